"""Projections: a weight, several that are read as one, and a frozen one with what its adapter adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """A projection stored as one fused weight or as several; biases match, or there are none."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        biases = self.biases or (None,) * len(self.weights)
        outputs = [F.linear(x, weight, bias) for weight, bias in zip(self.weights, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@dataclass(frozen=True)
class BlockLinear:
    """The B matrices of neighbours as one block-diagonal weight, times the adapter's scale.

    One product instead of one for each neighbour; the zeros cost some hundredths of what stands beside it.

    Attributes:
        blocks: [N_i, rank], or [N_i, 0] where a neighbour has no adapter.
    """

    blocks: tuple[Tensor, ...]
    scale: float

    @property
    def weights(self) -> tuple[Tensor]:
        """[sum of N_i, sum of ranks], made of the blocks as they are now."""
        return (self.scale * torch.block_diag(*self.blocks),)

    @property
    def biases(self) -> tuple[()]:
        """None."""
        return ()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.weights)


@dataclass(frozen=True)
class LoraLinear:
    """``base(x) + up(down(x))``: a frozen projection and a low-rank change (arXiv 2106.09685), never merged."""

    base: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@dataclass(frozen=True)
class MadeLinear:
    """A projection whose weight is made of others whenever it is asked for, as they are then.

    Attributes:
        make: returns [outputs, inputs].
    """

    make: Callable[[], Tensor]

    @property
    def weights(self) -> tuple[Tensor]:
        """The weight, made now."""
        return (self.make(),)

    @property
    def biases(self) -> tuple[()]:
        """None."""
        return ()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.weights)
