"""The model that another trainer trains, in place."""

from __future__ import annotations

from typing import Any

import torch

from nrt_fast.model import Model
from nrt_fast.model.weights import parameter_shapes
from nrt_fast.types import UserError

DTYPES = (torch.float32, torch.bfloat16)


def live_model(trainer: Any) -> Model:
    """The model that a trainer trains, in place: its parameters are read where they are, its modules are not run.

    So there is no mode to change and to restore, and dropout, gradient checkpointing and hooks have no part in it.

    Raises:
        UserError: a model type or adapter that this decoder does not do, or parameters that are not whole.
    """
    model = Model.from_hf(trainer.accelerator.unwrap_model(trainer.model))
    for name, shape in parameter_shapes(model.config).items():
        _check_whole(name, model.weights.tensors.get(name), shape, model.embed.dtype)
    return model


def _check_whole(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sharded and quantised parameters are missing, or have another shape, class or dtype."""
    if tensor is None or tuple(tensor.shape) != shape or hasattr(tensor, "full_tensor"):
        found = "missing" if tensor is None else f"{type(tensor.data).__name__} {list(tensor.shape)}"
        raise UserError(
            f"the trainer's model: {name} is {found}, a whole tensor {list(shape)} is needed; valid: one process, DDP, "
            "ZeRO-1 or 2, LoRA. ZeRO-3, FSDP and quantisation keep parameters in pieces"
        )
    if tensor.dtype != dtype or dtype not in DTYPES:
        raise UserError(
            f"the trainer's model: {name} is {tensor.dtype}; valid: float32 or bfloat16, the same for all parameters "
            "(bf16=True with float32 weights is one such; load_in_8bit and cast_lm_head_to_fp32 are not)"
        )
