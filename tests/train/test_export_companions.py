"""What transformers needs of a trained checkpoint's export: tokenizer, chat template, processor, and the image's id."""

import json
from pathlib import Path
from types import SimpleNamespace

import hf_tiny
import hf_tiny_qwen2_vl
import numpy as np
import pytest
from releases import one
from train_toys import others_long

from medcg_jax.cli import main
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families.weights.convert import load_checkpoint, read_config
from medcg_jax.train.checkpoint import load_params, save_params

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
SPECIAL = {
    "llava": ("<unk>", "<s>", "</s>", "<image>", "<pad>"),
    "qwen2_vl": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                 "<|video_pad|>"),
}  # fmt: skip


def fast_tokenizer(family: str, size: int):
    """transformers' own, of `size` ids, the special ones the last."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    names = SPECIAL[family]
    words = [*"abcdefghijklmnopqrstuvwxyzABCD:?\n ", *(f"w{i}" for i in range(size))][: size - len(names)]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.add_special_tokens(list(names))
    pad, eos = ("<pad>", "</s>") if family == "llava" else ("<|endoftext|>", "<|im_end|>")
    own = {"bos_token": "<s>", "unk_token": "<unk>"} if family == "llava" else {}
    image = "<image>" if family == "llava" else "<|image_pad|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, eos_token=eos, extra_special_tokens={"image_token": image}, **own
    )


def save_processor(family: str, tokenizer, folder: Path) -> None:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 21}, crop_size=21)
        LlavaProcessor(images, tokenizer, patch_size=7, chat_template=TEMPLATE).save_pretrained(folder)
        return
    # The whole processor of Qwen2-VL needs torchvision, for its videos.
    tokenizer.chat_template = TEMPLATE
    for part in (tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


def released(family: str, folder: Path):
    """A model of transformers with its processor, as `save_pretrained` writes them, ids by the tokenizer."""
    pytest.importorskip("torch")
    module = hf_tiny if family == "llava" else hf_tiny_qwen2_vl
    model = module.reference()
    text = getattr(model.config, "text_config", model.config)
    tokenizer = fast_tokenizer(family, text.vocab_size)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL[family]}
    if family == "llava":
        model.config.image_token_index, model.config.pad_token_id = ids["<image>"], ids["<pad>"]
        text.pad_token_id, text.bos_token_id, text.eos_token_id = ids["<pad>"], ids["<s>"], ids["</s>"]
    else:
        model.config.image_token_id, model.config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        model.config.vision_start_token_id = ids["<|vision_start|>"]
        model.config.vision_end_token_id = ids["<|vision_end|>"]
        text.pad_token_id, text.bos_token_id, text.eos_token_id = ids["<|endoftext|>"], None, ids["<|im_end|>"]
    model.save_pretrained(folder)
    save_processor(family, tokenizer, folder)
    return model, tokenizer


@pytest.mark.parametrize("family", others_long(SPECIAL))
def test_transformers_loads_what_was_trained(family, tmp_path, capsys):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    model, tokenizer = released(family, tmp_path / "hf")
    (tmp_path / "hf" / "additional_chat_templates").mkdir(exist_ok=True)
    (tmp_path / "hf" / "additional_chat_templates" / "tool.jinja").write_text("x")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    config = read_config(tmp_path / "start")
    _, params = load_checkpoint(tmp_path / "start", config, one())
    params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"] * 1.5
    beside = (load_tokenizer(tmp_path / "start").path, tmp_path / "start")
    save_params(tmp_path / "params", params, config, {}, beside=beside)
    load_params(tmp_path / "params", config, one())  # the digests hold of these files, too
    assert main(["convert", str(tmp_path / "params"), str(tmp_path / "out"), "--to=hf"]) == 0
    out = tmp_path / "out"
    if family == "llava":
        again = AutoProcessor.from_pretrained(out)
    else:
        loaded = AutoTokenizer.from_pretrained(out)
        images = AutoImageProcessor.from_pretrained(out)
        again = SimpleNamespace(
            tokenizer=loaded, image_processor=images, apply_chat_template=loaded.apply_chat_template
        )
    for path in (tmp_path / "hf").glob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "config.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    talk = [{"role": "user", "content": "what?"}]
    assert again.apply_chat_template(talk, tokenize=False) == "user: what?"
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert type(again.image_processor).__name__.startswith("CLIP" if family == "llava" else "Qwen2VL")
    assert (out / "additional_chat_templates" / "tool.jinja").is_file()
    theirs = AutoModelForImageTextToText.from_pretrained(out)
    image = "<image>" if family == "llava" else "<|image_pad|>"
    stated = json.loads((out / "config.json").read_text())
    stated = {stated[name] for name in ("image_token_id", "image_token_index") if name in stated}
    assert stated == {tokenizer.convert_tokens_to_ids(image)} == {theirs.config.image_token_id}
    before, after = (next(p for n, p in m.named_parameters() if n.endswith("language_model.norm.weight"))
                     for m in (model, theirs))  # fmt: skip
    np.testing.assert_allclose(after.detach().numpy(), 1.5 * before.detach().numpy(), rtol=1e-6)


def test_an_image_id_that_the_tokenizer_has_not_is_refused(tmp_path, capsys):
    released("llava", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    about = json.loads(file.read_text())
    name = "image_token_id" if "image_token_id" in about else "image_token_index"
    file.write_text(json.dumps(about | {name: 7}))
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to=hf"]) == 2
    line = capsys.readouterr().err.strip()
    assert f"{name} is 7, and 99 in the tokenizer" in line and "\n" not in line
    assert not (tmp_path / "out").exists()


def test_an_id_that_nothing_states_is_the_tokenizers(tmp_path, capsys):
    """Padding that config.json leaves out is not taken for another one: the export states the tokenizer's."""
    released("llava", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    about = json.loads(file.read_text())
    about.pop("pad_token_id", None)
    about["text_config"].pop("pad_token_id", None)
    file.write_text(json.dumps(about))
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "model.json").read_text())["pad_token_id"] == 100
