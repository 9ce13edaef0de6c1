"""What the host does around the decode step: what ends a trace, graphs and their keys, fresh weights, pages, memory."""

import random

import pytest
import torch

from nrt_fast import Engine, Model
from nrt_fast.decode import StepGraphs
from nrt_fast.decode.decoding import LONGEST_CYCLE, bucket_of
from nrt_fast.decode.step import repeats
from nrt_fast.kv_cache import SCRATCH_PAGE, KVCache, Sequence

VOCABULARY, DELIMITER, EOS = 16, 3, 4
NOTHING_ENDS = {"delimiter_id": VOCABULARY, "eos_id": VOCABULARY + 1}
PROMPTS = [[9, 10, 12], [5], [7, 7, 8, 1]]


@pytest.fixture
def model(make_module):
    return Model.from_hf(make_module("llama", vocab_size=VOCABULARY))


def is_repetition(ids, num, longest=LONGEST_CYCLE):
    """Spelt out: the last ``num`` ids each equal the one a cycle before."""
    return any(
        len(ids) >= num + cycle and all(ids[-i] == ids[-i - cycle] for i in range(1, num + 1))
        for cycle in range(1, longest + 1)
    )


@pytest.mark.parametrize("num", [1, 2, 5])
def test_repeats_as_spelt_out(num):
    draw = random.Random(num)
    rows = [[draw.randrange(2) for _ in range(num + 4)] for _ in range(300)]
    found = repeats(torch.tensor(rows), num).tolist()
    assert found == [is_repetition(row, num, 4) for row in rows]
    assert 0 < sum(found) < 300


@pytest.mark.parametrize("with_graphs", [False, True])
def test_the_repetition_guard_cuts_where_the_cycle_is_full(with_graphs, model):
    free = Engine(model, **NOTHING_ENDS).rollout(PROMPTS, num_generations=1, max_trace_length=100, temperature=0.0)
    guarded = Engine(model, max_repeated=6, **NOTHING_ENDS)
    if with_graphs:
        guarded._graphs = StepGraphs(guarded._passes, guarded.cache, capture=lambda run: run)
    traces = guarded.rollout(PROMPTS, num_generations=1, max_trace_length=100, temperature=0.0)
    for (whole,), (cut,), (end,) in zip(free.trace_ids, traces.trace_ids, traces.delimiter_logprobs):
        assert end is None
        lengths = (length for length in range(1, 101) if is_repetition(whole[:length], 6))
        assert cut == whole[: next(lengths, 100)]
    assert any(len(cut) < 100 for (cut,) in traces.trace_ids)


def test_stream_gives_what_generate_gives(model):
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS)
    limits = {"max_trace_length": 12, "max_answer_length": 5, "seed": 3}
    for prompt in PROMPTS:
        generated = engine.generate([prompt], **limits)
        streamed = list(engine.stream(prompt, **limits))
        assert [token for kind, token in streamed if kind == "trace"] == generated.traces.trace_ids[0][0]
        assert [token for kind, token in streamed if kind == "answer"] == generated.answers[0][0]
        assert [kind for kind, _ in streamed] == sorted((kind for kind, _ in streamed), reverse=True)
        assert engine.cache.num_free == engine.cache.num_pages


def test_a_stream_that_is_left_gives_its_pages_back(model):
    engine = Engine(model, **NOTHING_ENDS)
    stream = engine.stream(PROMPTS[0], max_trace_length=12, max_answer_length=5)
    next(stream)
    assert engine.cache.num_free < engine.cache.num_pages
    stream.close()
    assert engine.cache.num_free == engine.cache.num_pages


def test_generate_answers_as_think_does(model):
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS)
    common = {"num_generations": 3, "max_trace_length": 9, "temperature": 1.0, "seed": 5}
    thoughts = engine.think(PROMPTS, [[1] * 6] * 3, [0, 1, 2], step=0, answer_greedily=True, **common)
    generated = engine.generate(PROMPTS, max_answer_length=6, **common)
    assert generated.traces == thoughts.traces
    assert generated.answers == [group[:-1] for group in thoughts.answers]


def test_weights_that_change_are_used_at_once(model):
    engine = Engine(model, **NOTHING_ENDS)
    sampling = {"num_generations": 2, "max_trace_length": 20}
    before = engine.rollout(PROMPTS, **sampling)
    with torch.no_grad():
        for layer in model.layers:
            for weight in layer.qkv.weights:
                weight.mul_(-2)
    after = engine.rollout(PROMPTS, **sampling)
    assert after.logprobs != before.logprobs
    assert after == Engine(model, **NOTHING_ENDS).rollout(PROMPTS, **sampling)


class Captures:
    """Counts captures; a replay runs the step on the captured tensors, as a graph would."""

    def __init__(self):
        self.num = 0

    def __call__(self, run):
        self.num += 1
        return run


@pytest.fixture
def graphed(model):
    engine, captures = Engine(model, **NOTHING_ENDS), Captures()
    engine._graphs = StepGraphs(engine._passes, engine.cache, captures)
    return engine, captures


def test_a_graph_is_captured_once_and_reads_every_later_number_from_tensors(graphed, model):
    """Seed, step, uids and prompts of the same size make no new graph, and are not those of the first one."""
    engine, captures = graphed
    plain = Engine(model, **NOTHING_ENDS)
    for seed, step in ((0, 0), (1, 0), (1, 7)):
        call = {"num_generations": 2, "max_trace_length": 9, "seed": seed, "step": step, "uids": [seed, 8, 9 + step]}
        assert engine.rollout(PROMPTS, **call) == plain.rollout(PROMPTS, **call)
        assert captures.num == 1


def test_what_a_graph_bakes_in_is_its_key(graphed, model):
    engine, captures = graphed
    plain = Engine(model, **NOTHING_ENDS)
    calls = [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 1.0, "num_generations": 7}]
    for num, call in enumerate(calls, start=1):
        call = {"num_generations": 2, "max_trace_length": 9} | call
        assert engine.rollout(PROMPTS, **call) == plain.rollout(PROMPTS, **call)
        assert captures.num == num


def test_graphs_of_moved_weights_are_dropped(graphed, model):
    engine, captures = graphed
    call = {"num_generations": 2, "max_trace_length": 9}
    engine.rollout(PROMPTS, **call)
    weight = model.layers[0].out.weights[0]
    weight.data = weight.data.clone()
    engine.rollout(PROMPTS, **call)
    assert captures.num == 2


def test_graphs_of_moved_weights_leave_their_pool(model, monkeypatch):
    made = []
    monkeypatch.setattr("nrt_fast.decode.graphs.CudaCapture", lambda: made.append(Captures()) or made[-1])
    engine = Engine(model, **NOTHING_ENDS)
    engine._graphs = StepGraphs(engine._passes, engine.cache)
    for num in (1, 2):
        engine.rollout(PROMPTS, num_generations=2, max_trace_length=9)
        assert [captures.num for captures in made] == [1] * num
        weight = model.layers[0].out.weights[0]
        weight.data = weight.data.clone()


def test_buckets_hold_what_they_are_asked_for():
    sizes = [bucket_of(num) for num in range(1, 1500)]
    assert all(size >= num for num, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert all(size <= 1.5 * num + 8 for num, size in enumerate(sizes, start=1))


def test_no_page_has_two_owners():
    cache, draw = KVCache(1, 1, 1, num_pages=17, page_size=3, like=torch.zeros(())), random.Random(0)
    sequences = [Sequence() for _ in range(6)]
    refused = 0
    for _ in range(2000):
        sequence = draw.choice(sequences)
        if draw.random() < 0.3:
            cache.drop(sequence)
        else:
            before, length = list(sequence.pages), draw.randrange(20)
            if cache.reserve(sequence, length):
                assert len(sequence.pages) == max(len(before), cache.pages_for(length))
                assert sequence.pages[: len(before)] == before
            else:
                refused += 1
                assert sequence.pages == before
        taken = [page for s in sequences for page in s.pages]
        assert SCRATCH_PAGE not in taken
        assert len(taken) == len(set(taken)) == cache.num_pages - cache.num_free
    assert refused > 100


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_is_flat_after_a_thousand_steps(model):
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS)

    def steps(num):
        for step in range(num):
            engine.think(PROMPTS, [[1, 2]] * 3, [0, 1, 2], num_generations=2, max_trace_length=4, temperature=1.0,
                         seed=0, step=step)  # fmt: skip

    steps(200)
    before, address = resident_bytes(), engine.cache.k.data_ptr()
    steps(1000)
    assert resident_bytes() - before < 1 << 20
    assert engine.cache.k.data_ptr() == address
    assert engine.cache.num_free == engine.cache.num_pages
