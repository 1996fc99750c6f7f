"""Recipes of the paper for ImageNet: the ablation ladder of its Tables 2 and 6, and the networks trained with SAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from normfree.config import DataConfig, ModelConfig, OptimConfig, RunConfig

# rung -> what it sets in the network, and ImageNet top-1 of F0 to F3 as published (per cent, three seeds)
LADDER: dict[str, tuple[dict, tuple[float, float, float, float]]] = {
    "baseline": ({"width": (256, 512, 1024, 2048), "second_conv": False}, (80.4, 81.7, 82.0, 82.3)),
    "modified_width": ({"second_conv": False}, (80.9, 81.8, 82.0, 82.3)),
    "second_conv": ({}, (81.3, 82.2, 82.4, 82.7)),
    "default_width": ({"width": (256, 512, 1024, 2048)}, (83.1, 84.5, 85.0, 85.5)),
    "bn": ({}, (83.4, 84.4, 85.1, 85.5)),
}


def ablation(size: int, rung: str, path: str) -> RunConfig:
    """One rung of the ladder from an SE-ResNeXt-D to NFNet-F`size` (0 to 3), on ImageNet.

    Source: paper, section 5, Tables 2 and 6, appendix A.1. `baseline` has a ResNet's widths and one 3x3 convolution a
    block; `modified_width` the NFNets' widths; `second_conv` the second 3x3 convolution, which makes it NFNet-F;
    `default_width` goes back to a ResNet's widths; `bn` has batch normalization in place of the normalizer-free parts.

    Command: `normfree train IMAGENET --recipe nfnet_f0_baseline`, and so on for every size and rung.
    Cost: 360 epochs at batch size 4096. For a batch of B images set --batch-size B and --lr to 0.1 * B / 256.
    Expected: `LADDER`. The last two rungs were published with MixUp, RandAugment and CutMix, which are not in this
    recipe. Whether AGC was on with `bn` is not published; it is off here.
    Reproduced: no; parameters and multiply-adds of every rung agree with the paper's networks.
    """
    options, _ = LADDER[rung]
    name = f"bn_nfnet_f{size}" if rung == "bn" else f"nfnet_f{size}"
    return RunConfig(
        ModelConfig(name, **options),
        DataConfig(path, eval_crop="resize_crop"),
        OptimConfig(epochs=360, batch_size=4096, lr=1.6, warmup_epochs=5.0, clipping=None if rung == "bn" else 0.01),
        precision="bfloat16",
    )


def with_sam(size: int, path: str) -> RunConfig:
    """NFNet-F5 or F6 with sharpness-aware minimization, on ImageNet.

    Source: paper, section 6.1, Table 3, appendix A.4: the ascent takes 20 % of the same batch, every replica its own.
    ρ is published for fine-tuning only, 0.05, which is taken here.

    Command: `normfree train IMAGENET --recipe nfnet_f5_sam`.
    Cost: 360 epochs at batch size 4096; a step takes 1.4 times that without SAM (published, F5).
    Expected: 86.3 % (F5), 86.5 % (F6) with MixUp, RandAugment and CutMix, which are not in this recipe.
    Reproduced: no.
    """
    run = ablation(0, "second_conv", path)
    return replace(run, model=ModelConfig(f"nfnet_f{size}"), optim=replace(run.optim, sam_rho=0.05))


RECIPES: dict[str, Callable[[str], RunConfig]] = {
    **{f"nfnet_f{size}_{rung}": partial(ablation, size, rung) for size in range(4) for rung in LADDER},
    **{f"nfnet_f{size}_sam": partial(with_sam, size) for size in (5, 6)},
}
