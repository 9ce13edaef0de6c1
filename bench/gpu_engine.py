"""The engine's sections of gpu_suite.py: exactness first, then Llama-3.1-8B and 3.2-1B shapes with random weights."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from engine_peers import (
    DELIMITER,
    LLAMA_1B,
    LLAMA_8B,
    TOLERANCE,
    generate,
    make_engine,
    make_ids,
    make_module,
    reforward,
    small_llama,
)  # fmt: skip
from gpu_sections import section
from timing import PhaseClock, interleaved
from torch import Tensor

from nrt_fast import ops
from nrt_fast.config import PRESETS
from nrt_fast.model import Model
from nrt_fast.pack import loss_tokens, pack
from nrt_fast.types import ANSWER, TRACE, Example

if TYPE_CHECKING:
    from gpu_suite import Suite

    from nrt_fast import Engine

PEAKS = {  # part of the device's name: bytes a second, bf16 FLOPs a second, dense; NVIDIA's data sheets
    "H200": (4.8e12, 989e12),
    "H100 80GB HBM3": (3.35e12, 989e12),
    "A100-SXM4-80GB": (2.039e12, 312e12),
}
MISMATCH = 0.02  # nats, mean |sampler - trainer| in bf16
TINY = small_llama(64, 2, 361)
ANSWER_LENGTH = 16


def weights_read(shape: dict) -> int:
    """Parameters that one decoded token goes through: all but the embedding's rows, with the head, tied or not."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv_width = hidden // heads * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * inner + 2 * hidden
    return shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"] + hidden


def decode_roofline(shape: dict, batch: int, context: float, bandwidth: float, flops: float) -> float:
    """Seconds of one bf16 decode step of ``batch`` rows at best: weights or arithmetic, and each row's keys and values.

    max(W / bandwidth, 2 P B / flops) + B context KV / bandwidth, with nothing of the cache shared between rows.
    """
    parameters = weights_read(shape)
    kv_heads, heads = shape["num_key_value_heads"], shape["num_attention_heads"]
    kv_bytes = 4 * shape["num_hidden_layers"] * kv_heads * (shape["hidden_size"] // heads)
    products = max(2 * parameters / bandwidth, 2 * parameters * batch / flops)
    return products + batch * context * kv_bytes / bandwidth


def peaks(suite: Suite) -> tuple[float, float]:
    """Bytes and FLOPs a second: the data sheet's, or what a copy and a matrix product reach on other devices."""
    name = torch.cuda.get_device_name() if suite.device == "cuda" else ""
    for part, peak in PEAKS.items():
        if part in name:
            return peak
    size = suite.size(8192, 64)
    a, out = suite.randn(size, size), torch.empty(size, size, dtype=suite.dtype, device=suite.device)
    return suite.bandwidth, 2 * size**3 / interleaved({"GEMM": lambda: torch.mm(a, a, out=out)}, suite.device)["GEMM"]


def make_prompts(module: torch.nn.Module, num_prompts: int, length: int) -> list[list[int]]:
    return make_ids(module.config.vocab_size, num_prompts, length).tolist()


def sequences_of(prompts: list, traces: list, answers: list) -> list[list[int]]:
    """Every prompt with each of its traces and the answer, then with the answer alone."""
    groups = zip(prompts, traces, answers, strict=True)
    return [[*prompt, *ids, DELIMITER, *answer] for prompt, group, answer in groups for ids in [*group, []]]


def flat(scores) -> Tensor:
    groups = zip(scores.logprobs, scores.baseline_logprobs, strict=True)
    return torch.stack([row for group, baseline in groups for row in [*group, baseline]])


@section(60)
def engine_exactness(suite: Suite) -> None:
    """Ragged traces and their scores against full forwards of transformers, each sequence alone, in fp32 and bf16."""
    P, G, prompt, cap = suite.size(8, 2), suite.size(8, 3), suite.size(300, 7), suite.size(256, 12)
    shape = TINY if suite.quick else small_llama(256, 6, 4096)
    for dtype in (torch.float32, torch.bfloat16):
        module = make_module(shape, dtype, suite.device, eos_probability=4 / cap)
        engine, prompts = make_engine(module), make_prompts(module, P, prompt)
        answers = make_ids(module.config.vocab_size, P, ANSWER_LENGTH, seed=1).tolist()
        thoughts = engine.think(
            prompts, answers, list(range(P)), num_generations=G, max_trace_length=cap, temperature=1.0, seed=0, step=0
        )
        traces, name = thoughts.traces, str(dtype).removeprefix("torch.")
        module.set_attn_implementation("eager")  # no kernel that might take a shorter way in fp32
        pairs = [(p, *row) for p, *group in zip(prompts, traces.trace_ids, traces.logprobs) for row in zip(*group)]
        theirs = torch.cat([reforward(module, [p + ids], len(ids), 1)()[0] for p, ids, _ in pairs])
        ours = torch.tensor([logprob for _, _, row in pairs for logprob in row])
        suite.check_close(f"sampled log-probs, {name}", ours, theirs, TOLERANCE[dtype], mean=dtype == torch.bfloat16)
        theirs = reforward(module, sequences_of(prompts, traces.trace_ids, answers), ANSWER_LENGTH, 1)()
        given = engine.score(prompts, traces.trace_ids, answers)
        for which, scores in (("live", thoughts.scores), ("given", given)):
            suite.check_close(
                f"{which} scores, {name}", flat(scores), theirs, TOLERANCE[dtype], mean=dtype == torch.bfloat16
            )
    module.set_attn_implementation("sdpa")
    lengths = [len(ids) for _, ids, _ in pairs]
    suite.compare(
        f"{P} x {G} ragged traces, {sum(lengths)} ids, longest {max(lengths)}, 256 wide, 6 layers, bf16",
        {"rollout": functools.partial(engine.rollout, prompts, num_generations=G, max_trace_length=cap)},
        {"generate": lambda: generate(module, prompts, G, lengths)},
        rounds=3,
        warmup_rounds=1,
    )


@section(150)
def engine_8b(suite: Suite) -> None:
    measure_engine(suite, LLAMA_8B, cache_bytes=30 << 30)


@section(60)
def engine_1b(suite: Suite) -> None:
    measure_engine(suite, LLAMA_1B, cache_bytes=12 << 30)


def measure_engine(suite: Suite, shape: dict, cache_bytes: int) -> None:
    """Scores and decode speed at two contexts, 256 traces of 32 prompts; scoring and the mismatch with 64 of 8."""
    shape = TINY if suite.quick else shape
    module = make_module(shape, suite.dtype, suite.device, context=suite.size(2048, 128))
    engine = make_engine(module, max_cache_bytes=suite.size(cache_bytes, 4 << 20))
    new = suite.size(256, 8)
    measure_scoring(suite, module, engine, suite.size(896, 11), new)
    for context, batches in ((suite.size(1024, 20), (64,)), (suite.size(350, 12), (64, 128))):
        measure_decode(suite, module, engine, shape, context - new // 2, new, batches)


def measure_decode(
    suite: Suite, module: torch.nn.Module, engine: Engine, shape: dict, prompt: int, new: int, batches: tuple[int, ...]
) -> None:
    """Tokens a second of decoding alone: the time of traces of ``new`` ids without that of one id each.

    transformers decodes 32 ids around the same context in batches that leave room for its cache.
    """
    P, G, theirs = suite.size(32, 2), suite.size(8, 2), suite.size(32, 3)
    prompts = make_prompts(module, P, prompt)
    ours = functools.partial(engine.rollout, prompts, num_generations=G)
    longer = make_prompts(module, P, prompt + (new - theirs) // 2)

    def peer(batch: int, num_new: int) -> Callable:
        rows = suite.size(batch, 4)
        return functools.partial(generate, module, longer[: rows // G], G, [num_new] * rows)

    peers = {f"generate, B={b}, {n} ids": peer(b, n) for b in batches for n in (theirs + 1, 1)}
    traces = ours(max_trace_length=new)  # warms up too, as the first call of each peer does
    name = f"{P} x {G} traces of {new} ids, prompts of {prompt}"
    lengths = torch.tensor([len(ids) for group in traces.trace_ids for ids in group])
    suite.check_equal(f"{name}: length", lengths, torch.tensor(new), 0.99)
    seconds = suite.compare(
        name,
        {f"rollout, {n} ids": functools.partial(ours, max_trace_length=n) for n in (new, 1)},
        peers,
        rounds=2,
        warmup_rounds=0,
    )
    if not seconds:
        return
    step = (seconds[f"rollout, {new} ids"] - seconds["rollout, 1 ids"]) / (new - 1)
    speed = {"decode": P * G / step}
    for batch in batches:
        times = [seconds.get(f"generate, B={batch}, {n} ids") for n in (theirs + 1, 1)]
        if None not in times:
            speed[f"generate, B={batch}"] = suite.size(batch, 4) * theirs / (times[0] - times[1])
    context = prompt + new / 2
    roofline = decode_roofline(shape, P * G, context, *peaks(suite))
    suite.record_speed(f"{P * G} traces, context {context:.0f}", speed, P * G / roofline)


def measure_scoring(suite: Suite, module: torch.nn.Module, engine: Engine, prompt: int, new: int) -> None:
    """Scoring on the live cache beside forwarding everything again; then the trainer's view of the same tokens."""
    P, G = suite.size(8, 2), suite.size(8, 2)
    prompts = make_prompts(module, P, prompt)
    answers = make_ids(module.config.vocab_size, P, ANSWER_LENGTH, seed=1).tolist()
    clock = PhaseClock("score")
    live = functools.partial(
        engine.think, prompts, answers, list(range(P)), num_generations=G, max_trace_length=new, temperature=1.0,
        seed=0, step=0, timed=clock.timed,
    )  # fmt: skip
    name = f"scoring {P} x {G + 1} answers of {ANSWER_LENGTH} ids after {prompt} + {new}"
    thoughts = live()
    sequences = sequences_of(prompts, thoughts.traces.trace_ids, answers)
    frugal = reforward(module, sequences, ANSWER_LENGTH, G)
    bf16 = suite.dtype == torch.bfloat16
    suite.check_close(f"{name}: live scores", flat(thoughts.scores), frugal(), TOLERANCE[suite.dtype], mean=bf16)
    for kind, which in ((TRACE, "sampler"), (ANSWER, f"{name}: scorer")):
        ours, theirs = trainer_logprobs(module, prompts, answers, thoughts, kind)
        suite.check_close(f"{which} against trainer", ours, theirs, MISMATCH if bf16 else TOLERANCE[suite.dtype], bf16)
    suite.compare(
        name,
        {
            "think, its scoring": live,
            "re-forward": clock.throughout(reforward(module, sequences, ANSWER_LENGTH, G // 2, all_logits=True)),
            "re-forward, logits of answers only": clock.throughout(frugal),
        },
        rounds=2,
        warmup_rounds=0,
        clock=clock,
    )


@torch.no_grad()
def trainer_logprobs(
    module: torch.nn.Module, prompts: list, answers: list, thoughts, kind: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of one kind of token, as the engine measured them and by the packed training forward."""
    model, num_traces = Model.from_hf(module), len(thoughts.traces.trace_ids[0])
    examples = [Example(i, p, a, None, "", "", "") for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    weights = [[torch.ones(len(answer))] * num_traces for answer in answers]
    advantages = [torch.linspace(-1, 1, num_traces)] * len(prompts)
    tokens = loss_tokens(
        examples, thoughts.traces, thoughts.scores.logprobs, advantages, [True] * len(prompts), weights,
        PRESETS["nrt-ws"], DELIMITER, 1.0, 1,
    )  # fmt: skip
    pairs = []
    for batch in pack(tokens, 8192, module.device):
        logprob_A = ops.linear_logprob(model.packed(batch)[batch.hidden_A], model.head, batch.loss.targets_A)
        chosen = batch.loss.kind_A == kind
        pairs.append((batch.loss.old_logprobs_A[chosen], logprob_A[chosen]))
    ours, theirs = zip(*pairs, strict=True)
    return torch.cat(ours), torch.cat(theirs)


@section(60)
def train(suite: Suite) -> None:
    """``nrt-fast train`` as it is, cut to a few steps."""
    try:
        import datasets  # noqa: F401, what the command needs besides torch and transformers
        import jsonargparse  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        suite.record(kind="note", name="nrt-fast train", text=f"not run: {error}")
        return
    from nrt_fast.cli import main

    steps = suite.size(5, 2)
    options = {"max_steps": steps, "num_eval_prompts": suite.size(128, 2), "device": suite.device, "eval_steps": 0}
    if suite.quick:
        options |= {"prompts_per_step": 2, "num_generations": 2, "max_trace_length": 8}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        code = main(["train", "--output_dir", f"{folder}/run", *arguments])
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines() if code == 0 else []
    rows = [row for row in map(json.loads, lines) if "loss" in row or "step_time" in row]
    suite.check_equal("exit code", torch.tensor(code), torch.tensor(0))
    suite.check_equal("steps", torch.tensor(len(rows)), torch.tensor(steps))
    seconds = sorted(row["step_time"] for row in rows if "step_time" in row)
    if seconds:
        suite.record(
            kind="time", name="step of the default run", us={"median step": 1e6 * seconds[len(seconds) // 2]},
            of_floor=None, floor_us=None,
        )  # fmt: skip
