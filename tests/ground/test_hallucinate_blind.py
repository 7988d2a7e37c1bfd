"""That text alone does not tell hallucinated captions from true ones, and the audit that says so."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_llava.cli import main
from hacl_llava.config import DataError
from hacl_llava.hallucinate import KINDS, Item
from hacl_llava.hallucinate.audit import Pair, audit, edit_size, margins, read_pairs
from hacl_llava.hallucinate.blind import BITS, Candidate, Choice, features, fit, words
from hacl_llava.hallucinate.checks import normal
from hacl_llava.hallucinate.counts import Counts
from hacl_llava.hallucinate.lexicon import lexicon
from hacl_llava.hallucinate.rules import Dice, Rules, Text
from hacl_llava.hallucinate.source import RulesSource

COCO = Path(__file__).parents[1] / "data/coco_captions.json"
EVEN = dict.fromkeys(KINDS, 1.0)


def human():
    return [(r["image"], r["conversations"][1]["value"]) for r in json.loads(COCO.read_text(encoding="utf-8"))]


def made_file(path, separable, count=120):
    """Records whose hallucinated captions are told by a word of theirs, or cannot be told."""
    rng, records = random.Random(0), []
    for i in range(count):
        true, false = rng.sample(["dog", "cat", "bird", "horse", "cow", "sheep"], 2)
        false = "zebra" if separable else false
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"a {true} in a field"}]
        record = {"id": i, "image": f"{i}.jpg", "conversations": turns}
        records.append(
            record | {"hallucinated_captions": [f"a {false} in a field"], "hallucinated_kinds": ["existence"]}
        )
    path.write_text(json.dumps(records))
    return path


# --- the audit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separable, low, high", [(True, 0.98, 1.0), (False, 0.25, 0.6)])
def test_the_report_of_a_file_says_how_well_text_tells(tmp_path, separable, low, high, capsys):
    path = made_file(tmp_path / "made.json", separable)
    assert main(["hallucinate", str(path), "--report"]) == 0
    found = json.loads((tmp_path / "made.report.json").read_text())
    figure = found["blind"]["all"]
    assert low <= figure["value"] <= high and figure["interval"][0] <= figure["value"] <= figure["interval"][1]
    assert figure["pairs"] == found["blind"]["kinds"]["existence"]["pairs"] == 120
    assert found["length_ratio"] == [1, 1, 1] and found["edit_size"] == [1, 1, 1]
    page = (tmp_path / "made.report.md").read_text()
    assert f"{figure['value']:.3f}" in page and "Hardest to tell" in page and (tmp_path / "made.report.png").exists()
    assert found["hardest"][0][0] <= found["easiest"][0][0]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([{"caption": "a dog", "negative_caption": "a cat", "filename": "1"}], [("1", "a dog", "a cat", "unknown")]),
        ({"0": {"caption": "a dog", "negative_caption": "a cat"}}, [("a dog", "a dog", "a cat", "unknown")]),
        (
            [{"file_path": "1", "positive_sample": "a dog", "adversarial_samples": {"tree": "a dog by a tree"}}],
            [("1", "a dog", "a dog by a tree", "unknown")],
        ),
        (
            [{"caption": "a dog", "kind": "object", "hallucinated_captions": ["a cat", " "]}, {"caption": "no"}],
            [("a dog", "a dog", "a cat", "object")],
        ),
    ],
)
def test_files_of_others_are_read(tmp_path, rows, expected):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(rows))
    pairs, counts = read_pairs(path)
    assert [pair[1:] for pair in pairs] == expected and counts["with hallucinated captions"] == 1


def test_what_the_audit_cannot_measure_is_said(tmp_path, capsys, monkeypatch):
    path = tmp_path / "in.json"
    path.write_text('[{"caption": "a dog"}]')
    with pytest.raises(DataError, match="holds no hallucinated captions; expected"):
        read_pairs(path)
    assert main(["hallucinate", str(path)]) == 2 and "OUTPUT is missing" in capsys.readouterr().err
    made_file(path, True, count=3)
    assert main(["hallucinate", str(path), "--report"]) == 2
    assert "fewer than 5 images" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'hacl_llava\[plot\]'"):
        margins([])


def test_the_sample_is_the_same_each_time_and_a_part_of_the_file(tmp_path):
    path = made_file(tmp_path / "made.json", True)
    few, counts = read_pairs(path, most=30)
    assert few == read_pairs(path, most=30)[0] and len(few) == 30 and counts["captions"] == 120
    assert few != read_pairs(path, seed=1, most=30)[0] and set(few) <= set(read_pairs(path)[0])


@pytest.mark.parametrize(
    "caption, text, size", [("a dog", "a cat", 1), ("a dog sits", "two dogs sit", 3), ("a cat", "a cat by a tree", 3)]
)
def test_the_size_of_an_edit(caption, text, size):
    assert edit_size(caption, text) == size


# --- the choice -------------------------------------------------------------------------------------------------------


def made_candidates(count=400):
    """Captions of even words, candidates of which most say a word that no caption says, as rules do."""
    rng, found = random.Random(1), []
    things = ["dog", "cat", "bird", "horse"]
    for _ in range(count):
        true = rng.choice(things)
        others = [
            f"a {word} in a field" for word in (*things, "emu", "yak", "gnu", "eel", "asp", "boa") if word != true
        ]
        texts = rng.sample(others, 6)
        found.append((f"a {true} in a field", [Candidate(rng.choice(KINDS), text) for text in texts]))
    return found


def accuracy_of(pairs):
    return audit([Pair(i, str(i), *pair, "existence") for i, pair in enumerate(pairs)])["blind"]["all"]["value"]


def test_the_choice_lowers_blind_accuracy_and_chance_does_not():
    samples = made_candidates()
    rng, choice = random.Random(2), fit(samples, EVEN)
    blind = [(caption, choice.take(i, caption, found)[0][1]) for i, (caption, found) in enumerate(samples)]
    at_random = [(caption, rng.choice(found).text) for caption, found in samples]
    assert accuracy_of(blind) < 0.6 < 0.75 < accuracy_of(at_random)


def test_what_is_put_in_is_taken_out_as_often():
    samples = [s for s in made_candidates() if any(c.text.split()[1] in ("dog", "cat", "bird", "horse") for c in s[1])]

    def imbalance(choice):
        total = np.zeros(1 << BITS)
        for caption, found in samples:
            odds = np.exp(choice.scores(caption, found))
            for chance, candidate in zip(odds / odds.sum(), found):
                np.add.at(
                    total, *(a if k == 0 else a * chance for k, a in enumerate(features(words(caption), candidate)))
                )
        return np.abs(total).max()

    even = Choice(np.zeros(1 << BITS, dtype=np.float32), dict.fromkeys(KINDS, 0.0), 1, 0)
    assert imbalance(fit(samples, EVEN, penalty=0.1)) < 0.1 * imbalance(even)


def test_the_same_seed_gives_the_same_and_several_differ():
    samples = made_candidates(50)
    choice, again, other = fit(samples, EVEN, 3), fit(samples, EVEN, 3), fit(samples, EVEN, 3, seed=1)
    takes = [[c.take(i, *sample) for i, sample in enumerate(samples)] for c in (choice, again, other)]
    assert takes[0] == takes[1] != takes[2]
    assert all(len(set(taken)) == 3 for taken in takes[0])
    assert choice.take(0, "a dog", []) == []


@pytest.mark.once
def test_rules_choose_blindly_in_human_captions():
    rows = human()
    items = [Item(i, "", caption) for i, (_, caption) in enumerate(rows)]
    figures = {}
    for blind in (True, False):
        source = RulesSource()
        if blind:
            source.balance(items)
        answers = list(source.answers(items))
        pairs = [Pair(a.index, rows[a.index][0], rows[a.index][1], t, k) for a in answers for k, t in a.captions]
        figures[blind] = audit(pairs)["blind"]["all"]["value"]
        assert len(pairs) >= 0.97 * len(items)
        if blind:
            kinds = Counter(pair.kind for pair in pairs)
            assert min(kinds[kind] for kind in KINDS) > 0.1 * len(pairs)
            source.workers = 2
            assert list(source.answers(items[:300])) == answers[:300]
    assert figures[True] < 0.6 < 0.7 < figures[False]


class Biased:
    """A language model that finds most candidates less likely than their captions."""

    def judge(self, proposed):
        rng = random.Random(0)
        for _, found in proposed:
            yield [c._replace(likelihood=rng.gauss(-2, 3)) for c in found]


def test_a_language_model_is_balanced_like_words():
    made = made_candidates()
    samples = list(zip([caption for caption, _ in made], Biased().judge(made)))
    choice, rng, taken = fit(samples, EVEN), random.Random(0), []
    for i, (caption, found) in enumerate(samples):
        text = choice.take(i, caption, found)[0][1]
        taken.append(next(c.likelihood for c in found if c.text == text) < 0)
    by_chance = [rng.choice(found).likelihood < 0 for _, found in samples]
    assert np.mean(taken) < 0.6 < np.mean(by_chance)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a causal language model of a few words, of no sense."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    words = {word: i for i, word in enumerate("<unk> <s> </s> a dog cat sits on the couch red blue".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return str(folder)


def test_likelihoods_are_those_of_each_text_alone(small_model, monkeypatch):
    import torch

    from hacl_llava.hallucinate import likelihood

    model = likelihood.Likelihood(small_model)
    texts = ["a dog", "the red cat sits on the couch", "a blue dog sits", ""]
    with torch.no_grad():
        for text, value in zip(texts, model.of(texts)):
            ids = torch.tensor([[1, *model.tokenizer(text, add_special_tokens=False)["input_ids"], 2]])
            mean = -model.model(input_ids=ids, labels=ids).loss.item()
            assert value == pytest.approx(mean * (ids.shape[1] - 1), abs=1e-4)
    found = [Candidate("existence", "a cat"), Candidate("attribute", "a blue dog sits on the red couch the cat")]
    monkeypatch.setattr(likelihood, "FAR", 12.0)
    near, only = model.judge([("a dog", found), ("a dog", found[1:])])
    (alone,) = model.of(["a dog"])
    assert near == [found[0]._replace(likelihood=pytest.approx(model.of(["a cat"])[0] - alone))]
    assert [c.text for c in only] == [found[1].text]  # the likeliest where all are far


def test_a_model_that_is_none_is_refused(tmp_path):
    from hacl_llava.config import HaclError
    from hacl_llava.hallucinate.likelihood import Likelihood

    with pytest.raises(HaclError, match="--likelihood-model .* cannot be loaded .* give a folder"):
        Likelihood(str(tmp_path))


# --- candidates -------------------------------------------------------------------------------------------------------

VOCABULARY = sorted(lexicon().own)[::5] + "a an the two dogs in on red blue and , . of".split() * 20


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(VOCABULARY), min_size=3, max_size=16).map(" ".join), st.booleans(), st.booleans())
def test_candidates_differ_and_keep_the_form_of_the_caption(caption, capital, stop):
    caption = (caption[0].upper() + caption[1:] if capital else caption) + "." * stop
    rules, text = Rules(counts=Counts([caption])), Text(caption)
    found, _ = rules.candidates(Item(0, "", caption), text, rules.sites(text), Dice("0"))
    assert found == rules.candidates(Item(0, "", caption), text, rules.sites(text), Dice("0"))[0]
    texts = [t for _, t in found]
    assert len(set(texts)) == len(texts) and len(texts) <= 20
    for kind, candidate in found:
        assert kind in KINDS and normal(candidate) != normal(caption)
        assert candidate[0].isupper() == caption[0].isupper() or not caption[0].isalpha() or not candidate[0].isalpha()
        assert candidate.endswith(".") == caption.endswith(".")
        assert "  " not in candidate and candidate == candidate.strip()


def test_counts_say_what_stands_where():
    counts = Counts(["a red car on a street", "a red bus on a street", "an old car by a tree"] * 10)
    assert counts.of("red") == 20 and counts.of("red car") == 10 and counts.of("a") == 60  # "an" is "a"
    assert counts.weight("red", "bus", "on") > counts.weight("old", "bus", "by") > counts.weight("red", "emu", "on")
    assert counts.weight("red", "emu", "on") == counts.weight("old", "unseen thing", None)


def every(caption, kind):
    rules, text = Rules(), Text(caption)
    sites, item = {kind: rules.sites(text)[kind]}, Item(0, "", caption)
    return {t for seed in range(30) for _, t in rules.candidates(item, text, sites, Dice(str(seed)))[0]}


@pytest.mark.parametrize(
    "caption, kind, made",
    [
        ("Two dogs sit on a couch", "quantity", "A dog sits on a couch"),
        ("A dog sits on a couch", "quantity", "Dogs sit on a couch"),
        ("Dogs running in a field", "quantity", "A dog running in a field"),
        ("Several men are near a bus", "quantity", "A man is near a bus"),
        ("two men and three women are eating", "quantity", "three men and two women are eating"),
        ("A red car next to a blue bus", "attribute", "A blue car next to a red bus"),
        ("A big dog behind a cat", "location", "A cat behind a big dog"),
    ],
)
def test_edits_go_both_ways(caption, kind, made):
    assert made in every(caption, kind)


@pytest.mark.parametrize(
    "caption, never",
    [("Two girls in hats hugging", "girl in hats"), ("Their two dogs play with each other", "dog"),
     ("A room filled with furniture", "with chair"), ("There are two cats on the bed", "are a group"),
     ("A TV behind a lamp", "tV")],
)  # fmt: skip
def test_nothing_reads_broken(caption, never):
    texts = set().union(*(every(caption, kind) for kind in KINDS))
    assert texts and not any(f" {never} " in f" {t} " for t in texts)
