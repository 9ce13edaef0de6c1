"""nrt-fast eval: figures that agree with score and with the run's own, what it writes, and what it refuses."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from nrt_fast import cli, heldout
from nrt_fast.config import EvalConfig, ScoreConfig
from nrt_fast.data import load_tokenizer
from nrt_fast.engine import Engine
from nrt_fast.eval_command import evaluate_dataset, grade_item, task_name
from nrt_fast.eval_report import Accuracy, EvalSummary, task_metrics, verdict
from nrt_fast.grading import exact, maj_at, normalised, pass_at
from nrt_fast.score_command import score_dataset
from nrt_fast.score_report import Estimate
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import Example

NUM_PROMPTS, G = 6, 4
SMALL = {"num_prompts": NUM_PROMPTS, "num_generations": G, "device": "cpu", "dtype": "float32", "seed": 5}
NAMES = ["exact_match", "exact_match_normalised"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(summary, results, samples) of one small evaluation."""
    folder = tmp_path_factory.mktemp("eval") / "deep/new"
    summary = evaluate_dataset(EvalConfig(**SMALL, output_dir=str(folder)))
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "samples_builtin_tasks.jsonl"]
    return summary, json.loads((folder / "results.json").read_text()), lines(folder / "samples_builtin_tasks.jsonl")


# Agreement


def test_gains_are_those_of_score(evaluated, tmp_path):
    summary, _, samples = evaluated
    score = score_dataset(ScoreConfig(**SMALL, output_file=str(tmp_path / "s.jsonl")))
    assert summary.gain == pytest.approx(score.gain, abs=1e-6)
    assert summary.hard_gain == pytest.approx(score.hard_gain, abs=1e-6)
    assert summary.helped.mean == pytest.approx(score.helped, abs=1e-6)
    for row, sample in zip(lines(tmp_path / "s.jsonl"), samples, strict=True):
        assert [t["trace_ids"] for t in row["traces"]] == [t["trace_ids"] for t in sample["traces"]]
        assert row["baseline_logprobs"] == pytest.approx(sample["baseline_logprobs"], abs=1e-6)


@pytest.mark.parametrize("dataset", ["file", "built-in"])
def test_figures_are_those_that_the_run_had(dataset, finished, tiny_run, tmp_path):
    if dataset == "file":
        folder, run = finished, tiny_run(finished)
    else:
        from nrt_fast.loop import train

        folder = tmp_path / "run"
        run = tiny_run(folder, dataset_name=None, num_eval_prompts=24, max_steps=1, seed=2)
        train(run)
    after = json.loads((folder / "summary.json").read_text())["after"]
    lengths = {name: getattr(run, name) for name in ("max_prompt_length", "max_trace_length", "max_answer_length")}
    summary = evaluate_dataset(
        EvalConfig(
            model_name_or_path=str(folder / "final"), dataset_name=run.dataset_name, num_prompts=after["num_items"],
            seed=run.seed, device="cpu", dtype="float32", **lengths,
        )
    )  # fmt: skip
    told = {
        "accuracy": summary.accuracy["exact"].with_trace.mean,
        "accuracy_no_trace": summary.accuracy["exact"].no_trace.mean,
        "gain": summary.gain.mean,
        "hard_token_gain": summary.hard_gain.mean,
        "trace_length": summary.trace_length.mean,
        "delimiter_rate": summary.delimiter_rate.mean,
        "num_items": summary.num_items,
    }
    assert told == pytest.approx({name: after[name] for name in told}, abs=1e-6)


def test_the_pieces_change_nothing(evaluated, monkeypatch):
    monkeypatch.setattr(heldout, "TRACES_AT_A_TIME", 1)
    again = evaluate_dataset(EvalConfig(**SMALL))
    assert again.gain == pytest.approx(evaluated[0].gain, abs=2e-5)
    assert again.accuracy == evaluated[0].accuracy


def test_greedy_traces_do_not_depend_on_the_seed(tmp_path):
    greedy = SMALL | {"temperature": 0.0, "num_generations": 1}
    del greedy["seed"]
    samples = []
    for number in range(2):
        folder = tmp_path / str(number)
        # The seed chooses the items' order too: all of them are taken, and compared by uid.
        summary = evaluate_dataset(EvalConfig(**greedy, seed=number, output_dir=str(folder)))
        rows = lines(folder / "samples_builtin_tasks.jsonl")
        samples.append({row["uid"]: [trace["trace_ids"] for trace in row["traces"]] for row in rows})
        assert summary.num_traces == NUM_PROMPTS and summary.accuracy["exact"].maj == {}
    assert samples[0] == samples[1] and len(samples[0]) == NUM_PROMPTS


# What is right


def test_aliases_and_the_reference_as_its_ids_read_are_right():
    tokenizer = load_tokenizer(str(MODEL_DIR))
    ids = [*tokenizer("it shows heads .", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    example = Example(0, [1], ids, None, "q", "it  shows heads .", "here", aliases=("tails", "The Heads"))
    answers = ["it shows heads .", "tails", "heads", "Tails", "it shows"]
    graded = grade_item(example, answers, tokenizer, {"exact": exact, "normalised": normalised})
    assert graded["exact"].after_traces.right == [True, True, False, False]
    assert graded["normalised"].after_traces.right == [True, True, True, True]
    assert not graded["exact"].no_trace and not graded["normalised"].no_trace
    without = grade_item(replace(example, aliases=()), answers, tokenizer, {"normalised": normalised})
    assert without["normalised"].after_traces.right == [True, False, False, False]


def test_aliases_of_a_file_count(tmp_path):
    """Every answer that the model gives becomes an alias: all of them are right then, and none was before."""
    rows = [{"question": f"take {n} plus 1 ?", "answer": "tiger maple"} for n in range(4)]
    lengths = {"max_prompt_length": 32, "max_trace_length": 12, "max_answer_length": 12}
    config = EvalConfig(device="cpu", temperature=0.0, num_prompts=4, **lengths)
    for name, accuracy in (("plain", 0), ("aliased", 1)):
        path, folder = tmp_path / f"{name}.jsonl", tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = evaluate_dataset(replace(config, dataset_name=str(path), output_dir=str(folder)))
        assert summary.accuracy["exact"].with_trace == Estimate(accuracy, 0)
        samples = lines(folder / f"samples_{name}.jsonl")
        answers = {sample["doc"]["question"]: sample["filtered_resps"][0] for sample in samples}
        assert any(len(answer.split()) > 3 for (answer,) in answers.values()), "longer than any reference"
        rows = [row | {"aliases": answers[row["question"]]} for row in rows]


# What is written


def test_figures_follow_from_the_samples(evaluated):
    summary, results, samples = evaluated
    task = results["results"]["builtin_tasks"]
    assert len(samples) == task["sample_len"] == NUM_PROMPTS
    gains = [
        [c - b for c, b in zip(trace["answer_logprobs"], row["baseline_logprobs"], strict=True)]
        for row in samples
        for trace in row["traces"]
    ]
    flat = [value for gain in gains for value in gain]
    assert task["gain,none"] == pytest.approx(sum(flat) / len(flat), abs=1e-6)
    hard = [[gain[p] for p in row["hard_positions"]] for row, gain in zip(once_a_trace(samples), gains, strict=True)]
    assert task["hard_gain,none"] == pytest.approx(sum(map(sum, hard)) / sum(map(len, hard)), abs=1e-6)
    for name, metric in zip(NAMES, ("exact", "normalised"), strict=True):
        shares = torch.tensor([row[name] for row in samples], dtype=torch.float64)
        empty = torch.tensor([float(row["no_trace"][name]) for row in samples], dtype=torch.float64)
        for how, values in (("none", shares), ("no-trace", empty), ("difference", shares - empty)):
            assert task[f"{name},{how}"] == pytest.approx(float(values.mean()))
            assert task[f"{name}_stderr,{how}"] == pytest.approx(float(values.std()) / math.sqrt(NUM_PROMPTS))
        rights = [sum(trace[name] for trace in row["traces"]) for row in samples]
        assert [right / G for right in rights] == shares.tolist()
        for k in (1, 2, 4):
            expected = sum(pass_at(G, right, k) for right in rights) / NUM_PROMPTS
            assert task[f"{name},pass@{k}"] == pytest.approx(expected)
            assert task[f"{name},maj@{k}"] == pytest.approx(summary.accuracy[metric].maj[k].mean)
        assert task[f"{name},maj@1"] == task[f"{name},pass@1"] == task[f"{name},none"]
        assert set(summary.accuracy[metric].pass_) == {1, 2, 4}


def once_a_trace(rows):
    """Each item once for each of its traces."""
    return [row for row in rows for _ in row["traces"]]


def test_majorities_are_over_the_traces_of_one_item(evaluated):
    summary, _, samples = evaluated
    tokenizer, values = load_tokenizer(str(MODEL_DIR)), []
    for row in samples:
        example = Example(0, [1], row["answer_ids"], None, "", row["target"], "")
        graded = grade_item(example, [*row["filtered_resps"][0], ""], tokenizer, {"exact": exact})["exact"]
        values.append(maj_at(graded.after_traces, G))
    assert summary.accuracy["exact"].maj[G].mean == pytest.approx(sum(values) / NUM_PROMPTS)


def test_results_have_the_layout_of_lm_eval(evaluated):
    results = evaluated[1]
    # EvalResults of lm-eval 0.4.13, less what is about groups and its own git hash.
    assert {
        "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date",
        "transformers_version", "model_source", "model_name", "model_name_sanitized", "chat_template",
        "total_evaluation_time_seconds",
    } <= set(results)  # fmt: skip
    assert results["n-samples"] == {"builtin_tasks": {"original": NUM_PROMPTS, "effective": NUM_PROMPTS}}
    assert results["n-shot"] == {"builtin_tasks": 0}
    assert results["configs"]["builtin_tasks"]["repeats"] == G
    assert results["config"]["random_seed"] == 5 and results["config"]["nrt_fast"]["num_generations"] == G
    assert results["config"]["nrt_fast"]["max_trace_length"] == 40, "what was left open is told"
    assert set(results["higher_is_better"]["builtin_tasks"]) >= {"gain", *NAMES}
    figures = {name for name in results["results"]["builtin_tasks"] if "," in name}
    for name in figures:
        metric, how = name.split(",")
        assert metric.endswith("_stderr") or f"{metric}_stderr,{how}" in figures


def test_samples_have_the_fields_of_lm_eval(evaluated):
    tokenizer = load_tokenizer(str(MODEL_DIR))
    for number, row in enumerate(evaluated[2]):
        # SampleResult of lm-eval 0.4.13.
        assert {
            "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash",
            "prompt_hash", "target_hash", *NAMES,
        } <= set(row)  # fmt: skip
        assert row["doc_id"] == number and row["metrics"] == NAMES and row["target"] == row["doc"]["answer"]
        assert row["arguments"]["gen_args_0"]["arg_0"] == tokenizer.decode(row["prompt_ids"])
        assert len(row["resps"]) == 1 and len(row["resps"][0]) == len(row["traces"]) == G
        for raw, answer, trace in zip(row["resps"][0], row["filtered_resps"][0], row["traces"], strict=True):
            assert raw == tokenizer.decode(trace["answer_ids"]) and answer == raw.removesuffix("<eos>").strip()
            assert trace["exact_match"] == (answer == row["target"])
        assert row["no_trace"]["exact_match"] == (row["no_trace"]["answer"] == row["target"])
        assert len(row["baseline_logprobs"]) == len(row["answer_ids"]) == len(row["traces"][0]["answer_logprobs"])


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (None, "builtin_tasks"),
        ("data/my set.v2.jsonl.gz", "my_set.v2"),
        ("openai/gsm8k,b/x.parquet", "gsm8k_x"),
    ],
)
def test_names_of_tasks(names, task):
    assert task_name(EvalConfig(dataset_name=names)) == task


def test_interrupting_keeps_what_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heldout, "TRACES_AT_A_TIME", 2 * G)
    think = Engine.think

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return think(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "think", interrupted)
    evaluate_dataset(EvalConfig(**SMALL, output_dir=str(tmp_path / "new")))
    assert "stopped after 2 of 6 items" in capsys.readouterr().out
    assert len(lines(tmp_path / "new/samples_builtin_tasks.jsonl")) == 2
    counts = json.loads((tmp_path / "new/results.json").read_text())["n-samples"]
    assert counts == {"builtin_tasks": {"original": 6, "effective": 2}}


# Figures


SOME = Accuracy(Estimate(0.6, 0.05), Estimate(0.4, 0.05), Estimate(0.2, 0.05), {}, {})
SUMMARY = EvalSummary(
    100, 100, Estimate(0.2, 0.05), Estimate(math.nan, math.nan), Estimate(0.6, 0.1), Estimate(9.0, 1.0),
    Estimate(0.9, 0.1), {"normalised": SOME},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "thinking makes more answers right (normalised: 40.0% to 60.0%, +20.0 ± 10.0 points, 95%)"),
        ({}, "log-probabilities change by +0.200 ± 0.100 nats a token."),
        ({"accuracy": {"exact": replace(SOME, difference=Estimate(-0.2, 0.05))}}, "fewer answers right (exact: 40.0%"),
        ({"accuracy": {"exact": replace(SOME, difference=Estimate(0.2, 0.11))}}, "do not tell whether thinking makes"),
        ({"num_items": 9}, "9 items are too few to tell"),
    ],
)
def test_verdict_claims_no_more_than_the_figures(change, text):
    assert text in verdict(replace(SUMMARY, **change))


def test_what_is_no_number_is_no_json_number():
    assert task_metrics(SUMMARY)["hard_gain,none"] == task_metrics(SUMMARY)["hard_gain_stderr,none"] == "N/A"


def test_the_console_has_every_figure(capsys):
    argv = ["eval", "--num_prompts=12", "--num_generations=3", "--metrics=normalised,math", "--device=cpu"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for text in (
        "memory of cpu", "12 items, 36 traces", "gain of thinking", "the same on hard tokens", "traces that help",
        "trace length", "closed by the delimiter", "without a trace", "difference, points", "normalised maj@k",
        "math pass@k", "│ 2 │", "│ 3 │", "answers right (normalised: ",
    ):  # fmt: skip
        assert text in out
    assert "results.json" not in out


# What is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_generations", "0"], "num_generations is 0; it should be at least 1"),
        (["--temperature", "-1"], "temperature is -1.0; it should be at least 0"),
        (["--temperature", ".inf"], "temperature is inf; it should be at least 0"),
        (
            ["--temperature", "0", "--num_generations", "2"],
            "num_generations 2 cannot take effect: at temperature 0 all are equal",
        ),
        (["--metrics", "exact,f1"], "metrics: 'f1' is unknown; valid: some of exact, normalised, math"),
        (["--metrics", ","], "metrics is ','; one or more of exact, normalised, math are expected, each once"),
        (["--metrics", "exact,exact"], "metrics is 'exact,exact'; one or more of"),
        (["--output_file", "x"], "unknown option --output_file"),
        (["--answer_field", "a"], "answer_field cannot take effect: the built-in tasks name theirs"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model_name_or_path", "./nowhere"], "model ./nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys, tmp_path):
    output = tmp_path / "new"
    assert cli.main(["eval", f"--output_dir={output}", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nrt-fast: error: ") and err.count("\n") == 1
    assert message in err
    assert not output.exists()


@pytest.mark.parametrize("name", ["precious.txt", "results.json", ".hidden"])
def test_a_folder_with_files_is_never_written_to(name, tmp_path, capsys):
    (tmp_path / name).write_text("precious\n")
    assert cli.main(["eval", f"--output_dir={tmp_path}"]) == 2
    assert f"output_dir {tmp_path} is there and not empty; choose an empty or new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious\n"
