"""The loop: data, rollout, score, reward, pack, train_step, checkpoint."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nrt_fast
from nrt_fast import checkpoint, distributed
from nrt_fast.completions import read_completions, write_completions
from nrt_fast.config import TrainConfig
from nrt_fast.diagnostics import count_tokens, engine_metrics, over_minibatches, rollout_metrics, train_metrics
from nrt_fast.engine import Thoughts, noise_floor
from nrt_fast.evaluate import samples, summarise
from nrt_fast.health import Health
from nrt_fast.hub import upload
from nrt_fast.metrics import MetricsFile, Timer, replace_file
from nrt_fast.model_card import NAME, model_card
from nrt_fast.optim import learning_rate
from nrt_fast.pack import loss_tokens, pack
from nrt_fast.plan import GIB
from nrt_fast.report import Report
from nrt_fast.resolve import NUM_PROGRESS
from nrt_fast.rewards import Rewards, reward
from nrt_fast.run import Run, prepare
from nrt_fast.shares import deal, gather_rows, gather_thoughts, own_share
from nrt_fast.signals import stop_requested
from nrt_fast.train_step import train_step
from nrt_fast.types import Example, Sample, Scores, Traces, UserError

NOISE_PROMPTS = 8
NUM_SAMPLES = 8


@dataclass
class Progress:
    """What changes from step to step, and goes into a checkpoint's state.

    Attributes:
        step: rollouts learnt from so far.
        num_tokens: trained so far.
        train_seconds: wall time of all steps, their evaluations included.
        seconds, tokens: by phase, over the whole run.
        before: held-out means at the start.
        samples: a few held-out traces at the start.
        heldout_sha256: hash of the held-out items that both are of.
    """

    step: int = 0
    num_tokens: int = 0
    train_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    heldout_sha256: str = ""

    def count(self, seconds: dict[str, float], tokens: dict[str, int]) -> None:
        """Add one step's figures."""
        for total, new in ((self.seconds, seconds), (self.tokens, tokens)):
            for phase, value in new.items():
                total[phase] = total.get(phase, 0) + value


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as configured; returns what summary.json holds, of a run that stopped ``steps`` and ``stopped_on``: the
    alarms that stopped it.

    A run that was stopped goes on from its newest complete checkpoint, and then equals one that never stopped.
    Processes that have ``distributed.joined`` make one run together; the first of them writes and reports.

    Raises:
        UserError: bad input, told in one line; what was written before is valid.
    """
    run = prepare(config, say=distributed.say)
    output_dir, num_steps = run.output_dir, run.config.max_steps
    resumed = distributed.on_first(checkpoint.to_resume, output_dir, run.config.resume_from_checkpoint)
    distributed.on_first(checkpoint.claim_folder, output_dir, run.identity)
    state = None if resumed is None else run.restore(resumed)
    progress = Progress() if state is None else Progress(**state["progress"])
    if progress.step >= num_steps and (summary := distributed.on_first(_summary_of, output_dir, progress.step)):
        distributed.say(f"{output_dir} is finished ({progress.step} steps); see {output_dir / 'summary.json'}")
        distributed.at_end(_share, run.config)
        return summary
    with checkpoint.told_when_full(output_dir / "metrics.jsonl"):
        metrics = MetricsFile(output_dir / "metrics.jsonl", progress.step, distributed.is_first())
    health = Health(run.config.dtype, metrics.rows)
    with Report(run.config, metrics.last_seen) as report, stop_requested() as stop:
        report.start(run, progress.step)
        if state is not None and (told := _schedule_change(run.config, state["config"]["max_steps"], progress.step)):
            report.say(told)
        if progress.step == 0:
            report.say(f"measuring {len(run.data.heldout):,} held-out items before training")
            _measure_before(run, progress)
            run.noise = _measure_noise(run)
        elif _has_other_heldout(run, progress):
            told = f"{len(run.data.heldout):,} of now under the weights of step {progress.step:,}"
            report.say(f"the held-out items are not those of {resumed}: measuring the {told}, as those before training")
            _measure_before(run, progress)
        stopping, stopped_on = False, []
        while progress.step < num_steps and not stopping:
            progress.step += 1
            row = _told_with_step(run, progress)
            progress.train_seconds += row["step_time"]
            changes = health.step(row)
            with checkpoint.told_when_full(output_dir / "metrics.jsonl"):
                metrics.write(row)
            report.step(row, partial(read_completions, output_dir, progress.step))
            for change in changes:
                report.say(str(change))
            stopped_on = [change.name for change in changes if change.raised and change.name in run.config.stop_alarms]
            stopping = distributed.any_of(stop or stopped_on)  # read once: what stops here is saved here
            if stopping or progress.step % run.config.save_steps == 0 or progress.step == num_steps:
                with checkpoint.told_when_full(output_dir / "metrics.jsonl"):
                    metrics.sync()
                _save(run, progress)
        if progress.step < num_steps:
            report.stopped(progress.step, stopped_on)
            return {"steps": progress.step, "stopped_on": stopped_on}
        report.say("measuring them again")
        means, after = evaluate(run, num_samples=NUM_SAMPLES)
        summary = distributed.on_first(_finish, run, progress, means, after, health)
        report.finish(summary, [Sample(**sample) for sample in progress.samples], after)
    distributed.at_end(_share, run.config)
    return summary


def dry_run(config: TrainConfig) -> None:
    """Do everything up to one whole step, in memory; write nothing."""
    run = prepare(replace(config, report_to="none", eval_steps=0), say=distributed.say)
    with Report(run.config) as report:
        report.start(run)
        report.step(step(run, Progress(step=1)))


def _told_with_step(run: Run, progress: Progress) -> dict[str, float]:
    try:
        return step(run, progress)
    except distributed.RankError:
        raise
    except UserError as error:
        raise UserError(f"step {progress.step}: {error}") from error


def step(run: Run, progress: Progress) -> dict[str, float]:
    """One rollout and what is learnt from it; returns the step's metrics."""
    config, timer = run.config, Timer()
    started = time.perf_counter()
    examples, before = run.take(), asdict(run.engine.counters)
    thoughts = think(run, examples, config.num_generations, config.temperature, progress.step, timer)
    traces, scores = thoughts.traces, thoughts.scores
    with timer("score"):
        against = _with_baseline(run, examples, scores)
        rewards = reward(against, traces, run.objective, run.noise, [example.where for example in examples])
    row = {}
    if config.num_generations:
        # With b under the weights of now: beside older ones, what was memorised would count as gained by thinking.
        row = rollout_metrics(examples, traces, scores, rewards, run.objective)
        counted = {name: total - before[name] for name, total in asdict(run.engine.counters).items()}
        row |= engine_metrics(distributed.total(counted, "the engine's counts"))
    with timer("train"):
        lr = _learning_rate(config, progress.step, config.max_steps)
        row |= learn(run, examples, traces, scores, rewards, lr)
    seconds, tokens = timer.take(), count_tokens(examples, traces, config.num_generations)
    progress.count(seconds, tokens)
    progress.num_tokens += tokens["train"]
    if config.eval_steps and progress.step % config.eval_steps == 0:
        held_out, _ = evaluate(run, NUM_PROGRESS)
        row |= {f"eval/{name}": value for name, value in held_out.items()}
        sampled = examples, traces, scores, rewards
        distributed.on_first(write_completions, run.output_dir, progress.step, *sampled, run.tokenizer)
    return {
        "step": progress.step,
        "epoch": run.order.epoch,
        "learning_rate": lr,
        "num_tokens": progress.num_tokens,
        **row,
        **distributed.take_measured(),
        "step_time": time.perf_counter() - started,
        **{f"perf/{phase}_s": value for phase, value in seconds.items()},
        "perf/tokens_per_second": tokens["train"] / sum(seconds.values()),
    }


def _learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    return learning_rate(step, num_steps, config.learning_rate, config.lr_scheduler_type, config.warmup_steps)


def _schedule_change(config: TrainConfig, before: int, step: int) -> str | None:
    """What to say of a run of ``before`` steps that goes on after ``step`` with another length."""
    for later in range(step + 1, min(before + 1, config.max_steps) + 1):
        old, new = (_learning_rate(config, later, num_steps) for num_steps in (before, config.max_steps))
        if old != new:
            told = f"max_steps was {before:,} and is {config.max_steps:,}, which the schedule follows"
            return f"{told}: the learning rate of step {later:,} is {new:g} instead of {old:g}"
    return None


def think(
    run: Run, examples: list[Example], num_generations: int, temperature: float, step: int, timer: Timer,
    answer_greedily: bool = False,
) -> Thoughts:  # fmt: skip
    """Rollout and scoring of some examples. Without generations (sft) the empty trace stands as the only one."""
    dealt = deal(examples, run.engine)
    mine = own_share(examples, dealt)
    thoughts = run.engine.think(
        [example.prompt_ids for example in mine],
        [example.answer_ids for example in mine],
        [example.uid for example in mine],
        num_generations=num_generations,
        max_trace_length=run.config.max_trace_length,
        temperature=temperature,
        seed=run.config.seed,
        step=step,
        answer_greedily=answer_greedily,
        max_answer_length=max(len(example.answer_ids) for example in examples),
        timed=timer,
    )
    with timer("score"):
        thoughts = gather_thoughts(thoughts, examples, dealt, num_generations, run.engine)
    if num_generations:
        return thoughts
    empty = Traces([[[]]] * len(examples), [[[]]] * len(examples), [[None]] * len(examples))
    log_b = thoughts.scores.baseline_logprobs
    return replace(thoughts, traces=empty, scores=Scores([[row] for row in log_b], log_b))


def learn(
    run: Run, examples: list[Example], traces: Traces, scores: Scores, rewards: Rewards, lr: float
) -> dict[str, float]:
    """The optimiser steps of one rollout, one for each minibatch; returns their metrics as one row."""
    config, size = run.config, run.config.prompts_per_minibatch
    run.optimizer.zero_grad()  # their memory was that of keys and values
    on_policy, rows = size >= len(examples), []
    for start in range(0, len(examples), size):
        part = slice(start, start + size)
        tokens = loss_tokens(
            examples[part],
            Traces(traces.trace_ids[part], traces.logprobs[part], traces.delimiter_logprobs[part]),
            scores.logprobs[part],
            rewards.advantage[part],
            rewards.signal[part],
            rewards.answer_weights[part],
            run.objective,
            run.delimiter.id,
            config.temperature,
            config.max_trace_length + config.max_answer_length,
        )
        batches = pack(tokens, config.max_tokens_per_batch, run.model.embed.device)
        stats = train_step(
            run.model, run.optimizer, tokens, batches, run.objective, lr, config.max_grad_norm,
            on_policy, reference=run.frozen if run.objective.beta else None, recompute=config.recompute,
        )  # fmt: skip
        if run.ema is not None:
            run.ema.update(run.model.trained.flat)
        rows.append(train_metrics(tokens, stats, run.objective, on_policy))
    return over_minibatches(rows)


def evaluate(run: Run, num_items: int | None = None, num_samples: int = 0) -> tuple[dict[str, float], list[Sample]]:
    """Held-out means (those of HeldOut) and the first items as samples; nothing where no item is held out.

    One trace for each item, sampled at temperature 1 with the same noise every time.
    """
    examples = list(islice(run.data.heldout, num_items))
    if not examples:
        return {}, []
    num_generations = min(1, run.config.num_generations)
    thoughts = think(run, examples, num_generations, 1.0, 0, Timer(), answer_greedily=True)
    measured = examples, thoughts.traces, thoughts.scores, thoughts.answers
    return asdict(summarise(*measured)), samples(*measured, run.tokenizer, num_samples)


def _with_baseline(run: Run, examples: list[Example], scores: Scores) -> Scores:
    """The scores with b under the weights that the reward is measured against."""
    if run.objective.baseline == "ema":
        return replace(scores, baseline_logprobs=_baseline(run, run.ema.model, examples))
    if run.objective.baseline != "frozen":
        return scores
    new = [example for example in examples if example.uid not in run.frozen_logprobs]
    if new:
        run.frozen_logprobs |= zip((e.uid for e in new), _baseline(run, run.frozen, new), strict=True)
    return replace(scores, baseline_logprobs=[run.frozen_logprobs[example.uid] for example in examples])


def _baseline(run: Run, model, examples: list[Example]) -> list[Tensor]:
    dealt = deal(examples, run.engine)
    mine = own_share(examples, dealt)
    prompts, answers = [e.prompt_ids for e in mine], [e.answer_ids for e in mine]
    log_b = run.engine.on(model).score(prompts, [[] for _ in prompts], answers).baseline_logprobs
    return gather_rows(log_b, dealt)


def _measure_before(run: Run, progress: Progress) -> None:
    progress.before, measured = evaluate(run, num_samples=NUM_SAMPLES)
    progress.samples = [asdict(sample) for sample in measured]
    progress.heldout_sha256 = run.data.heldout.sha256()


def _has_other_heldout(run: Run, progress: Progress) -> bool:
    """Whether what was measured before training is of other items than those that the run will end with."""
    if not progress.heldout_sha256:  # checkpoints of older versions know how many there were
        return progress.before.get("num_items", 0) != len(run.data.heldout)
    return progress.heldout_sha256 != run.data.heldout.sha256()


def _measure_noise(run: Run) -> float:
    """Noise of the run's own reward, from held-out items where there are any."""
    pool = run.data.heldout or run.data.train
    examples = list(islice(pool, NOISE_PROMPTS))
    prompts, answers = [e.prompt_ids for e in examples], [e.answer_ids for e in examples]
    kind, scale = run.objective.reward, run.objective.reward_scale
    return distributed.on_first(noise_floor, run.engine, prompts, answers, kind, scale)


def _save(run: Run, progress: Progress) -> None:
    state = {
        "progress": asdict(progress),
        "order": run.order.state_dict(),
        "noise": run.noise,
        "config": asdict(run.config),
        "given": run.given,
    }
    tensors, own = run.state_tensors(), run.optimizer.state()
    checkpoint.save(run.output_dir, progress.step, run.save_model, tensors, own, state, run.config.save_total_limit)


def _summary_of(output_dir: Path, step: int) -> dict[str, Any] | None:
    """What summary.json holds if the run has ended at this step."""
    path = output_dir / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"steps": None}
    return summary if summary["steps"] == step else None


def _finish(
    run: Run, progress: Progress, after: dict[str, float], samples_after: list[Sample], health: Health
) -> dict[str, Any]:  # fmt: skip
    """Write final/, samples.json and, last, summary.json."""
    summary = {
        "before": progress.before,
        "after": after,
        "steps": progress.step,
        "train_seconds": progress.train_seconds,
        "tokens_per_second": {
            phase: tokens / progress.seconds[phase]
            for phase, tokens in progress.tokens.items()
            if progress.seconds.get(phase)
        },
        "peak_memory_gib": _peak_memory_bytes(run.model.embed.device) / GIB,
        "noise": run.noise,
        "health": health.raised,
        "versions": {
            "nrt_fast": nrt_fast.__version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "config": asdict(run.config),
        "given": run.given,
    }
    with checkpoint.atomic_folder(run.output_dir / "final") as folder:
        run.save_model(folder)
        (folder / NAME).write_text(model_card(summary, run.delimiter.text), encoding="utf-8")
    with checkpoint.told_when_full(run.output_dir / "samples.json"):
        both = {"before": progress.samples, "after": [asdict(sample) for sample in samples_after]}
        replace_file(run.output_dir / "samples.json", json.dumps(both, ensure_ascii=False) + "\n")
    with checkpoint.told_when_full(run.output_dir / "summary.json"):
        replace_file(run.output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _share(config: TrainConfig) -> None:
    """Upload final/ where that is asked for."""
    if config.push_to_hub:
        print(f"uploaded to {upload(Path(config.output_dir) / 'final', config)}")


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has had: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
