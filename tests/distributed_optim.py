"""Run by torchrun from test_distributed.py: optimizers on several ranks against one process, on every rank.

torchrun --nproc-per-node 4 tests/distributed_optim.py
"""

import copy
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from normfree.models import create_model
from normfree.optim import AGC, EMA, SAM, SGD_AGC, adaptive_clip_grad_, param_groups
from normfree.optim.shards import local

CLIPPING = 0.02


class Odd(nn.Module):
    """Sizes that no number of ranks divides, parameters with fewer rows than there are ranks, scalars."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.up = nn.ConvTranspose2d(5, 6, 2, groups=1)
        self.grouped_up = nn.ConvTranspose2d(6, 9, 2, groups=3)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.thin = nn.Conv2d(9, 1, 3)
        self.fc = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.thin(self.grouped_up(self.up(self.conv(x).relu())) * self.gain).flatten(1))

    def get_classifier(self) -> nn.Module:
        return self.fc


def data(step: int, count: int, px: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, px, px, generator=generator), torch.arange(count) % 5


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def compare(name: str, model: nn.Module, single: nn.Module, attribute: str, bound: float = 1e-5) -> None:
    for (key, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        got, want = (full(getattr(p, attribute)), getattr(q, attribute)) if attribute else (full(p), q)
        error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-12)
        assert error < bound, f"{name}: {key} differs by {error:.1e}"


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    (30 * F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)).backward()


def stats_of(optimizer, names: dict[Tensor, str]) -> dict[str, tuple]:
    s = optimizer.stats
    return {
        names[p]: (units, int(clipped), round(ratio, 5 - len(str(int(ratio)))))
        for p, units, clipped, ratio in zip(s.params, s.units, s.clipped.tolist(), s.ratios.tolist(), strict=True)
    }


def check(name: str, build, shard, px: int) -> None:
    """Three steps of SGD_AGC and of AGC(AdamW) on all ranks, each with its share of the batch, and on one alone.

    In float64, since the order of sums differs, and AdamW makes much of small differences.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    for kind in ("sgd_agc", "adamw"):
        torch.manual_seed(0)
        single = build().double()
        model = shard(copy.deepcopy(single))
        averages, optimizers = [EMA(net, decay=0.9) for net in (model, single)], []
        for net in (model, single):
            inner = net.module if isinstance(net, DistributedDataParallel) else net
            groups = param_groups(inner, clipping=CLIPPING)
            if kind == "sgd_agc":
                optimizers.append((SGD_AGC(groups, lr=0.05), None))
            else:
                optimizer = torch.optim.AdamW(groups, lr=1e-3)
                optimizers.append((optimizer, AGC(optimizer, clipping=CLIPPING)))
        for step in range(3):
            x, y = data(step, 2 * world, px)
            backward(model, x[rank * 2 : rank * 2 + 2], y[rank * 2 : rank * 2 + 2])
            backward(single, x, y)
            for (optimizer, _), ema in zip(optimizers, averages, strict=True):
                optimizer.step()
                ema.update(step)
            ours, theirs = (
                stats_of(agc or optimizer, {p: key.removeprefix("module.") for key, p in net.named_parameters()})
                for (optimizer, agc), net in zip(optimizers, (model, single), strict=True)
            )
            assert ours.keys() == theirs.keys()
            for key, (units, clipped, ratio) in theirs.items():
                assert ours[key][:2] == (units, clipped), f"{name}: {key} {ours[key]} {theirs[key]}"
                assert abs(ours[key][2] - ratio) <= 1e-3 * ratio, f"{name}: {key} {ours[key]} {theirs[key]}"
        assert any(clipped for _, clipped, _ in theirs.values())
        compare(f"{name}, {kind}", model, single, "", 1e-9)
        own = [full(p).clone() for p in model.parameters()]
        with averages[0].applied(), averages[1].applied():
            compare(f"{name}, EMA after {kind}", model, single, "", 1e-9)
            assert not all(torch.equal(full(p), q) for p, q in zip(model.parameters(), own, strict=True))
        assert all(torch.equal(full(p), q) for p, q in zip(model.parameters(), own, strict=True))


def check_exact(name: str, build, shard, px: int) -> None:
    """With the very same gradients: units that are whole on a rank get the same bits, split ones the same to 1e-6."""
    torch.manual_seed(0)
    single = build()
    model = shard(copy.deepcopy(single))
    backward(single, *data(0, 4, px))
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        if isinstance(p, DTensor):
            grad = q.grad.clone()
            p.grad = torch.distributed.tensor.distribute_tensor(grad, p.device_mesh, p.placements)
        else:
            p.grad = q.grad.clone()
    adaptive_clip_grad_(param_groups(model, clipping=CLIPPING))
    adaptive_clip_grad_(param_groups(single, clipping=CLIPPING))
    for (key, p), q in zip(model.named_parameters(), single.named_parameters(), strict=True):
        got, want = full(p.grad), q[1].grad
        if want.squeeze().ndim > 1 and "up" not in key:
            assert torch.equal(got, want), f"{name}: {key} is not the same to the bit"
        assert torch.allclose(got, want, rtol=1e-6, atol=0), f"{name}: {key}"
    compare(name, model, single, "grad", 1e-6)


def check_sam(name: str, build, shard, px: int) -> None:
    """Two steps of SAM and SGD_AGC; DDP ranks climb by their own gradients, sharded ones by the common one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    single = build().double()
    model = shard(copy.deepcopy(single))
    ddp = isinstance(model, DistributedDataParallel)
    groups = param_groups(model.module if ddp else model, clipping=CLIPPING)
    sam = SAM(SGD_AGC(groups, lr=0.05), rho=0.1)
    plain = SGD_AGC(param_groups(single, clipping=CLIPPING), lr=0.05)
    for step in range(2):
        x, y = data(step, 4 * world, px)
        mine = slice(rank * 4, rank * 4 + 4)
        before = [local(p).clone() for p in model.parameters()]
        with model.no_sync() if ddp else nullcontext():
            backward(model, x[mine][:2], y[mine][:2])
        sam.ascend()
        assert not all(torch.equal(local(p), q) for p, q in zip(model.parameters(), before, strict=True))
        backward(model, x[mine], y[mine])
        sam.restore()
        assert all(torch.equal(local(p), q) for p, q in zip(model.parameters(), before, strict=True))
        sam.optimizer.step()

        gradients = [torch.zeros_like(p) for p in single.parameters()]
        for r in range(world):  # what each rank does, one after the other
            uphill = copy.deepcopy(single)
            climb = SAM(torch.optim.SGD(uphill.parameters(), lr=0.0), rho=0.1)
            rows = torch.arange(4 * world).view(world, 4)[:, :2]
            rows = (rows[r] if ddp else rows).flatten()
            backward(uphill, x[rows], y[rows])
            climb.ascend()
            part = slice(r * 4, r * 4 + 4)
            backward(uphill, x[part], y[part])
            for total, p in zip(gradients, uphill.parameters(), strict=True):
                total += p.grad / world
        for p, g in zip(single.parameters(), gradients, strict=True):
            p.grad = g
        plain.step()
    compare(f"{name}, SAM", model, single, "", 1e-9)


def tiny() -> nn.Module:
    options = dict(width=(16, 24, 24, 40), group_width=8, stochastic_depth=0.0, drop_rate=0.0)
    return create_model("nfnet_nano", num_classes=5, **options)


def sharded(mesh, blocks: bool = False, rest: bool = True):
    """FSDP2, which takes no scalars: those, or without `rest` all but the stages, stay plain and are averaged."""

    def shard(model: nn.Module) -> nn.Module:
        scalars = {p for p in model.parameters() if p.ndim == 0}
        for block in model.stages.children() if blocks else ():
            fully_shard(block, mesh=mesh, ignored_params=scalars)
        if rest:
            fully_shard(model, mesh=mesh, ignored_params=scalars)
        for p in model.parameters():
            if not isinstance(p, DTensor):
                p.register_post_accumulate_grad_hook(average)
        return model

    return shard


def average(p: Tensor) -> None:
    dist.all_reduce(p.grad)
    p.grad /= dist.get_world_size()


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,))
    cases = {
        "ddp": (tiny, DistributedDataParallel, 24),
        "fsdp2": (tiny, sharded(flat, blocks=True), 24),
        "fsdp2 uneven": (Odd, sharded(flat), 4),
        "fsdp2 mixed with plain": (tiny, sharded(flat, blocks=True, rest=False), 24),
    }
    if world == 4:
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        cases = {"hsdp": (tiny, sharded(hybrid, blocks=True), 24), "hsdp uneven": (Odd, sharded(hybrid), 4)}
    for name, (build, shard, px) in cases.items():
        if name not in ("ddp", "fsdp2 mixed with plain"):
            check_exact(name, build, shard, px)
        check(name, build, shard, px)
        check_sam(name, build, shard, px)
        if dist.get_rank() == 0:
            print(f"{name}: equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
