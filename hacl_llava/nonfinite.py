"""Batches whose loss or gradient is not finite stay away from the weights and are named; a run without labels stops."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .common import jsonl
from .config import HaclError

FILE = "nonfinite.jsonl"
BLANK = 100  # micro-batches without a single finite loss, after which going on is of no use
UNLABELLED = 20  # micro-batches of each rank without a single label, from the start, after which it is of no use either
_KEPT = 1000  # flags kept on the device at most, where nothing is ever logged or saved


class NonFiniteGuard:
    """Puts zero in the place of the gradient of a micro-batch whose loss or gradient is not finite.

    Each rank judges its own micro-batch; the mean over ranks is then that of the others' gradients, and of zeros. What
    it finds stays on the device until `read`, so the host never waits for it in a step, and finite gradients pass bit
    for bit. A gradient is known to be bad only when it is there: what the same backward pass added to parameters
    before it stays. With fp16's loss scaling only the loss is looked at: a gradient that overflows is the scaler's.

    Args:
        policy: ``"stop"`` or ``"skip"``. folder: gets ``nonfinite.jsonl``. scaled: whether fp16's loss scaler runs.
        name: from the index of a record to a dict that names it, for messages and the file.
    """

    def __init__(
        self,
        policy: str,
        folder: str | os.PathLike,
        scaled: bool = False,
        name: Callable[[int], dict[str, Any]] = lambda index: {"index": index},
    ) -> None:
        self.policy, self.path, self.scaled, self.name = policy, Path(folder) / FILE, scaled, name
        self.found = 0  # micro-batches of all ranks, since the start
        self.lost, self.seen = 0, 0  # without a finite loss, and all: of all ranks, since `take_counts`
        self._blank = 0
        self._looked = self._labelled = 0  # micro-batches of all ranks, and those that had a label
        self._pending = []
        self._current = self._flags = None
        self._watched = False

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Hook the gradients of those that train; once, whatever wraps the model."""
        if not self._watched:
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.register_hook(self._hook)
        self._watched = True

    def begin(self, step: int, records: torch.Tensor | None = None) -> None:
        """A micro-batch begins. step: as the log counts. records: ``[B]`` indices on any device, or None."""
        if len(self._pending) >= _KEPT:
            self.read()
        self._current, self._flags = (step, records), None

    def see(self, loss: torch.Tensor, own: torch.Tensor | None = None, labelled: torch.Tensor | None = None) -> None:
        """Between forward and backward.

        Args:
            loss: any shape. own: 0-d bool, whether all was finite before ranks mixed. labelled: 0-d bool, whether the
                micro-batch has a label; None: it has.
        """
        if self._current is not None:
            bad = ~torch.isfinite(loss.detach()).all()
            # not finite: the loss, a gradient, what this rank itself put in; and whether there was a label
            no = torch.zeros_like(bad)
            self._flags = torch.stack([bad, no, bad if own is None else ~own, ~no if labelled is None else labelled])

    def end(self, loss: torch.Tensor) -> torch.Tensor:
        """After backward. Returns the loss, with 0 for one that is not finite."""
        if self._flags is not None:
            self._pending.append((*self._current, self._flags))
        self._current = self._flags = None
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def _hook(self, grad):
        if self._flags is None or not grad.numel():
            return None
        if not self.scaled:
            self._flags[1].logical_or_(~torch.isfinite(torch.linalg.vector_norm(grad.detach(), math.inf)))
        return grad.masked_fill(self._flags[:2].any(), 0)

    def take_counts(self) -> tuple[int, int]:
        """``(lost, seen)`` since the last call: micro-batches of all ranks without a finite loss, and all."""
        counts = self.lost, self.seen
        self.lost = self.seen = 0
        return counts

    def read(self, final: bool = False) -> None:
        """Look at what was kept since the last call; every rank must call it at the same moment.

        Args:
            final: the training is over.

        Raises:
            HaclError: on all ranks together: with the policy ``"stop"``, something was not finite; with ``"skip"``,
                nothing has been for `BLANK` micro-batches; there was no label in the first `UNLABELLED`, or in all.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        flags = torch.stack([flags for *_, flags in pending])
        bad = flags[:, :2].any(1)
        counts = torch.stack([flags[:, 0].sum(), bad.sum(), flags[:, 3].sum()])
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks > 1:
            dist.all_reduce(counts)
        lost, found, labelled = counts.tolist()
        self.lost, self.seen = self.lost + lost, self.seen + len(pending) * ranks
        self._looked, self._labelled = self._looked + len(pending) * ranks, self._labelled + labelled
        if not self._labelled and (final or self._looked >= UNLABELLED * ranks):
            raise HaclError(
                f"none of the {self._looked} batches so far had a label, so nothing was learnt: every row is masked, "
                "or cut before its answer. Look at --version (the template that the tokenizer was made for), at "
                "--model_max_length (an image takes some hundred tokens of it) and at the data (hacl-llava check-data "
                "--tokenizer)."
            )
        if not found:
            self._blank = 0
            return
        self.found += found
        entries = [
            {
                "step": step,
                "rank": dist.get_rank() if ranks > 1 else 0,
                "what": "loss" if of_loss else "gradient",
                "began_here": own or not of_loss,
                "records": [self.name(i) for i in records.tolist()] if records is not None else [],
            }
            for (step, records, _), (of_loss, of_gradient, own, _) in zip(pending, flags.tolist())
            if of_loss or of_gradient
        ]
        if ranks > 1:
            everyone = [None] * ranks
            dist.all_gather_object(everyone, entries)
            entries = sorted((e for part in everyone for e in part), key=lambda e: e["step"])
        self._report(entries)
        self._blank = self._blank + len(pending) if found == len(pending) * ranks else 0
        if self.policy == "stop":
            raise HaclError(
                f"{_words(entries)}. It never reached the weights. Look at these records (hacl-llava check-data), leave"
                " them out and give the same command again, which goes on from the last checkpoint; --hacl_nonfinite "
                f"skip goes on past such batches. All of them are in {self.path}."
            )
        if self._blank >= BLANK:
            raise HaclError(
                f"the last {self._blank} batches of each rank were all not finite; {_words(entries)}. That is not the "
                "data: look at the learning rate, at the dtype, and at the weights that the run began with."
            )

    def _report(self, entries):
        """One line each in the file, one in all on the terminal; by the first rank."""
        if dist.is_initialized() and dist.get_rank():
            return
        print(f"HACL: {_words(entries)}; {self.found} batches left out so far ({self.path})", flush=True)
        try:
            jsonl.append(self.path, entries)
        except OSError as error:
            print(f"HACL: {self.path}: cannot be written ({error.strerror}).", flush=True)


def _words(entries):
    """The first batch in which it began; the others by their number."""
    first = next((e for e in entries if e["began_here"]), entries[0])
    names = [f"{r['index']} (id {r['id']!r})" if r.get("id") is not None else str(r["index"]) for r in first["records"]]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    of = f", records {shown}" if names else ""
    more = f", and in {len(entries) - 1} more batches" if len(entries) > 1 else ""
    return f"step {first['step']}, rank {first['rank']}{of}: the {first['what']} is not finite{more}"
