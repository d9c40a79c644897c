"""Every parameter of every released size: its shape, its axes' names and its layout, from shapes alone.

Totals and parts are those of the checkpoints, counted with the published configurations in PyTorch.
"""

import math
from pathlib import Path

import jax
import pytest

from medcg_jax.axes import RULES, spec
from medcg_jax.config import MeshConfig, ModelConfig
from medcg_jax.families import build
from medcg_jax.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
# One size of each family.
TABLES = ("llava15_7b", "qwen2_vl_7b", "llama32_vision_11b", "minigpt_v2_7b", "next_chat_7b_336")
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "data, tensor": MeshConfig(data=2, tensor=4),
    "fsdp, tensor": MeshConfig(data=1, fsdp=2, tensor=4),
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
# Query heads that 8 devices cannot split: 12 and 28.
REFUSED = {("qwen2_vl_2b", "tensor"), ("qwen2_vl_7b", "tensor")}
CLIP, PROJECTOR, LLAMA = 303_507_456, 20_979_712, 6_738_415_616
# Zero biases of EVA's keys, which the form that was counted has and this port does not hold.
KEY_BIASES = 39 * 1408
# A buffer of SAM, which no count of parameters has and this port holds.
FREQUENCIES = 256
QWEN_VISION, MLLAMA_VISION = 631_183_360, 863_567_379
# Size -> (all, {parts, joined by "+", of dotted names: numbers}).
COUNTS = {
    "llava15_7b": (
        7_062_902_784, {"vision+unused": CLIP, "unused": 12_598_272, "projector": PROJECTOR, "decoder": LLAMA},
    ),
    "llava15_13b": (13_350_839_296, {"vision+unused": CLIP, "projector": 31_467_520, "decoder": 13_015_864_320}),
    "qwen2_vl_2b": (
        2_208_985_600, {"vision": QWEN_VISION, "projector": 34_087_936, "decoder": 1_543_714_304},
    ),
    "qwen2_vl_7b": (
        8_291_375_616,
        {
            "vision+projector": 675_759_104, "projector": 44_575_744, "decoder.head": 544_997_376,
            "decoder.embed": 544_997_376, "decoder.embed+decoder.blocks+decoder.norm": 7_070_619_136,
        },
    ),
    "qwen2_vl_72b": (
        73_405_560_320, {"vision": QWEN_VISION, "projector": 68_173_312, "decoder": 72_706_203_648},
    ),
    "llama32_vision_11b": (
        10_670_220_835,
        {
            "vision": MLLAMA_VISION, "vision.tile_positions": 73_774_080, "projector": 31_461_376,
            "decoder.embed+decoder.blocks+decoder.cross+decoder.norm": 9_249_855_504, "decoder.cross": 1_744_898_064,
            "decoder.head": 525_336_576,
        },
    ),
    "llama32_vision_90b": (
        88_593_355_323, {"vision": MLLAMA_VISION, "projector": 62_922_752, "decoder": 87_666_865_192},
    ),
    "minigpt_v2_7b": (
        7_782_076_416 - KEY_BIASES,
        {"vision": 987_033_600 - KEY_BIASES, "projector": 23_072_768, "lora": 33_554_432, "decoder": LLAMA},
    ),
    "next_chat_7b_336": (
        7_741_812_788 + FREQUENCIES,
        {
            "vision+unused": CLIP, "decoder": 6_738_456_576, "projector": PROJECTOR, "boxes": 16_801_796,
            "mask_prompt": 20_976_640, "sam_encoder": 637_026_048, "mask_decoder": 4_058_340,
            "sam_encoder+sam_prompt+mask_decoder": 641_090_608 + FREQUENCIES,
        },
    ),
}  # fmt: skip
# What the names of axes mean: every size that they have. An axis named for its neighbour would have another.
CLIP_SIZES = {"vision_embed": {1024}, "vision_mlp": {4096}, "vision_heads": {16}, "pos": {577}, "patch": {588}}
LLAMA_SIZES = {"embed": {4096}, "heads": {32}, "kv_heads": {32}, "vocab": {32000}}
AXIS_SIZES = {
    "llava15_7b": CLIP_SIZES | LLAMA_SIZES | {
        "layer": {1, 23, 32}, "mlp": {4096, 11008}, "head_dim": {64, 128}, "norm": {1024, 4096},
    },
    "qwen2_vl_7b": {
        "layer": {28, 32}, "vocab": {152064}, "embed": {3584}, "mlp": {5120, 18944}, "heads": {28}, "kv_heads": {4},
        "head_dim": {80, 128, 3 * 80}, "norm": {1280, 3584}, "patch": {1176},
        # The merger's input is a block of four patches.
        "vision_embed": {1280, 5120}, "vision_mlp": {5120}, "vision_heads": {16},
    },
    "llama32_vision_11b": {
        "layer": {8, 32}, "vocab": {128256, 128264}, "embed": {4096}, "mlp": {14336}, "heads": {32}, "kv_heads": {8},
        "head_dim": {80, 128}, "norm": {128, 1280, 4096}, "patch": {588}, "pos": {4, 9, 1601}, "table_embed": {1280},
        # The projector's input is a channel of the last layer and of five others.
        "vision_embed": {1280}, "vision_mlp": {5120, 6 * 1280}, "vision_heads": {16},
    },
    "minigpt_v2_7b": LLAMA_SIZES | {
        "layer": {32, 39}, "mlp": {11008}, "head_dim": {88, 128, 3 * 88}, "norm": {1408, 4096}, "patch": {588},
        "pos": {1025}, "rank": {64}, "rank_parts": {64},
        # The projector's input is four neighbouring patches.
        "vision_embed": {1408}, "vision_mlp": {4 * 1408, 6144}, "vision_heads": {16},
    },
    "next_chat_7b_336": LLAMA_SIZES | {
        "layer": {1, 2, 4, 23, 28, 32}, "vocab": {32005}, "embed": {1024, 4096}, "mlp": {2048, 4096, 11008},
        "head_dim": {16, 32, 64, 80, 128}, "vision_embed": {64, 256, 1024, 1280}, "vision_mlp": {256, 2048, 4096, 5120},
        "vision_heads": {8, 16}, "pos": {2, 4, 27, 64, 127, 577}, "patch": {2, 4, 16, 588, 768, 1280, 2304},
        "norm": {3, 4, 16, 32, 64, 128, 256, 1024, 1280, 4096},
    },
}  # fmt: skip


NEIGHBOURS = (("embed", "heads"), ("embed", "kv_heads"), ("embed", "vocab"), ("vision_embed", "vision_heads"))


def table(config) -> list[tuple[str, tuple, tuple, tuple]]:
    """(dotted name, shape, names of the axes, spec) of each parameter."""
    leaves = jax.tree_util.tree_flatten_with_path(build.abstract(config)[1])[0]
    names = jax.tree.leaves(build.axis_names(config), is_leaf=lambda x: isinstance(x, tuple))
    return [
        (".".join(key.key for key in path), leaf.shape, axes, tuple(spec(*axes)))
        for (path, leaf), axes in zip(leaves, names, strict=True)
    ]


def text(rows) -> str:
    return "".join(f"{name} {shape} {' '.join(axes)} {spec}\n" for name, shape, axes, spec in rows)


def sizes_of_axes(rows) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for _, shape, axes, _ in rows:
        for name, size in zip(axes, shape, strict=True):
            found.setdefault(name, set()).add(size)
    return found


@pytest.mark.parametrize("size", TABLES)
def test_every_parameters_shape_names_and_spec_are_the_golden_ones(size, monkeypatch):
    config, golden = build.SIZES[size](), (GOLDEN / f"{size}_params.txt").read_text()
    rows = table(config)
    assert text(rows) == golden
    # Where a rule has changed, the table has.
    for rule in ("vocab", "vision_heads"):
        monkeypatch.setitem(RULES, rule, None)
        assert text(table(config)) != golden
        monkeypatch.undo()


@pytest.mark.parametrize("size", TABLES)
def test_names_stand_in_the_order_of_the_shape(size):
    rows = table(build.SIZES[size]())
    assert sizes_of_axes(rows) == AXIS_SIZES[size]
    # Planted, in one kernel after the other that has two such axes: they change places.
    planted = 0
    for i, (name, shape, axes, where) in enumerate(rows):
        for one, other in NEIGHBOURS:
            if name.startswith(("decoder", "vision")) and {one, other} <= set(axes):
                swapped = tuple({one: other, other: one}.get(axis, axis) for axis in axes)
                wrong = [*rows[:i], (name, shape, swapped, where), *rows[i + 1 :]]
                assert sizes_of_axes(wrong) != AXIS_SIZES[size]
                planted += 1
    assert planted >= 8


def part(params, names: str) -> int:
    """How many parameters the parts of these dotted names have together."""
    found = 0
    for name in names.split("+"):
        tree = params
        for key in name.split("."):
            tree = tree[key]
        found += build.num_params(tree)
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", build.SIZES)
def test_counts_and_what_each_device_holds(size):
    """On every mesh, without an allocation: the checkpoint's numbers, and nothing large whole that could be split."""
    config = build.SIZES[size]()
    _, params = build.abstract(config)
    total, parts = COUNTS[size]
    assert build.num_params(params) == total
    assert {names: part(params, names) for names in parts} == parts
    for name, axes in MESHES.items():
        mesh = make_mesh(axes)
        if (size, name) in REFUSED:
            with pytest.raises(ValueError, match="cannot be split over mesh axis tensor of 8 devices"):
                build.shardings(config, mesh)
        else:
            assert held(config, params, mesh) < 1.04 * total / (mesh.shape["fsdp"] * mesh.shape["tensor"])


def held(config, params, mesh) -> int:
    """How many numbers one device has."""
    places = jax.tree.leaves(build.shardings(config, mesh))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    return sum(math.prod(place.shard_shape(shape)) for place, shape in zip(places, shapes, strict=True))


def test_a_table_that_no_rule_splits_is_seen(monkeypatch):
    """What `held` is for: Llama-3.2-Vision's places of tiles and NExT-Chat's vocabulary, whole as they once were."""
    mesh = make_mesh(MESHES["tensor"])
    whole = {"llama32_vision_11b": 73_774_080, "next_chat_7b_336": 2 * 32005 * 4096}
    configs = {size: build.SIZES[size]() for size in whole}
    before = {size: held(config, build.abstract(config)[1], mesh) for size, config in configs.items()}
    monkeypatch.setitem(RULES, "table_embed", None)
    for size, config in configs.items():
        params = build.abstract(config)[1]
        after = held(config, params, mesh)
        assert after - before[size] == whole[size] * 7 // 8 and after > 1.04 * COUNTS[size][0] / 8


def test_a_vocabulary_that_the_tensor_axis_does_not_divide_is_split_by_its_width():
    config = build.SIZES["next_chat_7b_336"]()
    specs = {}
    for name, axes in MESHES.items():
        mesh = make_mesh(axes)
        decoder = build.shardings(config, mesh)["decoder"]
        specs[name] = tuple(decoder["embed"]["table"].spec), tuple(decoder["head"]["kernel"].spec)
        assert build.replicated(config, mesh) == []
    assert specs["fsdp"] == (("tensor", "fsdp"), ("fsdp", "tensor"))
    assert specs["tensor"] == ((None, ("fsdp", "tensor")), (("fsdp", "tensor"), None))


def test_llava_with_the_rows_of_llava_hf():
    config = build.architecture(ModelConfig("llava15_7b"), vocab_size=32064)
    assert build.num_params(build.abstract(config)[1]) == 7_063_427_072
