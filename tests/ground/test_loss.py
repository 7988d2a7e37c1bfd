"""The loss against loops in float64, its limits, its queue."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_loss

from hacl_llava.loss import HaclLoss, gather_features, hacl_loss


def features(B, K, P=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=g, dtype=dtype), dim=-1)

    return unit(B, P), unit(B, P), unit(B, K, P) if K else None


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 5),
    K=st.integers(0, 3),
    Q=st.integers(0, 4),
    negatives=st.sampled_from(["own", "batch", "global"]),
    seed=st.integers(0, 10**6),
)
def test_equals_loops_with_missing_captions_and_queue(B, K, Q, negatives, seed):
    v, t, h = features(B, K, seed=seed)
    g = torch.Generator().manual_seed(seed)
    h_mask = torch.rand(B, K, generator=g) > 0.4 if K else None
    mask = torch.rand(B, generator=g) > 0.3
    q_v, q_t, _ = features(Q, 0, seed=seed + 1)
    q_mask = torch.rand(Q, generator=g) > 0.3
    queue = (q_v, q_t, q_mask) if Q else None
    got = hacl_loss(v, t, h, h_mask, mask, 0.1, negatives, queue=queue)
    want = naive_loss(v, t, h, h_mask, mask, 0.1, negatives, queue=(q_v[q_mask], q_t[q_mask]))
    torch.testing.assert_close(got["loss_i2t"], want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["loss_t2i"], want[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["loss"], (want[0] + want[1]) / 2, rtol=1e-12, atol=1e-12)


def test_control_own_and_batch_differ():
    # The comparison above can tell the two apart: with the wrong candidates it would fail.
    v, t, h = features(4, 2)
    own, batch = naive_loss(v, t, h, negatives="own")[0], naive_loss(v, t, h, negatives="batch")[0]
    assert abs(own - batch) > 1e-3
    assert abs(hacl_loss(v, t, h, negatives="own")["loss_i2t"] - batch) > 1e-3


@pytest.mark.parametrize("negatives", ["own", "batch", "global"])
def test_gradient(negatives):
    v, t, h = (x.requires_grad_() for x in features(3, 2))
    h_mask = torch.tensor([[True, False], [True, True], [False, False]])
    mask = torch.tensor([True, True, False])
    queue = (*features(3, 0, seed=7)[:2], torch.tensor([True, False, True]))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def both(v, t, h, tau):
        out = hacl_loss(v, t, h, h_mask, mask, tau, negatives, queue=queue)
        return out["loss_i2t"], out["loss_t2i"]

    assert torch.autograd.gradcheck(both, (v, t, h, tau))


def test_without_hallucinations_it_is_clip():
    v, t, h = features(6, 2)
    logits = v @ t.T / 0.07
    target = torch.arange(6)
    clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(hacl_loss(v, t)["loss"], clip)
    none = torch.zeros(6, 2, dtype=torch.bool)
    torch.testing.assert_close(hacl_loss(v, t, h, none)["loss"], clip)
    assert abs(hacl_loss(v, t, h)["loss"] - clip) > 1e-3  # control: with them it is not


def test_a_masked_row_is_as_if_it_were_not_there():
    v, t, h = features(5, 2)
    mask = torch.tensor([True, True, False, True, True])
    for negatives in ("own", "batch", "global"):
        with_it = hacl_loss(v, t, h, None, mask, negatives=negatives)
        without = hacl_loss(v[mask], t[mask], h[mask], negatives=negatives)
        for key in ("loss_i2t", "loss_t2i", "retrieval_correct", "retrieval_total", "closer_to_true", "closer_total"):
            torch.testing.assert_close(with_it[key], without[key])


def test_all_rows_masked_is_zero_with_zero_gradient():
    v, t, h = (x.requires_grad_() for x in features(3, 1, dtype=torch.float32))
    out = hacl_loss(v, t, h, None, torch.zeros(3, dtype=torch.bool))
    out["loss"].backward()
    assert out["loss"] == 0 and out["retrieval_total"] == 0
    for x in (v, t, h):
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_figures():
    v = torch.eye(3)
    t = torch.eye(3)[[0, 1, 1]]  # images 1 and 2 share a caption: a tie for the one, wrong for the other
    h = torch.stack([torch.eye(3)[1], torch.eye(3)[1], torch.eye(3)[2]])[:, None]
    out = hacl_loss(v, t, h)
    assert (out["retrieval_correct"], out["retrieval_total"]) == (1, 3)
    # image 0: true 1 > 0; image 1: a tie, which is not closer; image 2: 0 < 1
    assert (out["closer_to_true"], out["closer_total"]) == (1, 3)
    collapsed = torch.ones(3, 3) / 3**0.5
    assert hacl_loss(collapsed, collapsed)["retrieval_correct"] == 0


def test_float32_under_autocast():
    v, t, h = features(4, 1, P=64, dtype=torch.float32)
    want = hacl_loss(v, t, h)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = hacl_loss(v, t, h)["loss"]
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert hacl_loss(v.bfloat16(), t.bfloat16(), h.bfloat16())["loss"].dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 4, 5, 10])
@pytest.mark.parametrize("K", [0, 2])
def test_queue_holds_the_last_features_whatever_its_size(size, K):
    loss = HaclLoss("own", queue_size=size)
    past_v, past_t = [], []
    for step in range(5):
        v, t, h = features(4, K, seed=step)
        mask = torch.tensor([True, step % 2 == 0, True, True])
        got = loss(v, t, h, None, mask)
        keep_v, keep_t = [x for x in past_v[-size:] if x is not None], [x for x in past_t[-size:] if x is not None]
        want = naive_loss(v, t, h, None, mask, queue=(keep_v, keep_t))
        torch.testing.assert_close(got["loss_i2t"], want[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got["loss_t2i"], want[1], rtol=1e-10, atol=1e-10)
        past_v += [x if m else None for x, m in zip(v, mask)]
        past_t += [x if m else None for x, m in zip(t, mask)]


def test_queue_is_left_alone_in_evaluation_and_travels():
    loss = HaclLoss("own", queue_size=6)
    assert loss.queue_state() == {}
    for step in range(3):
        loss(*features(4, 1, seed=step))
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in loss.queue_state().items()}
    probe = features(4, 1, seed=9)
    loss.eval()
    want = loss(*probe)["loss"]
    assert all(torch.equal(loss.queue_state()[k], state[k]) for k in ("images", "texts", "mask"))
    other = HaclLoss("own", queue_size=6).eval()
    assert abs(other(*probe)["loss"] - want) > 1e-3
    other.load_queue_state(state)
    torch.testing.assert_close(other(*probe)["loss"], want)
    assert not list(loss.parameters()) and not loss.state_dict()
    with pytest.raises(ValueError, match="6 features, this loss wants 7"):
        HaclLoss("own", queue_size=7).load_queue_state(state)


def test_queue_carries_no_gradient():
    loss = HaclLoss("own", queue_size=8)
    first = [x.requires_grad_() for x in features(4, 0)[:2]]
    loss(*first)
    loss(*features(4, 0, seed=1)[:2])["loss"]
    assert not any(x.requires_grad for x in loss._queue)


def test_errors_say_what_was_got():
    v, t, h = features(3, 2)
    with pytest.raises(ValueError, match="'all', allowed is one of own, batch, global"):
        hacl_loss(v, t, negatives="all")
    with pytest.raises(ValueError, match=r"\[3, 5\] and text_features \[2, 5\]"):
        hacl_loss(v, t[:2])
    with pytest.raises(ValueError, match=r"\[2, 2, 5\] must be \[B, K, P\]"):
        hacl_loss(v, t, h[:2])
    with pytest.raises(ValueError, match="queue_size is -1"):
        HaclLoss(queue_size=-1)


def test_gather_without_ranks_is_the_tensor_itself():
    v = features(3, 0)[0]
    assert gather_features(v) is v
