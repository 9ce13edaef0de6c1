"""Is every op exact here, and what does it gain? One small training step, each op's first call beside its reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nrt_fast import loop, ops
from nrt_fast.config import TrainConfig
from nrt_fast.packed_attention import PackedLayout
from nrt_fast.reference.adamw import join_master
from nrt_fast.run import prepare

CACHE_BYTES = 2**25
SECONDS = 0.02  # spent on timing one function
CONFIG = TrainConfig(
    prompts_per_step=4, num_generations=4, max_trace_length=24, max_steps=1, num_eval_prompts=0, eval_steps=0
)


@dataclass(frozen=True)
class Finding:
    """What one call of an op gave, beside plain PyTorch of the same dtype on the same tensors.

    Attributes:
        error: largest difference of a result or gradient to the reference in fp64; inf where whole numbers differ.
        allowed: twice that of the reference in the dtype of the call, plus 1e-5.
        speedup: time of the reference over that of the op, forward and backward.
    """

    error: float
    allowed: float
    speedup: float

    @property
    def exact(self) -> bool:
        """Whether the op errs no more than plain PyTorch may."""
        return self.error <= self.allowed


def examine_ops(device: str) -> dict[str, Finding]:
    """Train the built-in starter for one step on a device; what was found for each op that has more than a reference.

    Ops that such a step does not call are left out. Nothing is written.
    """
    findings: dict[str, Finding] = {}

    def call(op: str, chosen: Callable, reference: Callable, *args, **kwargs):
        if chosen is not reference and op not in findings:
            findings[op] = compare(op, chosen, reference, args, kwargs)
        return chosen(*args, **kwargs)

    run = prepare(replace(CONFIG, device=device), cache_bytes=CACHE_BYTES)
    with ops.watch(call):
        loop.step(run, loop.Progress(step=1))
    return findings


def examine_attention(backend: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Attention of packed groups by one of its backends, beside the plain one: three groups of ragged lengths."""
    lens, num_traces = [64, 30, 9, 17, 5, 40, 33, 1], [3, 1, 1]
    layout = PackedLayout(torch.tensor([0, *lens]).cumsum(0).int(), torch.tensor(num_traces), device)
    generator = torch.Generator().manual_seed(0)
    qkv_THE = torch.randn(sum(lens), 8, 32, generator=generator).to(device, dtype).requires_grad_()
    chosen, plain = (import_module(f"nrt_fast.packed_attention.{name}").attend for name in (backend, "plain"))
    return compare("packed_attention", chosen, plain, (*qkv_THE.split([4, 2, 2], dim=1), layout, None), {})


def compare(op: str, chosen: Callable, reference: Callable, args: tuple, kwargs: dict[str, Any]) -> Finding:
    """Both on copies of the same arguments, and the reference in fp64 as well."""
    if op == "adamw":  # Its remainders are bits of weights: on whole weights its results compare as numbers.
        args = (args[0], None, *args[2:]) if args[1] is None else (join_master(*args[:2]), None, *args[2:])
    found, plain = _results(chosen, args, kwargs), _results(reference, args, kwargs)
    # AdamW's moments are fp32 or less by definition.
    oracle = plain if op == "adamw" else _results(reference, *_map(_widened, (args, kwargs)))
    errors, allowed = [0.0], [0.0]
    for result, same_dtype, exact in zip(found, plain, oracle, strict=True):
        if result.is_floating_point():
            errors.append(_distance(result, exact))
            allowed.append(_distance(same_dtype, exact))
        elif not torch.equal(result, same_dtype):
            errors.append(float("inf"))
    seconds = [_seconds(function, args, kwargs) for function in (reference, chosen)]
    return Finding(max(errors), 2 * max(allowed) + 1e-5, seconds[0] / seconds[1])


def _results(function: Callable, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """What it returns, what it leaves in its arguments, and the gradients of what it returns."""
    args, kwargs = _map(_copied, (args, kwargs))
    return _tensors(_with_gradients(function, args, kwargs)) + [t.detach() for t in _tensors((args, kwargs))]


def _with_gradients(function: Callable, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    returned = _tensors(function(*args, **kwargs))
    inputs = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
    outputs = [tensor for tensor in returned if tensor.requires_grad]
    if not inputs or not outputs:
        return returned
    slopes = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, inputs, slopes, allow_unused=True)
    return [*(tensor.detach() for tensor in returned), *(tensor for tensor in gradients if tensor is not None)]


def _seconds(function: Callable, args: tuple, kwargs: dict[str, Any]) -> float:
    """The shortest of many runs."""
    args, kwargs = _map(_copied, (args, kwargs))
    synchronize = torch.cuda.synchronize if any(t.is_cuda for t in _tensors(args)) else lambda: None
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        _with_gradients(function, args, kwargs)
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest of tuples, lists and dictionaries with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(change, item) for name, item in value.items()}
    return type(value)(_map(change, item) for item in value) if isinstance(value, (tuple, list)) else value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda tensor: found.append(tensor) or tensor, value)
    return found


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _widened(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
    return wide.requires_grad_(tensor.requires_grad)


def _distance(tensor: Tensor, exact: Tensor) -> float:
    """Largest difference; equal infinities, or two NaN, are none apart, one NaN is infinitely far."""
    same = (tensor == exact) | (tensor.isnan() & exact.isnan())
    apart = (tensor.double() - exact.double()).abs().where(~same, 0.0)
    return apart.nan_to_num(nan=float("inf")).max().item() if tensor.numel() else 0.0
