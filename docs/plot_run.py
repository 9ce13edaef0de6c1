"""Draw reward and held-out gain of a run: ``python docs/plot_run.py runs/demo docs/demo.svg``."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nrt_fast.metrics import read_metrics

INK, BLUE, ORANGE = "#333333", "#2b6cb0", "#c05621"


def main(run: Path, target: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    measured = [row for row in rows if "eval/hard_token_gain" in row]
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
                     "svg.hashsalt": "nrt-fast", "text.color": INK, "axes.labelcolor": INK}  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    left.plot([row["step"] for row in rows], [row["reward"] for row in rows], color=BLUE, alpha=0.25, lw=1)
    left.plot(*_smooth(rows, "reward"), color=BLUE, lw=2)
    left.set(title="training reward", xlabel="step", ylim=(0, None))
    steps = [0, *(row["step"] for row in measured)]
    for name, color, label in (("hard_token_gain", ORANGE, "hard tokens"), ("gain", BLUE, "all tokens")):
        right.plot(steps, [summary["before"][name], *(row[f"eval/{name}"] for row in measured)], "o-", ms=3, lw=2,
                   color=color, label=label)  # fmt: skip
    right.axhline(0, color=INK, lw=0.5)
    right.set(title="held-out gain of thinking, nats a token", xlabel="step")
    right.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


def _smooth(rows: list[dict], name: str, window: int = 10) -> tuple[list[int], list[float]]:
    values = [row[name] for row in rows]
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
    return [row["step"] for row in rows], means


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
