"""The study on the embedded phantom world, with tiny models that are pre-trained and fine-tuned on two cores.

    medcg reproduce --config=configs/phantom.py --workdir=runs/demo              one seed, one kind of pairs, some minutes
    medcg reproduce --config=configs/phantom.py:study --workdir=runs/study       three seeds, every table
    medcg reproduce --config=configs/phantom.py:negative --workdir=runs/negative no decoys: the task is enough
    medcg reproduce --config=configs/phantom.py:null --workdir=runs/null         a rule for each subset: nothing helps

An answer needs what only a modality, an area and a task give together (`data.phantom.world`), so the first world is a
positive control: a sound study must end in "composition" there, in "transfer from one subset" in the negative one, and in
"not shown" in the null one.

The recipe (base, train, data, eval) was chosen on the four targets of `data.phantom.world.TUNE_TARGETS` with data seeds of
100 and above and bases of seeds 5, 6, 11 to 13, 100 and 101; figures are reported on the eight of `REPORT_TARGETS` with
seeds 7, 8 and 9, which nothing was chosen on. Seed 1 is the demo's, whose page was looked at once the recipe was fixed; an
earlier recipe was looked at on these targets with seeds 4 and 5, where one base of two learnt from many subsets.
"""

from medcg_jax.config import DataConfig, EvalConfig, ModelConfig, RunConfig, StudyConfig, TrainConfig, replace
from medcg_jax.config_file import to_config_dict
from medcg_jax.data.phantom.world import REPORT_TARGETS, TASKS, study_words

ARGS = {
    "quick": "one seed, one kind of pairs, some minutes",
    "study": "three seeds, every table",
    "negative": "no decoys: the task is enough",
    "null": "a rule for each subset: nothing helps",
    "tiny": "a few steps of everything, for tests",
}
# A task's name is in its questions as well, but its labels say all of it. Trained too, it could carry the area or the
# modality of the one subset that a pair has of the task, and the pair would miss the target.
TRAINED_WORDS = tuple(word for word in study_words() if word not in TASKS)
# One target for each modality and area.
QUICK_TARGETS = REPORT_TARGETS[::2]
# Figure 4 and the curve cost most of a grid.
FIGURE_TARGETS = {"efficiency": REPORT_TARGETS[:1]}


def get_config(arg: str = "quick"):
    run = RunConfig(
        name=f"phantom_{arg}",
        # The words that no base has read are all that a fine-tune learns. Where the decoder is trained as well, sets of
        # some hundred records are learnt by heart before the words are found.
        model=ModelConfig(name="llava15_tiny", trainable=("embedding",), trainable_words=TRAINED_WORDS),
        data=DataConfig(
            source="phantom",
            system_prompt="",
            # What a question needs; a base makes its rows as long as its own records need.
            max_text_tokens=14,
            max_target_tokens=2,
            train_records_per_subset=450,
            test_records_per_subset=300,
        ),
        base=TrainConfig(
            # Answering with a letter sets in after 900 to 1,200 steps, by the seed.
            steps=2800,
            epochs=4,
            learning_rate=2e-3,
            b2=0.98,
            weight_decay=0.01,
            warmup_frac=0.06,
            end_learning_rate_frac=0.02,
            log_every_steps=50,
        ),
        train=TrainConfig(
            # Chosen on the tuning targets of three bases. With three fifths of the updates every fourth pair is missed;
            # weight decay pulls a word back to the mean of all words, which untrained words have.
            epochs=9,
            batch_size=16,
            learning_rate=0.05,
            weight_decay=0.3,
            b2=0.98,
            warmup_frac=0.06,
            end_learning_rate_frac=0.02,
        ),
        eval=EvalConfig(batch_size=100, generate=True, max_new_tokens=2),
        # Six targets or more, or no p can be below .05; of the four directions one, for ten minutes on two cores.
        study=StudyConfig(tables=("pairs",), parts=("fixed_modality",), targets=REPORT_TARGETS, seeds=(1,), jobs=2),
    )
    worlds = {
        "study": {},
        "negative": {"data__phantom_decoys": 0.0, "study__tables": ("pairs", "ablation")},
        "null": {"data__phantom_rule": "drawn", "study__tables": ("pairs",)},
    }
    if arg in worlds:
        return to_config_dict(replace(_study(run), **worlds[arg]))
    return to_config_dict(_tiny(run) if arg == "tiny" else run)


def _study(run: RunConfig) -> RunConfig:
    """Three seeds of data, base and fine-tune; eight targets."""
    return replace(
        run,
        eval__controls=("shuffled_images", "text_only"),
        study__tables=("pairs", "triples", "ablation", "efficiency"),
        study__parts=(),
        study__targets_of=FIGURE_TARGETS,
        # All related subsets are 18 times one: some 700 updates of 8,100 records.
        study__epochs_of={"ablation": 1.4, "efficiency": 1.4},
        study__efficiency_records=(0, 10, 30, 100, 300),
        study__seeds=(7, 8, 9),
        study__probe=True,
    )


def _tiny(run: RunConfig) -> RunConfig:
    """A few steps of everything, for tests: seconds, and scores at chance."""
    return replace(
        run,
        data__train_records_per_subset=16,
        data__test_records_per_subset=8,
        base__steps=4,
        base__epochs=1,
        train__epochs=0,
        train__steps=2,
        study__tables=("pairs", "triples"),
        study__parts=(),
        study__targets=QUICK_TARGETS[:1],
        study__jobs=1,
    )
