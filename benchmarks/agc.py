"""Adaptive gradient clipping and the whole update, against timm and torch: time, calls, and the bound of the memory.

    python benchmarks/agc.py --models nfnet_f0 nfnet_f1 --out agc.json --plot agc-cost.png

Both sides run in one process, in turn; times are medians. timm is needed. On a GPU (which it takes where there is one)
CUDA's launches are counted, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ModelEmaV2
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.engine.device import processor
from normfree.models import create_model
from normfree.native import library
from normfree.optim import EMA, SGD_AGC, adaptive_clip_grad_, param_groups


class Calls(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def now() -> float:
    """Seconds, when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def launches(function: Callable[[], Any]) -> int:
    """What a GPU is told to do: kernels, copies, fills."""
    now()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        now()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def fill_gradients(model: nn.Module) -> None:
    """About a third of the units above the limit, as early in training."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        rows = p.shape[0] if p.ndim > 1 else 1
        norm = (p.detach().flatten(1).norm(dim=1) if p.ndim > 1 else p.detach().norm().view(1)).cpu()
        grad = torch.randn(p.shape, generator=generator)
        scale = 0.015 * torch.rand(rows, generator=generator) * norm.clamp(min=1e-3)
        grad = grad.view(rows, -1) / grad.view(rows, -1).norm(dim=1, keepdim=True) * scale[:, None]
        p.grad = grad.view(p.shape).to(p.device)


def measure(functions: dict[str, Callable[[], Any]], before: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn; `before` runs untimed before every one."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            before()
            start = now()
            function()
            if i:  # the first round warms up
                times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def bytes_per_second(device: torch.device, megabytes: int = 512) -> float:
    """What copying moves, read and written, at best: the memory's bandwidth in this run."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = now()
        target.copy_(source)
        times.append(now() - start)
    return 2 * source.nbytes / min(times)


def benchmark(name: str, repeats: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_model(name).to(device)
    fill_gradients(model)
    kept = [(p, p.grad.clone()) for p in model.parameters()]
    params = list(model.parameters())
    groups = param_groups(model, clipping=0.01)
    head = {id(p) for group in groups if group["clipping"] is None for p in group["params"]}
    body = [p for p in params if id(p) not in head]

    def restore() -> None:
        for p, grad in kept:
            p.grad.copy_(grad)

    clips: dict[str, Callable[[], Any]] = {
        "normfree": lambda: adaptive_clip_grad_(groups),
        "timm": lambda: adaptive_clip_grad(body, clip_factor=0.01),
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(params, 1.0),
    }
    clip_times = measure(clips, restore, repeats)
    calls = {}
    for side, function in clips.items():
        restore()
        with Calls() as counter:
            function()
        calls[side] = counter.count

    optimizer, ema = SGD_AGC(groups, lr=1e-4), EMA(model)
    plain = [{key: value for key, value in group.items() if key != "clipping"} for group in groups]
    torch_sgd = torch.optim.SGD(plain, lr=1e-4, momentum=0.9, nesterov=True, foreach=True)
    timm_ema = ModelEmaV2(model, decay=0.99999)

    def ours() -> None:
        optimizer.step(ema=ema, ema_step=100)

    def theirs() -> None:
        adaptive_clip_grad(body, clip_factor=0.01)
        torch_sgd.step()
        timm_ema.update(model)

    updates: dict[str, Callable[[], Any]] = {"normfree": ours, "timm": theirs}
    update_times = measure(updates, restore, repeats)
    bandwidth = bytes_per_second(device)
    size = sum(p.nbytes for p in params)
    bounds = {"clip": 2 * size / bandwidth, "update": 7 * size / bandwidth}
    result: dict[str, Any] = {
        "model": name,
        "tensors": len(params),
        "parameters": sum(p.numel() for p in params),
        "clipped_fraction": round(adaptive_clip_grad_(groups).clipped_fraction, 4) if not restore() else 0,
        "clip_seconds": clip_times,
        "clip_dispatcher_calls": calls,
        "update_seconds": update_times,
        "bytes_per_second": bandwidth,
        "bound_seconds": bounds,
        "ratios": {
            "clip: timm / normfree": clip_times["timm"] / clip_times["normfree"],
            "clip: normfree / clip_grad_norm_": clip_times["normfree"] / clip_times["clip_grad_norm_"],
            "update: timm / normfree": update_times["timm"] / update_times["normfree"],
            "update: normfree / bound": update_times["normfree"] / bounds["update"],
        },
    }
    if device.type == "cuda":
        result["clip_launches"] = {side: launches(function) for side, function in clips.items()}
        result["update_launches"] = {side: launches(function) for side, function in updates.items()}
    return result


def plot(results: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    millions = [r["parameters"] / 1e6 for r in results]
    for axes, key, title in zip(
        figure.subplots(1, 2), ("clip_seconds", "update_seconds"), ("clipping", "whole update"), strict=True
    ):
        names = {"normfree": "#0072B2", "timm": "#D55E00", "clip_grad_norm_": "#009E73"}
        for name, color in names.items():
            if name in results[0][key]:
                label = "timm AGC + SGD + EMA" if key == "update_seconds" and name == "timm" else name
                axes.plot(millions, [1e3 * r[key][name] for r in results], marker="o", color=color, label=label)
        bound = [1e3 * r["bound_seconds"]["clip" if key == "clip_seconds" else "update"] for r in results]
        axes.plot(millions, bound, linestyle=":", color="0.4", label="bound of the memory")
        axes.set_title(f"{title}, {results[0]['model']} to {results[-1]['model']}", fontsize=11)
        axes.set_xlabel("millions of parameters")
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["nfnet_f0"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", help="picture to draw")
    args = parser.parse_args()
    results = []
    for name in args.models:
        result = benchmark(name, args.repeats, torch.device(args.device))
        results.append(result)
        clip, update, ratios = result["clip_seconds"], result["update_seconds"], result["ratios"]
        print(f"{name}: {result['tensors']} tensors, {result['parameters'] / 1e6:.1f} M parameters")
        print("  clip    " + "  ".join(f"{k} {1e3 * v:.1f} ms" for k, v in clip.items()), end="")
        print(f"  (bound {1e3 * result['bound_seconds']['clip']:.1f} ms)")
        print("  calls   " + "  ".join(f"{k} {v}" for k, v in result["clip_dispatcher_calls"].items()))
        for key in ("clip_launches", "update_launches"):
            if key in result:
                print(f"  {key.replace('_', ' ')}  " + "  ".join(f"{k} {v}" for k, v in result[key].items()))
        print("  update  " + "  ".join(f"{k} {1e3 * v:.1f} ms" for k, v in update.items()), end="")
        print(f"  (bound {1e3 * result['bound_seconds']['update']:.1f} ms)")
        print("  ratios  " + "  ".join(f"{k} {v:.2f}" for k, v in ratios.items()), flush=True)
    environment = {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "native": library() is not None,
    }
    if args.out:
        args.out.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
