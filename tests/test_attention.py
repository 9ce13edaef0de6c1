"""Attention over a shared prefix: both references against a loop over positions, and their gradients."""

import pytest
import torch

from nrt_fast import ops

P, G, Q, H, K, E = 2, 3, 4, 4, 2, 6
OWN_LENGTHS = [[0, 5, 2], [3, 0, 1]]
SHAPES = {  # prefix slots and how many of them each group fills, own slots, window
    "prefix": (7, (7, 3), 9, None),
    "empty-prefixes": (7, (0, 0), 9, None),
    "no-prefix": (0, (0, 0), 9, None),
    "window": (7, (7, 3), 9, 4),
    "window-of-1": (7, (7, 3), 9, 1),
    "window-over-all": (7, (7, 3), 9, 100),
}
ATTENTIONS = {"prefix": ops.prefix_attention, "joined": ops.joined_attention}


def make_inputs(prefix_slots, prefix_lens, own_slots, window, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    visible = ops.visibility(
        torch.tensor(prefix_lens), torch.tensor(OWN_LENGTHS), Q, prefix_slots, own_slots, window
    )  # fmt: skip
    own = randn(P, G, K, own_slots, E), randn(P, G, K, own_slots, E)
    return randn(P, G, Q, H, E), randn(P, K, prefix_slots, E), randn(P, K, prefix_slots, E), *own, visible


def oracle(q, prefix_k, prefix_v, own_k, own_v, prefix_lens, window):
    """One query at a time: its own row's tokens before it, the prefix before those, cut to the window's end."""
    out = torch.empty_like(q)
    for p, g, i, h in torch.cartesian_prod(*map(torch.arange, (P, G, Q, H))).tolist():
        num_prefix, num_own, head = prefix_lens[p], OWN_LENGTHS[p][g] + i + 1, h // (H // K)
        keys, values = (
            torch.cat([prefix[p, head, :num_prefix], own[p, g, head, :num_own]])[-(window or 10**9) :]
            for prefix, own in ((prefix_k, own_k), (prefix_v, own_v))
        )
        out[p, g, i, h] = (keys @ q[p, g, i, h] / E**0.5).softmax(dim=0) @ values
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_is_that_of_a_loop(attention, shape):
    _, prefix_lens, _, window = SHAPES[shape]
    inputs = make_inputs(*SHAPES[shape])
    expected = oracle(*inputs[:-1], prefix_lens, window)
    # prefix_attention computes its scores in fp32 whatever it is given.
    atol = 1e-6 if attention == "prefix" else 1e-12
    torch.testing.assert_close(ATTENTIONS[attention](*inputs), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_references_agree_in_fp32(shape):
    inputs = make_inputs(*SHAPES[shape], dtype=torch.float32)
    torch.testing.assert_close(ops.joined_attention(*inputs), ops.prefix_attention(*inputs), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", ["prefix", "no-prefix", "window"])
def test_gradients_by_finite_differences(shape):
    *inputs, visible = make_inputs(*SHAPES[shape])
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: ops.joined_attention(*x, visible), leaves, fast_mode=True)


def test_a_multi_head_model_has_a_key_for_every_query_head():
    q, prefix_k, prefix_v, own_k, own_v, visible = make_inputs(*SHAPES["window"])
    repeated = [x.repeat_interleave(H // K, dim=-3) for x in (prefix_k, prefix_v, own_k, own_v)]
    for attention in ATTENTIONS.values():
        grouped = attention(q, prefix_k, prefix_v, own_k, own_v, visible)
        torch.testing.assert_close(attention(q, *repeated, visible), grouped, rtol=0, atol=1e-6)


def test_layers_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, angles = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    cos, sin = angles[:, 0].cos(), angles[:, 0].sin()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.rotate(x, cos, sin), x)
    assert torch.autograd.gradcheck(ops.swiglu, (x, angles.requires_grad_()))
