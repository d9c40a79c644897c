"""XLA's flags: only the platform's own, never over the user's, and only such as XLA knows."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax.config import RunConfig, replace, xla_switches
from medcg_jax.platform import FLAGS, MEMORY_FRACTION, SPARSE_CORES, added, apply, platform, variable

values = st.sampled_from(("true", "false", "7"))


SWITCHES = st.frozensets(st.sampled_from(("deterministic", "sparse_cores")))


@given(
    here=st.sampled_from(("cpu", "cuda", "tpu")), switches=SWITCHES,
    own=st.dictionaries(st.sampled_from([flag.name for flag in FLAGS]), values),
)  # fmt: skip
def test_what_is_added_is_the_platform_s_and_not_the_user_s(here, switches, own):
    flags = added({variable(here): " ".join(f"--{name}={value}" for name, value in own.items())}, switches, here)
    for flag in FLAGS:
        is_wanted = flag.platform == here and flag.name not in own and flag.only_with in {"", *switches}
        assert (flag in flags) == is_wanted


@pytest.mark.parametrize(("name", "expected"), [("gpu", "cuda"), ("cuda,cpu", "cuda"), ("tpu", "tpu"), ("cpu", "cpu")])
def test_the_platform_is_the_first_that_is_named(name, expected):
    assert platform({"JAX_PLATFORMS": name}) == expected


def test_what_a_run_switches_on():
    plain = replace(RunConfig(), deterministic=False)
    flags = {
        run: {flag.name for here in ("cpu", "cuda", "tpu") for flag in added({}, xla_switches(config), here)}
        for run, config in {
            "plain": plain,
            "deterministic": replace(plain, deterministic=True),
            "sparse cores": replace(plain, mesh__sparse_cores=True),
        }.items()
    }
    assert flags["deterministic"] - flags["plain"] == {"xla_gpu_deterministic_ops"}
    assert flags["sparse cores"] - flags["plain"] == set(SPARSE_CORES)


@pytest.mark.parametrize(
    ("here", "whole_device", "own", "expected"),
    [("cuda", True, "", "0.90"), ("cuda", False, "", None), ("cuda", True, "0.5", "0.5"), ("cpu", True, "", None)],
)
def test_a_run_takes_most_of_its_gpu_s_memory(monkeypatch, here, whole_device, own, expected):
    monkeypatch.setenv("JAX_PLATFORMS", here)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv(MEMORY_FRACTION[0], own) if own else monkeypatch.delenv(MEMORY_FRACTION[0], raising=False)
    line = apply(frozenset({"deterministic"}), whole_device=whole_device)
    assert os.environ.get(MEMORY_FRACTION[0]) == expected
    assert (MEMORY_FRACTION[0] in line) == (expected == "0.90")
    os.environ.pop(MEMORY_FRACTION[0], None)


def test_a_tpu_s_flags_go_to_its_own_library(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_sc_disjoint_spmem=true")
    line = apply(frozenset({"sparse_cores"}))
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/tmp/x"
    words = os.environ["LIBTPU_INIT_ARGS"].split()
    assert words[0] == "--xla_sc_disjoint_spmem=true" and "--xla_sc_disjoint_spmem=false" not in words
    assert len(words) == len(SPARSE_CORES) and "beside your --xla_sc_disjoint_spmem=true" in line


KNOWN_TO_XLA = [flag for flag in FLAGS if flag.platform != "tpu"]


@pytest.mark.parametrize(
    "flag", [None, *KNOWN_TO_XLA], ids=lambda flag: flag.name if flag else "one that XLA does not know"
)
def test_xla_knows_every_flag(flag):
    """XLA ends a process with a flag in XLA_FLAGS that it does not know, of whatever platform."""
    text = f"--{flag.name}={flag.value}" if flag else "--xla_no_such_flag=true"
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.jit(lambda x: x + 1)(1))"], timeout=120, check=False,
        env=os.environ | {"XLA_FLAGS": text, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) == (flag is not None), done.stderr[-500:]
