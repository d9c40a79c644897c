"""Files beside exported weights with which transformers reads images and conversations as the model was trained on them:
image processor, chat template, the tokenizer's settings, generation.

Of the three families that transformers has. Source: huggingface/transformers at 5.23.0: models/llava/, models/qwen2_vl/,
models/mllama/ (processing_*.py, image_processing_pil_*.py), processing_utils.py, tokenization_utils_base.py.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medcg_jax.data.records import DataError, Turn
from medcg_jax.data.tokenizer import FAMILIES, Tokenizer, load_tokenizer
from medcg_jax.families.llava import rows as llava
from medcg_jax.families.mllama import rows as mllama
from medcg_jax.families.qwen2_vl import rows as qwen2_vl
from medcg_jax.families.weights.files import has_tokenizer
from medcg_jax.untrusted import FileError, read_json

IMAGES, PROCESSOR, VIDEOS = "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
BICUBIC, BILINEAR = 3, 2
PROMPTS = {"llava": llava.PROMPTS, "qwen2_vl": qwen2_vl.PROMPTS, "mllama": mllama.PROMPTS}
# A message is a text, or a list of parts {"type": "image"} and {"type": "text", "text": ...}. Images stand before the
# text, in the first user's message; a message of the system, if there is one, comes first and replaces the training's.
MACROS = r"""
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro images_of(content, image) -%}
{%- if content is not string -%}{%- for part in content if part['type'] == 'image' -%}{{- image -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set system = SYSTEM -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = text_of(messages[0]['content']) -%}{%- set messages = messages[1:] -%}
{%- endif -%}"""
# Tokenizers of Llama's kind differ in what opens a text, and in the space behind a special token: START and BREAK.
VICUNA = r"""
{{- START -}}{{- system + ' ' if system else '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + images_of(message['content'], '<image>BREAK') + (text_of(message['content']) | trim) + ' ASSISTANT:' -}}
{%- else -%}{{- ' ' + text_of(message['content']) + eos_token -}}{%- endif -%}
{%- endfor -%}"""
CHATML = r"""
{%- if system -%}{{- '<|im_start|>system\n' + system + '<|im_end|>\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{{- images_of(message['content'], '<|vision_start|><|image_pad|><|vision_end|>') + text_of(message['content']) -}}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
LLAMA3 = r"""
{%- macro header(role) -%}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' -}}{%- endmacro -%}
{{- bos_token -}}
{%- if system -%}{{- header('system') + (system | trim) + '<|eot_id|>' -}}{%- endif -%}
{%- for message in messages -%}
{{- header(message['role']) + images_of(message['content'], '<|image|>') + (text_of(message['content']) | trim) -}}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}"""


VICUNAS = tuple(
    VICUNA.replace("START", start).replace("BREAK", line_break)
    for start, line_break in itertools.product(("''", "bos_token"), (r"\n", r" \n"))
)
# A question whose words every tokenizer has, also a toy's.
SAMPLE = "A\nB: A"


def write_processor(folder: Path, config, system_prompt: str | None) -> tuple[str, ...]:
    """Writes into `folder`, which may hold the files of the checkpoint that was started from, what is missing there;
    returns what a user must know of it, for the card.

    system_prompt: `data.system_prompt` of the training. The files that say how images and conversations are read are then
    those of the training, in place of the start checkpoint's. None: the weights were not trained here.
    """
    write_json(folder / GENERATION, generation(config), replace=False)
    if config.family not in FILES or not has_tokenizer(folder):
        return ()
    try:
        tokenizer = load_tokenizer(folder)
    except DataError:  # it is carried as it is, and no prompt can be compared
        return ()
    notes: tuple[str, ...] = ()
    files, choices, system_of = FILES[config.family]
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, tokenizer_settings(folder, tokenizer, config))
    is_trained = system_prompt is not None
    if is_trained or not any((folder / name).exists() for name in (IMAGES, PROCESSOR)):
        for name, content in files(config).items():
            write_json(folder / name, content)
    templates = [folder / name for name in (TEMPLATE, OLD_TEMPLATE)]
    if is_trained or not any(path.exists() for path in templates) and not has_template(folder / SETTINGS):
        system = json.dumps(system_of(system_prompt or ""))
        written = [(MACROS + template).strip().replace("SYSTEM", system, 1) + "\n" for template in choices]
        alike = [text for text in written if reads_alike(folder, text, tokenizer, config.family, system_prompt or "")]
        if is_trained and not alike:
            notes = (
                "transformers' tokenizer cuts prompts into other tokens than were trained: its answers may differ",
            )
            print(*notes)
        if is_trained or alike:
            # Read before the other one.
            templates[1].unlink(missing_ok=True)
            templates[0].write_text([*alike, *written][0], encoding="utf-8")
    return notes


def reads_alike(folder: Path, template: str, tokenizer: Tokenizer, family: str, system_prompt: str) -> bool:
    """Whether transformers' tokenizer gives a prompt the ids that it has here. tokenizer: ours, of the same `folder`."""
    from transformers import AutoTokenizer

    prompts = PROMPTS[family]
    try:
        ours = prompts.evaluation_prompt(
            tokenizer, (Turn(SAMPLE, "A"),), system_prompt=system_prompt, num_image_tokens=1
        )
        theirs: Any = AutoTokenizer.from_pretrained(folder)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SAMPLE}]}
        text = theirs.apply_chat_template([message], chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception:  # of a tokenizer that only one of the two reads, or of its files
        return False
    # As transformers' processors do.
    has_start = theirs.bos_token is not None and text.startswith(theirs.bos_token)
    return theirs(text, add_special_tokens=not has_start)["input_ids"] == ours


def has_template(settings: Path) -> bool:
    """Whether a tokenizer_config.json has a chat template, as of versions before there was a file for it."""
    try:
        return "chat_template" in read_json(settings)
    except FileError:
        return False


def write_json(path: Path, content: dict, *, replace: bool = True) -> None:
    if replace or not path.exists():
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def generation(config) -> dict:
    """generation_config.json: greedy, as answers are generated here."""
    ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    return {"do_sample": False, **{name: number for name, number in ids.items() if number >= 0}}


def tokenizer_settings(folder: Path, tokenizer: Tokenizer, config) -> dict:
    """tokenizer_config.json for a tokenizer that came without one."""
    names = {tokenizer.known(name): name for family in FAMILIES for name in family if tokenizer.known(name) is not None}
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    settings: dict[str, Any] = {key: names[number] for key, number in roles.items() if number in names}
    settings |= {"model_max_length": config.text.max_positions, "clean_up_tokenization_spaces": False}
    if (folder / "tokenizer.json").exists():
        return {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    # A SentencePiece model has no token for images.
    added = {"content": "<image>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    more = {} if tokenizer.known("<image>") is not None else {str(tokenizer.image_id): added | {"single_word": False}}
    return {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": more, **settings}


def of_images(kind: str, config, resample: int, **fields: Any) -> dict:
    """preprocessor_config.json of an image processor."""
    vision = config.vision
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        **fields,
    }


def llava_files(config) -> dict[str, dict]:
    size, vision = config.image_size_px, config.vision
    square = {"height": size, "width": size}
    crop = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    strategy = "full" if vision.keep_class_token else "default"
    return {
        # Padded to a square, as here and in the original LLaVA; llava-hf's releases crop instead.
        IMAGES: of_images("Llava", config, BICUBIC, do_pad=True, **crop),
        PROCESSOR: {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision.patch_size_px,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": strategy,
        },
    }


def qwen2_vl_files(config) -> dict[str, dict]:
    vision = config.vision
    fields = {
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        "patch_size": vision.patch_size_px,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.num_frames,
    }
    images = of_images("Qwen2VL", config, BICUBIC, **fields)
    videos = {key: value for key, value in images.items() if key != "image_processor_type"}
    return {
        IMAGES: images,
        PROCESSOR: {"processor_class": "Qwen2VLProcessor"},
        VIDEOS: {"video_processor_type": "Qwen2VLVideoProcessor", **videos},
    }


def mllama_files(config) -> dict[str, dict]:
    size = config.image_size_px
    fields = {"size": {"height": size, "width": size}, "do_pad": True, "max_image_tiles": mllama.NUM_TILES}
    return {IMAGES: of_images("Mllama", config, BILINEAR, **fields), PROCESSOR: {"processor_class": "MllamaProcessor"}}


# Family -> (the processor's files, chat templates to choose from, `data.system_prompt` -> the sentence in the prompt).
FILES: dict[str, tuple[Callable, tuple[str, ...], Callable[[str], str]]] = {
    "llava": (llava_files, VICUNAS, lambda prompt: llava.PROMPTS.opening(prompt).removesuffix("USER: ").rstrip(" ")),
    "qwen2_vl": (qwen2_vl_files, (CHATML,), lambda prompt: qwen2_vl.QWEN2 if prompt == "qwen2" else prompt),
    "mllama": (mllama_files, (LLAMA3,), str),
}
