"""What autograd keeps of a layer for the way back; the rest is computed again there (arXiv 1604.06174, 2205.05198)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

PRODUCTS = ("::mm", "::addmm", "::linear", "attn", "attention")
LOW_RANK = 16  # times more columns out than in; gate and up of any model have under 12


def recomputed(mode: str, layer: Callable[..., Tensor], *args) -> Tensor:
    """``layer(*args)``, of which autograd keeps less: with "full" its arguments, with "selective" also its products.

    Products are the outputs of matrix multiplications and of attention; norms, rotations, activations, gathered keys
    and what an adapter adds are recomputed. Gradients are those of the plain call, bit for bit where its kernels are
    deterministic.
    """
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = any(name in str(op.name()) for name in PRODUCTS) and not _is_low_rank(op, args)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _is_low_rank(op, args) -> bool:
    """A product from few columns to many takes as much memory as any, and next to no arithmetic."""
    return op.name() in ("aten::mm", "aten::addmm") and LOW_RANK * args[-1].shape[0] < args[-1].shape[1]
