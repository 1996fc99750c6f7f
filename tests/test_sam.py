"""SAM against its definition, and with everything that it must work with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.errors import InputError
from normfree.optim import AGC, SAM, SGD_AGC, adaptive_clip_grad_, ascent_size

X = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(10) % 3


def build(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def loss(model, count=10, factor=1.0):
    x = X[:count].to(next(model.parameters()).dtype)
    return factor * F.cross_entropy(20 * model(x), Y[:count])


def reference_step(model, optimizer, rho, part, clip=None):
    """By the formula: gradients with autograd.grad, a second model for the point uphill."""
    grads = torch.autograd.grad(loss(model, part), list(model.parameters()))
    norm = torch.sqrt(sum((g**2).sum() for g in grads))
    uphill = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(uphill.parameters(), grads, strict=True):
            p += rho * g / norm
    for p, g in zip(model.parameters(), torch.autograd.grad(loss(uphill), list(uphill.parameters())), strict=True):
        p.grad = g
    if clip:
        adaptive_clip_grad_(model.parameters(), clip)
    optimizer.step()


@pytest.mark.parametrize("fraction", [0.2, 1.0])
@pytest.mark.parametrize("kind", ["sgd", "adamw with AGC", "sgd_agc"])
def test_steps_are_those_of_the_definition(kind, fraction):
    model, twin = build(), build()
    make = {
        "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "adamw with AGC": lambda params: torch.optim.AdamW(params, lr=0.01),
        "sgd_agc": lambda params: SGD_AGC(params, lr=0.1, clipping=0.05),
    }[kind]
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    if kind == "adamw with AGC":
        AGC(optimizer, clipping=0.05)
    sam, part = SAM(optimizer, rho=0.3), ascent_size(10, fraction)
    for _ in range(4):
        sam.step(lambda: loss(model, part).backward(), lambda: loss(model).backward())
        reference_step(twin, plain, 0.3, part, 0.05 if kind == "adamw with AGC" else None)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)
    plain_model = build()
    assert not torch.allclose(model[0].weight, plain_model[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_to_the_bit(dtype):
    """Adding and subtracting the ascent would leave rounding behind."""
    model = build(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.05)
    for _ in range(10):
        loss(model).backward()
        norm = sam.ascend()
        assert norm.isfinite()
        moved = torch.sqrt(
            sum((p.double() - q.double()).square().sum() for p, q in zip(model.parameters(), before, strict=True))
        )
        assert moved.item() == pytest.approx(0.05, rel=1e-3 if dtype == torch.float32 else 0.1)
        assert all(p.grad is None for p in model.parameters())
        loss(model).backward()
        sam.restore()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        sam.optimizer.zero_grad()


def test_micro_batches():
    model, twin = build(), build()
    sams = [SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3) for net in (model, twin)]
    sams[1].step(lambda: loss(twin).backward(), lambda: loss(twin).backward())

    def in_parts():
        for x, y in zip(X.double().split(5), Y.split(5), strict=True):
            (F.cross_entropy(20 * model(x), y) / 2).backward()

    sams[0].step(in_parts, in_parts)
    assert all(torch.allclose(p, q, rtol=1e-10) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_with_a_grad_scaler():
    model, twin = build(torch.float32), build(torch.float32)
    sam, plain = (SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3) for net in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for _ in range(3):
        sam.optimizer.zero_grad()
        scaler.scale(loss(model, 2)).backward()
        sam.ascend()
        scaler.scale(loss(model)).backward()
        sam.restore()
        scaler.step(sam.optimizer)
        scaler.update()
        plain.step(lambda: loss(twin, 2).backward(), lambda: loss(twin).backward())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    sam.optimizer.zero_grad()
    scaler.scale(loss(model, 2, factor=1e36)).backward()  # overflows
    sam.ascend()
    scaler.scale(loss(model)).backward()
    sam.restore()
    scaler.step(sam.optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_no_ascent_along_what_is_not_finite(bad):
    """The step is skipped, the scale goes down, and running statistics of a batch normalization stay finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    for spoilt in ("0.weight", "0.bias", None):
        sam.optimizer.zero_grad()
        scaler.scale(loss(model)).backward()
        if spoilt is not None:
            model.get_parameter(spoilt).grad.view(-1)[-1] = bad
        norm = sam.ascend()
        assert norm.isfinite() == (spoilt is None)
        climbed = not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert climbed == (spoilt is None)
        assert all(p.isfinite().all() for p in model.parameters())
        scaler.scale(loss(model)).backward()
        if spoilt == "0.bias":
            model[0].bias.grad = None  # then another one shows it
        sam.restore()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        shown = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert shown == {"0.weight": ["0.weight"], "0.bias": ["0.weight"], None: []}[spoilt]
        scale = scaler.get_scale()
        scaler.step(sam.optimizer)
        scaler.update()
        stepped = not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert stepped == (spoilt is None)
        assert scaler.get_scale() == (scale if spoilt is None else scale / 2)
        assert model[1].running_mean.isfinite().all()
        assert model[1].running_var.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e25])
def test_ascent_of_any_gradient_is_as_long_as_rho(scale):
    """Where there is one: of zeros there is none."""
    p, idle = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.ones(2))
    sam = SAM(torch.optim.SGD([p, idle], lr=0.1), rho=0.5)
    p.grad = torch.full((3, 4), scale)
    sam.ascend()
    assert p.norm().item() == pytest.approx(0.5 if scale else 0.0)
    assert torch.equal(idle, torch.ones(2))
    p.grad = torch.ones(3, 4)
    sam.restore()
    assert torch.equal(p.grad, torch.ones(3, 4))
    assert torch.equal(p, torch.zeros(3, 4))
    still = SAM(torch.optim.SGD([p], lr=0.1), rho=0.0)
    still.ascend()
    assert torch.equal(p, torch.zeros(3, 4))


def test_small_steps_in_float16():
    """ρ / ‖g‖ of scaled gradients is below what float16 can hold."""
    p = nn.Parameter(torch.zeros(40, 50, dtype=torch.float16))
    sam = SAM(torch.optim.SGD([p], lr=0.1), rho=0.05)
    p.grad = torch.full((40, 50), 5e4, dtype=torch.float16)
    sam.ascend()
    assert p.float().norm().item() == pytest.approx(0.05, rel=1e-3)


def test_sparse_gradients():
    words, dense = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4)
    dense.load_state_dict(words.state_dict())
    for net in (words, dense):

        def backward(net=net):
            net(torch.tensor([1, 2, 2, 5])).pow(3).sum().backward()

        SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.3).step(backward, backward)
    assert torch.allclose(words.weight, dense.weight, rtol=1e-6)


def test_wrong_order_and_ranges():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rho in (-1.0, float("nan")):
        with pytest.raises(InputError, match="rho"):
            SAM(optimizer, rho=rho)
    sam = SAM(optimizer)
    with pytest.raises(InputError, match="needs gradients"):
        sam.ascend()
    with pytest.raises(InputError, match=r"needs ascend\(\) first"):
        sam.restore()
    loss(model).backward()
    sam.ascend()
    with pytest.raises(InputError, match="twice"):
        sam.ascend()
    with pytest.raises(InputError, match=r"call restore\(\) before the optimizer's step"):
        optimizer.step()
    sam.restore()
    optimizer.step()
    model[0].bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        sam.step(lambda: loss(model).backward(), fail)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_ascent_size():
    assert [ascent_size(n) for n in (1, 4, 10, 32, 4096)] == [1, 1, 2, 7, 820]
    for fraction in (0.0, 1.5):
        with pytest.raises(InputError, match="fraction"):
            ascent_size(10, fraction)
