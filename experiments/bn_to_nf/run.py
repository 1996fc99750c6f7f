"""Trains one torchvision network with batch normalization, or converted to none, on a folder of small photographs.

    python experiments/bn_to_nf/run.py DATA --model resnet18 --norm nf --batch 4 --out nf.json

Both sides see the same images in the same order, start from the same random weights and follow the same schedule. The
normalizer-free one has its gradients clipped (AGC), the other if asked. The result is written after every epoch, so
that a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from normfree.conversion.convert import convert_to_nf
from normfree.data import (
    Batch,
    EvalTransform,
    LabelledImages,
    TrainTransform,
    eval_batches,
    open_dataset,
    train_batches,
)
from normfree.optim import SGD_AGC, param_groups, warmup_cosine
from normfree.tasks.accuracy import prepare

MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
LR = 0.01  # peak, at both batch sizes the best of those tried for resnet18 with batch normalization
CLIPPING = {4: 0.16, 32: 0.08}  # λ of AGC by batch size: the noisier the gradient, the more room it needs
CALIBRATION_IMAGES = 64  # on which the converter measures its scales
IMAGES_PER_POINT = 128  # of the training curve
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


def stream(args: argparse.Namespace, images: LabelledImages, batch_size: int, stop_step: int) -> Iterator[Batch]:
    """Augmented training images, in an order that depends on the seed alone."""
    transform = TrainTransform(args.px, min_area=args.min_area)
    return train_batches(
        images,
        transform,
        batch_size=batch_size,
        seed=args.seed,
        start_step=0,
        stop_step=stop_step,
        workers=0,
        min_px=transform.min_px,
    )


def build(args: argparse.Namespace, train_set: LabelledImages) -> tuple[nn.Module, SGD_AGC]:
    """The network with random initial weights, which depend on model and seed alone, and its optimizer."""
    torch.manual_seed(args.seed)
    model = torchvision.models.get_model(args.model, num_classes=len(train_set.class_names))
    if args.norm == "nf":
        first = next(stream(args, train_set, CALIBRATION_IMAGES, stop_step=1))
        model = convert_to_nf(model, prepare(first.images, MEAN, STD, CPU))
    model = model.to(memory_format=torch.channels_last)
    groups = param_groups(model, args.weight_decay, args.clipping, classifier=model.fc)
    # Where args.clipping is None this is torch.optim.SGD with Nesterov momentum.
    return model, SGD_AGC(groups, lr=0.0, momentum=args.momentum)


def train_step(model: nn.Module, optimizer: SGD_AGC, batch: Batch, lr: float, label_smoothing: float) -> float:
    """The loss before the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    logits = model(prepare(batch.images, MEAN, STD, CPU))
    loss = F.cross_entropy(logits, batch.targets, label_smoothing=label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def validate(model: nn.Module, images: LabelledImages, px: int) -> tuple[float, float]:
    """Top-1 in percent and mean cross-entropy, without label smoothing."""
    transform = EvalTransform(px)
    right, loss = 0, 0.0
    model.eval()
    for batch in eval_batches(images, transform, batch_size=64, workers=0, min_px=transform.min_px):
        logits = model(prepare(batch.images, MEAN, STD, CPU))
        right += int((logits.argmax(1) == batch.targets).sum())
        loss += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
    model.train()
    return 100 * right / len(images), loss / len(images)


def describe(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """The head of a result: everything that was set, and where it ran."""
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    return {
        "settings": settings | {"data": Path(args.data).name},
        "environment": {name: version(name) for name in ("normfree", "torch", "torchvision")}
        | {"device": "cpu", "threads": torch.get_num_threads()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "diverged_at_step": None,
        "epochs": [],
        "images_per_point": IMAGES_PER_POINT,
        "train_loss": [],
    }


def rounded(x: float) -> float | None:
    """Five significant digits; None where it is not finite, for which JSON has no word."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


def write(result: dict[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)


def train(args: argparse.Namespace) -> None:
    train_set, validation_set = open_dataset(args.data)
    model, optimizer = build(args, train_set)
    result = describe(args, model)
    steps_per_epoch = len(train_set) // args.batch
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    losses: list[float] = []
    clipped: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(stream(args, train_set, args.batch, total_steps), 1):
        lr = warmup_cosine(step - 1, peak_lr=args.lr, total_steps=total_steps, warmup_steps=warmup_steps)
        losses.append(train_step(model, optimizer, batch, lr, args.label_smoothing))
        clipped.append(optimizer.stats.clipped_fraction)
        if not math.isfinite(losses[-1]):
            result["diverged_at_step"] = step
            break
        if step * args.batch % IMAGES_PER_POINT == 0:
            steps = IMAGES_PER_POINT // args.batch
            result["train_loss"].append(rounded(sum(losses[-steps:]) / steps))
        if step % steps_per_epoch == 0:
            train_seconds = time.perf_counter() - start
            top1, validation_loss = validate(model, validation_set, args.px)
            figures = {
                "top1": rounded(top1),
                "validation_loss": rounded(validation_loss),
                "train_loss": rounded(sum(losses[-steps_per_epoch:]) / steps_per_epoch),
                "mean_clipped_fraction": rounded(sum(clipped[-steps_per_epoch:]) / steps_per_epoch),
                "largest_clipped_fraction": rounded(max(clipped[-steps_per_epoch:])),
                "train_seconds": round(train_seconds, 1),
            }
            result["epochs"].append(figures)
            print(args.out.stem, f"epoch {len(result['epochs'])}", figures, flush=True)
            write(result, args.out)
            start = time.perf_counter()
    write(result, args.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(parse_arguments())
