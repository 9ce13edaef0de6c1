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
from itertools import chain, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from nrt_fast.reference import adamw as adamw_
from nrt_fast.reference import attention, layers, logprob, loss, pack, panels, rewards, sample
from nrt_fast.reference import gather_rows as gather_rows_
from nrt_fast.reference import logsoftmax_gather as gather

Backend = Literal["triton", "cuda", "native", "reference"]
P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_LADDER: dict[str, tuple[Backend, ...]] = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}
_references: dict[str, Callable] = {}
_twins: dict[str, tuple[Backend, ...]] = {}
_forward_only: dict[str, Backend | None] = {}
_forced: Backend | None = None


def backend() -> dict[str, Backend]:
    """What runs each op on each kind of device that is here, gradients being on or off as they are now.

    ``{"pack_bins/cpu": "native", ...}``
    """
    devices, grad = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"], torch.is_grad_enabled()
    return {f"{op}/{device}": _choose(op, device, None, grad) for op in _references for device in devices}


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run every op on this backend, for tests; an op that cannot raises LookupError with the reason."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def obstacles(device: str) -> dict[str, dict[Backend, str]]:
    """Why nothing faster than what ``backend`` tells runs each op on a kind of device: {op: {backend: reason}}."""
    grad = torch.is_grad_enabled()
    reasons = {op: {rung: _obstacle(op, rung, grad) for rung in _LADDER[device]} for op in _references}
    # The ladder is walked from the fastest rung down, as far as the first without an obstacle.
    return {op: dict(takewhile(itemgetter(1), rungs.items())) for op, rungs in reasons.items()}


@contextmanager
def watch(call: Callable[..., object]) -> Iterator[None]:
    """Hand every call to ``call(op, implementation, reference, *args, **kwargs)``, which is to return its result."""
    global _implementation
    before = _implementation

    def watched(op: str, *where) -> Callable:
        return functools.partial(call, op, before(op, *where), _references[op])

    _implementation = watched
    try:
        yield
    finally:
        _implementation = before


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


def _obstacle(op: str, backend: Backend, grad: bool) -> str | None:
    """Why an op cannot run on a backend, or None."""
    if backend == "reference":
        return None
    if backend not in _twins[op]:
        return missing(backend) or "there is no such implementation"
    if grad and backend == _forward_only[op]:
        return "it has no backward; torch.no_grad() turns gradients off"
    return missing(backend)


@functools.cache
def _choose(op: str, device: str, forced: Backend | None, grad: bool = True) -> Backend:
    if forced is None:
        return next(b for b in _LADDER.get(device, ("reference",)) if _obstacle(op, b, grad) is None)
    if obstacle := _obstacle(op, forced, grad):
        raise LookupError(f"{op} on {forced}: {obstacle}")
    return forced


@functools.cache
def _implementation(op: str, device: str, forced: Backend | None, grad: bool = True) -> Callable:
    chosen = _choose(op, device, forced, grad)
    if chosen in ("native", "cuda"):
        native = getattr(torch.ops.nrt_fast, op).default
        return getattr(import_module("nrt_fast.backward"), op, native) if grad else native
    if chosen == "triton":
        return getattr(import_module(f"nrt_fast.triton_kernels.{op}"), op)
    return _references[op]


def _op(
    reference: Callable[P, R], *twins: Backend, forward_only: Backend | None = None, **checked: torch.dtype | None
) -> Callable[P, R]:
    """The dispatched form of a reference; ``checked`` names the tensors to check, with their dtype (None: any).

    A twin without a backward is ``forward_only``: it runs where gradients are off.
    """
    name = reference.__name__
    parameters = list(inspect.signature(reference).parameters)
    specs = [(parameter, _dimensions(parameter), dtype) for parameter, dtype in checked.items()]
    fit = _quick_check([(parameters.index(parameter), *spec) for parameter, *spec in specs])
    _references[name], _forward_only[name] = reference, forward_only
    _twins[name] = (*twins, forward_only) if forward_only else twins

    @functools.wraps(reference)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        if specs and (kwargs or not fit(args)):
            _check(specs, dict(zip(parameters, args, strict=False)) | kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else next(filter(_is_tensor, args), None)
        device = "cpu" if first is None or first.is_cpu else first.device.type
        return _implementation(name, device, _forced, torch.is_grad_enabled())(*args, **kwargs)

    return op


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _dimensions(parameter: str) -> tuple[str, ...]:
    """A parameter's suffix is its shape: ``entries_M3`` is [M, 3]; prefix sums ``cu_...`` have one axis of any size."""
    return ("*",) if parameter.startswith("cu_") else tuple(re.search(r"_([A-Z0-9]+)$", parameter)[1])


def _quick_check(specs: list[tuple[int, tuple[str, ...], torch.dtype | None]]) -> Callable[[tuple], bool]:
    """Whether all tensors at these positions are there and fit; if not, ``_check`` finds out whether that is wrong.

    Decoding calls hundreds of ops a token: all sizes are compared at once, with those of their letters' first axes.
    """
    positions, ranks = [position for position, *_ in specs], [len(dimensions) for _, dimensions, _ in specs]
    dtypes = [(position, dtype) for position, _, dtype in specs if dtype]
    axes = [axis for _, dimensions, _ in specs for axis in dimensions]
    constants = tuple(sorted({0, *(int(axis) for axis in axes if axis.isdigit())}))
    names = [*map(str, constants), *axes]
    expected = itemgetter(*(i if name == "*" else names.index(name) for i, name in enumerate(names)))

    def fit(args: tuple) -> bool:
        try:
            shapes = [args[position].shape for position in positions]
        except (IndexError, AttributeError):  # an optional tensor is not there
            return False
        if list(map(len, shapes)) != ranks:
            return False
        sizes = (*constants, *chain.from_iterable(shapes))
        if expected(sizes) != sizes:
            return False
        return not dtypes or all(args[position].dtype == dtype for position, dtype in dtypes)

    return fit


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
    source_T=torch.int64, rows_B=torch.int64,
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
_philox_uniform = _op(sample.philox_uniform, "native", "triton")


@functools.wraps(_philox_uniform)
def philox_uniform(seed: int, step: int, prompt: Tensor, trace: Tensor, position: Tensor) -> Tensor:
    # torch's integers are signed: a key of 64 bits goes as the number that has them.
    return _philox_uniform(_signed(seed), _signed(step), prompt, trace, position)


def _signed(word: int) -> int:
    return ((word + 2**63) & 0xFFFFFFFF_FFFFFFFF) - 2**63


prefix_attention = _op(
    attention.prefix_attention, "native", "triton", q_THE=None, prefix_k_NKSE=None, prefix_v_NKSE=None,
    prefix_pages_PX=torch.int32, prefix_lens_P=torch.int32, own_k_MKZE=None, own_v_MKZE=None,
    own_pages_BY=torch.int32, own_lens_B=torch.int32, cu_q=torch.int32, cu_rows=torch.int32,
)  # fmt: skip
gather_rows = _op(
    gather_rows_.gather_rows, "triton", x_TKE=None, index_R=torch.int64, copies_R=torch.int64, cu_copies=torch.int64
)
rms_norm = _op(layers.rms_norm, "native", "triton", weight_D=None)
add_rms_norm = _op(layers.add_rms_norm, "native", "triton", x_TD=None, residual_TD=None, weight_D=None)
swiglu = _op(layers.swiglu, "native", "triton", gate_up_T2F=None)
rotate = _op(layers.rotate, "native", "triton", q_THE=None, k_TKE=None, cos_TF=None, sin_TF=None)
rotate_write = _op(
    layers.rotate_write, "triton", forward_only="native", q_THE=None, k_TKE=None, v_TKE=None, cos_TF=None, sin_TF=None,
    k_pages_NKSE=None, v_pages_NKSE=None, page_T=None, slot_T=None,
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
panel_shape = panels.panel_shape
pack_panels = _op(panels.pack_panels, "native")
panel_linear = _op(panels.panel_linear, forward_only="native", x_TK=None)
panel_logits = _op(panels.panel_logits, forward_only="native", x_TK=None)
