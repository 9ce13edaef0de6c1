"""Shape of a decoder, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nrt_fast.types import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know; everything else of the Hugging Face config is carried along unread.

    Attributes:
        windows: per layer, the sliding window in tokens, or None for full attention.
        inv_freq: [E / 2] fp32 rotary frequencies, scaling applied.
        rope_scale: factor of cos and sin (yarn's attention factor; 1 otherwise).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    inv_freq: Tensor
    rope_scale: float

    @classmethod
    def from_hf(cls, hf) -> ModelConfig:
        """Read a ``transformers`` config; UserError where it asks for something this decoder does not do."""
        check_model_type(hf.model_type)
        if hf.hidden_act != "silu":
            raise UserError(f"activation {hf.hidden_act!r} is not supported; valid: silu")
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        attention_bias = hf.model_type in ("llama", "qwen3") and bool(hf.attention_bias)
        inv_freq, rope_scale = _rotary(hf, head_dim)
        return cls(
            model_type=hf.model_type,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=hf.max_position_embeddings,
            rms_norm_eps=hf.rms_norm_eps,
            tie_word_embeddings=bool(hf.tie_word_embeddings),
            qkv_bias=attention_bias or hf.model_type == "qwen2",
            out_bias=attention_bias,
            mlp_bias=hf.model_type == "llama" and bool(hf.mlp_bias),
            qk_norm=hf.model_type == "qwen3",
            windows=_windows(hf),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
        )

    def grown(self, num_tokens: int) -> ModelConfig:
        """The same decoder with more vocabulary rows."""
        return replace(self, vocab_size=self.vocab_size + num_tokens)


def check_model_type(model_type: str, where: str = "") -> None:
    """UserError, led by ``where``, unless this decoder knows the model type."""
    if model_type not in ARCHITECTURES:
        raise UserError(f"{where}model type {model_type!r} is not supported; valid: {', '.join(ARCHITECTURES)}")


def _windows(hf) -> tuple[int | None, ...]:
    if hf.model_type in ("qwen2", "qwen3"):
        sliding = hf.sliding_window if hf.use_sliding_window else None
        return tuple(sliding if kind == "sliding_attention" else None for kind in hf.layer_types)
    # Mistral slides in every layer or in none; Llama has no window, whatever its config holds.
    return (hf.sliding_window if hf.model_type == "mistral" else None,) * hf.num_hidden_layers


def _rotary(hf, head_dim: int) -> tuple[Tensor, float]:
    """Frequencies and scale. transformers 5 keeps them in ``rope_parameters``, 4 in ``rope_theta``/``rope_scaling``."""
    parameters = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"RoPE type {kind!r} is not supported; valid: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        theta = parameters.get("rope_theta") or hf.rope_theta
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / theta**exponent, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return inv_freq.float(), float(scale)
