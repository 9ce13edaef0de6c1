"""The starter model as an inference server: it samples up to a delimiter, and tells log-probabilities of a prompt."""

from functools import cache
from itertools import count
from pathlib import Path

import nrt_fast
from nrt_fast import Engine, Model, rewards
from nrt_fast.adapters.completions import split_at_delimiter
from nrt_fast.adapters.prompt_logprobs import encode_answer
from nrt_fast.config import Objective
from nrt_fast.data import load_tokenizer
from nrt_fast.types import Traces

STARTER = Path(nrt_fast.__file__).parent / "starter/model"
DELIMITER_ID = 5


class ServedPolicy:
    """One request at a time; every sample is another one.

    Attributes:
        scored: prompts whose log-probabilities were asked for.
    """

    def __init__(self):
        self.model = Model.from_pretrained(STARTER)
        self.tokenizer = load_tokenizer(str(STARTER))
        self.engine = Engine(self.model, delimiter_id=DELIMITER_ID, eos_id=self.tokenizer.eos_token_id)
        self.scored: list[list[int]] = []
        self._seeds = count()

    def prompt_ids(self, question: str) -> list[int]:
        """Ids of a question, up to where the model takes its turn."""
        turns = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    def sample(self, prompt_ids: list[int], max_tokens: int) -> tuple[list[int], list[float]]:
        """(ids, their log-probabilities); the delimiter is the last id where it was sampled."""
        traces = self.engine.rollout(
            [prompt_ids], num_generations=1, max_trace_length=max_tokens, seed=next(self._seeds)
        )
        (ids,), (logprobs,), (end,) = traces.trace_ids[0], traces.logprobs[0], traces.delimiter_logprobs[0]
        closed = end is not None
        return ids + [DELIMITER_ID] * closed, logprobs + [end] * closed

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        """Of every id but the first, by a forward pass of its own."""
        self.scored.append(ids)
        return list(self._logprobs(tuple(ids)))

    def reward(self, prompt_ids: list[int], sampled_ids: list[int], answer: str, objective: Objective) -> float:
        """What the engine makes of a trace: the figure that an adapter's is compared with."""
        trace, closed = split_at_delimiter(sampled_ids, DELIMITER_ID)
        scores = self.engine.score([prompt_ids], [[trace]], [encode_answer(answer, self.tokenizer, "")])
        traces = Traces([[trace]], [[[]]], [[0.0 if closed else None]])
        return float(rewards.reward(scores, traces, objective, noise=0.0, names=[""]).shaped[0])

    @cache  # noqa: B019, one policy for a module
    def _logprobs(self, ids: tuple[int, ...]) -> list[float]:
        logprobs = self.model.logits(list(ids)).log_softmax(dim=-1)
        return [float(logprobs[position, token]) for position, token in enumerate(ids[1:])]
