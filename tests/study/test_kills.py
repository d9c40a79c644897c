"""A grid whose disk fills up, and one whose workdir cannot be written any more, end in the same scores after all.

`kill_grid.py` does this fifty times over, with processes killed too; here each fault of a disk comes once.
"""

import pytest
from kill_grid import WAYS, run, trained_twice


@pytest.mark.long
def test_faults_of_the_disk_change_nothing(tmp_path, capfd):
    small = {"study.targets": "('ct-liver-stage',)", "study.tables": "('pairs',)"}
    used = run(tmp_path, kills=2, seed=1, ways=WAYS[2:], **small)
    if not used:
        pytest.skip("no file system can be mounted here: a full disk and a read-only workdir were not tried")
    assert used == {"full disk": 1, "read-only": 1}
    out = capfd.readouterr().out
    assert out.count("the same") >= 1 and "status 0" not in out


def test_a_job_trained_twice_is_seen(tmp_path):
    log = tmp_path / "log"
    log.write_text("a.b.s0: 12 steps, 1.0 s; compiled 0 programs\nc.s0: 12 steps, 1.0 s; x\n")
    assert trained_twice(log) == []
    log.write_text(log.read_text() + "a.b.s0: 12 steps, 2.0 s; compiled 0 programs\n")
    assert trained_twice(log) == ["a.b.s0"]
