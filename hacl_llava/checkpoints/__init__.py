"""LLaVA checkpoints: read, loaded, converted, talked to, described and pushed."""
