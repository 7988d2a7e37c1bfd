"""What a caption of the miniature's world says, and how much of it is right."""

import re
from collections import Counter
from collections.abc import Sequence

from ..common.statistics import ratio
from .world import COLOURS, COUNTS, PLACES, SHAPES, caption_of

Group = tuple[int, str, str, int]
GROUP = re.compile(
    rf"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)? at the "
    rf"({'|'.join(sorted(PLACES, key=len, reverse=True))})\b"
)
# Of sums of `counts`; a share of what captions name, of what is there, and of groups whose shape is there.
MEASURES = {
    "made_up": lambda s: ratio(s["made_up"], s["named"]),  # CHAIR_i
    "recall": lambda s: ratio(s["found"], s["there"]),
    "wrong_colour": lambda s: ratio(s["colour"], s["found"]),
    "wrong_count": lambda s: ratio(s["count"], s["found"]),
    "wrong_place": lambda s: ratio(s["place"], s["found"]),
}


def _group(match):
    count, colour, shape, place = match.groups()
    return COUNTS.index(count) + 1, colour, shape, PLACES.index(place)


def scene_of(caption: str) -> list[Group]:
    """What a caption says, as `world.make_scene` has it."""
    return [_group(match) for match in GROUP.finditer(caption)]


def counts(said: str, true: str) -> dict[str, int]:
    """Of one caption: shapes named, made_up, there and found; and of those found the wrong colour, count, place."""
    there, named = ({group[2]: group for group in scene_of(text)} for text in (true, said))
    pairs = [(group, there[shape]) for shape, group in named.items() if shape in there]
    found = {"named": len(named), "made_up": len(named) - len(pairs), "there": len(there), "found": len(pairs)}
    columns = {"count": 0, "colour": 1, "place": 3}
    return found | {name: sum(a[column] != b[column] for a, b in pairs) for name, column in columns.items()}


def judged(captions: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """`MEASURES` of what captions say of the scenes that the ``true`` ones are of."""
    sums = Counter()
    for said, caption in zip(captions, true):
        sums.update(counts(said, caption))
    return {name: float(measure(sums)) for name, measure in MEASURES.items()}


def marked(said: str, true: str) -> list[tuple[str, bool]]:
    """A caption in pieces, each with whether it is wrong: all of a group whose shape is not there, or its wrong words.

    The pieces together are the caption.
    """
    there, pieces, done = {group[2]: group for group in scene_of(true)}, [], 0
    for match in GROUP.finditer(said):
        group = _group(match)
        right = there.get(group[2])
        if right is None:
            wrong = [match.span()]
        else:
            wrong = [match.span(k + 1) for k in (0, 1, 3) if group[k] != right[k]]
        for start, end in wrong:
            pieces += [(said[done:start], False), (said[start:end], True)]
            done = end
    return [piece for piece in (*pieces, (said[done:], False)) if piece[0]]


def unseen(caption: str) -> list[str]:
    """Hallucinated captions of a sort that no run trains on, of the very same words: colours, counts or places of the
    first two groups swapped, as far as they differ."""
    (first, second, *others), found = [*scene_of(caption), None, None][: max(len(scene_of(caption)), 2)], []
    for column in (0, 1, 3) if second else ():
        if first[column] != second[column]:
            a, b = list(first), list(second)
            a[column], b[column] = b[column], a[column]
            found.append(caption_of([tuple(a), tuple(b), *others]))
    return found
