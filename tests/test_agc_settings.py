"""Settings of AGC: what groups, arguments and saved states say, and what happens where they disagree."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from normfree.errors import InputError
from normfree.optim import AGC, SGD_AGC, adaptive_clip_grad_, param_groups


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Flatten(), nn.Linear(64, 2))


def roles(model: nn.Module, **options) -> list[dict]:
    return param_groups(model, classifier=model[3], **options)


def fill_gradients(model: nn.Module, size: float = 100.0) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, size)


def settings_of(optimizer: torch.optim.Optimizer, *keys: str) -> list[tuple]:
    return [tuple(group[key] for key in keys) for group in optimizer.param_groups]


# --- roles are the groups', numbers the optimizer's ---


def test_groups_say_no_more_than_roles_and_what_was_given():
    model = small()
    keys = [{key: group[key] for key in group if key != "params"} for group in roles(model)]
    assert keys == [{}, {"transposed": 1}, {"weight_decay": 0.0}, {"clipping": None}]
    assert {group["weight_decay"] for group in roles(model, weight_decay=0.1)} == {0.0, 0.1}
    assert {group["clipping"] for group in roles(model, clipping=0.5)} == {0.5, None}
    assert {group["clipping"] for group in roles(model, clipping=None)} == {None}


def test_arguments_of_the_optimizer_fill_the_groups():
    model = small()
    optimizer = torch.optim.AdamW(roles(model), weight_decay=0.3)
    AGC(optimizer, clipping=0.5, eps=0.25, units="tensor")
    assert settings_of(optimizer, "clipping", "weight_decay") == [(0.5, 0.3), (0.5, 0.3), (0.5, 0.0), (None, 0.3)]
    assert set(settings_of(optimizer, "clip_eps", "units")) == {(0.25, "tensor")}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}  # Adam's own
    optimizer = SGD_AGC(roles(model), lr=0.1, clipping=None, weight_decay=5e-4, eps=0.25)
    assert settings_of(optimizer, "clipping", "weight_decay") == [(None, 5e-4), (None, 5e-4), (None, 0.0), (None, 5e-4)]
    assert set(settings_of(optimizer, "clip_eps")) == {(0.25,)}
    fill_gradients(model)
    optimizer.step()
    assert optimizer.stats.params == ()
    fill_gradients(model)
    adaptive_clip_grad_(roles(model), clipping=0.5, eps=1e3)
    assert model[0].bias.grad.norm().item() == pytest.approx(200.0)  # of 4 times 100, and the limit is 500
    adaptive_clip_grad_(roles(model), clipping=0.1, eps=1e3)
    assert model[0].bias.grad.norm().item() == pytest.approx(100.0)


def test_defaults_are_the_papers():
    model = small()
    optimizer = SGD_AGC(roles(model), lr=0.1)
    assert settings_of(optimizer, "clipping", "weight_decay", "clip_eps") == [
        (0.01, 2e-5, 1e-3),
        (0.01, 2e-5, 1e-3),
        (0.01, 0.0, 1e-3),
        (None, 2e-5, 1e-3),
    ]
    with io.BytesIO() as file:  # a state holds plain numbers
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: AGC(torch.optim.AdamW(roles(m, clipping=0.01)), clipping=0.5), "clipping 0.5 .* 0.01"),
        (
            lambda m: AGC(torch.optim.AdamW(roles(m, clipping=None)), clipping=0.5),
            "clipping 0.5 .* None, which exempts",
        ),
        (lambda m: SGD_AGC(roles(m, clipping=0.01), lr=0.1, clipping=None), "clipping None .* 0.01"),
        (lambda m: SGD_AGC(roles(m, clipping=0.02), lr=0.1, clipping=0.01), "clipping 0.01 .* 0.02"),
        (lambda m: SGD_AGC(roles(m, weight_decay=0.01), lr=0.1, weight_decay=0.5), "weight_decay 0.5 .* 0.01"),
        (lambda m: SGD_AGC(roles(m, weight_decay=0.0), lr=0.1, weight_decay=0.5), "weight_decay 0.5 .* 0.0"),
        (lambda m: SGD_AGC([{"params": m.parameters(), "clip_eps": 0.1}], lr=0.1, eps=0.2), "clip_eps 0.2 .* 0.1"),
        (lambda m: AGC(torch.optim.SGD([{"params": m.parameters(), "units": "tensor"}]), units="channel"), "units"),
        (lambda m: adaptive_clip_grad_(roles(m, clipping=0.01), clipping=0.5), "clipping 0.5 .* 0.01"),
        (lambda m: adaptive_clip_grad_([{"params": m.parameters(), "units": "tensor"}], units="channel"), "units"),
    ],
)
def test_two_values_are_an_error(build, message):
    with pytest.raises(InputError, match=message):
        build(small())


def test_equal_values_and_groups_by_hand():
    """An argument serves the groups that do not say; one that says the same is no contradiction."""
    model = small()
    for clipping in (0.5, None):
        AGC(torch.optim.SGD(roles(model, clipping=clipping)), clipping=clipping)
        SGD_AGC(roles(model, clipping=clipping), lr=0.1, clipping=clipping)
    groups = [{"params": model[0].parameters(), "clipping": 0.1}, {"params": model[3].parameters()}]
    optimizer = SGD_AGC(groups, lr=0.1, clipping=0.5)
    assert settings_of(optimizer, "clipping") == [(0.1,), (0.5,)]
    optimizer.add_param_group({"params": model[1].parameters(), "clipping": 0.3})
    assert settings_of(optimizer, "clipping") == [(0.1,), (0.5,), (0.3,)]
    vectors = param_groups(nn.BatchNorm2d(3), classifier=None)
    assert settings_of(SGD_AGC(vectors, lr=0.1, weight_decay=0.1), "weight_decay") == [(0.0,)]
    assert "lr" not in vectors[0]  # the groups given are left as they are


def test_optimizers_clip_once():
    model = small()
    with pytest.raises(InputError, match="SGD_AGC already clips"):
        AGC(SGD_AGC(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters())
    agc = AGC(optimizer)
    with pytest.raises(InputError, match="already clips"):
        AGC(optimizer)
    agc.detach()
    AGC(optimizer, clipping=0.5)
    assert settings_of(optimizer, "clipping") == [(0.5,)]


@pytest.mark.parametrize("key", ["cliping", "clip", "clip_factor", "Clipping", "unit", "clip_ep", "transpose"])
def test_misspelt_keys(key):
    def groups():
        return [{"params": list(small().parameters()), key: 0.5}]

    for use in (adaptive_clip_grad_, lambda g: SGD_AGC(g, lr=0.1), lambda g: AGC(torch.optim.SGD(g))):
        with pytest.raises(InputError, match=f"key '{key}'; did you mean"):
            use(groups())


def test_other_keys_of_groups():
    """What users and schedulers keep there passes; what torch's SGD would obey and this one cannot is refused."""
    model = small()
    theirs = {"name": "body", "lr_scale": 0.5, "initial_lr": 0.1, "max_momentum": 0.95, "foreach": None}
    optimizer = SGD_AGC([{"params": model.parameters(), **theirs}], lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    fill_gradients(model)
    optimizer.step()
    AGC(torch.optim.SGD([{"params": model.parameters(), **theirs}]))
    for key in ("maximize", "dampening", "differentiable"):
        with pytest.raises(InputError, match=f"no {key}"):
            SGD_AGC([{"params": model.parameters(), key: True}], lr=0.1)
    bad = {"units": "rows", "clipping": -1.0, "clip_eps": float("inf"), "lr": float("nan"), "momentum": 1.0}
    for key, value in bad.items():
        with pytest.raises(InputError, match=key.removeprefix("clip_")):
            SGD_AGC([{"params": model.parameters(), key: value}], lr=0.1)
        good = SGD_AGC(model.parameters(), lr=0.1)
        good.param_groups[0][key] = value
        with pytest.raises(InputError, match=key.removeprefix("clip_")):
            good.step()
    for empty, error in (([], ValueError), ([{"params": set(model.parameters())}], TypeError)):
        with pytest.raises(error):  # torch's own
            SGD_AGC(empty, lr=0.1)
    optimizer = SGD_AGC(model[0].parameters(), lr=0.1)
    with pytest.raises(InputError, match="clipping"):
        optimizer.add_param_group({"params": model[3].parameters(), "clipping": 0})
    assert len(optimizer.param_groups) == 1


def test_eps_is_called_clip_eps_in_every_group():
    model = small()
    optimizer = SGD_AGC([{"params": model.parameters(), "eps": 0.5}], lr=0.1)  # the former name
    assert settings_of(optimizer, "clip_eps") == [(0.5,)]
    assert "eps" not in optimizer.param_groups[0]
    with pytest.raises(InputError, match="differ"):
        SGD_AGC([{"params": model.parameters(), "eps": 0.5, "clip_eps": 0.25}], lr=0.1)
    adams = torch.optim.AdamW([{"params": list(model.parameters())}]).param_groups
    assert settings_of(SGD_AGC(adams, lr=0.1), "clip_eps") == [(1e-3,)]
    zero = nn.Parameter(torch.zeros(3))
    zero.grad = torch.ones(3)
    adaptive_clip_grad_(SGD_AGC([zero], lr=0.1, clipping=0.1, eps=0.5).param_groups)
    assert zero.grad.norm().item() == pytest.approx(0.05)


def test_arguments_of_param_groups():
    model = small()
    with pytest.raises(InputError, match="takes the model"):
        param_groups(list(model.parameters()), classifier=model[3])
    with pytest.raises(InputError, match="given classifier, Flatten, has no weight"):
        param_groups(model, classifier=model[2])
    for options in ({"weight_decay": -1.0}, {"weight_decay": float("nan")}, {"weight_decay": None}, {"clipping": 0.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            roles(model, **options)
    one, listed = roles(model, exempt=model[0]), roles(model, exempt=[model[0]])
    assert [len(group["params"]) for group in one] == [len(group["params"]) for group in listed]
    with pytest.raises(InputError, match="exempt module str is not a layer"):
        roles(model, exempt=["0"])
    with pytest.raises(InputError, match="lazy layers"):
        param_groups(nn.Sequential(nn.LazyLinear(2)), classifier=None)
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(4, 2))
    assert param_groups(nested, classifier=None, exempt=nested[0])[-1]["clipping"] is None
    params = model.parameters()
    assert list(params)
    with pytest.raises(InputError, match="iterated only once"):
        adaptive_clip_grad_(params)
    fill_gradients(model)
    assert adaptive_clip_grad_([{"params": model[0].weight}]).units == (4,)  # a tensor is not taken for its rows
    with pytest.raises(InputError, match="transposed convolution of 3 groups"):
        adaptive_clip_grad_([{"params": [model[1].weight], "transposed": 3}])


# --- saved states ---


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    "make", [lambda groups: torch.optim.AdamW(groups), lambda groups: torch.optim.SGD(groups, 0.1)]
)
def test_states_written_without_agc(make):
    model, twin = small(), small()
    optimizer = make(roles(model))
    agc = AGC(optimizer, clipping=0.05, eps=0.01, units="tensor")
    plain = make([{"params": group["params"]} for group in roles(twin)])
    step(twin, plain)
    plain.param_groups[0]["lr"] = 0.75
    before = settings_of(optimizer, "clipping", "clip_eps", "units")
    optimizer.load_state_dict(plain.state_dict())
    assert settings_of(optimizer, "clipping", "clip_eps", "units") == before
    assert optimizer.param_groups[1]["transposed"] == 1
    assert optimizer.param_groups[0]["lr"] == 0.75
    fill_gradients(model)
    optimizer.step()
    assert (model[3].weight.grad == 100).all()
    assert agc.stats.clipped_fraction == 1
    agc.detach()
    assert not {"clip_eps", "units"} & set(optimizer.param_groups[0])
    plain.load_state_dict(
        torch.optim.AdamW(roles(twin)).state_dict() if "betas" in plain.defaults else plain.state_dict()
    )


def test_states_written_with_agc():
    """They win over the arguments, as a saved learning rate does; an optimizer without AGC carries them along."""
    model, twin = small(), small()
    saving, loading = torch.optim.AdamW(roles(model)), torch.optim.AdamW(roles(twin))
    AGC(saving, clipping=0.05)
    saving.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    step(model, saving)
    loading.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    loading.load_state_dict(saving.state_dict())
    step(twin, loading)
    AGC(loading)
    expected = [(0.05,), (0.05,), (0.05,), (None,), (0.05,)]
    assert settings_of(saving, "clipping") == settings_of(loading, "clipping") == expected
    with pytest.raises(ValueError, match="number of parameter groups"):
        loading.load_state_dict(torch.optim.AdamW(twin.parameters()).state_dict())


def test_states_of_torch_sgd():
    """The three next steps are those of SGD going on, since nothing is clipped."""
    model, twin = small(), small()
    plain = torch.optim.SGD([{"params": g["params"]} for g in roles(twin)], lr=0.1, momentum=0.8, nesterov=True)
    step(twin, plain)
    model.load_state_dict(twin.state_dict())
    optimizer = SGD_AGC(roles(model), lr=3.0, clipping=None, weight_decay=0.0, eps=0.25)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch would share the momenta
    assert set(settings_of(optimizer, "lr", "momentum", "clipping", "clip_eps")) == {(0.1, 0.8, None, 0.25)}
    for _ in range(3):
        step(model, optimizer)
        step(twin, plain)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    clipping = SGD_AGC(roles(model), lr=0.1)
    clipping.load_state_dict(plain.state_dict())
    assert settings_of(clipping, "clipping") == [(0.01,), (0.01,), (0.01,), (None,)]
    fill_gradients(model)
    clipping.step()
    assert clipping.stats.clipped_fraction == 1


def test_states_of_former_versions_and_without_momentum():
    model = small()
    optimizer = SGD_AGC(model.parameters(), lr=0.1, eps=0.25)
    step(model, optimizer)
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    group["eps"] = group.pop("clip_eps")
    other = SGD_AGC(small().parameters(), lr=0.2)
    other.load_state_dict(state)
    assert settings_of(other, "lr", "clip_eps") == [(0.1, 0.25)]
    for entry in state["state"].values():
        entry["momentum_buffer"] = None  # as SGD without momentum once wrote
    other.load_state_dict(state)
    step(small(), other)


def test_states_that_do_not_fit():
    model = small()
    optimizer = SGD_AGC(model.parameters(), lr=0.1)
    step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    adam = torch.optim.AdamW(model.parameters())
    step(model, adam)
    with pytest.raises(InputError, match="another optimizer, which keeps exp_avg"):
        optimizer.load_state_dict(adam.state_dict())
    for options in ({"dampening": 0.5, "momentum": 0.9}, {"maximize": True}):
        with pytest.raises(InputError, match=f"no {next(iter(options))}"):
            optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1, **options).state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][0]["momentum_buffer"] = torch.zeros(1, 3, 3, 3)
    with pytest.raises(InputError, match=r"momentum of \(1, 3, 3, 3\)"):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_clip(duplicate):
    model = small()
    for optimizer in (torch.optim.AdamW(roles(model)), SGD_AGC(roles(model), lr=0.1, clipping=0.05)):
        clipper = optimizer if isinstance(optimizer, SGD_AGC) else AGC(optimizer, clipping=0.05)
        step(model, optimizer)
        twin, agc = duplicate((model, clipper))
        copied = agc if isinstance(agc, SGD_AGC) else agc.optimizer
        assert copied is not optimizer
        fill_gradients(twin)
        copied.step()
        assert agc.stats.clipped_fraction == 1
        assert not torch.equal(twin[0].weight, model[0].weight)
        if isinstance(agc, AGC):
            agc.detach()
            fill_gradients(twin)
            copied.step()
            assert (twin[0].weight.grad == 100).all()
