"""Linear layers on packed weights beside F.linear, at the products of decoding; and what packing costs."""

import functools

import pytest
import torch
import torch.nn.functional as F

from nrt_fast import ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="panels are for CPUs")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (64, 1024, 512),
    (64, 2720, 512),
    (64, 512, 1360),
    (64, 32000, 512),
    (8, 32000, 512),
    (64, 256, 128),
]  # T, N, K
PACKED_BYTES = 160_000_000


def make_inputs(T, N, K, dtype):
    generator = torch.Generator().manual_seed(T + N + K)
    x = torch.randn(T, K, generator=generator).to(dtype)
    weight = (K**-0.5 * torch.randn(N, K, generator=generator)).to(dtype)
    panels = torch.empty(ops.panel_shape(N, K, dtype), dtype=dtype)
    ops.pack_panels([weight], panels)
    return x, weight, panels


def check(ours, plain, x, weight):
    exact = x.double() @ weight.double().T
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


@pytest.mark.benchmark(group="panel_linear")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
@torch.no_grad()
def test_panel_linear(T, N, K, dtype, compare):
    x, weight, panels = make_inputs(T, N, K, dtype)
    ours, plain = functools.partial(ops.panel_linear, x, panels, None, N), functools.partial(F.linear, x, weight)
    check(ours(), plain(), x, weight)
    compare({"panel_linear": ours, "F.linear": plain}, rounds=31)


@pytest.mark.benchmark(group="panel_logits")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_panel_logits(dtype, compare):
    """fp32 logits of a head: F.linear rounds 16-bit ones, or takes the weight in fp32."""
    x, weight, panels = make_inputs(64, 32000, 512, dtype)
    wide_x, wide = x.float(), weight.float()
    ours, plain = functools.partial(ops.panel_logits, x, panels, 32000), functools.partial(F.linear, wide_x, wide)
    check(ours(), plain(), x, weight)
    compare({"panel_logits": ours, "F.linear in fp32": plain}, rounds=31)


@pytest.mark.benchmark(group="pack_panels")
@pytest.mark.parametrize("K", [512, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_pack_panels(K, dtype, compare):
    N = PACKED_BYTES // K // dtype.itemsize
    _, weight, panels = make_inputs(1, N, K, dtype)
    with ops.use("reference"):
        expected = torch.empty_like(panels)
        ops.pack_panels([weight], expected)
    assert torch.equal(panels, expected)
    copy = torch.empty_like(weight)
    compare({"pack_panels": functools.partial(ops.pack_panels, [weight], panels), "copy": lambda: copy.copy_(weight)})
