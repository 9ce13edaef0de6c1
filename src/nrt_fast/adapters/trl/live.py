"""An engine on a trainer's model, and its delimiter, tokenizer and prompts as the engine takes them."""

from __future__ import annotations

import inspect
from typing import Any

from nrt_fast.adapters.live import live_model
from nrt_fast.data import Delimiter, example_delimiters, find_delimiter
from nrt_fast.engine import Engine
from nrt_fast.types import UserError


def live_engine(trainer: Any, delimiter: Delimiter, max_cache_bytes: int) -> Engine:
    """An engine on the trainer's model; the tokenizer's EOS and TRL's own end a trace."""
    model, tokenizer = live_model(trainer), tokenizer_of(trainer)
    if delimiter.id >= model.config.vocab_size:
        raise UserError(f"delimiter {delimiter.text!r} has id {delimiter.id}, the model {model.config.vocab_size} rows")
    eos_ids = dict.fromkeys([tokenizer.eos_token_id, *getattr(trainer, "eos_token_ids", ())])
    return Engine(model, delimiter_id=delimiter.id, eos_id=tuple(eos_ids), max_cache_bytes=max_cache_bytes)


def choose_live_delimiter(trainer: Any, delimiter: str | None) -> Delimiter:
    """The token that ends a trace; the trainer's vocabulary stays as it is.

    Raises:
        UserError: the named delimiter is not one token, or none is named and the tokenizer reserves none.
    """
    tokenizer = tokenizer_of(trainer)
    found = find_delimiter(tokenizer, delimiter)
    if found is None:
        raise UserError(
            "the tokenizer reserves no token that could end a trace; valid: NRTReward(delimiter=...) with a token of "
            f"the vocabulary, for example {example_delimiters(tokenizer)}, or a tokenizer and model with </think>"
        )
    return found


def tokenizer_of(trainer: Any) -> Any:
    """The text tokenizer, which a multimodal processor holds as well."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def prompt_ids(trainer: Any, prompts: list) -> list[list[int]]:
    """Ids of each prompt as the trainer feeds them to its own sampler.

    Raises:
        UserError: prompts with images.
    """
    if hasattr(trainer, "_tokenize_prompts"):  # TRL 1.0
        ids, images, _ = trainer._tokenize_prompts(prompts)
        if images:
            raise UserError("prompts with images are not supported; valid: text")
        return [list(row) for row in ids]
    tokenizer, template = tokenizer_of(trainer), getattr(trainer, "chat_template_kwargs", None) or {}
    is_text = isinstance(prompts[0], str)
    texts = prompts if is_text else [_render(tokenizer, prompt, template) for prompt in prompts]
    options: dict[str, Any] = {"add_special_tokens": is_text}
    if "images" in inspect.signature(trainer._generate_single_turn).parameters:  # TRL 0.24: nothing added, left cut
        length = trainer.max_prompt_length
        options = {"add_special_tokens": False, "max_length": length, "truncation": length is not None}
    return tokenizer(texts, **options)["input_ids"]


def _render(tokenizer: Any, messages: list[dict], template: dict) -> str:
    """A conversation up to where the model takes its turn, or goes on with it."""
    goes_on = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on, **template
    )
