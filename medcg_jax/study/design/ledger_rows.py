"""Which rows of tables 1 to 8 a tree's subsets allow, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Mapping

from medcg_jax.study.design import mat
from medcg_jax.study.design.ledger_states import RowState, SubsetState

TABLES = range(1, 9)


def row_states(subsets: Mapping[str, SubsetState]) -> tuple[RowState, ...]:
    """Every row of tables 1 to 8. subsets: by number, all 53 of the catalogue among them."""
    inside, outside = mat.paper_split()
    trainable = any(subsets[number].can_train for number in inside)
    found = []
    for target in inside:
        usable = subsets[target].can_train and subsets[target].can_test
        found.append(_state(1, int(target), inside, target, () if usable else (target,), subsets))
    for target in outside:
        blocked = (() if trainable else inside) + (() if subsets[target].can_test else (target,))
        found.append(_state(2, int(target), inside, target, blocked, subsets))
    for table in TABLES[2:]:
        for row in mat.paper_rows(table):
            blocked = [number for number in row.related if not subsets[number].can_train]
            blocked += [row.target] if not subsets[row.target].can_test else []
            found.append(_state(table, row.row, row.related, row.target, tuple(blocked), subsets))
    return tuple(found)


def _state(
    table: int, row: int, related: tuple[str, ...], target: str, blocked_by: tuple[str, ...],
    subsets: Mapping[str, SubsetState],
) -> RowState:  # fmt: skip
    needed = dict.fromkeys((*related, target))
    short_of = tuple(n for n in needed if n not in blocked_by and subsets[n].state != "complete")
    state = "blocked" if blocked_by else "part" if short_of else "full"
    return RowState(table, row, related, target, state, blocked_by, short_of)
