"""Files from outside: kind, size, encoding and JSON are looked at, and every refusal is one line that names the file."""

import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcg_jax import untrusted
from medcg_jax.untrusted import FileError


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(FileError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    fifo = tmp_path / "config.json"
    os.mkfifo(fifo)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(refusal(untrusted.read_json, fifo)), daemon=True)
    thread.start()
    thread.join(10)
    assert answers == [f"{fifo}: no regular file (a FIFO)"]


@pytest.mark.parametrize("target, word", [("/dev/zero", "a device"), ("/", "a folder")])
def test_devices_and_folders_are_refused_behind_a_link_too(tmp_path, target, word):
    link = tmp_path / "link"
    link.symlink_to(target)
    assert refusal(untrusted.read_bytes, link, 10) == f"{link}: no regular file ({word})"


def test_size_is_looked_at_before_anything_is_read(tmp_path):
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, 60 * 2**30)
    assert "64,424,509,440 bytes; at most 1,000 are read" in refusal(untrusted.read_bytes, sparse, 1000)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b'{"a": 1', "no JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1, "a": 2}', 'the key "a" stands twice'),
        (b"[1]", "holds a list; expected an object"),
        (b"[" * 200_000, "nested too deep"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 (byte 0)"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_what_is_no_json_is_refused_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    text = refusal(untrusted.read_json, path)
    assert text.startswith(f"{path}: ") and reason in text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_of_other_writers_comes_back_as_it_is(value):
    assert untrusted.parsed(json.dumps({"value": value}), "x") == {"value": value}


def test_a_broken_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    lines = untrusted.json_lines(path)
    assert next(lines) == (1, {"a": 1})
    assert refusal(next, lines).startswith(f"{path}, line 3: no JSON")


@pytest.mark.parametrize("value", [True, "40", None, float("nan"), float("inf"), 0, -3, 2**63, [1], 1.5])
def test_numbers_outside_their_bounds_are_refused(value):
    text = refusal(untrusted.check_number, value, "config.json: hidden_size", least=1, most=10**6, whole=True)
    assert text.startswith("config.json: hidden_size=") and "a whole number of at least 1 and at most 1,000,000" in text


def test_numbers_within_their_bounds_come_back():
    assert untrusted.check_number(40, "x", least=1, most=64, whole=True) == 40
    assert untrusted.check_number(1e-5, "x", least=0, most=1) == 1e-5
