"""The input pipeline against timm's loader: images/s of whole loaders, µs of ours by stage, and our sources.

    python benchmarks/data.py --images 1000 --out data.json
    python benchmarks/data.py --parts stages sources --out data.json    # these parts anew, the others in data.json kept

JPEGs of photographs that installed packages carry are made in a temporary folder and lie in the page cache. Both sides
give batches of uint8 (N, 3, 192, 192) and run in one process, in turn; numbers are medians of rounds. A round begins a
loader, lets its first batches pass, and times the others. All that it needs is in the extra `dev`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
import sklearn
import timm
import torch
from PIL import Image, features
from timm.data import FastCollateMixup, create_dataset, create_loader, create_transform
from torch import Tensor

from normfree.data import (
    LabelledImages,
    Mixing,
    RandAugment,
    TrainTransform,
    cached,
    open_dataset,
    sample_rng,
    train_batches,
)
from normfree.data.pack import pack
from normfree.engine.device import processor

PX, BATCH, WARM_BATCHES = 192, 32, 4
SHORT_PX, QUALITY = 400, 90
PHOTOGRAPHS = [
    *(Path(sklearn.__file__).parent / "datasets/images" / name for name in ("china.jpg", "flower.jpg")),
    Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg",
]

# What is drawn for an image after crop and flip, by ours and by timm.
AUGMENTATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "crop, flip": ({}, {}),
    "RandAugment 4, 5; rand-m5-n4": ({"augment": RandAugment(4, 5, "pil")}, {"auto_augment": "rand-m5-n4"}),
    "RandAugment 4, 5; rand-m5-n4-p1": ({"augment": RandAugment(4, 5, "pil")}, {"auto_augment": "rand-m5-n4-p1"}),
    "MixUp and CutMix": ({"mixing": Mixing(0.2, 1.0)}, {"mixing": True}),
    "the same, in pairs of the batch": ({"mixing": Mixing(0.2, 1.0, "batch")}, {"mixing": True}),
}


def make_photographs(folder: Path, count: int) -> None:
    """`count` crops of the photographs, some mirrored, as JPEG: a class for each photograph, short side 400 px."""
    photographs = [Image.open(file).convert("RGB") for file in PHOTOGRAPHS]
    rng = np.random.default_rng(0)
    for number in range(count):
        which = number % len(photographs)
        file, photograph = PHOTOGRAPHS[which], photographs[which]
        shares = rng.uniform(0.6, 1, size=2)
        width, height = round(photograph.width * shares[0]), round(photograph.height * shares[1])
        left, upper = rng.integers(photograph.width - width + 1), rng.integers(photograph.height - height + 1)
        scale = SHORT_PX / min(width, height)
        size = round(width * scale), round(height * scale)
        box = (left, upper, left + width, upper + height)
        crop = photograph.resize(size, Image.Resampling.LANCZOS, box=box)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / "train" / file.stem / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=QUALITY)
    held = folder / "validation" / PHOTOGRAPHS[0].stem / "0.jpg"  # so that all of the others are for training
    held.parent.mkdir(parents=True)
    photographs[0].save(held)


def ours(images: LabelledImages, workers: int, seed: int, **options: Any) -> Iterator[Tensor]:
    steps = len(images) // BATCH
    batches = train_batches(
        images,
        TrainTransform(PX),
        batch_size=BATCH,
        seed=seed,
        start_step=0,
        stop_step=steps,
        workers=workers,
        **options,
    )
    return (batch.images for batch in batches)


def theirs(
    folder: Path, classes: int, workers: int, auto_augment: str | None = None, mixing: bool = False
) -> Iterator[Tensor]:
    dataset = create_dataset("", root=str(folder / "train"))
    collate = FastCollateMixup(mixup_alpha=0.2, cutmix_alpha=1.0, mode="elem", num_classes=classes) if mixing else None
    loader = create_loader(
        dataset,
        (3, PX, PX),
        BATCH,
        is_training=True,
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=False,
        collate_fn=collate,
    )
    # create_loader's own transform would normalize to float32
    dataset.transform = create_transform(
        (3, PX, PX),
        is_training=True,
        interpolation="bicubic",
        color_jitter=None,
        auto_augment=auto_augment,
        normalize=False,
    )
    return (batch[0] for batch in loader)


def images_per_second(batches: Iterator[Tensor]) -> float:
    """Of all batches but the first ones, which the workers have read ahead while they started."""
    start, count = 0.0, 0
    for number, images in enumerate(batches):
        assert images.shape == (BATCH, 3, PX, PX)
        assert images.dtype == torch.uint8
        if number >= WARM_BATCHES:
            count += len(images)
        else:
            start = time.perf_counter()
    return count / (time.perf_counter() - start)


def in_turn(loaders: dict[str, Callable[[int], Iterator[Tensor]]], rounds: int) -> dict[str, float]:
    """Median images/s of each."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name, loader in loaders.items():
            rates[name].append(images_per_second(loader(number)))
    return {name: statistics.median(values) for name, values in rates.items()}


def measure_loaders(folder: Path, workers: int, rounds: int) -> list[dict[str, Any]]:
    images, _ = open_dataset(str(folder))
    results = []
    for name, (our_options, their_options) in AUGMENTATIONS.items():
        rates = in_turn(
            {
                "normfree": lambda seed, options=our_options: ours(images, workers, seed, **options),
                "timm": lambda _, options=their_options: theirs(folder, len(images.class_names), workers, **options),
            },
            rounds,
        )
        ratio = rates["normfree"] / rates["timm"]
        results.append({"workers": workers, "augmentation": name, "images_per_second": rates, "ratio": ratio})
        print(f"{workers} workers, {name:<32} " + "  ".join(f"{k} {v:.0f}/s" for k, v in rates.items()), end="")
        print(f"  ratio {ratio:.2f}", flush=True)
    return results


def measure_stages(folder: Path, rounds: int, sample: int = 192) -> dict[str, float]:
    """Median µs an image of what a worker does, each stage over the same images."""
    images, _ = open_dataset(str(folder))
    some = np.random.default_rng(0).permutation(len(images))[:sample].tolist()
    transform, augment, mixing = TrainTransform(PX), RandAugment(4, 5, "pil"), Mixing(0.2, 1.0)
    kept = cached(images)
    decoded = [kept.read(index) for index in some]
    crops = [transform(image, sample_rng(0, 0, i)) for i, image in enumerate(decoded)]
    arrays = [crop.permute(1, 2, 0).numpy() for crop in crops]
    stages: dict[str, Callable[[int], Any]] = {
        "open, header": lambda i: images.size(some[i]),
        "read and decode": lambda i: images.read(some[i]),
        "read and decode at 1/2": lambda i: images.read(some[i], min_px=SHORT_PX // 2),
        "read and decode at 1/4": lambda i: images.read(some[i], min_px=SHORT_PX // 4),
        "read from memory": lambda i: kept.read(some[i]),
        "crop, resize, flip": lambda i: transform(decoded[i], sample_rng(0, 0, i)),
        "RandAugment(4, 5, pil)": lambda i: augment(arrays[i], sample_rng(0, 0, i)),
        "MixUp, CutMix": lambda i: mixing(crops[i], crops[i - 1], i, sample_rng(0, 0, i)),
        "collate": lambda i: torch.stack(crops[i : i + BATCH]) if i % BATCH == 0 else None,
    }
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(rounds):
        for name, stage in stages.items():
            start = time.perf_counter()
            for i in range(len(some)):
                stage(i)
            times[name].append(1e6 * (time.perf_counter() - start) / len(some))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:<24} {value:6.0f} µs")
    return medians


def measure_sources(folder: Path, rounds: int) -> dict[str, float]:
    """Images/s with one worker, crop and flip, from the same bytes in a folder, in tar shards and in Parquet."""
    images, _ = open_dataset(str(folder))
    pack(str(folder), str(folder.parent / "shards"), shard_mb=16)
    sources = {"folder": images, "tar shards": open_dataset(str(folder.parent / "shards"))[0]}
    with contextlib.suppress(ImportError):
        write_parquet(images, folder.parent / "train.parquet")
        sources["Parquet"] = open_dataset(str(folder.parent / "train.parquet"), validation_fraction=1e-6)[0]
    rates = in_turn({k: lambda seed, source=v: ours(source, 1, seed) for k, v in sources.items()}, rounds)
    for name, rate in rates.items():
        print(f"{name:<12} {rate:.0f} images/s")
    return rates


def write_parquet(images: LabelledImages, path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    rows = {"image": [Path(images.source(i)).read_bytes() for i in range(len(images))], "label": list(images.targets)}
    columns = Features({"image": ImageFeature(), "label": ClassLabel(names=list(images.class_names))})
    Dataset.from_dict(rows, features=columns).to_parquet(str(path))


def environment(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("train/*/*.jpg"))
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
        "files": len(files),
        "mean_kilobytes": round(statistics.mean(file.stat().st_size for file in files) / 1e3, 1),
        "px": PX,
        "batch": BATCH,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("one worker", "two workers", "stages", "sources")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.images < (WARM_BATCHES + 4) * BATCH:
        parser.error(f"--images is {args.images}; {(WARM_BATCHES + 4) * BATCH} is the least")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= {"HF_HOME": temporary, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "NORMFREE_DATA": temporary}
        folder = Path(temporary) / "photographs"
        make_photographs(folder, args.images)
        functions: dict[str, Callable[[], Any]] = {
            "one worker": lambda: measure_loaders(folder, 1, args.rounds),
            "two workers": lambda: measure_loaders(folder, 2, args.rounds),
            "stages": lambda: measure_stages(folder, args.rounds),
            "sources": lambda: measure_sources(folder, args.rounds),
        }
        results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
        results["environment"] = environment(folder)
        results |= {part: functions[part]() for part in args.parts}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
