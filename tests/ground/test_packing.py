"""Where tokens stand: against LLaVA's own loops, and against texts on their own."""

import copy

import pytest
import torch
from conftest import batch_of, gradients, load, relative
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hacl_llava import fused, representation
from hacl_llava.fused import splice_images
from hacl_llava.packing import ROW, pack, unpack


@given(st.lists(st.integers(0, 600), min_size=1, max_size=80), st.randoms())
def test_pack_holds_each_text_once_and_wastes_little(lengths, random):
    texts = [torch.tensor([random.randrange(100) for _ in range(n)]) if n else None for n in lengths]
    packed = pack(texts)
    ids, positions, owner = (packed[k].flatten() for k in ("ids", "positions", "owner"))
    assert (owner >= 0).sum() == sum(lengths) and packed["owner"].numel()
    for i, (n, text) in enumerate(zip(lengths, texts)):
        places = (owner == i).nonzero()[:, 0]
        if not n:
            assert packed["end"][i] == -1 and not len(places)
            continue
        assert places.tolist() == list(range(places[0], places[0] + n)) and packed["end"][i] == places[-1]
        assert torch.equal(ids[places], text) and positions[places].tolist() == list(range(n))
        assert len({int(p) // packed["owner"].shape[1] for p in places[[0, -1]]}) == 1  # in one row
    # No row is longer than the shortest and the longest text together.
    held = (packed["owner"] >= 0).sum(1)
    assert held.max() - held.min() <= max(lengths) and packed["owner"].shape[1] == max(held.max(), 1)
    assert packed["owner"].shape[1] <= 2 * max(ROW, *lengths)
    rows, found = unpack(packed)
    assert found.tolist() == [max(n, 1) for n in lengths]
    assert all(torch.equal(row[:n], text) for row, n, text in zip(rows, found, texts) if text is not None)


def mixed_rows(tokenizer):
    """Rows of ids, without padding: an image in the middle, first, last, two, none, and an unknown word."""
    image, bos, unk = -200, tokenizer.bos_token_id, tokenizer.unk_token_id
    return [
        [bos, image, 11, 12, 13],
        [image, 11, 12],
        [bos, 11, 12, 13, 14, 15, image],
        [bos, 11, image, 12, image, 13],
        [bos, 11, 12],
        [bos, image, 11, unk, 12],  # LLaVA pads with <unk>, so this one's word is taken for padding
    ]


@pytest.mark.parametrize("limit", [None, 512, 13, 6])
def test_splice_is_llavas(mini, limit):
    model, tokenizer = load(mini)
    model.config.tokenizer_model_max_length = limit
    rows = mixed_rows(tokenizer)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    for row, out in zip(rows, ids):
        out[: len(row)] = torch.tensor(row)
    mask, labels = ids.ne(tokenizer.pad_token_id), torch.where(ids > 10, ids, -100)
    images = torch.randn(7, 3, *[model.get_vision_tower().image_processor.crop_size["height"]] * 2)
    _, _, held, _, want, want_labels = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, labels, images)
    got, got_held, got_labels, predicting, first, behind, whole = splice_images(model, ids, mask, labels, images)
    T = held.shape[1]
    assert T <= got.shape[1] and not got_held[:, T:].any() and (got_labels[:, T:] == -100).all()
    assert torch.equal(got_held[:, :T], held) and torch.equal(got_labels[:, :T], want_labels)
    assert torch.equal(got[:, :T][held], want[held])
    for b, row in enumerate(want_labels):
        known = [x for x in predicting[b].tolist() if x >= 0]
        assert len(set(known)) == len(known) and set((row[1:] != -100).nonzero()[:, 0].tolist()) <= set(known)
    m = 9
    is_whole = [r.count(-200) == 1 and r.index(-200) + m <= (limit or 512) for r in rows]
    assert whole.tolist() == is_whole
    for b in range(len(rows)):
        if is_whole[b]:
            assert (first[b], behind[b]) == (rows[b].index(-200), rows[b].index(-200) + m)
    # The gradient reaches the projector as through LLaVA's loops.
    weight = torch.randn_like(want) * held[..., None]
    projector = model.get_model().mm_projector
    grads = [torch.autograd.grad((x[:, :T] * weight).sum(), list(projector.parameters())) for x in (want, got)]
    assert all(relative(a, b) < 1e-6 for a, b in zip(*grads))


def test_packed_texts_are_texts_on_their_own(mini, monkeypatch):
    model, tokenizer = load(mini)
    generator = torch.Generator().manual_seed(0)
    lengths = [77, 3, 0, 40, 41, 5, 60, 60, 1, 30, 12, 12] * 2
    texts = [torch.randint(3, model.config.vocab_size, (n,), generator=generator) if n else None for n in lengths]
    packed = pack(texts)
    assert len(packed["ids"]) > 1 and packed["owner"][0].unique().numel() > 2
    there = torch.tensor(lengths) > 0
    want = representation.texts(model, packed)[there]
    alone = [model.get_model()(input_ids=ids[None], return_dict=True)[0][0, -1] for ids in texts if ids is not None]
    assert relative(want, torch.stack(alone)) < 1e-5
    assert relative(fused.texts(model, packed)[there], want) < 1e-5
    # Controls: texts that see their neighbours; positions that run on.
    hidden = fused.hidden
    for see_all, run_on in ((True, False), (False, True)):

        def broken(model, embeds, sees, positions, see_all=see_all, run_on=run_on):
            sees = torch.ones_like(sees).tril() if see_all else sees
            positions = torch.arange(embeds.shape[1]).expand_as(positions) // 2 if run_on else positions
            return hidden(model, embeds, sees, positions)

        monkeypatch.setattr(fused, "hidden", broken)
        assert relative(fused.texts(model, packed)[there], want) > 1e-3


def test_images_of_several_sizes_take_llavas_loops(mini):
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(4))
    several = {**batch, "images": list(batch["images"])}
    losses, grads = [], []
    for one in (batch, several):
        model.zero_grad()
        losses.append(model(**one).loss)
        losses[-1].backward()
        grads.append(gradients(model))
    assert abs(losses[0] - losses[1]) < 1e-6
    assert all(relative(grads[1][k], grads[0][k]) < 1e-5 for k in grads[0])


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a device: its shapes or its Python values depend on them."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1].strip("_")
        if any(name == n.strip("_") or name.startswith("unique") for n in self.NAMES):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device(mini, records):
    """Neither for plain rows nor for ones without image or captions; LLaVA's own step, as a control, does."""
    rows = copy.deepcopy(records[:6])
    del rows[1]["hallucinated_captions"], rows[4]["image"]
    rows[4]["conversations"][0]["value"] = "Say something."
    model, tokenizer = load(mini, centre=True)
    batch = batch_of(mini, model, tokenizer, range(6), rows)
    model(**batch)  # with the self-check
    with Waits() as waits:
        model(**batch).loss.backward()
    assert not waits.seen, waits.seen
    stock = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "images")}
    with Waits() as waits:
        model(**stock)
    assert len(waits.seen) >= 6
