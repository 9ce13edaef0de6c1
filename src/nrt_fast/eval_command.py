"""``nrt-fast eval``: gain and accuracy on held-out items, with a trace and without one; nothing is trained."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

import nrt_fast
from nrt_fast.checkpoint import new_folder, told_when_full
from nrt_fast.config import EvalConfig
from nrt_fast.engine import Engine, Thoughts
from nrt_fast.eval_report import LM_EVAL_NAMES, EvalSummary, Graded, results, summarise_eval, tables, verdict
from nrt_fast.grading import MATH_SECONDS, Grade, MathJudge, Same, check_metrics, exact, grade, normalised
from nrt_fast.heldout import HeldoutItems, item_fields, open_heldout, think_in_parts, trace_fields
from nrt_fast.json_lines import JsonLines
from nrt_fast.metrics import replace_file
from nrt_fast.score_report import Scored
from nrt_fast.signals import stop_requested
from nrt_fast.types import Example


def evaluate_dataset(config: EvalConfig) -> EvalSummary:
    """Evaluate as configured: tables and a verdict on the console, results and samples in output_dir.

    Raises:
        UserError: bad input, told in one line; what was written before is whole.
    """
    config.check()
    check_metrics(config.metric_names)
    output_dir = None if config.output_dir is None else new_folder(config.output_dir)
    console, started = Console(highlight=False, soft_wrap=True), time.time()
    heldout = open_heldout(config, lambda line: console.print(line, markup=False))
    config, task, tokenizer = heldout.config, task_name(config), heldout.source.tokenizer
    samples = nullcontext() if output_dir is None else JsonLines(str(output_dir / f"samples_{task}.jsonl"))
    scored, graded = Scored(), {metric: [] for metric in config.metric_names}
    with samples as file, MathJudge() as judge, stop_requested() as stop:
        engine, same = heldout.engine(), {"exact": exact, "normalised": normalised, "math": judge.same}
        for part, thoughts in think_in_parts(engine, heldout.examples, config, answer_greedily=True):
            for index, example in enumerate(part):
                answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in thoughts.answers[index]]
                grades = grade_item(example, answers, tokenizer, {name: same[name] for name in graded})
                if file is not None:
                    number = len(scored.examples) + index
                    file.write(sample_row(number, example, index, thoughts, answers, grades, heldout, engine))
                for metric, of_item in grades.items():
                    graded[metric].append(of_item)
            scored.add(part, thoughts.traces, thoughts.scores, {})
            if stop:
                break
    summary = summarise_eval(scored, graded)
    if stop:
        console.print(f"stopped after {summary.num_items:,} of {len(heldout.examples):,} items")
    for table in tables(summary):
        console.print(table)
    if judge.num_given_up:
        given_up = f"{judge.num_given_up:,} comparisons took math-verify over {MATH_SECONDS:g} s or ended it"
        console.print(f"{given_up}; they count as not equal")
    if output_dir is not None:
        about = describe(heldout, engine, started)
        written = results(task, summary, len(heldout.examples), about)
        with told_when_full(output_dir / "results.json"):
            replace_file(output_dir / "results.json", json.dumps(written, indent=2, ensure_ascii=False) + "\n")
        console.print(f"results.json and samples_{task}.jsonl are in {output_dir}", markup=False)
    console.print(verdict(summary), markup=False, style="bold")
    return summary


def task_name(config: EvalConfig) -> str:
    """The data set's name as a part of a file's: without folders, endings and odd characters."""
    names = [re.sub(r"\.(jsonl|json|csv|parquet)(\.gz)?$", "", Path(name).name) for name in config.dataset_names]
    return re.sub(r"[^\w.-]+", "_", "_".join(names)) or "builtin_tasks"


def grade_item(example: Example, answers: list[str], tokenizer, same: dict[str, Same]) -> dict[str, Graded]:
    """The answers after an item's traces, and the last one, after none, by every metric.

    Right is what says the same as the reference, as it is written or as its ids read, or as one of its aliases.
    """
    reference = tokenizer.decode(example.answer_ids, skip_special_tokens=True)
    targets = list(dict.fromkeys([example.answer, reference, *example.aliases]))
    graded = {}
    for metric, says_the_same in same.items():
        whole = grade(answers, targets, says_the_same)
        graded[metric] = Graded(Grade(whole.right[:-1], whole.votes[:-1]), whole.right[-1])
    return graded


def sample_row(
    number: int, example: Example, index: int, thoughts: Thoughts, answers: list[str], grades: dict[str, Graded],
    heldout: HeldoutItems, engine: Engine,
) -> dict[str, Any]:  # fmt: skip
    """An item's line: lm-eval's fields of a sample, then what only this evaluation has."""
    tokenizer, config = heldout.source.tokenizer, heldout.config
    doc = {"question": example.question, "answer": example.answer, "aliases": list(example.aliases)}
    prompt, raw = tokenizer.decode(example.prompt_ids), [tokenizer.decode(ids) for ids in thoughts.answers[index]]
    verdicts = {LM_EVAL_NAMES[metric]: graded for metric, graded in grades.items()}
    item = item_fields(example, thoughts.scores.baseline_logprobs[index], tokenizer)
    traces = trace_fields(thoughts, index, tokenizer, config, engine.eos_ids)
    for row, answer_ids, answer, place in zip(traces, thoughts.answers[index], answers, range(len(traces))):
        row |= {"answer_ids": answer_ids, "answer": answer}
        row |= {name: graded.after_traces.right[place] for name, graded in verdicts.items()}
    return {
        "doc_id": number,
        "doc": doc,
        "target": example.answer,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": generation(config)}},
        "resps": [raw[:-1]],
        "filtered_resps": [answers[:-1]],
        "filter": "none",
        "metrics": list(verdicts),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(example.answer),
        **{name: _share(graded.after_traces.right) for name, graded in verdicts.items()},
        **{name: value for name, value in item.items() if name not in doc},
        "no_trace": {
            "answer_ids": thoughts.answers[index][-1],
            "answer": answers[-1],
            **{name: graded.no_trace for name, graded in verdicts.items()},
        },
        "traces": traces,
    }


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def generation(config: EvalConfig) -> dict[str, Any]:
    """How traces and answers were made."""
    return {
        "temperature": config.temperature,
        "max_trace_length": config.max_trace_length,
        "max_gen_toks": config.max_answer_length,
    }


def describe(heldout: HeldoutItems, engine: Engine, started: float) -> dict[str, Any]:
    """What results.json tells of the run: model, settings, time and versions."""
    config, source = heldout.config, heldout.source
    name = config.model_name_or_path or "nrt-fast starter"
    installed = ["torch", "transformers", *(["math-verify"] if "math" in config.metric_names else [])]
    return {
        "config": {
            "model": "nrt-fast",
            "model_args": {"pretrained": name},
            "delimiter": source.delimiter.text,
            "delimiter_id": source.delimiter.id,
            "model_num_parameters": engine.model.weights.flat.numel(),
            "model_dtype": source.dtype_name,
            "batch_size": None,
            "device": str(source.device),
            "limit": config.num_prompts,
            "bootstrap_iters": 0,
            "gen_kwargs": generation(config),
            "random_seed": config.seed,
            "nrt_fast": asdict(config),
        },
        "date": started,
        "nrt_fast_version": nrt_fast.__version__,
        "python_version": platform.python_version(),
        **{f"{package.replace('-', '_')}_version": version(package) for package in installed},
        "model_source": "nrt-fast",
        "model_name": name,
        "model_name_sanitized": re.sub(r"[^\w.-]+", "__", name),
        "chat_template": source.tokenizer.chat_template,
        "total_evaluation_time_seconds": str(time.time() - started),
    }
