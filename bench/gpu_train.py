"""The training sections of gpu_suite.py: exactness, the packed pass at the shapes of Llama, and whole steps."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from engine_peers import DELIMITER, EOS, LLAMA_1B, LLAMA_3B, LLAMA_8B, make_ids, make_module, small_llama
from gpu_engine import ANSWER_LENGTH, TINY, make_prompts, peaks
from gpu_sections import section
from torch import Tensor
from train_peers import Rows, geometric_lengths, owned, packed_pass, padded_pass, random_step, whole_step

from nrt_fast import Engine, Model
from nrt_fast.metrics import Timer
from nrt_fast.model.lora import Lora
from nrt_fast.model.peft_folder import ALL_LINEAR
from nrt_fast.optim import AdamW
from nrt_fast.pack import pack
from nrt_fast.plan import Sizes, num_parameters, training_bytes
from nrt_fast.types import Example, LossTokens, PackedBatch

if TYPE_CHECKING:
    from gpu_suite import Suite

RELATIVE = 1e-4  # of a gradient's norm, fp32
BETAS, RANK = (0.9, 0.95), 16


def relative_errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """Of each parameter's gradient: norm of the difference over the norm."""
    errors = [(ours[name].double() - grad.double()).norm() / grad.double().norm() for name, grad in theirs.items()]
    return torch.stack(errors).cpu()


@section(60)
def train_exactness(suite: Suite) -> None:
    """Loss and every gradient of a packed pass against padded rows by transformers, in fp32 and in bf16."""
    shape = TINY if suite.quick else small_llama(256, 6, 4096)
    tokens, rows = random_step(shape["vocab_size"], geometric_lengths(*((4, 12) if suite.quick else ())))
    module = make_module(shape, torch.bfloat16, suite.device, context=512)
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):  # the same weights
        again = make_module(shape, dtype, suite.device, context=512)
        again.load_state_dict(module.state_dict())
        calls[dtype] = (
            packed_pass(owned(again), tokens, 4096),
            padded_pass(again, rows, tokens.normalizer, len(rows.ids), by_length=True),
        )
    (loss, grads), (true_loss, true_grads) = (call() for call in calls[torch.float32])
    suite.check_close("loss, fp32", torch.tensor(loss), torch.tensor(true_loss), RELATIVE * max(1, abs(true_loss)))
    suite.check_close("gradients, fp32", relative_errors(grads, true_grads), torch.zeros(1), RELATIVE)
    (_, grads), (_, plain_grads) = (call() for call in calls[torch.bfloat16])
    errors, plain_errors = (relative_errors(g, true_grads) for g in (grads, plain_grads))
    suite.check_close("gradients, bf16", errors, torch.zeros(1), 2 * float(plain_errors.max()) + RELATIVE)
    packed, padded = calls[suite.dtype]
    name = f"pass of {len(rows.ids)} ragged traces, {shape['hidden_size']} wide"
    suite.compare(name, {"packed": packed, "padded, in order of length": padded}, rounds=5, warmup_rounds=1)


@section(90)
def train_1b(suite: Suite) -> None:
    """The pass of Llama-3.2-1B beside 8 padded rows of like length, then whole steps of all weights."""
    module = make_model_of(suite, LLAMA_1B)
    tokens, rows, prompt = make_pass(suite, LLAMA_1B)
    padded = functools.partial(padded_pass, module, rows, tokens.normalizer, 8, by_length=True, prompt=prompt)
    measure_pass(suite, owned(module), tokens, {"padded, 8 rows of like length": padded})
    del module, padded
    measure_step(suite, owned(make_model_of(suite, LLAMA_1B)), "all weights")


@section(90)
def train_3b(suite: Suite) -> None:
    """Whole steps of all weights of Llama-3.2-3B."""
    measure_step(suite, owned(make_model_of(suite, LLAMA_3B)), "all weights")


@section(150)
def train_8b(suite: Suite) -> None:
    """The pass and whole steps of an adapter of Llama-3.1-8B."""
    base = owned(make_model_of(suite, LLAMA_8B))
    measure_pass(suite, with_adapter(base), make_pass(suite, LLAMA_8B)[0], {})
    measure_step(suite, with_adapter(base), f"LoRA of rank {RANK}")


def with_adapter(base: Model) -> Model:
    model = base.with_adapter(Lora(RANK, 2 * RANK, ALL_LINEAR))
    model.adapter.reset(0)
    return model


def make_model_of(suite: Suite, shape: dict) -> torch.nn.Module:
    """Random weights; traces end with probability 1/256 a token."""
    context = suite.size(2048, 128)
    return make_module(TINY if suite.quick else shape, suite.dtype, suite.device, 1 / suite.size(256, 4), context)


def make_pass(suite: Suite, shape: dict) -> tuple[LossTokens, Rows, int]:
    """One step of ragged traces, the same as padded rows, and the length of its prompts."""
    vocabulary, prompt = (TINY if suite.quick else shape)["vocab_size"], suite.size(512, 7)
    lengths = geometric_lengths(suite.size(400, 4), suite.size(1024, 12))
    return *random_step(vocabulary, lengths, prompt), prompt


def pass_flops(model: Model, batches: list[PackedBatch]) -> float:
    """Of forward and backward, nothing recomputed: products with all weights, and causal attention as it is.

    Beside an adapter no weight has a gradient: two thirds of the products.
    """
    config, products = model.config, 4 if model.adapter else 6
    head = config.hidden_size * config.vocab_size
    matrices = num_parameters(config) - head * (1 if config.tie_word_embeddings else 2)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim
    return sum(
        products * (matrices * len(batch.tokens_T) + head * len(batch.hidden_A))
        + 6 * attention * float((batch.positions_T + 1).sum())
        for batch in batches
    )


def measure_pass(suite: Suite, model: Model, tokens: LossTokens, peers: dict[str, Callable]) -> None:
    """Tokens a second and MFU under each recomputation that fits; its peak beside the planned one."""
    batch_tokens, device = suite.size(8192, 256), model.embed.device
    batches = pack(tokens, batch_tokens, device)
    num_tokens, largest = (function(len(batch.tokens_T) for batch in batches) for function in (sum, max))
    roofline = num_tokens * peaks(suite)[1] / pass_flops(model, batches)
    adapter = model.adapter.flat.numel() if model.adapter else 0
    prompt, trace = (int(cu.diff().double().mean()) for cu in (tokens.cu_prompts, tokens.cu_traces))
    call = packed_pass(model, tokens, batch_tokens)
    for recompute in ("none", "selective", "full"):
        num_traces = (len(tokens.cu_traces) - 1) // (len(tokens.cu_prompts) - 1)
        sizes = Sizes(prompt, trace - ANSWER_LENGTH, ANSWER_LENGTH, num_traces, recompute=recompute, adapter=adapter)
        dtype = str(suite.dtype).removeprefix("torch.")
        planned = training_bytes(model.config, dtype, suite.device, largest, sizes)
        name = f"pass of {num_tokens} packed tokens, recompute {recompute}"
        if suite.device == "cuda" and planned > free_bytes():
            suite.record(kind="note", name=name, text=f"not timed: {planned / 2**30:.1f} GiB do not fit")
            continue
        recomputed = functools.partial(call, recompute)
        check_finite(suite, name, recomputed)
        if suite.device == "cuda":
            check_peak(suite, name, recomputed, planned)
        beside = peers if recompute == "none" else {}
        if seconds := suite.compare(name, {"packed": recomputed}, beside, rounds=2, warmup_rounds=0):
            suite.record_speed(name, {who: num_tokens / s for who, s in seconds.items()}, roofline)


def free_bytes() -> int:
    """Of the device, with those that torch keeps for later."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def check_finite(suite: Suite, name: str, call) -> None:
    _, gradients = call()
    finite = torch.stack([gradient.isfinite().all() for gradient in gradients.values()])
    suite.check_equal(f"{name}: finite gradients", finite, torch.tensor(True, device=finite.device))


def check_peak(suite: Suite, name: str, call, planned: int) -> None:
    """What a pass adds to weights and gradients is what was planned for it, or less."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    share = (torch.cuda.max_memory_allocated() - before) / planned
    suite.check_close(f"plan: peak of {name}", torch.tensor(share), torch.tensor(0.0), 1.1)


def measure_step(suite: Suite, model: Model, trained: str) -> None:
    """Seconds of rollout, scoring and training of ragged traces, the median of three steps after one."""
    P, G, longest = suite.size(32, 2), suite.size(8, 2), suite.size(512, 8)
    prompts = make_prompts(model, P, suite.size(350, 7))
    answers = make_ids(model.config.vocab_size, P, ANSWER_LENGTH, seed=1).tolist()
    examples = [Example(p, prompts[p], answers[p], None, "", "", "") for p in range(P)]
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS, max_cache_bytes=suite.size(12 << 30, 4 << 20))
    weights = model.trained
    optimizer = AdamW(weights.flat, weights.leaves.values(), weights.num_matrix_elements, BETAS, 1e-8, 0.0)
    run = functools.partial(
        whole_step, engine, optimizer, examples, num_generations=G, longest=longest, recompute="selective",
        batch_tokens=suite.size(8192, 256),
    )  # fmt: skip
    timer, steps, lengths = Timer(), [], []
    for step in range(suite.size(4, 2)):
        lengths = run(step, timer=timer)
        steps.append(timer.take())
    split = {phase: statistics.median(step[phase] for step in steps[1:]) for phase in ("rollout", "score", "train")}
    finite = weights.flat.isfinite().all()
    suite.check_equal(f"finite {trained}", finite, torch.tensor(True, device=finite.device))
    suite.record(
        kind="time", name=f"step of {P} x {G} traces, mean {statistics.fmean(lengths):.0f}, {trained}",
        us={"whole step": 1e6 * sum(split.values())} | {phase: 1e6 * s for phase, s in split.items()},
        of_floor=None, floor_us=None,
    )  # fmt: skip
