"""The lab's questions and its base model: three kinds of tasks, and a writer with mixed habits in all of them.

    A   thinking is needed, the answer is one hard token
    B   thinking is needed, the answer is a sentence of 17 or 20 tokens, one or two of them hard
    C   thinking is useless: the answer stands in the question, or is a fact that the model has by heart

The base is made as the starter is (nrt_fast.starter.recipe): it learns to work A and B out, then mostly rambles and
guesses. In C it learns to answer whatever the trace, and then to be right at a fixed rate, else to make the same
careless choice: its answer never owes anything to the trace.
"""

import random
from dataclasses import dataclass
from typing import Self

from nrt_fast.starter import recipe, tasks
from nrt_fast.starter.tasks import NAMES, RELATIONS, WORDS, Chain, Letters, Lookup, Order, Problem, Step


class ShortChain(Chain):
    """Three sums or differences modulo ten; the answer is the digit alone."""

    sentence = "{}"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randrange(10), [(rng.choice(["plus", "minus"]), rng.randrange(1, 6)) for _ in range(3)])


class ShortLookup(Lookup):
    """Three hops between people; the answer is the name alone."""

    sentence = "{}"


class LongOrder(Order):
    """A digit of a sorted list, at the end of a long sentence."""

    sentence = "if you put all of these digits in order from small to large the one you want is {} ."


class LongLetters(Letters):
    """Two letters moved along the alphabet, far apart in a long sentence."""

    sentence = "once both words are read the first letter is {} and the second one is {} ."


@dataclass(frozen=True)
class Read:
    """What does somebody have? The question says it, always in the same place."""

    people: list[str]
    things: list[str]
    sentence = "{}"
    sure = 0.5

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.sample(NAMES, 2), rng.sample(WORDS, 2))

    @property
    def question(self) -> str:
        return " , ".join(self._facts()) + f" , what has {self.people[0]} ?"

    @property
    def options(self) -> list[list[str]]:
        return [self.things]

    @property
    def careless(self) -> str:
        """The thing that was named last."""
        return self.things[1]

    def think(self, _step: Step) -> tuple[list[str], list[str]]:
        return self._facts(), [self.things[0]]

    def _facts(self) -> list[str]:
        return [f"{who} {does} {thing}" for who, does, thing in zip(self.people, ["has", "sees"], self.things)]


@dataclass(frozen=True)
class Fact:
    """One hop between people, known by heart; the words that ask only make questions differ."""

    words: list[str]
    relation: str
    person: str
    sentence = "{}"
    sure = 0.5

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.sample(WORDS, 2), rng.choice(["boss", "doctor"]), rng.choice(NAMES))

    @property
    def question(self) -> str:
        return " ".join(self._asking()) + f" who is {self.relation} of {self.person} ?"

    @property
    def options(self) -> list[list[str]]:
        return [NAMES]

    @property
    def careless(self) -> str:
        """The person of whom everybody has heard."""
        return NAMES[0]

    def think(self, _step: Step) -> tuple[list[str], list[str]]:
        return [*self._asking(), f"{self.relation} of {self.person}"], [RELATIONS[self.relation][self.person]]

    def _asking(self) -> list[str]:
        return [f"the {word} asks" for word in self.words]


KINDS: dict[str, dict[str, type[Problem]]] = {
    "A": {"chain": ShortChain, "lookup": ShortLookup},
    "B": {"order": LongOrder, "letters": LongLetters},
    "C": {"read": Read, "fact": Fact},
}
HABITS = recipe.HABITS | {"empty": 20}
"""The starter's, with more empty traces: what the base says without a trace has to be calibrated."""
FAMILIES = {name: family for families in KINDS.values() for name, family in families.items()}


def think(rng: random.Random, problem: Problem, styles: dict[str, int]) -> tuple[str, list[str]]:
    """A trace as the starter's writer makes it, and the hard words after it.

    In C they owe nothing to the trace: the lessons' are right after any, and habit makes them careless after any.
    """
    learns = styles is recipe.LESSONS
    if not isinstance(problem, Read | Fact):
        return recipe.think(rng, problem, HABITS if styles is recipe.HABITS else styles)
    trace, _ = recipe.think(rng, problem, HABITS if learns or styles is recipe.HABITS else styles)
    right = problem.think(tasks.careful)[1]
    return trace, right if learns or rng.random() < problem.sure else [problem.careless]
