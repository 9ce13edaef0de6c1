"""The NRT loss in TRL: what ``nrt-fast train`` minimises, on TRL's forward pass, micro-batches and optimiser."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nrt_fast.adapters.trl.fused_head import our_logprob
from nrt_fast.adapters.trl.groups import check_whole_groups
from nrt_fast.adapters.trl.reward import Judged, NRTReward
from nrt_fast.adapters.trl.rollout import RolloutMixin
from nrt_fast.config import Objective
from nrt_fast.config_checks import loss_problems
from nrt_fast.pack import loss_tokens
from nrt_fast.train_step import TRACE_LOSSES
from nrt_fast.types import ANSWER, FORMAT, TRACE, LossTokens, Traces, UserError

REPLACED = (
    "beta", "delta", "entropy_coef", "epsilon", "epsilon_high", "importance_sampling_level", "loss_type",
    "mask_truncated_completions", "multi_objective_aggregation", "off_policy_mask_threshold", "reward_weights",
    "scale_rewards", "top_entropy_quantile", "use_adaptive_entropy", "use_vllm",
)  # fmt: skip
"""Arguments of TRL's own loss, which the objective's fields stand for here."""
KINDS = {"trace": TRACE, "answer": ANSWER, "format": FORMAT}
NO_ANSWER = "has no answer, and the NRT loss is made of answers; valid: text in every row's column answer"


class LossMixin(RolloutMixin):
    """``class Trainer(LossMixin, GRPOTrainer)``: trace, answer and format terms over one normaliser (docs/method.md).

    The trainer's one reward function is an ``NRTReward``, whose objective this is. A row of the forward pass is the
    prompt, the trace, the delimiter and the reference answer; what TRL sampled behind the delimiter has no loss.

    Raises:
        UserError: other reward functions, an argument of TRL's loss, tools, a temperature other than 1, groups over
            several ranks, a row without an answer, or an objective whose loss trains nothing, unlearns answers, or has
            a constant normaliser, a KL or an entropy term.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.nrt_reward = _only_reward(self.reward_funcs)
        _check(self, self.nrt_reward.objective)
        _check_data(self)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        check_whole_groups(self, self.model.training, "the NRT loss")  # of a data set that evaluate() was given
        unanswered = any(row.get("answer", "") is None for row in inputs)  # the reward tells where there is no column
        self._refuse_together(unanswered, f"a row of the batch {NO_ANSWER}")
        batch = super()._generate_and_score_completions(inputs)
        sampled = batch.get("tool_mask", batch["completion_mask"])
        self._refuse_together(
            bool(((sampled == 0) & (batch["completion_mask"] == 1)).any()),
            "env_mask: a completion holds tokens that the policy did not sample, and the NRT loss would train on them; "
            "valid: a rollout without them",
        )
        policy = self.nrt_reward.policy(self)
        tokens = _tokens(policy.judged, self.nrt_reward.objective, policy.engine.delimiter_id)
        normalizer = torch.tensor(tokens.normalizer, device=self.accelerator.device)
        padded = {name: value.to(self.accelerator.device) for name, value in _padded(tokens).items()}
        return batch | padded | {"nrt_normalizer": self.accelerator.gather(normalizer).sum()}

    def _refuse_together(self, found: bool, problem: str) -> None:
        """UserError on every rank where one of them found a problem: the others would wait for it."""
        if self.accelerator.gather(torch.tensor(int(found), device=self.accelerator.device)).any():
            raise UserError(problem)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        ids_BC = inputs["nrt_ids"]
        with our_logprob():
            logprob_BC, entropy_BC, *_ = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], ids_BC], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["nrt_mask"]], dim=1),
                ids_BC.shape[1],
                compute_entropy=True,
            )
        is_training = self.model.training
        steps = self.current_gradient_accumulation_steps if is_training else 1
        window = steps / self.args.steps_per_generation if is_training else 1.0
        normalizer = inputs["nrt_normalizer"] / self.accelerator.num_processes * window
        loss_BC = _token_loss(logprob_BC, inputs, self.nrt_reward.objective) / normalizer
        metrics = self._metrics["train" if is_training else "eval"]
        kind_BC, counted_BC = inputs["nrt_kind"], inputs["nrt_counted"]
        for name, kind in KINDS.items():
            metrics[f"loss/{name}"].append(self._mean(loss_BC[kind_BC == kind].sum() * steps))
        traces = counted_BC & (kind_BC == TRACE)
        metrics["entropy"].append(self._mean((entropy_BC * traces).sum() / traces.sum().clamp(min=1)))
        return loss_BC.sum()

    def _mean(self, value: Tensor) -> float:
        return self.accelerator.gather(value.detach()).mean().item()


def _only_reward(reward_funcs: list) -> NRTReward:
    if len(reward_funcs) != 1 or not isinstance(reward_funcs[0], NRTReward):
        names = ", ".join(getattr(function, "__name__", type(function).__name__) for function in reward_funcs)
        raise UserError(f"the NRT loss is that of one NRTReward; reward_funcs are {names}: leave the loss to TRL "
                        "(RolloutMixin), or take the others out")  # fmt: skip
    return reward_funcs[0]


def _check(trainer: Any, objective: Objective) -> None:
    """UserError for what could have no effect, or would mean something else."""
    for field in fields(trainer.args):
        value = getattr(trainer.args, field.name)
        if field.name in REPLACED and value != field.default:
            raise UserError(f"{field.name} {value!r} cannot take effect: the NRT loss is its objective's; valid: leave "
                            "it out, or NRTReward(dataclasses.replace(PRESETS[...], ...))")  # fmt: skip
    if trainer.temperature != 1.0:
        raise UserError(f"temperature {trainer.temperature}: answers are read at 1, and TRL's forward has one for all; "
                        "valid: 1.0")  # fmt: skip
    if objective.normalizer == "constant" or objective.beta or objective.entropy_coef:
        raise UserError("the objective's normalizer 'constant', beta and entropy_coef are those of nrt-fast train; "
                        "valid here: normalizer 'token' or 'sequence', no beta, no entropy_coef")  # fmt: skip
    for problem in loss_problems(objective):
        raise UserError(problem)
    if getattr(trainer, "tools", None):
        raise UserError("tools: the NRT loss would train on what they return, which the policy did not sample; valid: "
                        "no tools and no environment_factory")  # fmt: skip
    check_whole_groups(trainer, True, "the NRT loss")
    if trainer.eval_dataset is not None:
        check_whole_groups(trainer, False, "the NRT loss")


def _check_data(trainer: Any) -> None:
    """UserError for a row without an answer, where the data set can be looked through before the training."""
    from datasets import Dataset

    given = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    named = {"train_dataset": trainer.train_dataset} | {f"eval_dataset {name}".strip(): d for name, d in given.items()}
    for name, dataset in named.items():
        if isinstance(dataset, Dataset) and "answer" in dataset.column_names:
            for row, answer in enumerate(dataset["answer"]):
                if answer is None:
                    raise UserError(f"row {row} of {name} {NO_ANSWER}")


def _tokens(judged: Judged, objective: Objective, delimiter_id: int) -> LossTokens:
    """The loss tokens of a batch, as ``nrt-fast train`` makes them."""
    traces = judged.traces
    unknown = [[[0.0] * len(ids) for ids in group] for group in traces.trace_ids]  # old log-probs are the trainer's
    rewards = judged.rewards
    return loss_tokens(
        judged.groups.examples, Traces(traces.trace_ids, unknown, traces.delimiter_logprobs),
        judged.scores.logprobs, rewards.advantage, rewards.signal, rewards.answer_weights, objective, delimiter_id,
        temperature=1.0, max_tokens_per_trace=0,
    )  # fmt: skip


def _padded(tokens: LossTokens) -> dict[str, Tensor]:
    """[B, C] in the trainer's order, padded on the right."""
    lens = tokens.cu_traces.diff().tolist()

    def fill(values_A: Tensor) -> Tensor:
        return pad_sequence(values_A.split(lens), batch_first=True)

    return {
        "nrt_ids": fill(tokens.targets_A),
        "nrt_mask": fill(torch.ones_like(tokens.targets_A)),
        "nrt_kind": fill(tokens.kind_A),
        "nrt_weight": fill(tokens.weight_A),
        "nrt_counted": fill(tokens.counted_A),
    }


def _token_loss(logprob_BC: Tensor, inputs: dict[str, Tensor], objective: Objective) -> Tensor:
    """[B, C] loss of each counted token, divided by nothing yet, 0 elsewhere."""
    weight_BC, is_trace_BC = inputs["nrt_weight"], inputs["nrt_kind"] == TRACE
    old_BC = logprob_BC.detach()
    if (sampled_BC := inputs.get("old_per_token_logps")) is not None:  # TRL's, where it trains on a batch repeatedly
        width = min(sampled_BC.shape[1], old_BC.shape[1])
        old_BC = old_BC.clone()
        old_BC[:, :width] = torch.where(is_trace_BC[:, :width], sampled_BC[:, :width], old_BC[:, :width])
    low, high = 1 - objective.epsilon, 1 + objective.epsilon_high
    trace_BC = TRACE_LOSSES[objective.trace_loss](logprob_BC, (logprob_BC - old_BC).exp(), weight_BC, low, high)
    loss_BC = torch.where(is_trace_BC, trace_BC, -weight_BC * logprob_BC)
    return torch.where(inputs["nrt_counted"], loss_BC, 0.0)
