"""The fused step against plain references, and what surrounds it."""

import copy
import json
import warnings

import pytest
import torch
from conftest import batch_of, gradients, load, relative, texts_of
from reference import naive_step

from hacl_llava import fused, representation

CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def run(model, batch):
    """(loss, loss_lm, loss_i2t, loss_t2i, gradients) of one step."""
    model.zero_grad()
    model.reset_hacl_metrics()
    loss = model(**batch).loss
    loss.backward()
    figures = model.hacl_metrics()
    names = ("loss_lm", "loss_i2t", "loss_t2i")
    return loss.item(), *(figures[k] for k in names if k in figures), gradients(model)


def reference(model, batch):
    model.zero_grad()
    lm, i2t, t2i = naive_step(model, batch)
    loss = lm + model.hacl_config.weight * (i2t + t2i) / 2
    loss.backward()
    return *(x.item() for x in (loss, lm, i2t, t2i)), gradients(model)


def assert_same(got, want, loss_tolerance=1e-5, gradient_tolerance=1e-4):
    (*got_losses, got), (*losses, want) = got, want
    assert len(got_losses) == len(losses)
    for a, b in zip(got_losses, losses):
        assert abs(a - b) <= loss_tolerance, (got_losses, losses)
    assert set(got) == set(want)
    for name in want:
        if want[name].norm() > 1e-12:
            assert relative(got[name], want[name]) <= gradient_tolerance, name


@pytest.fixture
def mixed(mini, records):
    """Seven records: plain ones, one without hallucinated captions, one with a single one, one without an image."""
    rows = copy.deepcopy(records[:7])
    del rows[1]["hallucinated_captions"]
    rows[2]["hallucinated_captions"] = rows[2]["hallucinated_captions"][0]
    del rows[4]["image"]
    rows[4]["conversations"][0]["value"] = "Say something."
    rows[5]["hallucinated_captions"] = ["", rows[5]["hallucinated_captions"][1]]
    return rows


PROMPT = {"representation": "prompt", "prompt": "\nthis in one:", "centre": True}


@pytest.mark.parametrize("settings", [{}, PROMPT], ids=["eos", "prompt, centred"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("fused", [True, False])
def test_step_equals_four_plain_passes(mini, mixed, checkpointing, fused, settings):
    model, tokenizer = load(mini, fused=fused, head_dim=16, negatives="own", **settings)
    assert len(model.hacl_suffix) == (1 if "prompt" not in settings else len(tokenizer.tokenize(PROMPT["prompt"])))
    batch = batch_of(mini, model, tokenizer, range(7), mixed)
    want = reference(model, batch)
    if CHECKPOINTING[checkpointing]:
        # As LLaVA's train() does it under --gradient_checkpointing.
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    got = run(model, batch)
    assert model.hacl_fused is fused
    assert_same(got, want)
    assert sorted(got[-1]) == sorted(
        [f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")]
        + [f"hacl_head.{m}.{k}" for m in ("text", "visual") for k in ("weight", "bias")]
        + ["hacl_head.log_temperature"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"negatives": "batch"},
        {"head_dim": 0, "learnable_temperature": False, "temperature": 0.2},
        {"weight": 0.1, "num_hallucinated": -1},
        {"centre": True, "head_dim": 0},
        {"representation": "prompt", "prompt": "all", "centre": True, "head_dim": 0},
    ],
    ids=str,
)
def test_step_with_other_settings(mini, mixed, settings):
    model, tokenizer = load(mini, **settings)
    batch = batch_of(mini, model, tokenizer, range(7), mixed)
    got, want = run(model, batch), reference(model, batch)
    assert model.hacl_fused
    assert_same(got, want)


@pytest.mark.parametrize("settings", [{}, PROMPT], ids=["eos", "prompt, centred"])
def test_controls_suffix_that_sees_the_caption_or_stands_elsewhere_fails(mini, mixed, monkeypatch, settings):
    model, tokenizer = load(mini, **settings)
    batch = batch_of(mini, model, tokenizer, range(7), mixed)
    want = reference(model, batch)
    assert_same(run(model, batch), want)
    hidden, S = fused.hidden, len(model.hacl_suffix)

    def of_the_suffix(change):
        def broken(model, embeds, sees, positions):
            if len(sees) == 7:  # the generation pass, where the suffix stands behind all
                sees, positions = sees.clone(), positions.clone()
                change(sees, positions)
            return hidden(model, embeds, sees, positions)

        return broken

    def sees_one_column_more(sees, positions):
        sees[:, 0, -1] |= torch.arange(sees.shape[-1])[None] == positions[:, -S, None]

    def wrong_position(sees, positions):
        positions[:, -1] += 1

    def does_not_see_itself(sees, positions):
        sees[:, 0, -1, -S:-1] = False

    for change in (sees_one_column_more, wrong_position, *([does_not_see_itself] if S > 1 else [])):
        monkeypatch.setattr(fused, "hidden", of_the_suffix(change))
        model.hacl_head.centre = settings and type(model.hacl_head.centre)() or None  # as before a first step
        with pytest.raises(AssertionError):
            assert_same(run(model, batch), want)
        monkeypatch.setattr(fused, "hidden", hidden)
    if S > 1:  # another tokenization behind the image than behind the captions
        model.hacl_suffix = [*reversed(model.hacl_suffix)]
        with pytest.raises(AssertionError):
            assert_same(run(model, batch), want)
        model.hacl_suffix.reverse()
    model.hacl_head.centre = settings and type(model.hacl_head.centre)() or None
    assert_same(run(model, batch), want)


def test_released_visual_row_without_bos(mini, records):
    with_bos, tokenizer = load(mini, fused=False)
    without, _ = load(mini, fused=False, visual_bos=False)
    batch = batch_of(mini, with_bos, tokenizer)
    a, b = run(with_bos, batch), run(without, batch)
    assert abs(a[1] - b[1]) < 1e-6 and abs(a[2] - b[2]) > 1e-4
    # By hand: [image tokens, EOS] for every row.
    lm, head = without.get_model(), without.hacl_head
    images = lm.mm_projector(lm.get_vision_tower()(batch["images"]))
    eos = lm.embed_tokens(torch.full((6, 1), tokenizer.eos_token_id))
    e_v = lm(inputs_embeds=torch.cat([images, eos], 1), use_cache=False, return_dict=True)[0][:, -1]
    rows = [lm(input_ids=ids[None], return_dict=True)[0][0, -1] for ids in texts_of(batch)[0]]
    v, t, tau = head(e_v, torch.stack(rows))
    want = torch.nn.functional.cross_entropy(t @ v.T / tau, torch.arange(6))
    assert abs(want.item() - b[3]) < 1e-5


def test_without_captions_it_is_stock_llava_bit_for_bit(mini):
    ours, tokenizer = load(mini)
    stock, _ = load(mini, stock=True)
    batch = batch_of(mini, ours, tokenizer)
    plain = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "images")}
    a, b = ours(**plain), stock(**plain)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits)
    a.loss.backward(), b.loss.backward()
    ga, gb = gradients(ours), gradients(stock)
    assert set(ga) == set(gb) and all(torch.equal(ga[k], gb[k]) for k in gb)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_the_contrast_begins_late_rises_and_ends(mini, fused):
    """Outside, a step is one pass of stock LLaVA's rows, and leaves heads, centre and queue as they were."""
    model, tokenizer = load(mini, weight=2.0, start=0.3, end=0.9, fused=fused, centre=True, queue_size=8)
    batch, passes = batch_of(mini, model, tokenizer, range(4)), []
    stock = {k: v for k, v in batch.items() if k != "texts"}
    loss = model(**stock).loss
    loss.backward()
    want = gradients(model)
    run(model, batch)  # in which `fused` is checked
    model.get_model().register_forward_hook(lambda m, args, out: passes.append(out[0].shape[:2]))
    for progress, weight in ((0.0, 0), (0.3, 0), (0.4, 1), (0.5, 2), (0.89, 2), (0.9, 0), (1.0, 0)):
        model.hacl_progress = progress
        kept = model.hacl_head.centre.state() | model.hacl_loss.queue_state()
        passes.clear()
        total, lm, *contrast, got = run(model, batch)
        assert lm == pytest.approx(loss.item(), abs=1e-5)
        assert total == pytest.approx(lm + weight * sum(contrast) / 2, abs=1e-5)
        now = model.hacl_head.centre.state() | model.hacl_loss.queue_state()
        same = now.keys() == kept.keys() and all(torch.equal(x, kept[k]) for k, x in now.items() if torch.is_tensor(x))
        assert (len(passes) == 1) == same == (not contrast) == (not model.hacl_config.ramp(progress))
        if same:
            assert not any(g.any() for n, g in got.items() if "hacl_head" in n)
            assert all(relative(got[n], g) < 1e-4 for n, g in want.items())
    model.eval()  # evaluation measures it at any time
    assert len(run(model, batch)) == 5


def test_the_centre():
    """A batch without captions is none; images' mean follows what training makes of them, captions' comes to stay."""
    centre, (v, t) = representation.Centre(), torch.randn(2, 4, 3)
    all_, none = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    for mask in (none, all_, none):
        centre.update(v, t, mask, moves=False)
    torch.testing.assert_close(centre.means, torch.stack([v.mean(0), t.mean(0)]))
    centre.update(v + 1, t + 2, all_, moves=False)
    torch.testing.assert_close(centre.means, torch.stack([v.mean(0) + 0.5, t.mean(0) + 1]))
    for _ in range(centre.STEPS - 2):
        centre.update(v + 4, t + 2, all_, moves=False)
    torch.testing.assert_close(centre.means, torch.stack([v.mean(0) + 4, t.mean(0) + 1.98]), atol=1e-3, rtol=0)
    centre.update(v + 14, t + 102, all_, moves=False)
    torch.testing.assert_close(centre.means, torch.stack([v.mean(0) + 5, t.mean(0) + 1.98]), atol=1e-3, rtol=0)
    centre.update(v, t + 101.98, all_, moves=True)
    torch.testing.assert_close(centre.means[1], t.mean(0) + 2.98, atol=1e-3, rtol=0)

    taken = representation.Centre()
    taken.load(centre.state())
    assert torch.equal(taken.means, centre.means) and taken.steps == centre.steps
    older = centre.state()  # of captions alone, which images had too
    del older["image_centre"]
    taken.load(older)
    assert torch.equal(taken.means, centre.means[[1, 1]]) and not older


def test_text_pass_has_a_graph_only_when_the_llm_trains(mini):
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer)

    def graphs():
        return {passes.texts(model, batch["texts"]).requires_grad for passes in (fused, representation)}

    assert graphs() == {False}
    model.enable_input_require_grads()  # LLaVA's hook under gradient checkpointing must not bring the graph back
    assert graphs() == {False}
    model.get_model().layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert graphs() == {True}
    # and then the whole step still equals the plain one
    assert_same(run(model, batch), reference(model, batch))


def test_gradient_through_texts_of_a_trained_llm(mini):
    model, tokenizer = load(mini, frozen=False, head_dim=0)
    batch = batch_of(mini, model, tokenizer, range(4))
    got, want = run(model, batch), reference(model, batch)
    assert_same(got, want)
    assert any("embed_tokens" in name for name in got[4])


def test_lm_head_sees_text_only_and_vision_tower_runs_once(mini):
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer)
    model(**batch)
    seen, towers = [], []
    model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape[:2]))
    model.get_vision_tower().register_forward_hook(lambda m, i, o: towers.append(1))
    model(**batch)
    assert seen == [(6, batch["input_ids"].shape[1] - 1)] and towers == [1]


def test_row_cut_inside_or_behind_its_image(mini, records):
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(4))
    lengths = batch["attention_mask"].sum(1) + 8  # nine visual tokens for one placeholder
    # Cut behind the image: the longest rows lose words of their caption, and every row still counts.
    model.config.tokenizer_model_max_length = int(lengths.min()) + 1
    model(**batch)
    assert model._hacl_sums[7] == 4
    # Cut inside the image: no row is whole, and the step still runs.
    model.config.tokenizer_model_max_length = 6
    model.reset_hacl_metrics()
    loss = model(**batch).loss
    assert model._hacl_sums[7] == 0 and torch.isfinite(loss)
    loss.backward()
    assert not model.hacl_head.visual.weight.grad.any()


def test_two_images_in_a_row_are_masked(mini):
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(3))
    batch["input_ids"][1, 2] = -200
    batch["images"] = torch.cat([batch["images"], batch["images"][:1]])
    model(**batch)
    assert model._hacl_sums[7] == 2


def test_batch_without_any_image_gives_zero_contrast_and_all_gradients(mini, records):
    rows = copy.deepcopy(records[:3])
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = "Say something."
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(3), rows)
    loss = model(**batch).loss
    figures = model.hacl_metrics()
    assert figures["loss_i2t"] == figures["loss_t2i"] == 0 and "retrieval_accuracy" not in figures
    loss.backward()  # every trained parameter takes part, or DDP and ZeRO would wait for ever
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_dataset_without_hallucinated_captions(mini, records):
    rows = [{k: v for k, v in r.items() if k != "hallucinated_captions"} for r in records[:4]]
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(4), rows)
    assert len(batch["texts"]["end"]) == 4
    assert_same(run(model, batch), reference(model, batch))


def test_literal_eos_in_a_caption(mini, records):
    rows = copy.deepcopy(records[:3])
    rows[0]["conversations"][1]["value"] = "a </s> in the middle"
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(3), rows)
    assert (texts_of(batch)[0][0] == 2).sum() == 2
    assert_same(run(model, batch), reference(model, batch))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_self_check(mini, implementation, dtype):
    model, tokenizer = load(mini, dtype=dtype, attn_implementation=implementation)
    model.hacl_head.float()
    batch = batch_of(mini, model, tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = model(**batch).loss
    said = [str(w.message) for w in caught if "HACL" in str(w.message)]
    assert model.hacl_fused is (implementation == "sdpa")
    if implementation == "sdpa":
        assert not said
    else:
        assert len(said) == 1 and "'eager'" in said[0] and "separate passes" in said[0]
        with torch.no_grad():
            lm, i2t, t2i = naive_step(model, batch)
        assert abs(loss - (lm + (i2t + t2i) / 2)) < (1e-5 if dtype == torch.float32 else 0.1)


def test_flash_attention_becomes_sdpa(mini):
    with pytest.warns(UserWarning, match="flash_attention_2 is replaced by sdpa"):
        model, tokenizer = load(mini, attn_implementation="flash_attention_2")
    model(**batch_of(mini, model, tokenizer))
    assert model.config._attn_implementation == "sdpa" and model.hacl_fused


def test_temperature_stays_in_its_range_and_comes_back(mini):
    model, tokenizer = load(mini)
    head = model.hacl_head
    with torch.no_grad():
        head.log_temperature.fill_(-20.0)
    tau = head(torch.ones(1, 64), torch.ones(1, 64))[2]
    assert abs(tau.item() - 0.001) < 1e-7
    tau.backward()  # asks for a lower temperature still
    assert head.log_temperature.grad.item() == 0
    (-head(torch.ones(1, 64), torch.ones(1, 64))[2]).backward()
    assert head.log_temperature.grad.item() < 0


def test_queue_over_steps(mini):
    model, tokenizer = load(mini, queue_size=7)
    batch = batch_of(mini, model, tokenizer, range(4))
    first, second = run(model, batch), run(model, batch)
    assert second[2] > first[2] + 0.1  # the same captions, now also in the queue
    assert int(model.hacl_loss.queue_state()["mask"].sum()) == 7


@pytest.mark.parametrize("stock", [False, True])
def test_float16_on_disk_is_trained_in_float32(mini, tmp_path, stock):
    """LLaVA's train() asks for None without --bf16; transformers 5 would take what the file holds."""
    from hacl_llava import compat
    from hacl_llava.model import HaclLlavaLlamaForCausalLM

    cls = compat.LlavaLlamaForCausalLM if stock else HaclLlavaLlamaForCausalLM
    cls.from_pretrained(str(mini.llm), torch_dtype=torch.float16).save_pretrained(tmp_path)
    for asked, got in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = cls.from_pretrained(str(tmp_path), cache_dir=None, attn_implementation=None, torch_dtype=asked)
        assert {p.dtype for p in model.parameters()} == {got}


def test_saved_checkpoint_is_stock(mini, tmp_path):
    import safetensors.torch

    ours, tokenizer = load(mini)
    stock, _ = load(mini, stock=True)
    ours(**batch_of(mini, ours, tokenizer))
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    a, b = (safetensors.torch.load_file(tmp_path / n / "model.safetensors") for n in ("ours", "stock"))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in b)
    a, b = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("ours", "stock"))
    assert a["architectures"] == ["LlavaLlamaForCausalLM"] and a.pop("hacl")["negatives"] == "own"
    assert a == b


def test_mistral_twin(mini):
    import transformers

    from hacl_llava.config import HaclConfig
    from hacl_llava.model import HaclLlavaMistralForCausalLM

    base, tokenizer = load(mini)
    config = HaclLlavaMistralForCausalLM.config_class(
        vocab_size=base.config.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tokenizer_padding_side="right",
    )  # fmt: skip
    assert isinstance(config, transformers.MistralConfig)
    torch.manual_seed(0)
    model = HaclLlavaMistralForCausalLM(config).train()
    model.get_model().mm_projector = copy.deepcopy(base.get_model().mm_projector)
    model.get_model().vision_tower = base.get_vision_tower()
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    model.enable_hacl(HaclConfig(), [tokenizer.eos_token_id])
    batch = batch_of(mini, base, tokenizer)
    assert_same(run(model, batch), reference(model, batch))
    assert model.hacl_fused


def test_forward_takes_llavas_arguments_and_one_more(mini):
    import inspect

    from hacl_llava import compat

    model, tokenizer = load(mini)
    ours, stock = (inspect.signature(c.forward).parameters for c in (type(model), compat.LlavaLlamaForCausalLM))
    assert list(ours) == [*stock, "texts"]
    batch = batch_of(mini, model, tokenizer)
    given = [batch.get(name) for name in list(stock)[1:]]
    assert torch.equal(model(*given, texts=batch["texts"]).loss, model(**batch).loss)  # by place as by name
    with pytest.raises(ValueError, match="got no images"):
        model(**{k: v for k, v in batch.items() if k != "images"})


def test_left_padding_is_refused(mini):
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer)
    model.config.tokenizer_padding_side = "left"
    with pytest.raises(ValueError, match="right padding"):
        model(**batch)


@pytest.mark.parametrize("fused", [True, False])
def test_every_batch_takes_the_same_passes(mini, mixed, fused):
    """Whatever a batch holds, the modules that hold weights run in one order: ranks under ZeRO-3 must not part."""
    mixed.append(copy.deepcopy(mixed[4]))  # a second record without an image
    model, tokenizer = load(mini, fused=fused)
    batches = {
        "images": (0, 2),
        "no hallucinated captions": (1, 1),
        "one with, one without an image": (0, 4),
        "no image at all": (4, 7),
    }
    seen = {}
    model(**batch_of(mini, model, tokenizer, (0, 1), mixed))  # with the self-check
    order = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    for name, indices in batches.items():
        order.clear()
        model(**batch_of(mini, model, tokenizer, indices, mixed)).loss.backward()
        seen[name] = tuple(order)
    for hook in hooks:
        hook.remove()
    assert len(set(seen.values())) == 1, seen
    assert seen["images"].count("model.layers.1.mlp.up_proj") == (2 if fused else 3)


def test_a_step_does_not_repeat_what_others_say_once(mini):
    """Under reentrant checkpointing the text pass has nothing to differentiate and says nothing of it; and a warning
    of another library that is shown once per place stays so."""
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})

    def somebody_else():
        warnings.warn("once per place", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", append=True)
        for _ in range(3):
            somebody_else()
            model(**batch).loss.backward()
    said = [str(w.message) for w in caught]
    assert said.count("once per place") == 1
    assert not any("None of the inputs" in s for s in said)
