"""Dose-response: accuracy by number of related subsets for each element, at equal records and updates; not in the paper.

    medcg reproduce --config=configs/dose.py:llava15_7b --config.data.root=MED_MAT --workdir=runs/dose
    medcg reproduce --config=configs/dose.py:llava15_tiny,phantom --workdir=runs/dose_phantom

A dose of K has K subsets for each element which share that element alone, 0 has unrelated ones.
`--config.study.dose_subsets=0,1,3` gives other doses, `--config.study.dose_records=900` other totals (by default what
one subset for each element has), and `--config.study.targets_of="{'dose': ('03',)}"` other targets. The argument is
BACKBONE[,SOURCE]: `paper.py`.
"""

import paper

ARGS = paper.ARGS
SECOND_ARGS = paper.SECOND_ARGS


def get_config(arg: str = "llava15_7b"):
    return paper.figure("dose", arg, "dose")
