"""Dataset and collator: what every batch holds, whatever the records hold."""

import copy
import json
import types

import pytest
import torch
from conftest import batch_of, load, make_llm_of_today, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_llava import check_data
from hacl_llava.config import HaclConfig
from hacl_llava.data import (
    DataError,
    HaclCollator,
    HaclDataset,
    hallucinated_captions,
    read_records,
    tokenize_caption,
)


@pytest.fixture(scope="module")
def setup(mini):
    return load(mini)


def dataset(mini, setup, records, tmp_path, **more):
    model, tokenizer = setup
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    args = types.SimpleNamespace(
        is_multimodal=True, image_folder=str(mini.images), image_processor=model.get_vision_tower().image_processor,
        image_aspect_ratio="square", mm_use_im_start_end=False, **more,
    )  # fmt: skip
    return HaclDataset(str(path), tokenizer, args)


def test_captions_run_from_bos_to_eos_and_a_long_one_keeps_its_eos(setup):
    tokenizer = copy.copy(setup[1])
    ids = tokenize_caption("two red circles at the top", tokenizer, [2])
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) > 4
    assert tokenizer.decode(ids[1:-1]) == "two red circles at the top"
    tokenizer.model_max_length = 6
    cut = tokenize_caption("two red circles at the top " * 20, tokenizer, [2])
    assert len(cut) == 6 and cut[0] == 1 and cut[-1] == 2 and torch.equal(cut[:5], ids[:5])
    assert tokenize_caption("", tokenizer, [2]) is None
    prompted = tokenize_caption("two red circles at the top " * 20, tokenizer, [7, 8, 9])
    assert len(prompted) == 6 and torch.equal(prompted[:3], ids[:3]) and prompted[3:].tolist() == [7, 8, 9]


def test_tokenizer_that_adds_eos_itself_does_not_add_it_twice(mini):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(mini.llm), use_fast=False, add_eos_token=True)
    tokenizer.model_max_length = 64
    ids = tokenize_caption("a red ring", tokenizer, [2])
    assert ids.tolist().count(2) == 1 and ids[-1] == 2


@pytest.mark.parametrize(
    "value, want",
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([None, "", " b "], ["b"]), ([], []), (None, []), ("  ", [])],
)
def test_hallucinated_captions_are_a_string_or_a_list(value, want):
    assert hallucinated_captions({"hallucinated_captions": value}) == want
    assert hallucinated_captions({"Hallucination caption": value}) == want


@pytest.mark.parametrize("value", [3, ["a", 3], {"a": "b"}])
def test_other_hallucinated_captions_are_refused(value):
    with pytest.raises(DataError, match="expected a string or a list of strings"):
        hallucinated_captions({"hallucinated_captions": value})


def test_answers_are_found_by_the_tokens_around_them(mini, tmp_path, monkeypatch, capsys):
    import transformers
    from llava import conversation as library

    from hacl_llava.check_data import TokenCheck
    from hacl_llava.data import GuardedDataset, answers_only, loses_count

    special = ("<|im_start|>", "<|im_end|>", "<|reserved_0|>")
    folder = make_llm_of_today(mini, tmp_path / "llm", special, eos_token="<|im_end|>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=False, model_max_length=512)
    tokenizer.pad_token = "<|reserved_0|>"
    monkeypatch.setattr(library, "default_conversation", library.conv_templates["chatml_direct"])
    assert loses_count(tokenizer)
    conv = library.conv_templates["chatml_direct"].copy()
    for role, text in zip(conv.roles * 2, ("What?", "A ring.", "And?", "Two of them.")):
        conv.append_message(role, text)
    ids = torch.tensor(tokenizer(conv.get_prompt()).input_ids)
    labels = answers_only(ids, tokenizer, 2)
    assert tokenizer.decode(labels[labels != -100]) == "A ring.<|im_end|>Two of them.<|im_end|>"
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert answers_only(ids, tokenizer, 1) is None and answers_only(ids, tokenizer, 3) is None
    tokenizer.model_max_length = len(ids) - 9
    assert (answers_only(ids[:-9], tokenizer, 3) != -100).sum() == (labels[:-9] != -100).sum()  # cut
    record = {"image": "a.png", "conversations": turns("<image>\nWhat?", "<|im_start|>assistant\nA ring.")}
    check = TokenCheck(str(folder), "chatml_direct", 512)
    assert [kind for kind, _ in check(record)] == ["masked"]
    assert check({"image": "a.png", "conversations": turns() + turns("And?", "Two.")}) == []
    # LLaVA's warning that it ignores a row is of rows alone that stay masked
    for last, warned in (("Two.", False), ("<|im_start|>assistant\nA ring.", True)):
        (tmp_path / "talk.json").write_text(json.dumps([{"id": "t", "conversations": turns("What?", last)}]))
        data_args = types.SimpleNamespace(is_multimodal=False)
        item = GuardedDataset(str(tmp_path / "talk.json"), tokenizer, data_args)[0]
        assert bool((item["labels"] == -100).all()) is warned is ("mismatch" in capsys.readouterr().out)
    # where LLaVA's count is right, its labels stay as they are
    monkeypatch.setattr(library, "default_conversation", library.conv_templates["v1"])
    assert not loses_count(tokenizer)


def test_every_batch_has_the_same_number_of_rows(mini, setup, records, tmp_path):
    rows = copy.deepcopy(records[:4])
    rows[0]["hallucinated_captions"] = ["one", "two", "three"]
    for row in rows[1:]:
        row.pop("hallucinated_captions")
    data = dataset(mini, setup, rows, tmp_path)
    captions, hallucinated = texts_of(HaclCollator(setup[1])([data[2], data[3]]))  # none of these has one
    assert hallucinated == [[None] * 3] * 2 and all(x is not None for x in captions)


def test_lengths_are_llavas_and_odd_records_have_one(mini, setup, records, tmp_path):
    import llava.train.train as stock

    data = dataset(mini, setup, records[:5], tmp_path)
    theirs = stock.LazySupervisedDataset(str(mini.data), setup[1], data.data_args)
    assert data.lengths == theirs.lengths[:5] and data.modality_lengths == theirs.modality_lengths[:5]
    odd = [records[0], {"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": ""}]}, 3, {}]
    data.list_data_dict = [*odd, {"image": "a.png", "conversations": "x"}]
    assert data.modality_lengths[1:] == [-1, -1, -1, 1] and all(n > 0 for n in data.lengths)


@pytest.mark.parametrize("limit, K", [(-1, 2), (1, 1), (5, 2), (0, 0)])
def test_number_of_hallucinated_captions_used(mini, setup, records, tmp_path, limit, K):
    data = dataset(mini, setup, records[:3], tmp_path, hacl=HaclConfig(num_hallucinated=limit))
    batch = HaclCollator(setup[1])([data[i] for i in range(3)])
    assert data.num_hallucinated == K
    assert len(batch["texts"]["end"]) == 3 * (1 + K)


def test_stock_part_of_a_batch_is_stock(mini, setup, records):
    import llava.train.train as stock

    model, tokenizer = setup
    batch = batch_of(mini, model, tokenizer, range(5))
    args = types.SimpleNamespace(
        is_multimodal=True, image_folder=str(mini.images), image_processor=model.get_vision_tower().image_processor,
        image_aspect_ratio="square", mm_use_im_start_end=False,
    )  # fmt: skip
    data = stock.LazySupervisedDataset(str(mini.data), tokenizer, args)
    want = stock.DataCollatorForSupervisedDataset(tokenizer)([data[i] for i in range(5)])
    assert set(batch) - set(want) == {"texts"}
    assert all(torch.equal(batch[k], want[k]) for k in want)


def test_text_only_record_under_plain(mini, setup, records, tmp_path):
    rows = copy.deepcopy(records[:2])
    rows[1] = {"id": "t", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "a red ring"}]}
    item = dataset(mini, setup, rows, tmp_path)[1]
    assert item["input_ids"].tolist()[:1] == [1] and item["labels"].tolist()[:1] == [-100]
    assert torch.equal(item["labels"][1:], item["input_ids"][1:]) and not item["image"].any()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_collation_keeps_every_token_and_marks_what_is_missing(setup, data):
    tokenizer = setup[1]
    K = data.draw(st.integers(0, 3))
    row = st.one_of(
        st.none(), st.lists(st.integers(3, 90), min_size=1, max_size=7).map(lambda x: torch.tensor(x + [2]))
    )
    items = [
        {
            "input_ids": torch.tensor([1, 5]),
            "labels": torch.tensor([-100, 5]),
            "caption_ids": data.draw(row),
            "hallucinated_ids": data.draw(st.lists(row, min_size=K, max_size=K)),
        }
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    batch = HaclCollator(tokenizer)(items)

    def plain(x):
        return None if x is None else x.tolist()

    captions, hallucinated = texts_of(batch)
    assert [plain(x) for x in captions] == [plain(item["caption_ids"]) for item in items]
    assert [[plain(x) for x in row] for row in hallucinated] == [
        [plain(x) for x in item["hallucinated_ids"]] for item in items
    ]


# --- bad input --------------------------------------------------------------------------------------------------------


def broken(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1}', "holds a dict, expected a list"),
        ("[]", "holds no records"),
        ('[{"id": "1", "conversations": [{"fr', "truncated"),
        ('[{"id": 1,}]', "record 0 is not valid json"),
        (b"[\xff\xfe]", "not UTF-8"),
    ],
)
def test_unreadable_json_is_named(tmp_path, text, message):
    path = broken(tmp_path, text)
    with pytest.raises(DataError, match=message) as error:
        read_records(path)
    assert path in str(error.value)


def test_missing_json_is_named_and_bom_is_read(tmp_path):
    with pytest.raises(DataError, match="nowhere.json: cannot be read .No such file"):
        read_records(str(tmp_path / "nowhere.json"))
    assert list(read_records(broken(tmp_path, b'\xef\xbb\xbf[{"id": 1}]'))) == [{"id": 1}]


def check_records(path, records, image_folder, plain):
    """As a run's start does it."""
    found = check_data.find(records, image_folder, plain)
    if errors := [f for f in found if f.severity == "error"]:
        raise check_data.refusal(path, records, errors)


def turns(question="<image>\nWhat?", answer="a ring"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conversations": None}, "has no 'conversations'"),
        ({"conversations": []}, "has no 'conversations'"),
        ({"conversations": [{"from": "human"}]}, "has the turn"),
        ({"conversations": [{"from": "user", "value": "<image>"}]}, "'user', allowed are 'human' and 'gpt'"),
        ({"conversations": turns() * 2}, "4 turns"),
        ({"conversations": turns("What?")}, "no <image> in its question"),
        ({"image": None}, "has the image None"),
        ({"image": "nowhere.png"}, "nowhere.png, which does not exist"),
        ({"image": "no/such/folder.png"}, "which does not exist"),
        ({"hallucinated_captions": 7}, "'hallucinated_captions' is '7'"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_unusable_record_is_named_and_counted(mini, records, change, message):
    rows = copy.deepcopy(records[:3])
    rows[1].update(change)
    with pytest.raises(DataError, match="data.json: record 1 .id 'train-000000001'. ") as error:
        check_records("data.json", rows, str(mini.images), plain=True)
    assert message in str(error.value)
    rows[2].update(change)
    with pytest.raises(DataError, match="2 of 3 records cannot be used"):
        check_records("data.json", rows, str(mini.images), plain=True)


def test_image_token_without_image_and_things_that_are_fine(mini, records):
    row = {"id": 1, "conversations": turns()}
    with pytest.raises(DataError, match="<image> in its question but no 'image'"):
        check_records("d", [row], str(mini.images), plain=True)
    with pytest.raises(DataError, match="record 0 is a str"):
        check_records("d", ["x"], str(mini.images), plain=True)
    fine = [{"id": 1, "conversations": turns("Hello", "Hi.")}, {**records[0], "hallucinated_captions": None}]
    check_records("d", fine, str(mini.images), plain=True)
    check_records("d", [{**records[0], "conversations": turns() + turns("And?")}], str(mini.images), plain=False)


def test_image_that_cannot_be_read_is_named(mini, setup, records, tmp_path):
    rows = copy.deepcopy(records[:2])
    whole = (mini.images / rows[0]["image"]).read_bytes()
    (mini.images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (mini.images / "text.png").write_text("not an image")
    rows[0]["image"], rows[1]["image"] = "cut.png", "text.png"
    data = dataset(mini, setup, rows, tmp_path)
    for i, file in enumerate(("cut.png", "text.png")):
        with pytest.raises(
            DataError, match=f"record {i} .id 'train-00000000{i}'., image {file}: cannot be used .*Repair"
        ):
            data[i]
