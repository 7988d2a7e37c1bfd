"""How many decoder layers gradient checkpointing computes again in the backward pass (``--hacl_checkpoint_layers``).

A layer that is computed again keeps its input alone; one that is not keeps what its backward pass needs, some fifteen
times as much, and saves a forward pass. The result is the same. The first N layers are the ones computed again: the
backward pass comes to them last, when what the others kept is free. Where memory is short, the others are "lean": of
``down(act(gate) * up)`` they keep gate and up, and compute act(gate) again. That takes no matrix product, and is a
sixth of what a layer with frozen weights keeps.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.llama.modeling_llama import LlamaMLP

from .common.weights import first_line
from .compat import recompute_layers
from .config import HaclError, on_first_rank

RESERVE = 0.1  # of the memory at hand, which ``auto`` leaves: the allocator's gaps, and what is not measured


def recompute(llm: Any, count: int, lean: bool | None = None) -> None:
    """Let gradient checkpointing, which is on, compute the first ``count`` decoder layers again, and no others.

    It holds for forward passes from now on, until gradient checkpointing is switched on anew.

    Args:
        llm: with its decoder ``layers``, as LLaVA's ``get_model()`` gives it.
        lean: whether the others are lean; None: if some layers are computed again. Those whose MLP is not
            transformers' own stay as they are.
    """
    recompute_layers(llm, count)
    lean = 0 < count < len(llm.layers) if lean is None else lean
    for i, layer in enumerate(llm.layers):
        _set_lean(layer.mlp, lean and i >= count)


def _set_lean(mlp, on):
    if hasattr(vars(mlp).get("forward"), "_hacl_lean"):
        del mlp.forward
    if not on or not _can_be_lean(mlp):
        return

    def product(gate, up):
        return mlp.act_fn(gate) * up

    def forward(x):
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if torch.is_grad_enabled() and gate.requires_grad:
            return mlp.down_proj(checkpoint(product, gate, up, use_reentrant=False, preserve_rng_state=False))
        return mlp.down_proj(product(gate, up))

    forward._hacl_lean = True
    mlp.forward = forward


def _can_be_lean(mlp):
    stock = type(mlp).forward is LlamaMLP.forward and "forward" not in vars(mlp)
    return stock and getattr(mlp.config, "pretraining_tp", 1) <= 1


class Memory(NamedTuple):
    """Bytes of a device: what tensors take now, the most they took since `forget_peak`, and what they could."""

    now: int
    peak: int
    limit: int


def memory(device: torch.device) -> Memory | None:
    """None for a device that cannot be asked, as a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)  # what the context and other processes take is in neither of the two
    limit = free + torch.cuda.memory_reserved(device)
    return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), limit)


def forget_peak(device: torch.device) -> None:
    """`Memory.peak` begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class KeptBytes:
    """Bytes that a module's forward passes keep for the backward pass, beside its parameters and what it is given.

    Measured from the tensors that autograd saves while this is attached, on any device; the values stay as they are.

    Attributes:
        most: of any micro-batch so far, all its passes together. spared: of these, what a lean layer would not keep.
    """

    def __init__(self, module: torch.nn.Module) -> None:  # a decoder layer
        self.most = self.spared = 0
        self._total, self._activations, self._inside = 0, 0, None
        before = module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._hooks = [before, module.register_forward_hook(self._end, always_call=True)]
        if _can_be_lean(module.mlp):
            self._hooks.append(module.mlp.act_fn.register_forward_hook(self._of_activation))

    def next(self) -> None:
        """Another micro-batch begins."""
        self._total = self._activations = 0

    def remove(self) -> None:
        """Measure no more."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module, args, kwargs):
        given = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
        given += [x for pair in kwargs.values() if isinstance(pair, tuple) for x in pair if torch.is_tensor(x)]
        seen = {_storage(x) for x in given}
        parameters = list(module.parameters())

        def pack(tensor):
            # Asked each time: ZeRO-3 gathers parameters while the module runs.
            if _storage(tensor) not in seen and _storage(tensor) not in {_storage(p) for p in parameters}:
                seen.add(_storage(tensor))
                self._total += tensor.untyped_storage().nbytes()
                self.most = max(self.most, self._total)
            return tensor.detach()  # the tensor itself, where it is an output, would keep its own graph alive

        self._inside = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._inside.__enter__()

    def _of_activation(self, module, args, out):
        if out.requires_grad and self._inside is not None:
            self._activations += out.untyped_storage().nbytes()
            self.spared = max(self.spared, self._activations)

    def _end(self, *_):
        if self._inside is not None:
            self._inside.__exit__(None, None, None)
        self._inside = None


def _storage(tensor):
    return tensor.untyped_storage()._cdata


class Measured(NamedTuple):
    """A first step. Bytes: before and after it (with the optimizer's state), at its peak, at hand, kept by a layer, and
    of these those that a lean layer spares."""

    before: int
    after: int
    peak: int
    limit: int
    kept: int
    spared: int
    tokens: int  # of its largest micro-batch, rows times columns of the first pass through the LLM

    def needed(self, tokens: int, layers: int) -> tuple[int, bool]:
        """How many of ``layers`` have to be computed again for a micro-batch of ``tokens``, and whether the others are
        lean: where all can keep all that they would, they do."""
        scale = tokens / self.tokens
        room = (1 - RESERVE) * self.limit - self.after - (self.peak - self.before) * scale
        if room < 0:
            return layers, False

        def count(kept):  # one layer was kept when the peak was measured
            return max(layers - 1 - int(room // max(kept * scale, 1)), 0)

        if not count(self.kept) or not self.spared:
            return count(self.kept), False
        return count(self.kept - self.spared), True


class Recomputation:
    """Sets which layers are computed again, for each micro-batch of a training.

    ``auto``: in the first optimizer step it is all but the last layer, which takes no more memory than all, for the
    backward pass begins with that layer. From the step's peak and what that layer kept, it is as few as the largest
    micro-batch so far lets, with `RESERVE` left; before a larger one runs, it is set anew. Each rank decides for
    itself, but under ZeRO-3, where a layer that runs again gathers its weights from all ranks, they agree on the most.

    Args:
        model: LLaVA's, or a LoRA around it. setting: as `RunSettings.checkpoint_layers`.
        device: on which it trains. alone: no other process and no engine takes part in a step, so that it may be run
            again.

    Raises:
        HaclError: the setting is more than there are layers.
    """

    def __init__(self, model: Any, setting: str, device: torch.device, alone: bool) -> None:
        self.model = getattr(model, "get_base_model", lambda: model)()
        self.setting, self.device, self.alone = setting, device, alone
        self.count: int | None = None  # of the first layers; None: as the Trainer has set it, all
        self.lean: bool | None = None  # whether the others are; None: as `recompute` has it
        self.measured: Measured | None = None  # once the first step is over
        self._kept: KeptBytes | None = None  # in the first step
        self._before = self._first_step = 0
        self._tokens = self._planned = 0  # the most so far; those that `count` was set for
        self._new_batch, self._hook = False, None
        if setting.isdigit() and int(setting) > len(self._llm.layers):
            raise HaclError(
                f"hacl_checkpoint_layers is {setting}, allowed is all, auto or a number from 0 to the LLM's "
                f"{len(self._llm.layers)} layers."
            )

    @property
    def _llm(self):
        return self.model.get_model()

    def step(self, number: int, run: Callable[[], Tensor]) -> Tensor:
        """``run()``, one micro-batch, forward and backward, of optimizer step ``number``.

        Where memory runs short, all layers are computed again from then on. If it is ``alone``, this micro-batch is
        run again, as if nothing had been.

        Raises:
            HaclError: memory ran short, and the micro-batch cannot be run again.
        """
        if self.setting == "all":
            return run()
        self._begin(number)
        layers = len(self._llm.layers)
        if self.count is None or self.count == layers:
            return run()
        put_back = self._keep() if self.alone else None
        try:
            return run()
        except torch.cuda.OutOfMemoryError as error:
            if put_back is None:
                raise HaclError(
                    f"step {number}: memory ran short ({first_line(error, 120)}) while {self.count} of "
                    f"{layers} layers were computed again, and a step of several processes, or of DeepSpeed, cannot be "
                    "repeated by one of them. Give the same command with --hacl_checkpoint_layers all, or a number "
                    f"above {self.count}; it goes on from the last checkpoint, where there is one."
                ) from None
        # Outside, for the error holds the tensors of what failed.
        print(
            f"HACL checkpointing: memory ran short in step {number} with {self.count} of {layers} layers computed "
            f"again; from now on all {layers} are. The step is repeated.",
            flush=True,
        )
        self._stop_measuring()
        self._set(layers)
        self.setting = "all"
        put_back()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return run()

    def _set(self, count, lean=None):
        self.count, self.lean = count, lean
        recompute(self._llm, count, lean)

    def _keep(self):
        """What a micro-batch changes; returns a function that puts it back."""
        grads = [(p, None if p.grad is None else p.grad.clone()) for p in self.model.parameters() if p.requires_grad]
        put_back = getattr(self.model, "hacl_keep", lambda: lambda: None)()

        def all_of_it():
            put_back()
            for p, grad in grads:
                p.grad = grad

        return all_of_it

    # --- auto ---------------------------------------------------------------------------------------------------------

    def _begin(self, number):
        self._new_batch = True
        if self.count is None:  # not earlier: the Trainer switches checkpointing on when it trains
            if self.setting == "auto":
                self._start(number)
            else:
                self._set(int(self.setting))
        elif self._kept is not None:
            self._kept.next()
            if number > self._first_step:
                self._measure()

    def _start(self, number):
        found = memory(self.device)
        if found is None:
            if on_first_rank():
                print(f"HACL checkpointing: auto on {self.device.type}, whose memory cannot be asked: all.", flush=True)
            self.setting = "all"
            return
        forget_peak(self.device)
        self._before, self._first_step = found.now, number
        self._kept = KeptBytes(self._llm.layers[-1])
        self._hook = self._llm.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        self._set(len(self._llm.layers) - 1, lean=False)

    def _measure(self):
        now, peak, limit = memory(self.device)
        self.measured = Measured(self._before, now, peak, limit, self._kept.most, self._kept.spared, self._tokens)
        self._kept.remove()
        self._kept = None

    def _stop_measuring(self):
        for measuring in (self._kept, self._hook):
            if measuring is not None:
                measuring.remove()
        self._kept = self._hook = None

    def _before_pass(self, llm, args, kwargs):
        """Of each micro-batch the first pass with a graph, which is its largest."""
        if not (self._new_batch and llm.training and torch.is_grad_enabled()):
            return
        self._new_batch = False
        given = next(x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if x is not None)
        self._tokens = max(self._tokens, given.shape[0] * given.shape[1])
        if self.measured is not None:
            self._plan(given.device)

    def _plan(self, device):
        together = is_deepspeed_zero3_enabled() and dist.is_initialized()
        if self._tokens == self._planned and not together:
            return
        layers = len(self._llm.layers)
        plan = self.measured.needed(self._tokens, layers)
        if together:
            most = torch.tensor(plan, dtype=torch.long, device=device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            plan = int(most[0]), bool(most[1])
        first, self._planned = not self._planned, self._tokens
        if (first or plan != (self.count, self.lean)) and on_first_rank():
            found, (needed, lean) = self.measured, plan
            print(
                f"HACL checkpointing: {needed} of {layers} layers are computed again"
                f"{', and the activation in the MLP of the others' if lean else ''}: for the {self._tokens:,} tokens "
                f"of the largest batch so far; in the first step a layer kept {_gib(found.kept)} for "
                f"{found.tokens:,}, and the peak was {_gib(found.peak)}, of {_gib(found.limit)} at hand.",
                flush=True,
            )
        if plan != (self.count, self.lean):
            self._set(*plan)


def _gib(count):
    return f"{count / 2**30:.1f} GiB"
