"""Do networks without normalization transfer better than their twins with batch normalization? Paper, 6.2 and Table 4.

    python experiments/transfer/run.py --size cpu --pretrain DATA              # all networks; hours
    python experiments/transfer/run.py --size cpu --target clothing=DATA --target cifar=DATA
    python experiments/transfer/run.py --size cpu --table                      # the results as tables
    python experiments/transfer/run.py --size cpu --plot                       # transfer-cpu.png
    python experiments/transfer/run.py --size cpu --networks nfnet_micro ...   # a part of it

Networks are pre-trained on one data set (Tiny-ImageNet, say), then trained on a share of the labels of others: from
scratch, as a linear probe on frozen features, and fine-tuned. The rate is the best of a grid for seed 0, the same grid
for all; the other seeds use that rate. The seed draws the share. Everything else is what `normfree train` chooses.
A result that is there is not computed again. Pre-trained weights stay in runs/transfer-SIZE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from normfree.config import with_options
from normfree.data import open_dataset
from normfree.engine.device import keep_freed_memory, processor
from normfree.engine.loop import Diverged
from normfree.tasks.choice import choose_recipe
from normfree.tasks.classification import start
from normfree.tasks.probe import probe_weights

HERE = Path(__file__).parent
TWINS = {"nfnet_micro": "bn_nfnet_micro", "nf_resnet26": "bn_resnet26"}
# bn_resnet26 is no name of the zoo
OPTIONS: dict[str, dict[str, Any]] = {"bn_resnet26": {"model": "bn_resnet50", "depth": (2, 2, 2, 2)}}
METHODS = ("scratch", "probe", "tuned")
Result = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is computed. `seen`: training images of a run on a target, if that is within the range of `epochs`.

    `pixels`: in training and evaluation, everywhere.
    """

    pretraining: dict[str, Any]
    rates: tuple[float, ...]
    seeds: int
    percents: dict[str, tuple[int, ...]]
    seen: int = 30_000
    pixels: tuple[int, int] = (56, 64)
    networks: tuple[str, ...] = ("nfnet_micro", "nf_resnet26")
    epochs: tuple[int, int] = (20, 200)


SHARES = {"clothing": (1, 10, 100), "cifar": (1, 10)}
SIZES = {
    "check": Size({"steps": 20}, (0.05,), 1, dict.fromkeys(SHARES, (1,)), 100, (32, 32), ("nfnet_micro",), (1, 3)),
    "cpu": Size({"epochs": 14.0}, (0.0125, 0.05, 0.1), 3, SHARES),
    "full": Size({"epochs": 90.0}, (0.0125, 0.05, 0.1), 3, SHARES, seen=100_000),
}


def options_for(network: str, path: str, pixels: tuple[int, int], seed: int) -> dict[str, Any]:
    given = {"path": path, "train_px": pixels[0], "eval_px": pixels[1], "seed": seed}
    return given | OPTIONS.get(network, {"model": network})


def carry_out(given: dict[str, Any], folder: Path) -> Result:
    """Trains as `normfree train` does with the given options, which are evaluated once, at the end."""
    run, _, weights = choose_recipe(None, given)
    run = with_options(run, {"eval_every": 1e9})
    try:
        outcome = start(run, folder, (), weights)
    except Diverged as error:
        return {"failed": str(error), "top1": 0.0}
    return {"top1": outcome.last["top1"], "loss": outcome.last["loss"], "seconds": round(outcome.seconds, 1)}


def environment(args: argparse.Namespace) -> Result:
    return {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "beside": args.beside,
    }


def keep(args: argparse.Namespace, name: str, result: Result) -> Result:
    folder = HERE / "results" / args.size
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result | {"environment": environment(args)}, indent=1) + "\n")
    return result


def kept(args: argparse.Namespace, name: str) -> Result | None:
    path = HERE / "results" / args.size / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def pretrained(args: argparse.Namespace, network: str) -> Path:
    return args.runs / f"transfer-{args.size}" / network


def pretrain(args: argparse.Namespace, size: Size, network: str) -> None:
    folder = pretrained(args, network)
    if folder.exists():
        return
    result = carry_out(options_for(network, args.pretrain, size.pixels, 0) | size.pretraining, folder)
    keep(args, f"pretraining-{network}", result | {"data": Path(args.pretrain).name} | size.pretraining)


def share(path: str, percent: int, seed: int, folder: Path) -> int:
    """A data set with that share of the training images of each class, at least one; returns how many there are."""
    train, validation = open_dataset(path)
    targets = np.array(train.targets)
    rng = np.random.default_rng([seed, percent])
    rows = [rng.permutation(np.flatnonzero(targets == target)) for target in range(len(train.class_names))]
    chosen = [index for row in rows for index in row[: max(1, round(len(row) * percent / 100))].tolist()]
    for part, images, indices in (("train", train, chosen), ("validation", validation, range(len(validation)))):
        for index in indices:
            source = Path(str(images.source(index))).resolve()
            place = folder / part / images.class_names[images.targets[index]]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index}{source.suffix}").symlink_to(source)
    return len(chosen)


def transfer(args: argparse.Namespace, size: Size, network: str, target: str, path: str) -> None:
    weights = str(pretrained(args, network))
    for percent in size.percents[target]:
        for seed in range(size.seeds):
            with tempfile.TemporaryDirectory() as place:
                count = share(path, percent, seed, Path(place))
                name = f"{target}-{percent}-{network}"
                if kept(args, f"{name}-probe-seed{seed}") is None:
                    (probe,) = probe_weights(weights, place)
                    keep(args, f"{name}-probe-seed{seed}", {"top1": probe.linear.top1_percent, "images": count})
                epochs = float(round(min(max(size.epochs[0], size.seen / count), size.epochs[1])))
                given = options_for(network, place, size.pixels, seed) | {"epochs": epochs}
                for method in ("scratch", "tuned"):
                    init = {"init": weights} if method == "tuned" else {}
                    for rate in size.rates if seed == 0 else [best_rate(args, size, f"{name}-{method}")]:
                        full = f"{name}-{method}-rate{rate:g}-seed{seed}"
                        if kept(args, full) is None:
                            result = carry_out(given | init | {"lr": rate}, Path(place) / "run" / full)
                            keep(args, full, result | {"images": count, "epochs": epochs})


def best_rate(args: argparse.Namespace, size: Size, name: str) -> float:
    """By the accuracy of seed 0."""
    found = {rate: kept(args, f"{name}-rate{rate:g}-seed0") or {"top1": -1.0} for rate in size.rates}
    return max(found, key=lambda rate: found[rate]["top1"])


def accuracies(args: argparse.Namespace, size: Size) -> dict[tuple[str, int, str, str], list[float]]:
    """(target, percent, network, method) -> top-1 of the seeds that are there."""
    found = defaultdict(list)
    for target, percents in size.percents.items():
        for percent in percents:
            for network in (name for pair in TWINS.items() for name in pair):
                for method in METHODS:
                    name = f"{target}-{percent}-{network}-{method}"
                    rate = "" if method == "probe" else f"-rate{best_rate(args, size, name):g}"
                    for seed in range(size.seeds):
                        if result := kept(args, f"{name}{rate}-seed{seed}"):
                            found[target, percent, network, method].append(result["top1"])
    return found


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{error}" if values else ""


def table(args: argparse.Namespace, size: Size) -> None:
    found = accuracies(args, size)
    for network, twin in TWINS.items():
        if not any(key[2] in (network, twin) for key in found):
            continue
        columns = [f"{method}, {name}" for method in METHODS for name in (network, twin)]
        print(f"\n| labels | {' | '.join(columns)} | gain NF | gain BN |\n|{'---|' * (len(columns) + 3)}")
        for target, percents in size.percents.items():
            for percent in percents:
                cells = [spread(found[target, percent, name, m]) for m in METHODS for name in (network, twin)]
                for name in (network, twin):
                    scratch, tuned = (found[target, percent, name, method] for method in ("scratch", "tuned"))
                    cells.append(f"{mean(tuned) - mean(scratch):+.1f}" if scratch and tuned else "")
                print(f"| {target}, {percent} % | {' | '.join(cells)} |")


def plot(args: argparse.Namespace, size: Size) -> None:
    import matplotlib.pyplot as plt

    found = accuracies(args, size)
    networks = [name for name in TWINS if any(key[2] == name for key in found)]
    grid = plt.subplots(
        len(networks), len(size.percents), figsize=(10.5, 3.4 * len(networks)), layout="constrained", squeeze=False
    )
    styles = {"scratch": (":", "o"), "probe": ("--", "s"), "tuned": ("-", "^")}
    for row, network in zip(grid[1], networks, strict=True):
        for axes, (target, percents) in zip(row, size.percents.items(), strict=True):
            for name, colour in ((network, "tab:blue"), (TWINS[network], "tab:orange")):
                for method, (style, marker) in styles.items():
                    points = [(p, found[target, p, name, method]) for p in percents]
                    points = [(p, values) for p, values in points if values]
                    errors = [stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for _, v in points]
                    axes.errorbar(
                        [p for p, _ in points],
                        [mean(v) for _, v in points],
                        errors,
                        color=colour,
                        linestyle=style,
                        marker=marker,
                        markersize=5,
                        label=f"{name}, {method}",
                    )
            axes.set(title=target, xscale="log", xlabel="labels, %", ylabel="top-1, %", xticks=percents)
            axes.set_xticklabels(map(str, percents))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        row[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    grid[0].savefig(HERE / f"transfer-{args.size}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--pretrain", metavar="DATA", help="pre-train on these images, where no weights are there")
    parser.add_argument("--target", action="append", default=[], metavar="NAME=DATA", help="clothing or cifar")
    parser.add_argument("--networks", nargs="*", help="a part of the networks; else all with their twins")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where pre-trained weights are kept")
    parser.add_argument("--threads", type=int, help="of torch; as many as cores")
    parser.add_argument("--beside", default="nothing", help="what else the machine did, for the record")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    parser.add_argument("--plot", action="store_true", help="draw them")
    args = parser.parse_args()
    size = SIZES[args.size]
    torch.set_num_threads(args.threads or torch.get_num_threads())
    keep_freed_memory()
    networks = args.networks or [name for key in size.networks for name in (key, TWINS[key])]
    for network in networks if args.pretrain else ():
        pretrain(args, size, network)
    for target in args.target:
        name, _, path = target.partition("=")
        for network in networks:
            transfer(args, size, network, name, path)
    if args.table:
        table(args, size)
    if args.plot:
        plot(args, size)


if __name__ == "__main__":
    main()
