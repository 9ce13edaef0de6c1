"""When an answer is right: equal to one of the texts that are, under one of three ideas of equal. No torch."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

from nrt_fast.types import UserError

Same = Callable[[str, str], bool]
"""Whether a text that is right and another one say the same."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
MATH_SECONDS = 10.0
"""One comparison takes milliseconds; what takes longer than this will not end soon."""


@dataclass(frozen=True)
class Grade:
    """The answers to one question.

    Attributes:
        right: of each answer, whether it says the same as one of the texts that are right.
        votes: of each answer, the first one that says the same.
    """

    right: list[bool]
    votes: list[int]


def grade(answers: list[str], targets: list[str], same: Same) -> Grade:
    """Grade answers against the texts that are right."""
    votes: list[int] = []
    for number, answer in enumerate(answers):
        votes.append(next((v for v in dict.fromkeys(votes) if same(answers[v], answer)), number))
    return Grade([any(same(target, answer) for target in targets) for answer in answers], votes)


def pass_at(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k samples drawn of these hold a right one: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def maj_at(graded: Grade, k: int) -> float:
    """How often the most frequent of k answers is right: mean over disjoint runs of k, ties drawn by lot."""
    starts = range(0, len(graded.votes) - k + 1, k)
    return sum(_majority(graded.right[s : s + k], graded.votes[s : s + k]) for s in starts) / len(starts)


def _majority(right: list[bool], votes: list[int]) -> float:
    counts = {vote: votes.count(vote) for vote in votes}
    winners = [r for r, vote in zip(right, votes, strict=True) if counts[vote] == max(counts.values())]
    return sum(winners) / len(winners)


def exact(target: str, answer: str) -> bool:
    """Equal text, but for white space around it."""
    return target.strip() == answer.strip()


def normalised(target: str, answer: str) -> bool:
    """Equal after SQuAD's normalisation."""
    return normalise(target) == normalise(answer)


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """SQuAD's normalisation (arXiv 1606.05250): no case, punctuation or articles, single spaces.

    A step that would leave nothing of a text ("(A)" is an article in brackets) is left out.
    """
    for step in (str.lower, lambda text: text.translate(NO_PUNCTUATION), lambda text: ARTICLES.sub(" ", text)):
        text = step(text) if step(text).strip() else text
    return " ".join(text.split())


class MathJudge:
    """Asks math-verify, in a process of its own that is ended where an answer takes it too long; a context manager.

    Its own time limits are Python's alarms: they interrupt neither one long step of integers (9^9^9^9), nor work
    outside the main thread.

    Args:
        seconds: what one comparison may take.

    Attributes:
        num_given_up: comparisons that were too long, or ended the process; they count as not equal.
    """

    def __init__(self, seconds: float = MATH_SECONDS):
        self.seconds, self.num_given_up = seconds, 0
        self._known: dict[tuple[str, str], bool] = {}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> MathJudge:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def same(self, target: str, answer: str) -> bool:
        """Whether the texts are equal, or math-verify reads the same value in both.

        Raises:
            UserError: math-verify cannot be loaded.
        """
        pair = target.strip(), answer.strip()
        if pair not in self._known:
            self._known[pair] = pair[0] == pair[1] or self._ask(pair)
        return self._known[pair]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, pair: tuple[str, str]) -> bool:
        if self._process is None:
            self._start()
        self._process.stdin.write(json.dumps(pair) + "\n")
        self._process.stdin.flush()
        if told := self._process.stdout.readline():
            return json.loads(told)
        self.close()
        self.num_given_up += 1
        return False

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from nrt_fast import grading; grading.serve({self.seconds})"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,  # Ctrl-C is for the command, which ends this when it is ready to.
        )  # fmt: skip
        problem = json.loads(self._process.stdout.readline() or '"its process ended"')
        if problem is not None:
            self.close()
            raise UserError(f"metrics: math-verify cannot be loaded ({problem}); pip install 'nrt-fast[math]'")


def serve(seconds: float) -> None:
    """Answer pairs from standard input until it is closed, one JSON line each; null first, or what is wrong.

    What takes longer ends the process: an alarm without a handler is the system's, and interrupts everything.
    """
    logging.disable()  # math-verify warns that its own time limits are off
    out, sys.stdout = sys.stdout, sys.stderr

    def tell(value: bool | str | None) -> None:
        print(json.dumps(value), file=out, flush=True)

    try:
        from math_verify import parse, verify
    except Exception as error:
        return tell(f"{type(error).__name__}: {error}")

    @lru_cache(maxsize=4096)
    def read(text: str) -> list:
        found = parse(f"${text}$", parsing_timeout=None) if is_formula(text) else []
        return found or parse(text, parsing_timeout=None)

    tell(None)
    for line in sys.stdin:
        target, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            equal = bool(verify(read(target), read(answer), timeout_seconds=None))
        except Exception:  # RecursionError and MemoryError among them: what cannot be compared is not equal
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        tell(equal)


def is_formula(text: str) -> bool:
    r"""Whether a text is mathematics as a whole, without the dollars that math-verify looks for: \sqrt{2}, (3, 4)."""
    if "$" in text or re.search(r"\\[(\[]|\\boxed", text):
        return False
    bare = re.sub(r"\\(text|mathrm|mbox)\{[^}]*\}|\\[a-zA-Z]+", "", text)
    return not re.search(r"[^\W\d_]{2}", bare) and bool(re.search(r"[\d\\=+*/^]", text))


def check_metrics(metrics: list[str]) -> None:
    """UserError with the command that installs math-verify, where it is asked for and not there."""
    if "math" in metrics and find_spec("math_verify") is None:
        raise UserError("metrics math needs math-verify, which is not installed: pip install 'nrt-fast[math]'")
