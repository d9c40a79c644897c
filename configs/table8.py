"""Table 8: eight of the pairs of table 3, with Llama-3.2-Vision.

    medcg reproduce --config=configs/table8.py:llama32_vision_11b --config.data.root=MED_MAT --workdir=runs/table8
    medcg reproduce --config=configs/table8.py:llama32_vision_tiny,phantom --workdir=runs/table8_phantom

The paper prints the base and Trained; Baseline+ and the arms that decide (`table3.py`) are run too;
`--config.study.arms=baseline,trained` leaves them out.
The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llama32_vision_11b"):
    return paper.table("table8", arg, "pairs", published_table=8)
