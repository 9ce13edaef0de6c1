"""verl's agent loop "nrt", which scores the traces it samples, and the policy loss "nrt"; docs/embedding.md."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from nrt_fast.adapters.prompt_logprobs import delimiter_id, encode_answer, in_flight, score_trace, trace_objective
from nrt_fast.config import Reward, RewardClip
from nrt_fast.data.tokenizer import END_OF_THINKING
from nrt_fast.reference.loss import cispo
from nrt_fast.types import UserError

SCORING = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
"""A server always samples something; 0 more candidates than the prompt's own ids."""


@register("nrt")
class NRTAgentLoop(SingleTurnAgentLoop):
    """Samples one trace, up to the delimiter, and asks the server what it does for ``reward_model.ground_truth``.

    Args:
        delimiter: the one token that ends a trace.
        reward: logp, prob, am, gm, ws_inv or ws_log.
        reward_clip: zero, unit or none.

    Raises:
        UserError: a delimiter of several tokens, a reward that needs a group, a prompt with images or sound, or a
            client of the server that drops log-probabilities.
    """

    def __init__(
        self, *args, delimiter: str = END_OF_THINKING, reward: Reward = "ws_log", reward_clip: RewardClip = "zero",
        **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.delimiter_id = delimiter_id(self.tokenizer, delimiter)
        self.objective = trace_objective(reward, reward_clip)

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> AgentLoopOutput:
        """verl's output with ``reward_score`` set, so that no reward worker is asked."""
        uid = kwargs.get("uid", uuid4().hex)
        answer_ids = encode_answer(kwargs["reward_model"]["ground_truth"], self.tokenizer, f"prompt {uid}")
        with in_flight(("verl", uid)) as shared:
            output = await super().run(sampling_params | {"stop_token_ids": [self.delimiter_id]}, **kwargs)
            if output.multi_modal_data:
                raise UserError(f"prompt {uid}: it holds images or sound, and the answer would be scored without them")
            sampled = [token for token, mask in zip(output.response_ids, output.response_mask, strict=True) if mask]
            scored = await score_trace(
                self._prompt_logprobs, output.prompt_ids, sampled, answer_ids, delimiter_id=self.delimiter_id,
                objective=self.objective, shared=shared, where=f"prompt {uid}",
            )  # fmt: skip
        output.reward_score = scored.reward
        output.extra_fields["reward_extra_info"] = scored.metrics
        return output

    async def _prompt_logprobs(self, ids: list[int]) -> list[float]:
        output = await self.server_manager.generate(uuid4().hex, prompt_ids=ids, sampling_params=dict(SCORING))
        if "prompt_logprobs" not in output.extra_fields:
            client = type(self.server_manager).__name__
            raise UserError(f"{client} gave no prompt_logprobs; valid: trainer.v1.trainer_mode=sync, whose client does")
        *logprobs, _ = output.extra_fields["prompt_logprobs"]  # the last one fills up the length
        return [own for (own,) in logprobs]


@register_policy_loss("nrt")
def policy_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None, **kwargs,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """CISPO as ``nrt-fast train`` has it: tokens whose ratio left the range on the side A pushes to have no loss.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [B, T]; the loss is differentiable in log_prob.
        loss_agg_mode: verl's normaliser.
        config: verl's ActorConfig; its clip_ratio_low and clip_ratio_high are epsilon and epsilon_high.
        rollout_is_weights: [B, T], verl's correction of the sampler, or None.

    Returns:
        (loss, metrics).
    """
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    ratio = (log_prob - old_log_prob).exp()
    loss = cispo(log_prob, ratio, advantages, low, high)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights
    outside = ((ratio < low) | (ratio > high)) & response_mask.bool()
    return (
        agg_loss(loss, response_mask, loss_agg_mode, **config.global_batch_info),
        {"actor/pg_clipfrac": float(outside.sum() / response_mask.sum().clamp(min=1))},
    )
