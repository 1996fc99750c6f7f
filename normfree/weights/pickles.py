"""Numbers from pickles, with nothing of the pickle run; torch.save's files among them.

A pickle names functions and classes, and reading it calls them. Here a name stands for what this package says, never
for what Python would import. Of a checkpoint's other contents (options, paths, dates, objects of anyone's classes)
empty placeholders are made; a call of any other function is refused by its name.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save's files began before version 1.6

Names = Mapping[tuple[str, str], Any]


class Refused(pickle.UnpicklingError):
    """str() names what has no place in a weight file."""


class Unpickler(pickle.Unpickler):
    """Knows the names that are `admitted`; any other is refused."""

    def __init__(self, file: BinaryIO, admitted: Names):
        super().__init__(file)
        self._admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        module = IMPORT_MAPPING.get(module, module)  # Python 2's names, which protocol 2 still writes
        if (module, name) not in self._admitted:
            return self.unknown(f"{module}.{name}")
        return self._admitted[module, name]

    def unknown(self, name: str) -> Any:
        raise Refused(name)

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("a reference to outside the file")


class Placeholder:
    """An object of a class that is not imported; it takes whatever it is filled with, and keeps none of it."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        return super().__new__(cls)

    def ignore(self, *anything: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class _Uncallable(Placeholder):
    """For modules whose functions do things. Pickles make most objects by `__new__` alone, and functions are called."""

    def __init__(self, *arguments: Any, **keywords: Any):
        raise Refused(type(self).__name__)


class _Mapping(dict):
    """Stands for an OrderedDict, a Counter or a defaultdict, whose attributes and factory are left out."""

    def __init__(self, *arguments: Any):
        super().__init__(*(each for each in arguments if isinstance(each, dict | list)))

    def __setstate__(self, *state: Any) -> None:
        pass


@dataclass(frozen=True)
class Storage:
    """Numbers in a torch file, one after the other: their place in it, type and count."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Stored:
    """A tensor in a torch file that has not been read."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size


def _rebuild(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Stored:
    return Stored(storage, storage.dtype, offset, size, stride)


def _rebuild_typed(storage: Storage, offset: int, size: tuple, stride: tuple, *more: Any) -> Stored:
    return Stored(storage, more[2], offset, size, stride)  # after requires_grad and hooks


def _rebuild_subclass(rebuild: Callable[..., Any], kind: Any, arguments: tuple, state: Any) -> Any:
    return rebuild(*arguments)


def _first(data: Any, *_: Any) -> Any:
    return data


_STORAGES = {
    **dict(Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Bool=torch.bool),
    **dict(Long=torch.int64, Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8),
}
# what is called in the pickles of data: by everyone's options, logs and random states; modules and their names
_DATA = """
builtins set frozenset complex bytearray slice range
copyreg _reconstructor
_codecs encode
argparse Namespace
types SimpleNamespace
collections deque
datetime datetime date time timedelta timezone
decimal Decimal
fractions Fraction
uuid UUID
pathlib Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath
pathlib._local Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath
numpy dtype ndarray
numpy.core.multiarray scalar _reconstruct
numpy._core.multiarray scalar _reconstruct
numpy.core.numeric _frombuffer
numpy._core.numeric _frombuffer
torch device Size
torch.serialization _get_layout
"""
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(line.split()[0], name): Placeholder for line in _DATA.split("\n") for name in line.split()[1:]},
    **{("collections", name): _Mapping for name in ("OrderedDict", "defaultdict", "Counter")},
    **{("torch", f"{name}Storage"): dtype for name, dtype in _STORAGES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _STORAGES.values()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
}
_DOERS = {*sys.stdlib_module_names, "torch", "numpy"} - {"__main__"}


class _TorchUnpickler(Unpickler):
    """Notes the storages that a torch file refers to, in `storages`."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, _ADMITTED)
        self.storages: dict[str, Storage] = {}

    def unknown(self, name: str) -> type:
        return type(name, (_Uncallable if name.partition(".")[0] in _DOERS else Placeholder,), {})

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or any(view):
            raise Refused(f"a reference to {kind!r}")
        return self.storages.setdefault(str(key), Storage(str(key), dtype, numel))


class TorchFile:
    """What torch.save wrote: `content`, in which every tensor is a `Stored`, and `tensor` to read one.

    Damaged files raise nearly any type of error; `Refused` names a function that a file wants to call.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._bytes: Callable[[str], bytes]
        self._kept: tuple[Storage | None, Tensor | None] = None, None
        try:
            start = self._file.read(len(OLD_TORCH))
            self._file.seek(0)
            self.content = self._open_old() if start == OLD_TORCH else self._open_zip()
        except BaseException:
            self._file.close()
            raise

    def _open_zip(self) -> Any:
        archive = zipfile.ZipFile(self._file)
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("torch.save did not write this archive")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in archive.namelist():
            raise Refused("TorchScript: save the network's state_dict()")
        if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
            raise ValueError("it is compressed, which torch.save's files are not")
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        self._bytes = lambda key: archive.read(f"{root}data/{key}")
        return _TorchUnpickler(io.BytesIO(archive.read(pickles[0]))).load()

    def _open_old(self) -> Any:
        for _ in range(3):  # a magic number, a version, the sizes of C's types
            _TorchUnpickler(self._file).load()
        unpickler = _TorchUnpickler(self._file)
        content = unpickler.load()
        places: dict[str, tuple[int, int]] = {}
        for key in _TorchUnpickler(self._file).load():
            storage = unpickler.storages[str(key)]
            numel, place = int.from_bytes(self._file.read(8), "little"), self._file.tell()
            places[storage.key] = place, numel * storage.dtype.itemsize
            self._file.seek(place + places[storage.key][1])

        def read(key: str) -> bytes:
            place, size = places[key]
            self._file.seek(place)
            return self._file.read(size)

        self._bytes = read
        return content

    def tensor(self, stored: Stored) -> Tensor:
        """A copy of its own, contiguous, on the CPU."""
        storage, flat = self._kept
        if flat is None or storage != stored.storage:  # several tensors may lie in one storage
            storage = stored.storage
            data = bytearray(self._bytes(storage.key))
            if len(data) != storage.numel * storage.dtype.itemsize:
                raise ValueError(f"storage {storage.key} has {len(data)} bytes")
            flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            self._kept = storage, flat
        if math.prod(stored.size) * stored.dtype.itemsize > flat.numel():
            raise ValueError(f"a tensor of {tuple(stored.size)} in a storage of {flat.numel()} bytes")
        view = flat.view(stored.dtype).as_strided(stored.size, stored.stride, stored.offset)
        return view.clone(memory_format=torch.contiguous_format)

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
