"""The source of records that a configuration names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from medcg_jax.config import SOURCES, DataConfig
from medcg_jax.data.records import DataError, Source

# A folder that `medcg data prepare` wrote into has it.
PLAN_FILE = ".plan.json"
GET_DATA = "`medcg data ledger FOLDER` says where each data set is to be had"


def open_source(config: DataConfig) -> Source:
    """The phantom world (`source="phantom"`, drawn from `seed`), the Med-MAT tree at `root` ("release"), or the
    prepared folder there ("prepared").

    Raises:
      DataError: the source is unknown, or the root is missing or holds something else.
    """
    if config.source == "phantom":
        from medcg_jax.data.phantom.source import PHANTOM_TEST_RECORDS, PhantomSource

        test = config.test_records_per_subset or PHANTOM_TEST_RECORDS
        sizes = config.train_records_per_subset, test
        return PhantomSource(config.seed, *sizes, decoys=config.phantom_decoys, rule=config.phantom_rule)
    check_root(config)
    if config.source == "release":
        from medcg_jax.data.release import ReleaseSource

        return ReleaseSource(config.root, config)
    if config.source == "prepared":
        from medcg_jax.data.prepared import PreparedSource

        return PreparedSource(config.root, config)
    raise DataError(f"data.source={config.source!r}; expected {' or '.join(SOURCES)}")


def is_prepared(root: str | Path) -> bool:
    """Whether `medcg data prepare` wrote into the folder, finished or not."""
    return (Path(root) / PLAN_FILE).is_file()


def check_root(config: DataConfig) -> None:
    """Raises DataError if `data.root` is missing where it is read, or is prepared where a tree is expected, or the other
    way about. Quick: opens nothing."""
    if config.source not in ("release", "prepared"):
        return
    name = f"data.root={config.root!r}"
    if not config.root or not Path(config.root).is_dir():
        what = "that of a Med-MAT tree" if config.source == "release" else "one that `medcg data prepare` wrote"
        raise DataError(f"{name}: no such folder; expected {what} ({GET_DATA})")
    if config.source == "release" and is_prepared(config.root):
        raise DataError(f"{name}: it is prepared; expected --config.data.source=prepared")
    is_any = is_prepared(config.root) or (Path(config.root) / "manifest.json").exists()
    if config.source == "prepared" and not is_any:
        raise DataError(
            f"{name}: not prepared; expected what `medcg data prepare {config.root} OUT` writes, or "
            "--config.data.source=release for the tree itself"
        )


def subset_names(source: Source, config: DataConfig) -> tuple[str, ...]:
    """The subsets of a run: `data.subsets`, by default all subsets of choice questions.

    Raises:
      DataError: no subset is named, and the source has only boxes.
    """
    names = config.subsets or tuple(subset.name for subset in source.subsets)
    if not names:
        boxes = ", ".join(subset.name for subset in source.detection_subsets)
        raise DataError(
            f"data.root={config.root!r} has no subset of choice questions, of boxes {boxes or 'none'}; name these in "
            "data.subsets, for a model that gives boxes, or make questions of their labels with "
            "`medcg data format --as=choice`"
        )
    return names


def require_subsets(source: Source, names: Sequence[str]) -> None:
    """Raises DataError, with close matches, if the source lacks one of the subsets `names`."""
    known = [subset.name for subset in source.subsets]
    # Detection files are read only if a name is of no choice subset.
    if not set(names) <= set(known):
        known += [subset.name for subset in source.detection_subsets]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise DataError(f"subset {name!r} does not exist; {hint}there are {', '.join(known)}")
