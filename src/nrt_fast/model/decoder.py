"""One decoder, three ways through it: extend (prefill, scoring), decode (extend by one) and packed (training).

All three run the same layers on flat tokens [T, D]; they differ in where attention finds its keys and, on a CPU, in how
the matrices are stored. The first two are in inference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nrt_fast import ops
from nrt_fast.model.attend import PackedAttention
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.embedding import summed_embedding
from nrt_fast.model.linear import Linear, LoraLinear
from nrt_fast.model.lora import Adapter
from nrt_fast.model.recompute import recomputed
from nrt_fast.model.weights import EMBED, FINAL_NORM, HEAD, FrozenWeights, OwnedWeights, SharedWeights
from nrt_fast.types import PackedBatch

# (layer, q_THE, k_TKE, v_TKE, cos_TF, sin_TF) -> [T, H, E]; queries and keys come before their rotation
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """Parameters of one layer."""

    input_norm: Tensor
    qkv: Callable[[Tensor], Tensor]
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Callable[[Tensor], Tensor]
    post_norm: Tensor
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


class Decoder:
    """The forward passes over one set of parameters.

    Attributes:
        config: the model's shape.
        weights: where the parameters live.
        adapter: what is added to the projections, or None; the weights are constants then.
    """

    def __init__(
        self, config: ModelConfig, weights: OwnedWeights | FrozenWeights | SharedWeights, adapter: Adapter | None = None
    ):
        self.config = config
        self.weights = weights
        self.adapter = adapter
        (self.embed,) = weights.group(EMBED)
        (self.head,) = (self.embed,) if config.tie_word_embeddings else weights.group(HEAD)
        (self.final_norm,) = weights.group(FINAL_NORM)
        self.layers = [self._layer(f"model.layers.{index}.") for index in range(config.num_layers)]
        self.inv_freq = config.inv_freq.to(self.embed.device)

    def _layer(self, prefix: str) -> Layer:
        def linear(*names: str) -> Linear | LoraLinear:
            names, group = [prefix + name for name in names], self.weights.group
            base = Linear(group(*(f"{name}.weight" for name in names)), group(*(f"{name}.bias" for name in names)))
            return base if self.adapter is None else self.adapter.adapted(base, names)

        def norm(name: str) -> Tensor | None:
            return next(iter(self.weights.group(f"{prefix}{name}.weight")), None)

        return Layer(
            input_norm=norm("input_layernorm"),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            q_norm=norm("self_attn.q_norm"),
            k_norm=norm("self_attn.k_norm"),
            out=linear("self_attn.o_proj"),
            post_norm=norm("post_attention_layernorm"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )

    def packed(self, batch: PackedBatch, recompute: str = "none", grad_embed_VD: Tensor | None = None) -> Tensor:
        """Training forward with autograd over packed groups: [T, D] final hidden states, normed.

        Args:
            recompute: "none", or what else autograd keeps less of; see ``recomputed``. The result is the same.
            grad_embed_VD: fp32, takes the embedding's gradient on the way back; None: the embedding is a leaf as any.
        """
        attend = PackedAttention(self.config, batch)
        if grad_embed_VD is None:
            x = self._embedded(batch.tokens_T)
        else:
            x = summed_embedding(batch.tokens_T, self.embed, grad_embed_VD)
        if recompute == "none":
            return self._through(x, batch.positions_T, attend, self.layers)
        cos, sin = self._angles(batch.positions_T, x.dtype)
        for index, layer in enumerate(self.layers):
            x = recomputed(recompute, self._from_residual, index, layer, x, cos, sin, attend)
        return self._norm(x, self.final_norm)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, layers: list[Layer]) -> Tensor:
        """All layers on flat tokens, with these parameters and this attention: [T, D] final hidden states, normed."""
        return self._through(self._embedded(tokens_T), positions_T, attend, layers)

    def _through(self, x: Tensor, positions_T: Tensor, attend: Attend, layers: list[Layer]) -> Tensor:
        cos, sin = self._angles(positions_T, x.dtype)
        next_norms = [layer.input_norm for layer in layers[1:]] + [self.final_norm]
        normed = self._norm(x, layers[0].input_norm)
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            change, x = self._block(index, layer, normed, x, cos, sin, attend)
            normed, x = ops.add_rms_norm(change, x, next_norm, self.config.rms_norm_eps)
        return normed

    def _embedded(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T, self.embed)

    def _angles(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines."""
        angles_TF = positions_T[:, None] * self.inv_freq
        cos, sin = ((f * self.config.rope_scale).to(dtype) for f in (angles_TF.cos(), angles_TF.sin()))
        return cos, sin

    def _block(
        self, index: int, layer: Layer, normed: Tensor, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """A layer between its two ends: what it adds last to the residual stream, and the stream before that."""
        attended = self._attention(index, layer, normed, cos, sin, attend)
        normed, x = ops.add_rms_norm(attended, x, layer.post_norm, self.config.rms_norm_eps)
        return layer.down(ops.swiglu(layer.gate_up(normed).unflatten(-1, (2, -1)))), x

    def _from_residual(self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """A layer as a function of the residual stream alone, the least that can be kept of it."""
        change, x = self._block(index, layer, self._norm(x, layer.input_norm), x, cos, sin, attend)
        return x + change

    def _attention(self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        if self.config.qk_norm:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        out = attend(index, q, k, v, cos, sin)
        return layer.out(out.reshape(-1, heads * head_dim))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, self.config.rms_norm_eps)
