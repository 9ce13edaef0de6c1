"""Built-in task family: five kinds of small word problems that thinking makes easy and guessing does not.

Every problem knows its question, its answer sentence with the hard words left open, and how to work it out in steps.
Training sees `rows` alone: question, answer, and where the hard words are. The steps serve the recipe of the starter.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

Split = Literal["train", "heldout"]
Step = Callable[[str, list[str]], str]
"""(right result, possible results) -> the result that is written down: a careful thinker returns the right one."""

NAMES = "ann bob cid dan eve fay gus hal ida joe kim leo mia ned pam ray".split()
SIDES = ["heads", "tails"]
DIGITS = list("0123456789")
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
WORDS = (
    "tiger maple lemon cloud storm river piano candle window garden silver market bridge forest pepper rabbit "
    "ticket orange castle pocket velvet dragon island mirror basket hammer blanket crystal feather meadow thunder "
    "anchor alpha tango disco bongo yoga khaki kiwi grass cross chef leaf golf flash beach math drum"
).split()
PLACES = "first second third fourth fifth".split()
OPERATIONS = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
RELATIONS = {
    relation: dict(zip(NAMES, random.Random(relation).sample(NAMES, len(NAMES))))
    for relation in "friend boss sister teacher doctor neighbor cousin".split()
}
"""The small world of the look-ups: every relation maps each person to one person."""
HELDOUT_EVERY = 10


class Problem(Protocol):
    """What every family provides."""

    sentence: str
    """The answer, with {} for every hard word."""

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        """Draw a problem at random."""

    @property
    def question(self) -> str:
        """The question, in words that spaces separate."""

    @property
    def options(self) -> list[list[str]]:
        """For every hard word, what a guess could be."""

    def think(self, step: Step) -> tuple[list[str], list[str]]:
        """Work the problem out: the lines of a trace, and the hard words that they lead to."""


def careful(right: str, _options: list[str]) -> str:
    """Take every step as it should be taken."""
    return right


@dataclass(frozen=True)
class Chain:
    """Three operations modulo ten on a start digit."""

    start: int
    operations: list[tuple[str, int]]
    sentence = "the answer to this question is {} ."

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randrange(10), [(rng.choice(list(OPERATIONS)), rng.randrange(1, 10)) for _ in range(3)])

    @property
    def question(self) -> str:
        return f"take {self.start} " + " ".join(f"{name} {operand}" for name, operand in self.operations) + " ?"

    @property
    def options(self) -> list[list[str]]:
        return [DIGITS]

    def think(self, step: Step) -> tuple[list[str], list[str]]:
        value, lines = str(self.start), []
        for name, operand in self.operations:
            result = step(str(OPERATIONS[name](int(value), operand) % 10), DIGITS)
            lines.append(f"{value} {name} {operand} is {result}")
            value = result
        return lines, [value]


@dataclass(frozen=True)
class Lookup:
    """Three hops through known relations between people."""

    relations: list[str]
    person: str
    sentence = "the person you look for is {} ."

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choices(list(RELATIONS), k=3), rng.choice(NAMES))

    @property
    def question(self) -> str:
        return "who is " + " ".join(f"{relation} of" for relation in self.relations) + f" {self.person} ?"

    @property
    def options(self) -> list[list[str]]:
        return [NAMES]

    def think(self, step: Step) -> tuple[list[str], list[str]]:
        person, lines = self.person, []
        for relation in reversed(self.relations):
            result = step(RELATIONS[relation][person], NAMES)
            lines.append(f"{relation} of {person} is {result}")
            person = result
        return lines, [person]


@dataclass(frozen=True)
class Letters:
    """Last letters of two words, both moved some places along the alphabet."""

    words: list[str]
    shift: int
    sentence = "the letters are {} and {} ."

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.sample(WORDS, 2), rng.randrange(1, 5))

    @property
    def question(self) -> str:
        return f"move the last letters of {self.words[0]} and {self.words[1]} forward by {self.shift} ."

    @property
    def options(self) -> list[list[str]]:
        return [LETTERS, LETTERS]

    def think(self, step: Step) -> tuple[list[str], list[str]]:
        lines, results = [], []
        for word in self.words:
            last = step(word[-1], LETTERS)
            results.append(step(LETTERS[(LETTERS.index(last) + self.shift) % 26], LETTERS))
            lines.append(f"{word} ends in {last} plus {self.shift} is {results[-1]}")
        return lines, results


@dataclass(frozen=True)
class Coin:
    """A coin that some people flip and others leave alone."""

    side: str
    actions: list[tuple[str, str]]
    sentence = "it shows {} ."

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(SIDES), [(name, rng.choice(["flips", "waits"])) for name in rng.sample(NAMES, 4)])

    @property
    def question(self) -> str:
        return f"a coin shows {self.side} , " + " , ".join(map(" ".join, self.actions)) + " , what does it show ?"

    @property
    def options(self) -> list[list[str]]:
        return [SIDES]

    def think(self, step: Step) -> tuple[list[str], list[str]]:
        side, lines = self.side, [f"shows {self.side}"]
        for name, action in self.actions:
            side = step(SIDES[(SIDES.index(side) + (action == "flips")) % 2], SIDES)
            lines.append(f"{name} {action} {side}")
        return lines, [side]


@dataclass(frozen=True)
class Order:
    """Which of five different digits comes in a given place when they are sorted?"""

    digits: list[str]
    place: int
    sentence = "the digit in that place is {} ."

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.sample(DIGITS, 5), rng.randrange(1, 5))

    @property
    def question(self) -> str:
        return f"sort {' '.join(self.digits)} , which comes {PLACES[self.place]} ?"

    @property
    def options(self) -> list[list[str]]:
        return [self.digits]

    def think(self, step: Step) -> tuple[list[str], list[str]]:
        found = [step(digit, self.digits) for digit in sorted(self.digits)[: self.place + 1]]
        return [f"{place} {digit}" for place, digit in zip(PLACES, found)], found[-1:]


FAMILIES: dict[str, type[Problem]] = {
    "chain": Chain,
    "lookup": Lookup,
    "letters": Letters,
    "coin": Coin,
    "order": Order,
}


def split_of(question: str) -> Split:
    """Say which split a question belongs to: a hash of its text decides, so the two can never share one."""
    return "heldout" if zlib.crc32(question.encode()) % HELDOUT_EVERY == 0 else "train"


def problems(split: Split, seed: int, families: dict[str, type[Problem]] = FAMILIES) -> Iterator[tuple[str, Problem]]:
    """Draw (family, problem) pairs of one split without end."""
    rng = random.Random(f"{split} {seed}")
    while True:
        family = rng.choice(list(families))
        problem = families[family].draw(rng)
        if split_of(problem.question) == split:
            yield family, problem


def row(family: str, problem: Problem) -> dict:
    """Turn a problem into what training and evaluation may see."""
    hard_words = problem.think(careful)[1]
    answer, spans = "", []
    for text, word in zip(problem.sentence.split("{}"), [*hard_words, ""]):
        answer += text
        spans.append([len(answer), len(answer) + len(word)])
        answer += word
    return {"question": problem.question, "answer": answer, "family": family, "hard_spans": spans[:-1]}


def rows(split: Split, num_rows: int, seed: int, families: dict[str, type[Problem]] = FAMILIES) -> list[dict]:
    """Make `num_rows` rows, the same for the same arguments on every machine.

    Train and held-out questions are disjoint, and no held-out question comes twice.

    Returns:
        Rows with `question`, `answer`, `family` and `hard_spans`, the character spans of the answer's hard words.
    """
    made: list[dict] = []
    seen: set[str] = set()
    source = problems(split, seed, families)
    while len(made) < num_rows:
        family, problem = next(source)
        if split == "train" or problem.question not in seen:
            seen.add(problem.question)
            made.append(row(family, problem))
    return made
