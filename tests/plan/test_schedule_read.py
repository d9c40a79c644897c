"""A scheduled program's text read in its sequence: TPU's and CUDA's forms of asynchronous work, bytes, and refusals."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from medcg_jax.plan import hlo, schedule
from medcg_jax.plan.hlo_products import products
from medcg_jax.plan.schedule import Compute, CopyDone, CopyStart, Done, Loop, Start

HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=4\n\n"
GROUPS = "channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true"
PRODUCT = """%product (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %d = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""
FLOPS, BYTES = 2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4)


def entry(*lines: str, before: str = "") -> str:
    return HEAD + before + "ENTRY %main (x: f32[8,16], w: f32[16,4], s: f32[4,4]) -> f32[8,4] {\n" + "\n".join(
        f"  {line}" for line in (
            "%x = f32[8,16]{1,0} parameter(0)", "%w = f32[16,4]{1,0} parameter(1)", "%s = f32[4,4]{1,0} parameter(2)",
            *lines,
        )
    ) + "\n}\n"  # fmt: skip


def names(steps) -> list:
    return [(type(step).__name__, step.name) for step in steps]


def test_start_and_done_as_cuda_writes_them():
    text = entry(
        f"%g = (f32[4,4], f32[16,4]) all-gather-start(%s), {GROUPS}, metadata={{op_name=\"jit(f)/dot\"}}",
        "%p = f32[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%product",
        "%h = f32[16,4]{1,0} all-gather-done(%g)",
        "ROOT %q = f32[8,4]{1,0} fusion(%x, %h), kind=kOutput, calls=%product",
        before=PRODUCT,
    )  # fmt: skip
    start, beside, done, after = schedule.read(text)
    assert isinstance(start, Start) and start.is_async and start.operation == "jit(f)/dot"
    assert (start.collective.kind, start.collective.payload_bytes) == ("all-gather", 256)
    assert beside == Compute("p", FLOPS, BYTES) and done == Done("g") and after == Compute("q", FLOPS, BYTES)


def test_a_collective_without_a_start_is_done_at_once():
    steps = schedule.read(entry(f"ROOT %g = f32[16,4]{{1,0}} all-gather(%s), {GROUPS}"))
    assert names(steps) == [("Start", "g"), ("Done", "g")] and not steps[0].is_async


FUSED = f"""%begin (a: f32[4,4]) -> (f32[4,4], f32[16,4], u32[]) {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %g1 = f32[16,4]{{1,0:S(1)}} all-gather(%a), {GROUPS}
  ROOT %c = (f32[4,4]{{1,0}}, f32[16,4]{{1,0}}, u32[]) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}}

%carry (a: f32[4,4], x: f32[8,16], w: f32[16,4]) -> (f32[8,4], f32[4,4], f32[16,4]) {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %x = f32[8,16]{{1,0}} parameter(1)
  %w = f32[16,4]{{1,0}} parameter(2)
  %d = f32[8,4]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %g2 = f32[16,4]{{1,0}} all-gather(%a), {GROUPS}
  ROOT %t = (f32[8,4]{{1,0}}, f32[4,4]{{1,0}}, f32[16,4]{{1,0}}) tuple(%d, %a, %g2)
}}

%end (a: f32[4,4], b: f32[16,4]) -> f32[16,4] {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %b = f32[16,4]{{1,0}} parameter(1)
  %g3 = f32[16,4]{{1,0}} all-gather(%a), {GROUPS}
  ROOT %c = f32[16,4]{{1,0}} custom-call(%a, %b, %g3), custom_call_target="AsyncCollectiveDone"
}}

"""
BEGIN = "%f1 = (f32[4,4], f32[16,4], u32[]) fusion(%s), kind=kCustom, calls=%begin"
CARRY = "%f2 = (f32[8,4]{1,0}, f32[4,4]{1,0}, f32[16,4]{1,0}) fusion(%s, %x, %w), kind=kOutput, calls=%carry"
END = "ROOT %f3 = f32[16,4]{1,0} fusion(%s, %w), kind=kCustom, calls=%end"


def test_a_gather_inside_fusions_as_a_tpu_writes_it():
    """Three fusions hold it; the one between carries it beside a product, and is no second gather."""
    steps = schedule.read(entry(BEGIN, CARRY, END, before=FUSED))
    assert names(steps) == [("Start", "f1/g1"), ("Compute", "f2"), ("Done", "f1/g1")]
    assert steps[0].is_async and steps[1] == Compute("f2", FLOPS, BYTES)
    with pytest.raises(ValueError, match="f3 ends g3, and nothing before it started that"):
        schedule.read(entry(END, before=FUSED))
    with pytest.raises(ValueError, match="f1/g1 starts in main and is not done there"):
        schedule.read(entry(BEGIN, CARRY.replace("%f2", "ROOT %f2"), before=FUSED))
    # Without a start, a fusion that holds a collective waits for it.
    carry = "%carry" + FUSED.partition("%carry")[2].partition("%end")[0]
    carries = schedule.read(entry(CARRY.replace("%f2", "ROOT %f2"), before=carry))
    assert names(carries) == [("Start", "f2/g2"), ("Done", "f2/g2"), ("Compute", "f2")] and not carries[0].is_async


LOOP = """%body (t: (u32[], f32[8,16], f32[16,4], f32[4,4])) -> (u32[], f32[8,16], f32[16,4], f32[4,4]) {
  %t = (u32[], f32[8,16]{1,0}, f32[16,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%t), index=1
  %w = f32[16,4]{1,0} get-tuple-element(%t), index=2
  %s = f32[4,4]{1,0} get-tuple-element(%t), index=3
  CARRY
  %two = u32[] constant(2)
  %j = u32[] add(%i, %two)
  ROOT %n = (u32[], f32[8,16]{1,0}, f32[16,4]{1,0}, f32[4,4]{1,0}) tuple(%j, %x, %w, %s)
}

%condition (t: (u32[], f32[8,16], f32[16,4], f32[4,4])) -> pred[] {
  %t = (u32[], f32[8,16]{1,0}, f32[16,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %k = u32[] constant(7)
  ROOT %l = pred[] compare(%i, %k), direction=LT
}

""".replace("CARRY", CARRY)


def test_a_gather_that_runs_beside_a_loop_over_parts_of_a_product():
    """The loop takes two parts at a time, four times for seven; what its fusions carry is not gathered anew."""
    text = entry(
        BEGIN,
        "%c = u32[] constant(0)",
        "%a = (u32[], f32[8,16]{1,0}, f32[16,4]{1,0}, f32[4,4]{1,0}) tuple(%c, %x, %w, %s)",
        "%v = (u32[], f32[8,16]{1,0}, f32[16,4]{1,0}, f32[4,4]{1,0}) while(%a), condition=%condition, body=%body",
        END,
        before=FUSED + LOOP,
    )
    start, loop, done = schedule.read(text)
    assert (start, done.name) == (start, start.name) and (loop.trips, names(loop.steps)[0]) == (4, ("Compute", "f2"))
    assert [type(step) for step in loop.steps] == [Compute] * len(loop.steps)
    assert [(c.kind, c.trips) for c in hlo.collectives(text)] == [("all-gather", 1)]
    # Alone, the loop's fusion gathers in every iteration.
    carry = "%carry" + FUSED.partition("%carry")[2].partition("%end")[0]
    alone = text.replace(FUSED, carry).replace(BEGIN, "").replace(END, "ROOT %z = u32[] add(%c, %c)")
    assert [(c.kind, c.trips) for c in hlo.collectives(alone)] == [("all-gather", 4)]
    assert isinstance(schedule.read(alone)[0].steps[0], Start)


def test_the_tpus_reduce_scatter_is_an_all_reduce_in_a_fusion():
    before = """%all-reduce-scatter.1 (a: f32[16,4]) -> f32[4,4] {
  %a = f32[16,4]{1,0} parameter(0)
  %r = f32[16,4]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%sum
  %z = s32[] constant(0)
  ROOT %p = f32[4,4]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={4,4}
}

"""
    text = entry("ROOT %f = f32[4,4]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1", before=before)
    start = schedule.read(text)[0]
    assert (start.collective.kind, start.collective.payload_bytes) == ("reduce-scatter", 256)


SPARSE = """%kernel (a: f32[16,4]) -> f32[16,4] {
  %a = f32[16,4]{1,0} parameter(0)
  ROOT %r = f32[16,4]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%sum
}, execution_thread="sparsecore"

%launch (a: f32[16,4]) -> f32[16,4] {
  %a = f32[16,4]{1,0} parameter(0)
  ROOT %c = f32[16,4]{1,0} custom-call(%a), custom_call_target="TODO(b/1)", called_computations={%kernel}
}, execution_thread="sparsecore"

"""


def test_a_sum_on_a_tpus_sparse_cores_begins_with_the_update_that_brings_its_operand():
    launched = '%l = ((), (), (s32[8])) async-start(), async_execution_thread="sparsecore", calls=%launch'
    text = entry(
        launched,
        "%n = f32[16,4]{1,0} negate(%w)",
        "%u = ((f32[16,4]), f32[16,4], (s32[8])) async-update(%l, %n)",
        "%m = f32[16,4]{1,0} negate(%w)",
        "ROOT %d = f32[16,4]{1,0} async-done(%u)",
        before=SPARSE,
    )
    assert names(schedule.read(text)) == [("Compute", "n"), ("Start", "l"), ("Compute", "m"), ("Done", "l")]
    assert [(c.kind, c.payload_bytes) for c in hlo.collectives(text)] == [("all-reduce", 256)]
    with pytest.raises(ValueError, match="d ends l, which nothing gave its operands"):
        schedule.read(entry(launched, "ROOT %d = f32[16,4]{1,0} async-done(%l)", before=SPARSE))
    with pytest.raises(ValueError, match="computation kernel has collectives, and no known instruction calls it"):
        schedule.read(entry("ROOT %n = f32[16,4]{1,0} negate(%w)", before=SPARSE))


def test_copies_to_the_chip_run_beside_and_arrays_on_it_cross_no_memory():
    before = """%slices (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %c = f32[2,16]{1,0:T(8,128)S(1)} slice(%a), slice={[0:2], [0:16]}
}

"""
    text = entry(
        "%c = (f32[16,4]{1,0:T(8,128)S(1)}, f32[16,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)",
        "%b = ((f32[8,16]{1,0:T(8,128)}), f32[2,16]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) async-start(%x), calls=%slices",
        "%d = f32[16,4]{1,0:T(8,128)S(1)} copy-done(%c)",
        "%e = f32[2,16]{1,0:T(8,128)S(1)} async-done(%b)",
        "ROOT %n = f32[16,4]{1,0:T(8,128)} negate(%d)",
        before=before,
    )
    assert schedule.read(text) == (
        CopyStart("c", 256), CopyStart("b", 128), CopyDone("c"), CopyDone("b"), Compute("n", 0, 256)
    )  # fmt: skip
    # A GPU has no such memory: there "S(1)" is where collectives write, in its own.
    gpu = entry("ROOT %n = f32[16,4]{1,0:S(1)} negate(%w)")
    assert schedule.read(gpu) == (Compute("n", 0, 512),)
    with pytest.raises(ValueError, match="in the host's memory"):
        schedule.read(entry("ROOT %n = f32[16,4]{1,0:T(8,128)S(5)} negate(%w)"))


def test_a_stack_of_layers_is_read_and_written_slice_by_slice():
    before = """%layer (stack: f32[64,16], y: f32[1,16], i: s32[]) -> (f32[64,16], f32[1,16]) {
  %stack = f32[64,16]{1,0} parameter(0)
  %y = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %s1 = f32[1,16]{1,0} dynamic-slice(%stack, %i, %z), dynamic_slice_sizes={1,16}
  %a = f32[1,16]{1,0} add(%s1, %y)
  %u = f32[64,16]{1,0} dynamic-update-slice(%stack, %a, %i, %z)
  ROOT %t = (f32[64,16]{1,0}, f32[1,16]{1,0}) tuple(%u, %a)
}

"""
    text = (
        HEAD
        + before
        + """ENTRY %main (stack: f32[64,16], y: f32[1,16], i: s32[]) -> (f32[64,16], f32[1,16]) {
  %stack = f32[64,16]{1,0} parameter(0)
  %y = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = (f32[64,16]{1,0}, f32[1,16]{1,0}) fusion(%stack, %y, %i), kind=kLoop, calls=%layer
}
"""
    )
    [step] = schedule.read(text)
    # The slice, y and the index in; the update and the second result out; the stack itself never.
    assert step.num_bytes == 64 + 64 + 4 + 64 + 64


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ROOT %n = f32[16,4]{1,0} frobnicate(%w)", "n: what frobnicate moves over memory is not known"),
        ("ROOT %n = f32[16,4] custom-call(%w), custom_call_target=\"new_kernel\"", "n: the work of new_kernel is not"),
        ("ROOT %n = f32[16,4]{1,0} all-gather-done(%w)", "n is of w, which nothing before it started"),
        (f"ROOT %n = (f32[4,4], f32[16,4]) all-gather-start(%s), {GROUPS}", "n starts in main and is not done there"),
        ("ROOT %n = (f32[4,4], u32[], token[]) recv-done(%s), channel_id=1, is_host_transfer=true", "nothing before it sent"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_an_error(line, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        schedule.read(entry(line))


def test_text_without_a_schedule_is_an_error():
    with pytest.raises(ValueError, match="has no schedule"):
        schedule.read(jax.jit(lambda x: x + 1).lower(1.0).as_text(dialect="hlo"))


# ------------------------------------------------------------------ whole programs


def flat(steps, trips=1):
    for step in steps:
        if isinstance(step, Loop):
            yield from flat(step.steps, trips * step.trips)
        else:
            yield step, trips


def compare(text: str) -> dict:
    """A schedule's sums; they must be those that `products` and `collectives` read of the same text."""
    steps = list(flat(schedule.read(text)))
    flops = sum(step.flops * trips for step, trips in steps if isinstance(step, Compute))
    moved: dict[str, int] = {}
    for step, trips in steps:
        if isinstance(step, Start) and any(len(set(group)) > 1 for group in step.collective.groups):
            kind = step.collective.kind
            moved[kind] = moved.get(kind, 0) + step.collective.payload_bytes * trips
    assert flops == products(text).flops > 0 and moved == hlo.bytes_by_kind(hlo.collectives(text))
    return moved


def test_a_program_of_eight_devices_has_all_its_products_and_collectives():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2)

    def shaped(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    args = shaped((5, 64, 64), None, "fsdp"), shaped((16, 64), ("data", "fsdp"))
    text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    assert compare(text)["all-gather"] >= 2 * 5 * 4 * 64 * 64
