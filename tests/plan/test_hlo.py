"""Collectives read from the text of compiled programs: every way they are written, and programs of known bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from medcg_jax.config import MeshConfig
from medcg_jax.mesh import make_mesh
from medcg_jax.plan.hlo import Collective, bytes_by_kind, collectives, crossing, groups_of, num_bytes

PAIRS = "replica_groups={{0,1},{2,3}}"


def program(*lines: str, others: str = "") -> str:
    """The text of a program of four devices, with these instructions in its entry."""
    body = "\n".join(f"  {line}" for line in lines)
    header = "HloModule jit_f, is_scheduled=true, num_partitions=4"
    return f"{header}\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def gather(channel: int = 1, groups: str = PAIRS) -> str:
    return f"%g.{channel} = f32[8]{{0}} all-gather(%p), channel_id={channel}, {groups}, dimensions={{0}}"


# ------------------------------------------------------------------ groups


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{{0},{1},{2},{3}}", [[0], [1], [2], [3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2,'c'=1] {'a','c'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_every_way_to_write_groups_is_read(written, expected):
    assert groups_of(f"channel_id=1, replica_groups={written}, dimensions={{0}}, metadata={{}}", 4) == expected


def test_pairs_of_a_permute_are_read():
    line = "%x = f32[2]{0} collective-permute(%p), channel_id=1, source_target_pairs={{0,2},{1,3}}, metadata={}"
    (found,) = collectives(program(line))
    assert found == Collective("x", "collective-permute", ((0, 2), (1, 3)), 8, 1)


@pytest.mark.parametrize(
    "written",
    ["others", "[2,2]", "mesh['a'=2,'b'=2] {'c'}", "mesh['a'=2,'b'=2] {'a':(1)2}", "[2,2]<=[4]T(x)", "{{a},{b}}"],
)
def test_groups_in_another_way_are_an_error(written):
    with pytest.raises(ValueError):
        collectives(program(gather(groups=f"replica_groups={written}")))


# ------------------------------------------------------------------ shapes and payloads


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[]", 4),
        ("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}", 64),
        ("(f32[2]{0}, /*index=5*/s8[3]{0:T(8)(4,1)}, (pred[4], u4[4]))", 8 + 3 + 4 + 2),
        ("f8e4m3fn[16]", 16),
        ("token[]", 0),
        ("c64[2]", 16),
    ],
)
def test_bytes_of_shapes(shape, expected):
    assert num_bytes(shape) == expected


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="unknown"):
        num_bytes("opaque[4]")


@pytest.mark.parametrize(
    ("line", "kind", "payload"),
    [
        ("%x = f32[8]{0} all-gather(%p)", "all-gather", 32),
        ("%x = f32[4]{0} reduce-scatter(%p)", "reduce-scatter", 32),
        ("%x = (f32[4]{0}, bf16[6]{0}) all-reduce(%p, %q)", "all-reduce", 28),
        ("%x = (f32[4]{0}, f32[4]{0}) all-to-all(%p, %q)", "all-to-all", 32),
        ("%x = (f32[4]{0}, f32[8]{0}) all-gather-start(%p)", "all-gather", 32),
        ("%x = ((f32[4]{0}, f32[2]{0}), (f32[8]{0}, f32[4]{0})) all-gather-start(%p, %q)", "all-gather", 48),
        ("%x = ((f32[8]{0}), f32[4]{0}, u32[]) reduce-scatter-start(%p)", "reduce-scatter", 32),
        ("%x = (f32[4]{0}, bf16[6]{0}) all-reduce-start(%p, %q)", "all-reduce", 28),
    ],
)
def test_payloads(line, kind, payload):
    (found,) = collectives(program(f"{line}, channel_id=1, {PAIRS}, dimensions={{0}}"))
    assert (found.kind, found.payload_bytes) == (kind, payload)


def test_an_asynchronous_collective_counts_once():
    start = f"%s = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%p), channel_id=1, {PAIRS}, dimensions={{0}}"
    found = collectives(program(start, '%d = f32[8]{0} all-gather-done(%s), metadata={op_name="x/all-gather"}'))
    assert [one.name for one in found] == ["s"]


# ------------------------------------------------------------------ loops, branches, fusions

LOOP = "%w = (s32[], f32[8]{{0}}) while(%t), condition=%cond, body=%body, metadata={{}}{config}"  # a format string
BODY = f"%body (b: f32[8]) -> f32[8] {{\n  {gather()}\n}}\n"
COUNTER = """%cond (c: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} fusion(%c, %n), kind=kLoop, calls=%compared
}
%compared (a: s32[], b: s32[]) -> pred[] {
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}
"""


def test_trips_are_read_from_the_loop_or_from_its_condition():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert [c.trips for c in collectives(program(LOOP.format(config=known), others=BODY + COUNTER))] == [5]
    assert [c.trips for c in collectives(program(LOOP.format(config=""), others=BODY + COUNTER))] == [7]


@pytest.mark.parametrize("change", [("direction=LT", "direction=NE"), ("constant(7)", "parameter(1)")])
def test_unknown_trips_are_an_error_where_they_matter(change):
    with pytest.raises(ValueError, match="unknown trips of the loop w"):
        collectives(program(LOOP.format(config=""), others=BODY + COUNTER.replace(*change)))
    still = "%body (b: f32[8]) -> f32[8] {\n  %y = f32[8] add(%b, %b)\n}\n"
    assert len(collectives(program(LOOP.format(config=""), gather(), others=still + COUNTER.replace(*change)))) == 1


def test_loops_in_loops_multiply():
    outer = BODY.replace("%body", "%inner") + (
        "%body (b: f32[8]) -> f32[8] {\n  %v = f32[8] while(%b), condition=%cond, body=%inner, "
        'backend_config={"known_trip_count":{"n":"3"}}\n}\n'
    )
    (found,) = collectives(program(LOOP.format(config=""), others=outer + COUNTER))
    assert (found.trips, found.total_bytes) == (21, 21 * 32)


def test_branches_count_all():
    others = "".join(f"%b{i} (x: f32[8]) -> f32[8] {{\n  {gather(i)}\n}}\n" for i in (1, 2))
    line = "%c = f32[8] conditional(%i, %p, %p), branch_computations={%b1, %b2}"
    assert len(collectives(program(line, others=others))) == 2


def test_fused_copies_of_one_collective_count_once():
    fused = "".join(f"%f{i} (x: f32[4]) -> f32[8] {{\n  {gather(channel)}\n}}\n" for i, channel in enumerate((3, 3, 4)))
    lines = [f"%x{i} = f32[8] fusion(%p), kind=kCustom, calls=%f{i}" for i in range(3)]
    assert len(collectives(program(*lines, others=fused))) == 2


def test_a_fused_reduce_scatter_is_none_of_the_all_reduces():
    reduce = f"%r = f32[8]{{0}} all-reduce(%x), channel_id=1, {PAIRS}, to_apply=%add"
    others = f"%all-reduce-scatter.1 (x: f32[8]) -> f32[4] {{\n  {reduce}\n}}\n"
    (found,) = collectives(program("%f = f32[4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", others=others))
    assert (found.kind, found.payload_bytes) == ("reduce-scatter", 32)


def test_a_kernels_own_configuration_ends_no_computation():
    kernel = '%k = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"body":"x\n  }\n}}'
    assert len(collectives(program(kernel, gather()))) == 1


# ------------------------------------------------------------------ what is refused, and what leaves a cell


def test_a_text_that_is_no_program_is_an_error():
    for text in ("", "HloModule jit_f", gather()):
        with pytest.raises(ValueError, match="no ENTRY"):
            collectives(text)


def test_groups_that_are_not_of_partitions_are_an_error():
    with pytest.raises(ValueError, match="no channel"):
        collectives(program(gather().replace("channel_id=1, ", "")))
    with pytest.raises(ValueError, match="replicas"):
        collectives(program(gather()).replace("num_partitions=4", "replica_count=2, num_partitions=4"))


def test_a_collective_that_would_be_missed_is_an_error():
    fused = f"%f (x: f32[4]) -> f32[8] {{\n  {gather()}\n}}\n"
    with pytest.raises(ValueError, match="computation f has collectives"):
        collectives(program("%x = f32[8] fusion(%p), kind=kCustom, invokes=%f", others=fused))
    with pytest.raises(ValueError, match="unknown instruction"):
        collectives(program("%x = f32[8] sparse{1} all-gather(%p), channel_id=1"))
    with pytest.raises(ValueError, match="send between devices"):
        collectives(program("%x = (f32[8], u32[], token[]) send(%p, %t), channel_id=1"))
    assert not collectives(program("%x = (f32[8], u32[], token[]) send(%p, %t), channel_id=1, is_host_transfer=true"))


def test_crossing_needs_a_collective_and_devices_that_there_are():
    with pytest.raises(ValueError, match="no collective at all"):
        crossing(collectives(program("%y = f32[8] add(%p, %p)")), num_devices=4, num_groups=2)
    with pytest.raises(ValueError, match="there are 2"):
        crossing(collectives(program(gather())), num_devices=2, num_groups=2)
    with pytest.raises(ValueError, match="a divisor"):
        crossing(collectives(program(gather())), num_devices=4, num_groups=3)


def test_what_leaves_a_cell_is_found():
    others = gather(2, "replica_groups=[2,2]<=[2,2]T(1,0)"), gather(3, "replica_groups={}")
    found = collectives(program(gather(1), *others))
    assert [one.name for one in crossing(found, num_devices=4, num_groups=2)] == ["g.2", "g.3"]
    assert [one.name for one in crossing(found, num_devices=4, num_groups=1)] == []


# ------------------------------------------------------------------ programs that were really compiled


@pytest.mark.parametrize("unroll", [1, 2])
def test_gathers_in_a_scan_move_what_is_known(unroll):
    trips, rows, width = 6, 16, 32
    mesh = make_mesh(MeshConfig(cell=2, data=1, fsdp=4))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    by_row = NamedSharding(mesh, PartitionSpec(("cell", "fsdp")))

    def f(x, weights):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, PartitionSpec())
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, weights, unroll=unroll)[0]

    with jax.set_mesh(mesh):
        args = (
            jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=by_row),
            jax.ShapeDtypeStruct((trips, width, width), jnp.float32, sharding=split),
        )
        found = collectives(jax.jit(f).lower(*args).compile().as_text())
    assert bytes_by_kind(found) == {"all-gather": trips * width * width * 4}
    assert {one.trips for one in found} == {trips // unroll}
    assert not crossing(found, num_devices=8, num_groups=2)


def test_a_sum_over_all_devices_leaves_its_cell():
    mesh = make_mesh(MeshConfig(cell=2, data=1, fsdp=4))
    for axes, leaves in ((("cell", "fsdp"), 1), ("fsdp", 0)):
        placed = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(axes)))
        found = collectives(jax.jit(lambda x: x.sum(axis=0)).lower(placed).compile().as_text())
        assert bytes_by_kind(found) == {"all-reduce": 16}
        assert len(crossing(found, num_devices=8, num_groups=2)) == leaves


# ------------------------------------------------------------------ what libtpu writes itself


def test_what_a_sparse_core_exchanges_counts_and_its_computations_end_as_they_do():
    """TPU7x: a collective stands in a computation that a custom call names, which runs in a thread of its own."""
    called = f'%sparse (p: f32[8]) -> f32[8] {{\n  {gather(7)}\n}}, execution_thread="sparsecore"\n'
    start = "%async (p: f32[8]) -> f32[8] {\n  %c = f32[8]{0} custom-call(%p), called_computations={%sparse}\n"
    others = called + start + '}, execution_thread="sparsecore"\n'
    begun = '%s = ((), ()) async-start(), async_execution_thread="sparsecore", calls=%async'
    text = program(begun, "%d = f32[8]{0} async-done(%s)", others=others)
    assert [(one.kind, one.payload_bytes, one.trips) for one in collectives(text)] == [("all-gather", 32, 1)]
    with pytest.raises(ValueError, match="sparse has collectives"):
        collectives(text.replace("called_computations", "unheard_of"))


def test_combined_collectives_of_one_channel_are_two_and_copies_of_one_are_one():
    def fusion(name: str, shape: str) -> str:
        inner = f"%r.{name} = {shape} all-reduce(%p), channel_id=1, {PAIRS}, to_apply=%add"
        return f"%all-reduce-scatter.{name} (p: f32[8]) -> f32[8] {{\n  {inner}\n}}\n"

    def called(*names: str) -> list[str]:
        return [f"%f.{name} = f32[4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.{name}" for name in names]

    two = program(*called("a", "b"), others=fusion("a", "(f32[8], f32[8])") + fusion("b", "(f32[8], f32[16])"))
    assert bytes_by_kind(collectives(two)) == {"reduce-scatter": 64 + 96}
    copies = program(*called("a", "b"), others=fusion("a", "f32[8]") + fusion("b", "f32[8]"))
    assert bytes_by_kind(collectives(copies)) == {"reduce-scatter": 32}
    # At full effort libtpu puts one of the copies into another memory.
    elsewhere = program(*called("a", "b"), others=fusion("a", "f32[8]{0:T(8)}") + fusion("b", "f32[8]{0:T(8)S(1)}"))
    assert bytes_by_kind(collectives(elsewhere)) == {"reduce-scatter": 32}


def test_a_sum_between_slices_goes_by_the_hosts_and_counts():
    sent = "%s = (bf16[8]{0}, u32[], token[]) send(%p, %t), channel_id=8, is_host_transfer=true, frontend_attributes={"
    sent += '_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    found = collectives(program(sent))
    assert bytes_by_kind(found) == {"all-reduce": 16}
    assert crossing(found, num_devices=4, num_groups=2) == found
    with pytest.raises(ValueError, match="ALL_TO_ALL between slices"):
        collectives(program(sent.replace("ALL_REDUCE", "ALL_TO_ALL")))
