"""`medcg VERB`: reads flags, calls one function of the package, prints its result and writes it as JSON.

Exit status: 0 success, 2 wrong use or bad input, 3 does not fit in memory, 75 (EX_TEMPFAIL) told to stop and saved, so
that the same command continues, 1 anything else.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

from medcg_jax import cli_checks, cluster, processes, terminal
from medcg_jax import platform as xla_flags
from medcg_jax.cli_ask import add_ask
from medcg_jax.cli_config import add_config, add_config_flags
from medcg_jax.cli_data import add_data
from medcg_jax.cli_parser import Parser, Version, add, add_amount, unknown_flag
from medcg_jax.config import ConfigError, Interrupted, RunConfig, RunError, xla_switches
from medcg_jax.data.records import DataError
from medcg_jax.files import user_path, write_whole
from medcg_jax.memory import explained, is_out_of_memory
from medcg_jax.platform import hidden_stdout, keep_freed_memory, run_process

# Files of a release that may be elsewhere than SRC.
RELEASE_PARTS = {
    "clip": "CLIP ViT-L/14-336, where SRC holds no vision tower",
    "base": "what SRC's projector or adapters were trained on, where SRC holds them alone (LLaVA's parts: the Llama)",
    "eva": "eva_vit_g.pth, where it does not lie beside SRC (Llama 2 for MiniGPT-v2)",
    "minigpt": "MiniGPT-v2's own .pth, where it does not lie beside SRC",
    "sam": "sam_vit_h_4b8939.pth, where NExT-Chat's SRC holds no SAM",
}
# Of --json: to standard output.
STDOUT = "-"
# Verbs whose run several processes may share.
SEVERAL_PROCESSES = ("train", "eval", "reproduce")
# Errors of a wrong path.
WRONG_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status. With several processes, one that fails ends here."""
    keep_freed_memory()
    verb = ""
    try:
        args = parse(sys.argv[1:] if argv is None else list(argv))
        verb = args.verb
        quiet, verbose = getattr(args, "quiet", False), getattr(args, "verbose", False)
        terminal.show(terminal.QUIET if quiet else terminal.VERBOSE if verbose else terminal.PLAIN)
        # The result alone goes to a pipe.
        with redirect_stdout(sys.stderr) if args.json == STDOUT else nullcontext():
            result = args.run(args)
        status = result.pop("exit_status", 0)
        if args.json and processes.is_first():
            text = json.dumps(result, indent=1) + "\n"
            print(text, end="") if args.json == STDOUT else write_whole(args.json, text)
        processes.finish()
        return status
    except (ConfigError, DataError, *WRONG_PATHS) as error:
        return failed(2, str(error))
    except OSError as error:  # a full disk or a lost network file system: the same command may work later
        return failed(1, str(error))
    except Interrupted as error:  # raised at the same step on every process
        print(f"medcg: {error}; run the same command again to go on", file=sys.stderr)
        processes.finish()
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        return failed(1, "stopped; run the same command again to go on")
    except RunError as error:
        return failed(1, str(error))
    except Exception as error:
        if is_out_of_memory(error):
            return failed(3, explained(error, verb))
        if processes.count() == 1:
            raise
        traceback.print_exc()
        return failed(1, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def failed(status: int, why: str) -> int:
    """Prints why the verb failed. With several processes the line names this one, and then all of them end."""
    processes.await_verdict(why)
    name = processes.whoami()
    print(f"medcg: {name}: {why}" if name else f"medcg: {why}", file=sys.stderr, flush=True)
    processes.fail(status, why)
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    """The verb's arguments; `args.overrides` holds every `--config.a.b=value` as {"a.b": "value"}.

    Raises:
      ConfigError: an unknown verb or flag, a flag without its value, or a path in a home folder that is not there.
    """
    verbs = parser()
    has_verb = not all(word.startswith("--") for word in argv)
    if argv and not has_verb and argv[0] not in verbs._option_string_actions:
        raise unknown_flag(argv[0], verbs, False)
    args, unread = verbs.parse_known_args(argv)
    for name, value in vars(args).items():  # every text that begins with ~ is a path
        if isinstance(value, str):
            setattr(args, name, user_path(value, name))
        elif isinstance(value, list):
            setattr(args, name, [user_path(text, name) for text in value])
    args.overrides = {}
    while unread:
        flag = unread.pop(0)
        if not flag.startswith("--config.") or not hasattr(args, "config"):
            raise unknown_flag(flag, args.parser, hasattr(args, "config"))
        key, equals, value = flag.removeprefix("--config.").partition("=")
        if not equals:
            if not unread or unread[0].startswith("--"):
                raise ConfigError(f"{flag} has no value; expected --config.{key}=VALUE")
            value = unread.pop(0)
        args.overrides[key] = value
    return args


def parser() -> Parser:
    top = Parser(prog="medcg", description=__doc__.partition("\n")[0], allow_abbrev=False)
    top.add_argument("--version", action=Version, help="print the version and stop")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    add_config(verbs, top)
    add_data(verbs)
    convert = add(verbs, "convert", run_convert, "released PyTorch checkpoint to Orbax, and back")
    convert.add_argument("src", metavar="SRC", help="a checkpoint's folder, or its name on the Hugging Face hub")
    convert.add_argument("dst", metavar="DST", help="folder to write; must not exist")
    text = "this project's own form, that of transformers, or of PEFT's adapters (orbax)"
    convert.add_argument("--to", choices=("orbax", "hf", "peft"), default="orbax", help=text)
    for flag, text in RELEASE_PARTS.items():
        convert.add_argument(f"--{flag}", default="", metavar="PATH", help=text)
    parity = add(verbs, "parity", run_parity, "the same input through this port and the PyTorch reference")
    parity.add_argument("src", metavar="SRC", help="a released (HF) model's folder or name")
    parity.add_argument("--inputs", default="", metavar="FILE.npz", help="numbers recorded elsewhere; needs no PyTorch")
    parity.add_argument("--record", default="", metavar="FILE.npz", help="write the reference's numbers, for --inputs")
    parity.add_argument("--against", default="", metavar="DIR", help="the released directory that SRC was made from")

    for name, run, text in (
        ("train", run_train, "one fine-tune"),
        ("eval", run_eval, "scores and predictions of a checkpoint on subsets"),
        ("reproduce", run_reproduce, "a whole grid: base, cells, evaluation, report; run again, it goes on"),
        ("bench", run_bench, "throughput here, of this port and of the reference, in one run"),
    ):
        verb = add(verbs, name, run, text)
        add_config_flags(verb)
        verb.add_argument("--workdir", default="", metavar="DIR", help="what it writes goes there (runs/NAME)")
        add_amount(verb)
        if name == "train":
            text = "write an xprof trace of these steps to WORKDIR/profile, for medcg_jax.bench.trace_read"
            verb.add_argument("--profile_steps", default="", metavar="FIRST:LAST", help=text)
        if name in SEVERAL_PROCESSES:
            add_processes(verb)
        if name in ("train", "eval"):
            verb.add_argument("--dry", action="store_true", help="check the config and its paths, and stop")
        if name == "reproduce":
            verb.add_argument("--dry", action="store_true", help="list every cell with its size and stop")
            text = "of a chip-hour of each kind, as h100:2.5,v5e:1.2, for the cost that --dry tells"
            verb.add_argument("--price", default="", metavar="CHIP:USD", help=text)
            verb.add_argument("--jobs", type=int, default=0, metavar="N", help="processes that share the grid's cells")
        if name == "bench":
            text = (
                "of train, eval, generate, loader, convert, startup (default: these), and those of configs/bench_gpu.py"
            )
            verb.add_argument("--stages", default="", metavar="A,B", help=text)
            text = "HF transformers on the same records in the same run (extra `parity`)"
            verb.add_argument("--against", choices=("torch",), default="", help=text)
    add_ask(verbs)
    add_plan(verbs)
    report = add(verbs, "report", run_report, "the page, tables and plots of a grid, or of what `bench` measured")
    report.add_argument("dir", metavar="DIR", help="workdir of a grid, or a JSON file of `medcg bench`")
    report.add_argument("other", metavar="OTHER", nargs="*", help="another grid's, to compare with; more such files")
    report.add_argument("--format", default="", metavar="md,tex,csv", help="forms beside the page")
    report.add_argument("--out", default="", metavar="FOLDER", help="where a comparison or a benchmark's page goes")
    return top


def add_processes(verb: Parser) -> None:
    """Adds the flags that tell a process about the others of its run, if its environment does not."""
    flags = verb.add_argument_group("one run of several processes, each started with the same command")
    flags.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0; auto: JAX asks a TPU VM")
    flags.add_argument("--num_processes", default="", metavar="N", help="1: alone, whatever the environment says")
    flags.add_argument("--process_id", default="", metavar="I", help="0 to N - 1")


def add_plan(verbs) -> None:
    plan = add(verbs, "plan", run_plan, "what a run needs on a machine that is not there: bytes, FLOPs, least time")
    plan.epilog = "Exit status 3: it does not fit."
    add_config_flags(plan)
    plan.add_argument("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p:4x4x4, v6e:8x8, h100:8, local")
    plan.add_argument("--search", action="store_true", help="try meshes, remat policies and batch sizes, and rank them")
    plan.add_argument("--compiles", type=int, default=12, metavar="N", help="programs that --search compiles at most")
    plan.add_argument(
        "--full_effort", action="store_true", help="compile as a real run does: slower, with exact memory"
    )
    plan.add_argument("--price", type=float, default=0.0, metavar="USD", help="of a chip-hour, for the grid's cost")
    text = "plan `medcg train` and `medcg eval` alone, without the memory that a grid needs beside its programs"
    plan.add_argument("--alone", action="store_true", help=text)
    plan.add_argument("--memory_gib", type=float, default=0.0, metavar="GIB", help="of a device, if not the known one")


def resolved(args: argparse.Namespace) -> RunConfig:
    """The verb's configuration."""
    from medcg_jax.config_file import load

    if getattr(args, "jobs", 0):
        args.overrides["study.jobs"] = str(args.jobs)
    if getattr(args, "profile_steps", ""):
        args.overrides["log.profile_steps"] = args.profile_steps
    return load(args.config, args.overrides)


@contextmanager
def started(args: argparse.Namespace, run: RunConfig) -> Iterator[None]:
    """Checks paths, sets XLA's flags, joins the other processes of the run, if any; only the first process prints.

    Raises:
      ConfigError: a path, the mesh, or flags or environment variables about processes cannot be used, or the processes
        do not agree.
      RunError: the others do not come.
    """
    flags = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    joined = cluster.detect(os.environ, **flags)
    whole_device = args.verb != "reproduce" or run.study.jobs == 1
    flags_line = xla_flags.apply(xla_switches(run), whole_device=whole_device)
    if joined:
        from medcg_jax.agreement import check_agreement

        processes.start(joined)
        check_agreement(run, args.verb, workdir(args, run), lambda: fingerprints(args, run))
    # Once they have joined, so that one that fails ends the others with its reason.
    cli_checks.check_run(run, args.verb, workdir(args, run))
    # The devices of a grid of several processes are theirs, and models of a grid may have settings of their own.
    if args.verb != "reproduce" or run.study.jobs == 1 and not run.study.models:
        check_mesh(run)
    from medcg_jax.train.log import keep_programs

    keep_programs()
    # Gloo, which joins CPUs, prints a line for every group of processes.
    with hidden_stdout() if joined and not terminal.shows_details() else nullcontext():
        if processes.is_first():
            if terminal.shows_details():
                print(flags_line, flush=True)
            # A grid tells its own progress.
            with terminal.beating(f"medcg {args.verb}") if args.verb != "reproduce" else nullcontext():
                yield
        else:
            with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
                yield


def check_mesh(run: RunConfig) -> None:
    """Raises ConfigError if the mesh does not fit the devices or the batches, before anything slower is imported."""
    import jax

    from medcg_jax.mesh import check_batches, fitted, mesh_shape

    run = fitted(run, jax.devices())
    _, data, fsdp, _ = mesh_shape(run.mesh, jax.device_count())
    check_batches(data * fsdp, run)


def fingerprints(args: argparse.Namespace, run: RunConfig) -> dict[str, str]:
    """Fingerprints of the data that the verb reads, by name."""
    if args.verb == "reproduce" and not run.study.models:
        from medcg_jax.study.run import grid

        return {f"seed {seed}": digest for seed, digest in grid.data_fingerprints(run).items()}
    from medcg_jax.agreement import data_fingerprint

    return {"all": data_fingerprint(run, with_boxes=True)}


def workdir(args: argparse.Namespace, run: RunConfig) -> Path:
    return Path(args.workdir or Path("runs") / run.name)


def dry_check(args: argparse.Namespace, run: RunConfig) -> dict:
    """The result of --dry for one run: its config is sound; prints what it is of, and paths that are not there."""
    from medcg_jax.families.weights.hub import is_repository

    model, data = run.model, run.data
    print(f"{run.name}: {model.name} on {data.source} data; workdir {workdir(args, run)}")
    checkpoint = "" if is_repository(model.checkpoint) else model.checkpoint
    paths = {"model.checkpoint": checkpoint, "model.tokenizer": model.tokenizer, "data.root": data.root}
    missing = {key: path for key, path in paths.items() if path and not Path(path).exists()}
    for key, path in missing.items():
        where = "" if Path(path).is_absolute() else f" (below {Path.cwd()})"
        print(f"warning: {key}={path} is not there{where}", file=sys.stderr)
    return {"name": run.name, "workdir": str(workdir(args, run)), "missing": missing}


def run_convert(args) -> dict:
    cli_checks.check_checkpoint(args.src)
    from medcg_jax.eval.card import model_card, training_of
    from medcg_jax.families.weights.convert import convert
    from medcg_jax.families.weights.hub import resolve
    from medcg_jax.train.checkpoint import check_whole
    from medcg_jax.train.meta import META_FILE, recipe_of
    from medcg_jax.train.sanity import ids_beside

    read_config_first(args.src)
    src, parts = resolve(args.src), {name: resolve(path) for name in RELEASE_PARTS if (path := getattr(args, name))}
    check_whole(src)
    training, recipe = training_of(src), recipe_of(src)
    with terminal.beating("medcg convert"):
        return convert(
            src, Path(args.dst), to=args.to, parts=parts, ids=ids_beside(src), system_prompt=training.system_prompt,
            card=lambda checkpoint, notes: model_card(checkpoint, training, args.to, notes),
            meta=(META_FILE, json.dumps(recipe, indent=1) + "\n") if recipe else None,
        )  # fmt: skip


def read_config_first(src: str) -> None:
    """Refuses a repository of the hub with what this port does not compute, before its weights are fetched."""
    from medcg_jax.families.weights.convert import read_config
    from medcg_jax.families.weights.hub import is_repository, resolve

    if is_repository(src) and ((folder := resolve(src, weights=False)) / "config.json").is_file():
        read_config(folder)


def run_parity(args) -> dict:
    cli_checks.check_reference(args.src, args.against, args.inputs)
    from medcg_jax.families.weights.hub import resolve
    from medcg_jax.parity.verb import parity

    files = {name: Path(getattr(args, name)) for name in ("inputs", "record", "against") if getattr(args, name)}
    read_config_first(args.src)
    return parity(resolve(args.src), **files)


def run_train(args) -> dict:
    run = resolved(args)
    if args.dry:
        return dry_check(args, run)
    with started(args, run):
        from medcg_jax.train.run import train

        return train(run, workdir(args, run))


def run_eval(args) -> dict:
    run = resolved(args)
    if args.dry:
        return dry_check(args, run)
    with started(args, run):
        from medcg_jax.eval.subsets import evaluate_subsets

        return evaluate_subsets(run, workdir(args, run))


def run_reproduce(args) -> dict:
    run = resolved(args)
    if args.dry:
        from medcg_jax.study.run.dry import dry, parse_prices

        return dry(run, parse_prices(args.price))
    if args.price:
        raise ConfigError(f"--price={args.price}: expected with --dry")
    with started(args, run):
        from medcg_jax.study.run import grid

        if run.study.cells_at_once == 0:
            run = with_as_many_cells_as_fit(run)
        return grid.reproduce(run, workdir(args, run))


def with_as_many_cells_as_fit(run: RunConfig) -> RunConfig:
    """The run with `study.cells_at_once` set from the memory of the devices here.

    Raises:
      RuntimeError: no cell fits.
    """
    from medcg_jax.config import replace

    if run.study.models:
        raise ConfigError("study.cells_at_once=0: expected at least 1 where study.models has several models")
    from medcg_jax.plan.programs import fitting_run, print_fitting
    from medcg_jax.train.start import with_checkpoint

    run = with_checkpoint(run)
    num_groups = max(1, run.mesh.cell)
    fitting = fitting_run(run, "local", num_groups=num_groups)
    print_fitting(fitting, "local", num_groups)
    if not fitting.num_cells:
        raise RuntimeError("RESOURCE_EXHAUSTED: not one cell fits the devices here")
    return replace(run, study__cells_at_once=fitting.num_cells)


def run_report(args) -> dict:
    of_grids = not args.dir.endswith(".json")
    if of_grids and len(args.other) > 1:
        raise ConfigError(f"medcg report {' '.join([args.dir, *args.other])}: expected one or two grids")
    from medcg_jax.study.report import check_grid

    for folder in (args.dir, *args.other):
        if not of_grids:
            if not Path(folder).is_file():
                raise ConfigError(f"{folder}: no such file; expected a JSON file of `medcg bench`")
        else:
            check_grid(folder)
    from medcg_jax.study.report.compare import models_in, write_comparison, write_models_page
    from medcg_jax.study.report.page import check_formats, write_report

    formats = check_formats(args.format)
    if not of_grids:
        return report_benchmarks(args)
    if args.other:
        page = write_comparison(args.dir, args.other[0], args.out)
        print(page)
        return {"page": str(page)}
    if args.out:
        raise ConfigError(f"--out={args.out}: expected with a second DIR only; a grid's report is in its workdir")
    models = models_in(Path(args.dir))
    for model in models:
        write_report(Path(args.dir) / model, formats)
    if models:
        page = write_models_page(Path(args.dir), models)
    else:
        page = write_report(Path(args.dir), formats)
        print((page.parent / "summary.txt").read_text(encoding="utf-8"))
    print(page)
    return {"page": str(page)}


def report_benchmarks(args) -> dict:
    from medcg_jax.study.report.bench import write_bench_page

    if args.format:
        raise ConfigError(
            f"--format={args.format}: expected with a grid only; a benchmark has a page, png, svg and csv"
        )
    page = write_bench_page([Path(name) for name in (args.dir, *args.other)], Path(args.out) if args.out else None)
    print(page)
    return {"page": str(page)}


def run_bench(args) -> dict:
    run = resolved(args)
    flags_line = xla_flags.apply(xla_switches(run))
    if terminal.shows_details():
        print(flags_line, flush=True)
    from medcg_jax.bench.run import DEFAULT, bench

    return bench(run, stages=args.stages.split(",") if args.stages else DEFAULT, against=args.against)


def run_plan(args) -> dict:
    if args.search and args.alone:
        raise ConfigError("--alone with --search: expected one of them; a search is for a grid's trainings")
    run = resolved(args)
    from medcg_jax.plan import search
    from medcg_jax.plan import text as plan_text
    from medcg_jax.plan import verb as plan
    from medcg_jax.study.design.schedule import runs_by_model
    from medcg_jax.study.run import dry
    from medcg_jax.train.start import with_sizes

    xla_flags.apply(xla_switches(run), "tpu")  # libtpu reads them when it is loaded, to compile for a TPU
    run = with_sizes(run)
    common = {"full_effort": args.full_effort, "memory_bytes": args.memory_gib * (1 << 30)}
    if args.search:
        ranking = search.search(run, args.topology, most_compiles=args.compiles, **common)
        print(search.table(ranking))
        return ranking
    plans = {}
    for model, model_run in runs_by_model(run).items():
        grid = None if args.alone else dry.grid_totals(model_run)
        plans[model] = plan.plan(model_run, args.topology, grid=grid, price=args.price, alone=args.alone, **common)
        print(plan_text.text_of(plans[model]), flush=True)
    if len(plans) == 1:
        return plans.popitem()[1]
    return {"models": plans, "exit_status": max(result.get("exit_status", 0) for result in plans.values())}


def run() -> None:
    """The command `medcg`."""
    run_process(main)


if __name__ == "__main__":
    run()
