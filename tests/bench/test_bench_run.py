"""`medcg bench`: every stage at a tiny size, and that its ratios are of like with like."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from benchmarks import first_steps
from medcg_jax.bench import clock as bench_clock
from medcg_jax.bench import host as bench_host
from medcg_jax.bench import run as bench_run
from medcg_jax.bench import steps as bench
from medcg_jax.bench.clock import Spent
from medcg_jax.bench.rows import loader_rows, open_rows, question_rows, some_records, training_batch
from medcg_jax.cli import main
from medcg_jax.config import (
    MODELS,
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    RunError,
    TrainConfig,
    replace,
)
from medcg_jax.families.build import TINY

RUN = RunConfig(
    name="tiny",
    model=ModelConfig(scan_unroll=1),
    data=DataConfig(
        system_prompt="", max_text_tokens=26, max_target_tokens=2, train_records_per_subset=8,
        test_records_per_subset=8, subsets=("ct-brain-state", "mri-brain-stage"),
    ),
    train=TrainConfig(steps=4, batch_size=8),
    base=TrainConfig(steps=0, epochs=0),
    eval=EvalConfig(batch_size=8, max_new_tokens=2),
)  # fmt: skip


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
            port.flops, port.loss = bench.step_flops(port.config, batch, RUN.model.trainable)["full"], 0.0
            port.compiled = bench.Compiled(None, None, batch)
            return {"lower_s": 0.0, "compile_s": 0.0, "attention": "plain", "program_bytes": None, "peak_bytes": None}

        def seconds(port, steps):
            self.ported += steps * port.flops

        monkeypatch.setattr(bench.Port, "compile", compile_shapes)
        monkeypatch.setattr(bench.Port, "seconds", seconds)
        monkeypatch.setattr(bench_run, "memory", lambda compiled: {"peak_bytes": None})
        monkeypatch.setattr(bench_run, "loader_rows", lambda setup: {"decoded when drawn": None})
        monkeypatch.setattr(bench_host, "data_wait", lambda *args: {"share": 0.0, "step_s": 0.0, "steps": 0})

    def __call__(self) -> Spent:
        done = self.ported + self.counter.get_total_flops()
        return Spent(done, done)


@pytest.fixture
def measured(torch, monkeypatch):
    """() -> what `bench` finds of training, ratios in FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = open_rows(RUN)

    def run() -> dict:
        with FlopCounterMode(display=False) as counter, monkeypatch.context() as patches:
            measure = bench_run.Measure(2, 1, FlopClock(patches, counter), "cpu")
            return bench_run.training(rows, "torch", measure, {"flops_per_s": 1.0, "flops_per_cpu_s": 1.0})

    return run


def test_the_ratio_is_of_like_with_like(measured, monkeypatch):
    """By FLOPs in place of seconds: HF's over the model's; a reference that does half the work is refused, and where it
    is not looked at, the ratio is half as large."""
    from medcg_jax.bench import pytorch

    whole = measured()
    ratio, runners = whole["ratios"]["train_vs_eager"], whole["train"]["runners"]
    executed = runners["torch eager"]["executed_flops"]
    assert ratio["median"] == ratio["min"] == ratio["max"] == pytest.approx(executed / whole["train"]["flops"]["full"])
    assert ratio["median"] > 1.1  # the head at all positions, the tower's last layer
    assert whole["ratios"]["train_vs_compile"]["median"] == ratio["median"]

    real = pytorch.hf_inputs

    def half(config, batch):
        return {name: value[: len(value) // 2] for name, value in real(config, batch).items()}

    monkeypatch.setattr(pytorch, "hf_inputs", half)
    with pytest.raises(RunError, match="do not do the same work: rows 8 against 4, tokens"):
        measured()
    monkeypatch.setattr(bench_run, "check_alike", lambda port, reference: None)
    assert measured()["ratios"]["train_vs_eager"]["median"] == pytest.approx(ratio["median"] / 2)


def test_a_reference_that_trains_less_is_refused(torch, monkeypatch):
    from medcg_jax.bench import pytorch

    real = pytorch.Reference

    def without_projector(config, batch, train, model, **rest):
        return real(config, batch, train, replace(model, trainable=("decoder",)), **rest)

    monkeypatch.setattr(pytorch, "Reference", without_projector)
    with pytest.raises(RunError, match=r"trained \d+ against \d+"):
        bench_run.bench(RUN, stages=("train",), against="torch", repeats=1, steps_per_repeat=1, matrix_sizes=(8,))


@pytest.mark.parametrize(
    "trainable", [("projector", "decoder"), ("decoder",), ("projector",), ("vision", "projector", "decoder")]
)
def test_formulas_count_what_pytorch_counts(trainable, torch):
    """On the reference itself, and the batch that it is measured with: a training step, and a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from medcg_jax.bench import pytorch

    model = replace(RUN.model, trainable=trainable)
    config = bench.architecture(model)
    batch = bench.example_batch(config, batch_size=3, text_tokens=(12, 20), num_targets=4)
    reference = pytorch.Reference(config, batch, RUN.train, model)
    with FlopCounterMode(display=False) as counter:
        reference.seconds(1)
    length = config.num_image_tokens + 20
    assert counter.get_total_flops() == pytorch.executed(config, 3, length, trainable)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.model(**reference.inputs)
    assert counter.get_total_flops() == pytorch.executed(config, 3, length)


def test_hf_answers_the_same_questions(torch, monkeypatch):
    """Rows padded on either side are the same questions: the first generated token is the likeliest one of the forward
    pass; half of them are refused."""
    from medcg_jax.bench import pytorch

    rows = open_rows(RUN)
    encoded = question_rows(rows, pytorch.EVAL_BATCH)
    assert len(encoded) == 32 and len({record.subset for record in encoded.records.records}) == 2
    questions = encoded.rows(np.arange(32))[0]
    asked = pytorch.Answers(rows.setup.model, [questions], RUN.model, num_new=2)
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

    def of_the_first(config, batches, model, **rest):
        return real(config, [{key: value[:8] for key, value in batches[0].items()}], model, **rest)

    monkeypatch.setattr(pytorch, "Answers", of_the_first)
    with pytest.raises(RunError, match="rows 32 against 8"):
        bench_run.bench(RUN, stages=("eval",), against="torch", repeats=1, steps_per_repeat=1)


def test_every_stage_here_is_measured_printed_and_written(request, capsys):
    against = "torch" if importlib.util.find_spec("torch") else ""
    if against:
        request.getfixturevalue("torch")
    found = bench_run.bench(
        RUN, stages=("train", "eval", "generate", "loader", "convert"), against=against, repeats=2, steps_per_repeat=1,
        matrix_sizes=(64,),
    )  # fmt: skip
    found = json.loads(json.dumps(found))
    train, answers = found["train"], found["answers"]
    port = train["runners"]["port"]
    assert 0 < port["step_s"]["min"] <= port["step_s"]["median"] <= port["step_s"]["max"] and port["step_s"]["n"] == 2
    assert port["samples_per_cpu_s"] == pytest.approx(8 / port["cpu_s"]["median"])
    assert port["mfu"] is None and port["mfu_matrix_causal"] < port["mfu_matrix"]
    assert port["mfu_matrix"] == pytest.approx(
        train["flops"]["full"] / port["step_s"]["median"] / found["matrix"]["flops_per_s"]
    )
    assert 0 <= train["data_wait"]["share"] < 1 and train["compile"]["program_bytes"] > 0
    assert answers["rows"] == 32
    assert found["loader"]["decoded when drawn"]["batches_per_s"] > 0
    assert found["convert"]["model"] == "llava15_tiny" and found["convert"]["to_hf"]["n"] == 2
    printed = capsys.readouterr().out
    for text in ("model FLOPs", "causal", "waiting for data", "no peak is published", "HF to Orbax", "memory in use"):
        assert text in printed
    if not against:
        assert found["ratios"] == {}
        return
    assert set(found["ratios"]) == {
        "train_vs_eager", "train_vs_compile", "eval_vs_generate", "eval_vs_forward", "generate_vs_generate"
    }  # fmt: skip
    assert answers["torch_generated_tokens"] == 2
    assert "train_vs_compile" in printed and "2 new tokens of every row" in printed
    for name, ours, theirs, runners in (
        ("train_vs_eager", "port", "torch eager", train["runners"]),
        ("eval_vs_generate", "port letters", "torch generate", answers["runners"]),
    ):
        ratio = found["ratios"][name]
        medians = runners[theirs]["cpu_s"]["median"] / runners[ours]["cpu_s"]["median"]
        assert ratio["by"] == "cpu" and ratio["min"] * 0.5 < medians < ratio["max"] * 2
        assert ratio["min"] <= ratio["median"] <= ratio["max"]


@pytest.mark.parametrize("model", sorted(set(TINY) - {"llava15_bench", "next_chat_tiny_sam"}))
def test_every_family_has_rows_and_flops(model):
    rows = open_rows(replace(RUN, model__name=model, data__max_text_tokens=40))
    batch = training_batch(rows)
    encoded = question_rows(rows, 8)
    assert len(batch["tokens"]) == 8 and len(encoded) == 32
    needed = bench.step_flops(rows.setup.model, batch, RUN.model.trainable)
    assert 0 < needed["causal"] < needed["full"] <= needed["executed"]
    letters, generated = (bench_run.needed_flops(rows.setup, encoded, num_new=number) for number in (0, 2))
    assert 0 < letters < generated
    if MODELS[model] != "llava":
        with pytest.raises(ConfigError, match=f"model.name={model}: LLaVA alone is accepted"):
            bench_run.bench(replace(RUN, model__name=model), against="torch")


def test_boxes_are_trained_with_their_loss():
    run = replace(RUN, model__name="next_chat_tiny", data__max_text_tokens=40, data__max_target_tokens=20,
                  data__subsets=("ct-brain-det",))  # fmt: skip
    rows = open_rows(run)
    batch = training_batch(rows)
    assert "at_positions" in batch or any(key.startswith("at_") for key in batch)
    # Letters are asked for nevertheless.
    assert {r.subset.endswith("-det") for r in question_rows(rows, 8).records.records} == {False}


def test_records_that_cannot_be_opened_have_a_stand_in(tmp_path):
    run = replace(RUN, data__source="release", data__root=str(tmp_path / "none"), data__subsets=())
    rows = open_rows(run)
    assert "cannot be opened" in rows.note and str(tmp_path) in rows.note
    lengths = training_batch(rows)["segment_ids"].sum(axis=1) - rows.setup.model.num_image_tokens
    assert lengths.max() == 26 and lengths.min() >= 13
    with pytest.raises(ConfigError, match="cannot be split"):
        open_rows(replace(RUN, train__batch_size=6))
    own = open_rows(RUN).setup
    sets = loader_rows(own)
    assert sets["decoded before"].images is not None and sets["decoded when drawn"].images is None
    few = some_records(own, "train", 40)
    assert len(few) == 40 and len({record.id for record in few.records}) == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages=train,evel"], "stages=evel: train, eval, generate, loader, convert, startup are accepted"),
        (["--against=tensorflow"], "invalid choice: 'tensorflow'"),
        (["--against=torch", "--config.model.name=qwen2_vl_tiny"], "model.name=qwen2_vl_tiny: LLaVA alone is accepted"),
        (["--against=torch", "--stages=loader"], "train, eval or generate is needed"),
        (["--stages=train", "--config.train.batch_size=12"], "cannot be split over data x fsdp = 8"),
    ],
)
def test_wrong_use_is_one_line(flags, message, capfd):
    assert main(["bench", "--config=configs/bench_tiny.py", *flags]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


# --- time


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
    spent = bench_clock.turns(runners, 2, clock=lambda: Spent(*clock))
    assert calls[-4:] == [("a", 4), ("b", 1), ("a", 4), ("b", 1)] and len(calls) == 8
    assert spent["a"] == [Spent(0.25, 0.5), Spent(0.75, 0.5)] and spent["b"] == [Spent(100.0, 1.0), Spent(300.0, 1.0)]
    found = bench_clock.ratio(spent["a"], spent["b"], by="cpu")
    assert (found["median"], found["by"], found["wall"]["min"], found["wall"]["max"]) == (2.0, "cpu", 400.0, 400.0)
    assert bench_clock.ratio(spent["a"], spent["b"], by="wall")["median"] == 400.0
    half = [Spent(one.wall_s / 2, one.cpu_s / 2) for one in spent["b"]]
    assert bench_clock.ratio(spent["a"], half, by="cpu")["median"] == 1.0


def test_take_turns_gives_seconds_of_a_step():
    times = bench.take_turns({"a": lambda steps: None, "b": lambda steps: None}, repeats=3, steps=2)
    assert [len(times["a"]), len(times["b"])] == [3, 3] and min(*times["a"], *times["b"]) > 0


def test_the_matrix_s_rate_is_the_best_of_its_sizes():
    found = bench_clock.matrix_rate("float32", sizes=(32, 128), repeats=2)
    assert found["flops_per_s"] == max(row["flops_per_s"] for row in found["by_size"].values())
    assert found["flops_per_cpu_s"] > 0 and set(found["by_size"]) == {"32", "128"}


# --- start-up


def test_a_start_has_its_phases_in_order(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dataclasses.asdict(RUN)))
    marks = first_steps.first_step(path)
    assert list(marks) == ["imports", "data", "compiled", "first_step"]
    assert list(marks.values()) == sorted(marks.values())


def test_a_start_that_hangs_or_fails_is_told(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="stage startup: no first step within 0 s"):
        bench_host.startup(RUN, 0.01)
    wrong = replace(RUN, train__batch_size=6)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(RunError, match="stage startup: the process ended with 1: .*cannot be split"):
        bench_host.startup(wrong, 120.0)
