"""A run from start to end: what it writes, what that says, and that it depends on its seed alone."""

import json
import math
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nrt_fast import Model, cli
from nrt_fast.config import TrainConfig
from nrt_fast.loop import dry_run, train
from nrt_fast.metrics import read_metrics
from nrt_fast.starter import MODEL_DIR

TRL_METRICS = (
    "step epoch loss grad_norm learning_rate num_tokens reward reward_std frac_reward_zero_std entropy step_time"
    " completions/mean_length completions/min_length completions/max_length completions/clipped_ratio"
    " clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean clip_ratio/high_max clip_ratio/region_mean"
).split()
OUR_METRICS = (
    "nrt/gain nrt/logp_no_trace nrt/frac_no_signal nrt/frac_clipped nrt/delimiter_rate nrt/dlogp_mean nrt/dlogp_max"
    " nrt/answer_overlap nrt/hard_token_gain perf/rollout_s perf/score_s perf/train_s"
).split()
COMPLETION_COLUMNS = "step prompt completion reward advantage answer answer_logp gain".split()


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_metrics_have_every_step_and_name(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5], "logging_steps is 3, and only thins out the console"
    for row in rows:
        assert set(TRL_METRICS + OUR_METRICS) <= row.keys()
        assert all(math.isfinite(value) for value in row.values())


def test_metrics_agree_with_one_another(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    for row, following in pairwise(rows):
        assert following["num_tokens"] > row["num_tokens"]
        assert following["epoch"] - row["epoch"] == pytest.approx(2 / 8), "two prompts a step, eight rows"
    for row in rows:
        assert row["nrt/delimiter_rate"] + row["completions/clipped_ratio"] == pytest.approx(1)
        assert row["completions/min_length"] <= row["completions/mean_length"] <= row["completions/max_length"] <= 12
        assert row["nrt/gain"] == pytest.approx(row["nrt/answer_logp"] - row["nrt/logp_no_trace"], abs=1e-6)
        phases = row["perf/rollout_s"] + row["perf/score_s"] + row["perf/train_s"]
        assert 0 < phases <= row["step_time"]
    assert rows[0]["nrt/dlogp_max"] < 2e-5


def test_held_out_measurements_come_as_often_as_asked(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/gain" in row] == [2, 4]


def test_completions_are_the_sampled_traces(finished):
    files = sorted((finished / "completions").iterdir())
    assert [path.name for path in files] == ["completions_00002.parquet", "completions_00004.parquet"]
    table = pq.read_table(files[0])
    row = read_metrics(finished / "metrics.jsonl")[1]
    assert table.column_names == COMPLETION_COLUMNS
    assert table.num_rows == 2 * 3
    columns = table.to_pydict()
    assert sum(columns["reward"]) / 6 == pytest.approx(row["reward"])
    assert sum(columns["gain"]) / 6 == pytest.approx(row["nrt/gain"], abs=0.1), "answers differ in length"
    assert len(set(columns["prompt"])) == 2


def test_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    expected = {"accuracy", "gain", "hard_token_gain", "trace_length", "entropy"}
    assert expected <= summary["before"].keys() == summary["after"].keys()
    assert summary["before"]["num_items"] == 2
    assert summary["steps"] == 5
    assert summary["tokens_per_second"].keys() == {"rollout", "score", "train"}
    seconds = [row["step_time"] for row in read_metrics(finished / "metrics.jsonl")]
    assert summary["train_seconds"] == pytest.approx(sum(seconds))
    assert {"nrt_fast", "torch", "python"} <= summary["versions"].keys()


def test_nothing_else_is_left_in_the_folder(finished):
    assert {path.name for path in finished.iterdir()} == {
        "run.json", "metrics.jsonl", "samples.json", "summary.json", "completions", "final",
        *(f"checkpoint-{step}" for step in range(1, 6)),
    }  # fmt: skip


def test_final_model_loads_in_transformers(finished):
    module = AutoModelForCausalLM.from_pretrained(finished / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    ids = tokenizer("take 9 minus 4 minus 1 minus 5 ?").input_ids
    with torch.no_grad():
        reference = module(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Model.from_pretrained(finished / "final").logits(ids), reference, rtol=0, atol=3e-5)
    assert_same_weights(finished / "final", finished / "checkpoint-5")


def test_tokenizer_is_copied_byte_by_byte(finished):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (finished / "final" / name).read_bytes() == (MODEL_DIR / name).read_bytes()


def test_console_thins_out_and_sums_up(tiny_run, tmp_path, capsys):
    train(tiny_run(tmp_path / "run", logging_steps=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["2/3", "3/3"]
    assert any("2 held-out items" in line for line in lines)
    assert lines[-1].startswith("3 steps, ")


def test_dry_run_writes_nothing(tiny_run, tmp_path):
    dry_run(tiny_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_hard_tokens_of_plain_data_are_the_least_likely(tiny_run, tmp_path):
    """Without hard_spans in the data, a tenth of the answer tokens is hard: where log b is lowest."""
    path = tmp_path / "plain.jsonl"
    rows = [{"question": f"take {n} plus 1 ?", "answer": f"the answer to this question is {n + 1} ."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(tiny_run(tmp_path / "run", dataset_name=str(path), max_steps=1))
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["nrt/hard_token_gain"] not in (0, row["nrt/gain"])


def test_nothing_held_out(tiny_run, tmp_path):
    summary = train(tiny_run(tmp_path / "run", num_eval_prompts=0, eval_steps=1))
    assert summary["before"] == summary["after"] == {}


def test_the_default_run_is_the_starter_on_its_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main("train --max_steps 1 --num_eval_prompts 3 --prompts_per_step 2 --max_trace_length 8".split()) == 0
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert summary["before"]["num_items"] == 3
    assert "built-in tasks (train)" in capsys.readouterr().out


def test_a_seed_decides_everything(tiny_run, tmp_path, measured, finished):
    same, other = tmp_path / "same", tmp_path / "other"
    train(tiny_run(same, max_steps=5, eval_steps=2))
    train(tiny_run(other, max_steps=5, eval_steps=2, seed=1))
    assert measured(same) == measured(finished)
    assert_same_weights(same / "final", finished / "final")
    assert measured(other)[0]["reward"] != measured(finished)[0]["reward"]


def test_micro_batches_change_rounding_only(tiny_run, tmp_path):
    """Adam divides a gradient by its own size: with the default epsilon, noise around 0 would take full steps."""
    folders = tmp_path / "whole", tmp_path / "cut"
    for folder, budget in zip(folders, (8192, 40), strict=True):
        train(tiny_run(folder, max_tokens_per_batch=budget, adam_epsilon=1e-6))
    whole, cut = (weights(folder / "final") for folder in folders)
    for name, tensor in whole.items():
        assert (cut[name] - tensor).norm() < 1e-5 * tensor.norm(), name


def test_more_prompts_than_rows_are_derived_not_refused(tiny_run, tmp_path):
    summary = train(tiny_run(tmp_path / "run", prompts_per_step=1000, prompts_per_minibatch=500, max_steps=1))
    assert summary["config"]["prompts_per_step"] == summary["config"]["prompts_per_minibatch"] == 8


def test_the_library_trains_without_a_command_line():
    import nrt_fast

    assert nrt_fast.train is train
    assert nrt_fast.TrainConfig is TrainConfig
