"""The tokenizer, and the one token of it that ends a trace."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nrt_fast.data.read import one_line
from nrt_fast.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_THINKING = "</think>"
RESERVED = re.compile(r"(<\|?|\[)(reserved|reserved_special_token|unused|control|special)_?\d+(\|?>|\])", re.I)
"""Llama 3's <|reserved_special_token_0|>, Mistral's [control_8] and <SPECIAL_20>, Gemma's <unused0>, ..."""
PLAIN = ("###", "---", "***", "===", "=>", "##", "~", "#")
"""Rare enough in text to end a trace."""
INCOMPLETE = "\ufffd"  # what a tokenizer makes of bytes that are no character yet
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class Delimiter:
    """The token that ends a trace and starts the answer.

    Attributes:
        id: its token id.
        text: its text.
        added: whether it was added to the tokenizer, so that the model may have no row for it yet.
    """

    id: int
    text: str
    added: bool


def load_tokenizer(model_name_or_path: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face folder or hub id; no code of the model's own is run.

    Raises:
        UserError: there is none, it cannot be loaded, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    folder = Path(model_name_or_path).expanduser()
    if folder.is_dir():
        if not has_tokenizer(folder):
            raise UserError(f"{model_name_or_path}: no tokenizer in this folder; a tokenizer.json is looked for")
        model_name_or_path = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises plain Exception for a damaged file.
        raise UserError(f"{model_name_or_path}: its tokenizer cannot be loaded ({one_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model_name_or_path}: the tokenizer has no eos_token, which closes every answer")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Check that every id of the tokenizer has a row in a model of vocab_size rows. To be called before adding any.

    Raises:
        UserError: it has ids beyond them.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise UserError(
            f"vocabulary mismatch: the tokenizer's highest id is {highest} ({token!r}), "
            f"but the model has {vocab_size} rows (ids 0 to {vocab_size - 1})"
        )


def choose_delimiter(
    tokenizer: "PreTrainedTokenizerBase", delimiter: str | None = None, may_add: bool = True
) -> Delimiter:
    """Choose the token that ends a trace: the named one, else </think>, else a reserved token, else a new </think>.

    A new token is added to the tokenizer in place.

    Raises:
        UserError: the named delimiter is not exactly one token, or has another use; or a new one would be needed and
            may not be added.
    """
    if found := find_delimiter(tokenizer, delimiter):
        return found
    if END_OF_THINKING in tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer's {END_OF_THINKING} has another use, and it reserves no token; valid: "
            f"{_valid_delimiters(tokenizer)}"
        )
    if not may_add:
        raise UserError(
            "the tokenizer reserves no token that could end a trace, and LoRA cannot train a new one's row; valid: "
            f"{_valid_delimiters(tokenizer)}, or --use_peft false"
        )
    tokenizer.add_tokens([END_OF_THINKING], special_tokens=True)
    return Delimiter(tokenizer.convert_tokens_to_ids(END_OF_THINKING), END_OF_THINKING, added=True)


def find_delimiter(tokenizer: "PreTrainedTokenizerBase", delimiter: str | None = None) -> Delimiter | None:
    """The named token, else </think>, else a reserved one; None where the tokenizer has none that is free.

    Raises:
        UserError: the named delimiter is not exactly one token, or it is BOS, EOS, PAD or the unknown token.
    """
    if delimiter is not None:
        return Delimiter(_single_id(tokenizer, delimiter), delimiter, added=False)
    vocabulary, taken = tokenizer.get_vocab(), _taken_tokens(tokenizer)
    for text in (END_OF_THINKING, *reserved_tokens(tokenizer)):
        if text in vocabulary and text not in taken:
            return Delimiter(vocabulary[text], text, added=False)
    return None


def detokenized(ids: Iterable[int], tokenizer) -> Iterator[str]:
    """What each id adds to the text. A character of several ids comes with its last one; what stays broken, at the end.

    Only the ids since the last but one complete piece are decoded again: the piece before decides about spaces.
    """
    window: list[int] = []
    num_shown = 0  # ids of the window that are shown already

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=True)

    for token in ids:
        window.append(token)
        before, now = decode(window[:num_shown]), decode(window)
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            continue
        yield now[len(before) :]
        window, num_shown = window[num_shown:], len(window) - num_shown
    if rest := decode(window)[len(decode(window[:num_shown])) :]:
        yield rest


def text_of_each(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What each id adds to the text: the name of a special token, "" of an id that completes no character."""
    texts: list[str] = []

    def taken() -> Iterator[int]:
        for token in ids:
            texts.append("")
            yield token

    for text in detokenized(taken(), tokenizer):
        texts[-1] += text
    special = set(tokenizer.all_special_ids)
    return [tokenizer.convert_ids_to_tokens(i) if i in special else text for i, text in zip(ids, texts, strict=True)]


def reserved_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Tokens that the tokenizer keeps for later use, in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(filter(RESERVED.fullmatch, vocabulary), key=vocabulary.get)


def _taken_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str | None]:
    """Tokens that end no trace, as they have another use."""
    return {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}


def _single_id(tokenizer: "PreTrainedTokenizerBase", delimiter: str) -> int:
    ids = tokenizer(delimiter, add_special_tokens=False)["input_ids"]
    if delimiter in tokenizer.get_vocab():
        ids = [tokenizer.convert_tokens_to_ids(delimiter)]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if len(ids) == 1 and tokens[0] not in _taken_tokens(tokenizer):
        return ids[0]
    pieces = " ".join(map(repr, tokens))
    problem = f"is {len(ids)} tokens ({pieces})" if len(ids) != 1 else f"is {pieces}, which has another use"
    raise UserError(
        f"delimiter {delimiter!r} {problem}; one token is needed, for example {example_delimiters(tokenizer)}, "
        f"or no delimiter at all: then {END_OF_THINKING} is added where nothing is reserved"
    )


def _valid_delimiters(tokenizer: "PreTrainedTokenizerBase") -> str:
    return f"--delimiter with a token of the vocabulary, for example {example_delimiters(tokenizer)}"


def example_delimiters(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Some tokens of the vocabulary that could end a trace, for messages."""
    vocabulary, taken = tokenizer.get_vocab(), _taken_tokens(tokenizer)
    known = [END_OF_THINKING] if END_OF_THINKING in vocabulary else []
    candidates = dict.fromkeys([*known, *reserved_tokens(tokenizer), *tokenizer.get_added_vocab()])
    reserved = [token for token in candidates if token not in taken][:4]
    plain = [text for text in PLAIN if text in vocabulary]
    return " ".join(reserved or plain[:4]) or "(none reserved here)"
