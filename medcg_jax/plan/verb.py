"""`medcg plan`: what a run needs on a machine that may be absent, from the run's programs compiled for it.

Whether the run fits, the bytes it moves, the known traps it falls into, and a bound on its speed. Nothing is executed:
times are bounds by published peaks (`roofline`), not measurements.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from medcg_jax.chips import Peak, peak_of, utilisation
from medcg_jax.config import RunConfig, model_title, replace
from medcg_jax.eval.features import GIB, frozen_parts
from medcg_jax.families import build, flops
from medcg_jax.mesh import islands, make_mesh
from medcg_jax.plan import exposures, hlo, roofline, rules, schedule, simulate, topology
from medcg_jax.plan.programs import (
    MARGIN,
    Compiled,
    PlannedRun,
    captured_stderr,
    compile_tests,
    compile_training,
    effort,
    eval_rows,
    fitting_cells,
    hears_compiler,
    plan_run,
    train_rows,
)

DOES_NOT_FIT = 3
# "total memory required for HLO temporaries (26.32G) exceeds available HBM (15.75G)", as libtpu writes it.
REFUSED = re.compile(r"\(([\d.]+)([KMGT])\)|([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", re.IGNORECASE)
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def plan(
    run: RunConfig,
    where: str,
    *,
    full_effort: bool = False,
    memory_bytes: float = 0.0,
    margin: float = MARGIN,
    grid: dict | None = None,
    price: float = 0.0,
    alone: bool = False,
) -> dict:
    """What the run needs on the topology `where`, with {"exit_status": 3} where it does not fit.

    full_effort: the compiler works as for a real run; else it does the least, which takes a fraction of the time and
      gives a program with other needs of memory.
    memory_bytes: of one device; 0: the known size. margin: the share of it that is left free.
    grid: {"samples", "steps", "test_rows"} of all trainings, for chip-hours. price: USD of a chip-hour.
    alone: as in `PlannedRun`.

    Raises:
      ConfigError: an unknown topology, its package is not installed, or the mesh does not divide the run.
    """
    devices = get_devices(where)
    mesh = make_mesh(run.mesh, devices)
    peak = peak_of(devices[0].device_kind)
    limit, memory_of = (memory_bytes, "") if memory_bytes else topology.limit_of(devices[0])
    usable = limit * (1 - margin)
    planned, here = plan_run(run, mesh, alone=alone), topology.about_here()
    result = {
        "date": here["date"],
        "versions": here["versions"],
        "topology": where,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "num_chips": math.ceil(len(devices) / (peak.devices_per_chip if peak else 1)),
        "mesh": dict(mesh.shape),
        "model": model_title(run.model.name, run.model.checkpoint),
        "trainable": list(run.model.trainable),
        "base_dtype": run.model.base_dtype,
        "remat": run.model.remat,
        "compute_dtype": run.model.compute_dtype,
        "batch_size": run.train.batch_size,
        "num_cells": planned.num_cells,
        "alone": alone,
        "full_effort": full_effort,
        "usable_bytes": usable,
        "memory_of": memory_of,
        "margin": margin,
        "peak": peak and dataclasses.asdict(peak),
        "whole_on_every_device": build.replicated(planned.setup.model, mesh),
    }
    with effort(full_effort):
        train = training(
            planned, compile_training(planned, run.train.batch_size, not full_effort), usable, peak, full_effort
        )
        tests = testing(planned, compile_tests(planned, not full_effort), usable, peak, full_effort)
        result |= {"train": train, "eval": tests, "fits": train["fits"] and tests["fits"]}
        if not train["fits"]:
            result["largest_batch"] = largest_batch(planned, usable)
    if grid:
        result["grid"] = grid | grid_costs(result, grid, price)
    if not result["fits"]:
        result["exit_status"] = DOES_NOT_FIT
    return result


def get_devices(where: str) -> list[jax.Device]:
    """`topology.get_devices`, with the compilers' output about this machine hidden."""
    with captured_stderr([]):  # libtpu warns that this machine has no TPU, XLA of a CPU's features
        return topology.get_devices(where)


# ------------------------------------------------------------------ one program


def training(
    planned: PlannedRun, compiled: Compiled, usable: float, peak: Peak | None, full_effort: bool = False
) -> dict:
    """What a training step needs, its FLOPs, its bound and simulated time, and findings of the rules."""
    run, mesh, setup = planned.run, planned.mesh, planned.setup
    state = device_bytes(planned.state())
    arrays = train_rows(setup).arrays
    length, targets = arrays["tokens"].shape[1], arrays["targets"].shape[1]
    rows = run.train.batch_size * planned.num_cells
    needed = flops.step(
        setup.model, [length] * rows, padded_length=length, num_images=1, num_logits=targets,
        trainable=run.model.trainable,
    )  # fmt: skip
    result = needs(compiled, 0 if planned.alone else start_bytes(planned), usable)
    result |= {"state_bytes": state, "rows": rows, "row_tokens": length, "flops": needed}
    if compiled.program is None:
        return result | {"findings": []}
    lengths = rules.lengths_of(planned, [length], rows // mesh.shape["cell"])
    text = read_text(compiled, needed, lengths, num_devices=mesh.size, remat=run.model.remat)
    findings = rules.donation_lost(result["alias_bytes"], state)
    findings += rules.involuntary_rematerialization(compiled.output)
    missed = [] if hears_compiler() else ["involuntary-rematerialization"]
    island_of = islands(list(mesh.devices.flat))
    if text.collectives is None:
        missed += ["full-all-reduce", "large-collective-in-loop", "gather-over-network"]
    else:
        layout = layout_of(planned)
        # At least effort no gather is a loop of permutes; for some meshes that is what a run's compiler makes of them.
        may_differ = not full_effort and mesh.devices.flat[0].device_kind.startswith("TPU")
        unless = "; --full_effort tells whether permutes beside products do it in a run" if may_differ else ""
        findings += rules.full_all_reduce(text.collectives, layout, unless)
        findings += rules.large_collective_in_loop(text.collectives, layout)
        findings += rules.gather_over_network(text.collectives, lambda c: roofline.crosses(c, island_of))
    result |= text.result | {
        "findings": [dataclasses.asdict(finding) for finding in findings + text.products.findings],
        "not_looked_for": missed + text.products.not_looked_for,
    }
    if peak is None:
        return result | {"bound": None}
    times = timed(planned, text, peak, needed["executed"], full_effort)
    used = utilisation(needed, times["bound"]["overlapped_s"], mesh.devices.flat[0].device_kind, mesh.size)
    return result | times | rates(times["bound"], rows, length) | used


def testing(
    planned: PlannedRun, compiled: Compiled, usable: float, peak: Peak | None, full_effort: bool = False
) -> dict:
    """What a batch of tests needs, its FLOPs, its bound and simulated time."""
    run, mesh, setup = planned.run, planned.mesh, planned.setup
    length, rows = eval_rows(setup).arrays["tokens"].shape[1], run.eval.batch_size
    num_new = run.eval.max_new_tokens if run.eval.generate else 1
    executed = flops.evaluation(setup.model, num_rows=rows, length=length, num_new=num_new)
    needed = {"full": executed, "executed": executed}
    result = needs(compiled, 0 if planned.alone else device_bytes(planned.state()) + feature_bytes(run), usable)
    result |= {"rows": rows, "row_tokens": length, "flops": needed, "num_new_tokens": num_new}
    if compiled.program is None:
        return result | {"findings": []}
    lengths = rules.lengths_of(planned, [length, length + num_new - 1], rows)
    # Generation stops when all rows have ended; the most steps are counted.
    text = read_text(compiled, needed, lengths, num_devices=mesh.size, remat="none", open_trips=max(num_new - 1, 1))
    result |= text.result | {
        "findings": [dataclasses.asdict(finding) for finding in text.products.findings],
        "not_looked_for": text.products.not_looked_for,
    }
    if peak is None:
        return result | {"bound": None}
    times = timed(planned, text, peak, executed, full_effort)
    return result | times | rates(times["bound"], rows, length)


def needs(compiled: Compiled, held: float, usable: float) -> dict:
    """Bytes of one device that a program needs, and whether it fits.

    held: bytes of arrays on the device that are no arguments of the program. peak_bytes: the compiler's peak, arguments
    included.
    """
    result = {"compile_s": round(compiled.seconds, 1), "compile_cpu_s": round(compiled.cpu_s, 1), "held_bytes": held}
    if compiled.program is None:
        sizes = [float(a or b) * UNITS[(c or d).upper()] for a, c, b, d in REFUSED.findall(compiled.refusal)]
        return result | {"fits": False, "refused": compiled.refusal[:400], "peak_bytes": max(sizes, default=None)}
    memory: Any = compiled.program.memory_analysis()
    peak = memory.peak_memory_in_bytes
    return result | {
        "fits": bool(peak) and peak + held <= usable,
        "refused": "",
        "peak_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


@dataclass(frozen=True)
class TextFacts:
    """What a program's text shows. collectives: None where they cannot be read; the reason is in `result`.

    steps: its schedule, or why that cannot be read.
    result: {"collectives": number and bytes by kind, "not_counted", "attention", "products"}.
    """

    collectives: list[hlo.Collective] | None
    products: rules.ProductCheck
    steps: tuple[schedule.Step, ...] | str
    result: dict


def read_text(
    compiled: Compiled, needed: dict, lengths: rules.Lengths, *, num_devices: int, remat: str,
    open_trips: int | None = None,
) -> TextFacts:  # fmt: skip
    """Reads the text of a compiled program; arguments as in `rules.check_products`."""
    text, executed, by_kind, attention, why = "", None, {}, None, ""
    try:
        text = compiled.text()
        attention = hlo.attention_in(text)
        executed = hlo.collectives(text, open_trips=open_trips)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        why = str(error) if text else f"the compiler cannot write the program as text: {error}"
    for collective in executed or ():
        if any(len(set(group)) > 1 for group in collective.groups):
            kind = by_kind.setdefault(collective.kind, {"count": 0, "bytes": 0})
            kind["count"] += collective.trips
            kind["bytes"] += collective.total_bytes
    try:
        steps: tuple[schedule.Step, ...] | str = schedule.read(text, open_trips=open_trips)
    except ValueError as error:
        steps = " ".join(str(error).split())[:300]
    products = rules.check_products(text, needed, lengths, num_devices=num_devices, remat=remat, open_trips=open_trips)
    result = {
        "collectives": None if executed is None else dict(sorted(by_kind.items(), key=lambda item: -item[1]["bytes"])),
        "not_counted": " ".join(why.split())[:300],
        "attention": attention,
        "products": products.about,
    }
    return TextFacts(executed, products, steps, result)


def timed(planned: PlannedRun, text: TextFacts, peak: Peak, executed_flops: float, full_effort: bool) -> dict:
    """{"bound", "schedule"} of a program. executed_flops: by formula, used where the program's own are not known.

    Where the schedule cannot be read, "schedule" is {"not_read": why} and the bound is of products and collectives alone.
    """
    devices = list(planned.mesh.devices.flat)
    island_of = islands(devices)
    try:
        if isinstance(text.steps, str):
            raise ValueError(text.steps)
        machine = simulate.Machine.published(peak, island_of)
        simulation = simulate.simulate(text.steps, machine)
    except ValueError as error:
        bound = roofline.bound(
            peak=peak, num_devices=len(devices), executed_flops=text.products.flops or executed_flops,
            sent_bytes=None if text.collectives is None else roofline.network_bytes(text.collectives, island_of),
            why=f"no schedule is simulated and bytes over memory are not known: {error}",
        )  # fmt: skip
        return {"bound": dataclasses.asdict(bound), "schedule": {"not_read": str(error)}}
    described = exposures.describe(
        simulation, layout_of(planned), device=devices[0].device_kind, full_effort=full_effort
    )
    return {"bound": dataclasses.asdict(simulation.bound()), "schedule": described}


def rates(bound: dict, rows: int, length: int) -> dict:
    """Rates at the bound, one after another, and by the schedule; None where that could not be read."""
    simulated = bound["simulated_s"]
    return {
        "samples_per_s": rows / bound["overlapped_s"],
        "samples_per_s_in_turn": rows / bound["in_turn_s"],
        "samples_per_s_simulated": rows / simulated if simulated else None,
        "tokens_per_s": rows * length / bound["overlapped_s"],
    }


# ------------------------------------------------------------------ sizes


def start_bytes(planned: PlannedRun) -> float:
    """Bytes on a device of one cell's trainable parameters in float32."""
    shardings = build.shardings(planned.setup.model, planned.mesh)
    trained = build.split_trainable(shardings, planned.run.model.trainable)[0]
    pairs = zip(jax.tree.leaves(planned.trainable), jax.tree.leaves(trained), strict=True)
    return 4 * sum(math.prod(sharding.shard_shape(x.shape)) for x, sharding in pairs)


def feature_bytes(run: RunConfig) -> float:
    """The most bytes of kept features of test images on a device."""
    return run.eval.features_gib * GIB if frozen_parts(run.model.trainable) else 0


def device_bytes(tree) -> float:
    """Bytes that arrays with shardings have on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _ungathered(sharding, mesh: Mesh) -> int:
    """Into how many shards an array is split once it is gathered over fsdp."""
    axes = {axis for entry in sharding.spec if entry for axis in ([entry] if isinstance(entry, str) else entry)}
    return math.prod(mesh.shape[axis] for axis in axes - {"fsdp"})


def layout_of(planned: PlannedRun) -> rules.Layout:
    """The `rules.Layout` of the run's parameters."""
    mesh, width = planned.mesh, jax.numpy.dtype(planned.run.model.compute_dtype).itemsize
    names = jax.tree.leaves(build.axis_names(planned.setup.model), is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(planned.params())
    whole, layers, single = 0.0, {}, 0.0
    for (path, x), axes in zip(leaves, names, strict=True):
        numbers, module = math.prod(x.shape) / _ungathered(x.sharding, mesh), path[0].key
        spec = str(x.sharding.spec)
        if module in planned.run.model.trainable and "'fsdp'" not in spec:
            whole += 4 * numbers
        if axes and axes[0] == "layer":
            layers[module, x.shape[0]] = layers.get((module, x.shape[0]), 0.0) + width * numbers / x.shape[0]
        else:
            single = max(single, width * numbers)
    each = planned.cells_each
    return rules.Layout(dict(mesh.shape), each * whole, each * max([single, *layers.values()]))


# ------------------------------------------------------------------ what would fit, and what it costs


def largest_batch(planned: PlannedRun, usable: float) -> int:
    """The largest batch below the run's that the mesh divides and whose step fits; 0 where none does."""
    run, mesh = planned.run, planned.mesh
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * run.train.accumulation_steps
    held = 0 if planned.alone else start_bytes(planned)
    most = run.train.batch_size - 1
    if most < unit or device_bytes(planned.state()) + held > usable:
        return 0

    def compile_rows(num_rows: int) -> jax.stages.Compiled:
        smaller = dataclasses.replace(planned.setup, run=replace(run, train__batch_size=num_rows))
        compiled = compile_training(dataclasses.replace(planned, setup=smaller), num_rows)
        if compiled.program is None:
            raise jax.errors.JaxRuntimeError(compiled.refusal)
        return compiled.program

    return fitting_cells(compile_rows, num_groups=unit, limit_bytes=usable - held, margin=0.0, most=most).num_cells


def grid_costs(result: dict, grid: dict, price: float) -> dict:
    """Chip-hours of a grid's trainings and tests at the bound; with a price of a chip-hour, the cost in USD."""
    train, tests = result["train"], result["eval"]
    if not train.get("bound") or not tests.get("bound"):
        return {"chip_hours": None}
    costs = {}
    for name, key in (("chip_hours", "overlapped_s"), ("chip_hours_in_turn", "in_turn_s")):
        seconds = grid["samples"] / train["rows"] * train["bound"][key]
        seconds += grid["test_rows"] / tests["rows"] * tests["bound"][key]
        costs[name] = seconds / 3600 * result["num_chips"]
    if price:
        costs |= {"usd": costs["chip_hours"] * price, "usd_in_turn": costs["chip_hours_in_turn"] * price}
    return costs
