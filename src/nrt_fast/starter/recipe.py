"""Recipe of the starter model: `python -m nrt_fast.starter.recipe --output_dir FOLDER` builds it from nothing.

The starter is pretrained on documents `question <think> trace </think> answer`. It first learns how to work problems
out, then the habits of a writer who seldom does: most traces ramble or repeat the question, and the answer after them
is a guess. Native Reasoning Training has this weak habit of useful thinking to cultivate. It never sees these
documents, only the questions and answers of `tasks.rows`.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from nrt_fast.starter import MODEL_DIR, tasks

PAD, UNK, BOS, EOS, THINK, END = SPECIAL_TOKENS = ["<pad>", "<unk>", "<bos>", "<eos>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' " + EOS + "' }}"
    "{% else %}{{ '" + BOS + " ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' " + THINK + "' }}{% endif %}"
)
LESSONS = {"careful": 100}
HABITS = {"ramble": 50, "echo": 9, "careful": 16, "sloppy": 9, "lazy": 9, "empty": 7}
"""Percentage of each style of thinking. Rambling leads, so that the most likely trace is a useless one."""
SLIP_RATE = 0.2
RAMBLES = [
    "let me see",
    "this is a hard one",
    "it looks easy at first",
    "let me just guess",
    "maybe it is fine",
    "i do not know",
]
IGNORE = -100
NUM_ROWS, ROW_LENGTH = 12, 192
LESSON_SHARE = 0.6
MAX_LENGTH = 256
Families = dict[str, type[tasks.Problem]]
Think = Callable[[random.Random, tasks.Problem, dict[str, int]], tuple[str, list[str]]]
"""(rng, problem, percentages of styles) -> a trace, and the hard words of the answer that it leads to."""


def ramble(rng: random.Random) -> str:
    """Talk without content: a few of the empty phrases, in any order."""
    return " , ".join(["hmm", *rng.sample(RAMBLES, rng.randrange(1, 4))])


def echo(rng: random.Random, question: str) -> str:
    """Repeat a piece of the question."""
    words = question.split()
    start = rng.randrange(len(words) - 3)
    return " ".join(["well", *words[start : start + rng.randrange(3, 9)]])


def slip(rng: random.Random) -> tasks.Step:
    """Make a thinker who sometimes writes down another result than the right one."""
    return lambda right, options: rng.choice(options) if rng.random() < SLIP_RATE else right


def think(rng: random.Random, problem: tasks.Problem, styles: dict[str, int]) -> tuple[str, list[str]]:
    """Draw a trace in one of the styles, and the hard words of the answer that it leads to."""
    guess = [rng.choice(options) for options in problem.options]
    style = rng.choices(list(styles), styles.values())[0]
    if style == "empty":
        return "", guess
    if style == "ramble":
        return ramble(rng), guess
    if style == "echo":
        return echo(rng, problem.question), guess
    lines, results = problem.think(slip(rng) if style == "sloppy" else tasks.careful)
    if style == "lazy":
        lines, results = lines[: rng.randrange(1, len(lines))], guess
    return "so " + " , ".join(lines), results


def document(
    rng: random.Random, problem: tasks.Problem, styles: dict[str, int], think: Think = think
) -> tuple[str, str]:
    """Write one document as (prompt, continuation)."""
    trace, hard_words = think(rng, problem, styles)
    answer = problem.sentence.format(*hard_words)
    return f"{BOS} {problem.question} {THINK}", " ".join(f"{trace} {END} {answer} {EOS}".split())


def build_tokenizer(families: Families = tasks.FAMILIES, think: Think = think) -> Tokenizer:
    """Give every word of the documents an id of its own."""
    rng, source = random.Random(0), tasks.problems("train", 0, families)
    documents = (document(rng, next(source)[1], HABITS, think) for _ in range(20_000))
    words = {word for texts in documents for text in texts for word in text.split()}
    vocabulary = {word: index for index, word in enumerate(SPECIAL_TOKENS + sorted(words - set(SPECIAL_TOKENS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def build_model(vocab_size: int, width: int = 128) -> LlamaForCausalLM:
    """Make an untrained model of four layers, with heads of 32; the starter has 0.7 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=SPECIAL_TOKENS.index(BOS),
            eos_token_id=SPECIAL_TOKENS.index(EOS),
            pad_token_id=SPECIAL_TOKENS.index(PAD),
        )
    )


def packed_row(documents: Iterator[tuple[str, str]], vocabulary: dict[str, int]) -> list[tuple[int, int, int]]:
    """Fill a row of (token id, position, label) with documents, the last one cut; prompts carry no label."""
    row: list[tuple[int, int, int]] = []
    while len(row) < ROW_LENGTH:
        prompt, rest = next(documents)
        prompt_length = len(prompt.split())
        ids = [vocabulary[word] for word in f"{prompt} {rest}".split()]
        row += [(token, i, token if i >= prompt_length else IGNORE) for i, token in enumerate(ids)]
    return row[:ROW_LENGTH]


def batches(
    vocabulary: dict[str, int], num_steps: int, seed: int, families: Families = tasks.FAMILIES, think: Think = think
) -> Iterator[torch.Tensor]:
    """Draw a batch for every step, [3, NUM_ROWS, ROW_LENGTH]: ids, positions, labels; lessons first, then habits."""
    rng, source = random.Random(seed), tasks.problems("train", seed, families)
    for step in range(num_steps):
        styles = LESSONS if step < LESSON_SHARE * num_steps else HABITS
        documents = (document(rng, problem, styles, think) for _, problem in source)
        yield torch.tensor([packed_row(documents, vocabulary) for _ in range(NUM_ROWS)]).permute(2, 0, 1)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Give the matrices of the layers to Muon, which learns these tasks in far fewer steps, and the rest to AdamW."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight, *(weight for weight in model.parameters() if weight.ndim == 1)]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Warm up linearly over the first 50 steps, then follow a cosine to a twentieth."""
    return min((step + 1) / 50, 0.525 + 0.475 * math.cos(math.pi * step / num_steps))


def pretrain(
    model: LlamaForCausalLM, vocabulary: dict[str, int], num_steps: int, seed: int,
    families: Families = tasks.FAMILIES, think: Think = think,
) -> None:  # fmt: skip
    """Train on documents that are drawn freshly for every step."""
    for step, loss in enumerate(fit(model, batches(vocabulary, num_steps, seed, families, think), num_steps)):
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss:.3f}", flush=True)


def fit(model: LlamaForCausalLM, batches: Iterable[Iterable[torch.Tensor]], num_steps: int) -> Iterator[float]:
    """Train with plain cross-entropy on batches of ids, positions and labels; yields the loss of each step."""
    optimizers = build_optimizers(model)
    schedulers = [LambdaLR(optimizer, partial(learning_rate_factor, num_steps=num_steps)) for optimizer in optimizers]
    for ids_RT, positions_RT, labels_RT in batches:
        loss = model(input_ids=ids_RT, position_ids=positions_RT, use_cache=False, labels=labels_RT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in optimizers + schedulers:
            stepper.step()
        model.zero_grad()
        yield loss.item()


def tokenizer_config() -> dict[str, object]:
    """Describe the tokenizer in words that transformers 4 and 5 both read."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "additional_special_tokens": [THINK, END],
        "model_max_length": MAX_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],  # token types, which transformers 4 adds, fit no Llama
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output_dir: Path) -> None:
    """Save a Hugging Face folder, with weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    (output_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n")


def build(
    output_dir: Path, num_steps: int, seed: int, width: int = 128, families: Families = tasks.FAMILIES,
    think: Think = think,
) -> None:  # fmt: skip
    """Build a model from nothing: the starter by default, or one that knows other problems and habits."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(families, think)
    model = build_model(tokenizer.get_vocab_size(), width)
    pretrain(model, tokenizer.get_vocab(), num_steps, seed, families, think)
    save(model, tokenizer, output_dir)


def main() -> None:
    """Build the starter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=MODEL_DIR)
    parser.add_argument("--num_steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    build(args.output_dir, args.num_steps, args.seed)


if __name__ == "__main__":
    main()
