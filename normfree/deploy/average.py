"""The mean of the weights in the last checkpoints of a run, as one weight file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.engine.checkpoint import DamagedCheckpoint, all_steps, read_tensors, verify
from normfree.errors import InputError
from normfree.files import check_writable
from normfree.tasks.files import model_of, save
from normfree.weights.file import ModelInfo, Weights, read_weights


@dataclass(frozen=True)
class Average:
    """`path`: the file; `steps`: after which the checkpoints were written; `damaged`: a line for each unusable one."""

    path: Path
    steps: tuple[int, ...]
    damaged: tuple[str, ...]

    def __str__(self) -> str:
        return f"mean of {_counted(self.steps)}"


def average_run(folder: str | Path, last: int | None = None, out: str | None = None, raw: bool = False) -> Average:
    """Writes the mean over the last checkpoints of a classifier's or a detector's run.

    Means are computed in float64, also of running statistics of batch normalization. Integers are the newest.

    Args:
        folder: of the run.
        last: number of checkpoints; None: all that the run keeps.
        out: file to write; None: average.safetensors in the run's folder.
        raw: take the weights as they were trained, instead of their moving averages, which a run's weight files hold.

    Raises:
        InputError: there are fewer checkpoints that are whole, or the file exists or cannot be written.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no run is there (config.json is missing)")
    if last is not None and last < 1:
        raise InputError(f"--last {last}: at least 1")
    path = Path(folder / "average.safetensors" if out is None else out)
    check_writable(path, endings=(".safetensors",))
    mean, manifests, damaged = _mean(folder / "checkpoints", last, raw)
    steps = tuple(manifest["step"] for manifest in reversed(manifests))
    if not steps or len(steps) < (last or 0):
        asked = f"--last {last}: " if last else ""
        whole = _counted(steps, "whole ") if steps else "no whole checkpoint"
        remedy = "; ".join(damaged[:1]) or "a run keeps as many as its --keep-checkpoints"
        raise InputError(f"{asked}{folder} has {whole}; {remedy}")
    info = _info(folder, manifests[0])
    done = Average(path, steps, tuple(damaged))
    save(model_of(Weights(mean, info), path), path, replace(info, source=f"{info.source}, {done}"))
    return done


def _counted(steps: Sequence[int], kind: str = "") -> str:
    return f"{len(steps)} {kind}checkpoint{'s' if len(steps) > 1 else ''}, after step {', '.join(map(str, steps))}"


def _mean(folder: Path, last: int | None, raw: bool) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[str]]:
    """The mean weights, the manifests of their checkpoints, the newest first, and lines about damaged ones."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    manifests: list[dict[str, Any]] = []
    damaged: list[str] = []
    for path in reversed(all_steps(folder)):
        if len(manifests) == last:
            break
        try:
            manifest = verify(path)
            names = set(manifest["names"])
            model = [name.removeprefix("model.") for name in names if name.startswith("model.")]
            chosen = {n: f"ema.{n}" if not raw and f"ema.{n}" in names else f"model.{n}" for n in model}
            tensors = read_tensors(path, chosen.values())
        except DamagedCheckpoint as reason:
            damaged.append(f"checkpoint {path} is damaged and is passed over: {reason}")
            continue
        manifests.append(manifest)
        for name, source in chosen.items():
            value = tensors[source]
            if name not in total:
                dtypes[name], total[name] = value.dtype, value.double() if value.is_floating_point() else value
            elif value.is_floating_point():
                total[name] += value
    for name, value in total.items():
        total[name] = (value / len(manifests)).to(dtypes[name]) if value.is_floating_point() else value
    return total, manifests, damaged


def _info(folder: Path, manifest: dict[str, Any]) -> ModelInfo:
    """The header for a run's weights, from a checkpoint, or from a weight file if an older version wrote it."""
    if header := manifest["extra"].get("task", {}).get("network"):
        return ModelInfo.from_metadata(header)
    for name in ("last", "best"):
        if (file := folder / f"{name}.safetensors").is_file():
            return read_weights(file)[1]
    raise InputError(
        f"{folder}: its checkpoints do not describe the network, and there is no best.safetensors that does"
    )
