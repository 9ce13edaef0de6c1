"""Held-out items before and after training, each token of the reference answer coloured by what the trace did to it."""

from __future__ import annotations

import math

from nrt_fast.html_report.read import RunRecord
from nrt_fast.html_report.text import MINUS, shown
from nrt_fast.metrics import mean
from nrt_fast.types import Sample

FULL = 2.0  # nats at which a colour is full: 7.4 times as likely
SURPRISE = 4.0  # nats at which a sampled token's shade is full
NUM_OPEN = 3
SCALE = f"""<div class="scale">
<p>Each token of the <b>reference answer</b> is coloured by log c &minus; log b: its log-probability with the
trace (c) less that without one (b). Point at a token, or touch it, to
read both. Hard tokens, on which reasoning is measured, are underlined.</p>
<div class="ramp" role="img" aria-label="red: the trace made the token {math.exp(FULL):.0f} times less likely;
no colour: it changed nothing; green: {math.exp(FULL):.0f} times likelier"></div>
<p class="ends"><span>&minus;{FULL:g} nats: {math.exp(FULL):.0f}&times; less likely</span><span>no change</span>
<span>+{FULL:g} nats: {math.exp(FULL):.0f}&times; likelier</span></p>
<p>Tokens of the <b>trace</b> are the darker, the less likely they were when they were sampled.</p></div>"""


def samples_html(run: RunRecord) -> str:
    """The items of one run; of an unfinished one as they were before training."""
    before, after = run.samples
    if not before:
        why = "no item was held out" if run.finished else "there is no checkpoint yet, or no item was held out"
        return f'<p class="note">No traces are kept: {why}.</p>'
    items = [
        _item(old, [("before training", old), *([("after", after[index])] if after else [])])
        for index, old in enumerate(before)
    ]
    rest = "".join(items[NUM_OPEN:])
    more = f"<details><summary>{len(items) - NUM_OPEN} more items</summary>{rest}</details>" if rest else ""
    note = "" if after else '<p class="note">The run is not finished: these are the traces before training.</p>'
    return f"{SCALE}{note}{''.join(items[:NUM_OPEN])}{more}"


def _item(item: Sample, versions: list[tuple[str, Sample]]) -> str:
    columns = "".join(_version(label, sample) for label, sample in versions)
    return (
        f'<article class="item"><h4>{shown(item.question)}</h4><p class="note">reference: {shown(item.reference)}</p>'
        f'<div class="versions">{columns}</div></article>'
    )


def _version(label: str, sample: Sample) -> str:
    gains = [c - b for c, b in zip(sample.log_c, sample.log_b, strict=True)]
    right = sample.answer == sample.reference
    trace = "".join(
        _token(text, f"--a:{min(1.0, -logp / SURPRISE):.2f}", "z", f"sampled with probability {_share(logp)}")
        for text, logp in zip(sample.trace_tokens, sample.trace_logprobs, strict=True)
    )
    hard = set(sample.hard_positions)
    answer = "".join(
        _token(
            text, f"--a:{min(1.0, abs(gain) / FULL):.2f}",
            ("up" if gain >= 0 else "down") + " hard" * (index in hard),
            f"c {_share(sample.log_c[index])}, b {_share(sample.log_b[index])}, log c {MINUS} log b {_signed(gain)}",
        )
        for index, (text, gain) in enumerate(zip(sample.reference_tokens, gains, strict=True))
    )  # fmt: skip
    return (
        f'<section><h5>{label}<span class="gain {"up" if mean(gains) >= 0 else "down"}">gain {_signed(mean(gains))} '
        f'nats a token</span></h5><p class="label">trace</p><p class="tokens trace">{trace or "(empty)"}</p>'
        f'<p class="label">reference answer</p><p class="tokens">{answer}</p>'
        f'<p class="label">its own answer</p><p class="own">{shown(sample.answer)} '
        f'<b class="{"up" if right else "down"}">{"✓ as the reference" if right else "✗ not the reference"}</b></p>'
        "</section>"
    )


def _token(text: str, style: str, kind: str, told: str) -> str:
    # Focus by touch shows what the pointer shows; the tab key passes tokens by.
    return f'<span class="{kind}" style="{style}" data-told="{told}" tabindex="-1">{shown(text) or "·"}</span>'


def _share(logp: float) -> str:
    p = math.exp(logp)
    return f"{p:.1%}" if p >= 0.001 else f"{p:.1e}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)
