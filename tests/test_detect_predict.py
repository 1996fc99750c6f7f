"""`write_detections`: files and pictures of detections, for what folders hold in real life."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from PIL import Image
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms.functional import pil_to_tensor

from normfree.data import read_image
from normfree.deploy import detect as module
from normfree.deploy.detect import write_detections
from normfree.engine.loop import Interrupted
from normfree.errors import InputError
from normfree.tasks.detection.model import create_detector, load_detector, save_detector

NAMES = ("cat", 'dog, "wild"', "eel\nÄ")
IDS = (3, 17, 90)
SMALL = dict(width=(16, 32, 64, 64), depth=(1, 1, 1, 1), channels=16, min_px=64, max_px=96, max_detections=12)


def made(path: Path, **options) -> str:
    torch.manual_seed(0)
    save_detector(create_detector("nf_resnet26", 3, **SMALL | options), path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    return made(path, class_names=NAMES, category_ids=IDS)


def photo(path: Path, seed: int, size: tuple[int, int] = (80, 60), **options) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Four pictures in two folders, two of which have the same name, and two files that are none."""
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "images" / "a.jpg", 0)
    turned = Image.Exif()
    turned[0x0112] = 6  # stored as 80 x 60, seen as 60 x 80
    photo(tmp_path / "images" / "b.jpg", 1, exif=turned)
    photo(tmp_path / "images" / "below" / "a.jpg", 2, (50, 90))
    photo(tmp_path / "images" / "below" / "c.png", 3)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "z.png").write_bytes(b"")
    return tmp_path / "images"


FILES = ["a.jpg", "b.jpg", "below/a.jpg", "below/c.png", "broken.jpg", "z.png"]
READABLE = FILES[:4]


def expected(weights: str, path: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the detector says of one image, and its masks in the image."""
    image = read_image(path)
    found = load_detector(weights).detect([pil_to_tensor(image)])[0][0]
    size = (image.height, image.width)
    return found, paste_masks_in_image(found["masks"][:, None], found["boxes"], size)[:, 0] >= 0.5


def test_json_holds_coco_results(weights, folder, capsys):
    assert write_detections(weights, ["images"], "x.json", device="cpu") == 2
    rows = json.loads(Path("x.json").read_text(encoding="utf-8"))
    for number, name in enumerate(FILES, 1):
        own = [row for row in rows if row["file_name"] == os.path.join("images", name)]
        assert {row["image_id"] for row in own} <= {number}
        if name not in READABLE:
            assert not own
            continue
        found, masks = expected(weights, folder / name)
        assert len(own) == len(found["scores"]) > 0
        assert [row["score"] for row in own] == found["scores"].tolist()
        assert [row["category_id"] for row in own] == [IDS[label - 1] for label in found["labels"]]
        assert [row["category_name"] for row in own] == [NAMES[label - 1] for label in found["labels"]]
        boxes = np.array([row["bbox"] for row in own])
        boxes[:, 2:] += boxes[:, :2]
        assert boxes == pytest.approx(found["boxes"].numpy(), abs=1e-4)
        pixels = rle.decode([row["segmentation"] for row in own]).transpose(2, 0, 1)
        assert np.array_equal(pixels, masks.numpy())
    error = capsys.readouterr().err
    assert error.count("images/broken.jpg: not an image in a known format") == 1
    assert error.count("images/z.png: the file is empty") == 1
    assert "x.json has no place for the 2 images that could not be read" in error
    assert "4 of 6 images have 12 detections, the most that are kept" in error


def test_lines_and_rows_name_every_image(weights, folder):
    write_detections(weights, ["images"], "x.jsonl", device="cpu")
    write_detections(weights, ["images"], "x.csv", device="cpu")
    write_detections(weights, ["images"], "x.json", device="cpu")
    lines = [json.loads(line) for line in Path("x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == [os.path.join("images", name) for name in FILES]
    assert [line["error"] for line in lines[4:]] == [
        "images/broken.jpg: not an image in a known format",
        "images/z.png: the file is empty",
    ]
    assert [(line["width"], line["height"]) for line in lines[:4]] == [(80, 60), (60, 80), (50, 90), (80, 60)]
    array = json.loads(Path("x.json").read_text(encoding="utf-8"))
    about = ("image_id", "file_name")
    again = [{key: line[key] for key in about} | row for line in lines[:4] for row in line["objects"]]
    assert again == array
    with open("x.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows[-2:]] == [line["error"] for line in lines[4:]]
    for row, result in zip(rows[:-2], array, strict=True):
        x, y, width, height = result["bbox"]
        assert [float(row[key]) for key in ("x1", "y1", "x2", "y2")] == pytest.approx(
            [x, y, x + width, y + height], abs=0.006
        )
        assert (row["file"], row["label"]) == (result["file_name"], result["category_name"])
        assert int(row["area"]) == rle.area(result["segmentation"])
        assert float(row["score"]) == pytest.approx(result["score"], abs=6e-5)


def test_without_a_file_rows_go_to_standard_output(weights, folder, capsys):
    write_detections(weights, ["images"], "x.csv", device="cpu")
    capsys.readouterr()
    write_detections(weights, ["images"], device="cpu")
    assert capsys.readouterr().out == Path("x.csv").read_text(encoding="utf-8")


def test_workers_and_company_change_nothing(weights, folder):
    write_detections(weights, ["images"], "x.jsonl", device="cpu")
    write_detections(weights, ["images"], "y.jsonl", device="cpu", workers=2)
    assert Path("x.jsonl").read_bytes() == Path("y.jsonl").read_bytes()
    write_detections(weights, ["images/b.jpg"], "z.jsonl", device="cpu")
    alone, among = (json.loads(Path(name).read_text().splitlines()[i]) for name, i in (("z.jsonl", 0), ("x.jsonl", 1)))
    assert alone["objects"] == among["objects"]


def test_pictures_keep_their_names(weights, folder):
    write_detections(weights, ["images"], "x.json", "seen", draw_score=0.1, device="cpu")
    seen = sorted(str(path.relative_to("seen")) for path in Path("seen").rglob("*.*"))
    assert seen == READABLE
    with Image.open("seen/below/a.jpg") as picture:
        assert picture.size == (50 * 11, 90 * 11)  # enlarged
    write_detections(weights, ["images/a.jpg"], "y.json", "bare", draw_score=1, device="cpu")
    with Image.open("bare/a.jpg") as bare, Image.open("seen/a.jpg") as drawn:
        assert np.abs(np.asarray(bare).astype(int) - np.asarray(drawn)).mean() > 5
        plain = np.asarray(read_image(folder / "a.jpg").resize(bare.size)).astype(int)
        assert np.abs(np.asarray(bare) - plain).mean() < 5


def test_pictures_never_collide(weights, tmp_path, monkeypatch):
    """One name in two folders, formats that are not written, and a name that such a picture would get."""
    monkeypatch.chdir(tmp_path)
    files = [photo(tmp_path / name, i) for i, name in enumerate(("u/a.jpg", "v/a.jpg", "v/b.gif", "v/b.gif.png"))]
    write_detections(weights, [str(path) for path in files], "x.csv", "seen", device="cpu")
    seen = sorted(str(path.relative_to("seen")) for path in Path("seen").rglob("*.*"))
    assert seen == ["u/a.jpg", "v/a.jpg", "v/b.gif.png", "v/b.gif.png.png"]


def test_boxes_alone(tmp_path, folder):
    weights = made(tmp_path / "boxes.safetensors", masks=False)
    write_detections(weights, ["images"], "x.csv", "seen", draw_score=0.1, device="cpu")
    write_detections(weights, ["images"], "x.json", device="cpu")
    rows = json.loads(Path("x.json").read_text())
    assert rows
    assert not any("segmentation" in row for row in rows)
    assert {row["category_id"] for row in rows} <= {1, 2, 3}  # without names or ids: the labels
    assert {row["category_name"] for row in rows} <= {"1", "2", "3"}
    with open("x.csv", newline="") as file:
        assert {row["area"] for row in csv.DictReader(file)} == {""}


def test_grey_images_for_a_grey_detector(tmp_path, folder):
    weights = made(tmp_path / "grey.safetensors", in_channels=1)
    assert write_detections(weights, ["images"], "x.json", "seen", draw_score=0.1, device="cpu") == 2


def test_the_least_score(weights, folder):
    """Suppression goes from high scores to low ones, so what is left out changes nothing above."""

    def rows(out: str, score: float | None) -> list[dict]:
        write_detections(weights, ["images"], out, min_score=score, device="cpu")
        return json.loads(Path(out).read_text(encoding="utf-8"))

    every = rows("all.json", None)
    middle = float(np.median([row["score"] for row in every]))
    assert rows("x.json", middle) == [row for row in every if row["score"] > middle] != []
    assert rows("none.json", 1.0) == []


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_stopped_command_leaves_nothing_behind(weights, folder, monkeypatch, suffix):
    as_results = module.as_results

    def stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return as_results(*arguments)

    monkeypatch.setattr(module, "as_results", stop)
    with pytest.raises(Interrupted, match=f"stopped after 0 of 6 images; x.{suffix} was not written"):
        write_detections(weights, ["images"], f"x.{suffix}", device="cpu")
    assert os.listdir() == ["images"]


def test_one_image_is_held_at_a_time(weights, tmp_path, monkeypatch):
    """Rows are written before the next image is read."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        photo(tmp_path / "images" / f"{i}.png", i)
    events = []
    read, line = module._read, json.dumps
    monkeypatch.setattr(module, "_read", lambda *arguments: (events.append("read"), read(*arguments))[1])
    monkeypatch.setattr(module.json, "dumps", lambda *a, **k: (events.append("write"), line(*a, **k))[1])
    write_detections(weights, ["images"], "x.jsonl", device="cpu")
    assert events == ["read", "write"] * 3


def test_arguments_that_cannot_be_used(weights, folder, tmp_path):
    Path("old.json").touch()
    Path("full").mkdir()
    Path("full", "a").touch()
    Path("empty").mkdir()
    wrong = [
        (dict(out="x.txt"), "must end in .json or .jsonl or .csv"),
        (dict(out="old.json"), "old.json exists"),
        (dict(pictures="full"), "--pictures full is not empty"),
        (dict(pictures="images"), "--pictures images is not empty"),
        (dict(pictures="old.json"), "--pictures old.json exists"),
        (dict(min_score=1.5), "--min-score 1.5: 0 to 1"),
        (dict(draw_score=-1), "--draw-score -1: 0 to 1"),
        (dict(workers=-1), "--workers"),
        (dict(device="abacus"), "no device 'abacus'"),
    ]
    for options, said in wrong:
        with pytest.raises(InputError, match=said):
            write_detections(weights, ["images"], **{"device": "cpu"} | options)
    with pytest.raises(InputError, match="none of the 2 images could be read"):
        write_detections(weights, ["images/broken.jpg", "images/z.png"], "x.json", device="cpu")
    with pytest.raises(InputError, match="no images to read"):
        write_detections(weights, ["nowhere"], "x.json", device="cpu")
    assert not Path("x.json").exists()
    write_detections(weights, ["images"], "x.json", "empty", device="cpu")
    assert any(Path("empty").iterdir())


def test_missing_paths_are_named(weights, folder, capsys):
    assert write_detections(weights, ["nowhere", "images/a.jpg"], "x.jsonl", device="cpu") == 1
    lines = [json.loads(line) for line in Path("x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"image_id": 1, "file_name": "nowhere", "error": "nowhere: no such file or directory"}
    assert lines[1]["image_id"] == 2
    assert "warning: nowhere: no such file or directory" in capsys.readouterr().err
