"""The model that another trainer trains, in place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from nrt_fast.engine import Engine
from nrt_fast.model import Model
from nrt_fast.model.weights import parameter_shapes
from nrt_fast.types import Scores, UserError

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


def score_in_parts(
    engine: Engine, prompts: list[list[int]], traces: list[list[list[int]]], answers: list[list[int]], names: list[str]
) -> Scores:
    """``Engine.score``; a group that the cache does not hold at once is scored in parts, with the same result.

    Raises:
        UserError: the cache does not hold a prompt with one of its traces; names the prompt.
    """
    parts: list[tuple[int, slice]] = []
    for index, (prompt, group, answer) in enumerate(zip(prompts, traces, answers, strict=True)):
        rows = [len(trace) + 1 + len(answer) for trace in group]
        parts += [(index, part) for part in parts_that_fit(engine, prompt, rows, 1 + len(answer), names[index])]
    scores = engine.score(
        [prompts[index] for index, _ in parts], [traces[index][part] for index, part in parts],
        [answers[index] for index, _ in parts],
    )  # fmt: skip
    logprobs: list[list[torch.Tensor]] = [[] for _ in prompts]
    baselines = {}
    for (index, _), logc, logb in zip(parts, scores.logprobs, scores.baseline_logprobs, strict=True):
        logprobs[index] += logc
        baselines[index] = logb
    return Scores(logprobs, list(baselines.values()))


def parts_that_fit(engine: Engine, prompt: list[int], rows: list[int], empty: int, where: str) -> list[slice]:
    """A group's rows, in order, as parts that the cache holds; each has the prompt, and the empty trace, beside it.

    Args:
        rows: tokens of each row behind the prompt.
        empty: of the empty trace's row.
        where: what the message calls the prompt.

    Raises:
        UserError: the cache does not hold a prompt with one row.
    """
    cache = engine.cache
    shared = cache.pages_for(len(prompt)) + cache.pages_for(empty)
    starts, free = [], 0
    for start, pages in enumerate(map(cache.pages_for, rows)):
        if shared + pages > cache.num_pages:
            raise UserError(
                f"{where}: prompt, trace and answer take {shared + pages} pages of {cache.page_size} tokens, the cache "
                f"has {cache.num_pages}; valid: more max_cache_bytes, or shorter traces"
            )
        if pages > free:
            starts.append(start)
            free = cache.num_pages - shared
        free -= pages
    return [slice(*ends) for ends in pairwise([*starts, len(rows)])]


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
