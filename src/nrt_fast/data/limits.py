"""Longest prompts and answers, and what becomes of longer ones."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from nrt_fast.types import Example, UserError


@dataclass(frozen=True)
class Limits:
    """Longest prompts and answers, in tokens (an answer's EOS counts), and what becomes of longer ones.

    truncate_left keeps a prompt's end, and its BOS.
    """

    max_prompt_length: int
    max_answer_length: int
    overlong_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    overlong_answers: Literal["drop", "error"] = "drop"


class Limiter:
    """Holds the examples of one data set to the limits, and counts.

    Attributes:
        num_rows: examples seen.
        num_overlong: examples that were dropped or truncated, by "prompt" and "answer".
        shortest: least length seen, by "prompt" and "answer".
    """

    def __init__(self, limits: Limits, bos_id: int | None):
        self.bos_id = bos_id
        self.limit = {"prompt": limits.max_prompt_length, "answer": limits.max_answer_length}
        self.action = {"prompt": limits.overlong_prompts, "answer": limits.overlong_answers}
        self.num_rows = 0
        self.num_overlong: Counter[str] = Counter()
        self.shortest: dict[str, int] = {}

    def fit(self, example: Example) -> Example | None:
        """The example within the limits, or None where it is dropped.

        Raises:
            UserError: it is too long, and that is to be an error.
        """
        self.num_rows += 1
        lengths = {"prompt": len(example.prompt_ids), "answer": len(example.answer_ids)}
        self.shortest = {part: min(length, self.shortest.get(part, length)) for part, length in lengths.items()}
        overlong = [part for part, length in lengths.items() if length > self.limit[part]]
        self.num_overlong.update(overlong)
        for part in overlong:
            if self.action[part] == "error":
                raise UserError(
                    f"{example.where}: the {part} has {lengths[part]} tokens, max_{part}_length is {self.limit[part]}"
                )
        if any(self.action[part] == "drop" for part in overlong):
            return None
        return self._truncate(example) if overlong else example

    def lines(self) -> list[str]:
        """The counts, for people."""
        verbs = {"drop": "dropped", "truncate_left": "cut the start of"}
        return [
            f"{verbs[self.action[part]]} {num:,} of {self.num_rows:,} rows: {part} over {self.limit[part]} tokens"
            for part, num in self.num_overlong.items()
        ]

    def describe_nothing_left(self) -> str:
        """Why no row is left, and from which limits on one would be."""
        shortest = (
            f"the shortest {part} has {length} tokens, max_{part}_length is {self.limit[part]}"
            for part, length in self.shortest.items()
        )
        return f"all {self.num_rows:,} rows are over the limits ({'; '.join(shortest)})"

    def _truncate(self, example: Example) -> Example:
        start = example.prompt_ids[:1] if example.prompt_ids[0] == self.bos_id else []
        end = len(example.prompt_ids) - (self.limit["prompt"] - len(start))
        return replace(example, prompt_ids=start + example.prompt_ids[end:])
