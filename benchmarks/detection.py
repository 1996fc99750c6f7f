"""One training step of Mask R-CNN, ours against torchvision's `maskrcnn_resnet50_fpn`: forward, backward, update.

    python benchmarks/detection.py --px 512 --batch 2 --backbone nf_resnet50 --out detection.json

Images of px x px/0.75 with ten objects each, 91 classes, everything trainable. torchvision's has frozen batch norm and
SGD, its reference recipe; ours AGC, SGD and the moving average of the weights. Both sides run in one process, in turn;
times are medians. Peak memory is that of a process for each side alone, less what the process held before.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from normfree.config import OptimConfig
from normfree.engine.device import autocast, processor
from normfree.engine.update import Update
from normfree.native import library
from normfree.tasks.detection.model import create_detector, roles

PARTS = ("forward", "backward", "update")
OBJECTS = 10


def sides(args: argparse.Namespace) -> dict[str, Callable[[], tuple[nn.Module, Callable[[], None]]]]:
    """name -> builder of (model, update)."""
    device, limits = torch.device(args.device), (args.px, 4 * args.px // 3)

    def ours() -> tuple[nn.Module, Callable[[], None]]:
        model = create_detector(args.backbone, 90, min_px=limits[0], max_px=limits[1])
        model = model.train().to(device, memory_format=torch.channels_last)
        update = Update(model, OptimConfig(), **roles(model))
        hold = torch.zeros((), dtype=torch.bool, device=device)
        return model, lambda: update.step(100, 1e-4, hold)

    def theirs() -> tuple[nn.Module, Callable[[], None]]:
        model = torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, trainable_backbone_layers=5, min_size=limits[0], max_size=limits[1]
        )
        model = model.train().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, foreach=True)
        return model, optimizer.step

    return {"normfree": ours, "torchvision": theirs}


class Step:
    """A step of one side, in three parts whose seconds it returns."""

    def __init__(self, name: str, args: argparse.Namespace):
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.model, self.update = sides(args)[name]()
        height, width = args.px, 4 * args.px // 3
        self.images, self.targets = [], []
        for _ in range(args.batch):
            corners = torch.rand(OBJECTS, 2) * torch.tensor([width, height]) * 0.7
            boxes = torch.cat([corners, corners + 0.05 * args.px + torch.rand(OBJECTS, 2) * 0.25 * args.px], 1)
            masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
            target = {"boxes": boxes, "labels": torch.randint(1, 91, (OBJECTS,)), "masks": masks}
            self.images.append(torch.rand(3, height, width).to(self.device))
            self.targets.append({key: value.to(self.device) for key, value in target.items()})

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loss(self) -> Tensor:
        with autocast(self.device, "bfloat16" if self.device.type == "cuda" else "float32"):
            return torch.stack([*self.model(self.images, self.targets).values()]).sum()

    def __call__(self) -> tuple[float, float, float]:
        times = [self.now()]
        loss = self.loss()
        times.append(self.now())
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        times.append(self.now())
        self.update()
        times.append(self.now())
        return times[1] - times[0], times[2] - times[1], times[3] - times[2]


def own_peak_megabytes(name: str, args: argparse.Namespace) -> float:
    library()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(name, args)
    for _ in range(3):
        step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--px", type=int, default=512)
    parser.add_argument("--backbone", default="nf_resnet50")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(own_peak_megabytes(args.memory_of, args))
        return
    names = tuple(sides(args))
    options = [f"--{name}={getattr(args, name)}" for name in ("batch", "px", "backbone", "device")]

    def peak(name: str) -> float:
        command = [sys.executable, __file__, "--memory-of", name, *options]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(said.split()[-1])

    memory = {name: statistics.median(peak(name) for _ in range(3)) for name in names}
    steps = {name: Step(name, args) for name in names}
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for repeat in range(args.repeats + 2):
        for name, step in steps.items():
            measured = step()
            if repeat >= 2:
                times[name].append(measured)
    result: dict[str, Any] = {
        "benchmark": "detection",
        "options": {name: getattr(args, name) for name in ("batch", "px", "backbone", "repeats", "device")},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in names:
        medians = [statistics.median(column) for column in zip(*times[name], strict=True)]
        result[name] = {f"{part}_ms": round(1000 * t, 1) for part, t in zip(PARTS, medians, strict=True)}
        result[name] |= {"step_ms": round(1000 * sum(medians), 1), "peak_mib": round(memory[name], 1)}
    ours, theirs = (result[name] for name in names)
    result["ratios"] = {key: round(theirs[key] / ours[key], 3) for key in ours}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
