"""Detectors without normalization beside their twins with batch normalization, by batch size.

    python experiments/detection/run.py DATA                               # as `normfree detect train DATA`
    python experiments/detection/run.py DATA --twin --set batch_size=1     # a backbone with batch normalization
    python experiments/detection/run.py DATA --init WEIGHTS --set epochs=40 px=256 --seed 1
    python experiments/detection/run.py --table                            # the results as a table
    python experiments/detection/run.py --plot                             # scenes.png: mask AP50 by batch size

DATA may be made by scenes.py. Results go to results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from normfree.config import DetectionRun, options_of
from normfree.engine.device import keep_freed_memory, processor
from normfree.engine.loop import Diverged
from normfree.tasks.detection.choice import choose_recipe
from normfree.tasks.detection.task import start

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def configure(args: argparse.Namespace) -> DetectionRun:
    given: dict[str, Any] = {"path": args.data, "seed": args.seed} | ({"init": args.init} if args.init else {})
    for option in args.set:
        name, _, value = option.partition("=")
        if name not in options_of(DetectionRun()):
            raise SystemExit(f"no option {name}")
        values = json.loads(value) if value[:1] in "[0123456789ntf" else value
        given[name] = tuple(values) if isinstance(values, list) else values
    if args.twin:
        given["backbone"] = "bn_nfnet_micro"
    return choose_recipe(None, given)[0]


def carry_out(run: DetectionRun, keep: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = start(run, keep or Path(folder))
        except Diverged as error:
            return {"failed": str(error)}
        lines = [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    speeds = sorted(line["images_per_s"] for line in lines if line["kind"] == "train")
    return {
        "minutes": round((lines[-1]["time"] - lines[0]["time"]) / 60, 2),
        "images_per_s": speeds[len(speeds) // 2],
        "last": outcome.last,
        "evaluations": [{k: v for k, v in line.items() if k not in ("kind", "time")} for line in evals],
    }


def results() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def table() -> None:
    columns = ("run", "batch", "epochs", "box AP", "box AP50", "mask AP", "mask AP50", "minutes")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, run in results().items():
        optim = run["config"]["optim"]
        figures = [run.get("last", {}).get(key) for key in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")]
        cells = ["diverged" if value is None else f"{100 * value:.1f} %" for value in figures]
        print(
            f"| {name} | {optim['batch_size']} | {optim['epochs']:g} | {' | '.join(cells)} | {run.get('minutes', '')} |"
        )


def plot() -> None:
    import matplotlib.pyplot as plt

    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for name, run in results().items():
        if name.startswith("scenes-"):
            kind = "BN" if run["config"]["model"]["backbone"].startswith("bn_") else "NF"
            value = 100 * run["last"]["mask_ap50"] if "last" in run else 0.0
            found[kind, run["config"]["optim"]["batch_size"]].append(value)
    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    batches = sorted({batch for _, batch in found})
    for kind, colour, label in (("NF", "tab:blue", "without normalization, AGC"), ("BN", "tab:orange", "batch norm")):
        rows = [(batches.index(batch), values) for (k, batch), values in sorted(found.items()) if k == kind]
        axes.plot([x for x, _ in rows], [mean(values) for _, values in rows], "-o", color=colour, label=label)
        for x, values in rows:
            axes.plot([x] * len(values), values, ".", color=colour, alpha=0.5)
    axes.set(xlabel="images in a batch", ylabel="mask AP50 on 100 held-out scenes, %", ylim=(0, 100))
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "scenes.png", dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="what normfree detect train takes")
    parser.add_argument("--twin", action="store_true", help="bn_nfnet_micro")
    parser.add_argument("--init", help="weights of the backbone")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run")
    parser.add_argument("--threads", type=int, help="of torch; as many as cores")
    parser.add_argument("--beside", default="nothing", help="what else the machine did, for the record")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    parser.add_argument("--plot", action="store_true", help="draw the results on scenes")
    args = parser.parse_args()
    if args.table or args.plot:
        table() if args.table else plot()
        return
    torch.set_num_threads(args.threads or torch.get_num_threads())
    keep_freed_memory()
    run = configure(args)
    kind = "bn" if args.twin else "nf"
    name = args.name or f"{Path(args.data).name}-{kind}-batch{run.optim.batch_size}-seed{args.seed}"
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": processor(),
        "beside": args.beside,
    }
    config = asdict(run)
    config["data"]["path"] = Path(args.data).name  # names, not places
    config["model"]["init"] = args.init and Path(args.init).parent.name
    result = carry_out(run, args.keep) | {"environment": environment, "config": config}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
