"""Gradients and the KV cache in one memory: neither ever reads what the other left, and no address changes."""

import pytest
import torch

from nrt_fast import Engine, Model, loop, plan
from nrt_fast import run as run_room
from nrt_fast.arena import Arena
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.weights import OwnedWeights
from nrt_fast.optim import AdamW

DELIMITER, EOS = 3, 4
PROMPTS, ANSWERS = [[9, 10, 12], [5, 6]], [[10, 11], [15, 7, 8]]
SAMPLING = {"num_generations": 3, "max_trace_length": 6}
ADAMW = (0.9, 0.95), 1e-15, 0.01
VARIANTS = {
    "float32": {},
    "bfloat16, averaged baseline": {"dtype": "bfloat16", "baseline": "ema"},
    "minibatches, KL, frozen baseline": {"prompts_per_minibatch": 1, "beta": 0.1, "baseline": "frozen"},
    "sft": {"objective": "sft", "max_trace_length": None, "num_generations": 8},
}


@pytest.fixture
def small_cache(monkeypatch):
    """A cache that is soon filled."""
    monkeypatch.setattr(plan, "CPU_CACHE_BYTES", 4 << 20)


@pytest.fixture
def poisoned(monkeypatch):
    """Every time the memory goes to one holder, all of it is NaN, in fp32 and in bf16; the list of holders."""
    holders, take = [], Arena.take

    def take_poisoned(self, holder):
        self.memory.fill_(0xFF)
        holders.append(holder)
        take(self, holder)

    monkeypatch.setattr(Arena, "take", take_poisoned)
    return holders


def result(folder, measured):
    """Everything that a run has computed."""
    files = sorted([*folder.glob("checkpoint-*/*.safetensors"), *folder.glob("final/*.safetensors")])
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}, measured(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_left_in_the_memory_reaches_nobody(
    variant, tiny_run, tmp_path, small_cache, measured, poisoned, monkeypatch
):
    """A run on poisoned memory, evaluations between its steps, equals one whose gradients have their own."""
    fields = VARIANTS[variant] | {"eval_steps": 1, "save_total_limit": 3}
    loop.train(tiny_run(tmp_path / "shared", **fields))
    assert poisoned.count("gradients") == 3, "once a rollout"
    monkeypatch.setattr(run_room, "Arena", lambda *_: None)
    loop.train(tiny_run(tmp_path / "apart", **fields))
    ours, theirs = (result(tmp_path / name, measured) for name in ("shared", "apart"))
    assert len(ours[0]) >= 3 * 2 + 1
    assert ours == theirs


def test_a_run_on_poisoned_memory_goes_on(tiny_run, tmp_path, finished, poisoned, small_cache, measured):
    fields = {"save_total_limit": 5, "eval_steps": 2, "logging_steps": 3}
    loop.train(tiny_run(tmp_path, max_steps=2, **fields))
    loop.train(tiny_run(tmp_path, max_steps=5, **fields))
    assert result(tmp_path, measured) == result(finished, measured)


@pytest.fixture
def shared(make_module):
    """(model, engine, optimizer) on one arena, which the gradients fill only in part."""
    config = make_module().config
    model = Model(config, OwnedWeights(ModelConfig.from_hf(config), torch.float32, torch.device("cpu")))
    torch.nn.init.normal_(model.weights.flat, std=0.3, generator=torch.Generator().manual_seed(0))
    arena = Arena(4 * model.weights.flat.numel() + (1 << 18), model.weights.flat.device)
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS, arena=arena)
    return model, engine, AdamW(model.weights.flat, model.weights.leaves.values(), 0, *ADAMW, arena=arena)


def backward(model):
    sum(leaf.square().sum() for leaf in model.weights.leaves.values()).backward()


def test_both_are_views_at_fixed_addresses(shared):
    """A captured CUDA graph reads the addresses it has seen."""
    model, engine, optimizer = shared

    def addresses():
        return engine.cache.k.data_ptr(), engine.cache.v.data_ptr(), optimizer.grad.data_ptr()

    before, memory = addresses(), engine.arena.memory
    assert before[0] == before[2] == memory.data_ptr()
    assert engine.cache.v.data_ptr() == memory.data_ptr() + engine.cache.k.nbytes
    used = engine.cache.k.nbytes + engine.cache.v.nbytes
    page_bytes = used // (engine.cache.num_pages + 1)
    assert used <= memory.nbytes < used + page_bytes, "all of it"
    for _ in range(2):
        engine.rollout(PROMPTS, **SAMPLING)
        optimizer.zero_grad()
        backward(model)
        optimizer.step(1e-3, 1.0)
    assert addresses() == before


def test_gradients_after_sampling_must_be_cleared_first(shared):
    model, engine, optimizer = shared
    calls = (
        lambda: engine.rollout(PROMPTS, **SAMPLING),
        lambda: engine.score(PROMPTS, [[[5]], [[6]]], ANSWERS),
        lambda: engine.generate(PROMPTS, max_trace_length=4, max_answer_length=2),
        lambda: next(engine.stream(PROMPTS[0], max_trace_length=4, max_answer_length=2)),
        lambda: engine.on(model.clone()).score(PROMPTS, [[], []], ANSWERS),
    )
    for call in calls:
        optimizer.zero_grad()
        backward(model)
        call()
        with pytest.raises(RuntimeError, match="the memory of gradients is lent to keys and values"):
            backward(model)
        with pytest.raises(RuntimeError, match="the memory of gradients is lent to keys and values"):
            optimizer.step(1e-3, 1.0)
    optimizer.zero_grad()
    assert not optimizer.grad.any()


def test_gradients_never_cleared_are_refused(shared):
    model, _, optimizer = shared
    with pytest.raises(RuntimeError, match="the memory of gradients is lent to None"):
        backward(model)
    optimizer.zero_grad()
    backward(model)
    assert optimizer.step(1e-3, 1.0) > 0


def test_another_models_engine_has_the_same_memory(shared):
    model, engine, _ = shared
    other = engine.on(model.clone())
    assert other.cache is engine.cache
    assert other.arena is engine.arena


def test_an_engine_alone_has_a_cache_of_its_own(shared, poisoned):
    model, engine, optimizer = shared
    alone = Engine(model, delimiter_id=DELIMITER, eos_id=EOS, max_cache_bytes=1 << 18)
    for _ in range(2):
        optimizer.zero_grad()
        assert engine.rollout(PROMPTS, **SAMPLING) == alone.rollout(PROMPTS, **SAMPLING)
    optimizer.zero_grad()
    backward(model)
    kept = optimizer.grad.clone()
    alone.rollout(PROMPTS, **SAMPLING)
    backward(model)
    assert torch.equal(optimizer.grad, 2 * kept), "gradients beside an engine of its own memory stay"
