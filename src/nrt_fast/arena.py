"""Memory that two things have in turn: gradients while weights are trained, keys and values while traces are sampled.

Neither is needed while the other is, so a run has the larger of the two once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Holder = Literal["gradients", "keys and values"]


class Arena:
    """One block of memory at a fixed address. What a holder left there means nothing to the next one.

    Attributes:
        memory: [num_bytes] uint8.
        holder: whose it is now; None until it is taken.
    """

    def __init__(self, num_bytes: int, device: torch.device):
        self.memory: Tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.holder: Holder | None = None

    def view(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """The front of the memory, as [num_elements] of a dtype."""
        return self.memory[: num_elements * dtype.itemsize].view(dtype)

    def take(self, holder: Holder) -> None:
        """Give the memory to one holder; the other may not use it before it takes it back."""
        self.holder = holder

    def check(self, holder: Holder) -> None:
        """Raise RuntimeError unless the memory is this holder's: what it would read is the other's."""
        if self.holder != holder:
            raise RuntimeError(f"the memory of {holder} is lent to {self.holder}: take it before it is used")
