"""AGC on every kind of layer, dtype and gradient, and in front of every kind of step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from torch import nn

from normfree.errors import InputError
from normfree.optim import AGC, adaptive_clip_grad_, param_groups

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 8, 2, groups=4), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), (3, 4)),
}


def slow_units(layer: nn.Module, p: torch.Tensor) -> list[torch.Tensor]:
    """The parts of a weight (or of its gradient `p`) that make one output channel each, by the layer's definition."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return list(p)
    per_group = layer.in_channels // layer.groups
    return [p[g * per_group : (g + 1) * per_group, c] for g in range(layer.groups) for c in range(p.shape[1])]


def gradients(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(0, 30, out.numel()).view_as(out)).sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_units_are_output_channels(name):
    """Each channel by itself, in float64, against a loop; about half of them are above the limit."""
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(LAYERS[name][0]).double(), LAYERS[name][1]
    gradients(layer, torch.randn(shape, dtype=torch.float64))
    grads = slow_units(layer, layer.weight.grad)
    weights = slow_units(layer, layer.weight.detach())
    ratios = sorted(g.norm().item() / w.norm().item() for g, w in zip(grads, weights, strict=True))
    clipping = (ratios[len(ratios) // 2 - 1] + ratios[len(ratios) // 2]) / 2
    expected = [g * min(1.0, clipping * w.norm().item() / g.norm().item()) for g, w in zip(grads, weights, strict=True)]
    stats = adaptive_clip_grad_(param_groups(layer, clipping=clipping, classifier=None))
    for got, want in zip(slow_units(layer, layer.weight.grad), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-12)
    weight = next(i for i, p in enumerate(stats.params) if p is layer.weight)
    assert stats.units[weight] == len(expected)
    assert stats.clipped[weight].item() == len(expected) - len(expected) // 2
    assert stats.ratios[weight].item() == pytest.approx(ratios[-1])


def test_embeddings_and_attention():
    """A row of an embedding is a unit, and so is one of each projection of attention."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "attention": nn.MultiheadAttention(4, 2, batch_first=True)})
    x = model["words"](torch.tensor([[1, 2, 2, 5]]))
    model["attention"](x, x, x)[0].mul(torch.randn(1, 4, 4)).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    adaptive_clip_grad_(param_groups(model, clipping=0.1, classifier=None))
    for name in ("words.weight", "attention.in_proj_weight", "attention.out_proj.weight"):
        p = model.get_parameter(name)
        for row, old, weight in zip(p.grad, before[name], p.detach(), strict=True):
            factor = min(1.0, 0.1 * weight.norm().item() / max(old.norm().item(), 1e-12))
            assert torch.allclose(row, old * factor, rtol=1e-5, atol=1e-12)
    assert not torch.equal(model.get_parameter("words.weight").grad, before["words.weight"])


def test_per_tensor_mode():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    gradients(layer, torch.randn(4, 5))
    before = layer.weight.grad.clone()
    stats = adaptive_clip_grad_(layer.parameters(), 0.3, units="tensor")
    expected = before * (0.3 * layer.weight.detach().norm() / before.norm())
    assert torch.allclose(layer.weight.grad, expected, rtol=1e-6)
    assert (stats.units, stats.num_units) == ((1, 1), 2)
    with pytest.raises(InputError, match="units 'rows': channel or tensor"):
        adaptive_clip_grad_(layer.parameters(), units="rows")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """Norms above 65504 and sums of squares below 6e-8 are what they are in float32."""
    torch.manual_seed(0)
    big, small = nn.Parameter(torch.randn(4, 300).to(dtype)), nn.Parameter(torch.randn(4, 300).to(dtype))
    big.grad, small.grad = (torch.randn(4, 300) * 1e4).to(dtype), (torch.randn(4, 300) * 1e-6).to(dtype)
    old_big, old_small = big.grad.double(), small.grad.clone()
    stats = adaptive_clip_grad_([big, small], 0.1)
    limits = 0.1 * big.detach().double().norm(dim=1, keepdim=True)
    expected = old_big * (limits / old_big.norm(dim=1, keepdim=True))
    assert relative_error(big.grad.double(), expected) < 2 * torch.finfo(dtype).eps
    assert torch.equal(small.grad, old_small)
    assert stats.ratios.isfinite().all()
    assert stats.clipped.tolist() == [4, 0]


def test_mixed_dtypes_in_one_group_and_complex():
    params = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    for p in params:
        p.grad = torch.full_like(p, 100.0)
    adaptive_clip_grad_(params, 0.01)
    for p in params:
        assert p.grad.dtype == p.dtype
        assert torch.allclose(p.grad.double(), torch.full((3, 2), 0.01, dtype=torch.float64), rtol=1e-2)
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(InputError, match="complex"):
        adaptive_clip_grad_(p)


def test_sparse_gradients():
    """Of an embedding: the rows that were looked up, each once however often it was."""
    torch.manual_seed(0)
    sparse, dense = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4)
    dense.load_state_dict(sparse.state_dict())
    for layer in (sparse, dense):
        layer(torch.tensor([1, 2, 2, 5])).mul(torch.arange(4.0)).sum().backward()
        stats = adaptive_clip_grad_(layer.parameters(), 0.01)
        assert stats.clipped.tolist() == [3]
    assert torch.allclose(sparse.weight.grad.to_dense(), dense.weight.grad)
    torch.optim.SGD(sparse.parameters(), lr=0.1).step()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_and_is_reported(bad):
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.tensor([[bad, 1.0, 1.0], [9.0, 9.0, 9.0]])
    stats = adaptive_clip_grad_(p, 0.01)
    assert not p.grad[0, 0].isfinite()
    assert p.grad[0, 1:].tolist() == [1.0, 1.0]
    assert p.grad[1].norm().item() == pytest.approx(0.01 * 3**0.5)
    assert not stats.max_ratio.isfinite()


def test_exemption_by_identity():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    groups = param_groups(model, classifier=model[2], exempt=[model[0]])
    free = {id(p) for g in groups if g.get("clipping", "?") is None for p in g["params"]}
    assert free == {id(p) for p in (*model[0].parameters(), model[2].weight)}
    assert {g["weight_decay"] for g in groups if any(p is model[0].bias for p in g["params"])} == {0.0}
    with pytest.raises(InputError, match="exempt module Linear is not a layer of the model"):
        param_groups(model, classifier=None, exempt=[nn.Linear(1, 1)])
    with pytest.raises(InputError, match="exempt module Flatten has no trainable parameters"):
        param_groups(model, classifier=None, exempt=[model[1]])
    with pytest.raises(InputError, match=r"pass model.parameters\(\)"):
        adaptive_clip_grad_(model)


def test_flat_parameters_of_fsdp1_are_refused():
    """The mark that FSDP1 puts on its parameters, with and without use_orig_params."""
    from torch.distributed.fsdp import _common_utils

    p = nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    _common_utils._set_fsdp_flattened(p)
    with pytest.raises(InputError, match="FSDP2"):
        adaptive_clip_grad_(p)


# --- in front of a step ---

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "sgd_foreach": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
    "muon": lambda groups: torch.optim.Muon(groups, lr=0.01),
}


def two(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8, bias=name != "muon"), nn.GELU(), nn.Linear(8, 3, bias=name != "muon")]
    model = nn.Sequential(*layers)
    return model, copy.deepcopy(model)


def backward(model: nn.Module, step: int, factor: float = 1.0) -> torch.Tensor:
    torch.manual_seed(step)
    model.zero_grad()
    loss = F.cross_entropy(30 * model(torch.randn(5, 6)), torch.tensor([0, 1, 2, 0, 1]))
    (loss * factor).backward()
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_on_clipped_gradients(name):
    model, twin = two(name)
    optimizer, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    agc = AGC(optimizer, clipping=0.03)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    twin_scheduler = torch.optim.lr_scheduler.StepLR(plain, 2)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        adaptive_clip_grad_(twin.parameters(), 0.03)
        plain.step()
        scheduler.step()
        twin_scheduler.step()
        assert agc.stats.clipped_fraction > 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "sgd_fused", "adamw", "adamw_fused"])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_scaled_gradients(name, unscale_first):
    """With a GradScaler as without one, also for fused optimizers, which are handed scaled gradients and the scale."""
    model, twin = two(name)
    optimizer, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    agc, twin_agc = AGC(optimizer, clipping=0.03), AGC(plain, clipping=0.03)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        model.zero_grad()
        scaled = scaler.scale(torch.ones(())).item()
        backward(model, step, scaled)
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        backward(twin, step)
        plain.step()
        assert agc.stats.clipped_fraction == twin_agc.stats.clipped_fraction > 0
        assert torch.allclose(agc.stats.ratios, twin_agc.stats.ratios, rtol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 5)
    next(iter(model.parameters())).grad[0, 0] = float("inf")
    scaler.step(optimizer)  # is skipped
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_closures_are_clipped_after_they_ran(how):
    model, twin = two("sgd")
    optimizer, plain = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    AGC(optimizer, clipping=0.03)
    for step in range(3):

        def closure(step=step):
            return backward(model, step)

        loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        expected = backward(twin, step)
        assert loss.item() == expected.item()
        adaptive_clip_grad_(twin.parameters(), 0.03)
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_settings_are_in_the_state_dict_and_go_when_detached():
    model, _ = two("adamw")
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    keys = [set(group) for group in optimizer.param_groups]
    agc = AGC(optimizer, clipping=0.03, eps=2e-3, units="tensor")
    saved = optimizer.state_dict()
    assert [(g["clipping"], g["clip_eps"], g["units"]) for g in saved["param_groups"]] == [(0.03, 2e-3, "tensor")] * 2
    other = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    attached = AGC(other)
    other.load_state_dict(saved)
    backward(model, 0)
    grads = [p.grad.clone() for p in model.parameters()]
    other.step()
    assert attached.stats.units == (1, 1, 1, 1)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    agc.detach()
    assert [set(group) for group in optimizer.param_groups] == keys
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    late = nn.Parameter(torch.ones(2))
    late.grad = torch.ones(2)
    other.add_param_group({"params": [late]})
    other.step()
    assert late.grad.norm().item() == pytest.approx(0.01 * 2**0.5)  # groups that come later get the arguments


def test_accumulated_gradients_are_clipped_once():
    """Four micro-batches and one step are one batch and one step."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    twin = copy.deepcopy(model)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    optimizer, plain = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin))
    AGC(optimizer, clipping=0.02)
    for part, labels in zip(x.split(2), y.split(2), strict=True):
        (F.cross_entropy(50 * model(part), labels) / 4).backward()
    optimizer.step()
    F.cross_entropy(50 * twin(x), y).backward()
    adaptive_clip_grad_(twin.parameters(), 0.02)
    plain.step()
    assert all(torch.allclose(p, q, rtol=1e-5) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
