"""The training pass, and what it is timed against: the same loss over padded rows, by transformers and autograd.

Both run forward and backward of one on-policy step of the default objective, down to gradients of every parameter.

    python bench/train_peers.py <ours|padded> <shape> <dtype>    bytes that one pass adds to the process's peak
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from engine_peers import DELIMITER, PROMPT, SHAPES, G, P, make_ids, make_module, small_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from nrt_fast import Engine, Model
from nrt_fast.config import PRESETS
from nrt_fast.metrics import Timer
from nrt_fast.model.config import ModelConfig
from nrt_fast.model.weights import OwnedWeights
from nrt_fast.optim import AdamW
from nrt_fast.pack import loss_tokens, pack
from nrt_fast.rewards import reward
from nrt_fast.train_step import train_step
from nrt_fast.types import Example, LossTokens, Traces

ANSWER, MEAN, LONGEST = 16, 64, 256
OBJECTIVE = PRESETS["nrt-ws"]
EVERY_GROUP = replace(OBJECTIVE, std_floor=0.0, reward_clip="none")  # has a signal
LR, MAX_GRAD_NORM = 1e-6, 1.0


def geometric_lengths(mean: int = MEAN, longest: int = LONGEST, seed: int = 1) -> list[int]:
    """Lengths of the P G traces."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(P * G).geometric_(1 / mean, generator=generator).clamp(max=longest).int().tolist()


@dataclass(frozen=True)
class Rows:
    """The step as a padded implementation has it: a row for each trace, its prompt with it.

    Attributes:
        ids: [N] lists of prompt, trace, delimiter and answer.
        weights: [N] tensors, the weight of each id after the prompt.
    """

    ids: list[list[int]]
    weights: list[Tensor]


def random_step(vocabulary: int, lengths: list[int], prompt: int = PROMPT) -> tuple[LossTokens, Rows]:
    """One step of random ids, advantages and answer weights, for us and for a padded implementation."""
    generator = torch.Generator().manual_seed(0)
    prompts, answers = (make_ids(vocabulary, P, size, seed=size).tolist() for size in (prompt, ANSWER))
    traces = [make_ids(vocabulary, length, seed=n).tolist() for n, length in enumerate(lengths)]
    groups = [traces[p * G : (p + 1) * G] for p in range(P)]
    advantage, weights = torch.randn(P, G, generator=generator), torch.rand(P, G, ANSWER, generator=generator)
    tokens = loss_tokens(
        [Example(p, prompts[p], answers[p], None, "", "", "") for p in range(P)],
        Traces(groups, [[[0.0] * len(ids) for ids in group] for group in groups], [[-1.0] * G] * P),
        [[torch.zeros(ANSWER)] * G] * P, list(advantage), [True] * P, [list(rows) for rows in weights], OBJECTIVE,
        DELIMITER, 1.0, LONGEST,
    )  # fmt: skip
    rows = Rows(
        [[*prompts[p], *ids, DELIMITER, *answers[p]] for p, group in enumerate(groups) for ids in group],
        [
            torch.cat([advantage[p, g].expand(len(ids) + 1), weights[p, g]])
            for p, group in enumerate(groups) for g, ids in enumerate(group)
        ],
    )  # fmt: skip
    return tokens, rows


@torch.no_grad()
def owned(module: LlamaForCausalLM) -> Model:
    """The module's weights in storage of ours."""
    model = Model(module.config, OwnedWeights(ModelConfig.from_hf(module.config), module.dtype, module.device))
    for name, tensor in model.weights.tensors.items():
        tensor.copy_(module.get_parameter(name))
    return model


def packed_pass(model: Model, tokens: LossTokens, max_tokens: int) -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """A call, of how to recompute, that returns loss and gradients by name of what is trained; packing is part of it,
    the optimiser's update is not."""
    trained = model.trained
    optimizer = AdamW(trained.flat, trained.leaves.values(), trained.num_matrix_elements, (0.9, 0.95), 1e-15, 0.0)
    no_update = SimpleNamespace(gradient=optimizer.gradient, step=lambda lr, max_grad_norm: 0.0)

    def call(recompute: str = "none") -> tuple[float, dict[str, Tensor]]:
        optimizer.zero_grad()
        batches = pack(tokens, max_tokens, trained.flat.device)
        stats = train_step(model, no_update, tokens, batches, OBJECTIVE, 0.0, math.inf, True, None, recompute)
        gradients = {
            name: optimizer.grad[tensor.storage_offset() :][: tensor.numel()].view_as(tensor)
            for name, tensor in trained.tensors.items()
        }
        return stats.loss["total"], gradients

    return call


def padded_pass(
    module: LlamaForCausalLM, rows: Rows, normalizer: float, rows_at_once: int, by_length: bool = False,
    prompt: int = PROMPT,
) -> Callable[[], tuple[float, dict[str, Tensor]]]:  # fmt: skip
    """The same with a transformers module: padded to the longest row of each micro-batch.

    All prompts have one length, so the head runs after the prompt alone.
    """
    module.requires_grad_(True)
    order = sorted(range(len(rows.ids)), key=lambda n: len(rows.ids[n]) if by_length else n)
    batches = []
    for start in range(0, len(order), rows_at_once):
        part = order[start : start + rows_at_once]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows.ids[n]) for n in part], batch_first=True)
        weights = torch.nn.utils.rnn.pad_sequence([rows.weights[n] for n in part], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(rows.ids[n]) for n in part])[:, None]
        batches.append([x.to(module.device) for x in (ids, mask.long(), weights)])

    def call() -> tuple[float, dict[str, Tensor]]:
        module.zero_grad(set_to_none=True)
        total = 0.0
        for ids, mask, weights in batches:
            num_targets = ids.shape[1] - prompt
            kept = module(ids, attention_mask=mask, use_cache=False, logits_to_keep=num_targets + 1).logits[:, :-1]
            logprobs = kept.float().log_softmax(-1).gather(2, ids[:, prompt:, None]).squeeze(2)
            loss = -(weights * logprobs).sum() / normalizer
            loss.backward()
            total += float(loss.detach())
        return total, {name: parameter.grad for name, parameter in module.named_parameters()}

    return call


def whole_step(
    engine: Engine, optimizer: AdamW, examples: list[Example], step: int, *, num_generations: int, longest: int,
    batch_tokens: int, timer: Timer, recompute: str = "none",
) -> list[int]:  # fmt: skip
    """Rollout, scoring, rewards and one update, as the loop has them; every trace's length."""
    prompts, answers, uids = zip(*((e.prompt_ids, e.answer_ids, e.uid) for e in examples), strict=True)
    thoughts = engine.think(
        list(prompts), list(answers), list(uids), num_generations=num_generations, max_trace_length=longest,
        temperature=1.0, seed=0, step=step, timed=timer,
    )  # fmt: skip
    traces, scores, device = thoughts.traces, thoughts.scores, engine.model.embed.device
    with timer("score"):
        rewards = reward(scores, traces, EVERY_GROUP, 0.0, [""] * len(examples))
    assert all(rewards.signal), "a group without a signal would be less work than the peer's"
    with timer("train"):
        tokens = loss_tokens(
            examples, traces, scores.logprobs, rewards.advantage, rewards.signal, rewards.answer_weights, EVERY_GROUP,
            DELIMITER, 1.0, longest + ANSWER,
        )  # fmt: skip
        optimizer.zero_grad()
        batches = pack(tokens, batch_tokens, device)
        train_step(engine.model, optimizer, tokens, batches, EVERY_GROUP, LR, MAX_GRAD_NORM, True, None, recompute)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return [len(ids) for group in traces.trace_ids for ids in group]


def contenders(shape: str, dtype: torch.dtype) -> dict[str, Callable[[], tuple[float, dict[str, Tensor]]]]:
    """By name; a whole step as one micro-batch, and the peer's also 8 rows at a time."""
    size = SHAPES[shape][0]
    tokens, rows = random_step(size[2], geometric_lengths())
    module = make_module(small_llama(*size), dtype, context=512)
    return {
        "packed": packed_pass(owned(module), tokens, 1 << 20),
        "padded, 64 rows": padded_pass(module, rows, tokens.normalizer, P * G),
        "padded, 8 rows": padded_pass(module, rows, tokens.normalizer, 8),
        "padded, 8 rows of like length": padded_pass(module, rows, tokens.normalizer, 8, by_length=True),
    }


def peak_growth(contender: str, shape: str, dtype: str) -> int:
    """Bytes by which one pass raises the resident memory of a fresh process at its highest."""
    call = contenders(shape, getattr(torch, dtype))[{"ours": "packed", "padded": "padded, 64 rows"}[contender]]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(peak_growth(*sys.argv[1:]))
