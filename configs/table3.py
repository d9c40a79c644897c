"""Table 3: 42 pairs of related subsets, each for the base, Baseline+ (as many unrelated records) and Trained.

    medcg reproduce --config=configs/table3.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/table3
    medcg reproduce --config=configs/table3.py:llava15_tiny,phantom --workdir=runs/table3_phantom

Beside the paper's arms stand those that tell composition from transfer out of one subset: each member alone, each with
unrelated records, the task's words of other modalities and areas, and the pair without images, all with the pair's
records and updates. `--dry` says what they cost; `--config.study.arms=baseline,baseline_plus,trained` leaves them out.
The argument is BACKBONE[,SOURCE]: `paper.py`. On phantoms: one pair for each target and direction.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llava15_7b"):
    return paper.table("table3", arg, "pairs", published_table=3)
