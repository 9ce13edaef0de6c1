"""Whether a run learns to reason, in one or two sentences with figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nrt_fast.health import WINDOW
from nrt_fast.html_report.read import RunRecord
from nrt_fast.html_report.text import NO_BREAK
from nrt_fast.metrics import mean

MIN_ITEMS = 10  # as for nrt-fast score: fewer say nothing
MARGIN = 2.0  # standard errors, 95%
SOME_RIGHT = 0.01  # accuracy under which greedy answers are free text, never the reference word by word
GAIN = "nrt/gain"


@dataclass(frozen=True)
class Verdict:
    """What a run shows.

    Attributes:
        level: good, bad, mixed, or open where it cannot be told (yet).
        headline: in a few words.
        text: one or two sentences with the figures.
    """

    level: Literal["good", "mixed", "bad", "open"]
    headline: str
    text: str


def judge(run: RunRecord) -> Verdict:
    """The verdict; alarms are told beside it."""
    if run.config["objective"] == "sft":
        told = f" {_accuracy(run.before, run.after)}" if run.after else ""
        return Verdict("open", "No reasoning is trained", f"Objective sft has no traces.{told}")
    if not run.finished:
        return _unfinished(run)
    if not run.after:
        return Verdict(
            "open", "No held-out items, no verdict",
            f"{_training_gain(run)} That is on the prompts it trained on, and tells no reasoning from memorising: "
            "hold some items out (num_eval_prompts).",
        )  # fmt: skip
    before, after = run.before, run.after
    items = after["num_items"]
    if items < MIN_ITEMS:
        return Verdict(
            "open", "Too few held-out items to tell",
            f"Thinking adds {gain(after)} nats a token, {gain(before)} before, on {items} held-out "
            f"item{'s' * (items != 1)}; hold out at least {MIN_ITEMS}, better hundreds.",
        )  # fmt: skip
    level, headline = _held_out(before, after)
    if level == "good" and run.raised:
        level, headline = "mixed", f"{headline}, under an alarm"
    text = (
        f"On {items:,} held-out items thinking adds {gain(after)} nats a token (95%) to the log-probability of the "
        f"reference answers; before training it was {gain(before)}. {_accuracy(before, after)}"
    )
    return Verdict(level, headline, text)


def _held_out(before: dict[str, float], after: dict[str, float]) -> tuple[Literal["good", "mixed", "bad"], str]:
    value, error = after["gain"], MARGIN * after["gain_error"]
    change = value - before["gain"]
    noise = MARGIN * math.hypot(before["gain_error"], after["gain_error"])
    if value < -error:
        return "bad", "Thinking hurts"
    if value <= error:
        return "bad", "Thinking does not help"
    if change > noise:
        return "good", "It learns to reason"
    return "mixed", "Thinking helps, but less than before" if change < -noise else "Thinking helps as before, no more"


def _unfinished(run: RunRecord) -> Verdict:
    of = f" of {run.config['max_steps']:,}" if run.config.get("max_steps") else ""
    headline = f"Not finished: step {run.steps:,}{of}"
    measured = [row for row in run.rows if "eval/gain" in row]
    if not measured:
        return Verdict("open", headline, f"Nothing was measured on held-out items so far. {_training_gain(run)}")
    now = {name.removeprefix("eval/"): value for name, value in measured[-1].items() if name.startswith("eval/")}
    began = f"; before training it was {gain(run.before)} on {run.before['num_items']:,}" if run.before else ""
    text = f"After step {measured[-1]['step']:,} thinking adds {gain(now)} nats a token on {now['num_items']:,} items"
    return Verdict("open", headline, f"{text}{began}. There is no verdict before the end.")


def _training_gain(run: RunRecord) -> str:
    gains = [row[GAIN] for row in run.rows if GAIN in row]
    first, last = mean(gains[:WINDOW]), mean(gains[-WINDOW:])
    return f"In training the gain of thinking went from {first:+.3f} to {last:+.3f} nats a token."


def _accuracy(before: dict[str, float], after: dict[str, float]) -> str:
    """What of the accuracy is thinking's."""
    pairs = [(means["accuracy"], means["accuracy_no_trace"]) for means in (before, after)]
    if max(max(pair) for pair in pairs) < SOME_RIGHT:
        return "Hardly any greedy answer equals its reference word by word, so accuracy tells nothing here."
    (was, was_without), (now, without) = pairs
    return (
        f"Greedy answers are right in {now:.0%} of the items, {was:.0%} before; without a trace in {without:.0%}, "
        f"{was_without:.0%} before. So thinking contributes {_points(now - without)}, and "
        f"{_points(was - was_without)} before."
    )


def _points(share: float) -> str:
    return f"{100 * share:+.0f} points"


def gain(means: dict[str, float], name: str = "gain") -> str:
    """A gain with its 95% margin."""
    return f"{means[name]:+.3f}{NO_BREAK}±{NO_BREAK}{MARGIN * means[f'{name}_error']:.3f}"
