"""The README's Python runs as it stands, with a file for WEIGHTS."""

import re
from pathlib import Path

import normfree

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 5
    normfree.save(normfree.create_model("nfnet_nano", num_classes=3), "weights.safetensors")
    exec("\n".join(blocks), {"WEIGHTS": "weights.safetensors"})
    assert (tmp_path / "model.safetensors").exists()
    assert 0 <= float(capsys.readouterr().out.split()[0]) <= 1


def test_every_file_that_the_readme_names_is_there():
    root = README.parent
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([\w/]+(?:\.\w+)+)\)", text)
    assert targets
    for target in targets:
        assert (root / target).exists(), target
    cells = re.findall(r"^\| (`[^|]+`) \|", text, flags=re.M)
    assert cells
    for cell in cells:
        for name in re.findall(r"`([^`]+)`", cell):
            path = root / name
            assert path.exists() or (root / "normfree" / name).exists(), name


def test_python_blocks_of_the_agc_page_run(capsys):
    blocks = re.findall(
        r"```python\n(.*?)```", (README.parent / "docs" / "agc.md").read_text(encoding="utf-8"), flags=re.S
    )
    assert len(blocks) == 4
    exec("\n".join(blocks), {})
    assert "units clipped" in capsys.readouterr().out


def test_python_block_of_the_speed_page_runs():
    (block,) = re.findall(
        r"```python\n(.*?)```", (README.parent / "docs" / "speed.md").read_text(encoding="utf-8"), flags=re.S
    )
    names: dict = {}
    exec(block, names)
    assert all(p.grad is not None for p in names["model"].parameters())
