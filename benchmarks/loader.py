"""Images a second of the loader, from prepared records and from raw files, beside `torch.utils.data.DataLoader`.

    python -m benchmarks.loader ROOT [--prepared=DIR] [--images=2000] [--json=FILE]

All three give batches of the same images in the same order as uint8[B, 336, 336, 3], padded to a square and resized, with
equally many workers: threads here, processes in PyTorch, whose dataset opens the raw file with PIL. They take turns in
one run. Rows here include tokens; PyTorch's are images alone.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.records import write_record
from medcg_jax.config import DataConfig
from medcg_jax.data.encoding import Encoded, encode
from medcg_jax.data.images import FILL
from medcg_jax.data.layouts import Layout
from medcg_jax.data.pipeline import Batches, num_decoding_threads
from medcg_jax.data.prepare import prepare
from medcg_jax.data.prepared import PreparedSource
from medcg_jax.data.records import Source, concat
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families.llava.rows import row_format

SIZE_PX, BATCH_SIZE, WORKERS = 336, 32, num_decoding_threads()
DATA = DataConfig(max_text_tokens=400)


def compare(root: Path, prepared: Path, *, images: int, rounds: int = 3) -> dict:
    """Images/s, MB/s and CPU seconds per 1,000 images of each loader, medians over the rounds; and ratios to PyTorch."""
    raw, ready = _encoded(ReleaseSource(root, DATA)), _encoded(PreparedSource(prepared, DATA))
    order = _order(raw, images)
    paths = [str(root / raw.records.records[index].image) for index in order]
    loaders = {
        "torch, raw files": lambda: _torch(paths),
        "medcg, raw files": lambda: _ours(raw),
        "medcg, prepared": lambda: _ours(ready),
    }
    first = {name: next(iter(load())) for name, load in loaders.items()}
    for name, batch in first.items():
        np.testing.assert_array_equal(batch, first["torch, raw files"], err_msg=name)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, load in loaders.items():
            taken[name].append(_time(load(), images // BATCH_SIZE))
    count, size = images // BATCH_SIZE * BATCH_SIZE, SIZE_PX * SIZE_PX * 3
    rows = {}
    for name, pairs in taken.items():
        wall, cpu = (statistics.median(values) for values in zip(*pairs, strict=True))
        rows[name] = {
            "images_per_s": count / wall, "mb_per_s": count * size / wall / 1e6, "cpu_s_per_1000": cpu / count * 1000
        }  # fmt: skip
    ratios = {
        name: statistics.median(t[0] / ours[0] for t, ours in zip(taken["torch, raw files"], pairs, strict=True))
        for name, pairs in taken.items()
    }
    figures = {"loaders": rows, "ratio_to_torch": ratios}
    return {"images": count, "rounds": rounds, "workers": WORKERS} | figures


def _encoded(source: Source) -> Encoded:
    """Rows of every choice record of the source, whose images are read when drawn."""
    records = concat([source.records(subset.name, "train") for subset in source.subsets])
    return encode(
        records,
        load_tokenizer(""),
        DATA,
        row_format(SimpleNamespace(image_size_px=SIZE_PX, num_image_tokens=4)),
        memory_limit_bytes=0,
    )


def _order(encoded: Encoded, images: int) -> list[int]:
    """The indices that `_ours` draws first."""
    index_of = {record.id: index for index, record in enumerate(encoded.records.records)}
    blind = Encoded(encoded.records, encoded.format, encoded.arrays, {"pixels": np.zeros((len(encoded), 1), np.uint8)})
    batches = Batches(blind, batch_size=BATCH_SIZE, seed=0, prefetch=0)
    order = [index_of[name] for _ in range(images // BATCH_SIZE + 1) for name in next(batches)[1]]
    batches.close()
    return order


def _ours(encoded: Encoded) -> Iterator[np.ndarray]:
    batches = Batches(encoded, batch_size=BATCH_SIZE, seed=0)
    try:
        for batch, _ in batches:
            yield batch["pixels"][:, 0]
    finally:
        batches.close()


class _Files:
    """PyTorch's side: one raw file, as a user of PIL reads it."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        import torch
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            image = image.convert("RGB")
        width, height = image.size
        if width != height:
            side = max(width, height)
            square = Image.new("RGB", (side, side), FILL)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        if image.size != (SIZE_PX, SIZE_PX):
            image = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image))


def _torch(paths: list[str]) -> Iterator[np.ndarray]:
    from torch.utils.data import DataLoader

    for batch in DataLoader(_Files(paths), BATCH_SIZE, num_workers=WORKERS):
        yield batch.numpy()


def _time(batches: Iterator[np.ndarray], count: int) -> tuple[float, float]:
    """(wall, CPU) seconds of `count` batches, with the start of the workers and their ended processes."""
    wall, cpu = time.perf_counter(), _cpu()
    for _ in range(count):
        next(batches)
    wall = time.perf_counter() - wall
    batches.close()
    return wall, _cpu() - cpu


def _cpu() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", metavar="ROOT", type=Path)
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="ROOT prepared with --image=square:336")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = args.prepared or Path(folder) / "prepared"
        if not args.prepared:
            prepare(args.root, prepared, DATA, Layout("square", SIZE_PX))
        figures = compare(args.root, prepared, images=args.images)
    for name, row in figures["loaders"].items():
        print(
            f"{name:18} {row['images_per_s']:8.0f} images/s {row['mb_per_s']:7.0f} MB/s "
            f"{row['cpu_s_per_1000']:6.2f} CPU s per 1,000   {figures['ratio_to_torch'][name]:.2f} x torch"
        )
    write_record(args.json, figures)


if __name__ == "__main__":
    main()
