"""Packing: the C++ kernels beside TRL's packer, vectorised PyTorch and a copy of as many bytes as they write."""

import functools

import pytest
import torch

from nrt_fast import ops

needs_extension = pytest.mark.skipif(ops.missing("native") is not None, reason=str(ops.missing("native")))
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


def trl_packer(cost_M, budget):
    """TRL's best-fit-decreasing packing of a table; its sequences hold nulls, so that it moves no tokens."""
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    offsets_M1 = pyarrow.array(offsets(cost_M).numpy(), pyarrow.int64())
    table = pyarrow.table({"ids": pyarrow.LargeListArray.from_arrays(offsets_M1, pyarrow.nulls(int(cost_M.sum())))})
    return lambda: data_utils._pack_bfd(table, budget)


@pytest.fixture
def costs():
    return torch.randint(1, 8193, (10_000,), generator=torch.Generator().manual_seed(0))


@needs_extension
@pytest.mark.benchmark(group="pack_bins, 10,000 groups")
def test_pack_bins(costs, compare):
    with ops.use("reference"):
        expected = ops.pack_bins(costs, 8192)
        reference = functools.partial(ops._implementation("pack_bins", "cpu", "reference"), costs, 8192)
    assert torch.equal(ops.pack_bins(costs, 8192), expected)
    medians = compare({"pack_bins": lambda: ops.pack_bins(costs, 8192), "reference": reference})
    assert medians["pack_bins"] < 10e-3


@needs_extension
@pytest.mark.benchmark(group="pack_bins, 10,000 groups, beside TRL")
def test_pack_bins_beside_trl(costs, compare):
    packer = trl_packer(costs, 8192)
    assert abs(len(packer()) - (int(ops.pack_bins(costs, 8192).max()) + 1)) <= 1
    medians = compare({"pack_bins": lambda: ops.pack_bins(costs, 8192), "TRL": packer}, rounds=5)
    assert 10 * medians["pack_bins"] < medians["TRL"]


@needs_extension
@pytest.mark.benchmark(group="pack_index, 512 groups of 8 traces")
def test_pack_index(compare):
    arguments = random_groups(512)
    with ops.use("reference"):
        expected = ops.pack_index(*arguments)
    for function in (ops.pack_index, vectorised_pack_index):
        for ours, reference in zip(function(*arguments), expected, strict=True):
            assert torch.equal(ours, reference)
    results = [torch.empty_like(array) for array in expected]
    medians = compare({
        "pack_index": lambda: ops.pack_index(*arguments),
        "vectorised torch": lambda: vectorised_pack_index(*arguments),
        "copy of as many bytes": lambda: [result.copy_(array) for result, array in zip(results, expected, strict=True)],
    })  # fmt: skip
    assert medians["pack_index"] < 2 * medians["copy of as many bytes"]


@needs_extension
@pytest.mark.benchmark(group="pack_gather, 16,384 tokens")
def test_pack_gather(device, compare):
    generator = torch.Generator().manual_seed(0)
    A, T, B = 2**17, 2**14, 15 * 2**10
    fp32 = torch.rand(3, A, generator=generator)
    ids = torch.randint(0, 128_000, (2**14 + A,), generator=generator)
    kind = torch.randint(0, 3, (A,), generator=generator, dtype=torch.int8)
    indices = torch.randint(0, A, (T,), generator=generator).sort().values
    arguments = [ids[: 2**14], ids[2**14 :], *fp32, kind, indices, indices[:B]]
    arguments = [array.to(device) for array in arguments]
    reference = functools.partial(ops._implementation("pack_gather", device, "reference"), *arguments)
    for ours, theirs in zip(ops.pack_gather(*arguments), reference(), strict=True):
        assert torch.equal(ours, theirs)
    compare({"pack_gather": lambda: ops.pack_gather(*arguments), "torch indexing": reference})
