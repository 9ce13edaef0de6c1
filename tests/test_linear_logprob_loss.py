"""linear_logprob_loss on every backend: loss and gradients against fp64 autograd."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from linear_logprob_inputs import (
    BACKENDS,
    CASE_IDS,
    CASES,
    TRACE_LOSSES,
    assert_error_is_that_of_pytorch,
    device_of,
    exact_stats,
    make_inputs,
    plain_stats,
    skip_unless_here,
)
from torch import Tensor

from nrt_fast import ops
from nrt_fast.reference import logprob as reference
from nrt_fast.reference.loss import kl_estimate

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LOW, HIGH = 0.8, 1.28


@dataclass(frozen=True)
class Arguments:
    """Those of linear_logprob_loss but for the head's gradient, in its order."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    inv_temperature: Tensor | None
    token_weight: Tensor
    policy: Tensor
    old: Tensor | None
    reference: Tensor | None
    trace_loss: str = "cispo"
    low: float = LOW
    high: float = HIGH
    beta: float = 0.0
    entropy_coef: float = 0.0
    scale: float = 1.0


@pytest.fixture(params=CASES, ids=CASE_IDS)
def place(request):
    """(device, dtype) of a case; the ops run on its backend."""
    backend, dtype = request.param
    skip_unless_here(backend)
    with ops.use(backend):
        yield device_of(backend), dtype


@pytest.fixture(params=BACKENDS)
def device(request):
    skip_unless_here(request.param)
    with ops.use(request.param):
        yield device_of(request.param)


def make_arguments(N, V, D, dtype, device, **options):
    """Policy tokens with ratios on both sides of either clip bound, some advantages 0, and other tokens."""
    inputs = make_inputs(N, V, D, dtype, device)
    generator = torch.Generator().manual_seed(N)

    def uniform():
        return (torch.rand(N, generator=generator) - 0.5).to(device)

    token_weight = 4 * uniform()
    token_weight[::5] = 0.0
    policy = uniform() > -0.2
    logprob, _, _ = exact_stats(*inputs)
    nudge = (torch.tensor([LOW, LOW, HIGH, HIGH, 1.0]).log() + torch.tensor([-1, 1, -1, 1, 0]) * 1e-3).to(device)
    old = (logprob - nudge[torch.arange(N) % 5]).float()
    return Arguments(*inputs, token_weight, policy, old, (logprob + uniform()).float(), **options)


def of_rows(arguments, rows):
    """The arguments of some of the tokens."""
    per_token = ("hidden", "target", "inv_temperature", "token_weight", "policy", "old", "reference")
    return replace(arguments, **{name: getattr(arguments, name)[rows] for name in per_token})


def composed_loss(stats, arguments):
    """(loss, log-probability, entropy) from the losses of ``reference.loss``, for autograd."""
    a = arguments
    logprob, _, entropy = stats
    policy, weight = a.policy, a.token_weight.to(logprob.dtype)
    old = logprob.detach() if a.old is None else a.old
    trace = TRACE_LOSSES[a.trace_loss](
        logprob[policy], (logprob - old)[policy].exp(), weight[policy], a.low, a.high
    ).sum()  # fmt: skip
    kl = 0.0 if a.reference is None else kl_estimate(logprob[policy], a.reference[policy]).sum()
    other = -(weight * logprob)[~policy].sum()
    loss = trace + other + a.beta * kl - a.entropy_coef * entropy[policy].sum()
    return a.scale * loss, logprob, entropy


def by_autograd(stats, arguments, dtype):
    """(loss, log-probability, entropy, gradients of hidden and weight)."""
    hidden, weight = (x.to(dtype).requires_grad_() for x in (arguments.hidden, arguments.weight))
    loss, *rest = composed_loss(stats(hidden, weight, arguments.target, arguments.inv_temperature), arguments)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), *(x.detach() for x in rest), *gradients


def by_op(arguments, op=None):
    a = arguments
    options = (a.trace_loss, a.low, a.high, a.beta, a.entropy_coef, a.scale)
    dtype = torch.promote_types(a.weight.dtype, torch.float32)
    grad_weight = torch.zeros(a.weight.shape, dtype=dtype, device=a.weight.device)
    inputs = (a.hidden, a.weight, a.target, a.inv_temperature, a.token_weight, a.policy, a.old, a.reference)
    op = op or ops.linear_logprob_loss
    loss, logprob, entropy, grad_hidden = op(*inputs, grad_weight, *options)
    return loss, logprob, entropy, grad_hidden, grad_weight


def of_constant_head(arguments):
    """(loss, log-probability, entropy, gradient of hidden)."""
    *inputs, trace_loss, low, high, beta, entropy_coef, scale = vars(arguments).values()
    return ops.linear_logprob_loss(*inputs, None, trace_loss, low, high, beta, entropy_coef, scale)


def assert_close(ours, exact, dtype):
    """Log-probability and entropy as in fp32; loss and gradients by the dtype the gradient of a logit is rounded to."""
    rounding = 1e-5 if dtype.itemsize == 4 else torch.finfo(dtype).eps
    for our, true, tolerance in zip(ours, exact, (1e-5, 1e-5, 1e-5, rounding, rounding), strict=True):
        largest = true.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(our.double(), true, rtol=2 * tolerance, atol=2 * tolerance * largest)


OPTIONS = {
    "cispo": {"trace_loss": "cispo"},
    "ppo": {"trace_loss": "ppo", "scale": 0.37},
    "reinforce": {"trace_loss": "reinforce"},
    "kl": {"beta": 0.5},
    "entropy": {"entropy_coef": 0.3},
    "everything": {"trace_loss": "ppo", "beta": 0.1, "entropy_coef": -0.2, "scale": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("N", "V"), [(1, 512), (11, 361)])
def test_error_is_that_of_pytorch(N, V, options, place):
    device, dtype = place
    arguments = make_arguments(N, V, 40, dtype, device, **options)
    ours = by_op(arguments)
    assert [x.dtype for x in ours] == [torch.float32] * 3 + [dtype, torch.float32]
    plain = by_autograd(plain_stats, arguments, dtype)
    exact = by_autograd(exact_stats, arguments, torch.float64)
    for results in zip(ours, plain, exact, strict=True):
        assert_error_is_that_of_pytorch(*results)
    assert_close(ours, exact, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_in_fp64_is_autograd(options):
    arguments = make_arguments(23, 257, 16, torch.float64, "cpu", **options)
    ours = by_op(arguments, reference.linear_logprob_loss)
    for our, true in zip(ours, by_autograd(exact_stats, arguments, torch.float64), strict=True):
        torch.testing.assert_close(our, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trace_loss", TRACE_LOSSES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_on_either_side_of_the_clip(sign, trace_loss, place):
    """A ratio 1e-3 inside the range has its gradient, and one 1e-3 outside has it or not, by the side."""
    device, dtype = place
    arguments = make_arguments(10, 257, 16, dtype, device, trace_loss=trace_loss)
    always = torch.ones(10, device=device)
    arguments = replace(arguments, token_weight=sign * always, policy=always.bool())
    exact = by_autograd(exact_stats, arguments, torch.float64)
    assert_close(by_op(arguments), exact, dtype)
    moves = exact[3].norm(dim=1) > 0
    moves[:2] = True  # a certain target and a hidden state of zeros
    pushed_out = torch.tensor([True, False, False, False, False] if sign < 0 else [False] * 3 + [True, False])
    expected = ~pushed_out if trace_loss != "reinforce" else torch.ones(5, dtype=torch.bool)
    assert moves[5:].tolist() == expected.tolist()


@pytest.mark.parametrize("trace_loss", TRACE_LOSSES)
def test_without_old_logprobs_the_ratio_is_1(trace_loss, place):
    device, dtype = place
    arguments = make_arguments(9, 257, 16, dtype, device, trace_loss=trace_loss)
    arguments = replace(arguments, old=None, reference=None)
    assert_close(by_op(arguments), by_autograd(exact_stats, arguments, torch.float64), dtype)


@pytest.mark.parametrize("trace_loss", TRACE_LOSSES)
def test_an_advantage_of_0_meets_an_infinite_ratio(trace_loss, place):
    """exp(new - old) is inf or NaN where the token must have no loss and no gradient."""
    device, dtype = place
    arguments = make_arguments(4, 257, 16, dtype, device, trace_loss=trace_loss)
    old = torch.tensor([-math.inf, math.nan, math.inf, -1e30], device=device)
    arguments = replace(
        arguments, token_weight=torch.zeros(4, device=device), policy=torch.ones(4, device=device).bool(), old=old,
        reference=None,
    )  # fmt: skip
    loss, _, _, grad_hidden, grad_weight = by_op(arguments)
    assert loss.item() == 0.0
    assert not grad_hidden.any()
    assert not grad_weight.any()


@pytest.mark.parametrize("trace_loss", TRACE_LOSSES)
def test_an_infinite_ratio_leaves_gradients_finite(trace_loss, place):
    device, dtype = place
    arguments = make_arguments(4, 257, 16, dtype, device, trace_loss=trace_loss, scale=1e-5)
    arguments = replace(
        arguments, token_weight=torch.full((4,), -1.0, device=device), policy=torch.ones(4, device=device).bool(),
        old=torch.full((4,), -math.inf, device=device),
    )  # fmt: skip
    for result in by_op(arguments):
        assert result.isfinite().all()


def test_a_token_that_does_not_count_is_as_if_absent(place):
    """Weight 0 without policy: nothing, whatever its log-probs hold, and although its logits overflow."""
    device, dtype = place
    arguments = make_arguments(12, 257, 16, dtype, device, beta=0.5, entropy_coef=0.3)
    counts = torch.arange(12, device=device) % 3 != 0
    junk = torch.where(counts, 0.0, math.nan)
    masked = replace(
        arguments,
        token_weight=torch.where(counts, arguments.token_weight, 0.0),
        policy=arguments.policy & counts,
        old=arguments.old + junk,
        reference=arguments.reference - junk.nan_to_num(nan=math.inf),
        inv_temperature=torch.where(counts, arguments.inv_temperature, math.inf),
    )
    kept = of_rows(arguments, counts)
    loss, logprob, entropy, grad_hidden, grad_weight = by_op(masked)
    assert not grad_hidden[~counts].any()
    ours = (loss, logprob[counts], entropy[counts], grad_hidden[counts], grad_weight)
    assert_close(ours, by_autograd(exact_stats, kept, torch.float64), dtype)


def read_out(V, D, dtype, device, columns):
    """A head whose columns 1, 2, ... are one-hot, so that dH there is the gradient of one logit."""
    weight = torch.zeros(V, D, device=device, dtype=dtype)
    for d, column in enumerate(columns, start=1):
        weight[column, d] = 1.0
    return weight


def loss_of_one_row(hidden, weight, target):
    one = torch.ones(1, device=hidden.device)
    target = torch.tensor([target], device=hidden.device)
    return by_op(Arguments(hidden, weight, target, None, one, one < 0, None, None))


def test_the_targets_gradient_is_rounded_once(place):
    """At p = 0.999, p rounded to bf16 is 1, and a gradient from it is 0."""
    device, dtype = place
    weight = read_out(257, 16, dtype, device, [9])
    hidden = torch.zeros(1, 16, device=device, dtype=dtype)
    hidden[0, 1] = 12.5
    p = 1 / (1 + 256 * math.exp(-12.5))
    assert 0.999 < p < 1
    gradient = loss_of_one_row(hidden, weight, 9)[3]
    assert gradient[0, 1].item() == pytest.approx(p - 1, rel=1.1 * torch.finfo(dtype).eps, abs=1e-5)


def test_a_tiny_probability_keeps_its_gradient(place):
    """No filter: a column of p = 1e-4 has a gradient of 1e-4."""
    device, dtype = place
    weight = read_out(257, 16, dtype, device, [9])
    hidden = torch.zeros(1, 16, device=device, dtype=dtype)
    hidden[0, 1] = -4.0
    p = math.exp(-4) / (256 + math.exp(-4))
    assert p < 2**-12
    gradient = loss_of_one_row(hidden, weight, 3)[3]
    assert gradient[0, 1].item() == pytest.approx(p, rel=max(1e-5, torch.finfo(dtype).eps))


def test_the_heads_gradient_is_added_to_what_is_there(place):
    device, dtype = place
    arguments = make_arguments(7, 257, 16, dtype, device)
    a, fresh = arguments, by_op(arguments)[4]
    grad_weight = torch.arange(257 * 16, device=device).view(257, 16).float()
    before = grad_weight.clone()
    ops.linear_logprob_loss(
        a.hidden, a.weight, a.target, a.inv_temperature, a.token_weight, a.policy, a.old, a.reference, grad_weight,
        a.trace_loss, a.low, a.high, a.beta, a.entropy_coef, a.scale,
    )  # fmt: skip
    torch.testing.assert_close(grad_weight - before, fresh, rtol=0, atol=1e-3)


def test_no_tokens(place):
    device, dtype = place
    loss, logprob, entropy, grad_hidden, grad_weight = by_op(make_arguments(0, 257, 16, dtype, device))
    assert (loss.item(), logprob.shape, entropy.shape, grad_hidden.shape) == (0.0, (0,), (0,), (0, 16))
    assert not grad_weight.any()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "odd width"])
def test_strides_do_not_matter(layout, place):
    device, dtype = place
    a = make_arguments(6, 257, 24, dtype, device, entropy_coef=0.1)
    views = {
        "transposed": lambda x: x.T.contiguous().T,
        "expanded": lambda x: x[:1].expand(x.shape),
        "sliced": lambda x: torch.cat([x, x[:, :3]], dim=1)[:, : x.shape[1]],
        "odd width": lambda x: x[:, :-1],
    }
    rows = ("target", "inv_temperature", "token_weight", "policy", "old", "reference")
    strided = {name: getattr(a, name).repeat_interleave(2)[::2] for name in rows}
    weight = a.weight if layout == "expanded" else views[layout](a.weight)  # equal rows would cancel in dH
    a = replace(a, hidden=views[layout](a.hidden), weight=weight, **strided)
    assert_close(by_op(a), by_autograd(exact_stats, a, torch.float64), dtype)


def test_the_cut_of_a_step_does_not_matter(place):
    device, dtype = place
    arguments = make_arguments(11, 257, 16, dtype, device, beta=0.5, entropy_coef=0.1, scale=1 / 11)
    whole = by_op(arguments)
    losses, gradients, weight_gradients = [], [], []
    for rows in (slice(0, 2), slice(2, 9), slice(9, 11)):
        loss, _, _, grad_hidden, grad_weight = by_op(of_rows(arguments, rows))
        losses.append(loss)
        gradients.append(grad_hidden)
        weight_gradients.append(grad_weight)
    parts = (torch.stack(losses).sum(), torch.cat(gradients), torch.stack(weight_gradients).sum(dim=0))
    for part, all_at_once in zip(parts, (whole[0], *whole[3:]), strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-5, atol=1e-6 if dtype.itemsize == 4 else 1e-3)


def test_a_hidden_state_that_predicts_several_tokens_sums_their_gradients(place):
    """The last token of a prompt predicts the first one of all its traces."""
    device, dtype = place
    arguments = make_arguments(6, 257, 16, dtype, device)
    index = torch.tensor([2, 0, 2, 5, 2, 0], device=device)
    leaf = arguments.hidden.clone().requires_grad_()
    selected = leaf.index_select(0, index)
    selected.backward(of_constant_head(replace(arguments, hidden=selected.detach()))[-1])
    exact = arguments.hidden.double().requires_grad_()
    gathered = exact.index_select(0, index)
    stats = exact_stats(gathered, arguments.weight, arguments.target, arguments.inv_temperature)
    composed_loss(stats, arguments)[0].backward()
    tolerance = 2e-5 if dtype.itemsize == 4 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
    assert not leaf.grad[[1, 3, 4]].any()


def test_a_constant_head_gets_no_gradient_and_changes_nothing(place):
    device, dtype = place
    a = make_arguments(131, 257, 16, dtype, device, beta=0.5)
    *results, _ = by_op(a)
    for our, true in zip(of_constant_head(a), results, strict=True):
        assert torch.equal(our, true)


def test_memory_of_the_reference_is_bounded(monkeypatch):
    arguments = make_arguments(23, 257, 16, torch.float32, "cpu", beta=0.5, entropy_coef=0.1)
    exact = by_autograd(exact_stats, arguments, torch.float64)
    for chunk_bytes in (4 * 257 * 5, 1):
        monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        assert_close(by_op(arguments, reference.linear_logprob_loss), exact, torch.float32)


@pytest.mark.parametrize("dtype", BACKENDS["triton"], ids=str)
def test_chunks_of_rows_do_not_show(dtype, monkeypatch):
    """Triton keeps the fp32 logits of some rows at a time."""
    skip_unless_here("triton")
    from nrt_fast.triton_kernels import linear_logprob

    arguments = make_arguments(7, 257, 16, dtype, device_of("triton"), beta=0.5, entropy_coef=0.1)
    monkeypatch.setattr(linear_logprob, "LOGITS_ROWS", 2)
    assert [rows.stop - rows.start for rows in linear_logprob.chunks_of_rows(7)] == [2, 2, 3]
    with ops.use("triton"):
        assert_close(by_op(arguments), by_autograd(exact_stats, arguments, torch.float64), dtype)


PRINT_ROW_KERNELS = """
import json
import triton
from compile_lane import Recorder
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

recorder = Recorder()
recorder.record(["linear_logprob_stats", "linear_logprob_loss"])
launches = {x.kernel.__name__: x for x in recorder.launches.values() if x.sm == 90}
launches = {name: launch for name, launch in launches.items() if name.endswith("rows_kernel")}
sources = {name: ASTSource(x.kernel, x.signature, x.constants, x.attributes) for name, x in launches.items()}
compiled = {
    name: triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launches[name].options)
    for name, source in sources.items()
}
print(json.dumps({name: kernel.asm["ttir"] for name, kernel in compiled.items()}))
"""


def test_offsets_of_rows_are_64_bit():
    """N V exceeds int32 from N = 16,745 at V = 128,256: no product of two 32-bit numbers is part of an address."""
    skip_unless_here("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PRINT_ROW_KERNELS]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert kernels.keys() == {"logprob_rows_kernel", "loss_rows_kernel"}
    for code in kernels.values():
        assert set(re.findall(r"arith\.muli .* : (\S+)", code)) == {"i64"}


@pytest.mark.gpu
def test_more_logits_than_int32_counts(monkeypatch):
    skip_unless_here("triton")
    from nrt_fast.triton_kernels import linear_logprob

    monkeypatch.setattr(linear_logprob, "LOGITS_ROWS", 20_000)
    N, V, dtype, device = 17_000, 128_256, torch.bfloat16, device_of("triton")
    arguments = make_arguments(64, V, 64, dtype, device)
    last = replace(arguments, token_weight=torch.ones(64, device=device), old=None, reference=None)
    padding = N - 64
    padded = {
        name: torch.cat([getattr(last, name)[:1].expand(padding, *getattr(last, name).shape[1:]), getattr(last, name)])
        for name in ("hidden", "target", "inv_temperature", "token_weight", "policy")
    }
    with ops.use("triton"):
        ours, alone = by_op(replace(last, **padded)), by_op(last)
    for many, few in zip(ours[1:4], alone[1:4], strict=True):
        torch.testing.assert_close(many[padding:], few, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_weight": torch.zeros(2)}, r"token_weight_N: expected shape \[N=3\]"),
        ({"policy": torch.zeros(3)}, "policy_N: expected .* of torch.bool"),
        ({"old": torch.zeros(3).double()}, "old_logprob_N: expected .* of torch.float32"),
        ({"reference": torch.zeros(3, 1)}, r"reference_logprob_N: expected shape \[N=3\]"),
        ({"weight": torch.zeros(257, 15)}, r"weight_VD: expected shape \[V=257, D=16\]"),
        ({"trace_loss": "grpo"}, "trace_loss 'grpo': expected cispo, ppo or reinforce"),
    ],
)
def test_bad_input_is_refused(changes, message, device):
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        by_op(replace(make_arguments(3, 257, 16, torch.float32, device), **moved))


def test_opcheck():
    """Schema, mutation, shapes without data, and no autograd of the C++ ops."""
    skip_unless_here("native")
    a = make_arguments(5, 257, 16, torch.float32, "cpu", beta=0.5, entropy_coef=0.1)
    head = a.hidden.requires_grad_(), a.weight.requires_grad_(), a.target, a.inv_temperature
    tokens = a.token_weight, a.policy, a.old, a.reference, torch.zeros(257, 16)
    torch.library.opcheck(torch.ops.nrt_fast.linear_logprob.default, head)
    torch.library.opcheck(torch.ops.nrt_fast.linear_logprob_stats.default, head[:3])
    options = a.trace_loss, a.low, a.high, a.beta, a.entropy_coef, a.scale
    torch.library.opcheck(torch.ops.nrt_fast.linear_logprob_loss.default, (*head, *tokens, *options))
