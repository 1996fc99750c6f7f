"""What `normfree train DATA` chooses, beside the twin with batch normalization and clipping of the whole gradient.

    python experiments/small_images/run.py DATA                        # as `normfree train DATA`
    python experiments/small_images/run.py DATA --twin                 # batch normalization, nothing clipped
    python experiments/small_images/run.py DATA --max-norm 1           # the norm of all gradients clipped, not AGC
    python experiments/small_images/run.py DATA --set lr=0.1 epochs=4  # another choice
    python experiments/small_images/run.py DATA --record RUN           # the run folder that `normfree train DATA` left
    python experiments/small_images/run.py --table                     # the results as a table

Everything else is as chosen. Results go to results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from normfree.config import ClassificationRun, load_config, options_of, with_options
from normfree.engine.device import processor
from normfree.engine.loop import Diverged
from normfree.tasks.choice import choose_recipe
from normfree.tasks.classification import start

RESULTS = Path(__file__).parent / "results"


def configure(args: argparse.Namespace) -> ClassificationRun:
    run, *_ = choose_recipe(None, {"path": args.data})
    for option in args.set:
        name, _, value = option.partition("=")
        if name not in options_of(run):
            raise SystemExit(f"no option {name}")
        values = json.loads(value) if value[:1] in "[0123456789ntf" else value
        run = with_options(run, {name: tuple(values) if isinstance(values, list) else values})
    if args.twin:
        run = with_options(run, {"model": f"bn_{run.model.model}", "clip": "none", "clipping": None})
    if args.max_norm:
        run = with_options(run, {"clip": "norm", "clipping": args.max_norm})
    return replace(run, seed=args.seed)


def carry_out(run: ClassificationRun) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            start(run, Path(folder))
        except Diverged as error:
            return {"failed": str(error)}
        return summary(Path(folder))


def summary(folder: Path) -> dict[str, Any]:
    """Of a run that is complete; `minutes` from its first to its last line."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    speeds = sorted(line["images_per_s"] for line in lines if line["kind"] == "train")
    keep = ("epoch", "top1", "top5", "raw_top1")
    return {
        "minutes": round((lines[-1]["time"] - lines[0]["time"]) / 60, 2),
        "top1": evals[-1]["top1"],
        "raw_top1": evals[-1]["raw_top1"],
        "best": max(line["top1"] for line in evals),
        "images_per_s": speeds[len(speeds) // 2],
        "evaluations": [{name: line[name] for name in keep if name in line} for line in evals],
    }


def table() -> None:
    print("| run | top-1, averaged weights | best | raw weights | minutes | seed |\n|---|---|---|---|---|---|")
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text())
        seed = run["config"]["seed"]
        if "failed" in run:
            print(f"| {path.stem} | diverged: {run['failed'].split(':')[0]} | | | | {seed} |")
        else:
            print(
                f"| {path.stem} | {run['top1']:.2f} % | {run['best']:.2f} % | {run['raw_top1']:.2f} % "
                f"| {run['minutes']:.1f} | {seed} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="what normfree train takes")
    parser.add_argument("--twin", action="store_true", help="the same network with batch normalization, unclipped")
    parser.add_argument("--max-norm", type=float, help="clip the norm of all gradients together, in place of AGC")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the run")
    parser.add_argument("--record", type=Path, metavar="RUN", help="a run folder, in place of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--threads", type=int, help="of torch; as many as cores")
    parser.add_argument("--beside", default="nothing", help="what else the machine did, for the record")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    args = parser.parse_args()
    if args.table:
        table()
        return
    torch.set_num_threads(args.threads or torch.get_num_threads())
    run = load_config(args.record / "config.json") if args.record else configure(args)
    kind = "bn" if args.twin else f"norm{args.max_norm:g}" if args.max_norm else "agc"
    name = args.name or "-".join([Path(args.data).name, kind, *(option.replace("=", "") for option in args.set)])
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": processor(),
        "beside": args.beside,
    }
    result = summary(args.record) if args.record else carry_out(run)
    result |= {"max_norm": args.max_norm, "environment": environment}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result | {"config": asdict(run)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
