"""Private names of torch and torchvision: each as this version has it, and the path for a version that lacks it."""

import ast
import inspect
import itertools
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import normfree
from normfree import _compat
from normfree.functional import standardize
from normfree.layers import WSConv2d
from normfree.models import create_model
from normfree.native import native_for
from normfree.optim import AGC, EMA, SGD_AGC
from normfree.optim.sgd import sgd_step_

PACKAGE = Path(normfree.__file__).parent
NOT_PRIVATE = {"_asdict", "_replace", "_exit"}  # of named tuples and of os, whose documentation has them


def private_names(tree: ast.AST, own: set[str]) -> list[str]:
    """What a file takes from elsewhere with a leading underscore: attributes, imports, names given to getattr."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [part for name in (module, *(alias.name for alias in node.names)) for part in name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        found += [name for name in names if name.startswith("_") and not name.startswith(("__", "_foreach_"))]
    return [name for name in found if name not in own | NOT_PRIVATE]


def defined(tree: ast.AST) -> set[str]:
    """Functions, classes, and variables and attributes that are assigned to."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def test_private_names_are_used_in_compat_alone():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    own = set().union(*map(defined, trees.values())) | {"_compat", "_compat_pickle"}
    used = {path.name: names for path, tree in trees.items() if (names := private_names(tree, own))}
    assert used.pop("_compat.py")
    assert not used
    source = "import torch._x\nfrom torch._y import z\nfrom torch import _w\nmodule._hooks\ngetattr(p, '_flag')"
    assert private_names(ast.parse(source), set()) == ["_x", "_y", "_w", "_hooks", "_flag"]


@pytest.mark.parametrize(
    ("ours", "cls", "theirs"),
    [
        ("BatchNorm", nn.BatchNorm3d, nn.modules.batchnorm._BatchNorm),
        ("NormBase", nn.InstanceNorm2d, nn.modules.batchnorm._NormBase),
        ("ConvNd", nn.Conv1d, nn.modules.conv._ConvNd),
        ("ConvTransposeNd", nn.ConvTranspose3d, nn.modules.conv._ConvTransposeNd),
        ("DropoutNd", nn.Dropout2d, nn.modules.dropout._DropoutNd),
    ],
)
def test_base_classes(ours, cls, theirs):
    assert getattr(_compat, ours) is theirs
    assert issubclass(cls, theirs)
    assert _compat._base(nn.Conv2d, "_Renamed") is nn.modules.conv._ConvNd  # the first, whatever it is called


@pytest.mark.parametrize(
    ("owner", "name"),
    [(torch._C, "_is_tracing"), (torch._C, "_are_functorch_transforms_active"), (forward_ad, "_current_level")],
)
def test_transforms(owner, name, monkeypatch):
    seen = []

    def look(x):
        seen.append(_compat.is_transformed())
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(look, torch.ones(2), check_trace=False)
    with forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [False, True, True, True]
    weight, gain = torch.randn(4, 3, 2, 2, requires_grad=True), torch.ones(4)
    before = standardize(weight, gain)
    monkeypatch.delattr(owner, name)
    assert _compat.is_transformed()  # PyTorch's own operations, which any transform understands
    torch.testing.assert_close(standardize(weight, gain), before)


def test_dispatch_modes(monkeypatch):
    assert not _compat.dispatch_mode_active()
    with FlopCounterMode(display=False):
        assert _compat.dispatch_mode_active()
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    assert _compat.dispatch_mode_active()
    assert native_for(torch.ones(3)) is None


@pytest.mark.parametrize("private", [True, False])
def test_storage(private, monkeypatch):
    if not private:
        monkeypatch.delattr(torch._C, "_has_storage")
    inside = []
    torch.vmap(lambda x: inside.append(_compat.has_storage(x)) or x)(torch.ones(2, 3))
    assert inside == [False]
    assert _compat.has_storage(torch.ones(3))
    assert not _compat.has_storage(torch.ones(3).to_sparse())


def test_hooks(monkeypatch):
    for register in (
        lambda module: module.register_forward_hook(print),
        lambda module: module.register_forward_pre_hook(print),
        lambda module: module.register_full_backward_hook(print),
        lambda module: module.register_full_backward_pre_hook(print),
        lambda module: nn.modules.module.register_module_forward_hook(print),
    ):
        module = nn.ReLU()
        assert not _compat.has_hooks(module)
        handle = register(module)
        assert _compat.has_hooks(module)
        assert _compat.has_forward_hooks(module) == bool(module._forward_hooks or module._forward_pre_hooks)
        handle.remove()
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook")
    assert _compat.has_hooks(module)
    del module._forward_hooks
    assert _compat.has_forward_hooks(module)


def test_wrappers():
    module = nn.Linear(1, 1)
    assert _compat.unwrapped(torch.compile(module, backend="eager")) is module
    assert _compat.unwrapped(nn.DataParallel(module)) is module
    assert _compat.unwrapped(module) is None


@pytest.mark.parametrize("missing", [None, "_parameters", "_buffers", "_modules"])
def test_registered_tensors(missing):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 3, bias=False)))
    names = {"_parameters", "_buffers", "_modules", "parameters", "buffers"} - {missing}
    later: Any = types.SimpleNamespace(**{name: getattr(model, name) for name in names})
    found = {id(t) for t in _compat.registered_tensors(later)}
    assert found == {id(t) for t in (*model.parameters(), *model.buffers())}


PADDED = [
    nn.Conv1d(4, 6, 3, padding=2, groups=2),
    nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), padding_mode="reflect"),
    nn.Conv2d(4, 6, (4, 2), padding="same", padding_mode="circular"),
    nn.Conv3d(4, 6, 3, padding="valid"),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("conv", PADDED, ids=str)
def test_padding_and_forward_of_convolutions(conv):
    x = torch.randn(2, 4, *[9] * len(conv.kernel_size))
    names = ("kernel_size", "stride", "padding", "padding_mode", "dilation", "groups")
    later: Any = types.SimpleNamespace(**{name: getattr(conv, name) for name in names})
    assert _compat.conv_pads(later) == _compat.conv_pads(conv) == list(conv._reversed_padding_repeated_twice)
    for either in (conv, later):
        assert torch.equal(_compat.conv_forward(either, x, conv.weight, conv.bias), conv(x))


@pytest.mark.parametrize("sides", [None, (13, 20), (2, 6, 13, 20)])
def test_output_padding(sides):
    conv = nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2))
    x = torch.randn(2, 4, 7, 6)
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation")
    later: Any = types.SimpleNamespace(**{name: getattr(conv, name) for name in names})
    padding = _compat.output_padding(conv, x, sides)
    assert _compat.output_padding(later, x, sides) == padding
    geometry = (conv.stride, conv.padding, padding, conv.groups, conv.dilation)
    made = torch.nn.functional.conv_transpose2d(x, conv.weight, conv.bias, *geometry)
    assert torch.equal(conv(x, None if sides is None else list(sides)), made)


def test_stored_values():
    dense = torch.ones(3)
    assert _compat.stored_values(dense) is dense
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 4.0]), (3,), check_invariants=False
    )
    assert _compat.stored_values(sparse).tolist() == [1, 2, 4]
    later = types.SimpleNamespace(is_sparse=True, coalesce=sparse.coalesce)
    assert _compat.stored_values(later).tolist() == [3, 4]  # type: ignore[arg-type]


def test_flat_parameters_of_fsdp1():
    p = nn.Parameter(torch.ones(3))
    assert not _compat.is_fsdp1_flat(p)
    p._fsdp_flattened = True
    assert _compat.is_fsdp1_flat(p)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("sides", [(6,), (2, 3)])
def test_first_row_of_a_shard(sides, private, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not private:
        monkeypatch.setitem(sys.modules, "torch.distributed.tensor._utils", None)
    for rank in range(6):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
        try:
            mesh = init_device_mesh("cpu", sides)
            for rows, places in itertools.product((1, 4, 7, 13), itertools.product((Shard(0), Shard(1), Replicate()),
                                                                                   repeat=len(sides))):  # fmt: skip
                part = torch.arange(rows)
                for place, ranks, coordinate in zip(places, sides, mesh.get_coordinate(), strict=True):
                    parts = part.chunk(ranks) if place == Shard(0) else [part] * ranks
                    part = parts[coordinate] if coordinate < len(parts) else part[:0]
                p = DTensor.from_local(torch.ones(1, 1), mesh, places, run_check=False, shape=(rows, 2), stride=(2, 1))
                if len(part):
                    assert _compat.first_row(p) == part[0], (rank, rows, places)
        finally:
            torch.distributed.destroy_process_group()
    assert _compat.first_row(torch.tensor(1.0)) == 0


def test_step_hooks():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    assert not list(_compat.step_pre_hooks(optimizer))
    AGC(optimizer)
    assert len(list(_compat.step_pre_hooks(optimizer))) == 1
    assert not list(_compat.step_pre_hooks(object()))  # type: ignore[arg-type]


def test_fused_sgd(monkeypatch):
    """Held back or not, the step is that of the batched operations."""
    assert _compat.fused_sgd_ is torch._fused_sgd_
    results = []
    for fused in (_compat.fused_sgd_, None):
        monkeypatch.setattr("normfree.optim.sgd.fused_sgd_", fused)
        for hold in (torch.tensor(False), torch.tensor(True)):
            torch.manual_seed(0)
            tensors = [[torch.randn(3, 4), torch.randn(5)] for _ in range(3)]
            sgd_step_(*tensors, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, hold=hold)
            results.append([*tensors[0], *tensors[2]])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=0)


def test_untyped_storage():
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(2).untyped_storage(), dtype=torch.float32, _internal=True
    )
    assert _compat.untyped(storage).nbytes() == 8
    later = types.SimpleNamespace(untyped=lambda: "bytes")
    assert _compat.untyped(later) == "bytes"


def test_records(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    with (tmp_path / "x.pt").open("rb") as file:
        names = _compat.records(file)
        assert "data.pkl" in names
        monkeypatch.delattr(torch._C, "PyTorchFileReader")
        assert _compat.records(file) >= names
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
    with (tmp_path / "script.pt").open("rb") as file:
        assert "constants.pkl" in _compat.records(file)


def test_lists_of_torchvision():
    both = types.SimpleNamespace(_images=["a", "b"], _labels=[0, 1])
    assert _compat.listed(both, "images", "labels") == [["a", "b"], [0, 1]]
    assert _compat.listed(both, "labels") == [0, 1]
    with pytest.raises(RuntimeError, match=r"torchvision keeps them elsewhere: .*_samples"):
        _compat.listed(both, "samples")
    import torchvision.datasets as sets

    for cls, names in ((sets.GTSRB, ["_samples"]), (sets.OxfordIIITPet, ["_images", "_labels"])):
        stored = {node.attr for node in ast.walk(ast.parse(Path(inspect.getfile(cls)).read_text()))
                  if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}  # fmt: skip
        assert stored >= set(names)


def test_a_training_step_without_them(monkeypatch):
    """A training step is the same to rounding if torch does not tell what watches operations: no kernel runs."""

    def step():
        torch.manual_seed(0)
        model = create_model("nfnet_nano", 3, stochastic_depth=0.0, drop_rate=0.0)
        optimizer, images = SGD_AGC(model.parameters(), lr=0.1), torch.randn(2, 3, 32, 32)
        average = EMA(model)
        model(images).square().mean().backward()
        optimizer.step()
        average.update(1)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    expected = step()
    for name in ("_len_torch_dispatch_stack", "_has_storage"):
        monkeypatch.delattr(torch._C, name)
    monkeypatch.delattr(forward_ad, "_current_level")
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook")
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(WSConv2d(3, 4, 1), _compat.ConvNd)
