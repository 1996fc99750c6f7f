"""Trains one torchvision network with batch normalization, or converted to none, on a folder of small photographs.

    python experiments/bn_to_nf/run.py DATA --model resnet18 --norm nf --batch 4 --out nf.json

Both versions see the same images in the same order, start from the same random weights and follow the same schedule.
The gradients of the normalizer-free one are clipped by AGC, those of the other on request.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from normfree.config import ClassificationRun, ClassifierOptim, DataConfig, MachineConfig, ModelConfig
from normfree.conversion.convert import convert_to_nf
from normfree.data import open_dataset
from normfree.engine import run as engine
from normfree.engine.device import processor
from normfree.engine.loop import Diverged
from normfree.engine.update import Update
from normfree.tasks.accuracy import prepare
from normfree.tasks.classification import Classification
from normfree.weights import ModelInfo

MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
LR = 0.01  # peak, at both batch sizes the best of those tried for resnet18 with batch normalization
CLIPPING = {4: 0.16, 32: 0.08}  # λ of AGC by batch size: the noisier the gradient, the more room it needs
CALIBRATION_IMAGES = 64  # on which the converter measures its scales
IMAGES_PER_POINT = 128  # of the training curve
CPU = torch.device("cpu")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train/CLASS/IMAGE and validation/CLASS/IMAGE")
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--norm", choices=("bn", "nf"), default="bn")
    parser.add_argument("--batch", type=int, choices=CLIPPING, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--px", type=int, default=48, help="side of the images, in training and evaluation")
    parser.add_argument("--lr", type=float, default=LR, help="peak learning rate")
    parser.add_argument("--clipping", type=float, help=f"λ of AGC; if not given: none for bn, for nf {CLIPPING}")
    parser.add_argument("--momentum", type=float, default=0.9, help="Nesterov's")
    parser.add_argument("--weight-decay", type=float, default=5e-5, help="of weights, not of gains and biases")
    parser.add_argument("--warmup-epochs", type=float, default=0.5)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--min-area", type=float, default=0.25, help="smallest training crop, share of the area")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    args.clipping = args.clipping or (CLIPPING[args.batch] if args.norm == "nf" else None)
    return args


class TorchvisionClassification(Classification):
    """Classification by a network that is none of ours, whose weight file names no architecture."""

    def save(self, path: Path) -> None:
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, path)

    def group_of(self, name: str) -> str:
        return name.partition(".")[0]


def configure(args: argparse.Namespace) -> ClassificationRun:
    optim = ClassifierOptim(
        epochs=args.epochs,
        batch_size=args.batch,
        lr=args.lr,
        warmup_epochs=args.warmup_epochs,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        clip="agc" if args.clipping else "none",
        clipping=args.clipping,
        label_smoothing=args.label_smoothing,
        ema_decay=0.0,  # the average is the weights
    )
    data = DataConfig(args.data, train_px=args.px, eval_px=args.px, min_area=args.min_area)
    machine = MachineConfig(device="cpu", workers=0, log_every=1, checkpoint_minutes=1e9)
    return ClassificationRun(ModelConfig(args.model), data, optim, machine, args.seed)


def build(args: argparse.Namespace, run: ClassificationRun) -> engine.Job:
    """The job with random initial weights, which depend on model and seed alone."""
    train_set, validation_set = open_dataset(args.data)
    names = tuple(train_set.class_names)
    info = ModelInfo(args.model, len(names), class_names=names, train_px=args.px, eval_px=args.px, eval_crop="center")
    torch.manual_seed(run.seed)
    model: nn.Module = torchvision.models.get_model(args.model, num_classes=len(names))
    task = TorchvisionClassification(model, info, train_set, validation_set, run, CPU)  # type: ignore[arg-type]
    if args.norm == "nf":
        batches = list(task.read(range(math.ceil(CALIBRATION_IMAGES / args.batch)), workers=0))
        first = torch.cat([batch.images for batch in batches])[:CALIBRATION_IMAGES]
        model = convert_to_nf(model, prepare(first, info.mean, info.std, CPU))
    task.model = model.to(memory_format=torch.channels_last)  # type: ignore[assignment]
    return engine.Job(
        run,
        task,
        Update(task.model, run.optim, classifier=task.model.fc),
        engine.make_plan(run, len(train_set)),
        name=args.out.stem,
        source=args.data,
        data={"held_out": False, "images": {}},
        description=[],
        notes=(),
        preview=lambda: task.read(range(3), workers=0),
        workers=0,
        evaluation=(len(validation_set) / args.batch, 1 / 3),
    )


def rounded(x: float) -> float | None:
    """Five significant digits; None where it is not finite, for which JSON has no word."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


def mean(values: list[float]) -> float | None:
    return rounded(sum(values) / len(values))


def summary(lines: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """The training loss, and figures of every epoch, from the lines of a log."""
    steps = [line for line in lines if line["kind"] == "train"]
    losses = [line["loss"] for line in steps]
    points = range(0, len(losses) - IMAGES_PER_POINT // batch + 1, IMAGES_PER_POINT // batch)
    epochs, start = [], 0
    for line in (line for line in lines if line["kind"] == "eval"):
        own = steps[start : line["step"]]
        start = line["step"]
        clipped = [step["clipped_fraction"] for step in own]
        epochs.append(
            {
                "top1": rounded(line["top1"]),
                "validation_loss": rounded(line["loss"]),
                "train_loss": mean([step["loss"] for step in own]),
                "mean_clipped_fraction": mean(clipped),
                "largest_clipped_fraction": rounded(max(clipped)),
                "train_seconds": round(own[-1]["time"] - own[0]["time"], 1),
            }
        )
    train_loss = [mean(losses[i : i + IMAGES_PER_POINT // batch]) for i in points]
    return {"epochs": epochs, "images_per_point": IMAGES_PER_POINT, "train_loss": train_loss}


def main() -> None:
    args = parse_arguments()
    job = build(args, configure(args))
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    result: dict[str, Any] = {
        "settings": settings | {"data": Path(args.data).name},
        "environment": {name: version(name) for name in ("normfree", "torch", "torchvision")}
        | {"device": "cpu", "cpu": processor(), "threads": torch.get_num_threads()},
        "parameters": sum(p.numel() for p in job.task.model.parameters()),
        "diverged_at_step": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        try:
            engine.start(job, run)
        except Diverged as error:
            result["diverged_at_step"] = error.step
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    args.out.write_text(json.dumps(result | summary(lines, args.batch), indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
