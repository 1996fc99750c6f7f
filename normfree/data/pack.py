"""Packs a data set into tar shards, which are quick to read and to copy; equal data gives equal bytes."""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from normfree.data.images import LabelledImages, Samples, UnreadableImage, image_suffixes, open_image, read_image
from normfree.data.loader import read_batches
from normfree.data.remote import short_hash
from normfree.data.shards import Index, index_file, scan
from normfree.data.sources import open_dataset
from normfree.data.splits import name_hash
from normfree.errors import InputError
from normfree.files import check_writable, replacing

Show = Callable[[int, int], None]  # of (done, total)
Job = Callable[[Any, int], Any]  # of (samples, index)

_CHUNK = 32  # images that a worker handles at a time


def pack(
    spec: str,
    out: str,
    *,
    shard_mb: float = 256,
    px: int | None = None,
    quality: int = 90,
    workers: int = 0,
    show: Show = lambda done, total: None,
) -> list[str]:
    """Writes the data set `spec` to the new folder `out` as train-000000.tar, ..., validation-000000.tar, ..., indexed.

    Images are shuffled by a hash of their names. Files are kept as they are, or, with `px`, re-encoded as JPEG of that
    `quality` with a short side of at most `px` pixels. After an interruption the same call resumes in OUT.partial.
    Returns what this call could not read, as "name: reason". Raises InputError if `out` exists, or if OUT.partial was
    begun with other settings or data.
    """
    if not 0 < shard_mb < math.inf or not 1 <= quality <= 100 or (px is not None and px < 1):
        raise InputError("--shard-mb is more than 0, --quality 1 to 100, --px at least 1")
    folder = Path(f"{out.rstrip('/')}.partial")
    check_writable(out, "folder", parents=True)
    splits = dict(zip(("train", "validation"), open_dataset(spec), strict=True))
    named = (f"{images.name(i)} {target}\n" for images in splits.values() for i, target in enumerate(images.targets))
    content = short_hash("".join(named))
    settings = json.dumps({"shard_mb": shard_mb, "px": px, "quality": quality, "content": content})
    folder.mkdir(parents=True, exist_ok=True)
    if (settings_file := folder / "pack.json").exists() and settings_file.read_text() != settings:
        raise InputError(f"{folder} was begun with other images or settings: repeat those, or delete it")
    with replacing(settings_file) as unfinished:
        unfinished.write_text(settings)
    total = sum(len(images) for images in splits.values())
    unreadable: list[str] = []
    finished = 0
    for split, images in splits.items():
        stored = partial(_stored, px=px, quality=quality)
        for position in _pack_split(images, folder / split, shard_mb * 1e6, stored, workers, unreadable):
            show(finished + position, total)
        finished += len(images)
    if len(unreadable) == total:
        raise InputError(f"none of the {total} images of {spec} could be read, the first is {unreadable[0]}")
    folder.rename(out)
    return unreadable


def each(images: Samples, indices: Sequence[int], function: Job, workers: int) -> Iterator[Any]:
    """`function(images, index)` for every index, in order, in `workers` processes (0: in this one)."""
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    for results in read_batches(partial(_all, function, images), chunks, workers):
        yield from results


def _all(function: Job, images: Samples, indices: Sequence[int]) -> list[Any]:
    return [function(images, index) for index in indices]


def _pack_split(
    images: LabelledImages, stem: Path, shard_bytes: float, stored: Job, workers: int, unreadable: list[str]
) -> Iterator[int]:
    """Writes the shards STEM-000000.tar, ... that are missing; yields the number of images done so far."""
    order = sorted(range(len(images)), key=lambda index: name_hash(0, images.name(index)))
    number = start = size = 0
    # an index is written after its shard, which is therefore whole
    while index := Index.load(index_file(f"{stem}-{number:06d}.tar")):
        start, number = 1 + order.index(int(index.keys[-1].partition(b"-")[0])), number + 1
    entries: list[tuple[str, bytes]] = []
    for position, item in enumerate(each(images, order[start:], stored, workers), start):
        if isinstance(item, str):
            unreadable.append(item)
        else:
            suffix, content = item
            words = re.sub("[^A-Za-z0-9_]+", "-", os.path.splitext(images.name(order[position]))[0])
            key = f"{order[position]:07d}-{words[-60:]}"
            entries += [(f"{key}.{suffix}", content), (f"{key}.cls", b"%d" % images.targets[order[position]])]
            size += len(content) + 2048  # two headers, and padding to blocks of 512 bytes
        if entries and (size >= shard_bytes or position == len(order) - 1):
            _write_shard(f"{stem}-{number:06d}.tar", entries, images.class_names)
            entries, number, size = [], number + 1, 0
        yield position + 1


def _write_shard(path: str, entries: Sequence[tuple[str, bytes]], class_names: Sequence[str]) -> None:
    with replacing(path) as unfinished, tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    scan(path, class_names).save(index_file(path))


def _stored(images: Samples, index: int, px: int | None, quality: int) -> tuple[str, bytes] | str:
    """(suffix, content) of an image in a shard, or "name: reason" if it is unreadable."""
    try:
        source = images.source(index)
        if px is None:
            with open_image(source) as image:
                suffix = (image.format or "").lower().replace("jpeg2000", "jp2").replace("jpeg", "jpg")
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            return suffix if f".{suffix}" in image_suffixes() else "jpg", content  # MPO, from some phones, is JPEG
        image = read_image(source, min_px=px)
        if (scale := px / min(image.size)) < 1:
            size = round(image.width * scale), round(image.height * scale)
            image = image.resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return "jpg", buffer.getvalue()
    except UnreadableImage as error:
        return f"{images.name(index)}: {error.reason}"
