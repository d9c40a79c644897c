"""The simulated clock: what it must say of small schedules, and that any schedule lies between its two bounds."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.chips import peak_of
from medcg_jax.plan.hlo import Collective
from medcg_jax.plan.schedule import Compute, CopyDone, CopyStart, Done, Loop, Start
from medcg_jax.plan.simulate import Machine, simulate

# Four devices, two in each island; a FLOP, a byte of memory and a byte of a link take a second, of the network two.
MACHINE = Machine(1.0, 1.0, 1.0, 0.5, island_of=(0, 0, 1, 1))
LINKS, BOTH = ((0, 1), (2, 3)), ((0, 2), (1, 3))


def work(flops, num_bytes=0, name="work"):
    return Compute(name, flops, num_bytes)


def gather(name, seconds, *, groups=LINKS, is_async=True):
    """A gather over two devices sends half of its payload."""
    return Start(name, Collective(name, "all-gather", groups, 2 * seconds, 1), is_async=is_async)


def total(*steps, machine=MACHINE):
    return simulate(steps, machine)


def test_what_runs_beside_a_collective_hides_it():
    start, done = gather("g", 10), Done("g")
    for beside, exposed in ((0, 10), (4, 6), (10, 0), (25, 0)):
        result = total(start, work(beside), done)
        assert (result.exposed_s, result.step_s) == (exposed, beside + exposed)
        [exposure] = result.exposures
        assert (exposure.seconds, exposure.beside_s, exposure.exposed_s, exposure.trips) == (10, beside, exposed, 1)
    # What stands before the start or behind the done hides nothing.
    assert total(work(25), start, done, work(25)).exposed_s == 10


def test_collectives_of_one_queue_run_one_after_another_and_two_queues_at_once():
    first, second = gather("a", 10), gather("b", 10)
    assert total(first, second, Done("a"), Done("b")).step_s == 20
    # Over the network, at half of the rate, and over the links too; a device of each island.
    across = gather("b", 10, groups=BOTH)
    result = total(across, Done("b"))
    assert (result.step_s, result.links_s, result.between_s, result.collectives_s) == (20, 10, 20, 20)
    assert total(across, gather("a", 10), Done("a"), Done("b")).step_s == 20
    # A fixed cost is of collectives that exchange something.
    slow = dataclasses.replace(MACHINE, collective_s=3.0)
    alone = Start("c", Collective("c", "all-gather", ((0,), (1,)), 8, 1))
    assert total(first, Done("a"), machine=slow).step_s == 13 and total(alone, Done("c"), machine=slow).step_s == 0


def test_a_computation_takes_the_longer_of_its_products_and_its_bytes():
    assert total(work(3, 5), work(7, 2)).step_s == 12


def test_copies_use_what_computations_leave_of_the_memory():
    start, done = CopyStart("c", 10), CopyDone("c")
    assert total(start, work(10), done).step_s == 10
    assert total(start, work(10, 10), done).step_s == 20, "the computation needs the memory all the time"
    assert total(start, work(10, 4), done).copies_s == 4
    assert total(start, gather("g", 6), Done("g"), done).step_s == 10, "a device that waits leaves the memory idle"
    # Earlier copies go first.
    assert total(CopyStart("a", 5), CopyStart("b", 5), work(6), CopyDone("b"), CopyDone("a")).step_s == 10


def test_loops_run_as_often_as_they_say_and_queues_outlast_an_iteration():
    body = (gather("g", 10), work(4), Done("g"))
    result = total(work(5), Loop("w", (*body, Loop("v", body, 3)), 2, "jit(f)/while"))
    assert result.step_s == 5 + 2 * 10 + 6 * 10
    inner, outer = sorted(result.exposures, key=lambda exposure: -exposure.trips)
    assert (inner.trips, inner.exposed_s, inner.loop) == (6, 36, "v")
    assert (outer.trips, outer.exposed_s, outer.loop) == (2, 12, "jit(f)/while")
    assert result.exposed_by(lambda exposure: exposure.loop) == {"v": 36, "jit(f)/while": 12}


def test_what_does_not_start_or_end_is_an_error():
    with pytest.raises(ValueError, match="g has started and is never done"):
        total(gather("g", 1))
    with pytest.raises(ValueError, match="g is done and has not started"):
        total(Done("g"))


def test_a_bandwidth_that_is_not_published_is_an_error():
    with pytest.raises(ValueError, match="its memory is not in the table"):
        Machine.published(peak_of("NVIDIA A100"), (0,))
    with pytest.raises(ValueError, match="its links is not in the table"):
        Machine.published(peak_of("NVIDIA H100 PCIe"), (0, 0))
    assert Machine.published(peak_of("NVIDIA H100 PCIe"), (0,)).flops_per_s == 756.5e12


# ------------------------------------------------------------------ any schedule


@st.composite
def schedules(draw, depth=2):
    """Steps in which whatever starts is done later, in any sequence."""
    steps, begun = [], []
    for number in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(("work", "work", "gather", "copy", "done", "loop")))
        name = f"{depth}.{number}"
        if kind == "work":
            steps.append(work(draw(st.integers(0, 20)), draw(st.integers(0, 20)), name))
        elif kind == "gather":
            start = gather(name, draw(st.integers(0, 20)), groups=draw(st.sampled_from((LINKS, BOTH))))
            steps.append(start)
            begun.append(Done(name))
        elif kind == "copy":
            steps.append(CopyStart(name, draw(st.integers(0, 20))))
            begun.append(CopyDone(name))
        elif kind == "done" and begun:
            steps.append(begun.pop(draw(st.integers(0, len(begun) - 1))))
        elif kind == "loop" and depth:
            steps.append(Loop(name, tuple(draw(schedules(depth - 1))), draw(st.integers(0, 3))))
    return [*steps, *draw(st.permutations(begun))]


@settings(deadline=None)
@given(schedules(), st.sampled_from((0.0, 2.0)))
def test_any_schedule_lies_between_its_bounds(steps, collective_s):
    result = simulate(steps, dataclasses.replace(MACHINE, collective_s=collective_s))
    bound = result.bound()
    assert bound.overlapped_s <= result.step_s + 1e-9 and result.step_s <= bound.in_turn_s + 1e-9
    assert bound.simulated_s == result.step_s == pytest.approx(result.busy_s + result.exposed_s + result.copies_s)
    assert result.exposed_s == pytest.approx(sum(exposure.exposed_s for exposure in result.exposures))


@settings(deadline=None)
@given(schedules())
def test_waiting_at_once_never_makes_it_faster(steps):
    """The planted fault: no collective has a computation beside it."""

    def at_once(steps):
        for step in steps:
            if isinstance(step, Loop):
                yield dataclasses.replace(step, steps=tuple(at_once(step.steps)))
            elif isinstance(step, Start):
                yield from (step, Done(step.name))
            elif not isinstance(step, Done):
                yield step

    result, waits = simulate(steps, MACHINE), simulate(list(at_once(steps)), MACHINE)
    assert result.step_s <= waits.step_s + 1e-9 and waits.exposed_s == pytest.approx(waits.collectives_s)
