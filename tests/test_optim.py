"""AGC, SGD_AGC, EMA, groups and schedule against slow references."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normfree.errors import InputError
from normfree.models import create_model
from normfree.optim import AGC, EMA, SGD_AGC, adaptive_clip_grad_, param_groups, unitwise_norm, warmup_cosine
from normfree.optim.agc import adaptive_clip_reference_

SHAPES = [(), (1,), (7,), (5, 3), (1, 6), (6, 1), (4, 3, 2), (4, 3, 3, 3), (5, 1, 1, 1), (1, 1, 3, 3), (6, 2, 2, 2, 2)]


def make(shapes, seed, dtype=torch.float64, weight_scale=1.0, grad_scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) * weight_scale)
        p.grad = torch.randn(shape, generator=generator, dtype=dtype) * grad_scale
        params.append(p)
    return params


def units(t):
    """The units of a tensor as a list of flat tensors, by the released code's definition (squeeze, then ndim)."""
    if t.squeeze().ndim <= 1:
        return [t.reshape(-1)]
    return [row.reshape(-1) for row in t]


@pytest.mark.parametrize("shape", SHAPES)
def test_unitwise_norm(shape):
    t = torch.randn(shape, dtype=torch.float64)
    norm = unitwise_norm(t)
    expected = torch.stack([u.square().sum().sqrt() for u in units(t)])
    assert torch.allclose(norm.reshape(-1), expected)
    assert (t * norm).shape == t.shape
    assert norm.numel() == len(expected)


@settings(max_examples=60)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    weights=st.sampled_from([0.0, 1e-5, 1.0, 1e4]),
    grads=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e8]),
    clipping=st.sampled_from([0.01, 0.16, 2.0]),
)
def test_batched_clipping_is_the_reference(shapes, seed, weights, grads, clipping):
    fast, slow = (
        make(shapes, seed, weight_scale=weights, grad_scale=grads),
        make(shapes, seed, torch.float64, weights, grads),
    )
    stats = adaptive_clip_grad_(fast, clipping)
    masks = [adaptive_clip_reference_(p.detach(), p.grad, clipping) for p in slow]
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=0)
    assert stats.num_units == sum(m.numel() for m in masks)
    assert stats.clipped.tolist() == [m.sum().item() for m in masks]


@settings(max_examples=40)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 1000), clipping=st.sampled_from([0.01, 0.5]))
def test_no_unit_is_above_the_limit_and_none_is_turned(shape, seed, clipping):
    (p,) = make([shape], seed, grad_scale=3.0)
    before = p.grad.clone()
    adaptive_clip_grad_(p, clipping)
    for w, g, old in zip(units(p.detach()), units(p.grad), units(before), strict=True):
        limit = clipping * max(w.norm().item(), 1e-3)
        assert g.norm().item() <= limit * (1 + 1e-12)
        if old.norm().item() <= limit:
            assert torch.equal(g, old)
        else:
            assert torch.nn.functional.cosine_similarity(g, old, dim=0).item() == pytest.approx(1)
            assert g.norm().item() == pytest.approx(limit)


def test_zero_initialised_parameters_can_move():
    p = nn.Parameter(torch.zeros(()))
    p.grad = torch.tensor(5.0)
    adaptive_clip_grad_(p, 0.01)
    assert p.grad.item() == pytest.approx(1e-5)


def test_groups_missing_gradients_and_statistics():
    clipped, exempt, idle = make([(4, 3), (4, 3), (4, 3)], 0, grad_scale=100.0)
    idle.grad = None
    kept = exempt.grad.clone()
    groups = [{"params": [clipped, idle], "clipping": 0.1}, {"params": [exempt], "clipping": None}]
    ratio = (unitwise_norm(clipped.grad) / unitwise_norm(clipped.detach())).max().item()
    stats = adaptive_clip_grad_(groups)
    assert torch.equal(exempt.grad, kept)
    assert stats.num_units == 4
    assert stats.clipped_fraction == 1.0
    assert stats.max_ratio.item() == pytest.approx(ratio)
    assert adaptive_clip_grad_([idle]).clipped_fraction == 0.0
    assert (unitwise_norm(clipped.grad) / unitwise_norm(clipped.detach())).max().item() == pytest.approx(0.1)


@pytest.mark.parametrize("clipping", [0.0, -1.0, math.inf])
def test_impossible_clipping_is_refused(clipping):
    with pytest.raises(InputError, match="clipping"):
        adaptive_clip_grad_(make([(2,)], 0), clipping)
    with pytest.raises(InputError, match="clipping"):
        SGD_AGC(make([(2,)], 0), lr=0.1, clipping=clipping)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_agc_is_clip_then_torch_sgd(nesterov):
    """In float64 over ten steps, groups with decay, without, and unclipped."""
    ours, theirs = make(SHAPES, 1), make(SHAPES, 1)

    def groups(params):
        return [
            {"params": params[:5], "weight_decay": 0.1, "clipping": 0.05},
            {"params": params[5:8], "weight_decay": 0.0, "clipping": 0.05},
            {"params": params[8:], "weight_decay": 0.1, "clipping": None},
        ]

    a = SGD_AGC(groups(ours), lr=0.1, nesterov=nesterov)
    plain = [{k: v for k, v in g.items() if k != "clipping"} for g in groups(theirs)]
    b = torch.optim.SGD(plain, lr=0.1, momentum=0.9, nesterov=nesterov)
    for step in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        for q in theirs[:8]:
            adaptive_clip_reference_(q.detach(), q.grad, 0.05)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


def test_agc_before_any_torch_optimizer():
    model, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    optimizer, plain = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(twin.parameters())
    agc = AGC(optimizer, clipping=0.02)
    x = torch.randn(4, 5)
    for _ in range(3):
        for net, o in ((model, optimizer), (twin, plain)):
            o.zero_grad()
            net(x).square().sum().backward()
            if net is twin:
                adaptive_clip_grad_(twin.parameters(), 0.02)
            o.step()
        assert agc.stats.clipped_fraction == 1.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    agc.detach()
    model(x).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_agc_leaves_exempt_groups_of_the_optimizer_alone():
    model = create_model("nfnet_nano", num_classes=4)
    optimizer = torch.optim.SGD(param_groups(model, clipping=0.01), lr=0.1)
    AGC(optimizer, clipping=0.01)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    head = model.head.fc.weight
    before = head.grad.clone()
    optimizer.step()
    assert torch.equal(head.grad, before)


def test_param_groups_of_the_released_code():
    model = create_model("nfnet_nano", num_classes=10)
    names = {p: n for n, p in model.named_parameters()}
    weights, vectors, head = param_groups(model, weight_decay=2e-5, clipping=0.01)
    assert {names[p] for p in head["params"]} == {"head.fc.weight"}
    assert {names[p].split(".")[-1] for p in vectors["params"]} == {"gain", "bias", "skip_gain"}
    assert {names[p].split(".")[-1] for p in weights["params"]} == {"weight"}
    assert "head.fc.bias" in {names[p] for p in vectors["params"]}
    assert "stages.0.0.se.fc1.weight" in {names[p] for p in weights["params"]}
    options = [(g["weight_decay"], g["clipping"]) for g in (weights, vectors, head)]
    assert options == [(2e-5, 0.01), (0.0, 0.01), (2e-5, None)]
    assert sorted(map(id, names)) == sorted(id(p) for g in (weights, vectors, head) for p in g["params"])


def test_param_groups_of_other_models():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(InputError, match="pass classifier="):
        param_groups(model)
    groups = param_groups(model, classifier=model[2])
    assert groups[-1]["params"] == [model[2].weight]  # a head of one class is a weight all the same
    assert groups[-1]["clipping"] is None
    assert all("clipping" not in g for g in param_groups(model, classifier=None))
    with pytest.raises(InputError, match="not a layer of the model"):
        param_groups(model, classifier=nn.Linear(4, 1))
    model[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in param_groups(model, classifier=model[2])) == 2


def test_warmup_cosine_of_the_papers_recipe():
    """360 epochs at batch 4096: 112,602 steps, 5 epochs of warm-up, 1.6 at the top, 0 at the end."""
    options = dict(peak_lr=1.6, total_steps=112_602, warmup_steps=5 * 1_281_167 / 4096)
    assert warmup_cosine(0, **options) == 0.0
    assert warmup_cosine(782, **options) == pytest.approx(1.6 * 782 / 1563.9, rel=1e-4)
    assert warmup_cosine(1564, **options) == pytest.approx(1.6, rel=1e-6)
    assert warmup_cosine(57_083, **options) == pytest.approx(0.8, rel=1e-4)
    assert warmup_cosine(112_602, **options) == 0.0
    assert warmup_cosine(10, peak_lr=1.0, total_steps=10, final_lr=0.25) == 0.25
    with pytest.raises(InputError, match="step -1"):
        warmup_cosine(-1, **options)


def test_ema_is_the_recurrence():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    ema = EMA(model, decay=0.95)
    expected = [p.detach().clone() for p in model.parameters()]
    decays = []
    for step in range(200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(step)
        decays.append(min(0.95, (1 + step) / (10 + step)))
        expected = [
            decays[-1] * e + (1 - decays[-1]) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)
        ]
    assert (decays[0], decays[89], decays[-1]) == (0.1, 90 / 99, 0.95)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ema.shadow.values(), expected, strict=True))


def test_ema_applied_gives_the_weights_back():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    parameters = list(model.parameters())
    with torch.no_grad():
        for p in parameters:
            p.add_(1)
    own = [p.detach().clone() for p in parameters]
    average = [v.clone() for v in ema.shadow.values()]

    def fail_inside():
        with ema.applied():
            assert all(torch.equal(p, a) for p, a in zip(model.parameters(), average, strict=True))
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))
    assert list(model.parameters()) == parameters  # the same objects, as the optimizer needs
    other = EMA(nn.Linear(2, 2), decay=0.5)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.shadow.values(), average, strict=True))
    with pytest.raises(InputError, match="other parameters"):
        other.load_state_dict({"x": torch.zeros(1)})


def test_clipping_keeps_a_high_learning_rate_stable():
    """What AGC is for: at this rate plain SGD of the same network leaves the finite numbers."""

    def loss_after(clipping):
        torch.manual_seed(0)
        model = create_model("nfnet_nano", num_classes=4, stochastic_depth=0.0, drop_rate=0.0, width=(16, 32, 32, 32))
        optimizer = SGD_AGC(param_groups(model, clipping=clipping), lr=2.0)
        x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
        for _ in range(25):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert loss_after(0.01) < 3.0
    unclipped = loss_after(None)
    assert math.isnan(unclipped) or unclipped > 10.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["rows", "bag", "vector", "elements"])
def test_sparse_gradients_are_those_of_torch_sgd(kind, momentum):
    """Rows that were looked up move, in each of three steps others; earlier ones go on by their momentum."""
    torch.manual_seed(0)
    make = nn.EmbeddingBag if kind == "bag" else nn.Embedding
    model = make(10, 1 if kind == "vector" else 4, sparse=True)
    twin = copy.deepcopy(model)
    options = dict(momentum=momentum, nesterov=momentum > 0, weight_decay=0.0)
    optimizer = SGD_AGC(model.parameters(), lr=0.1, clipping=0.05, **options)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, **options)
    ema = EMA(model, 0.9)
    start, average = model.weight.detach().clone(), model.weight.detach().clone()
    for step in range(3):
        rows = torch.tensor([[7, 8, 8], [7, 7, 7], [2, 7, 2]][step])
        for net in (model, twin):
            net.zero_grad()
            net(rows.view(1, -1)).square().sum().backward()
            if kind == "elements":
                net.weight.grad = net.weight.grad.to_dense().to_sparse()
        adaptive_clip_grad_(twin.parameters(), 0.05)
        optimizer.step(ema=ema, ema_step=step)
        plain.step()
        average.lerp_(twin.weight.detach(), 1 - ema.decay_at(step))
        assert torch.allclose(model.weight, twin.weight, rtol=1e-6)
        assert torch.allclose(ema.shadow["weight"], average, rtol=1e-6)
        assert optimizer.stats.clipped.sum() > 0
    moved = (model.weight != start).any(1)
    assert moved.nonzero().flatten().tolist() == [2, 7, 8]


def test_sparse_gradients_that_cannot_be_obeyed():
    words, dense = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1).double()
    optimizer = SGD_AGC([{"params": dense.parameters()}, {"params": words.parameters()}], lr=0.1)
    before = copy.deepcopy([*words.parameters(), *dense.parameters()])
    dense(words(torch.tensor([7, 8])).double()).sum().backward()
    with pytest.raises(InputError, match="weight decay would move all rows"):
        optimizer.step()
    for p, old in zip((*words.parameters(), *dense.parameters()), before, strict=True):
        assert torch.equal(p, old)  # nothing was done by halves
    optimizer.param_groups[1]["weight_decay"] = 0.0
    optimizer.step()
    assert (words.weight != before[0]).any(1).nonzero().flatten().tolist() == [7, 8]
    p = nn.Parameter(torch.ones(3, 2).to_sparse())
    p.grad = torch.ones(3, 2).to_sparse()
    for use in (lambda: adaptive_clip_grad_([p]), SGD_AGC([p], lr=0.1, weight_decay=0.0).step):
        with pytest.raises(InputError, match=r"parameter of layout torch\.sparse_coo"):
            use()


def test_agc_before_sparse_adam():
    words, twin = nn.Embedding(10, 4, sparse=True), nn.Embedding(10, 4, sparse=True)
    twin.load_state_dict(words.state_dict())
    optimizer, plain = torch.optim.SparseAdam(words.parameters()), torch.optim.SparseAdam(twin.parameters())
    agc = AGC(optimizer, clipping=0.05)
    for net in (words, twin):
        (100 * net(torch.tensor([7, 8, 8]))).square().sum().backward()
    adaptive_clip_grad_(twin.parameters(), 0.05)
    optimizer.step()
    plain.step()
    assert torch.equal(words.weight, twin.weight)
    assert agc.stats.clipped.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_may_be_a_tensor(dtype):
    ours, theirs = make(SHAPES, 1, dtype), make(SHAPES, 1, dtype)
    rate = torch.tensor(0.5)
    a, b = SGD_AGC(ours, lr=rate, weight_decay=0.1), SGD_AGC(theirs, lr=0.5, weight_decay=0.1)
    for _ in range(2):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
        a.step()
        b.step()
        rate.fill_(0.25)  # as schedulers change it
        b.param_groups[0]["lr"] = 0.25
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("of_weights", "of_grads"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_gradients_of_another_dtype(of_weights, of_grads):
    """torch lets them differ by p.grad_dtype. As exact as its SGD: the decay is not rounded to the gradient's dtype."""
    ours, theirs = (nn.Parameter(torch.ones(4, 3, dtype=getattr(torch, of_weights))) for _ in range(2))
    options = dict(momentum=0.5, nesterov=True, weight_decay=1e-4)
    a, b = SGD_AGC([ours], lr=1.0, clipping=None, **options), torch.optim.SGD([theirs], lr=1.0, **options)
    for _ in range(2):
        for p in (ours, theirs):
            p.grad_dtype = getattr(torch, of_grads)
            p.grad = torch.full((4, 3), 0.25, dtype=p.grad_dtype)
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)
    for p in (ours, theirs):
        p.grad = torch.full((4, 3), 0.25, dtype=p.grad_dtype)
    assert adaptive_clip_grad_([ours], 1e-3).clipped.tolist() == [4]
    assert ours.grad.norm().item() == pytest.approx(2e-3 * ours.detach().float()[0].norm().item(), rel=1e-2)
