"""Where tokens stand: against LLaVA's own loops, and against texts on their own."""

import copy

import pytest
import torch
from conftest import batch_of, gradients, load, relative
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hacl_llava.layout import ROW, pack


@given(st.lists(st.integers(0, 600), min_size=1, max_size=80))
def test_pack_holds_each_text_once_and_wastes_little(lengths):
    texts, columns, starts, at = pack(lengths)
    want = [max(n, 1) for n in lengths]
    assert texts.shape == columns.shape and (texts >= 0).sum() == sum(want)
    for i, n in enumerate(want):
        rows, places = (texts == i).nonzero(as_tuple=True)
        assert len(set(rows.tolist())) == 1 and places.tolist() == list(range(places[0], places[0] + n))
        assert columns[rows, places].tolist() == list(range(n))
        row, slot = divmod(int(at[i]), starts.shape[1])
        assert row == rows[0] and starts[row, slot] == places[0]
    # No row is longer than the shortest and the longest text together.
    held = (texts >= 0).sum(1)
    assert held.max() - held.min() <= max(want) and texts.shape[1] == held.max()
    assert texts.shape[1] <= 2 * max(ROW, *want)


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
    got, got_held, got_labels, predicting, first, behind, whole = model._splice(ids, mask, labels, images)
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
    ids = torch.randint(3, model.config.vocab_size, (24, 77), generator=generator)
    texts = ids, torch.tensor(lengths), None, None
    packed = [x[None] for x in pack(lengths)]
    assert packed[0].shape[1] > 1 and packed[2].shape[2] > 2
    want = model._text_pass(*texts)
    assert relative(model._packed_text_pass(*texts, packed=packed), want) < 1e-5
    assert relative(model._packed_text_pass(*texts, packed=(None,) * 4), want) < 1e-5
    # Controls: texts that see their neighbours; positions that run on.
    hidden_at = model._hidden_at
    for see_all, run_on in ((True, False), (False, True)):

        def broken(embeds, see, positions, columns, see_all=see_all, run_on=run_on):
            see = torch.ones_like(see).tril() if see_all else see
            positions = torch.arange(embeds.shape[1]).expand_as(positions) // 2 if run_on else positions
            return hidden_at(embeds, see, positions, columns)

        monkeypatch.setattr(model, "_hidden_at", broken)
        assert relative(model._packed_text_pass(*texts, packed=packed), want) > 1e-3


def test_last_layer_at_some_columns_is_the_whole_layer(mini):
    model, _ = load(mini, dtype=torch.float64, frozen=False)
    model.get_model().layers[-1].self_attn.attention_dropout = 0.0
    x = torch.randn(3, 11, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    see = torch.ones(3, 11, 11, dtype=torch.bool).tril()
    see[1, 7:, 2] = False
    positions = torch.arange(11).expand(3, -1).clone()
    positions[:, -1] = 4
    columns = torch.tensor([[10, 3], [0, 9], [5, 5]])
    weight = torch.randn(3, 2, model.config.hidden_size, dtype=torch.float64)

    def gradient(states):
        model.zero_grad()
        x.grad = None
        (states * weight).sum().backward()
        return {**gradients(model), "x": x.grad.clone()}

    every = torch.arange(3)[:, None]
    want = model._hidden(x, see[:, None], positions)[every, columns]
    got = model._hidden_at(x, see, positions, columns)
    assert relative(got, want) < 1e-6  # of the norms, which compute in float32
    a, b = gradient(got), gradient(want)
    assert set(a) == set(b) and all(relative(a[k], b[k]) < 1e-6 for k in b if b[k].norm() > 1e-12)
    assert relative(model._hidden_at(x, see, positions, columns + (columns < 10).long()), want) > 1e-3
    assert len(model.get_model().layers) == 2 and type(model.get_model().norm).__name__ != "Identity"


@pytest.mark.parametrize("captions", [0, 2])
def test_some_rows_of_a_batch_are_a_batch(mini, captions):
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(4), hacl_num_hallucinated=captions)
    for rows in (slice(0, 2), slice(2, 4), slice(0, 4)):
        part = {k: v[rows] for k, v in batch.items()}
        plain = {k: v for k, v in part.items() if not k.startswith("packed_")}
        assert abs(model(**part).loss - model(**plain).loss) < 1e-5


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


def test_lengths_decide_where_a_text_ends(mini):
    """Also when they were changed after the texts were packed."""
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(4))
    batch["caption_lengths"][1] -= 2
    batch["hallucinated_lengths"][2] = 0
    plain = {k: v for k, v in batch.items() if not k.startswith("packed_")}
    assert abs(model(**batch).loss - model(**plain).loss) < 1e-5


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
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(6), rows)
    model(**batch)  # with the self-check
    with Waits() as waits:
        model(**batch).loss.backward()
    assert not waits.seen, waits.seen
    stock = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "images")}
    with Waits() as waits:
        model(**stock)
    assert len(waits.seen) >= 6
