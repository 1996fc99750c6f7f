"""Trains a small NFNet with and without adaptive gradient clipping over a range of learning rates, and draws it.

    python experiments/agc_convergence/run.py --one adamw+agc --lr 0.016    # one run
    python experiments/agc_convergence/run.py --all                         # all of them, but for those that are there
    python experiments/agc_convergence/run.py --plot    # the figure in docs/images, the table in README.md

Every run is what `normfree train` does; optimizer and clipping are its options.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfree.config import ClassificationRun, ClassifierOptim, DataConfig, MachineConfig, ModelConfig
from normfree.engine.device import processor
from normfree.engine.loop import Diverged
from normfree.tasks.classification import start

HERE = Path(__file__).parent
IMAGE = HERE.parents[1] / "docs" / "images" / "agc-convergence.png"
RATES = {  # peak learning rates of the sweep, seed 0
    "sgd": (0.025, 0.05, 0.1, 0.2, 0.4),
    "sgd+agc": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2),
    "adamw": (0.001, 0.004, 0.008, 0.016, 0.032),
    "adamw+agc": (0.001, 0.004, 0.008, 0.016, 0.032),
}
REPEATED = {"sgd": (0.05, 0.1), "sgd+agc": (0.8,), "adamw": (0.004,), "adamw+agc": (0.008,)}  # with seeds 1 and 2
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.05}  # of weights; gains and biases have none
TRAIN_IMAGES, TEST_IMAGES, BATCH = 5120, 2000, 256
EPOCHS, WARMUP_EPOCHS = 5, 1
LAMBDA = 0.01  # the paper's, and the default


# --- one run ---


def subset(data: Path, folder: Path) -> None:
    """Links in `folder` to the first images of every class, equally many."""
    for part, name, count in (("train", "train", TRAIN_IMAGES), ("test", "validation", TEST_IMAGES)):
        classes = sorted(path for path in (data / part).iterdir() if path.is_dir())
        for images in classes:
            place = folder / name / images.name
            place.mkdir(parents=True)
            for image in sorted(images.iterdir())[: count // len(classes)]:
                (place / image.name).symlink_to(image.resolve())


def family(name: str) -> str:
    return "adamw" if name.startswith("adamw") else "sgd"


def configure(name: str, lr: float, data: str, seed: int) -> ClassificationRun:
    clips = name.endswith("+agc")
    optim = ClassifierOptim(
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=lr,
        warmup_epochs=WARMUP_EPOCHS,
        optimizer=family(name),
        weight_decay=WEIGHT_DECAY[family(name)],
        clip="agc" if clips else "none",
        clipping=LAMBDA if clips else None,
        label_smoothing=0.0,
        ema_decay=0.0,  # the average is the weights
    )
    pixels = DataConfig(data, train_px=32, eval_px=32, crop_style="shift")
    machine = MachineConfig(device="cpu", workers=0, log_every=1)
    return ClassificationRun(ModelConfig(width=(32, 64, 128, 128)), pixels, optim, machine, seed)


def train(name: str, lr: float, data: Path, seed: int) -> dict[str, Any]:
    """What happened, step by step; a run ends at a loss or gradient that is not finite."""
    result: dict[str, Any] = {"diverged_at_step": None}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subset(data, Path(folder, "images"))
        try:
            start(configure(name, lr, f"{folder}/images", seed), Path(folder, "run"))
        except Diverged as error:
            result["diverged_at_step"] = error.step
        lines = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    result["loss"] = [float(f"{line['loss']:.5g}") for line in steps]
    result["clipped_fraction"] = [round(line["clipped_fraction"], 4) for line in steps] if "+" in name else []
    result["top1"] = [round(line["top1"], 2) for line in lines if line["kind"] == "eval"]
    return describe(name, lr, seed, time.perf_counter() - began) | result


def describe(name: str, lr: float, seed: int, seconds: float) -> dict[str, Any]:
    """The head of a result: what was set, and where it ran."""
    return {
        "optimizer": name,
        "lr": lr,
        "seed": seed,
        "environment": {package: version(package) for package in ("normfree", "torch")}
        | {"cpu": processor(), "threads": torch.get_num_threads(), "seconds": round(seconds, 1)},
    }


# --- the figure and the table ---


def load_results() -> list[dict[str, Any]]:
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    return sorted(results, key=lambda r: (list(RATES).index(r["optimizer"]), r["lr"], r["seed"]))


def plot(results: list[dict[str, Any]]) -> None:
    """One row for each family: training loss of some runs, final accuracy of all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", width_ratios=(1.25, 1))
    for (left, right), kind in zip(axes, ("sgd", "adamw"), strict=True):
        mine = [r for r in results if family(r["optimizer"]) == kind]
        draw_losses(left, mine)
        draw_accuracies(right, mine)
    axes[0, 0].set_title("training loss, mean of 5 steps", fontsize=11)
    axes[0, 1].set_title("final test accuracy (open: other seeds)", fontsize=11)
    fig.suptitle("nfnet_nano at half width, 5,120 images of CIFAR-10, 100 steps at batch 256; AGC with λ = 0.01")
    fig.savefig(IMAGE, dpi=130)
    plt.close(fig)


STYLES = {  # colours of Okabe and Ito
    "sgd": dict(color="#D55E00", marker="s", ls="--", label="SGD"),
    "sgd+agc": dict(color="#0072B2", marker="o", ls="-", label="SGD, AGC"),
    "adamw": dict(color="#D55E00", marker="s", ls="--", label="AdamW"),
    "adamw+agc": dict(color="#0072B2", marker="o", ls="-", label="AdamW, AGC"),
}
SHOWN = {"sgd": 0.4, "sgd+agc": 0.4, "adamw": 0.016, "adamw+agc": 0.016}  # rates of the loss curves
TOP_LOSS = 2.9


def final_top1(result: dict[str, Any]) -> float:
    """In percent; a run that diverged knows nothing, like a constant answer."""
    return 10.0 if result["diverged_at_step"] is not None else result["top1"][-1]


def draw_losses(ax: Any, results: list[dict[str, Any]]) -> None:
    """Each optimizer at the same high rate, the plain one at the rate that suits it best as well."""
    first = [r for r in results if r["seed"] == 0]
    best = max((r for r in first if r["optimizer"] in ("sgd", "adamw")), key=final_top1)
    for r in first:
        if r is not best and r["lr"] != SHOWN[r["optimizer"]]:
            continue
        style = {key: value for key, value in STYLES[r["optimizer"]].items() if key != "marker"}
        loss = np.convolve(r["loss"], np.ones(5) / 5, "valid")
        name = f"{style['label']}, rate {r['lr']:g}" + (", its best" if r is best else "")
        shade = {"alpha": 0.45} if r is best and r["lr"] != SHOWN[r["optimizer"]] else {}
        ax.plot(np.arange(len(loss)) + 5, loss, lw=1.8, **style | {"label": name} | shade)
        if r["diverged_at_step"] is not None:
            step = int(np.argmax(loss > TOP_LOSS)) + 5
            ax.plot(step, TOP_LOSS, "x", color=style["color"], ms=9, mew=2, clip_on=False)
            ax.annotate(f"not finite at step {r['diverged_at_step']}", (step + 3, TOP_LOSS), va="center")
    ax.set(xlabel="step", ylabel="cross-entropy", ylim=(1.2, TOP_LOSS + 0.1))
    finish(ax, "lower left")


def draw_accuracies(ax: Any, results: list[dict[str, Any]]) -> None:
    """Against the learning rate; crosses at chance for runs that diverged."""
    for name in dict.fromkeys(r["optimizer"] for r in results):
        runs = [r for r in results if r["optimizer"] == name and r["seed"] == 0]
        others = [r for r in results if r["optimizer"] == name and r["seed"]]
        style = STYLES[name] | {"lw": 1.8, "ms": 6}
        ax.plot([r["lr"] for r in runs], [final_top1(r) for r in runs], **style)
        points = {"color": style["color"], "marker": style["marker"], "ls": "none", "ms": 6, "mfc": "none"}
        ax.plot([r["lr"] for r in others], [final_top1(r) for r in others], **points)
        lost = [r["lr"] for r in runs + others if r["diverged_at_step"] is not None]
        ax.plot(lost, [10.0] * len(lost), "x", color=style["color"], ms=11, mew=2.5)
    ax.axhline(10, color="grey", lw=0.8)
    ax.set(xscale="log", xlabel="peak learning rate", ylabel="top-1 (%)", ylim=(6, 56))
    rates = sorted({r["lr"] for r in results})
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.annotate("chance; a cross: loss not finite", (rates[0], 9.3), va="top", color="grey", fontsize=9)
    finish(ax, "upper left" if min(rates) > 0.01 else "center left")


def finish(ax: Any, legend: str) -> None:
    ax.legend(frameon=False, fontsize=9, loc=legend)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| optimizer | peak rate | seed | top-1 (%) | last training loss | units clipped, mean (largest) |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        step, shares = r["diverged_at_step"], r["clipped_fraction"]
        outcome = (
            f"{r['top1'][-1]:.1f} | {np.mean(r['loss'][-5:]):.2f}" if step is None else f"diverged, step {step} | -"
        )
        clipped = f"{np.mean(shares):.1%} ({max(shares):.0%})" if shares else "-"
        lines.append(f"| {r['optimizer']} | {r['lr']:g} | {r['seed']} | {outcome} | {clipped} |")
    return "\n".join(lines)


# --- the command ---


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="has train/CLASS and test/CLASS")
    parser.add_argument("--one", choices=RATES, help="optimizer of a run")
    parser.add_argument("--lr", type=float, help="its peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="carry out all runs that have no result yet")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    args = parser.parse_args()
    runs = [(args.one, args.lr, args.seed)] if args.one else []
    if args.all:
        runs += [(name, lr, 0) for name, rates in RATES.items() for lr in rates]
        runs += [(name, lr, seed) for name, rates in REPEATED.items() for lr in rates for seed in (1, 2)]
    for name, lr, seed in runs:
        out = HERE / "results" / f"{name}-lr{lr:g}-seed{seed}.json"
        if args.one or not out.exists():
            out.parent.mkdir(exist_ok=True)
            result = train(name, lr, args.data, seed)
            out.write_text(json.dumps(result) + "\n")
            print(f"{out.stem}: top-1 {final_top1(result):.1f} %", flush=True)
    if args.plot:
        results = load_results()
        plot(results)
        readme = HERE / "README.md"
        pattern = r"(?<=<!-- table -->\n).*?(?=\n<!-- /table -->)"
        readme.write_text(re.sub(pattern, lambda _: table(results), readme.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
