"""Memory of a run, told before anything is allocated: what each part takes, and what the rest buys in keys and values.

Arithmetic on a model's shape and a run's sizes; nothing here needs torch or a device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from nrt_fast.types import UserError

if TYPE_CHECKING:
    from nrt_fast.model.config import ModelConfig

GIB = 1 << 30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MOMENTS = {"float32": "fp32 moments", "bfloat16": "bf16 moments", "int8": "8-bit moments"}
MOMENT_BLOCK = 256  # weights that share the fp32 scale of an 8-bit moment
PAGE_TOKENS = {"cuda": 256, "cpu": 32}  # the engine's
CONTEXT_BYTES = 2 * GIB  # CUDA context, libraries and their workspaces
GRAPH_BYTES = 3 * GIB // 2  # CUDA graphs of the decode step
CPU_CACHE_BYTES = 2 * GIB
LOGIT_ROWS = {"cuda": 8192, "cpu": 512}  # at most, of fp32 logits alive at one time
CPU_LOGIT_BYTES = 64 << 20
PASS_TOKENS = 16384  # of a pass over a cache, or one group
RECOMPUTED = {
    "none": "nothing recomputed", "selective": "all but products recomputed", "full": "layers recomputed",
}  # fmt: skip
EFFICIENT_TOKENS = 8192  # a micro-batch of so many keeps a GPU's products busy
BATCH_STEP, MAX_BATCH_TOKENS = 256, 1 << 24  # a derived micro-batch is a multiple of it, and at most


@dataclass(frozen=True)
class Sizes:
    """What a run asks of the memory.

    Attributes:
        prompt, trace, answer: longest of each, in tokens.
        num_generations: G.
        batch_tokens: of one packed micro-batch; 0 where nothing is trained.
        num_copies: of what is trained, in its dtype (frozen, averaged).
        num_fp32_copies: the same in fp32 (what averages in it).
        recompute: what the backward pass computes again: none, selective, full; None: what the memory asks for.
        moments: dtype of the optimizer's: float32, bfloat16, int8; None: what the memory asks for.
        adapter: parameters of the adapter that is trained; 0: all weights are.
        num_ranks: processes that share the optimizer's state, each with a device of its own.
    """

    prompt: int
    trace: int
    answer: int
    num_generations: int
    batch_tokens: int = 0
    num_copies: int = 0
    num_fp32_copies: int = 0
    recompute: str | None = None
    moments: str | None = None
    adapter: int = 0
    num_ranks: int = 1


class Part(NamedTuple):
    """One line of the plan."""

    name: str
    num_bytes: int
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory of a device goes.

    Attributes:
        device: cpu or cuda.
        device_bytes: what there is.
        parts: what is there beside the keys and values.
        cache_bytes: for keys and values, the gradients' memory among it.
        token_bytes: keys and values of one token.
        sizes: of the run.
        lent_bytes: of the gradients, which have their memory when nothing is sampled.
    """

    device: str
    device_bytes: int
    parts: tuple[Part, ...]
    cache_bytes: int
    token_bytes: int
    sizes: Sizes
    lent_bytes: int = 0

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return PAGE_TOKENS[self.device]

    @property
    def num_pages(self) -> int:
        """Pages that sequences can have; one more is scratch."""
        return max(0, self.cache_bytes // (self.page_tokens * self.token_bytes) - 1)

    @property
    def group_pages(self) -> int:
        """Pages of one group at full length: the prompt once, G traces with answers, the answer without a trace."""
        pages_of, sizes = self._pages_of, self.sizes
        own = sizes.num_generations * pages_of(sizes.trace + 1 + sizes.answer)
        return pages_of(sizes.prompt) + own + pages_of(sizes.answer)

    @property
    def group_bytes(self) -> int:
        """Of the pages of one group, and of the scratch page."""
        return (self.group_pages + 1) * self.page_tokens * self.token_bytes

    @property
    def num_slots(self) -> int:
        """Traces that fit at full length, as whole groups."""
        return self.num_pages // self.group_pages * max(1, self.sizes.num_generations)

    def _pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def __str__(self) -> str:
        """A table: GiB of each part, and what it is."""
        more = self.cache_bytes - self.lent_bytes
        rows = [*self.parts, Part("keys and values", more, self._bought())]
        total = sum(part.num_bytes for part in rows)
        lines = [f"memory of {self.device}: {_gib(self.device_bytes)} GiB, planned before anything is allocated"]
        lines += [f"  {name:<16} {_gib(num_bytes):>9}  {note}".rstrip() for name, num_bytes, note in rows]
        return "\n".join([*lines, f"  {'sum':<16} {_gib(total):>9}  GiB; {_gib(self.device_bytes - total)} left over"])

    def _bought(self) -> str:
        sizes, length = self.sizes, self.sizes.trace + self.sizes.answer
        lent = f"with the gradients' {_gib(self.lent_bytes)}: " if self.lent_bytes else ""
        return (
            f"{lent}{self.num_pages:,} pages of {self.page_tokens} tokens, {_small(self.token_bytes)} a token: "
            f"{self.num_slots:,} slots x {length:,} tokens after prompts of {sizes.prompt:,}"
        )


def plan_training(
    shape: ModelConfig, dtype: str, device: str, device_bytes: int, sizes: Sizes, shrink: bool = False
) -> MemoryPlan:
    """The memory of a training run.

    Args:
        dtype: float32 or bfloat16.
        device: cpu or cuda.
        device_bytes: its memory.
        shrink: ``sizes.batch_tokens`` may be made smaller until activations take no more than keys and values have.

    Raises:
        UserError: it cannot fit; tells the numbers.
    """
    if sizes.moments is not None:
        return _plan_training(shape, dtype, device, device_bytes, sizes, shrink)
    may_be_short = device == "cuda" and dtype == "bfloat16" and not sizes.adapter  # those of an adapter are few
    *precise, least = MOMENTS if may_be_short else ("float32",)
    for moments in precise:
        with suppress(UserError):
            plan = _plan_training(shape, dtype, device, device_bytes, replace(sizes, moments=moments), shrink)
            if plan.sizes.batch_tokens >= min(sizes.batch_tokens, EFFICIENT_TOKENS):
                return plan
    return _plan_training(shape, dtype, device, device_bytes, replace(sizes, moments=least), shrink)


def _plan_training(
    shape: ModelConfig, dtype: str, device: str, device_bytes: int, sizes: Sizes, shrink: bool
) -> MemoryPlan:
    item, parameters = DTYPE_BYTES[dtype], sizes.adapter or num_parameters(shape)
    remainders = "" if dtype == "float32" else ", 16-bit remainders of fp32 weights"
    own = -(-parameters // sizes.num_ranks)
    ranks = f"; one of {sizes.num_ranks:,} slices" if sizes.num_ranks > 1 else ""
    static = [
        *_weights(shape, dtype, device),
        *_adapter(dtype, sizes),
        Part("gradients", 4 * parameters, "summed in fp32; lent to keys and values while traces are sampled"),
        Part("optimizer", optimizer_bytes(own, dtype, sizes.moments), MOMENTS[sizes.moments] + remainders + ranks),
    ]
    copies = (item * sizes.num_copies + 4 * sizes.num_fp32_copies) * parameters
    if copies and device == "cpu" and not sizes.adapter:
        copies += item * _packed_matrices(shape)  # while one of them scores
    if copies:
        static.append(Part("other weights", copies, "initial or averaged ones, for the baseline or the KL term"))
    static += _reserve(device)
    lent = _sum(part for part in static if part.name == "gradients")
    plan = MemoryPlan(device, device_bytes, tuple(static), 0, cache_token_bytes(shape, dtype), sizes, lent)
    left = device_bytes - _sum(static)
    if left <= 0:
        ranks = "; each rank has all weights and gradients, more ranks share the optimizer alone"
        hint = "a smaller model, a device with more memory or another dtype is needed"
        raise UserError(f"{_short(plan)}; {hint}{ranks if sizes.num_ranks > 1 else ''}")
    room = min(left, (left + lent) // 2)  # keys and values have as much, or what is lent
    longest = sizes.prompt + sizes.trace + sizes.answer
    batch_tokens = max(sizes.batch_tokens, longest)  # one trace is never split

    def training(num_tokens: int) -> int:
        return training_bytes(shape, dtype, device, num_tokens, sizes)

    if sizes.recompute is None:
        sizes = replace(sizes, recompute=_least_recompute(shape, dtype, device, batch_tokens, sizes, room, shrink))
    if shrink:
        batch_tokens = min(batch_tokens, max(_most_tokens(training, room), longest))
    parts = (
        *static,
        Part("activations", activation_bytes(shape, dtype, device, batch_tokens, sizes),
             f"of a micro-batch of {batch_tokens:,} tokens, {RECOMPUTED[sizes.recompute]}"),
        Part("backward", backward_bytes(shape, dtype, device, batch_tokens, sizes),
             "the loss, with logits in chunks; or one layer"),
    )  # fmt: skip
    # What training takes is free while traces are sampled and scored, and the other way round.
    passes = pass_bytes(shape, dtype, device, sizes)
    if (more := passes - training(batch_tokens)) > 0:
        parts = (*parts, Part("passes", more, "what scoring takes beyond that"))
    plan = replace(plan, parts=parts, sizes=replace(sizes, batch_tokens=batch_tokens))
    most = _most_tokens(lambda num_tokens: max(training(num_tokens), passes), left - max(0, plan.group_bytes - lent))
    hint = (
        f"max_tokens_per_batch of at most {most:,} fits" if most >= longest else
        f"limits of at most {most:,} tokens together would fit" if most else "shorter limits are needed"
    )  # fmt: skip
    return _with_cache(plan, hint)


def plan_inference(shape: ModelConfig, dtype: str, device: str, device_bytes: int, sizes: Sizes) -> MemoryPlan:
    """The memory of scoring and generating; see ``plan_training``."""
    passes = Part("passes", pass_bytes(shape, dtype, device, sizes), "of prompts and answers, at most")
    parts = (*_weights(shape, dtype, device), *_reserve(device), passes)
    plan = MemoryPlan(device, device_bytes, parts, 0, cache_token_bytes(shape, dtype), sizes)
    return _with_cache(plan, "a smaller model or a device with more memory is needed")


def num_parameters(shape: ModelConfig) -> int:
    """Of a model; a tied head counts once."""
    D, E = shape.hidden_size, shape.head_dim
    queries, keys = shape.num_heads * E, shape.num_kv_heads * E
    biases = shape.qkv_bias * (queries + 2 * keys) + shape.out_bias * D
    biases += shape.mlp_bias * (2 * shape.intermediate_size + D)
    norms = 2 * D + shape.qk_norm * 2 * E
    vectors = shape.num_layers * (biases + norms) + D
    return _layer_matrices(shape) + shape.vocab_size * D * (1 if shape.tie_word_embeddings else 2) + vectors


def _layer_matrices(shape: ModelConfig) -> int:
    D, E = shape.hidden_size, shape.head_dim
    attention = 2 * D * E * (shape.num_heads + shape.num_kv_heads)
    return shape.num_layers * (attention + 3 * D * shape.intermediate_size)


def _packed_matrices(shape: ModelConfig) -> int:
    return _layer_matrices(shape) + shape.vocab_size * shape.hidden_size


def optimizer_bytes(num_parameters: int, dtype: str, moments: str) -> int:
    """Two moments, the scales of 8-bit ones, and the remainders of bf16 weights."""
    scales = 8 * -(-num_parameters // MOMENT_BLOCK) if moments == "int8" else 0
    remainders = 0 if dtype == "float32" else 2 * num_parameters
    return 2 * {"float32": 4, "bfloat16": 2, "int8": 1}[moments] * num_parameters + scales + remainders


def cache_token_bytes(shape: ModelConfig, dtype: str) -> int:
    """Keys and values of one token, in all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[dtype]


def _least_recompute(
    shape: ModelConfig, dtype: str, device: str, batch_tokens: int, sizes: Sizes, num_bytes: int, shrink: bool
) -> str:
    """The first mode under which a micro-batch fits, or an efficient one where it may be made smaller."""
    wanted = min(batch_tokens, EFFICIENT_TOKENS) if shrink else batch_tokens

    def fits(recompute: str) -> bool:
        return training_bytes(shape, dtype, device, wanted, replace(sizes, recompute=recompute)) <= num_bytes

    return next(filter(fits, RECOMPUTED), "full")


def training_bytes(shape: ModelConfig, dtype: str, device: str, num_tokens: int, sizes: Sizes) -> int:
    """A micro-batch at its peak, beside weights, gradients and optimizer."""
    arguments = shape, dtype, device, num_tokens, sizes
    return activation_bytes(*arguments) + backward_bytes(*arguments)


def activation_bytes(shape: ModelConfig, dtype: str, device: str, num_tokens: int, sizes: Sizes) -> int:
    """What autograd keeps of a packed forward pass.

    A layer keeps the residual stream and its norm twice (4 D), queries, keys and values before and after rotation, the
    attention's output, gate and up (2 F) and their product (F). On CUDA each trace's keys are gathered behind those of
    its prompt. Recomputed with its products kept, it keeps its input, the four products (2 D, queries, keys and values,
    2 F) and the attention's output; recomputed wholly, its input.
    """
    kept = _layer_bytes(shape, dtype, device, sizes, sizes.recompute or "none")
    return num_tokens * (shape.num_layers * kept + 2 * DTYPE_BYTES[dtype] * shape.hidden_size)


def _layer_bytes(shape: ModelConfig, dtype: str, device: str, sizes: Sizes, recompute: str) -> int:
    """What autograd keeps of one token in one layer."""
    item, D, F = DTYPE_BYTES[dtype], shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    elements = 4 * D + 3 * queries + 3 * keys + 3 * F
    if device == "cuda":
        elements += round(2 * keys * _gathered_share(sizes))
    return {
        "none": item * elements + 4 * (shape.num_heads + 2),
        "selective": item * (3 * D + 2 * queries + 2 * keys + 2 * F) + 4 * shape.num_heads,
        "full": item * D,
    }[recompute]


def backward_bytes(shape: ModelConfig, dtype: str, device: str, num_tokens: int, sizes: Sizes) -> int:
    """The loss, or one layer on the way back, which is the larger: its widest gradients, and what it recomputes."""
    recomputed = _layer_bytes(shape, dtype, device, sizes, "none")
    recomputed -= _layer_bytes(shape, dtype, device, sizes, sizes.recompute or "none")
    # Beside an adapter the inner product's gradient has two parts, which autograd adds up.
    num_inner = 3 if sizes.adapter else 2
    gradients = DTYPE_BYTES[dtype] * (2 * shape.hidden_size + num_inner * shape.intermediate_size)
    return max(loss_bytes(shape, dtype, device, num_tokens), num_tokens * (recomputed + gradients))


def _gathered_share(sizes: Sizes) -> float:
    """Keys over tokens where every trace of a group has its prompt's keys before its own."""
    own = sizes.num_generations * (sizes.trace + sizes.answer)
    return (sizes.prompt * (1 + sizes.num_generations) + own) / (sizes.prompt + own)


def loss_bytes(shape: ModelConfig, dtype: str, device: str, num_tokens: int) -> int:
    """A chunk of logits; the hidden states and their gradients. The head's gradient is summed in place."""
    return _logit_bytes(shape, device, num_tokens) + 2 * DTYPE_BYTES[dtype] * shape.hidden_size * num_tokens


def pass_bytes(shape: ModelConfig, dtype: str, device: str, sizes: Sizes) -> int:
    """The widest layer of a pass over a cache, where nothing is kept for autograd, and the answers' logits."""
    num_tokens = max(PASS_TOKENS, (sizes.num_generations + 1) * sizes.answer)
    attention = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    width = 4 * shape.hidden_size + attention + 3 * shape.intermediate_size
    return DTYPE_BYTES[dtype] * num_tokens * width + _logit_bytes(shape, device, num_tokens)


def _logit_bytes(shape: ModelConfig, device: str, num_tokens: int) -> int:
    """A chunk of fp32 logits, with its product."""
    chunk = 4 * min(num_tokens, LOGIT_ROWS[device]) * (shape.vocab_size + shape.hidden_size)
    return min(chunk, CPU_LOGIT_BYTES) if device == "cpu" else chunk


def _weights(shape: ModelConfig, dtype: str, device: str) -> list[Part]:
    item, parameters = DTYPE_BYTES[dtype], num_parameters(shape)
    parts = [Part("weights", item * parameters, f"{parameters:,} parameters in {dtype}")]
    if device == "cpu":
        packed = item * _packed_matrices(shape)
        parts.append(Part("packed weights", packed, "the matrices once more, as decoding multiplies them"))
    return parts


def _adapter(dtype: str, sizes: Sizes) -> list[Part]:
    if not sizes.adapter:
        return []
    note = f"{sizes.adapter:,} parameters, the only ones trained, and the blocks that decoding multiplies by"
    return [Part("adapter", 4 * DTYPE_BYTES[dtype] * sizes.adapter, note)]


def _reserve(device: str) -> list[Part]:
    if device == "cpu":
        return []
    return [
        Part("context", CONTEXT_BYTES, "reserved for CUDA, its libraries and workspaces"),
        Part("graphs", GRAPH_BYTES, "reserved for CUDA graphs of the decode step"),
    ]


def _most_tokens(needed: Callable[[int], int], num_bytes: int) -> int:
    """The largest micro-batch that needs at most so many bytes, a multiple of 256."""
    low, high = 0, MAX_BATCH_TOKENS // BATCH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle * BATCH_STEP) <= num_bytes else (low, middle - 1)
    return low * BATCH_STEP


def _with_cache(plan: MemoryPlan, hint: str) -> MemoryPlan:
    """The plan with its keys and values: on CUDA what is left, on a CPU a fixed budget; what is lent at least.

    Raises:
        UserError: not even one group fits.
    """
    left, lent = plan.device_bytes - _sum(plan.parts), plan.lent_bytes
    budget = left + lent
    if plan.device == "cpu":
        budget = max(lent, min(budget, CPU_CACHE_BYTES, plan.device_bytes // 2))
    plan = replace(plan, cache_bytes=budget if left >= 0 else 0)
    if plan.num_slots == 0:
        sizes = plan.sizes
        raise UserError(
            f"{_short(plan)}, so {_gib(plan.cache_bytes)} GiB are there for keys and values; one group of a prompt of "
            f"{sizes.prompt:,} and {sizes.num_generations} traces of {sizes.trace:,} + {sizes.answer:,} tokens takes "
            f"{_gib(plan.group_bytes)}; {hint}"
        )
    return plan


def _short(plan: MemoryPlan) -> str:
    told = " + ".join(f"{part.name} {_gib(part.num_bytes)}" for part in plan.parts)
    return f"{plan.device} has {_gib(plan.device_bytes)} GiB of memory; {told} GiB are {_gib(_sum(plan.parts))}"


def _sum(parts) -> int:
    return sum(part.num_bytes for part in parts)


def _gib(num_bytes: int) -> str:
    """Four decimals where two would be nearly nothing."""
    return f"{num_bytes / GIB:.4f}" if 0 < num_bytes < GIB // 8 else f"{num_bytes / GIB:,.2f}"


def _small(num_bytes: int) -> str:
    return f"{num_bytes / 1024:g} KiB" if num_bytes >= 1024 else f"{num_bytes} bytes"
