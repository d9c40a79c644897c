"""The loader's benchmark compares like with like: a reference that does less is refused."""

import pytest
from PIL import Image
from trees import raw_record, write_subset

from medcg_jax.data.layouts import Layout
from medcg_jax.data.prepare import prepare

pytest.importorskip("torch", reason="PyTorch is not installed")
from benchmarks import loader  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, out = (tmp_path_factory.mktemp("loader") / name for name in ("tree", "prepared"))
    write_subset(root, "Subset--04-train", [raw_record(i, label=("Benign", "Normal")[i % 2]) for i in range(90)])
    prepare(root, out, loader.DATA, Layout("square", loader.SIZE_PX))
    return root, out


@pytest.mark.timeout(120)
def test_it_runs_and_its_ratios_are_of_its_own_figures(folders):
    found = loader.compare(*folders, images=64, rounds=1)
    rows = found["loaders"]
    assert set(rows) == {"torch, raw files", "medcg, raw files", "medcg, prepared"} and found["images"] == 64
    for name, ratio in found["ratio_to_torch"].items():
        assert ratio == pytest.approx(rows[name]["images_per_s"] / rows["torch, raw files"]["images_per_s"])
    assert found["versions"]["pillow"] and found["date"]


@pytest.mark.timeout(120)
def test_a_reference_that_does_less_is_seen(folders, monkeypatch):
    class Cheaper(loader._Files):
        def __getitem__(self, index):
            import numpy as np
            import torch

            with Image.open(self.paths[index]) as image:
                small = image.convert("RGB").resize((loader.SIZE_PX,) * 2, Image.Resampling.NEAREST)
            return torch.from_numpy(np.array(small))

    monkeypatch.setattr(loader, "_Files", Cheaper)
    with pytest.raises(AssertionError, match="medcg, raw files"):
        loader.compare(*folders, images=32, rounds=1)
