"""Whether a run can end well: what is wrong with its settings and its folders, before anything is loaded.

Each check is a function of the run to what is wrong and what to do, or None. A new one is written below and put into
`CHECKS`; data is looked at by `check_data`.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .common.weights import CheckpointError, Weights, first_line, is_whole, read_json
from .compat import STATE_FILE
from .config import HaclConfig, HaclError, RunSettings, on_first_rank
from .representation import read_head
from .resume import ranks_of
from .run import Run

# --- settings ---------------------------------------------------------------------------------------------------------


def settings(run: Run) -> str | None:
    """Values of the ``--hacl_*`` flags."""
    try:
        if run.model.use_hacl:
            HaclConfig.from_arguments(run.model)
    except HaclError as error:
        return str(error)
    return None


def stage(run: Run) -> str | None:
    """The script of stage 2 with a flag of stage 1; stage 2 with HACL is allowed, and advised against."""
    if run.stage == 2 and run.model.tune_mm_mlp_adapter:
        return "--tune_mm_mlp_adapter True is stage 1: use scripts/pretrain_hacl.py."
    if run.model.use_hacl and not run.model.tune_mm_mlp_adapter:
        warnings.warn(
            "HACL belongs to stage 1 (--tune_mm_mlp_adapter True): the paper's ablation found that training the LLM "
            "with it costs a lot.",
            stacklevel=2,
        )
    return None


def vision_tower(run: Run) -> str | None:
    """Images need a tower."""
    if run.model.vision_tower is not None:
        return None
    if run.model.use_hacl:
        return "--use_hacl contrasts images: give --vision_tower, a CLIP checkpoint."
    if run.model.tune_mm_mlp_adapter:
        return "--tune_mm_mlp_adapter True, but no mm_projector is trained: give --vision_tower."
    return None


def template(run: Run) -> str | None:
    """``--version`` has to be a template: LLaVA's train() takes vicuna_v1 for one that it does not know."""
    from llava.conversation import conv_templates

    known = sorted({*conv_templates, "v0.5"})
    if run.model.version in known:
        return None
    return (
        f"--version {run.model.version}: is no template of this LLaVA, which would train vicuna_v1 in its place; "
        f"allowed are: {', '.join(known)}."
    )


def name_of_an_mpt_model(run: Run) -> str | None:
    """LLaVA's train() chooses the model's class by a part of its name."""
    name = run.model.model_name_or_path
    if "mpt" in name and (run.model.vision_tower is not None or run.model.use_hacl):
        return (
            f"--model_name_or_path {name}: LLaVA takes a name with 'mpt' in it for an MPT model, and trained here are "
            "Llama- and Mistral-shaped ones alone; give the folder another name, or a link to it."
        )
    return None


def processes(run: Run) -> str | None:
    """Ways to start that HACL, or the saving of stage 1, cannot take."""
    if run.model.use_hacl and run.training.n_gpu > 1 and not run.rehearsed:
        return (
            f"one process was started for {run.training.n_gpu} GPUs, which torch's DataParallel would share batches "
            "out to; start one a GPU: deepspeed, torchrun, or CUDA_VISIBLE_DEVICES=0 for one GPU."
        )
    if run.model.tune_mm_mlp_adapter and (run.training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        return "stage 1 under FSDP cannot be saved; give --deepspeed zero_configs/zero2.json instead."
    return None


def deepspeed_config(run: Run) -> str | None:
    """A file, where one is given."""
    file = run.training.deepspeed
    if isinstance(file, str) and file and not file.lstrip().startswith("{") and not Path(file).is_file():
        return f"--deepspeed {file}: is no file; give a configuration, as zero_configs/zero2.json."
    return None


def text_cache(run: Run) -> str | None:
    """``--hacl_text_cache`` keeps what is constant: it is for an LLM that is frozen, and whole on each rank."""
    model, folder = run.model, RunSettings.from_arguments(run.model).text_cache
    flag = f"--hacl_text_cache {folder}"
    if not model.use_hacl or not folder:
        return None
    if Path(folder).exists() and not Path(folder).is_dir():
        return f"{flag}: is a file; give a folder."
    frozen = model.tune_mm_mlp_adapter or getattr(model, "freeze_backbone", False)
    if not frozen or run.training.lora_enable or model.mm_use_im_start_end:
        return (
            f"{flag}: is for an LLM that is frozen, and in this run it trains (no --tune_mm_mlp_adapter True, or a "
            "LoRA, or --mm_use_im_start_end True); leave the flag out."
        )
    config = run.training.deepspeed
    if isinstance(config, str) and Path(config).is_file():
        config = read_json(Path(config))
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if isinstance(zero, dict) and zero.get("stage") == 3:
        return (
            f"{flag}: under ZeRO-3 all ranks have to run the same passes; give --deepspeed zero_configs/zero2.json, or "
            "leave the flag out."
        )
    return None


def checkpoint_layers(run: Run) -> str | None:
    """``--hacl_checkpoint_layers`` chooses among the LLM's layers, and only where there is gradient checkpointing."""
    setting = RunSettings.from_arguments(run.model).checkpoint_layers
    flag, layers = f"--hacl_checkpoint_layers {setting}", run.llm.config.get("num_hidden_layers")
    if setting == "all":
        return None
    if not run.training.gradient_checkpointing:
        return f"{flag}: says which layers gradient checkpointing is for; give --gradient_checkpointing True too."
    if setting != "auto" and isinstance(layers, int) and int(setting) > layers:
        return f"{flag}: {run.llm.name} has {layers} layers; allowed is all, auto or a number from 0 to {layers}."
    return None


def something_to_learn(run: Run) -> str | None:
    """A run of no step, or in which nothing of LLaVA's trains, would end well and save what it began with."""
    training = run.training
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        return f"--num_train_epochs {training.num_train_epochs}: not a single step; allowed is more than 0."
    if training.learning_rate <= 0:
        return f"--learning_rate {training.learning_rate}: nothing would be learnt; allowed is more than 0."
    if run.model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        return "--tune_mm_mlp_adapter trains the projector, --freeze_mm_mlp_adapter does not: leave the second out."
    return None


# --- the language model and the vision tower, by the headers of their files -------------------------------------------

LLAMA_SHAPED = ("llama", "mistral", "llava", "llava_llama", "llava_mistral")  # "model_type" of config.json
_PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")
_BESIDE = ("mm_projector.", "vision_tower.", "rotary_emb.inv_freq", "image_newline", "hacl_head.")  # in a LLaVA model


def language_model(run: Run) -> str | None:
    """``--model_name_or_path`` has to be a whole Llama-shaped model. transformers fills what a file lacks, or what has
    other names, with random numbers and a warning."""
    flag, part = f"--model_name_or_path {run.llm.name}", run.llm
    if part.folder and (part.folder / "adapter_config.json").exists() and not is_whole(part.folder):
        return (
            f"{flag}: is a LoRA and no whole model; merge it first: hacl-llava export {part.name} TARGET --to llava "
            "--base LLM."
        )
    if problem := _not_there(flag, part, "the folder of a language model"):
        return problem
    if part.folder and (problem := _beside_a_model(part.folder)):
        return f"{flag}: {problem}."
    config, kind = part.config, part.config.get("model_type")
    if "text_config" in config and kind in ("llava", "llava_next"):
        return (
            f"{flag}: is in Hugging Face's format; convert it first: hacl-llava export {part.name} TARGET --to llava."
        )
    if config and kind not in LLAMA_SHAPED:
        return (
            f"{flag}: is of the type {kind!r}, of which LLaVA's train() would make a Llama with random weights; give a "
            "Llama-shaped model (Llama, Vicuna, Mistral, TinyLlama)."
        )

    if held := config.get("quantization_config"):
        return (
            f"{flag}: is quantized ({held.get('quant_method', 'unknown how')}), which cannot be trained from; give the "
            "model as it was before (--bits 4 --lora_enable True quantizes it while it trains)."
        )

    def expected():
        from transformers import LlamaConfig, LlamaForCausalLM

        values = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "transformers_version")}
        found = LlamaForCausalLM(LlamaConfig(**values)).state_dict()
        return {k: v for k, v in found.items() if k != "lm_head.weight" or not config.get("tie_word_embeddings")}

    tied = ("lm_head.",) if config.get("tie_word_embeddings") else ()  # it may be there all the same
    return _misfit(flag, part, expected, (*_BESIDE, *tied))


def _beside_a_model(folder):
    """What transformers loads along with a model, and stumbles over."""
    from transformers import GenerationConfig

    if (folder / "adapter_config.json").exists():
        return (
            "holds a LoRA beside a whole model, which transformers would load with it; take the adapter_* files out, "
            "or merge it (hacl-llava export --to llava --base LLM)"
        )
    try:
        GenerationConfig.from_pretrained(str(folder))
    except OSError:  # none, or no json: transformers goes on without it
        return None
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error, 100)}"
        return f"has a generation_config.json that transformers does not take ({what}); mend or remove it"
    return None


def context(run: Run) -> str | None:
    """More tokens than the model has positions for are worth nothing, and nothing says so; it is advised against."""
    config, length = run.llm.config, run.training.model_max_length
    most, scaled = config.get("max_position_embeddings"), config.get("rope_scaling")
    if isinstance(most, int) and length > most and not scaled:
        warnings.warn(
            f"--model_max_length {length}: {run.llm.name} was made for {most} tokens; longer rows are worth nothing.",
            stacklevel=2,
        )
    return None


def tower(run: Run) -> str | None:
    """``--vision_tower`` has to be a whole CLIP vision model, whole CLIP or its vision part."""
    part = run.tower
    if part is None:
        return None
    flag = f"--vision_tower {part.name}"
    if not Path(part.name).exists() and not re.match("openai|laion", part.name) and "ShareGPT4V" not in part.name:
        return f"{flag}: is no folder, and LLaVA takes names on the hub of openai/ and laion/ alone; download it first."
    if problem := _not_there(flag, part, "the folder of a CLIP vision model"):
        return problem
    kind = part.config.get("model_type")
    if part.config and kind not in ("clip", "clip_vision_model"):
        return (
            f"{flag}: is of the type {kind!r}, of which LLaVA would make a CLIP model with random weights; give a CLIP "
            "model, as openai/clip-vit-large-patch14-336."
        )

    if part.folder and Path(part.name).is_dir() and not any((part.folder / n).exists() for n in _PREPROCESSOR):
        return f"{flag}: has no {_PREPROCESSOR[0]}, by which images are prepared; copy it from the model's origin."

    def expected():
        from transformers import CLIPVisionConfig, CLIPVisionModel

        found = CLIPVisionModel(CLIPVisionConfig(**run.vision)).state_dict()
        return {k: v for k, v in found.items() if "position_ids" not in k}

    return _misfit(flag, part, expected, None)


def image_features(run: Run) -> str | None:
    """What is taken of the tower has to be there, and images have to come in the size that it takes."""
    layer, feature = run.model.mm_vision_select_layer, run.model.mm_vision_select_feature
    if feature not in ("patch", "cls_patch"):
        return f"--mm_vision_select_feature {feature}: allowed are patch and cls_patch."
    layers = run.vision.get("num_hidden_layers", 24 if run.vision else 0)
    if run.vision and layer is not None and not -layers - 1 <= layer <= layers:
        return f"--mm_vision_select_layer {layer}: the vision tower has {layers} layers; LLaVA-1.5 takes -2."
    file = run.tower and run.tower.folder and run.tower.folder / _PREPROCESSOR[0]
    if run.vision and file and file.exists():
        crop, size = read_json(file).get("crop_size"), run.vision.get("image_size", 224)
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if crop not in (None, size):
            return (
                f"{file}: makes images of {crop} pixels, and the tower's config.json says {size}; copy both files from "
                "the model's origin."
            )
    return None


def _not_there(flag, part, what):
    """A part that cannot be found; says what of one on the hub is not looked at."""
    if part.unseen and on_first_rank():
        print(f"HACL: {flag}: not checked, for it {part.unseen}.")
    if part.problem:
        return f"{flag}: {part.problem}."
    if part.folder and not part.config:
        return f"{flag}: has no config.json; give {what}."
    return None


def _misfit(flag, part, expected, beside):
    """What a part's tensors lack of those that its config.json asks for, or have besides.

    ``expected``: makes {name: tensor}; ``beside``: parts of names that may be there too, None: any.
    """
    again = "copy all files of the model again, and leave config.json as it is"
    try:
        weights = part.weights
        if weights is None:
            return None
        with torch.device("meta"):
            wanted = expected()
    except CheckpointError as error:
        return f"{flag.split()[0]} {error}"
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error, 160)}"
        return f"{flag}: has a config.json that this transformers makes no model of ({what}); {again}."

    def short(name):  # transformers 5 has no vision_model in between: neither in what it writes nor in its modules
        return name.removeprefix("vision_model.")

    stored = {short(name): name for name in weights}
    missing = [name for name in wanted if short(name) not in stored]
    more = [n for n in stored if beside and n not in wanted and not any(part in n for part in beside)]
    if missing:
        return (
            f"{flag}: lacks {len(missing)} tensors that its config.json asks for, as {missing[0]!r}, which would be "
            f"random numbers; {again}."
        )
    if more:
        return f"{flag}: holds {len(more)} tensors that its config.json does not know, as {more[0]!r}; {again}."
    for name, tensor in wanted.items():
        try:
            got = weights.shape(stored[short(name)])
        except CheckpointError as error:  # a shard that is cut, or that is not what the index says
            return f"{flag.split()[0]} {error}"
        if got not in (None, tuple(tensor.shape)):
            asked = f"its config.json asks for {list(tensor.shape)}"
            return f"{flag}: {name!r} has the shape {list(got)}, {asked}; {again}."
    return None


# --- the projector ----------------------------------------------------------------------------------------------------


def projector(run: Run) -> str | None:
    """``--pretrain_mm_mlp_adapter`` has to be a projector, and to fit the language model."""
    path, config = run.model.pretrain_mm_mlp_adapter, run.llm.config
    if problem := _of_a_whole_llava(run):
        return problem
    if path is None:
        if run.stage == 2 and config and "mm_vision_tower" not in config:
            warnings.warn(
                "no --pretrain_mm_mlp_adapter: stage 2 starts with a random projector. Give it the mm_projector.bin of "
                "stage 1.",
                stacklevel=2,
            )
        return None
    if not Path(path).is_file():
        return f"--pretrain_mm_mlp_adapter {path}: is no file."
    if str(path).endswith(".safetensors"):
        return f"--pretrain_mm_mlp_adapter {path}: is safetensors, and LLaVA reads it with torch.load; give a .bin."
    try:
        weights = Weights(Path(path))
    except CheckpointError as error:
        return str(error)
    own = {name.split("mm_projector.")[1]: name for name in weights if "mm_projector." in name}
    if not own:
        return f"{path}: holds no mm_projector; --pretrain_mm_mlp_adapter is the mm_projector.bin of stage 1."
    if run.model.mm_use_im_start_end and not any("embed_tokens" in name for name in weights):
        return (
            f"{path}: holds no embeddings of <im_start> and <im_end>, which --mm_use_im_start_end True asks for; give "
            "--mm_use_im_start_end False, as LLaVA-1.5 does."
        )
    if problem := _other_form(path, own, run.model.mm_projector_type):
        return problem
    linear = sorted(name for part, name in own.items() if part.endswith("weight"))
    if not linear:
        return f"{path}: its mm_projector has no weight; give the mm_projector.bin of stage 1."
    width, features = weights.shape(linear[-1])[0], weights.shape(linear[0])[-1]
    if config and width != config.get("hidden_size", width):
        return (
            f"{path}: projects to {width} features, {run.llm.name} has the hidden_size {config['hidden_size']}; give "
            "the language model that stage 1 was run with."
        )
    given = run.vision.get("hidden_size", features)
    if given != features:
        return (
            f"{path}: takes {features} features of a patch, --vision_tower {run.model.vision_tower} gives {given}; "
            "give the vision tower that stage 1 was run with."
        )
    return None


def _of_a_whole_llava(run):
    """The projector that a base has of its own is not made anew: flags of another would only be noted."""
    config, kind = run.llm.config, run.model.mm_projector_type or "linear"
    if not config.get("mm_vision_tower") or run.model.vision_tower is None:
        return None
    if (own := config.get("mm_projector_type", "linear")) != kind:
        return f"{run.llm.name}: has a projector that is {own}, and --mm_projector_type is {kind}: give {own}."
    if (takes := config.get("mm_hidden_size")) not in (None, run.vision.get("hidden_size", takes)):
        return (
            f"{run.llm.name}: its projector takes {takes} features of a patch, --vision_tower {run.tower.name} gives "
            f"{run.vision['hidden_size']}; give the vision tower that it was trained with."
        )
    return None


def _other_form(path, own, kind):
    """A projector of another form than ``--mm_projector_type``, ``linear`` or ``mlpNx_gelu``."""
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind or "linear")
    if not depth and kind not in (None, "linear"):  # LLaVA says so itself
        return None
    numbers = {int(part.split(".")[0]) for part in own if part[:1].isdigit()}
    holds = f"mlp{max(numbers) // 2 + 1}x_gelu" if numbers else "linear" if "weight" in own else "of another kind"
    if holds == (depth[0] if depth else "linear"):
        return None
    return (
        f"{path}: holds a projector that is {holds}; --mm_projector_type is {kind}: give the one it was trained with."
    )


# --- the output folder ------------------------------------------------------------------------------------------------


def output_folder(run: Run) -> str | None:
    """A folder, or nothing yet."""
    folder = Path(run.training.output_dir)
    return f"--output_dir {folder}: is a file; give a folder." if folder.exists() and not folder.is_dir() else None


def image_folder(run: Run) -> str | None:
    """A folder, where one is given; whether one is needed, the data says."""
    folder = run.data.image_folder
    if folder and not os.path.isdir(folder):
        return (
            f"--image_folder {folder}: is no folder (or cannot be reached); give the one that images are relative to."
        )
    return None


def earlier_stage1(run: Run) -> str | None:
    """Checkpoints in it that only look like ones of stage 1 to go on from, or are of one with another contrast."""
    for folder in run.checkpoints if run.model.tune_mm_mlp_adapter else ():
        if not (folder / STATE_FILE).exists():
            return (
                f"{folder}: is not of a stage 1 that can be gone on from (stock LLaVA keeps the projector and no "
                "optimizer). Give another --output_dir, or remove it to start anew."
            )
        begun, flags = read_head(folder), None
        if (begun is not None) != run.model.use_hacl:
            flags = f"--use_hacl {begun is not None}"
        elif begun:
            flags = begun.config.flags_to_go_on(HaclConfig.from_arguments(run.model))
        if flags:
            return f"{folder}: is of a run that was begun with {flags}; give that to go on, or another --output_dir."
    return None


def earlier_stage2(run: Run) -> str | None:
    """Checkpoints in it of another kind of run, or of another number of ranks under DeepSpeed."""
    for folder in run.checkpoints if run.stage == 2 else ():
        lora = (folder / "adapter_config.json").exists()
        of_engine = bool(list(folder.glob("global_step*")))
        if lora != run.training.lora_enable or not (lora or is_whole(folder) or of_engine):
            what = "of a LoRA run" if lora else "of a full run" if is_whole(folder) else "not of stage 2"
            return f"{folder}: is {what}, and cannot be gone on from here; give another --output_dir."
        if run.training.deepspeed and not of_engine:
            return f"{folder}: was saved without DeepSpeed; leave --deepspeed out, or give another --output_dir."
        ranks, now = ranks_of(folder), int(os.environ.get("WORLD_SIZE", 1))
        if run.training.deepspeed and ranks not in (None, now) and not run.rehearsed:
            return (
                f"{folder}: was saved by {ranks} ranks, of which DeepSpeed keeps a part each, and this run has {now}. "
                f"Start {ranks} to go on, or give another --output_dir."
            )
    return None


CHECKS: tuple[Callable[[Run], str | None], ...] = (
    *(settings, stage, template, vision_tower, name_of_an_mpt_model, processes, deepspeed_config, text_cache),
    *(something_to_learn, checkpoint_layers),
    *(language_model, context, tower, image_features, projector),
    *(image_folder, output_folder, earlier_stage1, earlier_stage2),
)


def problems(run: Run) -> Iterator[str]:
    """What each of `CHECKS` finds, with what to do."""
    for check in CHECKS:
        try:
            problem = check(run)
        except HaclError as error:  # a file that two checks read is damaged
            problem = str(error)
        if problem:
            yield problem


def check_run(run: Run) -> None:
    """All of `CHECKS`.

    Raises:
        HaclError: the first that finds something.
    """
    for problem in problems(run):
        raise HaclError(problem)
