"""What TRL keeps from a rollout function: the rows that its prompts belong to."""

from __future__ import annotations

from typing import Any

from nrt_fast.types import UserError

PLAIN_SAMPLING = {"top_p": (1.0, None), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
"""Values under which sampling is by temperature alone."""


class RolloutMixin:
    """``class Trainer(RolloutMixin, GRPOTrainer)``: lets ``NRTReward.rollout`` read the answers of its prompts."""

    nrt_inputs: list[dict[str, Any]] | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.nrt_inputs = inputs
        return super()._generate_and_score_completions(inputs)


def inputs_of(trainer: Any) -> list[dict[str, Any]]:
    """The rows that are being sampled for; UserError where the trainer does not keep them."""
    inputs = getattr(trainer, "nrt_inputs", None)
    if inputs is None:
        raise UserError("TRL gives a rollout function no answers: use class Trainer(RolloutMixin, GRPOTrainer)")
    return inputs


def check_sampling(trainer: Any) -> None:
    """UserError unless what TRL is asked for is sampling by temperature, with every trace in the loss."""
    for name, plain in PLAIN_SAMPLING.items():
        if (value := getattr(trainer, name, None)) not in plain:
            raise UserError(f"{name} {value} cannot take effect: this engine samples by temperature; valid: {plain[0]}")
    if trainer.args.generation_kwargs:
        raise UserError("generation_kwargs cannot take effect: this engine samples by temperature")
    if trainer.args.mask_truncated_completions:
        raise UserError("mask_truncated_completions would drop all traces: they end with the delimiter, not with EOS")
