"""Adapters against peft on the tiny LLaVA: logits, loss, gradients, AdamW, both exports; and faults it must see."""

import dataclasses
import json

import hf_tiny
import jax
import numpy as np
import pytest
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.weights import engine, llava, peft
from medcg_jax.families.weights.convert import convert, export, load_checkpoint, open_leaves, read_config, save_params
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.lora import TARGETS, LoraConfig
from medcg_jax.parity import llava as parity_llava
from medcg_jax.parity import verb as parity

TOLERANCE = 1e-4
TRAINED = ("projector", "lora")
LORA = LoraConfig(rank=4, alpha=7.0, targets=TARGETS)


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    return hf_tiny.reference()


def with_adapters(config, params, seed=0):
    """(config, graphdef, params) with random adapters, none of them zero."""
    config = dataclasses.replace(config, lora=LORA)
    graphdef, shapes = build.abstract(config)
    rng = np.random.default_rng(seed)

    def draw(x):
        return jax.numpy.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)

    lora = jax.tree.map(draw, shapes.raw_mapping["lora"])
    return config, graphdef, build.join(params, nnx.State({"lora": lora}))


@pytest.fixture(scope="module")
def ours(reference):
    config, _, params = hf_tiny.port(reference)
    return with_adapters(config, params)


@pytest.fixture(scope="module")
def peft_dir(ours, tmp_path_factory):
    directory = tmp_path_factory.mktemp("peft")
    config, _, params = ours
    assert peft.export_peft(llava, params, config, directory) == 3 * len(TARGETS) * 2 + 4
    return directory


def opened(directory):
    """A fresh HF model with peft's adapters of the directory, all of them and the projector trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(hf_tiny.reference(), directory, is_trainable=True).eval()


def torch_inputs():
    import torch

    return {name: torch.from_numpy(value) for name, value in hf_tiny.inputs().items()}


def logits(config, graphdef, params):
    given = parity_llava.port_inputs(config, hf_tiny.inputs())
    return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(**given))(params))


def difference(found, model) -> float:
    """Of logits at real tokens, over the largest."""
    import torch

    with torch.no_grad():
        theirs = model(**torch_inputs()).logits.numpy()
    real = hf_tiny.inputs()["attention_mask"] != 0
    return float(np.abs(found - theirs)[real].max() / np.abs(theirs[real]).max())


def test_logits_loss_gradients_and_five_adamw_steps_are_peft_s(ours, peft_dir):
    import torch

    config, graphdef, params = ours
    model = opened(peft_dir)
    assert difference(logits(*ours), model) < TOLERANCE
    # Adapters matter here: without them logits are others.
    assert difference(logits(*ours), hf_tiny.reference()) > 100 * TOLERANCE
    differentiate = parity.value_and_grad(graphdef, hf_tiny.inputs())
    value, grads = differentiate(*build.split_trainable(params, TRAINED))
    loss = model(**torch_inputs()).loss
    assert abs(float(value) - loss.item()) < TOLERANCE
    loss.backward()
    _, stream = engine.store(peft.peft_entries(llava, config, grads), dict(grads.raw_mapping))

    def stem(name):
        return name.replace(".default", "").replace(".modules_to_save", "")

    trained = {stem(name): p for name, p in model.named_parameters() if p.requires_grad}
    found = dict(stream)
    assert set(found) == set(trained) and len(found) == 3 * len(TARGETS) * 2 + 4
    for name, p in trained.items():
        expected = p.grad.numpy()
        assert np.abs(found[name] - expected).max() < TOLERANCE * np.abs(expected).max(), name
    trainable, frozen = build.split_trainable(params, TRAINED)
    state, update = parity.adamw(trainable, learning_rate=1e-3, eps=1e-6)
    mine = []
    for _ in range(5):
        value, grads = differentiate(trainable, frozen)
        trainable, state = update(trainable, state, grads)
        mine.append(float(value))
    optimizer, theirs = torch.optim.AdamW(trained.values(), lr=1e-3, eps=1e-6, weight_decay=0.0), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**torch_inputs()).loss
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert np.abs(np.array(mine) - np.array(theirs)).max() < TOLERANCE and theirs[-1] < theirs[0] - 0.1


def test_merged_they_are_the_weights_of_plain_transformers(ours, peft_dir, tmp_path):
    from transformers import LlavaForConditionalGeneration

    config, _, params = ours
    save_params(tmp_path / "params", params, config)
    result = convert(tmp_path / "params", tmp_path / "hf", to="hf")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", attn_implementation="eager").float().eval()
    assert result["tensors"] == len([name for name, _ in hf_tiny.reference().named_parameters()])
    assert difference(logits(*ours), merged) < TOLERANCE
    theirs = opened(peft_dir).merge_and_unload()
    for (name, p), q in zip(merged.named_parameters(), theirs.parameters(), strict=True):
        assert np.abs(p.detach().numpy() - q.detach().numpy()).max() < TOLERANCE, name
    # The params of the caller are as before.
    assert config.lora and not isinstance(params["decoder"]["blocks"]["q"]["kernel"], engine.Leaf)


def scaled(config, params):
    return dataclasses.replace(config, lora=dataclasses.replace(LORA, alpha=float(LORA.rank))), params


def exchanged(config, params):
    """gate's adapters on up, and up's on gate."""
    lora = dict(params["lora"])
    return config, nnx.State({**params.raw_mapping, "lora": lora | {"gate": lora["up"], "up": lora["gate"]}})


def unused(config, params):
    """The output projection's adapters left out."""
    kept = tuple(name for name in TARGETS if name != "out")
    config = dataclasses.replace(config, lora=dataclasses.replace(LORA, targets=kept))
    lora = {name: part for name, part in dict(params["lora"]).items() if name in kept}
    return config, nnx.State({**params.raw_mapping, "lora": lora})


def turned(config, params):
    """k's halves of the wrong rank axis: B's rows in another order."""
    lora = dict(params["lora"])
    k = dict(lora["k"])
    return config, nnx.State({**params.raw_mapping, "lora": lora | {"k": k | {"b": k["b"][:, ::-1]}}})


@pytest.mark.parametrize("fault", [scaled, pytest.param(exchanged, marks=pytest.mark.long), unused, turned])
def test_faults_are_seen_in_logits_and_in_merged_weights(ours, peft_dir, tmp_path, fault):
    from transformers import LlavaForConditionalGeneration

    config, _, params = ours
    config, params = fault(config, params)
    model = opened(peft_dir)
    assert difference(logits(config, build.abstract(config)[0], params), model) > 10 * TOLERANCE
    export(params, config, tmp_path / "hf")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", attn_implementation="eager").float().eval()
    assert difference(logits(*ours), merged) > 10 * TOLERANCE


def test_what_was_trained_alone_is_laid_over_its_base(ours, reference, tmp_path):
    """As `medcg train` leaves it: both exports, loading, and a base that has moved."""
    config, _, params = ours
    reference.save_pretrained(tmp_path / "base")
    trained, _ = build.split_trainable(params, TRAINED)
    save_params(tmp_path / "params", trained, config, trained_on=str(tmp_path / "base"))
    assert sorted(path.name for path in (tmp_path / "params").iterdir()) == ["model.json", "params"]
    assert read_config(tmp_path / "params") == config
    _, found = load_checkpoint(tmp_path / "params", config, make_mesh(devices=jax.devices()[:1]))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, params))
    about = convert(tmp_path / "params", tmp_path / "peft", to="peft")
    assert about["tensors"] == 3 * len(TARGETS) * 2 + 4
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base") and settings["r"] == 4
    assert difference(logits(*ours), opened(tmp_path / "peft")) < TOLERANCE
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match="was trained on, does not exist; pass --base=DIR"):
        open_leaves(tmp_path / "params")
    leaves = open_leaves(tmp_path / "params", parts={"base": tmp_path / "moved"})
    assert np.array_equal(np.asarray(leaves["lora"]["q"]["a"]), np.asarray(params["lora"]["q"]["a"]))
    assert set(leaves) == set(params)


def test_without_adapters_there_is_nothing_to_write_for_peft(ours, reference, tmp_path):
    reference.save_pretrained(tmp_path / "plain")
    with pytest.raises(WeightsError, match="there are no adapters here"):
        convert(tmp_path / "plain", tmp_path / "peft", to="peft")
    config, _, params = ours
    trained, _ = build.split_trainable(params, ("lora", "vision"))
    save_params(tmp_path / "params", trained, config, trained_on=str(tmp_path / "plain"))
    with pytest.raises(WeightsError, match="holds vision, too; to='peft' takes adapters and a projector"):
        convert(tmp_path / "params", tmp_path / "peft2", to="peft")
