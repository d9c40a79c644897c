"""What `ledger.read_ledger` finds: the state of each subset, dataset and printed row, and all of it together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medcg_jax.data import catalogue

State = Literal["complete", "partial", "missing"]
# The fault of a tree in which nothing lies yet.
NO_FILES = "no Subset--NN-train.json in it or in its Aggregated_Subsets"


@dataclass
class Tally:
    """Records that are well formed, by split, and the different images they name: those there and those absent."""

    train: int = 0
    test: int = 0
    images: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        self.train, self.test = self.train + other.train, self.test + other.test
        self.images |= other.images
        self.absent |= other.absent


@dataclass(frozen=True)
class SubsetState:
    """One subset of the catalogue or of the tree.

    Attributes:
      triplet: (modality, area, task): the tree's manifest's, else the catalogue's; three "" of a subset of neither.
      state: "complete": every member has records, both splits are there or can be made, no image is absent and no
        record broken; "missing": not one record; else "partial". Of the tree's own subsets no members are known.
      reasons: why it is not complete.
      train, test: well-formed records; where `split_made`, as the reader parts them (9:1 by image and label).
      images: different images that exist. absent: that are named and do not.
      broken: records that the reader refuses for anything but an absent image, by kind.
      members: of the catalogue's, those with records. lacking: those without. others: further data numbers in it.
      can_train, can_test: whether the reader gives its records of that split.
    """

    number: str
    in_catalogue: bool
    triplet: tuple[str, str, str]
    state: State
    reasons: tuple[str, ...]
    train: int = 0
    test: int = 0
    split_made: bool = False
    images: int = 0
    absent: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    can_train: bool = False
    can_test: bool = False


@dataclass(frozen=True)
class DatasetState:
    """One dataset of the catalogue, or a data number of the tree's own.

    Attributes:
      state: "complete": records in each subset that the catalogue has it in (in any, where it has it in none), of both
        splits, no image absent; "missing": no record; else "partial".
      name, addresses: the catalogue's, slips mended.
      found_in: the tree's subsets that have records of it.
    """

    number: str
    in_catalogue: bool
    state: State
    reasons: tuple[str, ...]
    name: str = ""
    addresses: tuple[str, ...] = ()
    found_in: tuple[str, ...] = ()
    train: int = 0
    test: int = 0
    images: int = 0
    absent: int = 0


@dataclass(frozen=True)
class RowState:
    """One printed row.

    Attributes:
      row: as in `mat.paper_rows`; in tables 1 and 2 the number of the subset that it tests.
      related: what it is trained on, in tables 1 and 2 all 25 of the multi-task model. target: what it is tested on.
      state: "full": every subset it needs is complete; "part": it can be computed, on less or other data than the
        paper's; "blocked".
      blocked_by: subsets without which it cannot be computed. short_of: of the others that it needs, those that are
        not complete (in tables 1 and 2 also those not there: the model is trained on the rest).
    """

    table: int
    row: int
    related: tuple[str, ...]
    target: str
    state: Literal["full", "part", "blocked"]
    blocked_by: tuple[str, ...]
    short_of: tuple[str, ...]


@dataclass(frozen=True)
class Ledger:
    """What a tree has.

    Attributes:
      subsets, datasets: the catalogue's by number, then the tree's own. rows: of tables 1 to 8.
      total: over all subsets. num_broken: broken records.
      faults: for what the reader refuses the tree as a whole; no row can be computed until they are mended.
      box_faults: the same, of the detection files: of rows of tables 5 and 6.
    """

    root: str
    subsets: tuple[SubsetState, ...]
    datasets: tuple[DatasetState, ...]
    rows: tuple[RowState, ...]
    total: Tally
    num_broken: int
    faults: tuple[str, ...]
    box_faults: tuple[str, ...]

    @property
    def is_broken(self) -> bool:
        """Whether a file that is there cannot be used; what is not there is no fault of a tree that is being made."""
        return any(fault != NO_FILES for fault in (*self.faults, *self.box_faults))

    def as_dict(self) -> dict[str, Any]:
        """The ledger as JSON takes it, with what the paper states of Med-MAT's size."""
        total = self.total
        return {
            "root": self.root,
            "opens": not self.faults,
            "faults": list(self.faults),
            "box_faults": list(self.box_faults),
            "train": total.train,
            "test": total.test,
            "images": len(total.images),
            "absent": len(total.absent),
            "broken": self.num_broken,
            "subsets": [asdict(state) for state in self.subsets],
            "datasets": [asdict(state) for state in self.datasets],
            "rows": [asdict(state) for state in self.rows],
            "catalogue_counts": {name: asdict(count) for name, count in catalogue.counts().items()},
        }


def states_of(states: Iterable[SubsetState | DatasetState]) -> dict[str, int]:
    """How many are complete, partial and missing."""
    counted = Counter(state.state for state in states)
    return {name: counted[name] for name in ("complete", "partial", "missing")}
