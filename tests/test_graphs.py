"""Networks of every family under the tools of their users: detection, checkpointing, compilation, export, autocast."""

import copy
import io
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from normfree.layers import ACTIVATIONS, Activation
from normfree.models import Network, create_model

LIGHT = dict(bottleneck_width=(16, 16, 32, 32), final_width=64, stem_channels=(8, 8, 16), group_width=8)
FAMILIES = {
    "nfnet": ("nfnet_micro", dict(stem_channels=(8, 16), group_width=8)),
    "eca_nfnet": ("eca_nfnet_l0", LIGHT),
    "nf_resnet": ("nf_resnet26", {}),
    "nf_resnet_se": ("nf_resnet26", dict(se_ratio=0.25)),
    "nf_regnet": ("nf_regnet_b0", {}),
    "bn_resnet": ("bn_resnet50", {}),
    "bn_nfnet": ("bn_nfnet_f0", dict(group_width=8)),
}
SHALLOW = (1, 1, 1, 1)  # tracing takes its time
# of an NF-ResNet, what pads: the stem's convolution and maximum, a block's strided convolution and mean
EVERY_PADDING = dict(depth=SHALLOW, pool_shortcut=True, features_only=True, out_indices=(1, 2))
every_family = pytest.mark.parametrize("family", FAMILIES)
normalizer_free = pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("bn_")])


def tiny(family: str, depth=(1, 2, 1, 1), dropping=0.0, **options) -> Network:
    """A network whose branches, classifier and running averages are not at their trivial first values."""
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    own = own | dict(width=(32, 32, 64, 64), depth=depth, num_classes=5, drop_rate=dropping) | options
    if family != "bn_resnet":
        own["stochastic_depth"] = dropping
    model = create_model(name, **own)
    for key, p in model.named_parameters():
        if key.endswith(("skip_gain", "conv2.gain")):
            nn.init.constant_(p, 0.7)
        if key == "head.fc.weight":
            nn.init.normal_(p, std=0.1)
    for key, b in model.named_buffers():
        if key.endswith("running_mean"):
            nn.init.normal_(b, std=0.2)
        if key.endswith("running_var"):
            nn.init.uniform_(b, 0.5, 1.5)
    return model


def largest_error(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference in a tensor over its largest magnitude; the worst of all tensors."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Feature maps, or the logits alone."""
    out = model(x)
    return [out] if isinstance(out, Tensor) else out


def step(model: nn.Module, x: Tensor, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Outputs, then the gradients of the sum of their squares."""
    outs = outputs(model, x)
    loss = torch.stack([out.square().sum() for out in outs]).sum()
    return [out.detach() for out in outs] + list(torch.autograd.grad(loss, list(parameters)))


class Pyramid(nn.Module):
    """A torchvision detector's backbone: feature maps 1 to 4, joined top-down to `out_channels` channels each."""

    def __init__(self, body: Network, out_channels: int = 16):
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): level for i, level in enumerate(self.body(x))})


@every_family
@pytest.mark.parametrize("side", [(64, 96), (61, 75)], ids=["even", "odd"])
def test_feature_pyramid(family, side):
    model = Pyramid(tiny(family, features_only=True, out_indices=(1, 2, 3, 4)))
    reduction = model.body.feature_info.reduction()
    assert reduction == [4, 8, 16, 32]
    maps = model(torch.randn(2, 3, *side))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for level, r in zip(maps.values(), [*reduction, 64], strict=True):
        assert level.shape == (2, 16, *(-(-s // r) for s in side))
    sum(level.square().sum() for level in maps.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def test_mask_rcnn_trains_and_predicts():
    torch.manual_seed(0)
    backbone = Pyramid(tiny("nfnet", features_only=True, out_indices=(1, 2, 3, 4)))
    detector = MaskRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=10,
        box_score_thresh=0.0,
    )
    images = [torch.rand(3, 64, 80), torch.rand(3, 71, 53)]
    targets = []
    for image in images:
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[:, 10:40, 8:48] = 1
        targets.append(dict(boxes=torch.tensor([[8.0, 10.0, 48.0, 40.0]]), labels=torch.tensor([1]), masks=mask))
    losses = detector(images, targets)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in backbone.parameters())
    with torch.no_grad():
        predictions = detector.eval()(images)
    for image, found in zip(images, predictions, strict=True):
        assert len(found["boxes"]) > 0
        assert found["boxes"].isfinite().all()
        assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])


@every_family
def test_checkpointing_changes_nothing(family):
    """Not the gradients, with dropout and stochastic depth too, and not the running averages of batch statistics."""
    plain = tiny(family, dropping=0.5)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(4, 3, 45, 40)
    results = []
    for model in (plain, saving):
        torch.manual_seed(1)
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()  # recomputed for a second time
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers(), strict=True))
    assert all(n == 1 for key, n in saving.named_buffers() if key.endswith("num_batches_tracked"))
    assert bool(list(saving.buffers())) == family.startswith("bn_")


def check_compiled(model: Network, backend: str, *sizes: tuple[int, int, int]) -> None:
    """Training steps in one graph, for every (batch, height, width) the same one, and what they leave behind."""
    torch.compiler.reset()
    model.double()  # so that nothing is forgiven as rounding
    eager = copy.deepcopy(model)
    eager.set_grad_checkpointing(False)
    several = len(sizes) > 1
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=several)
    for i, (batch, height, width) in enumerate(sizes):
        x = torch.randn(batch, 3, height, width, dtype=torch.float64)
        for dim in (0, 2, 3) if several else ():
            torch._dynamo.mark_dynamic(x, dim)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            ours = step(compiled, x, model.parameters())
        assert largest_error(ours, step(eager, x, eager.parameters())) < 1e-10
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(model.buffers(), eager.buffers(), strict=True))


@every_family
def test_compiled_training_step(family):
    check_compiled(tiny(family, depth=SHALLOW), "aot_eager", (2, 64, 45))


def test_one_compiled_graph_for_all_sizes():
    check_compiled(tiny("nf_resnet", **EVERY_PADDING), "aot_eager", (3, 45, 70), (2, 64, 96), (4, 33, 51))


def test_compiled_with_checkpointing():
    model = tiny("bn_resnet", depth=SHALLOW)
    model.set_grad_checkpointing()
    check_compiled(model, "aot_eager", (2, 64, 45))


def test_compiled_by_inductor(compiler):
    check_compiled(tiny("nf_resnet", depth=SHALLOW, features_only=True, out_indices=(1,)), "inductor", (2, 64, 45))


def check_exported(model: Network, strict: bool) -> None:
    """Exported with open batch, height and width: the same function before and after a file."""
    model.eval()
    shape = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=33, max=640), 3: Dim("width", min=33, max=640)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(shape,), strict=strict)
    ranges = sorted(str(r) for r in program.range_constraints.values())
    assert ranges == ["VR[1, 64]", "VR[33, 640]", "VR[33, 640]"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    with torch.no_grad():
        for size in [(1, 64, 64), (3, 33, 47), (2, 61, 100), (1, 50, 39), (1, 640, 33)]:
            x = torch.randn(size[0], 3, *size[1:])
            ours, theirs = outputs(again, x), outputs(model, x)
            assert [a.shape for a in ours] == [b.shape for b in theirs]
            assert largest_error(ours, theirs) < 1e-5


@every_family
def test_export_for_all_sizes(family):
    check_exported(tiny(family, depth=SHALLOW), strict=False)


def test_strict_export_of_feature_maps():
    check_exported(tiny("nf_resnet", **EVERY_PADDING), strict=True)


@every_family
def test_copy_and_pickle(family):
    model = tiny(family).eval()
    x = torch.randn(2, 3, 40, 33)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert all(a is not b for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_every_activation_pickles():
    for name in ACTIVATIONS:
        act = pickle.loads(pickle.dumps(Activation(name)))
        x = torch.linspace(-3, 3, 7)
        assert torch.equal(act(x), Activation(name)(x))


@every_family
def test_channels_last(family):
    model = tiny(family).double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 45, 64).double()
    ours = step(other, x.to(memory_format=torch.channels_last), other.parameters())
    assert largest_error(ours, step(model, x, model.parameters())) < 1e-10


@every_family
def test_autocast_keeps_float32_gradients(family):
    model = tiny(family)
    x = torch.randn(4, 3, 45, 64)
    reference = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert largest_error([out.float()], [reference]) < 0.1
    out.float().square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name


@every_family
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)])
def test_other_types(family, dtype, error):
    model = tiny(family).eval()
    x = torch.randn(2, 3, 45, 40)
    with torch.no_grad():
        reference = model(x)
        out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert largest_error([out.double()], [reference.double()]) < error


@normalizer_free
def test_gradients_of_single_examples(family):
    """What differentially private training needs: one vectorized pass equals a loop over the images."""
    model = tiny(family).eval().double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    images, labels = torch.randn(3, 3, 40, 33, dtype=torch.float64), torch.tensor([0, 3, 4])

    def loss(params, image, label):
        return nn.functional.cross_entropy(functional_call(model, params, image[None]), label[None])

    together = vmap(grad(loss), (None, 0, 0))(params, images, labels)
    for i in range(len(images)):
        single = torch.autograd.grad(
            nn.functional.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]), list(model.parameters())
        )
        assert largest_error([together[name][i] for name in params], single) < 1e-9
