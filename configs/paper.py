"""All tables and figures of the paper that one backbone can run, on one data source, as one grid.

    medcg reproduce --config=configs/paper.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/paper
    medcg reproduce --config=configs/paper.py:llava15_tiny,phantom --workdir=runs/paper_phantom

The argument is BACKBONE[,SOURCE], as of every `configs/tableN.py`, which are parts of this. A released backbone has
the model and recipe of its own file, `llava15_7b.py` say, and the Med-MAT tree at `data.root` (SOURCE `release`); a
tiny one has those of `phantom.py:study`, three seeds, and phantoms (SOURCE `phantom`) unless told otherwise. Equal
trainings of several tables run once here. `--dry` lists every cell with its size and cost, and needs no data.
"""

import importlib

import backbones_quick
import phantom

from medcg_jax.config import TABLES, RunConfig, replace
from medcg_jax.config_file import from_config_dict, to_config_dict
from medcg_jax.families import registry

ARGS = {
    "llava15_7b": "LLaVA-1.5-7B",
    "llava15_13b": "LLaVA-1.5-13B",
    "qwen2_vl_7b": "Qwen2-VL-7B",
    "llama32_vision_11b": "Llama-3.2-11B-Vision",
    "minigpt_v2_7b": "MiniGPT-v2",
    "next_chat_7b": "NExT-Chat-7B-336",
    "minigpt_v2_tiny": "MiniGPT-v2 at a size for two cores",
    "qwen2_vl_tiny": "Qwen2-VL at a size for two cores",
    "llama32_vision_tiny": "Llama-3.2-Vision at a size for two cores",
    "next_chat_tiny": "NExT-Chat at a size for two cores",
    "llava15_tiny": "LLaVA-1.5 at a size for two cores",
}
# Those that answer with boxes.
BOX_ARGS = {
    "next_chat_7b": "NExT-Chat-7B-336",
    "minigpt_v2_7b": "MiniGPT-v2",
    "next_chat_tiny": "NExT-Chat at a size for two cores",
    "minigpt_v2_tiny": "MiniGPT-v2 at a size for two cores",
}
SECOND_ARGS = {
    "release": "the Med-MAT tree at data.root, as of a released backbone without a word about it",
    "phantom": "phantoms, as of a tiny backbone",
}
# Backbone -> the file with its model and recipe.
RELEASED = {name: importlib.import_module(name) for family in registry.families() for name in family.recipes}
TINY = backbones_quick.MODELS


def get_config(arg: str = "llava15_7b"):
    run = backbone("paper", arg)
    has_boxes = registry.of_model(run.model.name).gives_boxes
    tables = (*TABLES, "detection_pairs") if has_boxes else TABLES
    return to_config_dict(with_figure_targets(replace(run, study__tables=tables)))


def table(name: str, arg: str, *tables: str, **study):
    """The configuration of one table: `study` are fields of `StudyConfig`."""
    own = {f"study__{key}": value for key, value in study.items()}
    return to_config_dict(replace(backbone(name, arg), study__tables=tables, **own))


def figure(name: str, arg: str, *tables: str):
    """The configuration of a figure, with targets of its own."""
    return to_config_dict(with_figure_targets(replace(backbone(name, arg), study__tables=tables)))


def backbone(name: str, arg: str) -> RunConfig:
    """Model, recipe and data of BACKBONE[,SOURCE], for the grid `name`."""
    model, comma, source = arg.partition(",")
    source = source if comma else "phantom" if model in TINY else "release"
    run = tiny(model, source) if model in TINY else released(model, source)
    return replace(run, name=f"{name}_{model}_{source}")


def released(model: str, source: str) -> RunConfig:
    run = from_config_dict(RELEASED[model].get_config())
    if source == "phantom":
        sizes = dict(data__train_records_per_subset=300, data__test_records_per_subset=300)
        run = replace(run, data__source="phantom", data__root="", study__targets=phantom.REPORT_TARGETS, **sizes)
    return run


def tiny(model: str, source: str) -> RunConfig:
    from medcg_jax.study.design.schedule import runs_by_model

    study = from_config_dict(phantom.get_config("study"))
    flags = {model: backbones_quick.MODEL_FLAGS.get(model, ())}
    parts = (*study.model.trainable, *(["boxes"] if model == "next_chat_tiny" else []))
    study = replace(study, study__models=(model,), study__model_flags=flags, model__trainable=parts)
    if source == "release" or registry.of_model(model).gives_boxes:
        # Words that phantoms alone have are not enough for real images, or to write boxes.
        study = backbones_quick.with_whole_decoder(study)
    run = runs_by_model(study)[model]
    own = dict(targets=phantom.REPORT_TARGETS, targets_of={}, epochs_of={}, arms=(), seeds=study.study.seeds, jobs=2)
    run = replace(run, **{f"study__{key}": value for key, value in own.items()})
    if model != "llava15_tiny":
        # What the longest question needs in any of the prompts.
        run = replace(run, data__max_text_tokens=30, data__max_target_tokens=8)
    if source == "release":
        # As `medmat_mini.py` and `backbones_quick.py:mini`.
        run = replace(
            run, data__source="release", data__root="Med-MAT", data__train_records_per_subset=3000,
            data__test_records_per_subset=0, data__max_text_tokens=58, data__max_target_tokens=12, study__targets=(),
        )  # fmt: skip
    return run


def with_figure_targets(run: RunConfig) -> RunConfig:
    """The targets and epochs of the figures and doses, of which a row costs as much as ten pairs."""
    if run.data.source == "phantom":
        study = from_config_dict(phantom.get_config("study")).study
        targets = {"dose": phantom.REPORT_TARGETS[:3]} | study.targets_of
        return replace(run, study__targets_of=targets, study__epochs_of=study.epochs_of)
    from medcg_jax.study.design.mat import reached_targets

    # Which the paper's figures have is not known as text; table 3 reaches these in two directions or more.
    return replace(run, study__targets_of=dict.fromkeys(("ablation", "efficiency", "dose"), reached_targets()))
