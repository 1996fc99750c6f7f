"""What frozen features are worth for a data set: nearest neighbours and a linear classifier, without a training run."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.config import MAX_SEED, MAX_WORKERS, DataConfig
from normfree.data import LabelledImages, has_validation, open_dataset
from normfree.engine.device import pick_device
from normfree.engine.log import progress
from normfree.errors import InputError, check_range
from normfree.tasks.accuracy import Accuracy, pick_workers, warn_of_trained
from normfree.tasks.features import FeatureCache, load_embedder
from normfree.tasks.reports import check_outputs, plot_curves, save_reports, versions
from normfree.weights import ModelInfo

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's (Caron et al. 2021)
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)  # of C, from strong to weak weight decay
MAX_ITERATIONS = 300
_HELD_OUT = 0.2  # of the training images, to choose C
_MOST_FOR_CHOICE = 10_000  # training images for the choice of C
_CHUNK = 256  # images that are compared with all training images at once


@dataclass(frozen=True)
class LinearProbe:
    """A logistic regression on standardized features.

    `logits` (N, K), -inf for classes without training images. `strength` is scikit-learn's C, chosen by the accuracy on
    `held_out` of `chosen_on` training images; `converged`: whether the solver did, on all of them.
    """

    logits: np.ndarray
    strength: float
    held_out: int
    chosen_on: int
    converged: bool


@dataclass(frozen=True)
class Probe:
    """Results at one resolution, in percent of the validation images that can be read."""

    info: ModelInfo
    class_names: tuple[str, ...]
    num_train: int
    num_neighbours: int
    chance: float
    majority: float
    nearest_mean: float
    neighbours: Accuracy
    linear: Accuracy
    fit: LinearProbe
    unreadable: tuple[str, ...]
    computed: int = 0
    """Images whose features were computed; the others' were `reused`."""
    reused: int = 0

    @property
    def top1(self) -> dict[str, float]:
        """Top-1 of every classifier, from the simplest one on."""
        knn, linear = self.neighbours.top1_percent, self.linear.top1_percent
        simple = {"chance": self.chance, "majority class": self.majority, "nearest class mean": self.nearest_mean}
        return simple | {f"{self.num_neighbours} nearest neighbours": knn, "linear probe": linear}

    def report(self) -> dict[str, Any]:
        """Everything, as JSON; scores by class and the confusion matrix are those of the linear probe."""
        simple = {"chance": self.chance, "majority": self.majority, "nearest_mean": self.nearest_mean}
        knn = {"neighbours": self.num_neighbours, "neighbours_top1": self.neighbours.top1_percent}
        fit = {"C": self.fit.strength, "held_out": self.fit.held_out, "chosen_on": self.fit.chosen_on}
        crop = {"px": self.info.eval_px, "crop": self.info.eval_crop, "crop_fraction": self.info.crop_fraction}
        fit["converged"] = self.fit.converged
        linear = self.linear.report(self.class_names)
        linear["loss"] = linear["loss"] if math.isfinite(linear["loss"]) else None  # a class has no training images
        images = {"training_images": self.num_train, "unreadable": [*self.unreadable]}
        return crop | linear | images | simple | knn | {"linear_probe": fit}


def nearest_neighbours(train: Tensor, targets: Tensor, images: Tensor, num_classes: int, k: int) -> Tensor:
    """Scores (N, K) of the classes: sums of exp(similarity / 0.07) over the `k` training images nearest by cosine.

    `train` (M, D) and `images` (N, D) float32, `targets` (M,) int64. All pairs are compared. Caron et al. 2021, section
    4.1; their code.
    """
    train = F.normalize(train)
    scores = torch.zeros(len(images), num_classes, device=train.device)
    for start in range(0, len(images), _CHUNK):
        nearest = (F.normalize(images[start : start + _CHUNK]) @ train.T).topk(k, 1)
        weights = (nearest.values / TEMPERATURE).exp()
        scores[start : start + _CHUNK].scatter_add_(1, targets[nearest.indices], weights)
    return scores


def nearest_mean(train: Tensor, targets: Tensor, images: Tensor, num_classes: int) -> Tensor:
    """Similarity (N, K) by cosine to the means of the classes' normalized features; -inf without training images."""
    means = torch.zeros(num_classes, train.shape[1], device=train.device).index_add_(0, targets, F.normalize(train))
    empty = torch.bincount(targets, minlength=num_classes) == 0
    return (F.normalize(images) @ F.normalize(means).T).masked_fill(empty, -math.inf)


def linear_probe(train: np.ndarray, targets: np.ndarray, images: np.ndarray, num_classes: int) -> LinearProbe:
    """Multinomial logistic regression by scikit-learn's L-BFGS on features (M, D), for images (N, D).

    Features are standardized by the training images. A fifth of the training images of each class decides on C: it is
    the one of `STRENGTHS` with the highest accuracy, and the smallest of equals. They are tried from the smallest on,
    until two in a row are worse. Of more than 10,000 training images this takes 10,000, the same share of each class,
    and every second value. The regression is then fitted to all training images.
    """
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0)  # less is the rounding of a constant
    train, images = (((part - mean.astype(np.float32)) / scale.astype(np.float32)) for part in (train, images))
    rng = np.random.default_rng(0)
    chosen, strengths = np.arange(len(train)), STRENGTHS
    if len(train) > _MOST_FOR_CHOICE:
        strengths = STRENGTHS[::2]
        chosen = np.flatnonzero(_part_of_classes(targets, _MOST_FOR_CHOICE / len(train), rng))
    held = _part_of_classes(targets[chosen], _HELD_OUT, rng)
    fitted, tried = chosen[~held], chosen[held]

    def fit(rows: np.ndarray, strength: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged is said below
            return LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(train[rows], targets[rows])

    best, strength, worse = -1.0, 0.01, 0
    for value in strengths if len(tried) and len(set(targets[fitted])) > 1 else ():
        accuracy = float(fit(fitted, value).score(train[tried], targets[tried]))
        worse = worse + 1 if accuracy < best else 0
        if accuracy > best:
            best, strength = accuracy, value
        if worse == 2:
            break
    model = fit(np.arange(len(train)), strength)
    found = model.decision_function(images)
    found = np.stack([np.zeros_like(found), found], 1) if found.ndim == 1 else found
    logits = np.full((len(images), num_classes), -np.inf)
    logits[:, model.classes_] = found
    return LinearProbe(logits, strength, len(tried), len(chosen), int(max(model.n_iter_)) < MAX_ITERATIONS)


def _part_of_classes(targets: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Which of the images (N,) are in a random share of each class: at least one of two, and never all."""
    taken = np.zeros(len(targets), bool)
    for target in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == target))
        taken[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return taken


def probe_weights(
    weights: str,
    data: str,
    px: Sequence[int] | None = None,
    held_out: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | None = None,
    plot: str | None = None,
) -> list[Probe]:
    """Nearest neighbours and a linear probe on frozen features of a data set, at one or several resolutions.

    The classes are those of the data; the classifier of the weights is not used. Features are kept (`FeatureCache`).

    Args:
        px: resolutions; None: the file's pixels for evaluation.
        held_out, seed: of data without validation images, as in training: the share to hold out (0.1), and seed (0).
        out: a new file, .json for everything or .csv: a row for each class, or each resolution if there are several.
        plot: picture to write, of the accuracies over several resolutions.

    Raises:
        InputError: an argument that cannot be used; no image, or only one class, that can be read.
    """
    check_outputs(px, out, plot)
    check_range("workers", workers, 0, MAX_WORKERS)
    check_range("seed", seed, 0, MAX_SEED)
    where = pick_device(device)
    given = f"--held-out {held_out}" if held_out is not None else f"--seed {seed}" if seed is not None else ""
    if given and has_validation(data):
        raise InputError(f"{given}: {data} has validation images of its own, so that none are held out")
    model, info = load_embedder(weights)
    fraction = DataConfig.validation_fraction if held_out is None else held_out
    train, validation = open_dataset(data, validation_fraction=fraction, seed=seed or 0)
    for note in train.notes:
        print(f"note: {note}", file=sys.stderr)
    warn_of_trained(validation, info)
    model = model.to(where).to(memory_format=torch.channels_last)
    began, probes = time.monotonic(), []
    for each in (replace(info, eval_px=side) for side in px or (info.eval_px,)):
        with FeatureCache(weights, model, each, data, where) as cache:  # left before anything is fitted
            seen, unseen = (
                _features(cache, "training", train, workers),
                _features(cache, "validation", validation, workers),
            )
        if cache.reused:
            print(f"{cache.reused} of {cache.reused + cache.computed} features are from {cache.path}", file=sys.stderr)
        found = _probe(each, train.class_names, seen, unseen, where)
        probes.append(replace(found, computed=cache.computed, reused=cache.reused))
    head = {"weights": weights, "data": data, "held_out": held_out, "seed": seed, "architecture": info.architecture}
    head |= {"device": str(where), "seconds": round(time.monotonic() - began, 3)} | versions("scikit-learn")
    save_reports(head, [probe.report() for probe in probes], out)
    if plot is not None and px is not None:
        names = [*probes[0].top1][2:]  # chance and the majority class do not depend on the pixels
        plot_curves(px, {name: [probe.top1[name] for probe in probes] for name in names}, info.eval_px, plot)
    return probes


@dataclass(frozen=True)
class _Part:
    """Features (N, D) and classes (N,) of the images that can be read; "name: reason" for the others."""

    features: np.ndarray
    targets: np.ndarray
    unreadable: tuple[str, ...]


def _features(cache: FeatureCache, part: str, images: LabelledImages, workers: int | None) -> _Part:
    with progress(f"{part} features, {cache.info.eval_px} px") as show:
        values, readable, unreadable = cache.features(images, pick_workers(workers, images), show)
    if not readable:
        raise InputError(f"none of the {len(images)} {part} images can be read; the first: {unreadable[0]}")
    return _Part(values, np.asarray(images.targets, np.int64)[readable], tuple(unreadable))


def _probe(
    info: ModelInfo, class_names: tuple[str, ...], train: _Part, validation: _Part, device: torch.device
) -> Probe:
    classes, counts = np.unique(train.targets, return_counts=True)
    if len(classes) < 2:
        only = class_names[classes[0]]
        raise InputError(f"only class {only!r} has training images that can be read; a probe needs two classes")
    k = max(1, min(NEIGHBOURS, len(train.targets) // len(classes)))
    arrays = train.features, train.targets, validation.features
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    fit = linear_probe(*arrays, len(class_names))
    scores = (
        nearest_mean(tensors[0], tensors[1], tensors[2], len(class_names)),
        nearest_neighbours(tensors[0], tensors[1], tensors[2], len(class_names), k).log(),
        torch.from_numpy(fit.logits),
    )
    mean, knn, linear = (Accuracy.of(each.cpu(), torch.from_numpy(validation.targets)) for each in scores)
    return Probe(
        info=info,
        class_names=class_names,
        num_train=len(train.targets),
        num_neighbours=k,
        chance=100 / len(class_names),
        majority=100 * float((validation.targets == classes[counts.argmax()]).mean()),
        nearest_mean=mean.top1_percent,
        neighbours=knn,
        linear=linear,
        fit=fit,
        unreadable=train.unreadable + validation.unreadable,
    )


def probe_lines(probes: Sequence[Probe]) -> list[str]:
    """The results for people: a row for each classifier, a column for each resolution, and how they were made."""
    first = probes[0]
    widths = max(map(len, first.top1))
    lines = []
    if len(probes) > 1:
        lines.append(" " * widths + "".join(f"{f'{probe.info.eval_px} px':>11}" for probe in probes))
    for name in first.top1:
        lines.append(f"{name:<{widths}}" + "".join(f"{probe.top1[name]:>9.2f} %" for probe in probes))
    strengths = ", ".join(f"{probe.fit.strength:g}" for probe in probes)
    subset = "" if first.fit.chosen_on == first.num_train else f" of {first.fit.chosen_on}"
    reason = f"the best on {first.fit.held_out}{subset} training images"
    reason = reason if first.fit.held_out else "not chosen, as no class has two training images"
    lines.append(f"linear probe: C {strengths}, {reason}")
    stopped = ", ".join(str(probe.info.eval_px) for probe in probes if not probe.fit.converged)
    lines += [f"the linear probe was stopped after {MAX_ITERATIONS} iterations at {stopped} px"] if stopped else []
    sizes = f"{first.linear.num_images} images, {first.num_train} training images, {len(first.class_names)} classes"
    return [*lines, f"top-1 on {sizes}" + (f" at {first.info.eval_px} px" if len(probes) == 1 else "")]
