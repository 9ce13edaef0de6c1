"""Pairs of text to token ids: the prompt by the chat template, the answer apart from it."""

from typing import TYPE_CHECKING, Any

from nrt_fast.data.read import one_line
from nrt_fast.data.schema import Messages, Pair
from nrt_fast.types import Example, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TURNS = {"system": "{}\n\n", "user": "Question: {}\n\n", "assistant": "Answer: {}\n\n"}
PLAIN_START = "Reasoning:"
OWN_KWARGS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message")
"""Of the chat template: they decide where the model takes its turn, and in what form."""


def render(
    pairs: list[Pair],
    tokenizer: "PreTrainedTokenizerBase",
    first_uid: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Example]:
    """Tokenise pairs: prompts by the chat template, answers apart from them and closed by one EOS.

    An EOS that the text of an answer contains is left out: an answer ends once.

    Args:
        pairs: questions with answers; one call of the tokenizer serves them all.
        tokenizer: its chat template is used, a plain one where it has none.
        first_uid: uid of the first example; the others follow.
        chat_template_kwargs: extra arguments of the chat template.

    Raises:
        UserError: the chat template refuses a prompt, or a prompt or an answer is no token at all.
    """
    conversations, where = [pair.messages for pair in pairs], [pair.where for pair in pairs]
    prompts = encode_prompts(conversations, tokenizer, chat_template_kwargs, where)
    answers = encode_answers(pairs, tokenizer)
    return [
        Example(first_uid + index, prompt_ids, answer_ids, hard, pair.question, pair.answer, pair.where, pair.aliases)
        for index, (pair, prompt_ids, (answer_ids, hard)) in enumerate(zip(pairs, prompts, answers, strict=True))
    ]


def encode_prompts(
    conversations: list[Messages],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None = None,
    where: list[str] | None = None,
) -> list[list[int]]:
    """Token ids of conversations, up to where the model takes its turn. BOS is there once, if the tokenizer has one."""
    where = where or [f"prompt {index}" for index in range(len(conversations))]
    if tokenizer.chat_template is None:
        encoded = _encode(tokenizer, [plain_prompt(messages) for messages in conversations])
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [ids if ids[:1] == bos else bos + ids for ids in encoded]
    kwargs = chat_template_kwargs or {}
    texts = [
        _apply_template(tokenizer, turns, kwargs, place) for turns, place in zip(conversations, where, strict=True)
    ]
    encoded = _encode(tokenizer, texts)
    for ids, place in zip(encoded, where, strict=True):
        if not ids:
            raise UserError(f"{place}: the chat template makes an empty prompt")
    return encoded


def check_template_kwargs(tokenizer: "PreTrainedTokenizerBase", kwargs: dict[str, Any] | None) -> None:
    """UserError for arguments of the chat template that are not the template's, or without one."""
    if kwargs and tokenizer.chat_template is None:
        raise UserError("chat_template_kwargs cannot take effect: the tokenizer has no chat template")
    for name in kwargs or ():
        if name in OWN_KWARGS:
            raise UserError(f"chat_template_kwargs: {name} is decided here; valid: options of the template's own")


def plain_prompt(messages: Messages) -> str:
    """The built-in template of tokenizers without one: base models go on reasoning after it."""
    turns = [PLAIN_TURNS.get(turn["role"], PLAIN_TURNS["user"]).format(turn["content"]) for turn in messages]
    return "".join(turns) + PLAIN_START


def encode_answers(
    pairs: list[Pair], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], tuple[int, ...] | None]]:
    """Token ids of each answer, closed by EOS, and the positions of its hard tokens (None where it declares none)."""
    with_spans = tokenizer.is_fast and any(pair.hard_spans is not None for pair in pairs)
    encoded = tokenizer(
        [pair.answer for pair in pairs],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_spans,
        verbose=False,
    )
    offsets = encoded["offset_mapping"] if with_spans else [None] * len(pairs)
    return [
        _close_answer(pair, ids, spans, tokenizer.eos_token_id)
        for pair, ids, spans in zip(pairs, encoded["input_ids"], offsets, strict=True)
    ]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, kwargs: dict[str, Any], where: str
) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:  # a template is a program, and raises whatever it meets
        raise UserError(f"{where}: the tokenizer's chat template refuses the prompt ({one_line(error)})") from error


def _close_answer(
    pair: Pair, ids: list[int], offsets: list[tuple[int, int]] | None, eos_id: int
) -> tuple[list[int], tuple[int, ...] | None]:
    if eos_id in ids:
        kept = [index for index, token_id in enumerate(ids) if token_id != eos_id]
        ids, offsets = [ids[index] for index in kept], offsets and [offsets[index] for index in kept]
    if not ids:
        raise UserError(f"{pair.where}: the answer {pair.answer[:40]!r} is empty after tokenisation")
    if pair.hard_spans is None or offsets is None:
        return [*ids, eos_id], None
    hard = (position for position, offset in enumerate(offsets) if _overlaps(offset, pair.hard_spans))
    return [*ids, eos_id], tuple(hard)


def _overlaps(offset: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    return any(offset[0] < end and start < offset[1] for start, end in spans)
