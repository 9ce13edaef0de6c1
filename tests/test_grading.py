"""When an answer is right: equal texts, SQuAD's normalisation, math-verify; maj@k and pass@k."""

import itertools
import subprocess
import sys
import time

import pytest

from nrt_fast import grading
from nrt_fast.grading import Grade, MathJudge, check_metrics, exact, grade, maj_at, normalise, normalised, pass_at
from nrt_fast.types import UserError


@pytest.fixture(scope="module")
def judge():
    with MathJudge() as judge:
        yield judge


# Texts


def test_exact_is_the_text_but_for_white_space_around_it():
    assert exact("New York", " New York\n")
    assert not exact("New York", "new york") and not exact("New York", "New  York")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("an  apple a\tday", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),  # an article is a whole word
        ("Padmé Amidala", "padmé amidala"),
        ("(A)", "a"),  # never nothing: an empty answer would be right
        ("The", "the"),
        (" +", "+"),
        ("", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalise(text) == expected


def test_normalised_answers_are_equal_whatever_their_case_and_articles():
    assert normalised("the Netherlands", "Netherlands.")
    assert not normalised("(A)", "") and not normalised("(A)", "(B)")


def test_any_target_is_right_and_equal_answers_vote_together():
    graded = grade(["nyc", "Boston", "NYC", "new york"], ["New York", "NYC"], normalised)
    assert graded == Grade([True, False, True, True], [0, 1, 0, 3])
    assert grade(["nyc", "NYC"], ["New York", "NYC"], exact).right == [False, True]


# Mathematics


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("72", "The answer is 72."),
        ("\\frac{1}{2}", "0.5"),
        ("$\\frac{1}{2}$", "1/2"),
        ("x^2+x-6", "(x-2)(x+3)"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("1,000", "1000"),
        ("(3,4)", "(3, 4)"),
        ("the answer to this question is 7 .", "it is 7"),
        ("no formula at all", "no formula at all"),
    ],
)
def test_mathematics_that_is_equal(judge, target, answer):
    assert judge.same(target, answer)


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("72", "27"),
        ("72", ""),
        ("-5", "5"),
        ("3x", "3"),
        ("(1, 4)", "(3, 4)"),
        ("yes", "sey"),  # words are no products of letters
        ("no formula", "none either"),
        ("\\frac{1}{", "1"),
        ("\\frac{", "\\sqrt["),
        ("(" * 300, "(" * 299),
        ("1/0", "2/0"),
    ],
)
def test_what_is_not_equal_or_cannot_be_read(judge, target, answer):
    assert not judge.same(target, answer)


def test_the_judge_goes_on_after_all_of_that(judge):
    assert judge.same("2/4", "0.5")
    assert judge.num_given_up == 0


def test_a_comparison_that_would_hang_is_given_up():
    with MathJudge(seconds=1.0) as judge:
        assert judge.same("1/2", "0.5")
        started = time.monotonic()
        assert not judge.same("9^{9^{9^{9}}}", "8^{9^{9^{9}}} + 1")
        assert not judge.same("9^{9^{9^{9}}}", "8^{9^{9^{9}}} + 1"), "it is known now"
        assert time.monotonic() - started < 60
        assert judge.num_given_up == 1
        assert judge.same("1/3", "2/6"), "another process answers"


def test_what_the_process_cannot_load_is_told(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('it is broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"math-verify cannot be loaded \(.*it is broken\); pip install 'nrt-fast\[math\]'"
    ):
        MathJudge().same("1", "2")


def test_a_missing_library_is_told_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(grading, "find_spec", lambda name: None)
    check_metrics(["exact", "normalised"])
    with pytest.raises(UserError, match=r"pip install 'nrt-fast\[math\]'"):
        check_metrics(["exact", "math"])


def test_the_process_ends_with_its_parent():
    code = (
        "import os\nfrom nrt_fast.grading import MathJudge\njudge = MathJudge()\n"
        "assert judge.same('1/2', '0.5')\nprint(judge._process.pid, flush=True)\nos._exit(0)"
    )
    pid = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, "an orphan is left"
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Several answers


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n):
    for num_right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * num_right + [False] * (n - num_right), k))
        assert pass_at(n, num_right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majorities():
    graded = Grade([True, True, False, False, False, True], [0, 0, 2, 2, 2, 0])
    assert maj_at(graded, 1) == 1 / 2
    assert maj_at(graded, 2) == pytest.approx((1 + 0 + 1 / 2) / 3), "a tie is drawn by lot"
    assert maj_at(graded, 3) == 1 / 2
    assert maj_at(graded, 4) == 1 / 2, "the first four; two are left over"
    assert maj_at(graded, 6) == 1 / 2
    assert maj_at(Grade([False, True, True], [0, 1, 1]), 3) == 1
    assert maj_at(Grade([False, True, False], [0, 1, 2]), 3) == pytest.approx(1 / 3)
