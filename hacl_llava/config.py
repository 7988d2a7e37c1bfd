"""Every HACL setting in one checked place. Standard library only."""

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Literal

TEMPERATURE_RANGE = (0.001, 0.5)  # the released code's
RAMP = 0.2  # share of a run over which the contrast's weight rises where it begins late
GONE = ("gradient_share", "ranking")  # settings of earlier versions, 0 where they were not used
NEGATIVES = Literal["own", "batch", "global"]
REPRESENTATION = Literal["eos", "prompt"]
CHECK_DATA = Literal["fast", "full", "off"]
BAD_RECORDS = Literal["refuse", "skip"]
NONFINITE = Literal["stop", "skip"]


class HaclError(ValueError):
    """A mistake in settings or input; the message says what was got, what is allowed, and what to do."""


class DataError(HaclError):
    """Input data that cannot be used; the message names the file and the record."""


def on_first_rank() -> bool:
    """Whether this process is the one that speaks (the launchers set RANK)."""
    return int(os.environ.get("RANK", 0)) == 0


def _setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class HaclConfig:
    """Settings of HACL, checked when made.

    Each field is also a command-line flag with the prefix ``--hacl_`` (``weight`` is ``--hacl_weight``), and the whole
    is kept under the key ``"hacl"`` of the model's config.json. Without values this is the paper's contrast, with heads
    as in the released code; the flags' defaults are ``PRESETS["default"]``.

    Raises:
        HaclError: a value is out of range, or two values do not go together.
    """

    weight: float = _setting(1.0, "Weight of the contrastive loss: loss_lm + weight * (loss_i2t + loss_t2i) / 2.")
    temperature: float = _setting(0.07, "Temperature at the start; it stays within [0.001, 0.5].")
    learnable_temperature: bool = _setting(True, "Train the temperature (on a log scale).")
    negatives: NEGATIVES = _setting(
        "own",
        "Whose hallucinated captions are candidates for an image: its own (the paper's formula), its rank's batch's "
        "(the released code), or those of all ranks.",
    )
    representation: REPRESENTATION = _setting(
        "eos",
        "What stands for an image or a caption: the LLM's state at EOS behind it (the paper), or at --hacl_prompt's "
        "last token there.",
    )
    prompt: str = _setting(
        r'\nThis in one word: "', "Put behind images and captions by --hacl_representation prompt; \\n: a new line."
    )
    centre: bool = _setting(
        False,
        "Subtract from images and captions their own means before heads and norm.",
    )
    start: float = _setting(
        0.0,
        "Share of the run before the contrast begins; its weight then rises over a fifth of the run. 0: at once.",
    )
    end: float = _setting(1.0, "Share of the run after which there is none.")
    num_hallucinated: int = _setting(
        -1,
        "Hallucinated captions used per image: -1 all, 0 none (contrast with captions only), K the first K.",
    )
    queue_size: int = _setting(
        0, "Past image and caption features kept as further negatives (the paper: 16384; 0: none)."
    )
    gather: bool = _setting(True, "Contrast over the batches of all ranks, with gradient; False: each rank on its own.")
    head_dim: int = _setting(
        -1,
        "Width of the two projection heads: -1 a quarter of the LLM's hidden size (the released code), 0 no heads (the "
        "paper's formula).",
    )
    fused: bool = _setting(
        True,
        "Share the generation pass with the image's representation; False: separate passes (the same result, slower).",
    )
    visual_bos: bool = _setting(
        True,
        "Start the visual sequence with BOS, as the captions do; False: image tokens alone, the released code (needs "
        "--hacl_fused False).",
    )

    def __post_init__(self) -> None:
        low, high = TEMPERATURE_RANGE
        choices = {"negatives": NEGATIVES.__args__, "representation": REPRESENTATION.__args__}
        checks = (
            ("weight", self.weight >= 0, "a number >= 0 (1.0 is the paper's)"),
            (
                "temperature",
                low <= self.temperature <= high,
                f"a number from {low} to {high} (0.07 is the usual start)",
            ),
            *((n, getattr(self, n) in allowed, f"one of {', '.join(allowed)}") for n, allowed in choices.items()),
            ("prompt", self.prompt.strip(), "a text with a word in it, as the default, " + repr(type(self).prompt)),
            ("start", 0 <= self.start < 1, "a share of the run, from 0 to less than 1"),
            (
                "end",
                self.start < self.end <= 1,
                f"a share of the run, more than hacl_start ({self.start:g}), at most 1",
            ),
            ("num_hallucinated", self.num_hallucinated >= -1, "-1 (all) or a number >= 0"),
            ("queue_size", self.queue_size >= 0, "0 (no queue) or a number > 0 (16384 is the paper's)"),
            ("head_dim", self.head_dim >= -1, "-1 (a quarter of the hidden size), 0 (no heads) or a number > 0"),
            (
                "visual_bos",
                self.visual_bos or not self.fused,
                "True while hacl_fused is True (that pass has a BOS); set --hacl_fused False too",
            ),
            ("negatives", self.gather or self.negatives != "global", "'own' or 'batch' while hacl_gather is False"),
        )
        for name, fine, allowed in checks:
            if not fine:
                raise HaclError(f"hacl_{name} is {getattr(self, name)!r}, allowed is {allowed}.")

    def ramp(self, progress: float) -> float:
        """The share of the weights, 0 to 1, when ``progress``, 0 to 1, of a run is done (`start`, `end`)."""
        if progress >= self.end and self.end < 1:
            return 0.0
        if not self.start:
            return 1.0
        rise = min(RAMP, self.end - self.start)
        return min(max((progress - self.start) / rise, 0.0), 1.0)

    @classmethod
    def from_arguments(cls, arguments: Any) -> "HaclConfig":
        """Read the ``hacl_*`` attributes of parsed arguments; an attribute that is missing keeps its default."""
        names = [f.name for f in fields(cls)]
        return cls(**{n: getattr(arguments, f"hacl_{n}") for n in names if hasattr(arguments, f"hacl_{n}")})

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Any = "HaclConfig.from_dict") -> "HaclConfig":
        """Rebuild from ``to_dict``; keys that this version does not know are refused by name, unless they say that
        something was not used. ``file``: where the values stand, for messages."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(k for k, v in values.items() if k not in known and not (k in GONE and v == 0)):
            raise HaclError(
                f"{file}: unknown HACL settings {unknown}, of another version of hacl_llava; known are {known}. Use "
                "that version, or train anew."
            )
        return cls(**{k: v for k, v in values.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, for json."""
        return asdict(self)

    def flags_to_go_on(self, now: "HaclConfig") -> str | None:
        """The flags without which a run begun with these settings cannot go on, all that differ from ``now``; None
        where it can: neither what is contrasted nor what trains is another."""
        needed = ["representation", "centre", "head_dim", "learnable_temperature"]
        needed += ["prompt"] if self.representation == "prompt" else []
        if all(getattr(self, name) == getattr(now, name) for name in needed):
            return None
        then, now = self.to_dict(), now.to_dict()
        return " ".join(f"--hacl_{k} {shlex.quote(str(v))}" for k, v in then.items() if v != now[k])


@dataclass(frozen=True)
class RunSettings:
    """How a run is done; flags with the prefix ``--hacl_`` too, but no part of the model.

    ``text_cache`` is HACL's alone. ``checkpoint_layers`` changes time and memory, never a result. The others say what
    becomes of what goes wrong, and leave no trace in a run in which nothing does. All but the first hold for stage 1
    and 2, with and without HACL.

    Raises:
        HaclError: a value is out of range.
    """

    check_data: CHECK_DATA = _setting(
        "fast",
        "Before anything costly is loaded: fast looks at every record and whether its image is there, full opens every "
        "image too (hacl-llava check-data does it ahead of time), off trusts the data.",
    )
    bad_records: BAD_RECORDS = _setting(
        "refuse",
        "What becomes of records that cannot be used: refuse ends the run before it starts, skip leaves them out, "
        "counts them and lists them in OUTPUT_DIR/bad_records.jsonl.",
    )
    max_failed: int = _setting(
        100,
        "Records that may fail while training runs (an image that vanishes, say): each is replaced by a masked row and "
        "listed; one more ends the run.",
    )
    nonfinite: NONFINITE = _setting(
        "stop",
        "Loss or gradient that is not a number: the batch never reaches the weights; stop ends the run with the "
        "records' ids, skip goes on and lists them in OUTPUT_DIR/nonfinite.jsonl.",
    )
    text_cache: str = _setting("", "Folder that keeps the frozen LLM's states of captions for further epochs and runs.")
    checkpoint_layers: str = _setting(
        "all",
        "Layers that gradient checkpointing computes again: all, the first N, or auto: as few as GPU memory lets.",
    )

    def __post_init__(self) -> None:
        for name, allowed in (("check_data", CHECK_DATA), ("bad_records", BAD_RECORDS), ("nonfinite", NONFINITE)):
            if getattr(self, name) not in allowed.__args__:
                raise HaclError(
                    f"hacl_{name} is {getattr(self, name)!r}, allowed is one of {', '.join(allowed.__args__)}."
                )
        layers = self.checkpoint_layers
        if layers not in ("all", "auto") and not (layers.isascii() and layers.isdigit()):
            raise HaclError(f"hacl_checkpoint_layers is {layers!r}, allowed is all, auto or a number >= 0.")
        if self.max_failed < 0:
            raise HaclError(f"hacl_max_failed is {self.max_failed}, allowed is a number >= 0.")

    @classmethod
    def from_arguments(cls, arguments: Any) -> "RunSettings":
        """Read the ``hacl_*`` attributes of parsed arguments; an attribute that is missing keeps its default."""
        names = [f.name for f in fields(cls)]
        return cls(**{n: getattr(arguments, f"hacl_{n}") for n in names if hasattr(arguments, f"hacl_{n}")})


USE_HACL = "Train with HACL: contrast each image with its caption, with hallucinated captions as hard negatives."
PRESET = "Defaults of the other flags: these, the paper's formula, or the released code's; a flag that is given wins."
# The contrast of the paper and of the released code, as `HaclConfig` has it where nothing is said.
EOS = {
    **{"representation": "eos", "centre": False, "weight": 1.0, "start": 0.0},
    **{"head_dim": -1, "learnable_temperature": True},
}
PRESETS = {
    # Of what was tried on a small LLM, what aligns images with captions and costs captions least: docs/evidence.md.
    "default": {
        **{"representation": "prompt", "centre": True, "weight": 0.05, "start": 0.3},
        **{"head_dim": 0, "learnable_temperature": False},
    },
    "paper": EOS | {"queue_size": 16384, "head_dim": 0},
    # Its hallucinated captions are used only without queue and gather.
    "release": EOS | {"negatives": "batch", "gather": False, "fused": False, "visual_bos": False},
}


def preset_in(argv: Sequence[str]) -> dict[str, Any]:
    """The flags that ``--hacl_preset NAME`` of a command line stands for: ``{"hacl_queue_size": 16384, ...}``; without
    it those of "default"."""
    words = " ".join(argv).replace("=", " ").replace("--hacl-preset", "--hacl_preset").split()
    *_, name = "default", *(b for a, b in itertools.pairwise(words) if a == "--hacl_preset")
    return {f"hacl_{k}": v for k, v in PRESETS.get(name, {}).items()}


def hacl_argument_fields(use_hacl: bool) -> list[tuple[str, Any, Field]]:
    """``(name, type, field)`` of ``--use_hacl``, with this default, and of each ``--hacl_*`` flag.

    As ``dataclasses.make_dataclass`` takes them.
    """
    flags = [("use_hacl", bool, _setting(use_hacl, USE_HACL))]
    flags += [("hacl_preset", Literal[tuple(PRESETS)], _setting("default", PRESET))]
    return flags + [
        (f"hacl_{f.name}", f.type, field(default=f.default, metadata=f.metadata))
        for settings in (HaclConfig, RunSettings)
        for f in fields(settings)
    ]
