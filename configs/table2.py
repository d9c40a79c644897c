"""Table 2: 12 subsets out of distribution, for the base and for the model of all 25 of table 1.

    medcg reproduce --config=configs/table2.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/table2
    medcg reproduce --config=configs/table2.py:llava15_tiny,phantom --workdir=runs/table2_phantom

The models of one subset are tested there too, which the paper did not print; `--config.study.arms=baseline,multi_task`
leaves them out. The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llava15_7b"):
    return paper.table("table2", arg, "multi_task", parts=("out_of_distribution",))
