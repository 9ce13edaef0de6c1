"""extend and decode: the forward passes over a cache, without gradients."""

from __future__ import annotations

from collections import abc
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nrt_fast import ops
from nrt_fast.arena import Arena
from nrt_fast.kv_cache import CacheRows, KVCache, Sequence
from nrt_fast.model.attend import CachedAttention
from nrt_fast.model.decoder import Decoder
from nrt_fast.model.linear import BlockLinear, Linear, LoraLinear
from nrt_fast.model.weights import FrozenWeights


class PanelLinear:
    """A projection packed into panels, which a CPU multiplies few rows by at several times the speed."""

    def __init__(self, linear: Linear | BlockLinear):
        first = linear.weights[0]
        self.linear, self.num_outputs = linear, sum(len(weight) for weight in linear.weights)
        self.panels = first.new_empty(ops.panel_shape(self.num_outputs, first.shape[1], first.dtype))
        self.bias_N: Tensor | None = None

    def refresh(self) -> None:
        """Pack the projection's weights as they are now."""
        ops.pack_panels(list(self.linear.weights), self.panels)
        self.bias_N = torch.cat(self.linear.biases) if self.linear.biases else None

    def __call__(self, x_TK: Tensor) -> Tensor:
        return ops.panel_linear(x_TK, self.panels, self.bias_N, self.num_outputs)


class HeldLinear:
    """A projection whose weight is made of others: made once for many steps, at an address that stays."""

    def __init__(self, linear: BlockLinear):
        self.linear, self.weight = linear, torch.empty_like(*linear.weights)

    def refresh(self) -> None:
        """Make the weight of the others as they are now."""
        self.weight.copy_(*self.linear.weights)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Inference:
    """The passes of one model over a cache.

    On CUDA they read the model's parameters in place. On a CPU they read a packed copy of its matrices, which
    ``refresh`` makes; a row of a product does not depend there on the other rows, bit for bit. Of a model with an
    adapter the matrices are packed once, the adapter's by every ``refresh``.

    Args:
        model: what the weights are taken from.
        beside: passes of another model, whose packed copies serve where both stand on the same constant weights.
    """

    @torch.no_grad()
    def __init__(self, model: Decoder, beside: Inference | None = None):
        self.model = model
        self._changing: list[PanelLinear | HeldLinear] = []
        self._constant: dict[int, PanelLinear] = {} if beside is None else beside._constant  # by address
        pack = self._pack
        self._layers = [
            replace(layer, qkv=pack(layer.qkv), out=pack(layer.out), gate_up=pack(layer.gate_up), down=pack(layer.down))
            for layer in model.layers
        ]
        self._head = pack(Linear((model.head,), ()))

    def _pack(self, linear: Linear | LoraLinear) -> abc.Callable[[Tensor], Tensor]:
        """A projection as the passes multiply by it."""
        if isinstance(linear, LoraLinear):
            base, changing = self._pack(linear.base), [self._pack_changing(part) for part in (linear.down, linear.up)]
            return LoraLinear(base, *changing)
        if not isinstance(self.model.weights, FrozenWeights) or self.device.type == "cuda":
            return self._pack_changing(linear)
        address = linear.weights[0].data_ptr()
        if address not in self._constant:
            self._constant[address] = PanelLinear(linear)
            self._constant[address].refresh()
        return self._constant[address]

    def _pack_changing(self, linear: Linear | BlockLinear) -> abc.Callable[[Tensor], Tensor]:
        if self.device.type == "cuda" and isinstance(linear, Linear):
            return linear
        self._changing.append(HeldLinear(linear) if self.device.type == "cuda" else PanelLinear(linear))
        return self._changing[-1]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights as they are now."""
        for linear in self._changing:
            linear.refresh()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed.device

    def addresses(self) -> tuple[int, ...]:
        """Where each parameter is; a graph of the passes is good for as long as this does not change."""
        adapter = self.model.adapter
        tensors = {} if adapter is None else adapter.tensors
        return tuple(tensor.data_ptr() for tensor in (*self.model.weights.tensors.values(), *tensors.values()))

    def new_cache(self, num_bytes: int, page_size: int, arena: Arena | None = None) -> KVCache:
        """A cache of this model's shape, dtype and device, in as many bytes, of an arena where there is one."""
        shape, like = self.model.config, self.model.embed.detach()
        page_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * page_size * like.element_size()
        num_pages = max(1, num_bytes // page_bytes - 1)  # one is scratch
        return KVCache(shape.num_layers, shape.num_kv_heads, shape.head_dim, num_pages, page_size, like, arena)

    @torch.no_grad()
    def extend(
        self, cache: KVCache, groups: abc.Sequence[tuple[Sequence, abc.Sequence[Sequence]]], inputs: list[list[int]]
    ) -> Tensor:
        """Run new tokens on top of what the cache holds; their keys and values go to the rows' next slots.

        Lengths do not change: the caller keeps what it wants.

        Args:
            groups: (prefix, rows that go on from it); the rows' pages are reserved.
            inputs: ids of each row, row after row.

        Returns:
            [T, D] final hidden states, normed.
        """
        num_new_B = torch.tensor([len(ids) for ids in inputs])
        cu_q = torch.cat([num_new_B.new_zeros(1), num_new_B.cumsum(0)])
        row_T = torch.arange(len(inputs)).repeat_interleave(num_new_B)
        offset_T = torch.arange(len(row_T)) - cu_q[row_T]
        tokens_T = torch.tensor([token for ids in inputs for token in ids], dtype=torch.int64)
        row_T, offset_T, tokens_T, cu_q = (x.to(self.device) for x in (row_T, offset_T, tokens_T, cu_q.int()))
        max_q = max(map(len, inputs), default=0)
        return self._run(tokens_T, CachedAttention(
            self.model.config, cache, cache.rows(groups), row_T, offset_T, cu_q, max_q
        ))  # fmt: skip

    @torch.no_grad()
    def decode(self, cache: KVCache, rows: CacheRows, tokens_B: Tensor) -> Tensor:
        """``extend`` by one token a row, from tensors alone: [B, D]. A graph can hold it: no number is asked for."""
        B = len(tokens_B)
        cu_q = torch.arange(B + 1, dtype=torch.int32, device=self.device)
        row_B = torch.arange(B, device=self.device)
        offset_B = torch.zeros_like(row_B)
        return self._run(tokens_B, CachedAttention(self.model.config, cache, rows, row_B, offset_B, cu_q, 1))

    def _run(self, tokens_T: Tensor, attend: CachedAttention) -> Tensor:
        return self.model.forward(tokens_T, attend.positions_T, attend, self._layers)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits [N, V] of final hidden states."""
        if isinstance(self._head, PanelLinear):
            return ops.panel_logits(hidden_ND, self._head.panels, self._head.num_outputs)
        return ops.linear_logits(hidden_ND, self.model.head)

    @torch.no_grad()
    def logprobs(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        """Log-probability [N] of one id after each final hidden state, at temperature 1."""
        return ops.linear_logprob(hidden_ND, self.model.head, target_N)
