"""Sampled traces with what they earned, as Parquet: ``completions/completions_<step>.parquet``, TRL's columns first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nrt_fast.checkpoint import told_when_full
from nrt_fast.metrics import replacing
from nrt_fast.rewards import Rewards
from nrt_fast.types import Example, Scores, Traces


def write_completions(
    output_dir: Path, step: int, examples: list[Example], traces: Traces, scores: Scores, rewards: Rewards, tokenizer
) -> None:
    """One row per trace: step, prompt, completion, reward, advantage, answer, answer_logp, gain."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "step": step,
            "prompt": tokenizer.decode(example.prompt_ids),
            "completion": tokenizer.decode(ids),
            "reward": float(rewards.reward[p][g]),
            "advantage": float(rewards.advantage[p][g]),
            "answer": example.answer,
            "answer_logp": float(scores.logprobs[p][g].mean()),
            "gain": float((scores.logprobs[p][g] - scores.baseline_logprobs[p]).mean()),
        }
        for p, example in enumerate(examples)
        for g, ids in enumerate(traces.trace_ids[p])
    ]
    final = _path(output_dir, step)
    with told_when_full(final.parent), replacing(final) as path:
        final.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)


def read_completions(output_dir: Path, step: int) -> list[dict[str, Any]]:
    """The rows that were written of a step; none where its traces were not kept."""
    import pyarrow.parquet as pq

    path = _path(output_dir, step)
    return pq.read_table(path).to_pylist() if path.exists() else []


def _path(output_dir: Path, step: int) -> Path:
    return output_dir / "completions" / f"completions_{step:05d}.parquet"
