"""Llama, Mistral, Qwen2 and Qwen3 decoders over one parameter set, Hugging Face folders in and out."""

from nrt_fast.model.model import Model

__all__ = ["Model"]
