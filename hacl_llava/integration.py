"""HACL inside LLaVA's own train(): some of its names replaced.

This module is imported at the head of a patched llava/train/train.py, before LLaVA's trainer, so that `compat` has
done its work by then; whatever itself imports llava.train.train waits for `install`.
"""

import argparse
import dataclasses
import os
import types
from collections.abc import Sequence
from functools import partial
from typing import Any

import transformers

from . import compat
from .check_data import check_before_run
from .check_run import check_run
from .config import HaclConfig, HaclError, RunSettings, hacl_argument_fields, on_first_rank, preset_in
from .resume import SIGNALS, check_folder, lock_folder
from .run import Run

NAMES = ("ModelArguments", "LlavaLlamaForCausalLM", "LLaVATrainer", "make_supervised_data_module")
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

    namespace.update(hacl, ModelArguments=_arguments(stock, use_hacl, **_starting(choose, stage)))


def run_of(argv: Sequence[str]) -> Run:
    """A training by its command line, to be looked at: nothing is checked, loaded or written.

    Args:
        argv: its script (``scripts/finetune_hacl.py``), which may be left out, and its arguments.

    Raises:
        HaclError: they are none that LLaVA's train() or HACL know.
    """
    import llava.train.train as stock

    scripts = [i for i, word in enumerate(argv) if word.endswith(".py") or word == "hacl_llava.train"]
    script, argv = (argv[scripts[-1]], argv[scripts[-1] + 1 :]) if scripts else ("", argv)
    first = _parser(argparse.ArgumentParser, add_help=False, allow_abbrev=False)
    for name in ("tune_mm_mlp_adapter", "version"):
        first.add_argument(f"--{name}")
    known, _ = first.parse_known_args(argv)
    on = str(known.tune_mm_mlp_adapter).lower() in ("true", "1", "yes", "y", "t")
    stage = 2 if "finetune" in script else 1 if script or on or known.version == "plain" else 2
    first = _parser(argparse.ArgumentParser, add_help=False, allow_abbrev=False)
    for name in ("deepspeed", "local_rank", "fp16", "tf32"):  # which would start its engine, or ask for a GPU
        first.add_argument(f"--{name}", nargs="?")
    known, rest = first.parse_known_args(argv)
    own = _arguments(vars(stock).get(_STOCK, vars(stock)), stage == 1)
    parser = _parser(stock.transformers.HfArgumentParser, (own, stock.DataArguments, stock.TrainingArguments))
    environment = dict(os.environ)  # in which TrainingArguments notes what it is given
    try:
        model, data, training = parser.parse_args_into_dataclasses(rest)
    except HaclError as error:
        raise HaclError(f"--run: {error}; give the arguments of a training, as its script takes them.") from None
    finally:
        os.environ.clear()
        os.environ.update(environment)
    training = types.SimpleNamespace(**{**vars(training), "deepspeed": known.deepspeed, "n_gpu": 1})
    data.hacl_run = RunSettings.from_arguments(model)
    return Run(model, data, training, stage, rehearsed=True)


def _parser(kind, *args, **options):
    def refuse(message):
        raise HaclError(message)

    parser = kind(*args, **options)
    parser.error = refuse
    return parser


def uninstall(namespace: dict[str, Any]) -> None:
    """Put LLaVA's own names back."""
    namespace.update(namespace.pop(_STOCK, {}))


def _starting(choose, stage):
    """Methods of ModelArguments with which a training checks what it is given, before it loads anything.

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
        training.hacl_version = None if model.tune_mm_mlp_adapter else model.version
        if model.use_hacl:
            if on_first_rank() and (flags := preset_in(["--hacl_preset", model.hacl_preset])):
                said = " ".join(f"--{name} {value}" for name, value in flags.items())
                print(f"HACL preset {model.hacl_preset}: {said}, where no other value is given.", flush=True)
            data.hacl = HaclConfig.from_arguments(model)  # the dataset sees the data arguments alone
        if stage is not None or model.use_hacl:
            run = Run(model, data, training, stage)
            check_run(run)
            SIGNALS.catch()
            check_folder(training.output_dir)
            if model.use_hacl and training.hacl_run.text_cache:
                check_folder(training.hacl_run.text_cache, "--hacl_text_cache")
            lock_folder(training.output_dir)
            check_before_run(run)
            # LLaVA makes projector and adapters before the Trainer seeds anything, and so does HACL its heads.
            transformers.set_seed(training.seed)

    return {"__post_init__": check, "hacl_parsed": parsed}


def _arguments(stock, use_hacl, **methods):
    """LLaVA's ModelArguments with HACL's flags."""
    bases = (stock["ModelArguments"],)
    return dataclasses.make_dataclass("ModelArguments", hacl_argument_fields(use_hacl), bases=bases, namespace=methods)
