"""A LoRA adapter: its shape, one flat tensor for all its matrices, and how it joins the projections."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nrt_fast.model.config import ModelConfig
from nrt_fast.model.linear import BlockLinear, Linear, LoraLinear
from nrt_fast.model.weights import parameter_shapes

NEIGHBOURS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections of a layer; those of one row are one fused product."""


@dataclass(frozen=True)
class Lora:
    """What an adapter is, but for its numbers.

    Attributes:
        rank: columns of B, rows of A.
        alpha: the change is B A x times ``alpha / rank``, or times ``alpha / sqrt(rank)`` with ``use_rslora``.
        targets: projections with an adapter, such as q_proj; the same in every layer.
        base_name: the model it was made for, as its user named it: a folder or a hub id.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False
    base_name: str | None = None

    @property
    def scale(self) -> float:
        """Factor of B A x."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """Names and shapes in storage order: of neighbours first every A, which are one fused tensor, then every B."""
        weights, shapes = parameter_shapes(config), {}
        for layer in range(config.num_layers):
            for neighbours in NEIGHBOURS:
                room = "mlp" if neighbours[0] in ("gate_proj", "down_proj") else "self_attn"
                names = [f"model.layers.{layer}.{room}.{name}" for name in neighbours if name in self.targets]
                shapes |= {a_name(name): (self.rank, weights[f"{name}.weight"][1]) for name in names}
                shapes |= {b_name(name): (weights[f"{name}.weight"][0], self.rank) for name in names}
        return shapes

    def num_parameters(self, config: ModelConfig) -> int:
        """Of an adapter for a model of this shape."""
        return sum(map(prod, self.shapes(config).values()))


def a_name(projection: str) -> str:
    """Name of the matrix that reads a projection's input."""
    return f"{projection}.lora_A.weight"


def b_name(projection: str) -> str:
    """Name of the matrix that writes to its output."""
    return f"{projection}.lora_B.weight"


class Adapter:
    """All matrices of an adapter as views of one flat tensor that never moves.

    Attributes:
        lora: its shape.
        flat: [num_parameters] in the model's dtype.
        num_matrix_elements: all of them.
        tensors: name → view.
        leaves: name → autograd leaf, the A of neighbours fused; the leaf's name is that of its first part.
    """

    def __init__(self, lora: Lora, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.lora, self.config = lora, config
        shapes, self._projections = lora.shapes(config), parameter_shapes(config)
        self.flat = torch.zeros(sum(map(prod, shapes.values())), dtype=dtype, device=device)
        self.num_matrix_elements = self.flat.numel()
        self.tensors: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        offset = 0
        for name, shape in shapes.items():
            self.tensors[name] = self.flat[offset : offset + prod(shape)].view(shape)
            offset += prod(shape)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """A as peft draws it (uniform within 1 / sqrt(its columns)), the same on every device; B = 0: no change yet."""
        generator = torch.Generator().manual_seed(seed)
        self.flat.zero_()
        for name, tensor in self.tensors.items():
            if ".lora_A." in name:
                bound = tensor.shape[1] ** -0.5
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))

    def clone(self) -> Adapter:
        """The same adapter on a copy of its numbers."""
        other = Adapter(self.lora, self.config, self.flat.dtype, self.flat.device)
        other.flat.copy_(self.flat)
        return other

    def adapted(self, base: Linear, projections: list[str]) -> Linear | LoraLinear:
        """A projection, of fused neighbours perhaps, with the change of those that have one."""
        targets = [name for name in projections if a_name(name) in self.tensors]
        if not targets:
            return base
        num_outputs = {name: self._projections[f"{name}.weight"][0] for name in projections}
        blocks = tuple(
            self._leaf(b_name(name), rows) if name in targets else self.flat.new_empty(rows, 0)
            for name, rows in num_outputs.items()
        )
        down = self._leaf(a_name(targets[0]), len(targets) * self.lora.rank)
        return LoraLinear(base, Linear((down,), ()), BlockLinear(blocks, self.lora.scale))

    def _leaf(self, name: str, num_rows: int) -> Tensor:
        first = self.tensors[name]
        start, shape = first.storage_offset(), (num_rows, first.shape[1])
        self.leaves[name] = self.flat[start : start + prod(shape)].view(shape).requires_grad_()
        return self.leaves[name]
