"""What `medcg train` must not be trained on: records that give away the tests of its own subsets."""

from collections.abc import Sequence

from medcg_jax.config import RunConfig
from medcg_jax.data.leaks import KINDS, Leak, actions_of, actions_of_general, find_leaks, hashed, joined, remedy, words
from medcg_jax.data.records import DataError, RecordSet, Source


def left_out(run: RunConfig, source: Source, subsets: Sequence[str], general: RecordSet | None) -> frozenset[str]:
    """Ids of the training records that a run leaves out; what is reported or left out is told in a line for each kind.

    Its tests are those of all these subsets, which `medcg eval` asks with the same flags. Training records of the
    subsets are compared by id, by their files' bytes and by patient, and none is decoded for it; near images are looked
    for among the general records alone, whose questions are compared too. Subsets of phantoms have nothing in common.

    general: the general records that the run is trained on.

    Raises:
      DataError: a record is refused (`study.leaks`), or the data cannot be read.
    """
    is_drawn = run.data.source == "phantom"
    if is_drawn and general is None:
        return frozenset()
    near_bits = None if general is None or run.study.near_duplicates == "off" else run.study.near_duplicate_bits
    decoded = None if near_bits is None else {}
    tests = joined(hashed(source.records(name, "test"), decoded) for name in subsets)
    found: list[tuple[Leak, str]] = []
    if not is_drawn:
        training = joined(hashed(source.records(name, "train")) for name in subsets)
        found += [(leak, actions_of(run.study)[leak.kind]) for leak in find_leaks(training, tests)]
    if general is not None:
        leaks = find_leaks(hashed(general, decoded), tests, near_bits, questions=True)
        found += [(leak, actions_of_general(run.study)[leak.kind]) for leak in leaks]
    for leak, action in found:
        if action == "refused":
            raise DataError(f"{words(leak)}; {remedy(leak)}")
    for action in ("dropped", "reported"):
        for kind in KINDS:
            leaks = [leak for leak, own in found if (leak.kind, own) == (kind, action)]
            if leaks:
                print(f"{action}: {len(leaks)} training records that give a test away, as {words(leaks[0])}")
    return frozenset(leak.training for leak, action in found if action == "dropped")
