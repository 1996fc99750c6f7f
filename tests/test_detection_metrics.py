"""COCO metrics against pycocotools, run lengths against torchvision's pasted masks, and pictures of both."""

import contextlib
import copy
import io
import json
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import paste_masks_in_image

from normfree.data.coco import open_detection
from normfree.errors import InputError
from normfree.tasks.detection import draw as pictures
from normfree.tasks.detection import metrics
from normfree.tasks.detection.draw import draw, side_by_side
from normfree.tasks.detection.metrics import as_results, cap_line, coco_scores, encode, score_table

NAMES = ("cat", "dog", "eel", "fox")
TWELVE = ("ap", "ap50", "ap75", "small", "medium", "large")
TWELVE += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
# pycocotools up to 2.0.11 under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COCO_TINY = Path(__file__).parents[2] / "shared" / "data" / "coco-tiny.zip"


def polygon(rng: np.random.Generator, radius: float, width: int, height: int) -> list[float]:
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    reach = radius * rng.uniform(0.6, 1, 9)
    centre = rng.uniform(radius, [width - radius, height - radius])
    return (centre + np.stack([np.cos(angles), np.sin(angles)], 1) * reach[:, None]).ravel().tolist()


def code_of(segmentation, width: int, height: int) -> dict:
    """Any segmentation as compressed run lengths with text."""
    if isinstance(segmentation, list):
        code = reference_mask.merge(reference_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = reference_mask.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    counts = code["counts"]
    return {"size": code["size"], "counts": counts if isinstance(counts, str) else counts.decode()}


def runs(code: dict) -> dict:
    """Compressed run lengths as a list of numbers, as COCO's crowds have them."""
    flat = reference_mask.decode(code).ravel(order="F")
    ends = [*np.flatnonzero(np.diff(flat)) + 1, len(flat)]
    counts = np.diff([0, *ends]).tolist()
    return {"size": code["size"], "counts": counts if flat[0] == 0 else [0, *counts]}


def made_truth(seed: int) -> dict:
    """Polygons, both kinds of run lengths and crowds of every size; one image is empty, one class has no object."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(1, 9):
        width, height = (int(side) for side in rng.integers(230, 330, 2))
        images.append({"id": image_id, "width": width, "height": height})
        for number in range(int(rng.integers(3, 9)) if image_id != 4 else 0):
            shape = [polygon(rng, rng.choice([8, 14, 35, 90, 100]), width, height)]
            code = code_of(shape, width, height)
            crowd = number == 2
            segmentation = runs(code) if crowd else (shape, code)[number % 2]
            area = float(reference_mask.area(code)) + rng.uniform(-1, 1)  # that of the file counts
            row = {"image_id": image_id, "category_id": int(rng.integers(1, 4)), "bbox": box_of(code)}
            row |= {"segmentation": segmentation, "iscrowd": int(crowd), "area": area}
            annotations.append({"id": len(annotations) + 1} | row)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": NAMES[i - 1]} for i in (1, 2, 3, 4)],
    }


def box_of(code: dict) -> list[float]:
    return [float(value) for value in reference_mask.toBbox(code)]


def perturbed(truth: dict, seed: int) -> list[dict]:
    """Objects moved a little, taken for others, found twice or missed, with many equal scores; one image has none."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    classes = sorted(category["id"] for category in truth["categories"])
    results = []
    for annotation in truth["annotations"]:
        for _ in range(int(rng.integers(0, 4)) if annotation["image_id"] != truth["images"][1]["id"] else 0):
            pixels = reference_mask.decode(code_of(annotation["segmentation"], *sizes[annotation["image_id"]]))
            moved = np.roll(pixels, rng.integers(-6, 7, 2), (0, 1))
            code = reference_mask.encode(np.asfortranarray(moved))
            box = np.array(box_of(code)) + rng.normal(0, 3, 4)
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(classes))
            row = {"image_id": annotation["image_id"], "category_id": category}
            row |= {"bbox": [*box[:2], *box[2:].clip(1)], "score": round(float(rng.random()), 1)}
            results.append(row | {"segmentation": {"size": code["size"], "counts": code["counts"].decode()}})
    return [results[i] for i in rng.permutation(len(results))]


def as_predictions(truth: dict) -> list[dict]:
    """The objects themselves, as results of score 1."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    return [
        {key: row[key] for key in ("image_id", "category_id", "bbox")}
        | {"score": 1.0, "segmentation": code_of(row["segmentation"], *sizes[row["image_id"]])}
        for row in truth["annotations"]
        if not row["iscrowd"]
    ]


def reference(truth: dict, results: list[dict], kind: str, limits: tuple[int, ...] = (1, 10, 100)) -> COCOeval:
    results = copy.deepcopy(results)
    for result in results:
        del result["segmentation" if kind == "bbox" else "bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = copy.deepcopy(truth)
        dataset.createIndex()
        run = COCOeval(dataset, dataset.loadRes(results), kind)
        run.params.maxDets = list(limits)
        run.evaluate()
        run.accumulate()
        if limits == (1, 10, 100):
            run.summarize()
    return run


def or_none(value: float) -> float | None:
    return None if value == -1 else pytest.approx(value, abs=1e-12, rel=0)


def mean(values: np.ndarray) -> float | None:
    return or_none(values[values > -1].mean() if (values > -1).any() else -1)


def check(truth: dict, results: list[dict], kind: str, names) -> metrics.Scores:
    """The scores, of which all are pycocotools'."""
    before = copy.deepcopy((truth, results))
    scores = coco_scores(truth, results, kind, names)
    assert (truth, results) == before
    run = reference(truth, results, kind)
    assert [getattr(scores, name) for name in TWELVE] == [or_none(value) for value in run.stats]
    precision = run.eval["precision"]
    for k, row in enumerate(scores.per_class):
        assert row.name == names[k]
        assert row.ap == mean(precision[:, :, k, 0, -1])
        assert row.ap50 == mean(precision[0, :, k, 0, -1])
        assert row.objects == sum(o["category_id"] == k + 1 and not o["iscrowd"] for o in truth["annotations"])
    return scores


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_pycocotools(kind, seed, capsys):
    truth = made_truth(seed)
    scores = check(truth, perturbed(truth, seed + 100), kind, NAMES)
    assert 0.05 < scores.ap < 0.9
    assert scores.per_class[3] == metrics.ClassAP("fox", 0, None, None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_sizes_of_masks_are_those_of_masks(kind):
    """A thin diagonal object: a large box, a small mask."""
    shape = [[10.0, 10.0, 14.0, 10.0, 150.0, 146.0, 150.0, 150.0]]
    code = code_of(shape, 160, 160)
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box_of(code), "segmentation": shape, "iscrowd": 0}
    row["area"] = float(reference_mask.area(code))
    truth = {"images": [{"id": 1, "width": 160, "height": 160}], "annotations": [row], "categories": [{"id": 1}]}
    wrong = [  # the second is elsewhere: a false positive with a small mask, but a large box
        *as_predictions(truth),
        {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 100.0, 100.0], "score": 2.0}
        | {"segmentation": code_of([[0.0, 100.0, 1.0, 100.0, 100.0, 0.0, 99.0, 0.0]], 160, 160)},
    ]
    scores = check(truth, wrong, kind, ("a",))
    assert scores.small == pytest.approx(1.0 if kind == "bbox" else 0.5)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_as_predictions_scores_one(kind):
    truth = made_truth(5)
    scores = check(truth, as_predictions(truth), kind, NAMES)
    assert [getattr(scores, name) for name in TWELVE if name not in ("ar1", "ar10")] == [1.0] * 10
    assert scores.detections == sum(not row["iscrowd"] for row in truth["annotations"])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_scores_equal_pycocotools_on_coco(kind, split):
    if not COCO_TINY.exists():
        pytest.skip("no coco-tiny.zip beside the checkout")
    with zipfile.ZipFile(COCO_TINY) as archive:
        truth = json.loads(archive.read(f"coco-tiny/annotations/instances_{split}2017.json"))
    labels = {category["id"]: k for k, category in enumerate(truth["categories"], 1)}
    for number, row in enumerate(truth["annotations"], 1):
        row |= {"id": number, "category_id": labels[row["category_id"]]}
    truth["categories"] = [category | {"id": labels[category["id"]]} for category in truth["categories"]]
    names = [category["name"] for category in truth["categories"]]
    perfect = check(truth, as_predictions(truth), kind, names)
    assert {perfect.ap, perfect.small, perfect.medium, perfect.large, perfect.ar100} == {1.0}
    assert 0.1 < check(truth, perturbed(truth, 0), kind, names).ap < 0.9


@pytest.mark.parametrize("most", [1, 3, 12, 150])
def test_another_number_of_detections(most):
    truth = made_truth(6)
    results = [dict(result) for _ in range(3) for result in perturbed(truth, 7)]
    scores = coco_scores(truth, results, "bbox", NAMES, max_detections=most)
    run = reference(truth, results, "bbox", tuple(sorted({min(1, most), min(10, most), most})))
    precision, recall = run.eval["precision"], run.eval["recall"]
    assert (scores.ap, scores.ap50, scores.ap75) == tuple(
        mean(precision[part, :, :, 0, -1]) for part in (slice(None), 0, 5)
    )
    assert [scores.small, scores.medium, scores.large] == [mean(precision[:, :, :, i, -1]) for i in (1, 2, 3)]
    assert [scores.ar1, scores.ar100] == [mean(recall[:, :, 0, place]) for place in (0, -1)]
    assert scores.ar10 == mean(recall[:, :, 0, min(1, recall.shape[-1] - 1)])
    assert scores.max_detections == most


def test_without_predictions_the_scores_are_zero():
    truth = made_truth(8)
    for kind in ("bbox", "segm"):
        scores = coco_scores(truth, [], kind, NAMES)
        assert [getattr(scores, name) for name in TWELVE] == [0.0] * 12
        assert [row.ap for row in scores.per_class] == [0.0, 0.0, 0.0, None]
    lines = score_table(scores, None)
    assert "nothing was detected" in lines
    assert any(line.startswith("AP  ") and "0.00 %" in line for line in lines)


def test_without_objects_there_is_nothing_to_score():
    truth = made_truth(9) | {"annotations": []}
    wrong = perturbed(made_truth(9), 1)
    for results in ([], wrong):
        scores = coco_scores(truth, results, "bbox", NAMES)
        assert [getattr(scores, name) for name in TWELVE] == [None] * 12
    assert "n/a (no objects)" in score_table(scores, None)[1]


def test_images_without_predictions_and_without_objects_count():
    truth = made_truth(10)
    results = as_predictions(truth)
    first = truth["images"][0]["id"]
    missed = [result for result in results if result["image_id"] != first]
    assert coco_scores(truth, missed, "bbox", NAMES).ap < 1
    empty = {"image_id": 4, "category_id": results[0]["category_id"], "bbox": [0.0, 0.0, 9.0, 9.0], "score": 2.0}
    assert coco_scores(truth, [*results, empty], "bbox", NAMES).ap < 1


def test_of_equal_scores_the_first_counts():
    truth = {"images": [{"id": 1, "width": 99, "height": 99}]}
    row = {"image_id": 1, "category_id": 1, "bbox": [10.0, 10.0, 40.0, 40.0]}
    truth["annotations"] = [row | {"id": 1, "iscrowd": 0, "area": 1600.0}]
    right, wrong = row | {"score": 0.5}, row | {"score": 0.5, "bbox": [50.0, 50.0, 40.0, 40.0]}
    assert coco_scores(truth, [right, wrong], "bbox", ("a",)).ap == 1.0
    assert coco_scores(truth, [wrong, right], "bbox", ("a",)).ap == 0.5


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"id": 0}, "bbox", "annotation ids 0"),
        ({"id": 2}, "bbox", "annotation ids that occur twice"),
        ({"category_id": 0}, "bbox", "the ground truth has category_id 0, which is not one of the 4 known"),
        ({"image_id": 77}, "bbox", "the ground truth has image_id 77"),
        ({"segmentation": None}, "segm", "1 of 34 objects have no mask"),
        ({"segmentation": []}, "segm", "1 of 34 objects have no mask"),
    ],
)
def test_truth_that_would_be_scored_wrong_is_refused(change, kind, said):
    truth = made_truth(11)
    results = as_predictions(truth)
    truth["annotations"][0] |= change
    with pytest.raises(InputError, match=said):
        coco_scores(truth, results, kind, NAMES)


@pytest.mark.parametrize("change", [{"category_id": 5}, {"image_id": 9}])
def test_results_that_would_be_dropped_are_refused(change):
    truth = made_truth(12)
    with pytest.raises(InputError, match=f"the results have {next(iter(change))}"):
        coco_scores(truth, [as_predictions(truth)[0] | change], "bbox", NAMES)


def test_pycocotools_is_left_alone():
    assert COCO.__module__ == "pycocotools.coco"
    assert sys.modules["pycocotools"].__file__ != sys.modules["faster_coco_eval"].__file__


def some_detections(count: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """Also boxes at the border, and boxes of less than a pixel."""
    ends = torch.tensor([width, height])
    corner = (torch.rand(count, 2) * ends - 5).clamp(min=0)
    side = torch.rand(count, 2) ** 3 * ends
    masks = torch.nn.functional.interpolate(torch.rand(count, 1, 7, 7), size=28, mode="bilinear")[:, 0]
    boxes = torch.cat([corner, (corner + side).minimum(ends)], 1)
    return {"boxes": boxes, "masks": masks, "labels": torch.randint(1, 5, (count,)), "scores": torch.rand(count)}


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_run_lengths_are_those_of_pasted_masks(monkeypatch, at_once, threshold):
    height, width = 61, 83
    found = some_detections(40, height, width)
    found["masks"][0] = threshold  # at the threshold is inside
    found["masks"][1] = 0
    monkeypatch.setattr(metrics, "_PASTE_BYTES", at_once * 4 * height * width)
    pasted = paste_masks_in_image(found["masks"][:, None], found["boxes"], (height, width))[:, 0] >= threshold
    codes = encode(found["boxes"], found["masks"], (height, width), threshold)
    json.dumps(codes)
    assert [code["size"] for code in codes] == [[height, width]] * 40
    assert np.array_equal(reference_mask.decode(codes).transpose(2, 0, 1), pasted.numpy())
    assert pasted[0].any()
    assert encode(found["boxes"][:0], found["masks"][:0], (height, width)) == []


def test_large_images_are_pasted_a_mask_at_a_time(monkeypatch):
    counts = []

    def paste(masks, boxes, size):
        counts.append(len(masks))
        assert 4 * len(masks) * size[0] * size[1] <= 64 * 2**20
        return torch.zeros(1).expand(len(masks), 1, *size)

    monkeypatch.setattr(metrics, "paste_masks_in_image", paste)
    monkeypatch.setattr(metrics.rle, "encode", lambda pixels: [{"counts": b""}] * pixels.shape[2])
    found = some_detections(100, 3000, 4000)
    assert len(encode(found["boxes"], found["masks"], (3000, 4000))) == 100
    assert counts == [1] * 100
    counts.clear()
    encode(found["boxes"], found["masks"], (1000, 1000))
    assert counts == [16] * 6 + [4]


def test_results_of_detections():
    found = some_detections(5, 40, 60)
    results = as_results(found, 7, (40, 60))
    assert json.loads(json.dumps(results)) == results
    for i, result in enumerate(results):
        x, y, width, height = result["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(found["boxes"][i].tolist(), abs=1e-9)
        assert (result["image_id"], result["category_id"]) == (7, found["labels"][i])
        assert result["score"] == found["scores"][i].item()
        assert result["segmentation"] == encode(found["boxes"], found["masks"], (40, 60))[i]
    del found["masks"]
    assert "segmentation" not in as_results(found, 7, (40, 60))[0]
    assert as_results({name: value[:0] for name, value in found.items()}, 7, (40, 60)) == []


def test_the_table_says_what_cannot_be_scored():
    truth = made_truth(13)
    truth["annotations"] = [row for row in truth["annotations"] if row["area"] >= 32**2]
    results = perturbed(truth, 14)
    box, mask = (coco_scores(truth, results, kind, NAMES) for kind in ("bbox", "segm"))
    lines = score_table(box, mask)
    assert lines[0].split() == ["box", "mask"]
    assert lines[1].split() == ["AP", f"{100 * box.ap:.2f}", "%", f"{100 * mask.ap:.2f}", "%"]
    assert "AP small   n/a (no objects of this size)" in lines
    assert lines[-1] == "n/a (no objects): 1 of 4 classes: fox"
    cat = next(line for line in lines if line.startswith("cat"))
    row = box.per_class[0]
    numbers = [row.ap, row.ap50, mask.per_class[0].ap]
    assert cat.split() == ["cat", str(row.objects), *" % ".join(f"{100 * n:.2f}" for n in numbers).split(), "%"]
    assert not any("-1" in line for line in lines)
    assert "mask" not in "".join(score_table(box, None))


def test_the_table_of_many_classes_has_the_worst_and_the_best():
    rows = tuple(metrics.ClassAP(f"c{i}", 1, i / 40, i / 40) for i in range(30))
    scores = metrics.Scores(*[0.5] * 12, per_class=rows, detections=9, max_detections=100)
    lines = score_table(scores, scores, most=4)
    names = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert names == ["c0", "c1", "...", "c28", "c29"]
    assert len(score_table(scores, None, most=30)) == 9 + 30


def test_the_cap_of_detections_is_named():
    assert cap_line([3, 99, 0], 100) is None
    assert cap_line([3, 100, 100], 100).startswith("2 of 3 images have 100 detections, the most that are kept")
    assert cap_line([100], 100).startswith("1 of 1 images has")


def blank(width: int = 700, height: int = 700) -> Image.Image:
    return Image.new("RGB", (width, height), (10, 20, 30))


def changed_pixels(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture) != (10, 20, 30)).any(2)


def test_masks_of_every_form_are_drawn_alike():
    found = some_detections(6, 700, 700)
    codes = encode(found["boxes"], found["masks"], (700, 700))
    pixels = torch.from_numpy(reference_mask.decode(codes)).permute(2, 0, 1)
    image = blank()
    drawn = [
        np.asarray(draw(image, **found | {"masks": m}, class_names=NAMES))
        for m in (found["masks"], codes, pixels, pixels.bool())
    ]
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])
    assert not changed_pixels(image).any()


def test_a_mask_is_translucent_and_its_class_has_the_colour():
    mask = torch.zeros(1, 700, 700, dtype=torch.bool)
    mask[0, 300:400, 300:500] = True
    box = torch.tensor([[200.0, 200.0, 600.0, 600.0]])
    image = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 700, 700)
    by_label = [np.asarray(draw(image, box, torch.tensor([label]), NAMES, masks=mask)) for label in (1, 2, 2)]
    for colour, pixels in zip(("#e6194b", "#3cb44b"), by_label, strict=False):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert np.abs(pixels[350, 400] - (0.45 * rgb + 0.55 * np.array([10, 20, 30]))).max() <= 1
        assert (pixels[400, 200] == rgb).all()  # the box
        assert (pixels[250, 550] == (10, 20, 30)).all()  # in the box, not in the mask
    assert np.array_equal(by_label[1], by_label[2])


def test_what_is_below_the_least_score_is_not_drawn():
    found = some_detections(8, 700, 700) | {"scores": torch.linspace(0.1, 0.8, 8)}
    some = {name: value[4:] for name, value in found.items()}
    kept = draw(blank(), **found, class_names=NAMES, min_score=0.5)
    assert np.array_equal(np.asarray(kept), np.asarray(draw(blank(), **some, class_names=NAMES)))
    assert not changed_pixels(draw(blank(), **found, class_names=NAMES, min_score=0.9)).any()


def test_objects_at_the_border_and_of_no_size_are_seen(monkeypatch):
    rectangles = []
    caption = pictures._caption

    def spy(*arguments):
        caption(*arguments)
        rectangles.append(arguments[-1][-1])

    monkeypatch.setattr(pictures, "_caption", spy)
    boxes = torch.tensor([[0, 0, 0.2, 0.2], [699.9, 699.9, 700, 700], [-9, 650, 12, 712], [0, 0, 700, 700.0]])
    picture = draw(blank(), boxes, torch.tensor([1, 2, 3, 4]), ("a" * 99, "b", "c", "d"), scores=torch.ones(4))
    assert picture.size == (700, 700)
    assert len(rectangles) == 4
    for x1, y1, x2, y2 in rectangles:
        assert 0 <= x1 < x2 <= 700
        assert 0 <= y1 < y2 <= 700
    drawn = changed_pixels(picture)
    assert drawn[0, 0]
    assert drawn[699, 699]


@pytest.mark.parametrize("name", ["Кошка", "猫", "a\n\tb", "x\udc80", "\ud83d", "🐈", "", "w" * 500])
def test_names_may_be_any_text(name):
    picture = draw(blank(64, 40), torch.tensor([[5.0, 5, 50, 30]]), torch.tensor([1]), [name])
    assert picture.size == (64 * 16, 40 * 16)  # enlarged, so that there is room for the caption
    assert changed_pixels(picture).any()


def test_ground_truth_is_beside_the_prediction():
    found = some_detections(5, 700, 700) | {"scores": torch.linspace(0.3, 0.7, 5)}
    truth = {name: value for name, value in found.items() if name != "scores"}
    both = side_by_side(blank(), truth, found, NAMES)
    right = np.asarray(both)[-700:, -700:]
    assert np.array_equal(right, np.asarray(draw(blank(), **found, class_names=NAMES, min_score=0.5)))
    assert np.array_equal(np.asarray(both)[-700:, :700], np.asarray(draw(blank(), **truth, class_names=NAMES)))
    none = {name: value[:0] for name, value in found.items()}
    side_by_side(blank(), none, none, NAMES)


def make_scenes(monkeypatch, out: Path, *options: object) -> dict[str, bytes]:
    script = str(Path(__file__).parents[1] / "experiments" / "detection" / "scenes.py")
    monkeypatch.setattr(sys, "argv", [script, str(out), "--px", "96", *map(str, options)])
    runpy.run_path(script, run_name="__main__")
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*")}


def test_scenes_are_a_function_of_the_seed(monkeypatch, tmp_path):
    first = make_scenes(monkeypatch, tmp_path / "a", "--images", 3, "--validation", 2)
    assert len(first) == 3 + 2 + 2
    assert make_scenes(monkeypatch, tmp_path / "b", "--images", 3, "--validation", 2) == first
    longer = make_scenes(monkeypatch, tmp_path / "c", "--images", 4, "--validation", 1)
    assert all(longer[name] == first[name] for name in longer.keys() & first.keys() if name.endswith("jpg"))
    other = make_scenes(monkeypatch, tmp_path / "d", "--images", 3, "--validation", 2, "--seed", 1)
    assert all(other[name] != first[name] for name in first)
    assert first["train/00001.jpg"] != first["val/00001.jpg"]


def test_scenes_have_exact_boxes_and_masks_of_what_is_visible(monkeypatch, tmp_path):
    make_scenes(monkeypatch, tmp_path / "a", "--images", 12, "--validation", 1)
    with open(tmp_path / "a" / "annotations" / "instances_train.json") as file:
        truth = json.load(file)
    for image in truth["images"]:
        rows = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        masks = reference_mask.decode([row["segmentation"] for row in rows])
        assert masks.shape == (96, 96, len(rows))
        assert masks.sum(2).max() == 1  # what is hidden is in no mask
        for row in rows:
            assert row["bbox"] == reference_mask.toBbox(row["segmentation"]).tolist()
            assert row["area"] == reference_mask.area(row["segmentation"]) > 20
    counts = [sum(row["image_id"] == image["id"] for row in truth["annotations"]) for image in truth["images"]]
    assert min(counts) >= 1
    assert max(counts) <= 8
    train, validation = open_detection(str(tmp_path / "a"))
    assert (len(train), len(validation), len(train.class_names), train.has_masks) == (12, 1, 12, True)
