"""From the configuration to the examples of a run: what to train on, and what is held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nrt_fast.config import DataFields, HeldoutFields, TrainConfig, split_names
from nrt_fast.data.examples import HELDOUT_KEY, Examples, derive_num_heldout, split_heldout
from nrt_fast.data.limits import Limiter, Limits
from nrt_fast.data.order import permutation
from nrt_fast.data.read import BATCH_ROWS, Row, has_splits, read_rows
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
        names: of the data sets.
        num_per_dataset: how many of them each data set has, as Order wants it.
        heldout: examples kept for evaluation.
        lines: what was detected, dropped and cut, for people.
    """

    train: Examples
    names: list[str]
    num_per_dataset: list[int]
    heldout: Examples
    lines: list[str]

    @property
    def digests(self) -> list[tuple[str, str]]:
        """(name, hash of what is trained on) of each data set, as Order wants it."""
        ends = np.cumsum(self.num_per_dataset).tolist()
        parts = zip(self.names, self.num_per_dataset, ends, strict=True)
        return [(name, self.train.select(range(end - size, end)).sha256()) for name, size, end in parts]


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


def load_data(config: TrainConfig, tokenizer: "PreTrainedTokenizerBase", limits: Limits, default_heldout: int) -> Data:
    """Load what a run trains on and what it is evaluated on.

    Held-out examples come from eval_dataset_name, from the built-in tasks' own held-out part, or else from a seeded
    split of the training data.

    Args:
        config: names the data sets and their fields; the built-in tasks serve where it names none.
        tokenizer: renders and tokenises.
        limits: the longest prompts and answers.
        default_heldout: examples to hold out where num_eval_prompts is None, of the training data at most a tenth.
            There are fewer if eval_dataset_name has fewer.

    Raises:
        UserError: data that cannot be used; see Loader.
    """
    loader = Loader(tokenizer, limits, config.prompt_field, config.answer_field, config.chat_template_kwargs)
    sources = _train_sources(config) or [_builtin_source("train", NUM_BUILTIN_ROWS)]
    own_heldout = config.eval_dataset_name is None and config.dataset_name is not None
    num_heldout = default_heldout if config.num_eval_prompts is None else config.num_eval_prompts
    heldout_sources = []
    if num_heldout and not own_heldout:
        heldout_sources = _heldout_sources(config) or [_builtin_source("heldout", num_heldout)]
    datasets = [loader.load(*source) for source in sources]
    heldout = Examples.join([loader.load(*source) for source in heldout_sources])
    train, sizes = Examples.join(datasets), [len(dataset) for dataset in datasets]
    if own_heldout:
        if config.num_eval_prompts is None:
            num_heldout = derive_num_heldout(num_heldout, len(train))
        kept, chosen = split_heldout(len(train), num_heldout, config.seed)
        sizes = np.diff(np.searchsorted(kept, np.cumsum([0, *sizes]))).tolist()
        train, heldout = train.select(kept), train.select(chosen)
    else:
        heldout = heldout.select(permutation(len(heldout), config.seed, HELDOUT_KEY)[:num_heldout].tolist())
    names = [name for name, _ in sources]
    return Data(train, names, sizes, heldout, [*loader.lines, *_lines_of_both(train, heldout)])


def load_heldout(
    config: HeldoutFields, tokenizer: "PreTrainedTokenizerBase", limits: Limits, default_prompts: int
) -> tuple[Examples, list[str]]:
    """What a run on the same data with the same seed holds out; every row where there are no more of them.

    Their uids are those of the run too, so that the same traces are sampled for them.

    Args:
        default_prompts: examples where num_prompts is None, of data sets at most a tenth, as in a run.

    Returns:
        (examples, what was detected, dropped and cut).

    Raises:
        UserError: data that cannot be used; see Loader.
    """
    fields = config.prompt_field, config.answer_field, config.chat_template_kwargs
    sources, num_prompts = _train_sources(config), config.num_prompts or default_prompts
    # A run numbers the rows of the built-in tasks that it trains on first.
    loader = Loader(tokenizer, limits, *fields, first_uid=0 if sources else NUM_BUILTIN_ROWS)
    if not sources:
        examples = loader.load(*_builtin_source("heldout", num_prompts))
        chosen = permutation(len(examples), config.seed, HELDOUT_KEY)
        return examples.select(chosen.tolist()), loader.lines
    examples, lines = Examples.join([loader.load(*source) for source in sources]), loader.lines
    if config.num_prompts is None and num_prompts > (num_heldout := derive_num_heldout(num_prompts, len(examples))):
        num_prompts = num_heldout
        lines.append(
            f"{num_prompts:,} of {len(examples):,} rows: those that a run on them holds out; num_prompts takes more"
        )
    chosen = permutation(len(examples), config.seed, HELDOUT_KEY)[-num_prompts:]
    return examples.select(chosen.tolist()), lines


def _train_sources(config: DataFields) -> list[Source]:
    names, split = config.dataset_names, config.dataset_train_split
    if split != DataFields.dataset_train_split:
        _check_split("dataset_train_split", split, names)
    return [(name, read_rows(name, split)) for name in names]


def _heldout_sources(config: TrainConfig) -> list[Source]:
    """Those of eval_dataset_name, which may be the training data at another split."""
    names, split = split_names(config.eval_dataset_name or []), config.dataset_eval_split
    if split is not None:
        _check_split("dataset_eval_split", split, names)
    split = split or config.dataset_train_split
    trained = [_place(name) for name in config.dataset_names]
    for name in names:
        if _place(name) in trained and not (has_splits(name) and split != config.dataset_train_split):
            valid = "dataset_eval_split with another split of it" if has_splits(name) else "other data"
            raise UserError(
                f"eval_dataset_name {name} is what is trained on; valid: {valid}, or no eval_dataset_name: then rows "
                "are held out of the training data"
            )
    return [(name, read_rows(name, split)) for name in names]


def _check_split(field: str, split: str, names: list[str]) -> None:
    """UserError for a split that was set where no data set has any."""
    if not any(map(has_splits, names)):
        raise UserError(f"{field} {split} cannot take effect: no splits in {', '.join(names) or 'the built-in tasks'}")


def _place(name: str) -> str:
    """One name for a data set, whatever way its path is written."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _lines_of_both(train: Examples, heldout: Examples) -> list[str]:
    """How many held-out questions are trained on, if any."""
    asked = set(heldout.prompts())
    trained = asked.intersection(train.prompts())
    num = sum(prompt in trained for prompt in heldout.prompts())
    return [f"{num:,} of {len(heldout):,} held-out questions are trained on as well"] if num else []


def _builtin_source(split: str, num_rows: int) -> Source:
    from nrt_fast.starter import tasks

    name = f"built-in tasks ({split})"
    rows = enumerate(tasks.rows(split, num_rows, seed=0), 1)
    return name, (Row(fields, f"{name}, row {number}") for number, fields in rows)
