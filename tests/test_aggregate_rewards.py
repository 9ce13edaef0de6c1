"""aggregate_rewards: reference, C++ and Triton against scalar fp64 formulas, over every combination of its choices."""

import math
from itertools import accumulate, chain, product
from typing import NamedTuple

import pytest
import torch
from rewards_oracle import reference_advantages, reference_group, reference_shaped

from nrt_fast import ops
from nrt_fast.config import PRESETS, TrainConfig
from nrt_fast.reference import rewards as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_extension = pytest.mark.skipif(ops.missing("native") is not None, reason=str(ops.missing("native")))
needs_triton = pytest.mark.skipif(ops.missing("triton") is not None, reason=str(ops.missing("triton")))
NATIVE, TRITON = pytest.param("native", marks=needs_extension), pytest.param("triton", marks=needs_triton)
REWARDS, SCALES, CLIPS, ADVANTAGES, ANSWER_WEIGHTS = reference.CHOICES.values()
GROUPS = ((3, 5), (0, 3), (11, 20), (1, 1))  # traces, answer tokens


@pytest.fixture(params=["reference", NATIVE, TRITON], autouse=True)
def backend(request):
    with ops.use(request.param):
        yield request.param


def on(*backends):
    """Run a test on these back ends only."""
    return pytest.mark.parametrize("backend", backends, indirect=True)


class Choices(NamedTuple):
    reward: str = "ws_log"
    reward_scale: str = "length"
    reward_clip: str = "none"
    advantage: str = "dr_grpo"
    answer_weight: str = "derived"
    std_floor: float = 0.0
    drop_cut_reward: bool = False
    format_coef: float = 0.0


class Results(NamedTuple):
    reward: torch.Tensor
    base: torch.Tensor
    shaped: torch.Tensor
    advantage: torch.Tensor
    signal: torch.Tensor
    token_weight: torch.Tensor


def offsets(sizes, device):
    return torch.tensor([0, *accumulate(sizes)], device=device)


def scores_of(logc, logb, groups, device):
    """The op's tensors from flat lists; every third trace was cut."""
    num_traces, num_tokens = [traces for traces, _ in groups], [tokens for _, tokens in groups]
    closed = [n % 3 != 1 for n in range(sum(num_traces))]
    sizes = num_tokens, num_traces, [traces * tokens for traces, tokens in groups]
    return [
        torch.tensor(logc, dtype=torch.float32, device=device),
        torch.tensor(logb, dtype=torch.float32, device=device),
        torch.tensor(closed, dtype=torch.bool, device=device),
        *(offsets(size, device) for size in sizes),
    ]


def random_scores(groups, device, seed=0):
    """Log-probabilities from about 0 to 1e-13, so that log b meets its clamp."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs(size):
        return (-30 * torch.rand(size, generator=generator) ** 4).tolist()

    logc, logb = logprobs(sum(traces * tokens for traces, tokens in groups)), logprobs(sum(t for _, t in groups))
    logb[0] = -25.0
    return scores_of(logc, logb, groups, device)


def aggregate(scores, choices):
    return Results(*ops.aggregate_rewards(*scores, *choices))


def oracle(scores, choices):
    """The formulas, group by group, in scalars; an empty group has a base only."""
    logc, logb, closed, *cu = (x.tolist() for x in scores)
    results = Results([], [], [], [], [], [])
    for p in range(len(cu[0]) - 1):
        answer, group, _ = (slice(offset[p], offset[p + 1]) for offset in cu)
        tokens, ends, start = logb[answer], closed[group], cu[2][p]
        rows = [logc[start + g * len(tokens) : start + (g + 1) * len(tokens)] for g in range(len(ends))]
        raw, weights = reference_group(rows, tokens, *choices[:2]) if rows else ([], [])
        base = reference_group([tokens], tokens, *choices[:2])[0][0]
        shaped = reference_shaped(
            raw, base, ends, choices.reward_clip, choices.drop_cut_reward, choices.format_coef
        )  # fmt: skip
        advantage = reference_advantages(shaped, choices.advantage, choices.std_floor) if rows else []
        answer_weights = {
            "fixed": [[1.0] * len(tokens)] * len(rows),
            "derived": weights,
            "reward": [[value] * len(tokens) for value in raw],
        }
        results.reward.extend(raw)
        results.base.append(base)
        results.shaped.extend(shaped)
        results.advantage.extend(advantage)
        results.signal.append(any(advantage))
        results.token_weight.extend(chain(*answer_weights[choices.answer_weight]))
    return Results(*(torch.tensor(x, dtype=torch.float64 if x is not results.signal else torch.bool) for x in results))


def assert_exact(scores, choices):
    """Error against the formulas at most twice that of plain PyTorch, plus 1e-5; signals are equal."""
    ours, exact = aggregate(scores, choices), oracle(scores, choices)
    with ops.use("reference"):
        plain = aggregate(scores, choices)
    for name, our, their, true in zip(Results._fields, ours, plain, exact, strict=True):
        assert our.shape == true.shape
        our, their = our.cpu(), their.cpu()
        if name == "signal":
            assert torch.equal(our, true)
        else:
            assert our.dtype == torch.float32
            limit = 2 * (their.double() - true).abs() + 1e-5 * true.abs().clamp(min=1)
            assert ((our.double() - true).abs() <= limit).all(), name


def every_combination():
    """Every reward with every clip and advantage, and by the way with every scale and answer weight."""
    others = list(product(SCALES, ANSWER_WEIGHTS))
    for reward in REWARDS:
        for index, (clip, advantage) in enumerate(product(CLIPS, ADVANTAGES)):
            scale, answer_weight = others[index % len(others)]
            choices = Choices(reward, scale, clip, advantage, answer_weight, 0.003, index % 2 == 1, index % 4 * 0.1)
            yield pytest.param(choices, id="-".join(choices[:5]))


@pytest.mark.parametrize("choices", list(every_combination()))
def test_every_combination_equals_the_formulas(choices, device):
    assert_exact(random_scores(GROUPS, device), choices)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_equal_the_formulas(preset, device):
    objective = TrainConfig(objective=preset).resolved_objective()
    choices = Choices(
        objective.reward, objective.reward_scale, objective.reward_clip, objective.advantage, objective.answer_weight,
        objective.std_floor, objective.drop_cut_reward,
        objective.format_coef if objective.format_term == "reward" else 0.0,
    )  # fmt: skip
    assert_exact(random_scores(GROUPS, device, seed=2), choices)


@pytest.mark.parametrize("reward", ["gm", "ws_inv", "r3"])
def test_answers_and_groups_longer_than_a_block(reward, device):
    assert_exact(random_scores(((9, 1100), (130, 3)), device), Choices(reward, "weight", "zero", "grpo"))


@pytest.mark.parametrize("reward", ["logp", "ws_log", "r3"])
def test_a_group_does_not_depend_on_the_others(reward, device):
    """Bit by bit: alone, among others, once more, and on several threads."""
    scores, choices = random_scores(GROUPS, device), Choices(reward, "weight", "zero", "grpo")
    together = aggregate(scores, choices)
    torch.set_num_threads(4)
    again = aggregate(scores, choices)
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(together, again, strict=True))
    cu = [x.tolist() for x in scores[3:]]
    for p, (traces, tokens) in enumerate(GROUPS):
        answer, group, mine = (slice(offset[p], offset[p + 1]) for offset in cu)
        sizes = [tokens], [traces], [traces * tokens]
        parts = scores[0][mine], scores[1][answer], scores[2][group], *(offsets(size, device) for size in sizes)
        alone = aggregate(parts, choices)
        for name, part in (("reward", group), ("advantage", group), ("token_weight", mine), ("base", slice(p, p + 1))):
            assert torch.equal(getattr(alone, name), getattr(together, name)[part]), name


def test_strides_do_not_matter(device):
    scores, choices = random_scores(GROUPS, device), Choices()
    strided = [torch.stack([x, x], dim=1)[:, 0] for x in scores]
    assert not any(x.is_contiguous() for x in strided)
    expanded = [scores[0], torch.tensor(-2.0, device=device).expand(len(scores[1])), *scores[2:]]
    dense = [scores[0], expanded[1].contiguous(), *scores[2:]]
    for views, plain in ((strided, scores), (expanded, dense)):
        for ours, theirs in zip(aggregate(views, choices), aggregate(plain, choices), strict=True):
            assert torch.equal(ours, theirs)


def test_no_prompt_at_all(device):
    results = aggregate(scores_of([], [], (), device), Choices())
    assert [list(x.shape) for x in results] == [[0]] * 6


@pytest.mark.parametrize(("reward", "value"), [("logp", 0.0), ("prob", 1.0), ("gm", 1.0), ("am", 0.0), ("r3", 0.0)])
@pytest.mark.parametrize("scale", SCALES)
def test_an_answer_of_no_tokens_has_sums_of_zero(reward, value, scale, device):
    results = aggregate(scores_of([], [], ((2, 0), (0, 0)), device), Choices(reward, scale))
    assert results.reward.tolist() == [value] * 2
    assert results.base.tolist() == [value] * 2


@pytest.mark.parametrize("values", [[0.1] * 7, [-3.3] * 2, [1e-30] * 8, [5.0], [123456.7] * 9, [-1e30] * 3], ids=len)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_equal_rewards_spread_by_exactly_zero(values, advantage, device):
    """A rounded mean would make a little more of it, and an advantage of the rounding."""
    results = aggregate(scores_of(values, [0.0], ((len(values), 1),), device), Choices("logp", advantage=advantage))
    assert results.advantage.tolist() == [0.0] * len(values)
    assert results.signal.tolist() == [False]


@pytest.mark.parametrize(("low", "high"), [(-85.0, -84.0), (-1e30, -2e30), (-1e4, -1e4 + 2**-8)])
def test_squares_neither_underflow_nor_overflow(low, high, device):
    """exp(-85) is 1e-37: its square is 0 in fp32, that of 1e30 infinite."""
    reward = "prob" if low == -85.0 else "logp"
    results = aggregate(scores_of([low, high, low], [-1.0], ((3, 1),), device), Choices(reward, advantage="grpo"))
    sign = 1 if high > low else -1
    expected = [-sign / math.sqrt(3), 2 * sign / math.sqrt(3), -sign / math.sqrt(3)]
    assert results.advantage.tolist() == pytest.approx(expected, rel=1e-5)
    assert results.signal.tolist() == [True]


@pytest.mark.parametrize(("floor", "signal"), [(-1.0, True), (0.0, True), (3.5e-7, True), (3.6e-7, False)])
def test_the_std_floor(floor, signal, device):
    """The example of the method: of 8 traces one is 1e-6 above the rest, and the std is 3.54e-7."""
    scores = scores_of([-1e-6] + [-2e-6] * 7, [-1.0], ((8, 1),), device)
    results = aggregate(scores, Choices("logp", advantage="grpo", std_floor=floor))
    assert results.advantage.tolist() == pytest.approx([2.475] + [-0.354] * 7 if signal else [0.0] * 8, abs=1e-3)
    assert results.signal.tolist() == [signal]


@pytest.mark.parametrize("reward", ["prob", "gm", "am", "ws_inv", "ws_log"])
@pytest.mark.parametrize("logp", [-200.0, -1e30])
def test_what_underflows_is_zero_not_nan(reward, logp, device):
    """c = 0 where b = 0: neither 0 times infinity nor infinity less infinity."""
    results = aggregate(scores_of([logp] * 40, [logp] * 20, ((2, 20),), device), Choices(reward, "weight", "zero"))
    for name in ("reward", "base", "shaped", "advantage", "token_weight"):
        assert not getattr(results, name).any(), name


@pytest.mark.parametrize("reward", ["ws_inv", "ws_log"])
@pytest.mark.parametrize(("logb", "clamped"), [(-1e30, -20.0), (1e-6, 0.0)])
@pytest.mark.parametrize("scale", SCALES)
def test_log_b_is_clamped_as_a_weight(reward, logb, clamped, scale, device):
    logc = [-1.0, -30.0, -2.0, -0.5]
    ours, theirs = (
        aggregate(scores_of(logc, [b, -3.0], ((2, 2),), device), Choices(reward, scale)) for b in (logb, clamped)
    )
    assert torch.equal(ours.reward, theirs.reward)
    assert torch.equal(ours.token_weight, theirs.token_weight)


def test_a_certain_baseline_weighs_nothing(device):
    """The weights -log b are all 0, and so is their sum."""
    results = aggregate(scores_of([-1.0, -2.0], [0.0], ((2, 1),), device), Choices("ws_log", "weight"))
    assert results.reward.tolist() == results.token_weight.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_traces", [1, 2, 7, 19])
def test_equal_traces_leave_r3_nothing_to_weigh_by(num_traces, device):
    results = aggregate(scores_of([-0.7, -9.1] * num_traces, [-0.1, -3.0], ((num_traces, 2),), device), Choices("r3"))
    assert results.reward.tolist() == [0.0] * num_traces
    assert not results.token_weight.any()
    assert not results.signal.any()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("place", ["c", "b"])
def test_nan_shows_in_the_reward(reward, place, device):
    """A clamp by minimum and maximum may lose it."""
    logc, logb = [-1.0] * 4, [-1.0] * 2
    (logc if place == "c" else logb)[1] = math.nan
    results = aggregate(scores_of(logc, logb, ((2, 2),), device), Choices(reward, "length", "zero"))
    assert torch.stack([*results.shaped, *results.base]).isnan().any()
    assert results.signal.tolist() == [False]
    assert results.advantage.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 2), r"logc_C: expected shape \[C=2\] of torch.float32, got \[2, 2\]"),
        (0, torch.zeros(4, dtype=torch.float64), "logc_C: expected .* got .* of torch.float64"),
        (1, torch.zeros(2, dtype=torch.bfloat16), "logb_A: expected .* got .* of torch.bfloat16"),
        (2, torch.zeros(2, dtype=torch.int64), "closed_N: expected .* of torch.bool, got .* of torch.int64"),
        (3, torch.zeros(2, dtype=torch.int32), "cu_answers: expected .* of torch.int64, got .* of torch.int32"),
        (5, torch.zeros(3, dtype=torch.int64), r"cu_scores: expected (one length|.*\[2\])"),
        (6, "best", "reward: expected one of logp, prob, am, gm, ws_inv, ws_log, r3, got best"),
        (7, "token", "reward_scale: expected one of length, weight, got token"),
        (8, "one", "reward_clip: expected one of none, zero, unit, got one"),
        (9, "gae", "advantage: expected one of grpo, dr_grpo, rloo, got gae"),
        (10, "free", "answer_weight: expected one of fixed, derived, reward, got free"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(index, value, message, device):
    arguments = [*scores_of([-1.0] * 4, [-1.0] * 2, ((2, 2),), device), *Choices()]
    arguments[index] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        ops.aggregate_rewards(*arguments)


@on(NATIVE)
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (3, [1, 2], r"cu_answers\[0\] = 1: expected 0"),
        (3, [0, 3], r"cu_answers\[1\] = 3: expected 2"),
        (4, [0, -1], r"cu_groups\[1\] = -1: expected at least 0"),
        (4, [0, 1], r"cu_groups\[1\] = 1: expected 2"),
        (5, [0, 5], r"cu_scores\[1\] = 5: expected 4"),
        (2, [True] * 4, r"cu_groups\[1\] = 2: expected 4"),
    ],
)
def test_offsets_out_of_range_are_refused(index, value, message):
    scores = scores_of([-1.0] * 4, [-1.0] * 2, ((2, 2),), "cpu")
    scores[index] = torch.tensor(value)
    with pytest.raises(ValueError, match=message):
        aggregate(scores, Choices())


@on(NATIVE)
def test_offsets_that_are_no_product_are_refused():
    scores = scores_of([-1.0] * 6, [-1.0] * 3, ((2, 2), (2, 1)), "cpu")
    scores[5] = torch.tensor([0, 3, 6])
    with pytest.raises(ValueError, match="prompt 0 has 3 scores: expected 2 traces x 2 tokens"):
        aggregate(scores, Choices())


@on(NATIVE)
@pytest.mark.parametrize("groups", [(), GROUPS], ids=["none", "some"])
def test_opcheck(groups):
    torch.library.opcheck(torch.ops.nrt_fast.aggregate_rewards.default, (*scores_of_any(groups), *Choices()))


def scores_of_any(groups):
    return random_scores(groups, "cpu") if groups else scores_of([], [], (), "cpu")


@on("reference")
def test_the_reference_works_in_fp64(device):
    scores = [x.double() if x.is_floating_point() else x for x in random_scores(GROUPS, device)]
    for reward in REWARDS:
        choices = Choices(reward, "weight", "zero", "grpo")
        for ours, true in zip(reference.aggregate_rewards(*scores, *choices), oracle(scores, choices), strict=True):
            torch.testing.assert_close(ours.cpu(), true, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@on(TRITON)
def test_the_host_does_not_wait(device):
    scores = random_scores(GROUPS, device)
    aggregate(scores, Choices())  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        aggregate(scores, Choices())
    finally:
        torch.cuda.set_sync_debug_mode("default")
