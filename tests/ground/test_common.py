"""What several rooms share: files that appear whole, json read with a good error, the journal."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hacl_llava.common import files, jsonl
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
    for text in ('{"a": 1}\n\n{"a": 2}\n', '[{"a": 1},\n{"a": 2}]'):  # json lines, and a list
        path.write_text(text)
        places, records = zip(*files.read_records(path, key="a", a=int))
        assert records == ({"a": 1}, {"a": 2})
        assert places[1] in (f"{path}: line 3 (a 2)", f"{path}: record 2 (a 2)")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "b": "x"}\n{"a": ', "line 2 is not valid json .*; give one"),
        ("[[1]]", "record 1 is a list, expected an object with a, b; give one"),
        ('{"a": 1}', r"line 1 \(a 1\) has no 'b'; expected an object with a, b; give one"),
        ('{"a": true, "b": "x"}', "has a True; expected a whole number"),
        ('{"a": 1, "b": ""}', "has b ''; expected text"),
        ('[{"a": 1, "b": "x"}, {"a": 1, "b": "y"}]', r"record 2 \(a 1\): the a comes twice"),
        ("", "has no records; give one"),
    ],
)
def test_records_that_are_wrong_are_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=f"a.json: .*{message}"):
        list(files.read_records(tmp_path / "a.json", "; give one", key="a", a=int, b=str))


VALUES = st.lists(
    st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=9), max_size=3), max_size=6
)


@given(values=VALUES, more=VALUES, cut=st.integers(0, 200), headed=st.booleans())
def test_a_journal_goes_on_behind_the_last_whole_line(tmp_path_factory, values, more, cut, headed):
    path = tmp_path_factory.mktemp("journal") / "a.jsonl"
    header = {"format": "test", "é": 1} if headed else None
    with jsonl.Journal(path, lambda value, place: None, header) as journal:
        for value in values:
            journal.append(value)
    whole = path.read_bytes() if path.exists() else b""
    if whole:
        path.write_bytes(whole[: max(len(whole) - cut, 0)])  # as a kill or a full disk leaves it
    left = (path.read_bytes() if path.exists() else b"").count(b"\n") - headed
    kept, places = [], []
    begun = []
    with jsonl.Journal(
        path, lambda v, p: (kept.append(v), places.append(p)), header, lambda b: begun.append(b)
    ) as journal:
        assert kept == values[: max(left, 0)] and begun == [header] * (headed and left >= 0)
        for value in more:
            journal.append(value)
        assert [journal.at(p) for p in places] == kept == values[: max(left, 0)] + more
    assert path.exists() or not (kept or headed)
    assert list(jsonl.read(path)) == [header] * headed + kept


def test_what_is_no_line_of_a_journal(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nx\n{"b": 2}\n{"a": 3}\n')
    with pytest.raises(DataError, match="a.jsonl: line 2 is damaged"):
        jsonl.Journal(path, lambda value, place: value["a"])
    kept = []
    jsonl.Journal(path, lambda value, place: kept.append(value["a"]), damaged="skip").close()
    assert kept == [1, 3] and "2 lines are damaged (2, 3)" in capsys.readouterr().err
    for text in ("my diary\n", "my diary"):  # somebody's file is never taken for one that was cut
        path.write_text(text)
        with pytest.raises(HaclError, match="is none"):

            def begin(begun):
                assert begun is None
                raise HaclError("is none")

            jsonl.Journal(path, kept.append, {"format": "test"}, begin)
        assert path.read_text() == text
    assert (
        jsonl.Journal(path, kept.append, {"format": "test"}, lambda begun: True)
        and path.read_text() == '{"format": "test"}\n'
    )


def test_several_processes_append_to_one_file(tmp_path):
    path = tmp_path / "folder/a.jsonl"
    jsonl.append(path, [{"a": 1}])
    with open(path, "a") as file:
        file.write('{"a"')  # killed in the middle of a line
    jsonl.append(path, [{"a": 2}, {"a": 3}])
    assert list(jsonl.read(path)) == [{"a": 1}, {"a": 2}, {"a": 3}]
    jsonl.append(path, [{"id": float("nan"), "a": [float("inf"), "é\ud800"]}])  # as a bad record may have it
    assert list(jsonl.read(path))[3:] == [{"id": None, "a": [None, "é\ud800"]}]
