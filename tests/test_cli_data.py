"""The verbs of `medcg data`: what they print and write, and how they end."""

import json

import numpy as np
import pytest
from PIL import Image
from trees import write_image, write_tree

from medcg_jax.cli import main


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree", train=12, test=4)


def test_prepare_then_check_then_nothing_to_do(tree, tmp_path, capsys):
    out, found = tmp_path / "out", tmp_path / "found.json"
    command = ["data", "prepare", str(tree), str(out), "--image=keep", "--workers=1", f"--json={found}"]
    assert main(command) == 0
    assert "1 subsets, 12 training and 4 test records" in capsys.readouterr().out
    assert json.loads(found.read_text("utf-8"))["shards_written"] == 2
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert json.loads(found.read_text("utf-8"))["shards_written"] == 0
    assert main(["data", "check", str(out)]) == 0
    (out / "records" / "04-test-00000-of-00001.arrayrecord").write_bytes(b"other")
    assert main(["data", "check", str(out)]) == 2
    assert "its bytes are not those that were written" in capsys.readouterr().out


def test_the_user_decides_how_much_may_be_bad(tree, tmp_path, capsys):
    (tree / "med-mat/a b/1 [1]%.png").write_bytes(b"no image")
    assert main(["data", "check", str(tree)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "bad records: 1 of 16 (6.25%)" in lines and ["image", "1", "1"] in [line.split() for line in lines]
    assert main(["data", "check", str(tree), "--max_bad_frac=0.1"]) == 0
    capsys.readouterr()
    assert main(["data", "prepare", str(tree), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert "1 of 16 records are bad (image 1)" in shown.err and "not an image of a known format" in shown.out
    assert main(["data", "prepare", str(tree), str(tmp_path / "out"), "--max_bad_frac=0.1"]) == 0
    assert "1 of 16 set aside" in capsys.readouterr().out


def test_greys_of_a_sixteenth_of_their_range_are_warned_of(tree, tmp_path, capsys):
    for number in (1, 2):
        greys = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8) + number
        Image.fromarray(greys).save(tree / f"med-mat/a b/{number} [1]%.png")
    warning = "warning: 2 images use less than 30% of the range that they are read by, such as "
    warning += "'med-mat/a b/1 [1]%.png' 6.3%"
    found = tmp_path / "found.json"
    assert main(["data", "check", str(tree), f"--json={found}"]) == 0
    shown = capsys.readouterr().out
    assert "read as: 2 16-bit greys, range 0 to 65535\n" in shown and warning in shown
    assert "--deep_grey=percentile" in shown and "no record is refused" in shown
    report = json.loads(found.read_text("utf-8"))
    assert report["ok"] and [image["share"] for image in report["dim"]] == [0.063, 0.063]
    assert main(["data", "prepare", str(tree), str(tmp_path / "out"), "--image=keep", f"--json={found}"]) == 0
    assert warning in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))
    assert manifest["dim"]["images"] == 2 == json.loads(found.read_text("utf-8"))["dim"]["images"]
    assert main(["data", "check", str(tree), "--deep_grey=percentile"]) == 0
    shown = capsys.readouterr().out
    assert "warning" not in shown and "read as: 2 16-bit greys, percentiles 0.5 to 99.5" in shown


def test_a_mirrored_test_image_in_training_is_named(tree, tmp_path, capsys):
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
    soft = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
    soft.save(tree / "med-mat/a b/1001 [1]%.png")
    soft.transpose(Image.Transpose.ROTATE_90).resize((90, 130)).save(tree / "med-mat/a b/3 [1]%.png")
    found = tmp_path / "found.json"
    assert main(["data", "check", str(tree), f"--json={found}"]) == 0
    assert "such as '1001 [1]%.png'" in (shown := capsys.readouterr().out) and ", turned left by 90\n" in shown
    assert [near["form"] for near in json.loads(found.read_text("utf-8"))["near"]] == ["turned left by 90"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--image=round:3", "image='round:3'; expected square:SIZE, fit:SIZE (pixels, from 1) or keep"),
        ("--max_bad_frac=7", "7: expected 0 to 1"),
        ("--window=moon", "data.window='moon'; "),
        ("--near=maybe", "invalid choice: 'maybe'"),
        ("--imag=keep", "--imag=keep is not known to `medcg data prepare`; did you mean --image? see `medcg data"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_nothing(tree, tmp_path, capsys, flag, message):
    assert main(["data", "prepare", str(tree), str(tmp_path / "out"), flag]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not (tmp_path / "out").exists()


def test_labels_become_a_subset_that_is_listed_checked_and_pictured(tmp_path, capsys):
    root, lines = tmp_path / "tree", ["image,label"]
    for number in range(20):
        write_image(root, f"med-mat/own/{number}.png", seed=number)
        lines.append(f"med-mat/own/{number}.png,{'Torn' if number % 2 else 'Whole'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines), "utf-8")
    command = ["data", "format", str(tmp_path / "labels.csv"), str(root), "--subset=knee"]
    assert main([*command, "--modality=MRI", "--area=Knee", "--task=Meniscus State", "--data_no=900"]) == 0
    assert "18 training and 2 test records" in capsys.readouterr().out
    assert main(["data", "check", str(root)]) == 0
    assert main(["data", "ledger", str(root)]) == 0
    assert "knee" in capsys.readouterr().out
    assert main(["data", "stats", str(root), str(tmp_path / "page")]) == 0
    assert "MRI, Knee, Meniscus State" in (tmp_path / "page" / "index.html").read_text("utf-8")


def test_a_ledger_needs_no_folder_yet(tmp_path, capsys):
    found = tmp_path / "found.json"
    assert main(["data", "ledger", str(tmp_path / "Med-MAT"), f"--json={found}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'Med-MAT'}: no such folder yet") and "https://" in out
    ledger = json.loads(found.read_text("utf-8"))
    assert ledger["root"] == str(tmp_path / "Med-MAT") and not (tmp_path / "Med-MAT").exists()
    assert {subset["state"] for subset in ledger["subsets"]} == {"missing"}


def test_stats_say_what_they_do_while_they_work(tree, tmp_path, capsys):
    assert main(["data", "stats", str(tree), str(tmp_path / "page")]) == 0
    shown = capsys.readouterr()
    told = shown.err.splitlines()
    assert told[0] == f"reading the records of {tree}, then every image" and told[1] == "reading 16 images"
    assert told[2] == "16 records of 16 images read; drawing contact sheets, then the page"
    assert main(["data", "stats", str(tree), str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["data", "check", str(tree)]) == 0
    assert "reading" in capsys.readouterr().err
