"""Packing: the C++ kernels beside the reference and, for the index arrays, beside vectorised PyTorch."""

import pytest
import torch

from nrt_fast import ops

needs_extension = pytest.mark.skipif(ops.missing("native") is not None, reason=str(ops.missing("native")))
BACKENDS = ["reference", pytest.param("native", marks=needs_extension)]
NUM_TRACES = 8


def offsets(lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def random_groups(num_groups):
    generator = torch.Generator().manual_seed(num_groups)
    prompt_lengths = torch.randint(20, 200, (num_groups,), generator=generator)
    trace_lengths = torch.randint(1, 400, (num_groups * NUM_TRACES,), generator=generator)
    first = torch.arange(num_groups) * NUM_TRACES
    entries = torch.stack([torch.arange(num_groups), first, first + NUM_TRACES], dim=1)
    return entries, offsets(prompt_lengths), offsets(trace_lengths)


def vectorised_pack_index(entries_M3, cu_prompts, cu_traces):
    """The same five arrays by repeat_interleave; every entry has the same number of traces."""
    prompt, first, end = entries_M3.unbind(1)
    traces = (first[:, None] + torch.arange(int(end[0] - first[0]))).flatten()
    prompt_lengths, num_targets = cu_prompts.diff()[prompt], cu_traces.diff()[traces]
    starts = torch.cat([cu_prompts[prompt, None], (cu_prompts[-1] + cu_traces[traces]).view(len(prompt), -1)], dim=1)
    lengths = torch.cat([prompt_lengths[:, None], (num_targets - 1).view(len(prompt), -1)], dim=1).flatten()
    cu_seqlens = offsets(lengths)
    within = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].repeat_interleave(lengths)
    base = prompt_lengths[:, None].expand_as(starts).clone()
    base[:, 0] = 0
    cu_rows = offsets(num_targets)
    target = torch.arange(int(cu_rows[-1])) - cu_rows[:-1].repeat_interleave(num_targets)
    segment = cu_seqlens[:-1].view_as(starts)
    prompt_end = (segment[:, :1] + prompt_lengths[:, None] - 1).expand(-1, starts.shape[1] - 1)
    hidden = torch.where(
        target == 0,
        prompt_end.flatten().repeat_interleave(num_targets),
        segment[:, 1:].flatten().repeat_interleave(num_targets) + target - 1,
    )
    return (
        starts.flatten().repeat_interleave(lengths) + within,
        base.flatten().repeat_interleave(lengths) + within,
        cu_seqlens.int(),
        hidden,
        cu_traces[traces].repeat_interleave(num_targets) + target,
    )


@pytest.mark.benchmark(group="pack_bins, 10,000 groups")
@pytest.mark.parametrize("backend", BACKENDS)
def test_pack_bins(backend, measure):
    cost_M = torch.randint(1, 8193, (10_000,), generator=torch.Generator().manual_seed(0))
    with ops.use("reference"):
        expected = ops.pack_bins(cost_M, 8192)
    with ops.use(backend):
        assert torch.equal(ops.pack_bins(cost_M, 8192), expected)
        measure(ops.pack_bins, cost_M, 8192)


@pytest.mark.benchmark(group="pack_index, 512 groups of 8 traces")
@pytest.mark.parametrize("backend", [*BACKENDS, "vectorised torch"])
def test_pack_index(backend, measure):
    arguments = random_groups(512)
    with ops.use("reference"):
        expected = ops.pack_index(*arguments)
    with ops.use("reference" if backend == "vectorised torch" else backend):
        function = vectorised_pack_index if backend == "vectorised torch" else ops.pack_index
        for ours, reference in zip(function(*arguments), expected, strict=True):
            assert torch.equal(ours, reference)
        measure(function, *arguments)
