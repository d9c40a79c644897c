"""Every family's PyTorch side of `medcg bench` does the work of the port: with the same weights it has the same loss."""

import re

import jax
import numpy as np
import pytest

from medcg_jax.bench import run as bench
from medcg_jax.bench import stages
from medcg_jax.bench.rows import open_rows, question_rows, training_batch
from medcg_jax.bench.steps import Port, example_batch
from medcg_jax.config import ConfigError, DataConfig, EvalConfig, ModelConfig, RunConfig, RunError, TrainConfig, replace
from medcg_jax.families import build, registry
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.parity.weights import tensors_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from medcg_jax.bench import pytorch, pytorch_families  # noqa: E402

RUN = RunConfig(
    name="tiny",
    model=ModelConfig(scan_unroll=1),
    data=DataConfig(
        system_prompt="", max_text_tokens=40, max_target_tokens=4, train_records_per_subset=8, test_records_per_subset=8,
        subsets=("ct-brain-state", "mri-brain-grade"),
    ),
    train=TrainConfig(steps=4, batch_size=8),
    base=TrainConfig(steps=0, epochs=0),
    eval=EvalConfig(batch_size=8, max_new_tokens=2),
)  # fmt: skip
# Model of each family -> what its run has beside `RUN`.
MODELS = {
    "llava15_tiny": {},
    "qwen2_vl_tiny": {},
    "llama32_vision_tiny": {},
    "minigpt_v2_tiny": {"model__trainable": ("projector", "lora")},
    "next_chat_tiny": {
        "model__trainable": ("projector", "decoder", "boxes"), "data__max_target_tokens": 20,
        "data__subsets": ("ct-brain-det", "ct-brain-state"),
    },
}  # fmt: skip
# Parts of the names in our MiniGPT-v2 of transformers' parts -> of the original's.
MINIGPT = {
    r"^vision\.embeddings\.class_embedding": "visual_encoder.cls_token",
    r"^vision\.embeddings\.position_embedding": "visual_encoder.pos_embed",
    r"^vision\.embeddings\.patch_embedding": "visual_encoder.patch_embed.proj",
    r"^vision\.encoder\.layers\.(\d+)\.self_attn\.projection": r"visual_encoder.blocks.\1.attn.proj",
    r"^vision\.encoder\.layers\.(\d+)\.self_attn": r"visual_encoder.blocks.\1.attn",
    r"^vision\.encoder\.layers\.(\d+)\.layer_norm": r"visual_encoder.blocks.\1.norm",
    r"^vision\.encoder\.layers": "visual_encoder.blocks",
    r"^vision\.post_layernorm": "ln_vision",
    r"^language_model\.": "llama_model.",
    r"^projector\.": "llama_proj.",
}


def run_of(model: str) -> RunConfig:
    return replace(RUN, model__name=model, **MODELS.get(model, {}))


def put(config, params, model) -> None:
    """Gives the PyTorch model the port's weights."""
    tensors, canonical = tensors_of(config, params), registry.of(config).weight_map.canonical
    if config.family == "minigpt_v2":
        fused = {name: value for name, value in tensors.items() if name.endswith(".q_bias")}
        for name, q in fused.items():
            v = tensors[name.replace("q_bias", "v_bias")]
            tensors[name.replace("q_bias", "qkv.bias")] = np.concatenate([q, np.zeros_like(q), v])
    for name, weight in model.named_parameters():
        if config.family == "minigpt_v2":
            for theirs, original in MINIGPT.items():
                name = re.sub(theirs, original, name)
        value = np.array(tensors[canonical(name)], np.float32)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(value).reshape(weight.shape))


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


def both(model: str, **changes):
    """(run, setup, batch, port's params with noise on all, the PyTorch reference with the same weights)."""
    run = replace(run_of(model), **changes)
    rows = open_rows(run)
    setup, batch = rows.setup, training_batch(rows)
    graphdef, params = build.create(setup.model, setup.mesh, seed=0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.05 * rng.standard_normal(w.shape).astype(np.float32), params)
    reference = pytorch.Reference(setup.model, batch, run.train, run.model)
    put(setup.model, params, reference.model)
    return run, setup, batch, (graphdef, params), reference


def port_loss(setup, model, batch) -> float:
    from flax import nnx

    with jax.set_mesh(setup.mesh):
        total, weight = jax.jit(lambda params: setup.loss(nnx.merge(model[0], params), batch))(model[1])
    return float(total / weight)


def torch_loss(reference) -> float:
    with torch.no_grad():
        return float(np.mean([reference.model(**piece).loss.item() for piece in reference.pieces]))


def test_every_family_has_a_side():
    assert set(pytorch_families.SIDES) == set(bench.COMPARED) == set(registry.FAMILIES)


@pytest.mark.parametrize("model", MODELS)
def test_with_the_same_weights_both_sides_have_the_same_loss(model):
    """So masks, image features, positions, labels and the terms of the loss are alike; an image or label that one side
    gets otherwise shows."""
    run, setup, batch, weights, reference = both(model)
    port = Port(setup.model, setup.mesh, run.train, run.model, loss_fn=setup.loss)
    counted = reference.work()
    assert stages.work_of(port, batch) == counted and counted["image_tokens"] > 0 and counted["pixels"] > 0
    assert (counted["boxes"] > 0) == (setup.model.family == "next_chat")
    ours, theirs = port_loss(setup, weights, batch), torch_loss(reference)
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert port_loss(setup, weights, batch | {"pixels": batch["pixels"][::-1]}) != pytest.approx(theirs, rel=2e-5)
    frozen = [weight for weight in reference.model.parameters() if not weight.requires_grad]
    reference.seconds(1)
    assert all(weight.grad is None for weight in frozen) and all(
        weight.grad is not None for weight in reference.weights
    )


@pytest.mark.parametrize(
    ("model", "trainable", "within"),
    [
        ("qwen2_vl_tiny", ("projector", "decoder"), 1e-9),
        ("qwen2_vl_tiny", ("decoder",), 1e-9),
        ("qwen2_vl_tiny", ("projector",), 1e-9),
        ("llama32_vision_tiny", ("projector", "decoder"), 5e-4),
        ("minigpt_v2_tiny", ("projector", "lora"), 1e-9),
        ("minigpt_v2_tiny", ("projector",), 1e-9),
        # No gradient of the images' keys and values, or of the first layer's input.
        ("llama32_vision_tiny", ("decoder",), 0.02),
        ("minigpt_v2_tiny", ("lora",), 0.02),
    ],
)
def test_formulas_count_what_pytorch_counts(model, trainable, within, monkeypatch):
    """Training steps and forward passes, on the batch that is measured. LLaVA's are in test_bench.py."""
    from torch.utils.flop_counter import FlopCounterMode

    # PyTorch's counter sees products, and no fused kernel for CPUs.
    real = pytorch.new_model
    monkeypatch.setattr(pytorch, "new_model", lambda config, dtype, attention: real(config, dtype, "eager"))
    run = replace(run_of(model), model__trainable=trainable)
    rows = open_rows(run)
    config = rows.setup.model
    reference = pytorch.Reference(config, training_batch(rows), run.train, run.model)
    with FlopCounterMode(display=False) as counter:
        reference.seconds(1)
    executed = pytorch_families.executed(config, 8, reference.length, trainable)
    assert counter.get_total_flops() == pytest.approx(executed, rel=within)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.model(**reference.pieces[0])
    assert counter.get_total_flops() == pytest.approx(
        pytorch_families.executed(config, 8, reference.length), rel=within
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_letters_are_the_same_questions(model):
    """With the same weights, rows padded at either side have the port's most likely first token."""
    run = run_of(model)
    rows = open_rows(run)
    setup = rows.setup
    encoded = question_rows(rows)
    questions = encoded.rows(np.arange(8))[0]
    graphdef, params = build.create(setup.model, setup.mesh, seed=0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.05 * rng.standard_normal(w.shape).astype(np.float32), params)
    reference = pytorch.Answers(setup.model, questions, run.model, num_new=1)
    put(setup.model, params, reference.model)
    assert stages.asked_of(setup.model, questions) == reference.work()
    reference.forward(1)
    answered = answers_of(setup, graphdef, params, questions)
    np.testing.assert_allclose(reference.logprobs, answered["option_logprobs"], atol=2e-4)
    if not pytorch_families.side_of(setup.model).no_generation:
        reference.generate(1)
        assert reference.generated[:, 0].tolist() == answered["first"].tolist()


def answers_of(setup, graphdef, params, questions) -> dict[str, np.ndarray]:
    """The port's log-probabilities of the letters, and its most likely first token."""
    from flax import nnx

    def answer(params):
        model = nnx.merge(graphdef, params)
        images = {key: questions[key] for key in model.image_keys}
        last = questions["last_position"][:, None]
        hidden, _ = model.hidden(questions["tokens"], images, segment_ids=questions["segment_ids"], at=last)
        logits = model.logits(hidden)[:, 0]
        logprobs = jax.nn.log_softmax(logits)
        options = np.maximum(questions["option_ids"], 0)
        return {"option_logprobs": jax.numpy.take_along_axis(logprobs, options, 1), "first": logits.argmax(-1)}

    with jax.set_mesh(setup.mesh):
        return jax.device_get(jax.jit(answer)(params))


def test_what_is_not_compared_is_one_line():
    masks = replace(run_of("next_chat_tiny_sam"), model__trainable=("mask_prompt", "mask_decoder"))
    with pytest.raises(ConfigError, match="model.trainable=mask_decoder,mask_prompt: expected some of boxes, decoder"):
        config = open_rows(masks).setup.model
        pytorch_families.side_of(config).trained(torch.nn.Linear(1, 1), config, masks.model.trainable)
    with pytest.raises(ConfigError, match="base_dtype=nf4: .* expected float32"):
        bench.check(replace(RUN, model__lora_rank=4, model__base_dtype="nf4"), ("train",), "torch")
    assert "cannot feed a decoded box" in pytorch_families.SIDES["next_chat"].no_generation


def test_adapters_are_trained_on_both_sides():
    run = replace(run_of("llava15_tiny"), model__lora_rank=4, model__trainable=("projector", "lora"))
    rows = open_rows(run)
    setup, batch = rows.setup, training_batch(rows)
    reference = pytorch.Reference(setup.model, batch, run.train, run.model)
    port = Port(setup.model, setup.mesh, run.train, run.model, loss_fn=setup.loss)
    assert stages.work_of(port, batch) == reference.work()


def test_microbatches_are_the_batch():
    run, setup, batch, weights, reference = both("qwen2_vl_tiny", train__batch_size=16, train__accumulation_steps=2)
    assert len(reference.pieces) == 2
    assert port_loss(setup, weights, batch) == pytest.approx(torch_loss(reference), rel=2e-5)
    reference.pieces[1]["labels"][:] = -100
    with pytest.raises(RunError, match="targets 32 against 16"):
        port = Port(setup.model, setup.mesh, run.train, run.model, loss_fn=setup.loss)
        stages.check_alike(stages.work_of(port, batch), reference.work())


def test_an_image_token_behind_the_table_has_a_row_in_pytorch():
    """LLaVA-1.5-7B's has the id 32000 of 32000 rows, which transformers cannot look up."""
    config = llava15_tiny(vocab_size=64, image_token_id=64)
    batch = example_batch(config, batch_size=2, text_tokens=(8, 12), num_targets=2)
    reference = pytorch.Reference(config, batch, RUN.train, RUN.model)
    counted = reference.work()
    reference.seconds(1)
    assert counted["image_tokens"] == 2 * config.num_image_tokens
    assert counted == counted | stages.asked_of(config, batch)
