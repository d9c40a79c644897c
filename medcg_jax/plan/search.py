"""`medcg plan --search`: meshes, remat policies and batch sizes for a machine, the likeliest compiled, ranked by speed.

Cheap estimates choose what to compile: the least memory of a step, and the time of its arithmetic and of the textbook's
collectives. Results come from compiled programs alone, and are ranked by the simulated time of their schedules.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from medcg_jax.chips import Peak, peak_of
from medcg_jax.config import REMAT, ConfigError, RunConfig, model_title, replace
from medcg_jax.families import build, flops
from medcg_jax.mesh import make_mesh
from medcg_jax.plan import topology
from medcg_jax.plan import verb as plan
from medcg_jax.plan.programs import MARGIN, PlannedRun, architecture_of, compile_training, effort, plan_run
from medcg_jax.plan.text import BOUND, wrapped

# Multiples of the run's batch size; a larger batch is another recipe, and `table` says so.
BATCHES = (1, 2, 4)


@dataclass(frozen=True)
class Candidate:
    """A run that may be worth compiling, with estimates of its least bytes on a device and its seconds a step."""

    run: RunConfig
    least_bytes: float
    seconds: float

    @property
    def seconds_per_sample(self) -> float:
        return self.seconds / self.run.train.batch_size


def search(
    run: RunConfig,
    where: str,
    *,
    most_compiles: int = 12,
    full_effort: bool = False,
    memory_bytes: float = 0.0,
    margin: float = MARGIN,
) -> dict:
    """{"ranked": rows that fit, most simulated samples/s a chip first, "refused": compiled rows that do not fit, ...}, with
    {"exit_status": 3} where nothing fits.

    most_compiles: most programs to compile. Other arguments as in `plan.plan`.

    Raises:
      ConfigError: the topology or its peaks are unknown, its package is not installed, or no mesh over it divides the
        run.
    """
    devices = plan.get_devices(where)
    peak = peak_of(devices[0].device_kind)
    if peak is None:
        raise ConfigError(f"topology={where}: no peaks of {devices[0].device_kind} are known, by which to rank")
    if most_compiles < 1:
        raise ConfigError(f"--compiles={most_compiles}: expected at least 1")
    usable = (memory_bytes or topology.limit_of(devices[0])[0]) * (1 - margin)
    possible = list(candidates(run, len(devices), peak))
    if not possible:
        raise ConfigError(
            f"topology={where}: no mesh of {len(devices)} devices divides a batch of {run.train.batch_size} rows or "
            f"{BATCHES[-1]} times as many; choose another train.batch_size"
        )
    likely = sorted((c for c in possible if c.least_bytes <= usable), key=lambda c: c.seconds_per_sample)
    rows: list[dict] = []
    num_undivided = 0
    with effort(full_effort):
        for candidate in likely:
            if len(rows) == most_compiles:
                break
            try:
                planned = plan_run(candidate.run, make_mesh(candidate.run.mesh, devices))
            except ConfigError:  # the mesh does not divide a size of the model
                num_undivided += 1
                continue
            rows.append(compiled(candidate, planned, usable, peak, full_effort))
            print(f"  {len(rows)} of at most {most_compiles}: {_name(rows[-1])}", flush=True)
    ranked = sorted((row for row in rows if row["fits"]), key=lambda row: -simulated_rate(row))
    here = topology.about_here()
    result = {
        "date": here["date"],
        "versions": here["versions"],
        "topology": where,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "model": model_title(run.model.name, run.model.checkpoint),
        "batch_size": run.train.batch_size,
        "full_effort": full_effort,
        "usable_bytes": usable,
        "num_candidates": len(possible),
        "num_too_large": len(possible) - len(likely),
        "num_undivided": num_undivided,
        "ranked": ranked,
        "refused": [row for row in rows if not row["fits"]],
    }
    return result | ({} if ranked else {"exit_status": plan.DOES_NOT_FIT})


def candidates(run: RunConfig, num_devices: int, peak: Peak) -> Iterator[Candidate]:
    """Every mesh, remat policy and batch size for `num_devices`, where the mesh divides the batch and the heads."""
    if num_devices % max(1, run.mesh.cell):
        raise ConfigError(f"mesh.cell={run.mesh.cell}: expected a divisor of {num_devices} devices")
    cell_devices = num_devices // max(1, run.mesh.cell)
    model = architecture_of(run.model)
    heads, params = model.text.num_heads, build.abstract(model)[1]
    trainable, frozen = build.split_trainable(params, run.model.trainable)
    sizes = build.num_params(trainable), build.num_params(frozen), build.num_bytes(frozen)
    for tensor in _divisors(cell_devices):
        if heads % tensor:
            continue
        for fsdp in _divisors(cell_devices // tensor):
            data = cell_devices // tensor // fsdp
            for times in BATCHES:
                batch = run.train.batch_size * times
                if batch % (data * fsdp * run.train.accumulation_steps):
                    continue
                # The batch size of tests changes no prediction: rounded up to what the mesh can split.
                tests = math.ceil(run.eval.batch_size / (data * fsdp)) * data * fsdp
                for remat in REMAT:
                    changed = replace(
                        run, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, train__batch_size=batch,
                        eval__batch_size=tests, model__remat=remat,
                    )  # fmt: skip
                    yield estimate(changed, peak, *sizes)


def estimate(run: RunConfig, peak: Peak, trainable: int, frozen: int, frozen_bytes: float) -> Candidate:
    """The run with the least bytes of its step on a device, and the textbook's seconds.

    trainable, frozen: numbers of parameters. frozen_bytes: of the frozen ones in their stored dtype.
    Bytes: float32 weights and moments, the weights that a fine-tune starts from, gradients, and what every decoder block
    saves for the backward pass (its input with full remat; also the results of its products with `dots`; also what lies
    between them without remat). Seconds: the sum of FLOPs at the peak, 2 gathers of all weights and 1 reduction over
    fsdp, a sum of the gradients' shards over data, and 4 sums of activations in every block over tensor.
    """
    model = architecture_of(run.model)
    mesh, text = run.mesh, model.text
    width = jax.numpy.dtype(run.model.compute_dtype).itemsize
    split = mesh.fsdp * mesh.tensor
    length = model.num_image_tokens + run.data.max_text_tokens
    rows = run.train.batch_size // run.train.accumulation_steps / (mesh.data * mesh.fsdp)
    inner = text.num_heads * text.head_dim + 2 * text.num_kv_heads * text.head_dim + 2 * text.mlp_dim
    saved = {"full": 0, "dots": inner / mesh.tensor + 2 * text.embed_dim}
    saved["none"] = saved["dots"] + inner / mesh.tensor + 2 * text.embed_dim
    block = rows * length * width
    activations = text.num_layers * block * (text.embed_dim + saved[run.model.remat])
    weights = width * (trainable + frozen) / mesh.tensor
    needed = flops.step(
        model, [length] * run.train.batch_size, padded_length=length, num_images=1,
        num_logits=run.data.max_target_tokens, trainable=run.model.trainable,
    )  # fmt: skip
    moved = 3 * weights * (mesh.fsdp - 1) / mesh.fsdp * run.train.accumulation_steps
    moved += 2 * 4 * trainable / split * (mesh.data - 1) / mesh.data
    moved += 4 * text.num_layers * 2 * (mesh.tensor - 1) / mesh.tensor * block * text.embed_dim
    seconds = needed["executed"] / (split * mesh.data) / peak.bf16_flops_per_s
    seconds += moved / (peak.link_bytes_per_s or math.inf)
    return Candidate(run, (5 * 4 * trainable + frozen_bytes) / split + activations, seconds)


def compiled(candidate: Candidate, planned: PlannedRun, usable: float, peak: Peak, full_effort: bool) -> dict:
    """A candidate's row of the table, from its compiled step."""
    run = candidate.run
    row = {
        "mesh": {axis: getattr(run.mesh, axis) for axis in ("data", "fsdp", "tensor")},
        "remat": run.model.remat,
        "batch_size": run.train.batch_size,
        "eval_batch_size": run.eval.batch_size,
        "estimated_bytes": candidate.least_bytes,
        "estimated_s": candidate.seconds,
    }
    step = plan.training(
        planned, compile_training(planned, run.train.batch_size, not full_effort), usable, peak, full_effort
    )
    copied = (
        "fits", "refused", "peak_bytes", "held_bytes", "collectives", "findings", "bound", "schedule", "mfu",
        "compile_cpu_s",
    )  # fmt: skip
    row |= {key: step[key] for key in copied if key in step}
    if "samples_per_s" not in step:
        return row
    chips = math.ceil(planned.mesh.size / peak.devices_per_chip)
    return row | {
        "samples_per_s_per_chip": step["samples_per_s"] / chips,
        "samples_per_s_per_chip_in_turn": step["samples_per_s_in_turn"] / chips,
        "samples_per_s_per_chip_simulated": step["samples_per_s_simulated"] and step["samples_per_s_simulated"] / chips,
    }


def simulated_rate(row: dict) -> float:
    """Samples/s a chip, by which rows are ranked: simulated; where the schedule could not be read, one after another."""
    return row["samples_per_s_per_chip_simulated"] or row["samples_per_s_per_chip_in_turn"]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _name(row: dict) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
    verdict = "fits" if row["fits"] else "does not fit"
    return f"mesh {mesh}, remat {row['remat']}, batch {row['batch_size']}: {verdict}"


def table(result: dict) -> str:
    """The result of `search` as text."""
    lines = [
        (
            f"{result['model']} on {result['topology']}: {result['num_devices']} x {result['device']}; "
            f"{result['num_candidates']} ways, {result['num_too_large']} surely too large, "
            f"{len(result['ranked']) + len(result['refused'])} compiled"
        ),
        "",
        (
            f"{'data x fsdp x tensor':>21}{'remat':>7}{'batch':>7}{'GiB of':>9}{result['usable_bytes'] / topology.GIB:6.1f}"
            f"{'samples/s a chip: simulated':>28}{'at most':>9}{'in turn':>9}{'MFU':>7}{'traps':>7}"
        ),
    ]
    for row in result["ranked"]:
        mesh = " x ".join(str(size) for size in row["mesh"].values())
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else ""
        needed = (row["peak_bytes"] + row["held_bytes"]) / topology.GIB
        simulated = row["samples_per_s_per_chip_simulated"]
        simulated = "not read" if simulated is None else f"{simulated:.2f}"
        lines.append(
            f"{mesh:>21}{row['remat']:>7}{row['batch_size']:>7}{needed:>15.2f}{simulated:>28}"
            f"{row['samples_per_s_per_chip']:>9.2f}{row['samples_per_s_per_chip_in_turn']:>9.2f}{mfu:>7}"
            f"{len(row['findings']):>7}"
        )
    if not result["ranked"]:
        lines.append("nothing that was compiled fits")
    else:
        best = result["ranked"][0]
        flags = {f"mesh.{axis}": size for axis, size in best["mesh"].items()}
        flags |= {"model.remat": best["remat"], "train.batch_size": best["batch_size"]}
        flags |= {"eval.batch_size": best["eval_batch_size"]}
        lines += ["", "the first: " + " ".join(f"--config.{key}={value}" for key, value in flags.items())]
        if best["batch_size"] != result["batch_size"]:
            lines.append(f"its batch is not the run's {result['batch_size']}: another recipe, with other scores")
    lines.append(BOUND)
    return "\n".join(line for text in lines for line in wrapped(text))
