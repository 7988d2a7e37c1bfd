"""Model cards for checkpoint folders, and the way of such a folder to the Hugging Face hub."""

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from .. import __version__
from ..common.files import is_number, write_text
from ..common.files import read_json as read_any_json
from ..common.report import TEMPLATES, literal, table
from ..common.weights import CheckpointError, Weights, kind_of, read_json
from ..config import HaclError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_MARK = "hacl_llava writes this file anew"
_KNOWN = (
    "a stage-1 folder (mm_projector.bin, config.json), LoRA (adapter_config.json), a whole LLaVA checkpoint, or one "
    "in Hugging Face's format (LlavaForConditionalGeneration)"
)
_LEFT_OUT = (  # the state of a run, half-written files, hidden ones: none of it belongs to the model
    *("checkpoint-*", "global_step*", "optimizer*", "scheduler*", "rng_state*", "latest", "zero_to_fp32.py"),
    *("unfinished/*", "training_args.bin", "*.part", "*.part/*", "runs/*", "wandb/*", ".*"),
)
_LEFT_OUT += tuple(f"*/{pattern}" for pattern in _LEFT_OUT)
_NEEDED = {
    "projector": ("mm_projector.bin", "config.json"),
    "lora": ("adapter_config.json", "non_lora_trainables.bin", "config.json"),
    "llava": ("config.json", "tokenizer_config.json"),
    "hf": ("config.json", "tokenizer_config.json", "preprocessor_config.json"),
}
_LOGGED = ("loss", "loss_lm", "loss_i2t", "loss_t2i", "temperature", "retrieval_accuracy", "closer_to_true")
_RESULT = '{"task": "POPE random", "metric": "f1", "value": 0.87, "interval": [0.85, 0.89]}'


def _kind_of(folder):
    """``projector``, ``lora``, ``llava`` or ``hf``; a folder that is none of them is refused."""
    config = _read(folder, "config.json")
    kind = kind_of(folder, config)
    if kind is None or kind == "llava" and "mm_vision_tower" not in config:
        what = "no checkpoint that is known here, which are" if folder.is_dir() else "no folder; give"
        raise CheckpointError(f"{folder}: is {what} {_KNOWN}.")
    return kind


# ---- what the files say


def _read(folder, name):
    """The object in a json file of the folder; {} where there is none."""
    return read_json(folder / name) if (folder / name).exists() else {}


def _dict(value):
    return value if isinstance(value, dict) else {}


def _is_hub_id(name):
    # LLaVA's scripts write to ./checkpoints/NAME, which looks like an id on another machine.
    looks = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.startswith("checkpoints/")
    return bool(looks) and not Path(name).exists()


def _named(value):
    """A model's name for others to read: a hub id as it is, of a path no more than its last part."""
    value = str(value)
    if cached := re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", value):
        return f"{cached[1]}/{cached[2]}"
    return value if _is_hub_id(value) else re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else _named(value) if isinstance(value, str) else str(value)


def _head(folder):
    """What the heads' file says: its metadata, the settings among them parsed."""
    file = folder / "hacl_head.safetensors"
    if not file.exists():
        return {}
    try:
        with safe_open(file, "pt") as opened:
            said = opened.metadata() or {}
        return said | {"hacl": json.loads(said.get("hacl", "{}"))}
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}).") from None


def _facts(folder):
    """What the files of a folder say of its making, fit to be published; nothing is unpickled.

    Returns:
        base: the language model's name. tower: the vision tower's. hacl, training, versions: {name: text}.
    """
    config, adapter, state, head = (
        *(_read(folder, name) for name in ("config.json", "adapter_config.json", "trainer_state.json")),
        _head(folder),
    )
    base = adapter.get("base_model_name_or_path") or config.get("_name_or_path")
    tower = config.get("mm_vision_tower") or _dict(config.get("hacl_llava")).get("mm_vision_tower")
    log = [entry for entry in state.get("log_history") or () if isinstance(entry, dict)]
    last = next((entry for entry in reversed(log) if "loss" in entry), {})
    rates = [entry["learning_rate"] for entry in log if isinstance(entry.get("learning_rate"), (int, float))]
    facts = {
        "hacl": _dict(config.get("hacl")) or _dict(head.get("hacl")),
        "training": {
            "steps": state.get("global_step"),
            "epochs": state.get("epoch"),
            "batch size of a device": state.get("train_batch_size"),
            "highest logged learning rate": max(rates, default=None),
            **{f"last logged {name}": last.get(name) for name in _LOGGED},
            "LoRA rank": adapter.get("r"),
            "LoRA alpha": adapter.get("lora_alpha"),
        },
        "versions": {
            "hacl_llava of the training": head.get("hacl_llava"),
            "transformers": config.get("transformers_version"),
            "peft": adapter.get("peft_version"),
        },
    }
    facts = {part: {k: _shown(v) for k, v in values.items() if v is not None} for part, values in facts.items()}
    # transformers writes the folder itself there where a checkpoint was loaded and saved again
    base = base if base and _named(base) != _name_of(folder) else None
    return {"base": base and _named(base), "tower": tower and _named(tower), **facts}


def _is_ours(card):
    """Whether a README.md may be replaced: one that this module wrote, or peft's own form that nobody has filled in."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{card}: cannot be read ({error.strerror}).") from None
    form = "library_name: peft" in text and text.count("[More Information Needed]") > 5
    return form or re.search(f"<!--[^>]*{_MARK}", text) is not None


def read_evaluation(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read evaluation results, as a model card shows them.

    Args:
        path: a json file, a list of {"task": "POPE random", "metric": "f1", "value": 0.87, "interval": [0.85, 0.89]};
            the interval may be missing.

    Raises:
        HaclError: it is no such file; the message names the entry.
    """
    results = read_any_json(path)
    if not isinstance(results, list) or not results:
        raise HaclError(f"{path}: holds {str(results)[:60]}, expected a list of results like {_RESULT}.")
    seen = set()
    for i, result in enumerate(results):
        if problem := _problem_of(result, seen):
            raise HaclError(f"{path}: result {i} {problem}; expected is {_RESULT} (interval may be missing).")
        seen.add((result["task"], result["metric"]))
    return results


def _problem_of(result, seen):
    """What is wrong with one result, or None. ``seen``: (task, metric) of those before it."""
    if not isinstance(result, dict):
        return f"is a {type(result).__name__}"
    if unknown := sorted(set(result) - {"task", "metric", "value", "interval"}):
        return f"has the unknown keys {unknown}"
    for key in ("task", "metric"):
        text = result.get(key)
        if not isinstance(text, str) or not text.strip() or not text.isprintable():
            return f"has the {key} {text!r}, expected a line of text"
    if not is_number(result.get("value")):
        return f"has the value {result.get('value')!r}, expected a finite number"
    interval = result.get("interval", [0, 0])
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(is_number, interval)):
        return f"has the interval {interval!r}, expected two finite numbers"
    if interval[0] > interval[1]:
        return f"has the interval {interval!r}, which begins above its end"
    if (result["task"], result["metric"]) in seen:
        return f"repeats {result['metric']} of {result['task']}"
    return None


# ---- the card


def _name_of(folder):
    return Path(os.path.abspath(folder)).name


def write_card(
    folder: str | os.PathLike,
    evaluation: str | os.PathLike | None = None,
    source: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
) -> Path | None:
    """Write the model card ``README.md`` into a checkpoint's folder, from what its files say.

    No path of this machine gets into it. A README.md that was not written by this function is never touched.

    Args:
        folder: a stage-1 folder, LoRA, a whole LLaVA checkpoint, or one in Hugging Face's format.
        evaluation: path of a json file with results (see `read_evaluation`), or None.
        source: the folder that it was exported from, which tells of the training.
        base: name or folder of the language model that it was exported with.

    Returns:
        The card's path, or None where somebody else's README.md is there.

    Raises:
        CheckpointError: the folder is none of these, or a file of it is damaged.
        HaclError: the evaluation file is not usable.
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    kind, card = _kind_of(folder), folder / CARD
    results = read_evaluation(evaluation) if evaluation else []
    facts = _facts(folder)
    if source:
        told = _facts(Path(source))
        facts = {part: value or told[part] for part, value in facts.items()}
    if base:
        facts["base"] = _named(base)
    if (card.exists() or card.is_symlink()) and not _is_ours(card):
        return None
    settings = [*facts["training"].items(), *((f"hacl_{k}", v) for k, v in facts["hacl"].items())]
    versions = [*facts["versions"].items(), ("hacl_llava of this card", __version__)]
    rows = [(r["task"], r["metric"], r["value"], " to ".join(map(str, r.get("interval", ())))) for r in results]
    llm, tower, name = facts["base"] or "the-language-model", facts["tower"], _name_of(folder)
    text = ModelCard.from_template(
        _front_matter(kind, name, facts, results),
        template_path=TEMPLATES / "card.md.j2",
        mark=_MARK,
        kind=kind,
        name=name,
        title=literal(name),
        base=facts["base"] and literal(facts["base"]),
        tower=tower and literal(tower),
        hacl=bool(facts["hacl"]),
        mistral="mistral" in str(_read(folder, "config.json").get("model_type")),
        tower_is_path=kind != "hf" and bool(tower) and not _is_hub_id(tower),
        loaded_with=llm if _is_hub_id(llm) else f"path/to/{llm}",
        training=settings and table(("setting", "value"), settings),
        evaluation=rows and table(("task", "metric", "value", "interval"), rows),
        versions=table(("package", "version"), versions),
    )
    try:
        write_text(card, f"{text}\n")
    except OSError as error:
        raise CheckpointError(f"{card}: cannot be written ({error.strerror}).") from None
    return card


def _front_matter(kind, name, facts, results):
    """What the hub reads of a card."""
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-text-to-text"
    evaluated = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"\W+", "-", r["task"].lower()).strip("-") or "task",
            dataset_name=r["task"],
            metric_type=r["metric"],
            metric_value=r["value"],
        )
        for r in results
    ]
    return ModelCardData(
        library_name="transformers" if kind == "hf" else "llava",
        pipeline_tag=task,
        tags=["llava", *(["hacl"] if facts["hacl"] else []), *(["lora"] if kind == "lora" else [])],
        base_model=facts["base"] if facts["base"] and _is_hub_id(facts["base"]) else None,
        model_name=name if results else None,  # belongs to them
        eval_results=evaluated or None,
    )


# ---- the hub


def client(repo_id: str) -> "HfApi":
    """huggingface_hub's client, once all is there that needs no network: a name, a token, and not being offline.

    The token is HF_TOKEN's, or that of `hf auth login`.

    Raises:
        HaclError: one of them is missing; the message says what to do.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        good = repo_id.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise HaclError(f"{repo_id!r} is no name of a repository, expected USER/NAME of letters, digits, '-', '_', '.'")
    if constants.HF_HUB_OFFLINE:
        raise HaclError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it first.")
    token = get_token()
    if not token:
        raise HaclError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN to one that may write.")
    return HfApi(token=token, library_name="hacl_llava", library_version=__version__)


def _check_whole(folder):
    """Refuse a folder that lacks something, or holds a damaged file of weights."""
    if _name_of(folder).endswith(".part"):
        raise CheckpointError(f"{folder}: is half-written, by its name; let the export end, or give it again.")
    kind = _kind_of(folder)
    if missing := [name for name in _NEEDED[kind] if not (folder / name).exists()]:
        raise CheckpointError(f"{folder}: has no {', '.join(missing)}, so it is not whole; copy all of its files.")
    held = set()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if not any(fnmatch(file.name, pattern) for pattern in _LEFT_OUT):
            held |= set(Weights(file))
    if kind == "lora":
        if not any((folder / f"adapter_model.{suffix}").exists() for suffix in ("safetensors", "bin")):
            raise CheckpointError(f"{folder}: has no adapter_model.safetensors or .bin, so it is not whole.")
    elif kind != "projector" and (missing := sorted(set(Weights(folder)) - held)):
        raise CheckpointError(f"{folder}: its index names {missing[0]}, which is in no shard; copy them all again.")
    if (folder / "vision_tower").is_dir():
        Weights(folder / "vision_tower")


def _why(error, repo_id, token):
    """One line for what huggingface_hub raised, and what to do; its versions raise errors of different libraries."""
    cause, status, said = error, None, str(error)
    checked = isinstance(error, ValueError) and not hasattr(error, "response")  # by huggingface_hub itself: a card, say
    while cause is not None and status is None and not checked:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        said = getattr(cause, "server_message", None) or ("" if status else said)
        cause = cause.__cause__ or cause.__context__
    said = " ".join(said.split("\n")[:2])
    said = re.sub(r"\?\S+", "", said)[:200].replace(token, "***")  # signed addresses are secrets too
    if checked:
        return f"{repo_id}: the push was refused ({said}); mend that and give the command again."
    if status is None:
        what = "check the network, and HF_ENDPOINT where it is set, and give the command again"
        return f"{repo_id}: the push failed ({type(error).__name__}: {said}); {what}."
    what = {
        401: "the token is not accepted; run `hf auth login`, or set HF_TOKEN to one that is valid",
        403: "the token may not write there; run `hf auth login` or set HF_TOKEN with one that may, or take a name of "
        "your own",
        404: "no such user, organization or repository, or the token may not see it; check the name, and `hf auth "
        "whoami`",
    }.get(status, "give the command again later" if status == 429 or status >= 500 else "it was refused")
    return f"{repo_id}: the hub answers {status}{f' ({said})' if said else ''}: {what}."


def push(
    folder: str | os.PathLike, repo_id: str, private: bool = True, revision: str | None = None
) -> tuple[str, bool]:
    """Upload a checkpoint's folder to the Hugging Face hub, into a repository that is made where there is none.

    The token is huggingface_hub's own: HF_TOKEN, or that of `hf auth login`. The state of a run is left out
    (checkpoint-*, optimizers, training_args.bin, logs, hidden files). Weights that the repository holds and the folder
    does not are deleted there, or loaders would mix old shards with new ones.

    Args:
        folder: what `write_card` takes. repo_id: USER/NAME. private: False for one that all may read; a repository
            that is there already keeps what it is. revision: a branch, made where there is none; None: main.

    Returns:
        (address of the repository, whether it is private)

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
        HaclError: the hub cannot be reached or refuses, or the repository is public and ``private`` was wanted.
    """
    folder, api = Path(folder), client(repo_id)
    _check_whole(folder)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = api.model_info(repo_id).private is True
        if private and not is_private:
            raise HaclError(
                f"{repo_id}: is public, and a private one was wanted; nothing was uploaded. Say --public "
                "(private=False), or take another name."
            )
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            ignore_patterns=list(_LEFT_OUT),
            delete_patterns=["*.safetensors", "*.bin", "*.index.json"],
            commit_message="Upload with hacl_llava",
        )
    except HaclError:
        raise
    except Exception as error:
        raise HaclError(_why(error, repo_id, api.token)) from None
    return str(url), is_private
