"""nrt-fast report: what the page says, that it says what the run says, and that it needs and does nothing else."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
from chromium import CHROMIUM, chromium

from nrt_fast import cli, loop
from nrt_fast.arguments import parse
from nrt_fast.config import ReportConfig, TrainConfig
from nrt_fast.health import ALARMS
from nrt_fast.html_report import RunRecord, read_run, render
from nrt_fast.html_report.charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    draw,
    log_ticks,
    smooth,
    ticks,
    told,
)
from nrt_fast.html_report.page import command
from nrt_fast.html_report.panels import charts_of
from nrt_fast.html_report.text import NO_BREAK
from nrt_fast.html_report.traces import samples_html
from nrt_fast.html_report.verdict import judge
from nrt_fast.report_command import report
from nrt_fast.types import Sample, UserError

VOID = {"meta", "link", "br", "img", "input", "hr"}
MEANS = {
    "accuracy": 0.5, "accuracy_no_trace": 0.2, "gain": 0.3, "gain_error": 0.01, "hard_token_gain": 0.9,
    "hard_token_gain_error": 0.05, "hard_token_logp": -1.0, "trace_length": 11.0, "entropy": 1.0,
    "delimiter_rate": 1.0, "num_items": 200,
}  # fmt: skip
SAMPLE = Sample("q ?", "so it is", "it is 4", "it is 5", ["so", " it", " is"], [-0.1, -4.0, -9.0],
                ["it", " is", " 5", "</s>"], [-0.5, -1.0, -3.0, -0.2], [-0.5, -2.0, -0.5, -0.2], [2])  # fmt: skip


class Document(HTMLParser):
    """A page that is checked while it is read: every element that is opened is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data.replace(NO_BREAK, " ") if self.open[-1:] != ["style"] else ""

    def values(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def record(**fields):
    """A finished run of ten steps, as read."""
    rows = [{"step": step, "reward": 0.1 * step, "nrt/gain": 0.01 * step, "step_time": 2.0} for step in range(1, 11)]
    config = vars(TrainConfig(dtype="float32", max_steps=10))
    before = MEANS | {"gain": 0.05, "accuracy": 0.3}
    values = {"name": "run", "rows": rows, "finished": True, "config": config, "given": {}, "before": before,
              "after": MEANS, "samples": ([SAMPLE], [SAMPLE])}  # fmt: skip
    return RunRecord(**(values | fields))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run's folder, without its weights."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("final", "*.safetensors", "completions"))
    return tmp_path / "run"


def charts(*runs):
    """By title."""
    return {chart.title: chart for group in charts_of(list(runs)).values() for chart in group}


def written(*runs, **fields):
    return report(ReportConfig([str(run) for run in runs], **fields)).read_text(encoding="utf-8")


# The page


@pytest.mark.parametrize("num_runs", [1, 2])
def test_a_page_is_well_formed_and_needs_nothing_else(num_runs):
    text = render([record(name=f"run {number}") for number in range(num_runs)])
    page = Document(text)
    tags = {tag for tag, _ in page.elements}
    assert {"h1", "svg", "figure", "table", "details"} <= tags
    assert not tags & {"script", "img", "iframe", "object", "embed", "form"}
    assert not [value for name in ("src", "srcset", "data", "action") for value in page.values(name)]
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    assert not re.search(r"https?:|url\(|@import|@font-face", text)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    assert {value[1:] for value in page.values("href") if value.startswith("#")} <= set(ids)
    for tag, attributes in page.elements:
        if tag == "svg" and "aria-hidden" not in attributes:
            assert {attributes["aria-labelledby"], attributes["aria-describedby"]} <= set(ids)


def test_figures_are_those_of_the_summary(run):
    text = Document(written(run)).text
    summary = json.loads((run / "summary.json").read_text())
    for when in ("before", "after"):
        means = summary[when]
        for name in ("gain", "hard_token_gain"):
            assert f"{means[name]:+.3f} ± {2 * means[f'{name}_error']:.3f}" in text
        for name in ("accuracy", "accuracy_no_trace", "delimiter_rate"):
            assert f"{means[name]:.1%}" in text
    assert f"{summary['peak_memory_gib']:.2f} GiB" in text
    assert f"torch {summary['versions']['torch']}" in text
    read = read_run(str(run))
    assert sum(read.seconds.values()) == pytest.approx(summary["train_seconds"])
    assert (read.before, read.after, read.health) == (summary["before"], summary["after"], summary["health"])


def test_the_default_place_and_what_may_be_replaced(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "run"]) == cli.main(["report", "run"]) == 0, "an earlier report is replaced"
    assert capsys.readouterr().out == "run/report.html shows run: open it in a browser\n" * 2
    shutil.copytree(run, "other")
    assert cli.main(["report", "run", "other"]) == 0
    assert "2 runs" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=r"metrics\.jsonl is there and no report of nrt-fast"):
        written(run, output_file=str(run / "metrics.jsonl"))
    written(run, output_file="new/folder/r.html")
    with pytest.raises(UserError, match=r"cannot write run/run\.json/r\.html"):
        written(run, output_file="run/run.json/r.html")


def test_it_takes_no_torch(run):
    code = f"import sys; sys.modules['torch'] = None; from nrt_fast import cli; sys.exit(cli.main(['report', '{run}']))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


HOSTILE = "</style></svg><script>alert(1)</script>\" onload='x' \x1b[31m\ud800"


def test_text_of_a_run_is_never_markup(run):
    path = run / "samples.json"
    samples = json.loads(path.read_text())
    for items in samples.values():
        for item in items:
            for name in ("question", "trace", "answer", "reference"):
                item[name] = HOSTILE
            for name in ("trace_tokens", "reference_tokens"):
                item[name] = [HOSTILE] * len(item[name])
    path.write_text(json.dumps(samples))
    summary = json.loads((run / "summary.json").read_text())
    summary["config"] |= {"dataset_name": HOSTILE, "delimiter": HOSTILE}
    summary["given"] = {"delimiter": HOSTILE}
    summary["versions"]["torch"] = HOSTILE
    summary["health"] = {"drift": {"first_step": 1, "last_step": 2, "message": HOSTILE}}
    (run / "summary.json").write_text(json.dumps(summary))
    renamed = run.rename(run.with_name("<script>x"))
    for runs in ([renamed], [renamed, shutil.copytree(renamed, run.with_name("<b>other"))]):
        text = written(*runs, output_file=str(run.with_name("r.html")))
        page = Document(text)
        assert "script" not in {tag for tag, _ in page.elements} and "b>other" not in text
        assert not page.values("onload")
        assert page.text.count("<script>alert(1)</script>") > 20
        assert "\x1b" not in text and "␛[31m" in text


# The verdict


@pytest.mark.parametrize(
    ("change", "level", "headline"),
    [
        ({}, "good", "It learns to reason"),
        ({"after": MEANS | {"gain": 0.06}}, "mixed", "Thinking helps as before, no more"),
        ({"before": MEANS | {"gain": 0.5}}, "mixed", "Thinking helps, but less than before"),
        ({"after": MEANS | {"gain": 0.01}}, "bad", "Thinking does not help"),
        ({"after": MEANS | {"gain": -0.1}}, "bad", "Thinking hurts"),
        ({"after": MEANS | {"num_items": 9}}, "open", "Too few held-out items to tell"),
        ({"before": {}, "after": {}}, "open", "No held-out items, no verdict"),
        ({"finished": False, "after": {}}, "open", "Not finished: step 10 of 10"),
        ({"config": vars(TrainConfig(objective="sft"))}, "open", "No reasoning is trained"),
    ],
)
def test_verdicts(change, level, headline):
    verdict = judge(record(**change))
    assert (verdict.level, verdict.headline) == (level, headline)
    assert headline in Document(render([record(**change)])).text


def test_a_verdict_has_the_figures():
    assert judge(record()).text.replace(NO_BREAK, " ") == (
        "On 200 held-out items thinking adds +0.300 ± 0.020 nats a token (95%) to the log-probability of the reference "
        "answers; before training it was +0.050 ± 0.020. Greedy answers are right in 50% of the items, 30% before; "
        "without a trace in 20%, 20% before. So thinking contributes +30 points, and +10 points before."
    )
    free = MEANS | {"accuracy": 0.0, "accuracy_no_trace": 0.0}
    assert "accuracy tells nothing here" in judge(record(before=free, after=free)).text
    assert "went from +0.045 to +0.065" in judge(record(before={}, after={})).text


def test_alarms_are_told_with_their_advice_and_shaded():
    rows = [row | ({"health/drift": 1.0} if row["step"] in (5, 6, 10) else {}) for row in record().rows]
    rows = [row | {"nrt/dlogp_mean": 1e-7 * row["step"]} for row in rows]
    drift = {"first_step": 5, "last_step": 10, "message": "they differ"}
    alarmed = record(rows=rows, health={"drift": drift})
    assert judge(alarmed).headline == "It learns to reason, under an alarm"
    text = Document(render([alarmed])).text
    assert "steps 5 to 10, raised at the end" in text
    assert "they differ" in text and ALARMS["drift"].advice in text
    assert charts(alarmed)["Sampler against trainer"].shaded == [(5, 6), (10, 10)]
    assert charts(alarmed)["Reward"].shaded == []
    over = record(rows=[*rows[:-1], record().rows[-1]], health={"drift": drift})
    assert judge(over).level == "good" and "over since" in render([over])
    assert "No health alarm was raised" in render([record()])


def test_a_run_that_is_not_finished(run):
    (run / "summary.json").unlink()
    (run / "samples.json").unlink()
    text = Document(written(run)).text
    before = json.loads((run / "checkpoint-5/trainer_state.json").read_text())["progress"]["before"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "Not finished: step 5 of 5" in text
    assert f"After step 4 thinking adds {rows[3]['eval/gain']:+.3f}" in text
    assert f"before training it was {before['gain']:+.3f}" in text
    assert "these are the traces before training" in text
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 6, "rew')  # of a run that goes on, or was killed, or of a power loss
    assert "step 5 of 5" in written(run)
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    text = Document(written(run)).text
    assert "Not finished: step 5" in text and "No traces are kept: there is no checkpoint yet" in text
    assert "The command is known from the first checkpoint on" in text


def test_a_summary_of_fewer_steps_is_no_end(run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": 4}))
    assert not read_run(str(run)).finished


# Traces


def test_tokens_are_coloured_by_what_the_trace_did():
    page = Document(samples_html(record(samples=([SAMPLE], []), finished=False)))
    spans = [a for tag, a in page.elements if tag == "span" and "data-told" in a]
    trace, answer = spans[:3], spans[3:]
    assert [a["style"] for a in trace] == ["--a:0.03", "--a:1.00", "--a:1.00"]
    assert trace[0]["data-told"] == "sampled with probability 90.5%"
    assert trace[2]["data-told"] == "sampled with probability 1.2e-04"
    # log c - log b: 0, -1, +2.5, 0 nats; full colour at 2.
    assert [(a["class"], a["style"]) for a in answer] == [
        ("up", "--a:0.00"), ("down", "--a:0.50"), ("up hard", "--a:1.00"), ("up", "--a:0.00"),
    ]  # fmt: skip
    assert answer[2]["data-told"] == "c 60.7%, b 5.0%, log c \N{MINUS SIGN} log b +2.50"
    assert answer[1]["data-told"] == "c 13.5%, b 36.8%, log c \N{MINUS SIGN} log b \N{MINUS SIGN}1.00"
    assert "gain +0.38 nats a token" in page.text
    assert "✗ not the reference" in page.text
    right = samples_html(record(samples=([SAMPLE], [replace(SAMPLE, answer="it is 5")])))
    assert right.count("✗") == right.count("✓") == 1


def test_what_the_loop_stores_is_what_was_measured(finished):
    samples = json.loads((finished / "samples.json").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    assert [len(items) for items in samples.values()] == [2, 2], "two items are held out"
    for when, items in samples.items():
        gains = []
        for item in items:
            sample = Sample(**item)
            assert "".join(sample.trace_tokens) == sample.trace
            assert len(sample.trace_tokens) == len(sample.trace_logprobs)
            assert "".join(sample.reference_tokens[:-1]) == sample.reference and sample.reference_tokens[-1] == "<eos>"
            assert max(sample.log_b + sample.log_c + sample.trace_logprobs) <= 0
            gains += [c - b for c, b in zip(sample.log_c, sample.log_b, strict=True)]
        assert sum(gains) / len(gains) == pytest.approx(summary[when]["gain"], abs=2e-6)
    hard = [item["log_c"][i] for item in samples["after"] for i in item["hard_positions"]]
    assert sum(hard) / len(hard) == pytest.approx(summary["after"]["hard_token_logp"], abs=2e-6)


def test_without_traces_the_reference_is_not_coloured(tiny_run, tmp_path):
    loop.train(tiny_run(tmp_path / "run", objective="sft", max_trace_length=None, num_generations=8, max_steps=1))
    text = written(tmp_path / "run")
    assert "(empty)" in text and "No reasoning is trained" in text
    assert 'class="down' not in text.split('id="traces"')[1].replace('<b class="down"', "")


# Charts


def points(svg, kind):
    (d,) = re.findall(rf'<path class="{kind} [^"]*" d="([^"]*)"/>', svg)
    return [[tuple(map(float, pair.split())) for pair in piece.split("L")] for piece in d.split("M")[1:]]


def test_lines_stand_where_their_values_are():
    svg = draw(Chart("t", "d", "u", [Line("a", [0, 10, 20], [0.0, 0.5, 1.0])], "share"), 1)
    assert points(svg, "line") == [[
        (LEFT, HEIGHT - 26), ((LEFT + WIDTH - RIGHT) / 2, pytest.approx((TOP + HEIGHT - 26) / 2)), (WIDTH - RIGHT, TOP),
    ]]  # fmt: skip
    broken = draw(Chart("t", "d", "u", [Line("a", [1, 2, 3, 4], [1.0, math.nan, 10.0, 100.0])], "log"), 1)
    assert [len(piece) for piece in points(broken, "line")] == [1, 2]
    (_, y1), (_, y10), (_, y100) = (point for piece in points(broken, "line") for point in piece)
    assert y1 - y10 == pytest.approx(y10 - y100, abs=0.11)
    assert "a: 0.5" not in svg and "a: 50%" in svg, "values under the pointer"


def test_moving_means_and_their_bands():
    line = smooth([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0], 2, "a")
    assert line.y == [1, 2, 4, 6]
    assert line.low == [1, 1, 3, 5] and line.high == [1, 3, 5, 7]
    assert line.faint == [1, 3, 5, 7]
    assert smooth([1, 2], [1.0, 100.0], 2, "a", log=True).y[1] == pytest.approx(10)
    long = smooth(range(1000), [float(i % 2) for i in range(1000)], 10, "a")
    assert len(long.x) <= 300 and long.y[100] == pytest.approx(0.5)


def test_ticks_and_numbers():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(-0.7, 0) == [-0.6, -0.4, -0.2, 0]
    assert log_ticks(3e-8, 2e-5) == [1e-7, 1e-6, 1e-5]
    assert log_ticks(0.9, 11) == [1, 2, 5, 10]
    assert [told(v) for v in (0, 0.25, 12345, 3e-4, 2.5e-7, -3)] == ["0", "0.25", "12,345", "3e−4", "2.5e−7", "−3"]  # noqa: RUF001
    assert [told(v, "share") for v in (0, 1, 0.5, 0.013)] == ["0%", "100%", "50%", "1.3%"]


def test_charts_leave_out_what_was_not_measured():
    assert list(charts(record())) == ["Reward", "Held-out gain of thinking", "Held-out answers that are right"]
    free = MEANS | {"accuracy": 0.0, "accuracy_no_trace": 0.0}
    assert list(charts(record(before=free, after=free))) == ["Reward", "Held-out gain of thinking"]


def test_the_ends_of_the_held_out_curve_are_the_summary():
    rows = [
        row | ({f"eval/{k}": v for k, v in MEANS.items()} if row["step"] in (5, 10) else {}) for row in record().rows
    ]
    rows = [row | {"eval/num_items": 100} if "eval/gain" in row else row for row in rows]
    (chart,) = (
        c
        for cs in charts_of([record(rows=rows, after=MEANS | {"gain": 0.4})]).values()
        for c in cs
        if "gain" in c.title
    )
    gain, hard = chart.lines
    assert (gain.x, gain.y) == ([0, 5, 10], [0.05, 0.3, 0.4])
    assert (hard.label, hard.low[0]) == ("hard tokens", pytest.approx(0.8))
    assert "only the first 100 items" in chart.text


def test_several_runs_share_charts_and_are_compared():
    other = record(name="other", config=record().config | {"learning_rate": 1e-3, "output_dir": "x"}, after=MEANS)
    page = Document(render([record(name="one"), other]))
    gain = charts(record(name="one"), other)["Held-out gain of thinking"]
    assert [(line.label, line.color, line.dash) for line in gain.lines] == [
        ("one, all tokens", 0, 0), ("one, hard tokens", 0, 1), ("other, all tokens", 1, 0),
        ("other, hard tokens", 1, 1),
    ]  # fmt: skip
    assert "where their configurations differ" in page.text
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", render([record(name="one"), other]))
    assert "learning_rate" in heads and "+0.050 ± 0.020 → +0.300 ± 0.020" in page.text
    assert "Their configurations are the same" in render([record(name="one"), record(name="two")])


# Configuration


def test_the_command_makes_the_same_configuration(tmp_path):
    config = TrainConfig(
        dataset_name=["a b.jsonl", "it's.csv"], dataset_weights=[0.5, 2.0], objective="rlpr", delimiter="</think>",
        chat_template_kwargs={"enable thinking": False}, drop_cut_reward=True, learning_rate=1e-5, seed=3,
        use_peft=True,
    )  # fmt: skip
    words = shlex.split(command(config.given))
    assert words[:2] == ["nrt-fast", "train"]
    parsed = parse(words[2:], cli.COMMANDS["train"].arguments)[0]
    assert replace(parsed, dataset_name=parsed.dataset_names) == config
    assert command({}) == "nrt-fast train"
    words = shlex.split(command({"dataset_name": ["a,b", "c"]}))
    assert parse(words[2:], cli.COMMANDS["train"].arguments)[0].dataset_name == ["a,b", "c"]


def test_what_was_set_is_kept_apart_from_what_was_derived(run):
    read = read_run(str(run))
    assert read.given["max_steps"] == 5 and "recompute" not in read.given
    assert unescape(command(read.given)) in Document(written(run)).text
    assert read.config["recompute"] == "none"


# Bad input


def forget(run, part, name):
    """As if the run were of a version that did not have it."""
    summary = json.loads((run / "summary.json").read_text())
    del summary[part][name]
    (run / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "holds no run: there is no metrics.jsonl in it"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has no step yet"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n'),
            "metrics.jsonl, line 2 is broken, and later lines are not",
        ),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "has no step yet"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "reward": "a"}\n'),
            "line 1: reward is 'a'; a num",
        ),
        (lambda run: (run / "samples.json").unlink(), "samples.json cannot be read"),
        (lambda run: (run / "samples.json").write_text("{}"), "is not as expected (KeyError('before'))"),
        (lambda run: forget(run, "before", "gain_error"), "is not as expected (KeyError('gain_error'))"),
        (lambda run: forget(run, "config", "objective"), "is not as expected (KeyError('objective'))"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json is no JSON"),
        (lambda run: (run / "summary.json").write_text("[]"), "summary.json holds no JSON object"),
    ],
)
def test_folders_that_are_no_run(damage, message, run, capsys):
    damage(run)
    assert cli.main(["report", str(run)]) == 2
    line = capsys.readouterr().err
    assert message in line and str(run) in line and line.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a run's folder is needed: nrt-fast report runs/demo"),
        (["a", "./a"], "a is there twice"),
        ([str(n) for n in range(9)], "9 runs; at most 8 can be told apart by colour"),
        (["a", "--output_fil", "b"], "unknown option --output_fil; did you mean --output_file?"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    assert cli.main(["report", *argv]) == 2
    assert message in capsys.readouterr().err


# A browser


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_chromium_finds_nothing_to_complain_about(run, tmp_path):
    written(run)
    with chromium(tmp_path / "profile") as page:
        page.open((run / "report.html").as_uri())
        assert page.requests == [(run / "report.html").as_uri()]
        assert page.complaints == []
        assert page.evaluate("document.querySelectorAll('figure svg').length") > 10
        for width in (360, 1280):
            page("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
            assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    (tmp_path / "other.html").write_text(
        "<img src='data:image/png,x'><script>console.error(1); fetch('data:,')</script>"
    )
    with chromium(tmp_path / "profile") as page:  # the check itself
        page.open((tmp_path / "other.html").as_uri())
        assert len(page.requests) > 1 and page.complaints
