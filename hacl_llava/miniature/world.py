"""Scenes of coloured shapes, rendered with pillow, with captions and hallucinated captions, on disk in LLaVA's format.

A scene is one to three groups of equal shapes in different cells of a 3 x 3 grid; shapes of a theme come together more
often than chance has it, as things in photographs do. A hallucinated caption changes one thing, of one of the four
kinds that the paper's prompt names: existence, attribute, quantity, location. Instructions are those of LLaVA's stage
2, questions those of POPE (arXiv 2305.10355), objects those of COCO's annotations, each in the format of its origin.
"""

import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 48
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "star")
THEMES = (("circle", "ring", "star", "cross"), ("square", "diamond", "bar", "triangle"))
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "yellow": (240, 200, 40),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
}
COUNTS = ("one", "two", "three")
PLACES = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
KINDS = ("existence", "attribute", "quantity", "location")
PROMPTS = (
    "Describe the image briefly.\n<image>",
    "<image>\nWhat is shown?",
    "Please describe this image in detail.\n<image>",
)


# What LLaVA-1.5 ends short questions with, and this world's instructions too.
SHORT = "\nAnswer the question using a single word or phrase."
SPLITS = ("random", "popular", "adversarial")


def make_scene(rng: random.Random) -> list[tuple[int, str, str, int]]:
    """One to three groups ``(count 1-3, colour, shape, cell 0-8)``; no two share a cell or a shape.

    Three times in four a further shape is of a theme that is there already.
    """
    number, shapes = rng.choice((1, 2, 2, 3)), [rng.choice(SHAPES)]
    while len(shapes) < number:
        near, far = relatives(shapes)
        shapes.append(rng.choice(near if not far or (near and rng.random() < 0.75) else far))
    return [
        (rng.randint(1, 3), rng.choice(list(COLOURS)), shape, cell)
        for shape, cell in zip(shapes, rng.sample(range(9), number))
    ]


def relatives(shapes: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those of the themes of ``shapes``, those of other themes), both without ``shapes``."""
    themes = {other for theme in THEMES if set(theme) & set(shapes) for other in theme}
    left = [s for s in SHAPES if s not in shapes]
    return [s for s in left if s in themes], [s for s in left if s not in themes]


def question_about(shape: str) -> str:
    """POPE's question: ``Is there a circle in the image?``"""
    return f"Is there a {shape} in the image?"


def caption_of(scene: Iterable[tuple[int, str, str, int]]) -> str:
    """The scene in words: ``two red circles at the top left and one blue bar at the right``."""
    parts = []
    for count, colour, shape, cell in scene:
        plural = "" if count == 1 else "es" if shape == "cross" else "s"
        parts.append(f"{COUNTS[count - 1]} {colour} {shape}{plural} at the {PLACES[cell]}")
    return " and ".join(parts)


def hallucinate(
    scene: Iterable[tuple[int, str, str, int]], kind: str, rng: random.Random
) -> list[tuple[int, str, str, int]]:
    """A copy of the scene with one group changed so that its caption is wrong in one way, and of the same length."""
    scene = list(scene)
    i = rng.randrange(len(scene))
    count, colour, shape, cell = scene[i]
    if kind == "existence":
        shape = rng.choice([s for s in SHAPES if s not in {g[2] for g in scene}])
    elif kind == "attribute":
        colour = rng.choice([c for c in COLOURS if c != colour])
    elif kind == "quantity":
        count = rng.choice([c for c in (1, 2, 3) if c != count])
    elif kind == "location":
        cell = rng.choice([c for c in range(9) if c not in {g[3] for g in scene}])
    else:
        raise ValueError(f"kind is {kind!r}, allowed is one of {', '.join(KINDS)}.")
    scene[i] = (count, colour, shape, cell)
    return scene


def render(scene: Iterable[tuple[int, str, str, int]], rng: random.Random) -> Image.Image:
    """The scene as a 48 x 48 RGB image on a dark, slightly varying background."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(15, 35) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for count, colour, shape, cell in scene:
        left, top = (cell % 3) * 16, (cell // 3) * 16
        for centre in {1: [(8, 8)], 2: [(4, 8), (12, 8)], 3: [(4, 4), (12, 4), (8, 12)]}[count]:
            _draw(draw, shape, left + centre[0], top + centre[1], 6 if count == 1 else 3, COLOURS[colour])
    return image


def _draw(draw, shape, x, y, r, colour):
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(1, r // 3))
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "bar":
        draw.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=colour)
    elif shape == "cross":
        draw.line((x - r, y, x + r, y), fill=colour, width=max(1, r // 2))
        draw.line((x, y - r, x, y + r), fill=colour, width=max(1, r // 2))
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour)
    elif shape == "star":
        draw.polygon(
            [(x, y - r), (x + r, y + r), (x - r, y - r // 3), (x + r, y - r // 3), (x - r, y + r)], fill=colour
        )


def make_dataset(
    folder: str | os.PathLike, count: int, seed: int = 0, per_caption: int = 1, name: str = "train"
) -> Path:
    """Render ``count`` scenes under ``folder`` in LLaVA-Pretrain's layout, the same for the same seed.

    Args:
        folder: gets ``<name>.json`` (LLaVA's records with ``hallucinated_captions``, a list of ``per_caption``
            captions of different kinds, and their ``hallucinated_kinds``) and
            ``images/<name>/00000/000000000.png`` ...
        per_caption: 0 to 4.

    Returns:
        The path of the json; its images are relative to ``folder/images``.
    """
    rng = random.Random(f"{seed}/{name}")
    folder = Path(folder)
    records = []
    for i in range(count):
        scene = make_scene(rng)
        image = _save(folder, name, i, scene, rng)
        record = {
            "id": f"{name}-{i:09d}",
            "image": image,
            "conversations": [
                {"from": "human", "value": rng.choice(PROMPTS)},
                {"from": "gpt", "value": caption_of(scene)},
            ],
        }
        kinds = rng.sample(KINDS, per_caption)
        if kinds:
            record["hallucinated_captions"] = [caption_of(hallucinate(scene, kind, rng)) for kind in kinds]
            record["hallucinated_kinds"] = kinds
        records.append(record)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def make_instructions(folder: str | os.PathLike, count: int, seed: int = 0, name: str = "instructions") -> Path:
    """Render ``count`` scenes with conversations as LLaVA's stage 2 has them.

    A quarter asks for the caption, the others whether a shape is there. Seven answers in ten are "Yes", to which
    instruction data leans.

    Returns:
        The path of the json; its images are relative to ``folder/images``.
    """
    rng = random.Random(f"{seed}/{name}")
    folder, records = Path(folder), []
    for i in range(count):
        scene = make_scene(rng)
        image = _save(folder, name, i, scene, rng)
        if rng.random() < 0.25:
            question, answer = rng.choice(PROMPTS).replace("<image>", "").strip(), caption_of(scene)
        else:
            there, yes = [group[2] for group in scene], rng.random() < 0.7
            shape = rng.choice(there if yes else [s for s in SHAPES if s not in there])
            question, answer = question_about(shape) + SHORT, "Yes" if yes else "No"
        conversations = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        records.append({"id": f"{name}-{i:09d}", "image": image, "conversations": conversations})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def make_questions(folder: str | os.PathLike, count: int, seed: int = 0, name: str = "test") -> dict[str, Path]:
    """Render ``count`` scenes and write what evaluation asks about them.

    Writes under ``folder`` ``mini_pope_<split>.json``, POPE's questions: for each shape in an image one that is not,
    drawn at random, or a most frequent one ("popular"), or one of a theme that is there ("adversarial"); and
    ``instances.json``, the shapes of each image in the format of COCO's instances, with ``synonyms.txt``, the words
    for each in the format of CHAIR's list.

    Returns:
        {"random": path, "popular": path, "adversarial": path, "instances": path, "synonyms": path}.
    """
    rng = random.Random(f"{seed}/{name}")
    folder = Path(folder)
    scenes = [make_scene(rng) for _ in range(count)]
    images = [_save(folder, name, i, scene, rng) for i, scene in enumerate(scenes)]
    frequency = {s: sum(s == group[2] for scene in scenes for group in scene) for s in SHAPES}
    paths = {}
    for split in SPLITS:
        lines = []
        for image, scene in zip(images, scenes):
            there = [group[2] for group in scene]
            missing = [s for s in SHAPES if s not in there]
            rng.shuffle(missing)
            if split == "popular":
                missing.sort(key=lambda s: -frequency[s])
            elif split == "adversarial":
                near, _ = relatives(there)
                missing.sort(key=lambda s: s not in near)
            for yes, no in zip(there, missing):
                lines += [(image, yes, "yes"), (image, no, "no")]
        paths[split] = folder / f"mini_pope_{split}.json"
        paths[split].write_text(
            "".join(
                json.dumps({"question_id": n, "image": image, "text": question_about(shape), "label": label}) + "\n"
                for n, (image, shape, label) in enumerate(lines, 1)
            )
        )
    paths["instances"], paths["synonyms"] = folder / "instances.json", folder / "synonyms.txt"
    instances = {
        "images": [{"id": i, "file_name": image} for i, image in enumerate(images)],
        "categories": [{"id": n, "name": shape} for n, shape in enumerate(SHAPES, 1)],
        "annotations": [
            {"image_id": i, "category_id": SHAPES.index(group[2]) + 1}
            for i, scene in enumerate(scenes)
            for group in scene
        ],
    }
    paths["instances"].write_text(json.dumps(instances))
    paths["synonyms"].write_text("".join(f"{shape}\n" for shape in SHAPES))
    return paths


def _save(folder, name, index, scene, rng):
    """Render a scene to its place under ``folder/images``; its path relative to that."""
    image = f"{name}/{index // 1000:05d}/{index:09d}.png"
    path = folder / "images" / image
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene, rng).save(path)
    return image
