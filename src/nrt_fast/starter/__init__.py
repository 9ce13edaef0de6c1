"""The embedded default: a tiny starter model and the built-in task family that it is trained on."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""Hugging Face folder of the starter model, made by `nrt_fast.starter.recipe`."""
