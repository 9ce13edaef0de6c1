"""One rendered example with its boundaries: prompt | trace | delimiter | answer."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from nrt_fast.data.tokenizer import Delimiter
from nrt_fast.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HINT = "if the chat template closes the thinking, chat_template_kwargs may leave it open (often enable_thinking)"


def show_example(
    example: Example, tokenizer: "PreTrainedTokenizerBase", delimiter: Delimiter, max_trace_length: int
) -> Text:
    """Show what the model reads and writes, hard answer tokens underlined; rich prints it plain off a terminal."""
    text = Text(example.where)
    _start_part(text, "prompt", f"{len(example.prompt_ids)} tokens")
    text.append(tokenizer.decode(example.prompt_ids), "cyan")
    _start_part(text, "trace", f"<= {max_trace_length} tokens")
    text.append("(sampled)", "dim italic")
    _start_part(text, "delimiter", "1 token")
    text.append(delimiter.text, "bold magenta")
    _start_part(text, "answer", f"{len(example.answer_ids)} tokens")
    for hard, piece in _answer_pieces(example, tokenizer):
        text.append(piece, "green underline" if hard else "green")
    if delimiter.id in example.prompt_ids:
        text.append(f"\nnote: the prompt holds {delimiter.text} already; {HINT}", "yellow")
    return text


def _answer_pieces(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[bool, str]]:
    """Runs of hard and of easy tokens; each is what it adds to the text before it, spaces included."""
    hard_positions, shown = example.hard_positions or (), ""
    for hard, run in groupby(range(len(example.answer_ids)), lambda position: position in hard_positions):
        text = tokenizer.decode(example.answer_ids[: max(run) + 1])
        yield hard, text[len(shown) :]
        shown = text


def _start_part(text: Text, label: str, size: str) -> None:
    text.append(f"\n{label:<9} {size:>14} | ", "bold")
