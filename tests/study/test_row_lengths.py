"""Rows of a grid's trainings: one length for all that share a program, that of the longest record of any."""

import json
from pathlib import Path

import pytest

from medcg_jax.config import replace
from medcg_jax.config_file import load
from medcg_jax.data.records import RecordSet
from medcg_jax.study.design.schedule import make_plan
from medcg_jax.study.run.jobs import SeedData
from medcg_jax.train.setup import open_setup

CONFIGS = Path(__file__).parents[2] / "configs"


def tiny(**changes):
    return replace(load(f"{CONFIGS / 'phantom.py'}:tiny", {}), eval__batch_size=8, **changes)


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
    path = tmp_path / "general.json"
    question = "Where is the lesion in this image? " * 6 + "\nA: no\nB: yes\nC: one\nD: two"
    path.write_text(json.dumps([
        {"id": i, "caption": "", "image": "", "Question": question, "Answer": "no", "Question-choice": question,
         "Answer-choice": "A", "data-no": ""} for i in range(99)
    ]))  # fmt: skip
    mixed = {"data__imagewikiqa_share": 0.5, "data__general_records": str(path)}
    found = []
    for changes in ({}, mixed):
        run = tiny(data__row_multiple=1, data__max_text_tokens=80, **changes)
        jobs = [job for job in make_plan(run).jobs if job.training]
        data = SeedData(open_setup(run, has_weights=True), jobs)
        found.append((widths(data, jobs[:1])[0], longest(data, jobs[0])))
    (plain, _), (width, longest_general) = found
    assert width >= longest_general > plain
