"""From the configuration to the examples of a run: what to train on, and what is held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from nrt_fast.config import HeldoutFields, TrainConfig, split_names
from nrt_fast.data.examples import HELDOUT_KEY, Examples, split_heldout
from nrt_fast.data.limits import Limiter, Limits
from nrt_fast.data.order import permutation
from nrt_fast.data.read import BATCH_ROWS, Row, read_rows
from nrt_fast.data.render import check_template_kwargs, render
from nrt_fast.data.schema import detect_schema
from nrt_fast.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_BUILTIN_ROWS = 10_000
Source = tuple[str, Iterator[Row]]


@dataclass(frozen=True)
class Data:
    """The examples of a run.

    Attributes:
        train: examples to train on, data set after data set.
        num_per_dataset: how many of them each data set has, as Order wants it.
        heldout: examples kept for evaluation.
        lines: what was detected, dropped and cut, for people.
    """

    train: Examples
    num_per_dataset: list[int]
    heldout: Examples
    lines: list[str]


class Loader:
    """Turns data sets into Examples, all rendered and limited alike; their rows are numbered through by uid.

    Args:
        tokenizer: renders and tokenises.
        limits: the longest prompts and answers.
        prompt_field: field of the question, as a dotted path; detected if None.
        answer_field: field of the reference answer, as a dotted path; detected if None.
        chat_template_kwargs: extra arguments of the chat template.
        first_uid: uid of the first row.

    Attributes:
        lines: what was detected, dropped and cut, for people.

    Raises:
        UserError: chat_template_kwargs that cannot take effect.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        limits: Limits,
        prompt_field: str | None = None,
        answer_field: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        first_uid: int = 0,
    ):
        check_template_kwargs(tokenizer, chat_template_kwargs)
        self.tokenizer, self.limits, self.chat_template_kwargs = tokenizer, limits, chat_template_kwargs
        self.prompt_field, self.answer_field = prompt_field, answer_field
        self.lines: list[str] = []
        self._next_uid = first_uid

    def load(self, name: str, rows: Iterator[Row]) -> Examples:
        """Read one data set to its end.

        Raises:
            UserError: a row that cannot be used, or no row is left.
        """
        batches = iter(lambda: list(islice(rows, BATCH_ROWS)), [])
        first = next(batches, None)
        if first is None:
            raise UserError(f"{name}: no rows")
        schema = detect_schema(first, self.prompt_field, self.answer_field)
        limiter, examples = Limiter(self.limits, self.tokenizer.bos_token_id), Examples()
        for batch in chain([first], batches):
            pairs = [schema.pair(row) for row in batch]
            rendered = render(pairs, self.tokenizer, self._next_uid, self.chat_template_kwargs)
            examples.extend(filter(None, map(limiter.fit, rendered)))
            self._next_uid += len(batch)
        if not examples:
            raise UserError(f"{name}: {limiter.describe_nothing_left()}")
        self.lines += [f"{name}: {limiter.num_rows:,} rows, {schema}", *limiter.lines()]
        return examples


def load_data(config: TrainConfig, tokenizer: "PreTrainedTokenizerBase", limits: Limits, num_heldout: int) -> Data:
    """Load what a run trains on and what it is evaluated on.

    Held-out examples come from eval_dataset_name, from the built-in tasks' own held-out part, or else from a seeded
    split of the training data.

    Args:
        config: names the data sets and their fields; the built-in tasks serve where it names none.
        tokenizer: renders and tokenises.
        limits: the longest prompts and answers.
        num_heldout: examples to hold out; 0 for none. There are fewer if eval_dataset_name has fewer.

    Raises:
        UserError: data that cannot be used; see Loader.
    """
    loader = Loader(tokenizer, limits, config.prompt_field, config.answer_field, config.chat_template_kwargs)
    split = config.dataset_train_split
    train_sources = _sources(config.dataset_name, split) or [_builtin_source("train", NUM_BUILTIN_ROWS)]
    own_heldout = config.eval_dataset_name is None and config.dataset_name is not None
    heldout_sources = []
    if num_heldout and not own_heldout:
        heldout_sources = _sources(config.eval_dataset_name, split) or [_builtin_source("heldout", num_heldout)]
    datasets = [loader.load(*source) for source in train_sources]
    heldout = Examples.join([loader.load(*source) for source in heldout_sources])
    train, sizes = Examples.join(datasets), [len(dataset) for dataset in datasets]
    if own_heldout:
        return _split(train, sizes, num_heldout, config.seed, loader.lines)
    chosen = permutation(len(heldout), config.seed, HELDOUT_KEY)[:num_heldout].tolist()
    return Data(train, sizes, heldout.select(chosen), loader.lines)


def load_heldout(
    config: HeldoutFields, tokenizer: "PreTrainedTokenizerBase", limits: Limits, num_prompts: int
) -> tuple[Examples, list[str]]:
    """What a run on the same data with the same seed holds out; every row where there are no more of them.

    Their uids are those of the run too, so that the same traces are sampled for them.

    Returns:
        (examples, what was detected, dropped and cut).

    Raises:
        UserError: data that cannot be used; see Loader.
    """
    fields = config.prompt_field, config.answer_field, config.chat_template_kwargs
    sources = _sources(config.dataset_name, config.dataset_train_split)
    # A run numbers the rows of the built-in tasks that it trains on first.
    loader = Loader(tokenizer, limits, *fields, first_uid=0 if sources else NUM_BUILTIN_ROWS)
    if sources:
        examples = Examples.join([loader.load(*source) for source in sources])
        chosen = permutation(len(examples), config.seed, HELDOUT_KEY)[-num_prompts:]
    else:
        examples = loader.load(*_builtin_source("heldout", num_prompts))
        chosen = permutation(len(examples), config.seed, HELDOUT_KEY)
    return examples.select(chosen.tolist()), loader.lines


def _sources(dataset_name: list[str] | str | None, split: str) -> list[Source]:
    return [(name, read_rows(name, split)) for name in split_names(dataset_name or [])]


def _builtin_source(split: str, num_rows: int) -> Source:
    from nrt_fast.starter import tasks

    name = f"built-in tasks ({split})"
    rows = enumerate(tasks.rows(split, num_rows, seed=0), 1)
    return name, (Row(fields, f"{name}, row {number}") for number, fields in rows)


def _split(train: Examples, sizes: list[int], num_heldout: int, seed: int, lines: list[str]) -> Data:
    """Hold out a part of the training data; every data set keeps its rows together."""
    kept, heldout = split_heldout(len(train), num_heldout, seed)
    num_per_dataset = np.diff(np.searchsorted(kept, np.cumsum([0, *sizes]))).tolist()
    return Data(train.select(kept), num_per_dataset, train.select(heldout), lines)
