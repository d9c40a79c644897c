"""The same run again: the same bytes; by other processes: the same batches, and losses within a tolerance."""

import compare_hosts
import pytest

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return compare_hosts.one(tmp_path_factory.mktemp("first") / "run", 1, 2, steps=3)


def test_the_same_run_again_gives_the_same_bytes(first, tmp_path):
    again = compare_hosts.one(tmp_path / "run", 1, 2, steps=3)
    assert again == first
    # What is compared is there at all.
    assert len(first["losses"]) == len(first["ids"]) == 3 and len({tuple(ids) for ids in first["ids"]}) == 3


def test_two_processes_draw_the_same_batches_and_have_nearly_the_same_losses(first, tmp_path):
    found = compare_hosts.one(tmp_path / "run", 2, 1, steps=3)
    assert found["ids"] == first["ids"]
    assert found["losses"] == pytest.approx(first["losses"], rel=compare_hosts.TOLERANCE)
