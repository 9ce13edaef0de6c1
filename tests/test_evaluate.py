"""Greedy answers against token-by-token decoding with transformers, and the means of held-out items."""

import math

import pytest
import torch

from nrt_fast import Engine, Model
from nrt_fast.evaluate import clustered_mean, hard_positions, summarise
from nrt_fast.types import Example, Scores, Traces

DELIMITER, EOS = 3, 9
PROMPTS = [[9, 10, 12, 2, 15, 11], [13], [12, 11, 10]]
ANSWERS = [[10, 11, EOS], [EOS], [5, 6, 7, 8, 4, 10, EOS]]


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_greedy_answers_equal_decoding_token_by_token(model_type, make_module, reference_logits):
    module = make_module(model_type, vocab_size=16, sliding_window=6)
    engine = Engine(Model.from_hf(module), delimiter_id=DELIMITER, eos_id=[EOS, 5])
    thoughts = engine.think(
        PROMPTS, ANSWERS, [0, 1, 2], num_generations=5, max_trace_length=6, temperature=1.0, seed=2, step=0,
        answer_greedily=True,
    )  # fmt: skip
    closed = []
    for prompt, group, answers in zip(PROMPTS, thoughts.traces.trace_ids, thoughts.answers, strict=True):
        for trace, answer in zip([*group, []], answers, strict=True):
            expected, ids = [], [*prompt, *trace, DELIMITER]
            while len(expected) < max(map(len, ANSWERS)) and EOS not in expected:
                expected.append(int(reference_logits(module, ids + expected)[-1].argmax()))
            assert answer == expected
            closed.append(EOS in answer)
    assert set(closed) == {True, False}


def example(answer_ids, hard_positions):
    return Example(0, [1], answer_ids, hard_positions, "", "", "")


def logs(*probabilities):
    return torch.tensor(probabilities).log()


@pytest.fixture
def evaluation():
    """Two items with two traces each; items, traces, scores, greedy answers."""
    traces = Traces(
        trace_ids=[[[5, 6], [7]], [[], [8, 9, 5]]],
        logprobs=[[[-1.0, -2.0], [-0.5]], [[], [-1.0, -1.0, -1.0]]],
        delimiter_logprobs=[[-0.5, None], [-1.0, None]],
    )
    scores = Scores([[logs(0.5, 0.8), logs(0.4, 0.8)], [logs(0.9), logs(0.2)]], [logs(0.1, 0.4), logs(0.3)])
    answers = [[[2, 4], [2, 2], [2, 4]], [[4], [4], [5]]]
    return [example([2, 4], (0,)), example([4], ())], traces, scores, answers


def test_means_of_held_out_items(evaluation):
    result = summarise(*evaluation)
    assert result.accuracy == 3 / 4
    assert result.accuracy_no_trace == 1 / 2
    gains = [math.log(x) for x in (5, 2, 4, 2, 3, 2 / 3)]
    assert result.gain == pytest.approx(sum(gains) / 6)
    assert result.hard_token_gain == pytest.approx((math.log(5) + math.log(4)) / 2)
    assert result.gain_error == pytest.approx(clustered_mean([torch.tensor(gains[:4]), torch.tensor(gains[4:])]).error)
    assert result.hard_token_gain_error == 0, "one of the two items has none"
    assert result.hard_token_logp == pytest.approx((math.log(0.5) + math.log(0.4)) / 2)
    assert result.trace_length == (2 + 1 + 0 + 3) / 4
    assert result.entropy == pytest.approx((1 + 2 + 0.5 + 0.5 + 1 + 3) / 8)
    assert result.delimiter_rate == 1 / 2
    assert result.num_items == 2


def test_hard_tokens_are_the_top_tenth_where_none_is_declared():
    logb = torch.log(torch.linspace(0.05, 0.95, 19))
    logc = torch.zeros(19)
    traces = Traces([[[1]], [[1]]], [[[-1.0]], [[-1.0]]], [[-1.0], [-1.0]])
    items = [example([2] * 10, None), example([2] * 9, None)]
    scores = Scores([[logc[:10]], [logc[10:]]], [logb[:10], logb[10:]])
    result = summarise(items, traces, scores, [[[2], [2]]] * 2)
    # Probabilities 0.05 and 0.10 of 19; without a single shared threshold the second item would have hard tokens too.
    assert result.hard_token_gain == pytest.approx(-(math.log(0.05) + math.log(0.1)) / 2)


@pytest.mark.parametrize("num_tokens", [1, 2, 10, 11, 1000, 12345])
def test_hard_tokens_are_those_up_to_the_tenth(num_tokens):
    logb = -torch.rand(num_tokens, generator=torch.Generator().manual_seed(num_tokens)).log2().abs()
    (hard,) = hard_positions([example([2] * num_tokens, None)], [logb])
    assert hard.tolist() == (logb <= logb.quantile(0.1)).nonzero().flatten().tolist()


def test_hard_tokens_of_more_than_torch_takes_a_quantile_of():
    num_tokens = 2**24 + 1
    (hard,) = hard_positions([example([], None)], [torch.arange(num_tokens, dtype=torch.float32)])
    assert torch.equal(hard, torch.arange(num_tokens // 10 + 1))


def test_without_traces_the_empty_one_stands_for_them(evaluation):
    items, _, scores, answers = evaluation
    traces = Traces([[], []], [[], []], [[], []])
    result = summarise(items, traces, Scores([[], []], scores.baseline_logprobs), [group[-1:] for group in answers])
    assert result.accuracy == result.accuracy_no_trace == 1 / 2
    assert result.gain == result.hard_token_gain == result.trace_length == result.entropy == 0
    assert result.hard_token_logp == pytest.approx(math.log(0.1))
