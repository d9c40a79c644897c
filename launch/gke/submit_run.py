"""One run over several hosts of GKE as a JobSet: every pod is one process, joined by jax.distributed.

    python launch/gke/submit_run.py --name=llava --hosts=4 --image=IMAGE --claim=CLAIM --tpu=tpu-v6e-slice \\
        --topology=4x4 [--dry-run] -- train --config=configs/llava15_7b.py --workdir=/grids/llava

Fills in run.yaml beside this file and gives it to `kubectl apply -f -`; with --dry-run prints it and submits nothing.
Needs Python alone, and kubectl to submit; the cluster needs JobSet (jobset.sigs.k8s.io), 0.8 or later.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from string import Template

from submit import MAX_HOST_NAME, MOUNT, add_pod, apply, positive

VERBS = ("train", "eval", "reproduce")
# The one that jax.distributed uses by default on Cloud TPUs.
PORT = 8476


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, and as `verb` what follows `--`; exits with status 2 and the reason where they cannot be used."""
    parser = argparse.ArgumentParser(
        prog="submit_run.py", usage="%(prog)s [options] -- VERB --config=FILE.py[:ARG] --workdir=/grids/NAME [...]",
        description="One run over several hosts as a JobSet on Kubernetes.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--name", required=True, help="of the JobSet; its pods are NAME-hosts-0-0, NAME-hosts-0-1, ...")
    parser.add_argument("--hosts", required=True, type=positive, metavar="N", help="pods, each on a machine of its own")
    add_pod(parser, topology="of the slice, as 4x4", gpus=8)
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="after failures; 3 unless given")
    parser.add_argument("verb", nargs="*", metavar="ARGUMENT", help="of `medcg`, after --")
    args = parser.parse_args(argv)
    if why := unusable(args):
        parser.error(why)
    return args


def unusable(args: argparse.Namespace) -> str:
    """Why the flags together cannot be used; "" where they can."""
    longest = f"{args.name}-hosts-0-{args.hosts - 1}"
    if not re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", args.name) or len(longest) > MAX_HOST_NAME:
        return (f"argument --name: {args.name!r}; letters a to z, digits and - are accepted, as many as leave the host "
                f"name {longest!r} at most {MAX_HOST_NAME} characters")  # fmt: skip
    if args.tpu and args.gpu:
        return "argument --tpu: not with --gpu; one of them is accepted"
    if bool(args.tpu) != bool(args.topology):
        return "argument --topology: with --tpu, and only with it"
    if args.topology:
        chips = math.prod(map(int, args.topology.split("x"))) if re.fullmatch("[0-9]+(x[0-9]+)+", args.topology) else 0
        if not chips or chips % args.hosts or chips // args.hosts not in (1, 4, 8):
            return (f"argument --topology: {args.topology!r}; one of 1, 4 or 8 chips for each of {args.hosts} hosts is "
                    "accepted, as 4x4 of 4 hosts")  # fmt: skip
    if args.restarts < 0:
        return f"argument --restarts: {args.restarts}; 0 or more is accepted"
    if not args.verb or args.verb[0] not in VERBS:
        return f"argument VERB (after --): {' '.join(args.verb[:1])!r}; {', '.join(VERBS)} are accepted"
    workdirs = [argument.partition("=")[2] for argument in args.verb if argument.startswith("--workdir=")]
    path = PurePosixPath(workdirs[-1] if workdirs else "")
    if PurePosixPath(MOUNT) not in path.parents or ".." in path.parts:
        return f"argument --workdir (after --): {str(path)!r}; a folder below {MOUNT}, the volume, is accepted"
    return ""


def jobset(args: argparse.Namespace) -> str:
    """The JobSet as YAML; what is filled in is JSON, which is YAML too."""
    selector, limits = dict(args.select), {}
    if args.tpu:
        selector["cloud.google.com/gke-tpu-accelerator"] = args.tpu
        selector["cloud.google.com/gke-tpu-topology"] = args.topology
        limits["google.com/tpu"] = math.prod(map(int, args.topology.split("x"))) // args.hosts
    if args.gpu:
        selector["cloud.google.com/gke-accelerator"] = args.gpu
        limits["nvidia.com/gpu"] = args.gpus
    values = {
        "image": args.image,
        "claim": args.claim,
        "arguments": args.verb,
        "restarts": args.restarts,
        "node_selector": selector,
        "requests": {name: value for name in ("cpu", "memory") if (value := getattr(args, name))},
        "limits": limits,
    }
    text = (Path(__file__).parent / "run.yaml").read_text(encoding="utf-8")
    filled = {name: json.dumps(value) for name, value in values.items()}
    return Template(text).substitute(filled, name=args.name, hosts=args.hosts, mount=MOUNT, port=PORT)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    text = jobset(args)
    if args.dry_run:
        print(text, end="")
        return 0
    return apply(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
