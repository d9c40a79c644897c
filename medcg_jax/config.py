"""The configuration of a run: frozen dataclasses that hold every default; `config_checks` holds values against one another.

A config file (`configs/*.py`) builds a `RunConfig`; `config_file` reads one and applies `--config.a.b=value`.
A default that stands in for something the paper does not state says so beside it.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, field

from medcg_jax.families import registry

SOURCES = ("phantom", "release", "prepared")
ATTENTION = ("auto", "plain", "splash", "cudnn")
MATMUL = ("", "int8", "fp8")
REMAT = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")
# How parameters that are not trained can be kept.
BASE_DTYPES = (*DTYPES, "int8", "nf4")
# Products of a decoder's layer that can have a low-rank adapter.
LORA_TARGETS = ("q", "k", "v", "out", "gate", "up", "down")
# What a base trains, which every model has; and what else a fine-tune may train, by the models that have it.
TRAINABLE = ("vision", "projector", "decoder")
# Those of masks are trained by themselves, with a loss of their own.
MASK_PARTS = ("mask_prompt", "mask_decoder", "sam_encoder")
# Part -> the family that alone has it; "lora" the others have where `model.lora_rank` is above 0.
OWN_PARTS = {part: family.name for family in registry.families() for part in family.parts}
PARTS = (*TRAINABLE, *OWN_PARTS)
TABLES = ("pairs", "triples", "ablation", "multi_task", "efficiency")
# Tables whose related subsets have boxes: for the families that answer with them. The second is tested on boxes too.
BOX_TABLES = ("detection_pairs", "detection")
# Ways in which test questions are asked again: `data.controls`.
CONTROLS = ("shuffled_images", "circular", "two_options")
# What a grid does about leaks.
LEAKS = ("refuse", "drop", "report")
# Numbers of the published tables that "pairs" and "detection_pairs" can repeat.
PUBLISHED_PAIRS, PUBLISHED_DETECTION = (3, 7, 8), (5, 6)
# Model -> its family.
MODELS = registry.models()

# The longest context of a model here (Llama 3.2), in tokens.
MOST_TOKENS = 2**17
# Steps are counted in int32 on devices, and so are pixels of an image.
MOST_STEPS = 2**31 - 1
MOST_RECORDS = 10**7
MOST_BATCH = 2**20
MOST_DEVICES = 2**20
# Two of them are added up, and the sum is a seed for JAX and numpy.
MOST_SEED = 2**30
# Below the largest float32.
MOST_FLOAT = 1e30
# The least number above 0, and the greatest below 1.
ABOVE_0, BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)


class ConfigError(ValueError):
    """A value in a run's configuration cannot be used; the message is one line for the user."""


class RunError(RuntimeError):
    """A run ended for a reason that its user must know; the message is one line."""


class Interrupted(KeyboardInterrupt):
    """A run was told to stop and has saved what it could; the same command goes on with it.

    No `Exception`, as it may be raised anywhere: code that reads a file again, or another one, must not swallow it.
    """


def setting(default, *, least=None, most=None, choices=(), once=False, free=False, later=False, path=False):
    """A field of a configuration with what it may hold; a dict's or tuple's bounds and choices are those of its entries.

    least, most: of a number, of each number in a tuple, of each value of a dict.
    choices: of a text, of each text in a tuple, of each key of a dict.
    once: no entry may stand in it twice.
    free: changes no result but in last digits: where, how fast and how visibly a run goes (`free_fields`).
    later: came after the first bases: left out of a base's fingerprint where it has its default.
    path: a path, "" where there is none; `config_file` puts the home folder in place of ~.
    """
    metadata = dict(least=least, most=most, choices=choices, once=once, free=free, later=later, path=path)
    if default == {}:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; -1 on one axis takes what is left.

    Of several TPU slices or GPU hosts, fsdp x tensor must divide one; cell and data go across them (`mesh.make_mesh`).
    """

    cell: int = setting(1, least=-1, most=MOST_DEVICES, free=True)
    data: int = setting(-1, least=-1, most=MOST_DEVICES, free=True)
    fsdp: int = setting(1, least=-1, most=MOST_DEVICES, free=True)
    tensor: int = setting(1, least=-1, most=MOST_DEVICES, free=True)


@dataclass(frozen=True)
class ModelConfig:
    name: str = setting("llava15_tiny", choices=tuple(MODELS))
    # Checkpoint of the base: a converted (Orbax) or released (HF) directory; "" means random weights.
    checkpoint: str = setting("", path=True)
    # Tokenizer directory, tokenizer.json or tokenizer.model; "" takes the one beside the checkpoint's weights, and for a
    # tiny model without one the small one kept in the package.
    tokenizer: str = setting("", path=True)
    compute_dtype: str = setting("float32", choices=DTYPES)
    # Products of the decoder's weights in 8 bits, by qwix: of `MATMUL` (`nn.matmul`); "": in `compute_dtype`.
    matmul: str = setting("", choices=MATMUL)
    attention: str = setting("auto", choices=ATTENTION, free=True)
    remat: str = setting("none", choices=REMAT, free=True)
    # Llama-3.2-Vision: whether inner layers of its tower give their "input", as Meta's model takes it, or their "output",
    # as transformers 4.57 to 5.23 do; "": Meta's. And whether tokens before every image are kept from it, as in Meta's.
    intermediate_from: str = setting("", choices=("", "input", "output"))
    mask_text_only_rows_attention: bool = False
    # Layers per iteration of the scan over blocks; 0: all on CPU (12 to 25 % faster there), 1 elsewhere.
    scan_unroll: int = setting(0, least=0, most=1000, free=True)
    # Qwen2-VL resizes images to so many pixels at least and at most; 0: the size's own.
    min_pixels: int = setting(0, least=0, most=MOST_STEPS)
    max_pixels: int = setting(0, least=0, most=MOST_STEPS)
    # NExT-Chat: boxes that a row or an answer has room for; 0: the size's own. More than any record has need memory.
    max_boxes: int = setting(0, least=0, most=10**4)
    # LLaVA-1.5's second stage: the vision tower stays frozen.
    trainable: tuple[str, ...] = setting(("projector", "decoder"), choices=PARTS, once=True)
    # Adapters on the decoder's products (LoRA): a part "lora" that can be trained in the decoder's place. 0: none, but
    # MiniGPT-v2 has its own.
    lora_rank: int = setting(0, least=0, most=10**5, later=True)
    # Their product is scaled by alpha / rank. 0: twice the rank, as in LLaVA-1.5's own recipe (256 of 128).
    lora_alpha: float = setting(0.0, least=0, most=MOST_FLOAT, later=True)
    # Of `LORA_TARGETS`; LLaVA-1.5's recipe has all.
    lora_targets: tuple[str, ...] = setting(LORA_TARGETS, choices=LORA_TARGETS, later=True)
    # How parameters that are not trained are kept, of `BASE_DTYPES`. int8 and nf4 are for the matrices of blocks;
    # norms, biases and tables are bfloat16 then.
    base_dtype: str = setting("float32", choices=BASE_DTYPES, later=True)


@dataclass(frozen=True)
class DataConfig:
    source: str = setting("phantom", choices=SOURCES)
    # Folder of a Med-MAT tree ("release"), or what `medcg data prepare` wrote ("prepared").
    root: str = setting("", path=True)
    seed: int = setting(0, least=0, most=MOST_SEED)
    # Text tokens a training row may have, beside the image's; a longer record is an error, never cut.
    max_text_tokens: int = setting(48, least=1, most=MOST_TOKENS)
    # Supervised tokens a row may have: the head runs at these positions only.
    max_target_tokens: int = setting(8, least=1, most=MOST_TOKENS)
    # The same of rows in a grid's trainings that have boxes; 0: as above. Boxes as text make rows several times as long.
    max_box_text_tokens: int = setting(0, least=0, most=MOST_TOKENS)
    max_box_target_tokens: int = setting(0, least=0, most=MOST_TOKENS)
    # Training rows end at the longest record's length, rounded up to a multiple of this (image included; never above
    # what `max_text_tokens` allows); 0: all rows have that. A grid's rows end at the longest of all its trainings.
    row_multiple: int = setting(0, least=0, most=MOST_TOKENS)
    # "At most 3,000 label-balanced training records per subset" (digest of the published version).
    train_records_per_subset: int = setting(3000, least=1, most=MOST_RECORDS)
    # 0: all test records.
    test_records_per_subset: int = setting(0, least=0, most=MOST_RECORDS)
    # Subsets that `train` trains on and `eval` tests on; empty: all. A grid chooses its own.
    subsets: tuple[str, ...] = setting((), once=True)
    # Sentence before the first user turn; "vicuna" takes LLaVA-1.5's.
    system_prompt: str = "vicuna"
    # General records (ImageWikiQA's in the study) for each record of a fine-tune, 0 to below 1; never in a test. They
    # are not in the release: `general_records` is a JSON list of four-option records with the release's keys, whose
    # images are relative to its folder ("": none).
    imagewikiqa_share: float = setting(0.0, least=0, most=BELOW_1)
    general_records: str = setting("", path=True)
    # Subset -> weight of its records in a batch; empty: every record once an epoch.
    subset_weights: dict[str, float] = setting({}, least=ABOVE_0, most=MOST_FLOAT)
    # What an image, and the square it is padded to, may have; a larger one is refused from its header.
    max_pixels: int = setting(50_000_000, least=1, most=MOST_STEPS)
    # How DICOM and images of more than 8 bits become 8 bits (`data.reading.Reading`): a window's preset or CENTER/WIDTH
    # ("": the file's own), what is done with greys of 16 bits without one, and which frame of several is taken.
    window: str = ""
    deep_grey: str = "range"
    frame: str = "middle"


@dataclass(frozen=True)
class TrainConfig:
    # 5 epochs, batch 32 and 5e-6 are known from a digest of the published version; the rest is LLaVA-1.5's recipe.
    epochs: float = setting(5.0, least=0, most=10**6)
    # 0: from epochs.
    steps: int = setting(0, least=0, most=MOST_STEPS)
    batch_size: int = setting(32, least=1, most=MOST_BATCH)
    accumulation_steps: int = setting(1, least=1, most=MOST_BATCH)
    learning_rate: float = setting(5e-6, least=ABOVE_0, most=MOST_FLOAT)
    warmup_frac: float = setting(0.03, least=0, most=1)
    end_learning_rate_frac: float = setting(0.0, least=0, most=1)
    weight_decay: float = setting(0.0, least=0, most=MOST_FLOAT)
    b1: float = setting(0.9, least=0, most=1)
    b2: float = setting(0.999, least=0, most=1)
    eps: float = setting(1e-8, least=ABOVE_0, most=MOST_FLOAT)
    # 0: no clipping.
    clip_norm: float = setting(1.0, least=0, most=MOST_FLOAT)
    # In which trained parameters and AdamW's moments are kept between updates. Updates are made in float32, and rounded
    # at random to bfloat16, deterministically by seed and step (`train.optim.narrow`).
    param_dtype: str = setting("float32", choices=DTYPES)
    moment_dtype: str = setting("float32", choices=DTYPES)
    seed: int = setting(0, least=0, most=MOST_SEED)
    log_every_steps: int = setting(10, least=1, most=MOST_STEPS, free=True)
    # 0: only at the end.
    checkpoint_every_steps: int = setting(0, least=0, most=MOST_STEPS, free=True)
    # The newest so many checkpoints are kept, and those of every so many steps beside them (0: none).
    keep_checkpoints: int = setting(2, least=1, most=MOST_STEPS, free=True)
    keep_every_steps: int = setting(0, least=0, most=MOST_STEPS, free=True)


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int = setting(64, least=1, most=MOST_BATCH)
    # Second column: greedy generation and strict parsing of the answer.
    generate: bool = True
    max_new_tokens: int = setting(4, least=1, most=MOST_TOKENS)
    # How a grid asks every test question again, of `CONTROLS`, "circular" up to thrice; (): not at all. By itself
    # "shuffled_images" takes as long as the test, and leaves `predictions/` as they are without it. Of several the text
    # behind the image is read anew each time. Controls are scored by the letters alone.
    controls: tuple[str, ...] = setting(("shuffled_images",), choices=CONTROLS)
    # Most tokens of an answer with boxes: MiniGPT-v2 writes up to 17 for each, NExT-Chat 2.
    max_box_tokens: int = setting(128, least=1, most=MOST_TOKENS)


@dataclass(frozen=True)
class StudyConfig:
    tables: tuple[str, ...] = setting(("pairs",), choices=(*TABLES, *BOX_TABLES), once=True)
    # Subsets to test on; empty: every subset the table is defined for.
    targets: tuple[str, ...] = setting((), once=True)
    # Detection subsets to train and test on; empty: all.
    box_subsets: tuple[str, ...] = setting((), once=True)
    # Arms to run; empty: all of the tables'.
    arms: tuple[str, ...] = setting((), once=True)
    # Parts of the tables to run, what their rows' names start with ("out_of_distribution", "fixed_area"); empty: all.
    parts: tuple[str, ...] = setting((), once=True)
    # Published table whose rows are repeated: 3, 7 or 8 by "pairs", 5 or 6 by "detection_pairs"; 0: the model's own.
    published_table: int = 0
    # Baseline+: training records in all, and subsets that they come from: "related" (as many as Trained has), a number,
    # or "all" subsets.
    baseline_plus_records: str = "related"
    baseline_plus_subsets: str = "related"
    # Training records of the target on the efficiency curve, up to all that the subset has, which always come last.
    efficiency_records: tuple[int, ...] = setting((0, 10, 30, 100, 300, 1000, 3000), least=0, most=MOST_RECORDS)
    # Table -> its own targets, in place of `targets`: a row of "ablation" costs as much as ten of "pairs".
    targets_of: dict[str, tuple[str, ...]] = setting({}, choices=(*TABLES, *BOX_TABLES), once=True)
    # Table -> its own epochs, in place of `train.epochs`: boxes are learnt more slowly than letters.
    epochs_of: dict[str, float] = setting({}, least=0, most=10**6, choices=(*TABLES, *BOX_TABLES))
    # Models that the grid is run with, each in a folder of its name, and all on one page; empty: `model.name` alone.
    models: tuple[str, ...] = setting((), choices=tuple(MODELS), once=True)
    # Model of `models` -> what is set for it alone, as flags without "--config.": "data.max_text_tokens=106".
    model_flags: dict[str, tuple[str, ...]] = setting({}, choices=tuple(MODELS))
    # One seed draws the data, the base and the fine-tunes alike.
    seeds: tuple[int, ...] = setting((0,), least=0, most=MOST_SEED, once=True)
    jobs: int = setting(1, least=1, most=10**4, free=True)
    # Cells trained at once in one program; 0: as many as fit the memory of the devices (`plan`).
    cells_at_once: int = setting(1, least=0, most=10**4, free=True)
    # Where bases are kept between grids, by the fingerprint of what made them; "": in `bases` beside the workdir.
    base_dir: str = setting("", free=True, path=True)
    # Keep each cell's trained parameters (else only its scores).
    keep_weights: bool = False
    # What is done about a training record whose image or patient (`Record.group`) is in a target's test set, and about
    # a general record that has a test's image or question, of `LEAKS`: the cell fails, is trained without it, or
    # the record is listed alone. The same image: of the same bytes or, where near duplicates are looked for, pixels.
    # Patients that file names alone tell are listed, and left out with "drop". `medcg train` does the same for tests of
    # its own subsets.
    leaks: str = setting("refuse", choices=LEAKS)
    # The same of an image that is nearly one of the test set; "off": not looked for, no image is decoded for it. A
    # general record whose image is nearly a test's is treated by `leaks`.
    near_duplicates: str = setting("report", choices=("off", *LEAKS))
    # Bits of 256 in which perceptual hashes of near images differ at most: measured in `data.duplicates`.
    near_duplicate_bits: int = setting(20, least=0, most=40)


@dataclass(frozen=True)
class LogConfig:
    """What `medcg train` shows beside its JSON lines; none of it changes a result. A grid keeps metrics of its own."""

    # Scalars for TensorBoard in WORKDIR/tensorboard.
    tensorboard: bool = setting(True, free=True)
    # Project in Weights & Biases (extra `wandb`); "": none.
    wandb: str = setting("", free=True)
    # Steps whose trace is written to WORKDIR/profile, "FIRST:LAST" with both included; "": none.
    profile_steps: str = setting("", free=True)


@dataclass(frozen=True)
class RunConfig:
    name: str = setting("run", free=True)
    # GPUs: the same bytes whenever the same run is made again, as on other platforms anyway. The price is XLA's
    # autotuning (`platform`): programs that live from it are slower, and one without deterministic kernels does not
    # compile.
    deterministic: bool = True
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = field(default_factory=DataConfig)
    # Pre-training of the base, on phantoms; steps 0: none (the base is `model.checkpoint`).
    base: TrainConfig = TrainConfig(learning_rate=1.5e-3)
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    study: StudyConfig = field(default_factory=StudyConfig)
    log: LogConfig = LogConfig()


@functools.cache
def marked(mark: str, cls: type = RunConfig, prefix: str = "") -> frozenset[str]:
    """The fields of a configuration with this mark in their metadata, as "train.log_every_steps"."""
    names = set()
    for setting_ in dataclasses.fields(cls):
        if dataclasses.is_dataclass(setting_.type):
            names |= marked(mark, setting_.type, f"{prefix}{setting_.name}.")
        elif setting_.metadata.get(mark):
            names.add(prefix + setting_.name)
    return frozenset(names)


def free_fields() -> frozenset[str]:
    """The fields with which a run or a grid may go on where they had other values: they change no result."""
    return marked("free")


def replace(config, **changes):
    """A copy of a (nested) dataclass with fields changed; nested fields as `a__b=value`."""
    here, below = {}, {}
    for key, value in changes.items():
        head, _, tail = key.partition("__")
        if tail:
            below.setdefault(head, {})[tail] = value
        else:
            here[head] = value
    for head, inner in below.items():
        here[head] = replace(getattr(config, head), **inner)
    return dataclasses.replace(config, **here)


def trains_masks(model: ModelConfig) -> bool:
    """Whether a fine-tune is of the parts that draw masks, and so has their data, loss and scores."""
    return bool(set(model.trainable) & set(MASK_PARTS))


def parts_of(family: str, names: tuple[str, ...], *, lora_rank: int = 0) -> tuple[str, ...]:
    """Those of the names that are parts of the family's models, in their order. lora_rank: as `ModelConfig`'s."""
    owners = OWN_PARTS if not lora_rank else {part: has for part, has in OWN_PARTS.items() if part != "lora"}
    return tuple(name for name in names if owners.get(name, family) == family)


def flat(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, for the sections of a configuration as a dict."""
    flattened: dict = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("subset_weights", "targets_of", "epochs_of", "model_flags"):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[prefix + key] = value
    return flattened
