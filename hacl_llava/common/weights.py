"""The files of checkpoints: tensors by name, folders that are there, on the hub, or to be written whole."""

import contextlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open

from ..config import HaclError
from . import files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Of a name on the hub; some hold the same weights in other libraries' formats, too.
_FETCHED = ["*.json", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "mm_projector.bin", "*.model"]
_FETCHED += ["non_lora_trainables.bin"]
SINGLES = ("model.safetensors", "pytorch_model.bin", "mm_projector.bin")  # files of weights, in transformers' order


class CheckpointError(HaclError):
    """A checkpoint that cannot be read or converted; the message names the file and the tensor."""


class Weights:
    """The tensors of a folder or file by name, read one at a time: safetensors or LLaVA's ``.bin``, sharded or not.

    Pickles are read with ``weights_only=True``: one that holds code is refused.

    Raises:
        CheckpointError: there are none, a shard is missing, or a file is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._open = (None, None)  # the one file that is held
        self._where = dict(sorted(self._find().items(), key=lambda found: found[1]))  # shard by shard

    def _find(self):
        """{name: file}; an index says it without a shard being opened."""
        if self.path.is_file():
            return dict.fromkeys(self._load(self.path).keys(), self.path)
        for single in SINGLES:
            index = f"{single}.index.json"
            if (self.path / single).exists():
                return dict.fromkeys(self._load(self.path / single).keys(), self.path / single)
            if (self.path / index).exists():
                names = read_json(self.path / index).get("weight_map")
                if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
                    raise CheckpointError(f"{self.path / index}: has no weight_map from tensors to files.")
                shards = sorted(set(names.values()))
                missing = [s for s in shards if not (self.path / s).exists()]
                if missing or not shards:
                    raise CheckpointError(
                        f"{self.path / index}: names {', '.join(missing) or 'no shards'}, not there; copy them all."
                    )
                return {name: self.path / shard for name, shard in names.items()}
        raise CheckpointError(
            f"{self.path}: holds no weights (model.safetensors, pytorch_model.bin, or shards of them)."
        )

    def _load(self, file):
        if self._open[0] != file:
            try:
                if file.suffix == ".safetensors":
                    self._open = (file, safe_open(file, "pt"))
                else:
                    mapped = zipfile.is_zipfile(file)  # else written by torch before 1.6
                    held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
                    if not isinstance(held, dict) or not all(isinstance(v, torch.Tensor) for v in held.values()):
                        raise ValueError("it holds something else than tensors by name")
                    self._open = (file, held)
            except Exception as error:
                first = first_line(error, 200)
                code = "; it may hold code, which is not run" if "weights_only" in str(error).lower() else ""
                raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {first}){code}.") from None
        return self._open[1]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self._where:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}.")
        return self._where[name]

    def _of(self, name, get_safe):
        file = self.file(name)
        found = self._load(file)
        try:
            return getattr(found, get_safe)(name) if hasattr(found, get_safe) else found[name]
        except Exception:  # an index that names a tensor which its shard does not hold
            raise CheckpointError(f"{file}: lacks the tensor {name!r} that the index names in it.") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._of(name, "get_tensor")

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape as a tuple, without reading the tensor."""
        found = self._of(name, "get_slice")
        return tuple(found.get_shape() if hasattr(found, "get_shape") else found.shape)


class Shapes(dict):
    """{tensor: shape} of weights on the hub, read as `Weights` is; None: its shape is not known."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """As `Weights.shape`."""
        return self[name]


class Part(NamedTuple):
    """A language model or a vision tower before it is loaded, as its small files say.

    ``folder``: where all its files are, be it the hub's cache; None: not on this machine. ``config``: its config.json;
    {}: not known. ``shapes``: of the weights, where there is no folder; None: not known. ``problem``: why it cannot be
    loaded; ``unseen``: what could not be looked at, and why.
    """

    name: str
    folder: Path | None = None
    config: dict[str, Any] = {}
    shapes: Shapes | None = None
    problem: str | None = None
    unseen: str | None = None

    @property
    def weights(self) -> "Weights | Shapes | None":
        """What holds the names and shapes of its tensors.

        Raises:
            CheckpointError: as `Weights`.
        """
        return Weights(self.folder) if self.folder else self.shapes


def find_part(name: str | os.PathLike, cache: str | os.PathLike | None = None) -> Part:
    """A model by its folder, or by its name on the hub: from the cache where it is there as a whole, else by what is
    cheap to fetch, config.json and the names and shapes of its tensors.

    Args:
        name: folder or name. cache: the hub's, where it is another than usual (``--cache_dir``).

    Raises:
        CheckpointError: a folder's config.json is damaged.
    """
    name, folder = str(name), Path(name)
    if folder.is_dir():
        file = folder / "config.json"
        return Part(name, folder, read_json(file) if file.exists() else {})
    from huggingface_hub import hf_hub_download, try_to_load_from_cache, utils

    try:
        if folder.is_file() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise utils.HFValidationError
        file = try_to_load_from_cache(name, "config.json", cache_dir=cache)
        if isinstance(file, str) and _all_here(Path(file).parent):
            return Part(name, Path(file).parent, read_json(file))
        file = Path(hf_hub_download(name, "config.json", cache_dir=cache))
    except utils.LocalEntryNotFoundError as error:
        return Part(name, unseen=f"is not on this machine, and the hub does not answer ({first_line(error, 100)})")
    except utils.EntryNotFoundError:
        return Part(name, problem="has no config.json on the hub; give a model of transformers' layout")
    except (utils.HFValidationError, utils.RepositoryNotFoundError) as error:
        gated = isinstance(error, utils.GatedRepoError)
        why = "asks for leave (accept its terms there, and run: hf auth login)" if gated else "is not there"
        why = f"and on the hub it {why}" if "/" in name else "nor a name on the hub"
        return Part(name, problem=f"is no folder, {why}; give a folder, or a name on the hub")
    except Exception as error:  # of the network's libraries
        return Part(name, unseen=f"is not on this machine, and the hub does not answer ({first_line(error, 100)})")
    config = read_json(file)
    if _all_here(file.parent):
        return Part(name, file.parent, config)
    try:
        shapes = _shapes_on_hub(name, cache)
    except Exception as error:
        return Part(name, config=config, unseen=f"has weights that cannot be looked at ({first_line(error, 100)})")
    why = None if shapes else "has weights in one .bin file, which is looked at once it is downloaded"
    return Part(name, None, config, shapes, unseen=why)


def _all_here(folder):
    """Whether a folder of the hub's cache holds all the weights that are loaded from it."""
    for single in SINGLES[:2]:
        if (folder / single).exists():
            return True
        if (index := folder / f"{single}.index.json").exists():
            named = read_json(index).get("weight_map") or {}
            return all((folder / str(shard)).exists() for shard in named.values())
    return False


def _shapes_on_hub(name, cache):
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, utils

    try:
        files = get_safetensors_metadata(name).files_metadata.values()
        return Shapes({n: tuple(tensor.shape) for file in files for n, tensor in file.tensors.items()})
    except utils.NotASafetensorsRepoError:
        with contextlib.suppress(utils.EntryNotFoundError):
            index = hf_hub_download(name, "pytorch_model.bin.index.json", cache_dir=cache)
            return Shapes(dict.fromkeys(read_json(index).get("weight_map") or ()))
        return None


def is_whole(folder: str | os.PathLike) -> bool:
    """Whether a folder has a model's weights, rather than a projector or an adapter alone (or nothing)."""
    names = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
    return any((Path(folder) / name).exists() for name in names)


def kind_of(folder: Path, config: dict[str, Any]) -> str | None:
    """What a folder holds, as its files and its config.json say.

    Returns:
        ``lora``, ``hf`` (Hugging Face's LlavaForConditionalGeneration), ``llava`` (a whole LLaVA checkpoint; a language
        model alone, too), ``projector``, or None.
    """
    if (folder / "adapter_config.json").exists():
        return "lora"
    if "LlavaForConditionalGeneration" in (config.get("architectures") or ()):
        return "hf"
    return "llava" if is_whole(folder) else "projector" if (folder / "mm_projector.bin").exists() else None


def local_folder(path: str | os.PathLike, what: str = "", hint: str = "give a folder or a name on the hub") -> Path:
    """A folder as it is, or a name on the hub as the folder that it was downloaded to.

    Args:
        path: folder or name. what: it is, hint: what to do, for the message.

    Raises:
        CheckpointError: there is no such folder, and the hub does not give it.
    """
    folder, why = Path(path).expanduser(), ""
    if str(path) and folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(path), allow_patterns=_FETCHED, ignore_patterns="open_clip*"))
        except Exception as error:
            why = f", and the hub does not give it ({first_line(error, 160)})"
    raise CheckpointError(f"{what}{path}: is no folder{why}; {hint}.")


def first_line(error: Exception, length: int) -> str:
    """What an error says, in one line of at most ``length`` characters; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a json file; CheckpointError where there is none."""
    return files.read_json(path, error=CheckpointError, expected=dict)


class Folder:
    """A folder that appears whole or not at all: written beside itself and renamed.

    Raises:
        CheckpointError: it exists already, or cannot be written (a full disk, say); nothing is left behind then.
    """

    def __init__(self, target: str | os.PathLike) -> None:
        self.target = Path(target)
        self.part = self.target.with_name(self.target.name + ".part")
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise CheckpointError(f"{self.target}: exists already; choose another folder, or remove it.")

    def __enter__(self) -> Path:
        shutil.rmtree(self.part, ignore_errors=True)
        try:
            self.part.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.part}: cannot be made ({error.strerror}).") from None
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if kind is None:
            if self.target.exists():
                self.target.rmdir()
            os.replace(self.part, self.target)
            return
        shutil.rmtree(self.part, ignore_errors=True)
        if isinstance(error, OSError) or kind.__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.target}: cannot be written ({reason}).") from None


def save_tokenizer(
    tokenizer: "PreTrainedTokenizerBase | None", folder: str | os.PathLike, origin: str | os.PathLike
) -> None:
    """Write a tokenizer as LLaVA's tools on every transformers read it: with the files of its origin, where there are.

    transformers 5 writes no tokenizer.model, and settings that older ones cannot read or read otherwise.

    Args:
        tokenizer: without added tokens; None where it is written already. folder: to write to. origin: folder or hub
            name of the model that it came with.
    """
    from transformers.utils import cached_file

    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        found = Path(origin) / name
        if not Path(origin).is_dir():
            try:  # what was downloaded when the tokenizer was loaded; a training that saves needs no network
                found = Path(cached_file(str(origin), name, local_files_only=True))
            except (OSError, TypeError, ValueError):  # not among them
                continue
        if found.exists():
            shutil.copyfile(found, Path(folder) / name)
