"""What is right on a CPU is right on a GPU. These run on a CPU too, so that they are known to be right themselves."""

import json

import pytest
import torch
from conftest import arguments, batch_of, gradients, load, relative
from test_integration import run_main, train_module  # noqa: F401
from torch.utils._pytree import tree_map

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def grads_of(mini, device, dtype, **settings):
    model, tokenizer = load(mini, dtype, **settings)
    batch = batch_of(mini, model, tokenizer)
    model, batch = model.to(device), tree_map(lambda x: x.to(device), batch)
    model(**batch).loss.backward()
    return {name: g.cpu().double() for name, g in gradients(model).items()}, model.hacl_fused


@on_both
@pytest.mark.parametrize("settings", [{}, {"representation": "prompt", "prompt": "\nthis:", "centre": True}])
def test_the_shared_pass_has_the_gradients_of_separate_ones(mini, device, settings):
    """In float32 those of a CPU; in bfloat16 as near as separate passes are in bfloat16."""
    want, _ = grads_of(mini, "cpu", torch.float32, fused=False, **settings)
    got, fused = grads_of(mini, device, torch.float32, **settings)
    assert fused and max(relative(got[n], want[n]) for n in want if want[n].norm() > 1e-9) < 1e-3
    half, noise = (grads_of(mini, device, torch.bfloat16, fused=f, **settings)[0] for f in (True, False))
    half, noise, want = (torch.cat([g[n].flatten() for n in sorted(want)]) for g in (half, noise, want))
    assert relative(half, want) < 2 * relative(noise, want) < 0.5


@on_both
@pytest.mark.parametrize("hacl", [True, False])
def test_a_run_in_bfloat16(monkeypatch, capsys, mini, tmp_path, train_module, device, hacl):  # noqa: F811
    """Through the door, with recomputation and kept texts; a GPU says how many layers it recomputes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # which transformers 4.37 leaves set
    flags = ["--bf16", "True", "--max_steps", "3", "--hacl_checkpoint_layers", "auto", "--use_hacl", str(hacl)]
    flags += ["--use_cpu", "True"] if device == "cpu" else []
    flags += ["--hacl_text_cache", str(tmp_path / "texts")] if hacl else []
    status, said, err = run_main(monkeypatch, capsys, *arguments(mini, tmp_path / "out", *flags))
    assert status == 0, err
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 3 and all(0 < loss < 30 for loss in losses)
    if device == "cpu":
        assert "HACL checkpointing: auto on cpu" in said
    else:
        assert "HACL checkpointing: 0 of 2 layers are computed again" in said  # there is room for all


@on_both
def test_what_is_measured(mini, device):
    """Of images and captions; a CPU's figures."""
    from hacl_llava.evaluation.captions import embeds_of, greedy, likelihoods
    from hacl_llava.evaluation.representations import Extractor, sample_records

    items, _, _ = sample_records(mini.data, 4, 0)
    texts = [[item.caption, *item.hallucinated] for item in items]

    def measured(device):
        model, tokenizer = load(mini)
        extractor = Extractor((tokenizer, model.to(device), model.get_vision_tower().image_processor, 512))
        before = embeds_of(extractor, mini.images, items)
        states, _, _ = extractor.images(mini.images, [item.image for item in items])
        words = extractor.texts([text for row in texts for text in row])
        scores, tokens = likelihoods(extractor, texts, before)
        blind, _ = likelihoods(extractor, texts)
        return states, words, torch.tensor(sum(scores + blind, [])), tokens, len(greedy(extractor, before))

    want, got = measured("cpu"), measured(device)
    assert all(relative(a, b) < 1e-3 for a, b in zip(got[:3], want)) and got[3:] == want[3:]
