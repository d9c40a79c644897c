"""Figure 4: a target with all related subsets, all unrelated, all related but those of one element, and all data.

    medcg reproduce --config=configs/figure4.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/figure4
    medcg reproduce --config=configs/figure4.py:llava15_tiny,phantom --workdir=runs/figure4_phantom

`--config.study.targets_of="{'ablation': ('03', '28')}"` gives any other targets; the paper's are in the figure alone.
Controls are run beside its arms: for each element as many subsets and records removed at random, and the subsets which
share the task alone. Every arm has the same number of epochs, as in the paper, and once more, with `_updates` at the end
of its name, the updates of all related subsets; `--config.study.ablation_budgets=epochs` leaves these out.
The argument is BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llava15_7b"):
    return paper.figure("figure4", arg, "ablation")
