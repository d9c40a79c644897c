"""Table 4: nine sets of three subsets which share one element each with the target.

    medcg reproduce --config=configs/table4.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/table4
    medcg reproduce --config=configs/table4.py:llava15_tiny,phantom --workdir=runs/table4_phantom

The paper prints the base and Trained; Baseline+ and the arms that decide (`table3.py`) are run too;
`--config.study.arms=baseline,trained` leaves them out.
The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llava15_7b"):
    return paper.table("table4", arg, "triples")
