"""Reading and writing LLaVA-format files record by record."""

import gzip
import json
import os
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_llava import records as module
from hacl_llava.records import DataError, stream_records, with_captions, write_records


def record(i, caption="a dog", **more):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": caption}]
    return {"id": str(i), "image": f"{i}.jpg", "conversations": turns, **more}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(JSON, min_size=1, max_size=12),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 40),
    st.booleans(),
)
def test_an_array_is_read_as_json_reads_it(tmp_path_factory, values, indent, ascii_only, chunk, packed):
    path = tmp_path_factory.mktemp("stream") / "a.json"
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:
        return
    path.write_bytes(gzip.compress(data) if packed else data)
    before, module._CHUNK = module._CHUNK, chunk  # values cut anywhere
    try:
        found = list(stream_records(path))
    finally:
        module._CHUNK = before
    assert [v for _, v in found] == json.loads(data)
    records = module.Records(text for text, _ in found)
    assert len(records) == len(values) and list(pickle.loads(pickle.dumps(records))) == json.loads(data)
    numbers = list(range(len(values)))[::-2]
    part = records.only(numbers).only(range(len(numbers)))
    assert list(part) == [json.loads(data)[n] for n in numbers] and part[-1] == part[len(part) - 1]
    with pytest.raises(IndexError):
        part[len(part)]


def test_a_number_that_is_cut_anywhere(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[0.5, -1e-3, 12, true, null]")
    for chunk in range(1, 30):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert [v for _, v in stream_records(path)] == [0.5, -1e-3, 12, True, None]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_json_lines_and_a_byte_order_mark(tmp_path, ending):
    lines = [json.dumps(record(i)) for i in range(5)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ending.join(lines).encode())
    assert [t for t, _ in stream_records(path)] == lines


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[]", "holds no records"),
        ("hello", "begins with 'hello'"),
        ('"text"', "begins with"),
        ('[{"a": 1}, {"a": ', "record 1 is not valid json.*truncated"),
        ('[{"a": 1}, {"a": "b', "record 1 is not valid json.*truncated"),
        ('[{"a": 1}', "ends after record 0"),
        ('[{"a": 1},', "ends after record 0"),
        ('[{"a": 1}, {"a": x}, {"a": 3}' + " " * 100, "record 1 is not valid json"),
        ('[{"a": 1} {"a": 2}]', "no comma between record 0"),
        ('[{"a": 1},]', "a comma before its ']'"),
        ('[{"a": 1}] trailing', "more text after its ']'"),
        ('{"a": 1}\n{"a": \n', "record 1 is not valid json"),
        ("[" + "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_says_where(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        list(stream_records(path))
    assert str(path) in str(error.value)


def test_other_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="nowhere.json: cannot be read .No such file"):
        list(stream_records(tmp_path / "nowhere.json"))
    with pytest.raises(DataError, match="is no regular file"):
        list(stream_records(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is no regular file; .*save it first"):
        list(stream_records(tmp_path / "pipe"))
    (tmp_path / "long.json").write_text('[{"a": ' + "1" * 5000 + "}]")
    with pytest.raises(DataError, match="record 0 is not usable json"):
        list(stream_records(tmp_path / "long.json"))
    packed = bytearray(gzip.compress(json.dumps([record(i, str(random.random())) for i in range(500)]).encode()))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    (tmp_path / "bits.json.gz").write_bytes(packed)
    with pytest.raises(DataError, match="damaged or cut off"):
        list(stream_records(tmp_path / "bits.json.gz"))
    path = tmp_path / "latin.json"
    path.write_bytes('[{"a": "café"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(stream_records(path))
    whole = gzip.compress(json.dumps([record(i, "x" * 500 + str(random.random())) for i in range(50)]).encode())
    path = tmp_path / "cut.json.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or cut off"):
        list(stream_records(path))


TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(TEXT, JSON, max_size=4),
    st.lists(TEXT, min_size=1, max_size=3),
    st.sampled_from([None, 2]),
    st.sampled_from(
        [{}, {"hallucinated_captions": None}, {"hallucinated_captions": [], "hallucinated_kinds": []}]
        + [{"Hallucination caption": ""}, {"hallucinated_kinds": ["quantity"]}]
    ),
)
def test_captions_are_added_and_nothing_else_changes(value, captions, indent, empty):
    value = {**value, **empty}
    text = json.dumps(value, indent=indent)
    kinds = ["location"] * len(captions)
    got = json.loads(with_captions(text, value, captions, kinds))
    assert got.pop("hallucinated_captions") == captions and got.pop("hallucinated_kinds") == kinds
    old = {*module.HALLUCINATED_KEYS, "hallucinated_kinds"}
    assert got == {k: v for k, v in json.loads(text).items() if k not in old}
    if not old & set(value):  # the record's own text is kept to the letter
        assert with_captions(text, value, captions, kinds).startswith(text.rstrip()[:-1].rstrip())


def test_numbers_keep_their_digits():
    text = '{"a": 1.10, "b": 1e400, "c": 12345678901234567890, "d": "\\ud83d\\ude00 \\u00e9"}'
    got = with_captions(text, json.loads(text), ["x"], ["quantity"])
    assert got == text[:-1] + ', "hallucinated_captions": ["x"], "hallucinated_kinds": ["quantity"]}'


@pytest.mark.parametrize(
    "captions, kinds, expected",
    [
        (["a", "b"], ["location", "quantity"], ["location", "quantity"]),
        (["a", " ", "b"], ["location", "attribute", "quantity"], ["location", "quantity"]),  # as the captions' own
        (["a", None], ["location", 5], ["location"]),
        (["a", "b"], ["location"], [None, None]),  # which is whose?
        (["a"], None, [None]),
        ("a", ["location"], ["location"]),
        (None, ["location"], []),
    ],
)
def test_kinds_stand_in_step_with_captions(captions, kinds, expected):
    value = {"hallucinated_captions": captions, "hallucinated_kinds": kinds}
    assert module.hallucinated_kinds(value) == expected
    assert len(module.hallucinated_captions(value)) == len(expected)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_written_files_are_read_back(tmp_path, name):
    values = [record(i, "ein Hund 🐕", note="a\nb") for i in range(10)]
    texts = [json.dumps(v, indent=2 * (i % 2) or None, ensure_ascii=False) for i, v in enumerate(values)]
    path = tmp_path / name
    write_records(path, texts)
    assert [v for _, v in stream_records(path)] == values
    raw = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    if "jsonl" in name:
        assert [json.loads(line) for line in raw.decode().splitlines()] == values
    else:
        assert json.loads(raw) == values
    first = path.read_bytes()
    write_records(path, texts)
    assert path.read_bytes() == first  # no time of day in it


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")

    def broken():
        yield "{}"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
