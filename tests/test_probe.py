"""`normfree eval --probe`, its kept features, and `eval --px` with several resolutions."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, draw
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import normfree
from normfree.cli import main
from normfree.data import EvalTransform, normalize, open_dataset, read_image
from normfree.data.pack import pack
from normfree.errors import InputError
from normfree.tasks import features as features_module
from normfree.tasks.features import FeatureCache, load_embedder
from normfree.tasks.probe import linear_probe, nearest_mean, nearest_neighbours, probe_weights
from normfree.tasks.reports import plot_curves


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NORMFREE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Of an untrained network without class names, of seven classes."""
    torch.manual_seed(0)
    model = normfree.create_model("nfnet_nano", 7, width=(16, 32, 32, 32), group_width=8)
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    normfree.save(model, path, replace(model.info, eval_px=16))
    return str(path)


def probe(weights: str, data: object, *args: Any, **options: Any) -> Any:
    return probe_weights(weights, str(data), *args, **{"device": "cpu", "workers": 0} | options)


def run(*args: object) -> None:
    main([word for a in args for word in (a.split() if isinstance(a, str) else [str(a)])])


def refused(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert (stop.value.code, out, len(lines)) == (2, "", 1), err
    return lines[0]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The sizes of the batches that go through the network."""
    sizes: list[int] = []
    embed = features_module.embed

    def counted(model: Any, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return embed(model, images)

    monkeypatch.setattr(features_module, "embed", counted)
    return sizes


def clusters(classes: int, per_class: int, seed: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Points of classes that differ in one small coordinate, (N, width) float32, with large noise in the others."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(classes), per_class)
    points = rng.normal(size=(len(targets), width)) * np.where(np.arange(width) == 0, 0.05, 3)
    points[:, 0] += targets
    return points.astype(np.float32), targets


def test_features_are_the_models_own(weights, photos):
    train, _ = open_dataset(str(photos))
    model, info = load_embedder(weights, 24)
    with FeatureCache(weights, model, info, str(photos), torch.device("cpu")) as cache:
        values, readable, unreadable = cache.features(train, 0)
    assert (readable, unreadable) == (list(range(72)), [])
    own = normfree.load(weights)
    crop = EvalTransform(24, info.eval_crop, info.crop_fraction)
    x = torch.stack([crop(read_image(train.source(i))) for i in range(72)])
    with torch.inference_mode():
        expected = own.forward_head(own.forward_features(normalize(x, info.mean, info.std)), pre_logits=True)
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_nearest_neighbours_against_a_slow_reference(k):
    rng = np.random.default_rng(0)
    train, images = (rng.normal(size=(n, 7)).astype(np.float32) + 0.5 for n in (60, 300))
    targets = rng.integers(0, 4, 60)
    scores = nearest_neighbours(*map(torch.from_numpy, (train, targets, images)), 5, k).numpy()
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (train, images))
    for row, similarity in zip(scores, b @ a.T, strict=True):
        expected = np.zeros(5)
        for place in np.argsort(-similarity)[:k]:
            expected[targets[place]] += np.exp(similarity[place] / 0.07)
        np.testing.assert_allclose(row, expected, rtol=1e-4)


def test_nearest_mean_against_a_slow_reference():
    train, targets = clusters(3, 10, 0)
    images, _ = clusters(3, 4, 1)
    found = nearest_mean(*map(torch.from_numpy, (train, targets, images)), 4).numpy()
    unit = train.astype(np.float64) / np.linalg.norm(train.astype(np.float64), axis=1, keepdims=True)
    for label in range(3):
        mean = unit[targets == label].mean(0)
        cosine = images @ mean / np.linalg.norm(images, axis=1) / np.linalg.norm(mean)
        np.testing.assert_allclose(found[:, label], cosine, atol=1e-5)
    assert (found[:, 3] == -np.inf).all()


@pytest.mark.parametrize("classes", [2, 5])
def test_the_linear_probe_is_scikit_learns(classes):
    train, targets = clusters(classes, 40, 0)
    images, truth = clusters(classes, 10, 1)
    found = linear_probe(train, targets, images, classes + 1)
    scaler = StandardScaler().fit(train.astype(np.float64))
    direct = LogisticRegression(C=found.strength, max_iter=1000, tol=1e-8)
    direct.fit(scaler.transform(train.astype(np.float64)), targets)
    chances = np.exp(found.logits - found.logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    np.testing.assert_allclose(chances[:, :-1], direct.predict_proba(scaler.transform(images)), atol=5e-3)
    assert (chances[:, -1] == 0).all()
    assert (found.held_out, found.chosen_on, found.converged) == (8 * classes, 40 * classes, True)
    means = nearest_mean(*map(torch.from_numpy, (train, targets, images)), classes).argmax(1).numpy()
    assert (found.logits.argmax(1) == truth).mean() > 0.95 > (means == truth).mean() + 0.1


def test_strong_and_weak_weight_decay_are_chosen_by_what_they_give():
    """Noise alone wants strong weight decay; a small feature that is never wrong wants weak decay."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 200)
    noisy = (rng.normal(size=(200, 100)) + 0.25 * targets[:, None]).astype(np.float32)
    strong = linear_probe(noisy, targets, noisy, 2).strength
    train, targets = clusters(5, 40, 0)
    assert strong < linear_probe(train, targets, train, 5).strength


def test_many_images_choose_on_an_equal_share_of_each_class(monkeypatch):
    monkeypatch.setattr("normfree.tasks.probe._MOST_FOR_CHOICE", 50)
    train, targets = clusters(5, 40, 0)
    found = linear_probe(train, targets, train, 5)
    assert (found.chosen_on, found.held_out) == (50, 10)
    standard = StandardScaler().fit_transform(train.astype(np.float64))
    direct = LogisticRegression(C=found.strength, max_iter=1000).fit(standard, targets)  # to all of them
    np.testing.assert_allclose(found.logits, direct.decision_function(standard), atol=0.02)


def test_a_constant_feature_and_a_class_of_one_image():
    train, targets = clusters(3, 20, 0)
    train[:, 5], keep = 0.1, np.r_[0:41]
    found = linear_probe(train[keep], targets[keep], train, 3)
    images = train.copy()
    images[:, 5] += 1e-6
    again = linear_probe(train[keep], targets[keep], images, 3)
    np.testing.assert_allclose(again.logits, found.logits, atol=1e-3)


def test_one_image_of_each_class(weights, photos, capsys):
    for path in photos.glob("train/*/*.jpg"):
        if path.name != "00.jpg":
            path.unlink()
    run("eval", weights, photos, "--probe --device cpu --workers 0")
    out, _ = capsys.readouterr()
    assert "linear probe: C 0.01, not chosen, as no class has two training images" in out
    assert out.splitlines()[3].startswith("1 nearest neighbours ")


def test_the_command(weights, photos, tmp_path, capsys):
    args = ("eval", weights, photos, "--probe --device cpu --workers 0")
    run(*args, "--out", tmp_path / "x.json")
    out, err = capsys.readouterr()
    rows = {line.rsplit(maxsplit=2)[0].strip(): line for line in out.splitlines()}
    report = json.loads((tmp_path / "x.json").read_text())
    assert rows["chance"].endswith(" 33.33 %")
    assert rows["majority class"].endswith(" 33.33 %")
    assert rows["linear probe"].endswith(f" {report['top1']:.2f} %")
    assert rows["20 nearest neighbours"].endswith(f" {report['neighbours_top1']:.2f} %")
    assert out.splitlines()[-1] == "top-1 on 18 images, 72 training images, 3 classes at 16 px"
    assert report["top1"] >= report["nearest_mean"] >= 60
    assert (report["images"], report["training_images"], report["px"]) == (18, 72, 16)
    assert sum(row["right"] for row in report["per_class"]) == round(0.18 * report["top1"])
    assert "features are from" not in err
    run(*args, "--out", tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == sorted(COLOURS)
    again, err = capsys.readouterr()
    assert again == out
    assert "90 of 90 features are from" in err


def test_kept_features_are_used_again_until_an_image_changes(weights, photos, own_cache, passes):
    (first,) = probe(weights, photos)
    assert (sum(passes), first.computed, first.reused) == (90, 90, 0)
    passes.clear()
    (again,) = probe(weights, photos)
    assert (passes, again.computed, again.reused, again.top1) == ([], 0, 90, first.top1)
    changed, before = photos / "train" / "red" / "03.jpg", os.stat(photos / "train" / "red" / "03.jpg")
    content = bytearray(changed.read_bytes())
    content[-3] ^= 1  # of the same size, and dated back
    changed.write_bytes(content)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    draw(photos / "validation" / "blue" / "new.jpg", COLOURS["blue"], 77)
    (third,) = probe(weights, photos)
    assert (passes, third.computed, third.reused) == ([1, 1], 2, 89)
    passes.clear()
    probe(weights, photos, [24])
    assert sum(passes) == 91
    (photos / "train" / "red" / "04.jpg").unlink()
    passes.clear()
    (last,) = probe(weights, photos)
    assert (passes, last.num_train) == ([], 71)
    assert len(list(own_cache.iterdir())) == 2


def test_features_of_other_weights_are_not_used(weights, photos, passes, tmp_path):
    probe(weights, photos)
    model = normfree.load(weights)
    with torch.no_grad():
        model.final_conv.bias.add_(1)
    normfree.save(model, tmp_path / "b.safetensors")
    passes.clear()
    probe(str(tmp_path / "b.safetensors"), photos)
    assert sum(passes) == 90


def test_images_without_files_of_their_own(weights, photos, passes, tmp_path):
    pack(str(photos), str(tmp_path / "shards"))
    (first,) = probe(weights, tmp_path / "shards")
    (again,) = probe(weights, tmp_path / "shards")
    assert (first.computed, again.reused, again.top1) == (90, 90, first.top1)
    assert first.top1 == probe(weights, photos)[0].top1


@pytest.mark.parametrize("damage", ["empty", "cut", "bits", "pickle", "shape"])
def test_damaged_features_are_computed_again(damage, weights, photos, own_cache, passes, capsys):
    (first,) = probe(weights, photos)
    (path,) = own_cache.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    if damage in ("pickle", "shape"):
        with path.open("wb") as file:
            wrong = np.array([{}] * 2) if damage == "pickle" else np.zeros((2, 3), np.float32)
            np.savez(file, images=np.array(["a", "b"]), features=wrong)
    else:
        path.write_bytes({"empty": b"", "cut": content[:999], "bits": content}[damage])
    passes.clear()
    (again,) = probe(weights, photos)
    assert (sum(passes), again.top1) == (90, first.top1)
    assert "kept features are not used" in capsys.readouterr().err
    passes.clear()
    probe(weights, photos)
    assert passes == []


def test_an_interruption_keeps_what_was_computed(weights, photos, passes, monkeypatch, own_cache):
    monkeypatch.setattr(features_module, "EVAL_BATCH", 16)
    counted = features_module.embed

    def stop_in_the_third_batch(*args: Any) -> torch.Tensor:
        if len(passes) == 2:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(features_module, "embed", stop_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        probe(weights, photos)
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(features_module, "embed", counted)
    (found,) = probe(weights, photos)
    assert (found.computed, found.reused) == (58, 32)


def test_features_that_are_not_finite(weights, photos, tmp_path, own_cache):
    model = normfree.load(weights)
    with torch.no_grad():
        model.final_conv.bias.fill_(float("nan"))
    normfree.save(model, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"features of train/blue/00.jpg are not finite"):
        probe(str(tmp_path / "b.safetensors"), photos)
    assert not own_cache.exists()


def test_the_least_recently_used_features_go(weights, photos, own_cache, monkeypatch):
    probe(weights, photos, [16])
    (old,) = own_cache.iterdir()
    os.utime(old, (1, 1))
    probe(weights, photos, [24])
    monkeypatch.setattr(features_module, "_MAX_BYTES", 2.5 * old.stat().st_size)
    probe(weights, photos, [32])
    assert len(list(own_cache.iterdir())) == 2
    assert not old.exists()


def test_a_folder_that_cannot_be_written(weights, photos, own_cache, capsys):
    own_cache.parent.mkdir()
    own_cache.write_text("a file, where the folder would be")
    (found,) = probe(weights, photos)
    assert found.computed == 90
    assert "warning: the features are not kept for the next time" in capsys.readouterr().err


def test_unreadable_images_are_named_and_not_counted(weights, photos, capsys):
    (photos / "train" / "red" / "00.jpg").write_bytes(b"no image")
    (photos / "validation" / "blue" / "01.jpg").write_bytes(b"")
    run("eval", weights, photos, "--probe --device cpu --workers 1 --px 16 24")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "top-1 on 17 images, 71 training images, 3 classes"
    assert err.count("warning: not counted: train/red/00.jpg: not an image in a known format") == 1
    assert err.count("warning: not counted: validation/blue/01.jpg: the file is empty") == 1


def test_held_out_images_are_those_of_training(weights, photos, tmp_path):
    shutil.move(photos / "train", tmp_path / "unsplit")
    (found,) = probe(weights, tmp_path / "unsplit", held_out=0.3, seed=5)
    train, validation = open_dataset(str(tmp_path / "unsplit"), validation_fraction=0.3, seed=5)
    assert (found.num_train, found.linear.num_images) == (len(train), len(validation))
    (other,) = probe(weights, tmp_path / "unsplit", seed=6)  # other shares of the same images
    assert (other.reused, other.computed) == (72, 0)


def test_classes_that_cannot_be_told_apart(weights, photos, tmp_path, capsys):
    for name in ("green", "red"):
        for path in (photos / "train" / name).iterdir():
            path.write_bytes(b"no image")
    with pytest.raises(InputError, match="only class 'blue' has training images that can be read; a probe needs two"):
        probe(weights, photos)
    shutil.rmtree(photos / "train" / "green")
    shutil.rmtree(photos / "train" / "red")
    assert "one class" in refused(capsys, "eval", weights, photos / "train", "--probe --device cpu")


def test_a_class_whose_training_images_are_all_broken(weights, photos, tmp_path):
    for path in (photos / "train" / "green").iterdir():
        path.write_bytes(b"no image")
    out = tmp_path / "x.json"
    (found,) = probe(weights, photos, out=str(out))
    assert found.linear.confusion[:, 1].sum() == 0
    assert json.loads(out.read_text(), parse_constant=pytest.fail)["loss"] is None


@pytest.fixture
def named(weights, tmp_path) -> str:
    model = normfree.load(weights)
    model.reset_classifier(3)
    normfree.save(model, tmp_path / "named.safetensors", replace(model.info, class_names=tuple(COLOURS)))
    return str(tmp_path / "named.safetensors")


@pytest.mark.parametrize("probed", ["", "--probe"])
def test_several_resolutions(probed, named, photos, tmp_path, capsys):
    options = f"--px 16 32 24 --device cpu --workers 0 {probed}"
    run("eval", named, photos, options, "--out", tmp_path / "x.json", "--plot", tmp_path / "x.png")
    out, _ = capsys.readouterr()
    run("eval", named, photos, options, "--out", tmp_path / "x.csv")
    report = json.loads((tmp_path / "x.json").read_text())
    rows = report["resolutions"]
    assert [row["px"] for row in rows] == [16, 32, 24]
    with (tmp_path / "x.csv").open(newline="") as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [row["top1"] for row in rows]
    if probed:
        assert out.splitlines()[0].split() == ["16", "px", "32", "px", "24", "px"]
        assert out.splitlines()[5].split()[2::2] == [f"{row['top1']:.2f}" for row in rows]
    else:
        assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
            [str(row["px"]), f"{row['top1']:.2f}"] for row in rows
        ]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    run("eval", named, photos, "--px 32 --device cpu --workers 0", probed, "--out", tmp_path / "y.json")
    single = json.loads((tmp_path / "y.json").read_text())
    same = set(single) & set(rows[1]) - {"seconds", "images_per_second"}
    assert len(same) > 8
    assert {key: single[key] for key in same} == {key: rows[1][key] for key in same}


def test_curves_are_drawn_over_sorted_pixels(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *xy, **k: (drawn.append(xy), plot(self, *xy, **k))[1])
    plot_curves([32, 16, 24], {"a": [3.0, 1, 2], "b": [30.0, 10, 20]}, 24, str(tmp_path / "x.svg"))
    assert drawn == [((16, 24, 32), (1, 2, 3)), ((16, 24, 32), (10, 20, 30))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--px", "--px"),
        ("--px 16 16", "--px 16 16: give each resolution once"),
        ("--px 16 4", "--px 4: 8 to 4096"),
        ("--plot x.png", "--plot x.png draws accuracy over pixels: give several"),
        ("--px 16 --plot x.png", "give several"),
        ("--px 16 24 --plot x.jpg", "must end in .pdf or .png or .svg"),
        ("--out x.txt", "must end in .json or .csv"),
        ("--probe --held-out 0.2", "has validation images of its own"),
        ("--probe --seed 1", "has validation images of its own"),
        ("--probe --workers -1", "--workers -1"),
        ("--probe --seed -1", "--seed -1"),
        ("", "has no class names, so the classes of"),
    ],
)
def test_options_that_cannot_be_used(words, message, weights, photos, capsys, monkeypatch, own_cache, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "eval", weights, photos, words, "--device cpu")
    assert not own_cache.exists()
    assert not list(Path().glob("x*"))
