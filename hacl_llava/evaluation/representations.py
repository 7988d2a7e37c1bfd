"""Global representations of images, captions and hallucinated captions, as HACL contrasts them: one pass each.

Shapes: N images, M hallucinated captions of all images together, D hidden size, P head size.
"""

import contextlib
import gc
import hashlib
import heapq
import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import compat  # noqa: F401  (before llava)
from ..checkpoints.load import Loaded, load_pretrained
from ..common.files import atomic
from ..common.images import Images
from ..common.weights import is_whole, local_folder, read_json
from ..config import HaclConfig, HaclError
from ..data import tokenize_caption
from ..fused import IMAGE_TOKEN_INDEX
from ..records import (
    DataError,
    caption_of,
    hallucinated_captions,
    hallucinated_kinds,
    name_of,
    problem_of,
    stream_records,
)
from ..representation import read_head, suffix_ids
from .answers import alive
from .journal import digest_of

# isort: split
from llava.mm_utils import tokenizer_image_token

_FORMAT = 3  # of the files; another one is made anew
_LISTED = 1000  # names of skipped records that are kept; all are counted


class Item(NamedTuple):
    """One record: its place in the file, its name for messages, image (a path), caption, hallucinated captions and
    what each of them gets wrong (None: unknown)."""

    index: int
    name: str
    image: str
    caption: str
    hallucinated: tuple
    kinds: tuple


@dataclass
class Representations:
    """What one checkpoint makes of the records.

    ``index``: ``[N]`` places of the records in the data. ``owner``: ``[M]`` row of the image that a hallucinated
    caption belongs to; ``which``: ``[M]`` its place among those of its record. ``spaces``: {"llm": (e_v ``[N, D]``, e_t
    ``[N, D]``, e_h ``[M, D]``), "centred": e_v less the mean e_v, the others less the mean e_t}, and with heads
    {"head": ...}, centred if they were trained so, of width P and unit norm; float32. ``skipped``: names of records
    whose image could not be read, and why. ``about``: settings and what the file was made from.
    """

    index: np.ndarray
    owner: np.ndarray
    which: np.ndarray
    spaces: dict
    skipped: list
    about: dict

    def only(self, index: Iterable[int]) -> "Representations":
        """The same for some of the records, ``index``, in that order; all of them must be here."""
        row_of = {int(i): row for row, i in enumerate(self.index)}
        rows = np.array([row_of[int(i)] for i in index], dtype=np.int64)
        new_row = np.full(len(self.index), -1)
        new_row[rows] = np.arange(len(rows))
        owner = new_row[self.owner]
        kept = np.lexsort((self.which, owner))[(owner < 0).sum() :]
        spaces = {name: (v[rows], t[rows], h[kept]) for name, (v, t, h) in self.spaces.items()}
        return Representations(self.index[rows], owner[kept], self.which[kept], spaces, self.skipped, self.about)


def sample_records(path: str | os.PathLike, limit: int, seed: int) -> tuple[list[Item], dict[str, Any], list[str]]:
    """Draw records with an image and a caption, whole and readable as LLaVA's; the same ones for the same seed.

    A larger ``limit`` draws the same records and more. Images are not opened here.

    Args:
        path: json or json lines, as LLaVA has them. limit: how many at most.

    Returns:
        ([`Item`] in the order of the file, {"records", "usable", "sampled", "sha256"}, [reasons by name]).

    Raises:
        DataError: the file cannot be read, or nothing in it can be used.
    """
    skipped, counts = [], {"records": 0, "usable": 0, "unusable": 0}

    def usable():
        for index, (_, record) in enumerate(stream_records(path)):
            problem = problem_of(record, plain=False)
            if problem is None and "image" not in record:
                problem = "has no image"
            if problem is None and not caption_of(record):
                problem = "has no caption"
            counts["records"] += 1
            counts["unusable" if problem else "usable"] += 1
            if problem is None:
                name, texts = name_of(os.path.basename(path), index, record), hallucinated_captions(record)
                kinds = tuple(hallucinated_kinds(record))
                yield Item(index, name, record["image"], caption_of(record), tuple(texts), kinds)
            elif len(skipped) < _LISTED:
                skipped.append(f"{name_of(path, index, record)} {problem}")

    drawn = heapq.nsmallest(limit, usable(), key=lambda item: random.Random(f"{seed}/{item.index}").random())
    if not drawn:
        first = f" The first: {skipped[0]}." if skipped else ""
        raise DataError(f"{path}: none of its {counts['records']} records has an image and a caption.{first}")
    items = sorted(drawn, key=lambda item: item.index)
    digest = hashlib.sha256(json.dumps([item[:1] + item[2:] for item in items]).encode()).hexdigest()
    return items, {**counts, "sampled": len(items), "sha256": digest}, skipped


# --- checkpoints ------------------------------------------------------------------------------------------------------


def hacl_settings(path: str | os.PathLike) -> tuple[HaclConfig | None, bool]:
    """A checkpoint's own HACL settings.

    Args:
        path: folder or name on the hub.

    Returns:
        (`HaclConfig` or None where it has none, whether it has projection heads).

    Raises:
        HaclError: they cannot be read, or there is no such checkpoint.
    """
    folder = local_folder(path)
    found = read_head(folder)
    if found is not None:
        return found[0], found[0].head_dim != 0
    saved = read_json(folder / "config.json").get("hacl")
    return (HaclConfig.from_dict(saved, folder / "config.json") if saved else None), False


def common_config(paths: Iterable[str | os.PathLike], **given: Any) -> HaclConfig:
    """How sequences are made, for all checkpoints the same: their own ``visual_bos``, ``representation``, ``prompt``.

    Args:
        given: what is to be in place of their own; None: their own.

    Returns:
        The defaults where no checkpoint has HACL settings.

    Raises:
        HaclError: they differ, or what is given is not allowed.
    """
    own = {str(path): config for path in paths if (config := hacl_settings(path)[0]) is not None}
    values = {}
    for name in ("visual_bos", "representation", "prompt"):
        found = {path: getattr(config, name) for path, config in own.items()}
        if name == "prompt":  # of no account for the others
            found = {path: prompt for path, prompt in found.items() if own[path].representation == "prompt"}
        if given.get(name) is None and len(set(found.values())) > 1:
            said = ", ".join(f"{path}: {value}" for path, value in found.items())
            flag = name.replace("_", "-")
            raise HaclError(f"the checkpoints were trained with different {name} ({said}); give --{flag}.")
        if (value := given.get(name, None)) is not None or found:
            values[name] = next(iter(found.values())) if value is None else value
    return HaclConfig(fused=False, **values)


def _sizes(files):
    """Sizes and times of files, 0 for one that is not there: an image that was repaired is looked at again."""
    for file in files:
        try:
            stat = os.stat(file)
            yield stat.st_size, stat.st_mtime_ns
        except (OSError, ValueError):  # ValueError: a name that no file can have
            yield 0, 0


# --- one checkpoint ---------------------------------------------------------------------------------------------------


class Extractor:
    """Runs single sequences through a LLaVA model and takes the last layer's state, after the final norm, at the end.

    The sequences are those of HACL's separate passes (`hacl_llava.representation`): ``[BOS, v_1 .. v_m, suffix]`` and
    ``[BOS, t_1 .. t_n, suffix]``, arXiv 2312.06968, where the suffix is EOS.

    Args:
        loaded: what `load_pretrained` returns; a model of any LLaVA class.
        config: how sequences are made, see `common_config`; None: `HaclConfig`'s defaults.
        batch_size: images at a time; of texts, which are shorter, four times as many.
        workers: processes that read images; 0 reads them here.
    """

    def __init__(
        self, loaded: Loaded, config: HaclConfig | None = None, batch_size: int = 16, workers: int = 0
    ) -> None:
        self.how = config or HaclConfig()
        self.tokenizer, self.model, self.processor, _ = loaded
        self.batch_size, self.workers = batch_size, workers
        config = self.model.config
        longest = getattr(config, "tokenizer_model_max_length", None) or config.max_position_embeddings
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, longest)
        # What LLaVA would cut is the end, which is EOS; and it refuses stage 1's setting of old with <im_start>.
        config.tokenizer_model_max_length, config.tokenizer_padding_side = None, "right"
        config.tune_mm_mlp_adapter = False
        self.suffix = suffix_ids(self.how, self.tokenizer)
        before = tokenizer_image_token("<image>", self.tokenizer)
        before = before[: before.index(IMAGE_TOKEN_INDEX)] if self.how.visual_bos else []
        if self.how.visual_bos and not before and self.tokenizer.bos_token_id is not None:
            before = [self.tokenizer.bos_token_id]  # of a tokenizer that adds none, as in training
        self.visual_ids = [*before, IMAGE_TOKEN_INDEX, *self.suffix]
        self.device = self.model.get_input_embeddings().weight.device
        self.cut = 0  # texts that were longer than the model takes

    def _last(self, embeds, mask):
        states = self.model.get_model()(inputs_embeds=embeds, attention_mask=mask, use_cache=False, return_dict=True)[0]
        end = mask.sum(1) - 1
        return states[torch.arange(len(states), device=states.device), end.to(states.device)].float().cpu()

    @torch.no_grad()
    def images(
        self, folder: str | os.PathLike, names: Sequence[str], label: str = ""
    ) -> tuple[torch.Tensor, list[int], dict[int, str]]:
        """Represent images.

        Args:
            folder: of the images. names: their files in it. label: for the progress bar.

        Returns:
            ``[N', D]`` float32, the rows of ``names`` that they belong to, and {row: reason} of those left out.
        """
        found, rows, failed = [], [], {}
        data = Images(folder, names, self.processor, self.model.config)
        workers = self.workers if len(names) > 2 * self.batch_size else 0
        loader = DataLoader(data, self.batch_size, collate_fn=list, num_workers=workers)
        with tqdm(total=len(names), desc=f"{label} images".strip(), unit="image") as bar:
            for first, batch in zip(range(0, len(names), self.batch_size), alive(loader)):
                failed.update({first + k: reason for k, (_, _, reason) in enumerate(batch) if reason})
                good = [(first + k, pixels, size) for k, (pixels, size, reason) in enumerate(batch) if not reason]
                if good:
                    pixels = [torch.from_numpy(p).to(self.device, self.model.dtype) for _, p, _ in good]
                    if pixels[0].ndim == 3:
                        pixels = torch.stack(pixels)
                    ids = torch.tensor([self.visual_ids] * len(good), device=self.device)
                    _, _, mask, _, embeds, _ = self.model.prepare_inputs_labels_for_multimodal(
                        ids, None, torch.ones_like(ids, dtype=torch.bool), None, None, pixels, [s for _, _, s in good]
                    )
                    found.append(self._last(embeds, mask))
                    rows += [row for row, _, _ in good]
                bar.update(len(batch))
        return (torch.cat(found) if found else torch.zeros(0, self.model.config.hidden_size)), rows, failed

    @torch.no_grad()
    def texts(self, texts: Iterable[str], label: str = "") -> torch.Tensor:
        """Represent texts, in batches of like length; one that repeats is computed once.

        Returns:
            ``[len(texts), D]`` float32.
        """
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # a tokenizer takes no half character
        unique = list(dict.fromkeys(texts))
        ids = [tokenize_caption(text, self.tokenizer, self.suffix) for text in unique]
        self.cut += sum(len(x) >= self.tokenizer.model_max_length for x in ids)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # the longest first: no surprise at the end
        states = torch.zeros(len(ids), self.model.config.hidden_size)
        size = 4 * self.batch_size
        with tqdm(total=len(ids), desc=f"{label} texts".strip(), unit="text") as bar:
            for start in range(0, len(order), size):
                part = order[start : start + size]
                lengths = torch.tensor([len(ids[i]) for i in part], device=self.device)
                rows = torch.zeros(len(part), int(lengths.max()), dtype=torch.long, device=self.device)
                for row, i in zip(rows, part):
                    row[: len(ids[i])] = ids[i]
                mask = torch.arange(rows.shape[1], device=self.device)[None] < lengths[:, None]
                states[part] = self._last(self.model.get_model().embed_tokens(rows), mask)
                bar.update(len(part))
        place = {text: i for i, text in enumerate(unique)}
        return states[[place[text] for text in texts]]


def extract(
    loaded: Loaded,
    items: Sequence[Item],
    images: str | os.PathLike,
    config: HaclConfig | None = None,
    batch_size: int = 16,
    workers: int = 0,
    label: str = "",
) -> Representations:
    """Represent records by a loaded model; centred, and in head space where the model has heads.

    Args:
        loaded: what `load_pretrained` returns. items: [`Item`]. images: the folder of their images. Others: as
            `Extractor`.

    Returns:
        `Representations` of the items whose image can be read; ``about`` is {"texts_cut": ...}.

    Raises:
        HaclError: a representation is not finite.
    """
    extractor = Extractor(loaded, config, batch_size, workers)
    e_v, rows, failed = extractor.images(images, [item.image for item in items], label)
    kept = [items[row] for row in rows]
    texts = [item.caption for item in kept] + [text for item in kept for text in item.hallucinated]
    states = extractor.texts(texts, label) if texts else e_v
    llm = e_v, states[: len(kept)], states[len(kept) :]
    means = llm[0].mean(0), llm[1].mean(0), llm[1].mean(0)
    spaces = {"llm": llm, "centred": tuple(x - mean for x, mean in zip(llm, means))}
    head = getattr(loaded.model, "hacl_head", None)
    if head is not None and not isinstance(head.visual, torch.nn.Identity):
        with torch.no_grad():
            device = head.log_temperature.device
            v, t, _ = head(llm[0].to(device), torch.cat(llm[1:]).to(device))
            spaces["head"] = v.cpu(), t[: len(kept)].cpu(), t[len(kept) :].cpu()
    if not all(x.isfinite().all() for x in llm):
        raise HaclError(f"{label}: a representation is not finite; load it with --dtype float32 or bfloat16.")
    return Representations(
        np.array([item.index for item in kept], dtype=np.int64),
        np.array([row for row, item in enumerate(kept) for _ in item.hallucinated], dtype=np.int64),
        np.array([k for item in kept for k in range(len(item.hallucinated))], dtype=np.int64),
        {name: tuple(x.numpy() for x in space) for name, space in spaces.items()},
        [f"{items[row].name}: {reason}" for row, reason in sorted(failed.items())],
        {"texts_cut": extractor.cut, "visual_ids": extractor.visual_ids},
    )


def _save(path, found):
    arrays = {"index": found.index, "owner": found.owner, "which": found.which}
    for space, parts in found.spaces.items():
        arrays |= {f"{space}.{name}": x for name, x in zip(("image", "caption", "hallucinated"), parts)}
    about = json.dumps({**found.about, "skipped": found.skipped})
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
    with atomic(path) as part:
        save_file(tensors, part, metadata={"hacl_llava": about})


def _read(path, digest):
    """What an earlier run left, or None where there is nothing or it was made from something else."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["hacl_llava"])
            if about["digest"] != digest:
                return None
            get = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (KeyError, OSError, ValueError, SafetensorError):
        return None
    spaces = {
        space: tuple(get[f"{space}.{name}"] for name in ("image", "caption", "hallucinated"))
        for space in ("llm", "centred", "head")
        if f"{space}.image" in get
    }
    skipped = about.pop("skipped")
    return Representations(get["index"], get["owner"], get["which"], spaces, skipped, about)


def represent(
    path: str | os.PathLike,
    base: str | os.PathLike | None,
    items: Sequence[Item],
    data_digest: str,
    images: str | os.PathLike,
    file: str | os.PathLike,
    *,
    config: HaclConfig,
    label: str = "",
    options: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[Representations, bool]:
    """Representations of records by one checkpoint, taken from ``file`` where it holds them, else written there.

    Args:
        path: of the checkpoint, any that `load_pretrained` takes. base: the language model of a projector or a LoRA;
            of no account for a whole checkpoint. items, data_digest: from `sample_records`. images: their folder.
        config, label, how: as `extract`. options: for `load_pretrained` (device, dtype, bits, vision_tower).

    Returns:
        (`Representations`, whether they were there already).

    Raises:
        HaclError: the checkpoint cannot be loaded, or not one image can be read.
    """
    folder, options = local_folder(path), options or {}
    lora = (folder / "adapter_config.json").exists()
    base = local_folder(base) if base and (lora or not is_whole(folder)) else None
    own, heads = hacl_settings(folder)
    sequences = {"visual_bos": config.visual_bos, "representation": config.representation}
    sequences |= {"prompt": config.prompt} if config.representation == "prompt" else {}
    heads = heads and all(getattr(own, name) == value for name, value in sequences.items())
    made_from = {
        "format": _FORMAT,
        "data": data_digest,
        "images": [os.path.abspath(images), *_sizes(os.path.join(images, item.image) for item in items)],
        "checkpoint": digest_of(folder),
        "base": base and digest_of(base),
        **sequences,
        "dtype": options.get("dtype"),
        "bits": options.get("bits"),
        "vision_tower": options.get("vision_tower"),
    }
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    found = _read(file, digest)
    if found is not None:
        return found, True
    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_pretrained(folder, base, hacl=heads, **options)
    found = extract(loaded, items, images, config, label=label, **how)
    if not len(found.index):
        raise DataError(f"{images}: none of {len(items)} images can be read; the first: {found.skipped[0]}")
    found.about |= {
        "digest": digest,
        "checkpoint": str(path),
        "checkpoint_digest": made_from["checkpoint"],
        "base": base and str(base),
        **sequences,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "hidden_size": loaded.model.config.hidden_size,
        "model_type": loaded.model.config.model_type,
    }
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _save(file, found)
    return found, False
