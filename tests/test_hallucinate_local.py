"""The source ``local`` and the NLI check: real models, made tiny on disk."""

import json
import random

import pytest
import torch
import transformers

from hacl_llava.cli import main
from hacl_llava.config import HaclError
from hacl_llava.hallucinate import Item
from hacl_llava.hallucinate.checks import Checker, Entailment
from hacl_llava.hallucinate.local import LocalSource
from hacl_llava.hallucinate.prompts import Prompt
from hacl_llava.records import stream_records

CAPTIONS = ("two red dots near a blue cross", "one green ring above a red cross")
ANSWERS = ("five red dots near a blue cross", "one green ring below a red cross")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def answer(caption):
    return json.dumps({"captions": [{"kind": "quantity", "caption": caption}]})


@pytest.fixture(scope="module")
def learned(mini, tmp_path_factory):
    """A tiny LLM with a chat template that has learned its answers to two captions by heart."""
    folder = tmp_path_factory.mktemp("learned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini.llm, use_fast=False)
    tokenizer.chat_template = TEMPLATE
    model = transformers.AutoModelForCausalLM.from_pretrained(mini.llm)
    prompt, rows = Prompt(system="Rewrite."), []
    for caption, text in zip(CAPTIONS, ANSWERS, strict=True):
        messages = prompt.messages(Item(0, "", caption, (), ("quantity",)))
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        first = tokenizer(asked, add_special_tokens=False).input_ids
        then = tokenizer(answer(text), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append((first + then, [-100] * len(first) + then))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        ids, labels = rows[step % 2]
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 and loss < 0.01:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def record(i, caption):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
    return {"id": i, "image": f"{i}.jpg", "conversations": turns}


def test_a_local_model_answers_in_batches_and_the_checks_hold(learned, tmp_path, capsys):
    texts = [*CAPTIONS, CAPTIONS[0], "a house", *CAPTIONS]
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps([record(i, t) for i, t in enumerate(texts)]))
    (tmp_path / "prompt.txt").write_text("Rewrite.")
    arguments = ["hallucinate", source, out, "--source", "local", "--local-model", learned, "--temperature", "0"]
    arguments += [
        "--types",
        "quantity",
        "--prompt-file",
        tmp_path / "prompt.txt",
        "--batch-size",
        "4",
        "--attempts",
        "1",
    ]
    arguments += ["--max-output-tokens", "160"]
    assert main([str(a) for a in arguments]) == 0
    made = [r.get("hallucinated_captions") for _, r in stream_records(out)]
    known = [[ANSWERS[0]], [ANSWERS[1]], [ANSWERS[0]], made[3], [ANSWERS[0]], [ANSWERS[1]]]
    assert made == known  # left-padded rows of a batch answer as alone
    lines = [json.loads(x) for x in (tmp_path / "out.json.journal").read_text().splitlines()[1:]]
    assert all(x["source"] == "local" and x["usage"]["input"] > 20 and x["usage"]["output"] > 5 for x in lines)
    assert lines[0]["usage"] == lines[2]["usage"]  # padding is not counted


def test_an_untrained_model_is_reported_not_believed(mini, tmp_path, capsys):
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps([record(0, "a dog on a bed"), record(1, "a cat near the red table")]))
    arguments = ["hallucinate", source, out, "--source", "local", "--local-model", mini.llm, "--max-output-tokens", "8"]
    assert main([str(a) for a in arguments]) == 0
    said = capsys.readouterr().out
    assert "0 of 2 records" in said and ("no usable answer" in said or "every candidate was rejected" in said)
    assert not any("hallucinated_captions" in r for _, r in stream_records(out))


def test_refusals_chatter_and_repeats(monkeypatch):
    said = {
        "a dog": ["I'm sorry, I can't do that."],
        "a dog on a big bed": ["{nonsense", answer("a dog on a big bed"), answer("a cat on a big bed")],
        "a cow on a hill": [answer("a cow on a hill")] * 9,
    }
    source, asked = LocalSource("none", Checker(), attempts=3), []

    def generate(works, attempt):
        asked.append([w.item.caption for w in works])
        for work in works:
            yield said[work.item.caption].pop(0), {"input": 10, "output": 5}

    monkeypatch.setattr(source, "_generate", generate)
    found = list(source.answers(Item(i, "", c) for i, c in enumerate(list(said))))
    assert [a.reason for a in found] == ["refused by the model", None, "every candidate was rejected"]
    assert found[1].captions == (("quantity", "a cat on a big bed"),) and found[1].rejected == {
        "same as the caption": 1
    }
    assert [a.usage["input"] for a in found] == [10, 30, 30]
    assert asked[1:] == [["a dog on a big bed", "a cow on a hill"]] * 2  # a refusal is not asked again


def test_models_that_cannot_be_loaded(tmp_path):
    items = [Item(0, "", "a dog")]
    with pytest.raises(HaclError, match="--local-model .*nowhere: cannot be loaded"):
        list(LocalSource(str(tmp_path / "nowhere"), Checker()).answers(items))
    with pytest.raises(HaclError, match="--nli-model .*nowhere: cannot be loaded"):
        Entailment(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("strict", [False, True])
def test_templates_without_a_system_role(mini, strict):
    source = LocalSource(str(mini.llm), Checker())
    source._load()
    source.tokenizer.chat_template = TEMPLATE.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        if strict
        else "{% for m in messages %}",
    )
    text = source._text(Prompt(system="Be wrong.").messages(Item(0, "", "a dog")))
    assert "Be wrong." in text and text.endswith("<assistant> ") and ("<system>" in text) != strict
    source.tokenizer.chat_template = None
    assert source._text(Prompt(system="Be wrong.").messages(Item(0, "", "a dog"))).endswith("ASSISTANT: ")


def test_the_nli_check(mini, tmp_path):
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini.llm, use_fast=False)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a dog cat sits on red couch bed the".split()]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3, id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"},
        label2id={"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    pairs = [
        ("a dog sits on a red couch", "a dog sits on a couch"),
        ("a dog sits on a red couch", "a cat sits on a bed"),
    ]
    labels, optimizer = torch.tensor([2, 0]), torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        inputs = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    entails = Entailment(str(tmp_path / "nli"))
    assert entails(pairs) == [True, False]
    item = Item(0, "", "a dog sits on a red couch")
    assert Checker(entails=entails).problem(item, "a cat sits on a bed") is None
    config.id2label = {0: "yes", 1: "no", 2: "maybe"}
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(HaclError, match="expected one named 'entailment'"):
        Entailment(str(tmp_path / "other"))
    source = tmp_path / "in.json"
    source.write_text(json.dumps([record(i, "a dog sits on a red couch") for i in range(3)]))
    random.seed(0)
    args = ["hallucinate", source, tmp_path / "out.json", "--nli-model", tmp_path / "nli"]
    assert main([str(a) for a in args]) == 0
