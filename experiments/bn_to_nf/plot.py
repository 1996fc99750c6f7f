"""Draws results/*.json and renews the table in README.md: python experiments/bn_to_nf/plot.py"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
BATCHES = (4, 32)
STYLES = {  # blue and orange of Okabe and Ito, told apart in grey by dash and marker, too
    "bn": dict(color="#D55E00", linestyle="--", marker="s", label="batch normalization"),
    "nf": dict(color="#0072B2", linestyle="-", marker="o", label="converted, normalizer-free"),
}
LR = 0.01  # of the runs in the figures
SMOOTHING_POINTS = 5  # of 128 images each

Result = dict[str, Any]


def load_results() -> list[Result]:
    """Sorted by network, batch size, normalization and learning rate, that of the figures first."""
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]

    def key(result: Result) -> tuple:
        s = result["settings"]
        return s["model"], s["batch"], s["norm"], -s["lr"], s["clipping"] or 0

    return sorted(results, key=key)


def in_figures(result: Result) -> bool:
    """The others are controls: batch normalization with another learning rate, or clipped."""
    s = result["settings"]
    return s["lr"] == LR and (s["norm"] == "nf" or s["clipping"] is None)


def smooth(values: list[float]) -> list[float]:
    """Centred moving average, shorter at the ends."""
    half = SMOOTHING_POINTS // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_loss(ax: Axes, result: Result, norm: str) -> None:
    style = {k: v for k, v in STYLES[norm].items() if k != "marker"}
    loss = result["train_loss"]
    epochs = [i * len(result["epochs"]) / len(loss) for i in range(1, len(loss) + 1)]
    ax.plot(epochs, loss, color=style["color"], alpha=0.4, lw=0.7)
    ax.plot(epochs, smooth(loss), lw=1.8, **style)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator([1.5, 2, 3, 4, 6]))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def draw_top1(ax: Axes, result: Result, norm: str) -> None:
    top1 = [epoch["top1"] for epoch in result["epochs"]]
    ax.plot(range(1, len(top1) + 1), top1, lw=1.8, markersize=5, **STYLES[norm])
    ax.set_xlim(0.8, len(top1) + 0.2)


def figure(results: list[Result], draw: Any, title: str, ylabel: str, ylim: tuple[float, float], path: Path) -> None:
    """One panel for each network (columns) and batch size (rows)."""
    fig, axes = plt.subplots(
        len(BATCHES), len(MODELS), figsize=(10, 5.6), sharex="col", sharey=True, layout="constrained"
    )
    for row, batch in enumerate(BATCHES):
        for column, model in enumerate(MODELS):
            ax = axes[row, column]
            for result in results:
                settings = result["settings"]
                if (settings["model"], settings["batch"]) == (model, batch) and in_figures(result):
                    draw(ax, result, settings["norm"])
            ax.set_title(f"{model}, batch {batch}", fontsize=11)
            ax.set_ylim(*ylim)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            ax.xaxis.get_major_locator().set_params(integer=True)
            if row == len(BATCHES) - 1:
                ax.set_xlabel("epoch")
            if column == 0:
                ax.set_ylabel(ylabel)
    fig.suptitle(title, fontsize=12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def table(results: list[Result]) -> str:
    """Markdown: one row for each run."""
    lines = [
        "| network | batch | normalization | epochs | peak rate | λ of AGC | last top-1 (%) | best top-1 (%) "
        "| last training loss | last validation loss | units clipped in the last epoch, mean (largest) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        s, last = result["settings"], result["epochs"][-1]
        best = max(epoch["top1"] for epoch in result["epochs"])
        clipped = f"{last['mean_clipped_fraction']:.1%} ({last['largest_clipped_fraction']:.0%})"
        lines.append(
            f"| {s['model']} | {s['batch']} | {'batch' if s['norm'] == 'bn' else 'none'} | {len(result['epochs'])} "
            f"| {s['lr']:g} | {s['clipping'] or '-'} | {last['top1']:.1f} | {best:.1f} | {last['train_loss']:.2f} "
            f"| {last['validation_loss']:.2f} | {clipped if s['clipping'] else '-'} |"
        )
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    results = load_results()
    IMAGES.mkdir(parents=True, exist_ok=True)
    title = "torchvision networks from scratch, 3,068 clothing photographs at 48 px: "
    figure(results, draw_loss, title + "training loss", "loss", (1.4, 7.5), IMAGES / "convert-loss.png")
    figure(results, draw_top1, title + "validation accuracy", "top-1 (%)", (0, 70), IMAGES / "convert-accuracy.png")
    readme = HERE / "README.md"
    text, count = re.subn(
        r"(?<=<!-- table -->\n).*?(?=\n<!-- /table -->)", lambda _: table(results), readme.read_text(), flags=re.DOTALL
    )
    assert count == 1
    readme.write_text(text)


if __name__ == "__main__":
    main()
