"""What is said where memory does not suffice: how much was asked for, in GiB, and which settings need less."""

import re

GIB = 1 << 30
# "Out of memory allocating 1038058823872 bytes", "trying to allocate 12884901888 bytes", as XLA writes it; libtpu
# writes "Used 26.32G of 15.75G hbm" or "(26.32G) exceeds available HBM (15.75G)".
_BYTES = re.compile(r"allocat\w*(?: of)? (\d+)\s?(?:bytes|B)\b", re.IGNORECASE)
_NUMBER = r"\(?([\d.]+)([KMGT])\)?"
_USED = re.compile(rf"{_NUMBER} (?:of|exceeds available HBM) {_NUMBER}", re.IGNORECASE)
_UNITS = {"K": 1 / (1 << 20), "M": 1 / (1 << 10), "G": 1.0, "T": 1024.0}
TRAINING = (
    "a smaller train.batch_size or, with the same results, a larger train.accumulation_steps or model.remat=full need "
    "less; so do model.base_dtype=bfloat16 and a larger mesh.fsdp"
)
TESTS = "a smaller eval.batch_size, which changes no prediction, and a larger mesh.fsdp need less"
# Verb -> what needs less.
ADVICE = {"train": TRAINING, "reproduce": f"{TRAINING}; tests: {TESTS}; fewer study.cells_at_once", "eval": TESTS}
ADVICE |= {"bench": TRAINING}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA, or a plan of its programs, has found that memory does not suffice."""
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def gib(count: float) -> str:
    """Bytes in GiB, with as many decimals as tell them apart: "966.8 GiB", "15.75 GiB", "0.0031 GiB"."""
    size = count / GIB
    return f"{size:,.1f} GiB" if size >= 100 else f"{size:.2f} GiB" if size >= 0.1 or not size else f"{size:.2g} GiB"


def asked_for(text: str) -> str:
    """How much memory an error of XLA is about, in words; its first line where it names no bytes."""
    if match := _USED.search(text):
        used, free = (float(match[i]) * _UNITS[match[i + 1].upper()] * GIB for i in (1, 3))
        return f"{gib(used)} were needed of the device's {gib(free)}"
    if match := _BYTES.search(text):
        return f"{gib(int(match[1]))} were asked for at once"
    return text.partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


def explained(error: BaseException, verb: str) -> str:
    """One line about an error of `is_out_of_memory`, with what to change. verb: of `medcg`."""
    advice = ADVICE.get(verb)
    plan = "; `medcg plan --config=... --topology=local` says what a run needs before it starts"
    return f"does not fit in memory: {asked_for(str(error))}" + (f"; {advice}{plan}" if advice else "")
