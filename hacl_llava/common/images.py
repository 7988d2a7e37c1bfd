"""Images: where they lie, opening them as LLaVA does, and preparing many for a vision tower."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DataError, HaclError

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_PIXELS = 178_956_970  # where Pillow refuses an image as a decompression bomb
_CROP = 336  # pixels; about the input of a vision tower


def image_path(folder: str | os.PathLike | None, image: str) -> str:
    """Where a record's image lies: ``image`` below ``folder``.

    Raises:
        DataError: it leads outside, by ``..`` or as an absolute path; links are not followed here.
    """
    path = os.path.join(folder or "", image)
    if ".." in image or os.path.isabs(image):
        root = os.path.join(os.path.abspath(folder or ""), "")
        if not os.path.abspath(path).startswith(root):
            raise DataError(f"has the image {image!r}, which leads outside --image_folder {folder or '.'}")
    return path


def image_file(folder: str | os.PathLike, name: str) -> Path:
    """`image_path` of an image that is there. Links are followed: data sets are often made of them.

    Raises:
        HaclError: the name leads out of the folder, or there is no such file.
    """
    try:
        path = Path(image_path(folder, name))
    except (DataError, TypeError):
        raise HaclError(f"{name!r}: leads out of the image folder {folder}, so it is not opened.") from None
    try:
        found = path.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        raise HaclError(f"{path}: no such file.")
    return path


def size_problem(width: int, height: int, pad: bool) -> str | None:
    """Why an image of so many pixels cannot be prepared as LLaVA does it, or None.

    Before it is cut, it is scaled until its shorter side suits the vision tower, or with ``pad`` made a square of its
    longer side: of an image of 30,000 x 1 pixels that makes millions or billions, though the file is small.
    """
    long, short = max(width, height), max(min(width, height), 1)
    taken = long**2 if pad else _CROP**2 * long // short
    if taken <= _MOST_PIXELS:
        return None
    how = "padded to a square" if pad else f"scaled to {_CROP} on its shorter side"
    return f"of {width} x {height}, which is {taken:,} pixels when {how}"


def open_image(path: str | os.PathLike, hint: str = "") -> "Image":
    """An image as LLaVA opens it: RGB, not turned by its EXIF orientation.

    Args:
        path: of the file; ``~`` is the home folder. hint: what to do, for the message.

    Raises:
        HaclError: there is no such file, or it is no image that Pillow reads.
    """
    from PIL import Image

    try:
        return Image.open(os.path.expanduser(path)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "not an image that Pillow reads, or a damaged one"
        raise HaclError(f"{path or '(no file)'}: cannot be opened ({why}){hint}.") from None


class Images:
    """A dataset of images, opened and prepared as LLaVA does it: (pixels, (width, height), None) of each.

    Pixels are numpy, of the processor's shape: tensors would go through shared memory, of which containers have little.
    Where one cannot be used: (None, None, why).

    Args:
        folder: the image folder. names: of the images in it. processor: the tower's. config: the model's.
    """

    def __init__(self, folder: str | os.PathLike, names: Sequence[str], processor: Any, config: Any):
        self.folder, self.names, self.processor, self.config = folder, names, processor, config

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple:
        from llava.mm_utils import process_images

        name = self.names[index]
        try:
            image = open_image(image_file(self.folder, name))
            pixels = process_images([image], self.processor, self.config)[0]
        except HaclError as error:
            return None, None, str(error)
        except Exception as error:  # whatever a damaged or odd image does to a library: one item, not the run
            return None, None, f"{name}: cannot be processed ({type(error).__name__}: {error})."
        return pixels.numpy(), image.size, None
