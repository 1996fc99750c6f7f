"""Adaptive gradient clipping (paper section 4; released code: optim.py, agc_optax.py).

    for every unit i:   G_i <- G_i * min(1, λ * max(‖W_i‖, ε) / ‖G_i‖)

A unit is one output channel of a convolution or linear layer (dimension 0), one row of an embedding, and the whole of
a bias, gain or scalar. Norms of half-precision tensors are taken in float32. Sharded parameters (FSDP2, DTensor) give
what they would give on one device: rows are whole on one rank, and what is not takes one all-reduce for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normfree.errors import InputError
from normfree.native import library
from normfree.optim.groups import (
    CLIPPING_KEYS,
    Default,
    Units,
    as_groups,
    check_names,
    clipping_of,
    keep_missing,
    settle,
)
from normfree.optim.sweep import Item, sweep

MIN_GRADIENT_NORM = 1e-6  # in the divisor only, as in the released code


def is_vector(parameter: Tensor) -> bool:
    """Whether AGC takes the whole of `parameter` as one unit: at most one dimension is longer than 1.

    So is a gain of shape (C, 1, 1, 1) as some libraries store it; the released code squeezes too.
    """
    return sum(size > 1 for size in parameter.shape) <= 1


def unitwise_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of each unit, broadcastable against `tensor`: (out, 1, ..., 1), or shape () for vectors."""
    if is_vector(tensor):
        return torch.linalg.vector_norm(tensor, dtype=wide(tensor.dtype))
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True, dtype=wide(tensor.dtype))


def adaptive_clip_reference_(parameter: Tensor, grad: Tensor, clipping: float, eps: float = 1e-3) -> Tensor:
    """The rule above, one tensor at a time and as it is written; returns the mask of clipped units."""
    limit = clipping * unitwise_norm(parameter).clamp(min=eps)
    norm = unitwise_norm(grad)
    clipped = (norm > limit) & norm.isfinite()
    grad.copy_(torch.where(clipped, grad * (limit / norm.clamp(min=MIN_GRADIENT_NORM)), grad))
    return clipped


@dataclass(frozen=True)
class AGCStats:
    """What one clipping did. Everything stays on the device until it is asked for as a number.

    Attributes:
        params: the P parameters that had a gradient.
        units: number of units of each of them.
        clipped: tensor (P,), how many of them were clipped.
        ratios: tensor (P,), the largest ‖G_i‖ / max(‖W_i‖, ε) before clipping; not finite if a gradient was not.
    """

    params: tuple[Tensor, ...] = ()
    units: tuple[int, ...] = ()
    clipped: Tensor = field(default_factory=lambda: torch.zeros(0))
    ratios: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def num_units(self) -> int:
        return sum(self.units)

    @property
    def clipped_fraction(self) -> float:
        """Share of all units that were clipped, in [0, 1]; waits for the device."""
        return self.clipped.sum().item() / self.num_units if self.params else 0.0

    @property
    def max_ratio(self) -> Tensor:
        """Tensor (), the largest of `ratios`, 0 without parameters."""
        return self.ratios.max() if self.params else torch.zeros(())


# --- how one tensor is cut into units ---


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which norms are summed: half precision would overflow at 65504, or lose digits."""
    return torch.float32 if dtype.itemsize < 4 else dtype


class _Whole:
    """One unit: vectors, scalars, and every tensor where units are tensors."""

    size = 1

    def norms(self, tensor: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tensor, dtype=wide(tensor.dtype)).view(1)

    def spread(self, factors: Tensor, ndim: int) -> Tensor:
        return factors.view(())


class _Rows:
    """A unit for each index of dimension 0: weights of convolutions, of linear layers, of embeddings."""

    def __init__(self, size: int):
        self.size = size

    def norms(self, tensor: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), dtype=wide(tensor.dtype))

    def spread(self, factors: Tensor, ndim: int) -> Tensor:
        return factors.view(-1, *[1] * (ndim - 1))


class _Transposed:
    """Transposed convolutions, weight (in, out / groups, ...): input row r of this rank belongs to group `group[r]`."""

    def __init__(self, group: Tensor, groups: int, columns: int):
        self.group, self.groups, self.columns, self.size = group, groups, columns, groups * columns

    def norms(self, tensor: Tensor) -> Tensor:
        rows = torch.linalg.vector_norm(tensor.flatten(2), dim=2, dtype=wide(tensor.dtype))
        return rows.new_zeros(self.groups, self.columns).index_add_(0, self.group, rows.square()).sqrt().view(-1)

    def spread(self, factors: Tensor, ndim: int) -> Tensor:
        rows = factors.view(self.groups, self.columns)[self.group]
        return rows.view(*rows.shape, *[1] * (ndim - 2))


@dataclass(frozen=True)
class Piece:
    """What this rank has of one parameter and of its gradient, and how it is clipped."""

    param: Tensor
    weight: Tensor
    grad: Tensor
    cut: _Whole | _Rows | _Transposed
    num_units: int  # of the whole parameter
    clipping: float | None
    eps: float
    split: tuple[Any, ...] = ()  # process groups over whose ranks a unit is split
    parted: tuple[Any, ...] = ()  # process groups over whose ranks whole units are

    def item(self, **update: Any) -> Item | None:
        """The same for the native sweep; None for what it does not take."""
        if library() is None or (self.clipping is not None and (self.split or isinstance(self.cut, _Transposed))):
            return None
        item = Item(self.weight, self.grad, isinstance(self.cut, _Whole), self.clipping, self.eps, **update)
        return item if item.fits else None


def piece_of(
    p: Tensor, clipping: float | None, eps: float, units: Units, transposed: int, dense: bool = False
) -> Piece:
    """How a parameter with a gradient is cut. `transposed`: 0, or the groups of the transposed convolution it is of."""
    grad = p.grad
    assert grad is not None
    if p.is_complex():
        raise InputError("a complex parameter has no place in adaptive gradient clipping: clip its real view")
    if getattr(p, "_fsdp_flattened", False):
        raise InputError("FSDP1's flat parameters do not show units: use FSDP2, torch.distributed.fsdp.fully_shard")
    whole = units == "tensor" or is_vector(p)
    total = 1 if whole else transposed * p.shape[1] if transposed else p.shape[0]
    weight, start, split, parted = p, 0, (), ()
    if is_sharded(p):
        weight, grad, start, split, parted = _shard(p, None if whole else 1 if transposed else 0)
    elif p.layout != torch.strided or grad.layout not in (torch.strided, torch.sparse_coo):
        raise InputError(f"a parameter of layout {p.layout} with a gradient of layout {grad.layout}: keep it dense")
    elif grad.is_sparse and (dense or grad.sparse_dim() > 1):
        p.grad = grad = grad.to_dense()
    elif grad.is_sparse:
        p.grad = grad = grad.coalesce()
        weight, grad = p if whole else p.index_select(0, grad.indices()[0]), grad.values()
    if whole:
        cut = _Whole()
    elif not transposed:
        cut = _Rows(len(weight))
    elif p.shape[0] % transposed or parted:
        shape = f"{tuple(p.shape)}, of which only dimension 0, the input channels, may be sharded"
        raise InputError(f"{transposed} groups of a transposed convolution do not fit a weight of {shape}")
    else:
        row = torch.arange(start, start + len(weight), device=p.device)
        cut = _Transposed(row // (p.shape[0] // transposed), transposed, p.shape[1])
    return Piece(p, weight, grad, cut, total, clipping, eps, split, parted)


def is_sharded(p: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    if type(p) in (torch.nn.Parameter, Tensor) or not (dist.is_available() and dist.is_initialized()):
        return False  # first what is quick to tell, for each parameter in each step
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


def local(t: Any) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return t.to_local() if is_sharded(t) else t


def _shard(p: Any, unit_dim: int | None) -> tuple[Tensor, Tensor, int, tuple, tuple]:
    """Weight, gradient and first row of this rank; `split` and `parted` of the piece. Units lie along `unit_dim`."""
    from torch.distributed.tensor import Partial, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if p.grad.placements != p.placements or any(isinstance(place, Partial) for place in p.placements):
        raise InputError(f"a gradient placed as {p.grad.placements} of a parameter placed as {p.placements}")
    shards = [
        (p.device_mesh.get_group(i), place.dim) for i, place in enumerate(p.placements) if isinstance(place, Shard)
    ]
    split, parted = (tuple(group for group, dim in shards if (dim == unit_dim) == whole) for whole in (False, True))
    start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0] if p.ndim else 0
    return p.to_local(), p.grad.to_local(), start, split, parted


# --- the rule, for many tensors at once ---


def _norms(tensors: Sequence[Tensor], cuts: Sequence[_Whole | _Rows | _Transposed]) -> list[Tensor]:
    """Norms of the units of each tensor (its part on this rank), as vectors; whole tensors in one batched call."""
    batches: dict[torch.dtype, list[Tensor]] = {}
    for tensor, cut in zip(tensors, cuts, strict=True):
        if isinstance(cut, _Whole):
            batches.setdefault(tensor.dtype, []).append(tensor)
    batched = {dtype: iter(torch._foreach_norm(batch, dtype=wide(dtype))) for dtype, batch in batches.items()}
    return [
        next(batched[tensor.dtype]).view(1) if isinstance(cut, _Whole) else cut.norms(tensor)
        for tensor, cut in zip(tensors, cuts, strict=True)
    ]


def _join_split(norms: list[Tensor], pieces: Sequence[Piece]) -> None:
    """Norms of units that are split over ranks, from those of their parts: one all-reduce for each kind of split."""
    kinds: dict[tuple, list[int]] = {}
    for i in range(len(norms)):
        if split := pieces[i % len(pieces)].split:
            kinds.setdefault(split, []).append(i)
    for split, members in kinds.items():
        joined = torch.cat([norms[i] for i in members]).square_()
        for group in split:
            dist.all_reduce(joined, group=group)
        for i, part in zip(members, joined.sqrt_().split([len(norms[i]) for i in members]), strict=True):
            norms[i] = part


def _join_parted(stats: Tensor, pieces: Sequence[Piece]) -> None:
    """Counts (row 0) and largest ratios (row 1) of parameters whose units lie on several ranks, in place."""
    kinds: dict[tuple, list[int]] = {}
    for i, piece in enumerate(pieces):
        if piece.parted:
            kinds.setdefault(piece.parted, []).append(i)
    for parted, members in kinds.items():
        for group in parted:
            mine = stats[:, members].contiguous()
            everyone = mine.new_empty(2 * dist.get_world_size(group), len(members))
            dist.all_gather_into_tensor(everyone, mine, group=group)
            everyone = everyone.view(-1, *mine.shape)
            stats[:, members] = torch.stack([everyone[:, 0].sum(0), everyone[:, 1].amax(0)])


def _parts(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Vectors of these sizes, or of a 0 in place of nothing."""
    return [part if len(part) else values.new_zeros(1) for part in values.split(list(sizes))]


def _clip(pieces: Sequence[Piece], clipping: float, eps: float, grad_scale: Tensor | None) -> Tensor:
    """Clips the gradients of parameters on one device; counts of clipped units and largest ratios, (2, P)."""
    cuts, grads = [piece.cut for piece in pieces], [piece.grad for piece in pieces]
    tensors, num = [piece.weight for piece in pieces] + grads, len(pieces)
    norms = _norms(tensors, cuts * 2)
    if grads[0].device.type == "cpu" and not math.isfinite(torch.cat(norms).sum().item()):
        # Squares may have overflowed where norms do not. Elsewhere than on a CPU asking would make the host wait.
        norms = [c.norms(t.double()).to(norm.dtype) for c, t, norm in zip(cuts * 2, tensors, norms, strict=True)]
    _join_split(norms, pieces)
    weight_norms, grad_norms = torch.cat(norms[:num]).clamp_(min=eps), torch.cat(norms[num:])
    if grad_scale is not None:
        weight_norms = weight_norms * grad_scale.to(weight_norms.device)
    limits = weight_norms * clipping
    clipped = (grad_norms > limits) & grad_norms.isfinite()  # what is not finite stays so, to be seen
    factors = torch.where(clipped, limits / grad_norms.clamp(min=MIN_GRADIENT_NORM), 1.0)
    sizes = [cut.size for cut in cuts]
    parts = zip(cuts, factors.split(sizes), grads, strict=True)
    torch._foreach_mul_(grads, [cut.spread(part, grad.ndim) for cut, part, grad in parts])

    # sums and maxima of each tensor's units as norms: an index would have to be copied to the device, and waited for
    ratios = _parts(grad_norms / weight_norms, sizes)
    counts = torch._foreach_norm(_parts(clipped.to(factors.dtype), sizes), 1)
    return torch.stack([torch.stack(counts), torch.stack(torch._foreach_norm(ratios, math.inf))])


def clip_pieces_(
    pieces: Sequence[Piece], updates: Sequence[Mapping[str, Any]] = (), grad_scale: Tensor | None = None
) -> tuple[AGCStats, set[int]]:
    """Clips in the native sweep, or where it cannot by batched operations.

    `updates`: of each piece, which the sweep makes with it. Returns also which pieces were swept, by number.
    """
    swept: dict[int, Item] = {}
    batches: dict[tuple[float, float, str], list[int]] = {}
    for i, piece in enumerate(pieces):
        item = piece.item(**(updates[i] if updates else {})) if grad_scale is None else None
        if item is not None:
            swept[i] = item
        elif piece.clipping is not None:
            batches.setdefault((piece.clipping, piece.eps, str(piece.param.device)), []).append(i)
    found, order = [sweep(list(swept.values()))] if swept else [], list(swept)
    for key, members in sorted(batches.items()):  # in one order on all ranks, whatever each of them swept
        found.append(_clip([pieces[i] for i in members], *key[:2], grad_scale))
        order += members
    columns = torch.cat([part.to(found[-1].device) for part in found], 1) if found else torch.zeros(2, 0)
    clipped = [i for i, piece in enumerate(pieces) if piece.clipping is not None]
    if order != clipped:
        place = dict(zip(order, columns.unbind(1), strict=True))
        columns = torch.stack([place[i] for i in clipped], 1) if clipped else columns[:, :0]
    _join_parted(columns, [pieces[i] for i in clipped])
    whole = tuple((pieces[i].param, pieces[i].num_units) for i in clipped)
    return AGCStats(tuple(p for p, _ in whole), tuple(num for _, num in whole), *columns), set(swept)


@torch.no_grad()
def adaptive_clip_grad_(
    params_or_groups: Tensor | Iterable[Tensor] | Iterable[Mapping[str, Any]],
    clipping: float | None = Default(0.01),
    eps: float = Default(1e-3),
    *,
    units: Units | None = None,
    grad_scale: Tensor | None = None,
) -> AGCStats:
    """Clips the gradients of parameters in place, unit by unit, as `torch.nn.utils.clip_grad_norm_` does globally.

    Call it once per optimizer step, on gradients that are summed over micro-batches and synchronised. Sharded
    parameters need it on all ranks at once.

    Args:
        params_or_groups: parameters, or optimizer groups, which may have their own `clipping` (None: left alone),
            `clip_eps`, `units` and `transposed`; the arguments are for those that do not. `param_groups(model)` writes
            groups by the roles of the layers, which tensors alone do not tell: leaves the classifier weight out
            (paper 4.1) and finds transposed convolutions. Parameters without a gradient are passed over.
        clipping: λ > 0, the largest ratio of gradient norm to weight norm; 0.01 suits batches of 1024 to 4096.
        eps: ε > 0, the smallest weight norm that is believed, so that zero-initialised parameters can move.
        units: "channel" as in the paper (the default), or "tensor": one norm for each whole parameter.
        grad_scale: tensor (), what gradients have been multiplied by (loss scaling) and stay multiplied by.

    Raises:
        InputError: λ, ε or units out of range, or given though all groups have others of their own; a misspelt key in
            a group; complex parameters; flat parameters of FSDP1; sparse parameters (gradients may be).

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> adaptive_clip_grad_(layer.parameters(), clipping=0.01).clipped_fraction
        1.0
    """
    groups = as_groups(params_or_groups)
    settings = settle(groups, clipping, eps, units)
    own = [(group["params"], clipping_of({**settings, **group})) for group in groups]
    members = [(p, how) for params, how in own for p in params if how[0] is not None and p.grad is not None]
    return clip_pieces_([piece_of(p, *how) for p, how in members], grad_scale=grad_scale)[0]


class AGC:
    """Puts adaptive gradient clipping in front of any torch optimizer's step.

        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> agc = AGC(optimizer, clipping=0.01)      # from now on optimizer.step() clips first
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> agc.stats.clipped_fraction               # of the last step
        1.0
        >>> agc.detach()                             # the optimizer as it was

    A group of the optimizer may carry its own `clipping`, None to be left alone (`param_groups` writes them); others
    get the arguments as `clipping`, `clip_eps` and `units`, which the optimizer's `state_dict` keeps. A state that was
    written without them leaves them as they are. With a closure, the gradients that it computes are clipped. A
    GradScaler may be used with every optimizer: those that unscale gradients themselves have them clipped against the
    scaled limit. Copy or pickle the `AGC`, which holds the optimizer: torch's optimizers by themselves are copied
    without what is attached to them.

    Raises:
        InputError: λ, ε or units out of range, or given though all groups have others of their own; a misspelt key in
            a group; an optimizer that clips already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clipping: float | None = Default(0.01),
        eps: float = Default(1e-3),
        units: Units | None = None,
    ):
        self._settings = settle(optimizer.param_groups, clipping, eps, units)
        self.optimizer, self.stats = optimizer, AGCStats()
        self._added: set[tuple[int, str]] = set()  # which keys are ours, in groups by number: loading replaces groups
        self._fill()
        self._attach()

    def _attach(self) -> None:
        hooks = self.optimizer._optimizer_step_pre_hooks.values()
        if "clip_eps" in self.optimizer.defaults or any(isinstance(getattr(h, "__self__", None), AGC) for h in hooks):
            raise InputError(f"this {type(self.optimizer).__name__} clips already: detach() its AGC, if it has one")
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
        """Groups get the settings that they do not have; some may have come with `add_param_group`."""
        for group in self.optimizer.param_groups:
            check_names(frozenset(group).difference(self.optimizer.defaults))
        for number, group in enumerate(self.optimizer.param_groups):
            self._added |= {(number, key) for key in self._settings.keys() - group.keys()}
            group.update(self._settings | group)

    def _before_load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"param_groups": keep_missing(state["param_groups"], optimizer.param_groups, CLIPPING_KEYS)}

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
        scale = getattr(self.optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
        keys = ("params", *CLIPPING_KEYS)
        groups = [{key: group[key] for key in keys if key in group} for group in self.optimizer.param_groups]
        self.stats = adaptive_clip_grad_(groups, grad_scale=scale)

    def detach(self) -> None:
        """Takes the clipping and its settings out of the optimizer."""
        for handle in self._handles:
            handle.remove()
        for number, key in self._added:
            self.optimizer.param_groups[number].pop(key, None)
