"""The TRL adapter: a naive forward beside stand-ins with TRL's signatures, and real trainings where TRL is there."""

import inspect
import types
from dataclasses import replace

import peft
import pytest
import torch
from rewards_oracle import reference_group, reference_shaped
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl_stand_in import DELIMITER, EOS, TrainerStandIn, naive_logprobs, word_tokenizer

from nrt_fast import UserError
from nrt_fast.adapters.trl import LossMixin, NRTReward, RolloutMixin, nrt_reward
from nrt_fast.adapters.trl.fused_head import FusedLogProb
from nrt_fast.config import PRESETS
from nrt_fast.optim import AdamW
from nrt_fast.pack import pack
from nrt_fast.starter import MODEL_DIR, tasks
from nrt_fast.train_step import train_step

ANSWERS = ["w9 w11 w4", "w30"]
PROMPTS = ["w5 w9 w11 w20 w7", "w13"]
COMPLETIONS = [
    [[8, 25, 6, DELIMITER, 9, 11, 4, EOS], [10, 31, 32, 33, 9, 22, EOS], [DELIMITER, 9]],
    [[14], [44, 14, 60, 61, DELIMITER], [50, EOS]],
]
MAX_ERROR = 1e-5


class StandIn(TrainerStandIn):
    """The stand-in, with prompts and completions."""

    def call(self, reward, **columns):
        """TRL's call of a reward function, a row for each completion."""
        rows = [(p, ids) for p, group in enumerate(COMPLETIONS) for ids in group]
        ids = [ids for _, ids in rows]
        columns = columns or {"answer": [ANSWERS[p] for p, _ in rows]}
        return reward(
            prompts=[PROMPTS[p] for p, _ in rows], completions=self.processing_class.batch_decode(ids),
            completion_ids=ids, trainer_state=self.state, log_extra=self._log_completion_extra,
            log_metric=self._log_metric, **columns,
        )  # fmt: skip


def naive_rewards(module, prompt, completions, answer, objective, delimiter=DELIMITER, baseline_module=None):
    """A group's rewards as the method has them, in scalars."""
    cut = [ids[: ids.index(delimiter)] if delimiter in ids else ids for ids in completions]
    logc = [naive_logprobs(module, [*prompt, *ids, delimiter], answer) for ids in cut]
    logb = naive_logprobs(baseline_module or module, [*prompt, delimiter], answer)
    raw, _ = reference_group(logc, logb, objective.reward, objective.reward_scale)
    ((base,), _) = reference_group([logb], logb, objective.reward, objective.reward_scale)
    share = objective.format_coef if objective.format_term == "reward" else 0.0
    closed = [delimiter in ids for ids in completions]
    return reference_shaped(raw, base, closed, objective.reward_clip, objective.drop_cut_reward, share)


def expected_rewards(stand_in, objective, **options):
    ids = stand_in.processing_class
    return [
        value
        for prompt, completions, answer in zip(PROMPTS, COMPLETIONS, ANSWERS, strict=True)
        for value in naive_rewards(
            stand_in.model, ids(prompt)["input_ids"], completions, [*ids(answer)["input_ids"], EOS], objective,
            **options,
        )
    ]  # fmt: skip


def error(call, *args, **kwargs):
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


def bytes_of(pages, config):
    """A cache of so many pages on a CPU, in fp32, and its scratch page."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 32 * 4 * (pages + 1)


def in_training(module):
    """As a trainer has it: dropout on, activations recomputed."""
    module.config.use_cache = False
    module.gradient_checkpointing_enable()
    return module.train()


FAMILIES = {
    "llama": ("llama", {"attention_dropout": 0.5}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_a_naive_forward(family, make_module):
    model_type, config = FAMILIES[family]
    module = in_training(make_module(model_type, **config))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    stand_in = StandIn(module)
    rewards = stand_in.call(nrt_reward)
    assert rewards == pytest.approx(expected_rewards(stand_in, PRESETS["nrt-ws"]), abs=MAX_ERROR)
    assert max(rewards) > 0 and module.training and module.is_gradient_checkpointing
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "sft"])
def test_every_preset_is_a_reward(preset, make_module):
    stand_in = StandIn(make_module())
    expected = expected_rewards(stand_in, PRESETS[preset])
    assert stand_in.call(NRTReward(preset)) == pytest.approx(expected, abs=MAX_ERROR, rel=MAX_ERROR)


def test_the_live_weights_are_scored(make_module):
    stand_in, reward = StandIn(make_module()), NRTReward("nrt-gm")
    before = stand_in.call(reward)
    with torch.no_grad():
        stand_in.model.model.layers[0].mlp.down_proj.weight.mul_(3)
    after = stand_in.call(reward)
    assert after != pytest.approx(before, abs=1e-3)
    assert after == pytest.approx(expected_rewards(stand_in, PRESETS["nrt-gm"]), abs=MAX_ERROR)


def test_a_frozen_baseline_keeps_the_first_weights(make_module):
    stand_in, first, reward = StandIn(make_module()), make_module(), NRTReward("rlpr")
    stand_in.call(reward)
    with torch.no_grad():
        stand_in.model.model.layers[0].mlp.down_proj.weight.mul_(3)
    expected = expected_rewards(stand_in, PRESETS["rlpr"], baseline_module=first)
    assert stand_in.call(reward) == pytest.approx(expected, abs=MAX_ERROR)
    live = StandIn(stand_in.model)
    live.call(NRTReward("nrt-am"))
    for name in ("nrt/gain", "nrt/logp_no_trace"):
        assert stand_in.metrics[name] == pytest.approx(live.metrics[name], abs=MAX_ERROR), "of the live weights"
    assert "step 5" in error(StandIn(make_module(), global_step=5).call, NRTReward("rlpr"))


def test_a_frozen_baseline_keeps_an_adapter_that_was_trained_before(make_module):
    def adapted(module, **options):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
        return peft.get_peft_model(module, config)

    def train_on(stand_in):
        with torch.no_grad():
            for name, tensor in stand_in.model.named_parameters():
                if "lora_B" in name:
                    tensor += 0.1

    stand_in, first = (StandIn(adapted(make_module(), init_lora_weights=False)) for _ in range(2))
    reward = NRTReward("rlpr")
    stand_in.call(reward)
    train_on(stand_in)
    expected = expected_rewards(stand_in, PRESETS["rlpr"], baseline_module=first.model)
    assert stand_in.call(reward) == pytest.approx(expected, abs=MAX_ERROR)
    with first.model.disable_adapter():
        other = expected_rewards(stand_in, PRESETS["rlpr"], baseline_module=first.model)
    assert expected != pytest.approx(other, abs=1e-3)

    resumed, reward = StandIn(adapted(make_module())), NRTReward("rlpr")
    reward.policy(resumed)
    train_on(resumed)
    resumed.state.global_step = 5
    assert "valid: reward.policy(trainer) before" in error(resumed.call, NRTReward("rlpr"))
    expected = expected_rewards(resumed, PRESETS["rlpr"], baseline_module=make_module())
    assert resumed.call(reward) == pytest.approx(expected, abs=MAX_ERROR)


def test_a_group_that_the_cache_does_not_hold_is_scored_in_parts(make_module):
    stand_in = StandIn(make_module())
    expected = stand_in.call(NRTReward("r3"))
    for pages in (5, 4, 3):  # prompt and empty trace take one each, as do the traces
        reward = NRTReward("r3", max_cache_bytes=bytes_of(pages, stand_in.model.config))
        assert stand_in.call(reward) == expected
        assert reward.policy(stand_in).engine.cache.num_pages == pages
    message = error(stand_in.call, NRTReward(max_cache_bytes=bytes_of(2, stand_in.model.config)))
    assert "row 0 of the batch" in message and "the cache has 2; valid: more max_cache_bytes" in message


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"lora_dropout": 0.5}],
    ids=["all", "rslora", "two projections", "dropout"],
)
def test_peft_models_are_scored_with_their_adapter(options, make_module):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False} | options
    module = peft.get_peft_model(in_training(make_module()), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    stand_in = StandIn(module)
    rewards = stand_in.call(NRTReward("nrt-gm"))
    assert rewards == pytest.approx(expected_rewards(stand_in, PRESETS["nrt-gm"]), abs=MAX_ERROR)
    with module.disable_adapter():
        assert rewards != pytest.approx(expected_rewards(stand_in, PRESETS["nrt-gm"]), abs=1e-3)


def test_an_adapter_in_another_dtype_is_rounded_to_the_models(make_module):
    module = make_module().to(torch.bfloat16)
    module = peft.get_peft_model(
        module, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    )
    assert {p.dtype for name, p in module.named_parameters() if "lora_" in name} == {torch.float32}
    reward = NRTReward("nrt-gm")
    assert StandIn(module).call(reward) == pytest.approx(expected_rewards(StandIn(module), reward.objective), abs=0.05)


def test_adapters_that_are_not_plain_lora(make_module):
    module = peft.get_peft_model(make_module(), peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True))
    assert "use_dora True is not supported" in error(StandIn(module).call, NRTReward())


def test_rows_without_an_answer_are_left_to_other_rewards(make_module):
    stand_in = StandIn(make_module())
    expected = expected_rewards(stand_in, PRESETS["nrt-ws"])
    rewards = stand_in.call(NRTReward(), answer=[*[None] * 3, *[ANSWERS[1]] * 3])
    assert rewards[:3] == [None] * 3 and rewards[3:] == pytest.approx(expected[3:], abs=MAX_ERROR)
    assert stand_in.call(NRTReward(), answer=[None] * 6) == [None] * 6


def test_what_is_measured_reaches_the_log(make_module):
    stand_in = StandIn(make_module())
    rewards = stand_in.call(NRTReward())
    assert stand_in.metrics["nrt/delimiter_rate"] == pytest.approx(3 / 6)
    assert stand_in.metrics["nrt/frac_clipped"] == pytest.approx(sum(value == 0 for value in rewards) / 6)
    means = [sum(row) / len(row) for p in range(2) for row in (
        naive_logprobs(stand_in.model, [*stand_in._tokenize_prompts(PROMPTS)[0][p], *ids, DELIMITER],
                       [*stand_in.processing_class(ANSWERS[p])["input_ids"], EOS])
        for ids in (ids[: ids.index(DELIMITER)] if DELIMITER in ids else ids for ids in COMPLETIONS[p])
    )]  # fmt: skip
    assert stand_in.columns["answer_logp"] == pytest.approx(means, abs=MAX_ERROR)


def test_the_delimiter_is_one_that_the_vocabulary_has(make_module):
    module = make_module()
    reserved = StandIn(module, word_tokenizer("<|reserved_special_token_0|>"))
    assert reserved.call(NRTReward()) == pytest.approx(expected_rewards(reserved, PRESETS["nrt-ws"]), abs=MAX_ERROR)
    none = StandIn(module, word_tokenizer("###"))
    assert "for example ###" in error(none.call, NRTReward())
    assert len(none.processing_class) == 67
    assert none.call(NRTReward(delimiter="###")) == reserved.call(NRTReward())
    assert "is 2 tokens" in error(none.call, NRTReward(delimiter="w5 w6"))


def test_trainers_that_cannot_be(make_module):
    stand_in = StandIn(make_module())
    assert "column answer" in error(stand_in.call, NRTReward(), solution=["w9"] * 6)
    assert "holds list" in error(stand_in.call, NRTReward(), answer=[["w9"]] * 6)
    assert "valid: nrt-ws" in error(NRTReward, "sft") and "no reward" in error(NRTReward, "nrt")
    assert "valid: current" in error(NRTReward, replace(PRESETS["nrt-ws"], baseline="ema"))
    assert "bind" in error(NRTReward(), prompts=[], completions=[], completion_ids=[], answer=[])
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=67, n_embd=8, n_layer=1, n_head=1))
    assert "'gpt2' is not supported; valid: llama, mistral" in error(StandIn(gpt2).call, NRTReward())
    sharded = make_module()
    sharded.model.norm.weight.data = torch.empty(0)  # as ZeRO-3 leaves a parameter
    assert "model.norm.weight is Tensor [0], a whole tensor [32]" in error(StandIn(sharded).call, NRTReward())
    assert "torch.float16" in error(StandIn(make_module().half()).call, NRTReward())


def test_r3_needs_whole_groups_on_each_rank(make_module):
    stand_in = StandIn(make_module().train())
    stand_in.accelerator.num_processes = 2
    stand_in.call(NRTReward("r3"))
    stand_in.args.per_device_train_batch_size, stand_in.args.steps_per_generation = 4, 2
    message = error(stand_in.call, NRTReward("r3"))
    assert "the reward r3" in message and "each of 2 ranks gets 8 rows" in message and "groups of 3" in message
    stand_in.call(NRTReward("nrt-gm"))
    stand_in.model.eval()
    stand_in.call(NRTReward("r3"))
    stand_in.num_generations_eval = 4
    assert "a multiple of num_generations_eval" in error(stand_in.call, NRTReward("r3"))


def test_a_rollout_needs_the_answers_of_its_prompts(make_module):
    stand_in = StandIn(make_module())
    assert "RolloutMixin" in error(NRTReward().rollout, PROMPTS, stand_in)
    stand_in.top_p = 0.9
    assert "top_p 0.9 cannot take effect" in error(NRTReward().rollout, PROMPTS, stand_in)


@pytest.mark.parametrize("entropy", ["no", "one factor", "factors"])
def test_the_fused_head_has_the_gradients_of_autograd(entropy):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (9, 40))
    target = torch.randint(40, (9,), generator=generator)
    upstream = torch.randn(9, generator=generator)
    upstream[2] = 0
    factors = {"no": 0.0, "one factor": 0.3, "factors": torch.linspace(-1, 1, 9)}[entropy]

    def gradients(logprob, entropies):
        return torch.autograd.grad((upstream * logprob + factors * entropies).sum(), (hidden, weight))

    logprobs = ((hidden @ weight.T) * 1.5 / 0.7).log_softmax(-1)
    expected = gradients(logprobs.gather(1, target[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1))
    ours = FusedLogProb(None).apply(hidden, weight, None, target, 0.7, 8, None, 1.5, ("log_probs", "entropy"))
    torch.testing.assert_close(ours[0], logprobs.gather(1, target[:, None])[:, 0], rtol=0, atol=MAX_ERROR)
    for got, wanted in zip(gradients(*ours[:2]), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=MAX_ERROR, atol=MAX_ERROR)


def test_the_fused_head_leaves_fp16_to_trl():
    theirs = types.SimpleNamespace(apply=lambda *args: args)
    args = torch.randn(4, 16), torch.randn(40, 16), None, torch.arange(4), 1.0, 8, None, 1.0, ("log_probs", "entropy")
    half = (args[0].half(), args[1].half(), *args[2:])
    assert FusedLogProb(theirs).apply(*half) == half
    with torch.autocast("cpu", dtype=torch.float16):
        assert FusedLogProb(theirs).apply(*args) == args
    assert FusedLogProb(theirs).apply(*args)[0].dtype == torch.float32


# In real trainings

ROWS = tasks.rows("train", 4, seed=0)


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="trl is not installed; pip install nrt-fast[trl] has it")


@pytest.fixture
def train(trl, tmp_path):
    """``train(reward, mixin, **arguments)``: a trainer after two steps on the starter, bound where TRL is old."""
    from datasets import Dataset

    def run(reward, mixin=None, trainer_options=None, answers=None, **arguments):
        config = trl.GRPOConfig(**{
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "learning_rate": 1e-3,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 2,
            "max_completion_length": 16, "temperature": 1.0, "report_to": "none", "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3,
        } | arguments)  # fmt: skip
        questions = [[{"role": "user", "content": row["question"]}] for row in ROWS]
        dataset = Dataset.from_dict({"prompt": questions, "answer": answers or [row["answer"] for row in ROWS]})
        base = trl.GRPOTrainer if mixin is None else type("Trainer", (mixin, trl.GRPOTrainer), {})
        module = AutoModelForCausalLM.from_pretrained(MODEL_DIR).float()
        trainer = base(
            model=module, reward_funcs=[reward], args=config, train_dataset=dataset,
            processing_class=PreTrainedTokenizerFast.from_pretrained(MODEL_DIR), **(trainer_options or {}),
        )  # fmt: skip
        reward.bind(trainer)
        trainer.train()
        return trainer

    return run


class Audited(NRTReward):
    """Holds every reward against a naive forward of the trainer's module as it is then, and keeps what it saw."""

    def __call__(self, prompts, completions, completion_ids, **columns):
        rewards = super().__call__(prompts, completions, completion_ids, **columns)
        policy, module = self.policy(self._bound), self._bound.accelerator.unwrap_model(self._bound.model)
        groups = policy.judged.groups
        for example, rows in zip(groups.examples, groups.rows, strict=True):
            expected = naive_rewards(
                module, example.prompt_ids, [completion_ids[row] for row in rows], example.answer_ids, self.objective,
                delimiter=policy.engine.delimiter_id,
            )  # fmt: skip
            assert [rewards[row] for row in rows] == pytest.approx(expected, abs=MAX_ERROR)
        self.seen = [*getattr(self, "seen", []), (policy.judged, completion_ids, columns, rewards)]
        self.before = policy.engine.model.clone() if policy.engine.model.adapter is None else None
        return rewards


def needs_rollout_func(trl):
    if not hasattr(trl.GRPOTrainer, "_tokenize_prompts"):
        pytest.skip(f"TRL {trl.__version__} hears of rollout_func only with vLLM, or not at all; 1.0 does")


def test_the_reward_trains(train):
    reward = Audited()
    trainer = train(reward)
    means = [row["rewards/nrt_reward/mean"] for row in trainer.state.log_history if "reward" in row]
    assert means == pytest.approx([sum(rewards) / 8 for *_, rewards in reward.seen], abs=MAX_ERROR)
    (_, first, *_), (_, second, *_) = reward.seen
    assert first != second and max(means) > 0
    for judged, *_ in reward.seen:
        assert [len(rows) for rows in judged.groups.rows] == [4, 4]
    if hasattr(trainer, "_log_metric"):
        gains = [row["nrt/gain"] for row in trainer.state.log_history if "reward" in row]
        seen = [
            torch.cat([c - b for group, b in zip(j.scores.logprobs, j.scores.baseline_logprobs) for c in group]).mean()
            for j, *_ in reward.seen
        ]
        assert gains == pytest.approx([float(gain) for gain in seen], abs=MAX_ERROR)


def test_the_reward_trains_an_adapter_with_recomputation(train):
    reward = Audited("nrt-gm")
    trainer = train(
        reward, gradient_checkpointing=True,
        trainer_options={"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")},
    )  # fmt: skip
    adapter = reward.policy(trainer).engine.model.adapter
    assert len(reward.seen) == 2 and any(b.abs().max() > 0 for name, b in adapter.tensors.items() if "lora_B" in name)


def test_our_engine_samples_for_trl(trl, train):
    needs_rollout_func(trl)
    reward = Audited()
    trainer = train(reward, RolloutMixin, {"rollout_func": reward.rollout})
    delimiter, module = reward.policy(trainer).engine.delimiter_id, trainer.model
    judged, completions, columns, _ = reward.seen[-1]
    assert len(reward.seen) == 2 and set(map(len, columns["answer_logprobs"])) == {
        len(a) for a in judged.groups.answers
    }
    assert all(delimiter not in ids[:-1] and len(ids) <= 16 for ids in completions)
    assert reward.seen[0][1] != completions
    assert module.training
    again = Audited()
    train(again, RolloutMixin, {"rollout_func": again.rollout})
    assert again.seen[-1][1] == completions, "the same seeds, the same traces"


def test_our_engine_samples_groups_that_its_cache_does_not_hold(trl, train):
    needs_rollout_func(trl)
    reward = Audited(max_cache_bytes=1)
    message = error(train, reward, RolloutMixin, {"rollout_func": reward.rollout})
    assert "row 0 of the batch" in message and "valid: more max_cache_bytes" in message
    reward = Audited(max_cache_bytes=bytes_of(6, AutoConfig.from_pretrained(MODEL_DIR)))
    trainer = train(reward, RolloutMixin, {"rollout_func": reward.rollout})
    assert reward.policy(trainer).engine.cache.num_pages == 6
    assert [len(rows) for judged, *_ in reward.seen for rows in judged.groups.rows] == [4] * 4


class Kept(RolloutMixin):
    """Keeps what TRL got from the rollout."""

    def _generate_and_score_completions(self, inputs):
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch


def test_a_rollouts_log_probabilities_are_those_of_the_policy(trl, train):
    needs_rollout_func(trl)
    reward = Audited()
    trainer = train(reward, Kept, {"rollout_func": reward.rollout}, max_steps=1, learning_rate=0.0)
    batch = trainer.batch
    for row, ids in enumerate(reward.seen[0][1]):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        expected = naive_logprobs(trainer.model, prompt, ids)
        assert batch["sampling_per_token_logps"][row, : len(ids)].tolist() == pytest.approx(expected, abs=MAX_ERROR)


@pytest.mark.parametrize("preset", ["nrt-ws", "nrt-derived", "jepo", "rlpr"])
def test_the_loss_is_that_of_our_own_loop(preset, trl, train):
    needs_rollout_func(trl)
    reward = Audited(replace(PRESETS[preset], std_floor=0.0))
    trainer = train(
        reward, LossMixin, {"rollout_func": reward.rollout}, max_steps=1, learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", optim="sgd",
    )  # fmt: skip
    judged, objective, before = reward.seen[0][0], reward.objective, reward.before
    tokens = loss_module()._tokens(judged, objective, reward.policy(trainer).engine.delimiter_id)
    optimizer = AdamW(before.weights.flat, before.weights.leaves.values(), 0, (0.9, 0.95), 1e-8, 0.0)
    optimizer.zero_grad()
    kept = types.SimpleNamespace(gradient=optimizer.gradient, step=lambda lr, max_grad_norm: 0.0)
    stats = train_step(before, kept, tokens, pack(tokens, 4096, torch.device("cpu")), objective, 0.0, 1.0, True, None)
    assert optimizer.grad.abs().max() > 1e-3
    for name, parameter in trainer.model.named_parameters():
        start = before.weights.tensors[name].storage_offset()
        expected = optimizer.grad[start : start + parameter.numel()].view_as(parameter)
        torch.testing.assert_close(before.weights.tensors[name].detach() - parameter, expected, rtol=0, atol=MAX_ERROR)
    (row,) = (row for row in trainer.state.log_history if "reward" in row)
    for term in ("trace", "answer", "format"):
        assert row[f"loss/{term}"] == pytest.approx(stats.loss[term], abs=MAX_ERROR)


def loss_module():
    from nrt_fast.adapters.trl import loss

    return loss


def test_the_loss_runs_on_our_head_where_trl_has_a_place_for_it(trl, train, monkeypatch):
    needs_rollout_func(trl)
    from trl.trainer import grpo_trainer, utils

    if not hasattr(grpo_trainer, "add_fused_lm_head"):
        pytest.skip(f"TRL {trl.__version__} makes logits; the fused head came with 1.15")
    calls, apply = [], FusedLogProb.apply
    monkeypatch.setattr(FusedLogProb, "apply", lambda *args: calls.append(args[9]) or apply(*args))
    theirs = utils._ChunkedLogProbFunction
    train(Audited(), LossMixin)
    assert calls == [("log_probs", "entropy")] * 4 and utils._ChunkedLogProbFunction is theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type 'grpo' cannot take effect"),
        ({"temperature": 0.7}, "temperature 0.7"),
        ({"beta": 0.1}, "beta 0.1 cannot take effect"),
    ],
)
def test_arguments_of_trls_loss_are_refused(arguments, message, trl, train):
    needs_rollout_func(trl)
    assert message in error(train, NRTReward(), LossMixin, **arguments)
    assert "normalizer 'constant'" in error(train, NRTReward("nrt-release"), LossMixin)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_weight": "reward", "reward": "r3"}, "answer_weight reward unlearns answers"),
        ({"answer_weight": "reward", "reward": "logp"}, "answer_weight reward unlearns answers"),
        ({"trace_loss": "none", "answer_coef": 0.0}, "neither answers nor traces train"),
    ],
)
def test_objectives_whose_loss_means_nothing_are_refused(changes, message, trl, train):
    needs_rollout_func(trl)
    assert message in error(train, NRTReward(replace(PRESETS["nrt-ws"], **changes)), LossMixin)


def test_the_loss_needs_whole_groups_and_sampled_tokens(trl, train):
    needs_rollout_func(trl)
    reward = NRTReward()

    def rollout(prompts, trainer):
        sampled = reward.rollout(prompts, trainer)
        return sampled | {"env_mask": [[0] + [1] * (len(ids) - 1) for ids in sampled["completion_ids"]]}

    assert "env_mask" in error(train, reward, LossMixin, {"rollout_func": rollout})
    trainer = train(NRTReward(), LossMixin, max_steps=1)
    check, objective = loss_module()._check, PRESETS["nrt-ws"]
    trainer.tools = [len]
    assert "tools" in error(check, trainer, objective)
    trainer.tools = []
    trainer.accelerator = types.SimpleNamespace(num_processes=2)
    check(trainer, objective)
    trainer.args.per_device_train_batch_size, trainer.args.steps_per_generation = 1, 2
    assert "each of 2 ranks gets 2 rows" in error(check, trainer, objective)
    trainer.args.steps_per_generation, trainer.eval_dataset = 4, trainer.train_dataset
    check(trainer, objective)
    trainer.args.per_device_eval_batch_size = 2
    assert "(per_device_eval_batch_size) of groups of 4" in error(check, trainer, objective)
    trainer.model.eval()
    assert "(per_device_eval_batch_size) of groups of 4" in error(trainer._generate_and_score_completions, [])


def test_the_loss_needs_an_answer_in_every_row(trl, train):
    needs_rollout_func(trl)
    answers = [row["answer"] for row in ROWS]
    message = error(train, NRTReward(), LossMixin, answers=[*answers[:2], None, answers[3]])
    assert "row 2 of train_dataset has no answer" in message
    trainer = train(NRTReward(), LossMixin, max_steps=1)
    trainer.eval_dataset = {"one": trainer.train_dataset.map(lambda row, index: {"answer": None}, with_indices=True)}
    assert "row 0 of eval_dataset one" in error(loss_module()._check_data, trainer)
    rows = [trainer.train_dataset[0] | {"answer": answer} for answer in ("w", None)]
    assert "a row of the batch has no answer" in error(trainer._generate_and_score_completions, rows)
    trainer.accelerator.gather = lambda found: torch.tensor([found, 1])  # another rank has such a row
    assert "a row of the batch has no answer" in error(trainer._generate_and_score_completions, rows[:1])


def test_signatures_are_those_that_are_relied_on(trl):
    parameters = inspect.signature(trl.GRPOTrainer._compute_loss).parameters
    assert list(parameters) == ["self", "model", "inputs"]
    needs_rollout_func(trl)
    assert "rollout_func" in inspect.signature(trl.GRPOTrainer.__init__).parameters
