"""Table 3: 42 pairs of related subsets, each for the base, Baseline+ (as many unrelated records) and Trained.

    medcg reproduce --config=configs/table3.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/table3
    medcg reproduce --config=configs/table3.py:llava15_tiny,phantom --workdir=runs/table3_phantom

The argument is BACKBONE[,SOURCE]: `paper.py`. On phantoms: one pair for each target and direction.
"""

import paper


def get_config(arg: str = "llava15_7b"):
    return paper.table("table3", arg, "pairs", published_table=3)
