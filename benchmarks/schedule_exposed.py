"""What the compiled step of LLaVA-1.5-7B waits for on machines that are not here, with and without an option of XLA.

    python -m benchmarks.schedule_exposed [--option=NAME=VALUE ...] [--label=WORD] [--json=FILE] [TOPOLOGY ...]

The meshes are those of `benchmarks.meshes`, unless `--mesh=DATAxFSDPxTENSOR` names one. Programs are compiled with the
compiler's full effort, as a run's; their schedules are simulated at published peaks, and nothing is executed.
`--option=NAME=` takes an option back that plan sets; `--option=xla_gpu_enable_pipelined_all_gather=false` is how to see what
a flag of `platform.py` does, `--sparse_cores` what `mesh.sparse_cores` does. A record keeps the rows of other labels and
topologies, each with its libtpu: compare within one. `--texts=FOLDER` keeps the programs' texts, and takes those that are
there instead of compiling.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import jax

from benchmarks.meshes import MESHES
from benchmarks.records import write_record
from medcg_jax import platform
from medcg_jax.chips import peak_of
from medcg_jax.config import ConfigError, MeshConfig, RunConfig, RunError, replace, xla_switches
from medcg_jax.config_file import load
from medcg_jax.mesh import islands, make_mesh
from medcg_jax.plan import exposures, schedule, topology
from medcg_jax.plan.programs import batch_of, compiled, effort, plan_run, train_rows
from medcg_jax.plan.simulate import Machine, simulate
from medcg_jax.plan.verb import layout_of

CONFIG = "configs/llava15_7b.py"
TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4", "v6e:8x8", "h100:8", "h100:8x8")


def parsed(options: list[str]) -> dict[str, str | bool | int | None]:
    """{"xla_a": True, "xla_b": 3, "xla_c": None} of ["xla_a=true", "xla_b=3", "xla_c="].

    Raises:
      ConfigError: no name or no "=".
    """
    for option in options:
        if not option.partition("=")[0] or "=" not in option:
            raise ConfigError(f"--option={option}: expected NAME=VALUE")
    pairs = dict(option.split("=", 1) for option in options)
    words: dict[str, bool | None] = {"true": True, "false": False, "": None}
    return {
        name: words[value] if value in words else int(value) if value.lstrip("-").isdecimal() else value
        for name, value in pairs.items()
    }


def parsed_mesh(text: str) -> MeshConfig | None:
    """MeshConfig(data=1, fsdp=8, tensor=2) of "1x8x2"; None of "".

    Raises:
      ConfigError: not three numbers.
    """
    if not text:
        return None
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise ConfigError(f"--mesh={text}: expected data x fsdp x tensor, as 1x8x2")
    data, fsdp, tensor = map(int, text.split("x"))
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def step_of(
    run: RunConfig, where: str, options: dict, text_file: Path | None = None, mesh: MeshConfig | None = None
) -> dict:
    """The simulated step of a topology, its bounds and waits, the compiler's peak and seconds. mesh: None: the row's.

    Raises:
      ConfigError, RunError: the topology or the step cannot be compiled for here.
      ValueError: the schedule cannot be read.
    """
    row = MESHES[where]
    run = replace(run, mesh=mesh or row.mesh, train__batch_size=row.batch_size)
    devices = topology.get_devices(where)
    planned = plan_run(run, make_mesh(run.mesh, devices), alone=True)
    mesh_devices = list(planned.mesh.devices.flat)
    result = {
        "topology": where,
        "mesh": dict(planned.mesh.shape),
        "batch_size": row.batch_size,
        "options": options,
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }
    if text_file and text_file.exists():
        # By whichever compiler wrote the text.
        text, absent = text_file.read_text(encoding="utf-8"), ("compile_cpu_s", "peak_bytes", "libtpu")
        result |= dict.fromkeys(absent)
    else:
        chosen = topology.compiler_options(mesh_devices[0], countable=False) | options
        chosen = {name: value for name, value in chosen.items() if value is not None}
        batch = batch_of(train_rows(planned.setup), row.batch_size)
        program = compiled(
            "the training step", chosen,
            lambda: planned.program.compile(planned.trainable, planned.frozen, batch, chosen)[1],
        )  # fmt: skip
        if program.program is None:
            raise RunError(f"{where}: {program.refusal}")
        text = program.text()
        result |= {
            "compile_cpu_s": round(program.cpu_s, 1),
            "peak_bytes": program.program.memory_analysis().peak_memory_in_bytes,
            "libtpu": topology.about_here()["versions"].get("libtpu"),
        }
        if text_file:
            text_file.write_text(text, encoding="utf-8")
    peak = peak_of(mesh_devices[0].device_kind)
    assert peak is not None  # of every topology of `MESHES`
    simulation = simulate(schedule.read(text), Machine.published(peak, islands(mesh_devices)))
    bound = simulation.bound()
    described = exposures.describe(simulation, layout_of(planned), device=mesh_devices[0].device_kind, full_effort=True)
    return result | {"overlapped_s": bound.overlapped_s, "in_turn_s": bound.in_turn_s} | described


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("topologies", nargs="*", metavar="TOPOLOGY", help=f"default: {' '.join(TOPOLOGIES)}")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of XLA; may be repeated")
    parser.add_argument("--label", default="plain", help="of the rows in the record (default: plain)")
    parser.add_argument("--sparse_cores", action="store_true", help="as --config.mesh.sparse_cores=true of a run")
    parser.add_argument("--mesh", default="", metavar="DATAxFSDPxTENSOR", help="of each topology")
    parser.add_argument("--texts", default="", metavar="FOLDER")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    unknown = [name for name in args.topologies if name not in MESHES]
    if unknown:
        print(f"{unknown[0]}: no mesh is recommended for it; expected one of {', '.join(MESHES)}", file=sys.stderr)
        return 2
    rows = json.loads(Path(args.json).read_text(encoding="utf-8"))["rows"] if os.path.exists(args.json) else []
    try:
        run, options, mesh = load(CONFIG, {}), parsed(args.option), parsed_mesh(args.mesh)
        platform.apply(xla_switches(replace(run, mesh__sparse_cores=args.sparse_cores)), "tpu")
        with effort(full=True):
            for where in args.topologies or TOPOLOGIES:
                name = f"{where.replace(':', '_')}_{args.label}.txt"
                text_file = Path(args.texts) / name if args.texts else None
                row = {"label": args.label} | step_of(run, where, options, text_file, mesh)
                print_row(row)
                rows = [r for r in rows if (r["label"], r["topology"]) != (row["label"], where)] + [row]
                write_record(args.json, {"config": CONFIG, "effort": "full", "rows": rows})
    except (ConfigError, RunError, ValueError, jax.errors.JaxRuntimeError) as error:
        print(" ".join(str(error).split())[:500], file=sys.stderr)
        return 2
    return 0


def print_row(row: dict) -> None:
    kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in row["exposed_by_kind"].items() if seconds)
    print(
        f"{row['topology']:11}{row['label']:12}step {row['step_s'] * 1e3:7.1f} ms (bounds {row['overlapped_s'] * 1e3:.1f}, "
        f"{row['in_turn_s'] * 1e3:.1f}), computations {row['busy_s'] * 1e3:.1f}, waits {row['exposed_s'] * 1e3:.1f} of "
        f"{row['collectives_s'] * 1e3:.1f}: {kinds}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
