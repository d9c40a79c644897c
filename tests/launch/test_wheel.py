"""The installed wheel: everything that the package reads at run time is in it, and nothing of the checkout is needed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    out = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves folders beside what it builds.
    copy = out / "checkout"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and name.startswith(
            ("medcg_jax/", "configs/", "pyproject", "setup", "README", "LICENSE")
        ):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(out), str(copy)], check=True, capture_output=True, timeout=200)
    (path,) = out.glob("*.whl")
    return path


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".py", ".csv", ".json", ".txt", ".j2", ".typed")
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "medcg_jax").rglob("*") if path.suffix in kinds}
    wanted |= {f"medcg_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert not wanted - packed
    entries = next(name for name in packed if name.endswith("entry_points.txt"))
    assert b"medcg = medcg_jax.cli:run" in zipfile.ZipFile(wheel).read(entries)


def test_the_wheel_finds_its_configs_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import medcg_jax; from medcg_jax.config_file import load\n"
        "print(load('configs/llava15_13b.py').model.name, medcg_jax.__file__)"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["llava15_13b", str(tmp_path / "site" / "medcg_jax" / "__init__.py")], done.stderr
