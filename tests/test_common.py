"""What several rooms share: files that appear whole, json read with a good error."""

import json

import pytest

from hacl_llava.common import files
from hacl_llava.config import DataError, HaclError


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, before):
    path = tmp_path / "a.json"
    if before:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as part:
        with open(part, "w") as file:
            file.write("half")
        assert (path.read_text() if path.exists() else None) == before  # nothing is there until the end
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == (["a.json"] if before else [])
    assert before is None or path.read_text() == before
    files.write_json(path, {"a": float("nan"), "b": [1.5, "é\ud800"]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, "é\ud800"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read .No such file or directory.; give one"),
        (b"\xff", "is not UTF-8 text, or damaged .byte 0.; give one"),
        (b'{"a": ', "is not json, half-written or damaged .*; give one"),
        (b"[" * 100_000, "is not json"),
        (b"[1]", "holds a list, expected an object of names and values; give one"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    for error in (DataError, HaclError):
        with pytest.raises(error, match=f"a.json: {message}") as raised:
            files.read_json(path, "; give one", error, dict)
        assert type(raised.value) is error


def test_what_can_be_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')  # with the mark that Windows puts before UTF-8
    assert files.read_json(path, expected=dict) == {"a": "é"}
    path.write_text('{"a": 1}\n\n[2]\n', encoding="utf-8")
    assert list(files.read_lines(path)) == [(1, {"a": 1}), (3, [2])]
    path.write_text('{"a": 1}\n{"a": ')
    with pytest.raises(DataError, match="a.json: line 2 is not valid json"):
        list(files.read_lines(path))
