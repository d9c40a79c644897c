"""A tiny model with sharp answers, its tokenizer, and phantom-like records, for tests of evaluation."""

import jax
import numpy as np
import pytest
from row_formats import llava

from medcg_jax.config import DataConfig, MeshConfig
from medcg_jax.data.encoding import encode_eval
from medcg_jax.data.records import Record, RecordSet, Turn
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.eval.letters import make_evaluator
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import make_mesh

TOKENIZER = load_tokenizer("")
EOS = TOKENIZER.eos_id
# Rows that the mesh's tensor axis divides.
CONFIG = llava15_tiny(
    -(-TOKENIZER.vocab_size // 64) * 64, TOKENIZER.image_id, pad_token_id=TOKENIZER.pad_id, eos_token_id=EOS,
    image_size_px=16, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2, mlp_dim=32, scan_unroll=1,
)  # fmt: skip


def others_long(names) -> list:
    """Parameters of a test: the first name in every run, the others where long tests are run."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.long) for name in others)]


def records(count: int = 21) -> RecordSet:
    """Questions with two or four options, so prompts of different lengths, and random images."""
    made = []
    for i in range(count):
        options = (("normal", "abnormal"), ("mild", "severe", "minimal", "moderate"))[i % 2]
        listed = "\n".join(f"{letter}: {text}" for letter, text in zip("ABCD", options, strict=False))
        turn = Turn(f"Grade?\n{listed}" if i % 3 else f"Is it?\n{listed}", "AB"[i % 2])
        made.append(Record(f"ct/test/{i}", "ct", (turn,), options, "AB"[i % 2], f"{i}.png"))
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    return RecordSet(made, images)


def encoded(found: RecordSet | None = None, *, text_tokens: int = 48):
    data = DataConfig(system_prompt="", max_text_tokens=text_tokens)
    fmt = llava(CONFIG.image_size_px, CONFIG.num_image_tokens)
    return encode_eval(records() if found is None else found, TOKENIZER, data, fmt)


def model_on(mesh_config: MeshConfig | None = None, **fields):
    """(evaluator, graphdef, params) with weights scaled so that logits are of order 1 to 10."""
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:1] if mesh_config is None else None)
    graphdef, params = build.create(CONFIG, mesh, seed=3)
    params["decoder"]["head"]["kernel"] = params["decoder"]["head"]["kernel"] * 3.0
    fields = {"eos_id": EOS, "max_new_tokens": 4, **fields}
    return make_evaluator(mesh, graphdef, build.shardings(CONFIG, mesh), **fields), graphdef, params
