"""``hacl-llava hallucinate``: the run, its journal, what stops it, and what it refuses."""

import contextlib
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import names_in

from hacl_llava.cli import main
from hacl_llava.hallucinate import KINDS
from hacl_llava.records import stream_records

COCO = Path(__file__).parents[1] / "data/coco_captions.json"
COMMAND = [sys.executable, "-m", "hacl_llava.cli", "hallucinate"]
KILLS = int(os.environ.get("HACL_KILLS", 4))  # `make test-all` asks for more


def record(i, caption, **more):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": caption}]
    return {"id": f"r{i}", "image": f"{i}.jpg", "conversations": turns, **more}


def write(path, records):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def hallucinate(*args):
    return main(["hallucinate", *map(str, args)])


def load(path):
    return [r for _, r in stream_records(path)]


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A hundred captions."""
    return write(tmp_path_factory.mktemp("some") / "some.json", load(COCO)[:100])


@pytest.fixture
def small(tmp_path):
    texts = ["A dog sits on a red couch.", "Two cats sleep under a table.", "A man rides a horse on the beach."]
    return write(tmp_path / "in.json", [record(i, t) for i, t in enumerate(texts)])


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_every_field_is_kept_and_the_captions_are_added(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert hallucinate(COCO, out) == 0
    before, after = load(COCO), load(out)
    assert "401 of 401 records have hallucinated captions" in capsys.readouterr().out
    for a, b in zip(before, after, strict=True):
        added, kinds = b.pop("hallucinated_captions"), b.pop("hallucinated_kinds")
        assert a == b and list(a) == list(b) and len(added) == 1 and isinstance(added[0], str)
        assert len(kinds) == 1 and kinds[0] in KINDS
    assert json.loads(out.read_text(encoding="utf-8"))  # and any json reader takes it


def test_training_reads_what_is_written(tmp_path, some):
    from hacl_llava.check_data import find
    from hacl_llava.data import read_records
    from hacl_llava.records import hallucinated_captions

    out = tmp_path / "out.json"
    assert hallucinate(some, out, "--per-caption", 2) == 0
    records = read_records(str(out))
    for folder in {r["image"] for r in records}:
        (tmp_path / folder).touch()
    assert not find(records, str(tmp_path), plain=True)
    counts = Counter(len(hallucinated_captions(r)) for r in records)
    assert counts[2] > 95


@pytest.mark.parametrize("name", ["out.jsonl", "out.json.gz", "out.jsonl.gz"])
def test_json_lines_and_gzip(tmp_path, small, name):
    assert hallucinate(small, tmp_path / "plain.json") == 0
    assert hallucinate(small, tmp_path / name) == 0
    assert load(tmp_path / name) == load(tmp_path / "plain.json")
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in load(small)).encode()))
    assert hallucinate(packed, tmp_path / "again.json") == 0
    assert load(tmp_path / "again.json") == load(tmp_path / "plain.json")


def test_the_same_bytes_whatever_the_workers(tmp_path, some, monkeypatch):
    from hacl_llava.hallucinate import source

    outputs, pools, pool = [], [], source.ProcessPoolExecutor
    monkeypatch.setattr(source, "BLOCK", 40)
    monkeypatch.setattr(source, "ProcessPoolExecutor", lambda *args, **more: pools.append(args) or pool(*args, **more))
    for workers in (1, 2):
        out = tmp_path / f"out{workers}.json"
        assert hallucinate(some, out, "--workers", workers, "--per-caption", 2, "--seed", 5) == 0
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1] and len(pools) == 2  # to balance the choice, and to choose
    monkeypatch.undo()
    assert hallucinate(some, tmp_path / "other.json", "--per-caption", 2, "--seed", 6) == 0
    assert (tmp_path / "other.json").read_bytes() != outputs[0]


def test_types_weights_and_several(tmp_path, some):
    out = tmp_path / "out.json"
    assert hallucinate(some, out, "--types", "quantity=3", "location", "--per-caption", 2) == 0
    kinds = Counter(k for line in journal(out) for k, _ in line["captions"])
    assert set(kinds) == {"quantity", "location"} and all(
        len(r.get("hallucinated_captions", [])) <= 2 for r in load(out)
    )


def journal(out):
    lines = (out.parent / (out.name + ".journal")).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_records_that_cannot_be_rewritten_are_counted_and_left(tmp_path, capsys):
    records = [
        record(0, "A dog sits on a red couch."),
        record(1, "  "),
        record(2, "собака сидит на диване"),
        record(3, "A cat on a bed", hallucinated_captions=["A dog on a bed"]),
        record(4, "A cat on a bed", hallucinated_captions=[]),
        record(5, "A cat on a bed", **{"Hallucination caption": "A dog on a bed"}),
    ]
    del records[4]["hallucinated_captions"]
    records[4]["hallucinated_captions"] = None
    text_only = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A dog."}]}
    out = tmp_path / "out.json"
    assert hallucinate(write(tmp_path / "in.json", [*records, text_only]), out) == 0
    said = capsys.readouterr().out
    for line in ("1 (empty caption)", "1 (not English)", "2 (has hallucinated captions already)", "1 (no image)"):
        assert f"without: {line}" in said
    after = load(out)
    assert [len(r.get("hallucinated_captions") or []) for r in after] == [1, 0, 0, 1, 1, 0, 0]
    assert after[3] == records[3] and after[5] == records[5] and after[6] == text_only
    assert hallucinate(tmp_path / "in.json", tmp_path / "all.json", "--replace") == 0
    assert load(tmp_path / "all.json")[5]["hallucinated_kinds"]
    assert "Hallucination caption" not in load(tmp_path / "all.json")[5]


def test_a_file_without_images_is_rewritten_all_the_same(tmp_path):
    records = [{"conversations": record(0, "A dog on a bed")["conversations"]}]
    records[0]["conversations"][0]["value"] = "What?"
    assert hallucinate(write(tmp_path / "in.json", records), tmp_path / "out.json") == 0
    assert load(tmp_path / "out.json")[0]["hallucinated_captions"]


def test_other_captions_of_the_image_are_looked_at(tmp_path):
    captions = ["A dog sits on a couch"] + [
        f"A {w} and a lamp" for w in ("cat", "rabbit", "hamster", "parrot", "kitten")
    ]
    records = [{**record(i, c), "image": "same.jpg"} for i, c in enumerate(captions)] * 40
    records = [{**r, "id": i} for i, r in enumerate(records)]
    out = tmp_path / "out.json"
    assert hallucinate(write(tmp_path / "in.json", records), out, "--types", "existence") == 0
    new = {t.lower() for r in load(out)[::6] for t in r["hallucinated_captions"]}
    assert new and not any(
        f"a {w} " in t for t in new for w in ("cat", "rabbit", "hamster", "parrot", "kitten", "lamp")
    )


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_done_again(tmp_path, small, monkeypatch):
    out = tmp_path / "out.json"
    assert hallucinate(small, out) == 0
    before, lines = out.read_bytes(), journal(out)
    out.unlink()
    monkeypatch.setattr("hacl_llava.hallucinate.source.RulesSource.block", None)  # would fail
    assert hallucinate(small, out) == 0
    assert out.read_bytes() == before and journal(out) == lines


def test_what_the_journal_has_is_kept_and_the_rest_is_made(tmp_path):
    source, whole, out = write(tmp_path / "in.json", load(COCO)[:80]), tmp_path / "whole.json", tmp_path / "out.json"
    assert hallucinate(source, whole) == 0
    lines = (tmp_path / "whole.json.journal").read_bytes().splitlines(keepends=True)
    for cut in (0, 5, len(lines[0]), len(lines[0]) + 1, sum(map(len, lines[:40])) + 30, sum(map(len, lines[:60]))):
        (tmp_path / "out.json.journal").write_bytes(b"".join(lines)[:cut])
        out.unlink(missing_ok=True)
        assert hallucinate(source, out) == 0
        assert out.read_bytes() == whole.read_bytes()
        assert (tmp_path / "out.json.journal").read_bytes().splitlines()[1:] == [x.rstrip() for x in lines[1:]]


def test_a_limit_and_then_the_rest(tmp_path, some):
    out = tmp_path / "out.json"
    assert hallucinate(some, out, "--limit", 30) == 0
    first = load(out)
    assert sum("hallucinated_captions" in r for r in first) == 30
    assert hallucinate(some, out) == 0
    assert load(out)[:30] == first[:30] and all("hallucinated_captions" in r for r in load(out))
    assert hallucinate(some, tmp_path / "whole.json") == 0
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize("change, named", [(["--seed", 1], "seed"), (["--per-caption", 2], "per_caption")])
def test_other_settings_are_refused_not_mixed(tmp_path, small, capsys, change, named):
    out = tmp_path / "out.json"
    assert hallucinate(small, out) == 0
    before = out.read_bytes()
    assert hallucinate(small, out, *change) == 2
    error = capsys.readouterr().err
    assert f"{named} " in error and "--restart" in error and out.read_bytes() == before
    assert hallucinate(small, out, *change, "--restart") == 0


@pytest.mark.parametrize("then, status", [(None, 0), ("roberta-large-mnli", 2)])
def test_a_run_of_before_is_gone_on_with_or_refused(tmp_path, small, capsys, then, status):
    """A setting that is no longer there: of no matter where it was off."""
    out = tmp_path / "out.json"
    assert hallucinate(small, out) == 0
    journal = tmp_path / "out.json.journal"
    first, *lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(json.dumps(json.loads(first) | {"nli_model": then}) + "\n" + "".join(lines[:1]))
    assert hallucinate(small, out) == status
    assert ('nli_model "roberta-large-mnli", this one has no nli_model' in capsys.readouterr().err) == bool(then)


def test_another_input_is_refused(tmp_path, small, capsys):
    out = tmp_path / "out.json"
    assert hallucinate(small, out) == 0
    write(small, [record(0, "A cat on a chair")])
    assert hallucinate(small, out) == 2 and "the input has changed since" in capsys.readouterr().err


def test_an_input_that_changes_under_the_run_is_noticed(tmp_path, small, capsys, monkeypatch):
    from hacl_llava.hallucinate.run import Run

    ask, out = Run.ask, tmp_path / "out.json"

    def changed(self, *args):
        found = ask(self, *args)
        write(small, [record(i, "A cat on a chair") for i in range(3)])
        return found

    monkeypatch.setattr(Run, "ask", changed)
    assert hallucinate(small, out) == 2
    assert "was changed while it was being read" in capsys.readouterr().err and not out.exists()


def test_no_file_of_the_users_is_taken_for_the_runs_own(tmp_path, small, capsys):
    for ending in (".journal", ".part"):
        source = tmp_path / f"x.json{ending}"
        source.write_bytes(small.read_bytes())
        for more in ([], ["--restart"]):
            assert hallucinate(source, tmp_path / "x.json", *more) == 2
            assert "is the input itself" in capsys.readouterr().err and source.read_bytes() == small.read_bytes()
        source.unlink()
    notes = tmp_path / "q.json.journal"
    notes.write_text("precious notes\n")
    assert hallucinate(small, tmp_path / "q.json", "--restart") == 2
    assert "is no journal of this command" in capsys.readouterr().err and notes.read_text() == "precious notes\n"


def test_a_damaged_line_of_the_journal_costs_one_answer(tmp_path, some, capsys):
    out = tmp_path / "out.json"
    assert hallucinate(some, out) == 0
    before, path = out.read_bytes(), tmp_path / "out.json.journal"
    data = bytearray(path.read_bytes())
    data[9000:9020] = b"\0" * 20
    path.write_bytes(data)
    assert hallucinate(some, out) == 0
    assert "lines are damaged" in capsys.readouterr().err and out.read_bytes() == before


HOLD = """
import sys, time
from hacl_llava.common.files import locked
with locked(sys.argv[1], "x", "y"):
    print(flush=True)
    time.sleep(60)
"""


def test_two_at_a_time_are_refused(tmp_path, small, capsys):
    out = tmp_path / "out.json"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, f"{out}.journal.lock"], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        assert hallucinate(small, out) == 2
        assert hallucinate(small, out, "--restart") == 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert capsys.readouterr().err.count(f"another run writes there (process {holder.pid} on ") == 2
    assert hallucinate(small, out) == 0  # a dead one's does not count


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = record(0, "A dog sits on a red couch.")


@pytest.mark.parametrize(
    "records, message",
    [
        ([GOOD, {"id": "x", "image": "a.jpg"}], "record 1 .id 'x'. has no 'conversations'"),
        ([GOOD, {"id": "x", "image": "a.jpg", "conversations": []}], "record 1 .id 'x'. has no 'conversations'"),
        (
            [GOOD, {**record(1, "a"), "conversations": [{"from": "human", "value": "<image>"}]}],
            "record 1 .* has no answer",
        ),
        ([GOOD, {**record(1, "a"), "conversations": [{"from": "gpt"}]}], "record 1 .* has the turn"),
        ([GOOD, {**record(1, "a"), "conversations": [{"from": "bot", "value": "a"}]}], "a turn from 'bot'"),
        ([GOOD, record(0, "A cat")], "record 1 .id 'r0'. has an id that an earlier record has"),
        ([GOOD, "text"], "record 1 is a str"),
        ([GOOD, {**record(1, "a dog"), "hallucinated_captions": 5}], "record 1 .* expected a string or a list"),
    ],
)
def test_bad_records_are_refused_all_at_once_or_skipped(tmp_path, capsys, records, message):
    source, out = write(tmp_path / "in.json", records), tmp_path / "out.json"
    assert hallucinate(source, out) == 2
    error = capsys.readouterr().err
    assert str(source) in error and "--bad-records skip" in error and not out.exists()
    assert not (tmp_path / "out.json.journal").exists()
    import re

    assert re.search(message, error)
    assert hallucinate(source, out, "--bad-records", "skip") == 0
    after, error = load(out), capsys.readouterr()
    assert re.search(message, error.err) and after[0]["hallucinated_captions"]
    if "earlier" in message:
        assert after[1]["hallucinated_captions"]
    else:
        assert after[1] == records[1] and "1 (bad record)" in error.out


def test_many_bad_records_are_counted(tmp_path, capsys):
    source = write(tmp_path / "in.json", [GOOD] + [{"id": i} for i in range(30)])
    assert hallucinate(source, tmp_path / "out.json") == 2
    error = capsys.readouterr().err
    assert (
        "30 of 31 records" in error and "record 10 " in error and "record 11 " not in error and "and 20 more" in error
    )


def test_what_cannot_be_read_or_written(tmp_path, small, capsys):
    def refused(*args):
        assert hallucinate(*args) == 2
        return capsys.readouterr().err

    assert "No such file" in refused(tmp_path / "nowhere.json", tmp_path / "out.json")
    (tmp_path / "broken.json").write_text('[{"id": 1,')
    assert "cut off" in refused(tmp_path / "broken.json", tmp_path / "out.json")
    (tmp_path / "text.json").write_text("hello")
    assert "begins with" in refused(tmp_path / "text.json", tmp_path / "out.json")
    assert "is the input itself" in refused(small, small)
    assert "cannot be written" in refused(small, "/proc/out.json")  # where root cannot write either
    assert "is a folder" in refused(small, tmp_path)
    assert "is no folder" in refused(small, tmp_path / "no/out.json")
    mine = tmp_path / "mine.json"
    mine.write_text("precious")
    assert "exists, and no journal" in refused(small, mine) and mine.read_text() == "precious"
    assert hallucinate(small, mine, "--restart") == 0
    assert "is no journal of this command" in refused_journal(tmp_path, small, refused)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "is not writable" in refused(small, tmp_path / "closed/out.json")
    assert not list(tmp_path.glob("*.part")) and load(small)


def refused_journal(folder, small, refused):
    (folder / "other.json.journal").write_text("my diary\n")
    return refused(small, folder / "other.json")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--source", "magic"], "allowed are rules, api,"),
        (["--source", "rules=-1"], "allowed are rules, api,"),
        (["--types", "colour"], "allowed are existence, attribute, quantity, location"),
        (["--types", "existence=0"], "every weight is 0"),
        (["--per-caption", "0"], "a whole number from 1"),
        (["--source", "api"], "--source api needs --model"),
        (["--source", "local=0.5"], "vLLM, SGLang or Ollama: --source api --model NAME --base-url"),
        (["--model", "m"], "--model is for --source api"),
        (["--read-results", "x"], "--read-results is for --source api"),
        (["--source", "api", "--model", "m", "--read-results", "x", "--write-requests", "y"], "one of them at a time"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(tmp_path, capsys, args, message):
    try:
        status = hallucinate(tmp_path / "nowhere.json", tmp_path / "out.json", *args)
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and message in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path, small, capsys):
    assert hallucinate(small, tmp_path / "out.json", "--dry-run") == 0
    assert "3 captions to rewrite" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["in.json"]


# --- no room ----------------------------------------------------------------------------------------------------------


def test_no_room_for_journal_or_target_damages_nothing(tmp_path, some):
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert hallucinate(some, whole) == 0
    sizes = whole.stat().st_size, (tmp_path / "whole.json.journal").stat().st_size
    assert sizes[0] > sizes[1]
    out.write_text("before")
    for limit, named in ((sizes[1] // 2, "out.json.journal"), (sizes[0] - 5000, "out.json")):

        def cap(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        more = ["--restart"] if named.endswith("journal") else []
        done = subprocess.run(
            [*COMMAND, some, out, "--workers", "1", *more], capture_output=True, text=True, preexec_fn=cap
        )
        assert done.returncode == 2 and f"{named}: cannot be written" in done.stderr, done.stderr
        assert "safe" in done.stderr and out.read_text() == "before" and not list(tmp_path.glob("*.part"))
    assert len(journal(out)) == 100
    assert hallucinate(some, out) == 0 and out.read_bytes() == whole.read_bytes()


def test_a_full_disk(tmp_path, some):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("a tmpfs cannot be mounted here; RLIMIT_FSIZE stands for it in the test above")
    try:
        out = disk / "out.json"
        done = subprocess.run([*COMMAND, some, out, "--workers", "1"], capture_output=True, text=True)
        assert done.returncode == 2 and "No space left on device" in done.stderr and "safe" in done.stderr
        assert not out.exists() and not list(disk.glob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert hallucinate(some, out) == 0
        assert hallucinate(some, tmp_path / "whole.json") == 0
        assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# --- killed -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_ends_the_run_in_words(tmp_path):
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    captions = [r["conversations"][1]["value"] for r in load(COCO)]
    write(source, [record(i, captions[i % len(captions)]) for i in range(1_000)])
    process = subprocess.Popen([*COMMAND, source, out, "--workers", "2"], stdout=-3, stderr=subprocess.PIPE, text=True)
    workers, until = [], time.monotonic() + 120
    while time.monotonic() < until and not workers:
        time.sleep(0.05)
        path = tmp_path / "out.json.journal"
        if path.exists() and path.stat().st_size > 20_000:  # at work
            with contextlib.suppress(OSError):  # of a thread or a process that has just ended
                tasks = [Path(f"/proc/{process.pid}/task/{t}/children") for t in names_in(f"/proc/{process.pid}/task")]
                children = [c for t in tasks for c in t.read_text().split()]
                workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    assert "a worker process was killed" in process.communicate(timeout=120)[1] and process.returncode == 2
    kept = len(journal(out))
    assert not out.exists() and hallucinate(source, out, "--workers", 1, "--limit", kept + 100) == 0
    assert all(len(r["hallucinated_captions"]) == 1 for r in load(out)[: kept + 100])


def test_interrupted_while_reading_or_writing(tmp_path, small, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("Survey.__init__", "Run.assemble"):
        with monkeypatch.context() as patch:
            patch.setattr(f"hacl_llava.hallucinate.run.{place}", interrupted)
            assert hallucinate(small, tmp_path / "out.json") == 130
    assert hallucinate(small, tmp_path / "out.json") == 0


def test_ctrl_c_says_how_to_go_on(tmp_path, small, capsys, monkeypatch):
    from hacl_llava.hallucinate.source import RulesSource

    def answers(self, items):
        yield from self.block(list(items)[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(RulesSource, "answers", answers)
    assert hallucinate(small, tmp_path / "out.json") == 130
    assert "2 answers are safe" in capsys.readouterr().err
    monkeypatch.undo()
    assert hallucinate(small, tmp_path / "out.json") == 0


@pytest.mark.once
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_killed_at_random_by_rules(tmp_path):
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    captions = [r["conversations"][1]["value"] for r in load(COCO)]
    write(source, [record(i, captions[i % len(captions)]) for i in range(4_000)])
    more = ("--workers", "1", "--choose", "random")  # of the blind choice: the test after this one
    assert hallucinate(source, tmp_path / "whole.json", *more) == 0
    rng, kills = random.Random(0), 0

    def journaled(name="out.json"):
        path = tmp_path / f"{name}.journal"
        return path.stat().st_size if path.exists() else 0

    for attempt in range(200):
        until = journaled() + rng.random() * journaled("whole.json") / 10
        process = subprocess.Popen([*COMMAND, source, out, *more], stdout=-3, stderr=-3)
        # As it starts, or at work, which a busy machine may take long to come to; later whenever, and after ever more.
        wait = rng.random() * 0.6 if attempt < 9 else rng.random() + (attempt - 8) / 5
        if attempt < 9 and attempt % 3:
            wait /= 6
            while journaled() < until and process.poll() is None:
                time.sleep(0.002)
        try:
            process.wait(wait)
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert not out.exists() or out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert kills >= 3 and out.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_blind_run_that_was_killed_goes_on_to_the_same_file(tmp_path):
    source, out, whole = tmp_path / "in.json", tmp_path / "out.json", tmp_path / "whole.json"
    captions = [r["conversations"][1]["value"] for r in load(COCO)]
    write(source, [record(i, f"{captions[i % 401]} {i}") for i in range(300)])
    assert hallucinate(source, whole, "--workers", 1) == 0
    path, kills = tmp_path / "out.json.journal", 0
    while kills < 2:
        process = subprocess.Popen([*COMMAND, source, out, "--workers", "1"], stdout=-3, stderr=-3)
        while (path.stat().st_size if path.exists() else 0) < 15_000 * (kills + 1) and process.poll() is None:
            time.sleep(0.002)
        assert process.poll() is None
        process.kill()
        process.wait()
        kills += 1
    assert not out.exists() and 15_000 < path.stat().st_size < (tmp_path / "whole.json.journal").stat().st_size
    assert hallucinate(source, out, "--workers", 1) == 0 and out.read_bytes() == whole.read_bytes()


BEHAVIOURS = (
    "ok",
    "ok",
    "slow",
    "429:0.2",
    "500",
    "503",
    "body",
    "cut",
    "empty",
    "schema",
    "unicode",
    "fence",
    "reset",
)
FOREVER = ("refusal", "filter", "same", "null")


@pytest.mark.once
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_killed_again_and_again_against_a_misbehaving_endpoint(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    from openai_server import KEY, OpenAIServer

    rng = random.Random(1)
    texts = [f"a brown dog with number {i} runs over wet grass behind a house" for i in range(30 + 8 * KILLS)]
    source = write(tmp_path / "in.json", [record(i, t) for i, t in enumerate(texts)])
    forever = {t: rng.choice(FOREVER) for t in rng.sample(texts, 8)}
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}

    def plan():
        inner = random.Random(2)
        behaviours = {t: inner.choice(BEHAVIOURS) for t in texts}
        behaviours = {t: b if b in ("unicode", "fence") else [b] for t, b in behaviours.items()}
        return {**behaviours, **forever}

    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("temperature: 0\nprice: [1, 1]\n")

    def command(server, out):
        more = [
            "--source",
            "api",
            "--model",
            "m",
            "--base-url",
            server.base_url,
            "--workers",
            "4",
            "--prompt-file",
            str(prompt),
        ]
        return [*COMMAND, str(source), str(out), *more, "--report"]

    with OpenAIServer(plan(), latency=0.05) as server:
        began = time.monotonic()
        done = subprocess.run(
            command(server, tmp_path / "whole.json"), env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert 1 < server.most <= 4
        everything = done.stdout + done.stderr
        first, last = (server.log[i]["time"] for i in (0, -1))
        starts, works = first - began, last - first  # seconds, on this machine as busy as it is

    out, kills, finished = tmp_path / "out.json", 0, []
    with OpenAIServer(plan(), latency=0.05) as server:
        for _ in range(300):
            asked, until = len(server.log), time.monotonic() + 60
            process = subprocess.Popen(
                command(server, out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            at_work = kills % 4  # else it is killed as it starts
            while at_work and len(server.log) == asked and process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            wait = rng.random() * (works / KILLS if at_work else starts)
            try:
                said = process.communicate(timeout=wait if kills < KILLS else 200)[0]
                everything += said
                assert process.returncode == 0, said
                break
            except subprocess.TimeoutExpired:
                process.kill()  # SIGKILL
                everything += process.communicate()[0]
                end = time.monotonic() + 10
                while server.flying and time.monotonic() < end:  # the server is still at the killed one's
                    time.sleep(0.01)
                kills += 1
                path = tmp_path / "out.json.journal"
                lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
                finished.append((time.monotonic(), {texts[json.loads(line)["record"]] for line in lines}))
                assert not out.exists()
        log = list(server.log)
        assert server.most <= 4

    assert kills > KILLS / 2
    assert any(0 < len(done) < len(texts) for _, done in finished)
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    for when, done in finished:  # no finished record was asked for again
        assert not [e for e in log if e["time"] > when and e["caption"] in done]
    entries = journal(out)
    assert sorted(e["record"] for e in entries) == list(range(len(texts)))  # each ended once
    without = {texts[i] for i, r in enumerate(load(out)) if "hallucinated_captions" not in r}
    foreign = {t for t, behaviour in plan().items() if behaviour == "unicode"}  # with words in another script: refused
    assert without == set(forever) | foreign
    written = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert KEY not in everything and KEY.encode() not in written


# --- the endpoint through the command ---------------------------------------------------------------------------------


@pytest.fixture
def endpoint(to_endpoints, monkeypatch):
    pytest.importorskip("openai")
    from openai_server import KEY, OpenAIServer

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("hacl_llava.common.endpoint.BACKOFF", 0.02)

    def api(server, *more):
        return ["--source", "api", "--model", "m", "--base-url", server.base_url, "--workers", "4", *more]

    return OpenAIServer, api


def test_a_mix_of_rules_and_endpoint(tmp_path, endpoint):
    server_class, api = endpoint
    source = write(
        tmp_path / "in.json", [record(i, f"a brown dog with number {i} runs over wet grass") for i in range(120)]
    )
    out = tmp_path / "out.json"
    with server_class() as server:
        args = ["--source", "rules=0.5", "--source", "api=0.5", *api(server)[2:]]
        assert hallucinate(source, out, *args) == 0
        asked = len(server.log)
    sources = Counter(e["source"] for e in journal(out))
    assert sum(sources.values()) == 120 and sources["api"] == asked and 40 < asked < 80
    assert all(r["hallucinated_captions"] for r in load(out))


def test_an_endpoint_is_asked_for_several_of_which_the_choice_takes_one(tmp_path, endpoint):
    server_class, api = endpoint
    animals = ("elephant", "penguin", "kangaroo", "octopus")  # what the server answers, in this order
    captions = [f"picture {i} of a brown {animals[i % 4]}" for i in range(80)]
    source, chosen = write(tmp_path / "in.json", [record(i, c) for i, c in enumerate(captions)]), {}
    for choose in ("random", "blind"):
        out = tmp_path / f"{choose}.json"
        with server_class() as server:
            assert hallucinate(source, out, *api(server, "--choose", choose)) == 0
            # the caption itself is refused, and asked for again where nothing else came
            assert len(server.log) == (100 if choose == "random" else 80)
            before = out.read_bytes()
            out.unlink()
            assert hallucinate(source, out, *api(server, "--choose", choose)) == 0 and out.read_bytes() == before
        assert all(len(e["captions"]) == (1 if choose == "random" else 3) for e in journal(out))
        texts = [r["hallucinated_captions"] for r in load(out)]
        assert all(len(t) == 1 for t in texts)
        chosen[choose] = Counter(t[0].split()[-1] for t in texts)
    assert max(chosen["blind"].values()) <= 30 and len(chosen["blind"]) == 4
    assert max(chosen["random"].values()) >= 50


def test_a_spending_cap_and_going_on(tmp_path, endpoint, capsys):
    server_class, api = endpoint
    source = write(
        tmp_path / "in.json", [record(i, f"a brown dog with number {i} runs over wet grass") for i in range(40)]
    )
    out = tmp_path / "out.json"
    with server_class() as server:
        prompt = tmp_path / "prompt.yaml"
        prompt.write_text("price: [10, 10]\nmax_cost: 0.06\n")  # an answer of the server costs $ 0.0034
        assert hallucinate(source, out, *api(server, "--prompt-file", prompt)) == 1
        said = capsys.readouterr()
        assert (
            "stopped early" in said.err
            and "not asked for yet" in said.err
            and "spent by api: " in said.out
            and "$ 0.0" in said.out
        )
        first = len(server.log)
        assert 0 < first < 20 and sum("hallucinated_captions" in r for r in load(out)) == first
        assert hallucinate(source, out, *api(server, "--prompt-file", prompt)) == 1  # nothing more is spent
        assert len(server.log) == first
        prompt.write_text("price: [10, 10]\n")
        assert hallucinate(source, out, *api(server, "--prompt-file", prompt)) == 0
        assert len(server.log) == 40
    assert all(r["hallucinated_captions"] for r in load(out))


def test_failures_are_asked_again_by_the_same_command(tmp_path, endpoint, capsys):
    server_class, api = endpoint
    texts = [f"a brown dog with number {i} runs over wet grass" for i in range(6)]
    source, out = write(tmp_path / "in.json", [record(i, t) for i, t in enumerate(texts)]), tmp_path / "out.json"
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("retries: 1\n")
    with server_class({texts[2]: ["500"] * 2}) as server:
        assert hallucinate(source, out, *api(server, "--prompt-file", prompt)) == 1
        assert "1 failed; the same command asks" in capsys.readouterr().err
        assert sum("hallucinated_captions" in r for r in load(out)) == 5
        assert hallucinate(source, out, *api(server, "--prompt-file", prompt)) == 0
        assert len(server.calls(texts[0])) == 1 and len(server.calls(texts[2])) == 3
    assert all(r["hallucinated_captions"] for r in load(out))


def test_wrong_key_and_unreachable_endpoint_keep_what_is_there(tmp_path, endpoint, capsys, monkeypatch):
    server_class, api = endpoint
    texts = [f"a brown dog with number {i} runs over wet grass" for i in range(6)]
    source, out = write(tmp_path / "in.json", [record(i, t) for i, t in enumerate(texts)]), tmp_path / "out.json"
    with server_class() as server:
        assert hallucinate(source, out, *api(server, "--limit", "3")) == 0
        before = out.read_bytes()
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret")
        assert hallucinate(source, out, *api(server)) == 2
    said = capsys.readouterr()
    assert "OPENAI_API_KEY" in said.err and "sk-wrong-secret" not in said.err + said.out
    assert hallucinate(source, out, *api(server)) == 2  # the server is gone
    assert "reach" in capsys.readouterr().err and out.read_bytes() == before
    assert sum(not e.get("failed") for e in journal(out)) == 3
    monkeypatch.delenv("OPENAI_API_KEY")
    assert hallucinate(source, tmp_path / "b.json", "--source", "api", "--model", "m") == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_prompt_and_examples_reach_the_model(tmp_path, endpoint):
    server_class, api = endpoint
    source = write(tmp_path / "in.json", [record(0, "a brown dog with number 0 runs over wet grass")])
    prompt, example = (
        tmp_path / "prompt.yaml",
        '{"caption": "a cat", "hallucinated_caption": "a tiger", "kind": "existence"}',
    )
    prompt.write_text(f"prompt: Make it wrong.\nexamples: [{example}]\n")
    with server_class() as server:
        more = ["--prompt-file", prompt, "--types", "location"]
        assert hallucinate(source, tmp_path / "out.json", *api(server), *more) == 0
        messages = server.log[0]["body"]["messages"]
        assert messages[0] == {"role": "system", "content": "Make it wrong."}
        assert "a tiger" in messages[2]["content"] and "location" in messages[-1]["content"]
        prompt.write_text(f"prompt: Make it very wrong.\nexamples: [{example}]\n")
        assert hallucinate(source, tmp_path / "out.json", *api(server), *more) == 2  # another prompt, another run
        assert len(server.log) == 1


# --- requests and results as files ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, endpoint, monkeypatch):
    """(source, texts, arguments without an endpoint, write(out) -> requests, read(out, lines, name) -> status)."""
    texts = [f"a brown dog with number {i} runs over wet grass" for i in range(40)]
    source = write(tmp_path / "in.json", [record(i, t) for i, t in enumerate(texts)])
    args = ["--source", "api", "--model", "m", "--per-caption", "2"]
    monkeypatch.delenv("OPENAI_API_KEY")  # neither is needed for files

    def requests(out, name="requests.jsonl", *more):
        assert hallucinate(source, out, *args, "--write-requests", tmp_path / name, *more) == 0
        return (tmp_path / name).read_text(encoding="utf-8")

    def read(out, lines, name="results.jsonl", *more):
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
        return hallucinate(source, out, *args, "--read-results", tmp_path / name, *more)

    return source, texts, args, requests, read


def test_results_in_any_order_and_the_rest_online_give_what_online_alone_gives(tmp_path, endpoint, files, monkeypatch):
    server_class, api = endpoint
    source, texts, args, requests, read = files
    plan = {texts[3]: "refusal", texts[4]: ["few"], texts[5]: ["cut"], texts[6]: "same", texts[7]: ["429:0.1"]}
    plan |= {texts[8]: "policy", texts[9]: ["schema"], texts[10]: ["null"]}
    out, alone = tmp_path / "out.json", tmp_path / "alone.json"
    with server_class(plan) as server:
        asked = requests(out)
        assert len(asked.splitlines()) == 40 and not server.log and not out.exists()
        lines = server.results(asked)
        random.Random(0).shuffle(lines)
        lines = [*lines[:30], *lines[:9], "{broken\n", "\n"]  # some missing, some twice, one damaged
        assert read(out, lines) == 1
        first = (tmp_path / "out.json.journal").read_bytes()
        done = {e["record"] for e in journal(out) if not e.get("failed")}
        assert 20 < len(done) < 31 and sum("hallucinated_captions" in r for r in load(out)) > 15
        assert read(out, lines[::-1]) == 1 and (tmp_path / "out.json.journal").read_bytes() == first  # nothing twice
        monkeypatch.setenv("OPENAI_API_KEY", server.key)
        count = len(server.log)
        assert hallucinate(source, out, *args, *api(server)[4:]) == 0
        assert not done & {
            texts.index(e["caption"]) for e in server.log[count:]
        }  # what was answered is not asked again
    with server_class(plan) as server:
        assert hallucinate(source, alone, *args, *api(server)[4:]) == 0
    assert out.read_bytes() == alone.read_bytes()


def test_what_does_not_do_is_asked_again_up_to_the_attempts(tmp_path, endpoint, files, capsys):
    server_class, _ = endpoint
    source, texts, args, requests, read = files
    out = tmp_path / "out.json"
    with server_class({texts[0]: "same", texts[1]: ["few"]}) as server:
        for attempt, left in enumerate((40, 2, 1)):
            asked = requests(out, f"requests{attempt}.jsonl")
            ids = [json.loads(line)["custom_id"].split("-") for line in asked.splitlines()]
            assert len(ids) == left and {tried for _, _, tried in ids} == {str(attempt)}
            seeds = {json.loads(line)["body"]["seed"] for line in asked.splitlines()}
            status = read(out, server.results(asked), f"results{attempt}.jsonl")
        assert status == 0 and len(seeds) == 1  # after the third, as online: record 0 stays without
    last = {e["record"]: e for e in journal(out)}
    assert last[0]["captions"] == [] and "failed" not in last[0] and last[1]["captions"]
    assert sum(e["usage"]["input"] for e in journal(out)) == 300 * (40 + 2 + 1)
    assert "1 of" not in capsys.readouterr().err


def test_wrong_results_end_with_one_line_and_nothing_is_kept(tmp_path, endpoint, files, capsys):
    server_class, _ = endpoint
    source, texts, args, requests, read = files
    out = tmp_path / "out.json"
    with server_class() as server:
        asked = requests(out)
        before = (tmp_path / "out.json.journal").read_bytes()
        good = server.results(asked)
        server.models = ()  # as an unknown model, a wrong key or a proxy's page would have it
        wrong = server.results(asked)
    other = [line.replace('"custom_id": "', '"custom_id": "x') for line in good]
    for lines, message in (
        (wrong, "no result is an answer: 40 times 404: The model m does not exist"),
        (other, "is of another input or other settings"),
    ):
        capsys.readouterr()
        assert read(out, lines) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert message in line and (tmp_path / "out.json.journal").read_bytes() == before
    assert hallucinate(source, out, *args, "--read-results", tmp_path / "nowhere.jsonl") == 2
    assert "nowhere.jsonl: cannot be read" in capsys.readouterr().err
    assert hallucinate(source, out, *args, "--write-requests", tmp_path / "requests.jsonl") == 2
    assert "requests.jsonl: exists" in capsys.readouterr().err
    assert (tmp_path / "requests.jsonl").read_text() == asked
    assert read(out, good) == 0  # control


def test_requests_of_many_captions_go_into_several_files(tmp_path, files, monkeypatch, capsys):
    source, texts, args, requests, read = files
    monkeypatch.setattr("hacl_llava.hallucinate.batch.MOST_REQUESTS", 16)
    first = requests(tmp_path / "out.json")
    parts = [first, *((tmp_path / f"requests-{n}.jsonl").read_text() for n in (2, 3))]
    assert [len(p.splitlines()) for p in parts] == [16, 16, 8]
    assert "40 requests: " in capsys.readouterr().out
    (tmp_path / "prompt.yaml").write_text("price: [1, 1]\nmax_cost: 0.01\n")
    more = ("--prompt-file", tmp_path / "prompt.yaml", "--restart")
    requests(tmp_path / "out.json", "few.jsonl", *more)
    assert "stopped by the spending cap" in capsys.readouterr().err
    assert 0 < len((tmp_path / "few.jsonl").read_text().splitlines()) < 16


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_was_made(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    records = load(COCO)[:60] + [record("x", "собака сидит на диване"), record("y", "A dog | <b> on a *bed*")]
    source, out = write(tmp_path / "in.json", records), tmp_path / "out.json"
    assert hallucinate(source, out, "--report") == 0
    text = (tmp_path / "out.report.md").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    made = [r["hallucinated_captions"] for r in load(out) if "hallucinated_captions" in r]
    assert found["captions"] == len(made) == sum(found["kinds"].values()) == sum(found["length_ratio"]["histogram"])
    assert found["without"] == {"not English": 1} and set(found["kinds"]) <= set(KINDS)
    assert found["settings"]["seed"] == 0 and found["settings"]["version"]
    assert "собака" in text and "## Candidates refused" in text and "not English" in text
    assert r"A dog \| &lt;b&gt; on a \*bed\*" in text  # a caption is shown, never interpreted
    for table_row in (line for line in text.splitlines() if line.startswith("|")):
        assert table_row.endswith("|")
    picture = (tmp_path / "out.report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert "out.report.md" in capsys.readouterr().out


def test_a_report_of_an_unfinished_run(tmp_path, endpoint):
    pytest.importorskip("matplotlib")
    server_class, api = endpoint
    source = write(tmp_path / "in.json", [record(i, f"a brown dog with number {i} runs over grass") for i in range(5)])
    with server_class() as server:
        assert hallucinate(source, tmp_path / "out.json", *api(server), "--limit", 2, "--report") == 0
    found = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert found["captions"] == 2 and found["to do"] == 3 and found["usage"]["api"]["input"] > 0
