"""`medcg data WHAT`: reads flags and calls one function of the data room."""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from medcg_jax.cli_checks import check_tree_folder
from medcg_jax.cli_parser import Parser, add, add_amount
from medcg_jax.config import PHANTOM_RULES, ConfigError, DataConfig
from medcg_jax.data.records import DataError
from medcg_jax.data.sources import is_prepared
from medcg_jax.terminal import bar, shows_progress

# The release's questions.
MED_MAT, MED_MAT_REPOSITORY = "Med-MAT", "FreedomIntelligence/Med-MAT"


def add_data(verbs) -> None:
    """Adds the verb `data` with its subcommands."""
    data = verbs.add_parser("data", help="write the phantom world, check a Med-MAT tree, list what it has")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="WHAT")
    phantom = add(kinds, "phantom", data_phantom, "write the phantom world in the release's layout")
    phantom.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--decoys", type=fraction, default=1.0, metavar="SHARE", help="of images with decoys")
    phantom.add_argument("--rule", choices=PHANTOM_RULES, default="shared", help="behind the answers")
    phantom.add_argument("--train", type=int, default=300, metavar="N", help="training records per subset")
    phantom.add_argument("--test", type=int, default=300, metavar="N", help="test records per subset")
    check = add(
        kinds, "check", data_check, "report, per record of a tree, what is missing, broken, unsafe or duplicated"
    )
    check.add_argument("root", metavar="ROOT", help="folder of a Med-MAT tree, or one that was prepared")
    add_amount(check)
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
    prepare.add_argument("--seed", type=int, default=0, help="of the choice of records under these limits")
    prepare.add_argument(
        "--near", choices=("keep", "drop"), default="keep", help="training records that nearly have a test's image"
    )
    prepare.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0: one per core")
    add_reading(prepare)
    add_amount(prepare)

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
    add_amount(stats)
    text = "fetch questions from the Hugging Face hub; say where the images are to be had"
    fetch = add(kinds, "fetch", data_fetch, text)
    text = "a data repository (OWNER/NAME, OWNER/NAME@REVISION); Med-MAT; or a subset of it, by its number (04)"
    fetch.add_argument("what", metavar="WHAT", help=text)
    fetch.add_argument("out", metavar="OUT", nargs="?", default="", help="folder; default: the hub's cache")
    text = "list what a tree has and lacks of Med-MAT, where to get it, and which rows of tables 1 to 8 it allows"
    ledger = add(kinds, "ledger", data_ledger, text)
    ledger.add_argument("root", metavar="ROOT", help="folder of a Med-MAT tree; may be empty, or not there yet")


def add_reading(verb: Parser) -> None:
    verb.add_argument(
        "--max_bad_frac", type=fraction, default=0.0, metavar="FRAC", help="greatest share of bad records (0)"
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
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 1")
    return value


def data_phantom(args) -> dict:
    from medcg_jax.data.phantom.source import PhantomSource, write_release

    out = Path(args.out)
    source = PhantomSource(args.seed, args.train, args.test, decoys=args.decoys, rule=args.rule)
    write_release(source, out)
    number, boxes = len(source.subsets), len(source.detection_subsets)
    sizes = f"{args.train} training and {args.test} test records each"
    print(f"{number} subsets of questions, {boxes} of boxes, {sizes}: {out}")
    return {"out": str(out), "subsets": number, "detection_subsets": boxes, "fingerprint": source.fingerprint()}


def data_check(args) -> dict:
    if not Path(args.root).is_dir():
        raise DataError(f"{args.root}: no such folder; expected that of a Med-MAT tree")
    if is_prepared(args.root):
        from medcg_jax.data import prepared

        faults = prepared.verify(args.root)
        print("\n".join(faults) or f"{args.root}: every record and every shard has the bytes that were written")
        return {"ok": not faults, "shards": faults, "exit_status": 2 if faults else 0}
    from medcg_jax.data.check import check_tree, print_report
    from medcg_jax.data.reading import Reading

    reading = Reading(args.window, args.deep_grey, args.frame)
    report = check_tree(args.root, args.max_pixels, reading, progress=progress)
    print_report(report)
    return report.as_dict() | {"exit_status": 0 if report.acceptable(args.max_bad_frac) else 2}


def data_prepare(args) -> dict:
    check_tree_folder(args.root)
    from medcg_jax.data.check import Dim, dim_warning, print_report
    from medcg_jax.data.layouts import parse_layout
    from medcg_jax.data.prepare import TooManyBad, prepare

    data = DataConfig(
        train_records_per_subset=args.train_records, test_records_per_subset=args.test_records, seed=args.seed,
        max_pixels=args.max_pixels, window=args.window, deep_grey=args.deep_grey, frame=args.frame,
    )  # fmt: skip
    layout, options = parse_layout(args.image), {"max_bad_frac": args.max_bad_frac, "drop_near": args.near == "drop"}
    try:
        prepared = prepare(args.root, args.out, data, layout, workers=args.workers, progress=progress, **options)
    except TooManyBad as error:
        print_report(error.report)
        raise
    manifest = prepared.manifest
    numbers = {split: sum(entry[split] for entry in manifest["subsets"]) for split in ("train", "test")}
    aside, subsets = manifest["set_aside"], len(manifest["subsets"])
    print(f"{args.out}: {subsets} subsets, {numbers['train']} training and {numbers['test']} test records")
    near = manifest["near"]
    if near["training_records"]:
        action = "kept (--near=drop leaves them out)" if near["kept"] else "left out"
        print(f"{near['training_records']} training records nearly have a test record's image: {action}")
    # A folder of an older version has neither of these.
    dim, read_as = manifest.get("dim", {"images": 0}), manifest.get("read_as", {})
    if read_as:
        print(f"read as: {', '.join(f'{count} {way}' for way, count in read_as.items())}")
    if dim["images"]:
        print(dim_warning(dim["images"], Dim(**dim["least"][0])))
    shards = prepared.shards_written
    print(f"{aside['records']} of {aside['of']} set aside; {shards} shards written in {prepared.seconds:.1f} s")
    counts = {**numbers, "set_aside": aside, "shards_written": shards}
    return {"out": args.out, **counts, "read_as": read_as, "dim": dim}


def data_format(args) -> dict:
    from medcg_jax.data.questions import format_labels

    triplet = (args.modality, args.area, args.task) if args.modality or args.area or args.task else None
    written = format_labels(
        args.labels, args.root, args.subset, seed=args.seed, data_no=args.data_no, triplet=triplet,
        as_choice=args.form == "choice", force=args.force,
    )  # fmt: skip
    print(f"{', '.join(written['files'])}: {written['train']} training and {written['test']} test records")
    for warning in written["warnings"]:
        print(f"warning: {warning}")
    print(f"{len(written['labels'])} labels: {', '.join(written['labels'])}; {written['left_out']} images left out")
    return written


def progress(items, total: int):
    """A bar on a terminal, elsewhere a line at the start; nothing with --quiet."""
    if shows_progress() and not sys.stderr.isatty():
        print(f"reading {total} images", file=sys.stderr, flush=True)
    return bar(items, total, "images")


def data_stats(args) -> dict:
    check_tree_folder(args.root)
    from medcg_jax.data.stats import write_stats

    def report(text: str) -> None:
        if shows_progress():
            print(text, file=sys.stderr, flush=True)

    page = write_stats(args.root, args.out, progress=progress, report=report)
    print(page)
    return {"page": str(page)}


def data_fetch(args) -> dict:
    from medcg_jax.data import catalogue
    from medcg_jax.families.weights.hub import REPOSITORY, fetch_data
    from medcg_jax.study.design.ledger_text import address_lines

    subset = catalogue.subsets().get(args.what)
    if not subset and args.what != MED_MAT and not REPOSITORY.fullmatch(args.what):
        raise ConfigError(f"{args.what}: expected OWNER/NAME of the Hugging Face hub, {MED_MAT}, or a subset, 01 to 53")
    if not subset and args.what != MED_MAT:
        repository, members = args.what, []
    else:
        every = catalogue.datasets()
        repository, members = MED_MAT_REPOSITORY, [every[number] for number in (subset.datasets if subset else every)]
        # Before the questions, which are behind a form.
        print(f"The images of these {len(members)} datasets are their hosts', each under terms of its own:")
        print("\n".join(address_lines(members)), flush=True)
        if subset and not subset.released:
            print(
                f"subset {subset.number}: its questions are not released; `medcg data format` makes some of its labels"
            )
    folder = fetch_data(repository, Path(args.out) if args.out else None)
    print(folder)
    return {"folder": str(folder), "elsewhere": {dataset.number: list(dataset.addresses) for dataset in members}}


def data_ledger(args) -> dict:
    from medcg_jax.study.design.ledger import read_ledger
    from medcg_jax.study.design.ledger_text import print_ledger

    if not Path(args.root).exists():
        print(f"{args.root}: no such folder yet, so all of Med-MAT is missing; this is where to get it")
        with tempfile.TemporaryDirectory() as empty:
            ledger = dataclasses.replace(read_ledger(empty), root=args.root)
    else:
        ledger = read_ledger(args.root)
    print_ledger(ledger)
    return ledger.as_dict() | {"exit_status": 2 if ledger.is_broken else 0}
