"""The rules and the checks: hallucinated captions from words alone."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_llava.config import HaclError
from hacl_llava.hallucinate import KINDS, Item
from hacl_llava.hallucinate.checks import Checker, Meaning, length, normal
from hacl_llava.hallucinate.lexicon import article, lexicon, plural, singulars
from hacl_llava.hallucinate.source import BLOCK, RulesSource, rewrite

COCO = Path(__file__).parents[1] / "data/coco_captions.json"
WORDS = lexicon()


@pytest.fixture(scope="module")
def captions():
    return [r["conversations"][1]["value"] for r in json.loads(COCO.read_text(encoding="utf-8"))]


def items_of(captions, per_caption=1):
    return [Item(i, f"record {i}", c, (), ("existence",) * per_caption) for i, c in enumerate(captions)]


def made(captions, **settings):
    per_caption = settings.pop("per_caption", 1)
    return list(RulesSource(**settings).answers(items_of(captions, per_caption)))


# --- on human captions ------------------------------------------------------------------------------------------------


def test_human_captions_are_rewritten_with_new_content_at_their_length(captions):
    answers = made(captions)
    got = [(captions[a.index], text) for a in answers for _, text in a.captions]
    assert len(got) >= 0.97 * len(captions)
    for caption, text in got:
        assert normal(text) != normal(caption)
        # other words, or the same ones in each other's place
        before, after = normal(caption).split(), normal(text).split()
        assert Counter(after) - Counter(before) or len(before) == len(after), f"{caption!r} -> {text!r} only leaves out"
    for measure in (length, len):  # in tokens, in characters
        ratios = [measure(text) / measure(caption) for caption, text in got]
        assert sum(0.7 <= r <= 1.4 for r in ratios) >= 0.95 * len(ratios)


@pytest.mark.parametrize(
    "types",
    [
        dict.fromkeys(KINDS, 1.0),
        {"existence": 4.0, "attribute": 3.0, "quantity": 2.0, "location": 1.0},
        {"quantity": 1.0, "location": 1.0},
    ],
)
def test_kinds_are_balanced_as_asked(captions, types):
    answers = made(captions, types=types)
    kinds = Counter(kind for a in answers for kind, _ in a.captions)
    assert set(kinds) == set(types)
    for kind, weight in types.items():
        assert kinds[kind] / sum(kinds.values()) == pytest.approx(weight / sum(types.values()), abs=0.03)


def test_several_for_a_caption_differ_in_kind_and_text(captions):
    answers = made(captions, per_caption=4)
    assert sum(len(a.captions) == 4 for a in answers) > 0.8 * len(answers)
    for a in answers:
        texts = [normal(t) for _, t in a.captions]
        assert len(set(texts)) == len(texts)
        assert (a.reason is None) == (len(texts) == 4)
    assert sum(len({k for k, _ in a.captions}) == 4 for a in answers) > 0.6 * len(answers)
    assert sum(len({k for k, _ in a.captions}) >= 3 for a in answers) > 0.85 * len(answers)


def test_deterministic_by_seed_whatever_the_workers_and_the_hash_seed(captions):
    first = made(captions)
    assert made(captions) == first
    assert made(captions, workers=2) == first
    other = made(captions, seed=1)
    assert sum(a.captions != b.captions for a, b in zip(first, other, strict=True)) > 0.8 * len(first)
    code = f"""
import json
from hacl_llava.hallucinate import Item
from hacl_llava.hallucinate.source import RulesSource
captions = [r["conversations"][1]["value"] for r in json.load(open({str(COCO)!r}))][:50]
items = [Item(i, "", c, (), ("existence",)) for i, c in enumerate(captions)]
print(json.dumps([a.captions for a in RulesSource().answers(items)]))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_block_depends_on_itself_alone(captions):
    many = (captions * 2)[: BLOCK + 100]
    whole = made(many)
    second = list(RulesSource().answers([i for i in items_of(many) if i.index >= BLOCK]))
    assert second == whole[BLOCK:]
    assert made(many[:100]) != whole[:100]  # control: a part of a block is balanced otherwise


def test_not_true_of_another_caption_of_the_image():
    caption = "A dog sits on a couch"
    free = {normal(t) for seed in range(60) for _, t in rewrite(caption, "existence", seed)}
    assert "a cat sits on a couch" in free
    source, kept = RulesSource({"existence": 1.0}), set()
    for seed in range(60):
        source.seed, source._rules = seed, None
        item = Item(0, "", caption, ("There is a cat and a rabbit in the room",), ("existence",))
        kept |= {normal(t) for _, t in source.block([item])[0].captions}
    assert kept and not any({"cat", "rabbit"} & set(t.split()) for t in kept)


# --- grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, many",
    [("dog", "dogs"), ("bus", "buses"), ("man", "men"), ("fireman", "firemen"), ("wolf", "wolves"), ("sheep", "sheep"),
     ("berry", "berries"), ("toy", "toys"), ("glass of wine", "glasses of wine"), ("stop sign", "stop signs"),
     ("potato", "potatoes"), ("child", "children"), ("knife", "knives"), ("bench", "benches")],
)  # fmt: skip
def test_plurals_and_back(one, many):
    assert plural(one) == many
    assert one == many or one in singulars(many)


@pytest.mark.parametrize(
    "word, expected",
    [("apple", "an"), ("dog", "a"), ("hour", "an"), ("unicorn", "a"), ("umbrella", "an"), ("UFO", "a"), ("old", "an"),
     ("European", "a"), ("one-way", "a"), ("uniform", "a"), ("useful", "a"), ("unusual", "an"), ("ukulele", "a")],
)  # fmt: skip
def test_articles(word, expected):
    assert article(word) == expected


def all_of(caption, kind, seeds=80):
    return {text for seed in range(seeds) for _, text in rewrite(caption, kind, seed)}


def test_the_article_follows_the_new_word(captions):
    texts = [t for seed in range(3) for a in made(captions, seed=seed) for _, t in a.captions]
    texts += [
        t
        for c in ("An apple on a table", "A red car near an old house", "A DOG AND AN ELEPHANT")
        for k in KINDS
        for t in all_of(c, k)
    ]
    wrong = []
    for text in texts:
        for found, following in re.findall(r"\b([Aa]n?|AN)\b ([A-Za-z-]+)", text):
            if found.lower() != article(following):
                wrong.append(text)
    known = [c for c in captions for f, w in re.findall(r"\b([Aa]n?)\b ([A-Za-z-]+)", c) if f.lower() != article(w)]
    assert len(wrong) <= 3 * len(known), wrong  # people write "a ugly bathroom", and it stays
    assert any(t.startswith("A ") for t in all_of("An apple on a table", "existence"))


def test_numbers_agree_with_noun_and_verb():
    texts = all_of("A dog sits on a red couch.", "quantity")
    assert "Three dogs sit on a red couch." in texts
    assert not any(
        re.search(r"\b(two|three|four|five|six|seven|eight|ten) (dog|couch|red couch)\b", t, re.I) for t in texts
    )
    assert not any(re.search(r"dogs (sits|is)\b", t) for t in texts)
    assert "There are two cats on the bed" in all_of("There is a cat on the bed", "quantity")
    assert all(t[0].isupper() for t in texts)
    for text in all_of("Two men are walking three dogs", "quantity"):
        assert re.search(r"(men are|A man is) walking .*dog", text)


def test_all_verbs_of_the_subject_agree_and_nouns_are_no_verbs():
    texts = all_of("A woman smiles and waves at the crowd", "quantity")
    assert any(t.endswith(" women smile and wave at the crowd") for t in texts)
    assert not any("waves" in t and "women" in t for t in texts)
    for text in all_of("A man on a pair of skis with a thumbs up", "quantity"):
        assert "pair of skis" in text or "men" not in text
        assert "thumbs up" in text


@pytest.mark.parametrize("caption", ["There are no cars on the long empty road", "A boy without a shirt and a hat"])
def test_what_is_denied_is_left(caption):
    for kind in KINDS:
        for text in all_of(caption, kind, 40):
            assert "no cars" in text or "without a shirt" in text, text


def test_a_text_longer_than_any_caption_is_left():
    for text in ("a " * 50_000, "dog, " * 20_000, "on top of " * 10_000):
        answer = RulesSource().block([Item(0, "", text)])[0]
        assert answer.reason == "too long"


def test_gender_follows_the_pronoun():
    texts = all_of("A man is walking with his dog on the beach in the morning", "existence", 120)
    people = {t.split()[1] for t in texts if not t.startswith("A man")}
    assert people and people <= {"boy", "elderly"}
    assert any(
        t.startswith(("A woman", "A girl")) for t in all_of("A man is walking with a dog on the beach", "existence")
    )


def test_every_mention_is_changed():
    for text in all_of("A dog looks at a ball while the dog next to it sleeps", "existence"):
        assert text.lower().count("dog") in (0, 2)


def test_the_rest_stays_as_it_was():
    caption = "  a RED car , parked  near “the café” — №5 on a street ! "
    for kind in KINDS:
        for text in all_of(caption, kind, 40):
            assert "“the café” — №5" in text and text.startswith("  ") and text.endswith(" ! ")


@pytest.mark.parametrize(
    "caption, never",
    [
        ("A man watches a fly fishing show", "dog watches"),
        ("The dogs park near the house can fly", "house tray"),  # "can" is no container here
        ("A person is watching tv on the couch", "is toy"),
    ],
)
def test_verbs_are_not_taken_for_nouns(caption, never):
    assert not any(never in t for kind in KINDS for t in all_of(caption, kind, 30))


def test_captions_of_the_web():
    # tokenised, lower case, without articles: as in LLaVA's 558k (BLIP's captions of LAION, CC, SBU)
    for caption in (
        "large grey rug for sale live - 5 x 8 feet",
        "a grey watch with an army style strap",
        "a t - shirt with a dragon on it",
        "olive oil in a glass bottle with green olives stock photo",
        "the white bedroom has a large bed , a lamp and a window",
    ):
        answers = [rewrite(caption, seed=s) for s in range(5)]
        assert all(answers), caption


@pytest.mark.parametrize(
    "text",
    ["", "   ", "…", "12345", "Un perro duerme en la playa con su dueño", "Ein Hund liegt auf dem Sofa neben der Katze",
     "一只狗坐在沙发上", "собака сидит на диване", "le chat est sur la table de la cuisine", "asdf qwer zxcv"],
)  # fmt: skip
def test_what_is_not_english_is_left(text):
    assert rewrite(text) == []
    answer = RulesSource().block([Item(0, "", text)])[0]
    assert answer.captions == () and answer.reason and not answer.failed


def test_an_unknown_kind_is_refused():
    with pytest.raises(HaclError, match="kind is 'colour', allowed are existence"):
        rewrite("A red dog", "colour")


def test_no_torch_is_loaded():
    code = "import sys, hacl_llava.hallucinate.run, hacl_llava.hallucinate.command; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- properties -------------------------------------------------------------------------------------------------------

VOCABULARY = (
    sorted(WORDS.own)
    + sorted(WORDS.attributes)
    + "a an the of on in with is are two 3 and , . ' - his its".split() * 20
)
ANY_TEXT = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(VOCABULARY), max_size=25).map(" ".join),
    st.lists(st.one_of(st.sampled_from(VOCABULARY), st.text(max_size=8)), max_size=20).map(" ".join),
    st.lists(st.sampled_from(VOCABULARY), max_size=12).map(lambda w: " ".join(w).upper()),
)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT, st.integers(0, 2**32), st.sampled_from([None, *KINDS]), st.integers(1, 4))
def test_never_raises_never_the_same_always_repeatable(caption, seed, kind, count):
    found = rewrite(caption, kind, seed, count)
    assert found == rewrite(caption, kind, seed, count)
    assert len(found) <= count and len({normal(t) for _, t in found}) == len(found)
    for got, text in found:
        assert got in KINDS and (kind is None or got == kind)
        assert normal(text) != normal(caption) and normal(text)
        assert Checker().problem(Item(0, "", caption), text, sure=True) is None
        # the checks count the two numbers of a fraction like ¼
        assert 0.7 <= length(text) / max(length(caption), 1) <= 1.4 or not caption.isascii()


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, ANY_TEXT, st.lists(ANY_TEXT, max_size=3))
def test_the_checks_never_raise_and_refuse_what_is_equal(caption, candidate, others):
    checker, item = Checker(), Item(0, "", caption, tuple(others))
    checker.problem(item, candidate)
    assert checker.problem(item, caption) is not None
    assert checker.problem(item, f" {caption.upper()}!! ") is not None or not caption.isascii()
    for other in others:
        assert checker.problem(item, other) is not None
    if candidate.strip():
        assert checker.problem(item, candidate, (candidate,)) is not None


# --- the checks -------------------------------------------------------------------------------------------------------

CAPTION = "A dog sits on a red couch near two windows."


@pytest.mark.parametrize(
    "caption, candidate, problem",
    [
        (CAPTION, "A cat sits on a red couch near two windows.", None),
        (CAPTION, "A dog sits on a blue couch near two windows.", None),
        (CAPTION, "A dog sits on a red couch near three windows.", None),
        (CAPTION, "A dog sits under a red couch near two windows.", None),
        (CAPTION, "a DOG sits on a red couch, near two windows", "same as the caption"),
        (CAPTION, "A dog is sitting on a red sofa near 2 windows.", "paraphrase"),
        (CAPTION, "An animal sits on a red couch near two windows.", "paraphrase"),
        (CAPTION, "A dog sits on a couch near two windows.", "paraphrase"),
        (CAPTION, "Two windows near a red couch, a dog sits on it.", "paraphrase"),
        (CAPTION, "A dog sits on a red couch beside two windows.", "paraphrase"),
        (CAPTION, "A cat.", "length ratio"),
        (CAPTION, "Xylophone bananas quickly jump over nine purple moons tonight.", "unrelated"),
        ("A dog.", "Some cats.", None),
        (CAPTION, "A **cat** sits on a red couch near two windows.", "chatter"),
        (CAPTION, "existence: a cat sits on a red couch near two windows", "chatter"),
        (CAPTION, "A cat sits on a red couch near two windows (existence)", "chatter"),
        (CAPTION, "1. A cat sits on a red couch near two windows.", "chatter"),
        (CAPTION, "“A cat sits on a red couch near two windows.”", "chatter"),
        (CAPTION, "A 猫 sits on a red couch near two windows.", "another language"),
        ("A red and white bus", "A white and red bus", "paraphrase"),
        ("A photo of a dog", "A picture of a dog", "paraphrase"),
        ("Time 12:30 on a clock (old)", "Time 12:45 on a clock (old)", None),
        ("一只狗坐在沙发上", "三辆蓝色卡车停着", "unrelated"),
        (CAPTION, CAPTION + " And a cat sleeps on the floor of the room.", "length ratio"),
        (CAPTION, "Here is a cat that sits on a blue couch near windows.", "chatter"),
        (CAPTION, "Caption: A cat sits on a red couch near two windows.", "chatter"),
        (CAPTION, "A hallucinated cat sits on a red couch near two windows.", "chatter"),
        (CAPTION, "A cat sits on a red couch\nnear two windows.", "chatter"),
        (CAPTION, "A cat sits on a red couch near two windows.</s>", "chatter"),
        (CAPTION, "  ", "empty"),
        (CAPTION, "?!", "empty"),
        ("The door is open.", "The door is closed.", None),
        ("The door is open.", "The door is not open.", None),
        ("The door is not open.", "The door is closed.", "paraphrase"),
        ("A man with a hat rides.", "A man without a hat rides.", None),
        ("A red car and a blue bus.", "A blue car and a red bus.", None),
        ("A dog and a cat.", "A cat and a dog.", "paraphrase"),
        ("A dog chases a cat.", "A cat chases a dog.", None),
        ("A dog chases a cat.", "A cat is chased by a dog.", "paraphrase"),
        ("A cat lying left of a dog", "A dog lying left of a cat", None),
        ("A man rides a horse", "A surfer rides a horse", "paraphrase"),  # a man may be a surfer
        ("一只狗坐在沙发上", "一只猫坐在沙发上", None),
    ],
)
def test_what_is_taken_and_what_is_not(caption, candidate, problem):
    assert Checker().problem(Item(0, "", caption), candidate) == problem


def test_other_captions_of_the_image():
    others = ("A grey cat on a bed", "Three pillows and a lamp")
    item = Item(0, "", "A dog sleeps on a bed", others)
    checker = Checker()
    assert checker.problem(item, "A cat sleeps on a bed") == "true of another caption"
    assert checker.problem(item, "a grey cat on a bed") == "caption of the same image"
    assert checker.problem(item, "A rabbit sleeps on a bed") is None
    assert checker.problem(item, "A cat and a rabbit on a bed") is None  # the rabbit is in none
    assert checker.problem(item._replace(others=()), "A cat sleeps on a bed") is None


def test_meaning_reads_what_matters():
    said = Meaning("Two dogs don't sit in front of a fire hydrant")
    assert said.numbers == {2: 1} and said.negations == 1 and said.relations == {"in front of": 1}
    assert {"dog", "fire hydrant"} <= said.words


def test_the_vocabulary_is_sound():
    for name, group in WORDS.groups.items():
        assert all(other in WORDS.groups for other in group.other), name
        assert len(set(group.words)) == len(group.words), name
        for word in group.words:
            assert WORDS.noun(word), word
    for scene, members in WORDS.scene_members.items():
        assert len(members) > 5, scene
    assert WORDS.related("taxi", "car") and WORDS.related("dog", "animal") and WORDS.related("sofa", "couch")
    assert not WORDS.related("dog", "cat") and not WORDS.related("red", "blue")


def test_few_hallucinated_objects_are_in_the_image_after_all():
    # COCO's boxes know what the caption does not say; the figures of the docs are for 20 seeds
    measure = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/hallucinate.py"))["accidentally_true"]
    alone, with_others = measure(False, seeds=3), measure(True, seeds=3)
    assert 0 < with_others < alone < 0.05
    rules = RulesSource.block
    try:  # control: words of things that are in the image are found out
        RulesSource.block = lambda self, items: [
            rules(self, [i])[0]._replace(captions=(("existence", i.caption + " bottle car chair cup dog pizza train"),))
            for i in items
        ]
        assert measure(False, seeds=1) > 0.15
    finally:
        RulesSource.block = rules


def test_the_sample_in_the_results_is_what_the_rules_give():
    root = Path(__file__).parents[2]
    namespace = runpy.run_path(str(root / "benchmarks/hallucinate.py"))
    written = (root / "benchmarks/results/hallucinated-captions-sample.md").read_text(encoding="utf-8")
    assert written.endswith(namespace["sample"]() + "\n"), "run: python benchmarks/hallucinate.py --sample"
