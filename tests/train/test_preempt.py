"""SIGTERM: what runs is saved at the next step and goes on with the same bits; elsewhere it ends at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import micro
import pytest
from train_toys import TRAIN, Stream, same_bits

from medcg_jax import cli
from medcg_jax.config import Interrupted, MeshConfig, replace
from medcg_jax.train import preempt
from medcg_jax.train.checkpoint import Checkpoints
from medcg_jax.train.loop import RunSpec, fit, fit_queue
from medcg_jax.train.optim import hparams_from

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def toy():
    return micro.setup(MeshConfig())


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def told_at(step: int):
    """A stream in whose batch number `step` the process gets SIGTERM, from a scheduler and a parent: twice."""

    def change(position, rows):
        if position == step:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return rows

    return lambda position: Stream(position, change=change)


def cell(path: Path, open_stream=Stream, steps: int = 12, **fields) -> RunSpec:
    return RunSpec("run", hparams_from(replace(TRAIN, steps=steps), 1), open_stream, checkpoints=path, **fields)


def quietly(*_):
    pass


@pytest.mark.parametrize("step", [0, 5, 11])
def test_what_runs_is_saved_and_goes_on_with_the_same_bits(toy, tmp_path, step):
    alone, _ = fit(*toy, cell(tmp_path / "alone"), progress=quietly)
    with preempt.sigterm_saves(), pytest.raises(Interrupted, match=f"run at step {step + 1} of 12"):
        fit(*toy, cell(tmp_path / "c", told_at(step)), checkpoint_every_steps=4, log_every_steps=5, progress=quietly)
    assert Checkpoints(tmp_path / "c").steps()[-1] == step + 1
    positions = []

    def opened(position):
        positions.append(position)
        return Stream(position)

    with preempt.sigterm_saves():
        state, result = fit(*toy, cell(tmp_path / "c", opened), progress=quietly)
    assert positions == [step + 1] and result.step == 12 and same_bits(state, alone)


def test_in_a_queue_too(toy, tmp_path):
    left, ended = [cell(tmp_path / "c", told_at(3))], []
    with preempt.sigterm_saves(), pytest.raises(Interrupted, match="run at step 4 of 12"):
        fit_queue(*toy, lambda: left.pop() if left else None, lambda *found: ended.append(found), progress=quietly)
    assert not ended and Checkpoints(tmp_path / "c").steps() == [4]


def test_between_loops_it_ends_at_once(toy, tmp_path):
    with preempt.sigterm_saves(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("nothing was raised")
    # A loop that is entered after one is not begun: code between may have swallowed it.
    with preempt.sigterm_saves():
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            fit(*toy, cell(tmp_path / "c"), progress=quietly)
    assert Checkpoints(tmp_path / "c").steps() == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_one_ends_at_once(second):
    program = (
        "import time\nfrom medcg_jax.train import preempt\npreempt.SAME_SIGNAL_S = 0.2\n"
        "with preempt.sigterm_saves(), preempt.at_steps():\n"
        "    print('in', flush=True)\n    while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout.readline() == b"in\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(30) == -second
    finally:
        process.kill()
        process.wait()


def test_the_command_ends_with_status_75_and_ctrl_c_with_1(monkeypatch, capsys):
    def ended_by(error):
        monkeypatch.setattr(cli, "parse", lambda _: (_ for _ in ()).throw(error))
        return cli.main([]), capsys.readouterr().err

    assert ended_by(Interrupted("told to stop: run at step 3 of 9")) == (
        75, "medcg: told to stop: run at step 3 of 9; run the same command again to go on\n"
    )  # fmt: skip
    assert ended_by(KeyboardInterrupt()) == (1, "medcg: stopped; run the same command again to go on\n")


def test_nothing_is_asked_of_other_processes_where_there_are_none():
    assert jax.process_count() == 1 and not preempt.told_to_stop()
