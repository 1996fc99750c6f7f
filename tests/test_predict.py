"""`normfree predict` on what folders hold in real life, and when it is stopped half-way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import draw

import normfree
from normfree.cli import main
from normfree.deploy import rows as module
from normfree.deploy.predict import predict
from normfree.errors import InputError, quoted
from normfree.files import utf8

NAMES = ("cat", 'dog, "wild"', "eel\n\t=1")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    model = normfree.create_model("nfnet_nano", 3, width=(16, 32, 32, 32), group_width=8)
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    normfree.save(model, path, replace(model.info, class_names=NAMES, eval_px=16))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Twelve pictures, in batches of four; the last is broken, and the name of one has a line break."""
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.chdir(tmp_path)
    for i in range(11):
        draw(tmp_path / "images" / ("05 a\nb.jpg" if i == 5 else f"{i:02d}.jpg"), (100, 50, 20 * i), i)
    (tmp_path / "images" / "99.jpg").write_bytes(b"no image")
    return tmp_path / "images"


def run(*args: object, code: int = 0) -> None:
    words = [*map(str, args), "--device", "cpu"]
    if code == 0:
        main(words)
    else:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code


def table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_cannot_be_read_has_a_row(weights, folder, capsys, monkeypatch):
    """A root user may list every folder, so that the refusal is an imitation."""
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "elsewhere").symlink_to("nowhere")
    (folder / "notes.txt").write_text("counted, no more")
    (folder / "folder.jpg").mkdir()
    shutil.copy(folder / "00.jpg", folder / "folder.jpg")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    (folder / "locked").mkdir()
    scandir = os.scandir

    def forbid(path: str) -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    run("predict", weights, "gone.jpg", folder, folder / "01.jpg", os.devnull, "--workers", 1)
    out, err = capsys.readouterr()
    rows = {row["path"]: row["error"].partition(": ")[2] for row in csv.DictReader(out.splitlines(keepends=True))}
    errors = {os.path.basename(path): error for path, error in rows.items() if error}
    assert len(rows) - len(errors) == 12
    for name in ("gone.jpg", "dangling.jpg", "elsewhere"):
        assert errors.pop(name) == "no such file or directory"
    assert errors.pop("loop.png").startswith("too many levels")
    assert errors.pop("locked") == "permission denied"
    assert errors.pop("99.jpg") == "not an image in a known format"
    assert errors.pop(os.path.basename(os.devnull)) == "a pipe, socket or device, not a file"
    assert errors.pop("pipe.png", "pipe").find("pipe") >= 0
    assert not errors
    assert "1 file is not read: 1 .txt" in err
    assert err.count("warning: ") == 1 + len(rows) - 12


def test_an_image_that_goes_while_others_are_read(weights, folder):
    rows = predict(weights, [str(folder)], device="cpu")
    first = next(rows)
    (folder / "07.jpg").unlink()
    rest = [Path(row.path).name for row in rows if row.error]
    assert not first.error
    assert rest == ["07.jpg", "99.jpg"]


def test_nothing_to_predict(weights, folder, capsys):
    run("predict", weights, "gone.jpg", "gone2.jpg", "--out", "x.csv", code=2)
    assert "no images to read: gone.jpg: no such file or directory, and 1 more" in capsys.readouterr().err
    assert not list(Path().glob("x*"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_predictions_go_on(suffix, number, weights, folder, capsys, monkeypatch):
    whole, out = Path(f"whole{suffix}"), Path(f"out{suffix}")
    run("predict", weights, folder, "--out", whole, "--top", 2)
    prepare, calls = module.prepare, []

    def stop_in_the_third_batch(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return prepare(*args)

    monkeypatch.setattr(module, "prepare", stop_in_the_third_batch)
    before = signal.getsignal(number)
    run("predict", weights, folder, "--out", out, "--top", 2, code=128 + number)
    assert signal.getsignal(number) is before
    assert "stopped after 8 of 12 images; the rows are in" in capsys.readouterr().err
    partial = Path(f"{out}.partial")
    assert whole.read_bytes().startswith(partial.read_bytes())
    rows = StringIO(partial.read_text(encoding="utf-8"), newline="")
    assert len(list(csv.reader(rows)) if suffix == ".csv" else rows.readlines()) == 8 + (suffix == ".csv")
    assert not out.exists()

    run("predict", weights, folder, "--out", out, "--top", 1, code=2)  # other rows than were begun
    run("predict", weights, folder / "00.jpg", "--out", out, "--top", 2, code=2)
    assert capsys.readouterr().err.count("repeat those, or delete it") == 2
    with partial.open("ab") as file:  # a process that was killed may leave half a row
        file.write(b'"images/09\n' if suffix == ".csv" else b'{"path": "images/0')
    calls.clear()
    run("predict", weights, folder, "--out", out, "--top", 2)
    assert len(calls) == 1
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(Path().glob("out*")) == [out]


def test_rows_without_their_count_are_refused(weights, folder, capsys, monkeypatch):
    """What a machine that lost its power may keep: fewer rows than were counted, or no count."""
    prepare, calls = module.prepare, []

    def stop_in_the_third_batch(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prepare(*args)

    monkeypatch.setattr(module, "prepare", stop_in_the_third_batch)
    command = ("predict", weights, folder, "--out", "x.csv")
    run(*command, code=130)
    rows = Path("x.csv.partial").read_bytes()
    os.truncate("x.csv.partial", len(rows) - 1)
    run(*command, code=2)
    Path("x.csv.partial").write_bytes(rows)
    count = Path("x.csv.partial.json")
    count.rename("elsewhere")
    run(*command, code=2)
    count.write_text("")
    run(*command, code=2)
    assert capsys.readouterr().err.count("repeat those, or delete it") == 3
    assert Path("x.csv.partial").read_bytes() == rows
    Path("elsewhere").rename(count)
    run(*command)
    assert len(table(Path("x.csv"))) == 12
    assert sorted(Path().glob("x*")) == [Path("x.csv")]


def test_a_run_that_has_trained_on_is_not_continued(weights, folder, capsys, monkeypatch):
    """The folder is the same, the best weights in it are not."""
    Path("run").mkdir()
    shutil.copy(weights, "run/best.safetensors")
    prepare, calls = module.prepare, []

    def stop_in_the_second_batch(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prepare(*args)

    monkeypatch.setattr(module, "prepare", stop_in_the_second_batch)
    run("predict", "run", folder, "--out", "x.csv", code=130)
    model = normfree.load("run")
    model.head.fc.bias.data += 1
    normfree.save(model, "run/best.safetensors")
    run("predict", "run", folder, "--out", "x.csv", code=2)
    assert "was begun with other weights, images or --top" in capsys.readouterr().err


def test_two_at_once(weights, folder, capsys, monkeypatch):
    prepare = module.prepare

    def start_another(*args: Any) -> Any:
        run("predict", weights, folder, "--out", "x.csv", code=2)
        return prepare(*args)

    monkeypatch.setattr(module, "prepare", start_another)
    run("predict", weights, folder, "--out", "x.csv")
    assert "is being written by another process" in capsys.readouterr().err
    assert len(table(Path("x.csv"))) == 12


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a file's size")
def test_a_full_disk(weights, folder, capsys):
    """Imitated by a limit on the size of a file."""
    import resource

    run("predict", weights, folder, "--out", "whole.csv")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        run("predict", weights, folder, "--out", "x.csv", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("normfree: cannot write x.csv: file too large; the rows so far are in x.csv.partial")
    run("predict", weights, folder, "--out", "x.csv")
    assert Path("x.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are UTF-8 there")
def test_names_that_are_not_utf8(weights, tmp_path):
    """Under a locale without UTF-8, which makes no difference to files."""
    name = os.fsencode(str(tmp_path)) + b"/\xff,\xc3\xa9.jpg"
    draw(tmp_path / "a.jpg", (200, 0, 0), 0)
    os.rename(tmp_path / "a.jpg", name)
    (tmp_path / "broken.jpg").write_bytes(b"")
    code = "from normfree.cli import main; import sys; p = sys.argv[1:]; main(['predict', *p]); "
    code += "[main(['predict', *p, '--out', 'x' + s]) for s in ('.csv', '.jsonl')]"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, weights, tmp_path], cwd=tmp_path, env=env, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    escaped = "\\udcff,é.jpg"
    assert Path(table(tmp_path / "x.csv")[1]["path"]).name == escaped
    assert escaped in (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert table(tmp_path / "x.jsonl")[1]["path"] == str(tmp_path / "\udcff,é.jpg")
    assert b"\\udcff,\\udcc3\\udca9.jpg" in done.stdout


def test_class_names_of_any_kind_survive(weights, folder):
    run("predict", weights, folder, "--out", "x.csv", "--top", 3)
    rows = table(Path("x.csv"))
    assert {row["label"] for row in rows} <= {*NAMES, ""}
    assert sorted(rows[5][key] for key in ("label", "label_2", "label_3")) == sorted(NAMES)
    assert rows[5]["path"] == str(folder / "05 a\nb.jpg")


def test_utf8():
    assert utf8("é\udcff") == b"\xc3\xa9\\udcff"
    assert utf8("\udcc3\udca9") == "é".encode()
    assert utf8("\ud800") == b"\\ud800"


@pytest.mark.parametrize("name", ["plain", "my run", "it's", "-run", "$HOME`ls`;", "a\nb\t'\\c", "\udcff é"])
def test_quoted_words_are_read_back_by_a_shell(name, tmp_path):
    if (bash := shutil.which("bash")) is None:
        pytest.skip("no bash")
    (tmp_path / name).touch()
    done = subprocess.run(
        [bash, "-c", f"cat {quoted(name)} && printf %s {quoted(name)}"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.removeprefix(b"./") == os.fsencode(name)
    assert "\n" not in quoted(name)


def test_top_and_workers_have_ranges(weights, folder):
    for options in ({"top": 0}, {"top": 4}, {"workers": -1}, {"workers": 1000}):
        with pytest.raises(InputError, match=f"--{next(iter(options))}"):
            predict(weights, [str(folder)], device="cpu", **options)
