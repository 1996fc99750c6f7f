"""The authors' released weight files, `F0_haiku.npz` … `F6_haiku.npz`: two-level mappings of numpy arrays.

In spite of their name the files are pickles (made with dill). They are read by an unpickler that knows numpy arrays
and mappings and refuses everything else by name, so that no code in a file can run.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.config import InputError
from normfree.weights.file import Report, replacing

Tree = dict[str, dict[str, np.ndarray]]

# first part of an architecture's name -> module of the network and of its blocks in the released code
FAMILIES = {
    "nfnet": ("NFNet", "nf_block"),
    "nf_resnet": ("NF_ResNet", "nf_res_block"),
    "nf_regnet": ("NF_RegNet", "nf_block"),
}
# options of ours of which the released code has this value only
FIXED: dict[str, Any] = dict(
    padding="same",
    gamma_in_conv=False,
    skip_gain=True,
    eca=False,
    pool_shortcut=False,
    channel_divisor=1,
    stem_channels=(16, 32, 64),
    stem_strides=(2, 1, 1, 2),
)


class _Refused(pickle.UnpicklingError):
    """str() names what has no place in a weight file."""


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    if encoding != "latin1":
        raise _Refused(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _array(subtype: type, shape: tuple, dtype: Any) -> np.ndarray:
    """The empty array that numpy's pickles fill afterwards."""
    if subtype is not np.ndarray or tuple(shape) != (0,):
        raise _Refused(f"an array of type {subtype!r} and shape {shape!r}")
    return np.ndarray((0,), dtype=np.dtype(dtype))


def _dill_array(rebuild: Callable, arguments: tuple, state: tuple, attributes: Any = None) -> np.ndarray:
    """How dill spells an array: what pickle does in two steps, in one call."""
    if rebuild is not _array or attributes:
        raise _Refused(f"an array made by {rebuild!r}")
    array = _array(*arguments)
    array.__setstate__(state)  # type: ignore[attr-defined]
    return array


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _array,  # the names of numpy 1 and numpy 2
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("dill._dill", "_create_array"): _dill_array,
    ("dill.dill", "_create_array"): _dill_array,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "dict"): dict,
    ("__builtin__", "dict"): dict,
    ("haiku._src.data_structures", "FlatMapping"): dict,  # both reduce to one call with a plain dict
    ("haiku._src.data_structures", "FlatMap"): dict,
    ("haiku._src.data_structures", "frozendict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _Refused(f"{module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a reference to outside the file")


def read_haiku(path: str | os.PathLike) -> Tree:
    """{module: {name: array}} of a file; InputError in one line if it holds anything but arrays in mappings."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            tree = _Unpickler(file).load()
    except _Refused as error:
        raise InputError(f"{path} is refused: a weight file has no business with {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly every type
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is damaged or no haiku weight file ({type(error).__name__}: {reason})") from None
    if not isinstance(tree, Mapping) or not all(isinstance(module, Mapping) for module in tree.values()):
        raise InputError(f"{path} is no haiku weight file: modules with named arrays are expected")
    for module, arrays in tree.items():
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
                raise InputError(f"{path} is no haiku weight file: {module}/{name} is no array of floats")
    return {str(module): dict(arrays) for module, arrays in tree.items()}


def write_haiku(path: str | os.PathLike, tree: Tree) -> None:
    """A file that the released code reads, and `read_haiku`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(tree, file, protocol=4)


def describe(tree: Tree, path: str | os.PathLike) -> tuple[str, int, int, int]:
    """Family (a key of `FAMILIES`), number of blocks, classes and input channels of the network in a file."""
    parts = [module.split("/~/") for module in tree]
    for family, (root, block) in FAMILIES.items():
        stem = tree.get(f"{root}/~/stem_conv0", tree.get(f"{root}/~/initial_conv", {})).get("w")
        if stem is not None and stem.ndim == 4:
            blocks = {part[1] for part in parts if len(part) > 2 and re.fullmatch(rf"{block}(_\d+)?", part[1])}
            classifier = tree.get(f"{root}/~/linear", {}).get("w", np.empty((0, 0)))
            return family, len(blocks), classifier.shape[-1], stem.shape[2]
    raise InputError(
        f"{path} is a haiku weight file, but of none of {', '.join(root for root, _ in FAMILIES.values())}"
    )


def haiku_name(key: str, blocks: list[str], family: str) -> tuple[str, str]:
    """Module and name in the released code of our tensor `key`; `blocks` are our prefixes `stages.I.J` in order.

    >>> haiku_name("stages.1.0.se.fc2.bias", ["stages.0.0", "stages.1.0"], "nfnet")
    ('NFNet/~/nf_block_1/~/squeeze_excite/~/linear_1', 'b')
    """
    root, block_name = FAMILIES[family]
    layer, _, name = key.rpartition(".")
    is_linear = layer.startswith("head.") or ".se." in layer
    name = {"weight": "w", "bias": "b" if is_linear else "bias"}.get(name, name)
    parts = [root]
    if layer.startswith("stages."):
        prefix = re.match(r"stages\.\d+\.\d+", layer)
        assert prefix is not None
        index = blocks.index(prefix[0])
        parts.append(f"{block_name}_{index}" if index else block_name)
        layer = layer.removeprefix(prefix[0]).lstrip(".")
    renamed = {"stem.conv": "initial_conv", "head.fc": "linear", "se.fc1": "squeeze_excite/~/linear"}
    renamed["se.fc2"] = "squeeze_excite/~/linear_1"
    if layer:
        parts.append(renamed.get(layer, layer.replace("stem.", "stem_")))
    return "/~/".join(parts), name


def _blocks(keys: Mapping[str, Any]) -> list[str]:
    found = (re.match(r"stages\.\d+\.\d+", key) for key in keys)
    return list(dict.fromkeys(match[0] for match in found if match))


def from_haiku(tree: Tree, like: Mapping[str, Tensor], family: str) -> tuple[dict[str, Tensor], Report]:
    """The tensors of `tree` under our names and in our layout (HWIO -> OIHW, IN x OUT -> OUT x IN).

    `like` is a state dict of the network that they are for; what differs from it in name or shape is in the report.
    """
    blocks, report, state = _blocks(like), Report(), {}
    left = {(module, name) for module, arrays in tree.items() for name in arrays}
    for key, own in like.items():
        place = haiku_name(key, blocks, family)
        if place not in left:
            report.missing.append(key)
            continue
        left.remove(place)
        array = tree[place[0]][place[1]]
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        if array.shape != tuple(own.shape):
            report.reshaped.append(f"{key} {array.shape} for {tuple(own.shape)}")
            continue
        state[key] = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
        report.matched.append(key)
    report.unexpected = sorted("/".join(place) for place in left)
    return state, report


def to_haiku(state: Mapping[str, Tensor], family: str) -> Tree:
    """The inverse of `from_haiku`: {module: {name: float32 array}}."""
    blocks = _blocks(state)
    tree: Tree = {}
    for key, value in state.items():
        array = value.detach().cpu().numpy()
        module, name = haiku_name(key, blocks, family)
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        tree.setdefault(module, {})[name] = np.ascontiguousarray(array).reshape(array.shape)
    return tree
