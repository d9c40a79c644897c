"""How much memory `medcg convert` takes, both ways: `python -m benchmarks.convert_memory [--gigabytes=4]`.

Writes a LLaVA-1.5 of the released width and less depth with random numbers, in four shards, converts it to Orbax and back
in a child process each, and watches the child's peaks: all its memory (VmHWM, with mapped files and libraries) and its
private memory (RssAnon). Then every tensor is compared with its original, and all files are deleted. Reads /proc: Linux
only.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medcg_jax.config import RunError
from medcg_jax.families import build
from medcg_jax.families.llava.model import LlavaConfig, llava15_7b
from medcg_jax.families.weights import engine, llava
from medcg_jax.families.weights.files import open_tensors, write_safetensors

# The most memory of a conversion, as a multiple of the largest shard.
LIMIT = 1.3
NUM_SHARDS = 4
LIMIT_S = 240
GB = 1e9


def main(argv: list[str] | None = None) -> int:
    """0: both conversions stayed below the limit, and every tensor came back; 1: not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint that is made")
    parser.add_argument("--dir", default=None, help="a folder with room for three times that")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        result = measure(Path(folder), of_size(args.gigabytes * GB), int(args.gigabytes * GB / NUM_SHARDS))
    print(json.dumps(result))
    return 0 if result["below_limit"] else 1


def of_size(num_bytes: float) -> LlavaConfig:
    """LLaVA-1.5 at the released width, with as many layers as fill `num_bytes` in 16 bits; at least one."""
    config = llava15_7b()
    deep, flat = (build.num_params(build.abstract(with_layers(config, layers))[1]) for layers in (2, 1))
    return with_layers(config, max(1, round((num_bytes / 2 - flat) / (deep - flat)) + 1))


def with_layers(config: LlavaConfig, num_layers: int) -> LlavaConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=num_layers))


def measure(folder: Path, config: LlavaConfig, shard_bytes: int) -> dict:
    """Peaks in bytes of both conversions of a checkpoint of this architecture, and whether they are below the limit.

    Raises:
      RunError: a conversion failed, took too long, or changed a tensor.
    """
    src, there, back = (folder / name for name in ("src", "orbax", "hf"))
    write_random(src, config, shard_bytes)
    sizes = [file.stat().st_size for file in src.glob("*.safetensors")]
    limit = LIMIT * max(sizes)
    result = {"bytes": sum(sizes), "largest_shard": max(sizes), "limit": int(limit)}
    print(f"{len(sizes)} files:", ", ".join(f"{name} {value / GB:.2f} GB" for name, value in result.items()))
    for to, source, target in (("orbax", src, there), ("hf", there, back)):
        result[to] = watched([sys.executable, "-m", "medcg_jax.cli", "convert", str(source), str(target), f"--to={to}"])
        print(f"to {to}: VmHWM {result[to]['VmHWM'] / GB:.2f} GB, RssAnon {result[to]['RssAnon'] / GB:.2f} GB, "
              f"{result[to]['seconds']:.0f} s")  # fmt: skip
    result["compared"] = compare(src, back)
    result["below_limit"] = all(result[to]["VmHWM"] < limit for to in ("orbax", "hf"))
    verdict = "below" if result["below_limit"] else "ABOVE"
    print(f"{result['compared']} tensors came back bit for bit; {verdict} the limit")
    return result


def write_random(directory: Path, config: LlavaConfig, shard_bytes: int) -> None:
    """A release with random float16 numbers between -2 and 2, one tensor in memory at a time."""
    rng = np.random.default_rng(0)
    slots = engine.slots(llava.table(config), build.abstract(config)[1])
    specs = {llava.released_name(name): (slot.released_shape, np.dtype(np.float16)) for name, slot in slots.items()}

    def tensors():
        for name, (shape, _) in specs.items():
            # Random bits without the exponent's highest: no infinity, no NaN.
            yield name, (rng.integers(0, 2**16, shape, np.uint16) & 0xBFFF).view(np.float16)

    directory.mkdir(parents=True)
    write_safetensors(directory, specs, tensors(), max_file_bytes=shard_bytes)
    (directory / "config.json").write_text(json.dumps(llava.config_to_json(config, "float16")))


def watched(command: list[str]) -> dict:
    """The command's peaks {"VmHWM", "RssAnon"} in bytes, and its "seconds"."""
    began, peaks = time.monotonic(), {"VmHWM": 0, "RssAnon": 0}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        while process.poll() is None:
            if time.monotonic() - began > LIMIT_S:
                raise RunError(f"{' '.join(command)}: not done after {LIMIT_S} s")
            for name, value in memory_of(process.pid).items():
                peaks[name] = max(peaks[name], value)
            time.sleep(0.01)
    finally:
        process.kill()
        output = process.communicate()[0]
    if process.returncode:
        raise RunError(f"{' '.join(command)}: exit status {process.returncode}: {output[-500:]}")
    return {**peaks, "seconds": time.monotonic() - began}


def memory_of(pid: int) -> dict[str, int]:
    """{"VmHWM", "RssAnon"} of a process in bytes; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon") if name in fields}


def compare(before: Path, after: Path) -> int:
    """The number of tensors of `before`, all of which are in `after` bit for bit.

    Raises:
      RunError: a tensor is missing or differs.
    """
    ours, theirs = open_tensors(before), open_tensors(after)
    for name, shape in ours.shapes.items():
        value = theirs.read(name) if name in theirs.shapes else np.zeros(0)
        # Rows beyond the vocabulary are added for the image token.
        if value[: shape[0]].tobytes() != ours.read(name).tobytes():
            raise RunError(f"{name} did not come back as it was")
    return len(ours.shapes)


if __name__ == "__main__":
    sys.exit(main())
