"""How fast duplicates are found: `python -m benchmarks.duplicates [--images=50000] [--root=TREE]`.

Writes images, then times at a quarter, a half and all of them: hashing from files (read, decode, three digests) in
`--workers` processes, and the search for near pairs in one process. Fits how each grows, and extrapolates to a million
images: by wall time, which other load on the machine lengthens, and by CPU seconds over the workers. The search is also
timed on as many hashes as the release has images: hashes of the images with a tenth of their bits flipped, a tenth of
them searched as tests among the others.

Each image is one of the tree's (without a tree: a phantom), cropped, made lighter or darker and resized by a seeded draw,
and saved as JPEG (7 of 10), PNG (2) or BMP (1). A tenth of them are copies of another, saved again.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.records import write_record
from medcg_jax.config import DataConfig
from medcg_jax.data.duplicates import (
    NEAR_BITS,
    ImageHashes,
    groups,
    hash_file,
    hash_rows,
    near_pairs,
    near_pairs_between,
)
from medcg_jax.data.images import load_image
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.tree import Tree

MILLION = 1_000_000
RELEASE = 111_000
TEST_SHARE = 0.1
MAX_PIXELS = DataConfig().max_pixels
FORMATS = ("JPEG",) * 7 + ("PNG",) * 2 + ("BMP",)
TURNED_SHARE = 0.1
CHUNK = 64


def main(argv: list[str] | None = None) -> int:
    """Prints the figures; 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--root", default="", help="a Med-MAT tree whose images are taken; else phantoms")
    parser.add_argument("--longest-side", type=int, default=0, help="pixels; 0: as the images are")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hashes", type=int, default=RELEASE, help="made-up hashes to search")
    parser.add_argument("--dir", default=None, help="a folder with room for the images")
    parser.add_argument("--json", default="", help="a file for the figures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        figures = measure(Path(folder), args.images, args.root, args.longest_side, args.workers, args.hashes)
    show(figures)
    write_record(args.json, figures)
    return 0


def measure(folder: Path, number: int, root: str, longest_side: int, workers: int, hashes: int) -> dict:
    """All figures as JSON; seconds are wall time unless named CPU seconds."""
    pictures = tree_images(Path(root)) if root else phantom_files(folder / "phantoms")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        make = partial(write_image, pictures, folder, longest_side)
        files = list(pool.map(make, range(number), chunksize=CHUNK))
    sizes = [number // 4, number // 2, number]
    rows, prints = [], []
    for size in sizes:
        prints, hashing = timed(partial(hash_files, files[:size], workers))
        places, hashed = hash_rows(prints)
        pairs, searching = timed(partial(near_pairs, hashed, NEAR_BITS))
        grouped, grouping = timed(partial(groups, prints))
        rows.append({"images": size, "hash": hashing, "search": searching, "group": grouping, "hashed": len(places),
                     "pairs": len(pairs), "groups": len(grouped)})  # fmt: skip
    fits = {step: fit(sizes, [row[step] for row in rows], workers if step == "hash" else 1)
            for step in ("hash", "search", "group")}  # fmt: skip
    made_up = turned(hash_rows(prints)[1], hashes)
    tests = int(hashes * TEST_SHARE)
    _, searched = timed(partial(near_pairs_between, made_up[tests:], made_up[:tests], NEAR_BITS))
    return {
        "made_from": root or "phantoms", "sources": len(pictures), "workers": workers, "cores": os.cpu_count(),
        "bytes_per_image": sum(os.path.getsize(file) for file in files) / number,
        "pixels_per_image": float(np.mean([np.prod(Image.open(file).size) for file in files[:1000]])),
        "rows": rows, "fits": fits, "made_up_hashes": {"hashes": hashes, **searched},
    }  # fmt: skip


def show(figures: dict) -> None:
    print(f"images from {figures['made_from']}: {figures['bytes_per_image'] / 1e3:.0f} kB and "
          f"{figures['pixels_per_image']:.0f} pixels each; {figures['workers']} workers, "
          f"{figures['cores']} cores")  # fmt: skip
    for row in figures["rows"]:
        parts = ", ".join(
            f"{step} {row[step]['wall_s']:.1f} s ({row[step]['cpu_s']:.1f} CPU s)"
            for step in ("hash", "search", "group")
        )
        print(f"{row['images']:8} images: {parts}; {row['pairs']} near pairs, {row['groups']} groups")
    for step, growth in figures["fits"].items():
        print(f"{step}: grows as n**{growth['exponent']:.2f} (CPU seconds); a million: {growth['million_wall_s']:.0f} s by "
              f"wall time, {growth['million_cpu_s']:.0f} s by CPU seconds over the workers")  # fmt: skip
    made_up = figures["made_up_hashes"]
    print(f"search of {made_up['hashes']} made-up hashes: {made_up['wall_s']:.1f} s ({made_up['cpu_s']:.1f} CPU s)")


def fit(sizes: Sequence[int], seconds: Sequence[dict], workers: int) -> dict:
    """Exponents of seconds over sizes, and seconds for a million by them (no less than in proportion)."""
    logs = np.log(sizes)

    def power(key: str) -> float:
        return float(np.polyfit(logs, np.log([max(row[key], 1e-6) for row in seconds]), 1)[0])

    def million(key: str) -> float:
        return seconds[-1][key] * (MILLION / sizes[-1]) ** max(1.0, power(key))

    return {"exponent": power("cpu_s"), "exponent_wall": power("wall_s"), "million_wall_s": million("wall_s"),
            "million_cpu_s": million("cpu_s") / workers}  # fmt: skip


def timed(function: Callable) -> tuple:
    """(the function's value, {"wall_s", "cpu_s"}); CPU seconds include ended child processes."""

    def cpu() -> float:
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in spent)

    wall, before = time.perf_counter(), cpu()
    value = function()
    return value, {"wall_s": time.perf_counter() - wall, "cpu_s": cpu() - before}


def hash_files(files: Iterable[str], workers: int) -> list[ImageHashes]:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(hash_file, max_pixels=MAX_PIXELS), files, chunksize=CHUNK))


def turned(hashes: np.ndarray, number: int) -> np.ndarray:
    """uint8[number, 32] hashes, drawn from `hashes` and with a tenth of their bits flipped."""
    generator = np.random.default_rng(0)
    made_up = hashes[generator.integers(0, len(hashes), number)]
    for start in range(0, number, 1 << 16):
        block = made_up[start : start + (1 << 16)]
        block ^= np.packbits(generator.random((len(block), 256), np.float32) < TURNED_SHARE, axis=1)
    return made_up


def tree_images(root: Path) -> list[str]:
    """The image files that a tree's records name, each once."""
    tree = Tree(root)
    names = {raw["image"] for file in tree.files for raw in tree.contents(file).raws}
    return [str(root / name) for name in sorted(names)]


def phantom_files(folder: Path) -> list[str]:
    """Phantoms of every subset as PNG, ten each."""
    folder.mkdir()
    source, files = PhantomSource(0, 10, 10), []
    for subset in source.subsets:
        records = source.records(subset.name, "train")
        for index in range(len(records)):
            files.append(str(folder / f"{subset.name}-{index}.png"))
            Image.fromarray(records.image(index)).save(files[-1])
    return files


def write_image(pictures: Sequence[str], folder: Path, longest_side: int, index: int) -> str:
    """Writes the image number `index` (see the module's docstring) and returns its file."""
    # A copy repeats the draws of the image before it, except the format's.
    of = index - 1 if index % 10 == 9 else index
    generator = np.random.default_rng((0, of))
    image = Image.fromarray(load_image(pictures[of % len(pictures)], MAX_PIXELS))
    width, height = image.size
    left, top, right, low = generator.uniform(0, 0.12, 4) * (width, height, width, height)
    image = image.crop((round(left), round(top), round(width - right), round(height - low)))
    gain, shift = generator.uniform(0.85, 1.15), generator.uniform(-15, 15)
    image = image.point(lambda grey: min(255, max(0, grey * gain + shift)))
    factor = longest_side / max(image.size) if longest_side else generator.uniform(0.8, 1.2)
    size = [max(1, round(side * factor)) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    form = FORMATS[np.random.default_rng((1, index)).integers(len(FORMATS))]
    path = folder / f"{index:07}.{form.lower()}"
    image.save(path, form, **({"quality": 75 + index % 21} if form == "JPEG" else {}))
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
