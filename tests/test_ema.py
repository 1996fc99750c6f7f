"""The moving average in every precision, and after changes of the network that it follows."""

import copy
import pickle

import pytest
import torch
from torch import nn

from normfree.errors import InputError
from normfree.models import create_model
from normfree.optim import EMA, SGD_AGC


def move(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    exact = copy.deepcopy(model).double()
    ema, truth = EMA(model, 0.9999), EMA(exact, 0.9999)
    for average in (ema, truth):
        average.decay_at = lambda step: 0.9999  # as after a long warm-up
    move(model)
    move(exact)
    for step in range(500):
        ema.update(step)
        truth.update(step)
    for name, average in ema.state_dict().items():
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), truth.shadow[name], rtol=1e-3, atol=1e-3)  # the weights were rounded
    still_to_go = model[0].weight.float() - ema.shadow["0.weight"]
    assert still_to_go.abs().mean().item() == pytest.approx(0.9999**500, rel=1e-2)

    own = {name: t.clone() for name, t in model.state_dict().items()}
    objects = list(model.parameters())
    with ema.applied():
        for name, p in model.named_parameters():
            assert p.dtype == dtype
            assert torch.equal(p, ema.shadow[name].to(dtype))
        model.eval()(torch.ones(1, 3, dtype=dtype))
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_that_average_are_steps_and_updates(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    twin = copy.deepcopy(model)
    emas = EMA(model, 0.9), EMA(twin, 0.9)
    optimizers = [SGD_AGC(net.parameters(), lr=0.1) for net in (model, twin)]
    for step in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizers[0].step(ema=emas[0], ema_step=step)
        optimizers[1].step()
        emas[1].update(step)
    for a, b in zip(emas[0].shadow.values(), emas[1].shadow.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for options in ({"ema": emas[0]}, {"ema_step": 3}):
        with pytest.raises(InputError, match="must be given together"):
            optimizers[0].step(**options)


def test_integers_and_complex_numbers():
    model = nn.BatchNorm1d(2)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    model.register_parameter("quantized", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    ema = EMA(model, 0.9)
    assert set(ema.shadow) == {"weight", "bias", "running_mean", "running_var", "phase"}
    model.phase += 1j
    model.num_batches_tracked += 3
    ema.update(0)
    with ema.applied():
        assert torch.allclose(model.phase, torch.full((2,), 0.9j))
        assert model.num_batches_tracked == 3
    assert torch.equal(model.phase, torch.full((2,), 1j))


def follows(ema: EMA, model: nn.Module) -> bool:
    """Whether every average goes nine tenths of the way to its parameter of today, which has moved."""
    before = {name: average.double() for name, average in ema.shadow.items()}
    move(model, 4.0)
    ema.update(0)
    return all(
        torch.allclose(ema.shadow[name].double(), before[name].lerp(p.double(), 0.9), rtol=1e-5, atol=1e-5)
        for name, p in model.named_parameters()
    )


CHANGES = {
    "assigned": lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}, assign=True),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(4, 3))),
    "module": lambda m: m.__setitem__(1, nn.Linear(4, 2)),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "there and back": lambda m: m.half().float(),
    "data": lambda m: m[0].weight.__setattr__("data", torch.randn(4, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_what_is_replaced(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = EMA(model, 0.5)
    assert follows(ema, model)
    CHANGES[change](model)
    assert follows(ema, model)
    own = [p.detach().clone() for p in model.parameters()]
    with ema.applied():
        for name, p in model.named_parameters():
            assert torch.equal(p, ema.shadow[name].to(p.dtype))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), own, strict=True))


def test_it_follows_a_network_to_another_device():
    """The meta device stands for any: torch checks that tensors of one operation are on one."""
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.5)
    model.to("meta")
    ema.update(0)
    assert {average.device.type for average in ema.shadow.values()} == {"meta"}


def test_other_parameters_are_refused():
    model = create_model("nfnet_nano", num_classes=4, width=(16, 24, 24, 40), group_width=8)
    ema = EMA(model)
    model.reset_classifier(3)
    for _ in range(2):
        with pytest.raises(InputError, match=r"head.fc.bias is \(3,.*, in this average \(4,.*: make a new EMA"):
            ema.update(0)
    with pytest.raises(InputError, match="make a new EMA"), ema.applied():
        pytest.fail("was applied")
    with pytest.raises(InputError, match="make a new EMA"):
        SGD_AGC(model.parameters(), lr=0.1).step(ema=ema, ema_step=0)
    EMA(model).update(0)

    layer = nn.Sequential(nn.Linear(3, 2))
    ema = EMA(layer)
    layer.add_module("new", nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"new\.bias is .*, in this average missing: make a new EMA"):
        ema.update(0)
    del layer.new
    ema.update(0)
    torch.nn.utils.parametrizations.weight_norm(layer[0])
    with pytest.raises(InputError, match="make a new EMA"):
        ema.update(0)
    layer = nn.Linear(3, 2)
    ema = EMA(layer)
    layer.weight.data = torch.zeros(2, 1)
    with pytest.raises(InputError, match=r"weight is \(2, 1\)"):
        ema.update(0)


def test_states_that_do_not_fit():
    ema = EMA(nn.Linear(3, 2))
    before = {name: average.clone() for name, average in ema.shadow.items()}
    state = dict(EMA(nn.Linear(3, 2)).state_dict())
    for change, message in [
        ({"weight": torch.zeros(1, 3)}, r"weight is \(1, 3\) float, in this average \(2, 3\)"),
        ({"bias": torch.zeros(())}, r"bias is \(\)"),
        ({"weight": torch.zeros(2, 3, dtype=torch.int64)}, "int64"),
        ({"weight": torch.zeros(2, 3, dtype=torch.complex64)}, "complex"),
        ({"weight": 1.0}, "weight is float"),
        ({"other": torch.zeros(1)}, "other is .*, in this average missing"),
    ]:
        with pytest.raises(InputError, match=message):
            ema.load_state_dict(state | change)
    with pytest.raises(InputError, match="bias is missing"):
        ema.load_state_dict({"weight": state["weight"]})
    assert all(torch.equal(average, before[name]) for name, average in ema.shadow.items())
    ema.load_state_dict({name: average.bfloat16() for name, average in state.items()})  # of a former version
    assert all(torch.equal(ema.shadow[name], average.bfloat16().float()) for name, average in state.items())


def test_inside_applied():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.5)
    move(model)
    ema.update(0)
    state = {name: average.clone() for name, average in ema.state_dict().items()}
    own = model.weight.detach().clone()
    with ema.applied():
        assert all(torch.equal(average, state[name]) for name, average in ema.state_dict().items())
        for use in (lambda: ema.update(1), lambda: ema.applied().__enter__()):
            with pytest.raises(InputError, match="inside applied"):
                use()
    assert torch.equal(model.weight, own)
    with pytest.raises(InputError, match="step -1"):
        ema.update(-1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_follow_the_copy(duplicate):
    model = nn.Linear(3, 2)
    twin, ema = duplicate((model, EMA(model, 0.5)))
    assert follows(ema, twin)
