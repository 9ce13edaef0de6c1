"""Scoring 16-token answers after 64 traces and none, on the live cache and from given traces, beside re-forwarding.

Other stacks forward prompt, trace and answer once more to score an answer; here as one would write it, with logits and
a log-softmax everywhere, and with those of the answers alone.
"""

import functools

import pytest
import torch
from engine_peers import DELIMITER, DTYPES, NEW, SHAPES, G, P, is_close, make_ids, make_setting, reforward
from timing import PhaseClock

ANSWER = 16
ROWS = 8  # sequences that re-forwarding runs at once, a group's traces: all their logits are in memory
CLOCK = PhaseClock("score")


def flat(scores):
    """[P (G + 1), answer], each group's baseline last."""
    groups = zip(scores.logprobs, scores.baseline_logprobs, strict=True)
    return torch.stack([row for group, baseline in groups for row in [*group, baseline]])


@pytest.mark.benchmark(group="scoring", timer=CLOCK)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_scoring(shape, dtype, compare, device):
    module, engine, prompts = make_setting(shape, dtype, device)
    answers = make_ids(module.config.vocab_size, P, ANSWER, seed=1).tolist()
    live = functools.partial(
        engine.think, prompts, answers, list(range(P)), num_generations=G, max_trace_length=NEW, temperature=1.0,
        seed=0, step=0, timed=CLOCK.timed,
    )  # fmt: skip
    thoughts = live()
    given = functools.partial(engine.score, prompts, thoughts.traces.trace_ids, answers)
    sequences = [
        [*prompt, *ids, DELIMITER, *answer]
        for prompt, group, answer in zip(prompts, thoughts.traces.trace_ids, answers) for ids in [*group, []]
    ]  # fmt: skip
    frugal = reforward(module, sequences, ANSWER, ROWS)
    for scores in (thoughts.scores, given()):
        assert is_close(flat(scores), frugal(), dtype)
    compare(
        {
            "think, its scoring": live,
            "score, traces given": CLOCK.throughout(given),
            "re-forward": CLOCK.throughout(reforward(module, sequences, ANSWER, ROWS, all_logits=True)),
            "re-forward, logits of answers only": CLOCK.throughout(frugal),
        },
        rounds=SHAPES[shape][1],
        warmup_rounds=0,
        clock=CLOCK,
    )
