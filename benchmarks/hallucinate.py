"""How fast `hacl-llava hallucinate --source rules` is, what memory it takes, and that it changes nothing else.

    python benchmarks/hallucinate.py                 558,128 records, as many as LLaVA's stage-1 set has
    python benchmarks/hallucinate.py --records 20000
    python benchmarks/hallucinate.py --sample        the table of results/hallucinated-captions-sample.md

The records are synthetic, in the layout of LLaVA's blip_laion_cc_sbu_558k.json: every second caption is one of the COCO
captions of tests/data, the others are put together from the vocabulary in the style of web captions. Writes
benchmarks/results/hallucinate.json and .md.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hacl_llava.common.report import provenance, table
from hacl_llava.hallucinate import Item
from hacl_llava.hallucinate.checks import Meaning
from hacl_llava.hallucinate.lexicon import article, lexicon
from hacl_llava.hallucinate.source import RulesSource
from hacl_llava.records import stream_records

HERE = Path(__file__).parent
COCO = HERE.parent / "tests/data/coco_captions.json"
SAMPLE = HERE / "results/hallucinated-captions-sample.md"
QUESTIONS = ("Describe the image concisely.\n<image>", "<image>\nWrite a terse but informative summary of the picture.")


def captions(count, seed=0):
    """Captions, half human and half made up; deterministic."""
    rng, words = random.Random(seed), lexicon()
    human = [record["conversations"][1]["value"] for _, record in stream_records(COCO)]
    things = [w for g in words.groups.values() if not g.place and not g.flags for w in g.words]
    places = [(g.place, w) for g in words.groups.values() if g.place and "mass" not in g.flags for w in g.words]
    colours = words.attribute_groups["colour"]
    for i in range(count):
        if i % 2:
            yield rng.choice(human)
            continue
        a, b, colour, (prep, place) = rng.choice(things), rng.choice(things), rng.choice(colours), rng.choice(places)
        yield rng.choice(
            (
                f"{article(colour)} {colour} {a} with {article(b)} {b} {prep} the {place}",
                f"the {a} is next to a {colour} {b} {prep} {article(place)} {place} stock photo",
                f"{rng.randint(2, 6)} {a} and {b} - {colour} , {place} , x{rng.randint(10, 99)} illustration",
                f"two people holding {article(a)} {a} {prep} {article(place)} {place} , {colour} {b} in the background",
            )
        )


def write_input(path, count):
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for i, caption in enumerate(captions(count)):
            turns = [{"from": "human", "value": QUESTIONS[i % 2]}, {"from": "gpt", "value": caption}]
            record = {"id": f"{i:09d}", "image": f"{i % 1000:05d}/{i:09d}.jpg", "conversations": turns}
            file.write((",\n" if i else "\n") + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")


def rate_on_one_core(count=20_000):
    """Captions a second of the rules alone, in this process, after a warm-up; the median of five."""
    texts = list(captions(count, seed=1))
    source, rates = RulesSource(), []
    for _ in range(6):
        items = (Item(i, "", c) for i, c in enumerate(texts))
        start = time.process_time()
        made = sum(len(a.captions) for a in source.answers(items))
        rates.append(count / (time.process_time() - start))
    return sorted(rates[1:])[2], made / count


def family(pid):
    """The process and its descendants."""
    found = [pid]
    for each in found:
        try:
            for task in os.listdir(f"/proc/{each}/task"):
                found += map(int, Path(f"/proc/{each}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def resident(pid):
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def run(source, target, workers, choose):
    """Run the real command; seconds, and the largest sum of resident memory over its processes."""
    command = [sys.executable, "-m", "hacl_llava.cli", "hallucinate", str(source), str(target)]
    command += ["--workers", str(workers), "--choose", choose, "--restart"]
    start, peak, over = time.perf_counter(), 0, threading.Event()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def watch():
        nonlocal peak
        while not over.wait(0.1):
            peak = max(peak, sum(map(resident, family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.communicate()
    over.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"choose": choose, "workers": workers, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


def compare(source, target):
    """Every record of the target against the source: all but the new keys equal, in order."""
    records = with_captions = 0
    for (_, before), (_, after) in zip(stream_records(source), stream_records(target), strict=True):
        added = after.pop("hallucinated_captions", None)
        after.pop("hallucinated_kinds", None)
        if before != after or list(before) != list(after):
            sys.exit(f"record {records} differs: {before} {after}")
        records += 1
        with_captions += bool(added)
    return records, with_captions


def sample(count=40, seed=0):
    """Random human captions with what the rules make of them, as a Markdown table; nothing chosen, nothing edited."""
    human = [record["conversations"][1]["value"] for _, record in stream_records(COCO)]
    source, items = RulesSource(seed=seed), [Item(i, "", c) for i, c in enumerate(human)]
    source.balance(items)
    answers = source.answers(items)
    made = [(human[a.index], *a.captions[0]) for a in answers if a.captions]
    rows = random.Random(seed).sample(made, count)
    head = ("kind", "caption (human)", "hallucinated caption (rules)")
    return table(head, [(kind, caption, text) for caption, kind, text in rows])


def accidentally_true(others, seeds=20):
    """Share of the hallucinated objects that COCO's boxes have in the image after all.

    Of the hallucinations of existence by rules in the human captions, those that name a thing of one of the image's
    box categories (people left out: "boy" for "man" is false although both are a "person").

    Args:
        others: whether the rules see the other captions of the image.
    """
    records = [record for _, record in stream_records(COCO)]
    captions = [r["conversations"][1]["value"] for r in records]
    of_image, words, made, wrong = {}, lexicon(), 0, 0
    for record, caption in zip(records, captions):
        of_image.setdefault(record["image"], []).append(caption)
    for seed in range(seeds):
        items = []
        for i, (record, caption) in enumerate(zip(records, captions)):
            known = tuple(c for c in of_image[record["image"]] if c != caption) if others else ()
            items.append(Item(i, "", caption, known))
        for answer in RulesSource({"existence": 1.0}, seed).answers(items):
            record, caption = records[answer.index], captions[answer.index]
            for _, text in answer.captions:
                made += 1
                new = Meaning(text).words - Meaning(caption).words
                wrong += any(words.related(n, o) for n in new for o in record["objects"] if o != "person")
    return wrong / made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=558_128)
    parser.add_argument("--output", default=HERE / "results/hallucinate", help="without ending")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sample", action="store_true", help="only write the table of examples")
    args = parser.parse_args()
    if args.sample:
        SAMPLE.write_text(SAMPLE.read_text().partition("| kind")[0] + sample() + "\n")
        return
    result = {**provenance(), "cores": len(os.sched_getaffinity(0)), "records": args.records}
    result["rules_per_second_one_core"], result["rules_coverage"] = rate_on_one_core()
    result["accidentally_true"] = {"alone": accidentally_true(False), "with_other_captions": accidentally_true(True)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "blip_558k_layout.json"
        write_input(source, args.records)
        result["input_bytes"] = source.stat().st_size
        result["runs"] = []
        for choose in ("random", "blind"):
            for workers in args.workers:
                result["runs"].append(run(source, Path(folder) / f"{choose}-{workers}.json", workers, choose))
        files = [Path(folder) / f"blind-{workers}.json" for workers in args.workers]
        result["records_compared"], result["with_hallucinated_captions"] = compare(source, files[0])
        result["same_whatever_the_workers"] = len({file.read_bytes() for file in files}) == 1 if files[1:] else None
    rows, said = [], {True: "yes", False: "NO", None: "one number of them alone was tried"}
    for r in result["runs"]:
        rate, memory = args.records / r["seconds"], r["peak_bytes"] / 2**20
        cpu = f"{r['cpu_seconds']:.0f} s"
        rows.append((r["choose"], r["workers"], f"{r['seconds']:.0f} s", cpu, f"{rate:.0f}", f"{memory:.0f} MiB"))
    got, made = result["with_hallucinated_captions"], result["versions"]
    text = f"""# Hallucinated captions by rules: speed and memory

`{result["command"]}`, hacl_llava {made["hacl_llava"]} ({(result["commit"] or "?")[:7]}), Python {made["python"]},
{result["cores"]} CPU cores, which other work used at the same time: CPU time says more than time.
Synthetic records in the layout of LLaVA's 558k set, {result["input_bytes"] / 2**20:.0f} MiB.

- the rules with a random choice, one core: {result["rules_per_second_one_core"]:.0f} captions/s (median of 5 x 20,000)
- records compared field by field, in order: {result["records_compared"]}, all equal but for the new keys
- with hallucinated captions: {got} ({got / args.records:.1%})
- objects added or exchanged that COCO's boxes have in the image after all: {result["accidentally_true"]["alone"]:.1%},
  or {result["accidentally_true"]["with_other_captions"]:.1%} where the image's other four captions are in the file
  (401 human captions of 80 images, 20 seeds; people left out)
- the same bytes whatever the workers: {said[result["same_whatever_the_workers"]]}

The whole command, from json to json (reading twice, rewriting, journal, writing):

{table(("choice", "workers", "time", "CPU time", "records/s", "peak memory, all processes"), rows)}
"""
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
