"""What a configuration leaves open, decided from the model, the machine and the data. Pure functions, no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from nrt_fast.config import TrainConfig, split_names
from nrt_fast.types import UserError


@dataclass(frozen=True)
class Scale:
    """Sizes of one kind of run.

    ``cuda`` is that of the published runs, ``cpu`` what two cores finish, ``starter`` the demo.
    """

    prompt: int
    trace: int
    answer: int
    prompts_per_step: int
    tokens_per_batch: int
    learning_rate: float
    warmup_steps: float
    max_steps: int | None
    heldout: int
    eval_steps: int
    save_steps: int


SCALES = {
    "cuda": Scale(4096, 2048, 2048, 256, 32768, 2e-6, 0.1, None, 512, 20, 50),
    "cpu": Scale(256, 128, 128, 16, 8192, 2e-6, 0.1, None, 64, 20, 50),
    "starter": Scale(64, 40, 16, 16, 8192, 3e-4, 15, 150, 1024, 10, 50),
}
LORA_FACTOR = 10  # of the learning rate: an adapter's matrices are far smaller than what they change
NUM_PROGRESS = 128  # held-out items measured every eval_steps; before and after use them all


def resolve_lengths(config: TrainConfig, scale: Scale, context: int) -> TrainConfig:
    """Limits that together fit the model's context: given ones stay, derived ones shrink in proportion.

    Raises:
        UserError: the given limits alone do not fit.
    """
    names = ("max_prompt_length", "max_trace_length", "max_answer_length")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    derived = dict(zip(names, (scale.prompt, scale.trace, scale.answer), strict=True))
    derived = {name: length for name, length in derived.items() if name not in given}
    room = context - 1 - sum(given.values())  # 1 is the delimiter's
    if room < len(derived):
        told = " + ".join(f"{name} {length}" for name, length in given.items())
        raise UserError(f"{told} + 1 delimiter do not fit the model's context of {context} tokens")
    shrink = min(1.0, room / max(1, sum(derived.values())))
    return replace(config, **{name: max(1, int(length * shrink)) for name, length in derived.items()})


def resolve_steps(config: TrainConfig, scale: Scale, num_examples: int) -> TrainConfig:
    """Batch sizes, schedule and cadence; what is too large for the data is made smaller, never refused."""
    prompts = min(config.prompts_per_step or scale.prompts_per_step, num_examples)
    epoch_steps = math.ceil(config.num_train_epochs * num_examples / prompts)
    steps = config.max_steps or (scale.max_steps if config.num_train_epochs == 1 else None) or epoch_steps

    def or_else(name: str, derived):
        return derived if getattr(config, name) is None else getattr(config, name)

    return replace(
        config,
        prompts_per_step=prompts,
        prompts_per_minibatch=min(config.prompts_per_minibatch or prompts, prompts),
        max_steps=steps,
        max_tokens_per_batch=or_else("max_tokens_per_batch", scale.tokens_per_batch),
        learning_rate=or_else("learning_rate", scale.learning_rate * (LORA_FACTOR if config.use_peft else 1)),
        warmup_steps=or_else("warmup_steps", scale.warmup_steps),
        save_steps=or_else("save_steps", scale.save_steps),
        eval_steps=or_else("eval_steps", scale.eval_steps),
    )


def resolve_output_dir(config: TrainConfig) -> str:
    """``runs/demo`` for the built-in default, ``runs/<model>-<data>-<objective>`` else."""
    if config.output_dir is not None:
        return os.path.expanduser(config.output_dir)
    lora = "-lora" if config.use_peft else ""
    if config.model_name_or_path is None and config.dataset_name is None:
        return "runs/demo" + ("" if config.objective == "nrt-ws" else f"-{config.objective}") + lora
    model = Path(config.model_name_or_path).name if config.model_name_or_path else "starter"
    data = Path(split_names(config.dataset_name)[0]).name.split(".")[0] if config.dataset_name else "tasks"
    return f"runs/{model}-{data}-{config.objective}{lora}"
