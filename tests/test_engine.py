"""Rollout and scoring on the live cache against full forward passes, whatever the batch was cut into."""

from functools import partial
from types import MethodType

import pytest
import torch

from nrt_fast import Engine, Model
from nrt_fast import engine as engine_module
from nrt_fast.config import PRESETS
from nrt_fast.engine import noise_floor
from nrt_fast.kv_cache import Sequence
from nrt_fast.optim import AdamW
from nrt_fast.pack import loss_tokens, pack
from nrt_fast.rewards import aggregate
from nrt_fast.train_step import train_step
from nrt_fast.types import ANSWER, TRACE, Example, Scores, UserError

TOLERANCE = 2e-5
VOCABULARY, DELIMITER, EOS = 16, 3, (4, 5)  # so small that random models end traces in every way
PROMPTS = [[9, 10, 12, 4, 2, 15, 11, 6, 1], [3], [12, 11, 12, 10], [14, 6]]
ANSWERS = [[10, 11, 12, 4], [15], [13, 9, 4], [1, 2, 3, 4, 5, 15, 4]]
UIDS = [5, 2**31 + 7, 0, 70]
CHI_SQUARE_15 = 37.7  # exceeded once in a thousand at 15 degrees of freedom
SAMPLING = {"num_generations": 6, "max_trace_length": 7, "temperature": 1.0, "seed": 11}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def module(request, make_module):
    return make_module(request.param, vocab_size=VOCABULARY, sliding_window=6)  # which llama does not read


@pytest.fixture(scope="module")
def model(module):
    return Model.from_hf(module)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, delimiter_id=DELIMITER, eos_id=EOS)


@pytest.fixture(scope="module")
def reference_logprobs(module, reference_logits):
    """Log-probabilities of ids after a context, by one full forward of transformers."""

    def logprobs(context, ids, temperature=1.0):
        logits = reference_logits(module, context + ids)[len(context) - 1 : -1] / temperature
        return logits.log_softmax(dim=-1).gather(1, torch.tensor(ids, dtype=torch.int64)[:, None]).squeeze(1)

    return logprobs


def assert_close(ours, reference):
    torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE)


def endings(traces):
    """How each trace ended."""
    return [
        "delimiter" if end is not None else "eos" if ids[-1] in EOS else "cut"
        for group, ends in zip(traces.trace_ids, traces.delimiter_logprobs)
        for ids, end in zip(group, ends)
    ]


def rows(*groups):
    """Nested lists [P][G] side by side, trace after trace."""
    return [row for group in zip(*groups) for row in zip(*group)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_live_scores_equal_a_full_forward(temperature, engine, reference_logprobs):
    thoughts = engine.think(PROMPTS, ANSWERS, UIDS, step=3, **SAMPLING | {"temperature": temperature})
    assert set(endings(thoughts.traces)) == {"delimiter", "eos", "cut"}
    for index, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        for ids, logprobs in zip(thoughts.traces.trace_ids[index], thoughts.scores.logprobs[index]):
            assert_close(logprobs, reference_logprobs([*prompt, *ids, DELIMITER], answer))
        assert_close(thoughts.scores.baseline_logprobs[index], reference_logprobs([*prompt, DELIMITER], answer))


def test_an_empty_live_trace_reads_as_the_baseline(model, module, reference_logits):
    likeliest = int(reference_logits(module, PROMPTS[0])[-1].argmax())
    engine = Engine(model, delimiter_id=likeliest, eos_id=EOS)
    thoughts = engine.think(PROMPTS[:1], ANSWERS[:1], [0], step=0, **SAMPLING | {"temperature": 0.0})
    assert thoughts.traces.trace_ids == [[[]] * SAMPLING["num_generations"]]
    for logprobs in thoughts.scores.logprobs[0]:
        assert_close(logprobs, thoughts.scores.baseline_logprobs[0])


def test_given_traces_are_scored_as_by_a_full_forward(engine, reference_logprobs):
    traces = [[[], [7, 8, 9, 10, 11, 12, 4]], [], [[15], [], [1, 2]], [[DELIMITER, 2]]]
    scores = engine.score(PROMPTS, traces, ANSWERS)
    assert [len(group) for group in scores.logprobs] == [2, 0, 3, 1]
    for prompt, group, answer, logc, logb in zip(
        PROMPTS, traces, ANSWERS, scores.logprobs, scores.baseline_logprobs, strict=True
    ):
        assert_close(logb, reference_logprobs([*prompt, DELIMITER], answer))
        for ids, row in zip(group, logc, strict=True):
            assert row.dtype == torch.float32
            assert_close(row, reference_logprobs([*prompt, *ids, DELIMITER], answer))


def test_a_sampled_trace_scores_alike_when_it_is_given(engine):
    thoughts = engine.think(PROMPTS, ANSWERS, UIDS, step=0, **SAMPLING)
    scores = engine.score(PROMPTS, thoughts.traces.trace_ids, ANSWERS)
    for live, given in zip(thoughts.scores.logprobs, scores.logprobs):
        for ours, theirs in zip(live, given):
            assert_close(ours, theirs)


def test_baseline_under_other_weights(engine, module, make_module, reference_logits):
    other = make_module(module.config.model_type, seed=1, vocab_size=VOCABULARY, sliding_window=6)
    baselines = engine.on(Model.from_hf(other)).score(PROMPTS, [[]] * len(PROMPTS), ANSWERS).baseline_logprobs
    for prompt, answer, ours in zip(PROMPTS, ANSWERS, baselines, strict=True):
        logits = reference_logits(other, [*prompt, DELIMITER, *answer[:-1]])[len(prompt) :]
        assert_close(ours, logits.log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampler_logprobs_equal_a_full_forward(temperature, engine, reference_logprobs):
    traces = engine.rollout(PROMPTS, uids=UIDS, **SAMPLING | {"temperature": temperature})
    for prompt, *group in zip(PROMPTS, traces.trace_ids, traces.logprobs, traces.delimiter_logprobs):
        for ids, logprobs, end in zip(*group, strict=True):
            sampled = ids if end is None else [*ids, DELIMITER]
            reference = reference_logprobs(prompt, sampled, temperature or 1.0)
            assert_close(torch.tensor(logprobs if end is None else [*logprobs, end]), reference)


def test_greedy_traces_take_the_likeliest_id(engine, module, reference_logits):
    traces = engine.rollout(PROMPTS, **SAMPLING | {"temperature": 0.0})
    for prompt, group, ends in zip(PROMPTS, traces.trace_ids, traces.delimiter_logprobs):
        sampled = group[0] if ends[0] is None else [*group[0], DELIMITER]
        likeliest = reference_logits(module, prompt + sampled)[len(prompt) - 1 : -1].argmax(dim=-1)
        assert sampled == likeliest.tolist()
        assert group == group[:1] * SAMPLING["num_generations"]


def test_traces_end_as_documented(engine):
    traces = engine.rollout(PROMPTS, uids=UIDS, **SAMPLING)
    for (ids, logprobs, _), ending in zip(
        rows(traces.trace_ids, traces.logprobs, traces.delimiter_logprobs), endings(traces), strict=True
    ):
        assert len(ids) == len(logprobs)
        assert DELIMITER not in ids
        assert not set(ids[:-1]) & set(EOS)
        assert len(ids) == SAMPLING["max_trace_length"] if ending == "cut" else len(ids) <= SAMPLING["max_trace_length"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_traces_follow_the_models_distribution(temperature, engine, module, reference_logits):
    """Two sampled ids of 20,000 traces: first ids by chi-square, second ids after the commonest first one too."""
    (traces,) = engine.rollout(
        PROMPTS[:1], num_generations=20_000, max_trace_length=2, temperature=temperature, seed=5
    ).trace_ids  # fmt: skip
    first = torch.tensor([ids[0] if ids else DELIMITER for ids in traces])
    commonest = next(i for i in first.bincount().argsort(descending=True).tolist() if i not in (DELIMITER, *EOS))
    second = torch.tensor([ids[1] if ids[1:] else DELIMITER for ids in traces if ids and ids[0] == commonest])
    for prefix, sampled in ((PROMPTS[0], first), ([*PROMPTS[0], commonest], second)):
        expected = len(sampled) * (reference_logits(module, prefix)[-1].double() / temperature).softmax(dim=0)
        observed = sampled.bincount(minlength=VOCABULARY)
        common = expected > 5
        assert ((observed - expected) ** 2 / expected)[common].sum() < CHI_SQUARE_15


def same_traces(ours, theirs):
    assert ours.trace_ids == theirs.trace_ids
    for our, their in rows(ours.logprobs, theirs.logprobs):
        assert our == pytest.approx(their, abs=TOLERANCE)


def test_traces_do_not_depend_on_the_order_of_prompts(engine):
    order = [2, 0, 3, 1]
    traces = engine.rollout(PROMPTS, uids=UIDS, **SAMPLING)
    shuffled = engine.rollout([PROMPTS[p] for p in order], uids=[UIDS[p] for p in order], **SAMPLING)
    assert shuffled.trace_ids == [traces.trace_ids[p] for p in order]


def test_traces_do_not_depend_on_their_company(engine):
    traces = engine.rollout(PROMPTS, uids=UIDS, **SAMPLING)
    alone = engine.rollout(PROMPTS[1:2], uids=UIDS[1:2], **SAMPLING)
    fewer = engine.rollout(PROMPTS, uids=UIDS, **SAMPLING | {"num_generations": 2})
    longer = engine.rollout(PROMPTS, uids=UIDS, **SAMPLING | {"max_trace_length": 20})
    assert alone.trace_ids == traces.trace_ids[1:2]
    assert fewer.trace_ids == [group[:2] for group in traces.trace_ids]
    assert [ids[: SAMPLING["max_trace_length"]] for group in longer.trace_ids for ids in group] == [
        ids for group in traces.trace_ids for ids in group
    ]


@pytest.fixture
def with_pages(model):
    """An engine with this many pages of 8 tokens."""

    def engine(num_pages):
        shape = model.config
        page_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 8 * 4
        size = {"max_cache_bytes": (num_pages + 1) * page_bytes, "page_size": 8}
        return Engine(model, delimiter_id=DELIMITER, eos_id=EOS, **size)

    return engine


def test_a_group_that_can_never_fit_is_refused(with_pages):
    """A prompt of 9, six traces of 7 with delimiter and answer of 8, and the empty trace: 2 + 6 * 2 + 1 pages."""
    with pytest.raises(ValueError, match=r"prompt 0 with its 7 rows takes 15 pages of 8 tokens; the cache has 14"):
        with_pages(14).think(PROMPTS, ANSWERS, UIDS, step=1, **SAMPLING)


@pytest.mark.parametrize("num_pages", [15, 40])
def test_a_small_cache_changes_nothing(num_pages, engine, with_pages):
    small = with_pages(num_pages)
    ours, theirs = (e.think(PROMPTS, ANSWERS, UIDS, step=1, answer_greedily=True, **SAMPLING) for e in (small, engine))
    same_traces(ours.traces, theirs.traces)
    assert ours.answers == theirs.answers
    given = [small.score(PROMPTS, theirs.traces.trace_ids, ANSWERS), ours.scores]
    for scores in given:
        for our, their in rows(scores.logprobs, theirs.scores.logprobs):
            assert_close(our, their)
        for our, their in zip(scores.baseline_logprobs, theirs.scores.baseline_logprobs):
            assert_close(our, their)


def test_answers_do_not_depend_on_the_cache(engine, with_pages):
    """A complete group that lost its prompt, for others were short of pages, is answered behind its prompt again."""
    lengths = {"num_generations": 3, "max_trace_length": 7, "max_answer_length": 4}
    for seed in range(24):
        prompts = PROMPTS[seed % 4 :] + PROMPTS[: seed % 4]
        small = with_pages(13)
        exact = engine.generate(prompts, seed=seed, **lengths)
        assert small.generate(prompts, seed=seed, **lengths).answers == exact.answers
        assert small.cache.num_free == 13


BAD = 10**6  # no id of the vocabulary


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.score(PROMPTS, [[[6] * 7, [1]]] * 4, [[7], [7], [7, BAD, 8], [7]]),
        lambda engine: engine.think(PROMPTS, [[7], [7, BAD, 8], [7], [7]], UIDS, step=0, **SAMPLING),
        lambda engine: engine.rollout([*PROMPTS, [BAD]], **SAMPLING),
        lambda engine: engine.generate([*PROMPTS, [BAD]], max_answer_length=3, **SAMPLING),
    ],
    ids=["score", "think", "rollout", "generate"],
)
def test_a_call_that_fails_leaves_no_page_taken(call, with_pages):
    engine = with_pages(60)
    with pytest.raises(IndexError) as failed:
        call(engine)
    assert engine.cache.num_free == 60, failed
    assert len(engine.rollout(PROMPTS, **SAMPLING).trace_ids) == 4


def test_answers_that_fail_leave_no_page_taken(with_pages, monkeypatch):
    def fail(self, work, num_steps):
        raise KeyboardInterrupt

    engine = with_pages(60)
    monkeypatch.setattr(engine_module, "greedy_answers", partial(failing, engine_module.greedy_answers, fail))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, max_answer_length=3, **SAMPLING)
    assert engine.cache.num_free == 60


def failing(greedy_answers, fail, decoding, *args):
    decoding.run = MethodType(fail, decoding)
    return greedy_answers(decoding, *args)


def test_pages_that_another_call_holds_are_told(with_pages):
    engine = with_pages(13)
    held = Sequence()
    assert engine.cache.reserve(held, 12 * engine.page_size)
    with pytest.raises(RuntimeError, match="no trace can go on: 1 of 13 pages are free, another call"):
        engine.rollout(PROMPTS[:1], **SAMPLING)
    engine.cache.drop(held)
    assert engine.rollout(PROMPTS[:1], **SAMPLING).trace_ids
    unread = engine.stream([9] * 20, max_trace_length=36, max_answer_length=3)
    next(unread)
    with pytest.raises(ValueError, match=r"tokens do not fit: \d+ of 13 pages are free"):
        list(engine.stream([9] * 20, max_trace_length=36, max_answer_length=3))
    unread.close()
    assert engine.cache.num_free == 13


def test_traces_of_no_tokens_are_refused(engine):
    with pytest.raises(ValueError, match="max_trace_length is 0: at least 1 is needed"):
        engine.rollout(PROMPTS, **SAMPLING | {"max_trace_length": 0})


@pytest.mark.parametrize("change", [{"seed": 12}, {"step": 1}, {"uids": [6, 1, 2, 3]}], ids=str)
def test_every_key_of_the_noise_counts(change, engine):
    keys = {"uids": UIDS, "step": 0}
    traces = engine.rollout(PROMPTS, **SAMPLING | keys)
    changed = engine.rollout(PROMPTS, **SAMPLING | keys | change)
    for ours, theirs in zip(traces.trace_ids, changed.trace_ids):
        assert ours != theirs
    assert all(len({tuple(ids) for ids in group}) > 1 for group in traces.trace_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_step_1(temperature, module, tmp_path):
    module.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path)
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS)
    thoughts = engine.think(PROMPTS, ANSWERS, UIDS, step=1, **SAMPLING | {"temperature": temperature})
    examples = [Example(uid, prompt, answer, None, "", "", "") for uid, prompt, answer in zip(UIDS, PROMPTS, ANSWERS)]
    weights = [[torch.ones(len(answer))] * 6 for answer in ANSWERS]
    tokens = loss_tokens(
        examples, thoughts.traces, thoughts.scores.logprobs, [torch.linspace(-1, 1, 6)] * 4, [True] * 4, weights,
        PRESETS["nrt-ws"], DELIMITER, temperature, 20,
    )  # fmt: skip
    optimizer = AdamW(model.weights.flat, model.weights.leaves.values(), 0, (0.9, 0.95), 1e-15, 0.0)
    batches = pack(tokens, 100, torch.device("cpu"))
    stats = train_step(model, optimizer, tokens, batches, PRESETS["nrt-ws"], 1e-3, 1.0, True, None)
    for kind in (TRACE, ANSWER):
        assert_close(stats.logprobs_A[tokens.kind_A == kind], tokens.old_logprobs_A[tokens.kind_A == kind])


def test_noise_floor_is_a_rounding_error(engine):
    assert 0 <= noise_floor(engine, PROMPTS, ANSWERS, "logp") < TOLERANCE


class Rounding:
    """Scores like an engine whose log-probabilities move by a known noise when an item is scored alone."""

    def __init__(self, num_tokens, eps):
        generator = torch.Generator().manual_seed(0)
        self.rows = [-3 * torch.rand(num_tokens, generator=generator) for _ in range(64)]
        self.moved = [(row + eps * torch.randn(num_tokens, generator=generator)).clamp(max=0.0) for row in self.rows]

    def score(self, prompts, traces, answers):
        rows = [(self.moved if len(prompts) == 1 else self.rows)[number] for (number,) in prompts]
        return Scores([[row] for row in rows], rows)


def test_noise_floor_of_r3_is_the_spread_of_a_group_of_equal_traces():
    """R is a mean over tokens weighed by |d|, d the distance of two scores; the std of two is theirs over sqrt 2."""
    engine, prompts, answers = Rounding(12, 0.02), [[number] for number in range(64)], [[1] * 12] * 64
    distances = [a.double() - b.double() for a, b in zip(engine.rows, engine.moved, strict=True)]
    expected = [float((d.abs() * d).sum() / d.abs().sum() / 12) / 2**0.5 for d in distances]
    floor = noise_floor(engine, prompts, answers, "r3")
    assert floor == pytest.approx((sum(std**2 for std in expected) / 64) ** 0.5, rel=1e-3)
    traces = torch.randn(8, 12, generator=torch.Generator().manual_seed(1)) * 0.02 - 1
    (group,), _ = aggregate([list(traces)], [torch.full((12,), -1.0)], "r3")
    assert group.std() / 3 < floor < 3 * group.std(), "that of a group of eight is about the same"


def test_noise_floor_of_a_mean_is_the_distance_of_two_scores():
    engine = Rounding(12, 0.02)
    distances = [float(a.exp().mean() - b.exp().mean()) for a, b in zip(engine.rows, engine.moved, strict=True)]
    floor = noise_floor(engine, [[number] for number in range(64)], [[1] * 12] * 64, "am")
    assert floor == pytest.approx((sum(d**2 for d in distances) / 64) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("prompts", "traces", "answers", "message"),
    [
        ([[1]], [[]], [[]], "an answer is empty"),
        ([[]], [[]], [[1]], "a prompt is empty"),
        ([[1], [2]], [[]], [[1]], "2 prompts, 1 groups of traces, 1 answers"),
        ([[1] * 60], [[[2] * 60]], [[3] * 10], "take 131 tokens; the model's context is 128"),
    ],
)
def test_bad_lists_are_refused(prompts, traces, answers, message, engine):
    with pytest.raises(ValueError, match=message):
        engine.score(prompts, traces, answers)


def test_too_long_a_trace_is_refused(engine):
    with pytest.raises(ValueError, match="take 129 tokens; the model's context is 128"):
        engine.rollout([[1] * 100], num_generations=1, max_trace_length=29)


def test_a_model_that_overflows_is_named(make_module):
    module = make_module()
    module.lm_head.weight.data[5] = float("inf")
    engine = Engine(Model.from_hf(module), delimiter_id=DELIMITER, eos_id=EOS)
    with pytest.raises(UserError, match="prompt 0: the model gives NaN for its answer"):
        engine.score([[1, 2]], [[[3]]], [[4]])
