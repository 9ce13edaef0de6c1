"""The lab's runs: one preset on one kind with one seed, through nrt_fast.loop.train; each leaves one JSON file.

A file's name holds a hash of all that decides the result (configuration, base model, data, code, torch), so a run that
is there is never made again, and one that something has changed for is.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lab_tasks

from nrt_fast.config import PRESETS, TrainConfig
from nrt_fast.metrics import read_metrics, replace_file

ROOT = Path(__file__).parent.parent
LAB = ROOT / "build/lab"
BASE_STEPS, BASE_SEED, BASE_WIDTH = 1000, 0, 96
NUM_TRAIN = 1000
SEEDS = [1, 2, 3, 4, 5]


@dataclass(frozen=True)
class Budget:
    """What every run of a lab gets, whatever its preset."""

    max_steps: int = 60
    prompts_per_step: int = 12
    num_generations: int = 8
    learning_rate: float = 5e-4
    warmup_steps: int = 5
    max_trace_length: int = 28
    num_eval_prompts: int = 512
    eval_steps: int = 10


FULL = Budget()
QUICK = replace(FULL, max_steps=40)


@dataclass(frozen=True)
class Job:
    """One run."""

    kind: str
    preset: str
    seed: int
    budget: Budget
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The preset, and the fields that are set on top of it."""
        return " ".join([self.preset, *(f"{field}={value}" for field, value in self.options)])

    def config(self, base: Path, data: Path, output_dir: Path) -> TrainConfig:
        """The product's own configuration of it."""
        budget = asdict(self.budget)
        if self.preset == "sft":
            del budget["max_trace_length"]  # it would have no effect, and is refused
        return TrainConfig(
            model_name_or_path=str(base),
            dataset_name=str(data / f"{self.kind}-train.jsonl"),
            eval_dataset_name=str(data / f"{self.kind}-heldout.jsonl"),
            objective=self.preset,
            seed=self.seed,
            output_dir=str(output_dir),
            max_prompt_length=32,
            max_answer_length=24,
            save_steps=self.budget.max_steps,
            logging_steps=self.budget.max_steps,
            resume_from_checkpoint="false",
            device="cpu",
            **budget | dict(self.options),
        )


def jobs(presets: Iterable[str], seeds: Iterable[int], budget: Budget) -> list[Job]:
    """Every preset on every kind, seed after seed, so that a lab cut short has seen everything once."""
    return [Job(kind, preset, seed, budget) for seed in seeds for kind in lab_tasks.KINDS for preset in presets]


def digest(*parts: object) -> str:
    """Twelve hexadecimal digits of a hash of files' contents and of what json can tell."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.read_bytes() if isinstance(part, Path) else json.dumps(part, sort_keys=True).encode())
    return sha.hexdigest()[:12]


def code_digest() -> str:
    """Hash of the package that trains, C++ included, and of the versions under it."""
    sources = [
        path for folder, end in (("src/nrt_fast", "*.py"), ("csrc", "*.*")) for path in (ROOT / folder).rglob(end)
    ]
    return digest(*sorted(sources), Path(__file__), version("torch"), version("transformers"))


def write_data(folder: Path) -> None:
    """Training and held-out rows of every kind; their questions are disjoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, families in lab_tasks.KINDS.items():
        for split, num_rows in (("train", NUM_TRAIN), ("heldout", FULL.num_eval_prompts)):
            rows = lab_tasks.tasks.rows(split, num_rows, 0, families)
            replace_file(folder / f"{kind}-{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def make_base(say: Callable[[str], None]) -> Path:
    """Folder of the base model, which is made if it is not there yet."""
    from nrt_fast.starter import recipe

    sources = [Path(module.__file__) for module in (lab_tasks, recipe, lab_tasks.tasks)]
    folder = LAB / f"base-{digest(*sources, BASE_STEPS, BASE_SEED, BASE_WIDTH, version('torch'))}"
    if not folder.exists():
        say(f"making the base model, {BASE_STEPS} steps")
        start, partial = time.perf_counter(), folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        one_thread()
        recipe.build(partial, BASE_STEPS, BASE_SEED, BASE_WIDTH, lab_tasks.FAMILIES, lab_tasks.think)
        partial.rename(folder)
        say(f"made in {time.perf_counter() - start:.0f} s")
    return folder


def result_file(job: Job, base: Path, data: Path, code: str) -> Path:
    """Where a run's JSON is, or will be."""
    files = [base / "model.safetensors", base / "tokenizer.json", *sorted(data.glob(f"{job.kind}-*.jsonl"))]
    chosen = asdict(job.config(Path("base"), Path("data"), Path("run")))
    return LAB / "runs" / f"{job.kind}-{job.preset}-{job.seed}-{digest(chosen, *files, code)}.json"


def execute(job: Job, base: Path, data: Path, target: Path) -> dict:
    """Train, measure, and leave the JSON; what the run itself writes is thrown away but for its log."""
    from nrt_fast.loop import train

    folder, start = target.with_suffix(""), time.process_time()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = job.config(base, data, folder)
    with target.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        summary = train(config)
        if "after" not in summary:
            raise KeyboardInterrupt(f"{target.stem} was stopped at step {summary['steps']}")
        with_trace = (
            summary["after"]
            if job.preset != "sft"
            else measured_with_traces(replace(job, preset="nrt-ws").config(folder / "final", data, folder))
        )
    rows = read_metrics(folder / "metrics.jsonl")
    record = {
        "kind": job.kind,
        "preset": job.name,
        "seed": job.seed,
        "budget": asdict(job.budget),
        "before": summary["before"],
        "after": summary["after"],
        "with_trace": with_trace,
        "curve": curve(summary, rows),
        "steps": {name: [row[key] for row in rows if key in row] for name, key in STEP_FIGURES.items()},
        "alarms": summary["health"],
        "cpu_seconds": time.process_time() - start,
    }
    replace_file(target, json.dumps(record) + "\n")
    shutil.rmtree(folder)
    return record


STEP_FIGURES = {
    "trace_length": "completions/mean_length", "entropy": "entropy", "no_signal": "nrt/frac_no_signal",
    "reward": "reward", "logp_no_trace": "nrt/logp_no_trace", "repetition": "nrt/repetition",
}  # fmt: skip


def curve(summary: dict, rows: list[dict]) -> dict[str, list[float]]:
    """Held-out figures over the steps: before, every eval_steps, after."""
    names = ("accuracy", "gain", "hard_token_gain", "trace_length", "entropy")
    points = [{"step": 0} | {name: summary["before"][name] for name in names}]
    points += [
        {"step": row["step"]} | {name: row[f"eval/{name}"] for name in names}
        for row in rows
        if "eval/accuracy" in row and row["step"] < summary["steps"]
    ]
    points.append({"step": summary["steps"]} | {name: summary["after"][name] for name in names})
    return {name: [point[name] for point in points] for name in ("step", *names)}


def measured_with_traces(config: TrainConfig) -> dict[str, float]:
    """Held-out figures of a configuration's model as it is."""
    from nrt_fast.loop import evaluate
    from nrt_fast.run import prepare

    return evaluate(prepare(config))[0]


def one_thread() -> None:
    """Two runs side by side are faster than one on two threads, and one thread gives the same sums every time."""
    import torch

    torch.set_num_threads(1)


def one_line(record: dict) -> str:
    """A finished run for people."""
    before, after = record["before"], record["after"]
    return (
        f"{record['kind']} {record['preset']:<12} seed {record['seed']}  accuracy {before['accuracy']:.3f} -> "
        f"{after['accuracy']:.3f}  trace {after['trace_length']:4.1f}  {record['cpu_seconds']:.0f} s of a core"
    )


def run_all(todo: list[Job], base: Path, data: Path, num_workers: int, say: Callable[[str], None]) -> list[dict]:
    """The records of all jobs, in order; those that have no file yet are run, ``num_workers`` at a time."""
    code = code_digest()
    files = {job: result_file(job, base, data, code) for job in todo}
    missing = [job for job in todo if not files[job].exists()]
    if len(missing) < len(todo):
        say(f"{len(todo) - len(missing)} of {len(todo)} runs are there already")
    if missing:
        os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        pool = ProcessPoolExecutor(num_workers, get_context("spawn"), one_thread)
        try:
            futures = {pool.submit(execute, job, base, data, files[job]): job for job in missing}
            for number, future in enumerate(as_completed(futures), 1):
                say(f"{number:3d}/{len(missing)}  {one_line(future.result())}")
        finally:
            pool.shutdown(cancel_futures=True)  # a run that failed is told now, not after all the others
    return [json.loads(files[job].read_text()) for job in todo]


ALL_PRESETS = list(PRESETS)
