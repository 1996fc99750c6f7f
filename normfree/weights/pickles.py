"""Numbers from pickles, files of torch.save included, without running any code in them.

A pickle names functions and classes, and unpickling calls them. Here each name maps to a replacement in this package,
and nothing is imported. Empty placeholders stand for a checkpoint's other contents (options, paths, dates, objects of
any class). A call of any other function is refused, and the error names it.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from normfree._compat import records, untyped

OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save's files began before version 1.6


class Refused(pickle.UnpicklingError):
    """str() names what has no place in a weight file."""


class Placeholder:
    """Stands for an object of any class. It accepts all content and keeps none."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        return super().__new__(cls)

    def ignore(self, *anything: Any) -> None:
        """Takes any call and keeps nothing."""

    __setstate__ = __setitem__ = append = extend = add = ignore


class Unpickler(pickle.Unpickler):
    """Unpickles only names that are `admitted`, each as its replacement; any other is refused."""

    admitted: ClassVar[Mapping[str, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a global of the pickle stands for; nothing is imported."""
        name = f"{IMPORT_MAPPING.get(module, module)}.{name}"  # protocol 2 writes Python 2's module names
        meaning = self.admitted[name] if name in self.admitted else self.unknown(name)
        if not isinstance(meaning, FunctionType):
            return meaning
        # a pickle can set attributes of a function, but not of a placeholder
        return type(meaning.__name__, (Placeholder,), {"__new__": lambda cls, *arguments: meaning(*arguments)})

    def unknown(self, name: str) -> Any:
        """What a name that is not admitted stands for; raises `Refused` here."""
        raise Refused(name)


class _Uncallable(Placeholder):
    """For modules whose functions have effects. Pickles call functions, but create most objects by `__new__` alone."""

    def __init__(self, *arguments: Any, **keywords: Any):
        raise Refused(type(self).__name__)


class _Mapping(dict):
    """Stands for an OrderedDict, a Counter or a defaultdict, without attributes and factory."""

    def __init__(self, *arguments: Any):
        super().__init__(*(each for each in arguments if isinstance(each, dict | list)))

    def __setstate__(self, *state: Any) -> None:
        pass


class _Bytes(Placeholder):
    """Stands for UntypedStorage; torch.load resolves the other storage classes by name."""

    dtype = torch.uint8


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *more: Any) -> Tensor:
    """A view of a storage. `more` holds hooks and the like, which are ignored, and in `_v3` the dtype."""
    dtype = next((each for each in more if isinstance(each, torch.dtype)), storage.dtype)
    tensor = torch.empty(0, dtype=dtype)
    if tensor.is_quantized:  # torch does not check that these lie inside their storage
        raise ValueError(f"a tensor of type {dtype}")
    return tensor.set_(untyped(storage), offset, size, stride)


def walk(content: Any, place: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """The path and value of everything in nested mappings, lists and tuples, each of which is entered once."""
    seen = set() if seen is None else seen
    items = content.items() if isinstance(content, Mapping) else ()
    items = enumerate(content) if isinstance(content, list | tuple) else items
    if items and id(content) in seen:
        return
    seen.add(id(content))
    yield place, content
    for key, value in items:
        yield from walk(value, f"{place}/{key}".lstrip("/"), seen)


# harmless functions and classes in pickles of options, logs and random states
_DATA = re.compile(
    r"""builtins\.(set|frozenset|complex|bytearray|slice|range) | copyreg\._reconstructor | _codecs\.encode
    | argparse\.Namespace | types\.SimpleNamespace | collections\.deque | datetime\.\w+ | decimal\.Decimal
    | fractions\.Fraction | uuid\.UUID | pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path
    | numpy\.(dtype|ndarray) | numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)
    | torch\.(device|Size|serialization\._get_layout)""",
    re.VERBOSE,
)
_DOERS = {*sys.stdlib_module_names, "torch", "numpy"} - {"__main__"}


class _TorchUnpickler(Unpickler):
    """For torch.load."""

    admitted: ClassVar[Mapping[str, Any]] = {
        **{f"collections.{name}": _Mapping for name in ("OrderedDict", "defaultdict", "Counter")},
        **{f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
        **{f"torch._utils._rebuild_tensor{version}": _tensor for version in ("", "_v2", "_v3")},
        **{f"torch._utils._rebuild_parameter{more}": lambda data, *_: data for more in ("", "_with_state")},
        "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
        "torch.storage.UntypedStorage": _Bytes,
    }

    def unknown(self, name: str) -> type:
        if _DATA.fullmatch(name):
            return Placeholder
        return type(name, (_Uncallable if name.partition(".")[0] in _DOERS else Placeholder,), {})


def load_torch(path: Path) -> Any:
    """The content of a torch.save file: tensors on the CPU, and placeholders for all but numbers, text and collections.

    Damaged files raise nearly any type of exception. `Refused` names a function that a file tries to call.
    """
    with path.open("rb") as opened:
        file: Any = opened
        if opened.read(len(OLD_TORCH)) == OLD_TORCH:
            file = io.BytesIO(path.read_bytes())  # a file on the disk might also be read as a tar archive
        else:
            opened.seek(0)
            # torch.load hands TorchScript, which is code, to torch.jit: so the question is what torch's reader sees
            if "constants.pkl" in records(opened):
                raise Refused("TorchScript: save the network's state_dict()")
            archive = zipfile.ZipFile(opened)
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise ValueError("it is compressed, which torch.save's files are not")
            if damaged := archive.testzip():  # torch compares no checksums
                raise ValueError(f"the checksum of {damaged} is another")
        file.seek(0)
        return _load(file)


def _load(file: Any) -> Any:
    """torch.load with `_TorchUnpickler`, or with torch's own restricted unpickler if the environment demands it."""
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        try:
            return torch.load(file, "cpu", weights_only=True, mmap=False)
        except pickle.UnpicklingError:
            raise Refused("what TORCH_FORCE_WEIGHTS_ONLY_LOAD forbids") from None
    unfilled: set[Any] = set()  # storages of an old file, whose data follow the pickle

    class Ours(_TorchUnpickler):
        def load(self) -> Any:
            storage = getattr(self, "persistent_load", None)  # torch.load sets it

            def persistent_load(pid: Any) -> Any:
                if storage is None or pid[0] != "storage":  # a "module" has source code, to be compared and written
                    raise Refused(f"a reference to {pid[0]!r}")
                unfilled.update(pid[2:3] if len(pid) == 6 else ())
                return storage(pid)

            self.persistent_load = persistent_load
            return super().load()

    def load(file: Any, **options: Any) -> Any:
        value = Ours(file, **options).load()
        unfilled.difference_update(value if isinstance(value, list) else ())
        return value

    content = torch.load(
        file, "cpu", SimpleNamespace(__name__="ours", Unpickler=Ours, load=load), weights_only=False, mmap=False
    )
    if unfilled:  # torch.load leaves them as the memory was
        raise ValueError(f"{len(unfilled)} storages have no numbers")
    return content
