"""The stages of `medcg bench` at a tiny size, and that its ratios are of like with like."""

import importlib.util

import jax
import numpy as np
import pytest

from medcg_jax.bench import run as bench
from medcg_jax.bench import stages, steps, text
from medcg_jax.bench.clock import Spent, matrix_rate, ratio, turns
from medcg_jax.bench.rows import loader_rows, open_rows, question_rows, some_records, training_batch
from medcg_jax.bench.run import Ask
from medcg_jax.config import (
    MODELS,
    ConfigError,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    RunError,
    TrainConfig,
    replace,
)
from medcg_jax.families import build
from medcg_jax.mesh import make_mesh

RUN = RunConfig(
    name="tiny",
    model=ModelConfig(scan_unroll=1),
    data=DataConfig(
        system_prompt="", max_text_tokens=26, max_target_tokens=2, train_records_per_subset=8,
        test_records_per_subset=8, subsets=("ct-brain-state", "mri-brain-grade"),
    ),
    train=TrainConfig(steps=4, batch_size=8),
    base=TrainConfig(steps=0, epochs=0),
    eval=EvalConfig(batch_size=8, max_new_tokens=2),
)  # fmt: skip


CONFIG = steps.architecture(ModelConfig())


@pytest.fixture
def torch(monkeypatch):
    """PyTorch, with a `torch.compile` that changes nothing (a minute of compilation proves nothing here), and HF's
    model with attention as products that PyTorch's counter sees: a fused kernel for CPUs it counts as nothing."""
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from medcg_jax.bench import pytorch

    real = pytorch.new_model
    monkeypatch.setattr(pytorch, "new_model", lambda config, dtype, attention: real(config, dtype, "eager"))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    return torch


class FlopClock:
    """A clock whose seconds are FLOPs: PyTorch's by its own counter, the port's by our formulas, nothing is timed."""

    def __init__(self, monkeypatch, counter):
        self.counter, self.ported = counter, 0.0

        def compile_shapes(port, batch):
            port.flops, port.loss = steps.step_flops(port.config, batch, RUN.model.trainable)["full"], 0.0
            return {"lower_s": 0.0, "compile_s": 0.0, "attention": "plain", "program_bytes": None, "peak_bytes": None}

        def seconds(port, count):
            self.ported += count * port.flops

        monkeypatch.setattr(steps.Port, "compile", compile_shapes)
        monkeypatch.setattr(steps.Port, "seconds", seconds)
        monkeypatch.setattr(stages, "loader_rows", lambda setup: {"decoded when drawn": None})
        monkeypatch.setattr(stages, "data_wait", lambda *args: {"share": 0.0, "step_s": 0.0, "steps": 0})

    def __call__(self) -> Spent:
        done = self.ported + self.counter.get_total_flops()
        return Spent(done, done)


@pytest.fixture
def measured(torch, monkeypatch):
    """() -> what the stage finds of training, ratios in FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = open_rows(RUN)

    def run() -> dict:
        with FlopCounterMode(display=False) as counter, monkeypatch.context() as patches:
            measure = stages.Measure(2, 1, FlopClock(patches, counter))
            return stages.training(rows, "torch", measure, {"flops_per_s": 1.0, "flops_per_cpu_s": 1.0})

    return run


def test_the_ratio_is_of_like_with_like(measured, monkeypatch):
    """By FLOPs in place of seconds: HF's over the model's; a reference that does half the work is refused, and where it
    is not looked at, the ratio is half as large."""
    from medcg_jax.bench import pytorch

    whole = measured()
    ratio, runners = whole["ratios"]["train_vs_eager"], whole["runners"]
    executed = runners["torch eager"]["executed_flops"]
    assert ratio["median"] == ratio["min"] == ratio["max"] == pytest.approx(executed / whole["flops"]["full"])
    assert ratio["median"] > 1.1  # the head at all positions, the tower's last layer
    assert whole["ratios"]["train_vs_compile"]["median"] == ratio["median"]

    real = pytorch.training_inputs

    def half(config, batch):
        return {name: value[: len(value) // 2] for name, value in real(config, batch).items()}

    monkeypatch.setattr(pytorch, "training_inputs", half)
    with pytest.raises(RunError, match="do not do the same work: rows 8 against 4, tokens"):
        measured()
    monkeypatch.setattr(stages, "check_alike", lambda port, reference: None)
    assert measured()["ratios"]["train_vs_eager"]["median"] == pytest.approx(ratio["median"] / 2)


def stage_error(function: str, stages_asked: tuple[str, ...], tmp_path) -> str:
    ask = Ask(RUN, stages_asked, "torch", repeats=1, steps=1, matrix_sizes=(8,))
    assert bench.run_here(function, ask, tmp_path / "out.json") == 1
    return bench.read_json(tmp_path / "out.json")["error"]


def test_a_reference_that_trains_less_is_refused(torch, monkeypatch, tmp_path):
    from medcg_jax.bench import pytorch

    real = pytorch.Reference

    def without_projector(config, batch, train, model, **rest):
        return real(config, batch, train, replace(model, trainable=("decoder",)), **rest)

    monkeypatch.setattr(pytorch, "Reference", without_projector)
    assert "RunError: port and reference do not do the same work: trained" in stage_error("train", ("train",), tmp_path)


@pytest.mark.parametrize(
    "trainable", [("projector", "decoder"), ("decoder",), ("projector",), ("vision", "projector", "decoder")]
)
def test_formulas_count_what_pytorch_counts(trainable, torch):
    """On the reference itself, and the batch that it is measured with: a training step, and a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from medcg_jax.bench import pytorch

    model = replace(RUN.model, trainable=trainable)
    config = steps.architecture(model)
    batch = steps.example_batch(config, batch_size=3, text_tokens=(12, 20), num_targets=4)
    reference = pytorch.Reference(config, batch, RUN.train, model)
    with FlopCounterMode(display=False) as counter:
        reference.seconds(1)
    length = config.num_image_tokens + 20
    assert counter.get_total_flops() == pytorch.families.executed(config, 3, length, trainable)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.model(**reference.pieces[0])
    assert counter.get_total_flops() == pytorch.families.executed(config, 3, length)


@pytest.mark.long
def test_hf_answers_the_same_questions(torch, monkeypatch, tmp_path):
    """Rows padded on either side are the same questions: the first generated token is the likeliest one of the forward
    pass; half of them are refused."""
    from medcg_jax.bench import pytorch

    rows = open_rows(RUN)
    encoded = question_rows(rows)
    assert len(encoded) == 32 and len({record.subset for record in encoded.records.records}) == 2
    questions = encoded.rows(np.arange(32))[0]
    asked = pytorch.Answers(rows.setup.model, questions, RUN.model, num_new=2)
    # Of order 1, so that the likeliest token is no matter of rounding.
    with torch.no_grad():
        for weight in asked.model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    asked.forward(1)
    asked.generate(1)
    assert asked.logprobs.shape == (32, 4) and asked.generated.shape == (32, 2)
    likeliest = []
    for inputs, _, last, _ in asked.chunks:
        with torch.no_grad():
            likeliest += asked.model(**inputs).logits[torch.arange(len(last)), last].argmax(-1).tolist()
    assert asked.generated[:, 0].tolist() == likeliest and len(set(likeliest)) > 1

    real = pytorch.Answers

    def of_the_first(config, rows, model, **rest):
        return real(config, {key: value[:8] for key, value in rows.items()}, model, **rest)

    monkeypatch.setattr(pytorch, "Answers", of_the_first)
    assert "rows 32 against 8" in stage_error("answers", ("eval",), tmp_path)


def test_every_stage_here_is_measured_and_shown(request, tmp_path):
    """In this process, where a fixture spares the minute that torch.compile takes."""
    against = "torch" if importlib.util.find_spec("torch") else ""
    if against:
        request.getfixturevalue("torch")
    asked = ("train", "eval", "generate", "loader", "convert")
    ask = Ask(RUN, asked, against, repeats=2, steps=1, matrix_sizes=(64,), scratch=tmp_path)
    result = {"name": "tiny", "model": "llava15_tiny", "compute_dtype": "float32", "trainable": ["projector", "decoder"],
             "stages": {}, "ratios": {}, "notes": [], "memory": {}}  # fmt: skip
    for name in ("train", "answers", "loader", "convert"):
        assert bench.run_here(name, ask, tmp_path / f"{name}.json") == 0
        result = bench.merge(result, name, {"status": "done"}, bench.read_json(tmp_path / f"{name}.json"))
    train, answers = result["train"], result["answers"]
    port = train["runners"]["port"]
    assert 0 < port["step_s"]["min"] <= port["step_s"]["median"] <= port["step_s"]["max"] and port["step_s"]["n"] == 2
    assert port["samples_per_cpu_s"] == pytest.approx(8 / port["cpu_s"]["median"])
    assert port["mfu"] is None and port["mfu_matrix_causal"] < port["mfu_matrix"]
    assert port["mfu_matrix"] == pytest.approx(
        train["flops"]["full"] / port["step_s"]["median"] / train["matrix"]["flops_per_s"]
    )
    assert 0 <= train["data_wait"]["share"] < 1 and train["compile"]["program_bytes"] > 0
    assert answers["rows"] == 32 and result["memory"]["host_peak_bytes"] > 1e8
    assert result["loader"]["decoded when drawn"]["batches_per_s"] > 0
    assert result["convert"]["model"] == "llava15_tiny" and result["convert"]["to_hf"]["n"] == 2
    printed = text.text_of(result | {"conclusions": text.conclusions(result)})
    for words in ("model FLOPs", "causal", "waiting for data", "no peak is published", "HF to Orbax", "memory in use"):
        assert words in printed
    if not against:
        assert result["ratios"] == {}
        return
    assert set(result["ratios"]) == {
        "train_vs_eager", "train_vs_compile", "eval_vs_generate", "eval_vs_forward", "generate_vs_generate"
    }  # fmt: skip
    assert answers["torch_generated_tokens"] == 2
    assert "train_vs_compile" in printed and "2 new tokens of every row" in printed
    for name, ours, theirs, runners in (
        ("train_vs_eager", "port", "torch eager", train["runners"]),
        ("eval_vs_generate", "port letters", "torch generate", answers["runners"]),
    ):
        medians = runners[theirs]["cpu_s"]["median"] / runners[ours]["cpu_s"]["median"]
        found_ratio = result["ratios"][name]
        assert found_ratio["by"] == "cpu" and found_ratio["min"] * 0.5 < medians < found_ratio["max"] * 2
        assert found_ratio["min"] <= found_ratio["median"] <= found_ratio["max"]


@pytest.mark.long
def test_the_verb_runs_a_process_a_stage(tmp_path, capsys):
    result = bench.bench(RUN, stages=("startup", "loader"), repeats=1, steps=1)
    assert list(result["stages"]) == ["startup", "loader"] and result["mesh"]["data"] * result["mesh"]["fsdp"] == 8
    for start in (result["startup"][name] for name in ("cold", "warm")):
        phases = [start[name] for name in ("imports", "data", "compiled", "first_step")]
        assert phases == sorted(phases) and phases[0] > 0 and start["cpu_s"] > 0
    assert "start of a process" in capsys.readouterr().out


@pytest.mark.parametrize("model", sorted(name for name in build.TINY if name.endswith("_tiny")))
def test_every_family_has_rows_and_flops(model):
    rows = open_rows(replace(RUN, model__name=model, data__max_text_tokens=40))
    batch = training_batch(rows)
    encoded = question_rows(rows)
    assert len(batch["tokens"]) == 8 and len(encoded) == 32
    needed = steps.step_flops(rows.setup.model, batch, RUN.model.trainable)
    assert 0 < needed["causal"] < needed["full"] <= needed["executed"]
    letters, generated = (stages.needed_flops(rows.setup, encoded, num_new=number) for number in (0, 2))
    assert 0 < letters < generated
    if MODELS[model] != "llava":
        with pytest.raises(ConfigError, match=f"letters with model.name={model}: expected a LLaVA"):
            bench.bench(replace(RUN, model__name=model), stages=("letters",))


def test_boxes_are_trained_with_their_loss():
    run = replace(RUN, model__name="next_chat_tiny", data__max_text_tokens=40, data__max_target_tokens=20,
                  data__subsets=("ct-brain-det",))  # fmt: skip
    rows = open_rows(run)
    batch = training_batch(rows)
    assert "at_positions" in batch or any(key.startswith("at_") for key in batch)
    # Letters are asked for nevertheless.
    assert {r.subset.endswith("-det") for r in question_rows(rows).records.records} == {False}


def test_records_that_cannot_be_opened_have_a_stand_in(tmp_path):
    run = replace(RUN, data__source="release", data__root=str(tmp_path / "none"), data__subsets=())
    rows = open_rows(run)
    assert "cannot be opened" in rows.note and str(tmp_path) in rows.note
    lengths = training_batch(rows)["segment_ids"].sum(axis=1) - rows.setup.model.num_image_tokens
    assert lengths.max() == 26 and lengths.min() >= 13
    with pytest.raises(ConfigError, match="cannot be split"):
        open_rows(replace(RUN, train__batch_size=6))
    setup = open_rows(RUN).setup
    sets = loader_rows(setup)
    assert sets["decoded before"].images is not None and sets["decoded when drawn"].images is None
    few = some_records(setup, "train", 40)
    assert len(few) == 40 and len({record.id for record in few.records}) == 16


# ------------------------------------------------------------------ time


def test_turns_alternate_and_ratios_are_of_pairs():
    clock, calls = [0.0, 0.0], []

    def runner(name, wall, cpu):
        def run(steps):
            calls.append((name, steps))
            slow = 3.0 if len(calls) > 6 else 1.0  # another process comes, after the first pair
            clock[0] += slow * wall * steps
            clock[1] += cpu * steps

        return run

    runners = {"a": runner("a", 0.25, 0.5), "b": runner("b", 100.0, 1.0)}
    spent = turns(runners, 2, clock=lambda: Spent(*clock))
    assert calls[-4:] == [("a", 4), ("b", 1), ("a", 4), ("b", 1)] and len(calls) == 8
    assert spent["a"] == [Spent(0.25, 0.5), Spent(0.75, 0.5)] and spent["b"] == [Spent(100.0, 1.0), Spent(300.0, 1.0)]
    ratios = ratio(spent["a"], spent["b"], by="cpu")
    assert (ratios["median"], ratios["by"], ratios["wall"]["min"], ratios["wall"]["max"]) == (2.0, "cpu", 400.0, 400.0)
    assert ratio(spent["a"], spent["b"], by="wall")["median"] == 400.0
    half = [Spent(taken.wall_s / 2, taken.cpu_s / 2) for taken in spent["b"]]
    assert ratio(spent["a"], half, by="cpu")["median"] == 1.0


def test_the_matrix_s_rate_is_the_best_of_its_sizes():
    rate = matrix_rate("float32", sizes=(32, (128, 64, 32)), repeats=2)
    assert rate["flops_per_s"] == max(row["flops_per_s"] for row in rate["by_size"].values())
    assert rate["flops_per_cpu_s"] > 0 and set(rate["by_size"]) == {"32", "128x64x32"}


# ------------------------------------------------------------------ start-up


def test_a_start_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "run_stage", lambda *args, **rest: ("stopped at its limit of 1 s", 1.0))
    assert bench.run_here("startup", Ask(RUN, scratch=tmp_path), tmp_path / "out.json") == 1
    assert "no first step: stopped at its limit" in bench.read_json(tmp_path / "out.json")["error"]


# ------------------------------------------------------------------ the step


def test_a_batch_has_the_pipeline_s_shapes_and_supervises_real_tokens():
    batch = steps.example_batch(CONFIG, batch_size=16, text_tokens=(12, 24), num_targets=4)
    num_image = CONFIG.num_image_tokens
    assert batch["tokens"].shape == batch["segment_ids"].shape == (16, num_image + 24)
    assert batch["pixels"].shape == (16, 1, 32, 32, 3) and batch["pixels"].dtype == np.uint8
    assert (batch["tokens"] == CONFIG.image_token_id).sum(axis=1).tolist() == [num_image] * 16
    lengths = batch["segment_ids"].sum(axis=1)
    assert lengths.min() >= num_image + 12 and lengths.max() == num_image + 24 and len(set(lengths)) > 1
    following = np.take_along_axis(batch["tokens"], batch["target_positions"] + 1, axis=1)
    assert (following == batch["targets"]).all() and (batch["target_weights"] == 1).all()
    assert (batch["target_positions"].max(axis=1) + 1 < lengths).all() and batch["target_positions"].min() >= num_image
    assert (np.diff(batch["segment_ids"], axis=1) <= 0).all()


def test_the_reference_s_step_trains_what_the_port_s_does():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medcg_jax.bench.pytorch import Reference, training_inputs
    from medcg_jax.families.build import abstract, num_params, split_trainable

    batch = steps.example_batch(CONFIG, batch_size=4, text_tokens=(12, 24), num_targets=4)
    reference = Reference(CONFIG, batch, TrainConfig(learning_rate=1e-2), ModelConfig())
    trainable, _ = split_trainable(abstract(CONFIG)[1], ModelConfig().trainable)
    assert sum(weight.numel() for weight in reference.weights) == num_params(trainable)
    assert (training_inputs(CONFIG, batch)["labels"] != -100).sum() == 16
    before = reference.weights[0].detach().clone()
    reference.seconds(1)
    assert not torch.equal(before, reference.weights[0])


@pytest.mark.long
def test_every_step_of_the_port_changes_its_weights():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    port = steps.Port(steps.architecture(RUN.model), mesh, TrainConfig(learning_rate=1e-2), RUN.model)
    port.compile(steps.example_batch(CONFIG, batch_size=4, text_tokens=(12, 24), num_targets=4))
    port.seconds(1)
    first = port.loss
    port.seconds(6)
    assert int(port.state.step) == 7 and port.loss != first and np.isfinite(port.loss)
