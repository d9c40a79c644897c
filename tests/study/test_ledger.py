"""The ledger of a tree: what is there, what is lacking and why, and which printed rows can be computed."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import raw_box_record, raw_record, write_subset, write_tree

from medcg_jax.cli import main
from medcg_jax.config import DataConfig
from medcg_jax.data import catalogue
from medcg_jax.data.records import DataError, Subset
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design import mat, suite
from medcg_jax.study.design.ledger import SubsetState, read_ledger, row_states, states_of
from medcg_jax.study.design.ledger_text import WIDTH, ledger_lines

NUM_ROWS = {1: 25, 2: 12, 3: 42, 4: 9, 5: 8, 6: 8, 7: 8, 8: 8}


def subset_of(ledger, number):
    return next(state for state in ledger.subsets if state.number == number)


def dataset_of(ledger, number):
    return next(state for state in ledger.datasets if state.number == number)


def rows_of(ledger, table, state):
    return [row.row for row in ledger.rows if (row.table, row.state) == (table, state)]


def raws(count, first=1, data_no="5", **changes):
    labels = ["Benign", "Normal"]
    return [raw_record(first + i, label=labels[i % 2], **{"data-no": data_no}, **changes) for i in range(count)]


def test_an_empty_folder_lacks_everything(tmp_path):
    ledger = read_ledger(tmp_path)
    assert states_of(ledger.subsets) == {"complete": 0, "partial": 0, "missing": 53}
    assert states_of(ledger.datasets) == {"complete": 0, "partial": 0, "missing": 109}
    assert {table: len(rows_of(ledger, table, "blocked")) for table in NUM_ROWS} == NUM_ROWS
    assert subset_of(ledger, "37").reasons == ("no file",)
    assert subset_of(ledger, "38").reasons == ("no file; its questions are not released",)
    assert dataset_of(ledger, "109").reasons == ("no record in subset 53, whose questions are not released",)
    assert dataset_of(ledger, "43").reasons == ("no record; in no subset of the catalogue",)
    text = "\n".join(ledger_lines(ledger))
    assert all(address in text for own in catalogue.datasets().values() for address in own.addresses)
    assert "REFUSES" not in text and " 46  name not known" in text


def test_rows_say_what_they_share_with_their_target(tmp_path):
    ledger = read_ledger(tmp_path)
    rows = {(row.table, row.row): row for row in ledger.rows}
    assert (rows[3, 11].shares, rows[3, 11].lapse) == (("MAT", "MT"), "whole triplet")
    assert (rows[4, 9].shares, rows[4, 9].lapse) == (("MT", "A", "T"), "two elements in one")
    assert (rows[3, 1].shares, rows[3, 1].lapse) == (("MA", "MT"), "")
    assert (rows[1, 2].shares, rows[1, 2].lapse) == ((), "")
    text = " ".join("\n".join(ledger_lines(ledger)).split())
    assert "a training subset has all three elements of the target: 11-13, 15-16 what the subsets share" in text
    assert "a source of one element has two: 4-7, 9 blocked" in text
    assert list(ledger.as_dict()["rows"][-1]["shares"]) == ["MA", "T"]


def test_what_is_no_folder_is_status_2(tmp_path, capfd):
    with pytest.raises(DataError, match="no such folder"):
        read_ledger(tmp_path / "none")
    root = tmp_path / "file"
    root.write_text("")
    assert main(["data", "ledger", str(root)]) == 2
    error = capfd.readouterr().err
    assert str(root) in error and error.count("\n") == 1


def test_a_whole_subset_is_complete_and_images_are_not_opened(tmp_path, capfd):
    write_tree(tmp_path)
    for image in (tmp_path / "med-mat").rglob("*.png"):
        image.write_bytes(b"no image")
    out = tmp_path / "ledger.json"
    assert main(["data", "ledger", str(tmp_path), f"--json={out}"]) == 0
    assert "04 complete" in capfd.readouterr().out
    found = json.loads(out.read_text())
    (own,) = [entry for entry in found["subsets"] if entry["number"] == "04"]
    assert own["state"] == "complete" and (own["train"], own["test"], own["images"], own["absent"]) == (12, 4, 16, 0)
    assert own["triplet"] == ["CT", "Lung", "Lung Cancer Classification"] and own["members"] == ["5"]
    (own,) = [entry for entry in found["datasets"] if entry["number"] == "5"]
    assert own["state"] == "complete" and own["found_in"] == ["04"]
    assert found["opens"] and found["catalogue_counts"]["areas"]["printed"] == 16
    assert [(r["table"], r["row"], r["state"]) for r in found["rows"] if r["state"] != "blocked"] == []


def test_reasons_for_partial(tmp_path):
    # 03: 4 and 6 are lacking; 18: 44 is printed there; 04: one image is gone, named twice; 25: test records alone.
    write_subset(tmp_path, "Subset--03-train", raws(3, 1, "3"))
    write_subset(tmp_path, "Subset--03-test", raws(2, 11, "300"))
    write_subset(tmp_path, "Subset--18-train", raws(2, 21, "44"))
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset--04-test", raws(2, 1001, image="med-mat/a b/1001 [1]%.png"))
    (tmp_path / "med-mat/a b/1001 [1]%.png").unlink()
    write_subset(tmp_path, "Subset--25-test", raws(2, 31, "49") + raws(2, 33, "53"))
    ledger = read_ledger(tmp_path)
    three, four = subset_of(ledger, "03"), subset_of(ledger, "04")
    assert (three.state, three.reasons, three.others) == ("partial", ("no record of 4, 6",), ("300",))
    assert (three.members, three.lacking, three.train, three.test) == (("3",), ("4", "6"), 3, 2)
    assert (four.state, four.reasons, four.images, four.absent) == ("partial", ("1 image absent",), 12, 1)
    assert (four.can_train, four.can_test) == (True, False)
    assert subset_of(ledger, "18").others == () and "no record of 33" in subset_of(ledger, "18").reasons[0]
    assert subset_of(ledger, "25").reasons == ("no training file",)
    assert dataset_of(ledger, "3").reasons == ("only training records",)
    assert dataset_of(ledger, "53").reasons == ("only test records",)
    assert dataset_of(ledger, "5").reasons == ("1 image absent",)
    assert dataset_of(ledger, "44").reasons == ("no record in subset 22", "only training records")
    assert not dataset_of(ledger, "300").in_catalogue


def test_a_subset_without_test_file_is_split_as_the_reader_does(tmp_path):
    write_subset(tmp_path, "Subset-04-train", raws(40), folder=".")
    write_subset(tmp_path, "Subset-05-train", raws(6, 101, "7"), folder=".")
    ledger = read_ledger(tmp_path)
    four, five = subset_of(ledger, "04"), subset_of(ledger, "05")
    read = {s.name: s for s in ReleaseSource(tmp_path, DataConfig(source="release")).subsets}
    assert (four.train, four.test) == (read["04"].num_train, read["04"].num_test) == (36, 4) and four.split_made
    assert four.state == "complete" and dataset_of(ledger, "5").state == "complete"
    # Three images of each label: a tenth is none.
    assert (five.test, five.can_test) == (read["05"].num_test, False) == (0, False)
    assert five.reasons == ("no test file, and too few images to split off a tenth",)
    assert rows_of(ledger, 3, "blocked") == list(range(1, 43))


def test_rows_of_a_tree(tmp_path):
    for number, data_no in (("02", "2"), ("04", "5"), ("05", "7"), ("06", "8"), ("22", "45"), ("09", "16")):
        for split in ("train", "test"):
            first = int(number) * 1000 + (500 if split == "test" else 0)
            write_subset(tmp_path, f"Subset--{number}-{split}", raws(4, first, data_no))
    ledger = read_ledger(tmp_path)
    assert rows_of(ledger, 4, "part") == [3]  # 02+22+09 -> 05; 22 lacks 44
    row = next(row for row in ledger.rows if (row.table, row.row) == (4, 3))
    assert (row.related, row.target, row.blocked_by, row.short_of) == (("02", "22", "09"), "05", (), ("22",))
    write_subset(tmp_path, "Subset--22-train", raws(2, 22900, "44") + raws(2, 22000, "45"))
    write_subset(tmp_path, "Subset--22-test", raws(2, 22500, "45"))
    ledger = read_ledger(tmp_path)
    assert rows_of(ledger, 4, "full") == [3]
    assert rows_of(ledger, 1, "part") == [2, 9, 22] and rows_of(ledger, 2, "part") == [4, 5, 6]
    blocked = next(row for row in ledger.rows if (row.table, row.row) == (3, 2))
    assert blocked.blocked_by == ("03",)
    assert {table: sum(row.table == table for row in ledger.rows) for table in NUM_ROWS} == NUM_ROWS


@given(there=st.sets(st.sampled_from([f"{i:02d}" for i in range(1, 54)])))
@settings(max_examples=12, deadline=None)
def test_rows_are_those_that_the_grid_expands_to(there):
    paper = mat.paper_subsets()
    states = {
        n: SubsetState(n, True, (s.modality, s.area, s.task), "complete" if n in there else "missing", (),
                       can_train=n in there, can_test=n in there)
        for n, s in paper.items()
    }  # fmt: skip
    possible = {(row.table, row.row) for row in row_states(states) if row.state != "blocked"}
    sized = [Subset(**{**vars(paper[n]), "num_train": 9, "num_test": 9}) for n in sorted(there)]
    choice, boxes = tuple(s for s in sized if not mat.has_boxes(s)), tuple(s for s in sized if mat.has_boxes(s))
    expanded = set()
    for table in range(3, 9):
        world = suite.World(choice, (), True, boxes if table in (5, 6) else (), table, table)
        kind = {4: suite.triples, 5: suite.detection_pairs, 6: suite.detection_pairs}.get(table, suite.pairs)
        expanded |= {cell.row.published for cell in kind(world, 0)}
    for cell in suite.multi_task(suite.World(choice, (), True), 0):
        if cell.arm == "multi_task":
            expanded |= {(1 if cell.row.part == "in_distribution" else 2, int(name)) for name in cell.target}
    assert possible == expanded


def test_full_rows_need_complete_subsets_alone():
    paper = mat.paper_subsets()
    states = {n: SubsetState(n, True, ("", "", ""), "complete", (), can_train=True, can_test=True) for n in paper}
    assert {row.state for row in row_states(states)} == {"full"} and len(row_states(states)) == sum(NUM_ROWS.values())
    states["27"] = SubsetState("27", True, ("", "", ""), "partial", ("",), can_train=True, can_test=True)
    short = [row for row in row_states(states) if row.state != "full"]
    assert all(row.state == "part" and row.short_of == ("27",) for row in short)
    assert {(row.table, row.row) for row in short if row.table in (1, 2)} == {(2, 27)}


BROKEN = {
    "json": ("Subset--04-train", "{", "no JSON"),
    "not_a_list": ("Subset--04-train", "{}", "expected a list of records"),
    "encoding": ("Subset--04-test", b"\xff\xfe", "not UTF-8"),
    "unknown_subset": ("Subset--77-train", "[]", "subset 77: neither in the tree's"),
    "duplicate_file": ("Subset-04-test", "[]", "the same subset and split"),
    "two kinds": ("Subset--04-det-train", "[]", "options or boxes, not both"),
    "train alone": ("Subset--05-train", json.dumps([raw_record(1, **{"data-no": 7})]), "data-no is 7"),
    "test alone": ("Subset--05-test", json.dumps([raw_record(1, image="../x.png")]), "climbs out"),
    "manifest": ("../manifest", "[]", "no list of subsets"),
    "fine": ("Subset--05-train", "[]", ""),
    "a record of both splits": ("Subset--04-test", json.dumps([raw_record(1) | {"Answer": "Grave"}]), ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_said_and_ends_nothing(case, tmp_path):
    name, content, message = BROKEN[case]
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset--02-train", raws(12, 5001, "2"))
    path = tmp_path / "Aggregated_Subsets" / f"{name}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ledger = read_ledger(tmp_path)
    assert subset_of(ledger, "02").state == "complete"
    text = " ".join(" ".join(ledger_lines(ledger)).split())
    try:
        source = ReleaseSource(tmp_path, DataConfig(source="release"))
    except DataError:
        assert any(message in fault for fault in ledger.faults) and message in text and "REFUSES THE TREE" in text
        assert not ledger.as_dict()["opens"] and message
        return
    assert not ledger.faults and not message
    for state in ledger.subsets:
        for split, can in (("train", state.can_train), ("test", state.can_test)):
            try:
                given = len(source.records(state.number, split)) > 0
            except DataError:
                given = False
            assert given == can, (state, split)


def test_broken_records_are_counted_by_kind(tmp_path):
    write_tree(tmp_path)
    wrong = [raw_record(1), 7, raw_record(2) | {"Answer-choice": "Z"}, raw_record(1), raw_record(9, image="../9.png")]
    write_subset(tmp_path, "Subset--04-train", wrong, images=False)
    four = subset_of(read_ledger(tmp_path), "04")
    assert four.broken == {"type": 1, "letter": 1, "duplicate_id": 1, "path": 1}
    assert four.reasons == ("4 broken records (type 1, letter 1, duplicate_id 1, path 1)",)
    assert (four.train, four.can_train, four.can_test) == (1, False, True)


def test_detection_files_stand_apart(tmp_path):
    write_tree(tmp_path)
    write_subset(tmp_path, "Subset--38-det-train", [raw_box_record(i, **{"data-no": "88"}) for i in range(12)])
    ledger = read_ledger(tmp_path)
    assert (subset_of(ledger, "38").test, subset_of(ledger, "38").lacking) == (1, ("89", "90", "91"))
    write_subset(tmp_path, "Subset--47-det-train", [raw_box_record(1) | {"boxes": 3}])
    ledger = read_ledger(tmp_path)
    assert not ledger.faults and "boxes is 3" in ledger.box_faults[0]
    assert "REFUSES THE DETECTION FILES" in "\n".join(ledger_lines(ledger))


def test_the_packs_ledger_fits_a_terminal(shared_dir):
    ledger = read_ledger(shared_dir / "data" / "medmat-mini")
    assert states_of(s for s in ledger.subsets if s.in_catalogue) == {"complete": 2, "partial": 12, "missing": 39}
    assert (ledger.total.train, ledger.total.test, ledger.total.images) == (4678, 1674, 5612)
    assert not ledger.total.absent and not ledger.num_broken and not ledger.faults + ledger.box_faults
    assert rows_of(ledger, 3, "part") == [30, 33, 38] and rows_of(ledger, 5, "part") == [7]
    assert dataset_of(ledger, "53").state == "complete" and dataset_of(ledger, "35").found_in == ("63",)
    assert subset_of(ledger, "25").reasons == ("no record of 49",)
    long = [line for line in ledger_lines(ledger)[1:] if len(line) > WIDTH and "http" not in line]
    assert not long and max(map(len, ledger_lines(ledger)[1:])) < 140
    json.dumps(ledger.as_dict())


SCALARS = st.none() | st.booleans() | st.integers() | st.text()
KEYS = st.sampled_from(["id", "image", "data-no", "Answer", "boxes"])
JUNK = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=5))


@given(junk=JUNK)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_ends_it(junk, tmp_path):
    for name in ("Subset--04-train", "Subset--38-det-test"):
        path = tmp_path / "Aggregated_Subsets" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([raw_record(1), junk]))
    ledger_lines(read_ledger(tmp_path))


def test_original_files_are_named(tmp_path):
    write_subset(tmp_path, "ori--5-train", raws(1), folder="Original_Medical_Datasets")
    reasons = dataset_of(read_ledger(tmp_path), "5").reasons
    assert reasons[-1] == "Original_Medical_Datasets/ori--5-train.json has it, no subset file does"
