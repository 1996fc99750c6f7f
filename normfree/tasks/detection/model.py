"""Mask R-CNN without normalization (He et al. 2017, arXiv 1703.06870): torchvision's, on any backbone of ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from normfree.data.coco import resized
from normfree.errors import InputError
from normfree.layers import ACTIVATIONS, WSConv2d, WSConvTranspose2d
from normfree.models.files import ZOO, bare, from_weights, full_state, rows_kept
from normfree.models.pyramid import PyramidBackbone
from normfree.models.table import build, our_words
from normfree.weights import IMAGENET_MEAN, IMAGENET_STD, ModelInfo, write_weights
from normfree.weights.file import DETECTOR, Weights, difference, spelled
from normfree.weights.read import read

Images = Sequence[Tensor]
Targets = Sequence[dict[str, Tensor]]

MAPS: dict[str, Any] = {"features_only": True, "out_indices": (1, 2, 3, 4)}
HEAD_OPTIONS = {"drop_rate", "global_pool"}  # of a classifier
# rows of a class in each predictor that knows classes; class 0 is the background
CLASS_ROWS = {
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,
}


class Detector(MaskRCNN):
    """torchvision's Mask R-CNN, on a pyramid of our own; without `masks` Faster R-CNN. No part of it normalizes.

    Images are lists of tensors (C, h, w), float in [0, 1] or uint8. Targets are one dictionary an image: `boxes` (N, 4)
    float, x1, y1, x2, y2 in pixels; `labels` (N,) int64 in 1 .. num_classes; `masks` (N, h, w) uint8.
    Under autocast, the layers of backbone, pyramid and heads run in low precision. What they put out is float32, and
    so are anchors, boxes, losses and scores.

    Args:
        body: the backbone, as `PyramidBackbone` takes it.
        num_classes: without the background.
        channels: of the pyramid and the mask head; the box head has four times as many.
        standardize: convolutions of pyramid and heads are weight-standardized; the predictors are always plain.
        min_px, max_px: images are resized to this short side, unless the long side would exceed `max_px`.
        anchor_px: side of the anchors on the finest level; it doubles from level to level.
        rois: sampled regions of an image in training.
        max_detections, min_score: detections of an image, at most, and their score, at least.
        mean, std: of the channels of an image in [0, 1].

    Attributes:
        info: the header for a weight file; None unless `create_detector` made the model.
        notes: lines on what was taken from `weights`.
    """

    info: ModelInfo | None = None
    notes: tuple[str, ...] = ()
    frozen: tuple[nn.Module, ...] = ()

    def __init__(
        self,
        body: nn.Module,
        num_classes: int,
        *,
        masks: bool = True,
        channels: int = 256,
        standardize: bool = True,
        min_px: int = 800,
        max_px: int = 1333,
        anchor_px: int = 32,
        rois: int = 512,
        max_detections: int = 100,
        min_score: float = 0.05,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        _check_options(num_classes, channels, min_px, max_px, anchor_px, rois, max_detections, min_score)
        backbone = PyramidBackbone(body, channels, standardize)
        sizes = tuple((anchor_px * 2**level,) for level in range(5))
        rpn_head, box_head = RPNHead(channels, 3), TwoMLPHead(channels * 7**2, 4 * channels)
        mask_head = MaskRCNNHeads(channels, (channels,) * 4, 1)
        box_predictor = FastRCNNPredictor(4 * channels, num_classes + 1)
        mask_predictor = MaskRCNNPredictor(channels, channels, num_classes + 1)
        if standardize:
            _standardize(rpn_head, box_head, box_predictor, mask_head, mask_predictor)
        super().__init__(
            backbone,
            min_size=min_px,
            max_size=max_px,
            image_mean=list(mean),
            image_std=list(std),
            size_divisible=2 * backbone.reductions[-1],  # of P6: its stride is a rounded quotient otherwise
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
            rpn_head=rpn_head,
            box_roi_pool=_pooler(7, backbone.reductions, anchor_px),
            box_head=box_head,
            box_predictor=box_predictor,
            mask_roi_pool=_pooler(14, backbone.reductions, anchor_px),
            mask_head=mask_head,
            mask_predictor=mask_predictor,
            box_batch_size_per_image=rois,
            box_detections_per_img=max_detections,
            box_score_thresh=min_score,
        )
        self.num_classes, self.masks = num_classes, masks
        if not masks:
            for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
                setattr(self.roi_heads, name, None)
        for module in (backbone, rpn_head, box_predictor, mask_predictor):
            module.register_forward_hook(_in_float32)

    def forward(self, images: Images, targets: Targets | None = None, resized: bool = False) -> Any:
        """With targets, in either mode, the losses by name; in evaluation without them the detections of every image.

        Detections are dictionaries of `boxes` (N, 4) in pixels of the given image, `labels` (N,) in 1 .. num_classes,
        `scores` (N,), and `masks` (N, 1, h, w) with probabilities. `resized`: images with targets have the right size
        already.
        """
        if targets is not None:
            batch, checked = self._batch(images, targets, resized)
            return self._losses(self.backbone(batch.tensors), batch, checked)
        if self.training:
            raise InputError("training needs targets")
        if resized:
            raise InputError("resized images need targets, or detect(), which is told their original sizes")
        found, _ = self.detect(images)
        if self.masks:
            for image, each in zip(images, found, strict=True):
                height, width = image.shape[-2:]
                each["masks"] = paste_masks_in_image(each["masks"][:, None], each["boxes"], (height, width))
        return found

    def losses(self, images: Images, targets: Targets) -> dict[str, Tensor]:
        """The sum "loss" and its parts by torchvision's names, in training or evaluation mode.

        `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`, `loss_box_reg`, `loss_mask`. Images are not resized.
        """
        batch, checked = self._batch(images, targets, resized=True)
        parts = self._losses(self.backbone(batch.tensors), batch, checked)
        return with_sum(parts)

    @torch.no_grad()
    def detect(
        self, images: Images, sizes: Sequence[tuple[int, int]] | None = None, targets: Targets | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of every image, and with `targets` the losses as in `losses`, from one pass of the backbone.

        Args:
            images: of original size; with `sizes` resized already.
            sizes: original (width, height) of each image, in whose pixels boxes are given back.
            targets: in pixels of `images`. What the losses sample is the same each time.

        Returns:
            The detections are those of `forward` but for masks (N, 28, 28), probabilities within the box.
        """
        if self.training:
            raise InputError("detect() is for evaluation: call model.eval() first")
        if sizes is not None and len(sizes) != len(images):
            raise InputError(f"{len(sizes)} sizes for {len(images)} images")
        originals = [tuple(image.shape[-2:]) for image in images] if sizes is None else [(h, w) for w, h in sizes]
        batch, checked = self._batch(images, targets, resized=sizes is not None)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        found, _ = self.roi_heads(features, proposals, batch.image_sizes)
        for each, size, original in zip(found, batch.image_sizes, originals, strict=True):
            each["boxes"] = resize_boxes(each["boxes"], list(size), list(original))
            if self.masks:
                each["masks"] = each["masks"][:, 0]
        if targets is None:
            return found, {}
        device = batch.tensors.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            parts = self._losses(features, batch, checked)
        return found, with_sum(parts)

    def train(self, mode: bool = True) -> Detector:
        """Training or evaluation mode; what `freeze` froze stays in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def _batch(self, images: Images, targets: Targets | None, resized: bool) -> tuple[ImageList, Any]:
        """Normalized images in one padded tensor, and targets in pixels of these images."""
        transform: Any = self.transform
        _check_images(images, len(transform.image_mean))
        images = [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]
        if targets is not None:
            _check_targets(images, targets, self.num_classes, self.masks)
        if not resized:
            limits = transform.min_size[0], transform.max_size
            targets = targets and [_resize_target(t, i, *limits) for i, t in zip(images, targets, strict=True)]
            images = [_resize(image, *limits) for image in images]
        images = [transform.normalize(image) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return ImageList(transform.batch_images(images, transform.size_divisible), sizes), targets

    def _losses(self, features: dict[str, Tensor], batch: ImageList, targets: Any) -> dict[str, Tensor]:
        heads = (self.rpn, self.roi_heads)
        modes = [head.training for head in heads]
        for head in heads:  # these two alone: what is inside does not depend on the mode
            head.training = True
        try:
            proposals, first = self.rpn(batch, features, targets)
            _, second = self.roi_heads(features, proposals, batch.image_sizes, targets)
        finally:
            for head, mode in zip(heads, modes, strict=True):
                head.training = mode
        return first | second


def with_sum(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses by name, and their sum as "loss"."""
    return {"loss": torch.stack([*parts.values()]).sum()} | parts


def _check_options(
    num_classes: int,
    channels: int,
    min_px: int,
    max_px: int,
    anchor_px: int,
    rois: int,
    max_detections: int,
    min_score: float,
) -> None:
    counts = dict(num_classes=num_classes, channels=channels, min_px=min_px, anchor_px=anchor_px, rois=rois)
    for name, number in (counts | dict(max_detections=max_detections)).items():
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{name} {number}: a whole number of at least 1")
    if max_px < min_px:
        raise InputError(f"max_px {max_px}: at least min_px, {min_px}")
    if not 0 <= min_score < 1:
        raise InputError(f"min_score {min_score}: a score lies in [0, 1)")


def _standardize(
    rpn_head: RPNHead,
    box_head: TwoMLPHead,
    box_predictor: FastRCNNPredictor,
    mask_head: MaskRCNNHeads,
    mask_predictor: MaskRCNNPredictor,
) -> None:
    """Weight standardization of the convolutions, with the γ of the ReLU before them.

    Linear layers keep the variance. More reaches the predictors than in torchvision, with whose initial values losses
    would be large (the mask loss of one class 4). Theirs are those of detectron2.
    """
    gamma, channels = ACTIVATIONS["relu"][1], rpn_head.cls_logits.in_channels
    for i, block in enumerate([rpn_head.conv[0], *mask_head]):
        scale = gamma if i > 1 else 1.0  # the first of either head follows no activation
        cast(nn.Sequential, block)[0] = WSConv2d(channels, channels, 3, padding=1, input_scale=scale)
    mask_predictor.conv5_mask = WSConvTranspose2d(channels, channels, 2, 2, input_scale=gamma)
    for fc in (box_head.fc6, box_head.fc7):
        nn.init.kaiming_normal_(fc.weight, nonlinearity="relu")
        nn.init.zeros_(fc.bias)
    stds = {box_predictor.cls_score: 0.01, box_predictor.bbox_pred: 0.001, mask_predictor.mask_fcn_logits: 0.001}
    for layer, std in stds.items():
        nn.init.normal_(cast(Tensor, layer.weight), std=std)
        nn.init.zeros_(cast(Tensor, layer.bias))


def _pooler(side: int, reductions: Sequence[int], anchor_px: int) -> MultiScaleRoIAlign:
    """RoIAlign whose levels fit the anchors; torchvision's rule is for anchors of 32 px.

    It would derive scales from the first batch, wrongly if that is padded to much more than the image.
    """
    canonical = 7 * anchor_px
    pooler: Any = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2, canonical_scale=canonical)
    pooler.scales, pooler.map_levels = [1 / reduction for reduction in reductions], LevelMapper(2, 5, canonical)
    return pooler


def _in_float32(module: nn.Module, args: Any, out: Any) -> Any:
    """Forward hook: coordinates in bfloat16 are off by pixels, and numbers above 256 by one."""
    if isinstance(out, Tensor):
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    if isinstance(out, dict):
        return {key: _in_float32(module, args, value) for key, value in out.items()}
    return type(out)(_in_float32(module, args, value) for value in out)


def _size(image: Tensor, min_px: int, max_px: int) -> tuple[int, int]:
    """(height, width) after the resize."""
    width, height = resized(image.shape[-1], image.shape[-2], min_px, max_px)
    return height, width


def _resize(image: Tensor, min_px: int, max_px: int) -> Tensor:
    """Bilinear with antialiasing, unlike torchvision's, as Pillow does for training."""
    size = _size(image, min_px, max_px)
    if size == image.shape[-2:]:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _resize_target(target: dict[str, Tensor], image: Tensor, min_px: int, max_px: int) -> dict[str, Tensor]:
    size = _size(image, min_px, max_px)
    new = target | {"boxes": resize_boxes(target["boxes"], list(image.shape[-2:]), list(size))}
    if "masks" in target:
        new["masks"] = F.interpolate(target["masks"][:, None].byte(), size, mode="nearest")[:, 0]
    return new


def _check_images(images: Images, channels: int) -> None:
    """InputError for images that torchvision would misread: it makes three channels of one."""
    if not images:
        raise InputError("there are no images")
    for i, image in enumerate(images):
        if image.ndim != 3 or len(image) != channels or not (image.is_floating_point() or image.dtype == torch.uint8):
            raise InputError(f"image {i} is {image.dtype} {tuple(image.shape)}: ({channels}, h, w), float or uint8")


def _check_targets(images: Images, targets: Targets, num_classes: int, masks: bool) -> None:
    """InputError for targets that torchvision would misread, or refuse without saying which."""
    if len(targets) != len(images):
        raise InputError(f"{len(targets)} targets for {len(images)} images")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        missing = [key for key in ("boxes", "labels", *(["masks"] if masks else [])) if key not in target]
        if missing:
            raise InputError(f"target {i} has no {missing[0]!r}")
        boxes, labels = target["boxes"], target["labels"]
        wrong = ""
        if boxes.dtype not in (torch.float32, torch.float64) or boxes.shape != (len(labels), 4):
            wrong = f"boxes are {boxes.dtype} {tuple(boxes.shape)}: float32 ({len(labels)}, 4), as there are labels"
        elif labels.dtype != torch.int64:
            wrong = f"labels are {labels.dtype}: int64"
        elif len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= num_classes:
            wrong = f"labels from {labels.min()} to {labels.max()}: 1 to {num_classes}, 0 is the background"
        elif not bool((boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)).all()):
            bad = next(box for box in boxes.tolist() if not (box[2] > box[0] and box[3] > box[1] and sum(box) < 1e9))
            wrong = f"the box {bad} is empty or not finite"
        elif masks and target["masks"].shape != (len(labels), *image.shape[-2:]):
            expected = (len(labels), *image.shape[-2:])
            wrong = f"masks are {tuple(target['masks'].shape)}: {expected}, one a box, of the image's size"
        if wrong:
            raise InputError(f"target {i}: {wrong}")


def freeze(model: Detector, stages: int) -> None:
    """Holds the stem and the first `stages` stages of the backbone as they are, 0 to 4; 0 freezes nothing.

    They stay in evaluation mode, also in training. With 4 the whole backbone is held.
    """
    body: Any = model.backbone.body
    if not 0 <= stages <= 4:
        raise InputError(f"freeze {stages} stages: 0 to 4")
    if stages and not (hasattr(body, "stem") and hasattr(body, "stages")):
        raise InputError(f"the stages of a {type(body).__name__} are not known: freeze its layers by requires_grad_")
    parts = [body] if stages == 4 else [body.stem, *list(body.stages)[:stages]] if stages else []
    model.frozen = tuple(parts)
    for module in parts:
        module.requires_grad_(False)
    model.train(model.training)


def roles(model: Detector) -> dict[str, Any]:
    """Keyword arguments for `normfree.optim.param_groups`: the predictors are not clipped.

    In the mask predictor, the transposed convolution is.
    """
    heads: Any = (model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor)
    mask = [] if heads[2] is None else [heads[2].mask_fcn_logits]
    return {"classifier": None, "exempt": [heads[0].cls_logits, heads[0].bbox_pred, heads[1], *mask]}


def create_detector(
    backbone: str,
    num_classes: int,
    *,
    masks: bool = True,
    channels: int = 256,
    standardize: bool = True,
    min_px: int = 800,
    max_px: int = 1333,
    anchor_px: int = 32,
    rois: int = 512,
    max_detections: int = 100,
    min_score: float = 0.05,
    weights: str | os.PathLike | None = None,
    content: Weights | None = None,
    class_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
    **overrides: Any,
) -> Detector:
    """A Mask R-CNN on a network of the zoo.

    Args:
        backbone: one of `list_models()`.
        num_classes: without the background.
        masks, channels, standardize, min_px, max_px, anchor_px, rois, max_detections, min_score: as in `Detector`.
        weights: classification weights of any kind that `create_model` takes, for the backbone, or a detector's file.
            Of that, predictors keep the rows of classes of the same name, as `create_model` does for a classifier.
        content: of the file `weights`, if it has been read; the detector may take over its tensors.
        class_names, category_ids: of the classes 1 .. num_classes.
        overrides: options of the backbone, as in `create_model`.

    Raises:
        InputError: impossible options; weights of another backbone or shape.
    """
    own: dict[str, Any] = dict(masks=masks, channels=channels, standardize=standardize, min_px=min_px, max_px=max_px)
    own |= dict(anchor_px=anchor_px, rois=rois, max_detections=max_detections, min_score=min_score)
    for name, values in dict(class_names=class_names, category_ids=category_ids).items():
        if len(values) not in (0, num_classes):
            raise InputError(f"{len(values)} {name} for {num_classes} classes")
    given = our_words(overrides)
    in_channels = given.pop("in_channels", 3)
    if void := sorted({*HEAD_OPTIONS, *MAPS} & given.keys()):
        raise InputError(f"a detector has no option {void[0]!r}")
    file = content or (None if weights is None else read(weights, ZOO, backbone, given))
    old = dict(file.info.overrides) if file and file.info.architecture == DETECTOR else {}
    notes: tuple[str, ...] = ()
    if weights is None or old:
        if old and (other := old.pop("backbone", None)) != backbone:
            raise InputError(f"{weights} holds a detector on {other}, not on {backbone}")
        known = {key: old.pop(key) for key in [*old] if key not in own}
        body = build(backbone, 0, in_channels, known | given | MAPS)
    else:
        body, notes = from_weights(backbone, 0, in_channels, weights, given | MAPS, weights=file)
    info = cast(ModelInfo, body.info)
    if file is not None and old:
        info = replace(info, mean=file.info.mean, std=file.info.std)
    options = {key: value for key, value in info.overrides.items() if key not in {*HEAD_OPTIONS, *MAPS}}
    model = Detector(body, num_classes, **own, mean=info.mean, std=info.std)
    model.info = replace(
        info,
        architecture=DETECTOR,
        num_classes=num_classes,
        overrides={"backbone": backbone, **own, **options},
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        train_px=min_px,
        eval_px=min_px,
        trained_on=(),
    )
    if file is not None and old:
        notes = _take_over(model, file, old, own, weights)
    model.notes = notes
    return model


def _take_over(model: Detector, file: Weights, old: dict[str, Any], own: dict[str, Any], path: Any) -> tuple[str, ...]:
    """Puts the weights of a detector's file into `model`; returns notes. `old`, `own`: options of the two."""
    changed = {key: value for key, value in old.items() if own[key] != value}
    if fixed := {key: changed[key] for key in ("channels", "standardize") if key in changed}:
        raise InputError(f"{path} holds a detector with {spelled(fixed)}, which weights cannot change: give the same")
    notes = [f"unlike the detector of {path}, which has {spelled(changed)}"] if changed else []
    fresh, state = model.state_dict(), dict(file.state)
    info = cast(ModelInfo, model.info)
    rows, note = rows_kept(file.info, info.num_classes, info.class_names)
    notes.append(
        note.replace("classifier keeps its", "predictors keep their").replace("classifier is", "predictors are")
    )
    for name, count in CLASS_ROWS.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state and key in fresh:
                merged = fresh[key].clone().unflatten(0, (-1, count))
                kept = [(0, 0), *((new + 1, row + 1) for new, row in rows)]
                merged[[new for new, _ in kept]] = state[key].unflatten(0, (-1, count))[[row for _, row in kept]]
                state[key] = merged.flatten(0, 1)
    if "masks" in changed:  # the mask head is new, or left out
        state = {key: value for key, value in state.items() if key in fresh}
        state = {key: value for key, value in fresh.items() if "mask_" in key} | state
    if wrong := difference(fresh, state):
        raise InputError(f"{path} does not fit this detector: {wrong}")
    model.load_state_dict(state)
    return tuple(notes)


def save_detector(model: nn.Module, path: str | os.PathLike, info: ModelInfo | None = None) -> None:
    """Writes a detector as one safetensors file, from which `load_detector` builds it. `info`: None for `model.info`.

    Raises:
        InputError: in one line, and nothing is written: the model was not made by `create_detector`, or was changed.
    """
    network: Any = bare(model)
    known = info or network.info
    if known is None:
        raise InputError("a weight file cannot describe this detector: create_detector did not make it")
    state = full_state(network)
    if wrong := difference(_outline(known, path).state_dict(), state):
        raise InputError(f"a weight file cannot describe this detector: it is no longer that of its info ({wrong})")
    write_weights(path, state, known)


def load_detector(path: str | os.PathLike) -> Detector:
    """The detector in a file of `save_detector` or in a run folder, in evaluation mode on the CPU.

    Raises:
        InputError: in one line, for anything else.
    """
    weights = read(path, ZOO)
    if weights.info.architecture != DETECTOR:
        raise InputError(f"{path} holds a classifier, {weights.info.architecture}, not a detector")
    return detector_of(weights, path)


def detector_of(weights: Weights, path: str | os.PathLike) -> Detector:
    """`load_detector`, for a file that has been read."""
    model = _outline(weights.info, path)
    if wrong := difference(model.state_dict(), weights.state):
        raise InputError(f"{path} does not fit the detector of its header: {wrong}")
    model.load_state_dict(weights.state, assign=True)
    return model.eval()


def described(info: ModelInfo) -> Detector:
    """A new detector as a header describes it."""
    options: dict[str, Any] = dict(num_classes=info.num_classes, in_channels=info.in_channels, weights=None)
    model = create_detector(**info.overrides, **options)
    transform: Any = model.transform
    transform.image_mean, transform.image_std = list(info.mean), list(info.std)
    model.info = info
    return model


def _outline(info: ModelInfo, path: str | os.PathLike) -> Detector:
    """`described` without memory; InputError for an impossible header."""
    try:
        with torch.device("meta"):
            return described(info)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: {error}") from None
