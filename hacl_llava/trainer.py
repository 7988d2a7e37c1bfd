"""LLaVA's trainer with checkpoints that resume; with HACL, its losses in the log and its heads beside them."""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from . import __version__
from .common.files import atomic
from .common.weights import save_tokenizer
from .compat import STATE_FILE, LLaVATrainer, end_in_order, savable_generation_config
from .config import HaclError, RunSettings, on_first_rank
from .nonfinite import NonFiniteGuard
from .recomputation import Recomputation
from .representation import HEAD_FILE, IGNORE_INDEX, read_head
from .resume import (
    StopInStep,
    Stopped,
    broken,
    checkpoints,
    differences,
    flush,
    in_worker,
    last_whole,
    load_training_state,
    optimizers,
    ranks_of,
    save_training_state,
    say,
    write_manifest,
)
from .text_cache import TextCache

UNFINISHED = "unfinished"
EPOCH_START = "rng_epoch.pt"


def save_head(model: torch.nn.Module, folder: str | os.PathLike, write: bool = True) -> Path | None:
    """Write heads and temperature to ``folder/hacl_head.safetensors``; every rank must call it (ZeRO-3 gathers).

    The file's metadata holds the HACL settings and the version. Returns the path, or None where nothing is written.
    """
    import safetensors.torch
    from llava.train.train import get_mm_adapter_state_maybe_zero_3

    state = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), ["hacl_head."])
    if not write or not state:
        return None
    state = {k[k.index("hacl_head.") + len("hacl_head.") :]: v.contiguous() for k, v in state.items()}
    if model.hacl_head.centre is not None:
        state |= model.hacl_head.centre.state()
    path = Path(folder) / HEAD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "hacl": json.dumps(model.config.hacl), "hacl_llava": __version__}
    metadata["suffix"] = json.dumps(model.hacl_suffix)
    with atomic(path) as part:
        safetensors.torch.save_file(state, part, metadata=metadata)
    return path


class ResumableTrainer(LLaVATrainer):
    """LLaVA's trainer, whose checkpoints appear whole or not at all and from which the same command goes on.

    A checkpoint is written to ``output_dir/unfinished`` and renamed to ``checkpoint-N`` when all ranks have written
    theirs; so whatever interrupts it, the last ``checkpoint-*`` is whole. ``--save_total_limit`` counts those; others
    are left alone. Those of stage 1 hold, beside the projector, what `save_training_state` writes.

    After SIGTERM, SIGINT or SIGUSR1 all ranks save after the same step, and `train` raises `resume.Stopped`.
    """

    _writing = False
    _resumes = None
    _epoch_start = None  # torch's random state when an epoch began: LLaVA's sampler by lengths draws its order from it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        savable_generation_config(self.model)
        self._stop = StopInStep()
        self.add_callback(self._stop)
        self.add_callback(_EpochStart(self))
        settings = getattr(self.args, "hacl_run", None) or RunSettings()
        if version := getattr(self.args, "hacl_version", None):  # LLaVA itself notes its template nowhere
            self.model.config.hacl_version = version
        self.guard = NonFiniteGuard(settings.nonfinite, self.args.output_dir, self.args.fp16, self._name_record)
        alone = self.args.world_size == 1 and self.args.n_gpu <= 1 and not self.is_deepspeed_enabled
        self.recomputation = Recomputation(self.model, settings.checkpoint_layers, self.args.device, alone)
        self.args.logging_nan_inf_filter = False  # the guard's work, for which the host need not wait in each step
        if is_deepspeed_zero3_enabled():
            # LLaVA makes the projector, and peft its adapters, in float32; ZeRO-3 shards one dtype, and keeps float32
            # copies of its own.
            dtype = self.model.get_input_embeddings().weight.dtype
            for p in self.model.parameters():
                if p.requires_grad and p.dtype != dtype:
                    p.data = p.data.to(dtype)

    def _name_record(self, index):
        record = getattr(self.train_dataset, "list_data_dict", {index: {}})[index]
        number = getattr(self.train_dataset, "numbers", {index: index})[index]  # in the file
        return {"index": number, **{key: record[key] for key in ("id", "image") if key in record}}

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's, under the eyes of the guard."""
        self.guard.watch(self.model.parameters())
        step, records, stock = self.state.global_step + 1, inputs.pop("record_indices", None), super().training_step

        def once():
            self.guard.begin(step, records)
            return self.guard.end(stock(model, inputs, *args, **kwargs))

        return self.recomputation.step(step, once)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The Trainer's, with 0 for a batch without labels."""
        labels = inputs.get("labels")
        found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        labelled = (labels[:, 1:] != IGNORE_INDEX).any() if labels is not None else None
        if getattr(self.model, "hacl_head", None) is None and labelled is not None:
            # The mean over no label at all, as of a batch of masked rows, is NaN in LLaVA.
            loss = found[0] if return_outputs else found
            loss = loss.where(labelled, torch.zeros_like(loss))
            found = (loss, *found[1:]) if return_outputs else loss
        loss = found[0] if return_outputs else found
        self.guard.see(loss, getattr(self.model, "hacl_own_finite", None), labelled)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with what the guard found."""
        if "loss" in logs or "train_loss" in logs:  # on all ranks
            self.guard.read(final="train_loss" in logs and not self._stop.stopped)
        if "loss" in logs:
            lost, seen = self.guard.take_counts()
            if lost:  # they count as 0 in the Trainer's mean, which is of all
                logs["loss"] = round(logs["loss"] * seen / (seen - lost), 4) if lost < seen else float("nan")
            if self.guard.found:
                logs["nonfinite"] = self.guard.found
        return super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The Trainer's, from the last whole checkpoint; raises `resume.Stopped` after a signal."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(self.args.output_dir, self.is_local_process_zero())
        self._resumes = resume_from_checkpoint
        if resume_from_checkpoint and on_first_rank():
            print(f"resuming from {resume_from_checkpoint}", flush=True)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._stop.close()
        if self._stop.stopped and self.state.global_step < self.state.max_steps:
            end_in_order()
            step = self.state.global_step
            raise Stopped(
                f"{self._stop.stopped} after step {step}: saved {Path(self.args.output_dir) / f'checkpoint-{step}'}; "
                "the same command goes on from there"
            )
        return result

    def _stage1(self):
        return getattr(self.args, "tune_mm_mlp_adapter", False)

    def _batch(self):
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The Trainer's, with workers that outlive the first SIGTERM."""
        loader = super().get_train_dataloader()
        for own in (loader, getattr(loader, "base_dataloader", None)):  # accelerate's, and the one in it
            if getattr(own, "num_workers", 0):
                own.worker_init_fn = partial(in_worker, own.worker_init_fn)
        return loader

    def _get_output_dir(self, trial=None):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writing else folder

    def _moves(self):
        each = self.args.save_on_each_node
        return self.is_local_process_zero() if each else self.is_world_process_zero()

    @contextlib.contextmanager
    def _unfinished(self, folder):
        """A folder that all ranks write to; when they are through, the first one goes on alone inside ``with``."""
        part = Path(folder) / UNFINISHED
        if self._moves():
            shutil.rmtree(part, ignore_errors=True)
        _wait()
        try:
            yield part
        except (OSError, RuntimeError, SafetensorError) as error:
            # Where json and safetensors hand on what the system said, torch has two words of its own for it.
            of_disk = re.search("PytorchStreamWriter|inline_container|No space|os error", str(error))
            if not isinstance(error, OSError) and not of_disk:
                raise
            shutil.rmtree(part, ignore_errors=True)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise HaclError(
                f"{part}: cannot be written ({reason}). What was saved before is whole; mend that, and give the same "
                "command again."
            ) from None
        finally:
            self._writing = False

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        self.guard.read()  # nothing is saved that was not looked at
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with self._unfinished(folder) as part:
            self._writing = True
            super()._save_checkpoint(model, trial, *args, **kwargs)
            self._save_beside(part / name)
            _wait()
            if self._moves():
                write_manifest(part / name)
        if self._moves():
            # What goes is renamed first too: a kill while it is removed must not leave a half of it.
            if (folder / name).exists():
                os.replace(folder / name, part / "replaced")
            os.replace(part / name, folder / name)
            flush(folder)
            whole = [p for p in checkpoints(folder) if not broken(p)]
            for old in whole[: -(self.args.save_total_limit or len(whole))]:
                os.replace(old, part / old.name)
            shutil.rmtree(part, ignore_errors=True)
        _wait()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        config = self.model.config
        added = getattr(config, "mm_use_im_start_end", False) or getattr(config, "mm_use_im_patch_token", False)
        if self.args.should_save and not added and not getattr(self.args, "tune_mm_mlp_adapter", False):
            save_tokenizer(None, output_dir or self.args.output_dir, config._name_or_path)

    def _save_beside(self, folder):
        # DeepSpeed keeps all that trains; without it, what trains beside a LoRA would be lost on resuming.
        if getattr(self.args, "lora_enable", False) and not self.is_deepspeed_enabled and self.args.should_save:
            torch.save(_trained_beside_lora(self.model), folder / "non_lora_trainables.bin")
        if self._stage1():
            self.store_flos()
            folder.mkdir(parents=True, exist_ok=True)  # by whichever rank is here first
            path, write = folder / STATE_FILE, self.args.should_save
            save_training_state(path, self.model, self.optimizer, self._settings(), self._scaler_state(), write)
            self._save_rng_state(str(folder))
            if write:
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
                self.state.save_to_json(str(folder / "trainer_state.json"))

    def _settings(self):
        hacl = getattr(self.model, "hacl_config", None)
        return {
            "ranks": self.args.world_size,
            "global_batch": self._batch(),
            "records": len(self.train_dataset),
            "seed": self.args.seed,
            "hacl": hacl and hacl.to_dict(),
        }

    def _scaler_state(self):
        if self.accelerator.scaler is not None:
            return self.accelerator.scaler.state_dict()
        kept = vars(getattr(self.optimizer.optimizer, "loss_scaler", object)) if self.args.fp16 else {}
        return {k: v for k, v in kept.items() if isinstance(v, (bool, int, float))}

    def _restore_scaler(self, scaler):
        if self.accelerator.scaler is not None and "scale" in scaler:
            self.accelerator.scaler.load_state_dict(scaler)
        elif hasattr(self.optimizer.optimizer, "loss_scaler"):
            own = vars(self.optimizer.optimizer.loss_scaler)
            own.update({k: v for k, v in scaler.items() if k in own})

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not (Path(checkpoint) / STATE_FILE).exists():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        settings, scaler = load_training_state(Path(checkpoint) / STATE_FILE, self.model, self.optimizer)
        say(*differences(settings, self._settings()))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr()):
            group["lr"] = rate
        self._restore_scaler(scaler)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.args.should_save and self._epoch_start is not None:
            torch.save(self._epoch_start, Path(output_dir) / EPOCH_START)

    def _load_rng_state(self, checkpoint):
        # At the start of an epoch, or once its order is drawn, but never between.
        drawn = self._epoch_start is not None and not torch.equal(self._epoch_start, torch.get_rng_state())
        if checkpoint is not None and ranks_of(checkpoint) in (None, self.args.world_size):
            super()._load_rng_state(checkpoint)
        if not drawn:
            self._epoch_start = torch.get_rng_state()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if (Path(resume_from_checkpoint) / STATE_FILE).exists():
            return  # with the optimizer, once it is made
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        beside = Path(resume_from_checkpoint) / "non_lora_trainables.bin"
        if beside.exists():
            self.model.load_state_dict(torch.load(beside, map_location="cpu", weights_only=True), strict=False)

    def save_state(self) -> None:
        """The Trainer's, once a LoRA's last file, if it is of an earlier run, is gone."""
        # The one call that LLaVA's train() makes on the trainer after training, before it writes a LoRA's files one by
        # one, this one last: while it is missing, nobody takes the folder for finished.
        if self._moves():
            (Path(self.args.output_dir) / "non_lora_trainables.bin").unlink(missing_ok=True)
        super().save_state()

    def save_finished(self, folder: str | os.PathLike, write: Callable[[str], Any]) -> None:
        """LLaVA's last step, into the run's folder: file by file only once all are written, config.json last.

        Args:
            folder: of the run. write: called on every rank with the folder to write to.
        """
        folder = Path(folder)
        with self._unfinished(folder) as part:
            write(str(part))
            _wait()
        if self._moves():
            written = sorted(part.iterdir(), key=lambda f: (f.name == "config.json", f.suffix == ".json"))
            if any(file.name.startswith(("model", "pytorch_model")) for file in written):
                kinds = ("*.index.json", "model*.safetensors", "pytorch_model*.bin", "adapter_*")  # of an earlier run
                for stale in (file for kind in kinds for file in folder.glob(kind)):
                    stale.unlink()
            (folder / "config.json").unlink(missing_ok=True)
            for file in written:
                os.replace(file, folder / file.name)
            part.rmdir()
        _wait()


class _EpochStart(TrainerCallback):
    """A resumed epoch starts with the random state with which it first started, so that its order is the same."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer._stage1():  # before the first step, not at the first checkpoint
            optimizers(self.trainer.optimizer, [p for p in self.trainer.model.parameters() if p.requires_grad])

    def on_epoch_begin(self, args, state, control, **kwargs):
        kept = Path(self.trainer._resumes or "") / EPOCH_START
        if self.trainer._resumes and kept.exists():
            torch.set_rng_state(torch.load(kept, weights_only=True))
        self.trainer._resumes = None
        self.trainer._epoch_start = torch.get_rng_state()


def _wait():
    if dist.is_initialized():
        dist.barrier()


def _trained_beside_lora(model):
    return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


class HaclTrainer(ResumableTrainer):
    """`ResumableTrainer` that logs ``loss_lm``, ``loss_i2t``, ``loss_t2i``, ``temperature``, ``retrieval_accuracy`` and
    ``closer_to_true`` (see `HaclMixin.hacl_metrics`) and saves the heads beside an unchanged ``mm_projector.bin``."""

    _said = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if folder := (getattr(self.args, "hacl_run", None) or RunSettings()).text_cache:
            self.model.hacl_text_cache = TextCache(folder)

    def _say_what_runs(self):
        """One line, from the objects that run rather than from the flags that asked for them."""
        engine, model, config = self.model_wrapped, self.model, self.model.hacl_config
        stage = getattr(engine, "zero_optimization_stage", lambda: None)()
        trained, held = {}, {}
        for name, p in model.named_parameters():
            part = next((x for x in ("hacl_head", "mm_projector", "vision_tower") if f"{x}." in name), "LLM")
            held.setdefault(part, str(p.dtype).removeprefix("torch."))
            if p.requires_grad:
                trained[part] = trained.get(part, 0) + getattr(p, "ds_numel", p.numel())
        zero = "" if stage is None else f" ZeRO-{stage}"
        ranks = f"{self.args.world_size} rank{'s' if self.args.world_size > 1 else ''} on {self.args.device.type}"
        print(
            f"HACL run: engine {type(engine).__name__}{zero}, {ranks}, {'fused' if model.hacl_fused else 'separate'} "
            f"passes, negatives {config.negatives}, queue {config.queue_size}, weight {config.weight}; trained: "
            + ", ".join(f"{part} {n:,}" for part, n in sorted(trained.items()))
            + "; held in: "
            + ", ".join(f"{part} {dtype}" for part, dtype in sorted(held.items())),
            flush=True,
        )

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """`ResumableTrainer`'s; after the first, one line says what runs."""
        # Not on what PEFT wraps it in: of that, names are only read through.
        inner = getattr(self.model, "get_base_model", lambda: self.model)()
        inner.hacl_progress = self.state.global_step / max(self.state.max_steps, 1)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._said and self.is_world_process_zero():
            self._say_what_runs()
        self._said = True
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`ResumableTrainer`'s, with HACL's figures."""
        if "loss" in logs:
            logs = {**logs, **{k: round(v, 4) for k, v in self.model.hacl_metrics().items()}}
            logs["hacl_scale"] = float(f"{self.model.hacl_scale():.4g}")
        if "train_loss" in logs and self.model.hacl_text_cache is not None and self.is_world_process_zero():
            print(f"HACL texts: {self.model.hacl_text_cache}.", flush=True)
        return super().log(logs, *args, **kwargs)

    def _save_beside(self, folder):
        super()._save_beside(folder)
        save_head(self.model, folder, write=self.args.should_save)
        config = self.model.hacl_config
        if config.queue_size and (self.args.should_save or not config.gather):  # gathered, it is the same on all ranks
            torch.save(self.model.hacl_loss.queue_state(), folder / self._queue_file())

    def _queue_file(self):
        return f"hacl_queue_{0 if self.model.hacl_config.gather else self.args.process_index}.pt"

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.model.hacl_config.queue_size:
            self._load_queue(Path(checkpoint) / self._queue_file())
        found, centre = read_head(checkpoint), self.model.hacl_head.centre
        if found and centre is not None:
            centre.load(found.state)  # no part of any state dict

    def _load_queue(self, path):
        try:
            # To the CPU first: torch knows no "cpu:0", DeepSpeed's device.
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = {k: v.to(self.args.device) if torch.is_tensor(v) else v for k, v in state.items()}
            self.model.hacl_loss.load_queue_state(state)
        except (FileNotFoundError, ValueError) as error:
            why = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
            print(f"warning: the queue of rank {self.args.process_index} starts empty ({why}).", file=sys.stderr)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if found := read_head(resume_from_checkpoint):
            self.model.hacl_head.load(found.state)

    def save_state(self) -> None:
        """`ResumableTrainer`'s, and the heads."""
        super().save_state()
        save_head(self.model, self.args.output_dir, write=self.args.should_save)
