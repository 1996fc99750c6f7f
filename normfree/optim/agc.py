"""Adaptive gradient clipping (paper section 4; released code: optim.py, agc_optax.py).

    for every unit i:   G_i <- G_i * min(1, λ * max(‖W_i‖, ε) / ‖G_i‖)

A unit is one output channel of a convolution or linear layer (dimension 0), one row of an embedding, or the whole of a
bias, gain or scalar. Norms of half-precision tensors are computed in float32. Sharded parameters (FSDP2, DTensor) give
the single-device result: one all-reduce serves all units that are split across ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normfree._compat import is_fsdp1_flat, step_pre_hooks
from normfree.errors import InputError
from normfree.native import library
from normfree.optim.groups import (
    CLIPPING_KEYS,
    Default,
    Units,
    as_groups,
    check_keys,
    clipping_settings,
    default_settings,
    fill_missing,
)
from normfree.optim.shards import by_groups, first_local_row, is_sharded, local, shard_groups
from normfree.optim.sweep import Item, sweep

MIN_GRADIENT_NORM = 1e-6  # in the divisor only, as in the released code


def is_vector(parameter: Tensor) -> bool:
    """Whether `parameter` is one unit, as the released code's squeeze implies: (), (C,), (C, 1, 1, 1), (1, C) ..."""
    return sum(size > 1 for size in parameter.shape) <= 1


def unitwise_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of each unit, broadcastable against `tensor`: (out, 1, ..., 1), or shape () for vectors."""
    dims = None if is_vector(tensor) else tuple(range(1, tensor.ndim))
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=dims is not None, dtype=at_least_float32(tensor.dtype))


def adaptive_clip_reference_(parameter: Tensor, grad: Tensor, clipping: float, eps: float = 1e-3) -> Tensor:
    """The rule for one tensor, written as in the paper. Clips `grad` in place; returns the mask of clipped units."""
    limit = clipping * unitwise_norm(parameter).clamp(min=eps)
    norm = unitwise_norm(grad)
    clipped = (norm > limit) & norm.isfinite()
    grad.copy_(torch.where(clipped, grad * (limit / norm.clamp(min=MIN_GRADIENT_NORM)), grad))
    return clipped


@dataclass(frozen=True)
class AGCStats:
    """Statistics of one clipping. Tensors stay on the device until a number is read from them.

    Attributes:
        params: the P parameters that had a gradient.
        units: number of units in each parameter.
        clipped: tensor (P,), number of clipped units in each parameter.
        ratios: tensor (P,), largest ‖G_i‖ / max(‖W_i‖, ε) before clipping; not finite if a gradient was not.
    """

    params: tuple[Tensor, ...] = ()
    units: tuple[int, ...] = ()
    clipped: Tensor = field(default_factory=lambda: torch.zeros(0))
    ratios: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def num_units(self) -> int:
        """Number of units in all parameters."""
        return sum(self.units)

    @property
    def clipped_fraction(self) -> float:
        """Share of all units that were clipped, in [0, 1]. Reading it waits for the device."""
        return self.clipped.sum().item() / self.num_units if self.params else 0.0

    @property
    def max_ratio(self) -> Tensor:
        """Scalar tensor, the largest of `ratios`; 0 without parameters."""
        return self.ratios.max() if self.params else torch.zeros(())


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over elements of `dtype`: in half precision they would overflow at 65504 or lose digits."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@dataclass(frozen=True)
class LocalParam:
    """This rank's part of a parameter and its gradient, its units, and how to clip them."""

    param: Tensor
    weight: Tensor
    grad: Tensor
    num_units: int  # of the whole parameter
    num_local: int  # on this rank
    whole: bool  # all of it is one unit; otherwise each index of dimension 0 is one
    clipping: float | None
    eps: float
    row_group: Tensor | None = None  # for transposed convolutions (in, out / groups, ...): the group of each row
    reduce_groups: tuple[Any, ...] = ()  # process groups whose ranks hold parts of the same units
    gather_groups: tuple[Any, ...] = ()  # process groups whose ranks hold different units

    def norms(self, t: Tensor) -> Tensor:
        """Norms of the units of `t`, which is the weight or the gradient: (num_local,)."""
        dtype = at_least_float32(t.dtype)
        if self.whole:
            return torch.linalg.vector_norm(t, dtype=dtype).view(1)
        if self.row_group is None:
            return torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), dtype=dtype)
        squares = torch.linalg.vector_norm(t.flatten(2), dim=2, dtype=dtype).square()
        sums = squares.new_zeros(self.num_local // t.shape[1], t.shape[1])
        return sums.index_add_(0, self.row_group, squares).sqrt().view(-1)

    def expand(self, factors: Tensor) -> Tensor:
        """Factors of the units, (num_local,), in a shape that broadcasts against the gradient."""
        ndim = self.grad.ndim
        if self.whole:
            return factors.view(())
        if self.row_group is None:
            return factors.view(-1, *[1] * (ndim - 1))
        rows = factors.view(-1, self.grad.shape[1])[self.row_group]
        return rows.view(*rows.shape, *[1] * (ndim - 2))

    def sweep_item(self, **update: Any) -> Item | None:
        """The arguments of the native sweep, with an optimizer update; None if it does not support this parameter."""
        if library() is None or (self.clipping is not None and (self.reduce_groups or self.row_group is not None)):
            return None
        item = Item(self.weight, self.grad, self.whole, self.clipping, self.eps, **update)
        return item if item.fits else None


def local_param(
    p: Tensor, clipping: float | None, eps: float, units: Units, transposed: int, dense: bool = False
) -> LocalParam:
    """Divides a parameter that has a gradient into units.

    `transposed` is the number of groups if `p` belongs to a transposed convolution, else 0. With `dense`, a sparse
    gradient is made dense.
    """
    grad = p.grad
    assert grad is not None
    if p.is_complex():
        raise InputError("adaptive gradient clipping does not take complex parameters: clip their real view")
    if is_fsdp1_flat(p):
        raise InputError("FSDP1's flat parameters hide the units: use FSDP2, torch.distributed.fsdp.fully_shard")
    whole = units == "tensor" or is_vector(p)
    num_units = 1 if whole else transposed * p.shape[1] if transposed else p.shape[0]
    weight, first_row, row_group, reduce, gather = p, 0, None, (), ()
    if is_sharded(p):
        weight, grad, first_row = local(p), local(grad), first_local_row(p)
        unit_dim = None if whole else 1 if transposed else 0
        reduce = tuple(group for group, dim in shard_groups(p) if dim != unit_dim)
        gather = tuple(group for group, dim in shard_groups(p) if dim == unit_dim)
    elif p.layout != torch.strided or grad.layout not in (torch.strided, torch.sparse_coo):
        raise InputError(f"a parameter of layout {p.layout} with a gradient of layout {grad.layout}: keep it dense")
    elif grad.is_sparse and (dense or grad.sparse_dim() > 1):
        p.grad = grad = grad.to_dense()
    elif grad.is_sparse:
        p.grad = grad = grad.coalesce()
        weight, grad = p if whole else p.index_select(0, grad.indices()[0]), grad.values()
    num_local = num_units if whole or transposed else len(weight)
    if transposed and not whole:
        if p.shape[0] % transposed or gather:
            allowed = "a multiple of that in dimension 0, the only one that may be sharded"
            raise InputError(f"a transposed convolution of {transposed} groups and shape {tuple(p.shape)}: {allowed}")
        row_group = torch.arange(first_row, first_row + len(weight), device=p.device) // (p.shape[0] // transposed)
    return LocalParam(p, weight, grad, num_units, num_local, whole, clipping, eps, row_group, reduce, gather)


# --- the rule, for many tensors at once ---


def _norms(params: Sequence[LocalParam], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms of the units of each tensor, as vectors. Tensors that are one unit take one batched call."""
    batches: dict[torch.dtype, list[Tensor]] = {}
    for p, t in zip(params, tensors, strict=True):
        if p.whole:
            batches.setdefault(t.dtype, []).append(t)
    norms = {dtype: iter(torch._foreach_norm(batch, dtype=at_least_float32(dtype))) for dtype, batch in batches.items()}
    return [next(norms[t.dtype]).view(1) if p.whole else p.norms(t) for p, t in zip(params, tensors, strict=True)]


def _reduce_norms(params: Sequence[LocalParam], norms: list[Tensor]) -> None:
    """Turns norms of parts of units into norms of units, with one all-reduce for each set of process groups."""
    for groups, indices in by_groups((p.reduce_groups, i) for i, p in enumerate(params) if p.reduce_groups).items():
        squares = torch.cat([norms[i] for i in indices]).square_()
        for group in groups:
            dist.all_reduce(squares, group=group)
        for i, norm in zip(indices, squares.sqrt_().split([len(norms[i]) for i in indices]), strict=True):
            norms[i] = norm


def _gather_stats(params: Sequence[LocalParam], stats: Tensor) -> None:
    """Combines counts (row 0) and largest ratios (row 1) of parameters whose units lie on several ranks, in place."""
    for groups, indices in by_groups((p.gather_groups, i) for i, p in enumerate(params) if p.gather_groups).items():
        for group in groups:
            mine = stats[:, indices].contiguous()
            gathered = mine.new_empty(2 * dist.get_world_size(group), len(indices))
            dist.all_gather_into_tensor(gathered, mine, group=group)
            gathered = gathered.view(-1, *mine.shape)
            stats[:, indices] = torch.stack([gathered[:, 0].sum(0), gathered[:, 1].amax(0)])


def _split(values: Tensor, sizes: list[int]) -> list[Tensor]:
    """Vectors of these sizes; a single 0 in place of an empty one, which has no maximum."""
    return [part if len(part) else values.new_zeros(1) for part in values.split(sizes)]


def _clip(params: Sequence[LocalParam], clipping: float, eps: float, grad_scale: Tensor | None) -> Tensor:
    """Clips the gradients of P parameters on one device; returns counts of clipped units and largest ratios, (2, P)."""
    grads = [p.grad for p in params]
    twice, tensors = [*params, *params], [p.weight for p in params] + grads
    norms = _norms(twice, tensors)
    if grads[0].device.type == "cpu" and not math.isfinite(torch.cat(norms).sum().item()):
        # Squares may overflow where norms do not. On other devices this check would make the host wait.
        norms = [p.norms(t.double()).to(norm.dtype) for p, t, norm in zip(twice, tensors, norms, strict=True)]
    _reduce_norms(twice, norms)
    weight_norms, grad_norms = torch.cat(norms[: len(params)]).clamp_(min=eps), torch.cat(norms[len(params) :])
    if grad_scale is not None:
        weight_norms = weight_norms * grad_scale.to(weight_norms.device)
    limits = weight_norms * clipping
    clipped = (grad_norms > limits) & grad_norms.isfinite()  # what is not finite is left so, for others to notice
    factors = torch.where(clipped, limits / grad_norms.clamp(min=MIN_GRADIENT_NORM), 1.0)
    sizes = [p.num_local for p in params]
    torch._foreach_mul_(grads, [p.expand(part) for p, part in zip(params, factors.split(sizes), strict=True)])
    # Sums and maxima over the units of a tensor are computed as norms: an index would have to be copied to the device.
    counts = torch._foreach_norm(_split(clipped.to(factors.dtype), sizes), 1)
    ratios = torch._foreach_norm(_split(grad_norms / weight_norms, sizes), math.inf)
    return torch.stack([torch.stack(counts), torch.stack(ratios)])


def clip_local_params_(
    params: Sequence[LocalParam], updates: Sequence[Mapping[str, Any]] = (), grad_scale: Tensor | None = None
) -> tuple[AGCStats, set[int]]:
    """Clips with the native sweep where it supports a parameter, else with batched operations.

    `updates` holds the optimizer update of each parameter, which the sweep applies in the same pass. Returns the
    statistics and the indices of the parameters that the sweep took, and thereby updated.
    """
    items: dict[int, Item] = {}
    batches: dict[tuple[float, float, str], list[int]] = {}
    for i, p in enumerate(params):
        item = p.sweep_item(**(updates[i] if updates else {})) if grad_scale is None else None
        if item is not None:
            items[i] = item
        elif p.clipping is not None:
            batches.setdefault((p.clipping, p.eps, str(p.param.device)), []).append(i)
    stats, order = [sweep(list(items.values()))] if items else [], list(items)
    for (clipping, eps, _), batch in sorted(batches.items()):  # the same order of collectives on all ranks
        stats.append(_clip([params[i] for i in batch], clipping, eps, grad_scale))
        order += batch
    columns = torch.cat([part.to(stats[-1].device) for part in stats], 1) if stats else torch.zeros(2, 0)
    clipped = [i for i, p in enumerate(params) if p.clipping is not None]
    if order != clipped:
        column = dict(zip(order, columns.unbind(1), strict=True))
        columns = torch.stack([column[i] for i in clipped], 1) if clipped else columns[:, :0]
    _gather_stats([params[i] for i in clipped], columns)
    num_units = tuple(params[i].num_units for i in clipped)
    return AGCStats(tuple(params[i].param for i in clipped), num_units, *columns), set(items)


@torch.no_grad()
def _clip_groups(groups: Iterable[Mapping[str, Any]], grad_scale: Tensor | None) -> AGCStats:
    """Clips the gradients of groups that have all settings."""
    settings = [(group["params"], clipping_settings(group)) for group in groups]
    members = [(p, own) for params, own in settings for p in params if own[0] is not None and p.grad is not None]
    return clip_local_params_([local_param(p, *own) for p, own in members], grad_scale=grad_scale)[0]


def adaptive_clip_grad_(
    params_or_groups: Tensor | Iterable[Tensor] | Iterable[Mapping[str, Any]],
    clipping: float | None = Default(0.01),
    eps: float = Default(1e-3),
    *,
    units: Units | None = None,
    grad_scale: Tensor | None = None,
) -> AGCStats:
    """Clips gradients in place, unit by unit. A counterpart of `torch.nn.utils.clip_grad_norm_`.

    Call it once per optimizer step, after gradients are summed over micro-batches and synchronised. With sharded
    parameters, call it on all ranks.

    Args:
        params_or_groups: parameters, or optimizer groups. A group may set `clipping` (None: not clipped), `clip_eps`,
            `units` and `transposed`; the arguments apply to groups that do not. `param_groups(model)` exempts the
            classifier's weight (paper 4.1) and marks transposed convolutions, which tensors alone do not reveal.
            Parameters without a gradient are skipped.
        clipping: λ > 0, the largest ratio of gradient norm to weight norm; 0.01 suits batches of 1024 to 4096.
        eps: ε > 0, a lower bound on the weight norm, which lets zero-initialised parameters move.
        units: "channel" as in the paper (the default), or "tensor", one norm for each parameter.
        grad_scale: scalar tensor, the loss scale that gradients still carry.

    Raises:
        InputError: λ, ε or units out of range, or given although all groups set others; a misspelt key in a group;
            complex parameters; flat parameters of FSDP1; sparse parameters (sparse gradients are fine).

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> adaptive_clip_grad_(layer.parameters(), clipping=0.01).clipped_fraction
        1.0
    """
    groups = as_groups(params_or_groups)
    settings = default_settings(groups, clipping, eps, units)
    for group in groups:
        check_keys(frozenset(group))
    return _clip_groups([settings | group for group in groups], grad_scale)


class AGC:
    """Clips gradients before each step of any torch optimizer.

        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> agc = AGC(optimizer, clipping=0.01)      # from now on optimizer.step() clips first
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> agc.stats.clipped_fraction               # of the last step
        1.0
        >>> agc.detach()                             # the optimizer as it was

    A group of the optimizer may set its own `clipping`, None to exempt it (see `param_groups`). The arguments fill the
    other groups as `clipping`, `clip_eps` and `units`, and the optimizer's `state_dict` keeps them. Loading a state
    without these keys leaves them unchanged. With a closure, the gradients that it computes are clipped. Any optimizer
    may be used with a GradScaler; for those that unscale gradients themselves, the limit is scaled instead. Copy or
    pickle the `AGC`, which holds the optimizer: a copy of a torch optimizer alone loses its hooks.

    Raises:
        InputError: λ, ε or units out of range, or given although all groups set others; a misspelt key in a group; an
            optimizer that already clips.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clipping: float | None = Default(0.01),
        eps: float = Default(1e-3),
        units: Units | None = None,
    ):
        self._settings = default_settings(optimizer.param_groups, clipping, eps, units)
        self.optimizer, self.stats = optimizer, AGCStats()
        self._added: set[tuple[int, str]] = set()  # (group, key) that came from here; loading a state replaces groups
        self._fill()
        self._attach()

    def _attach(self) -> None:
        hooks = step_pre_hooks(self.optimizer)
        if "clip_eps" in self.optimizer.defaults or any(isinstance(getattr(h, "__self__", None), AGC) for h in hooks):
            raise InputError(f"this {type(self.optimizer).__name__} already clips: detach() its AGC, if it has one")
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_load_state_dict_pre_hook(self._before_load),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def _fill(self) -> None:
        """Adds missing settings to the groups, also to those that `add_param_group` has added since."""
        for group in self.optimizer.param_groups:
            check_keys(frozenset(group).difference(self.optimizer.defaults))
        for number, group in enumerate(self.optimizer.param_groups):
            self._added |= {(number, key) for key in self._settings.keys() - group.keys()}
            group.update(self._settings | group)

    def _before_load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"param_groups": fill_missing(state["param_groups"], optimizer.param_groups, CLIPPING_KEYS)}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._clip()
            return None

        def clipped_closure() -> Any:
            loss = closure()
            self._clip()
            return loss

        options = {name: value for name, value in kwargs.items() if name != "closure"}
        return (optimizer, clipped_closure, *args[2:]), options

    def _clip(self) -> None:
        self._fill()
        grad_scale = getattr(self.optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
        self.stats = _clip_groups(self.optimizer.param_groups, grad_scale)

    def detach(self) -> None:
        """Removes the clipping and its settings from the optimizer."""
        for handle in self._handles:
            handle.remove()
        for number, key in self._added:
            self.optimizer.param_groups[number].pop(key, None)
