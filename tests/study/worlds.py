"""Small worlds of triplets for the tests of the study."""

from hypothesis import strategies as st

from medcg_jax.config import ARMS, DECIDING_ARMS
from medcg_jax.data.records import Subset

# The arms of the paper and its controls, for tests that are not about those which tell composition from transfer.
PAPER_ARMS = tuple(arm for arm in ARMS if arm not in DECIDING_ARMS and not arm.endswith("_updates"))


def subset(name: str, num_train: int = 100) -> Subset:
    """ "ct-lung-grade" -> its Subset."""
    modality, area, task = name.split("-")
    return Subset(name, modality, area, task, num_train=num_train, num_test=20)


def world(*names: str) -> tuple[Subset, ...]:
    return tuple(subset(name) for name in names)


SMALL = world(
    "ct-lung-state",  # the target
    "ct-lung-grade",  # M A
    "ct-brain-state",  # M T
    "mri-lung-state",  # A T
    "ct-skin-stage",  # M
    "mri-lung-stage",  # A
    "mri-brain-state",  # T
    "mri-brain-stage",  # none
    "xray-skin-grade",  # none
)


@st.composite
def random_worlds(draw) -> tuple[tuple[Subset, ...], Subset]:
    """(subsets of distinct names, one of them as target); some share a whole triplet under another name."""
    part = st.integers(0, 3)
    triplets = draw(st.lists(st.tuples(part, part, part), min_size=1, max_size=24))
    sizes = draw(st.lists(st.integers(1, 300), min_size=len(triplets), max_size=len(triplets)))
    subsets = tuple(
        Subset(f"{i:02d}", f"m{m}", f"a{a}", f"t{t}", num_train=size, num_test=10)
        for i, ((m, a, t), size) in enumerate(zip(triplets, sizes, strict=True))
    )
    return subsets, subsets[draw(st.integers(0, len(subsets) - 1))]
