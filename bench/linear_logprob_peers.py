"""Inputs and contenders of the benchmarks of linear_logprob and of its loss: PyTorch's ways, and GPU libraries."""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_sections import _cce, _liger, _trl_chunked
from torch import Tensor

SHAPES = {"cpu": (2048, 512, 32_000), "cuda": (8192, 4096, 128_256)}  # N, D, V
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
LIBRARIES = {"liger_kernel": "Liger", "cut_cross_entropy": "CCE", "trl": "TRL"}


def make_inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden_ND, weight_VD, target_N); logits of standard deviation 1."""
    generator = torch.Generator(device).manual_seed(0)
    N, D, V = SHAPES[device]
    hidden = torch.randn(N, D, generator=generator, device=device).to(dtype)
    weight = (torch.randn(V, D, generator=generator, device=device) * D**-0.5).to(dtype)
    return hidden, weight, torch.randint(0, V, (N,), generator=generator, device=device)


def log_softmax_gather(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


def peers(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Log-probabilities, or their negatives, by everything that is here and runs on this device."""
    arguments = hidden, weight, target
    found = {
        "log_softmax + gather": functools.partial(log_softmax_gather, *arguments),
        "F.cross_entropy": functools.partial(cross_entropy, *arguments),
        "torch.compile": functools.partial(torch.compile(log_softmax_gather), *arguments),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(*arguments, reduction="none")
    if hidden.is_cuda:
        here = {name for module, name in LIBRARIES.items() if importlib.util.find_spec(module)}
        theirs = {"Liger": functools.partial(_liger, reduction="none"), "CCE": _cce, "TRL": _trl_chunked}
        found |= {name: make(*arguments) for name, make in theirs.items() if name in here}
    return found
