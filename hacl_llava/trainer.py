"""LLaVA's trainer with checkpoints that resume; with HACL, its losses in the log and its heads beside them. Floor 3."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers.integrations import is_deepspeed_zero3_enabled

from . import __version__
from .checkpoint import save_tokenizer
from .compat import LLaVATrainer, savable_generation_config
from .config import HaclError
from .modeling import HEAD_FILE, read_head

UNFINISHED = "unfinished"


def save_head(model, folder, write=True):
    """Write heads and temperature to ``folder/hacl_head.safetensors``; every rank must call it (ZeRO-3 gathers).

    The file's metadata holds the HACL settings and the version. Returns the path, or None where nothing is written.
    """
    import safetensors.torch
    from llava.train.train import get_mm_adapter_state_maybe_zero_3

    state = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), ["hacl_head."])
    if not write or not state:
        return None
    state = {k[k.index("hacl_head.") + len("hacl_head.") :]: v.contiguous() for k, v in state.items()}
    path = Path(folder) / HEAD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "hacl": json.dumps(model.config.hacl), "hacl_llava": __version__}
    part = path.with_suffix(".part")
    safetensors.torch.save_file(state, part, metadata=metadata)
    os.replace(part, path)
    return path


class ResumableTrainer(LLaVATrainer):
    """LLaVA's trainer, whose checkpoints appear whole or not at all and from which the same command goes on.

    A checkpoint is written to ``output_dir/unfinished`` and renamed to ``checkpoint-N`` when all ranks have written
    theirs; so whatever interrupts it, the last ``checkpoint-*`` is whole. ``--save_total_limit`` counts those.
    """

    _writing = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        savable_generation_config(self.model)
        if is_deepspeed_zero3_enabled():
            # LLaVA makes the projector, and peft its adapters, in float32; ZeRO-3 shards one dtype, and keeps float32
            # copies of its own.
            dtype = self.model.get_input_embeddings().weight.dtype
            for p in self.model.parameters():
                if p.requires_grad and p.dtype != dtype:
                    p.data = p.data.to(dtype)

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
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with self._unfinished(folder) as part:
            self._writing = True
            super()._save_checkpoint(model, trial, *args, **kwargs)
            self._save_beside(part / name)
            _wait()
        if self._moves():
            # What goes is renamed first too: a kill while it is removed must not leave a half of it.
            if (folder / name).exists():
                os.replace(folder / name, part / "replaced")
            os.replace(part / name, folder / name)
            numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
            for _, old in sorted(numbered)[: -(self.args.save_total_limit or len(numbered))]:
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

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        beside = Path(resume_from_checkpoint) / "non_lora_trainables.bin"
        if beside.exists():
            self.model.load_state_dict(torch.load(beside, map_location="cpu", weights_only=True), strict=False)

    def save_state(self):
        # The one call that LLaVA's train() makes on the trainer after training, before it writes a LoRA's files one by
        # one, this one last: while it is missing, nobody takes the folder for finished.
        if self._moves():
            (Path(self.args.output_dir) / "non_lora_trainables.bin").unlink(missing_ok=True)
        super().save_state()

    def save_finished(self, folder, write):
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


def _wait():
    if dist.is_initialized():
        dist.barrier()


def _trained_beside_lora(model):
    return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


class HaclTrainer(ResumableTrainer):
    """`ResumableTrainer` that logs ``loss_lm``, ``loss_i2t``, ``loss_t2i``, ``temperature``, ``retrieval_accuracy`` and
    ``closer_to_true`` (see `HaclMixin.hacl_metrics`) and saves the heads beside an unchanged ``mm_projector.bin``."""

    _said = False

    def _say_what_runs(self):
        """One line, from the objects that run rather than from the flags that asked for them."""
        engine, model, config = self.model_wrapped, self.model, self.model.hacl_config
        stage = getattr(engine, "zero_optimization_stage", lambda: None)()
        trained = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                part = "hacl_head" if "hacl_head." in name else "mm_projector" if "mm_projector" in name else "LLM"
                trained[part] = trained.get(part, 0) + getattr(p, "ds_numel", p.numel())
        zero = "" if stage is None else f" ZeRO-{stage}"
        ranks = f"{self.args.world_size} rank{'s' if self.args.world_size > 1 else ''} on {self.args.device.type}"
        print(
            f"HACL run: engine {type(engine).__name__}{zero}, {ranks}, {'fused' if model.hacl_fused else 'separate'} "
            f"passes, negatives {config.negatives}, queue {config.queue_size}, weight {config.weight}; trained: "
            + ", ".join(f"{part} {n:,}" for part, n in sorted(trained.items())),
            flush=True,
        )

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not self._said and self.is_world_process_zero():
            self._say_what_runs()
        self._said = True
        return loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **{k: round(v, 4) for k, v in self.model.hacl_metrics().items()}}
        return super().log(logs, *args, **kwargs)

    def _save_beside(self, folder):
        super()._save_beside(folder)
        save_head(self.model, folder, write=self.args.should_save)
        config = self.model.hacl_config
        if config.queue_size and (self.args.should_save or not config.gather):  # gathered, it is the same on all ranks
            torch.save(self.model.hacl_loss.queue_state(), folder / self._queue_file())

    def _queue_file(self):
        return f"hacl_queue_{0 if self.model.hacl_config.gather else self.args.process_index}.pt"

    def _load_rng_state(self, checkpoint):
        # Called on every way of resuming, DeepSpeed's too, once the weights are there.
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        queue = Path(checkpoint) / self._queue_file()
        if queue.exists():
            state = torch.load(queue, map_location=self.args.device, weights_only=True)
            self.model.hacl_loss.load_queue_state(state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if found := read_head(resume_from_checkpoint):
            self.model.hacl_head.load_state_dict(found[1])

    def save_state(self):
        super().save_state()
        save_head(self.model, self.args.output_dir, write=self.args.should_save)
