"""``nrt-fast generate``: a question, or a file of them, to a trace and an answer; on a terminal as they are sampled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nrt_fast.config import GenerateConfig
from nrt_fast.data import (
    INCOMPLETE,
    Messages,
    check_template_kwargs,
    detokenized,
    encode_prompts,
    read_prompt,
    read_rows,
)
from nrt_fast.engine import Engine
from nrt_fast.json_lines import JsonLines, how_ended
from nrt_fast.resolve import resolve_lengths
from nrt_fast.source import Source, choose_scale, open_source
from nrt_fast.types import UserError

TRACES_AT_A_TIME = 256
STYLES = {"trace": "dim", "answer": ""}
CONTROLS = {code: INCOMPLETE for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}


@dataclass(frozen=True)
class Question:
    """A prompt: its turns, and "file, row N" for messages."""

    messages: Messages
    where: str

    @property
    def text(self) -> str:
        """The last turn, as shown to people."""
        return self.messages[-1]["content"]


def generate(config: GenerateConfig) -> None:
    """Answer as configured.

    Raises:
        UserError: bad input, told in one line; what was written before is whole.
    """
    config.check()
    questions = read_questions(config)
    source = open_source(config)
    config = resolve_lengths(config, choose_scale(config, source.device), source.shape.max_position_embeddings)
    prompts = encode(questions, source, config)
    plan = source.plan(config)
    if config.question is not None and config.output_file is None:
        return show(
            source.engine(config, plan.cache_bytes), prompts[0], source.tokenizer, config, Console(highlight=False)
        )
    with JsonLines(config.output_file) as file:
        engine = source.engine(config, plan.cache_bytes)
        for row in answer_all(engine, questions, prompts, source.tokenizer, config):
            file.write(row)


def read_questions(config: GenerateConfig) -> list[Question]:
    """The question of the command line, the lines of a text file, or the rows of a data file.

    Raises:
        UserError: no such file, or a row of it without a question.
    """
    if config.question is not None:
        return [Question([{"role": "user", "content": config.question}], "the question")]
    if config.input_file.endswith(".txt"):
        questions = list(_read_text(Path(config.input_file).expanduser()))
    else:
        rows = read_rows(config.input_file)
        questions = [Question(read_prompt(row, config.prompt_field), row.where) for row in rows]
    if not questions:
        raise UserError(f"input_file {config.input_file}: no questions")
    return questions


def _read_text(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"input_file {path} cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Question([{"role": "user", "content": line.strip()}], f"{path}, row {number}")


def encode(questions: list[Question], source: Source, config: GenerateConfig) -> list[list[int]]:
    """Ids of the questions in the template of training.

    Raises:
        UserError: a prompt over max_prompt_length.
    """
    check_template_kwargs(source.tokenizer, config.chat_template_kwargs)
    where = [question.where for question in questions]
    prompts = encode_prompts(
        [question.messages for question in questions], source.tokenizer, config.chat_template_kwargs, where
    )
    for place, prompt in zip(where, prompts, strict=True):
        if len(prompt) > config.max_prompt_length:
            raise UserError(
                f"{place}: the prompt has {len(prompt)} tokens, max_prompt_length is {config.max_prompt_length}"
            )
    return prompts


def answer_all(
    engine: Engine, questions: list[Question], prompts: list[list[int]], tokenizer, config: GenerateConfig
) -> Iterator[dict[str, Any]]:
    """One row for each question, a few questions at a time."""
    size = max(1, TRACES_AT_A_TIME // config.num_generations)
    for start in range(0, len(prompts), size):
        generated = engine.generate(
            prompts[start : start + size],
            num_generations=config.num_generations,
            max_trace_length=config.max_trace_length,
            max_answer_length=config.max_answer_length,
            temperature=config.temperature,
            seed=config.seed + start,  # noise is keyed by the position in a call
        )
        groups = zip(generated.traces.trace_ids, generated.traces.delimiter_logprobs, generated.answers, strict=True)
        for question, (traces, ends, answers) in zip(questions[start : start + size], groups, strict=True):
            yield {
                "question": question.text,
                "where": question.where,
                "generations": [
                    {
                        "trace": tokenizer.decode(trace, skip_special_tokens=True),
                        "answer": tokenizer.decode(answer, skip_special_tokens=True),
                        "ended": how_ended(trace, end, engine.eos_ids, config.max_trace_length),
                        "trace_ids": trace,
                        "answer_ids": answer,
                    }
                    for trace, end, answer in zip(traces, ends, answers, strict=True)
                ],
            }


def show(engine: Engine, prompt: list[int], tokenizer, config: GenerateConfig, console: Console) -> None:
    """Trace and answer of one question, the trace dimmed; several of them where several are asked for."""
    if config.num_generations == 1:
        stream = engine.stream(
            prompt,
            max_trace_length=config.max_trace_length,
            max_answer_length=config.max_answer_length,
            temperature=config.temperature,
            seed=config.seed,
        )
        return show_stream(stream, tokenizer, console)
    question = Question([{"role": "user", "content": config.question}], "the question")
    (row,) = answer_all(engine, [question], [prompt], tokenizer, config)
    for number, generation in enumerate(row["generations"], 1):
        console.print(f"{number} of {config.num_generations}", style="bold")
        both = [(kind, token) for kind in STYLES for token in generation[f"{kind}_ids"]]
        show_stream(both, tokenizer, console)


def show_stream(stream: Iterable[tuple[str, int]], tokenizer, console: Console) -> None:
    """Print ids as text as they come: the trace, an empty line, the answer."""
    shown = False
    for kind, part in groupby(stream, key=lambda pair: pair[0]):
        if kind == "answer" and shown:
            console.print("\n")
        for text in detokenized((token for _, token in part), tokenizer):
            shown = True
            console.print(Text(text.translate(CONTROLS), STYLES[kind]), end="", soft_wrap=True)
    console.print()
