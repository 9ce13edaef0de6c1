"""Which fields of a row hold the question and the reference answer."""

import math
from dataclasses import dataclass
from typing import Any

from nrt_fast.data.read import Row
from nrt_fast.types import UserError

Messages = list[dict[str, str]]
"""[{"role": "system" | "user" | "assistant", "content": text}], as chat templates take them."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's speakers, as roles."""

CANDIDATES: list[tuple[str, str | None]] = [
    ("messages", None),
    ("prompt", "completion"),
    *((prompt, answer) for prompt in ("messages", "prompt")
      for answer in ("answer", "solution", "ground_truth", "label", "target", "reward_model.ground_truth")),
    ("question", "answer"),
    ("instruction", "output"),
    ("conversations", None),
]  # fmt: skip
"""(prompt field, answer field) in order of detection; without an answer field the last assistant turn answers."""


@dataclass(frozen=True)
class Pair:
    """A question with its reference answer, as text.

    Attributes:
        messages: the prompt's turns, oldest first.
        answer: the reference answer.
        hard_spans: [start, end) character spans of the answer that the data declares hard, or None.
        where: "file, row N".
        aliases: other answers that are right as well.
    """

    messages: Messages
    answer: str
    hard_spans: list[tuple[int, int]] | None
    where: str
    aliases: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The last turn of the prompt, as shown to people."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Schema:
    """The fields that hold a pair: dotted paths, and no answer field where the last assistant turn answers."""

    prompt: str
    answer: str | None

    def __str__(self) -> str:
        if self.answer is None:
            return f"{self.prompt}, the last assistant turn is the answer"
        return f"{self.prompt}{' (+ input)' if self.prompt == 'instruction' else ''} + {self.answer}"

    def pair(self, row: Row) -> Pair:
        """Read a row's question and answer.

        Raises:
            UserError: the row lacks one of them, or a field holds something else than text.
        """
        turns = _prompt_turns(row, self.prompt)
        if self.answer is not None:
            turns = _without_last_answer(turns) + _answer_turns(row, self.answer)
        messages, answer = _split_at_answer(turns, row.where, self.answer or self.prompt)
        return Pair(messages, answer, _hard_spans(row, answer), row.where, _aliases(row))

    def matches(self, row: Row) -> bool:
        """Whether the row has values in these fields."""
        prompt = get_field(row.fields, self.prompt)
        if self.answer is not None:
            return prompt is not None and get_field(row.fields, self.answer) is not None
        return isinstance(prompt, list) and any(_role(turn) == "assistant" for turn in prompt)


def detect_schema(rows: list[Row], prompt_field: str | None = None, answer_field: str | None = None) -> Schema:
    """Find the first schema that one of the rows fits; named fields (dotted paths) win over known ones.

    Raises:
        UserError: no schema fits; the message lists the fields there are.
    """
    if prompt_field and answer_field:
        schemas = [Schema(prompt_field, answer_field)]
    else:
        schemas = [Schema(prompt_field or prompt, answer_field or answer) for prompt, answer in CANDIDATES]
    for schema in schemas:
        if any(schema.matches(row) for row in rows):
            return schema
    names = ", ".join(dict.fromkeys(name for row in rows for name in row.fields))
    wanted = " + ".join(filter(None, (prompt_field, answer_field))) or "question and answer"
    raise UserError(f"{rows[0].where}: {wanted} not found; name prompt_field and answer_field among: {names}")


def read_prompt(row: Row, prompt_field: str | None = None) -> Messages:
    """The turns of a row's question, without an answer after them. Known fields are tried unless one is named.

    Raises:
        UserError: the row has no question.
    """
    names = [prompt_field] if prompt_field else [prompt for prompt, _ in CANDIDATES]
    field = next((name for name in names if get_field(row.fields, name) is not None), None)
    if field is None:
        wanted = prompt_field or "question"
        raise UserError(f"{row.where}: {wanted} not found; name prompt_field among: {', '.join(row.fields)}")
    turns = _without_last_answer(_prompt_turns(row, field))
    if not any(turn["role"] == "user" for turn in turns):
        raise UserError(f"{row.where}: no question (no user turn in field {field!r})")
    return turns


def get_field(fields: dict[str, Any], path: str) -> Any:
    """Value at a field name or at a dotted path into nested objects; None where there is none."""
    if path in fields:
        return _present(fields[path])
    value: Any = fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return _present(value)


def _present(value: Any) -> Any:
    """The value, or None for NaN and infinities: pandas fills gaps with them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _prompt_turns(row: Row, field: str) -> Messages:
    turns = _turns(row, field)
    if field == "instruction" and (text := get_field(row.fields, "input")):
        turns[-1]["content"] += "\n\n" + _text(text, row.where, "input")
    return turns


def _turns(row: Row, field: str) -> Messages:
    value = get_field(row.fields, field)
    if isinstance(value, list):
        return [_turn(turn, row.where, f"{field}[{index}]") for index, turn in enumerate(value)]
    return [{"role": "user", "content": _text(value, row.where, field)}]


def _without_last_answer(turns: Messages) -> Messages:
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns


def _answer_turns(row: Row, field: str) -> Messages:
    value = get_field(row.fields, field)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return _turns(row, field)
    return [{"role": "assistant", "content": _text(value, row.where, field)}]


def _role(turn: Any) -> str | None:
    role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(role, role) if isinstance(role, str) else None


def _turn(turn: Any, where: str, field: str) -> dict[str, str]:
    role = _role(turn)
    if role is None:
        raise UserError(f"{where}: {field} is not a message with a role and a content")
    content = turn.get("content", turn.get("value"))
    return {"role": role, "content": _text(content, where, f"{field}.content", may_be_empty=role != "user")}


def _split_at_answer(turns: Messages, where: str, field: str) -> tuple[Messages, str]:
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise UserError(f"{where}: no answer (no assistant turn in field {field!r})")
    answer, prompt = turns[last]["content"], turns[:last]
    if not answer.strip():
        raise UserError(f"{where}: no answer (field {field!r} is empty)")
    if not any(turn["role"] == "user" for turn in prompt):
        raise UserError(f"{where}: no question (no user turn before the answer)")
    return prompt, answer


def _text(value: Any, where: str, field: str, may_be_empty: bool = False) -> str:
    value = _present(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None and not may_be_empty:
        raise UserError(f"{where}: field {field!r} is missing")
    if not isinstance(value or "", str):
        raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, text is expected")
    if not may_be_empty and not value.strip():
        raise UserError(f"{where}: field {field!r} is empty")
    return _checked_unicode(value or "", where, field)


def _checked_unicode(value: str, where: str, field: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} is not valid Unicode (half a surrogate pair)") from error
    return value


def _hard_spans(row: Row, answer: str) -> list[tuple[int, int]] | None:
    spans = get_field(row.fields, "hard_spans")
    if spans is None:
        return None
    try:
        spans = [(int(start), int(end)) for start, end in spans]
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.where}: hard_spans should be a list of [start, end] character positions") from error
    if any(not 0 <= start < end <= len(answer) for start, end in spans):
        raise UserError(f"{row.where}: hard_spans go beyond the answer's {len(answer)} characters")
    return spans


def _aliases(row: Row) -> tuple[str, ...]:
    aliases = get_field(row.fields, "aliases")
    if aliases is None:
        return ()
    if not isinstance(aliases, list):
        raise UserError(f"{row.where}: field 'aliases' holds {type(aliases).__name__}, a list of texts is expected")
    return tuple(_text(alias, row.where, f"aliases[{index}]") for index, alias in enumerate(aliases))
