"""Table 7: eight of the pairs of table 3, with Qwen2-VL.

    medcg reproduce --config=configs/table7.py:qwen2_vl_7b --config.data.root=MED_MAT --workdir=runs/table7
    medcg reproduce --config=configs/table7.py:qwen2_vl_tiny,phantom --workdir=runs/table7_phantom

The paper prints the base and Trained; Baseline+ and the arms that decide (`table3.py`) are run too;
`--config.study.arms=baseline,trained` leaves them out.
The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "qwen2_vl_7b"):
    return paper.table("table7", arg, "pairs", published_table=7)
