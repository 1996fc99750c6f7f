"""The private names of torch and torchvision that this package uses, each with a path for versions that lack it.

`torch._foreach_*` is used directly: torch's own optimizers are built on it, and third-party ones rely on it. The names
in the tables of `weights.pickles` and `weights.deepmind` are content of files and are never looked up.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

fused_sgd_ = getattr(torch, "_fused_sgd_", None)  # None: take the path that `optim.sgd.sgd_step_` has without it


def _base(cls: type, name: str) -> type:
    """The base class of `cls` that is called `name`; its first base class if there is none."""
    return next((base for base in cls.__mro__ if base.__name__ == name), cls.__bases__[0])


if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
    from torch.nn.modules.dropout import _DropoutNd as DropoutNd
else:
    BatchNorm, NormBase = _base(nn.BatchNorm2d, "_BatchNorm"), _base(nn.BatchNorm2d, "_NormBase")
    ConvNd, ConvTransposeNd = _base(nn.Conv2d, "_ConvNd"), _base(nn.ConvTranspose2d, "_ConvTransposeNd")
    DropoutNd = _base(nn.Dropout, "_DropoutNd")


# --- what watches or transforms operations ---


def is_transformed() -> bool:
    """Whether torch.jit.trace, a transform of torch.func or forward-mode AD is active; True if torch does not tell."""
    try:
        traced = torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
        return traced or forward_ad._current_level >= 0
    except AttributeError:
        return True


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode, such as a FLOP counter, is active; True if torch does not tell."""
    try:
        return torch._C._len_torch_dispatch_stack() > 0
    except AttributeError:
        return True


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own, unlike those inside vmap."""
    try:
        return torch._C._has_storage(tensor)
    except AttributeError:
        try:
            tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return False
        return True


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether `module` has forward hooks of its own; True if torch does not tell."""
    try:
        return bool(module._forward_hooks or module._forward_pre_hooks)
    except AttributeError:
        return True


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs any hook, global ones included; True if torch does not tell."""
    try:
        backward = bool(module._backward_hooks or module._backward_pre_hooks)
        return has_forward_hooks(module) or backward or bool(nn.modules.module._has_any_global_hook())
    except AttributeError:
        return True


# --- convolutions ---


def conv_pads(conv: Any) -> list[int]:
    """The padding of a convolution as F.pad takes it: before and after each dimension, the last dimension first."""
    try:
        return list(conv._reversed_padding_repeated_twice)
    except AttributeError:
        pads = []
        for i, (side, dilation) in reversed([*enumerate(zip(conv.kernel_size, conv.dilation, strict=True))]):
            total = dilation * (side - 1) if conv.padding == "same" else 0
            pads += [total // 2, total - total // 2] if isinstance(conv.padding, str) else [conv.padding[i]] * 2
        return pads


def conv_forward(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What nn.Conv1d, nn.Conv2d or nn.Conv3d would compute with other weights."""
    try:
        return conv._conv_forward(x, weight, bias)
    except AttributeError:
        function = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv_pads(conv), conv.padding_mode), 0
        return function(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def output_padding(conv: Any, x: Tensor, output_size: Sequence[int] | None) -> list[int]:
    """The output padding with which a transposed convolution of x has sides `output_size`; its own for None."""
    sizes = conv.stride, conv.padding, conv.kernel_size, conv.dilation
    try:
        return list(conv._output_padding(x, output_size, *sizes[:3], len(conv.kernel_size), conv.dilation))
    except AttributeError:
        if output_size is None:
            return list(conv.output_padding)
        sides = x.shape[-len(conv.kernel_size) :]
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, k, d in zip(sides, *sizes, strict=True)]
        return [side - low for side, low in zip(output_size[-len(least) :], least, strict=True)]


# --- modules, parameters, optimizers ---


def unwrapped(model: nn.Module) -> Any:
    """The module inside one that torch.compile, DDP, DataParallel or AveragedModel made; None for any other."""
    return getattr(model, "_orig_mod", getattr(model, "module", None))


def registered_tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers, in a fraction of the time of `named_parameters`; shared ones may come repeatedly."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [model]
    try:
        while modules:
            module = modules.pop()
            if module is not None:
                found += module._parameters.values()
                found += module._buffers.values()
                modules += module._modules.values()
    except AttributeError:
        return [*model.parameters(), *model.buffers()]
    return [tensor for tensor in found if tensor is not None]


def stored_values(tensor: Tensor) -> Tensor:
    """The values that a sparse tensor stores, not coalesced where torch allows it; a dense tensor itself."""
    if not tensor.is_sparse:
        return tensor
    try:
        return tensor._values()
    except AttributeError:
        return tensor.coalesce().values()


def is_fsdp1_flat(p: Tensor) -> bool:
    """Whether FSDP1 made this parameter by concatenating others; False if torch does not tell."""
    return getattr(p, "_fsdp_flattened", False)


def first_row(p: Any) -> int:
    """The global index along dimension 0 at which this rank's part of DTensor `p` begins."""
    if not p.ndim:
        return 0
    try:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    except ImportError:
        start, length = 0, p.shape[0]
        for place, ranks, rank in zip(p.placements, p.device_mesh.shape, p.device_mesh.get_coordinate(), strict=True):
            if place.is_shard(0):  # as torch.chunk splits
                chunk = -(-length // ranks)
                begin = min(rank * chunk, length)
                start, length = start + begin, min(chunk, length - begin)
        return start
    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0]


def step_pre_hooks(optimizer: torch.optim.Optimizer) -> Iterable[Any]:
    """The hooks of `register_step_pre_hook`; none if torch does not tell."""
    return getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()


# --- files ---


def untyped(storage: Any) -> torch.UntypedStorage:
    """The bytes of a TypedStorage, of which torch warns if it is asked in public."""
    own = getattr(storage, "_untyped_storage", None)
    return storage.untyped() if own is None else own


def records(file: IO[bytes]) -> set[str]:
    """Names of the records in a file of torch.save or torch.jit.save, as torch's reader sees them."""
    try:
        return set(torch._C.PyTorchFileReader(file).get_all_records())
    except AttributeError:
        with zipfile.ZipFile(file) as archive:
            return {name.partition("/")[2] for name in archive.namelist()}


def listed(dataset: Any, *names: str) -> Any:
    """Lists of paths and targets that a data set of torchvision keeps; RuntimeError if it keeps them elsewhere."""
    try:
        values = [getattr(dataset, f"_{name}") for name in names]
    except AttributeError as error:
        raise RuntimeError(f"this version of torchvision keeps them elsewhere: {error}") from None
    return values[0] if len(values) == 1 else values
