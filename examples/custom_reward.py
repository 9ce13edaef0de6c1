"""A reward of one's own, in a loop of one's own: the engine runs on a transformers model's live weights.

    python examples/custom_reward.py [FOLDER]        a Hugging Face folder; the built-in starter if absent

The reward is nrt-ws's, less a price for every token of the trace. The loss is plain policy gradient.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nrt_fast import Engine, Model, rewards
from nrt_fast.starter import MODEL_DIR, tasks

PRICE_PER_TOKEN = 0.002


def main(folder: str | Path = MODEL_DIR, num_steps: int = 10, num_prompts: int = 8) -> list[float]:
    """Train a few steps; returns the mean reward of each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4)
    delimiter = tokenizer.convert_tokens_to_ids("</think>")
    engine = Engine(Model.from_hf(module), delimiter_id=delimiter, eos_id=tokenizer.eos_token_id)

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_of(question: str) -> str:
        turns = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    pairs = tasks.rows("train", num_steps * num_prompts, seed=0)
    prompts = [ids_of(prompt_of(pair["question"])) for pair in pairs]
    answers = [[*ids_of(pair["answer"]), tokenizer.eos_token_id] for pair in pairs]

    means = []
    for step in range(num_steps):
        part = slice(step * num_prompts, (step + 1) * num_prompts)
        traces = engine.rollout(prompts[part], num_generations=8, max_trace_length=40, seed=0, step=step)
        scores = engine.score(prompts[part], traces.trace_ids, answers[part])

        reward, _ = rewards.aggregate(scores.logprobs, scores.baseline_logprobs, kind="ws_log")
        lengths = [torch.tensor([float(len(ids)) for ids in group]) for group in traces.trace_ids]
        reward = [reward_G - PRICE_PER_TOKEN * length_G for reward_G, length_G in zip(reward, lengths, strict=True)]
        advantage, _ = rewards.advantages(reward, kind="grpo", std_floor=0.002)

        optimizer.zero_grad()
        groups = zip(prompts[part], traces.trace_ids, traces.delimiter_logprobs, advantage, strict=True)
        for prompt, group, ends, advantage_G in groups:
            for ids, end, weight in zip(group, ends, advantage_G / (num_prompts * len(group)), strict=True):
                sampled = [*ids, delimiter] if end is not None else ids
                row = torch.tensor([prompt + sampled])
                logprobs = module(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                (-weight * logprobs.gather(1, row[0, len(prompt) :, None]).sum()).backward()
        optimizer.step()
        means.append(float(torch.cat(reward).mean()))
        print(f"step {step + 1}: reward {means[-1]:+.3f}, trace length {float(torch.cat(lengths).mean()):.1f}")
    return means


if __name__ == "__main__":
    main(*sys.argv[1:])
