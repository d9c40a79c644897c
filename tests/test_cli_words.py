"""The command line's words: what was meant by a wrong verb or flag, help, version, completion, how much is shown."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medcg_jax import cli, memory, terminal
from medcg_jax.cli import main
from medcg_jax.config import ConfigError

ROOT = Path(__file__).parents[1]
PHANTOM = f"--config={ROOT}/configs/phantom.py:tiny"
VERBS = ("convert", "parity", "train", "eval", "reproduce", "bench", "plan", "report", "data", "config", "completion")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian'; did you mean train? expected one of "),
        (["data", "chek", "x"], "did you mean check?"),
        (["convert", "a", "b", "--to=orbx"], "did you mean orbax?"),
        (["train", PHANTOM, "--workdr=x"], "--workdr=x is not known to `medcg train`; did you mean --workdir?"),
        (["train", PHANTOM, "--learning_rate=1e-3"], "did you mean --config.train.learning_rate or --config.base."),
        (["train", PHANTOM, "--train.steps=3"], "did you mean --config.train.steps?"),
        (["train", PHANTOM, "--config.learning_rate=1"], "did you mean config.train.learning_rate or config.base."),
        (["data", "check", "x", "--max_bad_frak=1"], "`medcg data check`; did you mean --max_bad_frac?"),
        (["--workdir=x", "train", PHANTOM], "--workdir=x: expected behind the verb, `medcg train --workdir=x`"),
        (["train", PHANTOM, "--zebra=1"], "--zebra=1 is not known to `medcg train`; see `medcg train --help`"),
        (["reproduce", PHANTOM, "--price=h100:2"], "--price=h100:2: expected with --dry"),
        (["train", "--config=phantm.py"], "did you mean configs/phantom.py?"),
        (
            ["train", "--config=phantom.py:stduy"],
            "--config=phantom.py:stduy: did you mean study? expected one of quick, ",
        ),
    ],
)
def test_what_was_meant_is_said(argv, message, capsys):
    assert main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_flag_and_names_the_configs(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    takes_config = "--config FILE.py[:ARG]" in text
    assert takes_config == (verb in ("train", "eval", "reproduce", "bench", "plan"))
    assert ("configs/phantom.py[:quick|study|negative|null|tiny]" in text) == takes_config
    actions = next(p for p in parsers(cli.parser()) if p.prog == f"medcg {verb}")._actions
    assert all(action.help for action in actions if action.choices is None), [a.dest for a in actions if not a.help]


def parsers(parser):
    yield parser
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_the_version_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and re.fullmatch(r"medcg \S+ \(Python \S+, JAX \S+\)\n", capsys.readouterr().out)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "medcg_jax", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean train?" in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------ completion


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "medcg.bash"
    found = path.with_suffix(".json")
    assert main(["completion", "bash", f"--json={found}"]) == 0
    path.write_text(json.loads(found.read_text())["script"])
    return path


def completed(script: Path, line: str, shell: str = "bash") -> list[str]:
    """The words that a shell offers at the end of a line."""
    program = (
        f'source {script}; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _medcg; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run([shell, "-c", program], capture_output=True, text=True, check=True, cwd=script.parent)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("medcg tr", ["train"]),
        ("medcg data st", ["stats"]),
        ("medcg data prepare --ne", ["--near=keep", "--near=drop"]),
        ("medcg convert a b --to=p", ["peft"]),
        ("medcg train --work", ["--workdir="]),
        (
            "medcg train --config=configs/phan",
            [
                "configs/phantom.py",
                *(f"configs/phantom.py:{arg}" for arg in ("quick", "study", "negative", "null", "tiny")),
            ],
        ),
        # A shell takes what stands behind the last colon for a word of its own.
        ("medcg train --config=configs/phantom.py:st", ["study"]),
        (
            "medcg reproduce --config=configs/table3.py:llava15_7b --config.study.near",
            ["--config.study.near_duplicates=", "--config.study.near_duplicate_bits="],
        ),
        ("medcg train --zebra", []),
    ],
)
def test_a_shell_completes_verbs_flags_files_and_fields(script, line, words):
    assert completed(script, line) == words


def test_folders_are_completed_where_one_is_expected(script):
    (script.parent / "runs").mkdir(exist_ok=True)
    assert completed(script, "medcg train --workdir=ru") == ["runs"] and completed(script, "medcg report ru") == [
        "runs"
    ]


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_takes_the_script():
    done = subprocess.run(
        ["zsh", "-fc", f"source <({sys.executable} -m medcg_jax completion zsh); which _medcg"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_medcg ()" in done.stdout


# ------------------------------------------------------------------ how much is shown


@pytest.fixture
def amounts(monkeypatch):
    shown = []

    def run(args):
        shown.append((terminal.shows_progress(), terminal.shows_details()))
        return {}

    monkeypatch.setattr(cli, "run_train", run)
    yield shown
    terminal.show(terminal.PLAIN)


def test_quiet_and_verbose_hold_for_one_call(amounts, capsys):
    for flags in (["--quiet"], [], ["--verbose"]):
        assert main(["train", PHANTOM, *flags]) == 0
    assert amounts == [(False, False), (True, False), (True, True)]
    assert main(["train", PHANTOM, "--quiet", "--verbose"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_libraries_in_c_are_not_seen_and_python_is():
    program = (
        "import ctypes, os\nfrom medcg_jax.platform import hidden_stdout\nc = ctypes.CDLL(None)\n"
        "def say(text):\n    c.puts(text.encode()); c.fflush(None)\n"
        "say('before')\nwith hidden_stdout():\n    say('[Gloo] Rank 0'); print('result')\nsay('after')\nprint('end')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["before", "result", "after", "end"]


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1038058823872 bytes.", "966.8 GiB were asked for at once"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes.\nmore", "3.00 GiB were asked"),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 26.32G of 15.75G hbm.",
            "26.32 GiB were needed of the device's 15.75 GiB",
        ),
        ("RESOURCE_EXHAUSTED: not one cell fits the devices here", "memory: not one cell fits the devices here"),
    ],
)
def test_memory_that_does_not_suffice_is_told_in_gib_with_what_to_change(text, words, monkeypatch, capsys):
    def run(args):
        raise RuntimeError(text)

    monkeypatch.setattr(cli, "run_train", run)
    assert main(["train", PHANTOM]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    for setting in ("train.batch_size", "train.accumulation_steps", "model.remat", "model.base_dtype", "`medcg plan "):
        assert setting in line


def test_what_a_tpu_s_compiler_refuses_is_read_too():
    text = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (26.32G) exceeds available HBM (15.75G)."
    assert memory.asked_for(text) == "26.32 GiB were needed of the device's 15.75 GiB"


def test_a_test_is_told_its_own_batch():
    line = memory.explained(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes."), "eval")
    assert "eval.batch_size" in line and "train.batch_size" not in line


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0.00 GiB"), (3.3e6, "0.0031 GiB"), (2**30, "1.00 GiB"), (80 * 2**30, "80.00 GiB")]
)
def test_a_small_size_is_not_shown_as_nothing(count, words):
    assert memory.gib(count) == words


def test_an_error_about_anything_else_is_no_lack_of_memory():
    assert not memory.is_out_of_memory(ConfigError("RESOURCE_EXHAUSTED")) and not memory.is_out_of_memory(
        RuntimeError("INVALID_ARGUMENT")
    )
