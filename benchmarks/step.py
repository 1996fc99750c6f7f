"""One training step, ours against timm's: forward, backward, clipping, update and moving average of the weights.

    python benchmarks/step.py --batch 8 --px 192 --out step.json

Both sides run in one process, in turn; times are medians. Peak memory is that of a process for each side alone, less
what the process held before the model was built. timm is needed. On a GPU both models run in bfloat16 with channels
last, compiled if --compile is given, and CUDA's launches are counted.
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

import timm
import torch
from timm.utils import ModelEmaV2
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from normfree.engine.device import processor
from normfree.models import create_model
from normfree.native import library
from normfree.optim import EMA, SGD_AGC, param_groups

PARTS = ("forward", "backward", "update")


def sides(device: torch.device, compiled: bool) -> dict[str, Callable[[], tuple[nn.Module, Callable[[], None]]]]:
    """name -> builder of (model, update)."""

    def finish(model: nn.Module) -> nn.Module:
        model = model.train().to(device)
        return torch.compile(model) if compiled else model

    def ours() -> tuple[nn.Module, Callable[[], None]]:
        model = create_model("nfnet_f0").to(memory_format=torch.channels_last)
        built = finish(model)
        optimizer, ema = SGD_AGC(param_groups(model), lr=1e-4), EMA(model)
        return built, lambda: optimizer.step(ema=ema, ema_step=100)

    def theirs() -> tuple[nn.Module, Callable[[], None]]:
        model = timm.create_model("dm_nfnet_f0")
        if device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        built = finish(model)
        head = set(model.get_classifier().parameters())
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 2e-5}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, nesterov=True, foreach=True)
        ema = ModelEmaV2(model, decay=0.99999)

        def update() -> None:
            adaptive_clip_grad([p for p in model.parameters() if p not in head], clip_factor=0.01)
            optimizer.step()
            ema.update(model)

        return built, update

    return {"normfree": ours, "timm": theirs}


class Step:
    """A step of one side, in three parts whose seconds it returns."""

    def __init__(self, name: str, batch: int, px: int, device: torch.device, compiled: bool):
        self.device = device
        self.model, self.update = sides(device, compiled)[name]()
        images = torch.randn(batch, 3, px, px, device=device)
        last = name == "normfree" or device.type == "cuda"
        self.images = images.contiguous(memory_format=torch.channels_last) if last else images
        self.labels = torch.randint(0, 1000, (batch,), device=device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(self.images)
        return nn.functional.cross_entropy(logits.float(), self.labels)

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


def peak_megabytes(name: str, args: argparse.Namespace) -> float:
    """Median of three processes of its own: the allocator's luck is some 30 MiB."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(args.batch), "--px", str(args.px)]
    command += ["--compile"] * args.compile
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return statistics.median(float(said.split()[-1]) for said in runs)


def own_peak_megabytes(name: str, args: argparse.Namespace, device: torch.device) -> float:
    library()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(name, args.batch, args.px, device, args.compile)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def kernels(step: Step) -> dict[str, float]:
    """Launches of a step, and share of the GPU's time that is not convolution or matrix product."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    heavy = ("conv", "gemm", "cutlass", "xmma", "cudnn", "wgrad", "dgrad", "sm90", "sm80")
    total = sum(event.device_time for event in events)
    other = sum(event.device_time for event in events if not any(word in event.name.lower() for word in heavy))
    return {"launches": len(events), "share_not_convolution": other / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--px", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", choices=["normfree", "timm"], help="print the peak of one side, in MiB")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    if args.memory_of:
        print(own_peak_megabytes(args.memory_of, args, device))
        return

    # first, because a process inherits the peak of the one that starts it
    memory = {name: peak_megabytes(name, args) for name in ("normfree", "timm")}
    steps = {name: Step(name, args.batch, args.px, device, args.compile) for name in ("normfree", "timm")}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for i in range(args.repeats + 2):
        for name, step in steps.items():
            taken = step()
            if i > 1:  # the first rounds warm up
                times[name].append(taken)
    seconds: dict[str, dict[str, float]] = {}
    for name, taken in times.items():
        seconds[name] = {part: statistics.median(t[i] for t in taken) for i, part in enumerate(PARTS)}
        seconds[name]["step"] = statistics.median(sum(t) for t in taken)
    result: dict[str, Any] = {"batch": args.batch, "px": args.px, "seconds": seconds}
    if device.type == "cuda":
        result["kernels"] = {name: kernels(step) for name, step in steps.items()}
    ours, theirs = seconds["normfree"]["step"], seconds["timm"]["step"]
    result |= {
        "peak_mib": memory,
        "images_per_second": {name: args.batch / values["step"] for name, values in seconds.items()},
        "ratios": {
            "time: timm / normfree": theirs / ours,
            "memory: normfree / timm": memory["normfree"] / memory["timm"],
        },
        "environment": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "native": library() is not None,
            "compiled": args.compile,
        },
    }
    print(f"NFNet-F0, {args.batch} images of {args.px} px on {device}")
    for name, values in seconds.items():
        parts = "  ".join(f"{part} {1e3 * value:.0f} ms" for part, value in values.items())
        print(f"  {name:<9} {parts}  peak {memory[name]:.0f} MiB")
    print("  ratios    " + "  ".join(f"{name} {value:.2f}" for name, value in result["ratios"].items()))
    for name, values in result.get("kernels", {}).items():
        print(f"  {name:<9} " + "  ".join(f"{key} {value:.3g}" for key, value in values.items()))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
