"""The scorers of POPE, CHAIR, AMBER and MMHal-Bench, and the statistics over them."""

import json
import math
import random
import re
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_llava.common import statistics
from hacl_llava.common.endpoint import NotAnswered
from hacl_llava.common.files import read_records
from hacl_llava.config import DataError, HaclError
from hacl_llava.evaluation import Question, amber, chair, mmhal, pope
from hacl_llava.evaluation.benchmark import SHORT

DATA = Path(__file__).parents[1] / "data" / "evaluation"
FULL = Path(__file__).parents[3] / "shared" / "data" / "pope"  # the whole files, where they are at hand


def items_of(task, answers, questions=None):
    return [
        {"id": q.id, "image": q.image, "answer": a, **task.score(q, a)}
        for q, a in zip(questions or task.questions, answers, strict=True)
    ]


def values(module, items):
    return {name: float(f(statistics.totals(items))) for name, f in module.METRICS.items()}


def read_one(module, *arguments):
    (task,) = module.read(*arguments)
    return task


def records_of(path):
    return [record for _, record in read_records(path)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- statistics

ACCURACY = {
    "accuracy": lambda c: statistics.ratio(c["right"], c["all"]),
    "rare": lambda c: statistics.ratio(c["rare_right"], c["rare"]),
}


def some_items(clusters, each, seed=0, chance=0.8):
    rng = random.Random(seed)
    return [
        {"id": f"{i}-{j}", "image": str(i), "counts": {"right": int(rng.random() < chance), "all": 1}}
        for i in range(clusters)
        for j in range(each)
    ]


def loop_bootstrap(items, seed, samples, by="image"):
    """Resampling as one would write it down, one image at a time."""
    groups = {}
    for item in items:
        groups.setdefault(item[by], []).append(item["counts"])
    rng, found = np.random.default_rng(seed), []
    for _ in range(samples):
        drawn = [list(groups.values())[i] for i in rng.integers(0, len(groups), len(groups))]
        right = sum(c["right"] for group in drawn for c in group)
        found.append(right / sum(c["all"] for group in drawn for c in group))
    return np.percentile(found, [2.5, 97.5])


def test_interval_is_that_of_a_plain_loop_over_images():
    items = some_items(40, 5)
    for image in range(0, 40, 2):  # answers on one image are alike
        for item in items[5 * image : 5 * image + 5]:
            item["counts"]["right"] = image % 4 // 2
    found = statistics.summarise(ACCURACY, items, samples=4000)["accuracy"]
    assert found["value"] == sum(i["counts"]["right"] for i in items) / 200
    expected = loop_bootstrap(items, 1, 4000)
    assert found["interval"] == pytest.approx(expected, abs=0.016)
    # the control: questions resampled one by one give an interval that is much too narrow
    wrong = loop_bootstrap(items, 1, 4000, by="id")
    assert found["interval"] != pytest.approx(wrong, abs=0.03)
    one_by_one = statistics.summarise(ACCURACY, items, [i["id"] for i in items], samples=4000)
    assert one_by_one["accuracy"]["interval"] == pytest.approx(wrong, abs=0.016)


def test_paired_interval_is_that_of_plain_numpy():
    """Against resampled sums of images; the control, resampled items, is much too narrow."""
    a, b = some_items(60, 4, 0, 0.9), some_items(60, 4, 1, 0.5)
    for i in range(0, 240, 4):  # what is wrong on an image is wrong in all of its questions
        for items in (a, b):
            for item in items[i : i + 4]:
                item["counts"] = dict(items[i]["counts"])
    found = statistics.paired(ACCURACY, a, b, samples=4000)["accuracy"]
    right = np.array([x["counts"]["right"] - y["counts"]["right"] for x, y in zip(a, b)])
    rng, expected = np.random.default_rng(5), {}
    for name, sums, of in (("images", right.reshape(60, 4).sum(1), 60), ("items", right, 240)):
        differences = sums[rng.integers(0, of, (4000, of))].sum(1) / 240
        expected[name] = np.percentile(differences, [2.5, 97.5])
    assert found["difference"] == pytest.approx(right.mean())
    assert found["interval"] == pytest.approx(expected["images"], abs=0.02)
    assert found["interval"] != pytest.approx(expected["items"], abs=0.05)


def test_many_images_take_little_memory():
    statistics.summarise(ACCURACY, some_items(3, 1))  # what importing scipy takes is not counted
    items = some_items(20_000, 1)
    tracemalloc.start()
    statistics.summarise(pope.METRICS | ACCURACY, items, samples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # 20,000 x 200 draws at once would be 32 MB for each of several arrays


def test_summary_is_seeded_and_covers():
    found = [statistics.summarise(ACCURACY, some_items(500, 6), seed=seed)["accuracy"] for seed in (3, 3, 4)]
    assert found[0] == found[1] and found[0]["interval"] != found[2]["interval"]
    covered = 0
    for seed in range(200):
        low, high = statistics.summarise(ACCURACY, some_items(60, 3, seed), samples=400)["accuracy"]["interval"]
        covered += low <= 0.8 <= high
    assert 180 <= covered <= 199  # of 95 % intervals, 190 are expected


def undefined(found):
    return math.isnan(found.get("value", found.get("difference"))) and all(map(math.isnan, found["interval"]))


def test_what_is_undefined_is_nan():
    for items in ([], [{"id": "1", "image": "a", "error": "no image"}]):
        assert undefined(statistics.summarise(ACCURACY, items)["accuracy"])
        assert undefined(statistics.paired(ACCURACY, items, items)["accuracy"])
    one = statistics.summarise(ACCURACY, some_items(1, 10))["accuracy"]
    assert 0 < one["value"] <= 1 and all(map(math.isnan, one["interval"]))  # one image says nothing of others
    # undefined samples are left out unless they are most
    items = some_items(50, 1)
    items[0]["counts"] |= {"rare": 1, "rare_right": 1}  # in 1 - (49/50)^50 = 64 % of samples
    assert statistics.summarise(ACCURACY, items)["rare"] == {"value": 1.0, "interval": [1.0, 1.0]}
    metrics = {"odd": lambda c: np.where(np.asarray(c["rare"]) > 1, 1.0, np.nan)}  # in 26 %
    assert undefined(statistics.summarise(metrics, items)["odd"])
    assert undefined(statistics.summarise(ACCURACY, some_items(5, 1))["rare"])  # a count that nothing has


def test_failed_items_are_passed_over():
    items = some_items(30, 2)
    failed = [{"id": f"f{i}", "image": "0", "error": "timed out"} for i in range(20)]
    metrics = {"accuracy": ACCURACY["accuracy"]}
    assert statistics.summarise(metrics, items) == statistics.summarise(metrics, items + failed)
    with pytest.raises(HaclError, match="clusters: 1 for 60 items"):
        statistics.summarise(ACCURACY, items, ["a"])


def test_paired_differences():
    a, b = some_items(100, 3, 0, 0.9), some_items(100, 3, 1, 0.6)
    found = statistics.paired(ACCURACY, a, b)["accuracy"]
    right = [sum(i["counts"]["right"] for i in items) for items in (a, b)]
    assert found["difference"] == pytest.approx((right[0] - right[1]) / 300)
    assert 0 < found["interval"][0] < found["difference"] < found["interval"][1]
    same = statistics.paired(ACCURACY, a, list(reversed(a)))["accuracy"]
    assert same == {"difference": 0, "interval": [0, 0]}  # so samples are the same images for both
    # only what both have: an item that failed in one run says nothing of the other
    a[0] = {"id": a[0]["id"], "image": "0", "error": "?"}
    shared = statistics.paired(ACCURACY, a, b[:150])["accuracy"]
    rest = zip(a[1:150], b[1:150])
    assert shared["difference"] == pytest.approx(
        sum(x["counts"]["right"] - y["counts"]["right"] for x, y in rest) / 149
    )
    with pytest.raises(HaclError, match="'1-1' comes twice"):
        statistics.paired(ACCURACY, a + [a[4]], b)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_mcnemar_is_the_exact_binomial(a, b):
    n, few = a + b, min(a, b)
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(few + 1))
    assert statistics.mcnemar(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    assert statistics.mcnemar(a, b) == statistics.mcnemar(b, a)


def test_mcnemar_of_thousands():
    p = statistics.mcnemar(5300, 5000)
    normal = math.erfc((300 - 1) / math.sqrt(10300) / math.sqrt(2))  # with continuity correction
    assert p == pytest.approx(normal, rel=0.01) and statistics.mcnemar(9000, 1000) == 0
    with pytest.raises(HaclError, match="at least 0"):
        statistics.mcnemar(-1, 3)


def test_correct_pairs():
    def items(*right):
        return [{"id": i, "counts": {"correct": r} if r is not None else {}} for i, r in enumerate(right)]

    a, b = items(1, 1, 0, 0, 1, None, 1), items(1, 0, 1, 0, 1, 1)
    assert statistics.correct_pairs(a, b) == (2, 1, 1, 1)


def test_sample():
    questions = list(range(1000))
    some = statistics.sample(questions, 50)
    assert some == statistics.sample(questions, 50) == sorted(some) and len(set(some)) == 50
    assert set(some) < set(statistics.sample(questions, 51)) and some != statistics.sample(questions, 50, seed=1)
    assert 300 < sum(some) / 50 < 700 and statistics.sample(questions, 2000) == questions


# --- POPE

AWKWARD = [
    "Yes", "No", "yes", "no", "YES", "NO", "yes.", "No.", "Yes, there is a dog.", "No, there is not.", "not", "Not", "",
    " ", " no", "\nNo", "No\n", "No\nThere is none.", "There is no dog. Yes", "Yes. There is no cat.", "Yes and no",
    "Oui", "Non", "否", "不，没有", "はい", "There isn't any.", "I cannot tell", "nothing", "No!", "(no)", "No,",
    "...", ".no", "a.b no", "Maybe, not sure", "The image shows a dog and no cat, yes",
]  # fmt: skip


def official(answers, labels):
    """POPE's evaluate.py said in other words: (tp, fp, tn, fn), answers and labels paired by their order."""
    cells = Counter()
    for answer, label in zip(answers, labels):
        sentence = answer[: answer.index(".")] if "." in answer else answer
        said = "yes"
        for word in sentence.replace(",", "").split(" "):
            if word in ("No", "not", "no"):
                said = "no"
        cells[said, "no" if label == "no" else "yes"] += 1
    return cells["yes", "yes"], cells["yes", "no"], cells["no", "no"], cells["no", "yes"]


def pope_files():
    files = [DATA / "coco_pope_random.json", DATA / "coco_pope_adversarial.json"]
    return files + [f for f in (FULL / file.name for file in files) if f.exists()]


def printed(capsys, answers, label_file):
    """What llava.eval.eval_pope prints of a list of answers: its counts and figures."""
    from hacl_llava import compat  # noqa: F401

    # isort: split
    from llava.eval.eval_pope import eval_pope

    capsys.readouterr()
    eval_pope([{"text": a} for a in answers], label_file)
    out = capsys.readouterr().out
    counts = tuple(map(int, out.splitlines()[1].split("\t")))
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1"}
    names["Yes ratio"] = "yes_ratio"
    return counts, {ours: float(re.search(rf"{theirs}: (\S+)", out)[1]) for theirs, ours in names.items()}


@pytest.mark.parametrize("file", pope_files(), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_pope_equals_the_official_script(file, capsys):
    task, rng = read_one(pope, file), random.Random(0)
    answers = [rng.choice(AWKWARD) for _ in task.questions]
    answers[: len(AWKWARD)] = AWKWARD
    items = items_of(task, answers)
    labels = [record["label"] for record in records_of(file)]
    counts = statistics.totals(items)
    assert tuple(counts[k] for k in ("tp", "fp", "tn", "fn")) == official(answers, labels)
    theirs, figures = printed(capsys, answers, file)
    assert official(answers, labels) == theirs
    mine = values(pope, items)
    assert {k: mine[k] for k in figures} == pytest.approx(figures, rel=1e-12)
    # the control: one answer changed changes what the script prints
    changed = [*answers[:-1], "No" if items[-1]["parsed"] == "yes" else "Yes"]
    assert printed(capsys, changed, file)[0] != theirs


@given(st.text(alphabet=st.sampled_from("nNooOtT yYesS.,!\n'\u2019é否"), max_size=25))
@settings(max_examples=400, deadline=None)
def test_pope_parses_any_text_as_the_official_script(answer):
    said_no = official([answer], ["no"])[2] == 1
    assert pope.parse(answer) == ("no" if said_no else "yes")


@pytest.mark.parametrize(
    ("answer", "parsed", "doubt"),
    [
        ("Yes", "yes", None),
        ("yes, there is", "yes", None),
        ("No, there is not.", "no", None),
        ("There isn't any.", "yes", "the official rule misses its no"),
        ("NO", "yes", "the official rule misses its no"),
        ("No\nThere is none", "yes", "the official rule misses its no"),
        ("", "yes", "no words"),
        ("否", "yes", "neither yes nor no"),
        ("Oui", "yes", "neither yes nor no"),
        ("There is no dog. Yes", "no", "both yes and no"),
        ("Yes, not no", "no", "both yes and no"),
    ],
)
def test_pope_unclear_answers_keep_the_official_verdict(answer, parsed, doubt):
    found = pope.score(Question("1", "a.jpg", "?", {"label": "no"}), answer)
    assert (found["parsed"], found["doubt"]) == (parsed, doubt)
    assert found["counts"]["unclear"] == int(doubt is not None)
    assert found["counts"]["correct"] == int(parsed == "no") == found["counts"]["tn"]


def test_where_the_official_script_goes_wrong(capsys):
    file = DATA / "coco_pope_random.json"
    task = read_one(pope, file)
    questions, right = task.questions, [q.facts["label"] for q in task.questions]
    whole = values(pope, items_of(task, right))
    assert whole["accuracy"] == 1 and whole["yes_ratio"] == 0.5
    # 1. never yes: it divides by zero
    with pytest.raises(ZeroDivisionError):
        printed(capsys, ["no"] * len(right), file)
    mine = values(pope, items_of(task, ["no"] * len(right)))
    assert mine["accuracy"] == 0.5 and mine["recall"] == 0 and mine["yes_ratio"] == 0
    assert math.isnan(mine["precision"]) and math.isnan(mine["f1"])
    # 2. one answer missing: it pairs all that follow with the label before theirs (yes and no alternate, so all of
    # them are wrong), and drops the last; with the first missing, nothing is right and it divides by zero
    counts, figures = printed(capsys, right[:60] + right[61:], file)
    assert sum(counts) == len(right) - 1 and figures["accuracy"] == 60 / 119
    with pytest.raises(ZeroDivisionError):
        printed(capsys, right[1:], file)
    assert values(pope, items_of(task, right[1:], questions[1:]))["accuracy"] == 1
    # 3. one too many: left out by the pairs, but not by its yes ratio
    assert printed(capsys, [*right, "yes"], file)[1]["yes_ratio"] > 0.5
    # 4. another order of the same answers
    order = random.Random(0).sample(range(len(right)), len(right))
    shuffled = [right[i] for i in order]
    assert printed(capsys, shuffled, file)[1]["accuracy"] < 0.7
    assert values(pope, items_of(task, shuffled, [questions[i] for i in order]))["accuracy"] == 1


def test_pope_task_names():
    for file, name in {
        "coco_pope_adversarial.json": "POPE coco adversarial",
        "gqa_pope_seem_random.json": "POPE gqa random",
        "aokvqa_pope_seem_popular.json": "POPE aokvqa popular",
        "coco_pope_seem_random.json": "POPE coco seem random",
        "mine.jsonl": "POPE mine",
    }.items():
        assert pope.task_name(f"some/folder/{file}") == name


def test_pope_questions_end_with_the_suffix_once(tmp_path):
    task = read_one(pope, DATA / "coco_pope_random.json")
    first = task.questions[0]
    assert len(task.questions) == 120 and first.id == "1" and first.facts == {"label": "yes"}
    assert first.text == "Is there a snowboard in the image?\nAnswer the question using a single word or phrase."
    rows = [{"question_id": 1, "image": "a.jpg", "text": first.text, "label": "yes"}]
    assert read_one(pope, write_rows(tmp_path / "q.json", rows)).questions[0].text == first.text


@pytest.mark.parametrize("layout", ["coco/", ""])
def test_pope_reads_llavas_own_file(tmp_path, layout):
    # numbered over all, the short-answer sentence in the text, categories, no labels
    rows = []
    for kind in ("adversarial", "random"):
        source = records_of(DATA / f"coco_pope_{kind}.json")
        write_rows(tmp_path / f"{layout}coco_pope_{kind}.json", reversed(source))  # order does not matter
        rows += [{**v, "text": v["text"] + SHORT, "category": kind} for v in source]
    labels = [row.pop("label") for row in rows]
    rows = [{**row, "question_id": i} for i, row in enumerate(rows)]
    tasks = pope.read(write_rows(tmp_path / "llava_pope_test.jsonl", rows))
    assert [task.name for task in tasks] == ["POPE coco adversarial", "POPE coco random"]
    questions = [q for task in tasks for q in task.questions]
    assert [q.facts["label"] for q in questions] == labels and [q.id for q in questions] == list(map(str, range(240)))
    assert all(q.text.count(SHORT) == 1 for q in questions)
    (tmp_path / f"{layout}coco_pope_random.json").unlink()
    with pytest.raises(DataError, match=r"line 121 .*: has no label; put POPE.s coco_pope_random.json into"):
        pope.read(tmp_path / "llava_pope_test.jsonl")


GOOD = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, GOOD], r"line 2 \(question_id 1\): the question_id comes twice"),
        ([GOOD | {"label": "maybe"}], r"line 1 \(question_id 1\): label 'maybe'; allowed are \"yes\" and \"no\""),
        ([GOOD | {"label": "Yes"}], "label 'Yes'"),
        ([{"question_id": 1, "image": "a.jpg", "text": "?"}], r"line 1 \(question_id 1\): has no label"),
        ([{k: v for k, v in GOOD.items() if k != "image"}], r"line 1 \(question_id 1\) has no \'image\'"),
        ([GOOD | {"question_id": None}], "has question_id None"),
    ],
)
def test_pope_refuses_bad_files(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        pope.read(write_rows(tmp_path / "q.json", rows))


# --- CHAIR

OWN = chair.read_synonyms()
COCO = sorted({name for name in OWN.category.values() if name})


def score(objects, text, synonyms=OWN):
    return chair.score(Question("1", "a.jpg", chair.PROMPT, {"objects": sorted(objects)}), text, synonyms)


def named(text, synonyms=OWN):
    return [category for _, category in chair.mentions(text, synonyms)]


def test_chair_knows_cocos_80_categories_and_each_by_its_name():
    assert len(COCO) == 80
    assert {"person", "hair drier", "tv", "couch", "potted plant", "dining table", "sports ball", "skis"} < set(COCO)
    for name in COCO:
        assert named(f"There is a {name}.") == [name], name
    synonyms = [w for w, name in OWN.category.items() if name]
    assert len(synonyms) > 800
    wrong = [w for w in synonyms if w not in OWN.colours and named(f"we see the {w} ,") != [OWN.category[w]]]
    assert [w for w in wrong if OWN.category[w] != "chair"] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Two men and three women with children", ["person"] * 3), ("two persons", ["person"]), ("", []),
        ("hot dogs and a Hot Dog", ["hot dog", "hot dog"]), ("a hot-dog, but man-made", ["hot dog"]),
        ("a dog. hot dogs", ["dog", "hot dog"]), ("It is hot. Dogs lie there.", ["dog"]),
        ("teddy bears next to a bear", ["teddy bear", "bear"]), ("adult giraffes", ["giraffe"]),
        ("a baby elephant and a baby", ["elephant", "person"]), ("a passenger jet", ["airplane"]),
        ("a passenger train with passengers", ["train", "person"]), ("home plate", []),
        ("train tracks at the train station", []), ("the toilet seat is up", ["toilet"]), ("a seat", ["chair"]),
        ("a toilet with a brown seat and two seats", ["toilet"]), ("a man in a bow tie", ["person", "tie"]),
        ("glasses of wine and wine glasses", ["wine glass", "wine glass"]), ("eye glasses", []),
        ("knives, buses, skis, scissors", ["knife", "bus", "skis", "scissors"]),
        ("TVs, couches and mice", ["tv", "couch", "mouse"]), ("a laptop computer", ["laptop"]),
        ("the dog's bone and the dogs' bones", ["dog", "dog"]), ("the man’s dog", ["person", "dog"]),
        ("an orange shirt, orange and white; oranges and an orange", ["orange", "orange"]),
        ("a motor bike, motorbike, bike", ["motorcycle", "motorcycle", "bicycle"]),
        ("a traffic light under a street light", ["traffic light"]), ("犬 und ein Hund", []),
        ("stop signs and stop lights", ["stop sign", "traffic light"]),
    ],
)  # fmt: skip
def test_chair_mentions(text, found):
    assert named(text) == found


def test_chair_by_hand():
    # two captions of one image with a person, a dog and a frisbee
    truth = ("person", "dog", "frisbee")
    first = score(truth, "A man throws a frisbee to his dog while another man sits on a bench.")
    assert first["counts"] == {
        "hallucinated": 1, "mentions": 5, "sentence_hallucinated": 1, "sentences": 1, "recalled": 3, "truth": 3,
        "words": 15, "correct": 0,
    }  # fmt: skip
    assert first["hallucinated"] == [["bench", "bench"]] and first["truth"] == ["dog", "frisbee", "person"]
    second = score(truth, "A dog jumps.")
    assert second["counts"] == {
        "hallucinated": 0, "mentions": 1, "sentence_hallucinated": 0, "sentences": 1, "recalled": 1, "truth": 3,
        "words": 3, "correct": 1,
    }  # fmt: skip
    found = values(chair, [first, second])
    assert found == pytest.approx({"chair_i": 1 / 6, "chair_s": 1 / 2, "recall": 4 / 6, "words": 9, "objects": 3})
    empty = values(chair, [score(truth, "")])
    assert math.isnan(empty["chair_i"]) and empty["chair_s"] == 0 == empty["recall"]


OFFICIAL = """person, man, woman, child, baby, passenger
dog, puppy
hot dog
elephant
toilet
chair, seat, stool
tie
train
airplane, plane, jet
teddy bear
bear
bench
traffic light, street light
"""
DOUBLE = ["hot dog", "teddy bear", "traffic light", "street light", "bow tie", "home plate"]


def loop_chair(text):
    """The official script's steps in other words, for plain singular lower-case words with spaces between."""
    rows = [line.split(", ") for line in OFFICIAL.splitlines()]
    first = {word: row[0] for row in rows for word in row}
    joined = {double: double for double in DOUBLE}
    joined |= {
        f"{age} {animal}": animal for age in ("baby", "adult") for animal in ("dog", "elephant", "bear", "animal")
    }
    joined |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
    words, left = [], text.split()
    while left:
        pair = " ".join(left[:2])
        words.append(joined.get(pair, left[0]))
        left = left[2 if pair in joined else 1 :]
    if "toilet" in words and "seat" in words:
        words = [w for w in words if w != "seat"]
    return [first[w] for w in words if w in first]


@pytest.fixture(scope="module")
def official_list(tmp_path_factory):
    path = tmp_path_factory.mktemp("chair") / "synonyms.txt"
    path.write_text(OFFICIAL)
    return path


WORDS = sorted({w for line in OFFICIAL.splitlines() for s in line.split(", ") for w in s.split()})
WORDS += ["a", "on", "adult", "animal", "bow", "home", "plate", "red", "light", "street"]


@given(st.lists(st.sampled_from(WORDS), max_size=14))
@settings(max_examples=400, deadline=None)
def test_chair_with_a_list_in_the_official_format_is_the_official_rule(official_list, words):
    text = " ".join(words)
    assert named(text, chair.read_synonyms(official_list)) == loop_chair(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("person, man\ndog, man\n", "'man' is in 'person' and in 'dog'"),
        ("", "no synonyms in it"),
        ("person: man\n- x\n> x y = cow\n", "'cow' is no category"),
        ("person: man\ndog, cat\n", "'dog, cat' is no line"),
    ],
)
def test_chair_refuses_bad_lists(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        chair.read_synonyms(tmp_path / "list.txt")


def test_chair_takes_a_list_in_the_form_of_its_own(tmp_path):
    (tmp_path / "list.txt").write_text("# dogs\n> toy dog = dog\n- hot dog\n~ tan\ndog: puppy, tan,\n  hound\n")
    words = chair.read_synonyms(tmp_path / "list.txt")
    assert named("a toy dog, a hot dog, hounds and a tan shirt", words) == ["dog", "dog"]


sentences = st.lists(
    st.builds(
        "There is {} {} with {} {}.".format,
        st.sampled_from(["a", "one", "the"]),
        st.sampled_from(COCO),
        st.sampled_from(["two", "many"]),
        st.sampled_from(["men", "cats", "hot dogs", "trees", "train tracks", "orange shirts", "seats"]),
    ),
    min_size=1,
    max_size=6,
)
truths = st.sets(st.sampled_from(COCO), max_size=10)


@given(sentences, truths, st.sampled_from([c for c in COCO if c not in ("toilet", "chair")]))
@settings(deadline=None)
def test_a_false_object_never_lowers_chair_and_a_true_one_never_raises_it(parts, truth, new):
    text = " ".join(parts)
    for objects, sign in ((truth - {new}, 1), (truth | {new}, -1)):
        before, after = (score(objects, t)["counts"] for t in (text, f"{text} A {new}."))
        rates = [Fraction(c["hallucinated"], c["mentions"]) for c in (before, after)]
        assert sign * (rates[1] - rates[0]) >= 0
        assert sign * (after["sentence_hallucinated"] - before["sentence_hallucinated"]) >= 0
        assert after["mentions"] == before["mentions"] + 1
        assert 0 <= after["recalled"] <= after["truth"] == len(objects)


def coco_files(folder):
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in (7, 5, 9)]
    boxes = [{"id": 1, "image_id": 7, "category_id": 18}, {"id": 2, "image_id": 7, "category_id": 1}]
    boxes += [{"id": 3, "image_id": 5, "category_id": 65}]
    names = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 65, "name": "bed"}]
    captions = [{"id": 4, "image_id": 5, "caption": "A cat on a mattress"}, {"id": 5, "image_id": 7, "caption": "Dogs"}]
    instances, texts = folder / "instances_val2014.json", folder / "captions_val2014.json"
    instances.write_text(json.dumps({"categories": names, "images": images, "annotations": boxes}))
    texts.write_text(json.dumps({"annotations": captions, "images": images}, indent=1))
    return instances, texts


def test_chair_reads_coco(tmp_path):
    instances, texts = coco_files(tmp_path)
    both = read_one(chair, [instances, texts]).questions
    assert [(q.id, q.image) for q in both] == [
        ("COCO_val2014_000000000005", "COCO_val2014_000000000005.jpg"),
        ("COCO_val2014_000000000007", "COCO_val2014_000000000007.jpg"),
    ]  # 9 has neither box nor caption
    assert [q.facts["objects"] for q in both] == [["bed", "cat"], ["dog", "person"]]
    assert [q.facts["objects"] for q in read_one(chair, [instances]).questions] == [["bed"], ["dog", "person"]]
    assert [q.facts["objects"] for q in read_one(chair, [texts]).questions] == [["bed", "cat"], ["dog"]]
    assert both[0].text == "Please describe this image in detail."


def test_chair_with_a_list_given_scores_by_that_list(tmp_path, official_list):
    rows = [{"image": "a.jpg", "captions": ["a puppy"], "instances": [{"category": "person"}]}]
    task = read_one(chair, [write_rows(tmp_path / "c.jsonl", rows)], official_list)
    (q,) = task.questions
    assert q.facts["objects"] == ["dog", "person"]
    assert task.score(q, "a stool and a kitten")["hallucinated"] == [["stool", "chair"]]  # the list has no kitten
    rows[0]["instances"].append({"category": "kite"})
    with pytest.raises(DataError, match=r"line 1: category 'kite' is not in .*synonyms.txt"):
        chair.read([write_rows(tmp_path / "d.jsonl", rows)], official_list)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "line 1 is not valid json"),
        ('{"images": [], "annotations": [{"image_id": 3}]}', "annotation None: expected COCO's"),
        ('{"images": []}', "line 1: expected COCO's"),
        ('{"image": "a.jpg", "captions": [3]}', "line 1: expected"),
        ('{"image": "a.jpg", "captions": []}\n{"captions": ["a"]}', "line 2: expected"),
        ('{"image": "1.png", "question_id": 1, "text": "Is there a dog?", "label": "yes"}', "line 1: expected COCO's"),
        ('{"image": "1.png", "captions": [], "instances": []}', "no image with a box or a caption"),
    ],
)
def test_chair_refuses_other_files(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        chair.read([tmp_path / "x.json"])
    with pytest.raises(DataError, match="cannot be read"):
        chair.read([tmp_path / "none.json"])


def test_chair_images_of_one_name_in_two_folders_are_two(tmp_path):
    rows = [{"image": f"{i}.png", "captions": ["a dog"]} for i in ("a/1", "b/1", "b/2")]
    questions = read_one(chair, [write_rows(tmp_path / "c.jsonl", rows)]).questions
    assert [(q.id, q.image) for q in questions] == [("a/1.png",) * 2, ("b/1.png",) * 2, ("2", "b/2.png")]


def test_chair_on_human_captions():
    rows = {row["image"]: row for row in records_of(DATA / "coco_captions.jsonl")}
    truth = {q.image: q.facts["objects"] for q in read_one(chair, [DATA / "coco_captions.jsonl"]).questions}
    assert len(truth) == 12 and truth.keys() == rows.keys()
    captions = [(image, caption) for image, row in rows.items() for caption in row["captions"]]
    items = [score(truth[image], caption) for image, caption in captions]
    boxes = [score({i["category"] for i in rows[image]["instances"]}, caption) for image, caption in captions]
    assert values(chair, items)["chair_i"] == 0  # the captions are a part of what is there
    assert 0 < values(chair, boxes)["chair_i"] < 0.15 and len(items) == 60
    others = [score(truth[i], caption) for i in list(truth)[6:] for image, caption in captions if image != i]
    assert values(chair, others)["chair_i"] > 0.4  # the control: captions of other images


# --- AMBER

RELATION = {
    "sky": [], "forest": ["tree", "bush"], "tree": ["forest"], "person": ["people", "man", "woman"], "dog": [],
    "cloud": [], "cup": ["glass"], "table": ["desk"], "TV": ["screen"], "can": [], "watch": [], "hot": [], "sign": [],
    "mug": ["glass"], "monitor": ["screen", "TV"], "grove": ["tree", "bush"],
}  # fmt: skip
ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["sky", "forest", "tree", "person"], "hallu": ["dog", "cloud"]},
    {"id": 2, "type": "generative", "truth": ["cup", "table"], "hallu": ["TV"]},
    {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 5, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 6, "type": "discriminative-attribute-action", "truth": "yes"},
    {"id": 7, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 8, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 9, "type": "discriminative-relation", "truth": "yes"},
    {"id": 10, "type": "relation", "truth": "no"},
]


@pytest.fixture
def amber_data(tmp_path):
    data = tmp_path / "AMBER" / "data"
    (data / "query").mkdir(parents=True)
    (data / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (data / "relation.json").write_text(json.dumps(RELATION))
    (data / "safe_words.txt").write_text("sign\nlight")
    texts = ["Describe this image."] * 2 + [f"Is {i}?" for i in range(2, 10)]
    query = [{"id": i, "image": f"AMBER_{min(i, 2)}.jpg", "query": text} for i, text in enumerate(texts, 1)]
    (data / "query" / "query_all.json").write_text(json.dumps(query))
    (data / "query" / "query_generative.json").write_text(json.dumps(query[:2]))
    return data


def test_amber_reads_its_folder(amber_data):
    task = read_one(amber, amber_data)
    questions = task.questions
    assert task.name == "AMBER" and questions == read_one(amber, amber_data.parent).questions
    assert [q.id for q in questions] == [str(a["id"]) for a in ANNOTATIONS]
    assert questions[0].text == "Describe this image."
    assert questions[2].text == "Is 2?\nAnswer the question using a single word or phrase."
    part = read_one(amber, amber_data / "query" / "query_generative.json")
    assert part.name == "AMBER generative" and part.questions == questions[:2]


def test_amber_by_hand(amber_data):
    task = read_one(amber, amber_data)
    answers = [
        # tree is the forest's word: it stands for the forest, the first that fits; "sign" is safe; dogs are expected
        "A man stands by trees. The sky is hot. Two dogs, a table and a sign.",
        "People can watch TV. A cup on a desk; glasses.",
        "Yes", "No.", "Yes", "No", "no, there is not", "Yes", "It is", "No",
    ]  # fmt: skip
    items = items_of(task, answers)
    assert items[0]["objects"] == ["man", "tree", "sky", "dog", "table", "sign"]
    assert items[0]["hallucinated"] == ["dog", "table"]
    expected = {"hallucinated": 2, "mentions": 6, "sentence_hallucinated": 1, "sentences": 1, "covered": 3, "truth": 4}
    expected |= {"expected_named": 1, "expected": 2, "words": 16, "correct": 0}
    assert items[0]["counts"] == expected
    assert items[1]["objects"] == ["people", "TV", "cup", "desk", "glass"]
    assert items[1]["hallucinated"] == ["people", "TV"]
    found = values(amber, items)
    # no is right: 4, 7, 10; answered no: 4, 6, 7, 10; to be answered no: 4, 5, 7, 8, 10
    precision, recall = 3 / 4, 3 / 5
    f1 = 2 * precision * recall / (precision + recall)
    assert found == pytest.approx({
        "chair": 4 / 11, "cover": 5 / 6, "hal": 1, "cog": 2 / 3, "words": 13, "amber_score": (1 - 4 / 11 + f1) / 2,
        "unclear": 1 / 8, "accuracy": 4 / 8, "precision": precision, "recall": recall, "f1": f1,
        "existence_accuracy": 1 / 2, "existence_precision": 1, "existence_recall": 1 / 2, "existence_f1": 2 / 3,
        "attribute_accuracy": 2 / 4, "attribute_precision": 1 / 2, "attribute_recall": 1 / 2, "attribute_f1": 1 / 2,
        "state_accuracy": 1, "state_precision": 1, "state_recall": 1, "state_f1": 1,
        "number_accuracy": 0, "number_precision": math.nan, "number_recall": 0, "number_f1": math.nan,
        "action_accuracy": 0, "action_precision": 0, "action_recall": math.nan, "action_f1": math.nan,
        "relation_accuracy": 1 / 2, "relation_precision": 1, "relation_recall": 1, "relation_f1": 1,
    }, nan_ok=True)  # fmt: skip


def loop_amber(found, truth, hallu):
    """The official script's steps for the nouns found, in other words, with equality for its similarity: counts."""

    def numbered(objects):
        return [(w, i) for i, o in enumerate(objects) for w in RELATION[o]] + [(o, i) for i, o in enumerate(objects)]

    safe, ha = numbered(truth), numbered(hallu)
    covered, named, wrong = [0] * len(truth), [0] * len(hallu), 0
    for noun in found:
        if noun in ("sign", "light"):
            continue
        hits = [i for w, i in safe if w == noun]
        if hits:
            covered[hits[0]] = 1
            continue
        hits = [i for w, i in ha if w == noun]
        if hits:
            named[hits[0]] = 1
        wrong += 1
    return wrong, len(found), sum(covered), sum(named)


KNOWN = {w.lower(): w for k, v in RELATION.items() for w in (k, *v)}
WORDS_OF_AMBER = amber.Words(RELATION, KNOWN, frozenset(("sign", "light")))


@given(st.lists(st.sampled_from(sorted(set(KNOWN.values()) - {"can", "watch", "hot"})), max_size=8), st.data())
@settings(deadline=None, max_examples=200)
def test_amber_descriptions_are_the_official_rule(found, data):
    truth = data.draw(st.lists(st.sampled_from(sorted(RELATION)), min_size=1, max_size=5))
    hallu = data.draw(st.lists(st.sampled_from(sorted(RELATION)), min_size=1, max_size=4))
    q = Question("1", "a.jpg", "?", {"type": "generative", "truth": truth, "hallu": hallu})
    c = amber.score(q, ", ".join(found), WORDS_OF_AMBER)["counts"]
    assert (c["hallucinated"], c["mentions"], c["covered"], c["expected_named"]) == loop_amber(found, truth, hallu)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A man can be seen. A can and two cans by a trash can.", ["man", "can", "can", "can"]),
        ("They watch him; she wants to watch; a watch.", ["watch"]),
        ("hot air over the tvs and TV screens", ["TV", "TV", "screen"]),
        ("Trees, women's desks and people", ["tree", "woman", "desk", "people"]),
        ("", []),
    ],
)
def test_amber_nouns(text, found):
    assert amber.nouns(text, KNOWN) == found


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [("Yes", "yes"), ("No", "no"), (" no.", "no"), ("**No**, it is", "no"), ("YES!", "yes"), ("", None), ("Nope", None),
     ("There is no", None), ("Not", None), ("是", None)],
)  # fmt: skip
def test_amber_parses_the_first_word(answer, parsed):
    q = Question("1", "a.jpg", "?", {"type": "relation", "truth": "no"})
    found = amber.score(q, answer, WORDS_OF_AMBER)
    assert found["parsed"] == parsed and found["counts"]["unclear"] == int(parsed is None)
    assert found["counts"]["correct"] == int(parsed == "no") == found["counts"]["relation_no_correct"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("annotations.json", lambda v: v[1:], r"query_all.json: record 1 \(id 1\): has no annotation"),
        ("annotations.json", lambda v: [{**v[0], "truth": ["moon"]}], r"record 1 \(id 1\): truth has 'moon'"),
        ("annotations.json", lambda v: [{"id": 3, "type": "relation", "truth": "maybe"}], "truth 'maybe'"),
        ("query/query_all.json", lambda v: [{"id": 1}], r"record 1 \(id 1\) has no 'image'"),
        ("query/query_all.json", lambda v: v + v[:1], r"record 11 \(id 1\): the id comes twice"),
        ("relation.json", lambda v: {"sky": "cloud"}, "expected an object of lists of words"),
    ],
)
def test_amber_refuses_bad_files(amber_data, name, change, message):
    file = amber_data / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(DataError, match=message):
        amber.read(amber_data)


def test_amber_names_a_missing_file(amber_data):
    (amber_data / "safe_words.txt").unlink()
    with pytest.raises(DataError, match="safe_words.txt: cannot be read"):
        amber.read(amber_data)
    with pytest.raises(DataError, match="relation.json: cannot be read"):
        amber.read(amber_data / "query")


# --- MMHal-Bench

TEMPLATE = {
    "question_type": "attribute", "question_topic": "animal", "image_id": "ab12",
    "image_src": "https://example.org/some/path/12_ab%20c.jpg?size=3", "image_content": ["Dog", "Tree"],
    "question": "What colour is the dog?", "gt_answer": "It is brown.", "model_answer": "",
}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    rows = [TEMPLATE, TEMPLATE | {"question_type": "counting"}, TEMPLATE | {"question_type": "new kind"}]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    return read_one(mmhal, tmp_path).questions


class Judge:
    """Replies one after the other, and remembers what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, messages):
        self.asked.append(messages)
        return self.replies.pop(0)


def test_mmhal_reads_its_file(bench, tmp_path):
    assert bench == read_one(mmhal, tmp_path / "response_template.json").questions
    facts = {"type": "counting", "content": "Dog, Tree", "reference": "It is brown."}
    assert bench[1] == Question("1", "12_ab c.jpg", "What colour is the dog?", facts)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TEMPLATE, {}], "record 2 has no 'image_src'; expected an object with image_src, question, gt_answer"),
        ([TEMPLATE | {"image_content": "Dog"}], "record 1 has image_content 'Dog'; expected a list of texts"),
    ],
)
def test_mmhal_refuses_other_files(tmp_path, rows, message):
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        mmhal.read(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        mmhal.read(tmp_path / "none")


def test_mmhal_by_hand(bench):
    replies = ["Good.\n- Rating: 3, not informative", "It claims a cat.\n\n**Rating: 2**", "rating: 6"]
    items = []
    for q, reply in zip(bench, replies, strict=True):
        judge = Judge(reply)
        items.append(mmhal.score(q, "It is {brown}.", judge))
        ((message,),) = judge.asked
        assert message["role"] == "user"
        for part in ("Dog, Tree", q.text, "It is brown.", "It is {brown}."):
            assert part in message["content"]
    assert items[0]["rubric"] == "own rubric, not comparable with published figures"
    assert items[1]["judgement"] == replies[1] and items[1]["rating"] == 2
    found = values(mmhal, items)
    assert found["score"] == pytest.approx(11 / 3) and found["hallucination_rate"] == pytest.approx(1 / 3)
    assert found["score_attribute"] == 3 and found["hallucination_rate_counting"] == 1
    assert math.isnan(found["score_other"])  # an unknown type counts in the whole only
    assert [i["counts"]["correct"] for i in items] == [1, 0, 1]


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 3-4", None), ("Rating: 3 or 4", None), ("Rating: 3 to 5", None), ("Rating: 3 - good", 3),
        ("Rating: 3", 3), ("rating: 0, bad", 0), ("Rating: **5**", 5), ("**Rating:** 1", 1), ("Rating: 4.", 4),
        ("Rating: 4\nRating: 4", 4), ("Rating: 2 ... Rating: 5", None), ("Rating: 7", None), ("Rating: 4.5", None),
        ("Rating: 60", None), ("5", None), ("", None), ("I cannot rate this.", None), ("Rating: -1", None),
    ],
)  # fmt: skip
def test_mmhal_ratings(reply, rating):
    assert mmhal.parse(reply) == rating
    # where the official script finds one, it is this
    found = [s for s in range(7) if f"rating: {s}" in reply.lower()]
    if rating is not None and len(found) == 1:
        assert found == [rating]


def test_mmhal_asks_again_and_never_scores_nonsense(bench):
    judge = Judge("Hm.", "Rating: 1 or Rating: 2", "Rating: 1")
    assert mmhal.score(bench[0], "Red.", judge)["rating"] == 1
    assert [len(m) for m in judge.asked] == [1, 3, 3] and judge.asked[2][1]["content"] == "Rating: 1 or Rating: 2"
    judge = Judge(*["No idea."] * 4)
    with pytest.raises(NotAnswered, match="question 0: no rating from 0 to 6 in 3 replies .* 'No idea.'"):
        mmhal.score(bench[0], "Red.", judge)
    assert len(judge.asked) == 3

    def broken(messages):
        raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        mmhal.score(bench[0], "Red.", broken)


def test_mmhal_takes_the_official_prompt_from_the_users_script(bench, tmp_path):
    script = tmp_path / "eval_gpt4.py"
    marker = tmp_path / "ran"
    script.write_text(
        f"import openai_that_is_not_here\nopen({str(marker)!r}, 'w')\n"
        "template = '''Judge.\n### Image Contents\n{}\n### Question\n{}\n### Answer\n{}\n### LMM\n{}\n'''\n"
    )
    rubric = mmhal.read_rubric(script)
    assert rubric.name == "eval_gpt4.py given by the user" and not marker.exists()
    judge = Judge("Rating: 3")
    assert mmhal.score(bench[0], "Red.", judge, rubric)["rubric"] == rubric.name
    assert judge.asked[0][0]["content"] == (
        "Judge.\n### Image Contents\nDog, Tree\n### Question\nWhat colour is the dog?\n### Answer\nIt is brown.\n"
        "### LMM\nRed.\n"
    )
    assert mmhal.read_rubric() is mmhal.OWN and json.dumps(rubric)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "template = f'{1}'", "assigns no text to `template`"),
        ("a.py", "template = (", "is no Python file"),
        ("a.py", "template = '{} {} {}'", "has 3 fields"),
        ("a.txt", "{} {} {} {0.__class__}", "has 4 fields"),
        ("a.txt", "{} {", "is no template"),
    ],
)
def test_mmhal_refuses_other_rubrics(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        mmhal.read_rubric(tmp_path / name)
