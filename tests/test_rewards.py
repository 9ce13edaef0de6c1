"""Rewards, token weights and advantages against scalar fp64 formulas of sections 2 and 3 of the method."""

import math
from dataclasses import replace

import pytest
import torch
from rewards_oracle import reference_advantages, reference_group, reference_shaped

from nrt_fast.config import PRESETS, TrainConfig
from nrt_fast.reference.rewards import clip_reward, trace_rewards
from nrt_fast.rewards import advantages, aggregate, reward
from nrt_fast.types import Scores, Traces, UserError

KINDS = ["logp", "prob", "am", "gm", "ws_inv", "ws_log", "r3"]
SCALES = ["length", "weight"]
PARTS = {"rtol": 1e-5, "atol": 1e-7}


def random_scores(lengths=(5, 1, 12), num_traces=6, seed=0):
    """Log-probabilities from about 0 to 1e-13, so that log b meets its clamp."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs(*shape):
        return -30 * torch.rand(shape, generator=generator) ** 4

    baseline = [logprobs(length) for length in lengths]
    baseline[0][0] = -25.0
    return Scores([list(logprobs(num_traces, length)) for length in lengths], baseline)


def assert_close(ours, reference):
    torch.testing.assert_close(ours.double(), torch.tensor(reference, dtype=torch.float64), **PARTS)


def listed(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_rewards_and_token_weights_equal_the_formulas(kind, scale):
    scores = random_scores()
    rewards, weights = aggregate(scores.logprobs, scores.baseline_logprobs, kind, scale)
    for ours_G, ours_GA, group, logb in zip(rewards, weights, scores.logprobs, scores.baseline_logprobs, strict=True):
        reference_G, reference_GA = reference_group(listed(group), logb.tolist(), kind, scale)
        assert ours_G.dtype == torch.float32
        assert_close(ours_G, reference_G)
        assert_close(torch.stack(ours_GA), reference_GA)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "r3"])
@pytest.mark.parametrize("scale", SCALES)
def test_token_weights_are_the_derivative_of_the_reward(kind, scale):
    """By central differences: alpha_i c_i = dR / d log c_i, which makes sum_i alpha_i c_i grad log c_i = grad R."""
    scores, width = random_scores(lengths=(7,), num_traces=3, seed=1), 1e-6
    logc_GA, logb_A = torch.stack(scores.logprobs[0]).double(), scores.baseline_logprobs[0].double().clamp(min=-5)
    _, weights_GA = trace_rewards(logc_GA, logb_A, kind, scale)
    for token in range(7):
        step = torch.zeros(7, dtype=torch.float64)
        step[token] = width
        (above, _), (below, _) = (trace_rewards(logc_GA + s, logb_A, kind, scale) for s in (step, -step))
        torch.testing.assert_close((above - below) / (2 * width), weights_GA[:, token], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "change", [{}, {"drop_cut_reward": True}, {"reward_scale": "weight", "answer_weight": "derived"}]
)
def test_presets_follow_the_formulas(name, change):
    objective = replace(TrainConfig(objective=name).resolved_objective(), **change)
    scores = random_scores(seed=2)
    scores.logprobs[0] = scores.logprobs[0][:1] * 6  # no signal
    closed = [[True] * 6, [False] * 6, [True, False, True, True, False, True]]
    ends = [[-0.5 if end else None for end in group] for group in closed]
    result = reward(scores, Traces([], [], ends), objective, 0.0, ["a", "b", "c"])
    for p, (group, logb) in enumerate(zip(scores.logprobs, scores.baseline_logprobs)):
        kind, scale = objective.reward, objective.reward_scale
        raw, weights = reference_group(listed(group), logb.tolist(), kind, scale)
        ((base,), _) = reference_group([logb.tolist()], logb.tolist(), kind, scale)
        share = objective.format_coef if objective.format_term == "reward" else 0.0
        shaped = reference_shaped(raw, base, closed[p], objective.reward_clip, objective.drop_cut_reward, share)
        expected = reference_advantages(shaped, objective.advantage, objective.std_floor)
        assert_close(result.reward[p], raw)
        assert_close(result.base[p], base)
        assert_close(result.shaped[p], shaped)
        torch.testing.assert_close(result.advantage[p].tolist(), expected, rtol=1e-5, atol=1e-5)
        assert result.signal[p] == any(expected)
        answer = {"fixed": [[1.0] * len(logb)] * 6, "derived": weights, "reward": [[r] * len(logb) for r in raw]}
        assert_close(torch.stack(result.answer_weights[p]), answer[objective.answer_weight])
    assert not result.signal[0]


def test_equal_traces_have_no_spread_to_weigh_tokens_by():
    for num_traces in range(1, 20):
        rewards, weights = aggregate([[torch.tensor([-0.7])] * num_traces], [torch.tensor([-0.1])], "r3")
        assert rewards[0].tolist() == [0.0] * num_traces
        assert not torch.cat(weights[0]).any()


@pytest.mark.parametrize(
    ("clip", "expected"), [("none", [-1.0, 0.5, 1.0, 3.0]), ("zero", [0, 0, 0.5, 2.5]), ("unit", [0, 0, 0.5, 1])]
)
def test_clips(clip, expected):
    assert clip_reward(torch.tensor([-1.0, 0.5, 1.0, 3.0]), torch.tensor(0.5), clip).tolist() == expected


@pytest.mark.parametrize("values", [[0.1] * 7, [-3.3] * 2, [1e-30] * 8, [5.0], [123456.7] * 9], ids=len)
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_carry_no_signal_even_without_a_floor(values, kind):
    """A mean is rounded: the plain std of nine times 123456.7 is above 0, and would turn rounding into advantages."""
    (advantage,), (signal,) = advantages([torch.tensor(values)], kind, 0.0)
    assert advantage.tolist() == [0.0] * len(values)
    assert signal is False


@pytest.mark.parametrize(("floor", "signal"), [(0.0, True), (3.5e-7, True), (3.6e-7, False)])
def test_the_floor_is_in_the_rewards_own_unit(floor, signal):
    """The example of the method: of 8 traces one is 1e-6 above the rest, and the std is 3.54e-7."""
    (advantage,), (has_signal,) = advantages([torch.tensor([1e-6] + [0.0] * 7)], "grpo", floor)
    assert has_signal is signal
    assert advantage.tolist() == pytest.approx([2.475] + [-0.354] * 7 if signal else [0.0] * 8, abs=1e-3)


@pytest.mark.parametrize(
    ("std_floor", "noise", "signal"),
    [(0.02, 0.0, True), (0.9, 0.0, False), (0.02, 0.25, True), (0.02, 0.3, False), (0.0, 0.3, True)],
    ids=["floor-under-std", "floor-over-std", "noise-under-std", "noise-over-std", "no-floor-at-all"],
)
def test_a_group_under_three_times_the_noise_has_no_signal(std_floor, noise, signal):
    objective = replace(PRESETS["nrt-logp"], std_floor=std_floor, reward_clip="none")
    logprobs = [torch.tensor([value]) for value in (-1.0, -2.0, -2.6)]  # std 0.808
    result = reward(
        Scores([logprobs], [torch.tensor([-3.0])]), Traces([], [], [[None] * 3]), objective, noise, ["a"]
    )  # fmt: skip
    assert result.signal == [signal]


@pytest.mark.parametrize("preset", ["jepo", "nrt-logp"])
def test_a_dropped_trace_earns_what_an_empty_one_does(preset):
    """With or without a baseline: an R of 0 would be the best there is where R is a log-probability."""
    objective = replace(TrainConfig(objective=preset).resolved_objective(), drop_cut_reward=True, reward_clip="none")
    logprobs = [torch.tensor([value]) for value in (-1.0, -2.0, -4.0)]
    scores, traces = Scores([logprobs], [torch.tensor([-3.0])]), Traces([], [], [[-0.1, None, None]])
    assert reward(scores, traces, objective, 0.0, ["a"]).shaped[0].tolist() == [-1.0, -3.0, -3.0]


EXTREMES = {
    "p=1e-40": (-92.1, -92.1),
    "c=1-b=1e-40": (0.0, -92.1),
    "c=1e-40-b=1": (-92.1, 0.0),
    "c=b=1": (0.0, 0.0),
    "b-next-to-1": (-1e-7, -1e-45),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("length", [1, 4096])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scale", SCALES)
def test_extreme_values_stay_finite(extreme, length, preset, scale):
    logc, logb = (torch.full((length,), value) for value in EXTREMES[extreme])
    objective = replace(TrainConfig(objective=preset).resolved_objective(), reward_scale=scale, answer_weight="derived")
    scores = Scores([[logc, logc * 0.5, logc]], [logb])
    result = reward(scores, Traces([], [], [[-1.0, None, -1.0]]), objective, 0.0, ["a"])
    for tensor in (*result.reward, *result.base, *result.shaped, *result.advantage, *result.answer_weights[0]):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.01])
@pytest.mark.parametrize("place", ["trace", "baseline"])
def test_an_impossible_logprob_names_its_prompt(bad, place):
    scores = random_scores()
    (scores.logprobs[1][2] if place == "trace" else scores.baseline_logprobs[1])[0] = bad
    with pytest.raises(UserError, match=r"data\.jsonl, row 7: a log-probability of its answer is NaN"):
        aggregate(scores.logprobs, scores.baseline_logprobs, names=["data.jsonl, row 3", "data.jsonl, row 7", "x"])
    with pytest.raises(UserError, match="prompt 1:"):
        aggregate(scores.logprobs, scores.baseline_logprobs)


def test_rounding_above_0_is_no_error():
    rewards, _ = aggregate([[torch.tensor([1e-6])]], [torch.tensor([-1.0])], "prob")
    assert rewards[0].tolist() == [1.0]


def test_a_baseline_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"prompt 0: every trace and the baseline need the answer's \[2\] tokens"):
        aggregate([[torch.zeros(3)]], [torch.zeros(2)])
