"""Figures of an evaluation against their definitions, for any batch size."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.data import Batch
from normfree.tasks.accuracy import Accuracy, ClassScore, evaluate, score_table
from normfree.tasks.reports import write_report

NAMES = ["cat", "dog, wild", "=eel\n"]


def batches(images: torch.Tensor, targets: torch.Tensor, size: int) -> list[Batch]:
    empty = Batch(images[:0], targets[:0], targets[:0], ("broken.jpg: cut off",))
    parts = zip(images.split(size), targets.split(size), strict=True)
    return [*(Batch(x, y, torch.arange(len(y)), ()) for x, y in parts), empty]


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_loss_is_the_mean_over_the_images(size):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (19, 3, 2, 2), generator=rng, dtype=torch.uint8)
    targets = torch.randint(0, 6, (19,), generator=rng)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    accuracy = evaluate(model, batches(images, targets, size), 6, mean, std, torch.device("cpu"))
    x = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        logits = model(x).double()
    assert accuracy.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert accuracy.top1_percent == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert (accuracy.num_images, accuracy.unreadable) == (19, ["broken.jpg: cut off"])


def example() -> Accuracy:
    """No image of the third class; one is taken for it."""
    return Accuracy(torch.tensor([[6, 2, 0], [3, 8, 1], [0, 0, 0]]), loss_sum=5.0, unreadable=["\udcff.jpg: empty"])


def test_scores():
    cat, dog, eel = example().scores(NAMES)
    assert (cat.recall, cat.precision, cat.f1) == (6 / 8, 6 / 9, pytest.approx(2 / (8 / 6 + 9 / 6)))
    assert (dog.images, dog.right, dog.predicted) == (12, 8, 10)
    assert (eel.recall, eel.precision, eel.f1) == (None, 0, 0)
    none = Accuracy(torch.zeros(1, 1, dtype=torch.int64)).scores(["x"])[0]
    assert (none.recall, none.precision, none.f1) == (None, None, None)
    assert score_table(example().scores(["cat", "dog", "eel"])) == [
        "       recall  precision        F1  right",
        "cat   75.00 %    66.67 %   70.59 %  6/8",
        "dog   66.67 %    80.00 %   72.73 %  8/12",
        "eel         -     0.00 %    0.00 %  0/0",
    ]


def test_of_many_classes_the_lowest_and_the_highest_are_shown():
    scores = [ClassScore(f"class{n}", 20, n, 20) for n in range(19, -1, -1)]
    assert [line.split()[-1] for line in score_table(scores[:10], most=10)[1:]] == [f"{n}/20" for n in range(19, 9, -1)]
    lines = score_table([*scores, ClassScore("absent", 0, 0, 0)], most=10)[1:]
    assert [line.split()[-1] for line in lines] == [
        *(f"{n}/20" for n in range(5)),
        "...",
        *(f"{n}/20" for n in range(15, 20)),
    ]


def test_mistakes_most_frequent_first():
    assert example().mistakes(["cat", "dog", "eel"]) == [
        "dog taken for cat 3 times (25 % of dog)",
        "cat taken for dog 2 times (25 % of cat)",
        "dog taken for eel once (8.3 % of dog)",
    ]
    assert example().mistakes(["cat", "dog", "eel"], most=1) == ["dog taken for cat 3 times (25 % of dog)"]
    assert Accuracy(torch.eye(2, dtype=torch.int64)).mistakes(["a", "b"]) == []


@pytest.mark.parametrize(
    ("wrong", "images", "share"),
    [(12, 12, "100"), (999, 1000, "100"), (2, 3, "67"), (1, 10, "10"), (1, 12, "8.3"), (1, 3000, "0.033")],
)
def test_shares_of_mistakes_are_plain_numbers(wrong: int, images: int, share: str):
    accuracy = Accuracy(torch.tensor([[images - wrong, wrong], [0, 1]]))
    assert accuracy.mistakes(["cat", "dog"])[0].endswith(f" ({share} % of cat)")


def test_reports_are_read_back(tmp_path: Path):
    report = example().report(NAMES)
    write_report(report, tmp_path / "a", ".json")
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == report
    assert report["loss"] == 0.25
    assert report["per_class"][2]["recall"] is None
    write_report(report, tmp_path / "b", ".csv")
    with (tmp_path / "b").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == NAMES
    assert [[int(row[f"taken for {name}"]) for name in NAMES] for row in rows] == example().confusion.tolist()
    assert rows[2]["recall"] == ""
