"""Captions from an endpoint: prompts, reading of answers, every way an endpoint misbehaves, the bill."""

import gc
import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from openai_server import KEY, OpenAIServer, rewrite, unicode  # noqa: E402

from hacl_llava.common import endpoint  # noqa: E402
from hacl_llava.common.endpoint import Endpoint  # noqa: E402
from hacl_llava.config import HaclError  # noqa: E402
from hacl_llava.hallucinate import KINDS, Item, prompts  # noqa: E402
from hacl_llava.hallucinate.api import ApiSource, estimate  # noqa: E402
from hacl_llava.hallucinate.prompts import Prompt, Settings, parse, read_settings  # noqa: E402

HERE = Path(__file__).parent
REQUEST = 0.0034  # dollars of one answer of the server (300 and 40 tokens) at PRICE
PRICE = (10.0, 10.0)


class Picky:
    """A checker that needs no word lists."""

    def problem(self, item, candidate, taken=()):
        return "same" if candidate == item.caption else "duplicate" if candidate in taken else None


@pytest.fixture(autouse=True)
def environment(to_endpoints, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF", 0.02)


def captions(n):
    return [f"a brown dog with number {i} runs over wet grass behind a house" for i in range(n)]


def items(texts, wanted=("existence",)):
    return [Item(i, f"record {i}", text, wanted=wanted) for i, text in enumerate(texts)]


def source(server, model="m", checker=None, concurrency=16, seed=None, spent=None, **settings):
    url = settings.pop("base_url", server.base_url if isinstance(server, OpenAIServer) else server)
    s = Settings(**{"key_env": "TEST_KEY", **settings})
    how = {"timeout": s.timeout, "retries": s.retries, "requests_per_minute": s.requests_per_minute}
    where = Endpoint(model, url, s.key_env, concurrency=concurrency, **how)
    return ApiSource(where, checker or Picky(), settings=s, seed=seed, spent=spent)


def ask(behaviours, wanted=("existence",), **settings):
    """The answer to one caption, and the server."""
    (caption,) = captions(1)
    with OpenAIServer({caption: behaviours}) as server:
        (answer,) = source(server, **settings).answers(items([caption], wanted))
    return answer, server


def drain(iterator):
    """What an iterator yields before it raises, and what it raises."""
    got = []
    try:
        got.extend(iterator)  # extend keeps what came before an exception
    except HaclError as error:
        return got, error
    return got, None


# ---- prompts


def test_messages_hold_prompt_examples_caption_kinds_and_form():
    examples = [{"caption": "a cat", "hallucinated_caption": "two cats", "kind": "quantity"}]
    item = Item(0, "r", 'He said "{x}" \n{0} %s', ("a bird",), ("existence", "location"))
    messages = Prompt(examples=examples).messages(item, ["a text"])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == prompts.PAPER_PROMPT
    assert parse(messages[2]["content"], Item(0, "", "a cat", wanted=("quantity",))) == [("quantity", "two cats")]
    last = messages[-1]["content"]
    assert json.dumps(item.caption) in last and '"a bird"' in last and '["a text"]' in last and "JSON" in last
    assert "1. existence: name an object" in last and "2. location: change where" in last


def test_paper_prompt_stays_as_published():
    assert hashlib.sha256(prompts.PAPER_PROMPT.encode()).hexdigest()[:16] == "18a06fd12ff6e865"


def test_digest_changes_with_prompt_and_examples():
    example = {"caption": "a cat", "hallucinated_caption": "two cats", "kind": "quantity"}
    digests = {Prompt().digest(), Prompt("other").digest(), Prompt(examples=[example]).digest()}
    assert len(digests) == 3 and Prompt().digest() == Prompt().digest() and len(Prompt().digest()) == 16


@given(st.text(st.characters(), max_size=60))
def test_any_caption_comes_through_the_prompt(caption):
    last = Prompt().messages(Item(0, "", caption))[-1]["content"]
    read, _ = json.JSONDecoder().raw_decode(last.removeprefix("Caption: "))
    assert read == caption.encode("utf-8", "replace").decode()
    last.encode()


def test_the_prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(" my: prompt\n")
    assert read_settings(path) == Settings(prompt="my: prompt")
    path.write_bytes(b"\n")
    with pytest.raises(HaclError, match="is empty; write the system prompt"):
        read_settings(path)
    path.write_bytes(b"\xff")
    with pytest.raises(HaclError, match="not UTF-8"):
        read_settings(path)
    with pytest.raises(HaclError, match="cannot be read"):
        read_settings(tmp_path / "missing")

    path, good = tmp_path / "prompt.yaml", {"caption": "a cat", "hallucinated_caption": "a dög", "kind": "existence"}
    values = {"prompt": "one\n  two", "examples": [good, {**good, "more": 1}], "price": [1, 2.5], "max_cost": 3}
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    assert read_settings(path) == Settings("one\n  two", (good, good), price=(1, 2.5), max_cost=3)
    path.write_text("temperature: 0\nprompt: |\n  one\n  two\n")
    assert read_settings(path) == Settings("one\ntwo", temperature=0)
    for text, message in (
        ("", "holds no settings"),
        ("[1]", "holds no settings"),
        ("a: [", "is not YAML"),
        ("tempreature: 1", "'tempreature' is no setting; known are prompt, examples, temperature"),
        ("prompt: 3", "prompt is 3; allowed is a text"),
        ("temperature: hot", "temperature is 'hot'; allowed is a number from 0"),
        ("timeout: .nan", "timeout is nan; allowed is a number of seconds above 0"),
        ("attempts: true", "attempts is True; allowed is a whole number from 1"),
        ("response_format: xml", "one of schema, json, text"),
        ("length_ratio: [1.2, 2]", "0 <= MIN <= 1 <= MAX"),
        ("price: [1]", "price is (1,); allowed is [INPUT, OUTPUT]"),
        ("max_cost: 1", "without a price"),
        ("examples: a", "examples is 'a'; allowed is a list"),
        ("examples: [1]", "example 1 needs a text under each of caption, hallucinated_caption, kind"),
        (json.dumps({"examples": [good, {**good, "caption": " "}]}), "example 2 needs a text"),
        (json.dumps({"examples": [{**good, "kind": "color"}]}), "example 1: the kind is 'color', allowed is one of"),
    ):
        path.write_text(text)
        with pytest.raises(HaclError, match=re.escape(message)) as error:
            read_settings(path)
        assert str(error.value).startswith(f"{path}: ")


# ---- parse

ITEM = Item(0, "", "a caption", wanted=("existence", "quantity"))
ENTRIES = [("quantity", "two {cats} [here]"), ("existence", 'a "dog"')]
FORM = json.dumps({"captions": [{"kind": kind, "caption": text} for kind, text in ENTRIES]})


@pytest.mark.parametrize(
    "text",
    [
        FORM,
        json.dumps(json.loads(FORM), indent=4),
        f"```json\n{FORM}\n```",
        f"Sure [note] {{x}}:\n{FORM}\nAnything else? {{",
        f'I took ["dog"] out. {FORM}',
        json.dumps(json.loads(FORM)["captions"]),
        FORM.replace('"quantity"', '" Quantity"').replace("two {cats}", " two\\n\\u2028 {cats}\n"),
    ],
)  # fmt: skip
def test_parse_reads(text):
    assert parse(text, ITEM) == ENTRIES


def test_parse_gives_plain_strings_the_kinds_wanted():
    expected = [("existence", "one"), ("quantity", "two"), ("quantity", "three")]
    assert parse('["one", "two", "three"]', ITEM) == expected
    assert parse('{"captions": ["one", "two", "three"]}', ITEM) == expected


@pytest.mark.parametrize("text", ["A\nB", '1. "A"\n2. "B"', "- A\n\n* B\n"])
def test_parse_reads_plain_lines_of_models_that_know_no_json(text):
    assert parse(text, ITEM) == [(ITEM.wanted[0], "A"), (ITEM.wanted[1], "B")]
    for other in ("A", "A\nB\nC", "{A\nB", "```\nA"):
        with pytest.raises(ValueError):
            parse(other, ITEM)


@pytest.mark.parametrize(
    "text",
    [
        '{"hallucinated_caption": "A cat."}', '{"hallucinated_captions": ["A cat."]}', '{"caption": "A cat."}',
        '{"captions": "A cat."}', '{"captions": [{"caption": "A cat."}]}', '{"kind": "location", "caption": "A cat."}',
        '{"captions": {"kind": "location", "caption": "A cat."}}', "Hallucinated caption: A cat.", '"A cat."',
        '{"captions": [{"kind": "object location", "caption": "A cat."}]}', "Here is the rewritten caption:\n\nA cat.",
        '{"captions": [{"kind": "no such kind", "caption": "A cat."}]}',
    ],
)  # fmt: skip
def test_parse_reads_the_forms_that_models_make_up(text):
    assert parse(text, Item(0, "", "A dog.", wanted=("location",))) == [("location", "A cat.")]


def test_answers_that_nobody_can_read_end_the_run():
    texts = captions(60)
    with OpenAIServer(dict.fromkeys(texts, "schema")) as server:
        asked = source(server, attempts=2, concurrency=4)
        found = []
        with pytest.raises(HaclError, match="2. records in a row got no usable answer, the last was .*text"):
            for answer in asked.answers(items(texts)):
                found.append(answer)
        assert len(server.log) < 70
    with OpenAIServer(dict.fromkeys(texts[::2], "schema")) as server:  # control: now and then is no reason to end
        assert len(list(source(server, attempts=1).answers(items(texts)))) == 60


def test_parse_leaves_out_what_is_of_no_use():
    entries = ["", "\x00", "\ud800", 3, None, {"kind": "existence"}, {"kind": "existence", "text": "x"}]
    with pytest.raises(ValueError, match="another form"):
        parse(json.dumps(entries), ITEM)
    assert parse(json.dumps([*entries, "good"]), ITEM) == [("quantity", "good")]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "empty"), (" \n", "empty"), ("no", "no JSON"), ("[]", "another form"), ("{}", "another form"),
        ('{"captions": []}', "another form"), ('{"captions": {"kind": "existence"}}', "another form"),
        ('{"captions": [{"type": "existence", "text": "x"}]}', "another form"), ("{a: 1}", "malformed"),
        ("[" * 100_000, "JSON"), ('{"a":' * 100_000, "JSON"), ("[" + "9" * 10_000 + "]", "JSON"),
    ],
)  # fmt: skip
def test_parse_refuses(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse(text, ITEM)


def test_parse_takes_nothing_from_a_cut_answer():
    for end in range(len(FORM)):
        with pytest.raises(ValueError):
            parse(FORM[:end], ITEM)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(KINDS),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["captions", "kind", "caption"]), v),
    max_leaves=8,
)
pieces = st.sampled_from(['{"captions":', "[", "]", "{", "}", '"', ",", "```", '"kind": "existence"', "\\ud800"])


@settings(max_examples=400)
@given(
    st.text(max_size=40) | json_values.map(json.dumps) | st.lists(pieces | st.text(max_size=3)).map("".join),
    st.lists(st.sampled_from(KINDS), max_size=3),
)
def test_parse_of_anything_is_a_list_or_a_value_error(text, wanted):
    try:
        found = parse(text, Item(0, "", "a caption", wanted=tuple(wanted)))
    except ValueError as error:
        assert 0 < len(str(error)) < 100
    else:
        assert found
        for kind, caption in found:
            assert kind in KINDS and caption == " ".join(caption.split()) != ""
            caption.encode()


# ---- one request after another


def test_good_answer_and_what_was_sent():
    answer, server = ask("ok", ("quantity", "existence"), seed=3, temperature=0.5)
    (caption,) = captions(1)
    assert answer == (
        0,
        (("quantity", rewrite(caption)), ("existence", rewrite(caption, 1))),
        None,
        False,
        {},
        answer.usage,
    )
    assert answer.usage == {"input": 300, "output": 40}
    (call,) = server.log
    body = call["body"]
    assert body["model"] == "m" and body["temperature"] == 0.5 and isinstance(body["seed"], int)
    assert body["response_format"]["json_schema"]["strict"] is True and 64 < body["max_tokens"] < 600
    assert ask("ok", max_output_tokens=77)[1].log[0]["body"]["max_tokens"] == 77
    assert "seed" not in ask("ok")[1].log[0]["body"]


@pytest.mark.parametrize("behaviour", ["ok", "chatter", "fence", "unicode", "no-usage", "slow", "thinks"])
def test_answers_that_are_good(behaviour):
    answer, server = ask(behaviour)
    expected = rewrite(captions(1)[0])
    if behaviour == "unicode":
        expected = " ".join(unicode(expected).split())
    assert answer.captions == (("existence", expected),) and answer.reason is None and len(server.log) == 1
    assert answer.usage["input"] > 100 and answer.usage["output"] > 10


@pytest.mark.parametrize(
    "behaviour, reason, calls",
    [
        ("cut", "no usable answer: its JSON is cut off", 3),
        ("schema", "no usable answer: its JSON has another form", 3),
        ("null", "no usable answer: it is empty", 3),
        ("empty", "no usable answer: it is empty", 3),
        ("same", "every candidate was rejected", 3),
        ("thoughts", "no usable answer: it is empty", 3),
        ("refusal", "refused by the model", 1),
        ("filter", "refused by the model", 1),
        ("sorry", "refused by the model", 1),
    ],
)
def test_answers_that_are_of_no_use(behaviour, reason, calls):
    answer, server = ask(behaviour)
    assert answer.reason.startswith(reason) and not answer.failed and not answer.captions
    assert len(server.log) == calls and answer.usage == {"input": 300 * calls, "output": 40 * calls}
    assert answer.rejected == ({"same": 3} if behaviour == "same" else {})
    # and asked again they may be good
    answer, server = ask([behaviour])
    assert bool(answer.captions) == (calls == 3) and len(server.log) == min(calls, 2)
    assert answer.usage["input"] == 300 * len(server.log)


def test_a_caption_that_cannot_believe_is_no_refusal():
    caption = "I can't believe how big this brown dog is"
    with OpenAIServer() as server:
        (answer,) = source(server).answers(items([caption]))
    assert answer.captions == (("existence", rewrite(caption)),)


def test_a_cut_answer_gets_more_room():
    answer, server = ask("length")
    first, second, third = (call["body"]["max_tokens"] for call in server.log)
    assert third == 4 * second == 16 * first and "stopped at" in answer.reason and "max_output_tokens" in answer.reason


def test_only_what_is_missing_is_asked_again():
    wanted = ("existence", "quantity", "location")
    answer, server = ask(["few"], wanted)
    caption = captions(1)[0]
    assert answer.captions == tuple((kind, rewrite(caption, n)) for n, kind in enumerate(wanted))
    last = server.log[1]["body"]["messages"][-1]["content"]
    assert "1. location" in last and "2." not in last and rewrite(caption) in last
    answer, server = ask("few", ("existence", "quantity"), attempts=1)
    assert answer.captions == (("existence", rewrite(caption)),) and not answer.failed
    assert answer.reason == "1 of 2: the model gave too few"


def test_endpoint_fails_after_answers():
    """What was got and paid for is kept; nothing got is asked again by the next run."""
    answer, _ = ask(["few", *["500"] * 9], ("existence", "quantity"), retries=1)
    assert len(answer.captions) == 1 and not answer.failed and answer.reason == "1 of 2: endpoint: 500: not now"
    assert answer.usage == {"input": 300, "output": 40}
    answer, _ = ask(["same", *["500"] * 9], retries=1)
    assert answer.failed and answer.usage == {"input": 300, "output": 40} and answer.rejected == {"same": 1}


@pytest.mark.parametrize(
    "behaviour, reason",
    [
        ("429", "429: not now"), ("500", "500: not now"), ("503", "503: not now"), ("hang", "no answer within 1 s"),
        ("drip", "no answer within 1 s"), ("reset", "no connection (ReadError"), ("body", "the response is not JSON"),
        ("html", "the response is not JSON"),
    ],
)  # fmt: skip
def test_trouble_that_passes_and_trouble_that_does_not(behaviour, reason):
    answer, server = ask([behaviour] * 2, timeout=1)
    assert answer.captions and answer.reason is None and len(server.log) == 3
    good, bad = captions(2)
    with OpenAIServer({bad: behaviour}) as server:  # for ever for one caption, where others are answered
        first, second = source(server, timeout=1, retries=2, concurrency=1).answers(items([good, bad]))
    assert first.captions and second.failed and second.reason.startswith(f"endpoint: {reason}")
    assert len(server.log) == 4 and second.usage == {}
    with OpenAIServer({good: behaviour, bad: behaviour}) as server:  # for all
        got, error = drain(source(server, timeout=1, retries=2, concurrency=1).answers(items([good, bad])))
    assert got == [] and f"has answered nothing: {reason}" in str(error) and len(server.log) == 3


@pytest.mark.parametrize("value", ["1", "1.2", "date"])
def test_retry_after_is_kept(value):
    if value == "date":
        value = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3))
    _, server = ask([f"429:{value}"])
    first, second = (call["time"] for call in server.log)
    assert second - first >= 1
    _, server = ask(["429"])
    first, second = (call["time"] for call in server.log)
    assert second - first < 0.9  # by BACKOFF alone


def test_retry_after_holds_for_all_requests():
    texts = captions(12)
    with OpenAIServer({texts[0]: ["429:3"]}, latency=0.1) as server:
        assert len(list(source(server, concurrency=2).answers(items(texts)))) == 12
        start = server.calls(texts[0])[0]["time"]
        assert not [e for e in server.log if start + 1 < e["time"] < start + 3]
        assert [e for e in server.log if e["time"] >= start + 3][9:]


def test_a_long_retry_after_is_waited_for_or_ends_the_run(monkeypatch):
    slept = []

    def sleep(self, seconds):
        slept.append(seconds)
        self._turn = 0.0

    monkeypatch.setattr(Endpoint, "_sleep", sleep)
    answer, _ = ask(["429:500", "503"])
    assert answer.captions and 500 <= slept[0] <= 625 and len(slept) == 2
    with pytest.raises(HaclError, match="asks to wait for 3600 s .+; run again after that"):
        ask("429:3600")


def test_every_item_is_answered_once_whatever_happens():
    kinds = (
        "ok 429:0.1 500 503 hang reset body cut empty schema null refusal filter sorry unicode fence chatter same few "
        "policy html drip no-usage"
    ).split()
    texts = captions(len(kinds) * 3)
    plan = {text: [kinds[i % len(kinds)]] * (i // len(kinds)) for i, text in enumerate(texts)}
    with OpenAIServer(plan) as server:
        answers = list(source(server, concurrency=8, timeout=0.5).answers(iter(items(texts))))
    assert sorted(a.index for a in answers) == list(range(len(texts)))
    refused = {"refusal", "filter", "sorry", "policy"}
    for answer in answers:
        kind = kinds[answer.index % len(kinds)]
        expect = answer.index < len(kinds) or kind not in refused
        assert bool(answer.captions) == expect and not answer.failed, (kind, answer)
        if expect and kind != "unicode":
            calls = server.calls(texts[answer.index])
            assert sum(call["sent"] for call in calls) == (
                kind not in ("chatter", "fence") or answer.index < len(kinds)
            )


def test_requests_in_flight():
    most = {}
    for concurrency in (5, 12):
        with OpenAIServer(latency=0.05) as server:
            assert len(list(source(server, concurrency=concurrency).answers(items(captions(60))))) == 60
            most[concurrency] = server.most
    assert 1 < most[5] <= 5 < most[12] <= 12


def test_items_are_taken_as_needed():
    taken = []

    def stream():
        for item in items(captions(30)):
            taken.append(item)
            yield item

    with OpenAIServer() as server:
        answers = source(server, concurrency=3).answers(stream())
        assert not taken
        for n in range(1, 6):
            next(answers)
            assert len(taken) <= n + 3
        answers.close()
        assert len(taken) < 10


def test_requests_per_minute():
    gaps = {}
    for pace in (300, None):
        with OpenAIServer({captions(1)[0]: ["500"]}) as server:
            list(source(server, requests_per_minute=pace).answers(items(captions(10))))
            times = sorted(entry["time"] for entry in server.log)
        assert len(times) == 11
        gaps[pace] = times[-1] - times[0]
    assert gaps[300] >= 1.9 > gaps[None]


# ---- what ends a run


def test_wrong_key_model_request_and_account():
    for settings_, plan, message in (
        ({}, "ok", r"refuses the key \(401: .*\*\*\*.*\); check the environment variable TEST_KEY"),
        ({"model": "x"}, "ok", r"does not know the model 'x'.+check model and base_url"),
        ({}, "403", r"refuses the key"),
        ({}, "bad", r"accepts no request \(400: Invalid value for 'temperature'"),
        ({}, "quota", r"no credit is left .+ add some, then run again"),
    ):
        texts = captions(8)
        with OpenAIServer(dict.fromkeys(texts, plan), key="sk-right" if "401" in message else KEY) as server:
            start = time.monotonic()
            got, error = drain(source(server, **settings_, concurrency=2).answers(items(texts)))
            assert re.search(message, str(error)) and time.monotonic() - start < 3, (message, error)
            assert got == [] and len(server.log) <= 6
            assert error.__cause__ is None and error.__context__ is None


def test_wrong_path_is_named():
    with OpenAIServer() as server:
        got, error = drain(source(server.base_url + "x/y").answers(items(captions(3))))
    assert not got and "check model and base_url" in str(error)


def test_a_bad_request_among_good_ones_fails_alone():
    texts = captions(6)
    with OpenAIServer({texts[3]: "bad", texts[4]: "policy"}) as server:
        answers = {a.index: a for a in source(server, concurrency=1).answers(items(texts))}
    assert answers[3].failed and answers[3].reason.startswith("endpoint: 400")
    assert not answers[4].failed and answers[4].reason == "refused by the model"
    assert all(answers[i].captions for i in (0, 1, 2, 5))


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    for n, concurrency in ((100, 4), (2, 16)):
        got, error = drain(source(url, concurrency=concurrency).answers(items(captions(n))))
        assert "cannot be reached: no connection (ConnectError" in str(error) and "check base_url" in str(error)
        assert got == []
    assert time.monotonic() - start < 5


def test_many_failures_in_a_row_end_the_run_and_scattered_ones_do_not():
    texts = captions(60)
    for bad, ends in ((texts[2:], True), ([t for i, t in enumerate(texts) if i % 20], False)):
        with OpenAIServer(dict.fromkeys(bad, "500")) as server:
            got, error = drain(source(server, concurrency=1, retries=0).answers(items(texts)))
        assert bool(error) == ends and [a.index for a in got] == list(range(2 if ends else 60))
        assert not ends or "25 requests in a row failed, the last with: 500" in str(error)


def test_requests_in_flight_are_finished_before_a_fatal_error(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 30)
    texts = captions(20)
    plan = {texts[0]: "401", texts[1]: "slow", texts[2]: "slow", texts[3]: "503", texts[4]: ["same", "503"]}
    with OpenAIServer(plan, latency=0.1) as server:
        start = time.monotonic()
        got, error = drain(source(server, concurrency=5).answers(items(texts)))
        assert "refuses the key" in str(error) and 0.5 < time.monotonic() - start < 5
        assert sorted(a.index for a in got if a.captions) == [1, 2]
        (paid,) = (a for a in got if not a.captions)  # an answer was paid for, none usable: asked again by the next run
        assert paid.index == 4 and paid.failed and paid.usage["input"] == 300


def test_an_error_of_checker_or_items_loses_nothing_paid():
    class Broken(Picky):
        def problem(self, item, candidate, taken=()):
            return super().problem(item, candidate, taken) if item.index else 1 / 0

    def stream():
        yield from items(captions(6))
        raise HaclError("record 6 is bad")

    cases = ({"checker": Broken()}, items(captions(6)), ZeroDivisionError), ({}, stream(), HaclError)
    for settings_, texts, expected in cases:
        got = []
        with OpenAIServer({captions(3)[2]: "slow"}, latency=0.1) as server:
            with pytest.raises(expected):
                for answer in source(server, **settings_, concurrency=3).answers(texts):
                    got.append(answer)
            asked = {entry["caption"] for entry in server.log} - (
                {captions(1)[0]} if expected is ZeroDivisionError else set()
            )
            assert {captions(6)[a.index] for a in got} == asked >= {captions(3)[2]} and len(asked) >= 2


def test_settings_are_checked(monkeypatch):
    url = "http://127.0.0.1:9/v1"
    for settings_, message in (
        ({"concurrency": 0}, "concurrency is 0"), ({"attempts": 0}, "attempts is 0"),
        ({"base_url": "localhost:80/v1"}, "base_url must be http"), ({"base_url": "http://h:x/v1"}, "base_url must be"),
        ({"base_url": f"http://u:{KEY}@h/v1"}, "base_url must be"), ({"base_url": f"http://h/?key={KEY}"}, "base_url"),
        ({"base_url": None, "key_env": "NO_KEY"}, "the environment variable NO_KEY is not set"),
    ):  # fmt: skip
        with pytest.raises(HaclError, match=message) as error:
            source(url, **settings_)
        assert KEY not in str(error.value)
    monkeypatch.setenv("TEST_KEY", "sk-söcret")
    with pytest.raises(HaclError, match="in TEST_KEY") as error:
        source(url)
    assert "cret" not in str(error.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hacl_llava[api]'")):
        source(url)


def test_key_placeholder_and_url_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with OpenAIServer(key="none") as server:
        (answer,) = source(server, key_env="NO_KEY").answers(items(captions(1)))
        assert answer.captions  # neither OPENAI_API_KEY nor anything else was sent
    with OpenAIServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        (answer,) = source(server, base_url=None).answers(items(captions(1)))
        assert answer.captions
        monkeypatch.setenv("TEST_KEY", f" {KEY}\n")  # as it comes from a file
        assert list(source(server).answers(items(captions(1))))[0].captions


def test_the_key_stays_inside(caplog, capsys, tmp_path):
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    texts, said = captions(4), []
    for key in (KEY, "sk-right"):
        plan = {texts[0]: "echo-key", texts[1]: ["429:0.1"], texts[2]: "reset", texts[3]: "format"}
        with OpenAIServer(plan, key=key, formats=("text",)) as server:
            s = source(server, retries=1)
            got, error = drain(s.answers(items(texts)))
            said += [repr(got), repr(s), str(s), repr(error), s.stopped]
            assert bool(error) == (key != KEY) and (error is None or "***" in str(error))
            assert key != KEY or "***" in repr(got)
            while error:
                said += [str(error), repr(error), repr(error.args)]
                error = error.__cause__ or error.__context__
    out = capsys.readouterr()
    logged = "".join(record.getMessage() + repr(record.args) for record in caplog.records)
    assert len(logged) > 1000  # the clients do log
    assert KEY not in "".join(map(str, said)) + out.out + out.err + logged + caplog.text
    # nor half of it, where a long message is cut
    assert KEY[:8] not in source("http://127.0.0.1:9/v1").endpoint.clean("x" * 290 + KEY)


def test_response_format_falls_back_once_for_all(capsys):
    for formats, types in ((("json_object", "text"), ["json_object"]), (("text",), ["json_object", None])):
        with OpenAIServer(formats=formats) as server:
            answers = list(source(server, concurrency=3).answers(items(captions(12))))
            assert all(a.captions and not a.failed for a in answers) and len(answers) == 12
            sent = [(e["body"].get("response_format") or {}).get("type") for e in server.log]
        assert sent.count(types[-1]) == 12 and len(sent) - 12 <= 3 * len(types)
        err = capsys.readouterr().err.splitlines()
        assert len(err) == len(types) and "going on with json_object." in err[0]
    answer, server = ask("ok", response_format="text")
    assert "response_format" not in server.log[0]["body"] and answer.captions


def test_max_completion_tokens(capsys):
    answer, server = ask("tokens")
    assert answer.captions and "max_completion_tokens" in server.log[1]["body"]
    assert "going on with max_completion_tokens." in capsys.readouterr().err


# ---- the bill


def test_spending_cap_is_kept_says_so_and_can_go_on():
    texts = captions(40)
    with OpenAIServer(latency=0.02) as server:
        s = source(server, price=PRICE, max_cost=0.05, spent={"input": 300, "output": 40}, concurrency=4)
        answers = list(s.answers(items(texts)))
        assert all(a.captions for a in answers) and len(answers) == len(server.log)
        spent = (len(answers) + 1) * REQUEST
        assert 0.05 - 3 * REQUEST < spent <= 0.05
        assert (
            s.stopped.startswith(f"stopped by the spending cap: ${spent:.4f} of $0.05")
            and "higher max_cost" in s.stopped
        )

        left = [item for item in items(texts) if item.index not in {a.index for a in answers}]
        s = source(server, price=PRICE, max_cost=0.05, spent=s.spent)
        assert list(s.answers(left)) == [] and s.stopped
        s = source(server, price=PRICE, max_cost=5.0, spent=s.spent)
        assert len(list(s.answers(left))) == len(left) and s.stopped is None
        assert s.spent == {"input": 300 * 41, "output": 40 * 41}


def test_spending_cap_between_attempts():
    texts = captions(3)
    with OpenAIServer(dict.fromkeys(texts, "same")) as server:
        s = source(server, price=PRICE, max_cost=2.5 * REQUEST, concurrency=1)
        (answer,) = s.answers(items(texts))
    assert (
        answer.failed and answer.reason == "the spending cap is reached" and s.stopped and answer.usage["input"] == 300
    )


def test_estimate():
    texts = captions(50)
    with OpenAIServer() as server:
        list(source(server).answers(items(texts)))
        sent = sum(len(json.dumps([e["body"]["messages"], e["body"]["response_format"]])) for e in server.log)
    about = estimate(Prompt(), 50, sum(map(len, texts)), 50, price=(1.0, 4.0))
    assert abs(about["input"] / (sent / 4) - 1) < 0.05 and 50 * 20 < about["output"] < 50 * 60
    assert about["dollars"] == pytest.approx((about["input"] + 4 * about["output"]) / 1e6)
    assert estimate(Prompt(), 0, 0, 0) == {"input": 0, "output": 0, "dollars": None}


# ---- stopping from outside


def test_closing_leaves_no_noise(caplog, capsys):
    with OpenAIServer(dict.fromkeys(captions(20)[1:], "hang")) as server:
        answers = source(server, concurrency=8).answers(items(captions(20)))
        assert next(answers).index == 0
        start = time.monotonic()
        answers.close()
        assert time.monotonic() - start < 1
        del answers
        gc.collect()
    assert not [r for r in caplog.records if r.name == "asyncio" and r.levelno > logging.INFO]
    assert capsys.readouterr().err == ""


def test_interrupt_leaves_no_noise():
    code = (
        "from test_hallucinate_api import *\n"
        "with OpenAIServer(dict.fromkeys(captions(20)[1:], 'hang')) as server:\n"
        "    for answer in source(server, concurrency=8).answers(items(captions(20))):\n"
        "        print('started', flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}:{HERE.parents[1]}"}
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=env)
    assert run.stdout.readline() == "started\n"
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=10)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "Task" not in err and "never" not in err and "Exception ignored" not in err


def test_import_is_light():
    code = "import sys, hacl_llava.hallucinate.api; assert not {'openai', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1], timeout=60)
