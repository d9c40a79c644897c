"""`medcg VERB`: flags in, one function of the package called, its result printed for people and as JSON.

Exit status: 0 done and right, 2 wrong use or bad input, 3 does not fit, 1 anything else.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from medcg_jax.data.records import DataError
from medcg_jax.files import write_whole
from medcg_jax.host import keep_freed_memory
from medcg_jax.run_config import ConfigError, DataConfig, RunConfig, RunError

# Files of a release that may lie apart from it.
RELEASE_PARTS = {
    "clip": "CLIP ViT-L/14-336, where SRC holds no vision tower",
    "base": "the Llama that SRC's projector or adapters were trained on, where SRC holds a part of LLaVA alone",
    "eva": "eva_vit_g.pth, where it does not lie beside SRC (Llama 2 for MiniGPT-v2)",
    "minigpt": "MiniGPT-v2's own .pth, where it does not lie beside SRC",
    "sam": "sam_vit_h_4b8939.pth, where NExT-Chat's SRC holds no SAM",
}
# What a path that was given wrongly raises.
WRONG_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line."""

    def error(self, message: str):
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    keep_freed_memory()
    try:
        args = parse(sys.argv[1:] if argv is None else list(argv))
        result = args.run(args)
    except (ConfigError, DataError, *WRONG_PATHS) as error:
        print(f"medcg: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a network file system that is away: the same command may work later
        print(f"medcg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("medcg: stopped; run the same command again to go on", file=sys.stderr)
        return 1
    except RunError as error:
        print(f"medcg: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"medcg: does not fit in memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    status = result.pop("exit_status", 0)
    if args.json:
        write_json(Path(args.json), result)
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    """The verb's arguments; `args.overrides` holds every `--config.a.b=value` as {"a.b": "value"}.

    Raises:
      ConfigError: an unknown verb or flag, or a flag without its value.
    """
    args, rest = parser().parse_known_args(argv)
    args.overrides = {}
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config.") or not hasattr(args, "config"):
            verb = f"medcg {args.verb} {args.kind}" if args.verb == "data" else f"medcg {args.verb}"
            raise ConfigError(f"{flag} is not known to `{verb}`; see `{verb} --help`")
        key, equals, value = flag.removeprefix("--config.").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{flag} has no value; --config.{key}=VALUE is accepted")
            value = rest.pop(0)
        args.overrides[key] = value
    return args


def parser() -> Parser:
    top = Parser(prog="medcg", description=__doc__.partition("\n")[0], allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    data = verbs.add_parser("data", help="write the phantom world, check a Med-MAT tree, list what it has")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="WHAT")
    phantom = add(kinds, "phantom", data_phantom, "write the phantom world in the release's layout")
    phantom.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--train", type=int, default=300, metavar="N", help="training records per subset")
    phantom.add_argument("--test", type=int, default=300, metavar="N", help="test records per subset")
    check = add(kinds, "check", data_check, "report, per record of a tree, what is missing, broken, unsafe or duplicated")
    check.add_argument("root", metavar="ROOT", help="folder of a Med-MAT tree, or one that was prepared")
    add_reading(check)
    prepare = add(kinds, "prepare", data_prepare, "write a tree's records, checked and decoded, as ArrayRecord shards")
    prepare.add_argument("root", metavar="ROOT", help="folder of a Med-MAT tree")
    prepare.add_argument("out", metavar="OUT", help="folder to write, or to go on with")
    prepare.add_argument(
        "--image", default="square:336", metavar="LAYOUT",
        help="square:336 (LLaVA-1.5's own square), fit:SIZE (longer side at most SIZE pixels) or keep",
    )  # fmt: skip
    prepare.add_argument("--train_records", type=int, default=3000, metavar="N", help="at most, of a subset")
    prepare.add_argument("--test_records", type=int, default=0, metavar="N", help="at most; 0: all")
    prepare.add_argument("--seed", type=int, default=0, help="of what the caps leave")
    prepare.add_argument(
        "--near", choices=("keep", "drop"), default="keep", help="training records that nearly have a test's image"
    )
    prepare.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0: one per core")
    add_reading(prepare)

    table = add(kinds, "format", data_format, "write a subset's files from raw labels: questions, or boxes")
    table.add_argument("labels", metavar="LABELS.csv", help="image,label and nothing, x1,y1,x2,y2 or mask")
    table.add_argument("root", metavar="ROOT", help="folder that its paths start in; the files go below it")
    table.add_argument("--subset", required=True, metavar="NN", help="number (38 to 53 are not released) or a name")
    table.add_argument("--seed", type=int, default=0, help="of instructions, options and letters")
    table.add_argument("--data_no", default="", metavar="N", help="number of the dataset, where the table names none")
    for name in ("modality", "area", "task"):
        table.add_argument(f"--{name}", default="", help="of a subset that is not Med-MAT's; all three")
    table.add_argument("--as", dest="form", choices=("choice",), default="", help="questions of the labels of boxes")
    table.add_argument("--force", action="store_true", help="replace the subset's files")

    stats = add(kinds, "stats", data_stats, "write a page with contact sheets, label and letter balance, copies")
    stats.add_argument("root", metavar="ROOT", help="folder of a Med-MAT tree")
    stats.add_argument("out", metavar="OUT", help="folder of the page")
    text = "list what a tree has and lacks of Med-MAT, where to get it, and which rows of tables 1 to 8 it allows"
    ledger = add(kinds, "ledger", data_ledger, text)
    ledger.add_argument("root", metavar="ROOT", help="folder of a Med-MAT tree; may be empty")

    convert = add(verbs, "convert", convert_weights, "released PyTorch checkpoint to Orbax, and back")
    convert.add_argument("src", metavar="SRC")
    convert.add_argument("dst", metavar="DST")
    convert.add_argument("--to", choices=("orbax", "hf"), default="orbax")
    for part, what in RELEASE_PARTS.items():
        convert.add_argument(f"--{part}", default="", metavar="PATH", help=what)
    parity = add(verbs, "parity", parity_check, "the same input through this port and the PyTorch reference")
    parity.add_argument("src", metavar="SRC", help="a released (HF) model directory")
    parity.add_argument("--inputs", default="", metavar="FILE.npz", help="numbers recorded elsewhere; needs no PyTorch")
    parity.add_argument("--record", default="", metavar="FILE.npz", help="write the reference's numbers, for --inputs")
    parity.add_argument("--against", default="", metavar="DIR", help="the released directory that SRC was made from")

    for name, run, text in (
        ("train", train_one, "one fine-tune"),
        ("eval", eval_one, "scores and predictions of a checkpoint on subsets"),
        ("reproduce", reproduce_grid, "a whole grid: base, cells, evaluation, report; run again, it goes on"),
        ("bench", bench_here, "throughput here, of this port and of the reference, in one run"),
    ):
        verb = add(verbs, name, run, text)
        verb.epilog = "--config.a.b=VALUE sets one field of the config."
        verb.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
        verb.add_argument("--workdir", default="", metavar="DIR")
        if name == "reproduce":
            verb.add_argument("--dry", action="store_true", help="list every cell with its size and stop")
            verb.add_argument("--jobs", type=int, default=0, metavar="N", help="processes that share the grid's cells")
        if name == "bench":
            verb.add_argument("--against", choices=("torch",), default="")
    report = add(verbs, "report", report_grid, "the page, tables and plots of a grid, from its files alone")
    report.add_argument("dir", metavar="DIR", help="workdir of a grid")
    report.add_argument("other", metavar="OTHER", nargs="?", default="", help="another grid's, to compare with")
    report.add_argument("--format", default="", metavar="md,tex,csv", help="forms beside the page")
    report.add_argument("--out", default="", metavar="FOLDER", help="where a comparison goes")
    return top


def add(verbs, name: str, run, text: str) -> Parser:
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    verb.add_argument("--json", default="", metavar="FILE", help="also write the result as one JSON object")
    verb.set_defaults(run=run)
    return verb


def data_stats(args) -> dict:
    from medcg_jax.data.stats import write_stats

    page = write_stats(args.root, args.out, progress=progress)
    print(page)
    return {"page": str(page)}


def add_reading(verb: Parser) -> None:
    verb.add_argument(
        "--max_bad_frac", type=fraction, default=0.0, metavar="FRAC", help="share of bad records that is accepted (0)"
    )
    for name, what in (
        ("window", "of DICOM and deep greys: a preset (lung, brain, ...) or CENTER/WIDTH; default: the file's own"),
        ("deep_grey", "greys of 16 bits: range, percentile or window"),
        ("frame", "of several: first, middle, last or a number from 0"),
    ):
        verb.add_argument(f"--{name}", default=getattr(DataConfig(), name), help=what)
    verb.add_argument("--max_pixels", type=int, default=DataConfig().max_pixels, metavar="N", help="of an image")


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: 0 to 1 is accepted")
    return value


def resolved(args: argparse.Namespace) -> RunConfig:
    from medcg_jax.config_file import load

    if getattr(args, "jobs", 0):
        args.overrides["study.jobs"] = str(args.jobs)
    return load(args.config, args.overrides)


def workdir(args: argparse.Namespace, run: RunConfig) -> Path:
    return Path(args.workdir or Path("runs") / run.name)


def data_phantom(args) -> dict:
    from medcg_jax.data.phantom import write_release
    from medcg_jax.data.phantom_boxes import PhantomBoxSource

    out = Path(args.out)
    source = PhantomBoxSource(args.seed, args.train, args.test)
    write_release(source, out)
    number, boxes = len(source.subsets), len(source.detection_subsets)
    sizes = f"{args.train} training and {args.test} test records each"
    print(f"{number} subsets of questions, {boxes} of boxes, {sizes}: {out}")
    return {"out": str(out), "subsets": number, "detection_subsets": boxes, "fingerprint": source.fingerprint()}


def data_check(args) -> dict:
    from medcg_jax.data import prepared
    from medcg_jax.data.check import check_tree, print_report
    from medcg_jax.data.reading import Reading

    if prepared.is_prepared(args.root):
        wrong = prepared.verify(args.root)
        print("\n".join(wrong) or f"{args.root}: every shard has the bytes that were written")
        return {"ok": not wrong, "shards": wrong, "exit_status": 2 if wrong else 0}
    reading = Reading(args.window, args.deep_grey, args.frame)
    report = check_tree(args.root, args.max_pixels, reading, progress=progress)
    print_report(report)
    return report.as_dict() | {"exit_status": 0 if report.acceptable(args.max_bad_frac) else 2}


def data_prepare(args) -> dict:
    from medcg_jax.data.check import print_report
    from medcg_jax.data.layouts import parse_layout
    from medcg_jax.data.prepare import TooManyBad, prepare

    data = DataConfig(
        train_records_per_subset=args.train_records, test_records_per_subset=args.test_records, seed=args.seed,
        max_pixels=args.max_pixels, window=args.window, deep_grey=args.deep_grey, frame=args.frame,
    )  # fmt: skip
    layout, options = parse_layout(args.image), {"max_bad_frac": args.max_bad_frac, "drop_near": args.near == "drop"}
    try:
        done = prepare(args.root, args.out, data, layout, workers=args.workers, progress=progress, **options)
    except TooManyBad as error:
        print_report(error.report)
        raise
    numbers = {split: sum(entry[split] for entry in done.manifest["subsets"]) for split in ("train", "test")}
    aside, subsets = done.manifest["set_aside"], len(done.manifest["subsets"])
    print(f"{args.out}: {subsets} subsets, {numbers['train']} training and {numbers['test']} test records")
    near = done.manifest["near"]
    if near["training_records"]:
        what = "kept (--near=drop leaves them out)" if near["kept"] else "left out"
        print(f"{near['training_records']} training records nearly have a test record's image: {what}")
    print(f"{aside['records']} of {aside['of']} set aside; {done.shards_written} shards written in {done.seconds:.1f} s")
    return {"out": args.out, **numbers, "set_aside": aside, "shards_written": done.shards_written}


def data_format(args) -> dict:
    from medcg_jax.data.questions import format_labels

    triplet = (args.modality, args.area, args.task) if args.modality or args.area or args.task else None
    done = format_labels(
        args.labels, args.root, args.subset, seed=args.seed, data_no=args.data_no, triplet=triplet,
        as_choice=args.form == "choice", force=args.force,
    )  # fmt: skip
    print(f"{', '.join(done['files'])}: {done['train']} training and {done['test']} test records")
    print(f"{len(done['labels'])} labels: {', '.join(done['labels'])}; {done['left_out']} images left out")
    return done


def progress(items, total: int):
    """A bar on a terminal; nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, total=total, disable=None)


def data_ledger(args) -> dict:
    from medcg_jax.study.ledger import read_ledger
    from medcg_jax.study.ledger_text import print_ledger

    ledger = read_ledger(args.root)
    print_ledger(ledger)
    return ledger.as_dict()


def convert_weights(args) -> dict:
    from medcg_jax.weights.convert import convert

    parts = {name: Path(path) for name in RELEASE_PARTS if (path := getattr(args, name))}
    return convert(Path(args.src), Path(args.dst), to=args.to, parts=parts)


def parity_check(args) -> dict:
    from medcg_jax.scale.parity import parity

    files = {name: Path(getattr(args, name)) for name in ("inputs", "record", "against") if getattr(args, name)}
    return parity(Path(args.src), **files)


def train_one(args) -> dict:
    run = resolved(args)
    from medcg_jax.train.run import train

    return train(run, workdir(args, run))


def eval_one(args) -> dict:
    run = resolved(args)
    from medcg_jax.eval.subsets import evaluate_subsets

    return evaluate_subsets(run, workdir(args, run))


def reproduce_grid(args) -> dict:
    run = resolved(args)
    if run.study.cells_at_once == 0 and not args.dry:
        run = with_as_many_cells_as_fit(run)
    if args.dry:
        from medcg_jax.study.dry import dry

        return dry(run)
    from medcg_jax.study import backbones, grid

    if run.study.models:
        return backbones.reproduce_models(run, workdir(args, run))
    return grid.reproduce(run, workdir(args, run))


def with_as_many_cells_as_fit(run: RunConfig) -> RunConfig:
    """The run with `study.cells_at_once` from the memory of the devices here.

    Raises:
      RuntimeError: not one cell fits.
    """
    from medcg_jax.run_config import replace

    if run.study.models:
        raise ConfigError("study.cells_at_once=0: a number is accepted where study.models has several models")
    from medcg_jax.scale.cells import fitting_run, print_fit

    fit = fitting_run(run, "local", num_groups=max(1, run.mesh.cell))
    print_fit({"topology": "local", "num_groups": max(1, run.mesh.cell), **vars(fit)})
    if not fit.num_cells:
        raise RuntimeError("RESOURCE_EXHAUSTED: not one cell fits the devices here")
    return replace(run, study__cells_at_once=fit.num_cells)


def report_grid(args) -> dict:
    from medcg_jax.study import report, report_backbones, report_compare, report_formats

    formats = report_formats.check_formats(args.format)
    if args.other:
        page = report_compare.write_comparison(args.dir, args.other, args.out)
        print(page)
        return {"page": str(page)}
    if args.out:
        raise ConfigError(f"--out={args.out}: accepted with a second DIR alone; a grid's report lies in its workdir")
    models = report_backbones.models_in(Path(args.dir))
    for model in models:
        report.write_report(Path(args.dir) / model, formats)
    if models:
        page = report_backbones.write_page(Path(args.dir), models)
    else:
        page = report.write_report(Path(args.dir), formats)
        print((page.parent / "summary.txt").read_text(encoding="utf-8"))
    print(page)
    return {"page": str(page)}


def bench_here(args) -> dict:
    from medcg_jax.scale.bench import bench

    return bench(resolved(args), against=args.against)


def write_json(path: Path, result: dict) -> None:
    write_whole(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
