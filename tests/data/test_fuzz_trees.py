"""Some dozen broken trees and prepared folders are taken rightly or refused."""

from fuzz_trees import PREPARED_FILES, TREE_FILES, fuzz


def test_broken_trees_and_prepared_folders(tmp_path):
    count = 6 * len((*TREE_FILES, *PREPARED_FILES))
    counts, failures = fuzz(count, 20241220, tmp_path / "kept")
    assert not failures and not (tmp_path / "kept").exists()
    assert counts.total() == count
    for name in set(TREE_FILES + PREPARED_FILES) - {".examined.jsonl"}:
        assert counts[name, False] > 2, name
