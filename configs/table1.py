"""Table 1: 25 subsets in distribution, each for the base, a model of that subset alone, and one model of all 25.

    medcg reproduce --config=configs/table1.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/table1
    medcg reproduce --config=configs/table1.py:llava15_tiny,phantom --workdir=runs/table1_phantom

On phantoms: the 24 subsets that are not held out. `--config.study.parts=` adds table 2, which the same trainings serve.
The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llava15_7b"):
    return paper.table("table1", arg, "multi_task", parts=("in_distribution",))
