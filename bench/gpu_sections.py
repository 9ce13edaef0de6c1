"""What gpu_suite.py checks and times, an op or a family of ops a section, at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timing import interleaved
from torch import Tensor

from nrt_fast import ops

if TYPE_CHECKING:
    from gpu_suite import Suite

SECTIONS: dict[str, tuple[Callable[[Suite], None], int]] = {}  # name: section, seconds it may take


def section(seconds: int):
    def register(function: Callable[[Suite], None]) -> Callable[[Suite], None]:
        SECTIONS[function.__name__] = function, seconds
        return function

    return register


def with_gradients(function: Callable, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and the gradients of the inputs, for upstream gradients that depend on the shape alone."""
    leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y) for y in outputs]
    upstream = [x.to(inputs[0].dtype).to(y.dtype) for x, y in zip(upstream, outputs, strict=True)]
    torch.autograd.backward(outputs, upstream)
    return [y.detach() for y in outputs] + [x.grad for x in leaves]


def check_differentiable(suite: Suite, name: str, op: Callable, inputs: list[Tensor], reference: Callable) -> None:
    """Outputs and gradients of an op against its reference in fp64 and in the inputs' dtype."""
    ours, plain = with_gradients(op, inputs), with_gradients(reference, inputs)
    exact = with_gradients(reference, inputs, torch.float64)
    for index, (our, true, their) in enumerate(zip(ours, exact, plain, strict=True)):
        suite.check(f"{name} {index}", our, true, their)


def forward_backward(function: Callable, inputs: list[Tensor]) -> Callable[[], None]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream = [torch.ones_like(y) for y in _as_list(function(*leaves))]

    def step() -> None:
        outputs = _as_list(function(*leaves))
        torch.autograd.grad(outputs, leaves, upstream)

    return step


def _as_list(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def reference_of(op: str) -> Callable:
    return ops._implementation(op, "cpu", "reference")


@section(30)
def ceilings(suite: Suite) -> None:
    suite.record(kind="note", name="copy", text=f"{suite.bandwidth / 1e12:.3f} TB/s read and written")
    hidden, weight, _ = head(suite, suite.size(8192, 32))
    out = torch.empty(len(hidden), len(weight), dtype=suite.dtype, device=suite.device)
    seconds = suite.compare("bare GEMM of the head", {"GEMM": lambda: torch.mm(hidden, weight.T, out=out)})
    flops = 2 * len(hidden) * weight.numel()
    suite.record(kind="note", name="GEMM", text=f"{flops / seconds['GEMM'] / 1e12:.1f} TFLOP/s")


def head(suite: Suite, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head, targets: the likeliest token of every other row, so that some rows are nearly sure."""
    D, V = suite.size(4096, 64), suite.size(128_256, 361)
    hidden, weight = suite.randn(N, D), suite.randn(V, D, scale=2 * D**-0.5)
    target = suite.randint(V, N)
    hidden[::2] += 3 * weight[target[::2]]
    return hidden, weight, target


@section(40)
def logsoftmax_gather(suite: Suite) -> None:
    N, V = suite.size(8192, 8), suite.size(128_256, 361)
    logits, target = suite.randn(N, V, scale=3), suite.randint(V, N)
    rows = slice(0, suite.size(64, 8))
    plain = functools.partial(reference_of("logsoftmax_gather"), target_N=target[rows])
    op = functools.partial(ops.logsoftmax_gather, target_N=target[rows])
    check_differentiable(suite, "logsoftmax_gather", lambda x: op(x * 1), [logits[rows]], plain)
    liger = lambda: _liger_cross_entropy(logits, target)  # noqa: E731
    with torch.no_grad():
        suite.compare(
            "forward",
            {
                "logsoftmax_gather": lambda: ops.logsoftmax_gather(logits, target),
                "F.cross_entropy": lambda: F.cross_entropy(logits, target, reduction="none"),
            },
            {"Liger": liger, "TRL": lambda: _trl_rows(logits, target)},
            suite.bytes_floor(logits),
        )
    leaf = logits.requires_grad_()
    suite.compare(
        "forward and backward, with a copy of the logits",
        {
            "logsoftmax_gather": lambda: torch.autograd.grad(ops.logsoftmax_gather(leaf.clone(), target).sum(), leaf),
            "F.cross_entropy": lambda: torch.autograd.grad(
                F.cross_entropy(leaf.clone(), target, reduction="sum"), leaf
            ),
        },
        floor_seconds=suite.bytes_floor(logits, times=5),  # copy 2, forward 1, backward 2
    )


def _liger_cross_entropy(logits: Tensor, target: Tensor) -> Callable:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda: liger_cross_entropy(logits, target, reduction="none")


def _trl_rows(logits: Tensor, target: Tensor) -> Callable:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda: selective_log_softmax_and_entropy(logits, target)


@section(60)
def linear_logprob(suite: Suite) -> None:
    for N in (suite.size(8192, 32), suite.size(128, 5)):
        hidden, weight, target = head(suite, N)
        rows = slice(0, suite.size(128, 32))
        ours = ops.linear_logprob_stats(hidden, weight, target)
        exact = reference_of("linear_logprob_stats")(hidden[rows].double(), weight.double(), target[rows])
        logits = hidden[rows] @ weight.T
        logprobs = logits.float().log_softmax(-1)
        plain = (
            logprobs.gather(1, target[rows, None]).squeeze(1), logits.float().logsumexp(-1),
            -(logprobs.exp() * logprobs).sum(-1),
        )  # fmt: skip
        for name, our, true, their in zip(("logprob", "logsumexp", "entropy"), ours, exact, plain, strict=True):
            suite.check(f"N={N}: {name}", our[rows], true, their, bound=5e-3)
        single = ops.linear_logprob(hidden, weight, target)
        suite.check(f"N={N}: linear_logprob", single[rows], exact[0], plain[0], bound=5e-3)
        del exact
        out = torch.empty(N, len(weight), dtype=suite.dtype, device=suite.device)
        gemm = lambda out=out, hidden=hidden, weight=weight: torch.mm(hidden, weight.T, out=out)  # noqa: E731
        arguments = hidden, weight, target
        with torch.no_grad():
            suite.compare(
                f"N={N}",
                {
                    "linear_logprob": functools.partial(ops.linear_logprob, *arguments),
                    "linear_logprob_stats": functools.partial(ops.linear_logprob_stats, *arguments),
                    "bare GEMM": gemm,
                    "log_softmax + gather": functools.partial(_plain_logprob, *arguments),
                },
                {
                    "Liger": functools.partial(_liger, *arguments, reduction="none"),
                    "CCE": functools.partial(_cce, *arguments),
                    "TRL": functools.partial(_trl_chunked, *arguments),
                },
                _gemm_floor(suite, gemm),
            )


def _gemm_floor(suite: Suite, gemm: Callable[[], object], times: float = 1.0) -> float:
    """The same run's time of the bare matrix product, ``times``."""
    return times * interleaved({"GEMM": gemm}, suite.device, 2 if suite.quick else 9)["GEMM"]


def _plain_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def _liger(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: liger_fused_linear_cross_entropy(hidden, weight, target, reduction=reduction)


def _cce(hidden: Tensor, weight: Tensor, target: Tensor) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(hidden, weight, target, reduction="none", filter_eps=None)


def _trl_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Callable:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return lambda: ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ("entropy",))[0]


@section(90)
def linear_logprob_loss(suite: Suite) -> None:
    options = ("cispo", 0.8, 1.28, 0.01, 0.001, 1e-3)
    hidden, weight, target = head(suite, suite.size(512, 32))
    extra = loss_inputs(suite, len(hidden))

    def gradients(dtype: torch.dtype, function: Callable) -> list[Tensor]:
        grad_weight = torch.zeros(weight.shape, dtype=torch.promote_types(dtype, torch.float32), device=suite.device)
        wide = [x.to(dtype) if dtype == torch.float64 and x.is_floating_point() else x for x in extra]
        results = function(hidden.to(dtype), weight.to(dtype), target, *wide, grad_weight, *options)
        return [*results, grad_weight]

    exact = gradients(torch.float64, reference_of("linear_logprob_loss"))
    plain = gradients(suite.dtype, reference_of("linear_logprob_loss"))
    ours = gradients(suite.dtype, ops.linear_logprob_loss)
    for name, our, true, their in zip(("loss", "logprob", "entropy", "dH", "dW"), ours, exact, plain, strict=True):
        if name in ("dH", "dW"):  # the reference never rounds a logit's gradient; kernels do, once, for the product
            their = true + 2 * (true.to(suite.dtype).double() - true)
        suite.check(name, our, true, their, bound=5e-3 if name in ("logprob", "entropy") else None)
    del exact, plain, ours

    N = suite.size(8192, 32)
    hidden, weight, target = head(suite, N)
    extra = loss_inputs(suite, N)
    out = torch.empty(N, len(weight), dtype=suite.dtype, device=suite.device)
    gemm = lambda: torch.mm(hidden, weight.T, out=out)  # noqa: E731
    floor = _gemm_floor(suite, gemm, times=3)
    constants, grad_weight = (hidden.detach(), weight.detach()), torch.zeros_like(weight, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def backward_of(call: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(call(), leaves) and None

    weights = extra[1]
    weighted = lambda call: backward_of(lambda: (call() * weights).sum())  # noqa: E731
    suite.compare(
        f"forward and backward, N={N}",
        {
            "linear_logprob_loss": lambda: ops.linear_logprob_loss(*constants, target, *extra, grad_weight, *options),
            "log_softmax + gather": weighted(lambda: _plain_logprob(hidden, weight, target)),
        },
        {
            "Liger (sum, no weights)": lambda: backward_of(_liger(hidden, weight, target, "sum")),
            "Liger (per token)": lambda: weighted(_liger(hidden, weight, target, "none")),
            "CCE": lambda: weighted(_cce(hidden, weight, target)),
            "TRL": lambda: weighted(_trl_chunked(hidden, weight, target)),
            "F.linear_cross_entropy": lambda: weighted(
                lambda: F.linear_cross_entropy(hidden, weight, target, reduction="none")
            ),
        },
        floor,
        rounds=9,
    )


def loss_inputs(suite: Suite, N: int) -> list[Tensor]:
    """Inverse temperature, token weights, policy, old and reference log-probs; a few weights of zero."""
    weight = suite.randn(N, dtype=torch.float32)
    weight[::7] = 0
    old = -suite.randn(N, dtype=torch.float32).abs()
    return [torch.ones(N, device=suite.device), weight, suite.randint(3, N) > 0, old, old - 0.1]


@section(40)
def sample_logprob(suite: Suite) -> None:
    for N in (suite.size(256, 4), suite.size(2048, 8)):
        hidden, weight, _ = head(suite, N)
        logits = hidden @ weight.T
        prompt, trace, position = suite.randint(1000, N), suite.randint(8, N), suite.randint(4096, N)
        uniform = ops.philox_uniform(7, 3, prompt, trace, position)
        suite.check_equal(f"N={N}: philox", uniform, reference_of("philox_uniform")(7, 3, prompt, trace, position))
        ids, logprob = ops.sample_logprob(logits, uniform, 1.0)
        expected_ids, _ = reference_of("sample_logprob")(logits, uniform, 1.0)
        # A number that falls on the border of two ids may go either way.
        suite.check_equal(f"N={N}: ids", ids, expected_ids, share=0.99)
        exact = logits.double().log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        suite.check(f"N={N}: logprob", logprob, exact, exact)
        plain = lambda logits=logits: torch.multinomial(logits.float().softmax(-1), 1)  # noqa: E731
        out = torch.empty_like(logits)
        suite.compare(
            f"N={N}",
            {
                "sample_logprob": functools.partial(ops.sample_logprob, logits, uniform, 1.0),
                "softmax + multinomial": plain,
                "bare GEMM of the head": lambda h=hidden, w=weight, out=out: torch.mm(h, w.T, out=out),
            },
            floor_seconds=suite.bytes_floor(logits),
        )


@section(20)
def aggregate_rewards(suite: Suite) -> None:
    P, G, A = suite.size(256, 3), suite.size(8, 4), suite.size(128, 9)
    logc, logb = -suite.randn(P * G * A, dtype=torch.float32).abs(), -suite.randn(P * A, dtype=torch.float32).abs()
    closed = suite.randint(4, P * G) > 0
    offsets = [torch.arange(P + 1, device=suite.device) * size for size in (A, G, A * G)]
    for reward, clip, advantage, weight in (
        ("ws_log", "zero", "grpo", "fixed"), ("gm", "none", "rloo", "derived"), ("r3", "unit", "dr_grpo", "reward"),
    ):  # fmt: skip
        options = (reward, "weight", clip, advantage, weight, 1e-4, True, 0.1)
        ours = ops.aggregate_rewards(logc, logb, closed, *offsets, *options)
        cpu = [x.cpu() for x in (logc, logb, closed, *offsets)]
        plain = reference_of("aggregate_rewards")(*cpu, *options)
        exact = reference_of("aggregate_rewards")(cpu[0].double(), cpu[1].double(), *cpu[2:], *options)
        names = ("reward", "base", "shaped", "advantage", "signal", "weight")
        for name, our, true, their in zip(names, ours, exact, plain, strict=True):
            suite.check(f"{reward} {name}", our.cpu(), true, their)
    suite.compare(f"{P} x {G} traces of {A}", {"aggregate_rewards": lambda: ops.aggregate_rewards(
        logc, logb, closed, *offsets, *options)}, floor_seconds=suite.bytes_floor(logc, logc, logb))  # fmt: skip


@section(60)
def prefix_attention(suite: Suite) -> None:
    P, G, prefix, own = suite.size(16, 2), suite.size(16, 3), suite.size(512, 7), suite.size(512, 5)
    H, K, E = suite.size(32, 4), suite.size(8, 2), suite.size(128, 16)
    B = P * G
    as_int = functools.partial(torch.tensor, dtype=torch.int32, device=suite.device)
    rows = torch.arange(B, dtype=torch.int32, device=suite.device)
    for Q in (1, suite.size(32, 2)):
        name = f"{Q} queries, prefix {prefix}, own {own}, {P} x {G}, one layer"
        q = suite.randn(B * Q, H, E)
        prefix_k, prefix_v = suite.randn(P, K, prefix, E), suite.randn(P, K, prefix, E)
        own_k, own_v = suite.randn(B, K, own + Q, E), suite.randn(B, K, own + Q, E)
        own_lens, cu_q = torch.full_like(rows, own), torch.arange(B + 1, dtype=torch.int32, device=suite.device) * Q
        shared = (
            q, prefix_k, prefix_v, rows[:P, None], as_int([prefix] * P), own_k, own_v, rows[:, None], own_lens, cu_q,
            torch.arange(P + 1, dtype=torch.int32, device=suite.device) * G, Q, G,
        )  # fmt: skip
        ours = ops.prefix_attention(*shared)
        reference = reference_of("prefix_attention")
        exact = reference(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in shared))
        suite.check(f"{name}: shared", ours, exact, reference(*shared))
        copies = [x.repeat_interleave(G, dim=0) for x in (prefix_k, prefix_v)]
        unshared = (q, *copies, rows[:, None], as_int([prefix] * B), *shared[5:10], as_int(range(B + 1)), Q, 1)
        suite.check(f"{name}: unshared", ops.prefix_attention(*unshared), exact, reference(*shared))
        del exact
        suite.compare(
            name,
            {
                "shared prefix": functools.partial(ops.prefix_attention, *shared),
                "a prefix a row": functools.partial(ops.prefix_attention, *unshared),
            },
            floor_seconds=suite.bytes_floor(prefix_k, prefix_v, own_k, own_v, q, q),
        )


@section(90)
def packed_attention(suite: Suite) -> None:
    from nrt_fast import packed_attention as room

    H, K, E = suite.size(32, 4), suite.size(8, 2), suite.size(128, 16)

    def inputs(prompts: int, traces: int, length: int):
        lens = torch.full((prompts * (traces + 1),), length)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)]).int()
        layout = room.PackedLayout(cu_seqlens, torch.full((prompts,), traces), torch.device(suite.device))
        return layout, [suite.randn(layout.num_tokens, heads, E) for heads in (H, K, K)]

    rungs = [rung for rung in room.LADDER[suite.device] if room.missing(rung) is None]
    layout, qkv = inputs(2, 3, suite.size(64, 5))

    def attend(rung: str, layout: object) -> Callable:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with room.use(rung):
                return room.packed_attention(q, k, v, layout)

        return call

    working = []
    for rung in rungs:
        try:
            check_differentiable(suite, f"{rung}:", attend(rung, layout), qkv, attend("plain", layout))
        except Exception as error:
            suite.record(kind="note", name=rung, text=f"{type(error).__name__}: {error}"[:300])
            continue
        if not suite.failed(rung):
            working.append(rung)
    layout, qkv = inputs(suite.size(4, 1), suite.size(7, 2), suite.size(512, 6))
    suite.compare(
        f"forward and backward, {layout.num_tokens} tokens",
        {rung: forward_backward(attend(rung, layout), qkv) for rung in working},
    )


@section(110)
def layers(suite: Suite) -> None:
    T, D, width = suite.size(8192, 9), suite.size(4096, 64), suite.size(14_336, 48)
    H, K, E = suite.size(32, 4), suite.size(8, 2), suite.size(128, 16)
    x, residual, weight, gate_up = suite.randn(T, D), suite.randn(T, D), suite.randn(D), suite.randn(T, 2, width)
    q, k, v = suite.randn(T, H + 2 * K, E).split([H, K, K], dim=1)
    angles = suite.randn(T, E // 2, dtype=torch.float32)
    cos, sin = angles.cos().to(suite.dtype), angles.sin().to(suite.dtype)
    norm, add_norm = (functools.partial(ops.rms_norm, eps=1e-5), functools.partial(ops.add_rms_norm, eps=1e-5))
    tables = {"cos_TF": cos, "sin_TF": sin}
    cases = {
        "rms_norm": (norm, [x, weight], 5),  # bytes of the first input moved, forward and backward
        "add_rms_norm": (add_norm, [x, residual, weight], 8),
        "swiglu": (ops.swiglu, [gate_up], 4),
        "rotate": (functools.partial(ops.rotate, **tables), [q, k], 4),
    }
    for name, (op, inputs, times) in cases.items():
        title = f"{name}, forward and backward"
        keywords = op.keywords if isinstance(op, functools.partial) else {}
        wide = {key: value.double() if torch.is_tensor(value) else value for key, value in keywords.items()}
        plain = functools.partial(reference_of(name), **keywords)
        ours, rounded = with_gradients(op, inputs), with_gradients(plain, inputs)
        exact = with_gradients(functools.partial(reference_of(name), **wide), inputs, torch.float64)
        for index, (our, true, their) in enumerate(zip(ours, exact, rounded, strict=True)):
            suite.check(f"{title}: {index}", our, true, their)
        peers = {"torch.compile": lambda p=plain, i=inputs: forward_backward(torch.compile(p), i)}
        peers = peers if suite.device == "cuda" else {}
        floor = times * sum(x.numel() * x.element_size() for x in inputs[: 2 if name == "rotate" else 1])
        suite.compare(
            title,
            {name: forward_backward(op, inputs), "torch": forward_backward(plain, inputs)},
            peers,
            floor / suite.bandwidth,
        )
    slots = 256
    pages = [torch.zeros(T // slots + 1, K, slots, E, dtype=suite.dtype, device=suite.device) for _ in range(2)]
    tokens = torch.randperm(T, generator=torch.Generator().manual_seed(0)).to(suite.device)
    places = tokens // slots, tokens % slots
    ours = [ops.rotate_write(q, k, v, cos, sin, *pages, *places), *(page.clone() for page in pages)]
    wide = [torch.zeros_like(page, dtype=torch.float64) for page in pages]
    exact = [reference_of("rotate_write")(*(x.double() for x in (q, k, v, cos, sin)), *wide, *places), *wide]
    for name, our, true in zip(("queries", "keys", "values"), ours, exact, strict=True):
        suite.check(f"rotate_write: {name}", our, true, true.to(suite.dtype))
    suite.compare(
        "rotate_write",
        {
            "rotate_write": lambda: ops.rotate_write(q, k, v, cos, sin, *pages, *places),
            "torch": lambda: reference_of("rotate_write")(q, k, v, cos, sin, *pages, *places),
        },
        floor_seconds=suite.bytes_floor(q, k, v, times=2),
    )


@section(60)
def adamw(suite: Suite) -> None:
    n = suite.size(2**28, 1000)
    settings = (1e-3, (0.9, 0.95), 1e-8, 0.1, n - n // 8, 3, torch.full((1,), 0.5, device=suite.device))
    kinds = {"fp32": (torch.float32,) * 2, "bf16": (torch.bfloat16,) * 2, "8-bit": (torch.int8, torch.uint8)}
    flat = [[suite.randn(n, dtype=torch.float32)] for _ in range(3)] + [[torch.rand(n, device=suite.device)]]
    fused = functools.partial(
        torch._fused_adamw_, *flat, [], [torch.ones((), device=suite.device)], lr=1e-3, beta1=0.9, beta2=0.95,
        weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    for kind, dtypes in kinds.items():
        if suite.device == "cpu" and kind != "fp32":  # the C++ has one kind
            continue
        name = f"{n} weights in bf16 and remainder, {kind} moments"
        _check_adamw(suite, name, kind, *_adamw_state(suite, min(n, 2**20), dtypes), settings)
        tensors, absmax = _adamw_state(suite, n, dtypes)
        suite.compare(
            name,
            {"adamw": functools.partial(ops.adamw, *tensors, *settings, *absmax), "torch's fused, all in fp32": fused},
            floor_seconds=suite.bytes_floor(*tensors, *absmax, times=2),
        )


def _adamw_state(suite: Suite, size: int, dtypes: tuple[torch.dtype, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Weight, remainder, gradient and moments; the scales of moments that are codes."""
    remainder, codes = (suite.randint(2**16 - 1, size) - 2**15).short(), suite.randint(100, size) + 1
    first, second = (suite.randn(size, dtype=torch.float32) for _ in range(2))
    moments = (codes, codes) if torch.int8 in dtypes else (first, second.square_())
    absmax = [torch.ones(-(-size // 256), device=suite.device) for _ in range(2 * (torch.int8 in dtypes))]
    moments = [moment.to(dtype) for moment, dtype in zip(moments, dtypes, strict=True)]
    weight, grad = suite.randn(size, dtype=torch.bfloat16), suite.randn(size, dtype=torch.float32)
    return [weight, remainder, grad, *moments], absmax


def _check_adamw(
    suite: Suite, name: str, kind: str, tensors: list[Tensor], absmax: list[Tensor], settings: tuple
) -> None:
    from nrt_fast.reference.adamw import join_master, load_moment

    settings = (*settings[:4], len(tensors[0]) // 2, *settings[5:])
    ours, expected = ([x.clone() for x in (*tensors, *absmax)] for _ in range(2))
    ops.adamw(*ours[:5], *settings, *ours[5:])
    reference_of("adamw")(*expected[:5], *settings, *expected[5:])
    exact = join_master(*expected[:2])
    suite.check(f"{name}: master", join_master(*ours[:2]), exact, exact)
    suite.check(f"{name}: gradient", ours[2], expected[2], expected[2])
    for index, moment in ((3, "first"), (4, "second")):
        our, true = (load_moment(x[index], x[index + 2] if absmax else None) for x in (ours, expected))
        if kind != "fp32":  # where the rounding of fp32 differs, so may the neighbour that was drawn
            our, true = our.mean(), true.mean()
        suite.check(f"{name}: {moment} moment", our, true, true)


@section(20)
def pack(suite: Suite) -> None:
    num_groups, G = suite.size(512, 5), suite.size(8, 2)
    cpu = torch.Generator().manual_seed(0)
    prompts, traces = (torch.randint(20, 200, (size,), generator=cpu) for size in (num_groups, num_groups * G))
    cu_prompts, cu_traces = (F.pad(x.cumsum(0), (1, 0)) for x in (prompts, traces))
    first = torch.arange(num_groups) * G
    entries = torch.stack([torch.arange(num_groups), first, first + G], dim=1)
    index = ops.pack_index(entries, cu_prompts, cu_traces)
    for name, ours, true in zip(
        ("source", "positions", "cu_seqlens", "hidden", "rows"), index,
        reference_of("pack_index")(entries, cu_prompts, cu_traces), strict=True,
    ):  # fmt: skip
        suite.check_equal(name, ours, true)
    A = int(cu_traces[-1])
    kind = suite.randint(3, A).to(torch.int8)
    arrays = [
        suite.randint(1000, int(cu_prompts[-1])), suite.randint(1000, A), *suite.randn(3, A, dtype=torch.float32), kind,
        index[0].to(suite.device), index[4].to(suite.device),
    ]  # fmt: skip
    plain = functools.partial(reference_of("pack_gather"), *arrays)
    for position, (ours, true) in enumerate(zip(ops.pack_gather(*arrays), plain(), strict=True)):
        suite.check_equal(f"pack_gather {position}", ours, true)
    suite.compare(
        f"pack_gather, {len(arrays[-2])} tokens",
        {"pack_gather": lambda: ops.pack_gather(*arrays), "torch indexing": plain},
        floor_seconds=suite.bytes_floor(*arrays[1:], times=2),
    )
