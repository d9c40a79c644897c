"""Every command in the documentation: its verb and flags are known, its config loads, its script is there."""

import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from medcg_jax import cli
from medcg_jax.config_file import load

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "BUILD_NOTES.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
# Programs of others.
FOREIGN = {"pip", "hf", "kaggle", "pre-commit", "git", "gcloud", "kubectl", "sbatch"}
LINK = re.compile(r"\]\(([^)#]+)\)")


def commands(text: str) -> list[str]:
    """The commands of a page's bash blocks, continued lines joined, comments taken off."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) and line for line in lines if shlex.split(line, comments=True)]


def check(command: str) -> None:
    """Raises where a command could not be started as it stands."""
    words = shlex.split(command, comments=True)
    if words[0] == "medcg":
        args = cli.parse(words[1:])
        if getattr(args, "config", ""):
            load(args.config, args.overrides)
    elif words[0] == "bash":
        script = ROOT / words[1]
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
        inner = next((i for i, word in enumerate(words) if word in ("train", "reproduce", "eval")), None)
        if inner is not None:
            check(shlex.join(["medcg", *words[inner:]]))
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), f"{command}: no module {words[2]}"
    else:
        assert words[0] in FOREIGN, f"{command}: unknown program"


CASES = [(page, command) for page in PAGES for command in commands((ROOT / page).read_text())]


@pytest.mark.parametrize(("page", "command"), CASES, ids=lambda value: value[:60])
def test_a_command_in_the_documentation_can_be_started(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(command)


@pytest.mark.parametrize(
    "command",
    ["medcg trian --config=configs/phantom.py", "medcg train --config=configs/none.py", "bash launch/none.sh",
     "medcg train --config=configs/phantom.py --config.train.lerning_rate=1", "python -m benchmarks.none", "rm -r x"],
)  # fmt: skip
def test_a_wrong_command_is_seen(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        check(command)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_documentation_lead_somewhere(page):
    links = [link for link in LINK.findall((ROOT / page).read_text()) if not link.startswith("http")]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing
