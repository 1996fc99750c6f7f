"""The native sweep against the batched operations and against the slow reference."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normfree.models import create_model
from normfree.native import FOLDER, library, status
from normfree.optim import EMA, SGD_AGC, adaptive_clip_grad_, param_groups
from normfree.optim import sweep as native
from normfree.optim.agc import adaptive_clip_reference_

pytestmark = pytest.mark.skipif(library() is None, reason=f"kernels {status()}")
SHAPES = [(), (1,), (7,), (5, 3), (1, 6), (6, 1), (4, 3, 2), (4, 3, 3, 3), (5, 1, 1, 1), (3, 2, 2, 2, 2), (40, 1100)]


def make(shapes, seed, weight_scale=1.0, grad_scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator) * weight_scale)
        p.grad = torch.randn(shape, generator=generator) * grad_scale
        params.append(p)
    return params


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    weights=st.sampled_from([0.0, 1e-5, 1.0, 1e4]),
    grads=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e8]),
    clipping=st.sampled_from([0.01, 0.16, 2.0]),
)
def test_clipping_is_the_reference(shapes, seed, weights, grads, clipping):
    fast, slow = make(shapes, seed, weights, grads), make(shapes, seed, weights, grads)
    stats = adaptive_clip_grad_(fast, clipping)
    for p, q, clipped, ratio in zip(fast, slow, stats.clipped, stats.ratios, strict=True):
        grad, weight = q.grad.double(), q.detach().double()
        mask = adaptive_clip_reference_(weight, grad, clipping)
        assert torch.allclose(p.grad.double(), grad, rtol=3e-7, atol=0)
        assert clipped.item() == mask.sum().item()
        assert ratio.isfinite()


def updates(use_native, monkeypatch, dtype=torch.float32, threads=2, steps=4, **options):
    """Parameters, momenta and averages of a network after some steps, and the statistics of each."""
    with monkeypatch.context() as patch:
        if not use_native:
            patch.setattr("normfree.optim.agc.library", lambda: None)
        torch.manual_seed(0)
        model = create_model("nfnet_nano", num_classes=5, width=(16, 24, 24, 40), group_width=8).to(dtype)
        model = model.to(memory_format=options.pop("memory_format", torch.contiguous_format))
        optimizer = SGD_AGC(param_groups(model, clipping=0.02), lr=0.1, **options)
        ema = EMA(model, decay=0.9)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        history = []
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.empty_like(p).copy_(0.1 * torch.randn(p.shape, generator=generator))
            optimizer.step(ema=ema, ema_step=step)
            history.append((optimizer.stats.clipped_fraction, optimizer.stats.max_ratio.item()))
        torch.set_num_threads(before)
        momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        return [p.detach() for p in model.parameters()], momenta, list(ema.shadow.values()), history


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"memory_format": torch.channels_last}])
def test_steps_are_those_of_batched_operations(options, monkeypatch):
    swept, plain = (updates(use, monkeypatch, **options) for use in (True, False))
    exact = updates(False, monkeypatch, torch.float64, **options)
    for mine, yours, truth in zip(swept[:3], plain[:3], exact[:3], strict=True):
        for a, b, c in zip(mine, yours, truth, strict=True):
            scale = c.abs().max()
            assert (a - b).abs().max() <= 1e-5 * scale
            assert (a - c).abs().max() <= 1e-5 * scale
    for a, b in zip(swept[3], plain[3], strict=True):
        assert a[0] == b[0] > 0
        assert a[1] == pytest.approx(b[1], rel=1e-5)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    one, two = (updates(True, monkeypatch, threads=threads) for threads in (1, 2))
    for a, b in zip(one[:3], two[:3], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.double(),
        lambda p: p.bfloat16(),
        lambda p: torch.randn(3, 4, 3, 3).transpose(0, 1),
    ],
)
def test_other_tensors_are_left_to_batched_operations(change, monkeypatch):
    p = nn.Parameter(change(torch.randn(4, 3, 3, 3)).clone(memory_format=torch.preserve_format))
    p.grad = torch.full_like(p, 3.0)
    assert not native.Item(p.detach(), p.grad, False, 0.01, 1e-3).fits
    reference = p.grad.clone()
    adaptive_clip_reference_(p.detach(), reference, 0.01)
    monkeypatch.setattr("normfree.optim.agc.sweep", lambda items: pytest.fail("was swept"))
    adaptive_clip_grad_(p, 0.01)
    assert torch.allclose(p.grad, reference)


def test_rows_of_the_sweep_are_the_struct_of_the_header():
    text = re.sub("//.*", "", (FOLDER / "kernels.h").read_text())
    fields = re.search(r"typedef struct \{(.*?)\} normfree_item;", text, re.DOTALL)[1].split(";")[:-1]
    size = {"float": 4, "int64_t": 8, "int32_t": 4, "double": 8}
    expected = [
        (name.strip(" *"), 8 if "*" in name else size[field.split()[0]])
        for field in fields
        for name in field.split(maxsplit=1)[1].split(",")
    ]
    assert [(name, native.ITEM[name].itemsize) for name in native.ITEM.names] == expected
    assert native.ITEM.itemsize == sum(size for _, size in expected)  # no padding
    offset = 0
    for name, size in expected:
        assert offset % size == 0, name  # nor in C
        offset += size


def test_it_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr("normfree.optim.agc.sweep", lambda items: calls.append(len(items)) or native.sweep(items))
    model = create_model("nfnet_nano", num_classes=5, width=(16, 24, 24, 40), group_width=8)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    SGD_AGC(param_groups(model), lr=0.1).step()
    assert calls == [len(list(model.parameters()))]
