"""Signal propagation plots: mean and variance of a network's activations, block by block.

Brock, De, Smith 2021 (arXiv 2101.08692), section 3. Exploding variance, drifting means and silent branches show here,
before any training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree._compat import BatchNorm
from normfree.config import MAX_PX, MAX_SEED
from normfree.conversion.graph import has_statistics
from normfree.conversion.trace import BlockSignal, trace_signal
from normfree.data import FolderImages, find_images, open_dataset
from normfree.data.transforms import normalize, sample_rng
from normfree.engine.device import pick_device
from normfree.errors import InputError, check_range, nearest
from normfree.files import check_writable
from normfree.models import Network, create_model, list_models, load
from normfree.tasks.accuracy import batches_for
from normfree.tasks.reports import LINES, PLOT_SUFFIXES
from normfree.weights import IMAGENET_MEAN, IMAGENET_STD, ModelInfo

DEFAULT_PX = 224  # for networks that do not say
PANELS = {"squared_mean": "squared mean", "variance": "variance", "branch_variance": "branch variance"}
OPEN_CIRCLES: dict[str, Any] = dict(linestyle="", marker="o", markersize=6, markerfacecolor="white")
SMALLEST = 1e-6  # a squared mean below this is rounding


@dataclass(frozen=True)
class SignalTable:
    """Measurements of `trace_signal`, for the stem and every residual block, and a description of the input."""

    blocks: tuple[BlockSignal, ...]
    input: str
    batch_statistics: bool  # of the batch normalizations

    def __iter__(self) -> Iterator[BlockSignal]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        return format_signals({"": self})

    def to_json(self) -> str:
        """The table as JSON text."""
        return json.dumps(asdict(self), indent=1)


def signal_propagation(
    model: nn.Module,
    x: Tensor | None = None,
    *,
    batch: int = 16,
    px: int | None = None,
    seed: int = 0,
    training: bool | None = None,
) -> SignalTable:
    """Squared mean, variance and branch variance of the activations after the stem and every residual block.

    Finds the blocks of any residual network, ours or not (`normfree.conversion.trace`). Measuring changes nothing:
    modes, running statistics and random state are restored.

    Args:
        x: images (N, C, H, W) as the model takes them; None: `batch` images of noise N(0, 1) drawn from `seed`, of `px`
            pixels a side (default: those the network of ours is trained at, 224 for others).
        training: None: evaluation mode, but batch normalizations whose running statistics are still those of
            initialisation, mean 0 and variance 1, use those of the batch, since nothing else is meaningful. True or
            False: that mode for the whole model, stochastic depth and dropout included.

    Raises:
        InputError: the network has no residual block.

    Example:
        >>> from normfree import create_model
        >>> table = signal_propagation(create_model("nfnet_nano"), batch=2)
        >>> len(table), table.blocks[1].name, table.blocks[1].transition
        (8, 'stages.0.0', True)
    """
    if x is not None:
        return _measure(model, x, "images given", training)
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise InputError(f"{type(model).__name__} has no convolution, so it is no residual network of images")
    px = px or _native_px(model)
    noise = torch.randn(batch, conv.in_channels, px, px, generator=torch.Generator().manual_seed(seed))
    return _measure(model, noise.to(conv.weight), f"noise N(0, 1) of seed {seed}", training)


def _measure(model: nn.Module, x: Tensor, kind: str, training: bool | None = None) -> SignalTable:
    with _mode(model, training) as batch_statistics:
        blocks = trace_signal(model, x)
    return SignalTable(tuple(blocks), f"{kind}, {' x '.join(map(str, x.shape))}", batch_statistics)


def _native_px(model: nn.Module) -> int:
    return model.info.train_px if isinstance(model, Network) and model.info else DEFAULT_PX


@contextmanager
def _mode(model: nn.Module, training: bool | None) -> Iterator[bool]:
    """Sets the mode temporarily; yields whether any batch normalization uses the statistics of the batch."""
    before = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    try:
        model.train(bool(training))
        if training is None:
            for norm in norms:
                norm.training = norm.running_mean is not None and not has_statistics(norm)
        yield any(norm.training or norm.running_mean is None for norm in norms)
    finally:
        for module, mode in before:
            module.training = mode


def set_skip_gains(model: nn.Module, value: float) -> int:
    """Sets the parameters that silence branches at initialisation; returns their number.

    They are the SkipInit gains of our networks and timm's, and all-zero gains of a last convolution or weights of a
    last batch normalization.
    """
    count = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf, is_vector = name.rpartition(".")[2], p.ndim > 0 and p.numel() == len(p)
            silent = leaf in ("gain", "weight") and is_vector and not p.any()
            if silent or leaf in ("skip_gain", "skipinit_gain"):
                p.fill_(value)
                count += 1
    return count


# --- models and images by name ---


def measure_models(
    names: Sequence[str],
    data: str | None = None,
    px: int | None = None,
    batch: int = 16,
    seed: int = 0,
    skip_gain: float | None = None,
    device: str | None = None,
) -> dict[str, SignalTable]:
    """The tables of several networks by name: of the zoo, weight files, `timm:NAME`, `torchvision:NAME`.

    Args:
        data: folder of images, or `mnist5k`; None: noise.
        px: side of the images; None: each network's own.
        seed: of the initialisation, the noise, and the choice of `batch` images from `data`.
        skip_gain: see `set_skip_gains`; None: 1 for networks at initialisation, weight files stay as they are.

    Raises:
        InputError: what cannot be found, read or measured.
    """
    check_range("batch", batch, 1, 65536)
    check_range("px", px, 1, MAX_PX)
    check_range("seed", seed, 0, MAX_SEED)
    if skip_gain is not None and not math.isfinite(skip_gain):
        raise InputError(f"--skip-gain {skip_gain}: a finite number")
    where = pick_device(device)
    tables = {}
    for name in names:
        model, fresh = open_model(name, seed)
        if skip_gain is not None or fresh:
            set_skip_gains(model, 1.0 if skip_gain is None else skip_gain)
        model, side = model.to(where), px or _native_px(model)
        images = None
        if data is not None:  # networks of other libraries get the most common preparation
            usual = ModelInfo(name, 0, eval_crop="center", mean=IMAGENET_MEAN, std=IMAGENET_STD)
            info = model.info if isinstance(model, Network) and model.info else usual
            images = read_images(data, info, side, batch, seed).to(where)
        try:
            if images is None:
                tables[name] = signal_propagation(model, batch=batch, px=side, seed=seed)
            else:
                tables[name] = _measure(model, images, f"images of {data}")
        except InputError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:  # how torch and timm refuse a size
            reason = str(error).partition("\n")[0]
            raise InputError(f"{name} cannot run on {batch} images of {side} px: {reason}; try another --px") from None
    return tables


def open_model(name: str, seed: int = 0) -> tuple[nn.Module, bool]:
    """The network, and whether it is at initialisation, drawn from `seed`, or from a weight file."""
    if name in list_models() or name.startswith(("timm:", "torchvision:")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _create(name), True
    if Path(name).is_file() or "://" in name:
        return load(name), False
    raise InputError(
        f"no network {name!r}{nearest(name, list_models())}; give a name of `normfree models`, a weight file, "
        "timm:NAME or torchvision:NAME"
    )


def _create(name: str) -> nn.Module:
    library, _, inner = name.rpartition(":")
    if not library:
        return create_model(name)
    if library == "torchvision":
        from torchvision import models as zoo

        known, create = zoo.list_models(module=zoo), zoo.get_model
    else:
        try:
            import timm
        except ImportError:
            raise InputError(f"{name} needs timm, which is not installed: pip install timm") from None
        known, create = timm.list_models(), timm.create_model
    if inner not in known:
        raise InputError(f"{library} has no network {inner!r}{nearest(inner, known)}")
    return create(inner)


def read_images(data: str, info: ModelInfo, px: int, count: int, seed: int = 0) -> Tensor:
    """`count` normalized images (N, C, px, px) of a folder or packaged set, or all if it has fewer; `seed` chooses."""
    if data == "mnist5k":
        images = open_dataset(data)[1]
    else:
        paths, failed = find_images([data])
        for path, reason in failed.items():
            raise InputError(f"--data {data}: {path}: {reason}")
        images = FolderImages(root="", paths=paths)
    chosen = sorted(sample_rng(seed, 0, 0).permutation(len(images))[:count].tolist())
    batch = next(batches_for(replace(info, eval_px=px), images.subset(chosen), count))
    if not len(batch.indices):
        raise InputError(f"none of {len(chosen)} images of {data} can be read; the first: {batch.unreadable[0]}")
    return normalize(batch.images, info.mean, info.std)


# --- showing ---


def format_signals(tables: Mapping[str, SignalTable]) -> str:
    """The tables side by side, with one column of names if all have the same blocks."""
    one_column = len({tuple((b.name, b.transition) for b in table) for table in tables.values()}) == 1
    columns = [_format(label, table, i == 0 or not one_column) for i, (label, table) in enumerate(tables.items())]
    widths = [max(map(len, column)) for column in columns]
    rows = zip_longest(*columns, fillvalue="")
    lines = ["   ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("* first block of a stage: its shortcut is not the identity")
    for label, table in tables.items():
        norms = "; batch normalization by the statistics of the batch" if table.batch_statistics else ""
        lines.append(f"{label}{': ' if label else ''}{table.input}{norms}")
    return "\n".join(lines)


def _format(label: str, table: SignalTable, named: bool) -> list[str]:
    names = ["block", *(block.name + (" *" if block.transition else "") for block in table)] if named else []
    width = max(map(len, names), default=0)
    lines = ["".join(f"{title:>17}" for title in PANELS.values())]
    for block in table:
        values = (getattr(block, key) for key in PANELS)
        lines.append("".join(f"{'-' if value is None else f'{value:.4g}':>17}" for value in values))
    if named:
        lines = [f"{name:<{width}}{line}" for name, line in zip(names, lines, strict=True)]
    return [f"{label:>{max(map(len, lines))}}", *lines] if label else lines


def plot_signal(tables: Mapping[str, SignalTable], path: str | Path) -> None:
    """Draws the tables, label -> table, over the number of the block; `path` ends in .pdf, .png or .svg.

    An axis is logarithmic if over the blocks of one network the values, all positive, span a factor of more than 30.
    """
    check_writable(path, "--plot", endings=PLOT_SUFFIXES, replace=True)
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3, sharex=True), PANELS.items(), strict=True):
        for (label, table), (color, style) in zip(tables.items(), cycle(LINES)):
            blocks = [(x, block) for x, block in enumerate(table) if getattr(block, key) is not None]
            first = [(x, block) for x, block in blocks if block.transition]
            for points, look in ((blocks, dict(linestyle=style, marker=".")), (first, OPEN_CIRCLES)):
                xs, ys = [x for x, _ in points], [getattr(block, key) for _, block in points]
                axes.plot(xs, ys, color=color, label=label if points is blocks else None, **look)
        series = [[y for block in table if (y := getattr(block, key)) is not None] for table in tables.values()]
        lowest = min(map(min, series))
        blocks_only = [values[-len(table) + 1 :] for values, table in zip(series, tables.values(), strict=True)]
        if lowest > 0 and any(max(values) > 30 * max(min(values), SMALLEST) for values in blocks_only):
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(lowest / 2, SMALLEST))
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("residual block (0: the stem)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
    figure.axes[0].plot([], [], color="0.4", label="first block of a stage", **OPEN_CIRCLES)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False)
    figure.savefig(path, dpi=120)


def report_signal(names: Sequence[str], plot: str | None, json_file: str | None, **options: Any) -> None:
    """Prints `measure_models` with its `options`, and writes the plot and JSON file if named."""
    if not names:
        raise InputError("signal needs a network: normfree signal MODEL ...")
    check_writable(plot, "--plot", endings=PLOT_SUFFIXES, replace=True)
    check_writable(json_file, "--json", replace=True)
    tables = measure_models(names, **options)
    print(format_signals(tables))
    if plot is not None:
        plot_signal(tables, plot)
    if json_file is not None:
        Path(json_file).write_text(json.dumps({name: asdict(table) for name, table in tables.items()}, indent=1) + "\n")
