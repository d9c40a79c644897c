"""Composition, or transfer out of one subset: the verdict on a table that trains on pairs or triples.

Arms of a row with k members, all with equal records and updates: `trained` (all members), FF (`baseline_plus`: unrelated
data alone), `single_1` to `single_k` (one member alone), `filler_1` to `filler_k` (one member's own records, unrelated
ones in place of the others'). Contrasts, each over targets and seeds with a test of its own (`paired.estimate`):

  gain         trained - FF
  over_k       trained - single_k
  gain_k       single_k - FF
  interaction  trained - sum of filler_k + (k - 1) FF: what the members do together beyond the sum of what each does

"Up" is a p below `LEVEL`, two-sided, with an interval above 0; "down" the same below it. The first line that holds:

  | gain         | over_k                     | gain_k       | interaction | verdict                                  |
  |--------------|----------------------------|--------------|-------------|------------------------------------------|
  | no FF at all |                            |              |             | not shown                                |
  | down         |                            |              |             | the reverse                              |
  | open         | any                        | any          | any         | not shown                                |
  | up           | every k up                 |              | up          | composition                              |
  | up           | some k within              | that k up    | any         | transfer from one subset                 |
  | up           | an arm is absent           |              |             | a gain over unrelated data, cause not    |
  |              |                            |              |             | tested                                   |
  | up           | otherwise                  |              |             | a gain over unrelated data, cause not    |
  |              |                            |              |             | shown                                    |

- Every single is tested for itself (an intersection-union test: the larger of their p holds at its level, while a test
  against "the better single", chosen by its noisy mean, would be too strict or, against their mean, too lax). So the
  chance of "composition" is at most .025 wherever one of its parts is not true.
- No gain over FF with a pair above its singles is "not shown": singles below unrelated data say nothing for the pair.
  Above every single with an open interaction is "cause not shown": two gains may add up without being combined.
- "Transfer" needs a single that is itself shown to gain over FF and is "within": shown to be less than `EQUIVALENCE`
  below the pair, or above it. That the pair is not shown to beat a single is not enough: it says as much of few data.
- Rows for which the grid plans no FF or not every single and filler that it plans elsewhere (a member with the target's
  whole triplet, no unrelated subset) cannot tell: they are left out of every contrast, and counted.
- A direction without a row that can tell is "cannot tell", and no member of Holm's family.
- An arm counts as present only where it has every cell of the other rows; of one with cells that failed or wait nothing
  is taken.
- One seed: nothing is said of the recipe. The verdict is "not shown", and `these_models` has what the table above says
  of these trained models alone, by sign flips over the targets. One target: nothing is said of others; "not shown".
- Directions of a table: p adjusted by Holm over them, separately for the gain and for composition (the largest p of its
  parts). The table as a whole stands alone.
- `words_only` and `no_images` decide nothing, so that their absence cannot help; their contrasts stand beside the
  verdict, and their absence is said.

Source of the test: Berger, Multiparameter hypothesis testing and acceptance sampling, Technometrics 24 (1982).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from medcg_jax.study.stats.paired import LEVEL, Estimate, Unit, estimate, holm, unit_of

# Table -> members of its rows.
MEMBERS = {"pairs": 2, "triples": 3, "detection_pairs": 2}
COMPOSITION = "composition"
TRANSFER = "transfer from one subset"
NOT_TESTED = "a gain over unrelated data, cause not tested"
NO_CAUSE = "a gain over unrelated data, cause not shown"
NOT_SHOWN = "not shown"
REVERSE = "the reverse"
CANNOT_TELL = "cannot tell"
# How much of composition a verdict claims.
RANK = {CANNOT_TELL: 0, REVERSE: 0, NOT_SHOWN: 0, NOT_TESTED: 1, NO_CAUSE: 1, TRANSFER: 2, COMPOSITION: 3}
# Accuracies that differ by less than this are taken for equal; set before any result was seen.
EQUIVALENCE = 0.03
# Arms whose contrasts to `trained` stand beside the verdict.
BESIDE = ("baseline", "words_only", "no_images")

Key = tuple[str, str, int]  # row, target, seed
# Arm -> key -> bool[records], whether each answer was right, in the same order of records in every arm.
Arms = Mapping[str, Mapping[Key, np.ndarray]]


@dataclass(frozen=True)
class Evidence:
    """The contrasts of a table, None where an arm is absent; `over`, `gains` by single."""

    gain: Estimate | None
    over: Mapping[str, Estimate | None]
    gains: Mapping[str, Estimate | None]
    interaction: Estimate | None

    @property
    def is_complete(self) -> bool:
        return None not in (self.gain, self.interaction, *self.over.values(), *self.gains.values())

    @property
    def p_composition(self) -> float:
        """The largest p of what composition needs; 1 where a part of it is absent or not above 0."""
        needed = (self.gain, *self.over.values(), self.interaction)
        present = [contrast for contrast in needed if contrast is not None]
        if not self.is_complete or not all(contrast.is_up for contrast in present):
            return 1.0
        return max(contrast.p for contrast in present)

    @property
    def p_gain(self) -> float:
        return 1.0 if self.gain is None else self.gain.p


def members(k: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names of the singles, names of the fillers) of rows with k members."""
    numbers = range(1, k + 1)
    return tuple(f"single_{i}" for i in numbers), tuple(f"filler_{i}" for i in numbers)


def decide(evidence: Evidence, p_gain: float, p_composition: float) -> str:
    """The verdict of the table in the docstring. p_gain, p_composition: adjusted where several are asked for."""
    gain = evidence.gain
    if gain is None or p_gain >= LEVEL or not (gain.is_up or gain.is_down):
        return NOT_SHOWN
    if gain.is_down:
        return REVERSE
    if p_composition < LEVEL:
        return COMPOSITION
    for name, over in evidence.over.items():
        single_gain = evidence.gains[name]
        if over is not None and within(over) and single_gain is not None and single_gain.is_up:
            return TRANSFER
    return NO_CAUSE if evidence.is_complete else NOT_TESTED


class Contrasts:
    """The contrasts of one table's arms; the units of each are computed once for all directions.

    patients: target -> patient of each record, "" where it is not known. same_records: as of `paired.estimate`.
    """

    def __init__(self, arms: Arms, patients: Mapping[str, Sequence[str]], *, same_records: bool):
        self.arms, self.patients, self.same_records = arms, patients, same_records
        self._units: dict[tuple, dict[Key, Unit]] = {}

    def estimate(self, weights: Mapping[str, float], keys: Sequence[Key], most: float = 1.0) -> Estimate | None:
        """The weighted sum of arms over these keys; None where one of them is absent, or there are no keys."""
        is_absent = any(key not in self.arms.get(arm, {}) for arm in weights for key in keys)
        if is_absent or not keys:
            return None
        return estimate(self.units(weights, keys), most, same_records=self.same_records)

    def units(self, weights: Mapping[str, float], keys: Sequence[Key]) -> list[Unit]:
        known = self._units.setdefault(tuple(weights.items()), {})
        for key in keys:
            if key not in known:
                values = sum(weight * np.asarray(self.arms[arm][key], float) for arm, weight in weights.items())
                known[key] = unit_of(key[1], key[2], values, self.patients.get(key[1], ()))
        return [known[key] for key in keys]

    def evidence(self, k: int, keys: Sequence[Key]) -> Evidence:
        """The contrasts over these keys; the gain over those of them that `trained` and `baseline_plus` have."""
        singles, fillers = members(k)
        gain = {"trained": 1.0, "baseline_plus": -1.0}
        together = {"trained": 1.0, **dict.fromkeys(fillers, -1.0), "baseline_plus": k - 1.0}
        return Evidence(
            self.estimate(gain, self.present(gain, keys)),
            {name: self.estimate({"trained": 1.0, name: -1.0}, keys) for name in singles},
            {name: self.estimate({name: 1.0, "baseline_plus": -1.0}, keys) for name in singles},
            self.estimate(together, keys, float(k)),
        )

    def present(self, arms: Collection[str], keys: Sequence[Key]) -> list[Key]:
        """Those of the keys that all of these arms have."""
        return [key for key in keys if all(key in self.arms.get(arm, {}) for arm in arms)]

    def accuracies(self, keys: list[Key]) -> dict[str, float]:
        """Arm -> mean accuracy over targets, of the arms that have all keys."""
        arms = [arm for arm in self.arms if keys and self.present([arm], keys) == keys]
        return {arm: estimate(self.units({arm: 1.0}, keys)).mean for arm in arms}


def telling(planned: Mapping[str, Collection[Key]], k: int) -> list[Key]:
    """The keys of `trained` for which the grid plans unrelated data and all singles and fillers that it plans for any."""
    singles, fillers = members(k)
    needed = ["baseline_plus", *(name for name in (*singles, *fillers) if planned.get(name))]
    return sorted(key for key in planned.get("trained", ()) if all(key in planned.get(arm, ()) for arm in needed))


def verdicts(
    arms: Arms,
    table: str,
    planned: Mapping[str, Collection[Key]] | None = None,
    patients: Mapping[str, Sequence[str]] = MappingProxyType({}),
    *,
    same_records: bool = False,
) -> list[dict]:
    """The verdict of a table as a whole (part ""), then of each of its directions (the first part of a row's name).

    planned: arm -> its keys in the whole grid, finished or not; default: those of `arms`. patients, same_records: as of
    `Contrasts`.

    [{"table": "pairs", "part": "",
      "verdict": "transfer from one subset",
      "these_models": None,             # with one seed what holds of these models, else None
      "p": .004, "p_smallest": None,    # of composition where that is the verdict, else of the gain; least possible p
      "p_holm": .004,                   # adjusted over the directions; of the table as a whole p itself
      "test": "two-way t of 8 targets and 3 seeds", "targets": 8, "seeds": 3, "rows": 24,     # of the gain
      "keys": [("fixed_area/ct", "ct", 0)],      # of the rows that can tell
      "rows_left_out": 0,               # rows that cannot tell (see above)
      "accuracy": {"trained": .69, "baseline_plus": .46, "single_1": .71},  # means over targets, of the arms that have
                                        # all cells of the gain
      "gain": {"mean": .23, "ci_low": .15, "ci_high": .31, "p": .004, "p_smallest": None, "up": True, "down": False},
      "over": {"single_1": {..., "relation": "within"}},    # or "above", "open"; None where absent
      "gains": {"single_1": {...}}, "interaction": {...},
      "beside": {"baseline": {...}, "words_only": None, "no_images": None},     # trained less that arm
      "cells": 72, "missing": {"single_2": 3}}]     # cells of `trained`; deciding arm -> number that it lacks
    """
    k = MEMBERS[table]
    planned = arms if planned is None else planned
    keys = telling(planned, k) or sorted(planned.get("trained", ()))
    parts = sorted({part_of(key) for key in arms.get("trained", {})})
    if not parts:
        return []
    contrasts = Contrasts(arms, patients, same_records=same_records)
    whole = [_verdict(contrasts, table, "", k, keys)]
    by_part = [_verdict(contrasts, table, part, k, keys) for part in parts]
    can_tell = [evidence for evidence, line in by_part if line["keys"]]
    gains = holm([evidence.p_gain for evidence in can_tell])
    compositions = holm([evidence.p_composition for evidence in can_tell])
    adjusted = iter([(whole[0][0].p_gain, whole[0][0].p_composition), *zip(gains, compositions, strict=True)])
    return [
        _decided(evidence, line, *next(adjusted)) if line["keys"] else line | {"verdict": CANNOT_TELL}
        for evidence, line in whole + by_part
    ]


def _decided(evidence: Evidence, line: dict, p_gain: float, p_composition: float) -> dict:
    kind = decide(evidence, p_gain, p_composition)
    p, p_holm = (evidence.p_composition, p_composition) if kind == COMPOSITION else (evidence.p_gain, p_gain)
    one_seed = line["seeds"] == 1
    return line | {
        "verdict": NOT_SHOWN if one_seed else kind, "these_models": kind if one_seed else None,
        "p": p, "p_holm": p_holm,
    }  # fmt: skip


def part_of(key: Key) -> str:
    return key[0].partition("/")[0]


def _verdict(contrasts: Contrasts, table: str, part: str, k: int, keys: Sequence[Key]) -> tuple[Evidence, dict]:
    arms = contrasts.arms
    keys = [key for key in keys if part in ("", part_of(key))]
    finished = contrasts.present(["trained"], keys)
    compared = contrasts.present(["trained", "baseline_plus"], keys) or finished
    every = {key[:2] for key in arms["trained"] if part in ("", part_of(key))}
    evidence = contrasts.evidence(k, keys)
    singles, fillers = members(k)
    lacking = {
        name: sum(key not in arms.get(name, {}) for key in keys)
        for name in ("trained", "baseline_plus", *singles, *fillers)
    }
    gain = evidence.gain
    line = {
        "table": table, "part": part, "verdict": "", "these_models": None, "p": 1.0, "p_holm": 1.0,
        "p_smallest": gain.p_smallest if gain else 1.0, "test": gain.test if gain else "",
        "targets": len({target for _, target, _ in compared}), "seeds": len({seed for _, _, seed in compared}),
        "rows": len({key[:2] for key in compared}), "keys": keys,
        "rows_left_out": len(every - {key[:2] for key in keys}),
        "accuracy": contrasts.accuracies(compared),
        "gain": as_dict(gain),
        "over": {name: over_dict(contrast) for name, contrast in evidence.over.items()},
        "gains": {name: as_dict(contrast) for name, contrast in evidence.gains.items()},
        "interaction": as_dict(evidence.interaction),
        "beside": {
            arm: as_dict(contrasts.estimate({"trained": 1.0, arm: -1.0}, contrasts.present([arm], finished)))
            for arm in BESIDE
        },
        "cells": len(keys), "missing": {name: number for name, number in lacking.items() if number},
    }  # fmt: skip
    return evidence, line


def as_dict(contrast: Estimate | None) -> dict | None:
    if contrast is None:
        return None
    low, high = contrast.interval()
    return {
        "mean": contrast.mean, "ci_low": low, "ci_high": high, "p": contrast.p, "p_smallest": contrast.p_smallest,
        "up": contrast.is_up, "down": contrast.is_down,
    }  # fmt: skip


def over_dict(contrast: Estimate | None) -> dict | None:
    """With "relation": "above" where the pair is above the single, "within" where the single is shown to be less than
    `EQUIVALENCE` below it, else "open"."""
    if contrast is None:
        return None
    relation = "above" if contrast.is_up else "within" if within(contrast) else "open"
    return as_dict(contrast) | {"relation": relation}


def within(contrast: Estimate) -> bool:
    """Whether the mean over targets is shown to lie below `EQUIVALENCE`: with one seed for these models alone, with one
    target never."""
    return contrast.targets > 1 and contrast.p_below(EQUIVALENCE) < LEVEL


def is_equivalent(contrast: Estimate) -> bool:
    """Two one-sided tests: whether the mean is shown to lie within `EQUIVALENCE` of 0 on either side. With one seed
    nothing is shown of others.

    Source: Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    return contrast.seeds > 1 and within(contrast) and contrast.p_above(-EQUIVALENCE) < LEVEL
