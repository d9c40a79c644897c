"""Real images on two cores: the State subsets (64 to 69) of a small Med-MAT tree, over six modalities.

    medcg reproduce --config=configs/medmat_mini.py --config.data.root=TREE --workdir=runs/medmat_mini

The tree is in the release's layout. Model and base are those of `phantom.py`, so a base that its grid left beside the
workdir is used again; fine-tunes train the projector and the whole decoder. A small model that was pre-trained on
phantoms is far too weak for a medical claim: what this grid shows is that the whole path works on real images, and how
wide the intervals are at such sizes.
"""

import backbones_quick
import phantom

from medcg_jax.config import replace
from medcg_jax.config_file import from_config_dict, to_config_dict


def get_config():
    run = backbones_quick.with_whole_decoder(from_config_dict(phantom.get_config("quick")))
    return to_config_dict(
        replace(
            run,
            name="medmat_mini",
            data__source="release",
            data__max_text_tokens=50,
            data__train_records_per_subset=3000,
            data__test_records_per_subset=0,
            study__tables=("pairs",),
            study__targets=backbones_quick.STATE_SUBSETS,
        )
    )
