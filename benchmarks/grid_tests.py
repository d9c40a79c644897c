"""What the tests of a grid compute, before and after features were kept and controls went on from the test's own rows.

    python -m benchmarks.grid_tests [--cells=10] [--json=FILE]

Before: for each cell, the test and each control as whole rows with images and free answers. Two parts:

- configs/phantom.py:study, run here: one target, tested by so many cells in turns of before and after, with random
  weights; FLOPs of matrix products of the compiled programs, and CPU-seconds. The answers are compared.
- configs/llava15_7b.py, compiled for its shapes and not run: real questions and the real tokenizer of the folder
  `../shared` beside the checkout; left out where that is absent. FLOPs, and seconds of one v5e chip at its published
  peaks: products at the peak rate, and for each token generated one by one the reading of the decoder's weights.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.records import write_record
from medcg_jax.chips import V5E
from medcg_jax.config import RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.data.controls import control_sets
from medcg_jax.data.encoding import Batch, Encoded, option_columns
from medcg_jax.data.eval_batches import batch_length, eval_rows, further_questions, text_length
from medcg_jax.eval.letters import make_evaluator, run_ahead
from medcg_jax.eval.predictions import predictions_of
from medcg_jax.eval.subsets import SubsetTest, Tester
from medcg_jax.families.build import abstract, num_bytes, shardings, split_trainable
from medcg_jax.plan.hlo_products import products
from medcg_jax.platform import keep_freed_memory
from medcg_jax.study.design.schedule import make_plan
from medcg_jax.train.setup import Setup, open_setup, start_params, with_small_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
SUBSET_7B = "04"
CONTROLS_7B = ((), ("shuffled_images",), ("shuffled_images", "text_only"))


class Counted:
    """A program that counts the FLOPs of its calls, and where `runs` is false makes zeros in place of running.

    generated: tokens that a loop of the program generates after the first; `steps` counts them.
    """

    def __init__(self, jitted: Callable, *, runs: bool, generated: int = 0):
        self._jitted, self._runs, self._generated = jitted, runs, generated
        self._known: dict[str, int] = {}
        self.flops = self.steps = 0

    def __call__(self, *args):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        key = str([(x.shape, x.dtype) for x in jax.tree.leaves(shapes)])
        if key not in self._known:
            # The same products, sooner: LLVM's optimisations are left out.
            text = self._jitted.lower(*shapes).compile({"xla_backend_optimization_level": 0}).as_text()
            self._known[key] = products(text, open_trips=self._generated).flops
        self.flops += self._known[key]
        self.steps += self._generated
        if self._runs:
            return self._jitted(*args)
        return jax.tree.map(self._fake, jax.eval_shape(self._jitted, *args))

    @staticmethod
    def _fake(x):
        """Zeros of what the host reads; a shape alone of what stays on the devices."""
        return np.zeros(x.shape, x.dtype) if x.ndim < 3 else x


class Shapes:
    """A store of features that are only counted: their shapes."""

    def __init__(self, name: str, encode: Counted):
        self.name, self._encode = name, encode
        self._kept: dict = {}

    def get(self, params, key, images: Callable) -> dict:
        if key not in self._kept:
            self._kept[key] = {self.name: self._encode(params, images())}
        return self._kept[key]


class Before:
    """Every set of questions as whole rows: images, prompts and free answers."""

    def __init__(self, setup: Setup, graphdef: nnx.GraphDef, *, runs: bool):
        config = setup.run.eval
        new = dict(eos_id=setup.tokenizer.eos_id, max_new_tokens=config.max_new_tokens, generate=config.generate)
        evaluator = make_evaluator(setup.mesh, graphdef, shardings(setup.model, setup.mesh), **new)
        self.program = Counted(evaluator.jitted, runs=runs, generated=max(evaluator.num_new - 1, 0))
        self._evaluator, self._setup = dataclasses.replace(evaluator, jitted=self.program), setup

    def __call__(self, params, test: SubsetTest) -> list[list]:
        """The predictions of the test and of each control."""
        answers = []
        for encoded in (test.encoded, *test.controls.values()):
            batches, order = rows_of(encoded, self._setup.run.eval.batch_size)
            outputs = run_ahead(lambda batch: self._evaluator(params, batch), batches)
            logprobs, tokens = (np.concatenate(x)[np.argsort(order)] for x in zip(*outputs, strict=True))
            answers.append(predictions_of(encoded, logprobs, tokens, self._setup.tokenizer))
        return answers

    @property
    def programs(self) -> list[Counted]:
        return [self.program]


def rows_of(encoded: Encoded, batch_size: int) -> tuple[Iterator[Batch], np.ndarray]:
    """(batches of whole rows with room for an image, the order of the records in them)."""
    lengths = encoded.arrays["length"]
    order = np.argsort([-batch_length(encoded, int(length)) for length in lengths], kind="stable")

    def batches():
        for start in range(0, len(order), batch_size):
            taken = order[start : start + batch_size]
            batch, _ = encoded.rows(np.resize(taken, batch_size) if len(taken) < batch_size else taken)
            cut = batch_length(encoded, int(lengths[taken].max()))
            yield batch | {key: batch[key][:, :cut] for key in ("tokens", "segment_ids")}

    # Padding rows come last: the order of the records is that of the first rows.
    return batches(), np.concatenate([order, np.arange(len(order), -(-len(order) // batch_size) * batch_size)])


class After:
    """The tester of a grid, with its programs counted."""

    def __init__(self, setup: Setup, graphdef: nnx.GraphDef, *, runs: bool):
        self._tester = tester = Tester(setup, graphdef, sees=True)
        new = max(setup.run.eval.max_new_tokens - 1, 0) if setup.run.eval.generate else 0
        self.encoder = tester._features._encode = Counted(tester._features._encode, runs=runs)
        if not runs:
            tester._features = Shapes(tester._features.name, self.encoder)
        plain, alone, followed = tester._evaluator, tester._letters_alone, tester._followed_evaluator
        plain, alone = (
            dataclasses.replace(evaluator, jitted=Counted(evaluator.jitted, runs=runs, generated=number))
            for evaluator, number in ((plain, new), (alone, 0))
        )
        followed = dataclasses.replace(
            followed, first=Counted(followed.first, runs=runs, generated=new), again=Counted(followed.again, runs=runs)
        )
        tester._evaluator, tester._letters_alone, tester._followed_evaluator = plain, alone, followed
        self.programs = [self.encoder, plain.jitted, alone.jitted, followed.first, followed.again]

    def __call__(self, params, test: SubsetTest) -> list[list]:
        [(plain, controls)] = self._tester.run(params, [test])
        return [plain, *controls.values()]

    def forget(self) -> None:
        self._tester.forget()


def total(programs: Iterable[Counted]) -> tuple[int, int]:
    """(FLOPs, decoding steps) so far."""
    programs = list(programs)
    return sum(p.flops for p in programs), sum(p.steps for p in programs)


def questions(setup: Setup, subset: str, controls: Sequence[str], **options: int) -> SubsetTest:
    """A subset's test as a grid asks it. options: `memory_limit_bytes` of the images."""
    records = setup.source.records(subset, "test")
    encoded, columns = setup.encode_eval(records, **options), option_columns(records)
    again = {}
    for name, asked in control_sets(records, controls, setup.run.data.seed).items():
        again[name] = setup.encode_eval(asked, columns=columns, memory_limit_bytes=0)
        if encoded.images is not None:  # before, images of the test were gathered and not decoded
            places = np.asarray(getattr(asked, "places", np.arange(len(asked))))
            kept = {key: array[places] for key, array in encoded.images.items()}
            if name == "text_only":
                kept = {key: np.zeros_like(array) for key, array in kept.items()}
            again[name] = dataclasses.replace(again[name], images=kept)
    return SubsetTest(encoded, again, subset)


def tests_by_cells(run: RunConfig) -> dict[str, int]:
    """Of one seed of a grid: target -> trainings that are tested on it, the base included."""
    plan = make_plan(run)
    counts: Counter[str] = Counter()
    for job in plan.jobs:
        if job.seed == run.study.seeds[0]:
            counts.update(job.targets)
    return dict(counts)


def run_phantoms(num_cells: int) -> dict:
    """The phantom study's tests of one target by `num_cells` cells: FLOPs, CPU-seconds, and whether answers agree."""
    run = with_small_tokenizer(load("configs/phantom.py:study", {}))
    setup = open_setup(run, has_weights=True)
    counts = tests_by_cells(run)
    target = max(counts, key=lambda name: counts[name])
    graphdef, params = start_params(setup, seed=0)
    trainable, frozen = split_trainable(params, run.model.trainable)
    test = questions(setup, target, run.eval.controls)
    before, after = (kind(setup, graphdef, runs=True) for kind in (Before, After))

    def cell(number: int):
        from medcg_jax.families.build import join

        return join(jax.tree.map(lambda w: w * (1 + 0.02 * number), trainable), frozen)

    for ask in (before, after):  # compiles
        ask(cell(0), test)
    after.forget()
    started = total(before.programs), total(after.programs)
    spent: dict[str, list[float]] = {"before": [], "after": []}
    same = {"plain_lines": 0, "plain_same": 0, "control_lines": 0, "control_same": 0, "control_letters_same": 0}
    most = 0.0
    for number in range(num_cells):
        params, answers = cell(number), []
        jax.block_until_ready(params)
        for name, ask in (("before", before), ("after", after)):
            began = time.process_time()
            answers.append(ask(params, test))
            spent[name].append(time.process_time() - began)
        for kind, (old, new) in enumerate(zip(*answers, strict=True)):
            word = "control" if kind else "plain"
            same[f"{word}_lines"] += len(old)
            same[f"{word}_same"] += sum(a.logprobs == b.logprobs for a, b in zip(old, new, strict=True))
            if kind:
                same["control_letters_same"] += sum(a.predicted == b.predicted for a, b in zip(old, new, strict=True))
            most = max(
                most, *(abs(x - y) for a, b in zip(old, new, strict=True) for x, y in zip(a.logprobs, b.logprobs))
            )
    flops = [total(kind.programs)[0] - start[0] for kind, start in zip((before, after), started, strict=True)]
    encoded = after.encoder.flops / 2  # the compiling call encoded as much
    return {
        "config": "configs/phantom.py:study", "controls": run.eval.controls, "target": target, "cells": num_cells,
        "questions": len(test.encoded), "flops": dict(zip(spent, flops, strict=True)), "flops_ratio": flops[0] / flops[1],
        "cpu_s": spent, "cpu_ratio": sum(spent["before"]) / sum(spent["after"]),
        "cpu_ratio_by_turn": sorted(a / b for a, b in zip(*spent.values(), strict=True)),
        "answers": same | {"largest_difference_nats": most},
        "grid": _grid(counts, len(run.study.seeds), flops[0] / num_cells, (flops[1] - encoded) / num_cells, encoded),
    }  # fmt: skip


def _grid(counts: dict[str, int], seeds: int, before: float, after: float, encoding: float) -> dict:
    """All tests of the grid's targets, from one target's FLOPs of a cell and of encoding."""
    tests = sum(counts.values()) * seeds
    flops = tests * before, tests * after + len(counts) * seeds * encoding
    return {
        "cells_of_a_target": {"least": min(counts.values()), "median": statistics.median(counts.values()),
                              "most": max(counts.values())},
        "tests": tests, "flops": {"before": flops[0], "after": flops[1]}, "flops_ratio": flops[0] / flops[1],
    }  # fmt: skip


def compile_7b(num_cells: int) -> list[dict]:
    """LLaVA-1.5-7B's tests of one subset by `num_cells` cells, for each of `CONTROLS_7B`: compiled, not run."""
    run = replace(
        load("configs/llava15_7b.py", {}),
        data__root=str(SHARED / "data" / "medmat-mini"), model__tokenizer=str(SHARED / "tokenizers" / "llava_hf"),
        model__scan_unroll=1, mesh__fsdp=1, model__checkpoint="", eval__features_gib=64.0,
    )  # fmt: skip
    tests_7b = []
    for controls in CONTROLS_7B:
        setup = open_setup(replace(run, eval__controls=controls), has_weights=True)
        graphdef, params = abstract(setup.model, param_dtype=jax.numpy.bfloat16)
        test = questions(setup, SUBSET_7B, controls, memory_limit_bytes=0)
        # Pixels play no part: nothing runs.
        test = dataclasses.replace(
            test,
            encoded=_without_pixels(test.encoded),
            controls={k: _without_pixels(x) for k, x in test.controls.items()},
        )
        before, after = (kind(setup, graphdef, runs=False) for kind in (Before, After))
        for _ in range(num_cells):
            for ask in (before, after):
                ask(params, test)
        counted = {"before": total(before.programs), "after": total(after.programs)}
        step_s = num_bytes(params["decoder"]) / V5E.memory_bytes_per_s
        seconds = {name: flops / V5E.bf16_flops_per_s + steps * step_s for name, (flops, steps) in counted.items()}
        tests_7b.append(
            {
                "config": "configs/llava15_7b.py", "controls": controls, "subset": SUBSET_7B, "cells": num_cells,
                "questions": len(test.encoded), "batch_size": run.eval.batch_size,
                "flops": {name: flops for name, (flops, _) in counted.items()},
                "decoding_steps": {name: steps for name, (_, steps) in counted.items()},
                "least_v5e_chip_s": seconds, "ratio": seconds["before"] / seconds["after"],
            }
        )  # fmt: skip
        print(f"7B, controls {controls or 'none'}: {tests_7b[-1]['ratio']:.2f} times less", flush=True)
    return [*tests_7b, {"controls": ("circular",), "decoder_tokens_of_a_row": orders(setup)}]


def orders(setup: Setup) -> dict[str, int]:
    """Tokens that the decoder computes for a row of a question in every order of its options.

    whole: rows by themselves. from_the_image: what precedes a question once. from_the_difference: and what two orders
    have in common, to the first option.
    """
    size, image = setup.run.eval.batch_size, setup.model.image_token_id
    test = questions(setup, SUBSET_7B, ("circular",), memory_limit_bytes=0)
    sets = [test.encoded, *test.controls.values()]
    drawn = next(eval_rows(test.encoded, size))
    is_image = drawn.batch["tokens"] == image
    start = int((is_image.shape[1] - is_image[:, ::-1].argmax(1)).max())
    asked = next(further_questions(test.encoded, sets[1:], size, image_token_id=image))
    longest = max(int(encoded.arrays["length"].max()) for encoded in sets)
    return {
        "orders": len(sets),
        "whole": len(sets) * drawn.batch["tokens"].shape[1],
        "from_the_image": start + len(sets) * text_length(test.encoded, longest - start),
        "from_the_difference": drawn.batch["tokens"].shape[1]
        + sum(rows_asked.batch["tokens"].shape[1] for rows_asked in asked),
    }


def _without_pixels(encoded: Encoded) -> Encoded:
    """The rows with images of zeros that take no memory."""
    blank = {key: np.broadcast_to(x, (len(encoded), *x.shape)) for key, x in encoded.format.blank.items()}
    return dataclasses.replace(encoded, images=blank)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    keep_freed_memory()
    figures = {"phantoms": run_phantoms(args.cells)}
    phantoms = figures["phantoms"]
    print(f"phantoms: FLOPs {phantoms['flops_ratio']:.2f} times less, CPU-seconds {phantoms['cpu_ratio']:.2f} times; "
          f"the whole grid's FLOPs {phantoms['grid']['flops_ratio']:.2f} times", flush=True)  # fmt: skip
    print(f"answers: {phantoms['answers']}")
    if SHARED.is_dir():
        figures["llava15_7b"] = compile_7b(args.cells)
    else:
        print(f"{SHARED} is absent: the 7B is left out")
    write_record(args.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
