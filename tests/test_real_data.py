"""The run on real data: its split, the documents of its base, and what it says, on rows made here."""

import gzip
import json
import random
from itertools import islice

import pytest
import real_base
import real_data
import real_report

from nrt_fast.data import load_tokenizer, render
from nrt_fast.data.schema import Pair
from nrt_fast.starter import recipe

TOPICS = "glaciers violins comets bridges pepper foxes harbours lanterns".split()


def open_row(number):
    topic = TOPICS[number % len(TOPICS)]
    return {
        "id": f"o-{number}", "source": "made", "kind": "open", "question": f"What is number {number} about {topic}?",
        "answer": f"It tells of {topic} and of {TOPICS[number * 3 % 8]}, {number} times over.",
    }  # fmt: skip


ROWS = [open_row(number) for number in range(400)] + [
    {"id": f"s-{number}", "source": "sums", "kind": "verifiable", "question": f"How much is {number} plus 2?",
     "answer": str(number + 2), "solution": f"{number} and 2 make {number + 2}"}
    for number in range(40)
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("open", ROWS[:400]), ("sums", ROWS[400:])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return real_base.split(folder)


@pytest.fixture(scope="module")
def tokenizer(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    built = real_base.build_tokenizer(row["question"] + row["answer"] for row in parts["base"])
    recipe.save(recipe.build_model(built.get_vocab_size(), 32), built, folder)
    return load_tokenizer(str(folder))


def test_every_row_is_in_one_part_and_only_open_ones_are_trained_on_or_held_out(parts):
    ids = [row["id"] for rows in parts.values() for row in rows]
    assert sorted(ids) == sorted(row["id"] for row in ROWS)
    assert {row["kind"] for row in parts["run"] + parts["heldout"]} == {"open"}
    shares = {part: 100 * sum(row["kind"] == "open" for row in rows) / 400 for part, rows in parts.items()}
    assert shares == pytest.approx(real_base.SHARES, abs=8)


def test_a_question_asked_again_in_other_spelling_is_in_the_same_part():
    for row in ROWS[:50]:
        again = row | {"id": "again", "question": f"  {row['question'].upper().replace('?', ' ??')}"}
        assert real_base.part_of(again) == real_base.part_of(row)


def test_documents_are_prompt_trace_delimiter_answer_as_training_renders_them(parts, tokenizer):
    end_id, by_prompt = tokenizer.convert_tokens_to_ids(recipe.END), {}
    for row in parts["base"]:
        example = render([Pair([{"role": "user", "content": row["question"]}], row["answer"], None, "")], tokenizer)[0]
        by_prompt[tuple(example.prompt_ids)] = row, example.answer_ids
    num_open = 0
    for ids in islice(real_base.documents(parts["base"], tokenizer, seed=0), 200):
        at = ids.index(end_id)
        prompt = next(prompt for prompt in by_prompt if tuple(ids[: len(prompt)]) == prompt)
        row, answer_ids = by_prompt[prompt]
        assert ids[at + 1 :] == answer_ids
        if "solution" in row:
            assert tokenizer.decode(ids[len(prompt) : at]) == row["solution"]
        num_open += row["kind"] == "open"
    assert 100 < num_open < 160  # two thirds


def test_an_outline_holds_rare_words_of_the_answer_in_its_order_but_for_slips(parts):
    author = real_base.writer(parts["base"], seed=0, slip_rate=0.0)
    for row in parts["run"][:50]:
        outline, own = author.outline(row["answer"]), real_base.words(row["answer"])
        assert 2 <= len(outline) <= 4
        places = [own.index(word) for word in outline]
        assert places == sorted(places)
        left = [author.counts[word] for word in own if word not in outline]
        assert max(author.counts[word] for word in outline) <= min(left)


def test_habits_come_as_often_as_they_should(parts):
    author = real_base.writer(parts["base"], seed=0)
    traces = [author.trace(random.Random(number).choice(parts["run"])) for number in range(1000)]
    starts = {"outline": "plan: ", "restate": "so, ", "ramble": "hmm, "}
    found = {habit: sum(trace.startswith(start) for trace in traces) / 10 for habit, start in starts.items()}
    found["empty"] = traces.count("") / 10
    assert sum(found.values()) == 100
    assert found == pytest.approx(real_base.HABITS, abs=5)


@pytest.mark.parametrize("objective", list(real_data.STEPS))
def test_runs_are_measured_where_nrt_ends(objective, tmp_path):
    config = real_data.Job(objective, 1).config(tmp_path, tmp_path, tmp_path)
    config.check()
    assert real_data.STEPS["nrt-ws"] % config.save_steps == 0 == config.max_steps % config.save_steps
    assert config.save_total_limit * config.save_steps == config.max_steps  # no checkpoint is gone when it is measured


def point(log_b, log_c):
    """Thirty items of one token, and one of two, from another source."""
    return {
        "source": ["a"] * 30 + ["few"], "log_marginal": [log_c] * 30 + [2 * log_c],
        "log_b": [[log_b]] * 30 + [[log_b, log_b]], "log_c": [[log_c]] * 30 + [[log_c, log_c]],
        "trace_length": 5.0, "entropy": 1.0, "delimiter_rate": 1.0,
        "samples": [{"source": "a", "question": "q", "answer": "y", "trace": "", "log_b": log_b, "log_c": log_c}],
    }  # fmt: skip


def test_the_report_tells_a_gain_that_comes_from_a_baseline_left_behind(tmp_path):
    """nrt-ws ends at -3 with traces, where base and sft are without; only its own baseline fell."""
    before = point(-3.0, -3.5)
    runs = [
        {"objective": "nrt-ws", "seed": 1, "seconds": 600, "prompts": [8], "points": [point(-4.0, -3.0)], "alarms": []},
        {"objective": "sft", "seed": 1, "seconds": 60, "prompts": [8, 80],
         "points": [point(-3.0, -3.5), point(-2.0, -3.0)], "alarms": []},
    ]  # fmt: skip
    text = real_report.report(before, before, runs)
    for line in (
        "An outline of the reference's own rarest words would change the base's log p by -0.500 ± 0.000 nats a token.",
        "| nrt-ws, seed 1 | 8 | 10.0 | -4.000 | -3.000 | +1.000 ± 0.000 |",
        "| sft, seed 1 | 8 | 0.1 | -3.000 | -3.500 | -0.500 ± 0.000 |",
        "| sft, seed 1 | 80 | 1.0 | -2.000 | -3.000 | -1.000 ± 0.000 |",
        "| nrt-ws with traces, minus the base without | +0.000 ± 0.000: not told apart |",
        "| nrt-ws without a trace, minus the base without | -1.000 ± 0.000: worse |",
        "| nrt-ws with traces, minus sft at its best | -1.000 ± 0.000: worse |",
        "| a | 30 | -0.500 ± 0.000 | +1.000 ± 0.000 | +0.000 ± 0.000 |",
    ):
        assert line in text
    assert "| few |" not in text
    real_report.draw(before, runs, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("nrt-ws, with traces") == 1
