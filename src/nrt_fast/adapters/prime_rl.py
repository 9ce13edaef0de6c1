"""prime-rl's algorithm for the NRT reward and its answer term, and its custom loss for traces; docs/embedding.md."""

from __future__ import annotations

import asyncio
from typing import Any

import verifiers.v1 as vf
from prime_rl.orchestrator.algo.base import iter_trainable_traces
from prime_rl.orchestrator.algo.grpo import GRPOAlgorithm
from torch import Tensor
from verifiers.v1.graph import MessageNode

from nrt_fast.adapters.prompt_logprobs import TraceChoices, delimiter_id, encode_answer, score_trace, trace_objective
from nrt_fast.data.tokenizer import load_tokenizer
from nrt_fast.reference.loss import cispo
from nrt_fast.types import UserError


class NRTAlgorithm(TraceChoices, GRPOAlgorithm):
    """GRPO on traces that end at the delimiter, rewarded by what they do for the task's ``answer``.

    The answer follows its trace in the graph, not sampled, with weights for the loss component ``ce``: 1 for an answer
    token, and ``format_coef`` for the delimiter where the trace did not end with it. A subclass changes the choices.

    Attributes:
        answer_key: field of the task's data, or of the trace's info, that holds the reference answer.
    """

    answer_key: str = "answer"

    async def setup(self) -> None:
        """Load the policy's tokenizer, and check the choices."""
        await super().setup()
        self.objective = trace_objective(self.reward, self.reward_clip)
        self.tokenizer = load_tokenizer(self.policy_pool.model_name)
        self.delimiter_id = delimiter_id(self.tokenizer, self.delimiter)

    async def score_group(self, episodes: list[vf.Episode]) -> None:
        """Reward the traces of one task, all by the weights that serve now; then prime-rl's own advantages.

        Raises:
            UserError: a trace of several turns, or no text for an answer.
        """
        shared: dict[tuple[int, ...], dict] = {}
        traces = [trace for _, trace in iter_trainable_traces(episodes)]
        await asyncio.gather(*(self._score(trace, shared) for trace in traces))
        await super().score_group(episodes)

    async def _score(self, trace: vf.Trace, shared: dict[tuple[int, ...], dict]) -> None:
        where = f"task {trace.task.data.idx}"
        leaf = len(trace.nodes) - 1
        prompt_ids, sampled_ids = _one_turn(trace, where)
        answer = trace.info.get(self.answer_key, getattr(trace.task.data, self.answer_key, None))
        answer_ids = encode_answer(answer, self.tokenizer, where)

        async def ask(ids: list[int]) -> list[float]:
            return (await self.policy_pool.score(ids))[1:]  # the first stands for the first id, which follows nothing

        scored = await score_trace(
            ask, prompt_ids, sampled_ids, answer_ids, delimiter_id=self.delimiter_id, objective=self.objective,
            shared=shared.setdefault((*prompt_ids, -1, *answer_ids), {}), where=where,
        )  # fmt: skip
        trace.rewards["nrt"] = vf.Reward(score=scored.reward)
        trace.metrics |= scored.metrics
        appended = [] if scored.closed else [self.delimiter_id]
        node = MessageNode(
            parent=leaf, message=vf.AssistantMessage(content=answer), token_ids=appended + answer_ids,
            mask=[False] * len(appended + answer_ids),
            loss_weights={"ce": [self.objective.format_coef] * len(appended) + [1.0] * len(answer_ids)},
        )  # fmt: skip
        trace.nodes.append(node)


def _one_turn(trace: vf.Trace, where: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of what was sampled after it."""
    ids = [token for node in trace.nodes for token in node.token_ids]
    mask = [sampled for node in trace.nodes for sampled in node.mask]
    start = mask.index(True)
    if len(trace.branches) != 1 or not all(mask[start:]):
        raise UserError(f"{where}: a trace has several turns; valid: tasks that are answered in one")
    return ids[:start], ids[start:]


def cispo_loss(inputs: Any, epsilon: float = 0.2, epsilon_high: float = 0.28) -> Any:
    """CISPO as ``nrt-fast train`` has it: tokens whose ratio left the range on the side A pushes to have no loss.

    Args:
        inputs: prime-rl's LossInputs, tensors [T] of one sequence; the loss is differentiable in trainer_logprobs.
        epsilon, epsilon_high: lower and upper clip of the ratio of trainer to sampler.

    Returns:
        prime-rl's LossOutputs: the sum over the sequence, which prime-rl divides by all tokens of the step.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    logprob_A, advantage_A = inputs.trainer_logprobs[inputs.loss_mask], inputs.advantages[inputs.loss_mask]
    ratio_A = (logprob_A - inputs.inference_logprobs[inputs.loss_mask]).exp()
    low, high = 1 - epsilon, 1 + epsilon_high
    loss_A: Tensor = cispo(logprob_A, ratio_A, advantage_A, low, high)
    if inputs.loss_weights is not None:
        loss_A = loss_A * inputs.loss_weights[inputs.loss_mask]
    outside_A = ((ratio_A < low) | (ratio_A > high)).float()
    return LossOutputs(loss=loss_A.sum(), metrics={"is_masked": outside_A.sum() / outside_A.numel()})
