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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from normfree.config import InputError
from normfree.native import library
from normfree.optim.groups import (
    CLIPPING_KEYS,
    Default,
    Units,
    as_groups,
    check_clipping,
    check_given,
    check_names,
    keep_missing,
    plain,
)
from normfree.optim.sweep import Item, sweep

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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


def wide(dtype: torch.dtype) -> torch.dtype | None:
    """The type in which norms are summed: half precision would overflow at 65504, or lose digits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


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
    """What this rank has of one parameter and of its gradient."""

    param: Tensor
    weight: Tensor
    grad: Tensor
    cut: _Whole | _Rows | _Transposed
    num_units: int  # of the whole parameter
    split: tuple[Any, ...]  # process groups over whose ranks a unit is split
    parted: tuple[Any, ...]  # process groups over whose ranks whole units are

    def item(self, clipping: float | None, eps: float, **update: Any) -> Item | None:
        """The same for the native sweep; None for what it does not take."""
        item = Item(self.weight, self.grad, isinstance(self.cut, _Whole), clipping, eps, **update)
        plain = clipping is None or not (self.split or isinstance(self.cut, _Transposed))
        return item if plain and item.fits and library() is not None else None


def piece_of(p: Tensor, units: Units = "channel", transposed: int = 0) -> Piece:
    """How a parameter with a gradient is cut. `transposed`: 0, or the groups of the transposed convolution it is of."""
    grad = p.grad
    assert grad is not None
    if p.is_complex():
        raise InputError("a complex parameter has no place in adaptive gradient clipping: clip its real view")
    if getattr(p, "_fsdp_flattened", False):
        raise InputError(
            "these are FSDP1's flat parameters, in which units cannot be told apart: shard with FSDP2, "
            "torch.distributed.fsdp.fully_shard"
        )
    whole = units == "tensor" or is_vector(p)
    total = 1 if whole else transposed * p.shape[1] if transposed else p.shape[0]
    if is_sharded(p):
        return _shard(p, whole, transposed, total)
    if p.layout != torch.strided or grad.layout not in (torch.strided, torch.sparse_coo):
        raise InputError(f"a parameter of layout {p.layout} with a gradient of layout {grad.layout}: keep it dense")
    if transposed and not whole and p.shape[0] % transposed:
        raise InputError(f"{transposed} groups of a transposed convolution do not fit a weight of {tuple(p.shape)}")
    if grad.is_sparse and grad.sparse_dim() > 1:
        p.grad = grad = grad.to_dense()
    if grad.is_sparse:
        p.grad = grad = grad.coalesce()
        weight = p if whole else p.index_select(0, grad.indices()[0])
        return Piece(p, weight, grad.values(), _Whole() if whole else _Rows(len(weight)), total, (), ())
    cut = _cut(p, whole, transposed, range(p.shape[0] if p.ndim else 0))
    return Piece(p, p, grad, cut, total, (), ())


def _cut(p: Tensor, whole: bool, transposed: int, rows: range) -> _Whole | _Rows | _Transposed:
    """The units in `rows` of dimension 0 of a parameter."""
    if whole:
        return _Whole()
    if not transposed:
        return _Rows(len(rows))
    row = torch.arange(rows.start, rows.stop, device=p.device)
    return _Transposed(row // (p.shape[0] // transposed), transposed, p.shape[1])


def is_sharded(p: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


def local(t: Any) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return t.to_local() if is_sharded(t) else t


def _shard(p: Any, whole: bool, transposed: int, total: int) -> Piece:
    from torch.distributed.tensor import Partial, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    grad: DTensor = p.grad
    if grad.placements != p.placements or any(isinstance(place, Partial) for place in p.placements):
        raise InputError(
            f"a gradient placed as {grad.placements} does not go with a parameter placed as {p.placements}"
        )
    split, parted = [], []
    for dim, place in enumerate(p.placements):
        if isinstance(place, Shard):
            has_whole_units = not whole and place.dim == (1 if transposed else 0)
            (parted if has_whole_units else split).append(p.device_mesh.get_group(dim))
    weight = p.to_local()
    start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0] if p.ndim else 0
    if transposed and not whole and parted:
        raise InputError("a transposed convolution can be sharded over its input channels (dimension 0) only")
    cut = _cut(p, whole, transposed, range(start, start + (len(weight) if p.ndim else 0)))
    return Piece(p, weight, grad.to_local(), cut, total, tuple(split), tuple(parted))


# --- the rule, for many tensors at once ---


def _norms(tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> list[Tensor]:
    """Norms of the units of each tensor (its part on this rank), as vectors; whole tensors in one batched call."""
    whole = [isinstance(piece.cut, _Whole) for piece in pieces]
    batches: dict[torch.dtype, list[Tensor]] = {}
    for tensor, is_whole in zip(tensors, whole, strict=True):
        if is_whole:
            batches.setdefault(tensor.dtype, []).append(tensor)
    batched = {dtype: iter(torch._foreach_norm(batch, dtype=wide(dtype))) for dtype, batch in batches.items()}
    return [
        next(batched[tensor.dtype]).view(1) if is_whole else piece.cut.norms(tensor)
        for tensor, piece, is_whole in zip(tensors, pieces, whole, strict=True)
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
    num = len(pieces)
    weights, grads = [piece.weight for piece in pieces], [piece.grad for piece in pieces]
    norms = _norms(weights, pieces) + _norms(grads, pieces)
    if grads[0].device.type == "cpu" and not math.isfinite(torch.cat(norms).sum().item()):
        # Squares may have overflowed where norms do not. Elsewhere than on a CPU asking would make the host wait.
        cuts = [piece.cut for piece in pieces] * 2
        wider = [cut.norms(tensor.double()) for cut, tensor in zip(cuts, weights + grads, strict=True)]
        norms = [wide_norm.to(norm.dtype) for wide_norm, norm in zip(wider, norms, strict=True)]
    _join_split(norms, pieces)
    weight_norms, grad_norms = torch.cat(norms[:num]).clamp_(min=eps), torch.cat(norms[num:])
    if grad_scale is not None:
        weight_norms = weight_norms * grad_scale.to(weight_norms.device)
    limits = weight_norms * clipping
    clipped = (grad_norms > limits) & grad_norms.isfinite()  # what is not finite stays so, to be seen
    factors = torch.where(clipped, limits / grad_norms.clamp(min=MIN_GRADIENT_NORM), 1.0)
    sizes = [piece.cut.size for piece in pieces]
    spread = [piece.cut.spread(part, piece.grad.ndim) for piece, part in zip(pieces, factors.split(sizes), strict=True)]
    torch._foreach_mul_(grads, spread)

    # sums and maxima of each tensor's units as norms: an index would have to be copied to the device, and waited for
    ratios = _parts(grad_norms / weight_norms, sizes)
    counts = torch._foreach_norm(_parts(clipped.to(factors.dtype), sizes), 1)
    return torch.stack([torch.stack(counts), torch.stack(torch._foreach_norm(ratios, math.inf))])


def clip_pieces_(
    pieces: Sequence[Piece], clipping: float, eps: float = 1e-3, grad_scale: Tensor | None = None
) -> Tensor:
    """Clips one group, in the native sweep or where it cannot be by batched operations.

    Returns the counts of clipped units and the largest ratios in what this rank has of each parameter, (2, P).
    """
    swept: dict[int, Item] = {}
    devices: dict[torch.device, list[int]] = {}
    for i, piece in enumerate(pieces):
        item = None if grad_scale is not None else piece.item(clipping, eps)
        if item is not None:
            swept[i] = item
        else:
            devices.setdefault(piece.param.device, []).append(i)
    found, order = [], []
    if swept:
        found.append(sweep(list(swept.values())))
        order += swept
    for members in devices.values():
        found.append(_clip([pieces[i] for i in members], clipping, eps, grad_scale))
        order += members
    return arrange(found, order)


def arrange(found: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Columns of all of `found`, of which number k belongs in place order[k]."""
    if not found:
        return torch.zeros(2, 0)
    columns = torch.cat([part.to(found[0].device) for part in found], 1)
    return columns if sorted(order) == list(order) else columns[:, sorted(range(len(order)), key=order.__getitem__)]


def make_stats(pieces: Sequence[Piece], found: Tensor) -> AGCStats:
    """From what this rank found; the same parameters in the same order on every rank."""
    _join_parted(found, pieces)
    return AGCStats(tuple(piece.param for piece in pieces), tuple(piece.num_units for piece in pieces), *found)


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
    pieces: list[Piece] = []
    found: list[Tensor] = []
    groups = as_groups(params_or_groups)
    settings = _settle(groups, clipping, eps, units)
    for group in groups:
        check_names(frozenset(group))
        clip, least, cut = (group.get(name, value) for name, value in settings.items())
        check_clipping(clip, least, cut)
        if clip is not None:
            transposed = group.get("transposed", 0)
            members = [piece_of(p, cut, transposed) for p in group["params"] if p.grad is not None]
            found.append(clip_pieces_(members, clip, least, grad_scale))
            pieces += members
    return make_stats(pieces, arrange(found, range(len(pieces))))


def _settle(groups: Sequence[Mapping[str, Any]], clipping: float | None, eps: float, units: Units | None) -> dict:
    """The settings of groups that do not say; an argument that was given must have one."""
    check_given(groups, clipping=clipping, clip_eps=eps, **({"units": units} if units else {}))
    return {"clipping": plain(clipping), "clip_eps": float(eps), "units": units or "channel"}


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
        settings = _settle(optimizer.param_groups, clipping, eps, units)
        check_clipping(*settings.values())
        self.optimizer, self.stats = optimizer, AGCStats()
        self._settings = settings
        self._added: list[tuple[int, str]] = []  # which keys are ours, in groups by number: loading replaces groups
        self._fill()
        self._attach()

    def _attach(self) -> None:
        hooks = self.optimizer._optimizer_step_pre_hooks.values()
        if "clip_eps" in self.optimizer.defaults or any(isinstance(getattr(h, "__self__", None), AGC) for h in hooks):
            raise InputError(
                f"this {type(self.optimizer).__name__} clips already; detach() the AGC it has, if it has one"
            )
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
        groups = self.optimizer.param_groups
        for group in groups:
            check_names(frozenset(group).difference(self.optimizer.defaults))
        for number, group in enumerate(groups):
            added = [key for key in self._settings if key not in group]
            group.update((key, self._settings[key]) for key in added)
            self._added += [(number, key) for key in added]

    def _before_load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"param_groups": keep_missing(state["param_groups"], optimizer.param_groups, CLIPPING_KEYS)}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        arguments = args[1:] if args and args[0] is optimizer else args
        closure = kwargs.get("closure", arguments[0] if arguments else None)
        if closure is None:
            self._clip()
            return None

        def clipped_closure() -> Any:
            loss = closure()
            self._clip()
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": clipped_closure}
        return (*args[: len(args) - len(arguments)], clipped_closure, *arguments[1:]), kwargs

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
