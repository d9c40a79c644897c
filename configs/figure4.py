"""Figure 4: a target with all related subsets, all unrelated, all related but those of one element, and all data.

    medcg reproduce --config=configs/figure4.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/figure4
    medcg reproduce --config=configs/figure4.py:llava15_tiny,phantom --workdir=runs/figure4_phantom

`--config.study.targets_of="{'ablation': ('03', '28')}"` gives any other targets; the paper's are in the figure alone.
Two controls are run beside its arms: as many subsets removed at random, and those which share the task alone.
The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper


def get_config(arg: str = "llava15_7b"):
    return paper.figure("figure4", arg, "ablation")
