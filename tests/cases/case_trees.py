"""Rows about Med-MAT trees, label tables and prepared folders."""

import json
import os
import shutil
from pathlib import Path

from harness import SHARED, medcg, refused, told

HOSTILE, INPUTS = SHARED / "cases" / "hostile", SHARED / "cases" / "inputs"
TRAIN = (
    "--config=configs/phantom.py:tiny", "--config.data.source=release", "--config.data.max_text_tokens=120",
    "--config.data.max_target_tokens=4", "--config.train.batch_size=2", "--config.eval.batch_size=2",
    "--config.data.subsets=('03',)",
)  # fmt: skip
FORMAT = ("--subset=mine", "--modality=MRI", "--area=Knee")


def empty_tree(folder: Path) -> Path:
    tree = folder / "tree"
    (tree / "Aggregated_Subsets").mkdir(parents=True)
    return tree


def fifo_subset_file(folder: Path) -> str:
    tree = empty_tree(folder)
    os.mkfifo(tree / "Aggregated_Subsets" / "Subset--66-train.json")
    for verb in (("data", "ledger", tree), ("data", "prepare", tree, folder / "out")):
        result = medcg(*verb)
        assert result.seconds < 10 and result.status in (0, 1, 2), (verb, result.status)
        assert "Traceback" not in result.text, verb
    return told(medcg("data", "check", tree), "Subset--66-train.json", "regular file", status=(1, 2))


def subset_file_dev_zero(folder: Path) -> str:
    tree = empty_tree(folder)
    (tree / "Aggregated_Subsets" / "Subset--66-train.json").symlink_to("/dev/zero")
    result = medcg("data", "check", tree)
    assert result.growth_mb < 500 and result.seconds < 10, (result.growth_mb, result.seconds)
    return told(result, "Subset--66-train.json", status=(1, 2))


def manifest_utf16(folder: Path) -> str:
    import trees

    tree = trees.write_tree(folder / "tree")
    shutil.copy(HOSTILE / "manifest_utf16" / "manifest.json", tree)
    return told(medcg("data", "check", tree), "manifest.json", "not UTF-8", status=(1, 2))


def prepare_records_link(folder: Path) -> str:
    import trees

    tree, victim, out = trees.write_tree(folder / "tree"), folder / "victim", folder / "out"
    victim.mkdir()
    (victim / ".bashrc").write_text("mine")
    out.mkdir()
    (out / ".examined.jsonl").touch()
    (out / "records").symlink_to(victim)
    line = refused(medcg("data", "prepare", tree, out), "records")
    assert os.listdir(victim) == [".bashrc"], os.listdir(victim)
    return line


def prepared_tree(folder: Path) -> Path:
    import trees

    trees.write_tree(folder / "tree")
    told(medcg("data", "prepare", folder / "tree", folder / "prepared", "--image=keep"))
    return folder / "prepared"


def prepared_manifest(folder: Path) -> str:
    prepared = prepared_tree(folder)
    path = prepared / "manifest.json"
    whole = json.loads(path.read_text())
    without_shards = json.loads(path.read_text())
    del without_shards["subsets"][0]["shards"]
    broken = (
        (HOSTILE / "prepared_manifest" / "manifest.json").read_text(), json.dumps(without_shards), '{"a":' * 100_000, "[]", "",
        json.dumps({**whole, "subsets": 5}), json.dumps({**whole, "subsets": [5]}),
    )  # fmt: skip
    for text in broken:
        path.write_text(text)
        line = told(medcg("data", "check", prepared), "manifest.json", status=(1, 2))
    return line


def prepared_shards_swapped(folder: Path) -> str:
    prepared = prepared_tree(folder)
    records = prepared / "records"
    train, test = (next(records.glob(f"04-{split}-*.arrayrecord")) for split in ("train", "test"))
    train.rename(folder / "kept")
    test.rename(train)
    (folder / "kept").rename(test)
    # As many records in both lists as in the shards, so that only what is in them differs.
    flags = (
        *TRAIN[:1],
        "--config.data.source=prepared",
        f"--config.data.root={prepared}",
        *TRAIN[2:-1],
        "--config.data.subsets=('04',)",
    )
    return refused(
        medcg("train", *flags, f"--workdir={folder / 'w'}", cwd=checkout(), timeout_s=120),
        "arrayrecord",
        max_seconds=60,
    )


def checkout() -> Path:
    from harness import CHECKOUT

    return CHECKOUT


def boxes_0_to_1(folder: Path) -> str:
    shutil.copytree(INPUTS / "boxes_0_to_1", folder / "here")
    result = medcg("data", "format", "boxes.csv", ".", *FORMAT, "--task=Meniscus Detection", cwd=folder / "here")
    return (
        told(result, "1", status=(0, 2))
        if result.status == 0 and "share" in result.text
        else refused(result, "boxes.csv")
    )


def deep_tree(name: str) -> Path:
    return INPUTS / name / "tree"


def detection_only_tree(folder: Path) -> str:
    here = shutil.copytree(INPUTS / "detection_only_tree", folder / "here")
    told(medcg("data", "format", "boxes.csv", ".", *FORMAT, "--task=Meniscus Detection", cwd=here))
    told(medcg("data", "check", ".", cwd=here))
    lines = []
    for verb in (("prepare", ".", "out", "--image=keep"), ("stats", ".", "st")):
        result = medcg("data", *verb, cwd=here)
        if result.status == 0:
            lines.append(told(result))
        else:
            lines.append(refused(result, "choice"))
            assert "is no Med-MAT tree" not in lines[-1], lines[-1]
    return " / ".join(lines)


def five_options(folder: Path) -> str:
    tree = deep_tree("five_options")
    check = medcg("data", "check", tree)
    if "options" in check.text:
        return told(check, "options", status=(0, 1, 2))
    flags = (*TRAIN, f"--config.data.root={tree}", f"--workdir={folder / 'w'}")
    for verb in ("train", "eval"):
        told(medcg(verb, *flags, cwd=checkout(), timeout_s=200))
    lines = [json.loads(line) for line in (folder / "w" / "predictions" / "03.jsonl").read_text().splitlines()]
    assert all(len(line["logprobs"]) == 5 for line in lines), lines[:1]
    return "five options are scored"


def image_token_in_question(folder: Path) -> str:
    tree = deep_tree("image_token_in_question")
    line = told(medcg("data", "check", tree), "<image>", status=(0, 1, 2))
    result = medcg(
        "train", *TRAIN, f"--config.data.root={tree}", f"--workdir={folder / 'w'}", cwd=checkout(), timeout_s=120
    )
    refused(result, "<image>", max_seconds=60)
    return line


def labels_look_alike(folder: Path) -> str:
    here = shutil.copytree(INPUTS / "labels_look_alike", folder / "here")
    for name in ("nfc_nfd", "spaces", "floats"):
        line = refused(
            medcg("data", "format", f"{name}.csv", ".", *FORMAT, "--task=Meniscus State", cwd=here), f"{name}.csv"
        )
    return line


NEAR_MISSES = (
    "Subset--03-Test.json", "Subset--03-test.jsonl", "Subset--03-test (1).json", "Subset--03-test.json.txt",
    "Subset--03_test.json", "Subset--03-val.json", "subset--03-test.json",
)  # fmt: skip


def subset_name_near_miss(folder: Path) -> str:
    for number, name in enumerate(NEAR_MISSES):
        tree = shutil.copytree(deep_tree("subset_name_near_miss"), folder / f"tree{number}")
        where = tree / "Aggregated_Subsets"
        (where / "Subset--03-Test.json").rename(where / name)
        told(medcg("data", "check", tree), name, status=(0, 1, 2))
        result = medcg("data", "prepare", tree, folder / f"out{number}", "--image=keep")
        line = told(result, name, status=(0, 1, 2))
    flags = (*TRAIN, f"--config.data.root={tree}", f"--workdir={folder / 'w'}")
    told(medcg("train", *flags, cwd=checkout(), timeout_s=200), name, status=(0, 2))
    return line


ROWS = {
    run.__name__: run
    for run in (
        fifo_subset_file, subset_file_dev_zero, manifest_utf16, prepare_records_link, prepared_manifest,
        prepared_shards_swapped, boxes_0_to_1, detection_only_tree, five_options, image_token_in_question,
        labels_look_alike, subset_name_near_miss,
    )
}  # fmt: skip
