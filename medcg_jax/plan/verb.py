"""`medcg plan`: what a run needs on a machine that is not there, from its own programs compiled for it.

Whether it fits, what it moves, which known traps it falls into, and how fast it could be at most. Nothing is executed:
times are bounds by published peaks (`plan_roofline`), and no measurement.
"""

import dataclasses
import math
import re

import jax
from jax.sharding import Mesh

from medcg_jax.bench import steps as bench
from medcg_jax.chips import Peak, peak_of
from medcg_jax.config import RunConfig, replace
from medcg_jax.families import build
from medcg_jax.mesh import islands, make_mesh
from medcg_jax.plan import cells, flops, hlo, roofline, rules, topology
from medcg_jax.plan import products as plan_products
from medcg_jax.plan.programs import (
    Made,
    Subject,
    captured_stderr,
    compile_tests,
    compile_training,
    effort,
    eval_rows,
    hears_compiler,
    make_subject,
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
    margin: float = cells.MARGIN,
    grid: dict | None = None,
    price: float = 0.0,
    alone: bool = False,
) -> dict:
    """What the run needs on the topology `where`; {"exit_status": 3} is among it where it does not fit.

    full_effort: of the compiler; else it does as little as it can, which takes a fraction of the time, and needs other
      memory than the program of a real run.
    memory_bytes: of one device, in place of what is known of it. margin: part of it that is left free.
    grid: {"samples", "steps", "test_rows"} of all its trainings, for its chip-hours. price: USD of a chip-hour.
    alone: as of `Subject`.

    Raises:
      ConfigError: the topology is not known, its package is not installed, or the mesh does not divide the run.
    """
    devices = get_devices(where)
    mesh = make_mesh(run.mesh, devices)
    peak = peak_of(devices[0].device_kind)
    usable = (memory_bytes or topology.memory_bytes(devices[0])) * (1 - margin)
    subject = dataclasses.replace(make_subject(run, mesh), alone=alone)
    result = {
        **cells.about_compiling(),
        "topology": where,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "num_chips": math.ceil(len(devices) / (peak.devices_per_chip if peak else 1)),
        "mesh": dict(mesh.shape),
        "model": run.model.name,
        "trainable": list(run.model.trainable),
        "base_dtype": run.model.base_dtype,
        "remat": run.model.remat,
        "compute_dtype": run.model.compute_dtype,
        "batch_size": run.train.batch_size,
        "num_cells": subject.num_cells,
        "alone": alone,
        "full_effort": full_effort,
        "usable_bytes": usable,
        "margin": margin,
        "peak": peak and dataclasses.asdict(peak),
        "whole_on_every_device": build.replicated(subject.setup.model, mesh),
    }
    with effort(full_effort):
        train = training(subject, compile_training(subject, run.train.batch_size), usable, peak)
        tests = testing(subject, compile_tests(subject), usable, peak)
        result |= {"train": train, "eval": tests, "fits": train["fits"] and tests["fits"]}
        if not train["fits"]:
            result["largest_batch"] = largest_batch(subject, usable)
    if grid:
        result["grid"] = grid | grid_costs(result, grid, price)
    if not result["fits"]:
        result["exit_status"] = DOES_NOT_FIT
    return result


def get_devices(where: str) -> list[jax.Device]:
    """`topology.get_devices`, without what the compilers write about the machine here.

    Raises:
      ConfigError: as there.
    """
    with captured_stderr([]):  # libtpu complains of the machine that it is not on
        return topology.get_devices(where)


# ------------------------------------------------------------------ one program


def training(subject: Subject, made: Made, usable: float, peak: Peak | None) -> dict:
    """What a training step needs, its FLOPs, its bound, and the traps it falls into."""
    run, mesh, setup = subject.run, subject.mesh, subject.setup
    state = device_bytes(subject.state())
    found = needs(made, 0 if subject.alone else start_bytes(subject), usable) | {"state_bytes": state}
    arrays = train_rows(setup).arrays
    length, targets = arrays["tokens"].shape[1], arrays["targets"].shape[1]
    rows = run.train.batch_size * subject.num_cells
    needed = flops.step(
        setup.model, [length] * rows, padded_length=length, num_images=1, num_logits=targets,
        trainable=run.model.trainable,
    )  # fmt: skip
    found |= {"rows": rows, "row_tokens": length, "flops": needed}
    if made.compiled is None:
        return found | {"findings": []}
    read, found["collectives"], found["not_counted"], found["attention"], text = read_collectives(made, None)
    layout = layout_of(subject)
    findings = rules.donation_lost(found["alias_bytes"], state)
    findings += rules.involuntary_rematerialization(made.output)
    where = islands(list(mesh.devices.flat))
    if read is not None:
        findings += rules.full_all_reduce(read, layout)
        findings += rules.large_collective_in_loop(read, layout)
        findings += rules.gather_over_network(read, lambda one: roofline.crosses(one, where))
    products = plan_products.look(
        text, needed, plan_products.lengths_of(subject, [length], rows // mesh.shape["cell"]),
        num_devices=mesh.size, remat=run.model.remat,
    )  # fmt: skip
    found["products"], found["findings"] = products.about, _told(findings + products.findings)
    found["not_looked_for"] = [] if hears_compiler() else ["involuntary-rematerialization"]
    if read is None:
        found["not_looked_for"] += ["full-all-reduce", "large-collective-in-loop", "gather-over-network"]
    found["not_looked_for"] += products.not_looked_for
    if peak is None:
        return found | {"bound": None}
    passes = (3 if run.model.remat == "full" else 2) * run.train.accumulation_steps
    crossing_hbm = roofline.step_memory_bytes(
        state_bytes=state, grad_bytes=start_bytes(subject) * subject.cells_each,
        weight_bytes=gathered_bytes(subject) * subject.cells_each, temp_bytes=found["temp_bytes"], passes=passes,
        gathered=mesh.shape["fsdp"] > 1,
    )  # fmt: skip
    one = roofline.bound(
        peak=peak, num_devices=mesh.size, executed_flops=products.flops or needed["executed"],
        memory_bytes=crossing_hbm, sent_bytes=None if read is None else roofline.network_bytes(read, where),
    )  # fmt: skip
    used = flops.utilisation(needed, one.overlapped_s, mesh.devices.flat[0].device_kind, mesh.size)
    return found | {"bound": dataclasses.asdict(one), **rates(one, rows, length), **used}


def testing(subject: Subject, made: Made, usable: float, peak: Peak | None) -> dict:
    """What a batch of tests needs, its FLOPs and its bound."""
    run, mesh, setup = subject.run, subject.mesh, subject.setup
    found = needs(made, 0 if subject.alone else device_bytes(subject.state()), usable)
    length, rows = eval_rows(setup).arrays["tokens"].shape[1], run.eval.batch_size
    num_new = run.eval.max_new_tokens if run.eval.generate else 1
    executed = flops.evaluation(setup.model, num_rows=rows, length=length, num_new=num_new)
    needed = {"full": executed, "executed": executed}
    found |= {"rows": rows, "row_tokens": length, "flops": needed, "num_new_tokens": num_new}
    if made.compiled is None:
        return found | {"findings": []}
    # Generation stops when all rows have ended; what it takes at most is counted.
    trips = max(num_new - 1, 1)
    read, found["collectives"], found["not_counted"], found["attention"], text = read_collectives(made, trips)
    products = plan_products.look(
        text, needed, plan_products.lengths_of(subject, [length, length + num_new - 1], rows),
        num_devices=mesh.size, remat="none", open_trips=trips,
    )  # fmt: skip
    found["products"], found["findings"] = products.about, _told(products.findings)
    found["not_looked_for"] = products.not_looked_for
    if peak is None:
        return found | {"bound": None}
    weights = gathered_bytes(subject) * num_new * (2 if mesh.shape["fsdp"] > 1 else 1)
    one = roofline.bound(
        peak=peak, num_devices=mesh.size, executed_flops=products.flops or executed,
        memory_bytes=found["argument_bytes"] + weights + 2 * found["temp_bytes"],
        sent_bytes=None if read is None else roofline.network_bytes(read, islands(list(mesh.devices.flat))),
    )  # fmt: skip
    return found | {"bound": dataclasses.asdict(one), **rates(one, rows, length)}


def _told(findings: list[rules.Finding]) -> list[dict]:
    return [dataclasses.asdict(finding) for finding in findings]


def start_bytes(subject: Subject) -> float:
    """Bytes on a device of the trainable parameters of one cell in float32."""
    shardings = build.split_trainable(_shardings(subject), subject.run.model.trainable)[0]
    return 4 * device_numbers(subject.trainable, shardings)


def needs(made: Made, held: float, usable: float) -> dict:
    """Bytes of one device that a program needs, and whether it has them.

    peak_bytes: the most at any moment, arguments included, by the compiler's plan. held_bytes: of arrays that are no
    argument of it and are there meanwhile.
    """
    took = {"compile_s": round(made.seconds, 1), "compile_cpu_s": round(made.cpu_s, 1)}
    if made.compiled is None:
        sizes = [float(a or b) * UNITS[(c or d).upper()] for a, c, b, d in REFUSED.findall(made.refusal)]
        peak = max(sizes, default=None)
        return took | {"fits": False, "refused": made.refusal[:400], "peak_bytes": peak, "held_bytes": held}
    memory = made.compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    return took | {
        "fits": bool(peak) and peak + held <= usable,
        "refused": "",
        "peak_bytes": peak,
        "held_bytes": held,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def read_collectives(
    made: Made, open_trips: int | None
) -> tuple[list[hlo.Collective] | None, dict | None, str, str | None, str]:
    """(a program's collectives, their number and bytes by kind, why they could not be read, its attention, its text).

    open_trips: of loops that do not say how often they run.
    """
    try:
        with captured_stderr([]):  # where it fails libtpu writes a trace of its own stack
            text = topology.text_of(made.compiled, made.options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        why = f"the compiler cannot write the program as text: {' '.join(str(error).split())[:200]}"
        return None, None, why, None, ""
    attention = bench.attention_in(text)
    try:
        read = hlo.collectives(text, open_trips=open_trips)
    except ValueError as error:
        return None, None, str(error)[:300], attention, text
    by_kind: dict[str, dict] = {}
    for one in read:
        if any(len(set(group)) > 1 for group in one.groups):
            kind = by_kind.setdefault(one.kind, {"count": 0, "bytes": 0})
            kind["count"] += one.trips
            kind["bytes"] += one.total_bytes
    return read, dict(sorted(by_kind.items(), key=lambda item: -item[1]["bytes"])), "", attention, text


def rates(one: roofline.Bound, rows: int, length: int) -> dict:
    return {
        "samples_per_s": rows / one.overlapped_s,
        "samples_per_s_in_turn": rows / one.in_turn_s,
        "tokens_per_s": rows * length / one.overlapped_s,
    }


# ------------------------------------------------------------------ sizes


def _shardings(subject: Subject):
    return build.shardings(subject.setup.model, subject.mesh)


def device_bytes(tree) -> float:
    """Bytes that arrays with shardings have on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_numbers(shapes, shardings) -> int:
    """Numbers that arrays of these shapes have on one device."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(x.shape)) for x, sharding in pairs)


def _ungathered(sharding, mesh: Mesh) -> int:
    """Parts in which an array lies on the mesh when it is gathered over fsdp."""
    axes = {axis for part in sharding.spec if part for axis in ([part] if isinstance(part, str) else part)}
    return math.prod(mesh.shape[axis] for axis in axes - {"fsdp"})


def gathered_bytes(subject: Subject) -> float:
    """Bytes of all weights in the compute dtype as one device uses them: gathered over fsdp, split over tensor."""
    width = jax.numpy.dtype(subject.run.model.compute_dtype).itemsize
    pairs = zip(jax.tree.leaves(subject.params()), jax.tree.leaves(_shardings(subject)), strict=True)
    return sum(width * math.prod(x.shape) / _ungathered(sharding, subject.mesh) for x, sharding in pairs)


def layout_of(subject: Subject) -> rules.Layout:
    """What the rules know of the subject's parameters."""
    mesh, width = subject.mesh, jax.numpy.dtype(subject.run.model.compute_dtype).itemsize
    names = jax.tree.leaves(build.axis_names(subject.setup.model), is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(subject.params())
    whole, layers, single = 0.0, {}, 0.0
    for (path, x), axes in zip(leaves, names, strict=True):
        numbers, part = math.prod(x.shape) / _ungathered(x.sharding, mesh), path[0].key
        spec = str(x.sharding.spec)
        if part in subject.run.model.trainable and "'fsdp'" not in spec:
            whole += 4 * numbers
        if axes and axes[0] == "layer":
            layers[part, x.shape[0]] = layers.get((part, x.shape[0]), 0.0) + width * numbers / x.shape[0]
        else:
            single = max(single, width * numbers)
    each = subject.cells_each
    return rules.Layout(dict(mesh.shape), each * whole, each * max([single, *layers.values()]))


# ------------------------------------------------------------------ what would fit, and what it costs


def largest_batch(subject: Subject, usable: float) -> int:
    """The largest batch below the run's whose step fits, of those that the mesh divides; 0 where none does."""
    run, mesh = subject.run, subject.mesh
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * run.train.accumulation_steps
    held = 0 if subject.alone else start_bytes(subject)
    most = run.train.batch_size - 1
    if most < unit or device_bytes(subject.state()) + held > usable:
        return 0

    def compile_rows(num_rows: int) -> jax.stages.Compiled:
        smaller = dataclasses.replace(subject, setup=dataclasses.replace(
            subject.setup, run=replace(run, train__batch_size=num_rows)))  # fmt: skip
        made = compile_training(smaller, num_rows)
        if made.compiled is None:
            raise jax.errors.JaxRuntimeError(made.refusal)
        return made.compiled

    fit = cells.fitting_cells(compile_rows, num_groups=unit, limit_bytes=usable - held, margin=0.0, most=most)
    return fit.num_cells


def grid_costs(result: dict, grid: dict, price: float) -> dict:
    """Chip-hours of a grid at the bound, its trainings and tests; with a price of a chip-hour, the cost in USD."""
    train, tests = result["train"], result["eval"]
    if not train.get("bound") or not tests.get("bound"):
        return {"chip_hours": None}
    found = {}
    for name, key in (("chip_hours", "overlapped_s"), ("chip_hours_in_turn", "in_turn_s")):
        seconds = grid["samples"] / train["rows"] * train["bound"][key]
        seconds += grid["test_rows"] / tests["rows"] * tests["bound"][key]
        found[name] = seconds / 3600 * result["num_chips"]
    if price:
        found |= {"usd": found["chip_hours"] * price, "usd_in_turn": found["chip_hours_in_turn"] * price}
    return found
