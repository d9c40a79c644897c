"""Known traps as rules: each finds the fault that is planted, and nothing where there is none."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax.chips import peak_of
from medcg_jax.plan import roofline
from medcg_jax.plan import rules as plan_rules
from medcg_jax.plan.hlo import Collective
from medcg_jax.plan.rules import Layout

AXES = {"cell": 1, "data": 2, "fsdp": 4, "tensor": 2}
LAYOUT = Layout(AXES, whole_bytes=2e6, layer_bytes=400e6)
# Groups of the 16 devices of that mesh over one axis each.
OVER = {
    "tensor": tuple((2 * i, 2 * i + 1) for i in range(8)),
    "fsdp": tuple(tuple(8 * d + 2 * f + t for f in range(4)) for d in range(2) for t in range(2)),
    "data": tuple((i, i + 8) for i in range(8)),
}
MB = 1_000_000


def collective(kind, axis, size, trips=1, name="x"):
    return Collective(name, kind, OVER[axis], size, trips)


# What an FSDP step of 32 layers does: gathers of layers and their gradients scattered, sums over data and tensor.
SOUND = [
    collective("all-gather", "fsdp", 400 * MB, 32),
    collective("all-gather", "fsdp", 400 * MB, 32),
    collective("reduce-scatter", "fsdp", 400 * MB, 32),
    collective("all-reduce", "data", 100 * MB, 32),
    collective("all-reduce", "tensor", 300 * MB, 64),
    collective("all-gather", "fsdp", 500 * MB),
    collective("all-reduce", "fsdp", 2 * MB),
]


def rules(found, layout=LAYOUT):
    return plan_rules.full_all_reduce(found, layout) + plan_rules.large_collective_in_loop(found, layout)


def test_axes_that_a_collective_joins():
    for axis in OVER:
        assert LAYOUT.joined(collective("all-reduce", axis, 1)) == {axis}
    everyone = Collective("x", "all-reduce", (tuple(range(16)),), 1, 1)
    assert LAYOUT.joined(everyone) == {"data", "fsdp", "tensor"}
    assert LAYOUT.joined(Collective("x", "all-reduce", ((3,),), 1, 1)) == set()


def test_a_sound_step_has_no_findings():
    assert rules(SOUND) == []


def test_gradients_reduced_whole_are_found():
    planted = [one for one in SOUND if one.kind != "reduce-scatter"] + [
        collective("all-reduce", "fsdp", 90 * MB, 32, "all-reduce.7")
    ]
    [found] = plan_rules.full_all_reduce(planted, LAYOUT)
    assert found.rule == "full-all-reduce" and found.num_bytes == (90 * 32 + 2) * MB
    assert found.names[0].startswith("all-reduce.7: 32 x")
    # Parameters that are not split are reduced whole by right.
    assert not plan_rules.full_all_reduce(planted, dataclasses.replace(LAYOUT, whole_bytes=90 * 32 * MB))


@pytest.mark.parametrize(
    "planted",
    [
        collective("all-reduce", "fsdp", 101 * MB, 32),
        collective("all-gather", "fsdp", 401 * MB, 32),  # more than a layer: the whole stack, each time round
        collective("all-gather", "data", 101 * MB, 32),
        collective("collective-permute", "fsdp", 101 * MB, 2),
        collective("all-reduce", "data", 101 * MB, 32),  # gradients that are not scattered first
        collective("all-to-all", "data", 101 * MB, 32),
    ],
)
def test_a_large_collective_in_a_loop_is_found(planted):
    [found] = plan_rules.large_collective_in_loop([*SOUND, planted], LAYOUT)
    assert found.rule == "large-collective-in-loop" and found.num_bytes == planted.total_bytes
    # Once is no loop, and little is not worth a word.
    for harmless in (dataclasses.replace(planted, trips=1), dataclasses.replace(planted, payload_bytes=99 * MB)):
        assert not plan_rules.large_collective_in_loop([*SOUND, harmless], LAYOUT)


def test_a_lost_donation_is_found():
    assert plan_rules.donation_lost(5.07e9, 5.07e9) == []
    [found] = plan_rules.donation_lost(3.4e9, 5.07e9)
    assert found.rule == "donation-lost" and found.num_bytes == pytest.approx(1.67e9)


def test_what_the_compiler_warns_of_is_found():
    line = "W1125 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler cannot go from"
    [found] = plan_rules.involuntary_rematerialization(f"noise\n{line} a\n{line} b\n{line} b\n")
    assert found.rule == "involuntary-rematerialization" and "3 times" in found.text and len(found.names) == 2
    assert plan_rules.involuntary_rematerialization("E0000 common_lib.cc:906] INVALID_ARGUMENT\n") == []


def test_gathers_between_hosts_are_found():
    def between(per_host):
        return lambda one: roofline.crosses(one, [device // per_host for device in range(16)])

    [found] = plan_rules.gather_over_network(SOUND, between(4))
    assert found.rule == "gather-over-network" and found.num_bytes == (2 * 400 * 32 + 500) * MB
    # With data alone between the hosts only sums of gradients are exchanged there.
    assert not plan_rules.gather_over_network(SOUND, between(8))
    [found] = plan_rules.gather_over_network([*SOUND, collective("all-gather", "data", 101 * MB)], between(8))
    assert found.num_bytes == 101 * MB


# ------------------------------------------------------------------ the bound


@given(st.integers(2, 64), st.integers(1, 10**9), st.integers(1, 100))
def test_rings_send_less_than_the_payload_and_reductions_twice(size, payload, trips):
    group, one_host = (tuple(range(size)),), [0] * size
    sent = {
        kind: roofline.network_bytes([Collective("x", kind, group, payload, trips)], one_host)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert sent["all-reduce"][0] == pytest.approx(sent["all-gather"][0] + sent["reduce-scatter"][0])
    assert sent["all-gather"] == (pytest.approx(payload * trips * (size - 1) / size), 0.0)


def test_what_crosses_hosts_is_shared_by_their_devices():
    hosts = [device // 4 for device in range(16)]
    everyone = Collective("x", "all-gather", (tuple(range(16)),), 16 * MB, 1)
    assert roofline.network_bytes([everyone], hosts) == (15 * MB, 15 * MB / 4)
    # One device of each host: nobody shares.
    alone = Collective("x", "all-gather", ((0, 4, 8, 12),), 16 * MB, 1)
    assert roofline.network_bytes([alone], hosts) == (12 * MB, 12 * MB)
    assert roofline.network_bytes([Collective("x", "all-gather", ((3,),), MB, 1)], hosts) == (0.0, 0.0)


def test_the_bound_without_a_schedule_says_what_it_leaves_out():
    peak, why = peak_of("TPU v5 lite"), "no schedule"
    found = roofline.bound(peak=peak, num_devices=4, executed_flops=4 * 197e12, sent_bytes=(0.25 * 200e9, 0.0), why=why)
    assert (found.compute_s, found.memory_s, found.network_s) == (1.0, None, 0.25) and found.unknown == (why,)
    assert (found.overlapped_s, found.in_turn_s, found.limit, found.simulated_s) == (1.0, 1.25, "compute", None)
    # The slower of links and network counts, and what is not known counts nothing and is told.
    slow = roofline.bound(peak=peak, num_devices=4, executed_flops=0.0, sent_bytes=(200e9, 3 * 3.125e9), why=why)
    assert slow.network_s == 3.0 and slow.limit == "network"
    blind = roofline.bound(peak=peak, num_devices=1, executed_flops=197e12, sent_bytes=None, why=why)
    assert blind.network_s is None and blind.in_turn_s == 1.0 and "could not be read" in blind.unknown[1]
    card = roofline.bound(
        peak=peak_of("NVIDIA H100 PCIe"), num_devices=2, executed_flops=1e12, sent_bytes=(1e9, 0.0), why=why
    )
    assert card.network_s is None and "not in the table" in card.unknown[1]
