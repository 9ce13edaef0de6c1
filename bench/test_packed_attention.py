"""Packed attention, forward and backward, by every library at hand, beside traces padded to one rectangle."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from nrt_fast import packed_attention as room
from nrt_fast.packed_attention import PackedLayout, packed_attention

SHAPES = {  # prompts, traces each, mean and longest prompt, mean and longest trace, heads, width, dtype
    "cuda": {"": (4, 16, 512, 1024, 1024, 4096, (32, 8), 128, torch.bfloat16)},
    "cpu": {
        "8/8 of 64, fp32": (8, 8, 64, 256, 64, 256, (8, 8), 64, torch.float32),
        "8/4 of 32, fp32": (8, 8, 32, 32, 64, 256, (8, 4), 32, torch.float32),
        "8/4 of 32, bf16": (8, 8, 32, 32, 64, 256, (8, 4), 32, torch.bfloat16),
        "8/4 of 64, fp32": (8, 8, 32, 32, 64, 256, (8, 4), 64, torch.float32),
        "8/4 of 64, bf16": (8, 8, 32, 32, 64, 256, (8, 4), 64, torch.bfloat16),
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def geometric(count, mean, cap, generator):
    uniform = torch.rand(count, generator=generator)
    return (torch.log1p(-uniform) / math.log(1 - 1 / mean)).ceil().clamp(1, cap).long()


class Groups:
    """Ragged groups: lengths, tensors, and the work that no method can avoid."""

    def __init__(self, device, shape):
        P, self.G, *lengths, (H, K), E, dtype = SHAPES[device][shape]
        generator = torch.Generator().manual_seed(0)
        self.prompt_P = geometric(P, *lengths[:2], generator)
        self.trace_PG = geometric(P * self.G, *lengths[2:], generator).view(P, self.G)
        self.lens_S = torch.cat([self.prompt_P[:, None], self.trace_PG], dim=1).flatten()
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), self.lens_S.cumsum(0)])
        self.layout = PackedLayout(cu_seqlens.int(), torch.full((P,), self.G), torch.device(device))
        self.device, self.starts_S = device, cu_seqlens[:-1]
        qkv = torch.randn(self.layout.num_tokens, H + 2 * K, E, generator=generator).to(device, dtype)
        self.qkv = [x.contiguous().requires_grad_() for x in qkv.split([H, K, K], dim=1)]
        seen = (self.prompt_P * (self.prompt_P + 1) // 2).sum()
        seen += (self.prompt_P[:, None] * self.trace_PG + self.trace_PG * (self.trace_PG + 1) // 2).sum()
        self.gigaflops = 14 * int(seen) * H * E / 1e9  # 4 forward, 10 backward with the scores computed again

    def padded(self, q, k, v):
        """[prompt | trace] rows padded to the longest; the prompts' own rows are padded too."""
        width = int((self.prompt_P[:, None] + self.trace_PG).max())
        rows, cells = [], []
        for segment, length in enumerate(self.lens_S.tolist()):
            group, trace = divmod(segment, self.G + 1)
            own = torch.arange(length) + self.starts_S[segment]
            prompt = torch.arange(int(self.prompt_P[group])) + self.starts_S[group * (self.G + 1)]
            tokens = own if trace == 0 else torch.cat([prompt, own])
            cells.append(len(rows) * width + torch.arange(len(tokens) - length, len(tokens)))
            rows.append(F.pad(tokens, (0, width - len(tokens))))
        index, cells = torch.stack(rows).to(self.device), torch.cat(cells).to(self.device)

        def attend(q, k, v):
            q, k, v = (x[index].transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return out.transpose(1, 2).flatten(0, 1)[cells]

        return attend(q, k, v)


@pytest.fixture(scope="module", params=SHAPES[DEVICE])
def groups(request):
    return Groups(DEVICE, request.param)


def step(function, leaves):
    """The output, and the gradients for an upstream gradient that equals it."""
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, out.detach())


def test_forward_and_backward(groups, benchmark, compare):
    def packed(*leaves):
        return packed_attention(*leaves, groups.layout)

    def run(rung):
        with room.use(rung):
            return step(packed, groups.qkv)

    wide = [x.detach().double().requires_grad_() for x in groups.qkv]
    with room.use("plain"):
        exact = step(packed, wide)
    plain = run("plain")
    rungs = [rung for rung in room.LADDER[groups.device] if room.missing(rung) is None]
    for rung in rungs:
        for our, their, true in zip(run(rung), plain, exact, strict=True):
            assert (our.double() - true).abs().max() <= 2 * (their.double() - true).abs().max() + 1e-4
    contenders = {rung: functools.partial(run, rung) for rung in rungs}
    compare(contenders | {"padded": functools.partial(step, groups.padded, groups.qkv)}, rounds=5)
    benchmark.extra_info["gigaflops"] = groups.gigaflops
