"""What `charts` and `figures` share: colours and shapes, names drawn as they stand, PNG files."""

import io
import warnings

from ..common.files import write_bytes

# Okabe and Ito's colours, told apart by the colour-blind; each has a shape of its own, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
METHODS = {"pca": "PCA", "tsne": "t-SNE"}  # how `figures` brings representations to two dimensions


def pyplot():
    """matplotlib.pyplot that opens no window; ImportError names the extra."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'hacl_llava[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plain(text):
    """Text that matplotlib draws as it is: no mathematics between $, no name hidden from a legend for its first _."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def save(figure, path):
    """Write a figure to a PNG file, which appears whole or not at all, and close it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in letters that the font lacks
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, file.getvalue())
    pyplot().close(figure)
