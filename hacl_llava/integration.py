"""HACL inside LLaVA's own train(): some of its names replaced.

This module is imported at the head of a patched llava/train/train.py, before LLaVA's trainer, so that `compat` has
done its work by then; whatever itself imports llava.train.train waits for `install`.
"""

import dataclasses
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from . import compat
from .check import check_run
from .config import HaclConfig, HaclError, RunSettings, hacl_argument_fields
from .resume import FILES, SIGNALS, broken, check_folder, checkpoints, lock_folder, ranks_of

NAMES = ("ModelArguments", "DataArguments", "LlavaLlamaForCausalLM", "LLaVATrainer", "make_supervised_data_module")
SAVING = (
    "safe_save_model_for_hf_trainer",
    "get_peft_state_non_lora_maybe_zero_3",
    "get_mm_adapter_state_maybe_zero_3",  # called, not replaced
)
_STOCK = "_hacl_stock_names"


def install(namespace: dict[str, Any], use_hacl: bool = False, stage: int | None = None) -> None:
    """Let LLaVA's train() know ``--use_hacl`` and the ``--hacl_*`` flags.

    `train()` looks its classes up as globals of its module while it runs; those in `NAMES` and `SAVING` are
    replaced. When the command line then says ``--use_hacl False``, model, trainer and data are put back, and what runs
    is stock LLaVA.
    Calling it again changes only the default; `uninstall` undoes it.

    Args:
        namespace: the globals of llava.train.train (``globals()`` in a patched checkout).
        use_hacl: the default of ``--use_hacl``.
        stage: 1 or 2 keep, without HACL too, checkpoints that appear whole and resume, and what `RunSettings` says; 2
            checks stage 2's settings. None, as after the patch: without HACL, stock LLaVA and nothing else.

    Raises:
        compat.LlavaNotUsable: a name is missing, so this is not the train.py that HACL knows.
    """
    stock = namespace.get(_STOCK)
    if stock is None:
        missing = [name for name in (*NAMES, *SAVING) if name not in namespace]
        if missing:
            raise compat.LlavaNotUsable(
                f"{namespace.get('__name__', 'the namespace')} has no {', '.join(missing)}: this is not the train.py "
                f"of LLaVA {compat.LLAVA_VERSION}; run: {compat.LLAVA_INSTALL}"
            )
        stock = namespace[_STOCK] = {name: namespace[name] for name in (*NAMES, *SAVING)}

    from .data import make_hacl_data_module, make_plain_data_module
    from .model import HaclLlavaLlamaForCausalLM
    from .trainer import HaclTrainer, ResumableTrainer

    def save(trainer, output_dir):
        stage1 = getattr(trainer.args, "tune_mm_mlp_adapter", False)
        write = partial(stock["safe_save_model_for_hf_trainer"], trainer) if stage1 else trainer.save_model
        trainer.save_finished(output_dir, write)

    def beside_lora(named_parameters, *args, **kwargs):
        # A frozen projector too, which LLaVA leaves out: whoever loads the LoRA would get a random one.
        named = [(name, p) for name, p in named_parameters if "hacl_head." not in name]
        projector = stock["get_mm_adapter_state_maybe_zero_3"](named, ["mm_projector"])
        return {**projector, **stock["get_peft_state_non_lora_maybe_zero_3"](named, *args, **kwargs)}

    hacl = {
        "safe_save_model_for_hf_trainer": save,
        "get_peft_state_non_lora_maybe_zero_3": beside_lora,
        "LlavaLlamaForCausalLM": HaclLlavaLlamaForCausalLM,
        "LLaVATrainer": HaclTrainer,
        "make_supervised_data_module": make_hacl_data_module,
    }

    plain = stock
    if stage is not None:
        plain = {**hacl, "LlavaLlamaForCausalLM": stock["LlavaLlamaForCausalLM"], "LLaVATrainer": ResumableTrainer}
        plain["make_supervised_data_module"] = make_plain_data_module

    def choose(model_arguments):
        namespace.update({name: (hacl if model_arguments.use_hacl else plain)[name] for name in hacl})

    namespace.update(hacl, **_argument_classes(stock, use_hacl, choose, stage))


def uninstall(namespace: dict[str, Any]) -> None:
    """Put LLaVA's own names back."""
    namespace.update(namespace.pop(_STOCK, {}))


def _argument_classes(stock, use_hacl, choose, stage):
    """LLaVA's ModelArguments and DataArguments with HACL's flags, which check what they are given.

    ``choose`` is called with the parsed model arguments, before train() looks up anything else.
    """

    def check(model):
        choose(model)
        if model.use_hacl:
            HaclConfig.from_arguments(model)  # refuses wrong values before anything is loaded

    def parsed(model, arguments):
        # compat's parser calls this with all three; nothing is loaded yet.
        _, data, training = arguments
        data.hacl_run = training.hacl_run = RunSettings.from_arguments(model)
        if stage == 2:
            _check_stage2(model, training)
        if model.use_hacl:
            model.hacl_num_hallucinated = data.hacl_num_hallucinated
            HaclConfig.from_arguments(model)
            _check_model(model)
        if stage is not None or model.use_hacl:
            SIGNALS.catch()
            check_folder(training.output_dir)
            lock_folder(training.output_dir)
            if model.tune_mm_mlp_adapter:
                _check_stage1(training)
            check_run(model, data, training)
            # LLaVA makes projector and adapters before the Trainer seeds anything, and so does HACL its heads.
            transformers.set_seed(training.seed)

    flags = hacl_argument_fields(use_hacl)
    for_data = [f for f in flags if f[0] == "hacl_num_hallucinated"]  # the dataset sees the data arguments alone
    for_model = [f for f in flags if f not in for_data]

    def extended(name, fields, **methods):
        return dataclasses.make_dataclass(name, fields, bases=(stock[name],), namespace=methods)

    return {
        "ModelArguments": extended("ModelArguments", for_model, __post_init__=check, hacl_parsed=parsed),
        "DataArguments": extended("DataArguments", for_data),
    }


def _check_stage1(training):
    """Refuse checkpoints that only look like ones to go on from."""
    for folder in _whole(training.output_dir):
        if not (folder / compat.STATE_FILE).exists():
            raise HaclError(
                f"{folder}: is not of a stage 1 that can be gone on from (stock LLaVA keeps the projector and no "
                "optimizer). Give another --output_dir, or remove it to start anew."
            )


def _whole(folder):
    """Checkpoints that `ResumableTrainer` will not pass over, and those that hold a projector alone."""
    return [p for p in checkpoints(folder) if not broken(p) or not (p / FILES).exists() and any(p.glob("*.bin"))]


def _check_stage2(model, training):
    """Refuse, before 7B are loaded, a projector that does not belong to this LLM, and checkpoints of another run."""
    from .checkpoint import CheckpointError, Weights, is_whole, read_json

    if model.tune_mm_mlp_adapter:
        raise HaclError("--tune_mm_mlp_adapter True is stage 1: use scripts/pretrain_hacl.py.")
    output = Path(training.output_dir)
    if output.exists() and not output.is_dir():
        raise HaclError(f"--output_dir {output}: is a file; give a folder.")
    for folder in _whole(output):
        lora = (folder / "adapter_config.json").exists()
        if lora != training.lora_enable or not (lora or is_whole(folder) or list(folder.glob("global_step*"))):
            what = "of a LoRA run" if lora else "of a full run" if is_whole(folder) else "not of stage 2"
            raise HaclError(f"{folder}: is {what}, and cannot be gone on from here; give another --output_dir.")
        ranks, now = ranks_of(folder), int(os.environ.get("WORLD_SIZE", 1))
        if training.deepspeed and not list(folder.glob("global_step*")):
            raise HaclError(
                f"{folder}: was saved without DeepSpeed; leave --deepspeed out, or give another --output_dir."
            )
        if training.deepspeed and ranks not in (None, now):
            raise HaclError(
                f"{folder}: was saved by {ranks} ranks, of which DeepSpeed keeps a part each, and this run has {now}. "
                f"Start {ranks} to go on, or give another --output_dir."
            )
    folder = Path(model.model_name_or_path)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if model.pretrain_mm_mlp_adapter is None:
        if config and "mm_vision_tower" not in config:
            warnings.warn(
                "no --pretrain_mm_mlp_adapter: stage 2 starts with a random projector. Give it the mm_projector.bin of "
                "stage 1.",
                stacklevel=2,
            )
        return
    if not Path(model.pretrain_mm_mlp_adapter).is_file():
        raise CheckpointError(f"--pretrain_mm_mlp_adapter {model.pretrain_mm_mlp_adapter}: is no file.")
    weights = Weights(Path(model.pretrain_mm_mlp_adapter))
    own = [name for name in weights if "mm_projector." in name]
    if not own:
        raise CheckpointError(
            f"{weights.path}: holds no mm_projector; --pretrain_mm_mlp_adapter is the mm_projector.bin of stage 1."
        )
    last = weights.shape(max((n for n in own if n.endswith("weight")), default=own[0]))
    if config and last[0] != config.get("hidden_size", last[0]):
        raise CheckpointError(
            f"{weights.path}: projects to {last[0]} features, {folder} has the hidden_size {config['hidden_size']}; "
            "give the language model that stage 1 was run with."
        )


def _check_model(model):
    """Refuse, before a 7B model is loaded, what would fail later."""
    if model.vision_tower is None:
        raise HaclError("--use_hacl contrasts images: give --vision_tower, a CLIP checkpoint.")
    if "mpt" in model.model_name_or_path:
        raise HaclError(
            f"--model_name_or_path {model.model_name_or_path}: LLaVA takes a name with 'mpt' in it for an MPT model, "
            "and HACL is for Llama-family models; give the folder another name."
        )
    if not model.tune_mm_mlp_adapter:
        warnings.warn(
            "HACL belongs to stage 1 (--tune_mm_mlp_adapter True): the paper's ablation found that training the LLM "
            "with it costs a lot.",
            stacklevel=2,
        )
