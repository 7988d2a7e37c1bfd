"""HACL (arXiv 2312.06968) for LLaVA: hallucination augmented contrastive learning in stage-1 pretraining.

Importing the package loads neither torch nor transformers; the names below are resolved on first use.
"""

__version__ = "0.1.0"

_LAZY = {
    "HaclConfig": "config",
    "HaclLoss": "loss",
    "hacl_loss": "loss",
    "gather_features": "loss",
    "HaclHead": "representation",
    "HaclMixin": "model",
    "HaclLlavaLlamaForCausalLM": "model",
    "HaclLlavaMistralForCausalLM": "model",
    "HaclTrainer": "trainer",
    "load_pretrained": "checkpoints.load",
    "install": "integration",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
