"""A grid as an indexed Job on Kubernetes: every pod runs the same `medcg reproduce` on one workdir, on a shared volume.

    python launch/gke/submit.py --name=pairs --tasks=8 --image=IMAGE --claim=CLAIM --tpu=tpu-v6e-slice --topology=2x4 \\
        [--dry-run] -- --config=configs/table3.py:llava15_7b --workdir=/grids/pairs

Fills in job.yaml beside this file and gives it to `kubectl apply -f -`; with --dry-run prints it and submits nothing.
Needs Python alone, and kubectl to submit.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from string import Template

# Where the volume is mounted in every pod.
MOUNT = "/grids"
# The most chips that one TPU machine of GKE has; a slice of several machines would be one program over all of them.
MAX_CHIPS = 8
MAX_HOST_NAME = 63


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, and as `reproduce` what follows `--`; exits with status 2 and the reason where they cannot be used."""
    parser = argparse.ArgumentParser(
        prog="submit.py", usage="%(prog)s [options] -- --config=FILE.py[:ARG] --workdir=/grids/NAME [...]",
        description="A grid as an indexed Job on Kubernetes.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--name", required=True, help="of the Job; its pods are NAME-0, NAME-1, ...")
    parser.add_argument("--tasks", required=True, type=positive, metavar="N", help="pods in all")
    parser.add_argument("--at-once", type=positive, metavar="K", help="pods at a time; all unless given")
    add_pod(parser, topology="of one machine, as 2x4", gpus=1)
    parser.add_argument("reproduce", nargs="*", metavar="ARGUMENT", help="of `medcg reproduce`, after --")
    args = parser.parse_args(argv)
    if why := unusable(args):
        parser.error(why)
    return args


def add_pod(parser: argparse.ArgumentParser, *, topology: str, gpus: int) -> None:
    """Adds the flags of a pod, and --dry-run. topology: what one is of; gpus: of a pod, unless given."""
    parser.add_argument("--image", required=True, help="a container image in which the project is installed")
    parser.add_argument("--claim", required=True, help=f"PersistentVolumeClaim, ReadWriteMany, mounted at {MOUNT}")
    parser.add_argument("--tpu", metavar="TYPE", help="cloud.google.com/gke-tpu-accelerator, as tpu-v6e-slice")
    parser.add_argument("--topology", metavar="AxB", help=f"cloud.google.com/gke-tpu-topology {topology}")
    parser.add_argument("--gpu", metavar="TYPE", help="cloud.google.com/gke-accelerator, as nvidia-h100-80gb")
    text = f"GPUs of a pod; {gpus} unless given"
    parser.add_argument("--gpus", type=positive, default=gpus, metavar="N", help=text)
    parser.add_argument("--cpu", metavar="QUANTITY", help="cores that a pod asks for")
    parser.add_argument("--memory", metavar="QUANTITY", help="memory that a pod asks for, as 64Gi")
    parser.add_argument(
        "--select", action="append", default=[], type=label, metavar="KEY=VALUE",
        help="a further label of the nodes, as cloud.google.com/gke-spot=true; may be given again",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")


def positive(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; a whole number from 1 is accepted")
    return int(text)


def label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; KEY=VALUE is accepted")
    return key, value


def unusable(args: argparse.Namespace) -> str:
    """Why the flags together cannot be used; "" where they can."""
    longest = f"{args.name}-{args.tasks - 1}"
    if not re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", args.name) or len(longest) > MAX_HOST_NAME:
        return (f"argument --name: {args.name!r}; letters a to z, digits and - are accepted, as many as leave the host "
                f"name {longest!r} at most {MAX_HOST_NAME} characters")  # fmt: skip
    if args.tpu and args.gpu:
        return "argument --tpu: not with --gpu; one of them is accepted"
    if bool(args.tpu) != bool(args.topology):
        return "argument --topology: with --tpu, and only with it"
    if args.topology and (not re.fullmatch("[0-9]+(x[0-9]+)+", args.topology) or not 0 < chips(args) <= MAX_CHIPS):
        return (f"argument --topology: {args.topology!r}; that of one machine is accepted, of at most {MAX_CHIPS} "
                "chips, as 2x4 or 2x2x1")  # fmt: skip
    workdirs = [argument.partition("=")[2] for argument in args.reproduce if argument.startswith("--workdir=")]
    path = PurePosixPath(workdirs[-1] if workdirs else "")
    if PurePosixPath(MOUNT) not in path.parents or ".." in path.parts:
        return f"argument --workdir (after --): {str(path)!r}; a folder below {MOUNT}, the volume, is accepted"
    return ""


def chips(args: argparse.Namespace) -> int:
    return math.prod(map(int, args.topology.split("x")))


def job(args: argparse.Namespace) -> str:
    """The Job as YAML; what is filled in is JSON, which is YAML too."""
    selector = dict(args.select)
    requests = {name: value for name in ("cpu", "memory") if (value := getattr(args, name))}
    limits: dict[str, int] = {}
    if args.tpu:
        selector["cloud.google.com/gke-tpu-accelerator"] = args.tpu
        selector["cloud.google.com/gke-tpu-topology"] = args.topology
        limits["google.com/tpu"] = chips(args)
    if args.gpu:
        selector["cloud.google.com/gke-accelerator"] = args.gpu
        limits["nvidia.com/gpu"] = args.gpus
    values = {
        "name": args.name,
        "tasks": args.tasks,
        "at_once": min(args.at_once or args.tasks, args.tasks),
        "image": args.image,
        "claim": args.claim,
        "arguments": args.reproduce,
        "node_selector": selector,
        "requests": requests,
        "limits": limits,
    }
    text = (Path(__file__).parent / "job.yaml").read_text(encoding="utf-8")
    return Template(text).substitute({name: json.dumps(value) for name, value in values.items()}, mount=MOUNT)


def apply(text: str) -> int:
    """Gives the YAML to kubectl; returns its exit status."""
    try:
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=False).returncode
    except FileNotFoundError:
        print("submit.py: no kubectl on this machine; --dry-run prints what it would be given", file=sys.stderr)
        return 1


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    text = job(args)
    if args.dry_run:
        print(text, end="")
        return 0
    return apply(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
