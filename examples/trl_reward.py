"""The NRT reward in TRL's GRPOTrainer, on the built-in model and tasks; needs pip install 'nrt-fast[trl]'.

    python examples/trl_reward.py OUTPUT_DIR

With your own model and data nothing else changes: the data set has the columns prompt and answer.
"""

import sys

from nrt_fast.adapters.trl import nrt_reward
from nrt_fast.starter import MODEL_DIR, tasks


def main(output_dir: str, num_steps: int = 20) -> list[float]:
    """Train; return each step's mean reward."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rows = tasks.rows("train", 256, seed=0)
    dataset = Dataset.from_dict({
        "prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
        "answer": [row["answer"] for row in rows],
    })  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL_DIR).float(),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        reward_funcs=[nrt_reward],
        train_dataset=dataset,
        args=GRPOConfig(
            output_dir, use_cpu=True, bf16=False, max_steps=num_steps, per_device_train_batch_size=64,
            num_generations=8, max_completion_length=40, learning_rate=3e-4, logging_steps=1, report_to="none",
            save_strategy="no", scale_rewards="none",  # the std of a group may be rounding alone
        ),
    )  # fmt: skip
    trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
