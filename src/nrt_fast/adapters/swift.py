"""ms-swift's reward function "nrt", and the callback "nrt" that hands it the live policy; docs/embedding.md."""

from __future__ import annotations

from copy import copy
from itertools import chain
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from swift.rewards import ORM, orms

from nrt_fast import rewards
from nrt_fast.adapters.completions import as_traces
from nrt_fast.adapters.live import live_model, score_in_parts
from nrt_fast.adapters.prompt_logprobs import TraceChoices, delimiter_id, encode_answer, trace_objective
from nrt_fast.engine import MAX_CACHE_BYTES, Engine
from nrt_fast.types import UserError


class NRTCallback(TrainerCallback):
    """``--callbacks nrt``: the one place where ms-swift shows a plugin its trainer; reward functions are made later."""

    trainer: Any = None

    def __init__(self, args: Any, trainer: Any):
        super().__init__(args, trainer)
        NRTCallback.trainer = trainer


class NRT(TraceChoices, ORM):
    """R of every completion for the reference in the column ``solution``, by the weights that are being trained.

    The trace is what stands before a completion's first delimiter. Prompts are run once, and weights are read where
    they are. A subclass, put into ``orms`` in its place, changes the choices.

    Attributes:
        max_cache_bytes: keys and values; what does not fit is scored in several passes, with the same result.
    """

    max_cache_bytes: int = MAX_CACHE_BYTES

    def __init__(self, args: Any = None, **kwargs):
        super().__init__(args, **kwargs)
        if NRTCallback.trainer is None:
            raise UserError("the reward nrt needs the live policy; valid: --callbacks nrt")
        self.trainer = NRTCallback.trainer
        self.objective = trace_objective(self.reward, self.reward_clip)
        self._engine: Engine | None = None

    def __call__(
        self, completions: list[str], *, messages: list[list[dict]], solution: list[str],
        response_token_ids: list[list], **kwargs,
    ) -> list[float]:  # fmt: skip
        """R after baseline and clip, one for each completion.

        Raises:
            UserError: completions without ids, an answer that is no text, parameters that are in pieces, or a trace
                that the cache does not hold.
        """
        if not all(response_token_ids):
            raise UserError("a completion came without its token ids; valid: rollouts by vLLM or transformers")
        engine, tokenizer = self._policy(), self.trainer.template.tokenizer
        groups: dict[tuple, list[int]] = {}
        for row, turns in enumerate(messages):
            key = tuple(self._prompt_ids(turns, kwargs, row)), solution[row]
            groups.setdefault(key, []).append(row)
        prompts = [list(ids) for ids, _ in groups]
        answers = [encode_answer(answer, tokenizer, f"row {rows[0]}") for (_, answer), rows in groups.items()]
        completions_PG = [[_flat(response_token_ids[row]) for row in rows] for rows in groups.values()]
        traces = as_traces(completions_PG, engine.delimiter_id)
        names = [f"row {rows[0]} of the batch" for rows in groups.values()]
        scores = score_in_parts(engine, prompts, traces.trace_ids, answers, names)
        shaped = rewards.reward(scores, traces, self.objective, noise=0.0, names=names).shaped
        by_row = dict(zip(chain(*groups.values()), chain(*(reward_G.tolist() for reward_G in shaped)), strict=True))
        return [by_row[row] for row in range(len(completions))]

    def _policy(self) -> Engine:
        """An engine on the trainer's own parameters, made at the first call."""
        if self._engine is None:
            tokenizer = self.trainer.template.tokenizer
            self._engine = Engine(
                live_model(self.trainer), delimiter_id=delimiter_id(tokenizer, self.delimiter),
                eos_id=tokenizer.eos_token_id, max_cache_bytes=self.max_cache_bytes,
            )  # fmt: skip
        return self._engine

    def _prompt_ids(self, messages: list[dict], columns: dict[str, list], row: int) -> list[int]:
        """Ids of the turns before the completion, as the rollout encoded them."""
        template = copy(self.trainer.template)
        template.set_mode("transformers")  # up to where the model takes its turn
        template.max_length = None
        turns = {"messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages}
        if (kwargs := columns.get("chat_template_kwargs")) is not None:
            turns["chat_template_kwargs"] = kwargs[row]
        return template.encode(turns)["input_ids"]


def _flat(ids: list) -> list[int]:
    """ms-swift has the ids of one turn as they are, or in a list of turns."""
    return list(chain(*ids)) if isinstance(ids[0], list) else ids


orms["nrt"] = NRT
callbacks_map["nrt"] = NRTCallback
