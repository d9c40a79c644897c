"""The documentation: its commands are known, its links lead somewhere, its site builds, what it makes is ignored by git."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from documented import PAGES, ROOT, commands_of, inner_command

import medcg_jax
from medcg_jax import cli
from medcg_jax.config_file import load

# Programs of others.
FOREIGN = {"pip", "hf", "kaggle", "pre-commit", "git", "gcloud", "kubectl", "sbatch", "docker"}
LINK = re.compile(r"\]\(([^)#]+)\)")
# Arguments of verbs that name what they write.
WRITTEN = ("workdir", "json", "out", "dst")


def check(command: str) -> None:
    """Raises where a command could not be started as it stands."""
    words = shlex.split(command, comments=True)
    if words[0] == "medcg":
        args = cli.parse(words[1:])
        if getattr(args, "config", ""):
            load(args.config, args.overrides)
    elif words[0] in ("bash", "python") and words[1].startswith("launch/"):
        script = ROOT / words[1]
        assert script.is_file(), f"{command}: no such script"
        if words[0] == "bash":
            subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
        if inner := inner_command(words):
            check(shlex.join(["medcg", *inner]))
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) or words[2] == "sphinx", f"{command}: no module {words[2]}"
    else:
        assert words[0] in FOREIGN, f"{command}: unknown program"


CASES = [(page, command) for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize(("page", "command"), CASES, ids=lambda value: value[:60])
def test_a_command_in_the_documentation_can_be_started(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(command)


@pytest.mark.parametrize(
    "command",
    ["medcg trian --config=configs/phantom.py", "medcg train --config=configs/none.py", "bash launch/none.sh",
     "medcg train --config=configs/phantom.py --config.train.lerning_rate=1", "python -m benchmarks.none", "rm -r x",
     "python launch/gke/submit.py --name=a -- --config=configs/none.py"],
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


def written_by(command: str) -> set[str]:
    """What a command of the documentation writes below the folder that it is started in."""
    words = shlex.split(command, comments=True)
    if words[0] == "kaggle":
        return {words[words.index("-p") + 1]}
    if words[0] == "python" and "sphinx" in words:
        return {words[-1]}
    inner = words[1:] if words[0] == "medcg" else inner_command(words)
    args = vars(cli.parse(inner)) if inner else {}
    paths = {str(args[name]) for name in WRITTEN if args.get(name)}
    if args.get("kind") == "format":
        paths.add(args["root"])
    if args.get("verb") in ("train", "reproduce") and not args["workdir"]:
        paths.add("runs")
    return {path for path in paths if not Path(path).is_absolute()}


def test_git_ignores_what_the_documentation_s_commands_write(tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git here")
    paths = sorted({path for page in PAGES for command in commands_of(page) for path in written_by(command)})
    assert {"Med-MAT", "prepared", "runs/first", "checkpoints/llava", "bench.json"} <= set(paths)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for path in paths:
        target = tmp_path / path if Path(path).suffix else tmp_path / path / "file.bin"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"x")

    def untracked() -> str:
        return subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=all"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    assert all(path in untracked() for path in paths)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    assert untracked() == "?? .gitignore\n"


def test_git_ignores_nothing_of_the_project():
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout == ""


def test_the_page_of_python_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"auto(?:function|class|data):: medcg_jax\.(\w+)", page))
    assert named == set(medcg_jax.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for module in ("sphinx", "myst_parser"):
        if not find_spec(module):
            pytest.skip(f"no {module} here: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "--fail-on-warning", "--keep-going", "-c", "docs"]
    done = subprocess.run(
        [*command, "-d", str(out / "trees"), ".", str(out / "html")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists():
                broken.append((page.name, link))
    assert not broken
    assert "url=docs/index.html" in (site / "index.html").read_text()
    for page in PAGES:
        assert (site / page).with_suffix(".html").is_file(), page


@pytest.mark.long
def test_the_page_of_python_shows_the_docstrings(site):
    text = re.sub(r"<[^>]+>", "", (site / "docs" / "api.html").read_text())
    for name in medcg_jax.__all__:
        assert f"medcg_jax.{name}" in text
        summary = (getattr(medcg_jax, name).__doc__ or "").partition("\n")[0] if name in ("load", "report") else ""
        assert summary.replace("`", "") in text
    for method in ("ask", "score", "generate", "choose", "locate"):
        assert re.search(rf"{method}\(\s*image", text)
    assert "train(config, workdir" in text and "one fine-tune" in text
