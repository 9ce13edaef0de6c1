"""Sampling 64 traces (8 prompts, 8 of each) beside transformers' ``generate`` on the same module: even and ragged."""

import functools
import itertools
import math

import pytest
import torch
from engine_peers import DTYPES, EOS, NEW, PROMPT, SHAPES, G, P, generate, is_close, make_setting, reforward

CAP = 256  # ids of a ragged trace, whose mean is NEW
KOLMOGOROV = 1.63  # over the root of the sample's size: exceeded once in a hundred


def check_logprobs(module, prompts, traces, dtype):
    """Of the first trace of each prompt, against a full forward of transformers."""
    for prompt, ids, ours in zip(prompts, *([group[0] for group in x] for x in (traces.trace_ids, traces.logprobs))):
        theirs = reforward(module, [prompt + ids], len(ids), 1)()[0].cpu()
        assert is_close(torch.tensor(ours), theirs, dtype)


def record_speed(benchmark, medians, num_tokens):
    speed = {name: round(num_tokens / seconds) for name, seconds in medians.items()}
    benchmark.extra_info["tokens_per_second"] = speed
    print("".join(f"\n{tokens:12,} tokens/s  {name}" for name, tokens in speed.items()))


@pytest.mark.benchmark(group="rollout")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_rollout(shape, dtype, compare, benchmark, device):
    module, engine, prompts = make_setting(shape, dtype, device)
    ours = functools.partial(engine.rollout, prompts, num_generations=G, max_trace_length=NEW)
    traces = ours()
    assert {len(ids) for group in traces.trace_ids for ids in group} == {NEW}
    check_logprobs(module, prompts, traces, dtype)
    peers = {
        "generate": generate(module, prompts, G, [NEW] * P * G),
        "generate, static cache": generate(module, prompts, G, [NEW] * P * G, static=True),
    }
    rounds = SHAPES[shape][1]
    if rounds == 2:  # ten seconds a call: the faster of the two alone, without a warm-up
        del peers["generate, static cache" if dtype == torch.float32 else "generate"]
    medians = compare({"rollout": ours} | peers, rounds, warmup_rounds=int(rounds > 2))
    record_speed(benchmark, medians, P * G * NEW)


def check_lengths(module, prompts, traces, lengths):
    """EOS has probability 1/64 everywhere, by one forward; the lengths follow the geometric distribution."""
    sequences = [prompt + ids for prompt, group in zip(prompts, traces.trace_ids) for ids in group[:2]]
    with torch.inference_mode():
        eos = [
            module(torch.tensor([ids], device=module.device)).logits[0, PROMPT:].float().softmax(-1)[:, EOS]
            for ids in sequences
        ]
    assert float(torch.cat(eos).mean()) == pytest.approx(1 / NEW, rel=0.1)
    expected = NEW * (1 - (1 - 1 / NEW) ** CAP)  # about 63: the cap takes some
    assert sum(lengths) / len(lengths) == pytest.approx(expected, abs=3 * NEW / math.sqrt(len(lengths)))
    longer = [sum(n > limit for n in lengths) / len(lengths) for limit in range(CAP)]
    worst = max(abs(share - (1 - 1 / NEW) ** limit) for limit, share in enumerate(longer))
    assert worst < KOLMOGOROV / math.sqrt(len(lengths))


@pytest.mark.benchmark(group="rollout, geometric lengths")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", list(SHAPES)[:2])
def test_ragged_rollout(shape, dtype, compare, benchmark, device):
    """Traces end by EOS; the peer is then held to the same lengths row by row, and runs until the longest has ended."""
    module, engine, prompts = make_setting(shape, dtype, device, eos_probability=1 / NEW)
    ours = functools.partial(engine.rollout, prompts, num_generations=G, max_trace_length=CAP)
    traces = ours()
    lengths = [len(ids) for group in traces.trace_ids for ids in group]
    for ids in itertools.chain(*traces.trace_ids):
        assert ids[-1] == EOS or len(ids) == CAP
    check_lengths(module, prompts, traces, lengths)
    check_logprobs(module, prompts, traces, dtype)
    peer = generate(module, prompts, G, lengths, static=dtype == torch.bfloat16)
    medians = compare({"rollout": ours, "generate": peer}, rounds=3, warmup_rounds=0)
    record_speed(benchmark, medians, sum(lengths))
    benchmark.extra_info["longest"] = max(lengths)
