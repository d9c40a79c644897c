"""Real images on two cores: the State subsets (64 to 69) of a small Med-MAT tree, over six modalities.

    medcg reproduce --config=configs/medmat_mini.py --config.data.root=TREE --workdir=runs/medmat_mini

The tree is in the release's layout. Model, base and recipe are those of `phantom.py`, so a base that its grid left beside
the workdir is used again. A small model that was pre-trained on phantoms is far too weak for a medical claim: what this
grid shows is that the whole path works on real images, and how wide the intervals are at such sizes.
"""

import phantom

STATE_SUBSETS = ("64", "65", "66", "67", "68", "69")


def get_config():
    config = phantom.get_config("quick")
    config.name = "medmat_mini"
    config.data.source = "release"
    config.data.max_text_tokens = 50
    config.data.train_records_per_subset = 3000
    config.data.test_records_per_subset = 0
    config.study.tables = ("pairs",)
    with config.study.ignore_type():
        config.study.targets = STATE_SUBSETS
    return config
