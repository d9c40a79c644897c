"""Data efficiency: accuracy over 0 to all training records of a target, with its related subsets, with as many unrelated records, and alone.

    medcg reproduce --config=configs/efficiency.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/efficiency
    medcg reproduce --config=configs/efficiency.py:llava15_tiny,phantom --workdir=runs/efficiency_phantom

All points of a target have as many updates; `--config.study.efficiency_budget=epochs` gives them as many epochs instead.
`--config.study.efficiency_records=0,30,300` gives other numbers (all that the subset has always comes last), and
`--config.study.targets_of="{'efficiency': ('03',)}"` other targets. The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llava15_7b"):
    return paper.figure("efficiency", arg, "efficiency")
