"""The command line as a user meets it: every verb on real files, and one line for everything that is wrong."""

import contextlib
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import normfree
from normfree.cli import Train, TrainDetector, main, option_names
from normfree.config import ClassificationRun
from normfree.engine.checkpoint import check_free
from normfree.errors import InputError

QUICK = (
    "--train-px 16 --eval-px 16 --epochs 2 --batch-size 8 --workers 0 --device cpu --width 16 32 32 32 --group-width 8"
)


def run(*args: object) -> None:
    main([word for a in args for word in (a.split() if isinstance(a, str) else [str(a)])])


def refused(capsys, *args: object) -> str:
    """The one line that the command says, on standard error, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    out, err = capsys.readouterr()
    assert stop.value.code == 2, err
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("normfree: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the coloured pictures: its folder and its data."""
    from conftest import COLOURS, draw

    root = tmp_path_factory.mktemp("trained")
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(20):
            draw(root / "photos" / name / f"{i:02d}.jpg", colour, 100 * c + i)
    run("train", root / "photos", QUICK.replace("--epochs 2", "--epochs 6"), "--out", root / "run")
    return root / "run", root / "photos"


def test_train_says_how_to_go_on(photos, tmp_path, capsys):
    run("train", photos, QUICK, "--out", tmp_path / "run")
    out, err = capsys.readouterr()
    best = tmp_path / "run" / "best.safetensors"
    assert "validation top-1" in out
    assert f"normfree predict {best}" in out
    assert f"normfree eval {best} {photos}" in out
    assert "72 training and 18 validation images, 3 classes" in err
    assert "epoch 2: top1" in err


def test_the_recipe_follows_the_pictures_not_the_folders_name(photos, tmp_path, capsys, monkeypatch):
    """The pictures are below 64 px, though the folder is called as a recipe for larger ones is."""
    monkeypatch.chdir(photos.parent)
    run("train photos --epochs 0.2 --warmup-epochs 0 --batch-size 8 --workers 0 --device cpu --out run")
    assert "nfnet_nano" in capsys.readouterr().err


def test_without_out_the_next_free_folder_is_taken(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run("train", photos, QUICK.replace("--epochs 2", "--epochs 0.2 --warmup-epochs 0"))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["photos-nfnet_nano-1", "photos-nfnet_nano-2"]


def test_runs_at_once_take_different_numbers(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from normfree.engine.checkpoint import numbered_run_folder

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: numbered_run_folder(tmp_path / "runs" / "a.b"), range(40)))
    assert {folder.name for folder in folders} == {f"a.b-{n}" for n in range(1, 41)}


def test_a_run_that_started_meanwhile_keeps_its_number(photos, tmp_path, capsys, monkeypatch):
    """Both ask for a number before either has its folder."""
    from normfree.tasks import classification

    monkeypatch.chdir(tmp_path)
    build = classification.build

    def build_while_another_starts(*arguments):
        Path("runs/photos-nfnet_nano-1").mkdir(parents=True, exist_ok=True)
        return build(*arguments)

    monkeypatch.setattr(classification, "build", build_while_another_starts)
    run("train", photos, QUICK.replace("--epochs 2", "--steps 1"))
    out, err = capsys.readouterr()
    assert "into runs/photos-nfnet_nano-2" in err
    assert "runs/photos-nfnet_nano-2/best.safetensors" in out
    assert list(Path("runs/photos-nfnet_nano-1").iterdir()) == []


@pytest.mark.parametrize("length", ["--epochs 1", "--steps 5", "--recipe mnist5k --steps 3"])
def test_a_short_run_warms_up_shorter(length, photos, tmp_path, capsys):
    run("train", photos, QUICK.replace("--epochs 2", length), "--out", tmp_path / "run")
    assert f"because {length.removeprefix('--recipe mnist5k ')}: warm-up of 0." in capsys.readouterr().err
    (tmp_path / "run" / "last.safetensors").unlink()
    run("train --resume", tmp_path / "run")
    assert (tmp_path / "run" / "last.safetensors").exists()


def test_weights_bring_their_network_and_pixels(trained, tmp_path, capsys):
    folder, photos = trained
    words = "--batch-size 8 --workers 0 --device cpu --steps 1"
    run("train", photos, words, "--init", folder / "best.safetensors", "--out", tmp_path / "run")
    assert "best.safetensors: nfnet_nano, 16 px in training, 16 px in evaluation" in capsys.readouterr().err
    info = normfree.load(tmp_path / "run" / "last.safetensors").info
    assert (info.architecture, info.train_px, info.eval_px) == ("nfnet_nano", 16, 16)
    assert info.overrides["width"] == (16, 32, 32, 32)


@pytest.mark.parametrize(("kind", "builds"), [("file of ours", 2), ("state dict", 3)])
def test_a_run_reads_its_weights_once(kind, builds, trained, tmp_path, monkeypatch):
    """And builds the network twice: to be measured, and to be trained. A state dict is compared with an outline."""
    from normfree.models import files

    folder, photos = trained
    weights, options = folder / "best.safetensors", ""
    if kind == "state dict":
        torch.save(normfree.load(weights).state_dict(), tmp_path / "x.pth")
        weights, options = tmp_path / "x.pth", "--model nfnet_nano --width 16 32 32 32 --group-width 8"
    calls = []
    read, build = files.read, files.build
    monkeypatch.setattr(files, "read", lambda *arguments: (calls.append("read"), read(*arguments))[1])
    monkeypatch.setattr(files, "build", lambda *arguments: (calls.append("build"), build(*arguments))[1])
    monkeypatch.setattr(normfree.models, "build", files.build)
    # `save` builds an outline, too, which is not counted
    monkeypatch.setattr("normfree.tasks.classification.save", lambda model, path, info: path.touch())
    run(
        "train --batch-size 8 --workers 0 --device cpu --steps 1",
        photos,
        options,
        "--init",
        weights,
        "--out",
        tmp_path / "run",
    )
    assert sorted(calls) == ["build"] * builds + ["read"]


def test_nothing_to_validate_on_is_said_before_training(photos, tmp_path, capsys):
    for path in (photos / "validation").rglob("*.jpg"):
        path.write_bytes(b"no image")
    line = refused(capsys, "train", photos, QUICK, "--out", tmp_path / "run")
    assert "none of the 18 validation images can be read; the first: validation/blue/00.jpg" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_split_is_split(trained):
    folder, photos = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["path"] == str(photos)
    assert normfree.load(folder / "best.safetensors").info.class_names == ("blue", "green", "red")


def test_eval_on_what_training_held_out(trained, capsys):
    folder, photos = trained
    weights = folder / "best.safetensors"
    evals = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"eval"' in line]
    run("eval", weights, photos, "--held-out 0.1 --seed 0 --device cpu --workers 0")
    out, err = capsys.readouterr()
    best = max(evals, key=lambda line: line["top1"])  # the first of equals
    loss = f"loss {best['loss']:.4g}"
    assert out.splitlines()[-1] == f"top-1 {best['top1']:.2f} %, {loss} on 6 images at 16 px"
    assert {"raw_loss", "raw_top1"} <= best.keys()
    assert "warning" not in err


def test_eval(trained, tmp_path, capsys):
    folder, photos = trained
    weights = folder / "best.safetensors"
    shutil.copytree(photos, tmp_path / "photos")
    for i in range(3):  # red, and called blue
        shutil.copy(photos / "red" / f"{i:02d}.jpg", tmp_path / "photos" / "blue" / f"red{i}.jpg")
    args = ("eval", weights, tmp_path / "photos", "--device cpu --workers 0")
    run(*args, "--out", tmp_path / "report.json")
    out, err = capsys.readouterr()
    assert "trained on are among these" in err
    out = out.splitlines()
    assert out[0].split() == ["recall", "precision", "F1", "right"]
    assert [line.split()[0] for line in out[1:4]] == ["blue", "green", "red"]
    right = sum(int(line.split()[-1].split("/")[0]) for line in out[1:4])
    report = json.loads((tmp_path / "report.json").read_text())
    assert out[-1] == f"top-1 {100 * right / 63:.2f} %, loss {report['loss']:.4g} on 63 images at 16 px"
    assert right > 50
    matrix = np.array(report["confusion"]["rows_true_columns_predicted"])
    assert f"blue taken for red {matrix[0, 2]} times ({100 * matrix[0, 2] / 23:.2g} % of blue)" in out
    assert matrix.sum(1).tolist() == [23, 20, 20]
    assert np.trace(matrix) == right
    assert [row["recall"] for row in report["per_class"]] == (matrix.diagonal() / [23, 20, 20]).tolist()
    assert (report["images"], report["px"], report["device"], report["seed"]) == (63, 16, "cpu", None)
    assert report["versions"]["torch"] == torch.__version__
    assert "exists" in refused(capsys, *args, "--out", tmp_path / "report.json")
    assert "no folder" in refused(capsys, *args, "--out", tmp_path / "nowhere" / "report.json")
    assert ".json or .csv" in refused(capsys, *args, "--out", tmp_path / "report.txt")

    run(*args, "--out", tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["blue", "green", "red"]
    assert [int(row["taken for red"]) for row in rows] == matrix[:, 2].tolist()
    assert [float(row["precision"]) for row in rows] == [row["precision"] for row in report["per_class"]]


def test_eval_knows_training_images_by_their_content(trained, tmp_path, capsys):
    """Not by the name of their folder: others in a folder of that name are not accused, copies elsewhere are."""
    from conftest import COLOURS, draw

    folder, photos = trained
    weights = folder / "best.safetensors"
    for c, (name, colour) in enumerate(COLOURS.items()):
        draw(tmp_path / photos.name / name / "00.jpg", colour, 5000 + c)
    run("eval", weights, tmp_path / photos.name, "--device cpu --workers 0")
    assert "trained on" not in capsys.readouterr().err
    shutil.copytree(photos / "red", tmp_path / "copied" / "red")
    for path in (tmp_path / "copied" / "red").iterdir():
        path.rename(path.with_name(f"new-{path.name}"))
    run("eval", weights, tmp_path / "copied", "--device cpu --workers 0")
    assert "trained on are among these (19 of 54 looked for)" in capsys.readouterr().err
    run("eval", weights, photos, "--held-out 0.1 --seed 1 --device cpu --workers 0")  # not the seed of the training
    assert "trained on are among these" in capsys.readouterr().err


def test_predict_csv_and_json_lines_agree(trained, tmp_path, capsys):
    folder, photos = trained
    weights, picture = folder / "best.safetensors", photos / "red" / "03.jpg"
    (tmp_path / "broken.jpg").write_bytes(picture.read_bytes()[:300])
    run("predict", weights, photos / "red", tmp_path / "broken.jpg", photos / "blue", "--top 2 --device cpu")
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert [Path(r["path"]).name for r in rows] == [f"{i:02d}.jpg" for i in range(20)] + ["broken.jpg"] + [
        f"{i:02d}.jpg" for i in range(20)
    ]
    assert rows[20]["error"]
    assert rows[20]["label"] == ""
    assert "broken.jpg" in err
    assert sum(r["label"] == "red" for r in rows[:20]) > 15
    assert sum(r["label"] == "blue" for r in rows[21:]) > 15
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"])

    run("predict", weights, photos / "red", "--out", tmp_path / "p.jsonl", "--device cpu --workers 1")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [r["label"] for r in rows[:20]]
    assert lines[0]["probability"] == pytest.approx(float(rows[0]["probability"]), abs=1e-4)


def test_predict_is_the_model_on_the_prepared_picture(trained):
    from normfree.data import EvalTransform, normalize, read_image
    from normfree.deploy.predict import predict

    folder, photos = trained
    path = photos / "green" / "00.jpg"
    (row,) = predict(str(folder / "best.safetensors"), [str(path)], top=3, device="cpu")
    model = normfree.load(folder / "best.safetensors")
    image = EvalTransform(16, "center", 1.0)(read_image(path))[None]
    with torch.no_grad():
        expected = model(normalize(image, model.info.mean, model.info.std)).softmax(1)[0]
    assert dict(row.top) == pytest.approx(dict(zip(model.info.class_names, expected.tolist(), strict=True)), abs=1e-5)


def test_odd_images_are_read_alike(trained, tmp_path):
    """The same picture as RGB, CMYK, palette, with alpha, grey in 8 and 16 bits: the same label."""
    from normfree.deploy.predict import predict

    folder, photos = trained
    rgb = Image.open(photos / "red" / "01.jpg").convert("RGB")
    grey = rgb.convert("L")
    rgb.save(tmp_path / "0.png")
    rgb.convert("CMYK").save(tmp_path / "1.jpg", quality=100, subsampling=0)
    rgb.quantize(256).save(tmp_path / "2.png")
    rgba = rgb.copy()
    rgba.putalpha(255)
    rgba.save(tmp_path / "3.png")
    grey.save(tmp_path / "4.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "5.png")
    rows = list(predict(str(folder / "best.safetensors"), [str(tmp_path)], top=3, device="cpu"))
    assert [r.error for r in rows] == [""] * 6
    chances = [dict(r.top) for r in rows]
    assert rows[0].top[0][0] == "red"
    for other in chances[1:4]:
        assert other == pytest.approx(chances[0], abs=0.05)
    assert chances[5] == pytest.approx(chances[4], abs=1e-5)


def test_models(capsys):
    run("models", "nfnet_f*")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 17
    figures, weights = out[1].split()[:10], out[1].split()[10:]
    assert figures == ["nfnet_f0", "71.49", "M", "192", "6.98", "256", "12.38", "83.6", "%", "(paper)"]
    assert weights == ["hf://timm/dm_nfnet_f0.dm_in1k", "=", "F0_haiku.npz,", "Apache-2.0"]
    assert out[9].split()[-1] == "-"


def test_help_is_quick_and_complete():
    """Under a second on an idle machine; here only that torch is not imported."""
    code = "import sys; from normfree.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("train", "eval", "predict", "models"))


def test_help_and_version_wherever_one_looks_for_them(capsys):
    def said(*words: str) -> str:
        with contextlib.suppress(SystemExit):
            main(list(words))
        out, err = capsys.readouterr()
        assert err == ""
        return out

    assert said("help", "train") == said("train", "--help") == said("train", "-h")
    assert said("help", "data", "check") == said("data", "check", "--help")
    assert "usage: normfree data pack" in said("data", "pack", "--help")
    assert said("help", "data") == said("data", "--help")
    assert all(tool in said("data", "-h") for tool in ("check DATA", "pack DATA OUT"))
    assert said("help") == said() == said("--help")
    first, second = said("--version").splitlines()
    assert first == f"normfree {version('normfree')}, torch {version('torch')}"
    assert second.startswith("kernels ")
    assert "no verb 'trian'; did you mean 'train'" in refused(capsys, "help trian")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "normfree", "--help"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.lower() == "normfree: [errno 28] no space left on device\n"


@pytest.mark.parametrize(
    "verb", ["train", "eval", "predict", "embed", "models", "detect train", "detect eval", "detect predict"]
)
def test_verb_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert f"usage: normfree {verb}" in out
    if verb.endswith("train"):
        target, network, px = (Train, "model", "train-px") if verb == "train" else (TrainDetector, "backbone", "px")
        text = " ".join(out.replace("│", " ").split())
        for option in option_names(target):
            if option != "--path" and "--no-" not in option:
                assert len(text.split(f" {option}", 1)[1].split("(default")[0].split()) > 4, option
        for option in (network, "epochs", "batch-size", "lr", px, "clipping", "eval-every"):
            mentions = text.split(f" --{option} ")[1:]  # others' help may name it
            assert any("(default: chosen)" in words.split(" --")[0] for words in mentions), option
        lines = [line.strip("│ ") for line in out.splitlines()]
        short = [a for a, b in pairwise(lines) if len(a) < 30 and a[-1:].isalpha() and a[0] != "-" and b[:1].islower()]
        assert short == []  # lines are broken where they are full


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "no verb 'trian'; did you mean 'train'"),
        ("train --epoch 3", "train has no option --epoch; did you mean '--epochs'"),
        ("train --lr fast", "--lr"),
        ("train --epochs", "--epochs"),
        ("train --eval-crop middle", "'center'"),
        ("train --width 1 2", "--width"),
        ("train --model nfnet_nanno", "no model 'nfnet_nanno'; did you mean 'nfnet_nano'"),
        ("train --activation gelo", "did you mean 'gelu'"),
        ("train --recipe mnist", "no recipe 'mnist'; did you mean 'mnist5k'"),
        ("train --device cpuu", "no device 'cpuu' here; did you mean 'cpu'"),
        ("train --batch-size 5000", "--batch-size 5000 is more than the 4000 training images"),
        ("train --momentum 1", "--momentum 1"),
        ("train mnist5k --init nothing.safetensors", "no weight file"),
        ("train mnist5", "mnist5k"),
        ("train no/such/folder", "no such folder"),
        ("train --resume no/such/run", "no run is there"),
        ("train --recipe nfnet_f0 --model nfnet_f3", "--recipe nfnet_f0 is for nfnet_f0, not nfnet_f3"),
        ("train --epochs 2 --steps 9", "--epochs 2 and --steps 9: give one of them"),
        ("train --epochs 1 --warmup-epochs 1", "--warmup-epochs 1"),
        ("train --steps 5 --warmup-steps 5", "warm-up"),
        ("train --randaugment-magnitude 9", "does nothing without --randaugment-layers"),
        ("train --validation-fraction 0.2", "mnist5k has validation images"),
        ("eval", "WEIGHTS"),
        ("eval nothing.safetensors mnist5k", "no weight file"),
        ("predict nothing.safetensors", "needs images"),
        ("data chekc photos", "no verb 'data chekc'; did you mean 'data check'"),
        ("data", "predict, embed, detect train, detect eval, detect predict, data check, data pack"),
        ("detect", "predict, embed, detect train, detect eval, detect predict, data check, data pack"),
        ("models nfnet_g*", "no model fits 'nfnet_g*'"),
    ],
)
def test_wrong_words_get_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, words)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Of an untrained network with three classes."""
    model = normfree.create_model("nfnet_nano", 3, width=(16, 32, 32, 32), group_width=8)
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    normfree.save(model, path, replace(model.info, class_names=("blue", "green", "red"), eval_px=16))
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((f"eval W D --px {px}", f"--px {px}: 8 to 4096") for px in (-1, 0, 7, 100_000)),
        *((f"eval W D --workers {n}", f"--workers {n}: 0 to 256") for n in (-1, 257)),
        *((f"eval W D --held-out {share}", "held-out share") for share in (0, 1, 2, -0.5, "nan")),
        *((f"eval W D --held-out 0.1 --seed {seed}", "--seed") for seed in (-1, 2**32)),
        ("eval W D --seed 3", "add --held-out"),
        ("eval W D/split --held-out 0.1", "leave out --held-out"),
        ("eval W D --out x.txt", "must end in .json or .csv"),
        ("eval W D --out no/x.json", "there is no folder no"),
        *((f"predict W D --top {n}", f"--top {n}: 1 to 3") for n in (-1, 0, 4)),
        *((f"predict W D --workers {n}", f"--workers {n}: 0 to 256") for n in (-1, 257)),
        ("predict W D --out no/x.csv", "there is no folder no"),
        *((f"signal nfnet_nano --px {px}", f"--px {px}: 1 to 4096") for px in (-1, 0, 100_000)),
        *((f"signal nfnet_nano --batch {n}", f"--batch {n}") for n in (-1, 0)),
        *((f"signal nfnet_nano --seed {seed}", "--seed") for seed in (-1, 2**32)),
        ("signal nfnet_nano --skip-gain nan", "--skip-gain"),
        ("signal nfnet_nano --plot no/x.png", "--plot no/x.png cannot be written"),
        ("signal nfnet_nano --json no/x.json", "--json no/x.json cannot be written"),
        *((f"data check D --workers {n}", f"--workers {n}") for n in (-3, 257)),
        *((f"data pack D x --shard-mb {size}", "--shard-mb") for size in (0, -1, "nan", "inf")),
        *((f"data pack D x --quality {quality}", "--quality") for quality in (0, 101)),
        ("data pack D x --px 0", "--px"),
        ("data pack D x --workers -1", "--workers -1"),
        ("models zzz*", "no model fits"),
        *((f"train D {option}", option) for option in ("--workers -1", "--seed -1")),
    ],
)
def test_options_out_of_range_get_one_line(words, message, weights, capsys, tmp_path, monkeypatch):
    from conftest import draw

    monkeypatch.chdir(tmp_path)
    for part in ("D", "D/split/train", "D/split/val") if "split" in words else ("D",):
        for name in ("blue", "green"):
            for i in range(4):
                draw(tmp_path / part / name / f"{i}.jpg", (0, 0, 0), i)
    words = words.replace(" W ", f" {weights} ").replace("train D", f"train D {QUICK} --batch-size 2 --out x")
    with pytest.raises(SystemExit) as stop:
        run(words)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, ""), err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["D"]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)


def test_printed_commands_can_be_pasted(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos.rename(tmp_path / "my photos")
    for part in ("train", "validation"):
        (tmp_path / "my photos" / part / "red").rename(tmp_path / "my photos" / part / "dark red")
    quick = [
        *QUICK.replace("--epochs 2", "--steps 2 --warmup-steps 1").split(),
        "--recipe",
        "mnist5k",
    ]  # nothing is measured
    main(["train", "my photos", *quick, "--out", "my run's"])
    said = {line.split()[0]: shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()[2:] if "'" in line}
    assert said["curves"] == ["tensorboard", "--logdir", "my run's"]
    main([*said["evaluate"][1:], "--device", "cpu", "--workers", "0"])
    main([*said["predict"][1:3], "my photos/validation/dark red", "--device", "cpu"])
    assert "my photos/validation/dark red/05.jpg" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "my photos", *quick, "--out", "my run's"])
    line = capsys.readouterr().err
    assert shlex.split(line[line.index("--resume") : line.index(", or name")]) == ["--resume", "my run's"]


def test_a_run_folder_that_tensorboard_cannot_write_to(tmp_path):
    with pytest.raises(InputError, match="must be UTF-8"):
        check_free(tmp_path / "run\udcff")


def test_wrong_folders_get_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    assert "empty" in refused(capsys, "train", data)
    picture(data / "cats" / "a.png")
    picture(data / "cats" / "b.png")
    assert "one class" in refused(capsys, "train", data)
    (data / "dogs").mkdir()
    assert "dogs" in refused(capsys, "train", data)
    (data / "dogs" / "note.txt").write_text("no image")
    assert "dogs" in refused(capsys, "train", data)
    flat = tmp_path / "flat"
    picture(flat / "a.png")
    assert "CLASS" in refused(capsys, "train", flat)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        for kind in ("cats", "dogs"):
            (tmp_path / "fake" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "fake" / kind / name).write_text("this is text")
    line = refused(capsys, "train", tmp_path / "fake", "--batch-size 2 --workers 0")
    assert "no image of the data set could be read" in line
    assert not list(tmp_path.glob("runs/*"))


def test_nothing_is_overwritten(trained, capsys, tmp_path):
    folder, photos = trained
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert "exists" in refused(capsys, "train", photos, "--out", folder)
    out = tmp_path / "out.csv"
    out.write_text("mine")
    weights = folder / "best.safetensors"
    assert "exists" in refused(capsys, "predict", weights, photos, "--out", out)
    assert ".csv or .jsonl" in refused(capsys, "predict", weights, photos, "--out", tmp_path / "out.txt")
    assert out.read_text() == "mine"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_weights_of_another_kind(trained, capsys, tmp_path):
    folder, photos = trained
    weights = folder / "best.safetensors"
    line = refused(capsys, "train", photos, QUICK, "--model nfnet_micro --init", weights, "--out", tmp_path / "x")
    assert "weights of nfnet_nano, not of nfnet_micro" in line
    assert "0" in refused(capsys, "eval", weights, "mnist5k")
    other = tmp_path / "weights.safetensors"
    other.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in refused(capsys, "predict", other, photos)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        run("predict", weights, tmp_path / "text.jpg", "--device cpu")
    assert stop.value.code == 2
    assert "none of the 1 images could be read" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_resume_through_the_command_line(photos, tmp_path, capsys):
    folder = tmp_path / "run"
    run("train", photos, QUICK, "--out", folder)
    (folder / "last.safetensors").unlink()
    run("train --resume", folder, "--workers 1")
    assert (folder / "last.safetensors").exists()
    line = refused(capsys_clear(capsys), "train --resume", folder, "--epochs 9 --no-flip --workers 0")
    assert "only its length (--epochs or --steps) and the machine options may change" in line
    assert line.endswith(f": normfree train {photos} --init {folder}/last.safetensors --no-flip --epochs 9")
    (folder / "last.safetensors").unlink()
    line = refused(capsys, "train --resume", folder, "--no-flip")
    assert f"normfree train --resume {folder}, then normfree train {photos} --init {folder}/best.safetensors" in line
    assert "leave out --recipe and --out" in refused(capsys, "train --resume", folder, "--recipe mnist5k")
    assert "leave out --recipe and --out" in refused(capsys, "train --resume", folder, "--out x")


def capsys_clear(capsys):
    capsys.readouterr()
    return capsys


def test_only_the_command_changes_how_the_process_keeps_memory(photos, tmp_path, monkeypatch):
    """It would hold for everything in the process of whoever calls functions of ours."""
    from normfree.engine import device
    from normfree.tasks import classification

    calls = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(classification, "keep_freed_memory", device.keep_freed_memory, raising=False)
    monkeypatch.setattr("normfree.engine.loop.keep_freed_memory", device.keep_freed_memory, raising=False)
    quick = [*QUICK.replace("--epochs 2", "--epochs 0.2 --warmup-epochs 0").split(), "--out", str(tmp_path / "run")]
    start = classification.start
    monkeypatch.setattr(classification, "start", lambda *args: (calls.append("start"), start(*args))[1])
    run("train", photos, *quick)
    assert calls == [1, "start"]


def test_options_of_the_configuration_are_unique():
    """They share one flat name space on the command line."""
    names = list(option_names(ClassificationRun))
    assert len(names) == len(set(names))


def test_a_closed_pipe_is_no_error(trained):
    folder, photos = trained
    process = subprocess.Popen(
        [sys.executable, "-m", "normfree", "predict", folder / "best.safetensors", photos],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as stream:
        assert b"Traceback" not in stream.read()
    process.wait(timeout=60)
