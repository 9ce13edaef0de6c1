"""What the compile lane compiles: per Triton op, a call of its launcher with meta tensors at the shapes of a model.

To add a case, write a function here that calls ``nrt_fast.triton_kernels.<op>.<op>`` as a step of training or sampling
would, forward and backward, on tensors of ``meta(...)``, and decorate it with ``@case``; its name is the op's. Nothing
runs: every launch is recorded with the specialisation a real one would have, and what is new is compiled. Import the
kernel inside the function. ``python tests/compile_lane.py OP`` shows what the compiler made of it, ``make kernels``
writes the table of all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TARGETS = (80, 90, 100)


@dataclass(frozen=True)
class ModelShape:
    """Width D, feed-forward width F, vocabulary V, H query and K key/value heads of width E; at most ``num_tokens``
    tokens, and as many of whatever else a run decides; the targets it is compiled for.
    """

    name: str
    D: int
    F: int
    V: int
    H: int
    K: int
    E: int
    num_tokens: int = 8192
    targets: tuple[int, ...] = TARGETS

    def count(self, wanted: int) -> int:
        """So many, if a run of this model has as many."""
        return min(wanted, self.num_tokens)

    def kinds(self, *all_of_them):
        """What a kernel is compiled for; the first alone of a model that is there for its sizes."""
        return all_of_them if self.targets == TARGETS else all_of_them[:1]


MODELS = (
    ModelShape("Llama-3.1-8B", 4096, 14336, 128256, 32, 8, 128),
    ModelShape("Llama-3.2-3B", 3072, 8192, 128256, 24, 8, 128),
    ModelShape("Llama-3.2-1B", 2048, 8192, 128256, 32, 8, 64),
    ModelShape("Mistral-7B-v0.3", 4096, 14336, 32768, 32, 8, 128),
    # Small sizes meet what large ones never do: Triton makes an argument of 1 a constant.
    ModelShape("starter", 128, 256, 180, 4, 4, 32, num_tokens=1000, targets=(90,)),
    ModelShape("starter, one of everything", 128, 256, 180, 4, 1, 32, num_tokens=1, targets=(90,)),
)

CASES: dict[str, Callable[[ModelShape], None]] = {}
# Kernels that may hold fp64 instructions, and why; elsewhere they are accidents.
FP64_KERNELS: dict[str, str] = {
    "sample_logprob_kernel": "prefix sums of probabilities, against a uniform of 53 bits",
    "philox_uniform_kernel": "its results are fp64",
}
NO_WGMMA_KERNELS: dict[str, str] = {}  # kernels whose products are too small for wgmma on sm_90, and why


def case(function: Callable[[ModelShape], None]) -> Callable[[ModelShape], None]:
    CASES[function.__name__] = function
    return function


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    """A tensor without memory; its address counts as aligned, as the allocator's are."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


@case
def logsoftmax_gather(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.logsoftmax_gather import logsoftmax_gather

    logits_NV = meta(model.num_tokens, model.V, grad=True) * 1  # not a leaf: backward overwrites it
    target_N = meta(model.num_tokens, dtype=torch.int64)
    logsoftmax_gather(logits_NV, target_N, meta(model.num_tokens, dtype=torch.float32)).sum().backward()


@case
def rms_norm(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.rms_norm import rms_norm

    rms_norm(meta(model.num_tokens, model.D, grad=True), meta(model.D, grad=True), 1e-5).sum().backward()
    qkv = meta(model.num_tokens, model.H + 2 * model.K, model.E, grad=True)
    rms_norm(qkv[:, : model.H], meta(model.E, grad=True), 1e-6).sum().backward()


@case
def add_rms_norm(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.add_rms_norm import add_rms_norm

    x_TD, residual_TD = (meta(model.num_tokens, model.D, grad=True) for _ in range(2))
    normed_TD, sum_TD = add_rms_norm(x_TD, residual_TD, meta(model.D, grad=True), 1e-5)
    (normed_TD + sum_TD).sum().backward()


@case
def swiglu(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.swiglu import swiglu

    (swiglu(meta(model.num_tokens, 2, model.F, grad=True)) * 1).sum().backward()


@case
def rotate(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.rotate import rotate

    qkv = meta(model.num_tokens, model.H + 2 * model.K, model.E, grad=True)
    q, k, _ = qkv.split([model.H, model.K, model.K], dim=1)
    tables = meta(model.num_tokens, model.E // 2), meta(model.num_tokens, model.E // 2)
    sum((x * 1).sum() for x in rotate(q, k, *tables)).backward()


@case
def rotate_write(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.rotate_write import rotate_write

    for num_tokens in (model.count(256), model.num_tokens):
        q, k, v = meta(num_tokens, model.H + 2 * model.K, model.E).split([model.H, model.K, model.K], dim=1)
        tables = meta(num_tokens, model.E // 2), meta(num_tokens, model.E // 2)
        pages = (meta(1024, model.K, 256, model.E) for _ in range(2))
        places = (meta(num_tokens, dtype=torch.int64) for _ in range(2))
        rotate_write(q, k, v, *tables, *pages, *places)


@case
def sample_logprob(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.sample_logprob import sample_logprob

    N, Z = model.count(256), model.count(1024)
    uniform_NZ, floor_N = meta(N, Z, dtype=torch.float64), meta(N, dtype=torch.float32)
    for dtype in model.kinds(torch.bfloat16, torch.float32):
        for temperature, floor in model.kinds((1.0, None), (0.0, None), (0.7, floor_N)):
            sample_logprob(meta(N, model.V, dtype=dtype), uniform_NZ[:, -1], temperature, floor)


@case
def philox_uniform(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.philox_uniform import philox_uniform

    P, G, A = map(model.count, (32, 8, 1024))
    philox_uniform(2**64 - 1, 7, *(meta(*shape, dtype=torch.int64) for shape in ((P, 1, 1), (G, 1), (A,))))


@case
def adamw(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.adamw import adamw

    size = 32 * model.D * (2 * model.D + 3 * model.F) + 2 * model.V * model.D
    hyper = 1e-6, (0.9, 0.95), 1e-15, 0.01, size - 4096, 10, meta(1, dtype=torch.float32)
    grad, *moments = (meta(size, dtype=torch.float32) for _ in range(3))
    adamw(meta(size, dtype=torch.float32), None, grad, *moments, *hyper)
    scales = [meta(-(-size // 256), dtype=torch.float32) for _ in range(2)]
    for dtypes, absmax in model.kinds(
        ((torch.float32,) * 2, ()), ((torch.bfloat16,) * 2, ()), ((torch.int8, torch.uint8), scales),
    ):  # fmt: skip
        first, second = (meta(size, dtype=dtype) for dtype in dtypes)
        adamw(meta(size), meta(size, dtype=torch.int16), grad, first, second, *hyper, *absmax)


@case
def aggregate_rewards(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.aggregate_rewards import aggregate_rewards

    num_prompts, num_traces, num_tokens = map(model.count, (256, 2048, 400))
    scores = meta(num_traces * num_tokens, dtype=torch.float32), meta(num_prompts * num_tokens, dtype=torch.float32)
    offsets = [meta(num_prompts + 1, dtype=torch.int64) for _ in range(3)]
    for choices in model.kinds(
        ("ws_log", "length", "zero", "grpo", "fixed"), ("ws_log", "length", "zero", "grpo", "derived"),
        ("ws_inv", "weight", "zero", "dr_grpo", "derived"), ("gm", "length", "zero", "grpo", "derived"),
        ("logp", "length", "none", "rloo", "fixed"), ("prob", "length", "none", "rloo", "reward"),
        ("am", "length", "unit", "grpo", "fixed"), ("r3", "length", "none", "grpo", "derived"),
    ):  # fmt: skip
        aggregate_rewards(*scores, meta(num_traces, dtype=torch.bool), *offsets, *choices, 0.02, False, 0.0)


@case
def gather_rows(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.gather_rows import gather_rows

    index_R, copies_R = (meta(2 * model.num_tokens, dtype=torch.int64) for _ in range(2))
    k_TKE = meta(model.num_tokens, model.K, model.E, grad=True)
    gather_rows(k_TKE, index_R, copies_R, meta(model.num_tokens + 1, dtype=torch.int64)).sum().backward()


@case
def prefix_attention(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.prefix_attention import prefix_attention

    P, G, columns, queries = map(model.count, (16, 16, 8, 512))
    ints = {"dtype": torch.int32}
    pages = [meta(2048, model.K, 256, model.E) for _ in range(2)]
    windowed = [(1, 4096)] if model.name.startswith("Mistral") else []  # the only family that has had a window
    for max_q, window in ((1, None), *windowed, (model.count(24), None)):  # decode, and the scoring of answers
        q_THE = meta(P * G * max_q, model.H, model.E)
        rows = meta(P * G, columns, **ints), meta(P * G, **ints), meta(P * G + 1, **ints), meta(P + 1, **ints)
        prefix_attention(q_THE, *pages, meta(P, 2, **ints), meta(P, **ints), *pages, *rows, max_q, G, window)
    rows = meta(P, columns, **ints), meta(P, **ints), meta(P + 1, **ints), meta(P + 1, **ints)
    q_THE = meta(P * queries, model.H, model.E)
    prefix_attention(q_THE, *pages, meta(P, 0, **ints), meta(P, **ints), *pages, *rows, queries, 1)  # prefill


@case
def linear_logprob(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.linear_logprob import linear_logprob

    head_VD = meta(model.V, model.D)
    for num_tokens in (model.count(256), model.num_tokens):
        linear_logprob(meta(num_tokens, model.D), head_VD, meta(num_tokens, dtype=torch.int64))


@case
def linear_logprob_stats(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.linear_logprob_stats import linear_logprob_stats

    for dtype in model.kinds(torch.bfloat16, torch.float32):
        hidden_ND, head_VD = (meta(size, model.D, dtype=dtype) for size in (model.num_tokens, model.V))
        linear_logprob_stats(hidden_ND, head_VD, meta(model.num_tokens, dtype=torch.int64))


@case
def linear_logprob_loss(model: ModelShape) -> None:
    from nrt_fast.triton_kernels.linear_logprob_loss import linear_logprob_loss

    target_N, policy_N = meta(model.num_tokens, dtype=torch.int64), meta(model.num_tokens, dtype=torch.bool)
    inv_temperature_N, weight_N, old_N, reference_N = (meta(model.num_tokens, dtype=torch.float32) for _ in range(4))
    options = model.kinds(("cispo", None, None), ("ppo", old_N, reference_N), ("reinforce", None, None))
    for dtype in model.kinds(torch.bfloat16, torch.float32):
        hidden_ND, head_VD = (meta(size, model.D, dtype=dtype) for size in (model.num_tokens, model.V))
        for trace_loss, old, reference in options:
            linear_logprob_loss(
                hidden_ND, head_VD, target_N, inv_temperature_N, weight_N, policy_N, old, reference,
                meta(model.V, model.D, dtype=torch.float32), trace_loss, 0.8, 1.28, 0.1, 0.01, 1 / model.num_tokens,
            )  # fmt: skip
