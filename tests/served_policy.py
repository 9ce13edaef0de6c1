"""The starter model behind what an inference server offers: sampling up to a stop id, and log-probabilities of a prompt."""

from functools import cache
from itertools import count
from pathlib import Path

import nrt_fast
from nrt_fast import Engine, Model
from nrt_fast.data import load_tokenizer

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

    @cache  # noqa: B019, one policy for a module
    def _logprobs(self, ids: tuple[int, ...]) -> list[float]:
        logprobs = self.model.logits(list(ids)).log_softmax(dim=-1)
        return [float(logprobs[position, token]) for position, token in enumerate(ids[1:])]
