"""Signal propagation: numbers against the released code's, explicit formulas and timm; blocks found in any network."""

import doctest
import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from golden import build, load_golden, to_images, to_state
from test_timm import small_pair
from torch import Tensor, nn

import normfree
from normfree.analysis.signal import format_signals, plot_signal, set_skip_gains
from normfree.cli import main
from normfree.conversion.trace import BlockSignal, trace_signal
from normfree.errors import InputError

timm = pytest.importorskip("timm", reason="timm is the reference of these tests: pip install timm")

GOLDEN = [f"nfnet_tiny_{name}" for name in ("gelu", "silu", "relu", "one_conv")]
GOLDEN += ["nf_resnet_tiny", "nf_resnet_tiny_se", "nf_regnet_tiny"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def squared_mean(x: Tensor) -> float:
    return x.double().mean((0, 2, 3)).square().mean().item()


def variance(x: Tensor) -> float:
    return x.double().var((0, 2, 3), correction=0).mean().item()


def assert_signal(signal: BlockSignal, out: Tensor, branch: Tensor | None) -> None:
    assert signal.squared_mean == pytest.approx(squared_mean(out), rel=1e-5, abs=1e-12), signal.name
    assert signal.variance == pytest.approx(variance(out), rel=1e-5), signal.name
    if branch is None:
        assert signal.branch_variance is None
    else:
        assert signal.branch_variance == pytest.approx(variance(branch), rel=1e-5), signal.name


# --- the released code's statistics ---


def assert_golden(signals: list[BlockSignal], arrays: dict, side: int) -> None:
    expected = {
        key.split("/")[1]: float(v) for key, v in arrays.items() if key.startswith(f"output_{side}/") and v.ndim == 0
    }
    measured = {}
    for k, signal in enumerate(signals):
        measured[f"avg_sq_mean_{k}"], measured[f"avg_var_{k}"] = signal.squared_mean, signal.variance
        if k:
            measured[f"res_avg_var_{k - 1}"] = signal.branch_variance
    assert measured.keys() == {key for key in expected if "avg" in key}
    for key, value in measured.items():
        assert value == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("side", [0, 1], ids=["64x64", "61x67"])
@pytest.mark.parametrize("name", GOLDEN)
def test_released_code(name, side):
    arrays, config = load_golden(name)
    model = build(config).eval()
    model.load_state_dict(to_state(arrays, "params/", config["depth"]))
    images = to_images(arrays[f"input_{side}"])
    assert_golden(trace_signal(model, images), arrays, side)
    set_skip_gains(model, 0.0)  # a branch is measured before its gain: closed, it still has its variance
    closed = trace_signal(model, images)
    assert closed[1].branch_variance == pytest.approx(float(arrays[f"output_{side}/res_avg_var_0"]), rel=1e-5)


@pytest.mark.parametrize("side", [0, 1], ids=["batch statistics", "averages"])
def test_released_bn_baseline(side):
    arrays, config = load_golden("bn_resnet_tiny")
    model = build(config).train(side == 0)
    state = to_state(arrays, "params/", config["depth"]) | to_state(arrays, "state/", config["depth"])
    model.load_state_dict(state, strict=False)
    images = to_images(arrays[f"input_{side}"])
    assert_golden(trace_signal(model, images), arrays, side)
    assert_golden(trace_signal(model, images), arrays, side)  # the first time has not moved the averages
    if side == 1:  # by default, too, weights that have averages are measured with them
        table = normfree.signal_propagation(model.train(), images)
        assert not table.batch_statistics
        assert_golden(list(table), arrays, side)


# --- explicit formulas ---


def standardized(conv: nn.Module) -> Tensor:
    w = conv.weight
    fan_in = w[0].numel()
    centred = w - w.mean((1, 2, 3), keepdim=True)
    return centred / (centred.square().mean((1, 2, 3), keepdim=True) * fan_in).sqrt() * conv.gain.view(-1, 1, 1, 1)


def test_nf_resnet_formulas():
    """h + α g f(h), each operation written out: γ and β on activations, α and g on the branch."""
    model = normfree.create_model("nf_resnet26", width=(32, 64, 64, 64), depth=(2, 2, 1, 1)).eval()
    set_skip_gains(model, 0.7)
    x = torch.randn(4, 3, 64, 64)
    gamma, signals = 1.7139588594436646, trace_signal(model, x)
    with torch.no_grad():
        h = F.max_pool2d(
            F.conv2d(F.pad(x, (2, 3, 2, 3)), standardized(model.stem.conv), stride=2), 3, 2, ceil_mode=True
        )
        assert_signal(signals[0], h, None)
        expected_var, k = 1.0, 0
        for stage in model.stages:
            for i, block in enumerate(stage):
                k += 1
                z = gamma * F.relu(h) / math.sqrt(expected_var)
                shortcut = h
                if i == 0:
                    shortcut = F.conv2d(z, standardized(block.conv_shortcut), stride=block.stride)
                out = gamma * F.relu(F.conv2d(z, standardized(block.conv0)))
                if block.stride == 2:
                    out = F.conv2d(F.pad(out, (0, 1, 0, 1)), standardized(block.conv1), stride=2)
                else:
                    out = F.conv2d(out, standardized(block.conv1), padding=1)
                branch = F.conv2d(gamma * F.relu(out), standardized(block.conv2))
                h = shortcut + 0.2 * 0.7 * branch
                expected_var = (1 if i == 0 else expected_var) + 0.2**2
                assert_signal(signals[k], h, branch)
                assert signals[k].transition == (i == 0)
    assert [s.name for s in signals] == ["stem", *(f"stages.{i}" for i in ("0.0", "0.1", "1.0", "1.1", "2.0", "3.0"))]


def batch_norm_relu(x: Tensor) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    return F.relu(centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt())


def test_bn_resnet_formulas():
    """Fresh BN networks are measured with the statistics of the batch; nothing remembers it."""
    model = normfree.create_model("bn_resnet50", width=(32, 64, 64, 64), depth=(2, 1, 1, 1)).eval()
    x = torch.randn(4, 3, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = normfree.signal_propagation(model, x)
    assert table.batch_statistics
    assert not any(module.training for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    signals = list(table)
    with torch.no_grad():
        h = F.max_pool2d(F.conv2d(F.pad(x, (2, 3, 2, 3)), model.stem.conv.weight, stride=2), 3, 2, ceil_mode=True)
        assert_signal(signals[0], h, None)
        for k, block in enumerate(block for stage in model.stages for block in stage):
            z = batch_norm_relu(h)
            shortcut = h
            if block.conv_shortcut is not None:
                shortcut = F.conv2d(z, block.conv_shortcut.weight, stride=block.stride)
            out = batch_norm_relu(F.conv2d(z, block.conv0.weight))
            pad = (0, 1, 0, 1) if block.stride == 2 else (1, 1, 1, 1)
            out = F.conv2d(F.pad(out, pad), block.conv1.weight, stride=block.stride)
            branch = F.conv2d(batch_norm_relu(out), block.conv2.weight)
            h = shortcut + branch
            assert_signal(signals[k + 1], h, branch)


def test_bn_nfnet_is_its_branch_and_shortcut():
    model = normfree.create_model("bn_nfnet_f0", width=(32, 64, 64, 64), depth=(1, 1, 1, 1), group_width=16).eval()
    block = model.stages[0][0]
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        shortcut = block.conv_shortcut(block.act0(x))
        torch.testing.assert_close(block(x), shortcut + block.branch(x))
    signals = trace_signal(model, torch.randn(2, 3, 64, 64))
    assert len(signals) == 5
    assert all(s.transition for s in signals[1:])


def test_variances_that_theory_gives():
    """Normalizer-free: 1 in a branch, 1 + k α² in a stage. BN -> ReLU with He's initialisation: 2 (1 - 1/π) / 2."""
    wide = dict(width=(256, 256, 256, 256), depth=(2, 2, 1, 1))
    nf = normfree.create_model("nf_resnet26", **wide)
    set_skip_gains(nf, 1.0)
    for i, signal in enumerate(list(normfree.signal_propagation(nf, batch=8, px=64))[1:5]):
        assert signal.branch_variance == pytest.approx(1, abs=0.15)
        assert signal.variance == pytest.approx(1 + 0.04 * (i % 2 + 1), abs=0.1)
        assert signal.squared_mean < 0.05
    bn = normfree.create_model("bn_resnet50", **wide)
    for module in bn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    signals = list(normfree.signal_propagation(bn, batch=8, px=64))
    for signal in signals[1:5]:
        assert signal.branch_variance == pytest.approx(1 - 1 / math.pi, rel=0.05)
    assert signals[2].variance - signals[1].variance == pytest.approx(1 - 1 / math.pi, rel=0.15)


# --- the networks of others ---


def test_timm_nfnet_has_our_rows():
    ours, theirs = small_pair()
    x = torch.randn(2, 3, 61, 67, dtype=torch.float64)
    a, b = trace_signal(ours.eval(), x), trace_signal(theirs.eval(), x)
    assert len(a) == len(b) == 7
    for one, other in zip(a, b, strict=True):
        assert (one.name, one.transition) == (other.name, other.transition)
        assert one.squared_mean == pytest.approx(other.squared_mean, rel=1e-9)
        assert one.variance == pytest.approx(other.variance, rel=1e-9)
        if one.branch_variance is not None:
            assert one.branch_variance == pytest.approx(other.branch_variance, rel=1e-9)


# network, where its stages are, their depths, the module whose output ends the branch, blocks without projection
NETWORKS = {
    "torchvision:resnet18": (r"layer{}.{}", (2, 2, 2, 2), "bn2", ["layer1.0"]),
    "torchvision:resnet50": (r"layer{}.{}", (3, 4, 6, 3), "bn3", []),
    "torchvision:resnext50_32x4d": (r"layer{}.{}", (3, 4, 6, 3), "bn3", []),
    "torchvision:regnet_y_400mf": (r"trunk_output.block{0}.block{0}-{1}", (1, 3, 6, 6), "f", []),
    "timm:seresnet50": (r"layer{}.{}", (3, 4, 6, 3), "se", []),
    "timm:res2net50_26w_4s": (r"layer{}.{}", (3, 4, 6, 3), "bn3", []),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others(name):
    """Names, transitions and values against hooks on the layers that their authors named."""
    pattern, depth, last, identities = NETWORKS[name]
    library, _, network = name.partition(":")
    model = torchvision.models.get_model(network) if library == "torchvision" else timm.create_model(network)
    model.train()  # statistics of the batch
    set_skip_gains(model, 1.0)
    names = [pattern.format(stage, i) for stage in range(1, 5) for i in range(depth[stage - 1])]
    seen, handles = {}, []
    for block in names:
        for layer in (block, f"{block}.{last}"):
            # a copy: what is added in place is gone afterwards
            keep = lambda module, args, out, layer=layer: seen.__setitem__(layer, out.clone())  # noqa: E731
            handles.append(model.get_submodule(layer).register_forward_hook(keep))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    signals = trace_signal(model, x)
    assert [s.name for s in signals] == ["stem", *names]
    for signal in signals[1:]:
        assert_signal(signal, seen[signal.name], seen[f"{signal.name}.{last}"])
        first = signal.name.endswith((".0", "-0"))
        assert signal.transition == (first and signal.name not in identities)
    assert [s.squared_mean for s in trace_signal(model, x)] == [s.squared_mean for s in signals]


# --- ways to write a residual block ---


class Residual(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.conv, self.add = nn.Conv2d(4, 4, 3, padding=1), add

    def forward(self, x):
        return self.add(x, self.conv(F.relu(x)))


ADDITIONS = {
    "a + b": lambda x, y: x + y,
    "b + a": lambda x, y: y + x,
    "b += a": lambda x, y: y.__iadd__(x),
    "torch.add": torch.add,
    "torch.add, scaled": lambda x, y: torch.add(x, y, alpha=1),
    "add_": lambda x, y: y.add_(x),
    "addcmul": lambda x, y: torch.addcmul(x, y, torch.ones(1)),
}


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_additions(add):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(add), nn.Conv2d(4, 4, 1), Residual(add), nn.Flatten())
    x = torch.randn(2, 3, 9, 9)
    signals = trace_signal(model, x)
    with torch.no_grad():
        stem = model[0](x)
        branch = model[1].conv(F.relu(stem))
    assert [(s.name, s.transition) for s in signals] == [("stem", False), ("1", False), ("3", False)]
    assert_signal(signals[0], stem, None)
    assert_signal(signals[1], stem + branch, branch)


class Unusual(nn.Module):
    """Two residual sums in one module, gated by squeeze-excite, with sums that are no blocks inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.small = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + 0.1
        left, right = self.a(F.relu(x)).chunk(2, 1)
        left = self.small(left)
        out = torch.cat([left, self.small(left + right)], 1)  # Res2Net's sum, within the branch
        pooled = out.mean((2, 3), keepdim=True)
        out = out * torch.sigmoid(self.fc(pooled) + self.fc(2 * pooled))  # CBAM's sum
        self.first = x, out.clone()
        out += x
        self.second = out, self.b(F.relu(self.c(out)))
        return (self.second[0] + self.second[1]).mean((2, 3))


def test_unusual_sums():
    model = Unusual()
    signals = trace_signal(model, torch.randn(2, 3, 8, 8))
    assert [s.name for s in signals] == ["stem", "model:1", "model:2"]
    assert_signal(signals[0], model.first[0], None)
    assert_signal(signals[1], sum(model.first), model.first[1])
    assert_signal(signals[2], sum(model.second), model.second[1])


def test_half_precision_is_measured_in_float32():
    """Summed in bfloat16, a mean of 1000 values near 3 would be off by parts in a hundred."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(torch.add)).bfloat16()
    x = torch.randn(8, 3, 32, 32).bfloat16() + 3
    with torch.no_grad():
        assert_signal(trace_signal(model, x)[0], model[0](x), None)


# --- nothing is touched ---


def snapshot(model: nn.Module) -> list:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return [
        hooks,
        modes,
        torch.get_rng_state().tolist(),
        [v.double().sum().item() for v in model.state_dict().values()],
    ]


@pytest.mark.parametrize("training", [None, True, False])
def test_measuring_changes_nothing(training):
    for name in ("bn_resnet50", "nfnet_nano"):
        options = dict(width=(8, 8, 8, 8)) if name == "bn_resnet50" else {}
        model = normfree.create_model(name, drop_rate=0.5, **options)
        model.stages[1].eval()  # a mixture that must come back
        before = snapshot(model)
        table = normfree.signal_propagation(model, batch=2, px=32, training=training)
        assert snapshot(model) == before
        assert table.batch_statistics == (name == "bn_resnet50" and training is not False)
        assert all(p.grad is None for p in model.parameters())


def test_errors_leave_nothing_behind():
    model = normfree.create_model("bn_resnet50", width=(8, 8, 8, 8))
    before = snapshot(model)

    def fail(module, args, out):
        raise RuntimeError("on purpose")

    handle = model.head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        normfree.signal_propagation(model, batch=2, px=32)
    handle.remove()
    assert snapshot(model) == before


def test_stochastic_depth_counts_in_training_only():
    model = normfree.create_model("nfnet_nano", stochastic_depth=0.9)
    x = torch.randn(8, 3, 32, 32)
    still, moving = normfree.signal_propagation(model, x), normfree.signal_propagation(model, x, training=True)
    assert [b.branch_variance for b in still][:2] == [b.branch_variance for b in moving][:2]
    assert still.blocks[-1].variance != moving.blocks[-1].variance


@pytest.mark.parametrize("name", ["squeezenet1_1", "densenet121"])
def test_networks_without_residual_blocks(name):
    model = torchvision.models.get_model(name)
    with pytest.raises(InputError, match="has no residual block"):
        normfree.signal_propagation(model, batch=2, px=32)


# --- the table, the plot, the command ---


def test_noise_is_drawn_from_the_seed():
    model = normfree.create_model("nfnet_nano").eval()
    table = normfree.signal_propagation(model, batch=2, seed=3)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert list(table) == trace_signal(model, noise)
    assert table.input == "noise N(0, 1) of seed 3, 2 x 3 x 32 x 32"


def test_table_prints_and_converts():
    table = normfree.signal_propagation(normfree.create_model("nfnet_nano"), batch=2)
    lines = str(table).splitlines()
    assert lines[0].split() == ["block", "squared", "mean", "variance", "branch", "variance"]
    assert lines[1].split()[::3] == ["stem", "-"]
    assert lines[2].split()[:2] == ["stages.0.0", "*"]
    assert float(lines[2].split()[3]) == pytest.approx(table.blocks[1].variance, rel=1e-3)
    assert len({len(line) for line in lines[: len(table) + 1]}) == 1
    assert json.loads(table.to_json())["blocks"][1]["variance"] == table.blocks[1].variance
    other = normfree.signal_propagation(torchvision.models.resnet18(), batch=2, px=32)
    both = format_signals({"ours": table, "theirs": other}).splitlines()
    assert both[0].split() == ["ours", "theirs"]
    assert both[2].count("stem") == 2
    assert "statistics of the batch" in both[-1]


def test_example_in_the_docstring():
    results = doctest.testmod(importlib.import_module("normfree.analysis.signal"))
    assert (results.failed, results.attempted) == (0, 3)


def test_set_skip_gains():
    ours = normfree.create_model("nfnet_f0", width=(32, 32, 32, 32), group_width=16)
    assert set_skip_gains(ours, 0.5) == 12
    assert {p.item() for name, p in ours.named_parameters() if "skip_gain" in name} == {0.5}
    light = normfree.create_model("nfnet_l0", num_classes=2)
    assert set_skip_gains(light, 1.0) == 12
    assert all(block.conv2.gain.eq(1).all() for stage in light.stages for block in stage)
    resnet = timm.create_model("resnet18")
    assert set_skip_gains(resnet, 1.0) == 8
    assert set_skip_gains(torchvision.models.resnet18(), 1.0) == 0


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(tmp_path, suffix):
    net = normfree.create_model("nfnet_nano")
    tables = {"open": normfree.signal_propagation(net, batch=2)}
    set_skip_gains(net, 0.0)
    tables["closed"] = normfree.signal_propagation(net, batch=2)
    plot_signal(tables, tmp_path / f"a.{suffix}")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        for words in ("open", "closed", "squared mean", "branch variance", "first block of a stage"):
            assert f"<!-- {words} -->".encode() in data


def test_command(tmp_path, capsys, photos):
    args = ["--px", "32", "--batch", "4"]
    plot, numbers = tmp_path / "a.png", tmp_path / "a.json"
    main(["signal", "nfnet_nano", "timm:resnet18", *args, "--plot", str(plot), "--json", str(numbers)])
    out = capsys.readouterr().out
    assert "stages.2.0 *" in out
    assert "layer2.0 *" in out
    tables = json.loads(numbers.read_text())
    assert list(tables) == ["nfnet_nano", "timm:resnet18"]
    assert plot.stat().st_size > 10_000
    assert tables["timm:resnet18"]["blocks"][1]["branch_variance"] > 0.5  # its last gains start at 0

    model = normfree.create_model("nfnet_nano", num_classes=2, skip_init=0.0)
    normfree.save(model, tmp_path / "w.safetensors")
    weights = [str(tmp_path / "w.safetensors"), *args, "--data", str(photos), "--json", str(numbers)]
    main(["signal", *weights])
    (untouched,) = json.loads(numbers.read_text()).values()
    main(["signal", *weights, "--skip-gain", "1"])
    (opened,) = json.loads(numbers.read_text()).values()
    assert "4 x 3 x 32 x 32" in untouched["input"]
    stages = [[table["blocks"][i]["variance"] for i in (2, 3)] for table in (untouched, opened)]
    assert stages[0][0] == stages[0][1]  # the weights have closed branches: the block is the identity
    assert stages[1][0] < stages[1][1]


ERRORS = {
    "nfnet_f00": "did you mean 'nfnet_f0'",
    "torchvision:resnet51": "did you mean 'resnet50'",
    "timm:dm_nfnet_f9": "did you mean 'dm_nfnet_f",
    "timm:vit_tiny_patch16_224": "try another --px",
    "nfnet_nano --plot a.gif": ".png",
    "nfnet_nano --batch 0": "--batch 0: 1 to 65536",
    "torchvision:resnet18 --batch 1": "more than 1 value per channel",
    "torchvision:squeezenet1_1": "no residual block",
    "nfnet_nano --data nowhere": "nowhere: no such file or directory",
    "": "normfree signal MODEL",
}


@pytest.mark.parametrize("args", ERRORS)
def test_errors_are_one_line(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["signal", *args.split(), *(["--px", "32"] if args else [])])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert ERRORS[args] in err
    assert err.count("\n") == 1
