"""What flows between the stages, and the letters that name its dimensions.

Legend: P prompts, G traces per prompt, N = P G traces, T packed tokens, A answer tokens, V vocabulary, D model width,
H query heads, K key/value heads, E head width, S key slots. A suffix is a shape: rewards_N, logits_TV. cu_seqlens are
int32 prefix sums that start at 0. Log-probabilities are natural logs in fp32. Host tensors end in _cpu, counts start
with num_, units are in names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where (file, row, field), what would be valid. Exit code 2."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


TRACE, FORMAT, ANSWER = 0, 1, 2  # LossTokens.kind_A


@dataclass(frozen=True)
class Example:
    """One question with its reference answer, tokenised apart from each other.

    Attributes:
        uid: position of the row in its data set; keys the sampling noise.
        prompt_ids: ids of the prompt after the chat template.
        answer_ids: ids of the reference answer, closed by EOS.
        hard_positions: positions in answer_ids that the data declares hard, or None where it declares nothing.
        question: the question as shown to people.
        answer: the answer as shown to people.
        where: "file, row N", for messages.
        aliases: other answers that are right as well; evaluation alone reads them.
    """

    uid: int
    prompt_ids: list[int]
    answer_ids: list[int]
    hard_positions: tuple[int, ...] | None
    question: str
    answer: str
    where: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Traces:
    """Sampled traces of P prompts, G each, as nested lists ``[P][G]``.

    Attributes:
        trace_ids: sampled ids z, without the delimiter; a sampled EOS that ended the trace is its last id.
        logprobs: fp32 log-probability of each id of z under the sampling distribution (temperature included).
        delimiter_logprobs: the same of the delimiter where it was sampled, None where the trace was cut.
    """

    trace_ids: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    delimiter_logprobs: list[list[float | None]]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the reference answers at temperature 1, natural logs in fp32.

    Attributes:
        logprobs: ``[P][G]`` tensors [A_p], log c.
        baseline_logprobs: [P] tensors [A_p], log b of the empty trace.
    """

    logprobs: list[list[Tensor]]
    baseline_logprobs: list[Tensor]


@dataclass(frozen=True)
class Sample:
    """One held-out item as the model handled it, for people.

    Attributes:
        trace, answer: sampled trace and the greedy answer after it.
        reference: the answer that the data has.
        trace_tokens, trace_logprobs: text of each sampled id, and its log-probability.
        reference_tokens: text of each id of the reference answer, EOS included.
        log_b, log_c: their log-probabilities without and with the trace.
        hard_positions: those of them that count as hard.
    """

    question: str
    trace: str
    answer: str
    reference: str
    trace_tokens: list[str]
    trace_logprobs: list[float]
    reference_tokens: list[str]
    log_b: list[float]
    log_c: list[float]
    hard_positions: list[int]


@dataclass(frozen=True)
class LossTokens:
    """Every loss token of one optimiser step, trace after trace: z, the delimiter, y* if it has a loss. Fixed before
    micro-batching.

    A trace's inputs are its targets without the last one, so the same ids serve as both.

    Attributes:
        prompt_ids: [sum of prompt lengths] int64, prompt after prompt.
        cu_prompts: [P + 1] int64.
        targets_A: [A] int64.
        cu_traces: [N + 1] int64 into targets_A.
        cu_groups: [P + 1] int64 into the traces.
        kind_A: [A] int8: TRACE, FORMAT or ANSWER.
        weight_A: [A] fp32: advantage, format coefficient or answer weight, divided by nothing yet.
        old_logprobs_A: [A] fp32: the sampler's log-probability, the scorer's in the answer, 0 of an appended delimiter.
        inv_temperature_A: [A] fp32: what logits are multiplied by.
        counted_A: [A] bool: some term of the loss reads the token.
        normalizer: the one number that the summed loss is divided by.
    """

    prompt_ids: Tensor
    cu_prompts: Tensor
    targets_A: Tensor
    cu_traces: Tensor
    cu_groups: Tensor
    kind_A: Tensor
    weight_A: Tensor
    old_logprobs_A: Tensor
    inv_temperature_A: Tensor
    counted_A: Tensor
    normalizer: float


@dataclass(frozen=True)
class BatchTokens:
    """A packed batch's part of the arrays of LossTokens, on the device; A counts its own loss tokens here, and only
    those that some term of the loss reads.

    Attributes:
        targets_A, inv_temperature_A, weight_A, old_logprobs_A, kind_A: as in LossTokens.
    """

    targets_A: Tensor
    inv_temperature_A: Tensor
    weight_A: Tensor
    old_logprobs_A: Tensor
    kind_A: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Groups packed without padding: each prompt once, followed by its traces.

    Index arrays that only the host reads stay on the CPU.

    Attributes:
        tokens_T: [T] int64 input ids.
        positions_T: [T] int64; every trace goes on from the end of its prompt.
        cu_seqlens: [S + 1] int32, on the CPU: segments in order, a prompt and then its traces, group after group.
        num_traces_M: [M] int64, on the CPU: traces of each group in this batch.
        hidden_A: [A] int64 into T: the hidden state that predicts a loss token. The prompt's last one serves the
            first token of all its traces.
        copies_A, cu_copies: [A] and [T + 1] int64, where each hidden state stands in hidden_A: see ops.gather_rows.
        rows_A: [A] int64, on the CPU, into the arrays of LossTokens.
        loss: what stands there, in the order of rows_A.
    """

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    num_traces_M: Tensor
    hidden_A: Tensor
    copies_A: Tensor
    cu_copies: Tensor
    rows_A: Tensor
    loss: BatchTokens
