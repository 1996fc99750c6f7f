"""`normfree average`: the mean of a run's last checkpoints, against float64 means of what the files hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import refused, run
from test_train import small_run

from normfree.config import with_options
from normfree.deploy.average import average_run
from normfree.errors import InputError
from normfree.models import load
from normfree.tasks.classification import start


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Runs of four epochs with all their checkpoints, with and without batch normalization."""
    from conftest import COLOURS, draw

    root = tmp_path_factory.mktemp("average")
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(20):
            draw(root / "photos" / name / f"{i:02d}.jpg", colour, 100 * c + i)
    options = {"ema_decay": 0.9, "keep_checkpoints": 9, "min_area": 0.2, "validation_fraction": 0.2}
    small = with_options(small_run(root / "photos", epochs=4), options)
    models = {"nfnet_nano": small, "bn_nfnet_nano": with_options(small, {"model": "bn_nfnet_nano"})}
    for name, each in models.items():
        start(each, root / name)
    return {name: root / name for name in (*models, "photos")}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of a run, to be changed."""
    return shutil.copytree(folders["nfnet_nano"], tmp_path / "run")


def checkpoints(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(next(path.glob("*.safetensors"))) for path in sorted((folder / "checkpoints").iterdir())]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", ["nfnet_nano", "bn_nfnet_nano"])
def test_it_is_the_mean_of_what_the_checkpoints_hold(folders, tmp_path, name, raw):
    done = average_run(folders[name], 3, str(tmp_path / "mean.safetensors"), raw)
    files = checkpoints(folders[name])
    found = load_file(tmp_path / "mean.safetensors")
    assert found.keys() == load_file(folders[name] / "last.safetensors").keys()
    assert len(done.steps) == 3
    for key, value in found.items():
        kind = "model" if raw or f"ema.{key}" not in files[-1] else "ema"
        parts = [file[f"{kind}.{key}"].double().numpy() for file in files[-3:]]
        if value.is_floating_point():
            np.testing.assert_allclose(value.numpy(), np.mean(parts, 0), rtol=1e-7, err_msg=key)
        else:
            assert value.item() == parts[-1]
        assert value.dtype == files[-1][f"{kind}.{key}"].dtype
    weight = "head.fc.weight"
    assert not np.array_equal(found[weight], files[-1][f"ema.{weight}"])
    assert ("running_mean" in " ".join(found)) == (name == "bn_nfnet_nano")


def test_of_one_checkpoint_it_is_the_last_weight_file(folders, tmp_path):
    for name in ("nfnet_nano", "bn_nfnet_nano"):
        out = tmp_path / f"{name}.safetensors"
        average_run(folders[name], 1, str(out))
        one, other = load_file(out), load_file(folders[name] / "last.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        info, last = load(out).info, load(folders[name] / "last.safetensors").info
        assert info is not None
        assert last is not None
        assert info == replace(last, source="normfree train photos, mean of 1 checkpoint, after step 24")


def test_the_command_says_what_it_averages_and_the_file_is_used_as_any(folder, folders, capsys):
    steps = [int(path.name[5:]) for path in sorted((folder / "checkpoints").iterdir())]
    assert len(steps) == 4
    run("average", folder)
    assert capsys.readouterr().out.splitlines() == [
        f"mean of 4 checkpoints, after step {', '.join(map(str, steps))}: moving averages of the weights",
        f"wrote {folder / 'average.safetensors'}",
    ]
    run("eval", folder / "average.safetensors", folders["photos"], "--device cpu --workers 0")
    assert "top-1" in capsys.readouterr().out
    assert "average.safetensors exists; nothing was written" in refused(capsys, "average", folder)
    run("average", folder, "--last 2 --raw --out", folder / "raw.safetensors")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"mean of 2 checkpoints, after step {steps[-2]}, {steps[-1]}: weights as they were trained"


def test_a_damaged_checkpoint_is_named_and_passed_over(folder, capsys):
    paths = sorted((folder / "checkpoints").iterdir())
    file = next(paths[2].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    run("average", folder, "--last 3")
    said = capsys.readouterr()
    assert f"warning: checkpoint {paths[2]} is damaged and is passed over" in said.err
    steps = [int(path.name[5:]) for path in paths]
    assert f"mean of 3 checkpoints, after step {steps[0]}, {steps[1]}, {steps[3]}" in said.out
    (folder / "average.safetensors").unlink()
    line = refused(capsys, "average", folder, "--last 4")
    assert f"--last 4: {folder} has 3 whole checkpoints, after step" in line
    assert "is damaged" in line
    assert not (folder / "average.safetensors").exists()


def test_what_cannot_be_averaged(folder, tmp_path, capsys):
    line = refused(capsys, "average", folder, "--last 5")
    assert f"--last 5: {folder} has 4 whole checkpoints, after step" in line
    assert line.endswith("a run keeps as many as its --keep-checkpoints")
    assert "--last 0: at least 1" in refused(capsys, "average", folder, "--last 0")
    assert "no run is there" in refused(capsys, "average", tmp_path / "none")
    assert "the name must end in .safetensors" in refused(capsys, "average", folder, "--out x.npz")
    shutil.rmtree(folder / "checkpoints")
    assert f"{folder} has no whole checkpoint" in refused(capsys, "average", folder)


def test_checkpoints_that_do_not_describe_the_network(folder):
    """As those of version 0.1: the run's weight files do."""
    for path in (folder / "checkpoints").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["extra"]["task"]["network"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    (folder / "last.safetensors").unlink()
    assert load(average_run(folder).path).info is not None
    (folder / "average.safetensors").unlink()
    (folder / "best.safetensors").unlink()
    with pytest.raises(InputError, match="do not describe the network"):
        average_run(folder)
