"""On a GPU the host waits for nothing in a step: shown on any machine with PyTorch's fake CUDA tensors.

They have devices and shapes but no values; whoever asks for a value, as `.item()`, `.tolist()`, `.cpu()`, `bool()` or a
mask as an index do, gets `DataDependentOutputException` or ends on the CPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.data import normalize
from normfree.engine.loop import _add_gradients, _Watch
from normfree.layers import WSConv, reuse_weights
from normfree.models import create_model
from normfree.optim import AGC, EMA, SAM, SGD_AGC, adaptive_clip_grad_, param_groups

MOMENTS = ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


class Watch(TorchDispatchMode):
    """Counts operations, and lists those that copy between device and host and wait until it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waits: list[str] = []
        self.work = 0  # calls that are for the device to carry out, rather than to view what is there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        self.work += func.namespace == "aten" and not func.is_view
        copies = func._schema.name == "aten::_to_copy"  # other operations take a number of the host without waiting
        if len({t.device for t in (out, *args) if isinstance(t, Tensor) and (t.ndim or copies)}) > 1:
            self.waits.append(func._schema.name)
        return out


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor)  # draws until all are in bounds
    with FakeTensorMode(), torch.device("cuda"):
        yield create_model("nfnet_f0", num_classes=10, width=(128, 128, 128, 128))


def give_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.empty_like(p)


def test_what_waits_is_seen(model):
    give_gradients(model)
    stats = adaptive_clip_grad_(model.parameters())
    for values in (1.0, [1.0, 2.0]):
        with Watch() as watch:
            torch.tensor(values, device="cpu").to("cuda")
        assert watch.waits
    with pytest.raises(DataDependentOutputException):
        _ = stats.clipped_fraction
    with Watch() as watch:
        stats.clipped.cpu()
    assert watch.waits


def test_forward_passes(model):
    pixels = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="cuda")
    with Watch() as watch:
        images = normalize(pixels, *MOMENTS)
        model(images)
        model.eval()(images)
        with reuse_weights(model), torch.no_grad():
            model(images)
    assert not watch.waits


def test_weights_of_one_length_are_standardized_together(model):
    lengths = [layer.weight[0].numel() for layer in model.modules() if isinstance(layer, WSConv)]
    with Watch() as watch, reuse_weights(model):
        pass
    assert watch.calls["aten::linalg_vector_norm"] == len(set(lengths)) < len(lengths) / 5
    assert not watch.waits


def test_the_authors_optimizer_with_the_average(model):
    optimizer, ema = SGD_AGC(param_groups(model), lr=0.1), EMA(model)
    give_gradients(model)
    optimizer.step(ema=ema, ema_step=0)  # makes the momenta
    for step in (1, 2):
        give_gradients(model)
        with Watch() as watch:
            optimizer.step(ema=ema, ema_step=step)
        assert not watch.waits, watch.waits
        assert optimizer.stats.clipped.device.type == optimizer.stats.max_ratio.device.type == "cuda"
    num_params = len(list(model.parameters()))
    batched = {name: count for name, count in watch.calls.items() if "_foreach_" in name}
    assert sum(batched.values()) < 30
    assert watch.calls["aten::linalg_vector_norm"] < 2 * num_params  # one for a weight, all vectors together
    assert watch.work < num_params


def test_an_update_that_may_be_held_back(model, monkeypatch):
    monkeypatch.setattr("normfree.optim.sgd.fused_sgd_", None)  # it needs a real device
    optimizer, ema = SGD_AGC(param_groups(model), lr=0.1), EMA(model)
    seen = _Watch(model, one_by_one=True)
    for step in range(2):
        give_gradients(model)
        with Watch() as watch:
            hold = seen.see(step, torch.empty((), device="cuda"), model.parameters())
            seen.restore()
            optimizer.step(ema=ema, ema_step=step, hold=hold)
    assert not watch.waits, watch.waits  # but for the momenta, which the first step makes
    assert hold.device.type == "cuda"
    with pytest.raises(DataDependentOutputException):
        seen.found()


@dataclass
class Mean:
    """A task of the loop, as far as gradients need one."""

    model: nn.Module

    def split(self, batch: Tensor, size: int) -> list[tuple[Tensor, float]]:
        return [(part, len(part) / len(batch)) for part in batch.split(size)]

    def loss(self, forward: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": forward(normalize(batch, *MOMENTS)).mean()}


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_loss_of_the_loop_is_added_up_on_the_device(model, micro_batch, monkeypatch):
    monkeypatch.setattr(Tensor, "backward", lambda self: None)  # which needs a real device
    pixels = torch.empty(4, 3, 64, 64, dtype=torch.uint8, device="cuda")
    with torch.device("cpu"), Watch() as watch:
        loss = _add_gradients(Mean(model), pixels, 4, micro_batch)["loss"]  # type: ignore
    assert not watch.waits
    assert loss.device.type == "cuda"


@pytest.mark.parametrize("units", ["channel", "tensor"])
def test_agc_before_another_optimizer(model, units):
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), foreach=True)
    AGC(optimizer, units=units)
    with Watch() as watch:
        for _ in range(2):
            give_gradients(model)
            optimizer.step()
    assert not watch.waits


def test_sam(model):
    optimizer = SGD_AGC(param_groups(model), lr=0.1)
    sam = SAM(optimizer, 0.05)
    with Watch() as watch:
        give_gradients(model)
        sam.ascend()
        give_gradients(model)
        sam.restore()
        optimizer.step()
    assert not watch.waits
