"""A run that stops and goes on equals one that never stopped, on a CPU bit for bit.

    python examples/resume.py OUTPUT_DIR

On the command line the same thing is Ctrl-C, and the same command again.
"""

import sys
from dataclasses import replace
from pathlib import Path

from nrt_fast import TrainConfig, train


def main(output_dir: str | Path, num_steps: int = 6, **fields) -> bool:
    """Train once in one go and once in two; returns whether the trained weights are the same bytes."""
    whole, stopped = Path(output_dir) / "whole", Path(output_dir) / "stopped"
    config = TrainConfig(**{"num_eval_prompts": 64, "prompts_per_step": 8, "max_steps": num_steps} | fields)

    train(replace(config, output_dir=str(whole)))
    train(replace(config, output_dir=str(stopped), max_steps=num_steps // 2))
    train(replace(config, output_dir=str(stopped)))  # goes on from the newest checkpoint: max_steps may grow

    same = (whole / "final/model.safetensors").read_bytes() == (stopped / "final/model.safetensors").read_bytes()
    print("the weights are the same" if same else "the weights differ")
    return same


if __name__ == "__main__":
    main(*sys.argv[1:])
