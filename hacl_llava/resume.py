"""What a stage-1 checkpoint holds beside the projector, which checkpoints are whole, and stopping in time."""

import atexit
import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import __version__
from .common.files import locked
from .compat import order_is_of_one_rank
from .config import HaclConfig, HaclError, on_first_rank

MANIFEST = "files.json"  # of a checkpoint: what belongs to it, with sizes
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, saved; the same command goes on


# --- what trains and its optimizer: the same file whatever the engine and the number of ranks ------------------------


def optimizers(optimizer: Any, parameters: Iterable[torch.nn.Parameter]) -> tuple[Any, torch.optim.Optimizer]:
    """(ZeRO's optimizer or None, the one that makes the step) of what a Trainer calls its optimizer.

    Raises:
        HaclError: DeepSpeed's does not show the state of these parameters.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    base = getattr(inner, "optimizer", None)
    if base is None:
        return None, inner
    if not all(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters):
        raise HaclError(
            f"DeepSpeed's {type(inner).__name__} does not show its state, so stage 1 could not be resumed; give a "
            "configuration with ZeRO stage 1, 2 or 3 (zero_configs/)."
        )
    return inner, base


def _numbers(state):
    return {k: float(v) for k, v in state.items() if not torch.is_tensor(v) or v.dim() == 0}


def save_training_state(
    path: str | os.PathLike,
    model: torch.nn.Module,
    optimizer: Any,
    settings: dict[str, Any],
    scaler: dict[str, Any] | None = None,
    write: bool = True,
) -> None:
    """Write what trains in float32, with the optimizer's state of it, by name; every rank must call it.

    Args:
        path: of the safetensors file. model: unwrapped. optimizer: the Trainer's, after a step.
        settings: a dict for json, of what `differences` compares. scaler: of fp16's loss, a dict of numbers.
        write: whether this rank writes.

    Raises:
        HaclError: under a DeepSpeed optimizer that does not show its state.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    zero, base = optimizers(optimizer, [p for _, p in named])
    tensors, steps = {}, {}
    if zero is not None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        _link(zero)
        flat = next((state for state in base.state.values() if state), {})
        keys = sorted(k for k, v in flat.items() if torch.is_tensor(v) and v.dim() > 0)
        for name, p in named:  # collectives: the same order on every rank
            tensors[f"param/{name}"] = safe_get_full_fp32_param(p)
            tensors |= {f"{key}/{name}": safe_get_full_optimizer_state(p, key) for key in keys}
            steps[name] = _numbers(flat)
    else:
        for name, p in named:
            state = base.state.get(p, {})
            tensors[f"param/{name}"] = p.detach()
            tensors |= {f"{k}/{name}": v for k, v in state.items() if torch.is_tensor(v) and v.dim() > 0}
            steps[name] = _numbers(state)
    if write:
        metadata = {"settings": settings, "numbers": steps, "scaler": scaler, "hacl_llava": __version__}
        metadata = {"format": "pt"} | {k: json.dumps(v) for k, v in metadata.items()}
        save_file({k: v.detach().cpu().float().contiguous() for k, v in tensors.items()}, path, metadata=metadata)


def load_training_state(
    path: str | os.PathLike, model: torch.nn.Module, optimizer: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Restore `save_training_state`, on any number of ranks and under any of its engines; every rank must call it.

    Returns:
        ``(settings, scaler)`` as they were given.

    Raises:
        HaclError: the file is damaged, or of a model of which something else trains.
    """
    try:
        with safe_open(path, "pt") as file:
            saved = {k: json.loads(v) for k, v in file.metadata().items() if k != "format"}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)
        numbers = saved["numbers"]
    except (OSError, SafetensorError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise HaclError(f"{path}: cannot be read ({error}); remove its folder, and the one before is used.") from None
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    own = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in named.items()}
    got = {k.removeprefix("param/"): tuple(v.shape) for k, v in tensors.items() if k.startswith("param/")}
    if own != got:
        other = sorted(n for n in own.keys() | got.keys() if own.get(n) != got.get(n))
        raise HaclError(
            f"{path}: is of a run in which something else was trained ({other[0]}: {got.get(other[0], 'not')} then, "
            f"{own.get(other[0], 'not')} now); give the flags of that run, or another --output_dir."
        )
    zero, base = optimizers(optimizer, named.values())
    of = {n: {k.split("/")[0]: v for k, v in tensors.items() if k.split("/", 1)[1] == n} for n in named}
    if any(len(found) > 1 for found in of.values()):
        _make_optimizer_state(zero, base)
    with torch.no_grad():
        for name, p in named.items():
            _set(p, of[name], zero, base)
            if zero is None and not numbers[name]:
                base.state.pop(p, None)
        last = max(numbers.values(), key=lambda n: n.get("step", 0))
        own = {} if zero is not None else {id(p): numbers[n] for n, p in named.items()}
        for p, state in base.state.items():
            for key, value in own.get(id(p), last).items():
                if torch.is_tensor(state.get(key)):
                    state[key].fill_(value)
                else:
                    state[key] = int(value) if value.is_integer() else value
        for group in base.param_groups:
            if "step" in group:  # where fused optimizers count
                group["step"] = int(last.get("step", 0))
    return saved["settings"], saved["scaler"]


def _make_optimizer_state(zero, base):
    # A step on gradients of zero, by the optimizer itself: it knows best what it keeps, of which type and where. What
    # the step changes is overwritten next.
    zero3 = hasattr(zero, "_set_fp32_optimizer_param_groups")
    if zero3:
        zero._set_fp32_optimizer_param_groups()
    flat = [p for group in base.param_groups for p in group["params"]]
    kept = [p.grad for p in flat]
    for p in flat:
        p.grad = torch.zeros_like(p)
    base.step()
    for p, grad in zip(flat, kept):
        p.grad = grad
    if zero3:
        zero._clear_fp32_optimizer_param_groups()
    elif zero is not None:
        _link(zero)


def _link(zero):
    # ZeRO-1 and -2 say which parameter a piece of the optimizer's state belongs to, but do so when the first of their
    # groups has made its first step, which leaves the others without (DeepSpeed 0.19).
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set(p, found, zero, base):
    value = found["param"].to(p.device)
    if zero is None:
        p.data.copy_(value)
        for key, tensor in found.items():
            if key != "param":
                kept = base.state[p].get(key)
                base.state[p][key] = tensor.to(p.device) if kept is None else kept.copy_(tensor)
        return
    # What the model computes with is set too: it is made from the float32 copy only by the next step.
    import deepspeed
    from deepspeed import utils

    if not hasattr(p, "ds_id"):
        utils.safe_set_full_fp32_param(p, value)
        for key, tensor in found.items():
            if key != "param":
                utils.safe_set_full_optimizer_state(p, tensor.to(p.device), key)
        p.data.copy_(value)
        return
    # ZeRO-3's setters for the whole want as many elements as ranks; the local ones take the padded part of a rank.
    size, rank, ranks = p.ds_tensor.numel(), dist.get_rank(p.ds_process_group), dist.get_world_size(p.ds_process_group)
    for key, tensor in found.items():
        tensor = tensor.to(p.device).flatten()
        part = torch.cat([tensor, tensor.new_zeros(size * ranks - len(tensor))])[size * rank :][:size]
        if key == "param":
            utils.safe_set_local_fp32_param(p, part)
        else:
            utils.safe_set_local_optimizer_state(p, part, key)
    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        if dist.get_rank() == 0:
            p.data.copy_(value)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One sentence for each thing that a resumed run cannot have as it was.

    Args:
        then, now: settings of the saved and of this run: dicts with ranks, global_batch, records, seed, hacl.
    """
    found = []
    if then["ranks"] != now["ranks"]:
        found.append(f"{then['ranks']} ranks then, {now['ranks']} now: random states are not restored")
        if 1 in (then["ranks"], now["ranks"]) and order_is_of_one_rank():
            found[-1] += ", and one rank alone draws another order of the data"
    if then["global_batch"] != now["global_batch"]:
        found.append(
            f"{then['global_batch']} records a step then, {now['global_batch']} now: the position in the data is "
            "counted in steps, so some records are seen twice in this epoch, or not at all"
        )
    if then["records"] != now["records"]:
        found.append(f"{then['records']} records then, {now['records']} now: the order of the data is another")
    if then["seed"] != now["seed"]:
        found.append(f"--seed {then['seed']} then, {now['seed']} now: the order of the data is another")
    a, b = then["hacl"] or {}, now["hacl"] or {}
    if a and b:  # a setting that an older version did not have was what its default is
        a, b = ({**HaclConfig().to_dict(), **x} for x in (a, b))
    found += [f"hacl_{k} {a.get(k)} then, {b.get(k)} now" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return found


def say(*lines: str) -> None:
    """Warnings on standard error, by the first rank."""
    if on_first_rank():
        for line in lines:
            print(f"warning: {line}.", file=sys.stderr, flush=True)


# --- which checkpoints are whole --------------------------------------------------------------------------------------


def write_manifest(folder: str | os.PathLike) -> None:
    """Write what a finished checkpoint consists of into it, and see everything to the disk."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1))
    for path in (*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush(path)


def flush(path: str | os.PathLike) -> None:
    """Have the system write a file, or a folder's entries, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Folders named checkpoint-N, by N."""
    found = [(int(m[1]), p) for p in Path(folder).glob("checkpoint-*") if (m := re.fullmatch(r".*-(\d+)", p.name))]
    return [p for _, p in sorted(found) if p.is_dir()]


def broken(folder: str | os.PathLike) -> str | None:
    """Why a checkpoint cannot be used; None for one that is whole.

    One without `MANIFEST`, which others wrote, counts as whole when its trainer_state.json and safetensors can be
    opened.
    """
    folder, name = Path(folder), MANIFEST
    try:
        if (folder / MANIFEST).exists():
            for name, size in json.loads((folder / MANIFEST).read_text()).items():
                if not (folder / name).is_file():
                    return f"{name} is missing"
                if (got := (folder / name).stat().st_size) != size:
                    return f"{name} has {got} bytes of {size}"
            return None
        name = "trainer_state.json"
        json.loads((folder / name).read_text())
        for path in folder.glob("*.safetensors"):
            name = path.name
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        return f"{name} cannot be read ({error})"
    return None


def ranks_of(folder: str | os.PathLike) -> int | None:
    """How many ranks saved a checkpoint, by their random states; None if that cannot be told."""
    folder = Path(folder)
    return len(list(folder.glob("rng_state_*.pth"))) or (1 if (folder / "rng_state.pth").exists() else None)


def last_whole(folder: str | os.PathLike, look: bool = True) -> str | None:
    """The newest checkpoint that is whole on all machines, or None; says which are passed over. All ranks call it.

    Args:
        folder: of the run. look: whether this rank looks (one a machine is enough).
    """
    found = {p.name: broken(p) for p in checkpoints(folder)} if look else None
    views = [found]
    if dist.is_initialized():
        views = [None] * dist.get_world_size()
        dist.all_gather_object(views, found)
    views = [v for v in views if v is not None]
    bad = {name: why for v in reversed(views) for name, why in v.items() if why}
    names = [n for n in views[0] if all(n in v and not v[n] for v in views)]
    last = names[-1] if names else None
    number = (lambda name: int(name.rsplit("-", 1)[1])) if names else None
    passed = [n for n in bad if last is None or number(n) > number(last)]
    instead = f"{last} is used" if last else "training starts from the beginning"
    say(*(f"{Path(folder) / n}: passed over, {bad[n]}; {instead}" for n in passed))
    return last and str(Path(folder) / last)


# --- stopping ---------------------------------------------------------------------------------------------------------


class Stopped(SystemExit):
    """A signal ended the run in good order; the process ends with `EXIT_STOPPED`."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 as a wish to save and stop, from `catch` to the end of the process.

    Before the first step there is nothing to save, and they end the process at once; after the last they are ignored,
    for what is left is short. A second SIGINT ends the process at once, whatever it does.
    """

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.phase, self.received, self._before = "starting", None, {}

    def catch(self) -> None:
        """Take the signals from now on, as before the first step."""
        self.phase, self.received = "starting", None
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._handle) for number in self.CAUGHT}
            atexit.register(_end_workers)
            read, self._wake = os.pipe()
            os.set_blocking(self._wake, False)
            signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def release(self) -> None:
        """Put back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(-1)
            os.close(self._wake)
        self._before = {}

    def _watch(self, pipe):
        # `_handle` has to wait while the main thread is in a collective, for ever if it is that of a rank which died:
        # DeepSpeed's launcher then sends SIGTERM to one rank after the other, and waits 30 seconds for each.
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGTERM and _a_rank_is_gone():
                os._exit(128 + signal.SIGTERM)
            if self.phase == "starting":
                time.sleep(5)
                if self.phase == "starting":
                    os._exit(EXIT_STOPPED)
        os.close(pipe)

    def _handle(self, number, frame):
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.phase == "starting":
            raise Stopped(f"{name} before the first step: there is nothing to save")
        if self.phase == "training" and self.received is None:
            self.received = name


def _a_rank_is_gone():
    """Whether the launcher of this process (DeepSpeed's says how many it started here) has fewer children by now."""
    try:
        parent = os.getppid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False
    return len(children) < int(os.environ.get("LOCAL_SIZE", 0))


SIGNALS = Signals()


class StopInStep(TrainerCallback):
    """Ends the training, with a checkpoint, after a step on which all ranks agree, once any of them got a signal.

    They agree by a sum over all ranks that runs on the CPU beside the next step, so nobody waits for it.
    """

    def __init__(self) -> None:
        self.stopped = None
        self._group = self._asked = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something to save."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        SIGNALS.phase = "training"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the other ranks, and stop where one was told to."""
        wish = SIGNALS.received is not None
        if self._group is not None:
            mine, wish = wish, self._answer()
            if not wish:
                flag = torch.tensor([float(mine)])
                self._asked = (flag, dist.all_reduce(flag, group=self._group, async_op=True))
        if wish:
            self.stopped = SIGNALS.received or "a signal to another rank"
            control.should_save = control.should_training_stop = True

    def _answer(self, *timeout):
        if self._asked is None:
            return False
        flag, work = self._asked
        self._asked = None
        work.wait(*timeout)
        return bool(flag.item())

    def close(self) -> None:
        """The training is over, or failed: nobody asks any more."""
        SIGNALS.phase = "ending"
        with contextlib.suppress(RuntimeError):  # of a rank that is gone
            self._answer(timedelta(seconds=10))


def in_worker(init: Callable[[int], Any] | None, number: int) -> None:
    """Starts a data worker that outlives the first SIGTERM: a launcher sends it to the whole tree of processes, and
    the step that is to be finished needs data."""

    def once(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.set_wakeup_fd(-1)  # the pipe is shared with the rank
    signal.signal(signal.SIGTERM, once)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if init is not None:
        init(number)


def _end_workers():
    # Where a rank fails, Python ends its data workers by one SIGTERM, which they outlive, and would wait for ever.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would complain of their end
    for child in multiprocessing.active_children():
        child.kill()


# --- before the first step --------------------------------------------------------------------------------------------


LOCK = contextlib.ExitStack()  # of the run's folder; the process's end frees it too


def lock_folder(folder: str | os.PathLike) -> None:
    """Hold the folder of a run, by its first rank; a second run that is given it is refused, and told who holds it.

    Raises:
        HaclError: another run holds it. The launcher then ends the other ranks, as for any rank that fails.
    """
    if on_first_rank():
        LOCK.enter_context(locked(Path(folder) / ".lock", str(folder), "give another --output_dir"))


def check_folder(folder: str | os.PathLike, flag: str = "--output_dir") -> None:
    """Make the folder that a flag names, and write a file into it and remove it again.

    Raises:
        HaclError: that does not work.
    """
    probe = Path(folder) / f".probe-{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        flush(probe)
        probe.unlink()
    except OSError as error:
        raise HaclError(f"{flag} {folder}: cannot be written ({error.strerror}); give another.") from None
