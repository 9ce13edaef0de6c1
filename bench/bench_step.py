"""A whole step, rollout + score + train, beside TRL's GRPOTrainer with a reward that forwards the answer again.

Both have the same model, the same prompts and answers, 8 prompts x 8 traces, AdamW, and traces of the same lengths: 64
tokens each, or ended by an EOS of probability 1/64 a token, at most 256: ours samples it, TRL's traces get their EOS
where ours did. Ours trains the answers as well.

    pip install nrt-fast[bench]; python bench/bench_step.py [--shapes 256-6-4096] [--lengths equal] [--rounds 3]

The last line is one JSON object of ratios, TRL's time over ours.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
from engine_peers import DELIMITER, EOS, NEW, PROMPT, SHAPES, G, P, make_ids, make_module, small_llama
from torch import Tensor
from train_peers import ANSWER, LONGEST, LR, MAX_GRAD_NORM, MEAN, owned, whole_step
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from nrt_fast import Engine
from nrt_fast.metrics import Timer
from nrt_fast.optim import AdamW
from nrt_fast.types import Example

Step = dict[str, Any]  # seconds of each phase, and the traces' lengths
BETAS = (0.9, 0.95)
TRL_ROWS = 8  # of a micro-batch; 64 at once are slower on a CPU
PHASES = ("rollout", "score", "train")


def our_steps(module: LlamaForCausalLM, examples: list[Example], longest: int, rounds: int) -> list[Step]:
    """Steps of the engine."""
    model = owned(module)
    engine = Engine(model, delimiter_id=DELIMITER, eos_id=EOS)
    weights = model.weights
    optimizer = AdamW(weights.flat, weights.leaves.values(), weights.num_matrix_elements, BETAS, 1e-8, 0.0)
    return [_our_step(engine, optimizer, examples, longest, step) for step in range(rounds)]


def _our_step(engine: Engine, optimizer: AdamW, examples: list[Example], longest: int, step: int) -> Step:
    timer = Timer()
    lengths = whole_step(
        engine, optimizer, examples, step, num_generations=G, longest=longest, batch_tokens=8192, timer=timer
    )
    return timer.take() | {"lengths": lengths}


class EndAt:
    """A logits processor: rows of the n-th batch get EOS as their last of ``lengths[n]`` tokens, the longest none."""

    def __init__(self, lengths: list[list[int]], longest: int):
        self.lengths, self.longest, self.width = iter(lengths), longest, sys.maxsize

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] <= self.width:  # a new batch
            self.prompt, self.ends = ids.shape[1], torch.tensor(next(self.lengths))
        self.width = ids.shape[1]
        length = self.width - self.prompt + 1
        scores[:, EOS] = -torch.inf
        if length < self.longest:
            last = (self.ends == length).nonzero()[:, 0]
            scores[last] = -torch.inf
            scores[last, EOS] = 0
        return scores


class StepTimes(TrainerCallback):
    """Whole steps of a trainer, of which ``phases`` are told by those who know."""

    def __init__(self):
        self.steps, self.phases = [], {}

    def on_step_begin(self, *args, **kwargs):
        self.phases, self.started = dict.fromkeys(("rollout", "score"), 0.0), time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        known = self.phases["rollout"] + self.phases["score"]
        self.steps.append(self.phases | {"train": time.perf_counter() - self.started - known})


def trl_steps(module: LlamaForCausalLM, examples: list[Example], longest: int, lengths: list[list[int]]) -> list[Step]:
    """The same of TRL, whose words are the ids' names, a step for each list of lengths."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    times, tokenizer = StepTimes(), _tokenizer(module.config.vocab_size)
    answers = {_text(e.prompt_ids): e.answer_ids for e in examples}

    def answer_logprob(prompts, completion_ids, **kwargs) -> list[float]:
        started = time.perf_counter()
        sequences = [
            [*tokenizer(prompt)["input_ids"], *ids, DELIMITER, *answers[prompt]]
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        scores = [
            float(score) for n in range(0, len(sequences), G) for score in _mean_logprobs(module, sequences[n : n + G])
        ]
        times.phases["score"] += time.perf_counter() - started
        times.phases["lengths"] = list(map(len, completion_ids))
        return scores

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, fp16=False, learning_rate=LR, lr_scheduler_type="constant",
            adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM,
            per_device_train_batch_size=TRL_ROWS, gradient_accumulation_steps=P * G // TRL_ROWS, num_generations=G,
            max_steps=len(lengths), max_completion_length=longest, temperature=1.0, top_k=0, top_p=1.0, beta=0.0,
            num_iterations=1, loss_type="cispo", epsilon_high=0.28, gradient_checkpointing=False, shuffle_dataset=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        dataset = Dataset.from_dict({"prompt": [_text(e.prompt_ids) for e in examples]})
        trainer = GRPOTrainer(
            model=module, reward_funcs=answer_logprob, args=config, train_dataset=dataset, processing_class=tokenizer,
            callbacks=[times],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        module.generate = partial(module.generate, logits_processor=[EndAt(lengths, longest)])
        trainer._generate = _timed(trainer._generate, times)
        trainer.train()
    return times.steps


def _timed(generate, times: StepTimes):
    def timed(*args, **kwargs):
        started = time.perf_counter()
        result = generate(*args, **kwargs)
        times.phases["rollout"] += time.perf_counter() - started
        return result

    return timed


@torch.no_grad()
def _mean_logprobs(module: LlamaForCausalLM, sequences: list[list[int]]) -> Tensor:
    """[N], padded on the left: all answers end together, and the head runs on them alone."""
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in sequences])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = module(
        ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=ANSWER + 1
    ).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(2, ids[:, -ANSWER:, None]).mean(dim=(1, 2))


def _text(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token=f"t{EOS}", padding_side="left")


def measure(shape: str, lengths: str, dtype: torch.dtype, rounds: int) -> float:
    """TRL's median step over ours; prints both's phases. Each side's first step warms up."""
    size, ragged = SHAPES[shape][0], lengths == "ragged"
    longest = LONGEST if ragged else NEW
    prompts, answers = (make_ids(size[2], P, length, seed=length).tolist() for length in (PROMPT, ANSWER))
    examples = [Example(p, prompts[p], answers[p], None, "", "", "") for p in range(P)]
    name = str(dtype).removeprefix("torch.")
    print(f"\n{shape}, {lengths}, {name}: {P} prompts of {PROMPT} x {G} traces, answers of {ANSWER}; seconds a step")

    def module() -> LlamaForCausalLM:
        made = make_module(small_llama(*size), dtype, "cpu", 1 / MEAN if ragged else 0.0, context=512)
        made.config.eos_token_id = made.generation_config.eos_token_id = EOS
        return made.requires_grad_(True)

    ours = our_steps(module(), examples, longest, rounds + 1)
    gc.collect()
    lengths = [step["lengths"] for step in ours]
    theirs = trl_steps(module(), examples, longest, lengths)
    gc.collect()
    assert [step["lengths"] for step in theirs] == lengths, "TRL's traces have other lengths"
    ratio = _told("TRL", theirs[1:]) / _told("nrt-fast", ours[1:])
    print(f"  ratio {ratio:.2f}", flush=True)
    return ratio


def _told(side: str, steps: list[Step]) -> float:
    """The median step's seconds; prints each phase's."""
    split = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
    total = statistics.median(sum(step[phase] for phase in PHASES) for step in steps)
    told = "  ".join(f"{phase} {seconds:7.3f}" for phase, seconds in split.items())
    mean_length = statistics.fmean(length for step in steps for length in step["lengths"])
    print(f"  {side:<9} {told}  step {total:7.3f}  mean length {mean_length:.1f}")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["256-6-4096", "512-8-32000"], choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", default=["equal", "ragged"], choices=["equal", "ragged"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=1, help="timed steps of each side, after one that warms up")
    options = parser.parse_args()
    try:
        import trl
    except ImportError:
        print("trl is not installed; pip install nrt-fast[bench] has it", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)
    print(f"torch {torch.__version__}, trl {trl.__version__}, {torch.get_num_threads()} threads")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    ratios = {
        f"{shape.split('-')[0]}_{lengths}_{dtype}": round(measure(shape, lengths, dtypes[dtype], options.rounds), 2)
        for shape in options.shapes for lengths in options.lengths for dtype in options.dtypes
    }  # fmt: skip
    print(json.dumps(ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
