"""What the plan says of a compiled program's products and arrays: sound steps, and steps with a planted fault."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medcg_jax.config import DataConfig, EvalConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig, replace
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import make_mesh
from medcg_jax.plan import programs, rules
from medcg_jax.plan import verb as plan
from medcg_jax.plan.hlo_products import Buffer, buffers
from medcg_jax.train.losses import negative_log_likelihood, token_loss

# Lengths that no width shares: rows of 46 tokens, 96 words, 10 patches of the image with their class.
SMALL = llava15_tiny(
    96, 63, image_size_px=24, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2, mlp_dim=40,
    scan_unroll=1,
)  # fmt: skip
RUN = RunConfig(
    mesh=MeshConfig(fsdp=2), model=ModelConfig(name="llava15_tiny", scan_unroll=1),
    data=DataConfig(max_text_tokens=37, max_target_tokens=2), train=TrainConfig(batch_size=4),
    eval=EvalConfig(batch_size=4, max_new_tokens=3),
)  # fmt: skip
LENGTH = 46
FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def planned_of(monkeypatch, loss_fn=token_loss, remat="none"):
    """The small run on two devices; loss_fn: in place of the text's."""
    run = replace(RUN, model__remat=remat)
    monkeypatch.setattr(programs, "architecture_of", lambda model: dataclasses.replace(SMALL, remat=remat))
    planned = programs.plan_run(run, make_mesh(run.mesh, jax.devices()[:2]))
    program = programs.make_program(run, planned.setup.model, planned.mesh, num_cells=1, loss_fn=loss_fn)[0]
    return dataclasses.replace(planned, program=program)


def trained(monkeypatch, **rest) -> dict:
    planned = planned_of(monkeypatch, **rest)
    found = plan.training(planned, programs.compile_training(planned, 4), 1 << 30, None)
    assert found["row_tokens"] == LENGTH and found["products"]["not_counted"] == ""
    return found


def rules_of(found: dict) -> set[str]:
    return {finding["rule"] for finding in found["findings"]}


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.long)])
def test_a_sound_step_executes_what_the_model_needs(monkeypatch, remat):
    found = trained(monkeypatch, remat=remat)
    ratio = found["products"]["by_full"]
    assert ratio == pytest.approx(1.0, abs=0.02) if remat == "none" else 1.2 < ratio <= 1.34
    # Where attention is plain it executes the whole square, and writes it.
    assert found["products"]["by_causal"] > ratio
    assert rules_of(found) == {"square-attention-buffer"}


def test_tests_execute_what_the_model_needs(monkeypatch):
    planned = planned_of(monkeypatch)
    made = programs.compile_tests(planned)
    found = plan.testing(planned, made, 1 << 30, None)
    assert found["products"]["by_full"] == pytest.approx(1.0, abs=0.02)
    assert rules_of(found) == {"square-attention-buffer"}
    # The planted fault: a program for twice the words is no program for these.
    half = dict(found["flops"], full=found["flops"]["full"] / 2)
    lengths = rules.lengths_of(planned, [LENGTH, LENGTH + 2], 4)
    seen = rules.check_products(made.program.as_text(), half, lengths, num_devices=2, remat="full", open_trips=2)
    assert "extra-flops" in {finding.rule for finding in seen.findings}


def logits_everywhere(model, batch):
    """The planted fault: the head runs at every position, and what is not supervised is dropped behind it."""
    images = {key: batch[key] for key in model.image_keys}
    logits = model.logits(model.hidden(batch["tokens"], images, segment_ids=batch["segment_ids"])[0])
    places = batch["target_positions"][..., None]
    nll = negative_log_likelihood(jnp.take_along_axis(logits, places, axis=1), batch["targets"])
    return (nll * batch["target_weights"]).sum(), batch["target_weights"].sum()


def test_a_head_at_all_positions_is_found(monkeypatch):
    found = trained(monkeypatch, loss_fn=logits_everywhere)
    [one] = [finding for finding in found["findings"] if finding["rule"] == "logits-everywhere"]
    # float32 logits of the two rows of a device.
    assert one["num_bytes"] >= 4 * 2 * LENGTH * 96 and any("96" in name for name in one["names"])
    assert "extra-flops" in rules_of(found)


@pytest.mark.long
def test_a_forward_pass_too_many_is_found(monkeypatch):
    def twice(model, batch):
        total, weight = token_loss(model, batch)
        seen = dict(batch, tokens=jnp.where(batch["segment_ids"] > 0, 5, batch["tokens"]))
        return total + 0 * jax.lax.stop_gradient(token_loss(model, seen)[0]) ** 2, weight

    found = trained(monkeypatch, loss_fn=twice)
    assert found["products"]["by_full"] > 1.2 and "extra-flops" in rules_of(found)


def test_a_program_that_cannot_be_read_is_no_sound_one(monkeypatch):
    lengths = rules.lengths_of(planned_of(monkeypatch), [LENGTH], 4)
    for text, missing in (("", set(rules.PRODUCT_RULES)), (UNKNOWN_CALL, {"extra-flops"})):
        seen = rules.check_products(text, {"full": 1.0}, lengths, num_devices=2, remat="none")
        assert missing <= set(seen.not_looked_for) and seen.about["not_counted"]


UNKNOWN_CALL = """HloModule f

ENTRY %main (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} custom-call(), custom_call_target="my$matmul"
}
"""


# ------------------------------------------------------------------ arrays


@FEW
@given(st.permutations([46, 768, 2, 3]), st.sampled_from([46, 48, 771]), st.sampled_from([17, 4096]))
def test_squares_are_found_wherever_their_axes_lie(order, other, width):
    lengths = rules.Lengths(frozenset({46, 48, 768, 771}), 768, 4, frozenset({32000}), frozenset({17, 4096}))
    square = Buffer("x", tuple(order), 1, "")
    [found] = rules.square_attention_buffer([square], lengths)
    assert found.rule == "square-attention-buffer"
    for harmless in ((other, width), (width, 2, 3), (other,), (768, 2, width)):
        assert not rules.square_attention_buffer([Buffer("x", harmless, 1, "")], lengths)


@FEW
@given(st.sampled_from([32000, 16000]), st.integers(1, 4), st.booleans(), st.permutations([0, 1, 2]))
def test_logits_are_found_with_rows_joined_or_not(words, rows, shifted, order):
    lengths = rules.Lengths(frozenset({768}), 768, 4, frozenset({32000, 16000}), frozenset({4096, 11008}))
    assert lengths.unclear() == []
    joined = (rows * (768 - shifted), words)
    apart = (rows, 768 - shifted, words)
    for dims in (joined, joined[::-1], tuple(apart[i] for i in order)):
        assert rules.logits_everywhere([Buffer("x", dims, 1, "")], lengths)
    for harmless in ((rows, 8, words), (8 * rows, words), (4096, words), (words,), (rows, 768, 4096)):
        assert not rules.logits_everywhere([Buffer("x", harmless, 1, "")], lengths)


def test_what_cannot_be_told_apart_is_said():
    def unclear(**rest):
        known = {"attended": frozenset({768}), "vocabulary": frozenset({32000}), "widths": frozenset()}
        return rules.Lengths(**known | rest, positions=768, rows=4).unclear()

    assert unclear() == []
    assert unclear(widths=frozenset({3072})) == ["logits-everywhere"]
    assert unclear(widths=frozenset({768})) == ["square-attention-buffer", "logits-everywhere"]


def test_the_arrays_of_a_program():
    text = """HloModule f

%fused (p.1: f32[8,4]) -> f32[8,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %inner = f32[8,8,8]{2,1,0} broadcast(%p.1), dimensions={0,1}
  ROOT %out = f32[8,4]{1,0} slice(%inner), metadata={op_name="made/it"}
}

%body (c: (f32[8,4])) -> (f32[8,4]) {
  %c = (f32[8,4]{1,0}) parameter(0)
  %e = f32[8,4]{1,0} get-tuple-element(%c), index=0
  %in_loop = bf16[8,4]{1,0} convert(%e), metadata={op_name="in/loop"}
  ROOT %t = (f32[8,4]{1,0}) tuple(%e)
}

%until (d: (f32[8,4])) -> pred[] {
  %d = (f32[8,4]{1,0}) parameter(0)
  ROOT %never = pred[] constant(false)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %f = f32[8,4]{1,0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="f"}
  %pieces = f32[16,4]{1,0} concatenate(%f, %f), dimensions={0}
  %named = f32[16,4]{1,0} concatenate(%f, %f), dimensions={0}, metadata={op_name="joined"}
  %two = (f32[2]{0}, /*index=1*/s8[3,3]{1,0}) custom-call(%f), custom_call_target="x"
  %b = f32[32]{0} bitcast(%f)
  %start = (f32[8,4]{1,0}) tuple(%f)
  %w = (f32[8,4]{1,0}) while(%start), condition=%until, body=%body
  ROOT %g = f32[8,4]{1,0} get-tuple-element(%w), index=0
}
"""
    found = {(one.name, one.dims, one.num_bytes, one.where) for one in buffers(text)}
    assert found == {
        ("f", (8, 4), 128, "f"), ("named", (16, 4), 256, "joined"), ("two", (2,), 8, ""), ("two", (3, 3), 9, ""),
        ("in_loop", (8, 4), 64, "in/loop"),
    }  # fmt: skip
