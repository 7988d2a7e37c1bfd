"""One client for generating, answering and judging: reasoning, bad endpoints (retries: test_hallucinate_api).

A bad endpoint ends each of the three with its cause, and leaves nothing that looks like an item's own failure.
"""

import json
import re

import pytest

pytest.importorskip("openai")

from openai_server import KEY, OpenAIServer, completion  # noqa: E402
from PIL import Image  # noqa: E402

from hacl_llava import cli  # noqa: E402
from hacl_llava.common import endpoint  # noqa: E402
from hacl_llava.common.endpoint import Endpoint, NotAnswered, read_reply  # noqa: E402
from hacl_llava.config import HaclError  # noqa: E402


@pytest.fixture(autouse=True)
def environment(to_endpoints, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF", 0.002)


@pytest.mark.parametrize(
    "content, finish, text",
    [
        ("a dog", "stop", "a dog"),
        ("<think>a cat?</think>\n a dog ", "stop", "a dog"),
        ("\n<think>\n</think>a dog", "stop", "a dog"),
        ("a cat? </think> no </think>a dog", "stop", "a dog"),  # opened by the template
        ("[THINK]a cat?[/THINK]a dog", "stop", "a dog"),
        ("<thinking>a cat?</thinking>a dog", "stop", "a dog"),
        ("<think>a cat? {}", "length", ""),
        ("<think>a cat? {}", "stop", ""),
        ("I think <think> is a tag", "stop", "I think <think> is a tag"),
        ("a dog, cut o", "length", "a dog, cut o"),
        ([{"type": "thinking", "thinking": [1]}, {"type": "text", "text": "a dog"}], "stop", "a dog"),
        (None, "length", ""),
    ],
)
def test_reasoning_is_taken_away(content, finish, text):
    reply = read_reply(completion(content, finish, reasoning_content="a cat?"))
    assert reply.text == text and reply.cut == (finish == "length") and not reply.refused


def test_reasoning_that_the_template_opens_is_known_by_an_earlier_reply():
    cut = completion("a cat? a dog? a bi", "length")
    assert read_reply(cut).text == "a cat? a dog? a bi"
    seen = read_reply(completion("a cat? </think>a dog"))
    assert seen.thinks and read_reply(cut, seen.thinks).text == ""
    assert not read_reply(completion("<think>hm</think>a dog")).thinks


def test_reasoning_that_takes_all_the_room_is_given_more():
    def respond(body):
        asked.append(body["max_tokens"])
        return completion(None, "length", reasoning_content="hm") if len(asked) < enough else completion("a dog")

    for enough, rooms in ((3, [10, 40, 160]), (9, [10, 40, 160])):
        asked = []
        with OpenAIServer(responses=respond) as server:
            where = Endpoint("m", server.base_url)
            if enough == 3:
                assert where.ask([{"role": "user", "content": "?"}], 10) == "a dog"
            else:
                with pytest.raises(NotAnswered, match="no text within 160 tokens; allow more"):
                    where.ask([{"role": "user", "content": "?"}], 10)
        assert asked == rooms


# ---- generating, answering, judging


def generate(url, out, images):
    texts = [f"a brown dog with number {i} runs over wet grass behind a house" for i in range(4)]
    turns = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}] for text in texts]
    (out / "in.json").write_text(
        json.dumps([{"id": i, "image": f"{i}.png", "conversations": t} for i, t in enumerate(turns)])
    )
    prompt = out / "prompt.yaml"
    prompt.write_text("timeout: 2\nattempts: 1\n")
    to = ["--base-url", url, "--source", "api", "--model", "m", "--workers", "2", "--prompt-file", str(prompt)]
    return cli.main(["hallucinate", str(out / "in.json"), str(out / "out.json"), *to]), out / "out.json.journal"


def answer(url, out, images):
    lines = [{"question_id": i, "image": f"{i}.png", "text": f"Is it dog {i}?", "label": "yes"} for i in range(4)]
    (out / "pope.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    to = ["--model", "api:m", "--base-url", url, "--images", str(images), "--concurrency", "2"]
    status = cli.main(["eval", *to, "--output", str(out / "eval"), "--pope", str(out / "pope.json")])
    return status, out / "eval/pope-pope/answers.jsonl"


def judge(url, out, images):
    rows = [
        {"question_type": "other", "image_src": f"https://x.org/{i}.png", "image_content": ["dog"],
         "question": f"What is in image {i}?", "gt_answer": "a dog", "model_answer": ""}
        for i in range(4)
    ]  # fmt: skip
    (out / "mmhal.json").write_text(json.dumps(rows))
    with OpenAIServer(responses=lambda body: completion("a dog")) as server:
        to = ["--model", "api:m", "--base-url", server.base_url, "--images", str(images), "--concurrency", "2"]
        to += ["--judge", "api:m", "--judge-base-url", url, "--mmhal", str(out / "mmhal.json")]
        status = cli.main(["eval", *to, "--output", str(out / "eval")])
    return status, out / "eval/mmhal-bench/judgements.jsonl"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (4, 4)).save(folder / f"{i}.png")
    return folder


HTML = b"<html><body>Please log in to the proxy</body></html>"
BAD = {  # what the server does: (settings of it, what the run says)
    "key": ({"key": "sk-right"}, "refuses the key"),
    "model": ({"responses": lambda body: (404, {"error": {"message": "no model m"}})}, "does not know the model 'm'"),
    "a model by another name": (
        {"responses": lambda body: (400, {"error": {"message": "m is not a valid model ID"}})},
        "does not know the model 'm'",
    ),
    "credit": ({"responses": lambda body: (402, {"error": {"message": "pay"}})}, "no credit is left"),
    "429 for ever": ({"responses": lambda body: (429, {"error": {"message": "slow down"}})}, "answered nothing: 429"),
    "a broken server": ({"responses": lambda body: (502, HTML)}, "answered nothing: 502"),
    "a proxy's page": ({"responses": lambda body: (200, HTML)}, "answered nothing: the response is not JSON"),
    "a proxy that wants a password": ({"responses": lambda body: (407, HTML)}, "accepts no request (407"),
    "another service": ({"responses": lambda body: (200, {"ok": True})}, "answered nothing: the response is no chat"),
    "a wrong setting": ({"responses": lambda body: (400, {"error": {"message": "no"}})}, "accepts no request (400"),
}


@pytest.mark.parametrize("who", [generate, answer, judge])
@pytest.mark.parametrize("bad", [*BAD, "no route", "a wrong path"])
def test_a_bad_endpoint_ends_the_run_and_nothing_is_written_down(who, bad, tmp_path, images, capsys):
    how, said = BAD.get(bad, ({}, "cannot be reached" if bad == "no route" else "is not the right address"))
    with OpenAIServer(**how) as server:
        url = server.base_url + "/x" * (bad == "a wrong path")
        if bad != "no route":
            status, path = who(url, tmp_path, images)
    if bad == "no route":
        status, path = who(url, tmp_path, images)
    error = capsys.readouterr().err.split("error: ")[-1]
    assert status == 2 and said in error and len(error.splitlines()) == 1, error
    lines = path.read_text().splitlines() if path.exists() else []
    assert lines[who is generate :] == []  # a journal of captions has a header


@pytest.mark.parametrize("who", [generate, answer, judge])
def test_what_fails_by_itself_is_written_down(who, tmp_path, images):
    good = {generate: '{"captions": ["a brown cat with number 1 runs over wet grass behind a house"]}', answer: "yes"}

    def respond(body):
        if re.search(r"(number|dog|image) 1\b", str(body["messages"][-1]["content"])):
            return 400, {"error": {"message": "blocked", "code": "content_filter"}}
        return completion(good.get(who, "Rating: 6"))

    with OpenAIServer(responses=respond) as server:
        status, path = who(server.base_url, tmp_path, images)
    lines = [json.loads(line) for line in path.read_text().splitlines()][who is generate :]
    assert status == 0 and len(lines) == 4 and not any(line.get("failed") for line in lines)
    (refused,) = (line for line in lines if "refused" in str(line))
    assert 1 in (refused.get("record"), int(refused.get("question_id", 0)))


# ---- many requests


def test_what_the_endpoint_fails_at_is_held_back_until_it_answers_again():
    busy, own = NotAnswered("500", busy=True), NotAnswered("too long")

    def run(results, **more):
        where = Endpoint("m", "http://127.0.0.1:9/v1", concurrency=1)
        vars(where).update(more)

        def one(item):
            if isinstance(results[item], Exception):
                raise results[item]
            where.alive = True
            return results[item]

        got = []
        try:
            for item, _ in where.each(one, range(len(results))):
                got.append(item)
        except HaclError as error:
            return got, str(error)
        return got, None

    assert run(["ok", busy, busy, "ok", busy]) == ([0, 1, 2, 3, 4], None)
    got, error = run(["ok", own, *[busy] * 40])
    assert got == [0, 1] and "25 requests in a row failed, the last with: 500" in error
    got, error = run([own, "ok"])
    assert got == [] and "accepts no request (too long)" in error
    assert run([own, "ok"], known=True) == ([0, 1], None)  # it did answer before: this one is to blame
    assert run([own], known=True) == ([0], None)
    refused = NotAnswered("policy", refused=True)
    assert run([refused] * 60) == (list(range(60)), None)  # an answer


def test_items_that_wait_for_others_are_not_lost():
    where, waited = Endpoint("m", "http://127.0.0.1:9/v1", concurrency=3), []
    where.alive = True

    def items():
        yield 0
        while not waited:
            yield None
        yield 1

    def one(item):
        raise NotAnswered("500", busy=True)

    got = []
    for item, _ in where.each(one, items()):
        got.append(item)
        waited.append(item)
    assert got == [0, 1]
