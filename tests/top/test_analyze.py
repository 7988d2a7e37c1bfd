"""Representations equal training's, measures equal plain loops, and ``hacl-llava analyze`` writes what it promises."""

import base64
import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import batch_of, load
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_loading import lora_folder, published, stage2  # noqa: F401  (a fixture)
from workers import Command

from hacl_llava import cli
from hacl_llava.checkpoints.convert import export_to_hf
from hacl_llava.checkpoints.load import Loaded, load_pretrained, merge
from hacl_llava.common import statistics
from hacl_llava.config import HaclConfig, HaclError
from hacl_llava.evaluation import analyze, figures, measures, representations
from hacl_llava.evaluation.representations import Extractor, extract, represent, sample_records
from hacl_llava.records import DataError
from hacl_llava.representation import HaclHead

NAMES = ("image", "caption", "hallucinated")


def items_of(mini, limit=100, seed=0):
    return sample_records(mini.data, limit, seed)[0]


def as_loaded(model, tokenizer):
    return Loaded(tokenizer, model.eval(), model.get_vision_tower().image_processor, 2048)


def projector_folder(mini, folder, scale=1.0, head=None, seed=3):
    """A stage-1 folder: config.json, mm_projector.bin, and with ``head`` (settings) hacl_head.safetensors."""
    model, _ = load(mini, stock=True)
    folder.mkdir(parents=True)
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.config.save_pretrained(folder)
    torch.manual_seed(seed)
    state = {k: v * scale + 0.0 for k, v in model.get_model().mm_projector.state_dict().items()}
    torch.save({f"model.mm_projector.{k}": v for k, v in state.items()}, folder / "mm_projector.bin")
    if head is not None:
        from safetensors.torch import save_file

        config = HaclConfig(**head)
        values = {k: v.contiguous() for k, v in HaclHead(model.config.hidden_size, config).state_dict().items()}
        save_file(values, folder / "hacl_head.safetensors", metadata={"hacl": json.dumps(config.to_dict())})
    return folder


# --- representations are those that training contrasts ----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"visual_bos": False}, {"representation": "prompt", "prompt": "in one", "centre": True}], ids=str
)
@pytest.mark.parametrize("head_dim", [0, 16])
def test_the_same_as_the_separate_passes_of_training(mini, settings, head_dim, monkeypatch):
    settings = {"fused": False, **settings}
    model, tokenizer = load(mini, head_dim=head_dim, **settings)
    config, S = HaclConfig(**settings), len(model.hacl_suffix)
    rows = range(7)  # with batches of 3: a last batch that is not full
    seen = {}
    features = type(model).hacl_features
    monkeypatch.setattr(
        type(model), "hacl_features", lambda self, *a: seen.update(v=a[0], text=a[1]) or features(self, *a)
    )
    with torch.no_grad():
        model(**batch_of(mini, model, tokenizer, rows))
    model.eval()
    assert S == (1 if "prompt" not in settings else len(tokenizer.tokenize("in one")))
    items = items_of(mini)[:7]
    assert [item.index for item in items] == list(rows)
    found = extract(as_loaded(model, tokenizer), items, mini.images, config, batch_size=3)
    v, t, h = found.spaces["llm"]
    assert v.shape == (7, 64) and h.shape == (14, 64) and v.dtype == np.float32
    text = torch.cat([torch.tensor(t), torch.tensor(h)])
    torch.testing.assert_close(torch.tensor(v), seen["v"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(text, seen["text"], atol=2e-5, rtol=1e-4)
    if head_dim:
        with torch.no_grad():
            heads = model.hacl_head(seen["v"], seen["text"])
        torch.testing.assert_close(torch.tensor(found.spaces["head"][0]), heads[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(found.spaces["head"][2]), heads[1][7:], atol=2e-5, rtol=1e-4)
    else:
        assert list(found.spaces) == ["llm", "centred"]
    for raw, mean, centred in zip((v, t, h), (v, t, t), found.spaces["centred"]):
        np.testing.assert_allclose(centred, raw - mean.mean(0), atol=1e-5)

    # controls: with BOS the other way, and with another last token or none, it is something else
    turned = dataclasses.replace(config, visual_bos=not config.visual_bos)
    other = extract(as_loaded(model, tokenizer), items, mini.images, turned).spaces["llm"][0]
    assert np.abs(other - v).max() > 1e-2
    extractor = Extractor(as_loaded(model, tokenizer), config)
    extractor.visual_ids = [*extractor.visual_ids[:-1], 7]
    assert np.abs(extractor.images(mini.images, [item.image for item in items])[0].numpy() - v).max() > 1e-2
    monkeypatch.setattr(representations, "tokenize_caption", lambda *a: full(*a)[:-1])
    from hacl_llava.data import tokenize_caption as full

    assert np.abs(extractor.texts([item.caption for item in items]).numpy() - t).max() > 1e-2


def test_batches_and_workers_change_nothing(mini):
    loaded = as_loaded(*load(mini, stock=True))
    items = items_of(mini)
    one = extract(loaded, items, mini.images, batch_size=1).spaces["llm"]
    many = extract(loaded, items, mini.images, batch_size=5, workers=1).spaces["llm"]
    for a, b in zip(one, many):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert len(np.unique(one[0].round(4), axis=0)) > 20  # images differ, so that the order is tested


def test_images_of_different_numbers_of_tokens(mini, tmp_path):
    """LLaVA-1.6 cuts an image into parts by its size (anyres): rows of different lengths, EOS at different places."""
    model, tokenizer = load(mini, stock=True)
    side = model.get_vision_tower().config.image_size
    model.config.mm_patch_merge_type, model.config.image_aspect_ratio = "spatial_unpad", "anyres"
    model.config.image_grid_pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    model.model.image_newline = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, size in zip(paths, ((48, 48), (100, 40), (40, 100))):
        Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    loaded = as_loaded(model, tokenizer)
    together, rows, failed = Extractor(loaded, batch_size=3).images(tmp_path, [path.name for path in paths])
    alone, _, _ = Extractor(loaded, batch_size=1).images(tmp_path, [path.name for path in paths])
    assert rows == [0, 1, 2] and not failed
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    assert (together - together.roll(1, 0)).abs().amax(1).min() > 1e-2


def test_a_text_that_is_too_long_keeps_its_eos_and_is_counted(mini):
    model, tokenizer = load(mini, stock=True)
    model.config.tokenizer_model_max_length = 12
    loaded = as_loaded(model, tokenizer)
    item = items_of(mini)[0]._replace(caption="one red circle at the top " * 9, hallucinated=("one red bar",))
    found = extract(loaded, [item], mini.images)
    assert found.about["texts_cut"] == 1
    short = extract(loaded, [item._replace(caption="one red circle")], mini.images)
    assert short.about["texts_cut"] == 0 and np.abs(found.spaces["llm"][1] - short.spaces["llm"][1]).max() > 1e-3


def states(path, base, mini, file, **options):
    items, counts, _ = sample_records(mini.data, 6, 0)
    return represent(path, base, items, counts["sha256"], mini.images, file, config=HaclConfig(), **options)[0]


def close(a, b, atol=2e-4):
    return all(np.allclose(x, y, atol=atol) for x, y in zip(a.spaces["llm"], b.spaces["llm"]))


def test_every_layout_of_a_checkpoint(mini, stage2, tmp_path):  # noqa: F811
    """A projector with its base, the same merged, and in Hugging Face's format; a LoRA, and the same merged."""
    projector = projector_folder(mini, tmp_path / "llava-projector")
    one = states(projector, mini.llm, mini, tmp_path / "1")
    assert one.about["base"] == str(mini.llm) and "head" not in one.spaces
    merge(projector, tmp_path / "llava-whole", mini.llm)
    whole = states(tmp_path / "llava-whole", mini.llm, mini, tmp_path / "2")  # the base is of no account
    assert whole.about["base"] is None and close(one, whole)
    export_to_hf(tmp_path / "llava-whole", tmp_path / "hf")
    assert close(one, states(tmp_path / "hf", None, mini, tmp_path / "3"))

    lora = tmp_path / "llava-lora"
    lora_folder(stage2, mini, lora)
    two = states(lora, mini.llm, mini, tmp_path / "4")
    merge(lora, tmp_path / "llava-merged", mini.llm)
    assert close(two, states(tmp_path / "llava-merged", None, mini, tmp_path / "5"), 2e-3)
    assert not close(one, two, 1e-2)  # control: adapters matter
    assert close(states(published(stage2, mini, tmp_path / "v1.5"), None, mini, tmp_path / "6"), one, 0.05)


def test_heads_only_where_they_were_saved(mini, tmp_path):
    with_heads = projector_folder(mini, tmp_path / "heads", head={"head_dim": 8})
    without = projector_folder(mini, tmp_path / "none", head={"head_dim": 0})
    a, b = (states(path, mini.llm, mini, tmp_path / path.name[0]) for path in (with_heads, without))
    assert list(b.spaces) == ["llm", "centred"] and close(a, b)
    head = load_pretrained(with_heads, mini.llm, device="cpu", hacl=True).model.hacl_head
    with torch.no_grad():
        v, t, _ = head(torch.tensor(a.spaces["llm"][0]), torch.tensor(a.spaces["llm"][1]))
    np.testing.assert_allclose(a.spaces["head"][0], v, atol=1e-6)
    np.testing.assert_allclose(a.spaces["head"][1], t, atol=1e-6)
    assert a.spaces["head"][0].shape[1] == 8 and not np.allclose(v, t, atol=0.1)


def test_sequences_are_as_the_checkpoints_were_trained(mini, tmp_path):
    plain = projector_folder(mini, tmp_path / "plain")
    released = projector_folder(mini, tmp_path / "released", head={"head_dim": 0, "fused": False, "visual_bos": False})
    ours = projector_folder(mini, tmp_path / "ours", head={"head_dim": 0})
    prompted = projector_folder(mini, tmp_path / "prompted", head={"head_dim": 0, "representation": "prompt"})
    config = representations.common_config
    assert config([plain]).visual_bos and config([plain, ours]).visual_bos and not config([plain, released]).visual_bos
    with pytest.raises(HaclError, match="different visual_bos .*give --visual-bos"):
        config([ours, released])
    assert config([plain, prompted]).representation == "prompt"
    with pytest.raises(HaclError, match="different representation .*give --representation"):
        config([ours, prompted])
    assert config([ours, prompted], representation="prompt", prompt="so").prompt == "so"


# --- which records ----------------------------------------------------------------------------------------------------


def test_the_draw_is_seeded_nested_and_not_the_first(mini):
    few, counts, skipped = sample_records(mini.data, 8, 1)
    more = sample_records(mini.data, 20, 1)[0]
    assert few == sample_records(mini.data, 8, 1)[0] and set(few) < set(more) and not skipped
    assert counts["records"] == 32 and counts["sampled"] == 8 and counts["usable"] == 32
    drawn = [item.index for item in few]
    assert drawn != list(range(8)) and drawn == sorted(drawn)
    assert drawn != [item.index for item in sample_records(mini.data, 8, 2)[0]]
    assert all(item.hallucinated and len(item.kinds) == len(item.hallucinated) for item in few)


def test_records_that_cannot_be_used_are_named(mini, records, tmp_path):
    caption = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "a text"}]
    empty = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]
    bad = [{"id": "t", "conversations": caption}, {"id": "e", "image": "a.png", "conversations": empty}, 5]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(bad + records[:3]))
    items, counts, skipped = sample_records(path, 10, 0)
    assert [item.index for item in items] == [3, 4, 5] and counts["unusable"] == 3
    assert "(id 't') has no image" in skipped[0] and "(id 'e') has no caption" in skipped[1]
    assert "record 2 is a int" in skipped[2]
    path.write_text(json.dumps(bad))
    with pytest.raises(DataError, match="none of its 3 records has an image and a caption. The first: .*'t'"):
        sample_records(path, 10, 0)


# --- measures equal plain loops ---------------------------------------------------------------------------------------


def features(rng, n=9, d=6, k=2, gap=1.0):
    v, t, h = rng.normal(size=(n, d)) + gap, rng.normal(size=(n, d)), rng.normal(size=(n * k, d))
    return v, t, h, np.repeat(np.arange(n), k)


def cos(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def all_measures(v, t, h, owner, captions=None, images=None, kinds=None, samples=50):
    n = len(v)
    captions, images = captions or [f"c{i}" for i in range(n)], images or [f"i{i}" for i in range(n)]
    items, chance = measures.items_of(v, t, h, owner, range(n), images, captions, kinds or [None] * len(h))
    found = statistics.summarise(measures.MEASURES, items, samples=samples)
    return {name: x["value"] for name, x in found.items()}, chance, items


def loops(v, t, h, owner, captions, images):
    n = len(v)

    def norm(x):
        return [[c / math.sqrt(sum(y * y for y in row)) for c in row] for row in x]

    def centroid(x):
        return [sum(row[j] for row in x) / len(x) for j in range(len(x[0]))]

    def distance(a, b):
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))

    V, T, H = norm(v), norm(t), norm(h)
    want = {"modality_gap": distance(centroid(V), centroid(T))}
    spreads = [sum(distance(row, centroid(x)) for row in x) / n for x in (V, T)]
    want["modality_gap_relative"] = want["modality_gap"] / (sum(spreads) / 2)
    want["gap_image_hallucinated"] = distance(centroid(V), centroid(H))
    want["gap_caption_hallucinated"] = distance(centroid(T), centroid(H))
    for name, queries, targets in (("image_to_text", V, T), ("text_to_image", T, V)):
        for k in (1, 5):
            hits = 0
            for i in range(n):
                right = [j for j in range(n) if captions[j] == captions[i] or images[j] == images[i]]
                best = max(cos(queries[i], targets[j]) for j in right)
                wrong = [j for j in range(n) if j not in right and cos(queries[i], targets[j]) >= best - 1e-9]
                hits += len(wrong) < k
            want[f"{name}_r{k}"] = hits / n
    hits = []
    for i in range(n):
        others = [j for j in range(n) if captions[j] != captions[i]]
        if any(images[j] == images[i] for j in others):
            hits.append(images[max(others, key=lambda j: cos(T[i], T[j]))] == images[i])
    want["caption_to_caption_r1"] = sum(hits) / len(hits)
    margins = [cos(V[owner[m]], T[owner[m]]) - cos(V[owner[m]], H[m]) for m in range(len(H))]
    want["closer_to_true"] = sum(x > 0 for x in margins) / len(H)
    with_any = sorted(set(owner.tolist()))
    want["closer_to_true_than_all"] = sum(all(x > 0 for x, o in zip(margins, owner) if o == i) for i in with_any) / len(
        with_any
    )
    want["mean_margin"] = sum(margins) / len(H)
    want["alignment"] = sum(distance(a, b) ** 2 for a, b in zip(V, T)) / n
    want["alignment_hallucinated"] = sum(distance(V[o], b) ** 2 for o, b in zip(owner, H)) / len(H)
    return want


@pytest.mark.parametrize("seed", range(4))
def test_measures_equal_loops(seed):
    rng = np.random.default_rng(seed)
    v, t, h, owner = features(rng, n=11)
    keep = rng.random(len(h)) < 0.7  # some images have fewer hallucinated captions, some none
    h, owner = h[keep], owner[keep]
    captions = [f"c{i % 8}" for i in range(11)]  # repeated texts are right answers of each other
    images = [f"i{i % 9}" for i in range(11)]
    t[9] = t[0] + 0.1 * t[9]  # captions of one image
    got, chance, _ = all_measures(v, t, h, owner, captions, images)
    assert got["caption_to_caption_r1"] > 0
    want = loops(v, t, h, owner, captions, images)
    assert set(got) == set(want)
    for name in want:
        assert got[name] == pytest.approx(want[name], abs=1e-9), name
    # control: captions of others, and every figure that looks at pairs is another
    other, _, _ = all_measures(v, t[::-1], h, owner, captions, images)
    for name in ("alignment", "mean_margin"):
        assert abs(other[name] - want[name]) > 1e-4, name
    assert chance["closer_to_true"] == 0.5
    counts = np.bincount(owner, minlength=11)
    assert chance["closer_to_true_than_all"] == pytest.approx(np.mean([1 / (1 + c) for c in counts if c]))


def test_chance_of_recall_is_that_of_random_orders():
    right_of = np.array([1, 2, 1, 3, 2, 1])
    rng = np.random.default_rng(0)
    for k in (1, 5):
        hits = [(np.argsort(rng.random((6,)))[:c] < k).any() for _ in range(4000) for c in right_of]
        assert measures.chance_of_recall(right_of, k) == pytest.approx(np.mean(hits), abs=0.015)
    assert measures.chance_of_recall(np.array([1, 1]), 5) == 1


def test_by_kind_counts_each_kind_alone():
    v, t, h, owner = features(np.random.default_rng(2), n=30)
    kinds = ["existence", "location"] * 30
    _, _, items = all_measures(v, t, h, owner, kinds=kinds)
    for kind in ("existence", "location"):
        rows = [m for m in range(60) if kinds[m] == kind]
        want = np.mean([cos(v[owner[m]], t[owner[m]]) > cos(v[owner[m]], h[m]) for m in rows])
        got = statistics.summarise({"x": measures.of_kind(kind)}, items, samples=10)["x"]["value"]
        assert got == pytest.approx(want)
    nothing = statistics.summarise({"x": measures.of_kind("quantity")}, items, samples=10)["x"]["value"]
    assert math.isnan(nothing)


def test_a_tie_is_no_success():
    point = np.ones((6, 4))
    got, _, _ = all_measures(point, point, np.ones((6, 4)), np.arange(6))
    assert got["closer_to_true"] == got["closer_to_true_than_all"] == got["image_to_text_r1"] == 0
    assert got["image_to_text_r5"] == 0 and got["modality_gap"] == 0 and got["mean_margin"] == pytest.approx(0)


def test_without_hallucinated_captions_the_rest_is_there():
    v, t, _, _ = features(np.random.default_rng(0))
    got, chance, _ = all_measures(v, t, np.zeros((0, 6)), np.zeros(0, dtype=int))
    missing = {name for name, x in got.items() if math.isnan(x)}
    one_caption = {"caption_to_caption_r1"}  # an image has no other
    assert missing == one_caption | {n for n in got if "hallucinated" in n or "closer" in n or "margin" in n}
    assert "closer_to_true" not in chance


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 12), k=st.integers(1, 3))
def test_turning_scaling_and_reordering_change_nothing(seed, n, k):
    rng = np.random.default_rng(seed)
    v, t, h, owner = features(rng, n=n, k=k)
    before, _, _ = all_measures(v, t, h, owner, samples=2)
    turn, scale = rotation(rng, 6), rng.uniform(0.1, 9)
    after, _, _ = all_measures(v @ turn * scale, t @ turn, h @ turn * 3, owner, samples=2)
    order, texts = rng.permutation(n), rng.permutation(len(h))
    place = np.argsort(order)
    shuffled, _, _ = all_measures(v[order], t[order], h[texts], place[owner[texts]], samples=2)
    for name in before:
        assert after[name] == pytest.approx(before[name], abs=1e-7, nan_ok=True), name
        assert shuffled[name] == pytest.approx(before[name], abs=1e-7, nan_ok=True), name
    # control: a turn of the images alone is seen
    assert all_measures(v @ turn, t, h, owner, samples=2)[0]["alignment"] != pytest.approx(before["alignment"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 12))
def test_equal_sets_have_no_gap_and_find_each_other(seed, n):
    v, _, h, owner = features(np.random.default_rng(seed), n=n)
    got, _, _ = all_measures(v, v, h, owner, samples=2)
    assert got["modality_gap"] == pytest.approx(0, abs=1e-9) and got["alignment"] == pytest.approx(0, abs=1e-9)
    assert got["image_to_text_r1"] == got["text_to_image_r1"] == got["closer_to_true"] == 1
    away, _, _ = all_measures(v, -v, h, owner, samples=2)
    assert away["alignment"] == pytest.approx(4) and away["image_to_text_r1"] < 1
    assert 0 <= got["gap_caption_hallucinated"] == pytest.approx(got["gap_image_hallucinated"])


def test_intervals_cover_the_truth_and_pairs_narrow_them():
    """The gap of samples from a known distribution lies in its interval about as often as it says."""
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        # on the circle: images around angle 0, captions around 90 degrees; the true gap by a large sample below
        a, b = rng.normal(0, 0.4, 80), rng.normal(math.pi / 2, 0.4, 80)
        v, t = (np.stack([np.cos(x), np.sin(x)], 1) for x in (a, b))
        items, _ = measures.items_of(v, t, np.zeros((0, 2)), np.zeros(0, int), range(80), range(80), range(80), [])
        low, high = statistics.summarise(measures.MEASURES, items, samples=300)["modality_gap"]["interval"]
        inside += low <= math.exp(-(0.4**2) / 2) * math.sqrt(2) <= high
    assert 50 <= inside <= 60


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_equal_rows_come_to_equal_places_the_same_each_time(method):
    x = measures.unit(np.random.default_rng(0).normal(size=(30, 5)))
    rows = np.concatenate([x, x[:10]])
    (points, equal), share = figures.project([rows[:30], rows[30:]], method, seed=1)
    assert points.shape == (30, 2)
    np.testing.assert_allclose(points[:10], equal, atol=1e-9)
    np.testing.assert_array_equal(points, figures.project([rows[:30], rows[30:]], method, seed=1)[0][0])
    assert len(np.unique(points.round(5), axis=0)) == 30
    if method == "pca":  # axes are orthogonal, of the variance that they say
        centred = rows - rows.mean(0)
        values = np.linalg.eigvalsh(np.cov(centred.T))[::-1]
        np.testing.assert_allclose(share, values[:2] / values.sum())
        np.testing.assert_allclose(np.concatenate([points, equal]).var(0, ddof=1), values[:2])
    else:
        assert share is None


# --- the command ------------------------------------------------------------------------------------------------------


def run(*args):
    command, options = cli.parse(["analyze", *map(str, args)])
    return command(options)


@pytest.fixture(scope="module")
def two(mini, tmp_path_factory):
    """Two stage-1 folders, one with heads, whose projectors differ."""
    folder = tmp_path_factory.mktemp("two")
    projector_folder(mini, folder / "plain")
    projector_folder(mini, folder / "hacl", scale=0.2, head={"head_dim": 8})
    return folder


@pytest.fixture(scope="module")
def common(mini, two):
    base = ("--base", mini.llm, "--workers", 0, "--device", "cpu")
    return (two / "plain", two / "hacl", "--data", mini.data, "--images", mini.images, *base)


@pytest.fixture
def quick(monkeypatch):
    """Without what takes longest: pictures, and making room for the next model."""
    for name in ("scatter", "closer_chart"):
        monkeypatch.setattr(figures, name, lambda path, *args, **kwargs: path.write_bytes(b"a picture"))
    monkeypatch.setattr(representations.gc, "collect", lambda: 0)


def test_files_numbers_and_pictures(mini, two, common, tmp_path, capsys, records):
    out = tmp_path / "out"
    assert run(*common, "--output", out) == 0
    analysis = json.loads((out / "analysis.json").read_text())
    assert [m["name"] for m in analysis["models"]] == ["plain", "hacl"]
    assert [list(m["spaces"]) for m in analysis["models"]] == [["llm", "centred"], ["llm", "centred", "head"]]
    for model in analysis["models"]:
        for found in model["spaces"].values():
            assert set(found["measures"]) == set(analyze.LABELS) - {"caption_to_caption_r1"}  # one caption an image
            assert len(found["measures"]["closer_to_true"]["interval"]) == 2
    assert analysis["data"]["used"] == 32 and analysis["data"]["hallucinated"] == 64
    assert analysis["visual_bos"] is True and analysis["provenance"]["versions"]["hacl_llava"]
    (comparison,) = analysis["comparisons"]
    assert comparison["same_captions"] and list(comparison["spaces"]) == ["llm", "centred"]
    a, b = (m["spaces"]["llm"]["measures"]["modality_gap"]["value"] for m in analysis["models"])
    assert comparison["spaces"]["llm"]["measures"]["modality_gap"]["difference"] == pytest.approx(b - a)
    assert a != pytest.approx(b, abs=1e-4)
    files = [figure["file"] for figure in analysis["figures"]]
    assert files == [
        f"{name}{space}.png" for space in ("", "_centred", "_head") for name in ("pca", "tsne", "closer_to_true")
    ]
    for file in files:
        with Image.open(out / file) as image:
            assert image.width >= 700 and image.height >= 350
            colours = image.convert("RGB").resize((200, 100)).getcolors(20000)
            assert len(colours) > 50, file  # something is drawn
    page = (out / "report.html").read_text()
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)  # no network
    assert page.count("data:image/png;base64,") == len(files)
    first = base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1))
    assert first == (out / "pca.png").read_bytes()
    assert not (out / "report.md").exists()
    assert "both represent captions alike" in page
    assert "plain" in capsys.readouterr().out
    assert not list(out.glob("*.part"))


def test_the_second_run_loads_no_model_and_settings_are_seen(quick, mini, two, common, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    fast = ("--method", "pca", "--limit", 12, "--output", out)
    real, loads = representations.load_pretrained, []

    def killed(path, *args, **kwargs):
        if path == two / "hacl":
            raise KeyboardInterrupt
        return real(path, *args, **kwargs)

    def counted(path, *args, **kwargs):
        loads.append(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(representations, "load_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*common, *fast)
    assert [p.name for p in out.glob("*.safetensors")] == ["representations-plain.safetensors"]
    monkeypatch.setattr(representations, "load_pretrained", counted)
    assert run(*common, *fast) == 0 and loads == [two / "hacl"]
    before = json.loads((out / "analysis.json").read_text())
    loads.clear()
    assert run(*common, *fast, "--method", "tsne") == 0 and not loads and (out / "tsne.png").exists()
    after = json.loads((out / "analysis.json").read_text())
    assert after["models"] == before["models"] and after["comparisons"] == before["comparisons"]
    assert run(*common, *fast, "--visual-bos", "false") == 0 and len(loads) == 2
    changed = json.loads((out / "analysis.json").read_text())
    assert changed["visual_bos"] is False and changed["models"] != before["models"]
    (out / "representations-plain.safetensors").write_bytes(b"damaged")
    loads.clear()
    assert run(*common, *fast, "--visual-bos", "false") == 0 and loads == [two / "plain"]


def test_unreadable_images_are_named_counted_and_left_out_everywhere(quick, mini, common, records, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(mini.images, images)
    (images / records[4]["image"]).write_bytes(b"no image")
    (images / records[9]["image"]).unlink()
    out = tmp_path / "out"
    assert run(*common[:4], "--images", images, *common[6:], "--output", out, "--method", "pca") == 0
    data = json.loads((out / "analysis.json").read_text())["data"]
    assert data["used"] == 30 and data["unreadable_images"] == 2 and len(data["skipped"]) == 2
    said = capsys.readouterr().err
    for row in (4, 9):
        assert f"(id '{records[row]['id']}')" in said and records[row]["image"] in said
    assert records[4]["id"] in (out / "report.html").read_text()
    # the same as of data without these two records
    rest = tmp_path / "rest.json"
    rest.write_text(json.dumps([r for i, r in enumerate(records) if i not in (4, 9)]))
    assert run(*common[:2], "--data", rest, *common[4:], "--output", tmp_path / "rest", "--method", "pca") == 0
    a, b = (json.loads((x / "analysis.json").read_text())["models"] for x in (out, tmp_path / "rest"))
    for x, y in zip(a, b):
        one, other = (z["spaces"]["llm"]["measures"]["mean_margin"]["value"] for z in (x, y))
        assert one == pytest.approx(other, abs=1e-5)


def test_only_records_that_every_model_has():
    def made(index, owner, which):
        rows = np.array(index, dtype=float)[:, None]
        h = np.array([[index[o] * 10 + w] for o, w in zip(owner, which)], dtype=float)
        arrays = (np.array(x, dtype=int) for x in (index, owner, which))
        return representations.Representations(*arrays, {"llm": (rows, rows, h)}, [], {})

    a = made([1, 3, 5, 8], [0, 0, 1, 2, 3], [0, 1, 0, 0, 0])
    b = made([8, 5, 1, 9], [0, 1, 2, 2], [0, 0, 1, 0])
    items = [representations.Item(i, str(i), f"{i}.png", "c", (), ()) for i in (1, 3, 5, 8, 9)]
    (x, y), kept, _ = analyze._same_records([a, b], items)
    assert [item.index for item in kept] == [1, 5, 8]
    for z in (x, y):
        assert z.index.tolist() == [1, 5, 8] and z.spaces["llm"][0].ravel().tolist() == [1, 5, 8]
        assert z.owner.tolist() == [0, 0, 1, 2] and z.spaces["llm"][2].ravel().tolist() == [10, 11, 50, 80]
    with pytest.raises(HaclError, match="only 1 of 5 records"):
        analyze._same_records([a, made([3, 9], [], [])], items)


def test_no_claim_without_an_interval_that_leaves_out_0():
    change = {"difference": 0.2, "interval": [-0.01, 0.4]}
    assert analyze._verdict(change, "B") == "no clear difference"
    assert analyze._verdict({"difference": 0.2, "interval": [0.01, 0.4]}, "B") == "higher in B"
    assert analyze._verdict({"difference": -0.2, "interval": [-0.4, -0.01]}, "B") == "lower in B"
    nan = float("nan")
    assert analyze._verdict({"difference": 0.2, "interval": [nan, nan]}, "B") == "no clear difference"


def test_the_same_model_twice_differs_in_nothing(quick, mini, two, common, tmp_path, capsys):
    arguments = (two / "plain", two / "plain", "--name", "A", "--name", "B", *common[2:], "--limit", 16)
    assert run(*arguments, "--output", tmp_path, "--method", "pca") == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    lines = next(group["lines"] for group in found["findings"] if group["title"] == "B against A")
    assert len(lines) > 5 and not any("higher" in line or "lower in" in line for line in lines)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--limit", 1), "--limit is 1; allowed are 2"),
        (("--name", "one"), "--name is given 1 times for 2"),
        (("--name", "a b", "--name", "a/b"), "not different enough"),
        (("--base", "x", "--base", "y"), "--base is given 3 times"),
        (("--batch-size", 0), "--batch-size is 0"),
    ],
)
def test_mistakes_are_said_before_work(common, tmp_path, more, message):
    with pytest.raises(HaclError, match=message):
        run(*common, "--output", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(mini, two, common, tmp_path, monkeypatch):
    with pytest.raises(HaclError, match="5 checkpoints are given; at most 4"):
        run(*[two / "plain"] * 5, *common[2:], "--output", tmp_path)
    with pytest.raises(DataError, match="none of 32 images can be read; the first: .*no such file"):
        run(*common[:4], "--images", tmp_path / "nowhere", *common[6:], "--output", tmp_path)
    with pytest.raises(HaclError, match="give its base"):
        run(*common[:6], "--output", tmp_path)
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hacl_llava\[plot\]"):
        run(*common, "--output", tmp_path)


def test_data_without_hallucinated_captions_and_one_checkpoint(common, records, tmp_path, capsys):
    data = tmp_path / "data.json"
    keys = ("hallucinated_captions", "hallucinated_kinds")
    data.write_text(json.dumps([{k: v for k, v in r.items() if k not in keys} for r in records[:8]]))
    out = tmp_path / "out"
    assert run(common[0], "--data", data, *common[4:], "--output", out, "--method", "pca") == 0
    found = json.loads((out / "analysis.json").read_text())
    assert [figure["file"] for figure in found["figures"]] == ["pca.png", "pca_centred.png"]
    assert not found["comparisons"]
    assert "closer_to_true" not in found["models"][0]["spaces"]["llm"]["measures"]


def test_half_a_character_in_the_data_ends_nothing(quick, common, records, tmp_path):
    data, out = tmp_path / "data.json", tmp_path / "out"
    lost, odd = {**records[8], "image": "\ud83d.png"}, json.loads(json.dumps(records[7]))
    odd["conversations"][1]["value"] += " \ud83d"
    data.write_text(json.dumps([*records[:7], odd, lost]))
    assert run(common[0], "--data", data, *common[4:], "--output", out, "--method", "pca") == 0
    found = json.loads((out / "analysis.json").read_text())["data"]
    assert found["used"] == 8 and len(found["skipped"]) == 1 and "\ud83d.png" in found["skipped"][0]
    assert "ud83d" in (out / "report.html").read_text()


def test_names_stand_in_legends_as_they_are(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: seen.update({path: figure}))
    names = ("_hidden", "a$b$")
    rows = {"all": {"value": 0.5, "interval": [0.4, 0.6], "count": 9}}
    figures.closer_chart("closer", [(name, rows) for name in names], "heading")
    for figure in seen.values():
        texts = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
        assert sum(text.startswith("_hidden") for text in texts) == 1
        assert sum(text.startswith(r"a\$b\$") for text in texts) == 1
        figures.pyplot().close(figure)


@pytest.mark.once
@pytest.mark.e2e
def test_through_the_command_line(common, tmp_path):
    command = ["analyze", *common, "--limit", "10"]
    status, out, err = Command(tmp_path, *command, "--output", tmp_path / "out").ends()
    assert status == 0, err[-3000:]
    assert "hacl against plain:" in out and "report.html: written" in out
    assert "analyze" in json.loads((tmp_path / "out/analysis.json").read_text())["provenance"]["command"]
    status, out, err = Command(tmp_path, *command, "--output", tmp_path, "--base", "x").ends()
    assert status == 2 and err.count("error:") == 1 and not out
    # and what reads it reads it
    assert Command(tmp_path, "report", f"both={tmp_path / 'out'}", "--output", tmp_path / "page").ends()[0] == 0
