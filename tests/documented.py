"""The commands of the documentation, page by page, and which of them cannot run in an empty folder."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "BUILD_NOTES.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("launch/*/README.md")),
]
VERBS = ("train", "eval", "reproduce")
# Launchers that another machine answers; with --dry-run they check and print.
LAUNCHERS = ("launch/slurm/", "launch/tpu_vm/", "launch/gke/")
# What a command that cannot run here begins with, as an expression -> what it needs.
NOT_RUN = {
    r"(pip|pre-commit) install": "an installation",
    r"(hf|kaggle|gcloud|docker) ": "the network, or a program that may not be here",
    r"medcg data fetch ": "the network",
    r"medcg \w+ .*(llava-hf|microsoft)/": "the network",
    r"medcg (train|eval) --config=configs/llava15_7b.py": "released weights",
    r"medcg bench .*llava15_7b": "an accelerator",
    r"medcg plan ": "libtpu or XLA for GPUs, and minutes",
    r"medcg bench .*--against=torch": "minutes",
    r"medcg reproduce --config=configs/(table3|backbones_quick|phantom).py(:study|:null)? [^:]*--workdir=runs/\w+$": "hours",
    r"bash launch/(demo|test|bench_gpu).sh": "minutes, or a GPU",
    r"python -m (benchmarks|pytest|tests\b)": "the checkout, and minutes",
    r"python -m sphinx": "the checkout; tests/test_docs.py builds the site",
}


def commands(text: str) -> list[str]:
    """The commands of a page's bash blocks, continued lines joined, comments taken off."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) and line for line in lines if shlex.split(line, comments=True)]


def commands_of(page: str) -> list[str]:
    return commands((ROOT / page).read_text())


def needs(command: str) -> str:
    """What a command needs that an empty folder on two cores does not have; "": nothing."""
    words = " ".join(shlex.split(command, comments=True))
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, words)), "")


def is_launcher(words: list[str]) -> bool:
    return words[0] in ("bash", "python") and words[1].startswith(LAUNCHERS)


def inner_command(words: list[str]) -> list[str]:
    """The arguments of `medcg` in a launcher's command: behind `--`, else from the verb on; [] where there are none."""
    if "--" in words:
        inner = words[words.index("--") + 1 :]
        return inner if inner[0] in VERBS else ["reproduce", *inner]
    place = next((i for i, word in enumerate(words) if word in VERBS), None)
    return [] if place is None else words[place:]
