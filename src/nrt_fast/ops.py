"""The one facade over the maths: every op, its arguments checked, sent to the fastest implementation at hand.

An op is a function of ``nrt_fast.reference`` that may have twins of the same name: in C++ (``torch.ops.nrt_fast``) and
in ``nrt_fast.triton_kernels``, in a file of that name. CUDA tensors go to Triton (or to CUDA C++, where the extension
was built with it), CPU tensors to C++, and both to the reference where there is no twin. To add an op, write its
reference and one line at the end of this file.
"""

import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from nrt_fast.reference import adamw as adamw_
from nrt_fast.reference import attention, layers, logprob, loss, pack, rewards, sample
from nrt_fast.reference import gather_rows as gather_rows_
from nrt_fast.reference import logsoftmax_gather as gather

Backend = Literal["triton", "cuda", "native", "reference"]
P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_LADDER: dict[str, tuple[Backend, ...]] = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}
_references: dict[str, Callable] = {}
_twins: dict[str, tuple[Backend, ...]] = {}
_forced: Backend | None = None


def backend() -> dict[str, Backend]:
    """What runs each op on each kind of device that is here: ``{"pack_bins/cpu": "native", ...}``."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {f"{op}/{device}": _choose(op, device, None) for op in _references for device in devices}


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run every op on this backend, for tests; an op that cannot raises LookupError with the reason."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@functools.cache
def missing(backend: Backend) -> str | None:
    """Why a backend cannot run here, or None; logged when it is first asked for."""
    try:
        if backend in ("native", "cuda"):
            _load_extension()
        if backend == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("nrt_fast::pack_gather", "CUDA"):
            raise ImportError("the extension was built without CUDA; an install with NRT_FAST_EXT=cuda has it")
        if backend == "triton":
            import_module("triton")
    except (ImportError, OSError) as error:
        logger.warning("no %s ops, the PyTorch reference replaces them: %s", backend, error)
        return str(error)
    return None


def _load_extension() -> None:
    library = next(Path(__file__).parent.glob("_C.*"), None)
    if library is None:
        raise ImportError("the C++ extension was not built; an install with NRT_FAST_EXT=cpu tells why")
    torch.ops.load_library(library)
    import_module("nrt_fast.fakes")


@functools.cache
def _choose(op: str, device: str, forced: Backend | None) -> Backend:
    if forced is None:
        ladder = _LADDER.get(device, ("reference",))
        return next(b for b in ladder if b == "reference" or (b in _twins[op] and missing(b) is None))
    if forced != "reference" and (forced not in _twins[op] or missing(forced)):
        raise LookupError(f"{op} on {forced}: {missing(forced) or 'there is no such implementation'}")
    return forced


@functools.cache
def _implementation(op: str, device: str, forced: Backend | None) -> Callable:
    chosen = _choose(op, device, forced)
    if chosen in ("native", "cuda"):
        return getattr(torch.ops.nrt_fast, op).default
    if chosen == "triton":
        return getattr(import_module(f"nrt_fast.triton_kernels.{op}"), op)
    return _references[op]


def _op(reference: Callable[P, R], *twins: Backend, **checked: torch.dtype | None) -> Callable[P, R]:
    """The dispatched form of a reference; ``checked`` names the tensors to check, with their dtype (None: any)."""
    name = reference.__name__
    parameters = list(inspect.signature(reference).parameters)
    specs = [(parameter, _dimensions(parameter), dtype) for parameter, dtype in checked.items()]
    _references[name], _twins[name] = reference, twins

    @functools.wraps(reference)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((value.device.type for value in args if isinstance(value, Tensor)), "cpu")
        if specs:
            _check(specs, dict(zip(parameters, args, strict=False)) | kwargs)
        return _implementation(name, device, _forced)(*args, **kwargs)

    return op


def _dimensions(parameter: str) -> tuple[str, ...]:
    """A parameter's suffix is its shape: ``entries_M3`` is [M, 3]; prefix sums ``cu_...`` have one axis of any size."""
    return ("*",) if parameter.startswith("cu_") else tuple(re.search(r"_([A-Z0-9]+)$", parameter)[1])


def _check(specs: list[tuple[str, tuple[str, ...], torch.dtype | None]], values: dict[str, object]) -> None:
    """Raise ValueError unless dtypes and shapes are as declared; a letter has one size in all arguments of a call."""
    sizes = {}
    for parameter, dimensions, dtype in specs:
        value = values.get(parameter)
        if value is None:
            continue
        shape = value.shape
        fits = len(shape) == len(dimensions) and dtype in (None, value.dtype)
        for dimension, size in zip(dimensions, shape, strict=False):
            expected = int(dimension) if dimension.isdigit() else sizes.setdefault(dimension, size)
            fits = fits and (size == expected or dimension == "*")
        if not fits:
            axes = ", ".join(f"{d}={sizes[d]}" if d in sizes and d != "*" else d for d in dimensions)
            raise ValueError(
                f"{parameter}: expected shape [{axes}]{f' of {dtype}' if dtype else ''}, "
                f"got {list(shape)} of {value.dtype}"
            )


pack_bins = _op(pack.pack_bins, "native", cost_M=torch.int64)
pack_index = _op(pack.pack_index, "native", entries_M3=torch.int64, cu_prompts=torch.int64, cu_traces=torch.int64)
pack_gather = _op(
    pack.pack_gather, "native", "cuda", prompt_ids_U=torch.int64, targets_A=torch.int64,
    inv_temperature_A=torch.float32, weight_A=torch.float32, old_logprobs_A=torch.float32, kind_A=torch.int8,
    counted_A=torch.bool, source_T=torch.int64, rows_B=torch.int64,
)  # fmt: skip
logsoftmax_gather = _op(
    gather.logsoftmax_gather, "triton", logits_NV=None, target_N=torch.int64, inv_temperature_N=torch.float32
)
linear_logits = _op(logprob.linear_logits)
linear_logprob = _op(
    logprob.linear_logprob, "native", "triton", hidden_ND=None, weight_VD=None, target_N=torch.int64,
    inv_temperature_N=torch.float32,
)  # fmt: skip
linear_logprob_stats = _op(
    logprob.linear_logprob_stats, "native", "triton", hidden_ND=None, weight_VD=None, target_N=torch.int64,
    inv_temperature_N=torch.float32,
)  # fmt: skip
linear_logprob_loss = _op(
    logprob.linear_logprob_loss, "native", "triton", hidden_ND=None, weight_VD=None, target_N=torch.int64,
    inv_temperature_N=torch.float32, token_weight_N=torch.float32, policy_N=torch.bool, old_logprob_N=torch.float32,
    reference_logprob_N=torch.float32, grad_weight_VD=torch.float32,
)  # fmt: skip
sample_logprob = _op(
    sample.sample_logprob, "native", "triton", logits_NV=None, uniform_N=torch.float64, floor_N=torch.float32
)
sampling_floor = _op(sample.sampling_floor, logits_NV=None)
philox_uniform = _op(sample.philox_uniform, "triton")
prefix_attention = _op(
    attention.prefix_attention, "native", "triton", q_THE=None, prefix_k_NKSE=None, prefix_v_NKSE=None,
    prefix_pages_PX=torch.int32, prefix_lens_P=torch.int32, own_k_MKZE=None, own_v_MKZE=None,
    own_pages_BY=torch.int32, own_lens_B=torch.int32, cu_q=torch.int32, cu_rows=torch.int32,
)  # fmt: skip
gather_rows = _op(
    gather_rows_.gather_rows, "triton", x_TKE=None, index_R=torch.int64, copies_R=torch.int64, cu_copies=torch.int64
)
rms_norm = _op(layers.rms_norm, "triton", weight_D=None)
add_rms_norm = _op(layers.add_rms_norm, "triton", x_TD=None, residual_TD=None, weight_D=None)
swiglu = _op(layers.swiglu, "triton", gate_up_T2F=None)
rotate = _op(layers.rotate, "triton", q_THE=None, k_TKE=None, cos_TF=None, sin_TF=None)
rotate_write = _op(
    layers.rotate_write, "triton", q_THE=None, k_TKE=None, v_TKE=None, cos_TF=None, sin_TF=None, k_pages_NKSE=None,
    v_pages_NKSE=None, page_T=None, slot_T=None,
)  # fmt: skip
aggregate_rewards = _op(
    rewards.aggregate_rewards, "native", "triton", logc_C=torch.float32, logb_A=torch.float32, closed_N=torch.bool,
    cu_answers=torch.int64, cu_groups=torch.int64, cu_scores=torch.int64,
)  # fmt: skip
cispo = _op(loss.cispo)
ppo = _op(loss.ppo)
reinforce = _op(loss.reinforce)
kl_estimate = _op(loss.kl_estimate)
adamw = _op(adamw_.adamw, "native", "triton")
grad_norm = _op(adamw_.grad_norm, "native")
