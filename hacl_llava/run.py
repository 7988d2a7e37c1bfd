"""What a training was asked for: its arguments, and what the parts that they name say of themselves."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

from .common.weights import Part, find_part
from .resume import MANIFEST, broken, checkpoints


@dataclasses.dataclass
class Run:
    """What LLaVA's train() was called with: its three groups of arguments, parsed.

    ``stage``: 1 or 2 by the script; None: LLaVA's own script with ``--use_hacl``. ``rehearsed``: it is looked at and
    not started, so that nobody knows on how many processes it will be.
    """

    model: Any
    data: Any
    training: Any
    stage: int | None = None
    rehearsed: bool = False

    @property
    def checkpoints(self) -> list[Path]:
        """Those that training would not pass over, and those that hold a projector alone."""
        found = checkpoints(self.training.output_dir)
        return [p for p in found if not broken(p) or not (p / MANIFEST).exists() and any(p.glob("*.bin"))]

    @cached_property
    def llm(self) -> Part:
        """``--model_name_or_path``."""
        return find_part(self.model.model_name_or_path, getattr(self.training, "cache_dir", None))

    @cached_property
    def tower(self) -> Part | None:
        """``--vision_tower``."""
        return None if self.model.vision_tower is None else find_part(self.model.vision_tower)

    @property
    def vision(self) -> dict[str, Any]:
        """The vision part of the tower's config.json; {}: not known."""
        config = self.tower.config if self.tower else {}
        return config.get("vision_config", config)
