"""The paper's ImageNet recipes: NFNets, the ablation ladder, NF-ResNets and NF-RegNets, pre-training, fine-tuning.

All recipes crop as the released code does and evaluate on square images. With another --batch-size the learning rate
changes in proportion; --micro-batch saves memory. No recipe has been reproduced here at full length; the tests run two
steps of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from normfree.config import ClassificationRun, ClassifierOptim, DataConfig, ModelConfig

MAGNITUDES = (5, 10, 10, 15, 15, 15, 15, 15)  # of RandAugment for F0 to F7, as in the released code

# rung -> overrides of the network, augmentations, and published ImageNet top-1 of F0 to F3 (per cent)
ALL = ("mixup", "randaugment", "cutmix")
LADDER: dict[str, tuple[dict, tuple[str, ...], tuple[float, float, float, float]]] = {
    "baseline": ({"width": (256, 512, 1024, 2048), "second_conv": False}, (), (80.4, 81.7, 82.0, 82.3)),
    "modified_width": ({"second_conv": False}, (), (80.9, 81.8, 82.0, 82.3)),
    "second_conv": ({}, (), (81.3, 82.2, 82.4, 82.7)),
    "mixup": ({}, ALL[:1], (82.2, 82.9, 83.1, 83.5)),
    "randaugment": ({}, ALL[:2], (83.2, 84.6, 84.8, 85.0)),
    "cutmix": ({}, ALL, (83.6, 84.7, 85.1, 85.7)),
    "default_width": ({"width": (256, 512, 1024, 2048)}, ALL, (83.1, 84.5, 85.0, 85.5)),
    "bn": ({}, ALL, (83.4, 84.4, 85.1, 85.5)),
}
# depths of the NF- and BN-ResNets, and λ by batch size
DEPTHS = (50, 101, 152, 200)
CLIPPING = {256: 0.16, 512: 0.08, 1024: 0.04, 2048: 0.02, 4096: 0.01}


def nfnet(size: int, path: str) -> ClassificationRun:
    """NFNet-F`size`, 0 to 7.

    Source: paper, Table 1, appendix A.1 to A.3; released code, experiment_nfnets.py. MixUp applies to half of the
    images and CutMix to the other half, then RandAugment to all. Each training image is made of two.
    Command: `normfree train IMAGENET --recipe nfnet_f0`.
    Cost: 360 epochs at batch size 4096, 112,602 steps; a step on 32 TPUv3 cores with 32 images each took 73 ms (F0),
    159, 296, 532, 1033, 1399 ms (F5).
    Expected: 83.6, 84.7, 85.1, 85.7, 85.9, 86.0 % (F0 to F5, published; not reproduced).
    """
    return ClassificationRun(
        ModelConfig(f"nfnet_f{size}"),
        replace(_augmented(path, MAGNITUDES[size], ALL), eval_crop="resize_crop"),
        ClassifierOptim(epochs=360, batch_size=4096, lr=1.6, warmup_epochs=5.0),
        precision="bfloat16",
    )


def ablation(size: int, rung: str, path: str) -> ClassificationRun:
    """One rung of the ladder from an SE-ResNeXt-D to NFNet-F`size`, 0 to 3.

    Source: paper, section 5, Tables 2 and 6, appendix A.1. `baseline` has a ResNet's widths and one 3x3 convolution a
    block. `modified_width` has the NFNets' widths, and `second_conv` adds the second 3x3 convolution, which gives
    NFNet-F. MixUp, RandAugment and CutMix follow. `default_width` returns to a ResNet's widths. `bn` uses batch
    normalization; whether the authors used AGC with it is not published, and it is off here.
    Command: `normfree train IMAGENET --recipe nfnet_f0_baseline`, and so on for every size and rung.
    Cost: as `nfnet`.
    Expected: `LADDER` (published; not reproduced). The parameters and multiply-adds of all rungs agree with the paper.
    """
    options, kinds, _ = LADDER[rung]
    run = nfnet(size, path)
    data = replace(_augmented(path, MAGNITUDES[size], kinds), eval_crop=run.data.eval_crop)
    name = f"bn_nfnet_f{size}" if rung == "bn" else run.model.model
    return replace(
        run,
        model=ModelConfig(name, **options),
        data=data,
        optim=replace(run.optim, clipping=None if rung == "bn" else 0.01),
    )


def with_sam(size: int, path: str) -> ClassificationRun:
    """NFNet-F5 or F6 with sharpness-aware minimization.

    Source: paper, section 6.1, Table 3, appendix A.4: each replica computes the ascent on 20 % of its batch. The paper
    gives ρ = 0.05 for fine-tuning only; we use it here, too.
    Command: `normfree train IMAGENET --recipe nfnet_f5_sam`.
    Cost: 1.4 times that of `nfnet` (published, F5).
    Expected: 86.3 % (F5), 86.5 % (F6) (published; not reproduced).
    """
    run = nfnet(size, path)
    return replace(run, optim=replace(run.optim, sam_rho=0.05))


def resnet(name: str, batch_size: int, path: str) -> ClassificationRun:
    """A pre-activation NF-ResNet with AGC, or its BN baseline, for 90 epochs at one of the batch sizes of Figure 2.

    Source: paper, section 4.1, Figures 2 and 7. It gives epochs, batch sizes, learning rates, Nesterov momentum, and
    the λ that were tried, 0.01 to 0.16. The rest is from BN ResNet-50 in the released code (experiment.py). The best λ
    for each batch size appears only in a figure; `CLIPPING`, which halves λ as the batch doubles, is our guess.
    Command: `normfree train IMAGENET --recipe nf_resnet50_1024`, `... --recipe bn_resnet50_1024`.
    Cost: 90 epochs; 4.1 G multiply-adds an image (50 layers) to 15.0 G (200).
    Expected: with AGC at least the baseline's accuracy up to batch size 4096 (Figure 2a; not reproduced).
    """
    return ClassificationRun(
        ModelConfig(name, drop_rate=0.0),
        DataConfig(path, crop_style="paper", eval_crop="crop_resize", train_px=224, eval_px=224),
        ClassifierOptim(
            epochs=90,
            batch_size=batch_size,
            lr=0.1 * batch_size / 256,
            warmup_epochs=5.0,
            weight_decay=1e-4,
            clipping=CLIPPING[batch_size] if name.startswith("nf") else None,
            ema_decay=0.0,
        ),
        precision="bfloat16",
    )


def nf_regnet(size: int, path: str) -> ClassificationRun:
    """NF-RegNet-B`size`, 0 to 5, without AGC.

    Source: Brock, De, Smith 2021 (arXiv 2101.08692); released code, experiment_nf_regnets.py.
    Command: `normfree train IMAGENET --recipe nf_regnet_b0`.
    Cost: 360 epochs at batch size 1024; 0.44 G multiply-adds an image at the test pixels (B0) to 10.6 G (B5).
    Expected: we have found no figure to compare with (not reproduced).
    """
    return ClassificationRun(
        ModelConfig(f"nf_regnet_b{size}"),
        replace(_augmented(path, 0, ("mixup", "cutmix")), eval_crop="crop_resize"),
        ClassifierOptim(
            epochs=360,
            batch_size=1024,
            lr=0.4,
            final_lr=0.001,
            warmup_epochs=5.0,
            weight_decay=5e-5 + 1e-5 * size,
            clipping=None,
        ),
    )


def pretraining(name: str, path: str) -> ClassificationRun:
    """Pre-training on hundreds of millions of labelled images, as on JFT-300M: ResNets, NFNet-F4 and F4+.

    Source: paper, section 6.2, appendix A.5. Crops and flips only, at 224 px. For NFNets the paper says "as on
    ImageNet"; we keep dropout, stochastic depth and EMA, too. It does not give λ, which is the paper's usual one here,
    nor the stochastic depth of NF-ResNets, which is the released code's.
    Command: `normfree train SHARDS --recipe nfnet_f4_plus_pretraining`.
    Cost: 40 epochs (F4), 20 (F4+) at batch size 4096, 830 ms a step at 32 images a core; 10 epochs at 1024 (ResNets).
    Expected: see `fine_tuning` (not reproduced: the images are not public).
    """
    data = DataConfig(path, crop_style="paper", eval_crop="resize_crop", train_px=224, eval_px=224)
    if not name.startswith("nfnet"):
        optim = ClassifierOptim(
            epochs=10,
            batch_size=1024,
            lr=0.4,
            warmup_epochs=0.0,
            warmup_steps=5000,
            weight_decay=1e-5,
            clipping=0.01 if name.startswith("nf") else None,
            ema_decay=0.0,
        )
        return ClassificationRun(ModelConfig(name), replace(data, eval_crop="crop_resize"), optim, precision="bfloat16")
    epochs = 20 if name.endswith("plus") else 40
    optim = ClassifierOptim(epochs=epochs, batch_size=4096, lr=1.6, warmup_epochs=5.0, weight_decay=1e-6)
    return ClassificationRun(ModelConfig(name), data, optim, precision="bfloat16")


def fine_tuning(name: str, path: str) -> ClassificationRun:
    """Fine-tuning of all layers on ImageNet after `pretraining`: 15,000 steps.

    Source: paper, section 6.2, appendix A.5, Tables 4 and 5. ResNets use no weight decay, dropout or stochastic depth.
    NFNets use SAM, at the resolution of their variant, as the published multiply-adds of F4+ suggest. The paper does
    not give λ, the decay of their EMA (here that of the ResNets), or the share of the batch for SAM (here A.4's).
    Command: `normfree train IMAGENET --recipe nfnet_f4_plus_fine_tuning --init WEIGHTS`.
    Cost: 15,000 steps at batch size 2048, 24 epochs.
    Expected: 89.2 % (F4, F4+). At 384 px, BN / NF: ResNet-50 79.9 / 81.1 %, 101 82.5 / 83.2, 152 83.4 / 84.0,
    200 83.5 / 84.3 (published, after JFT-300M; not reproduced).
    """
    optim = ClassifierOptim(
        steps=15_000, batch_size=2048, lr=0.1, warmup_epochs=0.0, warmup_steps=5000, weight_decay=0.0, ema_decay=0.9999
    )
    if not name.startswith("nfnet"):
        data = DataConfig(path, crop_style="paper", eval_crop="crop_resize", train_px=384, eval_px=384)
        optim = replace(optim, clipping=0.01 if name.startswith("nf") else None)
        depth_rate = 0.0 if name.startswith("nf") else None  # the baselines have none
        model = ModelConfig(name, drop_rate=0.0, stochastic_depth=depth_rate)
        return ClassificationRun(model, data, optim, precision="bfloat16")
    data = DataConfig(path, crop_style="paper", eval_crop="resize_crop")
    optim = replace(optim, weight_decay=1e-5, sam_rho=0.05)
    return ClassificationRun(ModelConfig(name, drop_rate=0.25, stochastic_depth=0.1), data, optim, precision="bfloat16")


def _augmented(path: str, magnitude: float, kinds: tuple[str, ...]) -> DataConfig:
    """Crops and flips as in the released code, with the augmentations named in `kinds`."""
    return DataConfig(
        path,
        crop_style="paper",
        mixup=0.2 if "mixup" in kinds else 0.0,
        cutmix=1.0 if "cutmix" in kinds else 0.0,
        randaugment_layers=4 if "randaugment" in kinds else 0,
        randaugment_magnitude=magnitude,
        randaugment_style="paper",
    )


_RESNETS = [f"{kind}_resnet{depth}" for kind in ("nf", "bn") for depth in DEPTHS]
_PRETRAINED = ["nfnet_f4", "nfnet_f4_plus", *_RESNETS]

RECIPES: dict[str, Callable[[str], ClassificationRun]] = {
    **{f"nfnet_f{size}": partial(nfnet, size) for size in range(8)},
    **{f"nfnet_f{size}_sam": partial(with_sam, size) for size in (5, 6)},
    **{f"nfnet_f{size}_{rung}": partial(ablation, size, rung) for size in range(4) for rung in LADDER},
    **{f"{name}_{batch}": partial(resnet, name, batch) for name in _RESNETS for batch in CLIPPING},
    **{f"nf_regnet_b{size}": partial(nf_regnet, size) for size in range(6)},
    **{f"{name}_pretraining": partial(pretraining, name) for name in _PRETRAINED},
    **{f"{name}_fine_tuning": partial(fine_tuning, name) for name in _PRETRAINED},
}
