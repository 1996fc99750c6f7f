"""`normfree detect train` and `detect eval` on a few drawn pictures: what they write, say, resume and refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from test_cli import refused, run

import normfree
from normfree.config import DetectionRun, load_config, with_options
from normfree.data.coco import open_detection_split
from normfree.engine.run import estimated_seconds
from normfree.errors import InputError
from normfree.models.files import ZOO
from normfree.recipes.coco import DETECTION_RECIPES, Place, Scenes, choose_detection
from normfree.tasks.detection import choice
from normfree.tasks.detection import model as model_module
from normfree.tasks.detection import task as module
from normfree.tasks.detection.evaluation import evaluate, evaluate_weights
from normfree.tasks.detection.metrics import score_table
from normfree.tasks.detection.model import Detector, freeze, load_detector, save_detector
from normfree.tasks.detection.task import build, resume
from normfree.tasks.unreadable import Unreadable

QUICK = (
    "--backbone nfnet_nano --channels 16 --px 64 --anchor-px 8 --rois 16 --max-detections 20 --batch-size 2 --steps 2 "
    "--warmup-steps 1 --lr 0.01 --log-every 1 --ema-decay 0.9 --workers 0 --device cpu"
)
PARTS = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
NAMES = {7: "box", 3: "disc"}  # not in order, with gaps


def picture(path: Path, rng: np.random.Generator, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
    """Draws rectangles and ellipses; their annotations without ids."""
    image = Image.fromarray(rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8))
    pen, found = ImageDraw.Draw(image), []
    for i in range(count):
        width, height = (int(side) for side in rng.integers(16, 34, 2))
        x, y = int(rng.integers(0, size[0] - width)), int(rng.integers(0, size[1] - height))
        if i % 2:
            pen.ellipse((x, y, x + width, y + height), fill=(230, 80, 40))
            turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
            points = np.stack([x + width * (1 + np.cos(turns)) / 2, y + height * (1 + np.sin(turns)) / 2], 1)
        else:
            pen.rectangle((x, y, x + width, y + height), fill=(60, 120, 240))
            points = np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])
        area = width * height * (np.pi / 4 if i % 2 else 1)
        row = {"category_id": (3, 7)[1 - i % 2], "bbox": [x, y, width, height], "area": float(area), "iscrowd": 0}
        found.append(row | {"segmentation": [points.round(2).ravel().tolist()]})
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)
    return found


def split(root: Path, name: str, count: int, crowd: bool = False, first_id: int = 100) -> None:
    """`count` pictures, wide and tall ones in turn; the second has no objects, the first perhaps a crowd."""
    rng, images, annotations = np.random.default_rng(first_id), [], []
    for i in range(count):
        size = ((96, 64), (64, 96))[i % 2]
        rows = picture(root / name / f"{i:03d}.jpg", rng, size, 0 if i == 1 else 2 + i % 2)
        images.append({"id": first_id + 3 * i, "file_name": f"{i:03d}.jpg", "width": size[0], "height": size[1]})
        if crowd and i == 0:
            pixels = np.zeros((64, 96), dtype=np.uint8, order="F")
            pixels[40:, 50:] = 1
            code = rle.encode(pixels)
            code["counts"] = code["counts"].decode() if isinstance(code["counts"], bytes) else code["counts"]
            about = {"category_id": 3, "bbox": [50, 40, 46, 24], "area": 1104.0, "iscrowd": 1, "segmentation": code}
            rows.append(about)
        annotations += [
            {"id": len(annotations) + j + 1, "image_id": images[-1]["id"]} | row for j, row in enumerate(rows)
        ]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": number, "name": name} for number, name in NAMES.items()]
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def shapes(root: Path) -> Path:
    split(root, "train", 12, crowd=True)
    split(root, "val", 6, crowd=True, first_id=500)
    return root


def edited(root: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "annotations" / f"instances_{name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def boxes_alone(content: dict[str, Any]) -> None:
    content["annotations"] = [row | {"segmentation": []} for row in content["annotations"] if not row["iscrowd"]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return shapes(tmp_path / "shapes")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first run there is one picture at an evaluation, since TensorBoard takes long to compress them."""
    monkeypatch.setattr(module, "PICTURES", 1)


class Trained(NamedTuple):
    folder: Path
    data: Path
    out: list[str]
    err: list[str]

    def log(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in log_of(self.folder) if line["kind"] == kind]


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    clock = ("time", "images_per_s", "data_wait", "memory_mib")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of four steps with two evaluations, in folders whose names need quotes, and what it said."""
    root = tmp_path_factory.mktemp("trained")
    data, folder = shapes(root / "my shapes"), root / "my run"
    edited(data, "train", lambda content: content["annotations"].append(content["annotations"][0] | {"id": 0}))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        words = f"{QUICK} --steps 4 --eval-every 0.5 --seed 3".split()
        run("detect train", data, *words, "--out", folder)
    return Trained(folder, data, out.getvalue().splitlines(), err.getvalue().splitlines())


def configured(data: Path, **options: Any) -> DetectionRun:
    """The run of QUICK."""
    small: dict[str, Any] = dict(backbone="nfnet_nano", channels=16, px=64, max_px=96, anchor_px=8, rois=16)
    small |= dict(max_detections=20, batch_size=2, steps=2, warmup_steps=1, lr=0.01, workers=0, device="cpu")
    return with_options(DetectionRun(), small | {"path": str(data)} | options)


# --- what a run writes and says ---


def test_a_run_folder_has_everything(trained: Trained) -> None:
    folder = trained.folder
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == "detection"
    run = load_config(folder / "config.json", DetectionRun)
    assert (run.optim.steps, run.model.channels, run.seed) == (4, 16, 3)
    images = json.loads((folder / "data.json").read_text())["images"]
    assert images.keys() == {"train", "validation"}
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == [f"{i:06d}.jpg" for i in range(6)]
    with Image.open(folder / "pictures" / "000000.jpg") as shown:
        assert shown.width > 2 * 96  # the truth beside the prediction
    for name in ("best", "last"):
        detector = load_detector(folder / f"{name}.safetensors")
        info = detector.info
        assert info is not None
        assert (info.class_names, info.category_ids, info.eval_px) == (("disc", "box"), (3, 7), 64)
        assert info.trained_on
        assert info.source == "normfree detect train my shapes"


def test_losses_and_scores_are_logged(trained: Trained) -> None:
    steps, evaluations = trained.log("train"), trained.log("eval")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations] == [3, 4]
    for line in steps + evaluations:
        assert all(np.isfinite(line[name]) for name in PARTS)
        assert line["loss"] == pytest.approx(sum(line[name] for name in PARTS), rel=1e-5)
    for name in ("agc_stem", "agc_stages.0", "agc_stages.3", "agc_fpn", "agc_rpn", "agc_box_head", "agc_mask_head"):
        assert all(0 <= line[name] <= 1 for line in steps)
    for line in evaluations:
        assert {"mask_ap", "mask_ap50", "box_ap", "box_ap50", "box_ar100", "raw_mask_ap", "raw_loss"} <= line.keys()
        assert "box_large" not in line  # there are no objects of this size
    (details,) = trained.log("details")
    assert details["mask"]["ap"] == evaluations[-1]["mask_ap"]
    assert [row["name"] for row in details["box"]["per_class"]] == ["disc", "box"]
    assert sum(row["objects"] for row in details["box"]["per_class"]) == 12  # without the crowd


def test_tensorboard_has_numbers_and_pictures(trained: Trained) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.folder))
    events.Reload()
    assert {"train/loss_mask", "eval/mask_ap", "eval/loss_objectness"} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("000003")] == [3, 4]


def test_the_lines_that_a_run_prints(trained: Trained) -> None:
    folder, data, out, err = trained
    first = [line.split()[0] for line in err if line]
    for word in ("chosen", "data", "note", "problem", "network", "run", "time", "epoch"):
        assert word in first, word
    text = "\n".join(err)
    assert "12 training and 6 validation images, 28 objects to train on, 2 classes" in text
    assert "Mask R-CNN on nfnet_nano" in text
    assert "0.667 epochs = 4 steps of 2 images" in text
    assert "objects    box AP  box AP50   mask AP" in text
    assert out[0].startswith("validation mask AP ")
    assert "(epoch 0." in out[0]
    said = {line.split()[0]: shlex.split(line)[1:] for line in out[2:5]}
    assert said["predict"][:4] == ["normfree", "detect", "predict", str(folder / "best.safetensors")]
    assert said["evaluate"] == ["normfree", "detect", "eval", str(folder / "best.safetensors"), str(data)]
    assert said["curves"] == ["tensorboard", "--logdir", str(folder)]
    assert out[5] == f"pictures         {folder / 'pictures'}"


# --- resume ---

RESUMED: dict[str, Any] = dict(steps=4, batch_size=4, micro_batch=2, sam_rho=0.05, ema_decay=0.9, scale=(0.8, 1.25))
RESUMED |= dict(eval_every=1.0, checkpoint_minutes=0, log_every=1, max_detections=10, warmup_steps=0, seed=5)


def train_until(folder: str, data: str, stop: str) -> None:
    """In a process of its own, which is killed before update number `stop`."""
    module.PICTURES = 1
    job = build(configured(Path(data), **RESUMED))
    original = job.update.step

    def step(number: int, lr: float, hold: torch.Tensor) -> None:
        if number == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)
        original(number, lr, hold)

    job.update.step = step  # type: ignore[method-assign]
    module.engine.start(job, Path(folder))


@pytest.mark.parametrize("of", ["backbone", "detector"])
def test_a_run_from_weights_resumes_without_them(data: Path, tmp_path: Path, of: str) -> None:
    """The checkpoint has the network, with options that the weights brought."""
    weights = tmp_path / "weights.safetensors"
    network = normfree.create_model("nfnet_nano", 3, activation="relu")
    assert network.info is not None
    normfree.save(network, weights, dataclasses.replace(network.info, mean=(0.1, 0.2, 0.3)))
    if of == "detector":
        save_detector(build(configured(data, init=str(weights))).task.model, weights)
    run = configured(data, **RESUMED, init=str(weights))
    straight = module.start(run, tmp_path / "straight")
    job = build(run)
    original = job.update.step

    def step(number: int, lr: float, hold: torch.Tensor) -> None:
        if number == 2:
            raise KeyboardInterrupt
        original(number, lr, hold)

    job.update.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        module.engine.start(job, tmp_path / "stopped")
    weights.unlink()
    assert resume(tmp_path / "stopped").last == straight.last
    last = [(tmp_path / folder / "last.safetensors").read_bytes() for folder in ("straight", "stopped")]
    assert last[0] == last[1]
    info = load_detector(tmp_path / "stopped" / "last.safetensors").info
    assert info is not None
    assert (info.mean, info.overrides["activation"]) == ((0.1, 0.2, 0.3), "relu")


def test_killed_and_resumed_equals_uninterrupted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    outcome = module.start(configured(data, **RESUMED), straight)
    code = "import sys; from test_detect import train_until; train_until(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(killed), str(data), "2"]
    assert subprocess.run(command, cwd=Path(__file__).parent).returncode == -signal.SIGKILL
    assert not (killed / "last.safetensors").exists()
    assert resume(killed).last == outcome.last
    logs = [[line for line in log_of(folder) if line["kind"] != "start"] for folder in (straight, killed)]
    assert [line["step"] for line in logs[0] if line["kind"] == "eval"] == [3, 4]
    assert logs[0] == logs[1]
    assert [line["step"] for line in log_of(killed) if line["kind"] == "start"] == [0, 2]
    for name in ("best", "last"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (straight, killed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    capsys.readouterr()
    line = refused(capsys, "detect train --resume", killed, "--workers 0 --no-flip --max-px 200")
    assert "the machine options may change" in line
    init = f"--init {killed}/last.safetensors"
    assert line.endswith(f": normfree detect train {data} {init} --max-px 200 --no-flip")
    edited(data, "train", lambda content: content["annotations"][2]["bbox"].__setitem__(0, 1.5))
    line = refused(capsys, "detect train --resume", killed)
    assert "are not those that the run was begun with" in line


def test_a_run_gets_a_new_length(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    steps = load_config(folder / "config.json", DetectionRun).optim.steps
    assert steps is not None
    run("detect train --resume", folder, "--steps", steps + 1)
    assert f"length   {steps + 1} steps instead of {steps}: from step {steps + 1} on" in capsys.readouterr().err
    assert load_config(folder / "config.json", DetectionRun).optim.steps == steps + 1
    assert [line["step"] for line in log_of(folder) if line["kind"] == "train"] == list(range(1, steps + 2))
    with pytest.raises(SystemExit, match="2"):
        run("detect train --resume", folder, "--steps", steps)
    assert f"{steps + 1} steps are done" in capsys.readouterr().err


def test_the_mean_of_checkpoints_is_a_detector(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "mean.safetensors"
    run("average", trained.folder, "--last 1 --out", out)
    assert f"wrote {out}" in capsys.readouterr().out
    one, other = (load_detector(path) for path in (out, trained.folder / "last.safetensors"))
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert one.info is not None
    assert other.info is not None
    assert one.info == dataclasses.replace(
        other.info, source=f"{other.info.source}, mean of 1 checkpoint, after step 4"
    )


# --- batches ---


def test_processes_do_not_change_batches_of_one_orientation(data: Path) -> None:
    options: dict[str, Any] = dict(scale=(0.7, 1.4), batch_size=2)
    task, keeping = (build(configured(data, **options, workers=workers)).task for workers in (0, None))
    assert keeping.train_set.in_memory  # type: ignore[attr-defined]
    assert keeping.workers == 0  # type: ignore[attr-defined]
    here, there = (list(task.read(range(8), workers)) for workers in (0, 1))  # type: ignore[attr-defined]
    kept = list(keeping.read(range(8), 0))  # type: ignore[attr-defined]
    assert sorted(index for batch in here[:6] for index in batch.indices) == list(range(12))
    for one, other in [*zip(here, there, strict=True), *zip(here, kept, strict=True)]:
        assert one.indices == other.indices
        assert all(torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True))
        for a, b in zip(one.targets, other.targets, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in ("boxes", "labels", "masks"))
        assert len({image.shape[2] > image.shape[1] for image in one.images}) == 1
    assert len({image.shape for batch in here for image in batch.images}) > 4  # the scale jitters


# --- data that lack something, and what is refused ---


def test_boxes_alone_train_without_masks(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in ("train", "val"):
        edited(data, part, boxes_alone)
    assert "--masks needs a mask" in refused(capsys, "detect train", data, QUICK, "--masks --out", tmp_path / "no")
    run("detect train", data, QUICK, "--out", tmp_path / "run")
    out, err = capsys.readouterr()
    assert "chosen   boxes alone, without a mask head: not every object has a mask" in err
    assert "Faster R-CNN (boxes alone) on nfnet_nano" in err
    assert out.startswith("validation box AP ")
    last = [line for line in log_of(tmp_path / "run") if line["kind"] == "eval"][-1]
    assert "loss_classifier" in last
    assert not any("mask" in name for name in last)
    run("detect eval", tmp_path / "run", data, "--device cpu --workers 0")
    assert "mask" not in capsys.readouterr().out


def test_masks_can_be_left_out(data: Path) -> None:
    job = build(configured(data, masks=False))
    batch = next(job.task.batches(range(1), module.Shard()))
    assert "masks" not in batch.targets[0]
    assert job.task.loss(job.task.model, batch).keys() == {"loss", *PARTS} - {"loss_mask"}
    assert job.task.metric == "box_ap"


def without(part: str, key: str) -> Callable[[Path], None]:
    return lambda data: edited(data, part, lambda content: content.update({key: []}))


def double_id(data: Path) -> None:
    edited(data, "train", lambda content: content["annotations"][3].update(category_id=99))


def no_training(data: Path) -> None:
    (data / "annotations" / "instances_train.json").unlink()


REFUSED: dict[str, tuple[Callable[[Path], None] | None, str, str]] = {
    "no objects": (without("train", "annotations"), "", "has no objects to train on"),
    "no objects in validation": (without("val", "annotations"), "", "6 validation images have no objects"),
    "no images": (without("train", "images"), "", "lists no images"),
    "no validation images": (without("val", "images"), "", "lists no images"),
    "validation alone": (no_training, "", "annotations to validate on but none to train on"),
    "strict": (double_id, "--strict", "problems"),
    "batch": (None, "--batch-size 13", "--batch-size 13 is more than the 12 training images"),
    "warm-up": (None, "--warmup-steps 2", "warm-up"),
    "epochs and steps": (None, "--epochs 3", "--epochs 3 and --steps 2: give one of them"),
    "validation fraction": (None, "--validation-fraction 0.3", "--validation-fraction 0.3"),
    "min score": (None, "--min-score 1", "--min-score 1"),
    "scale": (None, "--scale 2 1", "--scale 2 1"),
    "pixels": (None, "--px 31", "--px 31"),
    "largest pixels": (None, "--max-px 50", "--max-px 50: 64 to"),
    "freezing": (None, "--freeze-stages 5", "--freeze-stages 5: 0 to 4"),
    "backbone": (None, "--backbone nfnet_nanno", "no model 'nfnet_nanno'; did you mean 'nfnet_nano'"),
    "recipe": (None, "--recipe coco_nfnet_f9", "no recipe 'coco_nfnet_f9'"),
    "recipe of a backbone": (None, "--recipe coco_nfnet_f0", "--recipe coco_nfnet_f0 is for nfnet_f0, not nfnet_nano"),
    "init": (None, "--init nothing.safetensors", "no weight file"),
    "device": (None, "--device cpuu", "did you mean 'cpu'"),
    "seed": (None, "--seed -1", "--seed -1"),
    "clipping": (None, "--clip none --clipping 0.1", "no effect with --clip none"),
    "option": (None, "--train-px 64", "detect train has no option --train-px"),
}


@pytest.mark.parametrize(("change", "words", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_line(
    change: Callable[[Path], None] | None, words: str, message: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    if change is not None:
        change(data)
    assert message in refused(capsys, "detect train", data, QUICK, words, "--out", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_words_without_data(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "DATA is missing" in refused(capsys, "detect train")
    assert "no/such" in refused(capsys, "detect train no/such")
    assert "no run is there" in refused(capsys, "detect train --resume no/such")
    assert "WEIGHTS" in refused(capsys, "detect eval")
    assert "no verb 'detect trian'; did you mean 'detect train'" in refused(capsys, "detect trian x")
    assert list(tmp_path.iterdir()) == []


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:800])  # the header is whole


def test_unreadable_images_are_replaced_and_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    truncated(data / "train" / "004.jpg")
    truncated(data / "val" / "002.jpg")
    line = f"--steps 6 --out {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as stop:
        run("detect train", data, QUICK, line)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    last = error.splitlines()[-1]
    assert (
        "1 of 12 training images cannot be read, more than --max-unreadable 0.05 allows; the last was 004.jpg" in last
    )
    assert "continue with: normfree detect train --resume" in error or not (tmp_path / "run").exists()


def test_some_unreadable_images_are_allowed(data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "PICTURES", 6)
    truncated(data / "train" / "004.jpg")
    truncated(data / "val" / "002.jpg")
    run("detect train", data, QUICK, "--steps 6 --max-unreadable 0.1 --out", tmp_path / "run")
    error = capsys.readouterr().err
    log = log_of(tmp_path / "run")
    assert [line["name"].split(":")[0] for line in log if line["kind"] == "unreadable"] == ["004.jpg"]
    assert error.count("warning: 004.jpg: ") == 1
    assert error.count("warning: not counted: 002.jpg: ") == 1
    (evaluation,) = (line for line in log if line["kind"] == "eval")
    assert evaluation["unreadable"] == 1
    (details,) = (line for line in log if line["kind"] == "details")
    rows = json.loads((data / "annotations" / "instances_val.json").read_text())["annotations"]
    left = sum(not row["iscrowd"] and row["image_id"] != 506 for row in rows)
    assert sum(row["objects"] for row in details["box"]["per_class"]) == left < 12
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 5


def test_a_run_goes_on_once_its_images_are_repaired() -> None:
    unreadable = Unreadable(10, 0.1)
    assert unreadable.count(["a: cut off"]) == ("a: cut off",)
    for _ in range(2):
        with pytest.raises(InputError, match=r"2 of 10 training images cannot be read.*the last was b: cut off"):
            unreadable.count(["a: cut off", "b: cut off"])
        unreadable.load_state_dict(json.loads(json.dumps(unreadable.state_dict())))
    assert unreadable.count(["a: cut off"]) == ()


def spoil(path: Path, size: tuple[int, int] | None = None) -> None:
    Image.new("RGB", size).save(path) if size else path.write_bytes(b"no image")


def test_files_that_do_not_fit_count_as_unreadable(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spoil(data / "train" / "004.jpg")
    spoil(data / "train" / "007.jpg", (30, 30))
    words = refused(capsys, "detect train", data, QUICK, "--max-unreadable 0.1 --out", tmp_path / "run")
    assert "2 of 12 training images cannot be used, more than --max-unreadable 0.1 allows: 004.jpg" in words
    assert len(build(configured(data, max_unreadable=0.2)).task.train_set) == 10  # type: ignore[attr-defined]


def test_images_that_were_held_out_can_be_evaluated_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (data / "annotations" / "instances_val.json").unlink()
    (data / "annotations" / "instances_train.json").rename(data / "annotations.json")
    (data / "train").rename(data / "images")
    run("detect train", data, QUICK, "--seed 3 --validation-fraction 0.3 --out", tmp_path / "run")
    said = capsys.readouterr()
    command = next(line for line in said.out.splitlines() if line.startswith("evaluate"))
    words = shlex.split(command)[2:]
    assert words[-4:] == ["--held-out", "0.3", "--seed", "3"]
    run(*map(shlex.quote, words), "--workers 0 --device cpu")
    alone = capsys.readouterr()
    assert "weights were trained on" not in alone.err
    number = re.search(r"and (\d+) validation images", said.err)
    assert number
    assert f"{number[1]} images, " in alone.out
    run("detect eval", tmp_path / "run", data, "--workers 0 --device cpu")
    whole = capsys.readouterr()
    assert "12 images, " in whole.out
    assert "images that the weights were trained on are among these" in whole.err
    for options, reason in {"--seed 3": "--held-out", "--workers 999": "--workers", "--held-out 2": "held-out"}.items():
        assert reason in refused(capsys, "detect eval", tmp_path / "run", data, options)
    (data / "annotations.json").rename(data / "annotations" / "instances_train.json")
    assert "add --held-out and --seed" in refused(capsys, "detect eval", tmp_path / "run", data)


def test_evaluation_says_what_it_leaves_out(trained: Trained, data: Path, capsys: pytest.CaptureFixture) -> None:
    edited(data, "val", lambda content: content["annotations"][0].update(bbox=[1, 1, -3, 4]))
    run("detect eval", trained.folder, data, "--workers 0 --device cpu")
    assert "1 boxes of negative size (left out): 000.jpg" in capsys.readouterr().err
    words = refused(capsys, "detect eval", trained.folder, data, "--held-out 0.1")
    assert "has validation images of its own: leave out --held-out" in words


# --- weights to start from ---


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classifier") / "five.safetensors"
    torch.manual_seed(9)
    normfree.save(normfree.create_model("nfnet_nano", 5), path)
    return str(path)


@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_a_run_reads_its_weights_once_and_does_not_change_them(
    kind: str, classifier: str, trained: Trained, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = choice.read, []
    for place in (choice, model_module, normfree.models.files):  # type: ignore[attr-defined]
        monkeypatch.setattr(place, "read", lambda *args: (calls.append(args), read(*args))[1])
    monkeypatch.setattr(choice, "_MEASURED_SECONDS", 0.01)
    init = classifier if kind == "classifier" else str(trained.folder)
    given = {"path": str(data), "init": init, "px": 64, "max_px": 96, "rois": 16, "device": "cpu"}
    run, _, weights = choice.choose_recipe(None, given)
    assert weights is not None
    before = {name: value.clone() for name, value in read(init, ZOO).state.items()}
    assert all(weights.state[name].equal(value) for name, value in before.items())
    build(run, weights)
    assert len(calls) == 1


def test_frozen_stages_keep_the_weights_of_a_classifier(classifier: str, data: Path, tmp_path: Path) -> None:
    run(
        "detect train", data, QUICK, f"--init {classifier} --freeze-stages 2 --weight-decay 0.1 --out", tmp_path / "run"
    )
    old, new = load_file(classifier), load_file(tmp_path / "run" / "last.safetensors")
    prefix = "backbone.body."
    body = {name.removeprefix(prefix): value for name, value in new.items() if name.startswith(prefix)}
    frozen = [name for name in body if name.startswith(("stem", "stages.0.", "stages.1."))]
    assert len(frozen) > 10
    assert all(torch.equal(body[name], old[name]) for name in frozen)
    for name in ("stages.2.", "stages.3."):
        assert not all(torch.equal(body[key], old[key]) for key in body if key.startswith(name))
    row = next(line for line in log_of(tmp_path / "run") if line["kind"] == "train")
    assert "agc_stages.2" in row
    assert not {"agc_stem", "agc_stages.0", "agc_stages.1"} & row.keys()


def test_weights_of_a_detector_keep_what_they_know(trained: Trained, data: Path, tmp_path: Path, capsys: Any) -> None:
    old = load_file(trained.folder / "best.safetensors")
    same = build(configured(data, init=str(trained.folder))).task.model.state_dict()
    assert all(torch.equal(same[name], old[name]) for name in old)
    for part in ("train", "val"):
        edited(data, part, lambda content: content["categories"][1].update(name="ring"))
    new = build(configured(data, init=str(trained.folder))).task.model
    assert new.info.class_names == ("ring", "box")  # type: ignore[union-attr]
    rows = new.state_dict()["roi_heads.box_predictor.cls_score.weight"]
    before = old["roi_heads.box_predictor.cls_score.weight"]
    assert [torch.equal(rows[i], before[i]) for i in range(3)] == [True, False, True]
    line = refused(capsys, "detect train", data, QUICK, "--channels 32 --init", trained.folder, "--out", tmp_path / "x")
    assert "--channels 32: the weights of --init are for --channels 16" in line
    line = refused(capsys, "detect train", data, QUICK, "--backbone nfnet_micro --init", trained.folder)
    assert "--backbone nfnet_micro: the weights of --init are for --backbone nfnet_nano" in line
    assert not (tmp_path / "x").exists()


def test_files_of_the_other_task_are_refused(trained: Trained, classifier: str, capsys: Any, tmp_path: Path) -> None:
    detector, data = trained.folder / "best.safetensors", trained.data
    assert "is a detector" in refused(capsys, "eval", detector, "mnist5k")
    assert "is a detector" in refused(capsys, "predict", detector, data / "val")
    assert "is a detector" in refused(capsys, "train mnist5k --steps 2 --init", detector, "--out", tmp_path / "x")
    for verb in ("detect eval", "detect predict"):
        assert "holds a classifier, nfnet_nano, not a detector" in refused(capsys, verb, classifier, data / "val")
    assert "of a run of detection, not of classification" in refused(capsys, "train --resume", trained.folder)
    assert list(tmp_path.iterdir()) == []


# --- precision, time ---


def test_bfloat16_trains(data: Path, tmp_path: Path) -> None:
    run("detect train", data, QUICK, "--precision bfloat16 --max-detections 5 --out", tmp_path / "run")
    steps = [line for line in log_of(tmp_path / "run") if line["kind"] in ("train", "eval")]
    assert len(steps) == 3
    assert all(np.isfinite(line[name]) for line in steps for name in ("loss", *PARTS))
    full = log_of(tmp_path / "run")
    assert {value.dtype for value in load_file(tmp_path / "run" / "last.safetensors").values()} == {torch.float32}
    assert full[0]["kind"] == "start"


def test_the_estimate_of_the_time_changes_nothing(data: Path) -> None:
    job = build(configured(data))
    before, random = {k: v.clone() for k, v in job.update.tensors().items()}, torch.get_rng_state()
    assert 0 < estimated_seconds(job) < 600
    assert all(torch.equal(value, before[name]) for name, value in job.update.tensors().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in job.task.model.parameters())


# --- choice and recipes ---

SCENES = Scenes(num_train=100, num_classes=3, num_objects=300, short_px=480, small_px=40.0, masks=True)
GIVEN = {"path": "shapes"}


def test_given_options_are_obeyed() -> None:
    given = dict(px=96, channels=24, rois=8, batch_size=3, lr=0.5, clipping=0.2, warmup_epochs=1.0, eval_every=2.0)
    given |= dict(anchor_px=64, scale=(0.5, 1.0), masks=False, epochs=7.0, weight_decay=0.1, backbone="nf_resnet26")
    for base in (None, DETECTION_RECIPES["detect_small"]("shapes")):
        run, reasons = choose_detection(GIVEN | given, SCENES, Place("cuda"), {}, base)
        run.check()
        chosen = normfree.config.options_of(run)  # type: ignore[attr-defined]
        assert {name: chosen[name] for name in given} == given
        assert not given.keys() & {name for reason in reasons for name in reason.options}


def test_nothing_is_measured_where_the_length_is_given() -> None:
    def measure(run: DetectionRun) -> float:
        raise AssertionError

    for length in ({"steps": 9}, {"epochs": 4.0}):
        choose_detection(GIVEN | length, SCENES, Place("cpu", measure), {})
    run, reasons = choose_detection(GIVEN, SCENES, Place("cpu", lambda run: 1.0), {})
    assert 3 <= run.optim.epochs < 30
    assert any("minutes allow at 1 images/s" in reason.text for reason in reasons)
    assert run.optim.warmup_epochs <= run.optim.epochs / 10
    slow, reasons = choose_detection(GIVEN, SCENES, Place("cpu", lambda run: 0.001), {})
    assert slow.optim.epochs == 3
    assert any("the least that is useful" in reason.text for reason in reasons)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [None, *DETECTION_RECIPES])
@pytest.mark.parametrize(
    "given", [{}, {"px": 900}, {"max_px": 200}, {"clip": "none"}, {"clip": "norm"}, {"optimizer": "adamw"}], ids=str
)
def test_what_is_given_never_contradicts_what_is_chosen(name: str | None, given: dict[str, Any], device: str) -> None:
    base = DETECTION_RECIPES[name]("shapes") if name else None
    for scenes in (SCENES, dataclasses.replace(SCENES, short_px=20, num_train=1, masks=False)):
        run, _ = choose_detection(GIVEN | given, scenes, Place(device, lambda run: 100.0), {}, base)
        run.check()
        options = normfree.config.options_of(run)  # type: ignore[attr-defined]
        assert {key: options[key] for key in given} == given
        assert run.optim.batch_size <= scenes.num_train or base
        assert run.model.masks == scenes.masks


def test_backbones_with_batch_normalization_are_clipped_as_others() -> None:
    """The heads have no normalization; without clipping ours diverged (experiments/detection)."""
    o = choose_detection(GIVEN | {"backbone": "bn_resnet50"}, SCENES, Place("cpu"), {})[0].optim
    assert o == choose_detection(GIVEN, SCENES, Place("cpu"), {})[0].optim
    assert (o.clip, o.clipping) == ("agc", 0.04)


def test_the_rate_follows_clipping_optimizer_and_batch() -> None:
    def chosen(**given: Any) -> float:
        return choose_detection(GIVEN | given, SCENES, Place("cpu"), {})[0].optim.lr

    assert chosen() == 0.1
    assert [chosen(batch_size=size) for size in (1, 4)] == pytest.approx([0.05, 0.2])
    assert chosen(clip="none") == pytest.approx(2 * 0.00125)
    assert chosen(clip="norm") == 0.1
    assert chosen(optimizer="adamw", batch_size=4) == pytest.approx(1e-4 * 0.5)
    assert chosen(clip="none", lr=0.3) == 0.3


def test_a_classifiers_verb_points_to_detection(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"normfree detect train {data}" in refused(capsys, "train", str(data))


def test_a_recipes_rate_follows_the_batch() -> None:
    base = DETECTION_RECIPES["coco_nfnet_f0"]("coco")
    run, reasons = choose_detection(GIVEN | {"batch_size": 4}, SCENES, Place("cpu"), {}, base)
    assert run.optim.lr == pytest.approx(base.optim.lr / 4)
    assert any("learning rate 0.005 for batches of 4" in reason.text for reason in reasons)
    run, reasons = choose_detection(GIVEN | {"batch_size": 4, "lr": 0.3}, SCENES, Place("cpu"), {}, base)
    assert run.optim.lr == 0.3
    assert reasons == ()


def test_a_short_run_of_a_recipe_warms_up_shorter() -> None:
    base = DETECTION_RECIPES["coco_nfnet_f0"]("coco")
    run, _ = choose_detection(GIVEN | {"steps": 5, "batch_size": 2}, SCENES, Place("cpu"), {}, base)
    assert run.optim.warmup_epochs == pytest.approx(0.01)
    run, _ = choose_detection(GIVEN | {"steps": 5, "warmup_steps": 2}, SCENES, Place("cpu"), {}, base)
    assert run.optim.warmup_steps == 2


@pytest.mark.parametrize("name", DETECTION_RECIPES)
def test_every_recipe_takes_a_step(name: str, data: Path) -> None:
    recipe = DETECTION_RECIPES[name](str(data))
    recipe.check()
    thin = dict(backbone="nfnet_nano", channels=16, px=64, max_px=96, rois=16, batch_size=2, device="cpu", workers=0)
    job = build(with_options(recipe, thin | dict(steps=2, warmup_steps=1)))
    torch.manual_seed(0)
    loss = job.task.loss(job.task.model, next(job.task.batches(range(1), module.Shard())))["loss"]
    loss.backward()
    job.update.step(0, job.plan.lr_at(1), hold=torch.tensor(False))
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in job.update.tensors().values())
    clipped = job.update.optimizer.stats.params  # type: ignore[attr-defined]
    assert bool(clipped) == (recipe.optim.clip == "agc")


@pytest.mark.parametrize("recipe", {getattr(make, "func", make) for make in DETECTION_RECIPES.values()})
def test_a_recipe_says_where_it_is_from(recipe: Callable) -> None:
    assert all(f"\n    {word}: " in recipe.__doc__ for word in ("Source", "Command", "Cost", "Expected"))


# --- evaluation ---


def by_pycocotools(data: Path, results: Path, kind: str) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations" / "instances_val.json"))
        scores = COCOeval(truth, truth.loadRes(str(results)), kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return scores.stats


def nearly_right(self: Detector, images: Any, sizes: Any, targets: Any) -> Any:
    """In place of `detect`: the objects with their boxes moved, more so from one to the next; masks fill them."""
    (target,), (width, height) = targets, sizes[0]
    boxes, count = target["boxes"], len(target["boxes"])
    factor = torch.tensor([width, height, width, height]) / torch.tensor([*images[0].shape[:0:-1]] * 2)
    moved = boxes * factor + torch.linspace(-2, 4, 4 * count).reshape(-1, 4)
    found = {"boxes": moved, "labels": target["labels"], "scores": torch.linspace(0.9, 0.3, count)}
    return [found | {"masks": torch.ones(count, 28, 28)}], self.losses(images, targets)


def test_eval_writes_what_pycocotools_scores_alike(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Detector, "detect", nearly_right)
    report, results = tmp_path / "report.json", tmp_path / "results.json"
    run("detect eval", trained.folder, trained.data, "--out", report, "--results", results, "--device cpu")
    out = capsys.readouterr().out.splitlines()
    figures, rows = json.loads(report.read_text()), json.loads(results.read_text())
    assert {row["image_id"] for row in rows} == {500 + 3 * i for i in (0, 2, 3, 4, 5)}
    assert {row["category_id"] for row in rows} == {3, 7}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats = by_pycocotools(trained.data, results, kind)
        for i, key in enumerate(("ap", "ap50", "ap75", "small", "medium", "large")):
            expected = None if stats[i] == -1 else pytest.approx(stats[i], abs=1e-12)
            assert figures[name][key] == expected
        assert 0.2 < figures[name]["ap"] < 0.95
        assert figures[f"{name}_ap"] == figures[name]["ap"]
    ap = next(line.split() for line in out if line.startswith("AP "))
    assert ap == ["AP", f"{100 * figures['box_ap']:.2f}", "%", f"{100 * figures['mask_ap']:.2f}", "%"]
    assert out[-1].startswith(f"6 images, {len(rows)} detections; loss ")
    assert figures["images"] == 6


def test_an_evaluation_has_no_side_effects(trained: Trained) -> None:
    model = load_detector(trained.folder)
    images = open_detection_split(str(trained.data), ("disc", "box"))
    cpu = torch.device("cpu")
    freeze(model.train(), 2)
    modes = {name: part.training for name, part in model.named_modules()}
    random = torch.get_rng_state()
    whole = evaluate(model, images, cpu, workers=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: part.training for name, part in model.named_modules()} == modes
    again = evaluate(model, images, cpu, workers=1, num_pictures=2)
    assert (again.results, again.figures()) == (whole.results, whole.figures())
    assert sorted(again.pictures) == ["000000", "000005"]
    alone = evaluate(model, images.subset([3]), cpu, workers=0)
    mine = [row | {"image_id": 1} for row in whole.results if row["image_id"] == 4]
    assert alone.results == mine
    assert score_table(whole.box, whole.mask) == whole.lines()[: len(score_table(whole.box, whole.mask))]


def test_evaluation_names_what_it_cannot_read(trained: Trained, data: Path, tmp_path: Path, capsys: Any) -> None:
    truncated(data / "val" / "000.jpg")
    run("detect eval", trained.folder, data, "--device cpu --workers 0 --out", tmp_path / "x.json")
    out, err = capsys.readouterr()
    assert "warning: not counted: 000.jpg" in err
    assert "5 images" in out.splitlines()[-1]
    assert len(json.loads((tmp_path / "x.json").read_text())["unreadable"]) == 1
    for i in range(1, 6):
        truncated(data / "val" / f"{i:03d}.jpg")
    with pytest.raises(InputError, match="none of the 6 images"):
        evaluate_weights(str(trained.folder), str(data), device="cpu", workers=0)
    capsys.readouterr()
    assert "must end in .json" in refused(capsys, "detect eval", trained.folder, data, "--results x.txt")


# --- prediction through the command line ---


def test_predict(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, pictures = tmp_path / "x.json", tmp_path / "seen"
    run("detect predict", trained.folder, trained.data / "val", "--out", out, "--pictures", pictures, "--device cpu")
    assert len(list(pictures.iterdir())) == 6
    rows = json.loads(out.read_text())
    assert {row["category_name"] for row in rows} <= {"disc", "box"}
    assert {row["category_id"] for row in rows} <= {3, 7}
    capsys.readouterr()
    assert "exists" in refused(capsys, "detect predict", trained.folder, trained.data / "val", "--out", out)
    assert "needs images" in refused(capsys, "detect predict", trained.folder)
    assert "--min-score 2" in refused(capsys, "detect predict", trained.folder, trained.data / "val", "--min-score 2")
