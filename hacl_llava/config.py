"""Every HACL setting in one checked place. Standard library only."""

import os
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Literal

TEMPERATURE_RANGE = (0.001, 0.5)  # the released code's
NEGATIVES = Literal["own", "batch", "global"]
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
    is kept under the key ``"hacl"`` of the model's config.json.

    Raises:
        HaclError: a value is out of range, or two values do not go together.
    """

    weight: float = _setting(1.0, "Weight of the contrastive loss: loss_lm + weight * (loss_i2t + loss_t2i) / 2.")
    temperature: float = _setting(0.07, "Temperature at the start; it stays within [0.001, 0.5].")
    learnable_temperature: bool = _setting(True, "Train the temperature (on a log scale).")
    negatives: NEGATIVES = _setting(
        "own",
        "Whose hallucinated captions are candidates for an image: its own (the paper's formula), those of the batch "
        "on its rank (the released code), or those of all ranks.",
    )
    num_hallucinated: int = _setting(
        -1,
        "Hallucinated captions used per image: -1 takes all a record has, 0 contrasts images with captions only, "
        "K takes the first K.",
    )
    queue_size: int = _setting(
        0, "Past image and caption features kept as further negatives (the paper: 16384; 0: none). Any number will do."
    )
    gather: bool = _setting(True, "Contrast over the batches of all ranks, with gradient; False: each rank on its own.")
    head_dim: int = _setting(
        -1,
        "Width of the two projection heads: -1 is a quarter of the LLM's hidden size (the released code), 0 means no "
        "heads, contrast in the LLM's own space (the paper's formula).",
    )
    fused: bool = _setting(
        True,
        "Share the generation pass with the visual representation, and compute logits on supervised positions only; "
        "False: a separate pass and full logits (the same result, slower).",
    )
    visual_bos: bool = _setting(
        True,
        "Start the visual sequence with what stands before the image (BOS), as the captions do; False: the image "
        "tokens alone, as the released code has it (needs --hacl_fused False).",
    )

    def __post_init__(self) -> None:
        def refuse(name, allowed):
            raise HaclError(f"hacl_{name} is {getattr(self, name)!r}, allowed is {allowed}.")

        if not self.weight >= 0:
            refuse("weight", "a number >= 0 (1.0 is the paper's)")
        low, high = TEMPERATURE_RANGE
        if not low <= self.temperature <= high:
            refuse("temperature", f"a number from {low} to {high} (0.07 is the usual start)")
        if self.negatives not in (allowed := NEGATIVES.__args__):
            refuse("negatives", f"one of {', '.join(allowed)}")
        if self.num_hallucinated < -1:
            refuse("num_hallucinated", "-1 (all) or a number >= 0")
        if self.queue_size < 0:
            refuse("queue_size", "0 (no queue) or a number > 0 (16384 is the paper's)")
        if self.head_dim < -1:
            refuse("head_dim", "-1 (a quarter of the hidden size), 0 (no heads) or a number > 0")
        if self.fused and not self.visual_bos:
            refuse("visual_bos", "True while hacl_fused is True (that pass has a BOS); set --hacl_fused False too")
        if self.negatives == "global" and not self.gather:
            refuse("negatives", "'own' or 'batch' while hacl_gather is False")

    @classmethod
    def from_arguments(cls, arguments: Any) -> "HaclConfig":
        """Read the ``hacl_*`` attributes of parsed arguments; an attribute that is missing keeps its default."""
        names = [f.name for f in fields(cls)]
        return cls(**{n: getattr(arguments, f"hacl_{n}") for n in names if hasattr(arguments, f"hacl_{n}")})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HaclConfig":
        """Rebuild from ``to_dict``; keys that this version does not know are refused by name."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise HaclError(f"unknown HACL settings {unknown}; known are {[f.name for f in fields(cls)]}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, for json."""
        return asdict(self)


@dataclass(frozen=True)
class RunSettings:
    """What a run does when something goes wrong; flags with the prefix ``--hacl_`` too, but no part of the model.

    They hold for stage 1 and 2, with and without HACL, and leave no trace in a run in which nothing goes wrong.

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

    def __post_init__(self) -> None:
        for name, allowed in (("check_data", CHECK_DATA), ("bad_records", BAD_RECORDS), ("nonfinite", NONFINITE)):
            if getattr(self, name) not in allowed.__args__:
                raise HaclError(
                    f"hacl_{name} is {getattr(self, name)!r}, allowed is one of {', '.join(allowed.__args__)}."
                )
        if self.max_failed < 0:
            raise HaclError(f"hacl_max_failed is {self.max_failed}, allowed is a number >= 0.")

    @classmethod
    def from_arguments(cls, arguments: Any) -> "RunSettings":
        """Read the ``hacl_*`` attributes of parsed arguments; an attribute that is missing keeps its default."""
        names = [f.name for f in fields(cls)]
        return cls(**{n: getattr(arguments, f"hacl_{n}") for n in names if hasattr(arguments, f"hacl_{n}")})


USE_HACL = "Train with HACL: contrast each image with its caption, with hallucinated captions as hard negatives."


def hacl_argument_fields(use_hacl: bool) -> list[tuple[str, Any, Field]]:
    """``(name, type, field)`` of ``--use_hacl``, with this default, and of each ``--hacl_*`` flag.

    As ``dataclasses.make_dataclass`` takes them.
    """
    flags = [("use_hacl", bool, _setting(use_hacl, USE_HACL))]
    return flags + [
        (f"hacl_{f.name}", f.type, field(default=f.default, metadata=f.metadata))
        for settings in (HaclConfig, RunSettings)
        for f in fields(settings)
    ]
