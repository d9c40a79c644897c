"""The configuration of a run: frozen dataclasses with every default, checked by `config_checks`.

A config file (`configs/*.py`) builds a `RunConfig`; `config_file` reads one and applies `--config.a.b=value`.
A comment beside a default says so if the paper does not state the value.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from pathlib import PurePath

from medcg_jax.families import registry

SOURCES = ("phantom", "release", "prepared")
ATTENTION = ("auto", "plain", "splash", "cudnn")
MATMUL = ("", "int8", "fp8")
REMAT = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")
# Dtypes in which parameters that are not trained can be stored.
BASE_DTYPES = (*DTYPES, "int8", "nf4")
PHANTOM_RULES = ("shared", "drawn")
# Products of a decoder's layer that can have a low-rank adapter.
LORA_TARGETS = ("q", "k", "v", "out", "gate", "up", "down")
# Parts that every model has, and that a base trains.
TRAINABLE = ("vision", "projector", "decoder")
# Parts for masks, which are trained alone, with their own loss.
MASK_PARTS = ("mask_prompt", "mask_decoder", "sam_encoder")
# Part -> the only family that has it. Other families have "lora" if `model.lora_rank` is above 0.
FAMILY_PARTS = {part: family.name for family in registry.families() for part in family.parts}
# The decoder's token embeddings alone, a part that can be trained instead of the decoder.
EMBEDDING = "embedding"
PARTS = (*TRAINABLE, EMBEDDING, *FAMILY_PARTS)
TABLES = ("pairs", "triples", "ablation", "multi_task", "efficiency")
# Tables whose related subsets have boxes, for families that answer with boxes. The second also tests on boxes.
BOX_TABLES = ("detection_pairs", "detection")
# Beside these, off unless asked for: accuracy by number of related subsets.
STUDY_TABLES = (*TABLES, *BOX_TABLES, "dose")
# Arms of pairs and triples that tell composition from transfer out of one subset (`study.design.arms`).
DECIDING_ARMS = (
    "single_1", "single_2", "single_3", "filler_1", "filler_2", "filler_3", "words_only", "no_images",
)  # fmt: skip
# Arms of the ablation that are compared with all related subsets; with "_updates" at the end at as many updates.
REMOVAL_ARMS = (
    "all_unrelated", "wo_modality", "wo_area", "wo_task", "random_removal_modality", "random_removal_area",
    "random_removal_task", "same_task", "all_data",
)  # fmt: skip
# All arms, beside `NUMBERED_ARMS` with a number at the end.
ARMS = (
    "baseline", "baseline_plus", "trained", *DECIDING_ARMS, "single_task", "multi_task", "all_related", *REMOVAL_ARMS,
    *(f"{arm}_updates" for arm in REMOVAL_ARMS),
)  # fmt: skip
NUMBERED_ARMS = ("efficiency", "dose")
# What arms of different numbers of records have in common: passes over them, or updates.
BUDGETS = ("epochs", "updates")
# Controls, which ask test questions again in changed form: `data.controls`.
CONTROLS = ("shuffled_images", "circular", "two_options", "blank_images", "text_only")
# Actions of a grid on leaks.
LEAKS = ("refuse", "drop", "report")
# Published tables that "pairs" and "detection_pairs" can repeat.
PUBLISHED_PAIRS, PUBLISHED_DETECTION = (3, 7, 8), (5, 6)
# Name of a model, a size or a family -> its family.
MODELS = registry.models()
# A model whose checkpoint states its family too.
AUTO = "auto"

# The longest context of all models (Llama 3.2), in tokens.
MOST_TOKENS = 2**17
# Devices count steps, and pixels of an image, in int32.
MOST_STEPS = 2**31 - 1
MOST_RECORDS = 10**7
MOST_BATCH = 2**20
MOST_DEVICES = 2**20
# The sum of two seeds is itself a seed for JAX and numpy.
MOST_SEED = 2**30
# Below the largest float32.
MOST_FLOAT = 1e30
# The least number above 0, and the greatest below 1.
ABOVE_0, BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)


class ConfigError(ValueError):
    """A value in a run's configuration cannot be used; the message is one line for the user."""


class RunError(RuntimeError):
    """A run failed for a reason that its user must know; the message is one line."""


class Interrupted(KeyboardInterrupt):
    """A run was told to stop and has saved what it could; the same command continues it.

    Not an `Exception`: it may be raised anywhere, and handlers that retry or fall back must not swallow it.
    """


def setting(default, *, least=None, most=None, choices=(), unit="", once=False, free=False, later=False, path=False):
    """A field of a configuration with its limits; for a dict or tuple they apply to each entry.

    The comment above a field is its meaning, which `medcg config` prints (`config_fields`): every field has one.

    least, most: bounds of a number, of each number in a tuple, of each value of a dict.
    choices: allowed texts, also for each text in a tuple or each key of a dict.
    unit: what a number counts or measures, in the plural.
    once: no entry may occur twice.
    free: changes results in the last digits at most: where, how fast and how visibly a run is executed (`free_fields`).
    later: added after the first bases were made; at its default it is left out of a base's fingerprint.
    path: a path; "": none. `config_file` replaces ~ by the home folder.
    """
    metadata = dict(least=least, most=most, choices=choices, unit=unit, once=once, free=free, later=later, path=path)
    if default == {}:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis takes all remaining devices.

    With several TPU slices or GPU hosts, fsdp x tensor must divide the devices of one; cell and data may cross them
    (`mesh.make_mesh`).
    """

    # Groups of devices that train different cells of a grid; -1: all that remain.
    cell: int = setting(1, least=-1, most=MOST_DEVICES, unit="devices", free=True)
    # Over these the rows of a batch are split; -1: all that remain.
    data: int = setting(-1, least=-1, most=MOST_DEVICES, unit="devices", free=True)
    # Over these rows are split, and parameters with their optimizer's state; -1: all that remain.
    fsdp: int = setting(1, least=-1, most=MOST_DEVICES, unit="devices", free=True)
    # Over these the products of each layer are split; -1: all that remain.
    tensor: int = setting(1, least=-1, most=MOST_DEVICES, unit="devices", free=True)
    # On more or fewer devices than these, a mesh that fits them and the batches is taken (`mesh.fitted`).
    elastic: bool = setting(False, free=True)
    # Collectives run on the sparse cores of a v5p or v6e, by flags of libtpu (`platform.SPARSE_CORES`): less is waited
    # for by the schedules of compiled steps; it was never run.
    sparse_cores: bool = setting(False, free=True)


@dataclass(frozen=True)
class ModelConfig:
    """The model, and what of it is trained."""

    # A size ("llava15_7b"); or a family ("llava"), whose sizes are then those that the checkpoint states; "auto": the
    # family is the checkpoint's, too.
    name: str = setting("llava15_tiny", choices=(AUTO, *MODELS))
    # Checkpoint of the base: a converted (Orbax) or released (HF) directory, or a repository of the Hugging Face hub
    # ("llava-hf/llava-1.5-7b-hf", "NAME@REVISION"), which is fetched; "": random weights.
    checkpoint: str = setting("", path=True)
    # Tokenizer directory, tokenizer.json or tokenizer.model; "": the one beside the checkpoint's weights, and for a
    # tiny model without one the package's small tokenizer.
    tokenizer: str = setting("", path=True)
    # Dtype of the activations, and of parameters in products.
    compute_dtype: str = setting("float32", choices=DTYPES)
    # Dtype of products with the decoder's weights, of `MATMUL` (`nn.matmul`, by qwix); "": `compute_dtype`.
    matmul: str = setting("", choices=MATMUL)
    # Kernel of attention; "auto": splash on TPUs, cuDNN's on GPUs in 16 bits, else plain.
    attention: str = setting("auto", choices=ATTENTION, free=True)
    # What is computed again in the backward pass and not kept in memory: nothing, all of a layer, or all but products.
    remat: str = setting("none", choices=REMAT, free=True)
    # Llama-3.2-Vision: what inner layers of its tower contribute, their "input" as in Meta's model, or their "output"
    # as in transformers 4.57 to 5.23; "": Meta's.
    intermediate_from: str = setting("", choices=("", "input", "output"))
    # Llama-3.2-Vision: whether tokens before every image do not attend to it, as in Meta's model.
    mask_text_only_rows_attention: bool = False
    # Layers per iteration of the scan over blocks; 0: on a CPU all of a short stack (12 to 25 % faster there), else 1.
    scan_unroll: int = setting(0, least=0, most=1000, unit="layers", free=True)
    # Qwen2-VL enlarges smaller images to at least so many; 0: the value of the model's size.
    min_pixels: int = setting(0, least=0, most=MOST_STEPS, unit="pixels")
    # Qwen2-VL shrinks larger images to at most so many; 0: the value of the model's size.
    max_pixels: int = setting(0, least=0, most=MOST_STEPS, unit="pixels")
    # NExT-Chat: greatest number of boxes in a row or an answer; 0: the value of the model's size. Room takes memory.
    max_boxes: int = setting(0, least=0, most=10**4, unit="boxes")
    # Parts that a fine-tune trains. The default is LLaVA-1.5's second stage: the vision tower stays frozen.
    trainable: tuple[str, ...] = setting(("projector", "decoder"), choices=PARTS, once=True)
    # Words, one token each, whose embeddings alone the part "embedding" trains, as peft's trainable tokens; (): all.
    trainable_words: tuple[str, ...] = setting((), once=True, later=True)
    # Rank of adapters on the decoder's products (LoRA), a part "lora" that can be trained instead of the decoder. 0: no
    # adapters, except those that belong to MiniGPT-v2.
    lora_rank: int = setting(0, least=0, most=10**5, later=True)
    # The adapters' product is scaled by alpha / rank. 0: twice the rank, as in LLaVA-1.5's recipe (256 for 128).
    lora_alpha: float = setting(0.0, least=0, most=MOST_FLOAT, later=True)
    # Products of a decoder's layer that have adapters; LLaVA-1.5's recipe has all.
    lora_targets: tuple[str, ...] = setting(LORA_TARGETS, choices=LORA_TARGETS, later=True)
    # Dtype of parameters that are not trained. int8 and nf4 apply to the matrices of blocks; norms, biases and tables
    # are bfloat16 then.
    base_dtype: str = setting("float32", choices=BASE_DTYPES, later=True)


@dataclass(frozen=True)
class DataConfig:
    """Records and images, and the rows made of them."""

    # Where records are from: drawn phantoms, a Med-MAT tree as released, or a folder that `medcg data prepare` wrote.
    source: str = setting("phantom", choices=SOURCES)
    # Phantoms: the share of images with decoys, objects that contradict the answer outside the area or beside the
    # modality's property; without any, knowing the task is enough.
    phantom_decoys: float = setting(1.0, least=0, most=1, unit="of 1")
    # Phantoms: the rule behind the answers, that of modality, area and task ("shared"), or one drawn for each subset,
    # so that nothing transfers ("drawn").
    phantom_rule: str = setting("shared", choices=PHANTOM_RULES)
    # Folder of a Med-MAT tree ("release"), or one that `medcg data prepare` wrote ("prepared").
    root: str = setting("", path=True)
    # Seed of phantoms, and of the choice of records where there are more than are asked for.
    seed: int = setting(0, least=0, most=MOST_SEED)
    # Text tokens of a training row at most, without the image's; a longer record is an error, and never cut.
    max_text_tokens: int = setting(48, least=1, most=MOST_TOKENS, unit="tokens")
    # Supervised tokens of a row at most: the head runs at these positions only.
    max_target_tokens: int = setting(8, least=1, most=MOST_TOKENS, unit="tokens")
    # `max_text_tokens` of a grid's trainings with boxes, which as text make rows several times as long; 0: the same.
    max_box_text_tokens: int = setting(0, least=0, most=MOST_TOKENS, unit="tokens")
    # `max_target_tokens` of a grid's trainings with boxes; 0: the same.
    max_box_target_tokens: int = setting(0, least=0, most=MOST_TOKENS, unit="tokens")
    # Training rows have the length of the longest record, with its image, rounded up to a multiple of this; never more
    # than `max_text_tokens` allows. 0: always that maximum. A grid's rows have the longest length of all its trainings.
    row_multiple: int = setting(0, least=0, most=MOST_TOKENS, unit="tokens")
    # Training records of a subset at most, with labels balanced. 3,000 is from a digest of the published version.
    train_records_per_subset: int = setting(3000, least=1, most=MOST_RECORDS, unit="records")
    # Test records of a subset at most, with labels balanced; 0: all.
    test_records_per_subset: int = setting(0, least=0, most=MOST_RECORDS, unit="records")
    # Subsets that `train` trains on and `eval` tests on; empty: all. A grid chooses its own.
    subsets: tuple[str, ...] = setting((), once=True)
    # Sentence before the first user turn; "vicuna": LLaVA-1.5's.
    system_prompt: str = "vicuna"
    # General records (ImageWikiQA's in the study) for each record of a fine-tune; never in a test.
    imagewikiqa_share: float = setting(0.0, least=0, most=BELOW_1, unit="of 1")
    # File of the general records, which the release lacks: a JSON list of four-option records with the release's keys;
    # paths of images are relative to its folder. "": none.
    general_records: str = setting("", path=True)
    # Subset -> weight of its records in a batch; empty: every record once an epoch.
    subset_weights: dict[str, float] = setting({}, least=ABOVE_0, most=MOST_FLOAT)
    # Pixels of an image, and of the square that it is padded to, at most; the header is enough to refuse a larger one.
    max_pixels: int = setting(50_000_000, least=1, most=MOST_STEPS, unit="pixels")
    # Window by which DICOM and other images of more than 8 bits become 8 bits: a preset (lung, brain, ...) or
    # CENTER/WIDTH; "": the file's own (`data.reading.Reading`).
    window: str = ""
    # How 16-bit greys without a window become 8 bits: range, percentile or window.
    deep_grey: str = "range"
    # The frame of an image with several that is used: first, middle, last or a number from 0.
    frame: str = "middle"


@dataclass(frozen=True)
class TrainConfig:
    """A training by AdamW: its rate rises linearly, then falls along a cosine.

    5 epochs, batch 32 and 5e-6 are known from a digest of the published version; the rest is LLaVA-1.5's recipe.
    """

    # Passes over the records. For a base of several passes: its steps read the same records so often; 0: none twice.
    epochs: float = setting(5.0, least=0, most=10**6, unit="passes")
    # Updates; 0: as many as `epochs` need.
    steps: int = setting(0, least=0, most=MOST_STEPS, unit="updates")
    # Rows of an update, on all devices together.
    batch_size: int = setting(32, least=1, most=MOST_BATCH, unit="rows")
    # Parts that a batch is cut into: memory is needed for one at a time, and their gradients are added up.
    accumulation_steps: int = setting(1, least=1, most=MOST_BATCH, unit="parts")
    # The greatest rate, at the end of the warm-up.
    learning_rate: float = setting(5e-6, least=ABOVE_0, most=MOST_FLOAT)
    # The part of the updates in which the rate rises.
    warmup_frac: float = setting(0.03, least=0, most=1, unit="of 1")
    # The rate at the last update, as a part of the greatest.
    end_learning_rate_frac: float = setting(0.0, least=0, most=1, unit="of 1")
    # AdamW's decoupled weight decay.
    weight_decay: float = setting(0.0, least=0, most=MOST_FLOAT)
    # AdamW's decay of the mean of gradients.
    b1: float = setting(0.9, least=0, most=1)
    # AdamW's decay of the mean of squared gradients.
    b2: float = setting(0.999, least=0, most=1)
    # AdamW's epsilon, added to the root of the second moment.
    eps: float = setting(1e-8, least=ABOVE_0, most=MOST_FLOAT)
    # Gradients of a larger norm are scaled down to it; 0: no clipping.
    clip_norm: float = setting(1.0, least=0, most=MOST_FLOAT)
    # Dtype in which trained parameters are stored between updates. Updates are computed in float32, and rounded to
    # bfloat16 with noise that seed and step determine (`train.optim.narrow`).
    param_dtype: str = setting("float32", choices=DTYPES)
    # Dtype in which AdamW's moments are stored between updates.
    moment_dtype: str = setting("float32", choices=DTYPES)
    # Seed of the order of records, and of parameters that start at random.
    seed: int = setting(0, least=0, most=MOST_SEED)
    # Updates between two lines of metrics.
    log_every_steps: int = setting(10, least=1, most=MOST_STEPS, unit="updates", free=True)
    # Updates between two checkpoints; 0: one at the end alone.
    checkpoint_every_steps: int = setting(0, least=0, most=MOST_STEPS, unit="updates", free=True)
    # Number of newest checkpoints to keep.
    keep_checkpoints: int = setting(2, least=1, most=MOST_STEPS, unit="checkpoints", free=True)
    # Checkpoints whose step is a multiple of this are kept too; 0: none.
    keep_every_steps: int = setting(0, least=0, most=MOST_STEPS, unit="updates", free=True)


@dataclass(frozen=True)
class EvalConfig:
    """Tests of a model."""

    # Questions asked at once; changes no prediction beyond the last digits.
    batch_size: int = setting(64, least=1, most=MOST_BATCH, unit="questions")
    # Whether free answers are also generated, greedily, and strictly parsed.
    generate: bool = True
    # Tokens of a free answer at most.
    max_new_tokens: int = setting(4, least=1, most=MOST_TOKENS, unit="tokens")
    # Controls of every test question in a grid, of `CONTROLS`; "circular" asks up to three times; (): none.
    # "blank_images" takes as long as the test; "text_only" computes short rows, and the others only what comes after the
    # image. Controls are scored by the letters only, and do not change `predictions/`; without free answers they may
    # change the last digits.
    controls: tuple[str, ...] = setting(("shuffled_images",), choices=CONTROLS)
    # Memory of each device for features of test images, which cells with the same frozen vision tower share instead of
    # computing them again; those that were not used for the longest time go first. 0: none are kept.
    features_gib: float = setting(1.0, least=0, most=MOST_DEVICES, unit="GiB", free=True)
    # Tokens of an answer with boxes at most: MiniGPT-v2 writes up to 17 for each box, NExT-Chat 2.
    max_box_tokens: int = setting(128, least=1, most=MOST_TOKENS, unit="tokens")


@dataclass(frozen=True)
class StudyConfig:
    """The grid of `medcg reproduce`: what is trained for which target."""

    # Kinds of tables: pairs and triples of related subsets, figure 4, tables 1 and 2, the curve, boxes, and doses.
    tables: tuple[str, ...] = setting(("pairs",), choices=STUDY_TABLES, once=True)
    # Subsets to test on; empty: every subset the table is defined for.
    targets: tuple[str, ...] = setting((), once=True)
    # Detection subsets to train and test on; empty: all.
    box_subsets: tuple[str, ...] = setting((), once=True)
    # Arms to run, of `ARMS` and `NUMBERED_ARMS` such as "efficiency_30"; empty: all arms of the tables. The paper's pairs
    # and triples have "baseline", "baseline_plus" and "trained" alone.
    arms: tuple[str, ...] = setting((), once=True)
    # Parts of the tables to run: prefixes of their rows' names ("out_of_distribution", "fixed_area"); empty: all.
    parts: tuple[str, ...] = setting((), once=True)
    # Published table to repeat: 3, 7 or 8 with "pairs", 5 or 6 with "detection_pairs"; 0: the model's own.
    published_table: int = 0
    # Baseline+: number of training records: "related" (as many as Trained has), or a number.
    baseline_plus_records: str = "related"
    # Baseline+: number of subsets that its records come from: "related" (as many as Trained has), a number, or "all".
    baseline_plus_subsets: str = "related"
    # Numbers of the target's training records on the efficiency curve, which always ends with all of its records.
    efficiency_records: tuple[int, ...] = setting(
        (0, 10, 30, 100, 300, 1000, 3000), least=0, most=MOST_RECORDS, unit="records"
    )
    # Whether all of a target's efficiency curves have the updates that its related subsets and all of its records need,
    # or every point has the same number of epochs, and so fewer updates with fewer records.
    efficiency_budget: str = setting("updates", choices=BUDGETS)
    # What the ablation's arms have in common: of "epochs", as in the paper, and "updates", whose arms end in "_updates".
    ablation_budgets: tuple[str, ...] = setting(BUDGETS, choices=BUDGETS, once=True)
    # Table "dose": numbers of related subsets for each element.
    dose_subsets: tuple[int, ...] = setting((0, 1, 2, 4, 8), least=0, most=MOST_RECORDS, unit="subsets")
    # Table "dose": training records of every dose; 0: as many as one subset for each element gives.
    dose_records: int = setting(0, least=0, most=MOST_RECORDS, unit="records")
    # Table -> its targets, instead of `targets`: a row of "ablation" costs as much as ten of "pairs".
    targets_of: dict[str, tuple[str, ...]] = setting({}, choices=STUDY_TABLES, once=True)
    # Table -> its epochs, instead of `train.epochs`: boxes are learnt more slowly than letters.
    epochs_of: dict[str, float] = setting({}, least=0, most=10**6, unit="passes", choices=STUDY_TABLES)
    # Models of the grid, each in a folder of its name, and all on one page; empty: only `model.name`.
    models: tuple[str, ...] = setting((), choices=tuple(MODELS), once=True)
    # Model of `models` -> fields that are set for it only, as flags without "--config.": "data.max_text_tokens=106".
    model_flags: dict[str, tuple[str, ...]] = setting({}, choices=tuple(MODELS))
    # Each seed is used for data, base and fine-tunes.
    seeds: tuple[int, ...] = setting((0,), least=0, most=MOST_SEED, once=True)
    # Processes of this machine that share the grid's cells.
    jobs: int = setting(1, least=1, most=10**4, unit="processes", free=True)
    # Cells trained at once in one program; 0: as many as fit in the memory of the devices (`plan`).
    cells_at_once: int = setting(1, least=0, most=10**4, unit="cells", free=True)
    # Folder that keeps bases for other grids, by fingerprint; "": `bases` beside the workdir.
    base_dir: str = setting("", free=True, path=True)
    # Whether a linear probe reads each target from the base's image features (`eval.probe`), for probe.csv: encodes up to
    # 1,000 training images of each target.
    probe: bool = False
    # Whether each cell's trained parameters are kept, and not only its scores.
    keep_weights: bool = False
    # Action on leaks: training records whose image or patient (`Record.group`) is in a target's test set, and general
    # records with a test's image or question. The cell fails ("refuse"), is trained without the record ("drop"), or
    # only lists it ("report"). The same image has the same bytes or, with a search for near duplicates, pixels.
    # Patients that are only known from file names are never refused. `medcg train` does the same for tests of its own
    # subsets.
    leaks: str = setting("refuse", choices=LEAKS)
    # Action on training records with a near duplicate of a test image; "off": no search, which would decode images.
    # For general records with one, `leaks` applies.
    near_duplicates: str = setting("report", choices=("off", *LEAKS))
    # Differing bits of 256 at most between perceptual hashes of near duplicates: measured in `data.duplicates`.
    near_duplicate_bits: int = setting(20, least=0, most=40, unit="bits")


@dataclass(frozen=True)
class LogConfig:
    """What `medcg train` logs beside its JSON lines; changes no result. A grid has its own metrics."""

    # Scalars for TensorBoard in WORKDIR/tensorboard.
    tensorboard: bool = setting(True, free=True)
    # Project in Weights & Biases (extra `wandb`); "": none.
    wandb: str = setting("", free=True)
    # Steps whose trace is written to WORKDIR/profile, "FIRST:LAST" with both included; "": none.
    profile_steps: str = setting("", free=True)


@dataclass(frozen=True)
class RunConfig:
    """A run, by sections."""

    # The name in progress lines, and of the workdir where none is given: runs/NAME.
    name: str = setting("run", free=True)
    # On GPUs: repeating a run gives the same bytes, as on other platforms anyway. This disables XLA's autotuning
    # (`platform`), which makes some programs slower; a program without deterministic kernels does not compile.
    deterministic: bool = True
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = field(default_factory=DataConfig)
    # Pre-training of the base on phantoms; steps=0: none (the base is `model.checkpoint`).
    base: TrainConfig = TrainConfig(learning_rate=1.5e-3)
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    study: StudyConfig = field(default_factory=StudyConfig)
    log: LogConfig = LogConfig()


@functools.cache
def marked(mark: str, cls: type = RunConfig, prefix: str = "") -> frozenset[str]:
    """The fields of a configuration with this mark (of `setting`), as "train.log_every_steps"."""
    names = set()
    for setting_ in dataclasses.fields(cls):
        if dataclasses.is_dataclass(setting_.type):
            names |= marked(mark, setting_.type, f"{prefix}{setting_.name}.")
        elif setting_.metadata.get(mark):
            names.add(prefix + setting_.name)
    return frozenset(names)


def xla_switches(run: RunConfig) -> frozenset[str]:
    """The settings on which flags of XLA depend (`platform.FLAGS`)."""
    switches = {"deterministic": run.deterministic, "sparse_cores": run.mesh.sparse_cores}
    return frozenset(name for name, is_on in switches.items() if is_on)


def free_fields() -> frozenset[str]:
    """The fields that change no result: a run or grid may continue with other values of them."""
    return marked("free")


def replace(config, **changes):
    """A copy of a (nested) dataclass with fields changed; nested fields as `a__b=value`."""
    changed, nested = {}, {}
    for key, value in changes.items():
        head, _, tail = key.partition("__")
        if tail:
            nested.setdefault(head, {})[tail] = value
        else:
            changed[head] = value
    for head, inner in nested.items():
        changed[head] = replace(getattr(config, head), **inner)
    return dataclasses.replace(config, **changed)


def has_any_size(name: str) -> bool:
    """Whether a model of this name has no sizes of its own: they are those of its checkpoint."""
    return name == AUTO or name in registry.FAMILIES


def model_title(name: str, checkpoint: str) -> str:
    """A model's name for people: its size, or its family and the name of its checkpoint, "llava (llava-med)"."""
    return f"{name} ({PurePath(checkpoint.partition('@')[0]).name})" if has_any_size(name) and checkpoint else name


def trains_masks(model: ModelConfig) -> bool:
    """Whether a fine-tune trains mask parts, and so needs their data, loss and scores."""
    return bool(set(model.trainable) & set(MASK_PARTS))


def parts_of(family: str, names: tuple[str, ...], *, lora_rank: int = 0) -> tuple[str, ...]:
    """Those names that are parts of the family's models, in their order. lora_rank: as `ModelConfig`'s."""
    owners = {part: owner for part, owner in FAMILY_PARTS.items() if part != "lora" or not lora_rank}
    return tuple(name for name in names if owners.get(name, family) == family)


def flat(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1} for a configuration as a dict; fields that are dicts stay whole."""
    flattened: dict = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("subset_weights", "targets_of", "epochs_of", "model_flags"):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[prefix + key] = value
    return flattened
