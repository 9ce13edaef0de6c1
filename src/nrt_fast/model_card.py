"""A model's README.md: what was trained how, what it measured, and how it wants to be asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nrt_fast.config import TrainConfig
from nrt_fast.report import figure
from nrt_fast.resolve import resolve_output_dir

NAME = "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SHOWN = (
    "prompts_per_step", "num_generations", "temperature", "max_prompt_length", "max_trace_length", "max_answer_length",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "lora_r", "lora_alpha", "dtype", "seed",
)  # fmt: skip
CITATION = """\
@inproceedings{wang2026native,
  title     = {Native Reasoning Models: Training Language Models to Reason on Unverifiable Data},
  author    = {Wang, Yuanfu and Liu, Zhixuan and Li, Xiangtian and Lu, Chaochao and Yang, Chao},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  note      = {arXiv:2602.11549}
}"""


def model_card(summary: dict[str, Any], delimiter: str) -> str:
    """The card of a finished run. It tells no time and no path, so that equal runs have equal folders.

    Args:
        summary: what summary.json holds.
        delimiter: text of the token that ends a trace.
    """
    from huggingface_hub import ModelCardData

    config = TrainConfig(**summary["config"])
    base, data = config.model_name_or_path, config.dataset_names
    metadata = ModelCardData(
        base_model=base if base and _on_hub(base) else None,
        datasets=[name for name in data if _on_hub(name)] or None,
        library_name="peft" if config.use_peft else "transformers",
        pipeline_tag="text-generation",
        tags=["nrt-fast", "native-reasoning-training", config.objective, "generated_from_trainer"],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(_body(config, summary, delimiter)) + "\n"


def _body(config: TrainConfig, summary: dict[str, Any], delimiter: str) -> Iterator[str]:
    base = _shown(config.model_name_or_path, "models") if config.model_name_or_path else "The starter model of nrt-fast"
    data = ", ".join(_shown(name, "datasets") for name in config.dataset_names) or "its built-in tasks"
    yield f"# {Path(resolve_output_dir(replace(config, output_dir=None))).name}\n"
    adapter = "with a LoRA adapter " if config.use_peft else ""
    yield f"{base}, {adapter}trained for {summary['steps']:,} steps on {data}.\n"
    yield _method(config.objective)
    yield "\n## How to ask it\n"
    yield (
        f"The question goes through the chat template. The model then thinks, ends its thoughts with `{delimiter}` and "
        'answers:\n\n```\nnrt-fast generate "your question" --model_name_or_path FOLDER_OR_ID\n```'
    )
    if summary["after"]:
        yield from _measured(summary["before"], summary["after"])
    yield "\n## Training\n"
    fields = {"objective": config.objective} | asdict(config.resolved_objective())
    fields |= {name: value for name in SHOWN if (value := getattr(config, name)) is not None}
    yield from _table(["", ""], [[name, str(value)] for name, value in fields.items()])
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    yield f"\nVersions: {versions}.\n\n## Citation\n\n```bibtex\n{CITATION}\n```"


def _method(objective: str) -> str:
    if objective == "sft":
        return "It was trained on the reference answers alone, each after an empty trace (`sft`)."
    return (
        "It was trained by reinforcement of its own reasoning on questions with reference answers (preset "
        f"`{objective}`): a sampled trace earned reward by how much it raised the model's own likelihood of the "
        "reference answer. No verifier looked at an answer. The method is "
        "[Native Reasoning Training](https://arxiv.org/abs/2602.11549)."
    )


def _measured(before: dict[str, float], after: dict[str, float]) -> Iterator[str]:
    yield f"\n## {after['num_items']:,} held-out items\n"
    yield "One trace sampled for each item at temperature 1, answers greedy, gains in nats a token; ± standard error.\n"
    names = [name for name in after if name != "num_items" and not name.endswith("_error")]
    rows = [[name.replace("_", " "), figure(before, name), figure(after, name)] for name in names]
    yield from _table(["", "before", "after"], rows)


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _on_hub(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _shown(name: str, kind: str) -> str:
    """A link to the hub, or the last part of a path."""
    if not _on_hub(name):
        return f"`{Path(name).name}`"
    return f"[{name}](https://huggingface.co/{'' if kind == 'models' else 'datasets/'}{name})"
