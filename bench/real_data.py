"""Does thinking pay on real, open-ended data? nrt-ws and sft from one base, which is made here from the same text.

    python bench/real_data.py FOLDER    its .jsonl.gz rows: id, source, kind, question, answer, maybe solution

Base, runs and measurements stay in build/real and are not made again; a run that was stopped goes on. Writes the
tables and the picture of docs/results.md. About an hour on two cores.
"""

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import real_base
import torch
from lab_runs import ROOT, code_digest, digest, one_thread
from objectives import put_between
from real_report import draw, report

from nrt_fast.config import EvalConfig, TrainConfig
from nrt_fast.heldout import HeldoutItems, open_heldout, think_in_parts
from nrt_fast.loop import train
from nrt_fast.metrics import mean, replace_file
from nrt_fast.starter import recipe

REAL, PAGE = ROOT / "build/real", ROOT / "docs/results.md"
BASE_STEPS, BASE_SEED = 900, 0
SEEDS = [1]
STEPS = {"nrt-ws": 700, "sft": 3500}
"""sft goes on to where it overfits. The rate is constant: sft after as many prompts as nrt-ws is a point on its way."""
SAVE_STEPS = {"nrt-ws": 100, "sft": 700}
LENGTHS = {"max_prompt_length": 64, "max_trace_length": 32, "max_answer_length": 64}
SETTINGS = {"prompts_per_step": 8, "num_generations": 8, "learning_rate": 1e-4, "warmup_steps": 10}
NUM_HELDOUT, NUM_TRACES = 512, 4
NUM_SAMPLES, QUOTED_LENGTH = 4, 120  # characters
QUOTED = ("dolly", "medquad")
"""Sources whose licences (CC BY-SA 3.0, CC BY 4.0) let a page quote them by name."""


@dataclass(frozen=True)
class Job:
    """One run."""

    objective: str
    seed: int

    def config(self, base: Path, data: Path, folder: Path) -> TrainConfig:
        """The product's own configuration of it."""
        lengths = {name: length for name, length in LENGTHS.items() if self.objective != "sft" or "trace" not in name}
        return TrainConfig(
            model_name_or_path=str(base),
            dataset_name=str(data / "run.jsonl"),
            eval_dataset_name=str(data / "heldout.jsonl"),
            num_eval_prompts=8,  # the run's own measurement goes to its log; ours is `measure`
            objective=self.objective,
            seed=self.seed,
            max_steps=STEPS[self.objective],
            save_steps=SAVE_STEPS[self.objective],
            save_total_limit=STEPS[self.objective] // SAVE_STEPS[self.objective],
            eval_steps=0,
            logging_steps=SAVE_STEPS[self.objective],
            output_dir=str(folder),
            device="cpu",
            **(SETTINGS | lengths),
        )


def make_base(source: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    """Folders of the base model and of the rows to train on and to hold out; made if they are not there yet."""
    texts = sorted(source.glob("*.jsonl.gz"))
    code = [Path(module.__file__) for module in (real_base, recipe)]
    folder = REAL / f"base-{digest(*texts, *code, BASE_STEPS, BASE_SEED, version('torch'))}"
    model, data = folder / "model", folder / "data"
    if not model.exists():
        parts, unfinished = real_base.split(source), folder / "unfinished"
        data.mkdir(parents=True, exist_ok=True)
        for part in ("run", "heldout"):
            real_base.write_rows(parts[part], data / f"{part}.jsonl")
        unfinished.mkdir(exist_ok=True)
        start = time.perf_counter()
        real_base.build(parts["base"], unfinished, BASE_STEPS, BASE_SEED, say)
        unfinished.rename(model)
        say(f"base made in {time.perf_counter() - start:.0f} s")
    return model, data


def open_items(model: Path, data: Path) -> HeldoutItems:
    """A model and the held-out items, the same for every model."""
    config = EvalConfig(
        model_name_or_path=str(model), dataset_name=str(data / "heldout.jsonl"), num_prompts=NUM_HELDOUT,
        num_generations=NUM_TRACES, device="cpu", **LENGTHS,
    )  # fmt: skip
    return open_heldout(config, lambda line: None)


def score_outlines(model: Path, data: Path, rows: list[real_base.Row]) -> dict[str, list[list[float]]]:
    """log_b and log_c [items][tokens] of held-out answers behind outlines of themselves, which no model can know."""
    heldout = open_items(model, data)
    examples, tokenizer = list(heldout.examples), heldout.source.tokenizer
    author = real_base.writer(rows, seed=1, slip_rate=0.0)
    texts = ["plan: " + ", ".join(author.outline(example.answer)) for example in examples]
    traces = [[ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    prompts, answers = [e.prompt_ids for e in examples], [e.answer_ids for e in examples]
    scores = heldout.engine().score(prompts, traces, answers)
    log_b, log_c = scores.baseline_logprobs, [group[0] for group in scores.logprobs]
    return {"log_b": [row.tolist() for row in log_b], "log_c": [row.tolist() for row in log_c]}


def measure(model: Path, data: Path) -> dict:
    """Held-out figures of a model, sampled traces and the empty one alike, whatever it was trained for.

    Returns:
        source [items]; log_b and log_c [items][tokens], the latter mean over the traces; log_marginal [items], the
        answer's log-probability as the mean of its probabilities over the traces; means over traces; samples.
    """
    heldout = open_items(model, data)
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    items, lengths, ends, sampled, samples = [], [], [], [], []
    for part, thoughts in think_in_parts(heldout.engine(), heldout.examples, heldout.config):
        scores, traces = thoughts.scores, thoughts.traces
        for index, example in enumerate(part):
            log_c_GA, source = torch.stack(scores.logprobs[index]), rows[example.uid]["source"]
            log_b, log_c = scores.baseline_logprobs[index].tolist(), log_c_GA.mean(0).tolist()
            marginal = log_c_GA.sum(1).logsumexp(0).item() - math.log(NUM_TRACES)
            items.append({"source": source, "log_b": log_b, "log_c": log_c, "log_marginal": marginal})
            if source in QUOTED and len(samples) < NUM_SAMPLES and len(example.answer) <= QUOTED_LENGTH:
                trace = heldout.source.tokenizer.decode(traces.trace_ids[index][0])
                first = {"trace": trace, "log_b": mean(log_b), "log_c": log_c_GA[0].mean().item()}
                samples.append({"source": source, "question": example.question, "answer": example.answer} | first)
        lengths += [len(ids) for group in traces.trace_ids for ids in group]
        ends += [end for group in traces.delimiter_logprobs for end in group]
        sampled += [logprob for group in traces.logprobs for row in group for logprob in row]
    return {
        **{name: [item[name] for item in items] for name in items[0]},
        "trace_length": mean(lengths),
        "entropy": -mean([*sampled, *(end for end in ends if end is not None)]),
        "delimiter_rate": mean([end is not None for end in ends]),
        "samples": samples,
    }


def execute(job: Job, base: Path, data: Path, target: Path) -> dict:
    """Train, measure every checkpoint, and leave the JSON beside the run's folder."""
    folder, every = target.with_suffix(""), SAVE_STEPS[job.objective]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log):
        summary = train(job.config(base, data, folder))
    if "after" not in summary:
        raise KeyboardInterrupt(f"{target.stem} was stopped at step {summary['steps']}")
    steps = range(every, summary["steps"] + 1, every)
    record = {
        "objective": job.objective,
        "seed": job.seed,
        "seconds": summary["train_seconds"],
        "prompts": [SETTINGS["prompts_per_step"] * step for step in steps],
        "points": [measure(folder / f"checkpoint-{step}", data) for step in steps],
        "alarms": summary["health"],
    }
    replace_file(target, json.dumps(record) + "\n")
    return record


def result_file(job: Job, base: Path, data: Path) -> Path:
    """Where a run's JSON is, or will be: its name holds a hash of all that decides it."""
    chosen = job.config(Path("base"), Path("data"), Path("run")).given
    files = [base / "model.safetensors", *sorted(data.iterdir())]
    return (
        REAL
        / "runs"
        / f"{job.objective}-{job.seed}-{digest(chosen, NUM_HELDOUT, NUM_TRACES, code_digest(), *files)}.json"
    )


def run_all(todo: list[Job], base: Path, data: Path, num_workers: int, say: Callable[[str], None]) -> list[dict]:
    """The records of all jobs, in order; those that have no file yet are run, ``num_workers`` at a time."""
    files = {job: result_file(job, base, data) for job in todo}
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), one_thread)
    try:
        missing = [job for job in todo if not files[job].exists()]
        futures = {pool.submit(execute, job, base, data, files[job]): job for job in missing}
        for future in as_completed(futures):
            say(f"{futures[future]}: {future.result()['seconds']:.0f} s of training")
    finally:
        pool.shutdown(cancel_futures=True)
    return [json.loads(files[job].read_text()) for job in todo]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the .jsonl.gz files")
    parser.add_argument("--num_workers", type=int, default=min(2, os.cpu_count()), help="runs side by side")
    arguments = parser.parse_args()
    say = partial(print, flush=True)
    one_thread()
    base, data = make_base(arguments.folder, say)
    before, outlined = measure(base, data), score_outlines(base, data, real_base.split(arguments.folder)["base"])
    jobs = [Job(objective, seed) for seed in SEEDS for objective in STEPS]
    records = run_all(jobs, base, data, arguments.num_workers, say)
    draw(before, records, PAGE.with_suffix(".svg"))
    replace_file(PAGE, put_between(PAGE.read_text(encoding="utf-8"), report(before, outlined, records)))


if __name__ == "__main__":
    main()
