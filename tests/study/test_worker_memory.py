"""A grid's process whose memory does not suffice: it says so in GiB, and the grid repeats it."""

from types import SimpleNamespace

import pytest

from medcg_jax.study.run import grid, worker


def test_a_process_ends_with_a_status_and_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    class Fails:
        def __init__(self, *_, **__):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes.")

    run = SimpleNamespace(model=SimpleNamespace(name="llava15_tiny"))
    monkeypatch.setattr(worker, "Worker", Fails)
    monkeypatch.setattr(worker, "read_config", lambda folder: run)
    monkeypatch.setattr(worker, "plan_of", lambda runs: None)
    monkeypatch.setattr(worker, "end_with", lambda parent: None)
    assert worker.main(["1", str(tmp_path)]) == worker.NO_MEMORY == grid.OUT_OF_MEMORY
    [line] = capsys.readouterr().out.splitlines()
    assert "does not fit in memory: 3.00 GiB were asked for at once" in line and "study.cells_at_once" in line


@pytest.mark.parametrize(("status", "is_told"), [(3, True), (1, False)])
def test_the_grid_says_why_a_process_ended(tmp_path, capsys, status, is_told):
    log = tmp_path / "worker-0.log"
    log.write_text("starting\ndoes not fit in memory: 3.00 GiB were asked for at once\n")
    ended = SimpleNamespace(poll=lambda: status, returncode=status)
    grid.watch([grid.Process(0, ended, log)])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"worker 0 ended with status {status}") and str(log) in line
    assert ("3.00 GiB" in line) == is_told
