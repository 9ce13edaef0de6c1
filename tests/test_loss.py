"""The packed shared-prompt loss and its gradient against a plain padded implementation over transformers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch

from nrt_fast import Model, ops
from nrt_fast.config import PRESETS
from nrt_fast.optim import AdamW
from nrt_fast.pack import loss_tokens, pack
from nrt_fast.train_step import loss_rows, train_step
from nrt_fast.types import Example, Traces, UserError

DELIMITER, TEMPERATURE, MAX_TOKENS_PER_TRACE = 3, 0.7, 20
DEFAULT = PRESETS["nrt-ws"]
OBJECTIVES = {
    "cispo": DEFAULT,
    "ppo": replace(DEFAULT, trace_loss="ppo", epsilon_high=0.27),
    "reinforce": replace(DEFAULT, trace_loss="reinforce"),
    "no-trace-loss": replace(DEFAULT, trace_loss="none"),
    "kl": replace(DEFAULT, beta=0.5),
    "entropy": replace(DEFAULT, entropy_coef=0.3),
    "sequence-normalizer": replace(DEFAULT, normalizer="sequence"),
    "constant-normalizer": replace(DEFAULT, normalizer="constant"),
    "answer-coef": replace(DEFAULT, answer_coef=0.25),
    "no-answer-loss": replace(DEFAULT, answer_coef=0.0),
    "no-format-loss": replace(DEFAULT, format_coef=0.0),
    "format-as-reward": replace(DEFAULT, format_coef=0.1, format_term="reward"),
}


def load(module, folder):
    module.save_pretrained(folder)
    return Model.from_pretrained(folder)


@pytest.fixture(scope="module")
def module(make_module):
    return make_module("llama")


@pytest.fixture(scope="module")
def model(module, tmp_path_factory):
    return load(module, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_module(make_module):
    return make_module("llama", seed=1)


@pytest.fixture(scope="module")
def other_model(other_module, tmp_path_factory):
    return load(other_module, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapted(make_module, tmp_path_factory):
    """The weights of ``module`` under a random LoRA adapter: peft's live module, and our model of its folder."""
    folder, module = tmp_path_factory.mktemp("adapted"), make_module("llama")
    module.save_pretrained(folder / "base")
    module.name_or_path = str(folder / "base")  # what the adapter's file says
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )  # fmt: skip
    theirs = peft.get_peft_model(module, config).eval()
    theirs.save_pretrained(folder / "adapter")
    return theirs, Model.from_pretrained(folder / "adapter")


def make_step(module, reference_logits, seed, closed, signal, longest=8):
    """Ragged groups as after a rollout by slightly different weights.

    Args:
        closed: [P][G], whether a trace ended with its delimiter; the second of each group is empty.
        signal: [P].
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(5, 67, (length,), generator=generator).tolist()

    def old(context, sampled, temperature):
        logits = reference_logits(module, context + sampled)[len(context) - 1 : -1] / temperature
        logprobs = logits.log_softmax(dim=-1).gather(1, torch.tensor(sampled, dtype=torch.int64)[:, None]).squeeze(1)
        # In steps that are not near the clip's edges, where rounding would decide.
        return logprobs + 0.1 * torch.randint(-6, 7, (len(sampled),), generator=generator)

    prompts, answers = [ids(1, 10) for _ in closed], [ids(1, 6) for _ in closed]
    traces = [[[] if g == 1 else ids(3 * (g == 2), longest) for g in range(len(group))] for group in closed]
    sampled = [
        [old(p, ids + [DELIMITER] * end, TEMPERATURE).tolist() for ids, end in zip(*group)]
        for p, *group in zip(prompts, traces, closed)
    ]
    return SimpleNamespace(
        examples=[Example(0, prompt, answer, None, "", "", "") for prompt, answer in zip(prompts, answers)],
        traces=Traces(
            traces,
            [[row[: len(ids)] for row, ids in zip(*group)] for group in zip(sampled, traces)],
            [[row[-1] if end else None for row, end in zip(*group)] for group in zip(sampled, closed)],
        ),
        answer_logprobs=[[torch.zeros(len(answer))] * len(group) for answer, group in zip(answers, closed)],
        advantage=[torch.randn(len(group), generator=generator) * has for group, has in zip(closed, signal)],
        signal=signal,
        answer_weights=[
            [torch.rand(len(answer), generator=generator) for _ in group] for answer, group in zip(answers, closed)
        ],
    )


@pytest.fixture(scope="module")
def step(module, reference_logits):
    """Four groups; the third has no signal."""
    closed = [[True, True, False], [False, False, True], [True, False, True], [True, True, True]]
    return make_step(module, reference_logits, 1, closed, [True, True, False, True])


def reordered(step, order):
    def pick(items):
        return [items[p] for p in order]

    traces = Traces(*map(pick, vars(step.traces).values()))
    return SimpleNamespace(
        **{name: pick(items) for name, items in vars(step).items() if name != "traces"}, traces=traces
    )


def make_tokens(step, objective):
    return loss_tokens(
        step.examples, step.traces, step.answer_logprobs, step.advantage, step.signal, step.answer_weights,
        objective, DELIMITER, TEMPERATURE, MAX_TOKENS_PER_TRACE,
    )  # fmt: skip


class NoUpdate:
    """An optimizer that leaves gradients where autograd puts them."""

    def gradient(self, leaf):
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return leaf.grad

    def step(self, lr, max_grad_norm):
        return 0.0


def packed_loss(model, step, objective, max_tokens=10_000, on_policy=False, reference=None, recompute="none"):
    """(loss by term, gradient by name of each trained parameter) of one of our training steps."""
    model, tokens = model.clone(), make_tokens(step, objective)
    # Without momentum the first moment after one step is the gradient.
    optimizer = AdamW(model.trained.flat, model.trained.leaves.values(), 0, (0.0, 0.9), 1e-8, 0.0)
    batches = pack(tokens, max_tokens, torch.device("cpu"))
    stats = train_step(model, optimizer, tokens, batches, objective, 0.0, math.inf, on_policy, reference, recompute)
    gradients = {
        name: optimizer.first[tensor.storage_offset() :][: tensor.numel()].view_as(tensor)
        for name, tensor in model.trained.tensors.items()
    }
    assert stats.grad_norm == pytest.approx(float(optimizer.first.norm()), rel=1e-5)
    return stats.loss, gradients


def padded_logits(module, sequences):
    width = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
    return module(ids, attention_mask=mask, use_cache=False).logits


def trace_token_losses(objective, new, old, advantage):
    """Of every token of a trace: the policy-gradient term as its paper writes it."""
    ratio, low, high = (new - old).exp(), 1 - objective.epsilon, 1 + objective.epsilon_high
    if objective.trace_loss == "reinforce":
        return -advantage * new
    if objective.trace_loss == "ppo":
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    masked = (ratio > high) if advantage > 0 else (ratio < low)
    return -advantage * ratio.detach().clamp(low, high) * new * ~masked


def one_by_one(module, sequences):
    return [module(torch.tensor([row]), use_cache=False).logits[0] for row in sequences]


def padded_loss(module, step, objective, on_policy=False, reference=None, padded=True):
    """(loss by term, gradient by name of each trained parameter) the plain way: every trace with a prompt of its own,
    padded or not."""
    rows = [(p, g) for p, group in enumerate(step.traces.trace_ids) for g in range(len(group))]
    examples, traces = step.examples, step.traces
    sequences = [
        examples[p].prompt_ids + traces.trace_ids[p][g] + [DELIMITER] + examples[p].answer_ids for p, g in rows
    ]
    forward = padded_logits if padded else one_by_one
    logits = forward(module, sequences)
    with torch.no_grad():
        reference_logits = forward(reference, sequences) if reference else logits
    terms = dict.fromkeys(("trace", "answer", "format", "kl", "entropy"), 0.0)
    num_tokens = 0
    for row, (p, g) in enumerate(rows):
        targets = sequences[row][len(examples[p].prompt_ids) :]
        end = traces.delimiter_logprobs[p][g]
        num_sampled, num_answer = len(traces.trace_ids[p][g]) + (end is not None), len(examples[p].answer_ids)

        def logprobs(logits, temperature, row=row, p=p, targets=targets):
            start = len(examples[p].prompt_ids) - 1
            all_logprobs = (logits[row][start : start + len(targets)] / temperature).log_softmax(dim=-1)
            return all_logprobs.gather(1, torch.tensor(targets)[:, None]).squeeze(1), all_logprobs

        sampled, distribution = (x[:num_sampled] for x in logprobs(logits, TEMPERATURE))
        plain, _ = logprobs(logits, 1.0)
        if step.signal[p] and objective.trace_loss != "none":
            old = torch.tensor(traces.logprobs[p][g] + [end] * (end is not None))
            old = sampled.detach() if on_policy else old
            terms["trace"] += trace_token_losses(objective, sampled, old, step.advantage[p][g]).sum()
            difference = logprobs(reference_logits, TEMPERATURE)[0][:num_sampled] - sampled
            terms["kl"] += objective.beta * (difference.exp() - difference - 1).sum()
            terms["entropy"] += objective.entropy_coef * (distribution.exp() * distribution).sum()
            num_tokens += num_sampled
        if objective.answer_coef:
            terms["answer"] -= objective.answer_coef * (step.answer_weights[p][g] * plain[-num_answer:]).sum()
            num_tokens += num_answer
        if end is None and objective.format_coef and objective.format_term == "loss":
            terms["format"] -= objective.format_coef * plain[num_sampled]
            num_tokens += 1
    normalizer = {"token": num_tokens, "sequence": len(rows), "constant": len(rows) * MAX_TOKENS_PER_TRACE}
    terms = {name: term / normalizer[objective.normalizer] for name, term in terms.items()}
    terms["total"] = sum(terms.values())
    module.zero_grad()
    terms["total"].backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad.clone()  # peft's names
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    return {name: float(torch.as_tensor(term).detach()) for name, term in terms.items()}, gradients


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def assert_same(ours, theirs, tolerance):
    (our_loss, our_gradients), (their_loss, their_gradients) = ours, theirs
    assert our_loss == pytest.approx(their_loss, rel=tolerance, abs=1e-6)  # terms of either sign cancel
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert gradient.norm() > 0
        assert relative_error(our_gradients[name], gradient) < tolerance, name


def test_the_step_has_ratios_on_both_sides_of_the_clip(step, model):
    """Else the comparisons below would prove less than they say."""
    tokens = make_tokens(step, DEFAULT)
    batches = pack(tokens, 10_000, torch.device("cpu"))
    stats = train_step(model.clone(), NoUpdate(), tokens, batches, DEFAULT, 0.0, 1.0, True, None)
    ratio = (stats.logprobs_A - tokens.old_logprobs_A).exp()
    trace_A = (tokens.kind_A == 0) & tokens.counted_A
    for sign in (1, -1):
        pushed = ratio[trace_A & (sign * tokens.weight_A > 0)]
        assert (pushed > 1.28).any()
        assert (pushed < 0.8).any()
        assert ((pushed > 0.8) & (pushed < 1.28)).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_gradients_equal_padded_ones(name, step, module, model, other_module, other_model):
    objective = OBJECTIVES[name]
    ours = packed_loss(model, step, objective, reference=other_model if objective.beta else None)
    theirs = padded_loss(module, step, objective, reference=other_module if objective.beta else None)
    assert_same(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=["llama-tied", "llama-biases", "mistral-window", "qwen2", "qwen3"],
)
def test_packed_gradients_of_every_family(model_type, config, step, make_module, tmp_path):
    module = make_module(model_type, **config)
    assert_same(packed_loss(load(module, tmp_path), step, DEFAULT), padded_loss(module, step, DEFAULT), 1e-4)


@pytest.mark.parametrize("trace_loss", ["cispo", "ppo", "reinforce"])
def test_on_policy_the_ratio_is_1(trace_loss, step, module, model):
    """All three forms have REINFORCE's gradient then."""
    objective = replace(DEFAULT, trace_loss=trace_loss)
    _, ours = packed_loss(model, step, objective, on_policy=True)
    _, theirs = padded_loss(module, step, objective, on_policy=True)
    _, reinforced = padded_loss(module, step, replace(DEFAULT, trace_loss="reinforce"))
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) < 1e-4
        assert relative_error(ours[name], reinforced[name]) < 1e-4


def test_gradients_reach_a_live_module(step, make_module, module, model):
    live = make_module("llama")
    tokens = make_tokens(step, DEFAULT)
    batches = pack(tokens, 30, torch.device("cpu"))
    train_step(Model.from_hf(live), NoUpdate(), tokens, batches, DEFAULT, 0.0, 1.0, False, None)
    _, theirs = padded_loss(module, step, DEFAULT)
    for name, parameter in live.named_parameters():
        assert relative_error(parameter.grad, theirs[name]) < 1e-4


@pytest.mark.parametrize("max_tokens", [60, 25, 18, 1])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=str)
def test_the_cut_of_a_step_does_not_matter(max_tokens, order, step, model):
    whole = packed_loss(model, step, DEFAULT)
    assert_same(packed_loss(model, reordered(step, order), DEFAULT, max_tokens), whole, 1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    "config", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}], ids=str
)
def test_recomputing_changes_nothing(recompute, config, step, make_module, tmp_path):
    model = load(make_module("llama", **config), tmp_path)
    loss, gradients = packed_loss(model, step, DEFAULT)
    again, recomputed = packed_loss(model, step, DEFAULT, recompute=recompute)
    assert again == loss
    for name, gradient in gradients.items():
        assert relative_error(recomputed[name], gradient) < 1e-6, name


@pytest.mark.parametrize("trained", ["weights", "adapter"])
@pytest.mark.parametrize("seed", range(100))
def test_packed_equals_padded_equals_one_at_a_time(
    seed, trained, module, model, adapted, other_module, other_model, reference_logits
):
    """Random groups under a random preset, budget and recomputation."""
    if trained == "adapter":
        module, model = adapted
    generator = torch.Generator().manual_seed(seed)

    def draw(high, low=0):
        return int(torch.randint(low, high, (), generator=generator))

    num_prompts, num_traces = draw(5, 1), draw(5, 1)
    closed = (torch.rand(num_prompts, num_traces, generator=generator) < 0.7).tolist()
    signal = [True] + (torch.rand(num_prompts - 1, generator=generator) < 0.7).tolist()
    step = make_step(module, reference_logits, seed, closed, signal, longest=draw(40, 4))
    objective, on_policy = list(PRESETS.values())[seed % len(PRESETS)], bool(draw(2))
    if objective.trace_loss != "none" and draw(4) == 0:
        objective = replace(objective, beta=0.3, entropy_coef=0.1)
    reference, other = (other_model, other_module) if objective.beta else (None, None)
    recompute = ("none", "selective", "full")[draw(3)]
    theirs = padded_loss(module, step, objective, on_policy, other)
    alone = padded_loss(module, step, objective, on_policy, other, padded=False)
    ours = packed_loss(model, step, objective, draw(200, 1), on_policy, reference, recompute)
    assert_same(alone, theirs, 1e-4)
    assert_same(ours, theirs, 1e-4)


@pytest.mark.parametrize(("max_tokens", "num_parts"), [(10_000, 4), (25, 5), (18, 6), (1, 12)])
def test_a_group_over_the_budget_is_split(max_tokens, num_parts, step):
    tokens = make_tokens(step, DEFAULT)
    batches = pack(tokens, max_tokens, torch.device("cpu"))
    assert sum(len(batch.num_traces_M) for batch in batches) == num_parts
    assert max(len(batch.tokens_T) for batch in batches) <= max(max_tokens, 16)  # the longest trace with its prompt
    rows = torch.cat([batch.rows_A for batch in batches])
    assert rows.sort().values.tolist() == tokens.counted_A.nonzero().flatten().tolist()


def test_a_group_without_signal_leaves_trace_term_and_normalizer(step):
    tokens = make_tokens(step, DEFAULT)
    lengths = [len(ids) for ids in step.traces.trace_ids[2]]
    all_signal = make_tokens(SimpleNamespace(**vars(step) | {"signal": [True] * 4}), DEFAULT)
    assert all_signal.normalizer - tokens.normalizer == sum(lengths) + 2  # and its two sampled delimiters
    assert all_signal.normalizer == len(tokens.targets_A)


def test_a_group_with_nothing_to_learn_is_not_packed(step):
    objective = replace(DEFAULT, answer_coef=0.0, format_coef=0.0)
    tokens = make_tokens(step, objective)
    (batch,) = pack(tokens, 10_000, torch.device("cpu"))
    groups = torch.bucketize(batch.rows_A, tokens.cu_traces[tokens.cu_groups], right=True) - 1
    assert groups.unique().tolist() == [0, 1, 3]
    silent = SimpleNamespace(**vars(step) | {"signal": [False] * 4})
    assert pack(make_tokens(silent, objective), 10_000, torch.device("cpu")) == []


@pytest.mark.parametrize("max_tokens", [10_000, 25])
def test_a_hidden_state_gets_the_sum_of_its_tokens_rounded_once(max_tokens, step, device):
    """A prompt's last one predicts the first token of every trace. In fp16, 2048 + 1 is 2048."""
    pytest.importorskip("triton", reason="the kernel needs triton")
    most = []
    for batch in pack(make_tokens(step, DEFAULT), max_tokens, torch.device(device)):
        hidden_TD = torch.zeros(len(batch.tokens_T), 4, dtype=torch.float16, device=device, requires_grad=True)
        upstream_A = torch.ones(len(batch.hidden_A), dtype=torch.float16, device=device)
        num_copies_T = batch.cu_copies.diff()
        upstream_A[batch.copies_A[batch.cu_copies[:-1][num_copies_T > 0]]] = 2048
        with ops.use("triton"):
            rows_AD = loss_rows(hidden_TD, batch)
        rows_AD.backward(upstream_A[:, None].expand(-1, 4))
        exact_T = torch.zeros(len(hidden_TD), dtype=torch.float64, device=device)
        exact_T.index_add_(0, batch.hidden_A, upstream_A.double())
        assert torch.equal(hidden_TD.grad, exact_T.half()[:, None].expand(-1, 4))
        most.append(int(num_copies_T.max()))
    assert max(most) > 2


CISPO_CASES = [  # ratio, advantage, loss for log pi = -2
    (1.0, 0.5, 1.0), (1.27, 0.5, 1.27), (1.29, 0.5, 0.0), (0.5, 0.5, 0.8),
    (1.0, -0.5, -1.0), (0.81, -0.5, -0.81), (0.79, -0.5, 0.0), (2.0, -0.5, -1.28), (9.0, 0.0, 0.0),
]  # fmt: skip
PPO_CASES = [  # ratio, advantage, loss, whether it has a gradient
    (1.0, 0.5, -0.5, True), (1.3, 0.5, -0.64, False), (0.5, 0.5, -0.25, True),
    (1.0, -0.5, 0.5, True), (0.5, -0.5, 0.4, False), (2.0, -0.5, 1.0, True),
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "advantage", "expected"), CISPO_CASES)
def test_cispo(ratio, advantage, expected):
    logprob = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    ratio, advantage = torch.tensor([ratio]).double(), torch.tensor([advantage]).double()
    loss = ops.cispo(logprob, ratio, advantage, 0.8, 1.28)
    assert loss.item() == pytest.approx(expected)
    # The ratio is held fixed: what multiplies log pi is also its gradient.
    assert torch.autograd.grad(loss.sum(), logprob)[0].item() == pytest.approx(expected / -2)


@pytest.mark.parametrize(("ratio", "advantage", "expected", "moves"), PPO_CASES)
def test_ppo(ratio, advantage, expected, moves):
    logprob = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    old = logprob.detach() - math.log(ratio)
    loss = ops.ppo(logprob, (logprob - old).exp(), torch.tensor([advantage]).double(), 0.8, 1.28)
    assert loss.item() == pytest.approx(expected)
    gradient = -advantage * ratio if moves else 0.0
    assert torch.autograd.grad(loss.sum(), logprob)[0].item() == pytest.approx(gradient)


def test_gradients_by_finite_differences():
    logprob = torch.linspace(-3, -0.1, 9, dtype=torch.float64, requires_grad=True)
    ratio, advantage = torch.linspace(0.5, 1.7, 9).double(), torch.linspace(1, -1, 9).double()
    old = logprob.detach() - ratio.log()
    losses = {
        "cispo": lambda new: ops.cispo(new, ratio, advantage, 0.8, 1.28),
        "ppo": lambda new: ops.ppo(new, (new - old).exp(), advantage, 0.8, 1.28),
        "reinforce": lambda new: ops.reinforce(new, ratio, advantage, 0.8, 1.28),
        "kl_estimate": lambda new: ops.kl_estimate(new, old),
    }
    for loss in losses.values():
        assert torch.autograd.gradcheck(loss, logprob)


def test_kl_estimate_is_unbiased_and_not_negative():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    estimate = ops.kl_estimate(policy, reference)
    assert (estimate >= 0).all()
    assert (policy.exp() * estimate).sum() == pytest.approx((policy.exp() * (policy - reference)).sum())


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(step, model):
    model = model.clone()
    model.weights.tensors["lm_head.weight"][0, 0] = math.nan
    before = model.weights.flat.clone()
    optimizer = AdamW(model.weights.flat, model.weights.leaves.values(), 0, (0.9, 0.9), 1e-8, 0.1)
    tokens = make_tokens(step, DEFAULT)
    with pytest.raises(UserError, match="the loss is nan: the weights are as before this step"):
        train_step(
            model, optimizer, tokens, pack(tokens, 40, torch.device("cpu")), DEFAULT, 0.1, 1.0, False, None
        )  # fmt: skip
    assert torch.equal(model.weights.flat.view(torch.int32), before.view(torch.int32))
