"""Detectors: equal to torchvision's, the signal at initialisation, precision, bad targets, files."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import normfree
from normfree.config import OptimConfig
from normfree.conversion.convert import convert_to_nf
from normfree.data.coco import resized
from normfree.engine.update import Update
from normfree.errors import InputError
from normfree.layers import WSConv2d
from normfree.models import create_model
from normfree.models import load as load_network
from normfree.models.network import FeatureInfo
from normfree.optim import param_groups
from normfree.tasks.detection.model import MAPS, Detector, freeze, load_detector, roles, save_detector

THIN = dict(width=(16, 32, 64, 64), depth=(1, 1, 1, 1))
SMALL = dict(channels=16, min_px=64, max_px=96, anchor_px=8, rois=32)
PARTS = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def thin(backbone="nfnet_micro", num_classes=3, **options) -> Detector:
    return normfree.create_detector(backbone, num_classes, **(SMALL | THIN | options))


def scene(height=64, width=96, boxes=((8, 8, 40, 50), (30, 20, 90, 60)), seed=0):
    """A noisy image with filled boxes, and its target; labels 1, 2, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        masks[i, y1:y2, x1:x2] = 1
        image[:, y1:y2, x1:x2] *= (i + 1) / 3
    labels = 1 + torch.arange(len(boxes)) % 2
    return image, dict(boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4), labels=labels, masks=masks)


def batch(*scenes):
    images, targets = zip(*(scenes or (scene(), scene(90, 64, ((4, 10, 60, 80),), 1))), strict=True)
    return list(images), list(targets)


def equal(left, right, tolerance=0.0):
    """Whether two lists of detections are equal."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=key)


# --- equal to torchvision's ---


class Layers(nn.Module):
    """ResNet-50 without normalization as a list of maps, with timm's `feature_info`."""

    def __init__(self, width=8):
        super().__init__()
        net = resnet50(weights=None, norm_layer=lambda channels: nn.Identity(), width_per_group=width)
        self.stem = nn.Sequential(net.conv1, net.relu, net.maxpool)
        self.stages = nn.Sequential(net.layer1, net.layer2, net.layer3, net.layer4)
        rows = [dict(num_chs=256 * 2**i, reduction=4 * 2**i, module=f"stages.{i}") for i in range(4)]
        self.feature_info = FeatureInfo(rows)
        for stage in self.stages:  # without normalization each block would double the signal
            for block in stage:
                nn.init.normal_(block.conv3.weight, std=0.02)

    def forward(self, x):
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class TheirBackbone(nn.Module):
    """The same with torchvision's pyramid."""

    def __init__(self, body, channels):
        super().__init__()
        self.body, self.out_channels = body, channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels, LastLevelMaxPool())

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(x))))


def both(channels=16, num_classes=3):
    """Our detector with plain convolutions and torchvision's Mask R-CNN, with the same weights, in float64."""
    body = Layers()
    ours = Detector(body, num_classes, **(SMALL | dict(channels=channels, rois=32)), standardize=False)
    theirs = MaskRCNN(
        TheirBackbone(Layers(), channels),
        min_size=64,
        max_size=96,
        size_divisible=64,
        _skip_resize=True,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5),
        box_head=TwoMLPHead(channels * 49, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, num_classes + 1),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        box_batch_size_per_image=32,
    )
    with torch.no_grad():  # scores that differ, so that detections do
        for p in (ours.roi_heads.box_predictor.cls_score.weight, ours.roi_heads.box_predictor.bbox_pred.weight):
            nn.init.normal_(p, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    for pooler in (theirs.roi_heads.box_roi_pool, theirs.roi_heads.mask_roi_pool):
        pooler.canonical_scale = 56
    return ours.double(), theirs.double()


def in_float64(images, targets):
    return [x.double() for x in images], [t | {"boxes": t["boxes"].double()} for t in targets]


def test_losses_and_gradients_are_torchvisions():
    ours, theirs = both()
    # sides from which torchvision infers the strides rightly (below)
    images, targets = in_float64(*batch(scene(64, 128), scene(128, 64, ((4, 10, 60, 80),), 1), scene(64, 64, (), 2)))
    torch.manual_seed(3)
    left = ours.losses(images, targets)
    torch.manual_seed(3)
    right = theirs(images, targets)
    assert left.keys() - {"loss"} == right.keys() == PARTS
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(left["loss"], sum(right.values()), rtol=1e-12, atol=0)
    left["loss"].backward()
    sum(right.values()).backward()
    grads = dict(theirs.named_parameters())
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[name].grad, rtol=1e-9, atol=1e-12, msg=name)
        assert p.grad.abs().sum() > 0, name


def test_detections_are_torchvisions():
    ours, theirs = both()
    images, _ = in_float64(*batch(scene(), scene(96, 64, ((4, 10, 60, 80),), 1)))
    with torch.no_grad():  # both have the size that the resize would give
        left, right = ours.eval()(images), theirs.eval()(images)
    assert len(left[0]["boxes"]) > 5
    equal(left, right, 1e-9)
    assert left[0]["masks"].shape == (len(left[0]["boxes"]), 1, 64, 96)


# --- the signal ---


def photographs(px=256, seed=5):
    """Other noise than the scales were measured on, of unit variance, at all scales."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(2, 3, px, px)
    for level in range(1, 8):
        small = torch.randn(2, 1, px >> level, px >> level, generator=generator)
        colour = torch.randn(2, 3, px >> level, px >> level, generator=generator)
        total += nn.functional.interpolate(0.9 * small + 0.44 * colour, px)
    return total / total.std()


def converted():
    return convert_to_nf(create_model("bn_resnet50", 0, **THIN, **MAPS))


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(
    "backbone", ["nfnet_micro", "nf_resnet50", "nf_regnet_b0", "bn_nfnet_micro", "bn_resnet50", "converted", "resnet"]
)
def test_every_level_has_unit_variance_at_initialisation(backbone, standardize):
    foreign = {"converted": converted, "resnet": Layers}
    wide = dict(width=(64, 128, 256, 256), depth=(1, 2, 2, 1))
    body = foreign[backbone]() if backbone in foreign else create_model(backbone, 0, **wide, **MAPS)
    model = Detector(body, 3, channels=64, standardize=standardize)
    with torch.no_grad():
        levels = model.backbone(photographs())
    assert list(levels) == ["0", "1", "2", "3", "pool"]
    assert [x.shape[-1] for x in levels.values()] == [64, 32, 16, 8, 4]
    deviations = [x.std().item() for x in levels.values()]
    assert all(0.65 < deviation < 1.5 for deviation in deviations), deviations
    inner = model.backbone.fpn.inner_blocks
    assert all(isinstance(block[0], WSConv2d) == standardize for block in inner)


def test_sums_of_levels_keep_unit_variance():
    """With maps that are exactly as the pyramid expects them."""
    from normfree.models.pyramid import FeaturePyramid

    sides = (64, 32, 16, 8)
    maps = [torch.randn(2, 128, side, side) for side in sides]
    for standardize in (True, False):
        pyramid = FeaturePyramid([128] * 4, [nn.Identity()] * 4, [1.0] * 4, 128, standardize)
        with torch.no_grad():
            deviations = [x.std().item() for x in pyramid(maps).values()]
        assert all(0.85 < deviation < 1.1 for deviation in deviations), deviations


def test_the_scale_is_that_of_the_weights_and_is_kept_in_the_file(tmp_path):
    """A trained network's maps are of any size; the pyramid divides by it, then and after loading."""
    network = create_model("nfnet_nano", 4, **THIN)
    with torch.no_grad():
        network.stages[1][0].conv_shortcut.gain *= 50
    normfree.save(network, tmp_path / "network.safetensors")
    options = dict(SMALL, **THIN)
    model = normfree.create_detector("nfnet_nano", 3, weights=tmp_path / "network.safetensors", **options)
    with torch.no_grad():
        deviations = [x.std().item() for x in model.backbone(photographs()).values()]
    assert all(0.6 < deviation < 1.5 for deviation in deviations), deviations
    save_detector(model, tmp_path / "detector.safetensors")
    again = load_detector(tmp_path / "detector.safetensors")
    scales = [float(m.backbone.fpn.inner_blocks[1][0].input_scale) for m in (model, again)]
    assert scales[0] == scales[1]
    assert scales[0] < 0.2


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("backbone", ["nfnet_micro", "nf_resnet50", "nf_regnet_b0", "bn_nfnet_micro", "nfnet_nano"])
def test_every_parameter_has_a_gradient(backbone, standardize):
    model = thin(backbone, standardize=standardize)
    losses = model(*batch(), resized=True)
    assert losses.keys() == PARTS
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_empty_images_have_finite_losses_and_gradients():
    model = thin()
    losses = model.losses(*batch(scene(64, 64, ()), scene(64, 96, ())))
    losses["loss"].backward()
    assert losses["loss_mask"] == losses["loss_box_reg"] == 0 < losses["loss"]
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_boxes_alone_are_faster_rcnn():
    model = thin(masks=False)
    assert not any("mask" in name for name in model.state_dict())
    images, targets = batch()
    for target in targets:
        del target["masks"]
    losses = model.losses(images, targets)
    assert losses.keys() == PARTS - {"loss_mask"} | {"loss"}
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images)[0].keys() == {"boxes", "labels", "scores"}


# --- anchors, levels, sizes ---


def test_anchors_of_p6_have_its_stride():
    """torchvision's size_divisible 32 gives 13 rows of stride 61 at 800 px."""
    model = thin(anchor_px=32)
    image = model.transform.batch_images([torch.zeros(3, 800, 800)], model.transform.size_divisible)
    assert image.shape[-2:] == (832, 832)
    features = [torch.zeros(1, 1, 832 // 2**k, 832 // 2**k) for k in range(2, 7)]
    anchors = model.rpn.anchor_generator(ImageList(image, [(800, 800)]), features)[0]
    last = anchors[-13 * 13 * 3 :].view(13, 13, 3, 4)
    assert (last[:, 1:, :, 0] - last[:, :-1, :, 0]).unique().tolist() == [64]
    assert (last[1:, :, :, 1] - last[:-1, :, :, 1]).unique().tolist() == [64]


def test_levels_of_regions_do_not_depend_on_the_first_batch():
    """torchvision infers the strides from the first image: 33 px padded to 64 give 1/2 for 1/4."""
    model = thin().eval()
    model.detect([scene(33, 33, ())[0]], [(33, 33)])
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    sides = torch.tensor([7.0, 27.0, 29.0, 57.0, 113.0, 500.0])  # canonical 56 px at anchors of 8 px is level 4
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], 1)
    assert model.roi_heads.box_roi_pool.map_levels([boxes]).tolist() == [0, 0, 1, 2, 3, 3]


def test_images_are_resized_as_the_data_are_and_boxes_come_back(monkeypatch):
    model = thin(min_px=64, max_px=96, min_score=0.0).eval()
    image = scene(200, 301)[0]
    assert resized(301, 200, 64, 96) == (96, 64)
    small = nn.functional.interpolate(image[None], (64, 96), mode="bilinear", antialias=True)[0]
    whole, _ = model.detect([image])
    given, _ = model.detect([small], sizes=[(301, 200)])
    equal(whole, given, 1e-3)
    boxes = whole[0]["boxes"]
    assert boxes[:, 2].max() > 96
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 301.001
    assert boxes[:, 3].max() <= 200.001
    assert whole[0]["masks"].shape[1:] == (28, 28)
    pasted = model([image])[0]["masks"]
    assert pasted.shape[1:] == (1, 200, 301)
    bytes_ = (image * 255).round().byte()
    equal(model.detect([bytes_])[0], model.detect([bytes_ / 255])[0], 1e-6)


def test_training_resizes_images_boxes_and_masks():
    model = thin()
    image, target = scene(128, 192, ((16, 16, 80, 100),))
    half = nn.functional.interpolate(image[None], (64, 96), mode="bilinear", antialias=True)[0]
    other = dict(target, boxes=target["boxes"] / 2, masks=target["masks"][:, ::2, ::2])
    torch.manual_seed(0)
    left = model([image], [target])
    torch.manual_seed(0)
    right = model([half], [other], resized=True)
    for name in PARTS:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


# --- precision ---


def test_coordinates_are_exact_under_autocast():
    """In bfloat16 anchors beyond 256 px are off by pixels, and boxes come back in steps of 4 to 8."""
    model = thin(min_px=64, max_px=1200, min_score=0.0).eval()
    image = scene(64, 1152, ((1001, 8, 1050, 60),))[0]
    seen = {}
    model.rpn.anchor_generator.register_forward_hook(lambda *call: seen.update(anchors=call[2][0], maps=call[1][1]))
    inside = []
    model.backbone.fpn.layer_blocks[0].register_forward_hook(lambda *call: inside.append(call[2].dtype))
    exact = model.detect([image])[0][0]
    anchors = seen["anchors"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model.detect([image])[0][0]
    assert inside == [torch.float32, torch.bfloat16]
    assert seen["maps"][0].dtype == torch.float32
    assert torch.equal(seen["anchors"], anchors)
    assert anchors[:, 0].max() > 1000
    assert {found[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}
    far = found["boxes"][found["boxes"][:, 0] > 512]
    assert len(far) > 5
    assert not torch.equal(far.bfloat16().float(), far)
    assert len(exact["boxes"]) == len(found["boxes"])


def test_losses_under_autocast_are_close():
    images, targets = batch()
    model = thin().eval()
    exact = model.detect(images, [(96, 64), (64, 90)], targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(images, targets)
        low = model.detect(images, [(96, 64), (64, 90)], targets)[1]
        losses["loss"].backward()
    for name in PARTS:
        assert low[name].dtype == losses[name].dtype == torch.float32
        torch.testing.assert_close(low[name], exact[name], rtol=0.1, atol=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_masks_of_many_instances_are_the_right_ones_under_autocast(monkeypatch):
    """The number of an instance travels with the box's coordinates; bfloat16 turns 257 into 256."""
    from torchvision.models.detection import roi_heads

    boxes = [(x, y, x + 3, y + 3) for y in range(0, 64, 4) for x in range(0, 96, 4)]
    assert len(boxes) == 384
    image, target = scene(64, 96, boxes)
    pairs = []
    project = roi_heads.project_masks_on_boxes

    def watched(masks, proposals, matched, side):
        pairs.append((proposals, matched.to(proposals)))
        return project(masks, proposals, matched, side)

    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", watched)
    model = thin(rois=1600)
    with torch.autocast("cpu", torch.bfloat16):
        model.losses([image], [target])["loss"].backward()
    proposals, matched = pairs[0]
    assert proposals.dtype == torch.float32
    assert {257, 259, 383} & set(matched.long().tolist())
    assert len(matched.unique()) > 256
    own = (proposals == target["boxes"][matched.long()]).all(1)  # ground truth is among the proposals
    assert own.sum() > 256


# --- targets that cannot be used ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(boxes=torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])), "target 0: boxes are torch.int64"),
        (dict(boxes=torch.ones(2, 4, dtype=torch.bfloat16)), "boxes are torch.bfloat16"),
        (dict(boxes=torch.ones(3, 4)), r"boxes are torch.float32 \(3, 4\): float32 \(2, 4\)"),
        (dict(boxes=torch.tensor([[1.0, 2, 3, 4], [5, 2, 5, 4]])), r"the box \[5.0, 2.0, 5.0, 4.0\] is empty"),
        (dict(boxes=torch.tensor([[1.0, 2, 3, float("nan")], [5, 2, 6, 4]])), "not finite"),
        (dict(labels=torch.tensor([1, 4])), "labels from 1 to 4: 1 to 3"),
        (dict(labels=torch.tensor([0, 1])), "0 is the background"),
        (dict(labels=torch.tensor([1.0, 1.0])), "labels are torch.float32: int64"),
        (dict(masks=torch.zeros(2, 32, 96, dtype=torch.uint8)), r"masks are \(2, 32, 96\): \(2, 64, 96\)"),
        (dict(masks=torch.zeros(1, 64, 96, dtype=torch.uint8)), "one a box"),
        (dict(masks=None), "target 0 has no 'masks'"),
    ],
)
def test_targets_that_cannot_be_used_are_named(change, message):
    image, target = scene()
    target = {key: value for key, value in (target | change).items() if value is not None}
    with pytest.raises(InputError, match=message) as caught:
        thin().losses([image], [target])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([torch.rand(3, 64, 64), torch.rand(1, 64, 64)], r"image 1 is torch.float32 \(1, 64, 64\): \(3, h, w\)"),
        ([torch.rand(1, 3, 64, 64)], r"image 0 is torch.float32 \(1, 3, 64, 64\)"),
        ([torch.ones(3, 64, 64, dtype=torch.int64)], "image 0 is torch.int64"),
    ],
)
def test_images_that_cannot_be_used_are_named(images, message):
    """torchvision makes three channels of one in silence."""
    with pytest.raises(InputError, match=message):
        thin().eval().detect(images)


def test_calls_that_mean_nothing_are_refused():
    model, (image, target) = thin(), scene()
    with pytest.raises(InputError, match="training needs targets"):
        model([image])
    with pytest.raises(InputError, match="2 targets for 1 images"):
        model([image], [target, target])
    with pytest.raises(InputError, match=r"call model\.eval"):
        model.detect([image])
    model.eval()
    with pytest.raises(InputError, match="resized images need targets"):
        model([image], resized=True)
    assert model([image], [target]).keys() == PARTS
    with pytest.raises(InputError, match="2 sizes for 1 images"):
        model.detect([image], [(1, 1), (2, 2)])
    for options, message in (
        (dict(channels=0), "channels 0"),
        (dict(min_px=2.5), "min_px 2.5"),
        (dict(max_px=32), "max_px 32: at least min_px, 64"),
        (dict(min_score=1.0), "min_score 1.0"),
        (dict(num_classes=0), "num_classes 0"),
        (dict(class_names=("a",)), "1 class_names for 3 classes"),
        (dict(features_only=True), "no option 'features_only'"),
        (dict(drop_rate=0.1), "no option 'drop_rate'"),
        (dict(groups=3), "no option 'groups'"),
        (dict(backbone="nfnet_f"), "no model 'nfnet_f'"),
    ):
        with pytest.raises(InputError, match=message):
            thin(**options)
    with pytest.raises(InputError, match="out_indices=\\(1, 2, 3, 4\\)"):
        Detector(create_model("nfnet_nano", 0, features_only=True), 3)
    with pytest.raises(InputError, match="features_only=True"):
        Detector(nn.Conv2d(3, 3, 3), 3)


# --- validation losses, freezing, groups ---


def test_validation_losses_leave_everything_as_it_was():
    model = thin("bn_nfnet_micro", stochastic_depth=0.9).eval()
    images, targets = batch()
    sizes = [(96, 64), (64, 90)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found, losses = model.detect(images, sizes, targets)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(value.requires_grad for value in losses.values())
    assert losses.keys() == PARTS | {"loss"}
    equal(found, model.detect(images, sizes)[0])
    assert model.detect(images, sizes, targets)[1] == losses
    random = torch.get_rng_state()
    torch.manual_seed(0)
    own = model.losses(images, targets)
    for name, value in losses.items():
        torch.testing.assert_close(own[name], value)


@pytest.mark.parametrize("stages", [0, 1, 2, 4])
def test_frozen_stages_do_not_change(stages):
    model = thin("bn_nfnet_micro").train()
    freeze(model, stages)
    frozen = [f"backbone.body.{name}." for name in ("stem", *(f"stages.{i}" for i in range(stages)))] if stages else []
    frozen = ["backbone.body."] if stages == 4 else frozen
    held = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert held == [name for name, _ in model.named_parameters() if name.startswith(tuple(frozen))]
    assert bool(held) == bool(stages)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train().losses(*batch())["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == held
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("running_mean" in key for key in changed)
    assert not [key for key in changed if key.startswith(tuple(frozen))] or not stages
    for module in (model.backbone.fpn, *([model.backbone.body.stages[3]] if stages < 4 else [])):
        assert module.training


def test_freezing_refuses_what_it_cannot_do():
    for stages in (-1, 5):
        with pytest.raises(InputError, match="0 to 4"):
            freeze(thin(), stages)
    model = Detector(Layers(), 3, channels=8)
    del model.backbone.body.stages
    with pytest.raises(InputError, match="not known"):
        freeze(model, 1)


def test_predictors_alone_are_not_clipped():
    model = thin()
    groups = param_groups(model, weight_decay=1e-4, clipping=0.01, **roles(model))
    names = {p: name for name, p in model.named_parameters()}
    placed = [names[p] for group in groups for p in group["params"]]
    assert sorted(placed) == sorted(names.values())
    exempt = {names[p] for group in groups if group["clipping"] is None for p in group["params"]}
    layers = ("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score")
    layers += ("roi_heads.box_predictor.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits")
    assert exempt == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    transposed = [names[p] for group in groups if group.get("transposed") for p in group["params"]]
    assert transposed == ["roi_heads.mask_predictor.conv5_mask.weight"]
    assert all(roles(thin(masks=False))["exempt"])


def test_steps_of_the_update_lower_the_loss():
    model = thin(stochastic_depth=0.0)
    update = Update(model, OptimConfig(optimizer="sgd", clipping=0.1), **roles(model))
    images, targets = batch()
    first = last = None
    for step in range(12):
        losses = model.losses(images, targets)
        model.zero_grad()
        losses["loss"].backward()
        update.step(step, 0.05, torch.tensor(False))
        first, last = first or losses["loss"].item(), losses["loss"].item()
    assert last < 0.8 * first


# --- files ---


@pytest.mark.parametrize(
    "options", [{}, dict(backbone="bn_nfnet_micro", masks=False), dict(backbone="nf_resnet50", standardize=False)]
)
def test_a_file_gives_the_same_detections(tmp_path, options):
    path = tmp_path / "detector.safetensors"
    model = thin(class_names=("a", "b", "c"), category_ids=(1, 7, 90), min_score=0.0, max_detections=20, **options)
    model.losses(*batch())  # batch normalization has statistics
    images, _ = batch()
    random = torch.get_rng_state()
    normfree.save(model, path)
    again = normfree.load(path)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(again) is Detector
    assert not again.training
    assert again.info == model.info
    assert (again.info.architecture, again.info.class_names, again.info.category_ids) == (
        "mask_rcnn",
        ("a", "b", "c"),
        (1, 7, 90),
    )
    assert again.info.overrides["backbone"] == options.get("backbone", "nfnet_micro")
    assert (again.info.train_px, again.info.eval_px) == (64, 64)
    found = model.eval()(images)
    equal(again(images), found)
    assert len(found[0]["boxes"]) == 20
    (tmp_path / "best.safetensors").write_bytes(path.read_bytes())
    assert load_detector(tmp_path).info == model.info  # a run folder
    normfree.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_files_of_networks_are_still_read_and_written(tmp_path):
    network = create_model("nfnet_nano", 4, **THIN).eval()
    normfree.save(network, tmp_path / "n.safetensors")
    again = normfree.load(tmp_path / "n.safetensors")
    assert again.info == network.info
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), network(x))
    header = again.info.to_metadata()
    header = {"normfree": header["normfree"].replace(', "category_ids": []', "")}  # of an earlier version
    assert "category_ids" not in header["normfree"]
    assert type(again.info).from_metadata(header) == again.info
    for ids in ((1, 2), ("a", "b", "c", "d"), (1.5, 2, 3, 4)):
        bad = replace(again.info, category_ids=ids).to_metadata()
        with pytest.raises(ValueError, match="impossible category_ids"):
            type(again.info).from_metadata(bad)


def test_a_classifiers_verb_refuses_a_detector_and_the_other_way_round(tmp_path):
    save_detector(thin(), tmp_path / "d.safetensors")
    normfree.save(create_model("nfnet_nano", 4, **THIN), tmp_path / "n.safetensors")
    with pytest.raises(InputError, match="is a detector: use the verbs of `normfree detect`"):
        load_network(tmp_path / "d.safetensors")
    with pytest.raises(InputError, match="is a detector"):
        create_model("nfnet_micro", 3, weights=tmp_path / "d.safetensors")
    with pytest.raises(InputError, match="holds a classifier, nfnet_nano, not a detector"):
        load_detector(tmp_path / "n.safetensors")


def test_damaged_files_and_changed_detectors_are_refused(tmp_path):
    path, model = tmp_path / "d.safetensors", thin()
    save_detector(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_detector(path)
    with pytest.raises(InputError, match="no weight file"):
        load_detector(tmp_path / "none.safetensors")
    for option, message in (
        (b'"channels": 16', b'"channels": 32'),
        (b'"channels": 16', b'"chanels": 16 '),
        (b'"nfnet_micro"', b'"nfnet_macro"'),
        (b'"rois": 32', b'"rois": 0 '),
        (b'"rois": 32', b'"rois":"a"'),
    ):
        escaped = [text.replace(b'"', b'\\"') for text in (option, message)]
        assert escaped[0] in whole
        path.write_bytes(whole.replace(*escaped))
        with pytest.raises(InputError, match=r"d\.safetensors") as caught:
            load_detector(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    model.roi_heads.box_predictor = FastRCNNPredictor(64, 6)
    with pytest.raises(InputError, match="no longer"):
        normfree.save(model, path)
    assert path.read_bytes() == whole
    with pytest.raises(InputError, match="create_detector did not make it"):
        normfree.save(Detector(Layers(), 3, channels=8), path)


def test_the_backbone_starts_from_a_classifier(tmp_path):
    network = create_model("nfnet_nano", 5, **THIN)
    network.info = replace(network.info, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), class_names=tuple("abcde"))
    normfree.save(network, tmp_path / "best.safetensors")
    model = normfree.create_detector("nfnet_nano", 2, weights=tmp_path, **SMALL)  # options are the file's
    body = model.backbone.body.state_dict()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in body.items())
    assert model.transform.image_mean == list(model.info.mean) == [0.1, 0.2, 0.3]
    assert model.info.overrides["width"] == THIN["width"]
    assert model.info.class_names == ()
    with pytest.raises(InputError, match="holds weights of nfnet_nano, not of nfnet_micro"):
        thin("nfnet_micro", weights=tmp_path)


def test_a_detector_starts_from_another(tmp_path):
    path = tmp_path / "d.safetensors"
    old = thin(class_names=("cat", "dog", "cow"), category_ids=(1, 2, 3))
    save_detector(old, path)
    new = normfree.create_detector("nfnet_micro", 2, weights=path, class_names=("emu", "cow"), **SMALL)
    assert any("1 of 2 classes" in note and "emu" in note for note in new.notes)
    theirs, ours = old.state_dict(), new.state_dict()
    for name, count in (
        ("box_predictor.cls_score", 1),
        ("box_predictor.bbox_pred", 4),
        ("mask_predictor.mask_fcn_logits", 1),
    ):
        for kind in ("weight", "bias"):
            key = f"roi_heads.{name}.{kind}"
            mine, file = (state[key].unflatten(0, (-1, count)) for state in (ours, theirs))
            assert torch.equal(mine[0], file[0])  # background
            assert torch.equal(mine[2], file[3])  # cow
            assert kind == "bias" or not any(torch.equal(mine[1], row) for row in file)
    rest = [key for key in ours if "box_predictor" not in key and "mask_fcn" not in key]
    assert all(torch.equal(ours[key], theirs[key]) for key in rest)
    assert new.info.overrides["width"] == THIN["width"]
    whole = thin(weights=path, class_names=("cat", "dog", "cow"))
    assert all(torch.equal(value, theirs[key]) for key, value in whole.state_dict().items())
    boxes = thin(weights=path, masks=False, anchor_px=16)
    assert any("masks=True, anchor_px=8" in note for note in boxes.notes)
    save_detector(boxes, path)
    again = thin(weights=path)
    assert torch.equal(again.state_dict()["rpn.head.cls_logits.weight"], theirs["rpn.head.cls_logits.weight"])
    for options, message in (
        (dict(channels=8), "channels=16, which weights cannot change"),
        (dict(backbone="nfnet_nano"), "a detector on nfnet_micro, not on nfnet_nano"),
        (dict(width=(16, 32, 64, 128)), "does not fit"),
    ):
        with pytest.raises(InputError, match=message):
            thin(weights=path, **options)
