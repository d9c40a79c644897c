"""The result of `medcg plan` as text, at most 110 columns wide."""

import textwrap
from collections.abc import Iterator

from medcg_jax.memory import gib
from medcg_jax.plan.topology import COMPILERS

WIDTH = 110
# Of instructions that could not be read: on a CPU every fused product is one.
MOST_NAMES = 3
GB = 1e9
BOUND = "Times are by published peaks, no measurement: no program reaches them."


def text_of(result: dict) -> str:
    """A plan's result (`plan.plan`) as a page of text."""
    return "\n".join(line for paragraph in _lines(result) for line in wrapped(paragraph))


def wrapped(line: str) -> list[str]:
    """The line, wrapped at `WIDTH`."""
    return textwrap.wrap(line, WIDTH, subsequent_indent="    ") or [""]


def _lines(result: dict) -> Iterator[str]:
    train, tests = result["train"], result["eval"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if axis != "cell" or size > 1)
    yield f"{result['model']} on {result['topology']}: {result['num_devices']} x {result['device']}, mesh {mesh}"
    cells = f"{result['num_cells']} cells at once, " if result["num_cells"] > 1 else ""
    base = f", the rest kept in {result['base_dtype']}" if result["base_dtype"] != "float32" else ""
    yield (
        f"{cells}batch {result['batch_size']}, rows of {train['row_tokens']} tokens, {result['compute_dtype']}, remat "
        f"{result['remat']}, trains {', '.join(result['trainable'])}{base}"
    )
    versions, is_tpu = result["versions"], result["device"].startswith("TPU")
    compilers = [name for name in COMPILERS if (name == "libtpu") == is_tpu]
    versions = ", ".join(f"{name} {versions[name]}" for name in ("jax", *compilers) if name in versions)
    effort = "full effort" if result["full_effort"] else "least effort (--full_effort compiles as a real run does)"
    wall, cpu = (train[key] + tests[key] for key in ("compile_s", "compile_cpu_s"))
    seconds = f"{wall:.0f} s ({cpu:.0f} s of CPU)"
    yield f"compiled with {versions} at {effort} in {seconds}"
    yield ""
    titles = ("training step", f"{tests['rows']} tests")
    yield f"{'':44}{titles[0]:>20}{titles[1]:>20}"
    for title, value in _rows():
        both = [value(program) for program in (train, tests)]
        if any(both):
            yield f"{title:44}{both[0]:>20}{both[1]:>20}"
    verdicts = ["fits" if program["fits"] else "DOES NOT FIT" for program in (train, tests)]
    usable = f"of {gib(result['usable_bytes'])} a device ({result['margin']:.0%} left free)"
    yield f"{usable:44}{verdicts[0]:>20}{verdicts[1]:>20}"
    if result.get("memory_of"):
        yield f"the limit is {result['memory_of']}, which its CPU devices share; --memory_gib=GIB sets another"
    yield ""
    yield from _after(result)


def _rows():
    """(title, function from a program's section of the result to the cell's text)."""

    def size(key):
        return lambda program: gib(program[key]).removesuffix(" GiB") if program.get(key) is not None else ""

    def bound(key):
        def value(program):
            seconds = (program.get("bound") or {}).get(key)
            return f"{seconds * 1e3:,.1f}" if seconds is not None else ""

        return value

    def timed(key):
        def value(program):
            seconds = (program.get("schedule") or {}).get(key)
            return f"{seconds * 1e3:,.1f}" if seconds is not None else ""

        return value

    def moved(kind):
        def value(program):
            sums = (program.get("collectives") or {}).get(kind)
            return f"{sums['bytes'] / GB:.2f} ({sums['count']})" if sums else ""

        return value

    def flops(key):
        return lambda program: f"{program['flops'][key] / 1e12:,.1f}" if key in program["flops"] else ""

    def rate(key, form):
        return lambda program: form.format(program[key]) if program.get(key) is not None else ""

    yield "GiB a device: peak of the program", size("peak_bytes")
    yield "  arguments", size("argument_bytes")
    yield "  temporary", size("temp_bytes")
    yield "  output", size("output_bytes")
    yield "  of it in place of arguments (donated)", size("alias_bytes")
    yield "  beside the program, in a grid", size("held_bytes")
    yield "model TFLOP, full attention", flops("full")
    yield "model TFLOP, causal attention", flops("causal")
    yield "executed TFLOP, padding and remat counted", flops("executed")
    yield "  matrix products as compiled", lambda program: _product(program, "flops", 1e12, ",.1f")
    yield "  of them by the model's, full attention", lambda program: _product(program, "by_full", 1, ".3f")
    yield "  of them by the model's, causal attention", lambda program: _product(program, "by_causal", 1, ".3f")
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"):
        yield f"{kind}, GB a device (how many)", moved(kind)
    yield "ms at least: compute", bound("compute_s")
    yield "  memory", bound("memory_s")
    yield "  network", bound("network_s")
    yield "  overlapped wholly", bound("overlapped_s")
    yield "  one after another", bound("in_turn_s")
    yield "ms simulated, by the schedule", timed("step_s")
    yield "  computations", timed("busy_s")
    yield "  waits for collectives", timed("exposed_s")
    yield "  waits for copies to the chip", timed("copies_s")
    yield "samples/s simulated", rate("samples_per_s_simulated", "{:,.1f}")
    yield "samples/s at most", rate("samples_per_s", "{:,.1f}")
    yield "  one after another", rate("samples_per_s_in_turn", "{:,.1f}")
    yield "tokens/s at most", rate("tokens_per_s", "{:,.0f}")
    yield "MFU at that bound", rate("mfu", "{:.1%}")


def _product(program: dict, key: str, unit: float, form: str) -> str:
    value = (program.get("products") or {}).get(key)
    return f"{value / unit:{form}}" if value is not None else ""


def _after(result: dict) -> Iterator[str]:
    train, tests = result["train"], result["eval"]
    for name, program in (("training step", train), ("tests", tests)):
        if program.get("refused"):
            yield f"{name}: the compiler says: {program['refused']}"
        if program.get("not_counted"):
            yield f"{name}: collectives not counted: {program['not_counted']}"
        for unknown in (program.get("bound") or {}).get("unknown", ()):
            yield f"{name}: {unknown}, so that part of the bound counts nothing"
        if why := (program.get("products") or {}).get("not_counted"):
            names = why.split(", ")
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            yield f"{name}: matrix products not counted: {', '.join(names[:MOST_NAMES])}{more}"
        for finding in program["findings"]:
            yield f"{name}: {finding['rule']}: {finding['text']}"
            yield from (f"    {line}" for line in finding["names"])
        yield from _waits(name, program.get("schedule") or {})
        missed = program.get("not_looked_for")
        if not program["findings"] and missed is not None:
            yield f"{name}: no known trap found" + (f"; not looked for: {', '.join(missed)}" if missed else "")
    if result["whole_on_every_device"]:
        whole = ", ".join(result["whole_on_every_device"])
        yield f"whole on every device, as mesh.tensor does not divide them: {whole}"
    if "largest_batch" in result:
        most = result["largest_batch"]
        size = f"{gib(train['state_bytes'] + train['held_bytes'])} a device before any row"
        why = f"; what stays takes {size}, less where mesh.fsdp or mesh.tensor is larger"
        yield f"largest train.batch_size that fits this mesh: {most}{'' if most else why}"
    if train["fits"] and not tests["fits"]:
        yield "the tests need less with a smaller eval.batch_size, which changes no prediction, or a larger mesh.fsdp"
    if result["peak"] is None:
        yield f"no peaks of {result['device']} are published here, so no bound on its time"
        return
    yield f"{BOUND} Peaks: {result['peak']['source']}."
    if result["compute_dtype"] != "bfloat16":
        yield f"compute_dtype {result['compute_dtype']}: the peak is that of bfloat16, so the bound is far off"
    yield from _grid(result)


def _waits(name: str, schedule: dict) -> Iterator[str]:
    """What a simulated program waits for: by kind, by loop, and its longest waits with what would hide them."""
    if not schedule.get("exposed_s"):
        return
    exposed, total = (f"{schedule[key] * 1e3:,.1f}" for key in ("exposed_s", "collectives_s"))
    kinds = ", ".join(f"{kind} {s * 1e3:,.1f}" for kind, s in schedule["exposed_by_kind"].items() if s)
    yield f"{name}: waits for collectives {exposed} ms of their {total}: {kinds}"
    places = (f"{loop or 'outside of loops'} {s * 1e3:,.1f}" for loop, s in schedule["exposed_by_loop"].items() if s)
    yield f"    by loop, all iterations: {', '.join(places)}"
    for wait in schedule["longest"]:
        beside = f"beside {wait['beside_s'] * 1e3:,.1f} ms of work" if wait["is_async"] else "beside nothing"
        times = f", {wait['trips']} times" if wait["trips"] > 1 else ""
        yield (
            f"    {wait['exposed_s'] * 1e3:,.1f} ms: {wait['kind']} {wait['name']} over {' x '.join(wait['axes'])}, "
            f"{wait['payload_bytes'] / 1e6:,.1f} MB{times}, {beside}: {wait['remedy']}"
        )


def _grid(result: dict) -> Iterator[str]:
    grid = result.get("grid")
    if not grid or grid.get("chip_hours") is None:
        return
    tests = f"{grid['test_rows']:,} tests" if grid["test_rows"] else "tests not counted (their number is not published)"
    yield (
        f"the whole grid: {grid['steps']:,} steps, {grid['samples']:,} samples, {tests}: at least "
        f"{grid['chip_hours']:,.1f} chip-hours, {grid['chip_hours_in_turn']:,.1f} one after another"
    )
    if "usd" in grid:
        yield f"cost: at least {grid['usd']:,.0f} USD, {grid['usd_in_turn']:,.0f} one after another"
    else:
        yield "cost: give --price=USD of a chip-hour (lists change, and differ by region and contract)"
