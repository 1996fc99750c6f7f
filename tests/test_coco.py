"""Annotated objects: sets of every layout, what is wrong in them, masks, augmentation, batches, `data check`."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from normfree.cli import main
from normfree.data import (
    Annotation,
    DetectionImages,
    DetectionTransform,
    FolderImages,
    UnreadableImage,
    changed,
    detection_batches,
    detection_eval_batches,
    inventory,
    is_detection,
    open_detection,
    open_detection_split,
    problem_lines,
    resized,
    sample_rng,
)
from normfree.errors import InputError

SQUARE = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def photo(path: Path, width: int = 40, height: int = 30, orientation: int = 0) -> str:
    """A noisy picture whose upper left quarter is red; PNG, so that pixels are exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 100, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2, 0] = 250
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path.name


def one(**changes: Any) -> dict[str, Any]:
    """An annotation; a value of ... leaves its key out."""
    whole = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 5, 20, 20], "iscrowd": 0, "area": 400}
    whole |= {"segmentation": SQUARE} | changes
    return {key: value for key, value in whole.items() if value is not ...}


def coco(path: Path, annotations: list[Any], images: list[Any] | None = None, categories: Any = CATEGORIES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def single(root: Path, *annotations: Any, **more: Any) -> Path:
    """One picture of 40 x 30 pixels and its file."""
    photo(root / "a.png")
    return coco(root / "a.json", list(annotations), **more)


def read(root: Path, *annotations: Any, **more: Any) -> DetectionImages:
    return open_detection_split(str(single(root, *annotations, **more)), ["cat", "dog"])


def collection(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Pictures with an object each, by sizes."""
    images, annotations = [], []
    for number, (width, height) in enumerate(sizes, 1):
        name = photo(root / "images" / f"{number:03d}.png", width, height)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        polygon = [[1.0, 1.0, width / 2, 1.0, width / 2, height / 2, 1.0, height / 2]]
        bbox = [1, 1, width / 2 - 1, height / 2 - 1]
        annotations.append(one(id=number, image_id=number, bbox=bbox, segmentation=polygon, area=...))
    return coco(root / "annotations.json", annotations, images)


# --- layouts ---


def coco_layout(root: Path, folders: tuple[str, str] = ("train2017", "val2017")) -> None:
    for role, folder in zip(("train2017", "val2017"), folders, strict=True):
        photo(root / folder / "a.png", 40 if role == "train2017" else 48, 30)
        size = {"width": 40 if role == "train2017" else 48, "height": 30}
        coco(root / "annotations" / f"instances_{role}.json", [one()], [{"id": 1, "file_name": "a.png"} | size])
    coco(root / "annotations" / "person_keypoints_train2017.json", [one()])


def roboflow(root: Path) -> None:
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "pets"},
    ]
    for folder, width in (("train", 40), ("valid", 48), ("test", 50)):
        images = [{"id": 0, "file_name": photo(root / folder / "a.png", width), "width": width, "height": 30}]
        raw = one(id=0, image_id=0, category_id=1)
        coco(root / folder / "_annotations.coco.json", [raw], images, categories)


VOC = """<annotation><filename>other.png</filename><size><width>{0}</width><height>30</height></size>
<object><name>cat</name><difficult>0</difficult>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
<object><name>{1}</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{0}</xmax><ymax>30</ymax></bndbox></object></annotation>"""


def voc(root: Path) -> None:
    for name, width, other in (("a", 40, "dog"), ("b", 48, "cat")):
        photo(root / "JPEGImages" / f"{name}.png", width)
        (root / "JPEGImages" / f"{name}.png").rename(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(VOC.format(width, other))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\n")
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text("a  1\n")


LAYOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "coco": (coco_layout, ""),
    "coco, folders of other names": (lambda root: coco_layout(root, ("train", "val")), ""),
    "coco, folders below images": (lambda root: coco_layout(root, ("images/train2017", "images/val2017")), ""),
    "coco, the file": (coco_layout, "annotations/instances_train2017.json"),
    "roboflow": (roboflow, ""),
    "voc": (voc, ""),
    "voc, devkit": (lambda root: voc(root / "VOCdevkit" / "VOC2012"), ""),
    "voc, inside the devkit": (lambda root: voc(root / "VOCdevkit" / "VOC2012"), "VOCdevkit"),
}


@pytest.mark.parametrize(("make", "inside"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path: Path, make: Callable[[Path], None], inside: str) -> None:
    make(tmp_path)
    spec = str(tmp_path / inside)
    assert is_detection(spec)
    train, validation = open_detection(spec)
    assert (len(train), len(validation)) == (1, 1)
    assert (train.read(0).size, validation.read(0).size) == ((40, 30), (48, 30)), "each has the picture of its split"
    assert train.class_names == validation.class_names == ("cat", "dog")
    assert train.annotations[0][0].box == validation.annotations[0][0].box == (10, 5, 30, 25)
    assert train.annotations[0][0].label == 1
    split = open_detection_split(str(tmp_path), ["dog", "cat"])
    assert split.annotations[0][0].label == 2
    assert split.sizes == [(48, 30)]


def test_pascal_voc_counts_from_one_and_difficult_objects_are_ignored(tmp_path: Path) -> None:
    voc(tmp_path)
    train, validation = open_detection(str(tmp_path))
    easy, hard = train.annotations[0]
    assert (easy.box, easy.crowd) == ((10, 5, 30, 25), False)
    assert (hard.box, hard.label, hard.crowd) == ((0, 0, 40, 30), 2, True)
    assert train.target(0, masks=False)["labels"].tolist() == [1]
    assert not train.problems
    assert not train.has_masks
    assert any(re.match("1 of 2 annotations are crowds, or difficult", note) for note in train.notes)
    assert [a.label for a in validation.annotations[0]] == [1, 1]
    (tmp_path / "Annotations" / "a.xml").write_text(VOC[:200])
    with pytest.raises(InputError, match=r"a\.xml is not an annotation of Pascal VOC, or is cut off"):
        open_detection(str(tmp_path))


def test_a_share_is_held_out(tmp_path: Path) -> None:
    spec = str(collection(tmp_path, [(40, 30)] * 40))
    train, validation = open_detection(spec, validation_fraction=0.2, seed=3)
    names = [{images.name(i) for i in range(len(images))} for images in (train, validation)]
    assert len(names[0] | names[1]) == 40
    assert not names[0] & names[1]
    assert 2 <= len(names[1]) <= 16
    assert validation.image_ids == [int(validation.name(i)[:3]) for i in range(len(validation))]
    again = open_detection(spec, validation_fraction=0.2, seed=3)[1]
    other = open_detection(spec, validation_fraction=0.2, seed=4)[1]
    assert again.image_ids == validation.image_ids != other.image_ids
    assert "it has no validation images: about 0.2 of the images are held out" in train.notes
    assert len(open_detection_split(spec, ["cat", "dog"])) == 40
    assert len(open_detection_split(str(tmp_path), ["cat", "dog"])) == 40


def test_roots_of_images(tmp_path: Path) -> None:
    """Subfolders in names, absolute names, and never the folder of another split."""
    path = photo(tmp_path / "elsewhere" / "b.png") and tmp_path / "elsewhere" / "b.png"
    photo(tmp_path / "in" / "train" / "sub" / "a.png")
    images = [
        {"id": 1, "file_name": "train/sub/a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": str(path), "width": 40, "height": 30},
    ]
    coco(tmp_path / "in" / "annotations" / "instances_train.json", [one()], images)
    found = open_detection(str(tmp_path / "in"), validation_fraction=0.5)
    assert sorted(images.name(0) for images in found) == sorted(image["file_name"] for image in images)
    assert all(images.read(0).size == (40, 30) for images in found)
    coco_layout(tmp_path / "other")
    (tmp_path / "other" / "val2017" / "a.png").unlink()
    with pytest.raises(InputError, match=r"^none of the 1 images of .*instances_val2017.json is there, such as a.png"):
        open_detection(str(tmp_path / "other"))


REFUSED: dict[str, tuple[str, str]] = {
    "not JSON": ("images: 3", "is not JSON, or is cut off"),
    "empty": ("", "is not JSON, or is cut off"),
    "cut off": ('{"images": [{"id": 1, "file_na', "is not JSON, or is cut off"),
    "binary": ("\x00\x01", "is not JSON, or is cut off"),
    "nested": ("[" * 100000, "is not JSON, or is cut off"),
    "results": (
        '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]',
        "is a list, as COCO results",
    ),
    "a number": ("3", "it has no list of images and annotations and categories"),
    "captions": ('{"images": [], "annotations": []}', "it has no list of categories"),
    "no images": ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "lists no images"),
    "no categories": ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "has no categories"),
    "an image without a name": (
        '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}',
        "entry 0 of its images lacks id or file_name",
    ),
    "a category without a name": ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "needs a number"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "annotations.json").write_text(text)
    for call in (lambda: open_detection(str(tmp_path / "a.json")), lambda: open_detection_split(str(tmp_path), ["x"])):
        with pytest.raises(InputError) as caught:
            call()
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_sets_that_are_refused(tmp_path: Path) -> None:
    for spec, reason in ((tmp_path / "none", "does not exist"), (tmp_path, "has no annotations of objects")):
        assert not is_detection(str(spec))
        with pytest.raises(InputError, match=reason):
            open_detection(str(spec))
    coco_layout(tmp_path / "two")
    coco(tmp_path / "two" / "annotations" / "instances_train2014.json", [one()])
    with pytest.raises(InputError, match=r"instances_train2014.json and instances_train2017.json for one split"):
        open_detection(str(tmp_path / "two"))
    coco_layout(tmp_path / "val")
    (tmp_path / "val" / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(InputError, match="none to train on"):
        open_detection(str(tmp_path / "val"))
    coco_layout(tmp_path / "train")
    (tmp_path / "train" / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(InputError, match="has images to train on only"):
        open_detection_split(str(tmp_path / "train"), ["cat", "dog"])
    for year in (2007, 2012):
        voc(tmp_path / "voc" / f"VOC{year}")
    with pytest.raises(InputError, match="has VOC2007 and VOC2012: give the path of one"):
        open_detection(str(tmp_path / "voc"))
    spec = single(tmp_path / "empty", one(bbox=[90, 90, 5, 5]), one(iscrowd=1))
    with pytest.raises(InputError, match="has no objects to train on; 1 boxes outside the image"):
        open_detection(str(spec))


# --- categories ---


def test_labels_follow_ascending_ids(tmp_path: Path) -> None:
    images = read(tmp_path, one(), one(id=2, category_id=7))
    assert (images.class_names, images.category_ids) == (("cat", "dog"), (3, 7))
    assert images.target(0, masks=False)["labels"].tolist() == [1, 2]


def test_only_roots_without_annotations_are_left_out(tmp_path: Path) -> None:
    roboflow(tmp_path / "a")
    train, _ = open_detection(str(tmp_path / "a"))
    assert (train.class_names, train.category_ids) == (("cat", "dog"), (1, 2))
    assert any("category 'pets' (id 0) is left out" in note for note in train.notes)
    root = [{"id": 0, "name": "fish", "supercategory": "none"}, {"id": 1, "name": "fish", "supercategory": "fish"}]
    own = [{"id": 3, "name": "cat", "supercategory": "cat"}, {"id": 7, "name": "dog", "supercategory": "cat"}]
    assert open_split(tmp_path / "b", [one(category_id=1)], root, ["fish"]).category_ids == (1,)
    assert open_split(tmp_path / "c", [one()], own, ["cat", "dog"]).category_ids == (3, 7), "a class with objects"
    lone = [{"id": 1, "name": "person", "supercategory": "person"}]
    assert open_split(tmp_path / "d", [], lone, ["person"]).category_ids == (1,), "its own supercategory"


def open_split(root: Path, annotations: list[Any], categories: list[Any], names: list[str]) -> DetectionImages:
    return open_detection_split(str(single(root, *annotations, categories=categories)), names)


@pytest.mark.parametrize(
    ("categories", "reason"),
    [
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], r"category id 1 is there twice \('cat' and 'dog'\)"),
        ([{"id": 1, "name": "cat"}, {"id": 4, "name": " cat"}], "the name 'cat' belongs to the categories 1 and 4"),
        ([{"id": None, "name": "cat"}], "needs a number as id and a name"),
        ([{"id": "1", "name": "cat"}], "needs a number as id and a name"),
        (["cat"], "needs a number as id and a name"),
        ([{"id": 3, "name": "cats"}], r"class 'cats' is not among the 1 of training; did you mean 'cat'\?"),
    ],
)
def test_categories_that_are_refused(tmp_path: Path, categories: list[Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        open_split(tmp_path, [one()], categories, ["cat"])


def test_classes_of_validation_are_matched_by_name(tmp_path: Path) -> None:
    coco_layout(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    size = {"width": 48, "height": 30}
    turned = [{"id": 90, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 1, "name": "unused"}]
    coco(path, [one(category_id=90, image_id=5)], [{"id": 5, "file_name": "a.png"} | size], turned)
    train, validation = open_detection(str(tmp_path))
    assert (train.category_ids, validation.category_ids) == ((3, 7), (90, 2))
    assert validation.class_names == ("cat", "dog")
    assert validation.annotations[0][0].label == 1
    coco(path, [one(image_id=5)], [{"id": 5, "file_name": "a.png"} | size], [{"id": 3, "name": "cow"}])
    with pytest.raises(InputError, match=r"instances_val2017.json: class 'cow' is not among the 2"):
        open_detection(str(tmp_path))


# --- masks ---


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    """COCO's RLE with counts as a list: runs of 0 and 1 in turn down the columns."""
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    places = np.flatnonzero(np.diff(flat)) if flat[1] else np.concatenate([[0], np.flatnonzero(np.diff(flat))])
    runs = np.diff(places).tolist()
    return {"size": list(mask.shape), "counts": runs if not flat[1] else [0, *runs]}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_masks_are_those_of_pycocotools(tmp_path: Path) -> None:
    """Polygons of several parts, RLE in both forms, in an image that is not square; decoded as (rows, columns)."""
    from pycocotools import mask as reference

    blob = np.zeros((30, 40), dtype=np.uint8)
    blob[2:9, 30:38] = blob[20:, 5] = 1
    counts = reference.encode(np.asfortranarray(blob))["counts"].decode()
    parts = [[10.5, 5.0, 30.0, 5.2, 30.7, 25.0], [1, 1, 5, 1, 5, 9, 1, 9], [35.5, 2, 60, 2, 60, 20]]
    forms = [parts, rle_of(blob), {"size": [30, 40], "counts": counts}, SQUARE]
    images = read(tmp_path, *(one(id=i, segmentation=form) for i, form in enumerate(forms, 1)))
    masks = images.target(0, masks=True)["masks"]
    expected = [reference.decode(reference.merge(reference.frPyObjects(part, 30, 40))) for part in (parts, SQUARE)]
    for mask, pixels in zip(masks, [expected[0], blob, blob, expected[1]], strict=True):
        assert np.array_equal(mask.numpy(), pixels)
    assert masks.dtype == torch.uint8
    assert images.has_masks
    assert not images.problems


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_ground_truth_is_a_coco_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from pycocotools.coco import COCO

    blob = rle_of(np.eye(30, 40, dtype=np.uint8))
    images = read(tmp_path, one(id=0, area=...), one(id=0, iscrowd=1, segmentation=blob, area=2.5), one(category_id=7))
    truth = json.loads(json.dumps(images.ground_truth()))
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3], "0 would be taken for no match"
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1, 0]
    assert [a["category_id"] for a in truth["annotations"]] == [1, 1, 2]
    assert [a["bbox"] for a in truth["annotations"]] == [[10, 5, 20, 20]] * 3
    assert [a["area"] for a in truth["annotations"]] == [400, 2.5, 400], "a missing area is that of the mask"
    assert truth["images"] == [{"id": 1, "width": 40, "height": 30, "file_name": "a.png"}]
    reference = COCO(str(tmp_path / "a.json"))
    ours = COCO()
    ours.dataset = truth
    ours.createIndex()
    theirs = [reference.annToMask(raw) for raw in reference.dataset["annotations"]]
    assert all(np.array_equal(ours.annToMask(a), b) for a, b in zip(truth["annotations"], theirs, strict=True))
    assert len(images.target(0, masks=True)["boxes"]) == 2, "crowds are no targets"


BOX_ALONE = [[], [[]], None, ...]


@pytest.mark.parametrize("given", BOX_ALONE, ids=str)
def test_boxes_alone_are_said(tmp_path: Path, given: Any) -> None:
    images = read(tmp_path, one(), one(id=2, segmentation=given))
    assert [a.segmentation is None for a in images.annotations[0]] == [False, True]
    assert not images.has_masks
    assert any(re.search("1 of 2 annotations have no mask", note) for note in images.notes)
    assert not images.problems
    assert set(images.target(0, masks=False)) == {"boxes", "labels"}
    assert "segmentation" not in images.ground_truth()["annotations"][1]


def test_what_masks_and_classes_lack_is_noted(tmp_path: Path) -> None:
    photo(tmp_path / "train" / "a.png")
    photo(tmp_path / "val" / "a.png")
    box = {key: value for key, value in one(id=2).items() if key != "segmentation"}
    coco(tmp_path / "instances_train.json", [one()])
    coco(tmp_path / "instances_val.json", [one(), box])
    train, validation = open_detection(str(tmp_path))
    assert (train.has_masks, validation.has_masks) == (True, False)
    assert not any("a box detector is trained" in note for note in train.notes)
    assert any(note.startswith("validation: boxes alone are scored") for note in train.notes)
    assert "1 of 2 classes have no objects to train on: dog" in train.notes
    coco(tmp_path / "instances_train.json", [one(), box | {"category_id": 7}])
    notes = open_detection(str(tmp_path))[0].notes
    assert "a box detector is trained (Faster R-CNN): not every object has a mask" in notes
    assert not any("to train on" in note or "boxes alone" in note for note in notes)


def test_the_file_of_a_roboflow_split_is_not_its_own_validation(tmp_path: Path) -> None:
    roboflow(tmp_path)
    train, validation = open_detection(str(tmp_path / "train" / "_annotations.coco.json"))
    assert (train.sizes, validation.sizes) == ([(40, 30)], [(48, 30)])


POLYGON_PROBLEMS: dict[str, list[float]] = {
    "two points, which would be read as a box": [1, 1, 20, 20],
    "one point": [1, 1],
    "odd": [1, 1, 20, 1, 20, 20, 1],
    "nan": [float("nan"), 1, 20, 1, 20, 20],
    "infinite": [1e400, 1, 20, 1, 20, 20],
    "far outside": [1e9, 1, 20, 1, 20, 20],
    "text": ["a", 1, 20, 1, 20, 20],  # type: ignore
}


@pytest.mark.parametrize("polygon", POLYGON_PROBLEMS.values(), ids=POLYGON_PROBLEMS)
def test_polygons_that_enclose_nothing(tmp_path: Path, polygon: list[float]) -> None:
    images = read(tmp_path, one(segmentation=[polygon, *SQUARE]), one(id=2, segmentation=[polygon]), one(id=3))
    first, last = images.annotations[0]
    assert [list(part) for part in first.segmentation or ()] == SQUARE
    assert first == last
    kinds = sorted(images.problems)
    assert kinds[0] == "annotations whose mask cannot be used (left out)"
    assert images.problems[kinds[0]] == ["a.png: annotation 2"]
    assert images.problems[kinds[1]] == ["a.png: annotation 1: 1 of 2", "a.png: annotation 2: 1 of 1"]
    alone = read(tmp_path, one(id=2, segmentation=[polygon]))
    assert [a.box for a in alone.annotations[0]] == [(10, 5, 30, 25)], "boxes are kept if nothing has a mask"
    assert "annotations whose mask cannot be used (their boxes are kept)" in alone.problems


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [40, 30], "counts": [600, 600]},
        {"size": [30, 40], "counts": [600, 601]},
        {"size": [30, 40], "counts": [600]},
        {"size": [30, 40], "counts": [700, -100, 600]},
        {"size": [30, 40], "counts": ["a"]},
        {"size": [30, 40], "counts": "zz~"},
        {"size": [30, 40], "counts": ""},
        {"size": [30, 40], "counts": None},
        {"size": [30], "counts": [1200]},
        {"counts": [600, 600]},
    ],
    ids=str,
)
def test_rle_that_does_not_fit(tmp_path: Path, rle: dict[str, Any]) -> None:
    images = read(tmp_path, one(), one(id=2, segmentation=rle))
    assert len(images.annotations[0]) == 1
    assert len(images.problems["RLE that does not fit its image"]) == 1
    assert images.problems["annotations whose mask cannot be used (left out)"] == ["a.png: annotation 2"]
    assert images.target(0, masks=True)["masks"].shape == (1, 30, 40)


# --- boxes and ids ---


@pytest.mark.parametrize(
    ("bbox", "kind"),
    [
        ([float("nan"), 5, 20, 20], "boxes that are not finite (left out)"),
        ([1e400, 5, 20, 20], "boxes that are not finite (left out)"),
        ([10, 5, -20, 20], "boxes of negative size (left out)"),
        ([10, 5, 20, 0], "boxes of zero size (left out)"),
        ([40, 5, 20, 20], "boxes outside the image (left out)"),
        ([-30, 5, 20, 20], "boxes outside the image (left out)"),
        ([10, 5, 20], "boxes that are not four numbers (left out)"),
        (["a", 5, 20, 20], "boxes that are not four numbers (left out)"),
        (3, "boxes that are not four numbers (left out)"),
    ],
)
def test_boxes_that_are_left_out(tmp_path: Path, bbox: Any, kind: str) -> None:
    images = read(tmp_path, one(), one(id=8, bbox=bbox))
    assert [a.box for a in images.annotations[0]] == [(10, 5, 30, 25)]
    assert list(images.problems) == [kind]
    (line,) = problem_lines(images)
    assert line.startswith(f"1 {kind}: a.png: annotation 8: ")


def test_boxes_are_clamped_and_become_floats(tmp_path: Path) -> None:
    images = read(tmp_path, one(bbox=[-5, 10, 60, 40]), one(id=2, bbox=[10.0, 5.0, 30.2, 25.0]), one(id=3))
    assert [a.box for a in images.annotations[0]] == [(0, 10, 40, 30), (10, 5, 40, 30), (10, 5, 30, 25)]
    assert images.problems == {"boxes partly outside the image (clamped)": ["a.png: annotation 1: [-5, 10, 60, 40]"]}, (
        "rounding is no problem"
    )
    boxes = images.target(0, masks=False)["boxes"]
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[0, 10, 40, 30], [10, 5, 40, 30], [10, 5, 30, 25]]


def test_a_missing_box_is_that_of_the_mask(tmp_path: Path) -> None:
    blob = np.zeros((30, 40), dtype=np.uint8)
    blob[3:9, 20:33] = 1
    raws = [one(bbox=...), one(id=2, bbox=[], segmentation=rle_of(blob)), one(id=3, bbox=None, segmentation=...)]
    images = read(tmp_path, *raws)
    assert [a.box for a in images.annotations[0]] == [(10, 5, 30, 25), (20, 3, 33, 9)]
    assert images.problems == {"annotations without box and mask (left out)": ["a.png: annotation 3"]}


def test_ids_that_do_not_belong_together(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 4, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 1, "file_name": "b.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "gone.png", "width": 40, "height": 30},
    ]
    raws = [one(), one(), one(id=0), one(id=4, image_id=9), one(id=5, category_id=1), "no", one(id=6, image_id=...)]
    raws += [one(id=7, image_id=[]), one(id=8, category_id={}), one(id=9, iscrowd="x"), one(id=10, image_id=2)]
    path = single(tmp_path, *raws, images=images)
    with pytest.raises(InputError, match=r"^1 images of .*a.json are not there, the first is gone.png: not in "):
        open_detection_split(str(path), ["cat", "dog"])
    photo(tmp_path / "c.png")
    more = [*images, {"id": 3, "file_name": "c.png", "width": 40, "height": 30}]
    coco(path, [*raws, one(id=11, image_id=3)], more)
    train, validation = open_detection(str(path), validation_fraction=0.5)
    assert not validation.problems, "those of held-out images are named with the others"
    ids, rows = train.image_ids + validation.image_ids, train.annotations + validation.annotations
    assert {number: len(row) for number, row in zip(ids, rows, strict=True)} == {1: 3, 3: 1, 4: 0}
    assert {kind: len(lines) for kind, lines in train.problems.items()} == {
        "image ids that are there twice (the first is kept)": 1,
        "files that are listed twice (both kept)": 1,
        "images without a file (left out)": 1,
        "annotation ids that are there twice (both kept)": 1,
        "annotations with id 0 (renumbered)": 1,
        "annotations of images that are not listed (left out)": 1,
        "annotations of categories that are not listed (left out)": 1,
        "annotations that are not COCO's (left out)": 5,
    }
    lines = problem_lines(train, at_most=1)
    assert lines[-1].startswith("5 annotations that are not COCO's (left out): annotation no")
    assert lines[-1].endswith("; ...")
    with pytest.raises(InputError, match=r"has 12 problems; 1 files that are listed twice"):
        open_detection(str(path), validation_fraction=0.5, strict=True)


def test_images_without_objects_are_kept(tmp_path: Path) -> None:
    photo(tmp_path / "b.png", 48)
    more = [{"id": n, "file_name": f"{c}.png", "width": w, "height": 30} for n, c, w in ((1, "a", 40), (2, "b", 48))]
    images = read(tmp_path, one(), images=more)
    assert len(images) == 2
    assert "1 of 2 images have no objects; they are kept" in images.notes
    empty = images.target(1, masks=True)
    assert {key: tuple(value.shape) for key, value in empty.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 30, 48),
    }
    assert [len(images.ground_truth()[part]) for part in ("images", "annotations")] == [2, 1]
    for transform in (DetectionTransform(20, 30), DetectionTransform(20, 30, crop=True, scale=(0.5, 2.0))):
        _, target = transform(images.read(1), empty, np.random.default_rng(0))
        assert target["boxes"].shape == (0, 4)
        assert target["masks"].shape[0] == 0


# --- sizes and EXIF ---


@pytest.mark.parametrize("annotated", ["upright", "stored"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_exif_turns(tmp_path: Path, orientation: int, annotated: str) -> None:
    """The box of the red quarter is red in the image as it is read, whichever way it was annotated."""
    photo(tmp_path / "a.png", 40, 30, orientation)
    with Image.open(tmp_path / "a.png") as image:
        shown = image.copy()
    if annotated == "upright":
        from PIL import ImageOps

        shown = ImageOps.exif_transpose(shown)
    rows, columns = np.nonzero(np.asarray(shown)[..., 0] > 200)
    x, y, width, height = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
    bbox = [int(v) for v in (x, y, width, height)]
    entry = {"id": 1, "file_name": "a.png", "width": shown.width, "height": shown.height}
    path = coco(tmp_path / "a.json", [one(bbox=bbox, segmentation=...)], [entry])
    images = open_detection_split(str(path), ["cat", "dog"])
    pixels = np.asarray(images.read(0))
    assert images.sizes == [shown.size] == [(pixels.shape[1], pixels.shape[0])]
    x1, y1, x2, y2 = (int(v) for v in images.annotations[0][0].box)
    same_frame = annotated == "upright" or orientation >= 5 or orientation == 1
    assert ((pixels[y1:y2, x1:x2, 0] == 250).all() and (pixels[..., 0] == 250).sum() == 300) == same_frame
    kinds = {
        "files turned by EXIF that are annotated, and used, as stored": orientation >= 5 and annotated == "stored",
        "files turned by EXIF with annotations taken as upright, which sizes do not tell": 2 <= orientation <= 4,
    }
    assert images.problems == {kind: ["a.png"] for kind, applies in kinds.items() if applies}


def test_sizes_that_the_file_lacks_are_those_of_the_images(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", 40, 30, 6)
    assert read_sizes(tmp_path, {"id": 1, "file_name": "a.png"}) == [(30, 40)]
    assert read_sizes(tmp_path, {"id": 1, "file_name": "a.png", "width": 0, "height": 0}) == [(30, 40)]
    assert read_sizes(tmp_path, {"id": 1, "file_name": "a.png", "width": None, "height": "30"}) == [(30, 40)]


def read_sizes(root: Path, entry: dict[str, Any]) -> list[tuple[int, int]]:
    path = coco(root / "a.json", [one(bbox=[1, 1, 9, 9], segmentation=...)], [entry])
    return open_detection_split(str(path), ["cat", "dog"]).sizes


def spoiled(root: Path) -> Path:
    """Five good pictures, one of another size than the file says, one that is cut off, one that is no image."""
    path = collection(root, [(40, 30)] * 8)
    photo(root / "images" / "006.png", 41, 30)
    whole = (root / "images" / "007.png").read_bytes()
    (root / "images" / "007.png").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "008.png").write_text("nothing")
    return path


def test_files_that_do_not_fit_are_named_and_left_out_of_training_alone(tmp_path: Path) -> None:
    path = spoiled(tmp_path)
    images = open_detection_split(str(path), ["cat", "dog"])
    assert images.problems == {
        "files whose size is not that in the annotations": ["006.png: 41 x 30, not 40 x 30"],
        "files that cannot be read": ["008.png: not an image in a known format"],
    }
    assert len(images) == 8
    batches = list(detection_eval_batches(images, min_px=24, max_px=32, masks=True, batch_size=3, workers=0))
    assert [batch.indices for batch in batches] == [[0, 1, 2], [3, 4], []]
    assert [len(batch.targets) for batch in batches] == [3, 2, 0]
    assert [len(batch.unreadable) for batch in batches] == [0, 1, 2]
    assert batches[1].unreadable == ("006.png: its size is 41 x 30 px, that of its annotations 40 x 30 px",)
    train, validation = open_detection(str(path), validation_fraction=0.2)
    assert sorted(train.image_ids + validation.image_ids) == [1, 2, 3, 4, 5, 7], "a cut-off file has a good header"
    with pytest.raises(InputError, match="has 2 problems"):
        open_detection(str(path), strict=True)


def test_large_sets_are_sampled_when_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfree.data.coco._MOST_HEADERS", 4)
    path = collection(tmp_path, [(40, 30)] * 9)
    photo(tmp_path / "images" / "002.png", 41, 30)
    images = open_detection_split(str(path), ["cat", "dog"])
    assert any("the files of 4 images were compared" in note for note in images.notes)
    assert not images.problems
    with pytest.raises(UnreadableImage, match=r"002.png: its size is 41 x 30 px"):
        images.read(1)


# --- transform ---


def numpy_rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sample(width: int = 60, height: int = 40) -> tuple[Image.Image, dict[str, torch.Tensor]]:
    """A picture that is white where the mask of its only object is, and an object at the right edge."""
    mask = torch.zeros((2, height, width), dtype=torch.uint8)
    mask[0, 10:20, 5:25] = 1
    mask[1, 30:, 50:] = 1
    pixels = (255 * mask.amax(0)).numpy()
    boxes = torch.tensor([[5.0, 10, 25, 20], [50, 30, width, height]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": mask}
    return Image.fromarray(pixels).convert("RGB"), target


def test_resized() -> None:
    assert resized(640, 480, 800, 1333) == (1067, 800)
    assert resized(480, 640, 800, 1333) == (800, 1067)
    assert resized(1000, 100, 800, 1333) == (1333, 133)
    assert resized(640, 480, 240, 400, 0.5) == (160, 120)
    assert resized(1000, 1, 8, 10) == (10, 1)


def test_without_chance_the_transform_is_torchvisions_resize() -> None:
    from torchvision.transforms.v2 import functional as F

    image, target = sample()
    pixels, out = DetectionTransform(100, 120, flip=False)(image, target, numpy_rng())
    assert pixels.shape == (3, 80, 120)
    assert torch.equal(pixels, F.resize(F.pil_to_tensor(image), [80, 120], antialias=True))
    assert torch.equal(out["boxes"], target["boxes"] * 2)
    assert torch.equal(out["masks"], target["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert torch.equal(out["labels"], target["labels"])
    assert {type(value) for value in (pixels, *out.values())} == {torch.Tensor}


def test_masks_are_not_shifted_when_they_become_smaller() -> None:
    """torchvision's resize of masks takes the upper left pixel of each four."""
    image, target = sample()
    _, out = DetectionTransform(10, 15, flip=False)(image, target, numpy_rng())
    rows, columns = out["masks"][0].nonzero().T
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (2, 5, 1, 6)
    odd = target | {"masks": torch.arange(60).expand(2, 40, 60).to(torch.uint8).clone()}
    _, out = DetectionTransform(10, 15, flip=False)(image, odd, numpy_rng())
    assert out["masks"][0, 0].tolist() == [4 * column + 2 for column in range(15)]


def test_flips_move_everything() -> None:
    image, target = sample()
    transform = DetectionTransform(40, 60)
    results = [transform(image, target, numpy_rng(seed)) for seed in range(20)]
    flipped = [not torch.equal(out["boxes"], target["boxes"]) for _, out in results]
    assert 3 < sum(flipped) < 17
    for (pixels, out), turned in zip(results, flipped, strict=True):
        assert torch.equal(pixels[0] == 255, out["masks"].amax(0) == 1)
        assert out["boxes"][0].tolist() == ([35, 10, 55, 20] if turned else [5, 10, 25, 20])


def test_scale_jitter_covers_its_range_and_both_limits() -> None:
    image, target = sample()
    transform = DetectionTransform(100, 150, scale=(0.5, 1.5))
    widths = [transform(image, target, numpy_rng(seed))[0].shape[2] for seed in range(60)]
    assert 75 <= min(widths) < 90
    assert 210 < max(widths) <= 225


def test_crops_recompute_boxes_from_masks() -> None:
    image, target = sample()
    transform = DetectionTransform(32, 32, scale=(0.5, 4.0), crop=True)
    counts, padded = set(), 0
    for seed in range(80):
        pixels, out = transform(image, target, numpy_rng(seed))
        assert pixels.shape == (3, 32, 32)
        counts.add(len(out["boxes"]))
        assert len(out["boxes"]) == len(out["labels"]) == len(out["masks"])
        for box, mask in zip(out["boxes"], out["masks"], strict=True):
            rows, columns = mask.nonzero().T
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        corner = pixels[:, -1, -1].tolist()
        padded += corner == [124, 116, 104]
    assert counts == {0, 1, 2}
    assert 5 < padded < 75
    alone = {key: value for key, value in target.items() if key != "masks"}
    for seed in range(40):
        boxes = transform(image, alone, numpy_rng(seed))[1]["boxes"]
        assert ((boxes >= 0) & (boxes <= 32)).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_boxes_stay_inside_and_positive(
    width: int, height: int, corners: list[Any], crop: bool, with_masks: bool, seed: int
) -> None:
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 2, 2).sort(1).values.reshape(-1, 4)
    boxes = boxes * torch.tensor([width, height, width, height])
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    target = {"boxes": boxes, "labels": torch.arange(len(boxes))}
    if with_masks:
        target["masks"] = torch.zeros((len(boxes), height, width), dtype=torch.uint8)
        for mask, box in zip(target["masks"], boxes.long(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
    transform = DetectionTransform(16, 24, scale=(0.1, 2.0), crop=crop)
    pixels, out = transform(Image.new("RGB", (width, height)), target, numpy_rng(seed))
    limits = torch.tensor([pixels.shape[2], pixels.shape[1]])
    assert out["boxes"].dtype == torch.float32
    assert (out["boxes"] >= 0).all()
    assert (out["boxes"].reshape(-1, 2) <= limits).all()
    assert (out["boxes"][:, 2:] > out["boxes"][:, :2]).all()
    assert len(out["labels"]) == len(out["boxes"])
    if with_masks:
        assert out["masks"].shape == (len(out["boxes"]), *pixels.shape[1:])


def test_objects_that_have_vanished_are_dropped() -> None:
    """As where float32 makes a thin box empty: torchvision's networks refuse those."""
    image, target = sample()
    target = target | {"boxes": torch.tensor([[5.0, 5, 5, 9], [50, 30, 60, 40]])}
    _, out = DetectionTransform(40, 60, flip=False)(image, target, numpy_rng())
    assert out["boxes"].tolist() == [[50, 30, 60, 40]]
    assert out["labels"].tolist() == [2]
    assert torch.equal(out["masks"], target["masks"][1:])


def test_all_chance_comes_from_the_generator() -> None:
    image, target = sample()
    transform = DetectionTransform(32, 48, scale=(0.3, 2.0), crop=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = transform(image, target, numpy_rng(5))
    torch.manual_seed(2)
    second = transform(image, target, numpy_rng(5))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    assert not torch.equal(first[0], transform(image, target, numpy_rng(6))[0])
    for wrong in (dict(min_px=0), dict(min_px=64), dict(scale=(0.0, 1.0)), dict(scale=(2.0, 1.0))):
        with pytest.raises(InputError, match="min_px is 1 to max_px"):
            DetectionTransform(**dict(min_px=32, max_px=48) | wrong)  # type: ignore


# --- batches ---


def mixed(root: Path) -> DetectionImages:
    """19 wide and 12 tall images."""
    path = collection(root, [(40, 30)] * 10 + [(30, 40)] * 12 + [(44, 30)] * 9)
    return open_detection_split(str(path), ["cat", "dog"])


def stream(images: DetectionImages, steps: range, workers: int = 0, **options: Any) -> list[Any]:
    transform = DetectionTransform(24, 32, scale=(0.8, 1.2), **options)
    batches = detection_batches(
        images, transform, masks=True, batch_size=4, seed=7, steps=steps, workers=workers, pin_memory=False
    )
    return list(batches)


def assert_same(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a.indices, a.unreadable, a.sizes) == (b.indices, b.unreadable, b.sizes)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        for x, y in zip(a.targets, b.targets, strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[key], y[key]) for key in x)


def test_batches_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    images = mixed(tmp_path)
    whole = stream(images, range(20))
    assert_same(stream(images, range(20), workers=2), whole)
    assert_same(stream(images, range(9, 20), workers=1), whole[9:])


def test_batches_hold_one_orientation_and_epochs_every_image_once(tmp_path: Path) -> None:
    images = mixed(tmp_path)
    batches = stream(images, range(31))  # 4 epochs of 31 images
    indices = [index for batch in batches for index in batch.indices]
    for start in range(0, len(indices), 31):
        assert sorted(indices[start : start + 31]) == list(range(31))
    assert indices[:31] != indices[31:62]
    wide = [{width >= height for width, height in batch.sizes} for batch in batches]
    assert sum(len(kinds) == 2 for kinds in wide) <= 2 * 4, "only batches at the ends of epochs are mixed"
    for batch in batches:
        assert batch.sizes == [images.sizes[index] for index in batch.indices]
        for image, (width, height) in zip(batch.images, batch.sizes, strict=True):
            assert (image.shape[2] >= image.shape[1]) == (width >= height)
    squares = stream(images, range(31), crop=True)
    assert [batch.indices for batch in squares] != [batch.indices for batch in batches], "crops need no grouping"
    assert {tuple(image.shape) for batch in squares for image in batch.images} == {(3, 24, 24)}


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 12), st.integers(0, 20))
def test_orders_are_permutations_that_start_with_what_completes_a_batch(
    wide: int, tall: int, batch_size: int, epoch: int
) -> None:
    sizes = [(2, 1)] * wide + [(1, 2)] * tall
    total = wide + tall
    paths = [str(number) for number in range(total)]
    images = DetectionImages(
        samples=FolderImages(root="", paths=paths),
        annotations=[[]] * total,
        sizes=sizes,
        image_ids=list(range(total)),
        class_names=("x",),
        category_ids=(1,),
        batch_size=batch_size,
    )
    lead = -epoch * total % batch_size
    order = images.order(sample_rng(0, epoch, 0, 1), lead).tolist()
    assert sorted(order) == list(range(total))
    rest = order[lead:]
    batches = [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    mixed = [batch for batch in batches if len({index < wide for index in batch}) == 2]
    assert len(mixed) <= 2
    assert not any(batch in mixed for batch in batches[:-2])


def test_unreadable_images_are_replaced_in_training(tmp_path: Path) -> None:
    images = open_detection_split(str(spoiled(tmp_path)), ["cat", "dog"])
    batches = stream(images, range(4))
    assert all(len(batch.images) == len(batch.targets) == 4 for batch in batches)
    named = {line.split(":")[0] for batch in batches for line in batch.unreadable}
    assert named == {"006.png", "007.png", "008.png"}
    assert not {5, 6, 7} & {index for batch in batches for index in batch.indices}
    with pytest.raises(InputError, match="the batch size is 4 but there are 3 training images"):
        stream(images.subset([0, 1, 2]), range(1))


def test_evaluation_batches_hold_resized_images_and_targets(tmp_path: Path) -> None:
    images = mixed(tmp_path)
    batches = list(detection_eval_batches(images, min_px=15, max_px=100, masks=True, batch_size=8, workers=1))
    assert [index for batch in batches for index in batch.indices] == list(range(31))
    assert [len(batch.images) for batch in batches] == [8, 8, 8, 7]
    assert batches[0].images[0].shape == (3, 15, 20)
    assert batches[0].images[0].dtype == torch.uint8
    assert batches[0].targets[0]["boxes"].tolist() == [[0.5, 0.5, 10, 7.5]]
    assert batches[0].targets[0]["masks"].shape == (1, 15, 20)
    assert batches[0].sizes[0] == (40, 30)
    boxes = next(detection_eval_batches(images, min_px=15, max_px=100, masks=False, batch_size=8, workers=0))
    assert set(boxes.targets[0]) == {"boxes", "labels"}


def test_a_changed_annotation_is_noticed(tmp_path: Path) -> None:
    images = read(tmp_path, one(), one(id=2))
    before = inventory(train=images)
    assert changed(before, inventory(train=read(tmp_path, one(), one(id=2)))) is None
    edits: list[dict[str, Any]] = [
        dict(bbox=[10, 5, 20, 21]),
        dict(category_id=7),
        dict(iscrowd=1),
        dict(segmentation=[[10.0, 5.0, 30.0, 5.0, 30.0, 24.0, 10.0, 25.0]]),
        dict(segmentation=rle_of(np.eye(30, 40, dtype=np.uint8))),
        dict(area=399),
    ]
    for edit in edits:
        now = inventory(train=read(tmp_path, one(**edit), one(id=2)))
        message = changed(before, now)
        assert message is not None, edit
        assert message.endswith("or with other annotations")
    larger = [{"id": 1, "file_name": "a.png", "width": 41, "height": 30}]
    assert changed(before, inventory(train=read(tmp_path, one(), one(id=2), images=larger))) is not None
    assert json.loads(json.dumps(before)) == before


def test_subsets_keep_rows_together(tmp_path: Path) -> None:
    images = mixed(tmp_path)
    some = images.subset([20, 3])
    assert (some.sizes, some.image_ids) == ([(30, 40), (40, 30)], [21, 4])
    assert [some.name(0), some.name(1)] == ["021.png", "004.png"]
    assert some.annotations == [images.annotations[20], images.annotations[3]]
    assert isinstance(some.annotations[0][0], Annotation)
    assert some.read(0).size == (30, 40)


# --- data check ---


def test_data_check_of_annotated_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("NORMFREE_DATA", str(tmp_path / "cache"))
    clean = collection(tmp_path / "clean", [(250, 200), (90, 100)] + [(30 + n, 40) for n in range(8)])
    assert not main(["data", "check", str(clean), "--workers", "0"])
    out = capsys.readouterr().out
    assert "10 images: " in out
    assert "10 objects: 8 small, 1 medium, 1 large" in out
    assert "objects by class: cat 10, dog 0" in out
    path = spoiled(tmp_path / "bad")
    (tmp_path / "bad" / "images" / "001.png").unlink()
    data = json.loads(path.read_text())
    data["annotations"][1]["bbox"] = [30, 2, 20, 3]
    data["annotations"][2]["bbox"] = [30, 2, 0, 3]
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(path), "--workers", "0", "--out", str(tmp_path / "report.json")])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["unreadable"].keys() == {"001.png", "006.png", "007.png", "008.png"}
    assert report["unreadable"]["006.png"] == "41 x 30, not 40 x 30"
    assert report["problems"] == {
        "boxes partly outside the image (clamped)": ["002.png: annotation 2: [30, 2, 20, 3]"],
        "boxes of zero size (left out)": ["003.png: annotation 3: [30, 2, 0, 3]"],
    }
    assert "boxes of zero size (left out): 1\n  003.png: annotation 3: [30, 2, 0, 3]" in out
    assert "unreadable: 4" in out


@pytest.mark.skipif(not os.path.exists("../shared/data/coco-tiny.zip"), reason="needs ../shared/data/coco-tiny.zip")
def test_coco_itself(tmp_path: Path) -> None:
    import zipfile

    zipfile.ZipFile("../shared/data/coco-tiny.zip").extractall(tmp_path)
    train, validation = open_detection(str(tmp_path / "coco-tiny"), strict=True)
    assert (len(train), len(validation), len(train.class_names)) == (40, 40, 80)
