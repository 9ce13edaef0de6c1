"""Alarms: each is raised by its failure, none by a healthy run; they stop a run, and a resumed one tells the same."""

import json
from dataclasses import replace

import pytest
import torch

from nrt_fast import loop
from nrt_fast.cli import main
from nrt_fast.config import PRESETS, TrainConfig
from nrt_fast.diagnostics import repetition, rollout_metrics
from nrt_fast.health import ALARMS, WINDOW, Health
from nrt_fast.rewards import reward
from nrt_fast.types import Example, Scores, Traces, UserError

P, G, LENGTH, ANSWER = 4, 6, 24, [30, 31, 32, 33, 34, 35, 36, 37, 38, 1]


def sampled(step, length=LENGTH, loops=False, copies=False, ends=True, gain=0.5, logp=-2.0):
    """The metrics of a step of random traces, as the loop has them."""
    generator = torch.Generator().manual_seed(step)

    def trace():
        ids = torch.randint(40, 400, (length,), generator=generator).tolist()
        ids = [50, 51, 52] * (length // 3) if loops else ids
        return [*ids, *ANSWER[:-1]] if copies else ids

    traces = Traces(
        [[trace() for _ in range(G)] for _ in range(P)], [[[-1.0] * length] * G] * P, [[-0.1 if ends else None] * G] * P
    )
    noise = 0.05 * torch.randn(P, G, len(ANSWER), generator=generator)
    log_b = [torch.full((len(ANSWER),), logp) + 0.01 * torch.randn(len(ANSWER), generator=generator) for _ in range(P)]
    scores = Scores([[log_b[p] + gain + noise[p, g] for g in range(G)] for p in range(P)], log_b)
    examples = [Example(p, [5, 6, 7], ANSWER, None, "", "", "") for p in range(P)]
    objective = PRESETS["nrt-ws"]
    rewards = reward(scores, traces, objective, 0.0, [""] * P)
    return {"step": step, "entropy": 1.0} | rollout_metrics(examples, traces, scores, rewards, objective)


def changes_of(rows, dtype="float32"):
    health = Health(dtype)
    return [change for row in rows for change in health.step(row)], health


def after_healthy(**failure):
    """As many healthy steps as are compared with, then as many of the failure."""
    steps = range(1, WINDOW + 1)
    return [sampled(step) for step in steps] + [sampled(WINDOW + step, **failure) for step in steps]


def test_healthy_traces_raise_nothing():
    changes, health = changes_of(after_healthy())
    assert not changes
    assert health.raised == {}


@pytest.mark.parametrize(
    ("name", "failure", "told"),
    [
        ("length_collapse", {"length": 10}, "traces shrank from 24.0 to 10.0 tokens"),
        ("repetition", {"loops": True}, "are repeated"),
        ("no_delimiter", {"ends": False}, "0% of the traces reach the delimiter, 100% at first"),
        ("answer_copied", {"copies": True}, "100% of the traces hold the whole reference answer, 0% at first"),
        ("gain_falls", {"gain": 0.1, "logp": -1.0}, "memorised"),
    ],
)
def test_traces_that_fail(name, failure, told):
    changes, health = changes_of(after_healthy(**failure))
    assert [(change.name, change.raised) for change in changes] == [(name, True)]
    assert told in health.raised[name]["message"]
    assert ALARMS[name].advice in str(changes[0])
    assert health.raised[name]["last_step"] == 2 * WINDOW
    assert WINDOW < health.raised[name]["first_step"] <= 2 * WINDOW


def test_a_lower_gain_alone_is_noise_or_harder_questions():
    assert not changes_of(after_healthy(gain=0.1))[0]  # nothing was memorised
    assert not changes_of(after_healthy(logp=-1.0))[0]  # and here nothing is lost


def test_entropy_may_fall_while_the_gain_rises():
    failing, learning = after_healthy(), after_healthy(gain=0.9)
    for row in failing[WINDOW:] + learning[WINDOW:]:
        row["entropy"] = 0.02
    assert [change.name for change in changes_of(failing)[0]] == ["entropy_collapse"]
    assert not changes_of(learning)[0]


@pytest.mark.parametrize(("dtype", "difference", "raised"), [
    ("float32", 1e-5, False), ("float32", 0.02, True), ("bfloat16", 0.02, False), ("bfloat16", 0.2, True),
])  # fmt: skip
def test_drift_is_judged_by_the_dtype(dtype, difference, raised):
    rows = [sampled(step) | {"nrt/dlogp_mean": difference} for step in range(1, WINDOW + 1)]
    assert [change.name for change in changes_of(rows, dtype)[0]] == ["drift"] * raised


def test_an_alarm_ends_and_is_told_once():
    rows = after_healthy(loops=True) + [sampled(100 + step) for step in range(WINDOW)]
    changes, health = changes_of(rows)
    assert [(change.name, change.raised) for change in changes] == [("repetition", True), ("repetition", False)]
    last = health.raised["repetition"]["last_step"]
    assert str(changes[1]) == f"health: repetition is over: after step {last}"
    raised = [row["step"] for row in rows if row.get("health/repetition")]
    assert (raised[0], raised[-1]) == (health.raised["repetition"]["first_step"], last)


def test_nothing_is_judged_before_a_window():
    assert not changes_of([sampled(step, ends=False) for step in range(1, WINDOW)])[0]


def test_rows_without_traces_are_silent():
    rows = [{"step": step, "loss": 1.0} for step in range(1, 3 * WINDOW)]
    assert not changes_of(rows)[0]


@pytest.mark.parametrize(
    ("ids", "share"), [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4], 0.0), ([7] * 10, 6 / 7), ([1, 2, 3, 4] * 2, 0.2)]
)
def test_repetition(ids, share):
    assert repetition(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("fields", "share"), [({}, 0.5), ({"drop_cut_reward": True}, 0.75), ({"reward_clip": "none"}, 0.0)]
)
@pytest.mark.parametrize("preset", ["rlpr", "nrt-am"])
def test_clipped_traces_are_those_that_do_not_beat_the_empty_one(preset, fields, share):
    """Whether or not a share of the reward is for the delimiter, as it is in rlpr."""
    objective = replace(PRESETS[preset], **fields)
    scores = Scores([[torch.tensor([value, -0.1]) for value in (-0.1, -0.2, -0.5, -0.6)]], [torch.tensor([-0.5, -0.1])])
    traces = Traces([[[40]] * 4], [[[-1.0]] * 4], [[-0.1, None, -0.1, None]])
    rewards = reward(scores, traces, objective, 0.0, [""])
    examples = [Example(0, [5], [30, 1], None, "", "", "")]
    assert rollout_metrics(examples, traces, scores, rewards, objective)["nrt/frac_clipped"] == share


# Runs


STEPS = WINDOW + 2


def alarms_of(config):
    return loop.train(config)["health"]


def test_a_healthy_run_is_silent(tiny_run, tmp_path, measured):
    assert alarms_of(tiny_run(tmp_path / "run", max_steps=2 * WINDOW)) == {}
    assert not [name for row in measured(tmp_path / "run") for name in row if name.startswith("health/")]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("no_delimiter", {"max_trace_length": 2}),
        ("no_signal", {"std_floor": 50.0}),
        ("answer_swamps_trace", {"answer_coef": 1000.0}),
    ],
)
def test_a_run_that_fails(name, fields, tiny_run, tmp_path, capsys):
    alarm = alarms_of(tiny_run(tmp_path / "run", max_steps=STEPS, learning_rate=1e-6, **fields))[name]
    assert (alarm["first_step"], alarm["last_step"]) == (WINDOW, STEPS)
    assert json.loads((tmp_path / "run/summary.json").read_text())["health"][name] == alarm
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"health: {name}")]
    assert told[0] == f"health: {name}: {told[0].split(': ', 2)[2]}"
    assert told[0].endswith(ALARMS[name].advice)
    assert told[-1].startswith(f"health: {name}, steps {WINDOW} to {STEPS}: ")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if f"health/{name}" in row] == list(range(WINDOW, STEPS + 1))


def test_weights_that_are_not_the_samplers(tiny_run, tmp_path, monkeypatch):
    learn = loop.learn

    def stale(run, *rest):
        run.model.weights.flat.mul_(1.01)
        return learn(run, *rest)

    monkeypatch.setattr(loop, "learn", stale)
    assert "drift" in alarms_of(tiny_run(tmp_path / "run", max_steps=WINDOW))


def test_a_run_stops_on_an_alarm_and_goes_on(tiny_run, tmp_path, measured, capsys):
    fields = {"max_trace_length": 2, "learning_rate": 1e-6, "max_steps": STEPS, "save_steps": 100}
    whole = loop.train(tiny_run(tmp_path / "whole", **fields))
    stopping = tiny_run(tmp_path / "run", stop_on="no_delimiter,drift", **fields)
    assert loop.train(stopping) == {"steps": WINDOW, "stopped_on": ["no_delimiter"]}
    assert f"stopped on no_delimiter after step {WINDOW}, saved" in capsys.readouterr().out
    assert (tmp_path / f"run/checkpoint-{WINDOW}").is_dir()
    assert not (tmp_path / "run/summary.json").exists()
    resumed = loop.train(stopping)  # it was told once
    assert resumed["health"] == whole["health"]
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


def test_the_exit_code_says_that_an_alarm_stopped_it(tiny_run, tmp_path):
    config = tiny_run(tmp_path / "run", max_trace_length=2, max_steps=STEPS, stop_on="all")
    given = {k: v for k, v in vars(config).items() if v != getattr(type(config)(), k)}
    assert main(["train", *(f"--{name}={value}" for name, value in given.items())]) == 3


def test_names_that_are_no_alarm(tiny_run, tmp_path):
    with pytest.raises(UserError, match="stop_on: no alarm is named 'lenght'; valid: all, or some of length_collapse"):
        tiny_run(tmp_path, stop_on="lenght,drift").check()
    with pytest.raises(UserError, match="stop_on cannot take effect: objective sft has no traces"):
        TrainConfig(objective="sft", stop_on="all").check()
