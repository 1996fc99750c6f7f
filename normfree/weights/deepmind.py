"""The authors' released weight files, `F0_haiku.npz` … `F6_haiku.npz`: two-level mappings of numpy arrays.

Despite their suffix the files are pickles (made with dill). A restricted unpickler reads numbers, arrays and mappings
and refuses everything else by name, so no code in a file can run.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from normfree.errors import InputError, one_line
from normfree.files import replacing
from normfree.weights.file import Report, Weights, Zoo
from normfree.weights.pickles import Placeholder, Refused, Unpickler, walk

Tree = dict[str, dict[str, np.ndarray]]

# first part of an architecture's name -> module of the network and of its blocks in the released code
FAMILIES = {
    "nfnet": ("NFNet", "nf_block"),
    "nf_resnet": ("NF_ResNet", "nf_res_block"),
    "nf_regnet": ("NF_RegNet", "nf_block"),
}
# options of ours for which the released code has one value only
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


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes in pickles of protocol 2."""
    if encoding != "latin1":
        raise Refused(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _array(subtype: type, shape: tuple, dtype: Any) -> np.ndarray:
    """The empty array that a numpy pickle fills afterwards."""
    if subtype is not Placeholder or tuple(shape) != (0,):
        raise Refused(f"an array of type {subtype!r} and shape {shape!r}")
    return np.ndarray((0,), dtype=np.dtype(dtype))


def _array_at_once(rebuild: Callable, arguments: tuple, state: tuple, attributes: Any = None) -> np.ndarray:
    """An array in pickles of dill and JAX: the two steps of pickle in one call. JAX adds type attributes."""
    array = rebuild(*arguments)
    if not isinstance(array, np.ndarray):
        raise Refused(f"an array made by {rebuild!r}")
    array.__setstate__(state)  # type: ignore[attr-defined]
    return array


def _array_of_bytes(data: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """An array in pickles of protocol 5."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


class _HaikuUnpickler(Unpickler):
    admitted: ClassVar[Mapping[str, Any]] = {
        "numpy.ndarray": Placeholder,
        "numpy.dtype": np.dtype,
        **{
            f"numpy.{core}.{name}": function  # the names of numpy 1 and numpy 2
            for core in ("core", "_core")
            for name, function in (
                ("multiarray._reconstruct", _array),
                ("multiarray.scalar", lambda dtype, data=b"": np.frombuffer(data, dtype, count=1).reshape(())),
                ("numeric._frombuffer", _array_of_bytes),
            )
        },
        "dill._dill._create_array": _array_at_once,
        "dill.dill._create_array": _array_at_once,
        "jax._src.array._reconstruct_array": _array_at_once,
        "jax._src.device_array.reconstruct_device_array": _array_at_once,
        "_codecs.encode": _latin1,
        "collections.OrderedDict": OrderedDict,
        "builtins.dict": dict,
        **{f"haiku._src.data_structures.{name}": dict for name in ("FlatMapping", "FlatMap", "frozendict")},
    }


def read_haiku(path: str | os.PathLike) -> Tree:
    """{module: {name: array}}; InputError, in one line, if the file holds anything but numbers in mappings.

    From a checkpoint with several such trees, the average is read if there is one, otherwise the parameters.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = _HaikuUnpickler(file).load()
        leaves = {place: leaf for place, leaf in walk(content) if not isinstance(leaf, Mapping | tuple | list | None)}
    except Refused as error:
        raise InputError(f"{path} is refused: a weight file has no business with {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly every type
        reason = one_line(error, 120)
        raise InputError(f"{path} is damaged or not a haiku weight file ({type(error).__name__}: {reason})") from None
    if not leaves or not isinstance(content, Mapping | tuple | list):
        raise InputError(f"{path} is not a haiku weight file: modules with named arrays are expected")
    for place, leaf in leaves.items():
        if not isinstance(leaf, np.ndarray | int | float) or np.asarray(leaf).dtype.kind not in "fiub":
            raise InputError(f"{path} is not a haiku weight file: {place} is not an array of floats")
    roots = "|".join(root for root, _ in FAMILIES.values())
    before = {found[1]: None for place in leaves if (found := re.match(rf"(|.*?/)(?:{roots})/", place))}
    prefix = min(before, key=lambda place: ("ema" not in place, "params" not in place), default="")
    tree: Tree = {}
    for place, leaf in leaves.items():
        module, _, name = place.removeprefix(prefix).rpartition("/")
        if not place.startswith(prefix):
            continue
        if not module or not isinstance(leaf, np.ndarray) or leaf.dtype.kind != "f":
            raise InputError(f"{path} is not a haiku weight file: {place} is not an array of floats")
        tree.setdefault(module, {})[name] = leaf
    return tree


def write_haiku(path: str | os.PathLike, tree: Tree) -> None:
    """Writes a file that the released code and `read_haiku` can read."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(tree, file, protocol=4)


def read_deepmind(path: Path, zoo: Zoo, name: str | None, overrides: Mapping[str, Any]) -> Weights:
    """A haiku file in our terms. Names, shapes and the number of blocks identify the network if `name` is None."""
    tree = read_haiku(path)
    family, num_blocks, num_classes, in_channels = describe(tree, path)
    if name is not None and not name.startswith(family):
        raise InputError(f"{path} is a haiku weight file of {FAMILIES[family][0]}, not of {name}")
    same_size = [each for each, depth in zoo.depths.items() if each.startswith(family) and sum(depth) == num_blocks]
    report = None
    for candidate in [name] if name else same_size:
        network = zoo.outline(candidate, num_classes, in_channels, overrides)
        state, report = from_haiku(tree, network.state_dict(), family)
        if report.complete:
            crop = "resize_crop" if family == "nfnet" else "crop_resize"
            info = replace(network.info, source=f"DeepMind's {path.name}", eval_crop=crop)
            return Weights(state, info, report, network=network)
    raise InputError(f"{path} does not fit {name}: {report}" if name else f"{path} fits no network here: name one")


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

    `like` is a state dict of the network to be filled. The report lists what differs in name or shape.
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
