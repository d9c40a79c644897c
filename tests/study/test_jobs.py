"""What jobs are trained on: rows of one length, general records in every training and no test; and the base of adapters."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from medcg_jax.cli import main
from medcg_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, parts_of, replace
from medcg_jax.config_checks import check
from medcg_jax.config_file import load
from medcg_jax.data.controls import BLANK
from medcg_jax.data.records import DataError, RecordSet
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design.schedule import make_plan, seeded
from medcg_jax.study.run.bases import base_model, base_path, base_recipe
from medcg_jax.study.run.grid import data_fingerprint, write_config
from medcg_jax.study.run.jobs import SeedData, Trainer
from medcg_jax.train.setup import open_setup

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = ("llava15_tiny", "qwen2_vl_tiny", "llama32_vision_tiny", "minigpt_v2_tiny", "next_chat_tiny")
PARTS = (("ct-brain-state", 16), ("mri-brain-grade", 8))
QUESTION = "Which?\nA: no\nB: yes\nC: one\nD: two"


def tiny(**changes):
    return replace(load(f"{CONFIGS / 'phantom.py'}:tiny", {}), eval__batch_size=8, **changes)


def with_general(share: float, path="", **changes):
    # General questions have four options, and are longer than those of phantoms.
    data = {"data__imagewikiqa_share": share, "data__general_records": str(path), "data__max_text_tokens": 40}
    return tiny(**data | changes)


def general_text(count: int, question: str = QUESTION) -> str:
    names = ("no", "yes", "one", "two")
    raws = [
        {"id": i, "caption": "", "image": "", "Question": "Which?", "Answer": names[i % 4],
         "Question-choice": question, "Answer-choice": "ABCD"[i % 4], "data-no": ""}
        for i in range(count)
    ]  # fmt: skip
    return json.dumps(raws)


def general_file(folder: Path, count: int, question: str = QUESTION) -> Path:
    (folder / "general.json").write_text(general_text(count, question))
    return folder / "general.json"


@pytest.fixture
def path(tmp_path):
    return general_file(tmp_path, 30)


# ------------------------------------------------------------------ rows of one length


def longest(data: SeedData, job) -> int:
    return int(data.training(job.training).arrays["length"].max())


def widths(data: SeedData, jobs) -> list[int]:
    return [data.training(job.training).arrays["tokens"].shape[1] for job in jobs]


def lengthened(setup, subset: str):
    """The setup's source with a longer question in one subset."""
    found = setup.source.records(subset, "train")
    records = [replace(r, turns=tuple(replace(t, question=f"{t.question} {'what ' * 3}") for t in r.turns))
               for r in found.records]  # fmt: skip
    setup.source._made[subset, "train"] = RecordSet(records, found.images)


@pytest.mark.parametrize("multiple", [0, 1, 8, 64])
def test_all_trainings_have_rows_of_one_length(multiple):
    run = tiny(data__row_multiple=multiple, data__max_text_tokens=40)
    setup = open_setup(run, has_weights=True)
    jobs = [job for job in make_plan(run).jobs if job.training]
    # One training alone has a long question.
    names = [{name for name, _ in job.training} for job in jobs]
    own = min(names[0] - names[-1])
    lengthened(setup, own)
    data = SeedData(setup, jobs)
    lengths, most = [longest(data, job) for job in jobs], setup.model.num_image_tokens + 40
    assert len(set(lengths)) > 1
    wanted = min(most, -(-max(lengths) // multiple) * multiple) if multiple else most
    assert set(widths(data, jobs)) == {wanted}
    # Another order of jobs, as after a restart, and a process that does others: the same.
    assert set(widths(SeedData(setup, jobs[::-1]), jobs[-1:])) == {wanted}


def test_trainings_with_boxes_have_a_length_of_their_own():
    run = tiny(
        model__name="next_chat_tiny", data__row_multiple=4, data__max_text_tokens=40, data__max_box_text_tokens=98,
        data__max_box_target_tokens=78, study__tables=("pairs", "detection_pairs"), study__targets=(),
    )  # fmt: skip
    setup = open_setup(run, has_weights=True)
    jobs = [job for job in make_plan(run).jobs if job.training]
    data = SeedData(setup, jobs)
    by_kind = {kind: [job for job in jobs if job.has_boxes == kind] for kind in (False, True)}
    found = {}
    for kind, some in by_kind.items():
        assert some
        found[kind] = max(longest(data, job) for job in some)
        assert set(widths(data, some)) == {-(-found[kind] // 4) * 4}
    assert found[True] > found[False]


def test_general_records_count(tmp_path):
    question = "Where is the lesion in this image? " * 6 + "\nA: no\nB: yes\nC: one\nD: two"
    path = general_file(tmp_path, 99, question)
    lengths = []
    for share in (0.0, 0.5):
        run = with_general(share, path, data__row_multiple=1, data__max_text_tokens=80)
        jobs = [job for job in make_plan(run).jobs if job.training]
        data = SeedData(open_setup(run, has_weights=True), jobs)
        lengths.append((widths(data, jobs[:1])[0], longest(data, jobs[0])))
    (plain, _), (width, longest_general) = lengths
    assert width >= longest_general > plain


# ------------------------------------------------------------------ blank images, a member alone


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_without_images_has_the_same_rows_about_one_grey_image(name):
    run = tiny(model__name=name, data__max_text_tokens=40, data__max_target_tokens=8, data__row_multiple=1)
    run = replace(run, model__trainable=("projector", "decoder"))
    setup = open_setup(run, has_weights=True)
    jobs = [job for job in make_plan(run).jobs if job.training]
    blank = next(job for job in jobs if job.blank)
    data = SeedData(setup, jobs)
    plain, found = data.training(blank.training), data.training(blank.training, blank=True)
    assert [r.id for r in found.records.records] == [r.id for r in plain.records.records]
    for key in ("targets", "target_weights"):
        np.testing.assert_array_equal(found.arrays[key], plain.arrays[key])
    grey = setup.format.preprocess(BLANK)
    for key, images in found.images.items():
        assert (images == images[:1]).all(), key
        np.testing.assert_array_equal(images[0][tuple(slice(n) for n in grey[key].shape)], grey[key])
    assert any((images != images[:1]).any() for images in plain.images.values())
    # One program: rows are as long as the longest of both kinds needs.
    assert len({array.shape[1] for array in (plain.arrays["tokens"], found.arrays["tokens"])}) == 1
    # Its tests have their own images.
    test = data.test(blank.targets[0])
    assert any((images != images[:1]).any() for images in test.images.values())


def test_a_member_alone_has_as_many_records_as_the_pair_and_the_pair_those_it_always_had():
    run = tiny()
    setup = open_setup(run, has_weights=True)
    plan = make_plan(run)
    data = SeedData(setup, plan.jobs)
    by_arm = {cell.arm: job for job in plan.jobs for cell in job.cells if cell.table == "triples"}
    pair, single = data.taken(by_arm["trained"].training), data.taken(by_arm["single_1"].training)
    ((name, ids),) = single.items()
    assert len(ids) == sum(map(len, pair.values())) == 48 and pair[name] < ids
    assert pair[name] == {record.id for record in setup.source.records(name, "train").records}
    assert len(data.training(by_arm["single_1"].training)) == 48
    tests = {record.id for record in setup.source.records(name, "test").records}
    assert not ids & tests


def test_the_guard_sees_records_beyond_a_subsets_share(clean_tree, tmp_path):
    """An image of the target's test among the records that only the member alone is trained on."""
    tree = tmp_path / "tree"
    shutil.copytree(clean_tree, tree)
    run = tiny(data__source="release", data__root=str(tree), data__train_records_per_subset=2, data__max_text_tokens=40)
    run = replace(run, data__max_target_tokens=8, study__targets=("ct-liver-grade",), study__tables=("pairs",))
    setup = open_setup(run, has_weights=True)
    jobs = make_plan(run).jobs
    single = next(job for job in jobs if job.cells[0].arm == "single_1")
    ((name, _),) = single.training
    extra = SeedData(setup, jobs).taken(single.training)[name] - {
        record.id for record in setup.source.records(name, "train").records
    }
    spare = {record.id: record.image for record in ReleaseSource(tree, DataConfig()).records(name, "train").records}
    test = setup.source.records("ct-liver-grade", "test").records[0]
    shutil.copyfile(tree / test.image, tree / spare[min(extra)])
    data = SeedData(setup, jobs)
    with pytest.raises(DataError, match=f"{single.id}: .*{min(extra)}"):
        data.leaking(single, tmp_path / "w")
    trained = next(job for job in jobs if job.cells[0].arm == "trained" and name in dict(job.training))
    assert data.leaking(trained, tmp_path / "w") == frozenset()  # the pair never sees that record


# ------------------------------------------------------------------ tests of many cells


def test_tests_beyond_the_memory_are_encoded_once_and_decoded_when_drawn(monkeypatch):
    setup = open_setup(tiny(data__max_text_tokens=40), has_weights=True)
    names = [subset.name for subset in setup.source.subsets[:2]]
    wanted = [SeedData(setup).test(name) for name in names]
    size = sum(array.nbytes for array in wanted[0].images.values())
    monkeypatch.setattr("medcg_jax.study.run.jobs.MEMORY_LIMIT_BYTES", size)
    data = SeedData(setup)
    found = [data.test(name) for name in names]
    assert [test.images is None for test in found] == [False, True]
    assert all(data.test(name) is test for name, test in zip(names, found, strict=True))
    rows = np.array([2, 0])
    for test, expected in zip(found, wanted, strict=True):
        for key, array in expected.rows(rows)[0].items():
            np.testing.assert_array_equal(test.rows(rows)[0][key], array)


def test_another_seed_starts_without_the_features_of_the_last_one(tmp_path):
    """Its subsets have the same names and other images."""
    trainer, forgotten = Trainer(tiny(), tmp_path, None), []
    trainer._tester = SimpleNamespace(forget=lambda: forgotten.append(trainer._seed))
    trainer.setup(0)
    trainer.setup(0)
    trainer.setup(1)
    assert forgotten == [None, 0]


# ------------------------------------------------------------------ general records


def ids_of(run) -> list[str]:
    return [record.id for record in SeedData(open_setup(run, has_weights=True)).training(PARTS).records.records]


def test_a_cell_is_trained_on_its_share_of_them(path):
    plain, mixed = (SeedData(open_setup(with_general(share, path), has_weights=True)) for share in (0.0, 0.25))
    own, both = plain.training(PARTS), mixed.training(PARTS)
    assert (len(own), len(both)) == (24, 30)
    ids = [record.id for record in both.records.records]
    # Its own records are the same, in the same rows; the general ones stand behind them.
    assert ids[:24] == [record.id for record in own.records.records]
    assert all(name.startswith("general/") for name in ids[24:]) and len(set(ids[24:])) == 6
    for key, array in own.arrays.items():
        np.testing.assert_array_equal(array, both.arrays[key][:24])
    assert (both.arrays["target_weights"][24:].sum(1) > 0).all()
    assert ids == ids_of(with_general(0.25, path))
    test, same = (data.test("ct-brain-state") for data in (plain, mixed))
    assert test.records.records == same.records.records


def test_large_sets_are_mixed_too(path, monkeypatch):
    monkeypatch.setattr("medcg_jax.study.run.jobs.MEMORY_LIMIT_BYTES", 1)
    ids = ids_of(with_general(0.25, path))
    assert len(ids) == 30 and sum(name.startswith("general/") for name in ids) == 6


def test_steps_count_them(path):
    changes = {"train__epochs": 4.0, "train__steps": 0, "train__batch_size": 8}
    plans = [make_plan(with_general(share, path, **changes)) for share in (0.0, 0.5)]
    for before, after in zip(*(sorted(plan.jobs, key=lambda job: job.id) for plan in plans), strict=True):
        records = sum(count for _, count in before.training)
        assert (before.id, before.training) == (after.id, after.training)
        assert after.steps == -(-4 * (records + round(records / 2)) // 8) and before.steps == -(-4 * records // 8)


def test_a_grid_knows_of_them_and_of_too_few_before_it_trains(path, tmp_path):
    run = with_general(0.25, path)
    prints = {data_fingerprint(run), data_fingerprint(with_general(0.0))}
    path.write_text(general_text(31))
    assert len({*prints, data_fingerprint(run)}) == 3
    path.write_text(general_text(1))
    with pytest.raises(DataError, match="general.json' has 1 records; data.imagewikiqa_share=0.25 of"):
        write_config(run, tmp_path / "grid", make_plan(run))
    assert not (tmp_path / "grid").exists()


def test_medcg_train_mixes_them_and_refuses_in_one_line(path, tmp_path, capfd):
    argv = [
        "train", f"--config={CONFIGS / 'phantom.py'}:tiny", "--config.data.subsets=ct-brain-state",
        "--config.train.steps=2", "--config.train.batch_size=8", "--config.eval.batch_size=8",
        "--config.data.imagewikiqa_share=0.25", "--config.data.max_text_tokens=40",
    ]  # fmt: skip
    given, found = f"--config.data.general_records={path}", tmp_path / "found.json"
    assert main([*argv, given, f"--workdir={tmp_path / 'run'}", f"--json={found}"]) == 0
    assert json.loads(found.read_text())["records"] == 20
    for wrong, message in (
        ([], "data.general_records=''"),
        ([f"{given}x"], "data.general_records: general.jsonx: No such file"),
        ([given, "--config.data.imagewikiqa_share=2"], "data.imagewikiqa_share=2.0: expected 0 to below 1"),
    ):
        capfd.readouterr()
        assert main([*argv, *wrong, f"--workdir={tmp_path / 'other'}"]) == 2
        error = capfd.readouterr().err
        assert message in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------ adapters

ADAPTED = replace(RunConfig(), model__lora_rank=4, model__trainable=("projector", "lora"), base__steps=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(model__base_dtype="int4"), "model.base_dtype='int4': expected one of float32, bfloat16, int8, nf4"),
        (dict(model__lora_rank=-1), "model.lora_rank=-1: expected a finite number of at least 0"),
        (
            dict(model__lora_targets=("q", "head")),
            "model.lora_targets='head': expected one of q, k, v, out, gate, up, down",
        ),
        (dict(model__lora_targets=()), "expected one or more of q, k, v, out, gate, up, down"),
        (dict(model__lora_targets=("q", "q")), "once each"),
        (dict(model__trainable=("projector",)), 'adapters are trained by the part "lora"; expected 0 without it'),
        (dict(model__trainable=("decoder", "lora")), 'either "decoder" or "lora"'),
        (dict(model__lora_rank=0), "model.trainable='lora': expected one of vision, projector, decoder"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(changes, says):
    check(ADAPTED)
    with pytest.raises(ConfigError) as caught:
        check(replace(ADAPTED, **changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_is_the_same_whatever_is_trained_from_it(tmp_path):
    plain = replace(RunConfig(), base__steps=3)
    other = replace(ADAPTED, model__base_dtype="nf4")
    assert base_recipe(seeded(other, 0)) == base_recipe(seeded(plain, 0))
    # As before there were adapters.
    assert not {"lora_rank", "lora_alpha", "lora_targets", "base_dtype"} & set(base_recipe(plain)["model"])
    assert base_path(other, tmp_path / "a", 0) == base_path(plain, tmp_path / "b", 0)
    assert base_model(other.model) == dataclasses.replace(plain.model, trainable=("projector", "lora"))
    # MiniGPT-v2's adapters are in its base.
    own = replace(other, model__name="minigpt_v2_tiny")
    assert base_recipe(own)["model"]["lora_rank"] == 4 and base_model(own.model).base_dtype == "float32"
    assert base_path(replace(RunConfig(), base__steps=0), tmp_path / "b", 0) is None


def test_adapters_are_a_part_of_every_family_that_has_them():
    names = ("projector", "decoder", "lora")
    assert parts_of("llava", names) == ("projector", "decoder")
    assert parts_of("llava", names, lora_rank=8) == parts_of("minigpt_v2", names) == names
    assert ModelConfig().lora_rank == 0
