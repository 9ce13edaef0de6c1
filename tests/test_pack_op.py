"""Packing ops: the C++ kernels against their references, the references against the definition, and bad input."""

import math
import time

import pytest
import torch

from nrt_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_extension = pytest.mark.skipif(ops.missing("native") is not None, reason=str(ops.missing("native")))


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_extension)], autouse=True)
def backend(request):
    with ops.use(request.param):
        yield


native_only = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_extension)], indirect=True)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def offsets(lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.as_tensor(lengths).cumsum(0)])


def random_groups(num_groups, num_traces, seed=0):
    """Groups of random prompts and traces, in shuffled order, every fifth trace of one loss token."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, 40, (num_groups,), generator=generator)
    trace_lengths = torch.randint(1, 60, (num_groups * num_traces,), generator=generator)
    trace_lengths[::5] = 1
    first = torch.arange(num_groups) * num_traces
    entries = torch.stack([torch.arange(num_groups), first, first + num_traces], dim=1)
    order = torch.randperm(num_groups, generator=generator)
    return entries[order], offsets(prompt_lengths), offsets(trace_lengths)


@pytest.mark.parametrize(
    ("costs", "bins"),
    [
        ([], []),
        ([10], [0]),
        ([4, 7, 3, 6], [1, 0, 0, 1]),
        ([6, 6, 4, 4], [0, 1, 0, 1]),
        ([5, 5, 5], [0, 0, 1]),
        ([2, 9, 5, 8, 1], [1, 0, 2, 1, 0]),
    ],
)
def test_bins_follow_best_fit_decreasing(costs, bins):
    assert ops.pack_bins(int64(*costs), 10).tolist() == bins


@pytest.mark.parametrize("high", [30, 5000, 8192])
def test_bins_are_the_references_and_hold_their_budget(high):
    cost_M = torch.randint(1, high + 1, (2000,), generator=torch.Generator().manual_seed(high))
    bin_M = ops.pack_bins(cost_M, 8192)
    load = torch.zeros(int(bin_M.max()) + 1, dtype=torch.int64).index_add_(0, bin_M, cost_M)
    assert load.max() <= 8192
    # Two bins that are half empty would have been one.
    assert (load <= 4096).sum() <= 1
    with ops.use("reference"):
        assert torch.equal(bin_M, ops.pack_bins(cost_M, 8192))


@native_only
@pytest.mark.parametrize("num_traces", [4, 16])
def test_bins_are_within_two_percent_of_the_lower_bound(num_traces):
    """Log-normal prompts and traces, the prompt once, a dozen groups to a bin; the bound is all tokens over the budget.

    With two or three groups to a bin, no packer comes near that bound.
    """
    generator = torch.Generator().manual_seed(num_traces)
    lengths = torch.randn(2000, 1 + num_traces, generator=generator).mul(0.6).add(5.5).exp().clamp(8, 2048)
    cost_M = lengths.sum(1).long()
    budget = 8 * int(cost_M.max())
    bin_M = ops.pack_bins(cost_M, budget)
    assert int(bin_M.max()) + 1 <= math.ceil(1.02 * -(-int(cost_M.sum()) // budget))


@pytest.mark.parametrize(
    ("cost_M", "message"),
    [
        (int64(3, 11), r"cost_M\[1\] = 11: expected 1 <= cost <= budget = 10"),
        (int64(3, 0), r"cost_M\[1\] = 0"),
        (int64(-(2**63)), r"cost_M\[0\] = -9223372036854775808"),
        (int64(3).int(), r"cost_M: expected shape \[M=1\] of torch.int64, got \[1\] of torch.int32"),
        (int64(3)[None], r"cost_M: expected shape \[M.*\] of torch.int64, got \[1, 1\]"),
    ],
)
def test_bad_costs_are_refused(cost_M, message):
    with pytest.raises(ValueError, match=message):
        ops.pack_bins(cost_M, 10)


def test_index_of_a_worked_example():
    # Prompts of 2 and 3 tokens; traces of 3, 1 and 2 loss tokens, the first two of prompt 0, which comes second.
    entries_M3 = torch.tensor([[1, 2, 3], [0, 0, 2]])
    source, positions, cu_seqlens, hidden, rows = ops.pack_index(entries_M3, int64(0, 2, 5), int64(0, 3, 4, 6))
    assert source.tolist() == [2, 3, 4, 9, 0, 1, 5, 6]
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert cu_seqlens.tolist() == [0, 3, 4, 6, 8, 8]
    assert hidden.tolist() == [2, 3, 5, 6, 7, 5]
    assert rows.tolist() == [4, 5, 0, 1, 2, 3]
    assert cu_seqlens.dtype == torch.int32


def test_every_loss_token_is_predicted_from_its_own_past():
    """Walking back from each hidden state along its trace and prompt gives the tokens that precede the target."""
    entries_M3, cu_prompts, cu_traces = random_groups(7, 4)
    num_prompt_tokens, num_targets = int(cu_prompts[-1]), int(cu_traces[-1])
    token_ids = torch.randperm(num_prompt_tokens + num_targets)
    prompt_ids, targets_A = token_ids.split([num_prompt_tokens, num_targets])
    source, positions, _, hidden, rows = ops.pack_index(entries_M3, cu_prompts, cu_traces)
    tokens_T = token_ids[source]
    prompt_of_trace = {n: p for p, first, end in entries_M3.tolist() for n in range(first, end)}
    assert sorted(rows.tolist()) == list(range(num_targets))
    for h, row in zip(hidden.tolist(), rows.tolist(), strict=True):
        trace = int(torch.searchsorted(cu_traces, row, right=True)) - 1
        prompt = prompt_of_trace[trace]
        past = [
            *prompt_ids[cu_prompts[prompt] : cu_prompts[prompt + 1]].tolist(),
            *targets_A[cu_traces[trace] : row].tolist(),
        ]
        assert tokens_T[h] == past[-1]
        assert positions[h] == len(past) - 1


@pytest.mark.parametrize(("num_groups", "num_traces"), [(0, 1), (1, 1), (1, 16), (33, 8)])
def test_index_is_the_references(num_groups, num_traces):
    arguments = random_groups(num_groups, num_traces)
    packed = ops.pack_index(*arguments)
    with ops.use("reference"):
        expected = ops.pack_index(*arguments)
    for ours, reference in zip(packed, expected, strict=True):
        assert ours.dtype == reference.dtype
        assert torch.equal(ours, reference)


def test_strided_input_means_the_same():
    entries_M3, cu_prompts, cu_traces = random_groups(5, 3)
    strided = torch.stack([entries_M3, entries_M3], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    for ours, dense in zip(
        ops.pack_index(strided, cu_prompts, cu_traces), ops.pack_index(entries_M3, cu_prompts, cu_traces), strict=True
    ):
        assert torch.equal(ours, dense)


@pytest.mark.parametrize(
    ("entry", "cu_prompts", "cu_traces", "message"),
    [
        ([1, 0, 1], [0, 2], [0, 3], r"entries_M3\[0\]: prompt 1, expected 0 <= prompt < 1"),
        ([-1, 0, 1], [0, 2], [0, 3], "prompt -1"),
        ([0, 0, 2], [0, 2], [0, 3], "traces 0 to 2, expected 0 <= first < end <= 1"),
        ([0, -1, 1], [0, 2], [0, 3], "traces -1 to 1"),
        ([0, 1, 1], [0, 2], [0, 3], "traces 1 to 1"),
        ([0, 1, 0], [0, 2], [0, 3], "traces 1 to 0"),
        ([0, 0, 1], [0, 0], [0, 3], "prompt 0 is empty, expected at least one token"),
        ([0, 0, 2], [0, 2], [0, 3, 3], "trace 1 is empty, expected at least one loss token"),
        ([0, 0, 1], [0, 2, 1], [0, 3], r"cu_prompts\[2\] = 1: expected at least 2"),
        ([0, 0, 1], [0, 2], [0, 3, 2], r"cu_traces\[2\] = 2: expected at least 3"),
        ([0, 0, 1], [0, 2], [1, 3], r"cu_traces\[0\] = 1: expected 0"),
        ([0, 0, 1], [], [0, 3], "cu_prompts is empty: expected at least the offset 0"),
        ([0, 0], [0, 2], [0, 3], r"entries_M3: expected shape \[M=1, 3\] of torch.int64, got \[1, 2\]"),
    ],
)
def test_bad_entries_are_refused(entry, cu_prompts, cu_traces, message):
    with pytest.raises(ValueError, match=message):
        ops.pack_index(torch.tensor([entry]), int64(*cu_prompts), int64(*cu_traces))


def test_what_runs_an_op_is_known():
    assert ops.backend()["pack_index/cpu"] == ("native" if ops.missing("native") is None else "reference")
    with ops.use("triton"), pytest.raises(LookupError, match="pack_bins on triton: there is no such implementation"):
        ops.pack_bins(int64(1), 10)


@native_only
def test_more_tokens_than_int32_counts_are_refused():
    with pytest.raises(ValueError, match=r"more than 2\^31 - 1 packed tokens"):
        ops.pack_index(torch.tensor([[0, 0, 1]]), int64(0, 2**31), int64(0, 3))


@native_only
def test_ten_thousand_groups_take_milliseconds():
    cost_M = torch.randint(1, 8193, (10_000,), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        ops.pack_bins(cost_M, 8192)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def step_arrays(num_tokens=5, num_prompt_tokens=3):
    """prompt_ids, then targets, inverse temperatures, weights, old log-probs and kinds of the loss tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    fp32 = torch.randn(3, num_tokens, generator=generator)
    kind = torch.arange(num_tokens, dtype=torch.int8) % 3
    ids = torch.randint(0, 1000, (num_prompt_tokens + num_tokens,), generator=generator)
    return ids[:num_prompt_tokens], ids[num_prompt_tokens:], *fp32, kind


def test_gather_takes_tokens_by_source_and_the_rest_by_row():
    arrays = step_arrays()
    tokens, *gathered = ops.pack_gather(*arrays, int64(7, 0, 2, 3), int64(4, 0))
    assert tokens.tolist() == torch.cat(arrays[:2])[[7, 0, 2, 3]].tolist()
    for ours, array in zip(gathered, arrays[1:], strict=True):
        assert ours.dtype == array.dtype
        assert ours.tolist() == array[[4, 0]].tolist()


def test_gather_of_a_packed_batch_is_the_references():
    _, cu_prompts, cu_traces = groups = random_groups(7, 4)
    index = ops.pack_index(*groups)
    arguments = (*step_arrays(int(cu_traces[-1]), int(cu_prompts[-1])), index[0], index[4])
    gathered = ops.pack_gather(*arguments)
    with ops.use("reference"):
        expected = ops.pack_gather(*arguments)
    for ours, reference in zip(gathered, expected, strict=True):
        assert torch.equal(ours, reference)


def test_gather_reads_strided_and_expanded_arrays():
    arrays = [torch.stack([array, array], dim=1)[:, 0] for array in step_arrays()]
    arrays[2] = torch.ones(1).expand(5)
    tokens, targets, inv_temperature, *_ = ops.pack_gather(*arrays, int64(0, 1, 2)[::2], int64(1).expand(3))
    assert tokens.tolist() == arrays[0][::2].tolist()
    assert targets.tolist() == [arrays[1][1]] * 3
    assert inv_temperature.tolist() == [1.0] * 3


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(0, 0), (0, 2), (2, 0)])
def test_gather_of_nothing(num_tokens, num_rows):
    tokens, *gathered = ops.pack_gather(*step_arrays(), torch.arange(num_tokens), torch.arange(num_rows))
    assert [len(tokens), *map(len, gathered)] == [num_tokens] + [num_rows] * 5


@pytest.mark.parametrize(
    ("source", "rows", "message"),
    [
        (int64(0, 8), int64(), r"source_T\[1\] = 8: expected 0 <= index < 8"),
        (int64(-1), int64(), r"source_T\[0\] = -1: expected 0 <= index < 8"),
        (int64(), int64(0, 1, 5), r"rows_B\[2\] = 5: expected 0 <= index < 5"),
        (int64(), int64(-1), r"rows_B\[0\] = -1: expected 0 <= index < 5"),
    ],
)
def test_gather_refuses_indices_out_of_range(source, rows, message):
    with pytest.raises(ValueError, match=message):
        ops.pack_gather(*step_arrays(), source, rows)


def test_gather_refuses_arrays_of_another_length_or_dtype():
    arrays = step_arrays()
    with pytest.raises(ValueError, match=r"weight_A: expected shape \[A=5\]"):
        ops.pack_gather(*arrays[:3], torch.ones(4), *arrays[4:], int64(), int64())
    with pytest.raises(ValueError, match=r"kind_A: .* of torch\.int8"):
        ops.pack_gather(*arrays[:5], arrays[5].long(), int64(), int64())


@native_only
def test_native_ops_keep_their_schema():
    # Packing has no fake kernels, as it runs on the host before any graph: what needs one is left out.
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.nrt_fast.pack_bins.default, (int64(4, 7, 3, 6), 10), test_utils=checks)
    torch.library.opcheck(torch.ops.nrt_fast.pack_index.default, random_groups(3, 2), test_utils=checks)
    gather = torch.ops.nrt_fast.pack_gather.default
    torch.library.opcheck(gather, (*step_arrays(), int64(0, 7), int64(1, 2)), test_utils=checks)


@native_only
def test_native_ops_check_shapes_themselves():
    with pytest.raises(ValueError, match=r"entries_M3: expected int64 of shape \[\*, 3\]"):
        torch.ops.nrt_fast.pack_index(int64(0, 0, 1), int64(0, 2), int64(0, 3))
    with pytest.raises(ValueError, match=r"cost_M: expected int64 of shape \[\*\]"):
        torch.ops.nrt_fast.pack_bins(torch.ones(3), 10)
