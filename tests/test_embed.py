"""`normfree embed`: the features of the model itself, in three formats, whole or continued."""

import csv
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw

import normfree
from normfree.cli import main
from normfree.data import EvalTransform, normalize, read_image
from normfree.deploy import embed as module
from normfree.deploy import rows
from normfree.files import sha256

WIDTH = 64


def small(num_classes: int = 3, **overrides: Any) -> normfree.models.Network:
    options = {"width": (16, 32, 32, 32), "group_width": 8, "second_conv": False} | overrides
    return normfree.create_model("nfnet_nano", num_classes, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    model = small()
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    normfree.save(model, path, replace(model.info, class_names=("a", "b", "c"), eval_px=16))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Eleven pictures in batches of four; the fifth is broken, and the name of one has a comma and a line break."""
    monkeypatch.setattr(rows, "BATCH", 4)
    monkeypatch.chdir(tmp_path)
    for i in range(11):
        draw(tmp_path / "images" / ("07, a\nb.jpg" if i == 7 else f"{i:02d}.jpg"), (100, 50, 20 * i), i)
    (tmp_path / "images" / "04.jpg").write_bytes(b"no image")
    return tmp_path / "images"


def run(*args: object, code: int = 0) -> None:
    words = [*map(str, args), "--device", "cpu"]
    if code == 0:
        main(words)
    else:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code


def own(weights: Path, path: Path, px: int | None = None) -> np.ndarray:
    """The model's pooled features of one image, by the public API."""
    model = normfree.load(weights)
    info = model.info
    assert info is not None
    crop = EvalTransform(px or info.eval_px, info.eval_crop, info.crop_fraction)
    x = normalize(crop(read_image(path, channels=info.in_channels))[None], info.mean, info.std)
    with torch.inference_mode():
        return model.forward_head(model.forward_features(x), pre_logits=True)[0].numpy()


def read(out: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths, features (N, D) with NaN where there are none, errors."""
    if out.suffix == ".csv":
        with out.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        assert header == ["path", *(f"f{i}" for i in range(WIDTH)), "error"]
        values = np.array([[float(v or "nan") for v in line[1:-1]] for line in lines], np.float32)
        return [line[0] for line in lines], values, [line[-1] for line in lines]
    if out.suffix == ".npy":
        about, values = json.loads(out.with_suffix(".json").read_text(encoding="utf-8")), np.load(out)
        assert values.dtype == np.float32
        return about["paths"], values, ["x" if i in about["unreadable"] else "" for i in range(len(values))]
    import pyarrow.parquet as pq

    table = pq.read_table(out)
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: float>[{WIDTH}]"
    vectors = [[np.nan] * WIDTH if v is None else v for v in table["embedding"].to_pylist()]
    return table["path"].to_pylist(), np.array(vectors, np.float32), [e or "" for e in table["error"].to_pylist()]


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".parquet"])
@pytest.mark.parametrize("px", [None, 24])
def test_features_are_the_models_own(suffix, px, weights, folder, capsys, monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 5)
    out = Path(f"x{suffix}")
    run("embed", weights, folder, folder / "00.jpg", "--out", out, *([] if px is None else ["--px", px]))
    assert capsys.readouterr().out == f"wrote {out}; 1 images could not be read\n"
    paths, values, errors = read(out)
    assert paths == [*(str(folder / name) for name in sorted(os.listdir(folder))), str(folder / "00.jpg")]
    assert [bool(error) for error in errors] == [i == 4 for i in range(12)]
    if suffix != ".npy":
        assert errors[4] == f"{folder / '04.jpg'}: not an image in a known format"
    assert np.isnan(values[4]).all()
    for path, row in zip(paths, values, strict=True):
        if not path.endswith("04.jpg"):
            np.testing.assert_allclose(row, own(weights, Path(path), px), rtol=1e-5, atol=1e-6)
    assert set(Path().iterdir()) - {out, folder.relative_to(Path.cwd())} <= {Path("x.json")}


def test_files_say_how_the_features_were_made(weights, folder):
    import pyarrow.parquet as pq

    run("embed", weights, folder, "--out", "x.parquet", "--px", 24)
    run("embed", weights, folder, "--out", "x.npy", "--px", 24)
    about = json.loads(pq.read_schema("x.parquet").metadata[b"normfree"])
    assert about["weights_sha256"] == sha256(weights)
    assert {name: about[name] for name in ("architecture", "px", "crop", "features")} == {
        "architecture": "nfnet_nano",
        "px": 24,
        "crop": normfree.load(weights).info.eval_crop,
        "features": "pooled pre-logits, not normalised",
    }
    beside = json.loads(Path("x.json").read_text())
    assert about == {name: beside[name] for name in about}
    assert beside["unreadable"] == [4]


@pytest.mark.parametrize("what", ["no classifier", "maps", "no class names"])
def test_weights_without_a_classifier(what, folder):
    model = small(5 if what == "no class names" else 0)
    if what == "maps":
        model.reset_classifier(0, "")
    normfree.save(model, "a.safetensors", replace(model.info, eval_px=16))
    run("embed", "a.safetensors", folder / "00.jpg", "--out", "x.npy")
    vector = own(Path("a.safetensors"), folder / "00.jpg")
    np.testing.assert_allclose(np.load("x.npy")[0], vector.mean((-2, -1)) if vector.ndim == 3 else vector, atol=1e-6)


def test_the_weights_of_a_run_folder(weights, folder):
    Path("run").mkdir()
    Path("run/best.safetensors").write_bytes(weights.read_bytes())
    run("embed", "run", folder, "--out", "x.npy")
    assert json.loads(Path("x.json").read_text())["weights_sha256"] == sha256(weights)


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".parquet"])
def test_interrupted(suffix, weights, folder, capsys, monkeypatch):
    """What is there is used again, but in Parquet, of which nothing is left; the file is the same in the end."""
    whole, out = Path(f"whole{suffix}"), Path(f"out{suffix}")
    run("embed", weights, folder, "--out", whole)
    prepare, calls = rows.prepare, []

    def stop_in_the_second_batch(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return prepare(*args)

    monkeypatch.setattr(rows, "prepare", stop_in_the_second_batch)
    run("embed", weights, folder, "--out", out, code=130)
    assert "stopped after 4 of 11 images" in capsys.readouterr().err
    assert not out.exists()
    if suffix == ".parquet":
        assert not list(Path().glob("*out*"))
    else:
        run("embed", weights, folder, "--out", out, "--px", 24, code=2)
        assert "other weights, images or --px: repeat those" in capsys.readouterr().err
    run("embed", weights, folder, "--out", out)
    assert len(calls) == 2 + (3 if suffix == ".parquet" else 2)
    np.testing.assert_array_equal(read(out)[1], read(whole)[1])
    assert read(out)[0] == read(whole)[0]
    assert sorted(Path().glob("*out*")) == [Path("out.json"), out] if suffix == ".npy" else [out]


def test_features_that_are_not_finite_are_errors(folder, capsys):
    model = small()
    with torch.no_grad():
        model.final_conv.bias.fill_(float("inf"))
    normfree.save(model, "a.safetensors", replace(model.info, eval_px=16))
    run("embed", "a.safetensors", folder, "--out", "x.csv", code=2)
    assert capsys.readouterr().err.count("its features are not finite") == 10


def test_no_image_can_be_read(weights, folder):
    run("embed", weights, folder / "04.jpg", "--out", "x.parquet", code=2)
    assert not list(Path().glob("*x.parquet*"))


def test_without_pyarrow(weights, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    run("embed", weights, folder, "--out", "x.parquet", code=2)
    assert 'pip install "normfree[data]"' in capsys.readouterr().err
    assert not list(Path().glob("*x.*"))
    run("embed", weights, folder, "--out", "x.npy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out x.txt", "must end in .parquet or .npy or .csv"),
        ("", "--out"),
        ("--out gone/x.npy", "there is no folder gone"),
        ("--out x.npy --px 4", "--px 4: 8 to 4096"),
        ("--out x.npy --workers -1", "--workers -1"),
        ("--out taken.npy", "taken.json exists"),
    ],
)
def test_options_that_cannot_be_used(words, message, weights, folder, capsys):
    Path("taken.json").write_text("{}")
    run("embed", weights, folder, *words.split(), code=2)
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert Path("taken.json").read_text() == "{}"
    assert sorted(Path().iterdir()) == [Path("images"), Path("taken.json")]


def test_files_that_are_no_networks(folder, capsys):
    Path("a.safetensors").write_bytes(b"nonsense")
    run("embed", "a.safetensors", folder, "--out", "x.npy", code=2)
    maps = small(0, features_only=True)
    normfree.save(maps, "b.safetensors")
    run("embed", "b.safetensors", folder, "--out", "x.npy", code=2)
    assert "gives feature maps (features_only)" in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path().glob("*x.*"))
