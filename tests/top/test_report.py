"""hacl-llava report: hand-made runs, whose comparisons were computed by hand; awkward names, answers and files."""

import importlib
import io
import json
import math
import re
import shutil
import subprocess
import sys

import markupsafe
import pytest
from PIL import Image

from hacl_llava import cli
from hacl_llava.common.report import as_markdown, literal, provenance, table, thumbnail
from hacl_llava.common.statistics import holm
from hacl_llava.config import HaclError
from hacl_llava.evaluation import report
from hacl_llava.evaluation.runs import TASKS, draw_gallery, parse_runs, read_run, verdict_of, way_of

pytest.importorskip("matplotlib")
NASTY = "a | b <script>alert(1)</script> `code` **bold** [x](http://x) $x^2$ 你好 🙂\n# no heading\n- \x00 & \ud800 \\|"
SETTINGS = {"task": "t", "questions": "1" * 64, "model": "checkpoints/x", "template": "v1", "max_new_tokens": 16}


def item(identity, label, answer, image=None, question="Is there a dog?"):
    """An item as `hacl-llava eval` writes it of POPE."""
    yes = answer.lower().startswith("yes")
    counts = {"tp": yes and label == "yes", "fp": yes and label == "no"}
    counts |= {"tn": not yes and label == "no", "fn": not yes and label == "yes"}
    counts = {k: int(v) for k, v in counts.items()} | {"correct": int(yes == (label == "yes")), "unclear": 0}
    facts = {"image": image or f"{identity}.png", "question": question, "answer": answer, "label": label}
    return {"id": identity, **facts, "counts": counts, "parsed": "yes" if yes else "no"}


def write_task(folder, items, task="POPE coco random", images=".", kind="pope", **settings):
    from hacl_llava.common.statistics import summarise
    from hacl_llava.evaluation import chair, pope

    folder.mkdir(parents=True)
    metrics = summarise({"pope": pope, "chair": chair}.get(kind, pope).METRICS, items, samples=50)
    metrics = {n: {k: v if v == v else None for k, v in m.items() if k == "value"} for n, m in metrics.items()}
    metrics["accuracy"] = {"value": metrics.get("accuracy", {}).get("value"), "interval": [0.1, 0.9]}
    scored = sum("counts" in x for x in items)
    counts = {"questions": len(items), "scored": scored, "failed": len(items) - scored, "unclear": 0}
    result = {"task": task, "kind": kind, "model": folder.parent.name, "metrics": metrics, "counts": counts}
    result |= {"images": str(images), "settings": SETTINGS | {"model": f"checkpoints/{folder.parent.name}"} | settings}
    result["provenance"] = {"versions": {"hacl_llava": "0.1"}, "command": "hacl-llava eval", "commit": None, "seed": 0}
    (folder / "results.json").write_text(json.dumps(result))
    (folder / "items.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    return folder


def write_training(folder, hacl=True, entries=30, **config):
    """trainer_state.json of a run, with the keys of a real one; two values of its log are no numbers."""
    folder.mkdir(parents=True)
    log = []
    for i in range(1, entries + 1):
        entry = {"epoch": i / entries, "grad_norm": 0.3, "learning_rate": 0.001 / i, "loss": 2 + 1 / i, "step": 10 * i}
        if hacl:
            entry |= {"loss_lm": 2.0, "loss_i2t": 5.5, "loss_t2i": 3.45, "temperature": 0.07, "closer_to_true": 0.25}
            entry["retrieval_accuracy"] = 0.03125
        log.append(entry)
    log[1]["loss"], log[2]["grad_norm"] = math.nan, math.inf
    log.append({"epoch": 1.0, "step": 10 * entries, "train_loss": 2.03, "train_runtime": 50.2, "total_flos": 6e11})
    state = {"log_history": log, "max_steps": 10 * entries, "train_batch_size": 32, "epoch": 1.0}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    config = {
        "tune_mm_mlp_adapter": True,
        **({"hacl": {"weight": 1.0, "negatives": "batch"}} if hacl else {}),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(config))


def make(tmp_path, *words, output="out", status=0):
    """Run the command line; returns report.json and report.html."""
    out = tmp_path / output
    assert cli.main(["report", *map(str, words), "--output", str(out)]) == status
    if status:
        return None
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (20, 10), (20 * i, 0, 255)).save(folder / f"{i}.png")
    return folder


def write_two(tmp_path, pictures, **wrong):
    """Runs of 12 questions, yes and no by turns, that answer these wrong."""
    labels, right, other = ["yes", "no"] * 6, {"yes": "Yes", "no": "No"}, {"yes": "No.", "no": "Yes, there is."}
    for name, mistakes in wrong.items():
        answers = [(other if i in mistakes else right)[label] for i, label in enumerate(labels)]
        items = [item(str(i), label, answer) for i, (label, answer) in enumerate(zip(labels, answers))]
        write_task(tmp_path / name / "pope", items, images=pictures)
    return [tmp_path / name for name in wrong]


@pytest.fixture
def two(tmp_path, pictures):
    """Of 12 questions 6 are right in both, 1 only in plain, 5 only in hacl."""
    return write_two(tmp_path, pictures, plain=(1, 3, 5, 7, 8), hacl=(0,))


def test_paired_difference_and_mcnemar_by_hand(tmp_path, two):
    found, page = make(tmp_path, *two)
    (task,) = found["tasks"]
    (c,) = task["comparisons"]
    assert (c["a"], c["b"], c["questions"], c["only_a"], c["only_b"]) == ("plain", "hacl", 12, 0, 0)
    # plain: no-questions 1, 3, 5, 7 answered yes (fp 4, tn 2), yes-question 8 answered no (tp 5, fn 1)
    # hacl: yes-question 0 answered no (tp 5, fn 1, fp 0, tn 6)
    by_hand = {
        "accuracy": (7 / 12, 11 / 12),
        "precision": (5 / 9, 1.0),
        "recall": (5 / 6, 5 / 6),
        "yes_ratio": (9 / 12, 5 / 12),
    }
    by_hand["f1"] = (2 * 5 / (2 * 5 + 4 + 1), 2 * 5 / (2 * 5 + 0 + 1))
    for metric, (a, b) in by_hand.items():
        entry = c["metrics"][metric]
        assert (entry["a"], entry["b"], entry["difference"]) == pytest.approx((a, b, b - a)), metric
        assert entry["interval"][0] <= b - a <= entry["interval"][1]
    # 1 against 5 of 6: twice the tail (C(6,0) + C(6,1)) / 2^6
    m = c["mcnemar"]
    assert [m[k] for k in ("both", "only_a", "only_b", "neither")] == [6, 1, 5, 0]
    assert m["p"] == pytest.approx(2 * 7 / 64) == m["p_holm"] and m["tests"] == 1
    assert "0.2188" in page
    assert "12 questions that both answered" in page
    assert any("Small samples: the smallest has 12 questions" in x for x in found["summary"]["cautions"])


def test_the_summary_claims_no_more_than_the_intervals(tmp_path, pictures):
    two = write_two(tmp_path, pictures, plain=(1, 3, 5, 7, 8), hacl=())
    found, page = make(tmp_path, *two)
    (pair,) = found["summary"]["pairs"]
    metrics = found["tasks"][0]["comparisons"][0]["metrics"]
    assert metrics["accuracy"]["interval"][0] > 0  # but 5 of 5 is no more than p = 2 / 2^5
    expected = {"accuracy": ["unclear"], "precision": ["changed"], "f1": ["improved"]}
    for metric, entry in metrics.items():
        said = [v for v in ("improved", "worse", "changed", "unclear") if f"{metric} " in " ".join(pair[v])]
        low, high = entry["interval"]
        assert said == expected.get(metric, [] if (low, high) == (0, 0) else ["unclear"]), metric
        assert metric in ("accuracy", "unclear") or (low <= 0 <= high) == (said == ["unclear"]), metric
    assert "McNemar&#39;s p is 0.0625 (adjusted)" in page
    assert "f1 " in pair["improved"][0] and "precision 0.556 to 1.000" in pair["changed"][0]
    reversed_, page = make(tmp_path, *two, "--baseline", "hacl", "--gallery", "0", output="reversed")
    (pair,) = reversed_["summary"]["pairs"]
    assert "f1 " in pair["worse"][0] and "precision 1.000 to 0.556" in pair["changed"][0] and not pair["improved"]
    assert "plain against hacl" in page


def test_a_model_that_always_says_yes_has_not_improved(tmp_path):
    labels = ["yes", "no"] * 20
    for name, wrong in (("a", (0, 2, 4, 6, 8, 10, 12)), ("b", range(1, 40, 2))):
        answers = [("No" if (x == "yes") == (i in wrong) else "Yes") for i, x in enumerate(labels)]
        write_task(tmp_path / name / "pope", [item(i, x, y) for i, (x, y) in enumerate(zip(labels, answers))])
    found, _ = make(tmp_path, tmp_path / "a", tmp_path / "b")
    (pair,) = found["summary"]["pairs"]
    assert not pair["improved"] and "accuracy 0.825 to 0.500" in pair["worse"][0]
    assert "recall 0.650 to 1.000" in pair["changed"][0] and "yes_ratio" in pair["changed"][0]


def test_the_gallery_says_what_the_other_was_asked_and_opens_no_image_outside(tmp_path, pictures):
    for name, answer, question in (("a", "Yes", "Is there a dog?"), ("b", "No", "Is there a zebra?")):
        images = ("0.png", "../secret.png", str(tmp_path / "secret.png"))
        items = [item(i, "yes", answer, image, question) for i, image in enumerate(images)]
        write_task(tmp_path / name / "pope", items, images=pictures)
    shutil.copy(pictures / "1.png", tmp_path / "secret.png")
    found, page = make(tmp_path, tmp_path / "a", tmp_path / "b")
    entries = {e["id"]: e for part in found["gallery"] for e in part["entries"]}
    assert [bool(entries[str(i)]["picture"]) for i in range(3)] == [True, False, False]
    assert all("leads out of the image folder" in entries[i]["problem"] for i in "12")
    assert entries["0"]["question"] == "Is there a dog?"
    assert entries["0"]["facts"]["b"] == {"asked in other words": "Is there a zebra?"}
    assert "Is there a zebra?" in page


def test_verdicts_know_which_way_is_better():
    up, down, zero = ({"difference": d, "interval": [d - 0.1, d + 0.1]} for d in (0.2, -0.2, 0.05))
    for metric in ("accuracy", "f1", "existence_f1", "score", "score_attribute", "cover", "amber_score", "recall"):
        assert [verdict_of(metric, x) for x in (up, down, zero)] == ["improved", "worse", "unclear"], metric
    for metric in ("chair_i", "chair_s", "chair", "hal", "cog", "hallucination_rate", "hallucination_rate_attribute"):
        assert [verdict_of(metric, x) for x in (up, down, zero)] == ["worse", "improved", "unclear"], metric
    for metric in ("yes_ratio", "words", "objects", "unclear", "unheard_of"):
        assert [verdict_of(metric, x) for x in (up, down, zero)] == ["changed", "changed", "unclear"], metric
    assert verdict_of("f1", {"difference": 0.1, "interval": [math.nan, 0.2]}) is None
    for kind, module in TASKS.items():
        metrics = importlib.import_module(module, "hacl_llava.evaluation").METRICS
        assert {m for m in metrics if not way_of(m)} <= {"yes_ratio", "unclear", "words", "objects"}, kind


def test_several_tests_are_counted_and_adjusted(tmp_path, two):
    third = tmp_path / "third"
    shutil.copytree(two[1], third)
    found, page = make(tmp_path, *two, third)
    tests = [c["mcnemar"] for c in found["tasks"][0]["comparisons"]]
    assert [t["tests"] for t in tests] == [2, 2] and [t["p_holm"] for t in tests] == pytest.approx([4 * 7 / 64] * 2)
    assert "2 such tests in this report" in page and "0.4375" in page
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # by hand
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_common_questions_only(tmp_path, pictures):
    a = [item(i, "yes", "Yes", f"{i}.png") for i in range(6)]
    b = [item(str(i), "yes", "No", f"{i}.png") for i in range(3, 9)]  # ids as words
    b[0]["image"] = "another.png"  # id 3 asks about something else
    b[1].pop("counts")
    b[1]["error"] = "no such image"
    write_task(tmp_path / "a" / "pope", a)
    write_task(tmp_path / "b" / "pope", b, questions="2" * 64)
    found, page = make(tmp_path, tmp_path / "a", tmp_path / "b")
    (c,) = found["tasks"][0]["comparisons"]
    assert (c["questions"], c["only_a"], c["only_b"], c["other_question"]) == (1, 5, 4, 1)  # 5 alone is common
    assert c["mcnemar"]["only_a"] == 1
    assert "1 question that both answered; left out: 5 of a and 4 of b that the other lacks" in page
    assert [d["setting"] for d in found["settings_that_differ"]] == ["questions"]
    assert any("1 of b" in x for x in found["summary"]["cautions"])
    write_task(tmp_path / "c" / "pope", [item(i, "yes", "Yes") for i in range(20, 23)])
    found, page = make(tmp_path, tmp_path / "a", tmp_path / "c")
    assert found["tasks"][0]["comparisons"][0]["problem"] == "no question that both answered"
    assert "Not compared" in page and found["gallery"] == []
    (pair,) = found["summary"]["pairs"]
    assert not (pair["improved"] or pair["worse"] or pair["changed"] or pair["unclear"])


def edited(folder, **changes):
    path = folder / "pope" / "results.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {k: (result[k] | v if k == "settings" else v) for k, v in changes.items()}))


def test_settings_that_matter_are_flagged(tmp_path, two):
    edited(two[1], settings={"template": "plain", "batch_size": 64})
    found, page = make(tmp_path, *two)
    (flag,) = found["settings_that_differ"]
    assert flag["setting"] == "template" and flag["values"] == {"plain": "v1", "hacl": "plain"}
    assert "Differences below may come from them" in page and "different versions or commits" not in page
    assert any(x.endswith("template.") for x in found["summary"]["cautions"])
    # an endpoint lacks settings that checkpoints have
    endpoint = {k: v for k, v in SETTINGS.items() if k != "template"} | {"model": "api:gpt"}
    path = two[1] / "pope" / "results.json"
    provenance = {"versions": {"hacl_llava": "0.2"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": endpoint, "provenance": provenance}))
    found, page = make(tmp_path, *two)
    assert found["settings_that_differ"] == [] and "different versions or commits" in page


def test_training_curves(tmp_path):
    write_training(tmp_path / "hacl" / "stage1")
    write_training(tmp_path / "hacl" / "stage2", hacl=False, tune_mm_mlp_adapter=False)
    write_training(tmp_path / "plain" / "stage1", hacl=False)
    (tmp_path / "plain" / "stage1" / "checkpoint-3").mkdir()
    (tmp_path / "plain" / "stage1" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    found, page = make(tmp_path, f"hacl={tmp_path / 'hacl'}", tmp_path / "plain")
    stage1, stage2 = found["training"]["1"], found["training"]["2"]
    assert [x["line"] for x in stage1] == ["hacl", "plain"] and [x["line"] for x in stage2] == ["hacl"]
    assert stage1[0]["end"]["loss_i2t"] == 5.5 and stage1[0]["not_finite"] == {"loss": 1}
    last = sum(2 + 1 / i for i in (29, 30)) / 2  # a tenth of the 29 finite ones
    assert stage1[0]["end"]["loss"] == pytest.approx(last)
    assert stage1[1]["end"]["loss_lm"] == pytest.approx(last)  # without HACL the trained loss is the caption loss
    assert page.count("data:image/png;base64,") == 2
    assert re.search(r"caption loss \(nats a token\)</th>\s*<td>2</td><td>2.034</td>", page)
    assert found["left_out"] == [] and "loss was no finite number in 1 of the logged steps" in page
    assert "weight 1, negatives batch" in page and "without HACL" in page
    assert "nothing is said about which is better" in page


def test_escaping(tmp_path, pictures):
    name = '<b>|"x"&$a$_'
    a = [item(str(i), "yes", f"Yes {NASTY}", f"{i}.png", NASTY) for i in range(4)]
    b = [item(str(i), "yes", f"No {NASTY}", f"{i}.png", NASTY) for i in range(4)]
    write_task(tmp_path / "a" / "pope", a, images=pictures, task="POPE <i>|$")
    write_task(tmp_path / "b" / "pope", b, images=pictures, task="POPE <i>|$")
    found, page = make(tmp_path, f"_hid={tmp_path / 'a'}", f"{name}={tmp_path / 'b'}", "--title", NASTY)
    for bad in ("<script", "<b>|", "<i>", "\x00"):
        assert bad not in page, bad
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert markupsafe.escape(name) in page
    assert "🙂" in page and found["title"].startswith("a | b <script>")
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == [] and "<script" not in page.lower()


@pytest.mark.parametrize(
    "text, shown",
    [
        ("loss_lm of a1_b", "loss_lm of a1_b"),  # CommonMark: no emphasis inside a word
        ("_a_ __b__ c__d (_e)", r"\_a\_ \_\_b\_\_ c\_\_d (\_e)"),
        ("**a** `b` ~c~ $x$", r"\*\*a\*\* \`b\` \~c\~ \$x\$"),
        ("<b>&amp; ![i](x)", r"&lt;b&gt;&amp;amp; \!\[i\](x)"),
        ("a | b\n\n# c\\|", r"a \| b # c\\\|"),
        ("a #", r"a \#"),  # which would close a heading
        (0.5, "0.5"),
    ],
)
def test_markdown_means_nothing_but_the_text(text, shown):
    assert literal(text) == shown and table((text,), [(text,)]).splitlines() == [
        f"| {shown} |",
        "| --- |",
        f"| {shown} |",
    ]


def test_blocks_of_any_words():
    blocks = [("heading", 2, "#"), ("text", "1. <x>"), ("text", "- {{ 7 }}"), ("table", ("a", "b"), [("-", "|")])]
    blocks += [("picture", "a.png", "[x](y)"), ("code", "a\n\n<b>")]
    assert as_markdown(blocks) == (
        "## \\#\n\n1\\. &lt;x&gt;\n\n\\- {{ 7 }}\n\n| a | b |\n| --- | --- |\n| - | \\| |\n\n"
        "![\\[x\\](y)](a.png)\n\n    a\n    \n    <b>\n"
    )


def test_provenance_names_what_ran():
    found = provenance(3)
    assert found["seed"] == 3 and found["versions"]["torch"] and found["versions"]["python"] and found["command"]
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])


def test_damaged_files_are_named_and_not_fatal(tmp_path, two, capsys):
    plain, hacl = two
    with open(plain / "pope" / "items.jsonl", "a") as file:
        file.write('[1]\n{"id": "13", "counts": {"tp": "one"}}\n{"id": "12", "image": "12.p')  # half a last line
    going = hacl / "amber"
    going.mkdir()
    (going / "answers.jsonl").write_text('{"question_id": 1}\n{"question_id": 2}\n')
    for name, text in (
        ("half", '{"task": "POPE", '),
        ("other", '{"results": {}}'),
        ("list", "[]"),
        ("again", (hacl / "pope" / "results.json").read_text()),
    ):
        (hacl / name).mkdir()
        (hacl / name / "results.json").write_text(text)
    (hacl / "train").mkdir()
    (hacl / "train" / "trainer_state.json").write_text('{"log_history": [{"loss": 1.0, "step"')
    (hacl / "train2" / "checkpoint-5").mkdir(parents=True)
    (hacl / "empty").mkdir()
    (hacl / "empty" / "trainer_state.json").write_text('{"log_history": []}')
    (hacl / "analysis.json").write_bytes(b"\xff\xfe{")
    older = {"models": [], "comparisons": [], "figures": [], "findings": ["plain sentences"]}
    (hacl / "older").mkdir()
    (hacl / "older/analysis.json").write_text(json.dumps(older))
    found, page = make(tmp_path, plain, hacl)
    reasons = {x["file"]: x["reason"] for x in found["left_out"]}
    assert "3 of its lines are no whole item" in reasons[str(plain / "pope" / "items.jsonl")]
    assert "2 answers but no results.json" in reasons[str(going)]
    assert "half-written or damaged" in reasons[str(hacl / "half" / "results.json")]
    assert (
        "is not one that `hacl-llava eval` wrote (missing or of another type: task, kind"
        in reasons[str(hacl / "other" / "results.json")]
    )
    assert "expected an object" in reasons[str(hacl / "list" / "results.json")]
    second = {n for n in reasons if "is a second result" in reasons[n]}
    assert second == {str(hacl / "pope" / "results.json")}  # 'again' comes before it
    assert "half-written" in reasons[str(hacl / "train" / "trainer_state.json")]
    assert "1 checkpoint-* but no trainer_state.json" in reasons[str(hacl / "train2")]
    assert reasons[str(hacl / "empty" / "trainer_state.json")] == "has no logged loss"
    assert "damaged" in reasons[str(hacl / "analysis.json")]
    said = reasons[str(hacl / "older/analysis.json")]
    assert said == "is of another version of `hacl-llava analyze` (its findings); run that again"
    assert "Left out" in page and "left out: " in capsys.readouterr().err
    assert found["tasks"][0]["counts"]["plain"]["questions"] == 12


@pytest.mark.parametrize(
    "wrong", [{"settings": []}, {"metrics": {"f1": 0.5}}, {"metrics": {"f1": {"value": 1, "interval": 3}}}]
)
def test_wrong_types_in_a_result_are_not_fatal(tmp_path, two, wrong):
    path = two[0] / "pope" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    found, page = make(tmp_path, *two)
    assert [x["file"] for x in found["left_out"]] == [str(path)] and "type" in found["left_out"][0]["reason"]
    assert str(path) in page


def test_an_unknown_kind_of_task_is_shown_but_not_compared(tmp_path, two):
    for folder in two:
        edited(folder, kind="mme")
    found, page = make(tmp_path, *two)
    assert "the kind of task is mme" in page and "0.583" in page


def test_one_run_alone(tmp_path, two):
    write_training(two[1] / "train")
    found, page = make(tmp_path, two[1])
    assert found["summary"]["pairs"] == [] and found["gallery"] == [] and found["tasks"][0]["comparisons"] == []
    assert "One run: nothing is compared." in page and "0.917 [0.100, 0.900]" in page


def test_gallery_is_balanced_seeded_and_says_how_it_was_drawn(tmp_path, two, pictures):
    (pictures / "0.png").unlink()
    (pictures / "1.png").write_text("no image")
    found, page = make(tmp_path, *two, "--gallery", "8")
    (part,) = found["gallery"]
    assert "1 of the 1 that only plain got right and 4 of the 5 that only hacl got right" in part["drawn"]
    assert [e["right"] for e in part["entries"]] == ["plain"] + ["hacl"] * 4
    assert part["entries"][0]["problem"] == "0.png: no such file." and "no picture: 0.png" in page
    shown = [e for e in part["entries"] if e["picture"]]
    assert all((tmp_path / "out" / e["picture"]).read_bytes().startswith(b"\xff\xd8") for e in shown)
    assert page.count("data:image/jpeg;base64,") == len(shown) >= 3
    runs = [read_run(p.name, p) for p in two]
    drawn = {tuple(e["id"] for e in draw_gallery(*runs, ["POPE coco random"], 4, seed)[0][1]) for seed in range(8)}
    assert len(drawn) > 1
    assert draw_gallery(*runs, ["POPE coco random"], 4, 3) == draw_gallery(*runs, ["POPE coco random"], 4, 3)
    assert make(tmp_path, *two, "--gallery", "0", output="none")[0]["gallery"] == []
    moved = tmp_path / "moved"
    pictures.rename(moved)
    again = make(tmp_path, *two, "--images", moved, output="moved-out")[0]["gallery"][0]["entries"]
    assert sum(bool(e["picture"]) for e in again) >= 4


def test_gallery_of_captions_shows_what_hallucinates(tmp_path):
    def caption(identity, text, wrong):
        counts = {"hallucinated": len(wrong), "mentions": 2, "sentence_hallucinated": int(bool(wrong)), "sentences": 1}
        counts |= {"recalled": 1, "truth": 2, "words": 5, "correct": int(not wrong)}
        return {
            "id": identity,
            "image": f"{identity}.jpg",
            "question": "Describe.",
            "answer": text,
            "counts": counts,
        } | {"hallucinated": wrong}

    a = [caption(i, "A dog and a puppy.", [["puppy", "dog"], ["dog", "dog"]]) for i in range(4)]
    b = [caption(i, "A cat.", []) for i in range(4)]
    write_task(tmp_path / "a" / "chair", a, task="CHAIR", kind="chair")
    write_task(tmp_path / "b" / "chair", b, task="CHAIR", kind="chair")
    found, page = make(tmp_path, tmp_path / "a", tmp_path / "b")
    c = found["tasks"][0]["comparisons"][0]
    assert c["metrics"]["chair_s"]["difference"] == -1 and c["metrics"]["chair_i"]["difference"] == -1
    (pair,) = found["summary"]["pairs"]
    assert "chair_i 1.000 to 0.000" in pair["improved"][0] and not pair["worse"]
    assert c["mcnemar"]["only_b"] == 4 and "puppy (dog), dog" in page and "right, or nothing hallucinated" in page


@pytest.mark.parametrize(
    "size, expected",
    [((20, 10), (320, 160)), ((1000, 500), (320, 160)), ((200, 300), (200, 300)), ((1, 900), (1, 320))],
)
def test_thumbnails(tmp_path, size, expected):
    Image.effect_noise(size, 90).save(tmp_path / "x.png")
    with Image.open(io.BytesIO(thumbnail(tmp_path / "x.png"))) as image:
        assert image.size == expected
    with pytest.raises(HaclError, match="No such file"):
        thumbnail(tmp_path / "none.png")


def test_analysis(tmp_path, two):
    folder = tmp_path / "analysis"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "pca.png")
    entry = {"value": 0.7, "interval": [0.6, 0.8]}
    gap = {"value": 1.5, "interval": [None, None]}
    space = {"measures": {"modality_gap": gap, "image_to_text_r1": {**entry, "chance": 0.01}}}
    space["closer_to_true_by_kind"] = {"attribute": {**entry, "count": 40}}
    models = [{"name": n, "checkpoint": n, "spaces": {"llm": space}} for n in ("plain", "hacl|")]
    figures = [{"file": "pca.png", "title": "PCA <1>"}, {"file": "../gone.png", "title": "gone"}]
    analysis = {"models": models, "figures": figures, "data": {}, "provenance": {}}
    change = {
        "measures": {"modality_gap": {"difference": -0.5, "interval": [-0.6, -0.4]}},
        "closer_to_true_by_kind": {},
    }
    analysis["findings"] = [{"title": "Each against chance", "lines": ["plain: above chance."]}]
    analysis["comparisons"] = [{"first": "plain", "second": "hacl|", "spaces": {"llm": change}}]
    (folder / "analysis.json").write_text(json.dumps(analysis))
    found, page = make(tmp_path, *two, folder, f"same={folder}")
    assert ">1.500</td>" in page
    assert [r["name"] for r in found["runs"]] == ["plain", "hacl"]  # an analysis is no run
    assert len(found["analyses"]) == 1 and (tmp_path / "out" / "analysis-1-1.png").exists()
    for words in (
        "Each against chance</h3>",
        "<li>plain: above chance.</li>",
        "PCA &lt;1&gt;",
        "<td>0.010</td><td>0.700 [0.600, 0.800]</td>",
        "attribute (40 pairs)",
        "gone: left out",
    ):
        assert words in page, words
    assert "-0.500 [-0.600, -0.400]" in page
    alone = make(tmp_path, folder, output="alone")[0]
    assert alone["runs"] and alone["analyses"]


def test_the_same_seed_gives_the_same_report(tmp_path, two):
    write_training(two[0] / "train")
    first, _ = make(tmp_path, *two, output="one")
    again, _ = make(tmp_path, *two, output="two")
    shutil.rmtree(two[0] / "train")  # a picture less to draw
    other, _ = make(tmp_path, *two, "--seed", "1", output="three")
    for found in (first, again):
        found.pop("provenance")
    assert json.dumps(first) == json.dumps(again)
    assert json.dumps(first["tasks"]) != json.dumps(other["tasks"])
    assert (tmp_path / "one" / "evaluation.png").read_bytes() == (tmp_path / "two" / "evaluation.png").read_bytes()


def test_the_page_is_made_from_what_report_json_holds(tmp_path, two):
    write_training(two[0] / "train")
    found, page = make(tmp_path, *two)
    assert report.page(found, tmp_path / "out") == page
    found["tasks"][0]["comparisons"][0]["metrics"]["f1"]["difference"] = 0.123456
    assert "+0.123" in report.page(found, tmp_path / "out") and "+0.123" not in page
    assert sorted(p.name for p in (tmp_path / "out").glob("report*")) == ["report.html", "report.json"]


def test_a_report_inside_a_run_is_not_read_again(tmp_path, two):
    make(tmp_path, *two, output="plain/out")
    shutil.copytree(two[0] / "pope", two[0] / "out" / "pope")
    assert make(tmp_path, *two, output="plain/out")[0]["left_out"] == []


def test_mistakes(tmp_path, two, capsys):
    plain, hacl = map(str, two)
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, message in (
        ([str(tmp_path / "none")], "is no folder"),
        ([f"a={plain}", f"a={hacl}"], "two runs are named 'a'"),
        ([f"={plain}"], "has no name before '='"),
        ([plain, "--baseline", "x"], "allowed is the name of a run: plain"),
        ([plain, "--gallery", "-1"], "allowed is a number from 0"),
        ([str(empty)], "Looked for: trainer_state.json"),
    ):
        make(tmp_path, *words, status=2)
        assert message in capsys.readouterr().err, message
    (tmp_path / "file").write_text("")
    make(tmp_path, plain, output="file", status=2)
    assert "cannot be written" in capsys.readouterr().err


def test_names(tmp_path, monkeypatch):
    odd = tmp_path / "a=b"
    odd.mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_runs([str(odd), "x=a=b", "."]) == [("a=b", str(odd)), ("x", "a=b"), (tmp_path.name, ".")]


def test_imports_nothing_heavy():
    code = (
        "import sys; from hacl_llava import cli; cli.make_parser(); "
        "heavy = {'torch', 'transformers', 'llava', 'matplotlib', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_matplotlib_missing_names_the_extra(tmp_path, two, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make(tmp_path, *two, status=2)
    assert "hacl_llava[plot]" in capsys.readouterr().err
