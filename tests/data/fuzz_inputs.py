"""Broken files by the thousand, given to the product's own readers: each must be taken rightly or refused.

    PYTHONPATH=. python tests/data/fuzz_inputs.py ../shared/data/medmat-mini --count 20000 --seed 0

Starts from files of the image pack and from pydicom's own. What hangs, kills its process, raises anything but a
DataError, takes memory past a bound, names a patient, or gives no uint8[h, w, 3] is a failure; its input is kept, and
the exit status is 1. The same seed gives the same inputs, whatever the number of workers.
"""

import argparse
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random

import numpy as np
from fuzz_mutations import IMAGE_CLASSES, JSON_CLASSES, mutated
from PIL import Image

from medcg_jax.data.images import image_size, read_image
from medcg_jax.data.reading import Reading
from medcg_jax.data.records import DataError
from medcg_jax.data.schema import detection_problems, image_path
from medcg_jax.data.tree import Contents, SubsetFile

IMAGES = ("jpeg", "png", "bmp", "gif", "tiff", "webp", "ppm", "dicom", "dicom_compressed")
KINDS = (*IMAGES, "json_choice", "json_detection")
MAX_PIXELS = 2**22
MAX_SECONDS = 10.0
# A square of MAX_PIXELS is 12 MiB of RGB; deep greys, a copy turned upright and what decoders keep are some times that.
MAX_GROWTH_BYTES = 256 * 2**20
ADDRESS_SPACE_BYTES = 4 * 2**30
PATIENTS = ("CompressedSamples", "1CT1", "4MR1")
READINGS = (
    Reading(),
    Reading(window="lung", frame="first"),
    Reading(window="40/400", deep_grey="window", frame="last"),
    Reading(deep_grey="percentile", frame="0"),
)
COMPRESSED = (
    "MR_small_RLE.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_small_odd_jpeg.dcm",
    "MR_small_jp2klossless.dcm", "SC_rgb_gdcm_KY.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jls_lossy_line.dcm",
    "JPEGLSNearLossless_16.dcm", "SC_rgb_jpeg_gdcm.dcm",
)  # fmt: skip


@dataclass
class Result:
    """Numbers of inputs by (kind, class), the worst of each kind, and what failed."""

    taken: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    slowest_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    growth_bytes: int = 0
    failures: list[str] = field(default_factory=list)


@cache
def seeds(kind: str, pack: Path) -> tuple[bytes, ...]:
    """The unbroken files that mutations of one kind start from."""
    hostile, odd = pack / "hostile", pack / "odd-formats"
    if kind == "json_choice":
        return tuple(p.read_bytes() for p in sorted(hostile.glob("*.json")) if not p.name.startswith(("det", "exp")))
    if kind == "json_detection":
        lists = (json.loads(p.read_text())[:3] for p in sorted((pack / "Aggregated_Subsets").glob("*-det-train.json")))
        return (hostile / "det_bad_boxes.json").read_bytes(), *(json.dumps(found, indent=1).encode() for found in lists)
    if kind.startswith("dicom"):
        from pydicom.data import get_testdata_file

        plain = ("MR_small_padded.dcm", "SC_ybr_full_422_uncompressed.dcm")
        names = COMPRESSED if kind == "dicom_compressed" else plain
        found = [Path(get_testdata_file(name, download=False)) for name in names]
        return tuple(p.read_bytes() for p in found + (sorted(odd.glob("*.dcm")) if kind == "dicom" else []))
    if kind in ("webp", "ppm"):
        return tuple(_made(kind, number) for number in range(4))
    ends = {"jpeg": (".jpg", ".jpeg"), "tiff": (".tiff",)}.get(kind, (f".{kind}",))
    folders = (pack / "med-mat", pack / "odd-formats")
    of_kind = [p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in ends]
    # Small ones are quick, and more of their bytes are headers.
    small = sorted(of_kind, key=lambda p: (p.stat().st_size, p.name))[:6]
    odd_ones = [p for p in sorted((hostile / "images").iterdir()) if p.suffix in ends and "bomb" not in p.name]
    return tuple(content for content in (p.read_bytes() for p in small + odd_ones) if len(content) > 100)


def _made(kind: str, number: int) -> bytes:
    """Small files of formats that the pack has none of: lossless and lossy, turned, grey, of 16 bits, in plain text."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
    if kind == "ppm":
        plain = b"P3\n# made\n32 24 255\n" + " ".join(map(str, pixels.ravel())).encode()
        heads = (b"P6 32 24 255\n", b"P5 96 24 255\n", b"P5 48 24 4095\n")
        return plain if number == 3 else heads[number] + pixels.tobytes()
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = (1, 6, 8, 3)[number]
    Image.fromarray(pixels).save(out, "WEBP", lossless=number % 2 == 0, exif=exif)
    return out.getvalue()


def make(seed: int, index: int, pack: Path) -> tuple[str, str, bytes, Random]:
    """(kind, class, content, the source of further choices) of one input."""
    kind = KINDS[index % len(KINDS)]
    classes = JSON_CLASSES if kind.startswith("json") else IMAGE_CLASSES
    where = classes[index // len(KINDS) % len(classes)]
    random = Random(f"{seed}/{index}")
    return kind, where, mutated(kind, where, random.choice(seeds(kind, pack)), random), random


def read_one(kind: str, content: bytes, random: Random, pack: Path, scratch: Path) -> bool:
    """Whether the product takes the input; it is refused with a DataError of one line that names no patient.

    Raises:
      AssertionError: what it says or gives is not as it must be; anything else: what it lets through.
    """
    try:
        if kind.startswith("json"):
            return _read_json(kind, content, pack, scratch)
        reading = random.choice(READINGS)
        try:
            size = image_size(content, MAX_PIXELS)
        except DataError:
            size = None
        found, how = read_image(content, MAX_PIXELS, reading)
    except DataError as error:
        said = str(error)
        assert "\n" not in said and said, f"message {said!r}"
        assert not any(name in said for name in PATIENTS), f"message {said!r}"
        return False
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3, f"{found.dtype}{found.shape}"
    assert 0 < found.shape[0] * found.shape[1] <= MAX_PIXELS, found.shape
    assert size == found.shape[:2], f"header says {size}, pixels {found.shape}"
    assert not any(name in how for name in PATIENTS), how
    return True


def _read_json(kind: str, content: bytes, pack: Path, scratch: Path) -> bool:
    path = scratch / "Subset--04-train.json"
    path.write_bytes(content)
    wrong = None
    file = SubsetFile(path, "04", "train", kind != "json_choice")
    for entry in Contents(file, partial(image_path, pack)).entries:
        assert "\n" not in str(entry.error), f"message {str(entry.error)!r}"
        wrong = wrong or entry.error
        if entry.error is None and file.detection:
            for _, reason in detection_problems(entry.raw, (entry.raw["height"], entry.raw["width"])):
                wrong = wrong or DataError(reason)
        elif entry.error is None:
            assert entry.record.label and entry.record.answer, entry
            repr(entry.record).encode()
    if wrong:
        raise wrong
    return True


@dataclass(frozen=True)
class Subject:
    """What is fuzzed; its functions are a module's own, so that another process finds them."""

    make: Callable[[int, int, Path], tuple[str, str, bytes, Random]] = make
    # Reads every unbroken file once, so that what a library takes for itself is no growth: `warm(pack, scratch)`.
    warm: Callable[[Path, Path], None] | None = None
    address_space_bytes: int = ADDRESS_SPACE_BYTES
    max_seconds: float | None = None


def _warm(pack: Path, scratch: Path) -> None:
    for kind in KINDS:
        for content in seeds(kind, pack):
            read_one(kind, content, Random(0), pack, scratch)


def _work(pipe, seed: int, pack: Path, read: Callable, subject: Subject) -> None:
    """Reads inputs by their index until None comes: (taken, seconds, peak growth in bytes, what failed) of each."""
    # Decoders written in C complain on standard error themselves.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_AS, (subject.address_space_bytes, subject.address_space_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as scratch:
        (subject.warm or _warm)(pack, Path(scratch))
        start = _peak_bytes()
        pipe.send("ready")
        while (index := pipe.recv()) is not None:
            kind, _, content, random = subject.make(seed, index, pack)
            began, taken, failure = time.monotonic(), False, ""
            try:
                taken = read(kind, content, random, pack, Path(scratch))
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"
            growth = _peak_bytes() - start
            if growth > MAX_GROWTH_BYTES and not failure:
                failure = f"took {growth / 2**20:.0f} MiB"
            pipe.send((taken, time.monotonic() - began, growth, failure))
            if growth > MAX_GROWTH_BYTES:
                # The peak never falls: the next inputs need a fresh process.
                return


def _peak_bytes() -> int:
    # Not getrusage's, which a process that is started takes over from the one that starts it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class _Worker:
    """One process and the input that it is at."""

    def __init__(self, seed: int, pack: Path, read: Callable, subject: Subject):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, seed, pack, read, subject), daemon=True)
        self.process.start()
        self.max_seconds = subject.max_seconds or MAX_SECONDS
        theirs.close()
        if not self.pipe.poll(180) or self.pipe.recv() != "ready":
            raise RuntimeError("a worker does not start")

    def give(self, index: int) -> None:
        self.pipe.send(index)
        self.index, self.began, self.used_s = index, time.monotonic(), self._cpu_s()

    @property
    def is_late(self) -> bool:
        """Whether the input has taken too much processor time, or thrice the time while others kept the machine busy."""
        waited_s = time.monotonic() - self.began
        return waited_s > 3 * self.max_seconds or self._cpu_s() - self.used_s > self.max_seconds

    def _cpu_s(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has died
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(
    pack: Path, count: int, seed: int, workers: int, keep: Path, read: Callable = read_one, subject: Subject = Subject()
) -> Result:
    """Gives `count` inputs to `read`; those that fail are kept as files in the folder `keep`."""
    result, left = Result(), iter(range(count))
    pool = [_Worker(seed, pack, read, subject) for _ in range(workers)]
    for worker in pool:
        worker.give(next(left))
    while pool:
        multiprocessing.connection.wait([worker.pipe for worker in pool], timeout=0.2)
        for worker in list(pool):
            failure, answer, alive = "", None, True
            if worker.pipe.poll():
                try:
                    answer = worker.pipe.recv()
                    alive = answer[2] <= MAX_GROWTH_BYTES
                except EOFError:
                    worker.process.join()
                    failure, alive = f"killed its process ({worker.process.exitcode})", False
            elif worker.is_late:
                failure, alive = f"no answer in {worker.max_seconds:.0f} s", False
            else:
                continue
            kind, where, content, _ = subject.make(seed, worker.index, pack)
            if answer:
                taken, seconds, growth, failure = answer
                (result.taken if taken else result.refused)[kind, where] += 1
                result.slowest_s[kind] = max(result.slowest_s[kind], seconds)
                result.growth_bytes = max(result.growth_bytes, growth)
            if failure:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{worker.index}.{kind}").write_bytes(content)
                result.failures.append(f"seed {seed}, input {worker.index}, {kind}, {where}: {failure}")
            index = next(left, None)
            if index is None or not alive:
                worker.end()
                pool.remove(worker)
            if index is not None:
                if not alive:
                    worker = _Worker(seed, pack, read, subject)
                    pool.append(worker)
                worker.give(index)
    return result


def print_result(result: Result) -> None:
    print(f"{'kind':18}{'class':12}{'taken':>8}{'refused':>9}")
    for kind, where in sorted(result.taken | result.refused):
        print(f"{kind:18}{where:12}{result.taken[kind, where]:8}{result.refused[kind, where]:9}")
    print(f"{'all':30}{result.taken.total():8}{result.refused.total():9}")
    print("slowest, ms: " + ", ".join(f"{kind} {s * 1000:.0f}" for kind, s in sorted(result.slowest_s.items())))
    print(f"greatest growth of a process: {result.growth_bytes / 2**20:.0f} MiB")
    print(f"failures: {len(result.failures)}")
    for failure in result.failures[:50]:
        print(f"  {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path, help="folder of the image pack, medmat-mini")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "medcg-fuzz")
    args = parser.parse_args()
    began = time.monotonic()
    result = fuzz(args.pack.resolve(), args.count, args.seed, args.workers, args.keep)
    print_result(result)
    print(f"{args.count} inputs of seed {args.seed} in {time.monotonic() - began:.0f} s")
    if result.failures:
        print(f"inputs that failed are in {args.keep}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
