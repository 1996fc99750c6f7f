"""Batch-normalized networks to normalizer-free ones: function, scales, report, refusals."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock as TimmBasicBlock
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn
from torchvision.models import regnet, resnet, video
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from normfree import convert_to_nf, create_model, save
from normfree.errors import InputError
from normfree.layers import BranchEnd, ChannelAffine, SkipInit, WSConv, WSConv1d, WSConv3d
from normfree.optim import param_groups

CONV, NORM = nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase
NARROW = dict(width=(32, 64, 64, 64), depth=(1, 2, 1, 1))
TIMM = dict(layers=(1, 2, 1, 1), channels=(16, 32, 48, 64), stem_width=16, num_classes=5)


def small_regnet(**options) -> nn.Module:
    params = regnet.BlockParams.from_init_params(depth=6, w_0=16, w_a=12, w_m=2.2, group_width=8, **options)
    return regnet.RegNet(params, num_classes=5)


def small_resnet(block: type, stages: int = 2, **options) -> nn.Module:
    """torchvision's, one block a stage; of the four stages the first ones."""
    model = resnet.ResNet(block, [1, 1, 1, 1], num_classes=5, **options)
    for i in range(stages, 4):
        setattr(model, f"layer{i + 1}", nn.Sequential())
    model.fc = nn.Linear(64 * block.expansion * 2 ** (stages - 1), 5)
    return model


NETWORKS = {
    "resnet18": lambda: small_resnet(resnet.BasicBlock),
    "resnet50": lambda: small_resnet(resnet.Bottleneck),
    "zero_init": lambda: small_resnet(resnet.BasicBlock, zero_init_residual=True),
    "resnext": lambda: small_resnet(resnet.Bottleneck, groups=32, width_per_group=4),
    "wide": lambda: small_resnet(resnet.Bottleneck, width_per_group=128),
    "dilated": lambda: small_resnet(resnet.Bottleneck, 3, replace_stride_with_dilation=[False, True, False]),
    "regnet_x": small_regnet,
    "regnet_y": lambda: small_regnet(se_ratio=0.25),
    "timm_resnet": lambda: TimmResNet(TimmBasicBlock, **TIMM, drop_path_rate=0.2),
    "timm_resnet_d": lambda: TimmResNet(TimmBottleneck, **TIMM, stem_type="deep", avg_down=True),
    "timm_seresnet": lambda: TimmResNet(TimmBottleneck, **TIMM, block_args=dict(attn_layer="se"), drop_path_rate=0.2),
    "timm_eca": lambda: TimmResNet(TimmBasicBlock, **TIMM, block_args=dict(attn_layer="eca")),
    "timm_resnetv2": lambda: timm.create_model("resnetv2_18", channels=(16, 32, 48, 64), num_classes=5),
    "timm_regnet": lambda: timm.create_model("regnety_002", num_classes=5),
    "bn_resnet": lambda: create_model("bn_resnet50", num_classes=5, **NARROW),
    "bn_nfnet": lambda: create_model("bn_nfnet_f0", num_classes=5, **NARROW, group_width=16),
}
SUMS = {  # residual blocks
    **dict.fromkeys(("resnet18", "resnet50", "zero_init", "resnext", "wide"), 2),
    **dict.fromkeys(("timm_resnet", "timm_resnet_d", "timm_seresnet", "timm_eca", "bn_resnet", "bn_nfnet"), 5),
    **dict(dilated=3, regnet_x=6, regnet_y=6, timm_resnetv2=8, timm_regnet=13),
}
PRE_ACTIVATION = ("bn_resnet", "bn_nfnet", "timm_resnetv2")
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def as_if_trained(model: nn.Module, centred: bool = True) -> nn.Module:
    """Statistics, gains and biases of any size; filters without a mean, if asked for."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, NORM):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                if m.affine:
                    m.weight.uniform_(0.5, 1.5)
                    m.bias.normal_(0, 0.3)
            elif isinstance(m, CONV) and centred:
                m.weight -= m.weight.mean(tuple(range(1, m.weight.ndim)), keepdim=True)
            elif isinstance(m, nn.Linear):
                m.weight.normal_(0, m.in_features**-0.5)
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (4, 3, 48, 48)), generator=torch.Generator().manual_seed(1), dtype=dtype)


def error(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max()).item()


@every_network
def test_every_layer_is_accounted_for(name):
    original = build(name)
    nf = convert_to_nf(original, images())
    done = nf.conversion
    before, after = dict(original.named_modules()), dict(nf.named_modules())
    assert type(nf) is type(original)
    assert {n for n, m in before.items() if isinstance(m, CONV)} == {*done.convs} | {*done.left}
    assert {n for n, m in before.items() if isinstance(m, NORM)} == {*done.folded} | {*done.on_stream}
    assert not any(isinstance(m, NORM) for m in after.values())
    assert bool(done.on_stream) == (name in PRE_ACTIVATION)
    assert len(done.branches) == SUMS[name]
    assert {n for n, m in after.items() if isinstance(m, WSConv)} == set(done.convs)
    for n, m in before.items():
        if n not in {*done.convs, *done.folded, *done.on_stream}:
            assert type(after[n]) is type(m)
    for n, p in original.named_parameters():  # the weights, bit for bit
        if n.rpartition(".")[0] not in {*done.folded, *done.on_stream}:
            assert torch.equal(p, nf.get_parameter(n))
    for n in done.branches:
        assert isinstance(after[n], BranchEnd) or isinstance(after[n].skip_init, SkipInit)
    for n, why in done.left.items():
        assert why == "part of a gate or of a classifier"
        assert ".se." in n or (name, n) == ("timm_resnetv2", "head.fc")
    assert f"{len(done.convs)} convolutions standardized" in str(done)
    assert all(signal.name in str(done) for signal in done.after)


@every_network
def test_function_of_a_trained_network_is_kept(name):
    model = as_if_trained(build(name).double()).eval()
    x, other = images(dtype=torch.float64), images(2, 3, 40, 56, dtype=torch.float64)
    nf = convert_to_nf(model, x)
    assert nf.conversion.statistics
    assert error(nf(other), model(other)) < 1e-10
    model, x = model.float(), x.float()
    as_if_trained(model)
    assert error(convert_to_nf(model, x)(x), model(x)) < 1e-5


def test_trained_filters_with_a_mean_keep_the_channel_means():
    """What a filter's mean adds is lost, but for its average over the images."""
    torch.manual_seed(0)
    model = as_if_trained(nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)), centred=False).double().eval()
    model[0].weight.data += 0.05
    x = images(64, 8, 16, 16, dtype=torch.float64).relu()
    nf = convert_to_nf(model, x)
    torch.testing.assert_close(nf(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)), rtol=1e-10, atol=1e-10)
    bare = copy.deepcopy(nf)
    with torch.no_grad():  # the average by hand: mean of the filter times the average sum of what it sees
        scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
        sums = F.conv2d(x, torch.ones(1, 8, 3, 3, dtype=torch.float64), stride=2, padding=1).mean()
        lost = model[0].weight.mean((1, 2, 3)) * sums
        bare[0].bias.copy_(model[1].bias + (model[0].bias + lost - model[1].running_mean) * scale)
    torch.testing.assert_close(nf[0].bias, bare[0].bias, rtol=1e-10, atol=1e-10)
    assert lost.abs().max() > 0.1
    assert not torch.allclose(nf(x), model(x), rtol=0.01)


@every_network
def test_fresh_network_propagates_unit_variance(name):
    model, x = build(name), images(4, 3, 128, 128)
    nf = convert_to_nf(model, x).eval()
    done, inputs, outputs = nf.conversion, {}, {}
    assert not done.statistics
    for n in done.convs:
        conv = nf.get_submodule(n)
        assert torch.equal(conv.gain, torch.ones_like(conv.gain))
        assert not conv.bias.any()

        def note(conv, args, out, n=n):
            scale = conv.skip_gain * conv.alpha if isinstance(conv, BranchEnd) else 1
            inputs[n] = (args[0] * conv.input_scale).var((0, 2, 3), correction=0).mean().item()
            outputs[n] = (out / scale).var((0, 2, 3)).mean().item()

        conv.register_forward_hook(note)
    with torch.no_grad():
        nf(x)
    first, *others = done.convs
    assert nf.get_submodule(first).input_scale == 1
    for n in others:
        assert inputs[n] == pytest.approx(1, rel=1e-4)
    for n in done.convs:  # zeros around small maps take variance away
        smallest = 0.8 if max(nf.get_submodule(n).kernel_size) == 1 else 0.6
        assert smallest < outputs[n] < 1.2, n
    for n, std in done.branches.items():
        end = nf.get_submodule(n)
        gated = not isinstance(end, BranchEnd)
        assert std == pytest.approx(0.5 if gated else 1, rel=0.2)
        scalars = end.skip_init if gated else end
        assert scalars.alpha.item() == pytest.approx(0.2 / std)
        assert scalars.skip_gain == 1
    _stem, *blocks = done.after
    for block, std in zip(blocks, done.branches.values(), strict=True):
        assert block.branch_variance == pytest.approx(std**2)
    if name in PRE_ACTIVATION:  # α² a block, anew after transitions
        assert all(block.variance == pytest.approx(1 + 0.04, rel=0.25) for block in blocks)


def test_scales_are_those_of_the_papers():
    """One over the expected deviation times γ: what `NFResNet` is built with."""
    torch.manual_seed(0)
    options = dict(width=(256, 256, 256, 256), depth=(1, 3, 1, 1))
    nf = convert_to_nf(create_model("bn_resnet50", **options), images(2, 3, 256, 256))
    reference = create_model("nf_resnet50", **options)
    for n in nf.conversion.convs[1:]:
        if n.startswith("stages.0"):
            continue  # its input, behind a maximum, is not of unit variance
        expected = reference.get_submodule(n).input_scale
        tolerance = 0.1 if n.endswith("conv2") else 0.03  # zeros around small maps take variance from the 3x3 before it
        assert nf.get_submodule(n).input_scale.item() == pytest.approx(expected, rel=tolerance)


@every_network
def test_trains_without_looking_at_other_images(name):
    nf = convert_to_nf(build(name).train(), images())
    assert all(m.training for m in nf.modules())
    torch.manual_seed(0)
    for m in nf.modules():  # the only layers that may tell images apart, by chance
        if type(m).__name__ in ("DropPath", "StochasticDepth", "Dropout"):
            m.eval()
    x = images()
    others = torch.cat([x[:1], 5 * x[1:] + 2])
    torch.testing.assert_close(nf(x)[:1], nf(others)[:1], rtol=1e-4, atol=1e-5)
    groups = param_groups(nf, classifier=nf.head.fc if hasattr(nf, "head") else nf.fc)
    assert all(p.ndim <= 1 for p in groups[1]["params"])
    assert len(groups[2]["params"]) == 1
    optimizer = torch.optim.SGD(groups, lr=0.01)
    target = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(nf(x), target)
        loss.backward()
        losses.append(loss.item())
        if name not in ("bn_resnet",) or len(losses) > 1:  # its classifier starts at 0
            for n, p in nf.named_parameters():
                assert p.grad is not None, n
                assert p.grad.any(), n
        optimizer.step()
    assert losses[-1] < losses[0]


def test_scale_of_the_weights_does_not_matter():
    model, x = build("resnet18"), images()
    scaled = copy.deepcopy(model)
    for m in scaled.modules():
        if isinstance(m, CONV):
            m.weight.data *= 7
    a, b = (convert_to_nf(m, x).eval()(x) for m in (model, scaled))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_original_and_random_state_stay_untouched():
    model = build("timm_seresnet").train()
    model.layer1.eval()
    before, x, state = copy.deepcopy(model.state_dict()), images(), torch.get_rng_state()
    nf = convert_to_nf(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()].count(False) == len(list(model.layer1.modules()))
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in nf.parameters()}
    assert not shared
    assert {n for n, m in nf.named_modules() if not m.training} >= {
        n for n, m in model.named_modules() if not m.training
    }
    assert nf.layer2[0].conv1.training


def test_copy_pickle_and_state_dict_keep_the_function(tmp_path):
    x = images()
    nf = convert_to_nf(build("timm_seresnet"), x).eval()
    with torch.no_grad():
        for p in nf.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = nf(x)
    assert torch.equal(copy.deepcopy(nf)(x), expected)
    torch.save(nf, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), expected)
    torch.manual_seed(1)
    other = convert_to_nf(NETWORKS["timm_seresnet"](), x).eval()
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(nf.state_dict())  # the scales are in it
    assert torch.equal(other(x), expected)


def test_noise_is_the_same_every_time_and_named():
    model = build("resnet18")
    a, b = convert_to_nf(model), convert_to_nf(model)
    assert a.conversion == b.conversion
    assert a.conversion.noise
    assert "traced with noise" in str(a.conversion)
    assert all(torch.equal(value, b.state_dict()[n]) for n, value in a.state_dict().items())


def test_alpha_and_skip_init():
    x = images()
    fresh, trained = build("resnet18"), as_if_trained(build("resnet18"))
    end = convert_to_nf(fresh, x, alpha=0.5, skip_init=0.0).layer1[0].conv2
    assert end.skip_gain == 0
    std = convert_to_nf(fresh, x, alpha=0.5).conversion.branches["layer1.0.conv2"]
    assert end.alpha.item() == pytest.approx(0.5 / std)
    end = convert_to_nf(trained, x, alpha=0.5).layer1[0].conv2
    assert (end.alpha.item(), end.skip_gain.item()) == (0.5, 2)
    closed = convert_to_nf(trained, x, skip_init=0.0).layer1[0].conv2
    assert not closed(torch.randn(1, 64, 4, 4)).any()
    with pytest.raises(InputError, match="alpha 0"):
        convert_to_nf(fresh, x, alpha=0)


def test_dtype_frozen_parameters_and_our_own_files(tmp_path):
    model = build("bn_resnet").to(torch.bfloat16)
    model.stages[0].requires_grad_(False)
    nf = convert_to_nf(model, images())
    assert {p.dtype for p in nf.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in nf.stages[0].parameters())
    assert all(p.requires_grad for n, p in nf.named_parameters() if not n.startswith("stages.0."))
    with pytest.raises(InputError, match="not made by create_model"):  # its name would promise another architecture
        save(nf, tmp_path / "x.safetensors")


def test_frozen_batch_norm_of_detectors():
    torch.manual_seed(0)
    model = small_resnet(resnet.BasicBlock, norm_layer=FrozenBatchNorm2d).double()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, FrozenBatchNorm2d):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.weight.uniform_(0.5, 1.5)
    as_if_trained(model)
    x = images(dtype=torch.float64)
    assert error(convert_to_nf(model, x).eval()(x), model.eval()(x)) < 1e-10


@pytest.mark.parametrize(
    ("dims", "conv", "norm", "cls"),
    [
        (1, nn.Conv1d, nn.BatchNorm1d, WSConv1d),
        (3, nn.Conv3d, nn.BatchNorm3d, WSConv3d),
    ],
)
def test_one_and_three_dimensions(dims, conv, norm, cls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3, 8, 3, 2, padding="valid")
            self.branch = nn.Sequential(conv(8, 8, 3, padding="same", dilation=2, groups=2), norm(8))

        def forward(self, x):
            x = self.stem(x).relu()
            return x + self.branch(x)

    torch.manual_seed(0)
    model = as_if_trained(Net().double()).eval()
    x = images(4, 3, *[21] * dims, dtype=torch.float64)
    nf = convert_to_nf(model, x)
    assert isinstance(nf.branch[0], cls)
    assert nf.conversion.branches.keys() == {"branch.0"}
    assert error(nf(x), model(x)) < 1e-10
    assert convert_to_nf(model).conversion.noise


def test_video_network():
    model = video.r3d_18(num_classes=5)
    done = convert_to_nf(model, images(2, 3, 4, 16, 16)).conversion
    assert (len(done.convs), len(done.folded), len(done.branches), done.left) == (20, 20, 8, {})


class Block(nn.Module):
    """x + f(x), with anything as f."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.f = nn.Sequential(*layers)

    def forward(self, x):
        x = self.stem(x)
        return x + self.f(x)


def test_plain_network_has_no_branches():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()
    )
    done = convert_to_nf(model, images()).conversion
    assert (len(done.convs), len(done.folded), done.branches, done.after) == (2, 2, {}, ())
    assert "0 residual branches" in str(done)


def test_stochastic_depth_and_constants_stay_behind_the_branch_end():
    class Net(Block):
        def forward(self, x):
            x = self.stem(x)
            return torch.add(x, self.f(x) * 0.5)

    model = Net(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.1), StochasticDepth(0.1, "row"))
    nf = convert_to_nf(model, images())
    assert list(nf.conversion.branches.items()) == [("f.0", pytest.approx(0.5, rel=0.1))]
    assert nf.f[0].alpha.item() == pytest.approx(0.4, rel=0.1)
    assert isinstance(nf.f[3], StochasticDepth)


def test_gates_that_are_plain_sequences_stay_plain():
    class Net(Block):
        def __init__(self):
            super().__init__(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
            )

        def forward(self, x):
            x = self.stem(x)
            out = self.f(x)
            return x + out * self.gate(out)

    nf = convert_to_nf(Net(), images())
    assert nf.conversion.convs == ("stem", "f.0")
    assert nf.conversion.left.keys() == {"gate.1", "gate.3"}
    ((end, std),) = nf.conversion.branches.items()
    assert end == "gate.4"
    assert nf.gate[4].skip_init.alpha.item() == pytest.approx(0.2 / std)
    assert std == pytest.approx(0.5, rel=0.2)


class Shared(Block):
    def forward(self, x):
        x = self.stem(x)
        return x + self.f(self.f(x))


class Untraceable(Block):
    def forward(self, x):
        return self.stem(x) if x.sum() > 0 else x


class Functional(Block):
    def forward(self, x):
        return F.layer_norm(super().forward(x), (6, 6))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return x


REFUSED = {
    "layer norm": (Block(nn.GroupNorm(2, 8)), r"f\.0 \(GroupNorm\)"),
    "instance norm": (Block(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8)), r"f\.1 \(InstanceNorm2d\)"),
    "custom": (Block(timm.layers.FilterResponseNormAct2d(8)), r"f\.0 \(FilterResponseNormAct2d\)"),
    "shared": (Shared(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), r"f\.1 \(called 2 times\)"),
    "reflect": (
        Block(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)),
        r"f\.1 \(f\.0 before it stays: padding_mode 'reflect'\)",
    ),
    "transposed": (Block(nn.ConvTranspose2d(8, 8, 1), nn.BatchNorm2d(8)), r"ConvTranspose2d is another kind"),
    "own forward": (Block(timm.layers.Conv2dSame(8, 8, 1), nn.BatchNorm2d(8)), "Conv2dSame is another kind"),
    "parametrized": (
        Block(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)),
        "parametrization",
    ),
    "unused": (Block(Scale()), r"f\.0\.bn \(not reached in evaluation\)"),
    "function": (Functional(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), r"layer_norm \(a function, no layer\)"),
    "untraceable": (Untraceable(), "torch.fx cannot trace Untraceable: .*control flow"),
    "nothing": (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "Sequential has no convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_named(name):
    model, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as info:
        convert_to_nf(model, images(2, 3, 8, 8))
    assert "\n" not in str(info.value)


def test_not_strict_leaves_and_names():
    model = Block(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    nf = convert_to_nf(model, images(), strict=False)
    assert nf.conversion.left == {"f.1": "InstanceNorm2d"}
    assert "left, InstanceNorm2d: f.1" in str(nf.conversion)
    assert nf.conversion.folded == ("f.3",)
    assert isinstance(nf.f[1], nn.InstanceNorm2d)


def test_sums_without_a_branch_are_named():
    class Net(Block):
        def forward(self, x):
            x = self.stem(x)
            return (x + F.relu(self.f(x))) + (self.f2(x) + self.f3(x))

    model = Net(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model.f2, model.f3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    left = convert_to_nf(model, images()).conversion.left
    assert left["add"] == "residual sum without α: no module ends the branch"
    assert left["add_1"] == "residual sum without α: both sides have as many convolutions"


def test_signal_without_variance_is_refused():
    with pytest.raises(InputError, match="pass more, larger or other images"):
        convert_to_nf(build("resnet18"), torch.zeros(2, 3, 64, 64))
    with pytest.raises(InputError, match="deviation 0"):
        convert_to_nf(build("resnet18"), images(1, 3, 8, 8))


def test_normalization_on_the_stream_becomes_an_affine_layer():
    model = as_if_trained(build("bn_resnet"))
    nf = convert_to_nf(model, images())
    assert isinstance(nf.act.bn.affine, ChannelAffine)
    assert "act.bn" in nf.conversion.on_stream
    assert isinstance(convert_to_nf(build("bn_resnet"), images()).act.bn, nn.Identity)


def test_activations_do_not_overwrite_the_shortcut_once_the_normalization_between_is_gone():
    class Net(Block):
        def forward(self, x):
            x = self.stem(x)
            return x + self.f(x)

    torch.manual_seed(0)
    model = Net(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    x = images()
    nf = convert_to_nf(model, x)
    shortcut = nf.stem(x)
    torch.testing.assert_close(nf(x), shortcut + nf.f[2](shortcut.relu()))
    with pytest.raises(InputError, match=r"f\.0 \(a function after it overwrites"):
        convert_to_nf(Net(nn.BatchNorm2d(8), InPlace(), nn.Conv2d(8, 8, 1)), x)


class InPlace(nn.Module):
    """Looked into, since there is normalization inside."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        return self.f(F.relu(x, inplace=True))
