"""What a simulated step is said to wait for, and what would hide it: each cause has its own remedy."""

import dataclasses

import pytest

from medcg_jax.plan.exposures import LONGEST, describe
from medcg_jax.plan.hlo import Collective
from medcg_jax.plan.rules import Layout
from medcg_jax.plan.schedule import Compute, Done, Loop, Start
from medcg_jax.plan.simulate import Machine, simulate

# Eight devices, data 2 x fsdp 2 x tensor 2; data crosses two islands.
LAYOUT = Layout({"cell": 1, "data": 2, "fsdp": 2, "tensor": 2}, 0.0, 0.0)
MACHINE = Machine(1.0, 1.0, 1.0, 1.0, island_of=(0,) * 4 + (1,) * 4)
GROUPS = {"data": ((0, 4),), "fsdp": ((0, 2),), "tensor": ((0, 1),)}
TPU, GPU = "TPU v5 lite", "NVIDIA H100 80GB HBM3"


def described(kind="all-gather", axis="fsdp", *, device=TPU, full=True, is_async=False, loop=True, work=1000):
    start = Start("g", Collective("g", kind, GROUPS[axis], 100, 1), is_async=is_async)
    steps = [start, Done("g")]
    steps = [Loop("w", tuple(steps), 2, "jit(f)/while")] if loop else steps
    return describe(simulate([Compute("c", work, 0), *steps], MACHINE), LAYOUT, device=device, full_effort=full)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (dict(full=False), "--full_effort"),
        (dict(axis="data"), "smaller mesh.data"),
        (dict(work=10), "so no flag hides all of it"),
        (dict(kind="all-reduce", axis="tensor"), "smaller mesh.tensor"),
        (dict(loop=False), "outside of the layers' loops"),
        (dict(), "xla_jf_spmd_threshold_for_windowed_einsum_mib"),
        (dict(kind="reduce-scatter", device="TPU v5"), "mesh.sparse_cores=true"),
        (dict(is_async=True), "a larger train.batch_size"),
        (dict(kind="reduce-scatter", device=GPU, is_async=True), "xla_gpu_enable_pipelined_reduce_scatter"),
    ],
)  # fmt: skip
def test_each_cause_has_its_remedy(case, says):
    [wait] = described(**case)["longest"]
    assert says in wait["remedy"] and wait["axes"] == [case.get("axis", "fsdp")]


def test_the_longest_come_first_and_sums_are_whole():
    def loop(number, kind):
        start = Start(f"g{number}", Collective("g", kind, GROUPS["fsdp"], 2 * number, 1))
        return Loop(f"w{number}", (start, Compute("c", 1, 0), Done(start.name)), 3, f"jit(f)/while{number}")

    steps = [loop(number, "all-gather" if number % 2 else "reduce-scatter") for number in range(1, 9)]
    result = simulate(steps, MACHINE)
    page = describe(result, LAYOUT, device=TPU, full_effort=True)
    # A gather of 2 n bytes takes n seconds, of which one is hidden, three times.
    assert [wait["exposed_s"] for wait in page["longest"]] == [3 * (number - 1) for number in range(8, 8 - LONGEST, -1)]
    assert page["exposed_by_kind"] == {"reduce-scatter": 48, "all-gather": 36} and page["exposed_s"] == 84
    assert page["exposed_by_loop"]["jit(f)/while8 x 3"] == 21 and sum(page["exposed_by_loop"].values()) == 84
    assert page["step_s"] == page["busy_s"] + page["exposed_s"] == 24 + 84
    hidden = dataclasses.replace(MACHINE, link_bytes_per_s=100.0)
    assert describe(simulate(steps, hidden), LAYOUT, device=TPU, full_effort=True)["longest"] == []
