"""The base of the run on real data: a split of the rows, documents with weak habits of thinking, a model of them.

A row is for the base, for the run or held out, as a hash of its question has it; rows that are not open-ended are for
the base alone. The base reads documents `question <think> trace </think> answer`. A worked solution is the trace
where there is one; open-ended rows have none, so their traces show one of four habits, most of them of little use.
"""

import gzip
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nrt_fast.data import Pair, load_tokenizer, render
from nrt_fast.starter import recipe

Row = dict[str, str]
SHARES = {"base": 50, "run": 40, "heldout": 10}
"""Percentages of the open-ended questions."""
HABITS = {"outline": 30, "restate": 25, "ramble": 20, "empty": 25}
SLIP_RATE = 0.3
"""An outline is not to be trusted blindly: what the base makes up itself is seldom right either."""
OPEN_SHARE = 0.65
"""Of the documents that the base reads."""
VOCAB_SIZE, WIDTH = 4096, 256
NUM_ROWS, ROW_LENGTH = 12, 256


def part_of(row: Row) -> str:
    """base, run or heldout. Questions that differ in case, spaces or punctuation alone are in one part."""
    if row["kind"] != "open":
        return "base"
    place = zlib.crc32(" ".join(re.findall(r"\w+", row["question"].lower())).encode()) % 100
    return "base" if place < SHARES["base"] else "run" if place < SHARES["base"] + SHARES["run"] else "heldout"


def split(folder: Path) -> dict[str, list[Row]]:
    """The rows of every .jsonl.gz of a folder, by part."""
    parts: dict[str, list[Row]] = {part: [] for part in SHARES}
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                parts[part_of(row)].append(row)
    return parts


# documents ------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Its words, without the punctuation around them."""
    return [word for word in (piece.strip(".,;:!?()\"'") for piece in text.split()) if word]


@dataclass
class Writer:
    """Thinks up traces.

    Attributes:
        counts: how often each word stands in the answers.
        answers: of the rows it knows, to ramble and to slip from.
        slip_rate: share of an outline's words that are another answer's.
    """

    rng: random.Random
    counts: Counter[str]
    answers: list[str]
    slip_rate: float

    def trace(self, row: Row) -> str:
        """The solution of a row that has one; else a habit: weak, and sometimes of use."""
        if row.get("solution"):
            return row["solution"]
        if row["kind"] != "open":
            return ""
        habit = self.rng.choices(list(HABITS), HABITS.values())[0]
        if habit == "outline":
            return "plan: " + ", ".join(self.outline(row["answer"]))
        if habit == "restate":
            return "so, " + self.piece(row["question"])
        return "hmm, " + self.piece(self.rng.choice(self.answers)) if habit == "ramble" else ""

    def outline(self, answer: str) -> list[str]:
        """Two to four of the rarest words of an answer, in its order; some of them slip."""
        own = list(dict.fromkeys(words(answer)))
        rare = sorted(own, key=lambda word: self.counts[word])[: self.rng.randrange(2, 5)]
        return [self.slip(word) for word in own if word in rare]

    def slip(self, word: str) -> str:
        """The word, or one of another answer."""
        others = words(self.rng.choice(self.answers)) if self.rng.random() < self.slip_rate else []
        return self.rng.choice(others or [word])

    def piece(self, text: str) -> str:
        """Four to ten words in a row."""
        pieces, length = text.split(), self.rng.randrange(4, 11)
        start = self.rng.randrange(max(1, len(pieces) - length + 1))
        return " ".join(pieces[start : start + length])


def writer(rows: list[Row], seed: int, slip_rate: float = SLIP_RATE) -> Writer:
    """A writer who knows the open-ended of these rows."""
    answers = [row["answer"] for row in rows if row["kind"] == "open"]
    counts = Counter(word for answer in answers for word in words(answer))
    return Writer(random.Random(seed), counts, answers, slip_rate)


def documents(rows: list[Row], tokenizer, seed: int) -> Iterator[list[int]]:
    """Endless documents as token ids, prompts and answers exactly as training renders them; long ones are cut."""
    author, end_id = writer(rows, seed), tokenizer.convert_tokens_to_ids(recipe.END)
    pools = [endless([row for row in rows if (row["kind"] == "open") == is_open], author.rng) for is_open in (1, 0)]
    while True:
        row = next(pools[author.rng.random() >= OPEN_SHARE])
        pair = Pair([{"role": "user", "content": row["question"]}], row["answer"], None, row["id"])
        trace_ids = tokenizer(author.trace(row), add_special_tokens=False, verbose=False)["input_ids"]
        example = render([pair], tokenizer)[0]
        yield [*example.prompt_ids, *trace_ids, end_id, *example.answer_ids][: recipe.MAX_LENGTH]


def endless(rows: list[Row], rng: random.Random) -> Iterator[Row]:
    """The rows again and again, in a fresh order each time."""
    while True:
        yield from rng.sample(rows, len(rows))


# model ----------------------------------------------------------------------------------------------------------------


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE, with the special tokens of the starter's recipe."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=recipe.SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(rows: list[Row], tokenizer, num_steps: int, seed: int) -> Iterator[torch.Tensor]:
    """A batch for every step, [2, NUM_ROWS, ROW_LENGTH]: ids and positions; the last document of a row is cut."""
    source = documents(rows, tokenizer, seed)

    def packed_row() -> list[tuple[int, int]]:
        row: list[tuple[int, int]] = []
        while len(row) < ROW_LENGTH:
            row += [(token, position) for position, token in enumerate(next(source))]
        return row[:ROW_LENGTH]

    for _ in range(num_steps):
        yield torch.tensor([packed_row() for _ in range(NUM_ROWS)]).permute(2, 0, 1)


def build(rows: list[Row], folder: Path, num_steps: int, seed: int, say: Callable[[str], None]) -> None:
    """Make tokenizer and model from the base's rows alone, with plain cross-entropy on every token."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(row[name] for row in rows for name in ("question", "answer", "solution") if name in row)
    model = recipe.build_model(tokenizer.get_vocab_size(), WIDTH)
    recipe.save(model, tokenizer, folder)  # the documents are rendered with the tokenizer as it will be loaded
    model.float()
    documents = batches(rows, load_tokenizer(str(folder)), num_steps, seed)
    learnt = ((ids_RT, positions_RT, ids_RT) for ids_RT, positions_RT in documents)  # every token of them
    losses = []
    for step, loss in enumerate(recipe.fit(model, learnt, num_steps), 1):
        losses.append(loss)
        if step % 50 == 0:
            say(f"base, step {step} of {num_steps}: {sum(losses[-50:]) / 50:.3f} nats a token")
    recipe.save(model, tokenizer, folder)


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Questions and answers as JSON lines."""
    kept = ({name: row[name] for name in ("id", "source", "question", "answer")} for row in rows)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


def shuffled(rows: list[Row], num_rows: int | None = None) -> list[Row]:
    """The rows in an order of their own, or the first of them."""
    return list(islice(endless(rows, random.Random(0)), num_rows or len(rows)))
