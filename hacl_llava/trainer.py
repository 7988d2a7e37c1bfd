"""LLaVA's trainer, plus the parts of HACL's loss in the log and the heads in the checkpoint. Floor 3."""

import json
import os
from pathlib import Path

from . import __version__
from .compat import LLaVATrainer

HEAD_FILE = "hacl_head.safetensors"


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
    safetensors.torch.save_file(state, path, metadata=metadata)
    return path


class HaclTrainer(LLaVATrainer):
    """`LLaVATrainer` that logs ``loss_lm``, ``loss_i2t``, ``loss_t2i``, ``temperature``, ``retrieval_accuracy`` and
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

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        super()._save_checkpoint(model, trial, *args, **kwargs)
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        save_head(self.model, folder, write=self.args.should_save)

    def save_state(self):
        # The one call that LLaVA's train() makes on the trainer after training: the heads go into the output folder.
        super().save_state()
        save_head(self.model, self.args.output_dir, write=self.args.should_save)
