"""LLaVA-1.5-7B at its full size on a CPU, once: `python -m benchmarks.full_size FOLDER --tokenizer=DIR`.

Writes the released layout with random weights, tensor by tensor, beside a real tokenizer (llava-hf/llava-1.5-7b-hf's);
then `medcg convert`, `medcg eval` of two records, and `medcg train` of adapters on a base of 4 bits, two steps of two
records, told to stop after the first and started again. For each: minutes, peak memory, and the longest time without a
line. FOLDER needs 45 GB; weights that are there are used again. Reads /proc: Linux only.
"""

import argparse
import dataclasses
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.convert_memory import memory_of
from benchmarks.records import write_record
from medcg_jax.config import RunError
from medcg_jax.families import build
from medcg_jax.families.llava.model import LlavaConfig, llava15_7b
from medcg_jax.families.weights import engine, llava
from medcg_jax.families.weights.files import write_safetensors

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "llava15_7b.py"
GIB = 2**30
SUBSET = "ct-brain-state"
# Two records of phantoms, in rows as short as they are; one device.
FEW = {
    "data.source": "phantom", "data.subsets": f"('{SUBSET}',)", "data.train_records_per_subset": 2,
    "data.test_records_per_subset": 2, "eval.batch_size": 2, "mesh.data": 1, "mesh.fsdp": 1,
}  # fmt: skip
TRAINING = {
    "train.batch_size": 2, "train.accumulation_steps": 1, "train.steps": 2, "train.checkpoint_every_steps": 1,
    "train.log_every_steps": 1,
}  # fmt: skip
FIRST_STEP = "step 1/2"


def main(argv: list[str] | None = None) -> int:
    """0: every record has a score, the loss is finite and the adapters are saved; 1: not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of llava-hf/llava-1.5-7b-hf's tokenizer")
    parser.add_argument("--layers", type=int, default=0, help="fewer of the decoder, to try the script; 0: all")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    result = measure(args.folder, args.tokenizer, of_depth(args.layers))
    print(json.dumps(result, indent=1))
    write_record(args.json, result)
    return 0 if result["holds"] else 1


def of_depth(num_layers: int) -> LlavaConfig:
    """LLaVA-1.5-7B with llava-hf's token ids and padded vocabulary, and so many layers of the decoder; 0: all."""
    config = llava15_7b()
    text = dataclasses.replace(config.text, num_layers=num_layers or config.text.num_layers, vocab_size=32064)
    return dataclasses.replace(config, text=text, image_token_id=32000, pad_token_id=32001)


def measure(folder: Path, tokenizer: Path, config: LlavaConfig) -> dict:
    """Minutes, peak GiB and longest silence of each command; what came out; whether it is what must hold."""
    release, converted = folder / "release", folder / "converted"
    result: dict = {"parameters": build.num_params(build.abstract(config)[1]), "cores": os.cpu_count()}
    began = time.monotonic()
    if not (release / "config.json").is_file():
        write_release(release, tokenizer, config)
    result["write"] = {"minutes": minutes(began)}
    shutil.rmtree(converted, ignore_errors=True)
    result["convert"] = watched("convert", str(release), str(converted))
    flags = {"model.name": "auto", "model.checkpoint": converted, **FEW}
    tested, trained = (folder / name for name in ("eval", "qlora"))
    for workdir in (tested, trained):
        shutil.rmtree(workdir, ignore_errors=True)
    result["eval"] = watched("eval", *arguments(CONFIG, flags, tested))
    qlora = arguments(f"{CONFIG}:qlora", flags | TRAINING, trained)
    result["first step"] = watched("train", *qlora, stop_at=FIRST_STEP)
    result["resumed"] = watched("train", *qlora)
    scores = [json.loads(line)["logprobs"] for line in (tested / "predictions" / f"{SUBSET}.jsonl").open()]
    losses = [json.loads(line)["loss"] for line in (trained / "metrics" / "train.jsonl").open()]
    result |= {"scores": scores, "losses": losses, "saved": sorted(p.name for p in (trained / "params").iterdir())}
    result["minutes"] = minutes(began)
    finite = all(map(math.isfinite, [*losses, *(x for each in scores for x in each)]))
    result["holds"] = finite and len(scores) == len(losses) == 2 and "model.json" in result["saved"]
    return result


def arguments(config: str | Path, fields: dict, workdir: Path) -> list[str]:
    return [f"--config={config}", *(f"--config.{key}={value}" for key, value in fields.items()), f"--workdir={workdir}"]


def write_release(folder: Path, tokenizer: Path, config: LlavaConfig) -> None:
    """A release with random bfloat16 weights as a new model's (0.02), one tensor in memory at a time."""
    rng = np.random.default_rng(0)
    slots = engine.slots(llava.table(config), build.abstract(config)[1])
    specs = {llava.released_name(n): (slot.released_shape, np.dtype(ml_dtypes.bfloat16)) for n, slot in slots.items()}

    def tensors():
        for number, (name, (shape, dtype)) in enumerate(specs.items()):
            if number % 50 == 0:
                print(f"writing tensor {number} of {len(specs)}", flush=True)
            if len(shape) > 1:
                value = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            else:
                value = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
            yield name, value.astype(dtype)

    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)
    write_safetensors(folder, specs, tensors())
    (folder / "config.json").write_text(json.dumps(llava.config_to_json(config, "bfloat16")))


def watched(verb: str, *words: str, stop_at: str = "") -> dict:
    """{"minutes", "peak_gib", "private_gib", "silent_s"} of a command, whose lines are printed on.

    stop_at: words of a line after which the command is told to stop (SIGTERM), which it answers with status 75.

    Raises:
      RunError: another exit status.
    """
    print(f"-- medcg {verb}", flush=True)
    began = last = time.monotonic()
    silent, peaks, told = 0.0, {"VmHWM": 0, "RssAnon": 0}, False
    command = [sys.executable, "-m", "medcg_jax", verb, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while process.poll() is None:
                ready = selector.select(0.2)
                for name, value in memory_of(process.pid).items():
                    peaks[name] = max(peaks[name], value)
                text = process.stdout.read() if ready else ""
                if text:
                    print(text, end="", flush=True)
                    silent, last = max(silent, time.monotonic() - last), time.monotonic()
                    if stop_at and not told and stop_at in text:
                        process.send_signal(signal.SIGTERM)
                        told = True
        print(process.stdout.read() or "", end="", flush=True)
    if process.returncode != (os.EX_TEMPFAIL if told else 0):
        raise RunError(f"medcg {verb}: exit status {process.returncode}")
    silent = max(silent, time.monotonic() - last)
    peak, private = (round(peaks[name] / GIB, 2) for name in ("VmHWM", "RssAnon"))
    return {"minutes": minutes(began), "peak_gib": peak, "private_gib": private, "silent_s": round(silent, 1)}


def minutes(began: float) -> float:
    return round((time.monotonic() - began) / 60, 2)


if __name__ == "__main__":
    sys.exit(main())
