"""Models of any size: the architecture is the one that the checkpoint states, and what cannot be computed is said."""

import dataclasses
import json
from pathlib import Path

import pytest
from releases import CONFIGS, random_params

from medcg_jax.cli import main
from medcg_jax.config import AUTO, MODELS, ConfigError, ModelConfig, RunConfig, has_any_size, model_title, replace
from medcg_jax.config_checks import check
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.families import build, registry
from medcg_jax.families.weights.convert import export, module_of, read_config
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.plan.programs import architecture_of
from medcg_jax.train.run import train
from medcg_jax.train.setup import model_config, open_setup
from medcg_jax.train.start import check_colours, with_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
PHANTOM = f"--config={ROOT / 'configs' / 'phantom.py'}:tiny"
# LLaVA-Med 1.5's config.json, in small.
LLAVA_MED = {
    "architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat", "image_aspect_ratio": "pad",
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "sliding_window": None, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def state(config, folder: Path) -> str:
    """A folder with the config.json of `config`, and no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(module_of(config).config_to_json(config, "float32")))
    return str(folder)


def wider(family: str):
    """A family's tiny model with the ids of its packaged tokenizer and other widths, which no size has."""
    name = registry.family(family).tiny[0]
    config = model_config(ModelConfig(name), load_tokenizer("", registry.family(family).tokenizer))
    ids = {}
    if family == "next_chat":  # its config.json gives the ids of its tokens by its number of rows alone
        last = len(json.loads(SMALL.with_stem("next_chat").read_text())["model"]["vocab"]) - 1
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=last + 1))
        ids = {"image_token_id": last - 4, "at_token_id": last - 1, "box_token_id": last}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, mlp_dim=144), **ids)


def tokenizer_of(family: str) -> str:
    """The packaged tokenizer; of NExT-Chat with its five tokens behind all others, as in the release."""
    text = SMALL.with_stem(registry.family(family).tokenizer).read_text()
    if family != "next_chat":
        return text
    about = json.loads(text)
    pieces = about["model"]["vocab"]  # an id is a place in this list
    order = [*range(3), *range(8, len(pieces)), *range(3, 8)]
    about["model"]["vocab"] = [pieces[i] for i in order]
    about["added_tokens"] = [token | {"id": order.index(token["id"])} for token in about["added_tokens"]]
    return json.dumps(about)


def release(family: str, folder: Path) -> str:
    """A release of `wider`, whole, with its tokenizer."""
    config = wider(family)
    export(random_params(config), config, folder)
    (folder / "tokenizer.json").write_text(tokenizer_of(family))
    return str(folder)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_architecture_is_the_checkpoint_s_and_the_options_are_the_run_s(family, tmp_path):
    checkpoint = state(CONFIGS[family], tmp_path / "small")
    stated = read_config(tmp_path / "small")
    model = ModelConfig(family, checkpoint=checkpoint, compute_dtype="bfloat16", remat="full")
    built = build.architecture(model, pad_token_id=7)
    assert built == dataclasses.replace(stated, compute_dtype="bfloat16", remat="full", pad_token_id=7)
    assert built.text.num_layers == CONFIGS[family].text.num_layers == 2
    # MiniGPT-v2's adapters are its checkpoints'; others are the run's.
    assert (built.lora is None) == (family != "minigpt_v2")
    adapted = build.architecture(dataclasses.replace(model, lora_rank=3, trainable=("lora",), base_dtype="int8"))
    assert (adapted.lora.rank, adapted.base.dtype) == (3, "int8")
    assert architecture_of(model).text == stated.text


@pytest.mark.parametrize("family", CONFIGS)
def test_auto_is_the_checkpoint_s_family(family, tmp_path):
    checkpoint = state(CONFIGS[family], tmp_path / "small")
    run = replace(RunConfig(), model__name=AUTO, model__checkpoint=checkpoint)
    check(run)
    assert with_checkpoint(run).model == dataclasses.replace(run.model, name=family)
    assert with_checkpoint(with_checkpoint(run)) == with_checkpoint(run)


def test_what_a_family_does_not_take_is_refused_once_it_is_known(tmp_path):
    checkpoint = state(CONFIGS["llava"], tmp_path / "small")
    run = replace(RunConfig(), model__name=AUTO, model__checkpoint=checkpoint, model__min_pixels=784)
    check(run)
    with pytest.raises(ConfigError, match="only Qwen2-VL has this option"):
        with_checkpoint(run)
    run = replace(run, model__min_pixels=0, model__trainable=("boxes",))
    with pytest.raises(ConfigError, match="model.trainable='boxes'"):
        with_checkpoint(run)


def test_a_family_without_a_checkpoint_has_no_size():
    for name in (AUTO, "llava"):
        with pytest.raises(ConfigError, match="model.checkpoint='': expected the folder.*llava15_7b") as refused:
            check(replace(RunConfig(), model__name=name))
        assert "\n" not in str(refused.value)
    assert {name for name in MODELS if has_any_size(name)} == {*CONFIGS}
    assert (
        model_title("llava", "llava-hf/med@abc") == "llava (med)" and model_title("llava15_7b", "x/y") == "llava15_7b"
    )


def test_a_checkpoint_of_another_family_is_named_before_its_tokenizer_is_read(tmp_path):
    checkpoint = state(CONFIGS["llava"], tmp_path / "small")
    message = f"model.checkpoint={checkpoint} is a llava checkpoint, and model.name=qwen2_vl.* is of qwen2_vl"
    for name in ("qwen2_vl_tiny", "qwen2_vl_7b", "qwen2_vl"):
        with pytest.raises(ConfigError, match=message):
            open_setup(replace(RunConfig(), model__name=name, model__checkpoint=checkpoint))


def test_another_architecture_is_named_before_the_disk_is_looked_at(tmp_path, monkeypatch):
    checkpoint = state(wider("llava"), tmp_path / "small")
    monkeypatch.setattr("medcg_jax.train.run.check_disk", lambda *_: pytest.fail("the disk was looked at"))
    run = replace(RunConfig(), model__name="llava15_tiny", model__checkpoint=checkpoint, data__system_prompt="")
    message = r"another architecture: text.mlp_dim 144 \(expected 128\); --config.model.name=auto takes"
    with pytest.raises(ConfigError, match=message):
        train(run, tmp_path / "run")


def test_colours_that_the_tower_does_not_take_are_refused(tmp_path):
    config = wider("llava")
    for file, about in (("preprocessor_config.json", {}), ("processor_config.json", {"image_processor": {}})):
        folder = tmp_path / file
        folder.mkdir()
        inner = about.get("image_processor", about)
        inner |= {"image_mean": [0.48145466, 0.4578, 0.4082], "image_std": [0.26862954, 0.26130258, 0.27577711]}
        (folder / file).write_text(json.dumps(about))
        check_colours(folder, config)
        inner["image_mean"] = [0.5, 0.5, 0.5]
        (folder / file).write_text(json.dumps(about))
        with pytest.raises(ConfigError, match=r"image_mean is \[0.5, 0.5, 0.5\], and this port scales by \[0.48145466"):
            check_colours(folder, config)


def test_llava_med_s_mistral_is_a_llama_where_it_has_no_window(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAVA_MED))
    text = read_config(tmp_path).text
    assert (text.embed_dim, text.num_kv_heads, text.mlp_dim, text.rope_theta) == (48, 2, 80, 1e6)
    for window, shown in ((4096, "4096"), (..., "4096")):  # without the field it is Mistral's default
        about = {key: value for key, value in LLAVA_MED.items() if key != "sliding_window" or window is not ...}
        (tmp_path / "config.json").write_text(
            json.dumps(about if window is ... else about | {"sliding_window": window})
        )
        with pytest.raises(WeightsError, match=f"sliding_window={shown}; expected null"):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llava", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config=.*not quantised"),
        ("llava", {"text_config": {"hidden_act": "swish2"}}, "text_config.hidden_act='swish2'; expected"),
        ("llava", {"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type='siglip"),
        ("qwen2_vl", {"use_sliding_window": True}, "use_sliding_window=True; expected attention to all"),
        ("mllama", {"vision_config": {"max_num_tiles": 9}}, "vision_config.max_num_tiles=9; expected 4"),
        ("minigpt_v2", {"model_type": "minigpt_v3"}, "model_type='minigpt_v3'; accepted"),
        ("next_chat", {"mm_depth": 3}, "mm_depth=3; expected 2"),
    ],
)
def test_what_this_port_does_not_compute_is_said_in_one_line(family, change, message, tmp_path):
    state(CONFIGS[family], tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    about = json.loads(file.read_text())
    for key, value in change.items():
        about[key] = {**about.get(key, {}), **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=message) as refused:
        with_checkpoint(replace(RunConfig(), model__name=AUTO, model__checkpoint=str(tmp_path / "small")))
    assert "\n" not in str(refused.value)


@pytest.mark.long
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_of_no_named_size_is_trained_evaluated_and_planned(family, tmp_path, capfd):
    checkpoint, workdir = release(family, tmp_path / "release"), f"--workdir={tmp_path / 'run'}"
    flags = [
        PHANTOM, f"--config.model.name={AUTO}", f"--config.model.checkpoint={checkpoint}", "--config.train.batch_size=8",
        "--config.eval.batch_size=8", "--config.data.subsets=ct-brain-state", "--config.data.max_text_tokens=64",
        "--config.data.max_target_tokens=8",
    ]  # fmt: skip
    if family == "qwen2_vl":  # config.json does not state them, and the default is for patches of 14 pixels
        flags += ["--config.model.min_pixels=256", "--config.model.max_pixels=2304"]
    assert main(["train", *flags, workdir]) == 0, capfd.readouterr().err
    assert main(["eval", *flags, workdir]) == 0, capfd.readouterr().err
    assert "of 8 right" in capfd.readouterr().out
    (tmp_path / "release" / "model.safetensors").unlink()
    assert main(["plan", *flags, "--topology=local", "--memory_gib=4", "--alone"]) == 0, capfd.readouterr().err
    assert f"{family} (release) on local" in capfd.readouterr().out
