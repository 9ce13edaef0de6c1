"""OpenRLHF's agent executor that scores the traces it samples; docs/embedding.md."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor

from nrt_fast.adapters.prompt_logprobs import (
    TraceChoices,
    delimiter_id,
    encode_answer,
    in_flight,
    score_trace,
    trace_objective,
)
from nrt_fast.types import UserError


class AgentExecutor(TraceChoices, SingleTurnAgentExecutor):
    """Samples one trace, up to the delimiter, and asks the engine what it does for the label, the reference answer.

    A subclass in a file of its own changes the choices.
    """

    def __init__(self):
        super().__init__()
        self.objective = trace_objective(self.reward, self.reward_clip)
        self._delimiter_id: int | None = None

    async def execute(
        self, prompt: str, label: str, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """OpenRLHF's output with ``reward`` set, and ``scores`` 1 where the trace made the answer likelier, else 0.

        Raises:
            UserError: images, a delimiter of several tokens, an answer that is no text, or no room for a trace.
        """
        where = f"prompt {prompt[:40]!r}"
        if images:
            raise UserError(f"{where}: it holds images, and the answer would be scored without them")
        if self._delimiter_id is None:  # every call brings its own copy of the tokenizer
            self._delimiter_id = delimiter_id(hf_tokenizer, self.delimiter)
        answer_ids = encode_answer(label, hf_tokenizer, where)
        prompt_ids = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        params = self._trace_params(sampling_params, max_length - len(prompt_ids) - len(answer_ids), where)

        async def ask(ids: list[int]) -> list[float]:
            # A new object: vLLM decides when it is made whether the prefix cache may be read.
            scoring = type(sampling_params)(max_tokens=1, temperature=1.0, prompt_logprobs=0)
            output = await llm_engine.generate(ids, scoring)
            told = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            return [candidates[token].logprob for token, candidates in told]

        with in_flight(("openrlhf", prompt, label)) as shared:
            output = await super().execute(prompt, label, params, max_length, hf_tokenizer, llm_engine)
            ((start, end),) = output["action_ranges"]
            ids = output["observation_tokens"]
            scored = await score_trace(
                ask, ids[:start], ids[start:end], answer_ids, delimiter_id=self._delimiter_id, objective=self.objective,
                shared=shared, where=where,
            )  # fmt: skip
        return output | {"reward": scored.reward, "scores": float(scored.gain > 0), "extra_logs": scored.metrics}

    def _trace_params(self, sampling_params: Any, room: int, where: str) -> Any:
        """The trainer's parameters, with a stop at the delimiter and room for what the scoring request adds."""
        room -= 2  # the delimiter, and the one id that the engine samples after the answer
        if room < 1:
            raise UserError(f"{where}: with its answer it leaves no room for a trace; valid: a longer --data.max_len")
        params = deepcopy(sampling_params)
        params.stop_token_ids = [*(params.stop_token_ids or []), self._delimiter_id]
        params.max_tokens = min(params.max_tokens or room, room)
        return params
