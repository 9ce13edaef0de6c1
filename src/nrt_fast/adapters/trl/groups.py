"""A trainer's rows, one for each completion, as groups of one prompt and one answer, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from nrt_fast.data import Pair, encode_answers
from nrt_fast.types import Example, UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Groups:
    """Neighbouring rows of one prompt and answer; rows without an answer are in none.

    Attributes:
        examples: P prompts with their answers.
        rows: [P][G] positions among the trainer's rows.
        num_rows: of the trainer.
    """

    examples: list[Example]
    rows: list[list[int]]
    num_rows: int

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of each prompt."""
        return [example.prompt_ids for example in self.examples]

    @property
    def answers(self) -> list[list[int]]:
        """Ids of each answer."""
        return [example.answer_ids for example in self.examples]

    def take(self, values: Sequence[Value]) -> list[list[Value]]:
        """The trainer's values, one for each row, as [P][G]."""
        return [[values[row] for row in group] for group in self.rows]

    def spread(self, values: list[Sequence[Value]]) -> list[Value | None]:
        """[P][G] values in the trainer's order, None in rows that are in no group."""
        spread: list[Value | None] = [None] * self.num_rows
        for group, of_group in zip(self.rows, values, strict=True):
            for row, value in zip(group, of_group, strict=True):
                spread[row] = value
        return spread

    def cut(self, size: int) -> Groups:
        """The same rows in groups of this size, which divides all of theirs."""
        pieces = [
            (example, rows[start : start + size])
            for example, rows in zip(self.examples, self.rows, strict=True) for start in range(0, len(rows), size)
        ]  # fmt: skip
        return Groups([example for example, _ in pieces], [rows for _, rows in pieces], self.num_rows)


def group_rows(prompt_ids: list[list[int]], prompts: list, answers: list[str | None], tokenizer: Any) -> Groups:
    """Groups of a trainer's rows.

    Raises:
        UserError: an answer is no text, or no token at all.
    """
    examples, groups = [], []
    for (ids, answer), neighbours in groupby(range(len(prompts)), lambda row: (prompt_ids[row], answers[row])):
        if answer is None:
            continue
        groups.append(list(neighbours))
        first = groups[-1][0]
        examples.append(_example(ids, prompts[first], answer, f"row {first} of the batch", tokenizer))
    return Groups(examples, groups, len(prompts))


def check_whole_groups(trainer: Any, is_training: bool, what: str) -> None:
    """UserError where a group's rows may be on several ranks: ``what`` compares them, and a rank sees its own alone."""
    args, num_ranks = trainer.args, trainer.accelerator.num_processes
    if is_training:
        size, name = trainer.num_generations, "num_generations"
        rows = args.per_device_train_batch_size * args.steps_per_generation
        fields = "per_device_train_batch_size x steps_per_generation"
    else:
        size, name = getattr(trainer, "num_generations_eval", trainer.num_generations), "num_generations_eval"
        rows, fields = args.per_device_eval_batch_size, "per_device_eval_batch_size"
    if num_ranks > 1 and rows % size:
        raise UserError(
            f"{what} compares the traces of a group, and each of {num_ranks} ranks gets {rows} rows ({fields}) of "
            f"groups of {size}; valid: {fields} a multiple of {name}"
        )


def _example(prompt_ids: list[int], prompt: Any, answer: Any, where: str, tokenizer: Any) -> Example:
    if not isinstance(answer, str):
        raise UserError(
            f"{where}: the column answer holds {type(answer).__name__}; valid: text, or None to leave it out"
        )
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    ((answer_ids, _),) = encode_answers([Pair([], answer, None, where)], tokenizer)
    return Example(0, prompt_ids, answer_ids, None, question, answer, where)
