"""How the code hangs together: imports run one way, files stay short, and two parts work where packages are missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "medcg_jax"
MAX_LINES = 600

# Room (or file) of the package -> what of the package it may import. What may be imported by all: `axes` and `config`,
# which hold names and plain values only, `files` and `untrusted`.
BASICS = {"axes", "config", "config_checks", "files", "memory", "registry", "terminal", "untrusted"}
# What a room may know of the run's other processes, beside that.
SHARED = BASICS | {"processes"}
MODELS = SHARED | {"chips", "mesh", "nn", "data", "families"}
ALLOWED: dict[str, set[str]] = {
    # Names for Python, of which none is imported before its first use.
    "__init__": {"eval", "study", "train"},
    "axes": set(),
    "chips": set(),
    "files": {"config"},
    "untrusted": {"config"},
    "config": {"axes", "registry"},
    "config_checks": {"config", "registry"},
    "terminal": set(),
    "memory": set(),
    "__main__": {"cli"},
    "cli_parser": {"config", "config_file"},
    "cli_checks": BASICS | {"data", "eval", "families", "train"},
    "cli_config": {"cli_parser", "config", "config_fields", "config_file", "config_list"},
    "cli_ask": {"cli_parser", "config", "data", "eval", "families", "platform"},
    "cli_data": {"cli_checks", "cli_parser", "config", "terminal", "data", "families", "study"},
    "config_fields": {"config", "config_checks"},
    "config_list": {"config"},
    "cluster": {"config"},
    "rendezvous": {"cluster", "config"},
    "processes": {"cluster", "rendezvous", "config"},
    "witness": set(),
    "platform": set(),
    "config_file": {"files", "config", "config_checks", "config_list"},
    "mesh": SHARED,
    "nn": SHARED,
    "data": BASICS,
    "families": SHARED | {"nn", "mesh", "data"},
    "agreement": SHARED | {"data", "families"},
    "train": MODELS | {"cluster", "config_file", "platform"},
    "eval": MODELS | {"train"},
    "study": MODELS | {"agreement", "config_file", "platform", "train", "eval"},
    "plan": MODELS | {"platform", "train", "eval"},
    "parity": MODELS | {"train", "eval"},
    "bench": MODELS | {"platform", "train", "eval", "plan", "parity"},
}
# Within a room: part -> the other parts that it may import.
PARTS: dict[str, dict[str, set[str]]] = {
    "study": {"design": set(), "stats": {"design"}, "report": {"design", "stats"}, "run": {"design", "stats", "report"}}
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "cli.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """Top-level names of every import in `source`, at any depth; ours as "medcg_jax.ROOM"."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[:3] == ["medcg_jax", "families", "registry"]:
                parts = ["medcg_jax", "registry"]  # light, and known to the configuration
            names.add(".".join(parts[:2]) if parts[0] == "medcg_jax" else parts[0])
    return names


def forbidden(name: str, source: str) -> set[str]:
    """What `source`, standing in room `name`, imports of the package and may not."""
    ours = {item.partition(".")[2] for item in imported(source) if item.startswith("medcg_jax")}
    return ours - ALLOWED[name] - {name}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    assert room(path) in ALLOWED, f"{room(path)} has no line in ALLOWED"
    assert not forbidden(room(path), path.read_text())


@pytest.mark.parametrize("path", sorted((PACKAGE / "study").rglob("*.py")), ids=lambda path: path.stem)
def test_parts_of_the_study_import_one_way(path):
    part = path.parent.name
    names = {name for name in PARTS["study"] if f"medcg_jax.study.{name}" in path.read_text()}
    assert part == "study" or not names - PARTS["study"][part] - {part}


def test_an_import_against_the_direction_is_seen():
    assert forbidden("nn", "def f():\n    from medcg_jax.train import loop") == {"train"}
    assert forbidden("families", "import medcg_jax.study.run.grid") == {"study"}
    assert forbidden("plan", "from medcg_jax import study, mesh") == {"study"}
    assert not forbidden("study", "from medcg_jax.eval.run import evaluate")


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=lambda path: path.name)
def test_data_names_no_jax(path):
    assert not imported(path.read_text()) & {"jax", "jaxlib", "flax", "optax"}


def code_files() -> list[Path]:
    folders = ("medcg_jax", "configs", "tests", "launch")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".j2")]
    return sorted(files)


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in code_files()}
    long = {path: number for path, number in lengths.items() if number > MAX_LINES}
    assert lengths and not long, f"longer than {MAX_LINES} lines: {long}"


def run_without(packages: tuple[str, ...], program: str) -> subprocess.CompletedProcess:
    """Runs `program` in a fresh Python in which importing any of `packages` fails."""
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Block())
"""
    return subprocess.run(
        [sys.executable, "-c", block + program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


# Grain itself imports jax where it finds it, so `sys.modules` would prove nothing.
DATA_PROGRAM = """
import importlib, pkgutil
import medcg_jax.data
for module in pkgutil.iter_modules(medcg_jax.data.__path__):
    importlib.import_module(f"medcg_jax.data.{module.name}")
from medcg_jax.data import encoding, pipeline, tokenizer
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.families import registry
from medcg_jax.config import DataConfig
source = PhantomSource(seed=0, train_records=8, test_records=4)
records = source.records(source.subsets[0].name, "train")
from types import SimpleNamespace
fmt = registry.family("llava").row_format(SimpleNamespace(image_size_px=64, num_image_tokens=16))
encoded = encoding.encode(records, tokenizer.load_tokenizer(""), DataConfig(max_text_tokens=128), fmt)
batch, ids = next(iter(pipeline.Batches(encoded, batch_size=4, seed=0)))
print(batch["pixels"].shape, len(ids))
"""
MODEL_PROGRAM = """
import importlib, pkgutil
import medcg_jax.families.build, medcg_jax.families.flops, medcg_jax.nn, medcg_jax.mesh
for package in (medcg_jax.nn,):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
import medcg_jax.train.step, medcg_jax.train.optim, medcg_jax.train.losses
import medcg_jax.families.flops, medcg_jax.plan.hlo, medcg_jax.bench.steps
print("imported")
"""


def test_data_works_without_jax():
    done = run_without(("jax", "jaxlib", "flax"), DATA_PROGRAM)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(4, 1, 64, 64, 3) 4"


def test_models_and_the_step_import_on_a_bare_gpu_machine():
    missing = (
        "grain", "ml_collections", "tensorflow_datasets", "PIL", "tensorboardX", "tqdm", "transformers", "tokenizers",
        "sentencepiece",
    )  # fmt: skip
    done = run_without(missing, MODEL_PROGRAM)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_blocked_package_is_missed():
    done = run_without(("jax",), "import medcg_jax.mesh")
    assert done.returncode != 0 and "jax is blocked" in done.stderr
