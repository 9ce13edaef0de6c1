"""Data: rows of question and reference answer, in whatever form they come, to Examples in a resumable order."""

from nrt_fast.data.examples import Examples, split_heldout
from nrt_fast.data.limits import Limits
from nrt_fast.data.load import Data, Loader, load_data, load_heldout
from nrt_fast.data.order import Order
from nrt_fast.data.read import Row, read_rows
from nrt_fast.data.render import check_template_kwargs, encode_answers, encode_prompts, render
from nrt_fast.data.schema import Messages, Pair, Schema, detect_schema, read_prompt
from nrt_fast.data.show import show_example
from nrt_fast.data.tokenizer import (
    INCOMPLETE,
    Delimiter,
    check_vocabulary,
    choose_delimiter,
    detokenized,
    example_delimiters,
    find_delimiter,
    has_tokenizer,
    load_tokenizer,
    text_of_each,
)

__all__ = [
    "INCOMPLETE", "Data", "Delimiter", "Examples", "Limits", "Loader", "Messages", "Order", "Pair", "Row", "Schema",
    "check_template_kwargs", "check_vocabulary", "choose_delimiter", "detect_schema", "detokenized", "encode_answers",
    "encode_prompts", "example_delimiters", "find_delimiter", "has_tokenizer", "load_data", "load_heldout",
    "load_tokenizer", "read_prompt", "read_rows", "render", "show_example", "split_heldout", "text_of_each",
]  # fmt: skip
