"""nrt-fast score: what its lines hold, what they say altogether, and what it refuses."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from nrt_fast import Model, cli, heldout
from nrt_fast.config import ScoreConfig, TrainConfig
from nrt_fast.data import Limits, load_data, load_heldout, load_tokenizer
from nrt_fast.engine import Engine
from nrt_fast.json_lines import JsonLines, how_ended
from nrt_fast.score_command import KINDS, score_dataset
from nrt_fast.score_report import Estimate, RewardFigures, ScoringCost, Summary, clustered_mean, scoring_cost, verdict
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import UserError

NUM_PROMPTS, G = 6, 3
SMALL = {"num_prompts": NUM_PROMPTS, "num_generations": G, "device": "cpu", "dtype": "float32"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(summary, lines) of one small run."""
    path = tmp_path_factory.mktemp("scores") / "deep/scores.jsonl"
    summary = score_dataset(ScoreConfig(**SMALL, output_file=str(path)))
    return summary, lines(path)


# Lines


def test_a_line_for_every_item_and_trace(scored):
    summary, rows = scored
    assert len(rows) == summary.num_items == NUM_PROMPTS
    assert [len(row["traces"]) for row in rows] == [G] * NUM_PROMPTS
    assert len({row["uid"] for row in rows}) == NUM_PROMPTS
    for row in rows:
        assert len(row["answer_tokens"]) == len(row["answer_ids"]) == len(row["baseline_logprobs"])
        assert " ".join(row["answer_tokens"][:-1]) == row["answer"]
        for trace in row["traces"]:
            assert len(trace["trace_ids"]) == len(trace["logprobs"]) == len(trace["trace"].split())
            assert (trace["ended"] == "delimiter") == (trace["delimiter_logprob"] is not None)


def test_a_full_disk_is_told_in_one_line_and_leaves_whole_ones(tmp_path, file_size_limit):
    row, path = {"text": "ä" * 100}, tmp_path / "lines.jsonl"
    with (
        file_size_limit(1000),
        pytest.raises(UserError, match=r"cannot write \S+/lines.jsonl: File too large; what was saved before is"),
        JsonLines(str(path)) as file,
    ):
        for _ in range(100):
            file.write(row)
    assert lines(path) == [row] * 4
    with file_size_limit(10), pytest.raises(UserError, match="cannot write"), JsonLines(str(tmp_path / "none")) as file:
        file.write(row)
    assert not (tmp_path / "none").exists()


def test_rewards_follow_from_the_log_probabilities(scored):
    for row in scored[1]:
        log_b = torch.tensor(row["baseline_logprobs"], dtype=torch.float64)
        log_c = torch.tensor([trace["answer_logprobs"] for trace in row["traces"]], dtype=torch.float64)
        spread = log_c.std(dim=0)
        expected = {
            "logp": log_c.sum(1),
            "prob": log_c.sum(1).exp(),
            "am": log_c.exp().mean(1),
            "gm": log_c.mean(1).exp(),
            "ws_inv": (log_c - log_b).exp().mean(1),
            "ws_log": (log_c.exp() * -log_b).mean(1),
            "r3": ((log_c - log_b) * spread / spread.sum()).mean(1),
        }
        for kind in KINDS:
            told = [trace["rewards"][kind] for trace in row["traces"]]
            torch.testing.assert_close(torch.tensor(told).double(), expected[kind], rtol=1e-4, atol=1e-5)
        for trace in row["traces"]:
            for kind in ("am", "ws_inv", "ws_log"):
                assert sum(trace["answer_weights"][kind]) == pytest.approx(trace["rewards"][kind], rel=1e-4, abs=1e-6)
        assert row["baseline_rewards"]["logp"] == pytest.approx(float(log_b.sum()), abs=1e-5)
        assert row["baseline_rewards"]["ws_inv"] == pytest.approx(1, abs=1e-5)


def test_scores_equal_a_full_forward(scored):
    model = Model.from_pretrained(MODEL_DIR)
    delimiter = load_tokenizer(str(MODEL_DIR)).convert_tokens_to_ids("</think>")
    for row in scored[1][:2]:
        answer = row["answer_ids"]
        for told, trace_ids in [(row["baseline_logprobs"], [])] + [
            (trace["answer_logprobs"], trace["trace_ids"]) for trace in row["traces"]
        ]:
            ids = [*row["prompt_ids"], *trace_ids, delimiter, *answer]
            logprobs = model.logits(ids).log_softmax(dim=1)[-len(answer) - 1 : -1]
            full = logprobs.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(told), full, atol=2e-5, rtol=1e-4)


def test_neither_the_pieces_nor_the_place_change_a_line(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "TRACES_AT_A_TIME", 1)
    score_dataset(ScoreConfig(**SMALL, output_file=str(tmp_path / "again.jsonl")))
    for row, other in zip(scored[1], lines(tmp_path / "again.jsonl"), strict=True):
        assert [trace["trace_ids"] for trace in row["traces"]] == [trace["trace_ids"] for trace in other["traces"]]
        assert row["baseline_logprobs"] == pytest.approx(other["baseline_logprobs"], abs=2e-5)


@pytest.mark.parametrize("dataset", ["file", "built-in"])
def test_items_are_those_that_training_holds_out(dataset, tiny_run, tmp_path):
    run = tiny_run(tmp_path, seed=3)
    name = run.dataset_name if dataset == "file" else None
    tokenizer, limits = load_tokenizer(str(MODEL_DIR)), Limits(64, 16)
    for num in (4, None):
        config = TrainConfig(dataset_name=name, seed=3, num_eval_prompts=num)
        trained = load_data(config, tokenizer, limits, 3).heldout
        examples, lines = load_heldout(ScoreConfig(dataset_name=name, seed=3, num_prompts=num), tokenizer, limits, 3)
        assert list(examples) == list(trained)  # uids too: they key the noise
        assert len(examples) == num or (1 if name else 3)
    if name:
        assert lines[-1] == "1 of 10 rows: those that a run on them holds out; num_prompts takes more"
    everything, _ = load_heldout(ScoreConfig(dataset_name=run.dataset_name, num_prompts=1000), tokenizer, limits, 3)
    assert len(everything) == 10


def test_how_a_trace_ended():
    assert how_ended([5, 6], -0.1, (2,), 2) == "delimiter"
    assert how_ended([5, 2], None, (2,), 4) == "eos"
    assert how_ended([5, 6], None, (2,), 2) == "limit"
    assert how_ended([5, 5, 5], None, (2,), 8) == "repetition"


# Interruption


def test_what_was_written_stays_when_it_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "TRACES_AT_A_TIME", 2 * G)
    think, calls = Engine.think, []

    def breaks(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return think(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "think", breaks)
    with pytest.raises(RuntimeError):
        score_dataset(ScoreConfig(**SMALL, output_file=str(tmp_path / "s.jsonl")))
    assert len(lines(tmp_path / "s.jsonl")) == 4


def test_interrupting_still_tells_what_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heldout, "TRACES_AT_A_TIME", 2 * G)
    think = Engine.think

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return think(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "think", interrupted)
    summary = score_dataset(ScoreConfig(**SMALL, output_file=str(tmp_path / "s.jsonl")))
    assert summary.num_items == len(lines(tmp_path / "s.jsonl")) == 2
    assert "stopped after 2 of 6 items" in capsys.readouterr().out


# Figures


def test_summary_follows_from_the_lines(scored):
    summary, rows = scored
    traces = [trace for row in rows for trace in row["traces"]]
    gains = [
        [c - b for c, b in zip(trace["answer_logprobs"], row["baseline_logprobs"], strict=True)]
        for row in rows
        for trace in row["traces"]
    ]
    flat = [value for gain in gains for value in gain]
    assert summary.gain.mean == pytest.approx(sum(flat) / len(flat), abs=1e-6)
    assert summary.helped == pytest.approx(sum(sum(gain) > 0 for gain in gains) / len(gains))
    assert summary.trace_length == pytest.approx(sum(len(trace["trace_ids"]) for trace in traces) / len(traces))
    assert summary.delimiter_rate == sum(trace["ended"] == "delimiter" for trace in traces) / len(traces)
    for kind in KINDS:
        assert summary.rewards[kind].mean == pytest.approx(
            sum(trace["rewards"][kind] for trace in traces) / len(traces), rel=1e-4, abs=1e-5
        )
        assert 0 <= summary.rewards[kind].signal <= 1
    positions = [row["hard_positions"] for row in rows for _ in range(G)]
    hard = [gain[position] for gain, part in zip(gains, positions, strict=True) for position in part]
    assert summary.hard_gain.mean == pytest.approx(sum(hard) / len(hard), abs=1e-6)


def test_cost_of_scoring_in_tokens():
    """P = 300, Z = 600, A = 415, G = 8."""
    assert scoring_cost(300, [600] * 8, 415) == ScoringCost(16_240, 8_835, 3_735)


def test_cost_is_what_went_through_the_model(scored):
    summary, rows = scored
    assert summary.cost.from_cache == sum((G + 1) * len(row["answer_ids"]) for row in rows)
    engine = Engine(Model.from_pretrained(MODEL_DIR), delimiter_id=5, eos_id=3)
    answers, options = [[8, 9, 3], [10, 3]], {"max_trace_length": 3, "temperature": 1.0, "seed": 0, "step": 0}
    thoughts = engine.think([[4, 6, 7]] * 2, answers, [0, 1], num_generations=4, **options)
    num_cut = sum(end is None for group in thoughts.traces.delimiter_logprobs for end in group)
    costs = [scoring_cost(3, [3] * 4, len(answer)).from_cache for answer in answers]
    # The last id of a trace that the delimiter did not end was sampled, but never fed.
    assert engine.counters.score_tokens == sum(costs) + num_cut


def test_standard_error_takes_an_items_values_for_dependent():
    items = torch.tensor([0.1, 0.5, -0.2, 0.4])
    estimate = clustered_mean([value.repeat(50) for value in items])
    assert estimate.mean == pytest.approx(float(items.mean()))
    assert estimate.error == pytest.approx(float(items.std()) / 2), "fifty copies of a value say no more than one"
    weighted = clustered_mean([torch.ones(3), torch.zeros(1)])
    assert weighted.mean == pytest.approx(0.75)
    assert weighted.error == pytest.approx(math.sqrt(2 * 2 * 0.75**2) / 4)
    assert math.isnan(clustered_mean([torch.ones(3)]).error)
    assert math.isnan(clustered_mean([torch.ones(0), torch.ones(0)]).mean)


SUMMARY = Summary(
    100, 800, Estimate(0.2, 0.05), Estimate(0.5, 0.1), 0.6, 100.0, 0.9,
    {"ws_log": RewardFigures(1.0, 0.5, 0.1, 0.75)}, ScoringCost(3, 2, 1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "thinking helps: the reference answers' log-probabilities change by +0.200 ± 0.100 nats a token (95%)"),
        ({}, "75% of the groups carry a signal."),
        ({"gain": Estimate(-0.2, 0.05)}, "thinking hurts: the reference answers' log-probabilities change by -0.200 ±"),
        ({"gain": Estimate(0.2, 0.11)}, "do not tell whether thinking helps: the answers' log-probabilities change by"),
        ({"num_items": 9}, "9 items are too few to tell"),
    ],
)
def test_verdict_claims_no_more_than_the_figures(change, text):
    assert text in verdict(replace(SUMMARY, **change))


def test_one_trace_an_item_says_nothing_of_groups():
    assert "signal" not in verdict(replace(SUMMARY, num_traces=100))


def test_the_console_has_every_figure(tmp_path, capsys):
    path = tmp_path / "s.jsonl"
    assert cli.main(["score", "--num_prompts=12", "--num_generations=2", f"--output_file={path}", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert len(lines(path)) == 12
    for text in (
        "memory of cpu", "12 items, 24 traces", "gain of thinking", "the same on hard tokens", "traces that help",
        "trace length", "closed by the delimiter", "groups with signal", *KINDS, "tokens through the model",
        f"items, traces and scores are in {path}", "thinking",
    ):  # fmt: skip
        assert text in out


# What is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_generations", "0"], "num_generations is 0; it should be at least 1"),
        (["--num_prompts", "0"], "num_prompts is 0; it should be at least 1"),
        (["--temperature", "0"], "temperature is 0.0; it should be above 0"),
        (["--learning_rate", "1"], "unknown option --learning_rate"),
        (["--num_prompt", "1"], "unknown option --num_prompt; did you mean --num_prompts?"),
        (["--prompt_field", "q"], "prompt_field cannot take effect: the built-in tasks name theirs"),
        (["--dataset_name", ","], "dataset_name is empty"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model_name_or_path", "./nowhere"], "model ./nowhere: no such folder"),
        (["--max_trace_length", "9999"], "do not fit the model's context"),
        (["--delimiter", "take 9"], "delimiter 'take 9' is 2 tokens"),
        (["--dtype", "int8"], "--dtype: 'int8' is not valid; one of auto, float32, bfloat16 is expected"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys, tmp_path):
    output = tmp_path / "s.jsonl"
    assert cli.main(["score", f"--output_file={output}", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nrt-fast: error: ") and err.count("\n") == 1
    assert message in err
    assert not output.exists()


def test_an_output_file_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "s.jsonl").write_text("precious\n")
    assert cli.main(["score", f"--output_file={tmp_path}/s.jsonl"]) == 2
    assert f"output_file {tmp_path}/s.jsonl is there already; choose another" in capsys.readouterr().err
    assert (tmp_path / "s.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize("place", ["/proc/s.jsonl", "{}/file/s.jsonl"])
def test_output_files_that_cannot_be(place, tmp_path, capsys):
    (tmp_path / "file").touch()
    path = place.format(tmp_path)
    assert cli.main(["score", f"--output_file={path}"]) == 2
    assert f"cannot write {path}: " in capsys.readouterr().err


def test_weights_that_cannot_be_read_leave_no_file(tmp_path, monkeypatch):
    def broken(*args):
        raise UserError("model.norm.weight holds NaN or Inf")

    monkeypatch.setattr(Model, "from_pretrained", broken)
    with pytest.raises(UserError):
        score_dataset(ScoreConfig(**SMALL, output_file=str(tmp_path / "s.jsonl")))
    assert not (tmp_path / "s.jsonl").exists()
