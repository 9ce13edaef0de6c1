"""However a rollout is scheduled (slots, buckets, pages, pauses, chunks), its traces and scores are the same."""

import random

import pytest
import torch

from nrt_fast import Engine, Model, streams
from nrt_fast import engine as engine_module
from nrt_fast.decode import StepGraphs

TOLERANCE = 2e-5
VOCABULARY, DELIMITER, EOS = 40, 3, (4,)
MAX_TRACE_LENGTH = 24
NUM_SCHEDULES, NUM_PROMPTS, NUM_GENERATIONS = 200, 8, 4
SAMPLING = {"max_trace_length": MAX_TRACE_LENGTH, "temperature": 0.9, "seed": 4, "step": 2}


@pytest.fixture(scope="module")
def module(make_module):
    return make_module("llama", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def model(module):
    return Model.from_hf(module)


@pytest.fixture(scope="module")
def problems():
    """(uid, prompt, answer) of every prompt; lengths differ wildly."""
    draw = random.Random(0)

    def ids(most):
        return [draw.randrange(5, VOCABULARY) for _ in range(draw.randint(1, most))]

    return [(draw.randrange(2**32), ids(30), ids(9)) for _ in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def one_by_one(model, problems):
    """Each trace decoded alone: uid -> (ids, log-probs, delimiter log-probs, log c, log b)."""
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS, num_slots=1)
    results = {}
    for uid, prompt, answer in problems:
        thoughts = engine.think([prompt], [answer], [uid], num_generations=NUM_GENERATIONS, **SAMPLING)
        traces = thoughts.traces
        results[uid] = (
            traces.trace_ids[0], traces.logprobs[0], traces.delimiter_logprobs[0], *thoughts.scores.logprobs,
            *thoughts.scores.baseline_logprobs,
        )  # fmt: skip
    lengths = [len(ids) for trace_ids, *_ in results.values() for ids in trace_ids]
    assert min(lengths) < 4 and max(lengths) == MAX_TRACE_LENGTH
    return results


def page_bytes(model, page_size):
    shape = model.config
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * page_size * model.embed.element_size()


def random_engine(draw, model, problems, num_generations):
    """An engine with any slots and pages; often with hardly more of them than one group may take."""
    page_size = draw.choice([1, 3, 8, 32, 256])
    rows = [[len(prompt)] + [MAX_TRACE_LENGTH + 1 + 9] * num_generations + [10] for _, prompt, _ in problems]
    least = max(sum(-(-length // page_size) for length in lengths) for lengths in rows)
    num_pages = draw.choice([least, least + 2, 2 * least, 100 * least])
    engine = Engine(
        model, delimiter_id=DELIMITER, eos_id=EOS, num_slots=draw.choice([1, 2, 3, 7, 16, 64]), page_size=page_size,
        max_cache_bytes=(num_pages + 1) * page_bytes(model, page_size),
    )  # fmt: skip
    assert engine.cache.num_pages == num_pages
    if draw.random() < 0.5:  # the way of a GPU: buckets, and steps on tensors that stay where they are
        engine._graphs = StepGraphs(engine._passes, engine.cache, capture=lambda run: run)
    return engine


@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, 20))
def test_any_schedule_gives_the_same(first, model, problems, one_by_one, monkeypatch):
    num_paused = 0
    for seed in range(first, first + 20):
        draw = random.Random(seed)
        chosen = draw.sample(problems, draw.randint(1, NUM_PROMPTS))
        num_generations = draw.randint(1, NUM_GENERATIONS)
        monkeypatch.setattr(engine_module, "MAX_STEPS", draw.choice([1, 2, 5, 8]))
        engine = random_engine(draw, model, chosen, num_generations)
        uids, prompts, answers = zip(*chosen)
        thoughts = engine.think(
            list(prompts), list(answers), list(uids), num_generations=num_generations, answer_greedily=seed % 3 == 0,
            **SAMPLING,
        )  # fmt: skip
        assert engine.cache.num_free == engine.cache.num_pages
        num_paused += engine.counters.num_paused
        for index, uid in enumerate(uids):
            ids, logprobs, ends, logc, logb = one_by_one[uid]
            assert thoughts.traces.trace_ids[index] == ids[:num_generations], (seed, index)
            for ours, theirs in zip(thoughts.traces.logprobs[index], logprobs):
                assert ours == pytest.approx(theirs, abs=TOLERANCE)
            for ours, theirs in zip(thoughts.traces.delimiter_logprobs[index], ends):
                assert ours == (theirs if theirs is None else pytest.approx(theirs, abs=TOLERANCE))
            for ours, theirs in zip(thoughts.scores.logprobs[index], logc):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(thoughts.scores.baseline_logprobs[index], logb, rtol=0, atol=TOLERANCE)
    assert num_paused > 0


def test_one_at_a_time_equals_a_full_forward(module, problems, one_by_one, reference_logits):
    for uid, prompt, answer in problems:
        trace_ids, logprobs, ends, logc, _ = one_by_one[uid]
        for ids, sampled, end, scored in zip(trace_ids, logprobs, ends, logc):
            logits = reference_logits(module, [*prompt, *ids, DELIMITER, *answer])
            expected = (logits[len(prompt) - 1 : -1] / SAMPLING["temperature"]).log_softmax(dim=-1)
            assert sampled == pytest.approx([float(row[token]) for row, token in zip(expected, ids)], abs=TOLERANCE)
            if end is not None:
                assert end == pytest.approx(float(expected[len(ids), DELIMITER]), abs=TOLERANCE)
            answer_logprobs = logits[-1 - len(answer) : -1].log_softmax(dim=-1)
            expected = answer_logprobs.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
            torch.testing.assert_close(scored, expected, rtol=0, atol=TOLERANCE)


def test_scoring_costs_what_the_method_says(model, problems):
    """(G + 1) A tokens a prompt, and one for each trace that was cut: its last id was never fed."""
    uids, prompts, answers = (list(column) for column in zip(*problems))
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS)
    thoughts = engine.think(prompts, answers, uids, num_generations=NUM_GENERATIONS, **SAMPLING)
    counters, traces = engine.counters, thoughts.traces
    cut = sum(end is None for group in traces.delimiter_logprobs for end in group)
    sampled = sum(len(ids) for group in traces.trace_ids for ids in group)
    assert counters.score_tokens == (NUM_GENERATIONS + 1) * sum(map(len, answers)) + cut
    assert counters.prefill_tokens == sum(map(len, prompts))
    assert counters.decode_tokens == sampled + NUM_PROMPTS * NUM_GENERATIONS - cut
    assert counters.num_paused == counters.recomputed_tokens == 0


def test_a_pass_has_a_limit_and_changes_nothing(model, problems, one_by_one, monkeypatch):
    monkeypatch.setattr(streams, "MAX_TOKENS", 25)
    uids, prompts, answers = (list(column) for column in zip(*problems))
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS)
    extend, sizes = engine._passes.extend, []

    def counted(cache, groups, inputs):
        sizes.append((sum(map(len, inputs)), len(groups)))
        return extend(cache, groups, inputs)

    monkeypatch.setattr(engine._passes, "extend", counted)
    thoughts = engine.think(prompts, answers, uids, num_generations=NUM_GENERATIONS, **SAMPLING)
    assert all(tokens <= 25 or groups == 1 for tokens, groups in sizes)
    assert max(groups for _, groups in sizes) > 1
    assert thoughts.traces.trace_ids == [one_by_one[uid][0] for uid in uids]
    for (*_, logc, _), group in zip((one_by_one[uid] for uid in uids), thoughts.scores.logprobs):
        for ours, theirs in zip(group, logc, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
