"""The one file that knows versions of transformers, accelerate and torch.

Importing it makes stock `llava` work on transformers 4.37.2 to 5.x and imports it; so everything here that needs
`llava` imports this first. Each shim says why it is there and when it can go. Nothing is changed where the installed
versions do not need it.
"""

import atexit
import functools
import importlib.util
import inspect
import os
import sys
import time
from typing import TYPE_CHECKING

from .config import HaclError, preset_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LLAVA_INSTALL = "pip install --no-deps llava-torch==1.2.2.post1"
LLAVA_VERSION = "1.2.2.post1"
STATE_FILE = "training_state.safetensors"  # beside the projector in a stage-1 checkpoint


class LlavaNotUsable(ImportError):
    """`llava` is missing, is another package, or lacks something that HACL builds on."""


def _parameters(function):
    return inspect.signature(function).parameters


def _find_llava():
    # What needs no import is told before those that take seconds.
    spec = importlib.util.find_spec("llava")
    if spec is None:
        raise LlavaNotUsable(f"llava is not installed; run: {LLAVA_INSTALL}")
    where = list(spec.submodule_search_locations or [spec.origin])
    if not any(os.path.exists(os.path.join(folder, "train", "llava_trainer.py")) for folder in where):
        raise LlavaNotUsable(f"the llava at {where[0]} is not LLaVA {LLAVA_VERSION}; run: {LLAVA_INSTALL}")


# --- before llava.train is imported -----------------------------------------------------------------------------------


def _layernorm_list():
    # llava.train.llava_trainer imports ALL_LAYERNORM_LAYERS from transformers.trainer, which no longer re-exports it
    # (gone by 4.57). It named the layers without weight decay, LlamaRMSNorm among them. Goes with transformers 4.37.
    import transformers.trainer

    if not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):
        from torch import nn
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
        from transformers.models.mistral.modeling_mistral import MistralRMSNorm

        transformers.trainer.ALL_LAYERNORM_LAYERS = [nn.LayerNorm, LlamaRMSNorm, MistralRMSNorm]


# As LLaVA's scripts spell it -> what newer transformers call it (evaluation_strategy: 4.46; warmup_ratio: 5.0, where
# warmup_steps below 1 is a ratio). An alias is made only where the old name is unknown and the new one is known.
RENAMED_ARGUMENTS = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps", "no_cuda": "use_cpu"}


def _argument_parser():
    # LLaVA's scripts are many and stay as they are. Goes when LLaVA's scripts change.
    import transformers

    if getattr(transformers.HfArgumentParser, "_hacl_aliases", False):
        return

    class HfArgumentParser(transformers.HfArgumentParser):
        _hacl_aliases = True

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            known = self._option_string_actions
            for old, new in RENAMED_ARGUMENTS.items():
                if f"--{old}" not in known and f"--{new}" in known:
                    known[f"--{new}"].option_strings.append(f"--{old}")
                    known[f"--{old}"] = known[f"--{new}"]

        def parse_args_into_dataclasses(self, args=None, *more, **kwargs):
            # Not for a version's sake: the one moment when all of LLaVA's arguments are known and nothing is loaded.
            if "--hacl_preset" in self._option_string_actions:
                self.set_defaults(**preset_in(sys.argv[1:] if args is None else args))
            try:
                parsed = super().parse_args_into_dataclasses(args, *more, **kwargs)
            except (ValueError, ImportError) as error:  # of the Trainer's own arguments, as --tf32 without such a GPU
                raise HaclError(str(error)) from None
            for arguments in parsed:
                if hasattr(arguments, "hacl_parsed"):
                    arguments.hacl_parsed(parsed)
            return parsed

    transformers.HfArgumentParser = HfArgumentParser


def _deepspeed_on_cpu():
    # Without an accelerator, recent accelerate finds no backend for a DeepSpeed start and reports a world of one
    # process, so that every rank would train alone. DeepSpeed itself runs on CPU over gloo. Seen with accelerate
    # 1.15; goes when PartialState._prepare_backend answers gloo for it.
    import torch

    if torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        return
    from accelerate.state import DistributedType, PartialState

    prepare = PartialState._prepare_backend
    if getattr(prepare, "_hacl", False):
        return

    @functools.wraps(prepare)
    def _prepare_backend(self, *args, **kwargs):
        backend, kind = prepare(self, *args, **kwargs)
        launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
        if launched and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            # DeepSpeed would compile a shared-memory op now, which takes half a minute and a C++ compiler; gloo does
            # the same work. Goes when the op is optional.
            import deepspeed.ops

            getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
            if backend is None:
                return "gloo", DistributedType.MULTI_CPU
        return backend, kind

    _prepare_backend._hacl = True
    PartialState._prepare_backend = _prepare_backend

    # transformers refuses --bf16 without a GPU unless --use_cpu is given, and --use_cpu makes accelerate bypass
    # DeepSpeed. torch's CPU build does have bfloat16. Goes when the two can be told apart.
    import transformers.training_args as arguments

    arguments.is_torch_bf16_gpu_available = lambda: True


def _accumulation_under_zero():
    # Gradient accumulation under ZeRO-2 and -3: accelerate 0.34, the last that goes with transformers 4.37, enters the
    # no_sync of DeepSpeed's engine, which recent DeepSpeed refuses with partitioned gradients. DeepSpeed knows its
    # accumulation steps itself. Newer accelerate skips it there too; goes with transformers 4.37.
    import contextlib

    from accelerate import Accelerator

    no_sync = Accelerator.no_sync
    if "zero_stage" in inspect.getsource(no_sync) or getattr(no_sync, "_hacl", False):
        return

    @contextlib.contextmanager
    def wrapped(self, model):
        zero = getattr(self.state, "deepspeed_plugin", None)
        with contextlib.nullcontext() if zero is not None and zero.zero_stage >= 2 else no_sync(self, model):
            yield

    wrapped._hacl = True
    Accelerator.no_sync = wrapped


def _random_states():
    # torch >= 2.6 reads pickles without code alone, and a Trainer's rng_state.pth holds numpy's state: transformers
    # 4.37 cannot resume there. These are what its array is made of. Goes with transformers 4.37.
    import numpy
    import torch
    import transformers.trainer

    load = inspect.getsource(transformers.trainer.Trainer._load_rng_state)
    if "safe_globals" in load or not hasattr(torch.serialization, "add_safe_globals"):
        return
    core = getattr(numpy, "_core", None) or numpy.core
    parts = [core.multiarray._reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
    torch.serialization.add_safe_globals(parts)


def _fork_beside_gloo():
    # A data worker may hang as it is born, and its rank with it: forked in the moment in which a thread of gloo's, to
    # free a tensor, holds the interpreter's list of threads (CPython issue 112275, met once in some eighty short epochs
    # on two processes; mended in 3.11.10 and 3.12). A moment after the last collective they rest. Goes with 3.11.
    import torch.distributed as dist

    if sys.version_info < (3, 11, 10):
        os.register_at_fork(before=lambda: dist.is_initialized() and time.sleep(0.02))


def _resuming_under_deepspeed():
    # Not for a version's sake: a stage-1 checkpoint is not DeepSpeed's, and ResumableTrainer loads it a moment later.
    # And the Trainer leaves frozen weights out of a LoRA's DeepSpeed checkpoint, and that of 4.37 misses them when it
    # resumes. Newer ones say load_module_strict=False themselves. This goes with transformers 4.37.
    import transformers.trainer as trainer

    load = trainer.deepspeed_load_checkpoint
    knows = "load_module_strict" in _parameters(load)

    @functools.wraps(load)
    def wrapped(engine, path, *args, **kwargs):
        if os.path.exists(os.path.join(path, STATE_FILE)):
            return
        load_checkpoint = engine.load_checkpoint
        if not knows and hasattr(engine.module, "peft_config"):
            engine.load_checkpoint = functools.partial(load_checkpoint, load_module_strict=False)
        try:
            load(engine, path, *args, **kwargs)
        finally:
            engine.load_checkpoint = load_checkpoint

    trainer.deepspeed_load_checkpoint = wrapped


# --- after llava is imported ------------------------------------------------------------------------------------------


def _forward_arguments(model_class):
    # generate() of transformers >= 4.38 hands cache_position to forward, which stock LLaVA refuses (haotian-liu/LLaVA
    # issue 1218). It is derived from the cache when missing, so it may be dropped. Goes when LLaVA's forward takes it.
    forward = model_class.forward
    if "cache_position" in _parameters(forward):
        return

    @functools.wraps(forward)
    def wrapped(self, *args, cache_position=None, **kwargs):
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    extra = inspect.Parameter("cache_position", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    # No **kwargs in what others see: the Trainer takes them as "the loss is already divided by accumulation steps".
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    model_class.forward = wrapped


def _loading(model_class):
    # LLaVA's train() gives torch_dtype=None unless --bf16 is given, which meant float32 and means, from transformers 5
    # on, what the file holds: Vicuna is published in float16, which trains badly and which no loss scaler takes.
    #
    # LLaVA asks for 4 bits (in train() and in load_pretrained_model) both by a flag and by a quantization_config, for 8
    # bits by the flag alone; transformers >= 4.38 refuses the first, 5 does not know the flags. And 5 compares what is
    # not to be quantized with the beginning of a module's name, where LLaVA says mm_projector. Goes when LLaVA's does.
    import torch
    from transformers import BitsAndBytesConfig

    from_pretrained = model_class.from_pretrained.__func__

    @functools.wraps(from_pretrained)
    def wrapped(cls, *args, load_in_4bit=False, load_in_8bit=False, **kwargs):
        if "torch_dtype" in kwargs and kwargs["torch_dtype"] is None:
            kwargs["torch_dtype"] = torch.float32
        if (load_in_4bit or load_in_8bit) and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
        if skipped := getattr(kwargs.get("quantization_config"), "llm_int8_skip_modules", None):
            skipped += [f"model.{name}" for name in skipped if f"model.{name}" not in skipped]
        return from_pretrained(cls, *args, **kwargs)

    model_class.from_pretrained = classmethod(wrapped)


def _trainer_methods(trainer_class):
    # LLaVATrainer overrides four methods with the signatures of transformers 4.36. Each can go when LLaVA's does.
    from transformers import Trainer

    if "tokenizer" not in _parameters(Trainer.__init__):  # renamed in 4.46, the old name gone in 5.0

        def __init__(self, *args, tokenizer=None, processing_class=None, **kwargs):
            processing_class = tokenizer if processing_class is None else processing_class
            Trainer.__init__(self, *args, processing_class=processing_class, **kwargs)

        trainer_class.__init__ = __init__

    sampler = trainer_class._get_train_sampler
    if "train_dataset" in _parameters(Trainer._get_train_sampler) and "train_dataset" not in _parameters(sampler):

        @functools.wraps(sampler)
        def _get_train_sampler(self, train_dataset=None):
            return sampler(self)

        trainer_class._get_train_sampler = _get_train_sampler

    create = trainer_class.create_optimizer
    takes_model = "model" in _parameters(Trainer.create_optimizer) and "model" not in _parameters(create)

    @functools.wraps(create)
    def create_optimizer(self, *model):
        create(self, *(() if takes_model else model))
        if self.is_deepspeed_enabled and hasattr(self.optimizer, "param_groups"):
            # With LoRA and --mm_projector_lr some of LLaVA's four groups are empty. DeepSpeed drops those, and the
            # scheduler, made with them, then counts more than there are (recent torch refuses). Goes when LLaVA's do.
            self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g["params"]]
        return self.optimizer

    trainer_class.create_optimizer = create_optimizer

    if "and args.auto_find_batch_size" not in inspect.getsource(Trainer.train):
        # Resuming, it goes on with the batch size of the checkpoint, whatever --per_device_train_batch_size says now:
        # with another number of ranks, the global batch would be another. Seen up to 4.57.
        loop = Trainer._inner_training_loop

        @functools.wraps(loop)
        def _inner_training_loop(self, batch_size=None, *args, **kwargs):
            size = batch_size if self.args.auto_find_batch_size else self.args.train_batch_size
            return loop(self, size, *args, **kwargs)

        trainer_class._inner_training_loop = _inner_training_loop

    save = trainer_class._save_checkpoint
    if "metrics" not in _parameters(Trainer._save_checkpoint) and "metrics" in _parameters(save):

        @functools.wraps(save)
        def _save_checkpoint(self, model, trial):
            if getattr(self.args, "tune_mm_mlp_adapter", False):
                return save(self, model, trial)
            return Trainer._save_checkpoint(self, model, trial)

        trainer_class._save_checkpoint = _save_checkpoint


def savable_generation_config(model: "PreTrainedModel") -> None:
    """Make a model's generation settings ones that can be saved.

    Vicuna's have a temperature without do_sample, which newer transformers refuse to write: after the training (LLaVA
    issues 1144, 1252). Goes when Vicuna's file changes.
    """
    settings = model.generation_config
    if settings is not None and not settings.do_sample and (settings.temperature or 1, settings.top_p or 1) != (1, 1):
        settings.do_sample = True


def recompute_layers(llm: "PreTrainedModel", count: int) -> None:
    """Let gradient checkpointing, which is on, compute the first ``count`` decoder layers again, and no others.

    It holds for forward passes from now on, until gradient checkpointing is switched on anew.

    Args:
        llm: with its decoder ``layers``, as LLaVA's ``get_model()`` gives it.
    """
    if hasattr(llm.layers[0], "gradient_checkpointing"):  # each layer checkpoints itself, from transformers 4.53 on
        for i, layer in enumerate(llm.layers):
            layer.gradient_checkpointing = i < count
        return
    # Before, the model hands each layer's call to one function. Goes with transformers 4.37.
    checkpoint = getattr(llm._gradient_checkpointing_func, "_hacl_stock", llm._gradient_checkpointing_func)
    chosen = set(llm.layers[:count])

    def first_ones(call, *args, **kwargs):
        layer = getattr(call, "func", call).__self__  # some versions hand over a partial
        return checkpoint(call, *args, **kwargs) if layer in chosen else call(*args, **kwargs)

    first_ones._hacl_stock = checkpoint
    llm._gradient_checkpointing_func = first_ones


def end_in_order() -> None:
    """Close the process groups when the interpreter ends; for a process that is through with its work."""
    atexit.unregister(_close_process_groups)
    atexit.register(_close_process_groups)


def order_is_of_one_rank() -> bool:
    """Whether a run on one rank draws another order of the data than a run on several, as with transformers 4.37."""
    import transformers.trainer_pt_utils as utils

    return not hasattr(utils, "AcceleratorConfig")  # which came with a sampler seeded by epoch alone


def _close_process_groups():
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _end_in_order(trainer_class):
    # Neither LLaVA nor the Trainer closes the process groups. Gloo's thread may then ask for the interpreter's lock, to
    # free a tensor, in the moment in which the interpreter shuts down: the process aborts after a run that was fine
    # (pytorch issue 190489), and the launcher reports failure. NCCL only warns. save_state is the last call on the
    # trainer of a training that ended well; where one failed, waiting for the others could hang. Goes when torch closes
    # them itself.
    save_state = trainer_class.save_state

    @functools.wraps(save_state)
    def wrapped(self):
        save_state(self)
        end_in_order()

    trainer_class.save_state = wrapped


def _import_llava():
    try:
        import llava
    except ImportError as error:
        raise LlavaNotUsable(f"llava cannot be imported ({error}); see: hacl-llava env") from error
    try:
        from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
        from llava.train.llava_trainer import LLaVATrainer
    except ImportError as error:
        # llava.model hides its own import errors, so the name of what is missing is all there is.
        raise LlavaNotUsable(
            f"the llava at {list(llava.__path__)[0]} is not LLaVA {LLAVA_VERSION} or does not work here ({error}); "
            f"run: {LLAVA_INSTALL}"
        ) from error
    return LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LLaVATrainer


_find_llava()
_layernorm_list()
_argument_parser()
_deepspeed_on_cpu()
_accumulation_under_zero()
_random_states()
_resuming_under_deepspeed()
_fork_beside_gloo()
LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LLaVATrainer = _import_llava()
for _class in (LlavaLlamaForCausalLM, LlavaMistralForCausalLM):
    _forward_arguments(_class)
    _loading(_class)
_trainer_methods(LLaVATrainer)
_end_in_order(LLaVATrainer)
