"""What was chosen where the paper is silent or known at second hand: every such choice, its field, and the reason.

The paper is arXiv 2412.20070; "the digest" is a third party's summary of its published version (ACL 2025), which gives
some settings that the paper's own pages, as far as they were read, do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medcg_jax.config import MODELS


@dataclass(frozen=True)
class Choice:
    """A field of the configuration, the value that full-size configs give it, and why; of one family, or of all."""

    field: str
    value: Any
    why: str
    family: str = ""


CHOICES = (
    Choice("train.epochs", 5.0, "the digest: 5 epochs"),
    Choice("train.batch_size", 32, "the digest: batch 32"),
    Choice(
        "train.learning_rate", 5e-6,
        "the digest: 5e-6, said of LLaVA-1.5-7B; other backbones, of which nothing is stated, have it too",
    ),
    Choice(
        "train.learning_rate", 1e-5, "not stated for MiniGPT-v2: that of its release's own fine-tuning", "minigpt_v2"
    ),
    Choice("train.weight_decay", 0.0, "not stated: LLaVA-1.5's fine-tuning recipe"),
    Choice(
        "train.weight_decay", 0.05, "not stated for MiniGPT-v2: that of its release's own fine-tuning", "minigpt_v2"
    ),
    Choice("train.warmup_frac", 0.03, "not stated: LLaVA-1.5's fine-tuning recipe"),
    Choice("train.end_learning_rate_frac", 0.0, "not stated: half a cosine to 0 is LLaVA-1.5's schedule"),
    Choice("train.clip_norm", 1.0, "not stated: the default of the trainer that LLaVA-1.5 was tuned with"),
    Choice(
        "model.trainable", ("projector", "decoder"),
        "not stated: LLaVA-1.5's second stage, whose vision tower is frozen",
    ),
    Choice(
        "model.trainable", ("projector", "lora"), "not stated for MiniGPT-v2: what its release's fine-tuning trains",
        "minigpt_v2",
    ),
    Choice(
        "model.trainable", ("projector", "decoder", "boxes"),
        "not stated for NExT-Chat: the first two stages of its release, all but the tower and SAM", "next_chat",
    ),
    Choice(
        "model.compute_dtype", "bfloat16",
        "not stated: as LLaVA-1.5 was tuned; parameters and AdamW's state are float32",
    ),
    Choice(
        "model.max_pixels", 200_704,
        "not stated for Qwen2-VL: 256 tokens an image, where its own default gives up to 1,280", "qwen2_vl",
    ),
    Choice("mesh.fsdp", 8, "the digest: 8 A800; the numbers do not depend on the mesh beyond rounding"),
    Choice(
        "data.train_records_per_subset", 3000, "the digest: at most 3,000 training records of a subset, labels balanced"
    ),
    Choice("data.test_records_per_subset", 0, "test sizes are not stated: all records of the test split"),
    Choice(
        "data.imagewikiqa_share", 0.0,
        "non-medical questions of four options were integrated against the bias of varying numbers of options; neither "
        "how many nor into which trainings is stated, and they are not in the release: none; where there is a file "
        "of them (data.general_records), every fine-tune takes its share",
    ),
    Choice(
        "study.baseline_plus_records", "related",
        '"randomly sampled unrelated data", with no amount: as many records as Trained has',
    ),
    Choice(
        "study.baseline_plus_subsets", "related",
        "how they were drawn is not stated: from as many subsets at random as Trained has (more where these are too "
        "small), by (target, size, seed), since rows of one target print equal values",
    ),
    Choice(
        "study.arms", (), "tables 4, 7 and 8 print no Baseline+; it is run there too, the one control for more training"
    ),
    Choice(
        "study.targets", (),
        "which targets figure 4 and the efficiency curves have is in figures alone: their configs take those that "
        "table 3 reaches in two directions or more",
    ),
    Choice(
        "study.efficiency_records", (0, 10, 30, 100, 300, 1000, 3000),
        "the counts of the efficiency curves are not stated: two to a decade, and all that the subset has",
    ),
    Choice("study.seeds", (0,), "neither the number of seeds nor their values are stated; more seeds give intervals"),
    Choice(
        "eval.generate", True,
        "decoding and parsing are not stated: the likelihood of the option letters decides, greedy generation with "
        "strict parsing stands beside it",
    ),
    Choice(
        "eval.controls", ("shuffled_images",),
        "none is stated: every test is asked once more beside another record's image, which must fall to chance where "
        "questions, letters or the balance of labels give nothing away; it doubles the time of tests",
    ),
    Choice(
        "study.leaks", "refuse",
        "nothing is said of patients, or of images that recur: a cell fails where a training record has a test's image "
        "or states its patient (`group`), or a general record has its question. The released records state no patient; "
        "where file names tell one that is on both sides, that is listed and not refused, for the release's own tests "
        "may be split by image",
    ),
    Choice(
        "study.near_duplicates", "report",
        "not stated: images that are nearly a test's, by a perceptual hash, are listed; many are adjacent slices or "
        "frames of one patient, in tests as they were released",
    ),
)  # fmt: skip


def choices(config: Mapping[str, Any]) -> list[tuple[str, Any, bool, str]]:
    """(field, value, whether it is the value chosen here, reason) for each choice, in one order.

    config: the sections of a run as nested dicts, as `config` in config.json. Where a family has a choice of its own,
    the general one is left out.
    """
    family, found = MODELS[config["model"]["name"]], {}
    for choice in CHOICES:
        if choice.family in ("", family):
            section, _, name = choice.field.partition(".")
            if name not in config.get(section, {}):
                continue  # a grid of an earlier version
            value = config[section][name]
            found[choice.field] = (choice.field, value, _plain(value) == _plain(choice.value), choice.why)
    return list(found.values())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
