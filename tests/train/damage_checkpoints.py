"""Checkpoints damaged in every way: each must be noticed and named, none loaded, and the one before it taken.

    python tests/train/damage_checkpoints.py --number=200 FOLDER

Of every kind of file in a checkpoint (and in parameters that `save_params` wrote) one bit is turned, the file is
removed, cut off, or exchanged with another one of the same checkpoint or of another step; and a file is added. Every
fifth time the older checkpoint is damaged too, and the run must stop with the names.
"""

import argparse
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
from train_toys import CONFIG, TRAIN, run, same_bits, setup

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.mesh import make_mesh
from medcg_jax.train.checkpoint import CheckpointError, Checkpoints, load_params, save_params
from medcg_jax.train.optim import hparams_from
from medcg_jax.train.step import with_shardings

OLD, NEW = 1, 2
Damage = Callable[[Path, Path, random.Random], str]


def one_bit(path: Path, top: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path.name


def missing(path: Path, top: Path, rng: random.Random) -> str:
    path.unlink()
    return path.name


def truncated(path: Path, top: Path, rng: random.Random) -> str:
    os.truncate(path, rng.randrange(path.stat().st_size))
    return path.name


def swapped(path: Path, top: Path, rng: random.Random) -> str:
    """With any other file of the same checkpoint that has other bytes."""
    data = path.read_bytes()
    other = rng.choice([p for p in sorted(top.rglob("*")) if p.is_file() and p.read_bytes() != data])
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"{path.name}|{other.name}"


def of_another_step(path: Path, top: Path, rng: random.Random) -> str:
    """A file of the same kind, of the checkpoint before."""
    data = path.read_bytes()
    others = [p for p in files(top.parent / str(OLD)).get(kind(path, top), []) if p.read_bytes() != data]
    if not others:
        return ""
    path.write_bytes(rng.choice(others).read_bytes())
    # Digests of another step are whole by themselves: what is named is a file that they do not fit.
    return "state/|meta.json" if path.name.startswith("checksums") else path.name


def added(path: Path, top: Path, rng: random.Random) -> str:
    new = path.with_name(f"{path.name}.{rng.randrange(1 << 32):x}")
    new.write_bytes(path.read_bytes())
    return new.name


DAMAGES: tuple[Damage, ...] = (one_bit, missing, truncated, swapped, of_another_step, added)


def kind(path: Path, top: Path) -> str:
    """The file's place in the checkpoint, without digests and numbers of its own."""
    return re.sub(r"[0-9a-f]{16,}", "*", path.relative_to(top).as_posix())


def files(top: Path) -> dict[str, list[Path]]:
    """Kind -> its files that hold anything."""
    found: dict[str, list[Path]] = {}
    for path in sorted(top.rglob("*")):
        if path.is_file() and path.stat().st_size:
            found.setdefault(kind(path, top), []).append(path)
    return found


def run_all(folder: Path, number: int, seed: int) -> Counter:
    """(kind, damage) -> times that it was done, and noticed; `number` times in all, every kind and damage in turn.

    Raises:
      AssertionError: damage was not noticed, not named, or loaded.
    """
    rng, done = random.Random(seed), Counter()
    program, trainable, frozen = setup()
    hparams = [hparams_from(TRAIN, 1)]
    old, _ = run(program, trainable, frozen, hparams, OLD)
    whole = Checkpoints(folder / "whole")
    whole.save(OLD, old, {"position": OLD})
    whole.wait()
    kept = jax.device_get(old)
    new, _ = run(program, trainable, frozen, hparams, NEW - OLD, state=old)
    whole.save(NEW, new, {"position": NEW})
    whole.close()
    wanted = with_shardings(new, jax.tree.map(lambda x: x.sharding, new))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    save_params(folder / "parameters", build.join(trainable, frozen), CONFIG)
    ways = [(name, damage, False) for name in files(folder / "whole" / str(NEW)) for damage in DAMAGES]
    ways += [(name, damage, True) for name in files(folder / "parameters") for damage in DAMAGES[:4]]
    rng.shuffle(ways)
    place = 0
    while sum(done.values()) < number:
        name, damage, of_parameters = ways[place % len(ways)]
        place += 1
        both = place % 5 == 0 and not of_parameters
        if of_parameters:
            noticed = damage_parameters(folder, name, damage, rng, mesh)
        else:
            noticed = damage_one(folder, name, damage, both, rng, wanted, kept)
        if noticed:
            done["parameters: " + name if of_parameters else name, damage.__name__] += 1
    return done


def damage_one(folder: Path, name: str, damage: Damage, both: bool, rng: random.Random, wanted, kept) -> bool:
    """False where the damage would change nothing."""
    trial = folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(folder / "whole", trial / "c")
    top = trial / "c" / str(NEW)
    names = damage(rng.choice(files(top)[name]), top, rng)
    if not names:
        return False
    if both:
        other = trial / "c" / str(OLD)
        one_bit(rng.choice(rng.choice(list(files(other).values()))), other, rng)
    said, read = [], []
    store = Checkpoints(trial / "c", report=said.append)
    store._read = lambda path, step, abstract: (read.append(step), Checkpoints._read(store, path, step, abstract))[1]
    try:
        found, _ = store.restore(wanted)
    except CheckpointError as error:
        assert both, (name, damage.__name__, error)
        assert any(part in str(error) for part in names.split("|")) and not read, (names, str(error), read)
    else:
        assert not both and read == [OLD] and same_bits(found, kept), (name, damage.__name__, read)
        assert len(said) == 1 == len(store.skipped) and f"checkpoint {NEW} is damaged" in said[0], said
        assert any(part in said[0] for part in names.split("|")), (names, said)
        assert (trial / f"c-damaged-{NEW}").is_dir() and store.steps() == [OLD]
    finally:
        store.close()
    return True


def damage_parameters(folder: Path, name: str, damage: Damage, rng: random.Random, mesh) -> bool:
    trial = folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(folder / "parameters", trial)
    names = damage(rng.choice(files(trial)[name]), trial, rng)
    try:
        load_params(trial, CONFIG, mesh)
    except CheckpointError as error:
        assert any(part in str(error) for part in names.split("|")), (names, str(error))
        return True
    raise AssertionError(f"{name}, {damage.__name__}: loaded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    began = time.monotonic()
    done = run_all(args.folder, args.number, args.seed)
    columns = [damage.__name__ for damage in DAMAGES]
    print(f"{'file':52}" + "".join(f"{column:>16}" for column in columns))
    for name in dict.fromkeys(name for name, _ in done):
        print(f"{name:52}" + "".join(f"{done[name, column]:16}" for column in columns))
    print(f"{sum(done.values())} damaged, all noticed and named, none loaded; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
