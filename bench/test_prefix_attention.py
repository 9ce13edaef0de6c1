"""prefix_attention: decode and answer scoring beside PyTorch over gathered keys; on a GPU beside the unshared path."""

import functools

import pytest
import torch
import torch.nn.functional as F

from nrt_fast import ops

ON_GPU = torch.cuda.is_available()
SHAPES = {  # groups, rows of each, queries of each, prefix, own keys, query heads, key heads, head width
    "decode, 16 x 16, 512 + 1024": (16, 16, 1, 512, 1024, 32, 8, 128),
    "score, 16 x 17, 24 queries, 512 + 1024": (16, 17, 24, 512, 1024, 32, 8, 128),
} if ON_GPU else {
    "decode, 8 x 8, 32 + 64, heads 4/2 of 32": (8, 8, 1, 32, 64, 4, 2, 32),
    "decode, 8 x 8, 32 + 64, heads 8/4 of 64": (8, 8, 1, 32, 64, 8, 4, 64),
    "score, 8 x 9, 17 queries, 32 + 64, heads 4/2 of 32": (8, 9, 17, 32, 64, 4, 2, 32),
    "score, 8 x 9, 17 queries, 32 + 64, heads 8/4 of 64": (8, 9, 17, 32, 64, 8, 4, 64),
    "prefill, 8 x 64, heads 8/4 of 64": (8, 1, 64, 0, 0, 8, 4, 64),
}  # fmt: skip
DTYPES = [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16]
PAGE = 256


def make_arguments(P, G, Q, prefix, own, H, K, E, dtype, device):
    """On the GPU pages of 256 slots; on the CPU one page a row, as the engine lays it out."""
    B, generator = P * G, torch.Generator().manual_seed(0)

    def table(rows, length):
        page = PAGE if ON_GPU else max(length, 1)
        columns = -(-length // page)
        shape = max(rows * columns, 1), K, page, E
        k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        return k, v, torch.arange(rows * columns, dtype=torch.int32, device=device).view(rows, columns)

    q = torch.randn(B * Q, H, E, generator=generator).to(device, dtype)
    lens = (torch.full((rows,), length, dtype=torch.int32, device=device) for rows, length in ((P, prefix), (B, own)))
    offsets = (torch.arange(0, n * step + 1, step, dtype=torch.int32, device=device) for n, step in ((B, Q), (P, G)))
    return q, *table(P, prefix), next(lens), *table(B, own + Q), next(lens), *offsets, Q, G


def gathered(arguments, length, index):
    """[P or B, K, length, E]: the pages of each sequence side by side."""
    pages, table = arguments[index], arguments[3 if index < 3 else 7]
    return pages[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :length]


def visible(Q, prefix, own, device):
    slot, query = torch.arange(prefix + own + Q, device=device), torch.arange(Q, device=device)[:, None]
    return slot <= prefix + own + query


def joined_sdpa(arguments, P, G, Q, prefix, own, H, K, E):
    """torch's fused kernel over keys joined row by row; keys lie side by side already, the join is timed."""
    parts = [(gathered(arguments, prefix, i), gathered(arguments, own + Q, j)) for i, j in ((1, 5), (2, 6))]
    mask = visible(Q, prefix, own, arguments[0].device)
    q = arguments[0].view(P * G, Q, H, E).transpose(1, 2)

    def call():
        k, v = (torch.cat([shared.repeat_interleave(G, dim=0), each], dim=2) for shared, each in parts)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K)
        return out.transpose(1, 2).reshape(-1, H, E)

    return call


def two_products(arguments, P, G, Q, prefix, own, H, K, E):
    """Plain PyTorch that reads the prefix once: two products for scores, one softmax, two for values."""
    (pk, ok), (pv, ov) = (
        (gathered(arguments, prefix, i), gathered(arguments, own + Q, j)) for i, j in ((1, 5), (2, 6))
    )
    R, hidden = H // K, ~visible(Q, prefix, own, arguments[0].device)
    q = (arguments[0] * E**-0.5).view(P, G, Q, K, R, E).permute(0, 3, 1, 4, 2, 5)  # [P, K, G, R, Q, E]

    def by_row(x):  # [P, K, G, R Q, S] to [P G, K, R Q, S]
        return x.transpose(1, 2).flatten(0, 1)

    def call():
        shared = (q.reshape(P, K, G * R * Q, E) @ pk.transpose(-1, -2)).view(P, K, G, R * Q, prefix)
        each = by_row(q.flatten(3, 4)) @ ok.transpose(-1, -2)
        scores = torch.cat([by_row(shared), each], dim=-1).float().unflatten(2, (R, Q))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(q.dtype).flatten(2, 3)
        from_prefix = weights[..., :prefix].unflatten(0, (P, G)).transpose(1, 2).reshape(P, K, G * R * Q, prefix) @ pv
        out = by_row(from_prefix.view(P, K, G, R * Q, E)) + weights[..., prefix:] @ ov
        return out.unflatten(2, (R, Q)).permute(0, 3, 1, 2, 4).reshape(-1, H, E)

    return call


def unshared(arguments, G):
    """Our own kernel, every row a group with a prefix of its own: what sharing saves."""
    q, k, v, pages, lens, *own, max_q, _ = arguments
    cu_rows = torch.arange(len(own[3]) + 1, dtype=torch.int32, device=q.device)
    pages, lens = pages.repeat_interleave(G, dim=0), lens.repeat_interleave(G)
    return functools.partial(ops.prefix_attention, q, k, v, pages, lens, *own[:-1], cu_rows, max_q, 1)


def flex(arguments, P, G, Q, prefix, own, H, K, E):
    """torch's compiled flex_attention over keys that were joined beforehand."""
    from torch.nn.attention.flex_attention import flex_attention

    k, v = (
        torch.cat([gathered(arguments, prefix, i).repeat_interleave(G, 0), gathered(arguments, own + Q, j)], dim=2)
        for i, j in ((1, 5), (2, 6))
    )
    q = arguments[0].view(P * G, Q, H, E).transpose(1, 2).contiguous()

    def causal(score, b, h, query, key):
        return torch.where(key <= prefix + own + query, score, -float("inf"))

    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, score_mod=causal, enable_gqa=H != K).transpose(1, 2).reshape(-1, H, E)


def copy_of_the_cache(arguments):
    """As many bytes read as decode reads of keys and values: its floor on a GPU, at half for the writing."""
    source = torch.cat([x.flatten() for x in (arguments[1], arguments[2], arguments[5], arguments[6])])
    target = torch.empty_like(source[: len(source) // 2])
    return lambda: target.copy_(source[: len(target)])


def is_floating(x):
    return torch.is_tensor(x) and x.is_floating_point()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefix_attention(shape, dtype, compare, device):
    P, G, *rest = SHAPES[shape]
    arguments = make_arguments(P, G, *rest, dtype, device)
    contenders = {
        "prefix_attention": functools.partial(ops.prefix_attention, *arguments),
        "two products": two_products(arguments, P, G, *rest),
        "joined SDPA": joined_sdpa(arguments, P, G, *rest),
    }
    if ON_GPU:
        contenders["unshared"] = unshared(arguments, G)
        contenders["flex_attention"] = flex(arguments, P, G, *rest)
    with ops.use("reference"):
        exact = ops.prefix_attention(
            *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments)
        )
    for name, call in contenders.items():
        error = (call().double() - exact).abs().max().item()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2), name
    if ON_GPU:
        contenders["copy of as many bytes"] = copy_of_the_cache(arguments)
    compare(contenders)
