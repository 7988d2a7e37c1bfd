"""The embedded world: rendered scenes with captions and hallucinated captions, and tiny models to train on them.

`make_dataset` needs pillow; `make_models` needs torch, transformers and sentencepiece.
"""
