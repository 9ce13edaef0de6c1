"""The lab of objectives: its tasks, its figures, its files and what it says about the claims."""

import itertools
import json
import math
import random
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import lab_options
import lab_plots
import lab_report
import lab_runs
import lab_tasks
import objectives
import pytest
from lab_report import claims, collapsed, interval, report, verdict

from nrt_fast.starter import tasks

KINDS = list(lab_tasks.KINDS)


def record(kind, preset, seed, accuracy, length=18.0, entropy=0.5):
    held = {
        "accuracy": 0.3, "accuracy_no_trace": 0.1, "gain": 0.05, "hard_token_gain": 0.4, "trace_length": 20.0,
        "entropy": 1.0,
    }  # fmt: skip
    after = held | {"accuracy": accuracy, "trace_length": length, "entropy": entropy}
    middle = {name: (held[name] + after[name]) / 2 for name in held}
    return {
        "kind": kind, "preset": preset, "seed": seed, "budget": {"max_steps": 4}, "before": held, "after": after,
        "with_trace": held,
        "curve": {"step": [0, 2, 4]} | {name: [held[name], middle[name], after[name]] for name in held},
        "steps": {"no_signal": [0.25, 0.75], "repetition": [0.0, 0.02]},
    }  # fmt: skip


@pytest.fixture
def records():
    """nrt-ws learns A and B where sft does not, jepo wins nowhere and shrinks on C; C is the same for all."""
    level = {"nrt-ws": 0.9, "jepo": 0.7, "sft": 0.4}
    return [
        record(kind, preset, seed, (0.95 if kind == "C" else level[preset]) + seed / 1000 * (1 + level[preset]),
               length=4.0 if (preset, kind) == ("jepo", "C") else 18.0)
        for seed, kind, preset in itertools.product((1, 2, 3), KINDS, level)
    ]  # fmt: skip


# tasks ----------------------------------------------------------------------------------------------------------------


def right_answer(row):
    """The hard words of a row, worked out here from the question's text."""
    words = row["question"].split()
    match row["family"]:
        case "chain":
            value = int(words[1])
            for name, operand in zip(words[2:-1:2], words[3:-1:2], strict=True):
                value = {"plus": value + int(operand), "minus": value - int(operand), "times": value * int(operand)}[
                    name
                ]
            return [str(value % 10)]
        case "lookup":
            person = words[-2]
            for relation in reversed(words[2:-2:2]):
                person = tasks.RELATIONS[relation][person]
            return [person]
        case "order":
            return [sorted(words[1:6])[tasks.PLACES.index(words[9])]]
        case "letters":
            return [tasks.LETTERS[(tasks.LETTERS.index(words[i][-1]) + int(words[10])) % 26] for i in (5, 7)]
        case "read":
            return [words[2]]
        case "fact":
            return [tasks.RELATIONS[words[8]][words[10]]]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_and_their_hard_words_are_marked(kind):
    rows = tasks.rows("train", 300, 0, lab_tasks.KINDS[kind])
    assert {row["family"] for row in rows} == set(lab_tasks.KINDS[kind])
    for row in rows:
        hard = [row["answer"][start:end] for start, end in row["hard_spans"]]
        assert hard == right_answer(row), row


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_as_long_as_their_kind_says(kind):
    lengths = {len(row["answer"].split()) for row in tasks.rows("heldout", 100, 0, lab_tasks.KINDS[kind])}
    assert lengths == ({17, 20} if kind == "B" else {1})


def test_splits_are_disjoint_and_the_base_sees_no_held_out_question():
    families = lab_tasks.FAMILIES
    heldout = {row["question"] for row in tasks.rows("heldout", 200, 0, families)}
    assert len(heldout) == 200
    assert not heldout & {row["question"] for row in tasks.rows("train", 2000, 0, families)}
    source = tasks.problems("train", 0, families)
    assert not heldout & {problem.question for _, problem in itertools.islice(source, 2000)}


@pytest.mark.parametrize("family", [lab_tasks.Read, lab_tasks.Fact])
def test_where_thinking_is_useless_no_style_of_trace_makes_answers_better(family):
    for style in ("careful", "ramble", "empty"):
        rng, right = random.Random(0), 0
        for _ in range(2000):
            problem = family.draw(rng)
            words = lab_tasks.think(rng, problem, {style: 1})[1]
            truth = problem.think(tasks.careful)[1]
            assert words in (truth, [problem.careless])
            right += words == truth != [problem.careless]
        by_chance = {lab_tasks.Read: 0, lab_tasks.Fact: 1 / 16}[family]  # the careless choice is the right one
        assert right / 2000 == pytest.approx(family.sure * (1 - by_chance), abs=0.04), style


def test_where_thinking_is_needed_careful_traces_lead_to_the_answer():
    rng = random.Random(0)
    for family in [*lab_tasks.KINDS["A"].values(), *lab_tasks.KINDS["B"].values()]:
        for _ in range(50):
            problem = family.draw(rng)
            trace, words = lab_tasks.think(rng, problem, {"careful": 1})
            assert trace.startswith("so ")
            assert words == problem.think(tasks.careful)[1]


# figures --------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_students_t():
    # 1..5: deviation sqrt(2.5), 2.776 * sqrt(2.5 / 5)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 1.9630), abs=1e-4)
    assert interval([0.0, 1.0]) == pytest.approx((0.5, 6.353), abs=1e-3)
    assert interval([2.0]) == (2.0, math.inf)


@pytest.mark.parametrize(
    ("difference", "word"),
    [((0.1, 0.05), "better"), ((-0.1, 0.05), "worse"), ((0.1, 0.2), "not told apart"), ((0.0, 0.0), "not told apart"),
     ((5.0, math.inf), "not told apart")],
)  # fmt: skip
def test_a_verdict_needs_an_interval_without_zero(difference, word):
    assert verdict(difference) == word


def test_differences_are_paired_by_seed(records):
    assert lab_report.differences(records[::-1], "A", "nrt-ws", "jepo") == pytest.approx([0.2002, 0.2004, 0.2006])
    with pytest.raises(ValueError, match="different seeds"):
        lab_report.differences(records[:-1], "C", "nrt-ws", "sft")


@pytest.mark.parametrize(("length", "told"), [(9.9, True), (10.1, False)])
def test_a_collapse_is_half_of_the_first_length(length, told):
    assert collapsed(record("C", "jepo", 1, 0.5, length=length)) is told


def test_claims_are_told_kind_by_kind(records):
    lines = claims(records)
    assert lines[0] == "nrt-ws beats jepo where thinking is needed: holds (A better, B better, C not told apart)"
    assert "C: traces end under half of their first length: jepo (3 of 3 seeds)" in lines
    assert "A: traces end under half of their first length: no preset" in lines
    assert "C: worse than sft: no preset" in lines


def test_claims_tell_what_does_not_hold():
    def spread(kind, preset, base):
        return [record(kind, preset, seed, base + offset) for seed, offset in ((1, 0.0), (2, 0.1), (3, -0.1))]

    records = [r for kind in KINDS for r in spread(kind, "sft", 0.8)]
    records += [record("A", "nrt-ws", seed, 0.8) for seed in (1, 2, 3)]
    records += spread("B", "nrt-ws", 0.9) + spread("C", "nrt-ws", 0.7)
    lines = claims(records)
    assert lines[0] == "nrt-ws beats sft where thinking is needed: holds in part (A not told apart, B better, C worse)"
    assert lines[-1] == "C: worse than sft: nrt-ws (-0.100 ± 0.000)"
    assert objectives.costs(records) == ["kind C: nrt-ws is worse than sft: -0.100 ± 0.000"]


def test_the_quick_lab_fails_where_thinking_does_not_pay(records):
    assert objectives.problems(records) == []
    for run in records:
        if (run["kind"], run["preset"], run["seed"]) == ("B", "nrt-ws", 2):
            run["after"]["accuracy"] = 0.1
    (line,) = objectives.problems(records)
    assert line.startswith("kind B: nrt-ws does not beat sft with every seed: accuracy -0.3")


# tables, pictures -----------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_preset_best_first(records):
    rows = lab_report.table(records, "A").splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["before", "nrt-ws", "jepo", "sft", "sft, made to think"]
    assert len({row.count("|") for row in rows}) == 1
    assert "0.90 ± 0.00" in rows[3]
    assert "20.0 → 19.0 → 18.0" in rows[3]
    assert "50%" in rows[3]


def test_the_page_keeps_what_was_written_by_hand(records, tmp_path):
    page = tmp_path / "objectives.md"
    page.write_text(f"by hand\n{objectives.BEGIN}\nstale\n{objectives.END}\nand after\n")
    objectives.publish(records, page)
    text = page.read_text()
    assert text.startswith("by hand\n") and text.endswith("\nand after\n")
    assert "stale" not in text
    assert report(records).splitlines()[0] in text
    for kind in KINDS:
        assert f"objectives-{kind}.svg" in text
        picture = tmp_path / f"objectives-{kind}.svg"
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert picture.stat().st_size < 150_000
    objectives.publish(records, page)
    assert page.read_text() == text
    with pytest.raises(ValueError, match="markers"):
        objectives.put_between("no markers", "text")


def test_every_claimed_preset_has_a_colour():
    assert set(lab_plots.COLORS) == {lab_report.OURS, *lab_report.RIVALS}


# files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A lab in an empty folder, with files that stand for a base model and its data."""
    monkeypatch.setattr(lab_runs, "LAB", tmp_path)
    for name in ("base/model.safetensors", "base/tokenizer.json", "data/A-train.jsonl", "data/A-heldout.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_a_finished_run_is_not_run_again(lab, monkeypatch):
    todo = [lab_runs.Job("A", preset, 1, lab_runs.QUICK) for preset in ("sft", "nrt-ws")]
    code = lab_runs.code_digest()
    for job in todo:
        path = lab_runs.result_file(job, lab / "base", lab / "data", code)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"preset": job.preset}))
    monkeypatch.setattr(lab_runs, "ProcessPoolExecutor", None)  # a run would need it
    said = []
    records = lab_runs.run_all(todo, lab / "base", lab / "data", 2, said.append)
    assert records == [{"preset": "sft"}, {"preset": "nrt-ws"}]
    assert said == ["2 of 2 runs are there already"]
    with pytest.raises(TypeError):
        lab_runs.run_all([lab_runs.Job("A", "jepo", 1, lab_runs.QUICK)], lab / "base", lab / "data", 2, said.append)


def test_a_file_is_named_by_all_that_decides_its_result(lab):
    def name(job, code="code"):
        return lab_runs.result_file(job, lab / "base", lab / "data", code).name

    job = lab_runs.Job("A", "nrt-ws", 1, lab_runs.FULL)
    others = [replace(job, seed=2), replace(job, preset="sft"), replace(job, budget=lab_runs.QUICK)]
    others.append(replace(job, options=(("std_floor", 0.1),)))
    names = [name(job), name(job, "other code"), *map(name, others)]
    for path in ("base/model.safetensors", "data/A-train.jsonl"):
        (lab / path).write_text("changed")
        names.append(name(job))
    assert len(set(names)) == len(names)
    assert name(job) == names[-1]


def test_the_full_lab_is_every_preset_on_every_kind_with_five_seeds():
    todo = lab_runs.jobs(lab_runs.ALL_PRESETS, lab_runs.SEEDS, lab_runs.FULL)
    assert len(set(todo)) == 13 * 3 * 5
    for job in todo:
        job.config(lab_runs.LAB, lab_runs.LAB, lab_runs.LAB).check()


# options --------------------------------------------------------------------------------------------------------------


def test_every_option_is_run_beside_the_preset_as_it_is():
    todo = lab_options.jobs()
    assert len(set(todo)) == len(lab_options.OPTIONS) * 3 * 3
    assert [job.name for job in todo[:2]] == ["nrt-ws", "nrt-ws std_floor=0.0"]
    for job in todo:
        config = job.config(lab_runs.LAB, lab_runs.LAB, lab_runs.LAB)
        config.check()
        assert {name: getattr(config, name) for name, _ in job.options} == dict(job.options)


def test_an_option_is_compared_over_the_run_and_paired_by_seed():
    """Over the run an accuracy of a counts as (0.3 + (0.3 + a) / 2 + a) / 3, so a difference of d as d / 2."""
    name = "nrt-ws std_floor=0.1"
    runs = [record("B", "nrt-ws", seed, 0.6 + seed / 10) for seed in (1, 2, 3)]
    runs += [record("B", name, seed, 0.5 + seed / 10 + seed / 1000) for seed in (3, 2, 1)]
    center, half = lab_options.difference(runs, "B", name)
    assert center == pytest.approx((-0.1 + 0.002) / 2)
    assert half == pytest.approx(4.303 * 0.0005 / math.sqrt(3), rel=1e-3)
    rows = [line.split(" | ") for line in lab_options.report(runs).splitlines() if line.startswith("| nrt-ws")]
    assert [row[3] for row in rows] == ["-", "-0.049 ± 0.001: worse"]
    assert rows[0][7:] == ["50%", "1.0% |"]
