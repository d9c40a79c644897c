"""How the device spends the time of a traced step, read from the trace alone.

    python -m medcg_jax.bench.trace_read WORKDIR/profile [--steps=N] [--json=FILE]

Reads a trace of `medcg train --profile_steps` or of jax.profiler: the newest of a folder, or one .xplane.pb. Needs jax,
but neither TensorBoard nor xprof.
"""

import argparse
import itertools
import json
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jax.profiler import ProfileData

from medcg_jax.data.records import DataError
from medcg_jax.files import write_whole
from medcg_jax.untrusted import FileError, read_bytes

# Kinds of operations by a pattern in the operation's name, kernel or category; the first match counts.
# Names are XLA's ("gemm_fusion_dot.3", "loop_convert_fusion"), cuBLAS's (nvjet, sm90_xmma_gemm, cutlass), cuDNN's
# (cudnn_generated_fort_native_sdpa) and NCCL's; a TPU's operations have a category ("convolution fusion" is a product).
KINDS = {
    "collectives": r"nccl|all[-_]?(reduce|gather|to[-_]all)|reduce[-_]scatter|collective|(^| )(send|recv)([-_. ]|$)",
    "attention": r"fmha|sdpa|flash|splash|attention",
    # XLA's CPU compiler calls fusions around a product that YNNPACK runs "ynn_fusion".
    "matrix products": r"nvjet|gemm|cutlass|cublas|splitk|convolution|xmma|(?<![a-z])(dot|ynn)(?![a-z])|matmul",
    "copies": r"mem(cpy|set)|dynamic[-_](update[-_])?slice|(?<![a-z])(copy|transpose)(?![a-z])",
    # Elementwise work, reductions, the optimizer: bound by memory.
    "other fusions": r"",
}
# Operations that contain others; those are in the trace themselves, on a CPU in other threads.
CONTAINERS = re.compile(r"(while|conditional|call)([.\d]|$)")
NAME_CHARACTERS = 90
NUM_LONGEST = 10
# A trace is read into memory; a few steps of a large model take 100 MB a host.
MAX_TRACE_BYTES = 2**31


@dataclass(frozen=True)
class Op:
    """One run of one operation, on one line (a GPU's stream, a CPU's thread, a TPU core's sequence) of a device."""

    name: str
    kind: str
    line: str
    start_ns: float
    end_ns: float


def read(path: str | Path, *, steps: int = 0) -> dict:
    """The figures of the trace at `path`; seconds are the mean over its devices.

    span_s: from the start of the first operation to the end of the last. busy_s: while at least one operation ran.
      idle_s: span_s - busy_s; longest_gap_s: the longest idle interval. steps: as given, 0: not known.
    kinds: kind -> {"seconds", "share" of the span}. Concurrent operations (streams, a CPU's threads) all count, so shares
      may add up to more than the busy time; of nested operations the outer one counts without the inner.
    longest: the ten longest operations with all their runs, {"name", "kind", "count", "seconds", "share"}.

    Raises:
      DataError: there is no trace, it cannot be read, or it has no operation of a device.
    """
    files = trace_files(Path(path))
    planes = [plane for file in files for plane in device_planes(load(file))]
    if not planes:
        raise DataError(f"{files[0]}: no operation of a device is in this trace")
    return summary([ops for _, ops in planes], device=planes[0][0], steps=steps) | {"files": [str(f) for f in files]}


def trace_files(path: Path) -> list[Path]:
    """The files of the newest trace at or below `path`, one for each host."""
    if path.exists() and not path.is_dir():
        return [path]
    files = sorted(path.rglob("*.xplane.pb"), key=lambda file: (file.stat().st_mtime, str(file)))
    if not files:
        raise DataError(f"{path}: no *.xplane.pb at or below it; medcg train --profile_steps=FIRST:LAST leaves one")
    return sorted(file for file in files if file.parent == files[-1].parent)


def load(file: Path) -> ProfileData:
    try:
        return ProfileData.from_serialized_xspace(read_bytes(file, MAX_TRACE_BYTES))
    except FileError as error:
        raise DataError(str(error)) from None
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as a trace: {' '.join(str(error).split())[:200]}") from None


def device_planes(data: ProfileData) -> list[tuple[str, list[Op]]]:
    """(name, operations) of every device; of all CPU threads together where the trace has no device."""
    planes = []
    for plane in data.planes:
        if plane.name.startswith("/device:"):
            lines = list(plane.lines)
            # A line "XLA Ops" repeats the operations of the streams.
            op_lines = [line for line in lines if line.name == "XLA Ops"] or [
                line for line in lines if line.name.startswith("Stream")
            ]
            ops = [op for line in op_lines for op in operations(line, any_event=True)]
            planes += [(plane.name, ops)] if ops else []
    if planes:
        return planes
    hosts = [plane for plane in data.planes if plane.name == "/host:CPU"]
    ops = [op for plane in hosts for line in plane.lines for op in operations(line, any_event=False)]
    return [("/host:CPU", ops)] if ops else []


def operations(line, *, any_event: bool) -> list[Op]:
    """A line's operations. any_event: every event is one; else only events with an HLO operation."""
    ops = []
    for event in line.events:
        stats = {key: value for key, value in event.stats if key in ("hlo_op", "hlo_category")}
        if event.duration_ns <= 0 or not (any_event or "hlo_op" in stats):
            continue
        op, category = str(stats.get("hlo_op", "")), str(stats.get("hlo_category", ""))
        if CONTAINERS.match(op or event.name):
            continue
        name = event.name if not op or op == event.name else f"{event.name[:NAME_CHARACTERS]} [{op}]"
        kind = kind_of(f"{category} {event.name} {op}")
        ops.append(Op(name, kind, line.name, event.start_ns, event.start_ns + event.duration_ns))
    return ops


def kind_of(text: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, text.lower()))


# ------------------------------------------------------------------ sums


def summary(devices: list[list[Op]], *, device: str, steps: int) -> dict:
    """The figures of `read` from the operations of each device."""
    span = busy = gap = 0.0
    kinds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    named: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for ops in devices:
        begin, end = min(op.start_ns for op in ops), max(op.end_ns for op in ops)
        covered = union(ops)
        span += end - begin
        busy += sum(after - before for before, after in covered)
        gap += max((b[0] - a[1] for a, b in itertools.pairwise(covered)), default=0.0)
        for op, own_ns in own_times(ops):
            kinds[op.kind] += own_ns
            count_and_time = named[op.name, op.kind]
            count_and_time[0] += 1
            count_and_time[1] += own_ns

    def seconds(nanoseconds: float) -> float:
        return nanoseconds / len(devices) / 1e9

    def timed(nanoseconds: float) -> dict:
        return {"seconds": seconds(nanoseconds), "share": nanoseconds / span}

    longest = sorted(named.items(), key=lambda item: -item[1][1])[:NUM_LONGEST]
    return {
        "device": device,
        "num_devices": len(devices),
        "steps": steps,
        "span_s": seconds(span),
        "busy_s": seconds(busy),
        "idle_s": seconds(span - busy),
        "longest_gap_s": seconds(gap),
        "kinds": {kind: timed(time) for kind, time in kinds.items()} | {"idle": timed(span - busy)},
        "longest": [
            {"name": name, "kind": kind, "count": count, **timed(time)} for (name, kind), (count, time) in longest
        ],
    }


def union(ops: Iterable[Op]) -> list[tuple[float, float]]:
    """Sorted, disjoint intervals (begin, end) in which at least one operation runs."""
    intervals: list[tuple[float, float]] = []
    for begin, end in sorted((op.start_ns, op.end_ns) for op in ops):
        if intervals and begin <= intervals[-1][1]:
            intervals[-1] = (intervals[-1][0], max(intervals[-1][1], end))
        else:
            intervals.append((begin, end))
    return intervals


def own_times(ops: Iterable[Op]) -> list[tuple[Op, float]]:
    """(operation, its nanoseconds without those of the operations nested in it on the same line)."""
    entries: list[list] = []
    open_: dict[str, list[list]] = defaultdict(list)
    for op in sorted(ops, key=lambda op: (op.start_ns, -op.end_ns)):
        outer = open_[op.line]
        while outer and outer[-1][0].end_ns <= op.start_ns:
            outer.pop()
        entry = [op, op.end_ns - op.start_ns]
        if outer:
            outer[-1][1] -= min(op.end_ns, outer[-1][0].end_ns) - op.start_ns
        outer.append(entry)
        entries.append(entry)
    return [(op, max(own_ns, 0.0)) for op, own_ns in entries]


# ------------------------------------------------------------------ text


def text_of(trace: dict) -> list[str]:
    """The result of `read` as lines of text."""
    each = f", {trace['span_s'] / trace['steps'] * 1e3:.1f} ms a step" if trace["steps"] else ""
    lines = [
        (
            f"{trace['num_devices']} x {trace['device']}: {trace['span_s'] * 1e3:.1f} ms from the first operation to the "
            f"last{each}; idle {trace['idle_s'] * 1e3:.1f} ms, at most {trace['longest_gap_s'] * 1e3:.2f} ms at once"
        ),
        f"{'kind':<18}{'ms':>10}{'share':>8}",
    ]
    for kind, row in sorted(trace["kinds"].items(), key=lambda item: -item[1]["seconds"]):
        lines.append(f"{kind:<18}{row['seconds'] * 1e3:10.2f}{row['share']:8.1%}")
    lines.append(f"{'ms':>10}{'share':>8}{'runs':>7}  the longest operations, with all their runs")
    for row in trace["longest"]:
        lines.append(f"{row['seconds'] * 1e3:10.2f}{row['share']:8.1%}{row['count']:7d}  {row['name']} ({row['kind']})")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Prints where the time of a trace went; 2 when there is none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("trace", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=0, help="steps that were traced, for the time of one")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    # A warning about jaxlib's classes on Python 3.12.
    warnings.filterwarnings("ignore", message="builtin type .* has no __module__", category=DeprecationWarning)
    try:
        trace = read(args.trace, steps=args.steps)
    except DataError as error:
        print(f"trace_read: {error}", file=sys.stderr)
        return 2
    print("\n".join(text_of(trace)))
    if args.json:
        write_whole(args.json, json.dumps(trace, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
