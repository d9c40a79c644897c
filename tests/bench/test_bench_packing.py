"""What the benchmark of packing says: shapes that hold the records, and FLOPs that fall with padding."""

import numpy as np

from benchmarks import packing
from medcg_jax.families.llava.model import llava15_7b


def test_rows_hold_the_records_and_packing_pays_with_text_alone():
    text = np.random.default_rng(0).integers(70, 108, 400)
    found = {(one["text_share"], one["rows_are"]): one for one in packing.by_formula(llava15_7b(), text)}
    for share in packing.TEXT_SHARES:
        longest = found[share, "multiple of 1"]
        assert longest["length"] == 576 + 107 and found[share, "as the limit"]["flops_full"] == 1
        assert longest["flops_full"] < 0.9
        assert all(one["real"] <= 1 for one in found.values())
        # Never dearer than a record a row.
        assert found[share, "packed if cheaper"]["flops_full"] <= found[share, "multiple of 16"]["flops_full"]
    assert found[0.5, "packed if cheaper"]["flops_full"] < 0.9 * found[0.5, "multiple of 16"]["flops_full"]
    assert found[0.0, "packed"]["rows"] == 16 and found[0.0, "packed"]["images"] == 2


def test_lengths_are_about_llamas():
    # 34 tokens in LLaVA-1.5, whose image starts at 35 behind <s>.
    sentence = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER:"
    )
    assert 34 <= packing.estimated_tokens(sentence) <= 38
    drawn = packing.text_lengths("")
    assert 64 <= drawn.min() and drawn.max() <= packing.LIMIT and 84 < drawn.mean() < 86


def test_steps_on_both_kinds_of_rows_have_one_loss(monkeypatch):
    # `measured` compares the first losses: records of other sizes in the packed rows are seen.
    from medcg_jax.data.packing import Packer
    from medcg_jax.families.llava.model import llava15_tiny

    small = dict(
        image_size_px=16, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2, mlp_dim=32, scan_unroll=1
    )
    monkeypatch.setattr(packing, "llava15_bench", lambda *ids, **rest: llava15_tiny(40, 39, **small))
    monkeypatch.setattr(packing, "MEASURED_SHARES", (0.5,))
    text = packing.text_lengths("") * 60
    [one] = packing.measured(text, batch=8, rounds=1)
    assert one["packed"][0] < 8 and one["cpu"]["median"] > 0
    rows = Packer.rows

    def wrong(self, indices, own):
        batch, ids = rows(self, indices, own)
        return batch | {"segment_ids": np.minimum(batch["segment_ids"], 1)}, ids

    monkeypatch.setattr(Packer, "rows", wrong)
    try:
        packing.measured(text, batch=8, rounds=1)
    except AssertionError as error:
        assert "Mismatched elements" in str(error)
    else:
        raise AssertionError("packed rows without segments were not seen")
