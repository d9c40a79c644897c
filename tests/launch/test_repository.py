"""Files that other programs read: the Dockerfile, GitHub's workflows and templates. Everything that they name is there."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from medcg_jax import cli

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# An exact version of Python on a named release of Debian.
PINNED = re.compile(r"ARG BASE=python:\d+\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, comments taken off, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1].strip()) for line in joined.splitlines() if line.strip()]


def faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile of this project."""
    wrong, steps = [], instructions(text)
    if not PINNED.search(text):
        wrong.append("base not pinned")
    wrong += [f"FROM {value}" for name, value in steps if name == "FROM" and value.split()[0] != "${BASE}"]
    for name, value in steps:
        if name == "COPY" and "--from" not in value:
            sources = value.split()[:-1]
            wrong += [f"COPY {source}" for source in sources if not (ROOT / source).exists()]
        if name in ("ENV", "ARG") and re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", value):
            wrong.append(f"{name} {value}")
    users = [value for name, value in steps if name == "USER"]
    if not users or not users[-1].isdigit() or int(users[-1]) == 0:
        wrong.append("user is root")
    if "medcg --version" not in text:
        wrong.append("not tried")
    return wrong


def test_the_dockerfile_is_sound():
    assert not faults(DOCKERFILE)


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("python:3.12.12-slim-bookworm", "python:3", "base not pinned"),
        ("FROM ${BASE} AS build", "FROM debian AS build", "FROM debian AS build"),
        ("COPY configs configs", "COPY config configs", "COPY config"),
        ("USER 1000", "USER 0", "user is root"),
        ("USER 1000", "", "user is root"),
        ("ARG DEVICE=cpu", "ARG DEVICE=cpu\nARG HF_TOKEN=hf_x", "ARG HF_TOKEN=hf_x"),
        ("/opt/medcg/bin/medcg --version", "true", "not tried"),
    ],
)
def test_a_fault_of_a_dockerfile_is_seen(before, after, fault):
    assert before in DOCKERFILE
    assert fault in faults(DOCKERFILE.replace(before, after))


def test_the_image_has_every_kind_of_device_that_there_is_an_extra_for():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    kinds = re.search(r"\n +(\w+) \| (\w+)\) extra=", DOCKERFILE)
    assert kinds and set(kinds.groups()) == {"cuda", "tpu"} <= set(extras)


def test_the_build_sees_what_the_dockerfile_copies_and_no_more():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    steps = instructions(DOCKERFILE)
    copied = {
        source for name, value in steps if name == "COPY" and "--from" not in value for source in value.split()[:-1]
    }
    assert set(allowed) == copied
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if not hadolint:
        pytest.skip("no hadolint here: pip install -e '.[docs]'")

    def lint(text: str) -> subprocess.CompletedProcess:
        return subprocess.run([hadolint, "-"], input=text, capture_output=True, text=True, timeout=60, check=False)

    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout
    assert lint(DOCKERFILE.replace("WORKDIR /work", "WORKDIR work")).returncode != 0


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_docker_builds_the_image_for_a_cpu():
    if not shutil.which("docker"):
        pytest.skip("no docker here")
    if subprocess.run(["docker", "info"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("docker is here and its daemon does not answer")
    tag = "medcg-test:cpu"
    subprocess.run(["docker", "build", "--build-arg", "DEVICE=cpu", "--tag", tag, "."], cwd=ROOT, check=True)
    ask = ["docker", "run", "--rm", "--entrypoint", "sh", tag, "-c"]
    done = subprocess.run([*ask, "medcg --version && id -u"], capture_output=True, text=True, check=True)
    assert re.match(r"medcg \d", done.stdout) and done.stdout.splitlines()[-1] == "1000"
    subprocess.run(["docker", "image", "rm", tag], capture_output=True, check=False)


def steps_of(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def command_faults(script: str) -> list[str]:
    """Files and arguments in a workflow's commands that are not there."""
    wrong = []
    for line in script.splitlines():
        words = shlex.split(line)
        if words[0] == "bash" and not (ROOT / words[1]).is_file():
            wrong.append(words[1])
        if words[0].endswith("medcg") and "--version" not in words:
            cli.parse(words[1:])
        if words[:3] == ["python", "-m", "sphinx"] and not (ROOT / words[words.index("-c") + 1] / "conf.py").is_file():
            wrong.append("conf.py")
    return wrong


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_what_is_there_and_asks_for_little(path):
    workflow = yaml.safe_load(path.read_text())
    # YAML 1.1 reads the key `on` as true.
    assert set(workflow) >= {"name", True, "permissions", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] <= 180
    for step in steps_of(workflow):
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
        assert not command_faults(step.get("run", ""))


def test_the_workflows_cover_tests_site_wheel_and_image():
    assert [path.stem for path in WORKFLOWS] == ["docs", "package", "tests"]
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in WORKFLOWS}
    (job,) = workflows["tests"]["jobs"].values()
    with (ROOT / "pyproject.toml").open("rb") as file:
        least = tomllib.load(file)["project"]["requires-python"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert least.startswith(">=3.11")
    scripts = {name: "\n".join(step.get("run", "") for step in steps_of(flow)) for name, flow in workflows.items()}
    assert "bash .ci/run" in scripts["tests"]
    assert "sphinx --fail-on-warning" in scripts["docs"]
    assert "pip wheel" in scripts["package"] and "docker build" in scripts["package"]
    assert command_faults("bash launch/none.sh") == ["launch/none.sh"]


def test_the_templates_are_forms():
    for name in ("bug", "question"):
        form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert form["name"] and form["description"]
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields) >= 2
        assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields)
        assert any(field.get("validations", {}).get("required") for field in fields)
    assert yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "config.yml").read_text()) == {"blank_issues_enabled": True}
    request = (GITHUB / "pull_request_template.md").read_text()
    assert len(request.splitlines()) < 10
    assert all((ROOT / name).exists() for name in re.findall(r"`((?:launch|docs)/[\w.]*)", request))
