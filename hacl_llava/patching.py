"""The two lines that teach LLaVA's own train.py the flag ``--use_hacl``.

patches/use_hacl.patch is the same change for ``git apply``.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from .common.options import argument, option
from .config import HaclError

# The two lines, and the lines of LLaVA's train.py that they go beside.
IMPORT_BEFORE = "from llava.train.llava_trainer import LLaVATrainer\n"
IMPORT = "from hacl_llava.integration import install as install_hacl  # before LLaVA's trainer\n"
CALL_BEHIND = "def train(attn_implementation=None):\n"
CALL = "    install_hacl(globals())  # --use_hacl; off, this is stock LLaVA\n"


def find_train_py(path: str | os.PathLike) -> Path:
    """The train.py meant by a checkout, an installed ``llava`` folder, site-packages, or the file itself.

    Raises:
        HaclError: there is none.
    """
    path = Path(path)
    for candidate in (path, path / "llava/train/train.py", path / "train/train.py", path / "train.py"):
        if candidate.is_file():
            return candidate
    raise HaclError(
        f"{path} has no llava/train/train.py; give a LLaVA checkout or the folder of an installed llava "
        "(python -c 'import llava; print(llava.__path__[0])')."
    )


def patched(text: str) -> str:
    """The text of a train.py with the two lines, or the text as it is if it has them.

    Raises:
        HaclError: it is not LLaVA's train.py of v1.2.2.post1 or later.
    """
    if IMPORT in text and CALL in text:
        return text
    for line in (IMPORT_BEFORE, CALL_BEHIND):
        if text.count(line) != 1:
            raise HaclError(
                f"it has the line {line.strip()!r} {text.count(line)} times, expected once: this is not the train.py "
                "of LLaVA v1.2.2.post1 or later. Use scripts/pretrain_hacl.py instead, which needs no patch."
            )
    text = text.replace(IMPORT_BEFORE, IMPORT + IMPORT_BEFORE)
    return text.replace(CALL_BEHIND, CALL_BEHIND + CALL)


def patch(path: str | os.PathLike, check: bool = False, revert: bool = False) -> str:
    """Apply the change to a checkout or an installed package; twice does no harm.

    Args:
        path: see `find_train_py`. check: only look. revert: take it out again.

    Returns:
        One line that says what was found or done.
    """
    file = find_train_py(path)
    with open(file, encoding="utf-8", newline="") as stream:  # line ends stay as they are
        raw = stream.read()
    windows = "\r\n" in raw
    text = raw.replace("\r\n", "\n")
    try:
        new = patched(text)
    except HaclError as error:
        raise HaclError(f"{file}: {error}") from None
    applied = new == text
    if check:
        return f"{file}: {'has the patch' if applied else 'can be patched'}"
    if revert:
        new = text.replace(IMPORT, "").replace(CALL, "")
        done = "patch taken out" if applied else "has no patch; nothing done"
    else:
        done = "has the patch already; nothing done" if applied else "patched; its scripts now take --use_hacl True"
    if new != text:
        temporary = file.with_suffix(".py.hacl")
        with open(temporary, "w", encoding="utf-8", newline="") as stream:
            stream.write(new.replace("\n", "\r\n") if windows else new)
        temporary.chmod(file.stat().st_mode)
        temporary.replace(file)
    return f"{file}: {done}"


@dataclass
class PatchOptions:
    """teach LLaVA's own train_mem.py the flag --use_hacl

    Add two lines to llava/train/train.py, after which LLaVA's own training scripts take --use_hacl and the --hacl_*
    flags. Without the flag they do what they did before.
    """

    path: str = argument("a LLaVA checkout, an installed llava folder, or its train.py", metavar="PATH")
    check: bool = option("only say whether it can be applied or is applied", False, either="action")
    revert: bool = option("take the two lines out again", False, either="action")


def run(options: PatchOptions) -> int:
    """Patch, and print what `patch` says; returns 0."""
    print(patch(options.path, check=options.check, revert=options.revert))
    return 0
