"""Data of one's own: rows with names of their own to a file, then a run on it.

    python examples/custom_data.py OUTPUT_DIR

Replace ``rows`` by whatever reads your questions and answers. ``score`` and ``eval`` take the same file and fields.
"""

import json
import random
import sys
from pathlib import Path

from nrt_fast import TrainConfig, train

PLACES = ["first", "second", "third", "fourth", "fifth"]


def rows(num_rows: int, seed: int = 0):
    """Questions with one reference answer each; the characters of it that are hard to guess are optional."""
    rng = random.Random(seed)
    for _ in range(num_rows):
        digits, place = rng.sample(range(10), 5), rng.randrange(5)
        answer = f"the digit in that place is {sorted(digits)[place]} ."
        yield {
            "case": {"text": f"sort {' '.join(map(str, digits))} , which comes {PLACES[place]} ?"},
            "expert": answer,
            "hard_spans": [[len(answer) - 3, len(answer) - 2]],
        }


def main(output_dir: str | Path, num_rows: int = 400, **fields) -> dict:
    """Write the file, train on it, return what summary.json holds."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(num_rows)))
    config = TrainConfig(
        dataset_name=str(path),
        prompt_field="case.text",
        answer_field="expert",
        output_dir=str(output_dir / "run"),
        **{"num_eval_prompts": 64, "max_steps": 20, "prompts_per_step": 8, "learning_rate": 3e-4} | fields,
    )
    summary = train(config)
    before, after = summary["before"], summary["after"]
    print(f"right answers: {before['accuracy']:.0%} before, {after['accuracy']:.0%} after {summary['steps']} steps")
    return summary


if __name__ == "__main__":
    main(*sys.argv[1:])
