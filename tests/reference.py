"""Plain references, written to be read rather than to be fast: loops over images, one pass per text, no padding."""

import math

import torch
import torch.nn.functional as F
from conftest import texts_of


def naive_loss(v, t, h=None, h_mask=None, mask=None, tau=0.07, negatives="own", ranks=1, queue=None):
    """(loss_i2t, loss_t2i) by the paper's formulas, in Python loops, over the joined batch of ``ranks`` equal shares.

    Args as `hacl_llava.loss.hacl_loss`; ``queue`` is (images, texts), lists of feature vectors.
    """
    B = len(v)
    share = B // ranks
    rows = [i for i in range(B) if mask is None or mask[i]]
    K = 0 if h is None else h.shape[1]
    tau = float(tau) if not torch.is_tensor(tau) else tau
    q_images, q_texts = queue or ([], [])

    def f(a, b):
        return ((a * b).sum() / tau).exp()

    i2t = t2i = 0
    for i in rows:
        candidates = [t[j] for j in rows if j != i] + list(q_texts)
        for j in rows:
            allowed = {"own": j == i, "batch": j // share == i // share, "global": True}[negatives]
            candidates += [h[j, k] for k in range(K) if allowed and (h_mask is None or h_mask[j, k])]
        true = f(v[i], t[i])
        i2t = i2t - (true / (true + sum(f(v[i], c) for c in candidates))).log()
        images = [v[j] for j in rows if j != i] + list(q_images)
        t2i = t2i - (true / (true + sum(f(t[i], c) for c in images))).log()
    count = max(len(rows), 1)
    zero = v.sum() * 0
    return zero + i2t / count, zero + t2i / count


def naive_step(model, batch):
    """The released code's four passes, row by row and with gradient everywhere: (loss_lm, loss_i2t, loss_t2i).

    Rows of text have no padding, the visual row is [BOS, image tokens, EOS], logits are computed at every position.
    """
    lm, tower = model.get_model(), model.get_vision_tower()
    embed, head = lm.embed_tokens, model.hacl_head

    def last_state(rows):
        states = lm(inputs_embeds=rows[None], use_cache=False, return_dict=True)[0]
        return states[0, -1]

    suffix = torch.tensor(model.hacl_suffix)
    images = lm.mm_projector(tower(batch["images"]))
    nll, tokens, e_v, e_t, e_h, h_mask = 0.0, 0, [], [], [], []
    captions, hallucinated = texts_of(batch)
    K = len(hallucinated[0])
    for b in range(len(batch["input_ids"])):
        ids = batch["input_ids"][b][batch["attention_mask"][b]]
        labels = batch["labels"][b][batch["attention_mask"][b]]
        where = (ids == -200).nonzero()[:, 0].tolist()
        if where:
            p = where[0]
            row = torch.cat([embed(ids[:p]), images[b], embed(ids[p + 1 :])])
            labels = torch.cat([labels[:p], torch.full((len(images[b]),), -100), labels[p + 1 :]])
        else:
            row = embed(ids)
        states = lm(inputs_embeds=row[None], use_cache=False, return_dict=True)[0][0]
        logits = model.lm_head(states)
        keep = labels[1:] != -100
        nll = nll + F.cross_entropy(logits[:-1][keep], labels[1:][keep], reduction="sum")
        tokens += int(keep.sum())
        if not where or captions[b] is None:
            continue
        e_v.append(last_state(torch.cat([embed(ids[:p]), images[b], embed(suffix)])))
        e_t.append(last_state(embed(captions[b])))
        e_h += [last_state(embed(suffix if x is None else x)) for x in hallucinated[b]]
        h_mask.append([x is not None for x in hallucinated[b]])
    e_v, e_t, e_h = torch.stack(e_v), torch.stack(e_t), torch.stack(e_h) if K else None
    of_images, centre = (x.mean(0).detach() if model.hacl_config.centre else 0 for x in (e_v, e_t))  # of a first step
    v, t = head.visual(e_v - of_images), head.text(e_t - centre)
    v, t = F.normalize(v, dim=-1), F.normalize(t, dim=-1)
    h = F.normalize(head.text(e_h - centre), dim=-1).view(len(v), K, -1) if K else None
    h_mask = torch.tensor(h_mask)
    tau = head.log_temperature.clamp(math.log(0.001), math.log(0.5)).exp()[0]
    i2t, t2i = naive_loss(v, t, h, h_mask, None, tau, model.hacl_config.negatives)
    return nll / tokens, i2t, t2i
