"""Pictures of the lab's runs, one for each kind: held-out figures over the steps, means over seeds."""

from pathlib import Path

from lab_report import Record, chosen, kinds_of, presets_of

from nrt_fast.metrics import mean

INK, GREY = "#333333", "#bbbbbb"
COLORS = {"nrt-ws": "#2b6cb0", "jepo": "#c05621", "verifree": "#2f855a", "rlpr": "#b83280", "sft": "#333333"}
PANELS = {
    "accuracy": "held-out accuracy",
    "hard_token_gain": "gain on hard tokens, nats",
    "trace_length": "trace length, tokens",
    "entropy": "entropy, nats a token",
}


def pyplot():
    """matplotlib.pyplot without a screen, in the lab's style: the same figures give the same SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
                     "svg.hashsalt": "nrt-fast", "text.color": INK, "axes.labelcolor": INK}  # fmt: skip
    return plt


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Write objectives-KIND.svg for every kind; presets without a colour are grey."""
    plt, paths = pyplot(), []
    for kind in kinds_of(records):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 2.8), layout="constrained")
        for preset in sorted(presets_of(records), key=lambda preset: preset in COLORS):
            runs = chosen(records, kind, preset)
            for axis, name in zip(axes, PANELS):
                if preset == "sft" and name != "accuracy":
                    continue  # it has no traces
                values = [mean(list(column)) for column in zip(*(run["curve"][name] for run in runs))]
                axis.plot(runs[0]["curve"]["step"], values, lw=2 if preset in COLORS else 1,
                          color=COLORS.get(preset, GREY), label=preset if preset in COLORS else None)  # fmt: skip
        for axis, title in zip(axes, PANELS.values()):
            axis.set(title=title, xlabel="step")
        axes[0].set_ylim(0, 1)
        axes[0].legend(frameon=False, fontsize=7)
        paths.append(folder / f"objectives-{kind}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        plt.close(figure)
    return paths
