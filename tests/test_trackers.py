"""Trackers: every step once, resumed runs in the same tracker run, completions as tables, and no failure that kills."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from nrt_fast.completions import read_completions
from nrt_fast.config import TrainConfig
from nrt_fast.loop import train
from nrt_fast.metrics import read_metrics
from nrt_fast.trackers import Trackers


@pytest.fixture
def tracker(monkeypatch):
    """Stands in for a module with wandb's interface; notes its calls."""

    def install(name="wandb", **others):
        calls = []
        module = SimpleNamespace(
            calls=calls,
            init=lambda **kwargs: calls.append(("init", kwargs)),
            log=lambda metrics, step: calls.append((step, metrics)),
            finish=lambda: calls.append(("finish", None)),
            Table=lambda columns, data: (columns, data),
        )
        vars(module).update(others)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def fail(*args, **kwargs):
    raise OSError("no route to host")


def steps(calls):
    return [step for step, _ in calls if isinstance(step, int)]


def test_every_step_is_told_once_and_a_run_goes_on_in_the_same_one(tiny_run, tmp_path, tracker):
    calls, folder = tracker().calls, tmp_path / "run"
    train(tiny_run(folder, report_to="wandb", logging_steps=2, eval_steps=2))
    shutil.rmtree(folder / "checkpoint-3")  # as if the run had died after its third step
    (folder / "summary.json").unlink()
    train(tiny_run(folder, report_to="wandb", logging_steps=2, eval_steps=2, max_steps=4))
    told = [(step, metrics["loss"]) for step, metrics in calls if isinstance(step, int)]
    assert told == [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]
    first, second = [kwargs for call, kwargs in calls if call == "init"]
    assert first["id"] == second["id"] == first["name"] == second["name"]
    assert first["name"].startswith("run-") and first["resume"] == "allow"
    assert (first["config"]["max_steps"], second["config"]["max_steps"]) == (3, 4)
    assert [call for call, _ in calls].count("finish") == 2


def test_two_runs_of_one_name_are_two(tmp_path, tracker):
    calls = tracker("trackio").calls
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        Trackers(TrainConfig(output_dir=str(tmp_path / parent / "run"), report_to="trackio"), fail)
    (_, first), (_, second) = calls
    assert first["name"] != second["name"]
    assert "id" not in first  # trackio has no such argument


def test_completions_are_a_table_of_their_step(tiny_run, tmp_path, tracker):
    calls = tracker().calls
    train(tiny_run(tmp_path / "run", report_to="wandb", eval_steps=2))
    tables = {step: metrics.get("completions") for step, metrics in calls if isinstance(step, int)}
    rows = read_completions(tmp_path / "run", 2)
    assert len(rows) == 6
    assert tables == {1: None, 2: (list(rows[0]), [list(row.values()) for row in rows]), 3: None}


@pytest.mark.parametrize(("broken", "told_steps"), [("init", []), ("log", []), ("Table", [1]), ("finish", [1, 2, 3])])
def test_a_failure_is_told_and_the_run_goes_on(broken, told_steps, tiny_run, tmp_path, tracker, capsys):
    calls = tracker(**{broken: fail}).calls
    summary = train(tiny_run(tmp_path / "run", report_to="wandb", eval_steps=2))
    assert summary["steps"] == len(read_metrics(tmp_path / "run/metrics.jsonl")) == 3
    assert steps(calls) == told_steps
    assert capsys.readouterr().out.count("wandb failed and is left out from here on") == 1


def test_one_that_fails_takes_no_other_with_it(tmp_path, tracker):
    said, config = [], TrainConfig(output_dir=str(tmp_path), report_to="wandb,trackio")
    tracker("wandb", log=fail)
    calls = tracker("trackio").calls
    trackers = Trackers(config, said.append)
    for step in (1, 2):
        trackers.log({"loss": 0.5}, step)
    trackers.finish()
    assert calls[1:] == [(1, {"loss": 0.5}), (2, {"loss": 0.5}), ("finish", None)]
    assert len(said) == 1 and "no route to host" in said[0]


def test_tensorboard_gets_scalars_and_text(tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(
        add_scalar=lambda *scalar: written.append(scalar), add_text=lambda *text: written.append(text),
        close=lambda: written.append("closed"),
    )  # fmt: skip
    module = SimpleNamespace(SummaryWriter=lambda folder: written.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    trackers = Trackers(TrainConfig(output_dir=str(tmp_path), report_to="tensorboard"), fail)
    trackers.log({"loss": 0.5}, 2, [{"step": 2, "completion": "a | b\nc", "reward": 0.123456}])
    trackers.finish()
    table = "| step | completion | reward |\n| --- | --- | --- |\n| 2 | a \\| b c | 0.1235 |"
    folder = str(tmp_path / "tensorboard")
    assert written == [folder, ("loss", 0.5, 2), ("completions", table, 2), "closed"]


def test_nothing_is_left_without_a_tracker(tmp_path):
    Trackers(TrainConfig(output_dir=str(tmp_path)), fail).log({"loss": 0.5}, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_name_is_kept_as_json(tmp_path, tracker):
    calls = tracker().calls
    Trackers(TrainConfig(output_dir=str(tmp_path), report_to="wandb"), fail)
    assert json.loads((tmp_path / "tracker_run.json").read_text()) == {"name": calls[0][1]["name"]}
