"""Evidence: evaluation on the field's benchmarks, pictures of representations, and a report of both.

A task (`pope`, `chair`, `amber`, `mmhal`) reads `Question` items and scores answers into counts, whose sums give every
metric; `answers` asks a checkpoint or an endpoint; `analyze` looks at representations; `report` puts runs side by side.
"""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .. import __version__


class Question(NamedTuple):
    """One thing asked about one image.

    ``id``: unique within its task. ``image``: path relative to the image folder. ``text``: what is asked, without the
    image token. ``facts``: what the task scores the answer by (``{"label": "yes"}``).
    """

    id: str
    image: str
    text: str
    facts: dict


def provenance(seed=None):
    """What made a result: versions, command line, commit of the checkout if there is one, and the seed."""
    names = {"torch": "torch", "transformers": "transformers", "llava": "llava-torch"}
    versions = {"hacl_llava": __version__, "python": platform.python_version()}
    for name, distribution in names.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    # Only of this package's own checkout: installed elsewhere, git would answer for whatever repository lies around it.
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists():
        git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"versions": versions, "command": command, "commit": commit, "seed": seed}
