"""AdamW over one flat parameter tensor, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nrt_fast import distributed, ops
from nrt_fast.arena import Arena
from nrt_fast.reference.adamw import BLOCK
from nrt_fast.types import UserError

TENSORS = ("first", "second", "first_absmax", "second_absmax", "remainder")


class AdamW:
    """Decoupled-weight-decay Adam (arXiv 1711.05101) with an exact fp32 master of bf16 weights.

    Parameters are views of one flat tensor that never moves. Gradients are summed in fp32 as backward passes produce
    them, whatever the weights' dtype. Of several ranks each has all weights and gradients, and updates its own slice:
    moments and remainders are of that slice alone (ZeRO stage 1, arXiv 1910.02054).

    Args:
        flat: [n] fp32 or bf16 weights.
        leaves: the autograd leaves, views of ``flat``.
        num_decayed: weights before this offset decay.
        moments: float32, bfloat16 or int8 (codes with an fp32 scale for every 256 weights).
        arena: memory whose front the gradients have, after ``zero_grad`` and until something else takes it; memory of
            their own where there is none.
    """

    def __init__(
        self, flat: Tensor, leaves: Iterable[Tensor], num_decayed: int, betas: tuple[float, float], eps: float,
        weight_decay: float, moments: torch.dtype = torch.float32, arena: Arena | None = None,
    ):  # fmt: skip
        self.flat, self.num_decayed = flat, num_decayed
        self.own = distributed.own_slice(flat.numel(), BLOCK)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.num_steps = 0
        self._arena = arena
        self.grad = arena.view(flat.numel(), torch.float32) if arena else torch.zeros_like(flat, dtype=torch.float32)
        own = flat[self.own]
        self.first = torch.zeros_like(own, dtype=moments)
        self.second = torch.zeros_like(own, dtype=torch.uint8 if moments == torch.int8 else moments)
        self.first_absmax = self.second_absmax = self.remainder = None
        if moments == torch.int8:
            num_blocks = -(-own.numel() // BLOCK)
            self.first_absmax, self.second_absmax = (flat.new_zeros(num_blocks, dtype=torch.float32) for _ in range(2))
        if flat.dtype == torch.bfloat16:
            self.remainder = torch.zeros_like(own, dtype=torch.int16)
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(self._accumulate)

    def zero_grad(self) -> None:
        """Clear the gradients; they have the arena's memory from now on. A step leaves them cleared."""
        if self._arena:
            self._arena.take("gradients")
        self.grad.zero_()

    def gradient(self, leaf: Tensor) -> Tensor:
        """The leaf's summed gradient, fp32, for what adds to it beside autograd."""
        if self._arena:
            self._arena.check("gradients")
        start = leaf.storage_offset()
        return self.grad[start : start + leaf.numel()].view_as(leaf)

    def _accumulate(self, leaf: Tensor) -> None:
        self.gradient(leaf).add_(leaf.grad)
        leaf.grad = None

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping; not finite: nothing changes."""
        if self._arena:
            self._arena.check("gradients")
        distributed.reduce_scatter(self.grad, BLOCK)
        weights, grad = self.flat[self.own], self.grad[self.own]
        norm = distributed.norm(ops.grad_norm(grad))
        # On the device, where the norm is: what waits for it is this function's result, not the update.
        grad_scale = (max_grad_norm / (norm + 1e-6)).clamp_(max=1.0).where(norm.isfinite(), math.nan).view(1)
        ops.adamw(
            weights, self.remainder, grad, self.first, self.second, lr, self.betas, self.eps, self.weight_decay,
            max(0, self.num_decayed - self.own.start), self.num_steps + 1, grad_scale, self.first_absmax,
            self.second_absmax,
        )  # fmt: skip
        distributed.all_gather(self.flat, BLOCK)
        self.grad[: self.own.start].zero_()
        self.grad[self.own.stop :].zero_()
        norm = float(norm)
        self.num_steps += math.isfinite(norm)
        return norm

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the weights, of the own slice; tensors are the live ones."""
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        return tensors | {"num_steps": torch.tensor([self.num_steps])}

    def ranges(self) -> dict[str, slice]:
        """The own part of all ranks' tensors together, by name: of any that a checkpoint may have."""
        blocks = slice(self.own.start // BLOCK, -(-self.own.stop // BLOCK))
        own = {name: blocks if name.endswith("absmax") else self.own for name in TENSORS}
        return own | {"num_steps": slice(0, 1)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a checkpoint's state, the own slice of it.

        Raises:
            UserError: its moments or its weights are of another dtype.
        """
        if state["first"].dtype != self.first.dtype:
            theirs, ours = (str(x.dtype).removeprefix("torch.") for x in (state["first"], self.first))
            raise UserError(f"the checkpoint's moments are {theirs}, this run's {ours}; adam_moments_dtype decides")
        if state.keys() != self.state().keys():  # bf16 weights have the remainder of their fp32 master
            theirs, ours = ("bfloat16" if "remainder" in x else "float32" for x in (state, self.state()))
            raise UserError(f"the checkpoint's weights are {theirs}, this run's {ours}; dtype decides")
        self.num_steps = int(state["num_steps"])
        for name, tensor in self.state().items():
            if name != "num_steps":
                tensor.copy_(state[name])


def learning_rate(step: int, num_steps: int, peak: float, kind: str, warmup_steps: float) -> float:
    """Learning rate of step 1, 2, ..., num_steps: linear warm-up, then constant, linear or cosine decay to 0.

    ``warmup_steps`` under 1 is a share of all steps.
    """
    warmup = round(warmup_steps * num_steps) if warmup_steps < 1 else int(warmup_steps)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(1, num_steps - warmup)
    return peak * {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[kind]
