"""Table 6: eight pairs of a detection subset and one of choice questions, with MiniGPT-v2.

    medcg reproduce --config=configs/table6.py:minigpt_v2_7b --config.data.root=MED_MAT --workdir=runs/table6
    medcg reproduce --config=configs/table6.py:minigpt_v2_tiny,phantom --workdir=runs/table6_phantom

The paper prints the base and Trained; Baseline+ (unrelated records of boxes and of choice questions) and the arms that
decide (`table3.py`) are run too; `--config.study.arms=baseline,trained` leaves them out.
The argument is BACKBONE[,SOURCE] (`paper.py`), of a backbone that answers with boxes.
"""

import paper

ARGS = paper.BOX_ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "minigpt_v2_7b"):
    return paper.table("table6", arg, "detection_pairs", published_table=6)
