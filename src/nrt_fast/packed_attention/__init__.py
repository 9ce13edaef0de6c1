"""Attention of packed groups: a prompt sees itself, a trace sees its prompt and itself, all of it causal.

One function over the libraries that compute it. What runs is the first rung of ``LADDER`` that fits the device and the
dtype and can be imported; it is logged when it is first chosen, and ``use`` puts another in its place, for tests.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import Tensor

from nrt_fast.packed_attention.layout import PackedLayout

HALF = (torch.float16, torch.bfloat16)
LADDER = {"cpu": ("native", "plain"), "cuda": ("varlen", "xformers", "flex", "plain")}
DTYPES = {"native": (torch.float32, torch.bfloat16), "varlen": HALF, "xformers": HALF}  # any, where not listed

logger = logging.getLogger(__name__)
_forced: str | None = None


def packed_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: PackedLayout, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the keys that each token sees.

    Args:
        q_THE, k_TKE, v_TKE: [T, H, E], [T, K, E], [T, K, E] of one dtype, any strides; H is a multiple of K.
        layout: of the batch.
        window: a token sees this many positions, its own the last of them; None for all.

    Returns:
        [T, H, E], dtype of q.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        LookupError: the backend that ``use`` asks for cannot run here; the reason is told.
    """
    T, _, E = q_THE.shape
    if T != layout.num_tokens or k_TKE.shape != v_TKE.shape or (k_TKE.shape[0], k_TKE.shape[2]) != (T, E):
        shapes = [list(x.shape) for x in (q_THE, k_TKE, v_TKE)]
        raise ValueError(f"packed_attention: {layout.num_tokens} tokens, q, k and v of {shapes}")
    if q_THE.shape[1] % k_TKE.shape[1] or not q_THE.dtype == k_TKE.dtype == v_TKE.dtype:
        kinds = [(x.shape[1], x.dtype) for x in (q_THE, k_TKE, v_TKE)]
        raise ValueError(f"packed_attention: q, k and v have heads and dtypes {kinds}")
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: a window of {window}; it holds one position at least")
    chosen = backend(q_THE.device.type, q_THE.dtype) if _forced is None else _forced
    return import_module(f"{__name__}.{chosen}").attend(q_THE, k_TKE, v_TKE, layout, window)


@functools.cache
def backend(device: str, dtype: torch.dtype) -> str:
    """What runs on a kind of device in a dtype."""
    reasons = obstacles(device, dtype)
    chosen = next(rung for rung in LADDER.get(device, ("plain",)) if rung not in reasons)
    for rung, reason in reasons.items():
        if dtype in DTYPES.get(rung, (dtype,)):
            logger.warning("packed attention without %s: %s", rung, reason)
    logger.info("packed attention on %s in %s: %s", device, dtype, chosen)
    return chosen


def obstacles(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Why nothing before ``backend`` on the ladder runs on a kind of device in a dtype: {rung: reason}."""
    reasons = {}
    for rung in LADDER.get(device, ("plain",)):
        fits = dtype in DTYPES.get(rung, (dtype,))
        if (reason := missing(rung) if fits else f"it does not compute in {dtype}") is None:
            break
        reasons[rung] = reason
    return reasons


@functools.cache
def missing(rung: str) -> str | None:
    """Why a backend cannot run here, or None."""
    try:
        import_module(f"{__name__}.{rung}").load()
    except (ImportError, OSError) as error:
        return str(error)
    return None


@contextmanager
def use(rung: str) -> Iterator[None]:
    """Run on this backend, for tests; LookupError with the reason if it cannot."""
    global _forced
    if missing(rung):
        raise LookupError(f"packed attention by {rung}: {missing(rung)}")
    before, _forced = _forced, rung
    try:
        yield
    finally:
        _forced = before
