"""Chooses the options of `normfree train DATA --init WEIGHTS` that the user does not give: fine-tuning.

The rules for small networks were measured on two CPU cores (docs/transfer.md); those for others follow the paper.
"""

from __future__ import annotations

from normfree.config import ClassificationRun, ClassifierOptim, DataConfig, ModelConfig, Tune
from normfree.recipes.small import OURS, Asked, Images, Machine, clipping_for

SEEN = {"all": 100_000, "gradual": 100_000, "head": 30_000}  # training images
MOST_EPOCHS, FEWEST_EPOCHS = 60, 5


def rule(images: Images, machine: Machine, asked: Asked | None, tune: Tune = "all") -> ClassificationRun:
    """The run for images and machine from the weights of `asked`, without given options.

    Source: for large networks, the rate, weight decay, dropout and stochastic depth of the paper's appendix A.5.
    """
    assert asked is not None
    count, ours = images.num_train, asked.name in OURS
    size = min(64 if count >= 20_000 else 32, max(2, count // 8))
    paper = asked.name.startswith("nfnet") and not ours
    model = ModelConfig(asked.name, drop_rate=0.25 if paper else None, stochastic_depth=0.1 if paper else None)
    optim = ClassifierOptim(
        epochs=round(min(max(FEWEST_EPOCHS, SEEN[tune] / count), MOST_EPOCHS)),
        batch_size=size,
        lr=0.1 if tune == "head" or ours else 0.1 * size / 256 / 8,
        clipping=clipping_for(asked.name, size),
        weight_decay=1e-5 if tune != "head" else 0.0,
        tune=tune,
    )
    return ClassificationRun(model, DataConfig(min_area=0.35 if count < 10_000 else 0.25), optim)
