"""Weight files of networks of ours: however the network was changed, wrapped or written, and whatever the disk does."""

import argparse
import collections
import dataclasses
import datetime
import enum
import errno
import os
import pathlib
import pickle
import resource
import signal
import stat
import subprocess
import tarfile
import types
import unicodedata
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.serialization import MAGIC_NUMBER

import normfree
from normfree.cli import main
from normfree.deploy.convert import convert_weights
from normfree.deploy.predict import predict
from normfree.errors import InputError
from normfree.layers import WSConv2d
from normfree.models import create_model, from_weights, table
from normfree.models.network import Network
from normfree.weights import read_weights
from normfree.weights.deepmind import to_haiku, write_haiku
from normfree.weights.pickles import OLD_TORCH
from normfree.weights.timm import ARCHITECTURES, to_timm, write_timm

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


def nano(num_classes: int = 5, **options) -> Network:
    """A network all of whose parameters count."""
    torch.manual_seed(0)
    model = create_model("nfnet_nano", num_classes, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2 or p.shape[0] == num_classes:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


def logits(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def refused(match: str, call, *arguments, **options) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


# --- a network that was changed after it was made ---


def with_other_head(model):
    model.head.fc = nn.Linear(model.num_features, 7)


def with_other_stem(model):
    old = model.stem.conv0
    model.stem.conv0 = WSConv2d(4, old.out_channels, 3, old.stride, old.padding, input_scale=old.input_scale)


def with_one_tensor_twice(model):
    block = model.stages[1][1]
    block.conv1b.weight = block.conv1.weight


OPTIONS = {"timm": ARCHITECTURES["nf_resnet26"][1], "haiku": {}}
CHANGES = {
    "classes": lambda model: model.reset_classifier(3),
    "as many classes": lambda model: model.reset_classifier(5),
    "no classes": lambda model: model.reset_classifier(0),
    "no classifier": lambda model: setattr(model.head, "fc", nn.Identity()),
    "another classifier": with_other_head,
    "four channels": with_other_stem,
    "shared": with_one_tensor_twice,
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "frozen": lambda model: model.requires_grad_(False),
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "dropout": lambda model: setattr(model.head.drop, "p", 0.7),
    "compiled stage": lambda model: setattr(model.stages, "1", torch.compile(model.stages[1], backend="eager")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_read_as_it_is(change, tmp_path):
    model = nano()
    assert model.info is not None
    model.info = dataclasses.replace(model.info, class_names=("a", "b", "c", "d", "e"))
    CHANGES[change](model)
    normfree.save(model, tmp_path / "x.safetensors")
    again = normfree.load(tmp_path / "x.safetensors")
    weight = model.head.fc.weight if isinstance(model.head.fc, nn.Linear) else None
    assert again.info is not None
    assert again.info.num_classes == again.num_classes == (0 if weight is None else len(weight))
    assert len(again.info.class_names) in (0, again.num_classes)
    images = torch.randn(2, again.in_channels, 32, 32).to(next(model.parameters()).dtype)
    assert again.in_channels == len(again.info.mean) == len(again.info.std)
    state = {key.replace("_orig_mod.", ""): value for key, value in model.state_dict().items()}
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    if change != "compiled stage":  # which takes seconds
        rounding = torch.finfo(images.dtype).eps
        torch.testing.assert_close(logits(again, images), logits(model.eval(), images), rtol=100 * rounding, atol=1e-5)


@pytest.mark.parametrize("indices", [None, (0,), (1, 3)])
def test_feature_extractors(indices, tmp_path):
    model = nano(features_only=True, out_indices=indices)
    normfree.save(model, tmp_path / "x.safetensors")
    for mine, yours in zip(logits(normfree.load(tmp_path / "x.safetensors")), logits(model), strict=True):
        assert torch.equal(mine, yours)


UNDESCRIBED = {
    "head.fc.1.weight": lambda model: setattr(
        model.head, "fc", nn.Sequential(nn.ReLU(), nn.Linear(model.num_features, 5))
    ),
    "head.fc": lambda model: setattr(model, "head", nn.Identity()),
    "stages.3.0": lambda model: setattr(model, "stages", model.stages[:3]),
    "stem.conv0": lambda model: setattr(model.stem.conv0, "stride", (2, 2)),
    "layer 'act'": lambda model: setattr(model, "act", nn.ReLU()),
    "se.fc1.bias": lambda model: setattr(model.stages[0][0].se.fc1, "bias", None),
}


@pytest.mark.parametrize("name", UNDESCRIBED)
def test_what_a_file_cannot_describe_is_not_written(name, tmp_path):
    """`load` would build another function, or none."""
    model = nano()
    UNDESCRIBED[name](model)
    refused("cannot describe this network", normfree.save, model, tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_header_that_contradicts_the_network_is_refused(tmp_path):
    model, path = nano(), tmp_path / "x.safetensors"
    info = model.info
    assert info is not None
    refused(
        "info is for 6 classes and 3 channels", normfree.save, model, path, dataclasses.replace(info, num_classes=6)
    )
    refused("impossible class_names", normfree.save, model, path, dataclasses.replace(info, class_names=("a",)))
    refused("impossible mean and std", normfree.save, model, path, dataclasses.replace(info, mean=(0.5,)))
    refused("not JSON", normfree.save, model, path, dataclasses.replace(info, overrides={"drop_rate": np.float32(0)}))
    refused("not made by create_model", normfree.save, nn.Linear(1, 1), path)
    refused("hold no numbers", normfree.save, nano().to("meta"), path)
    assert not any(tmp_path.iterdir())


class Scaled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(2 * x)


def test_wrappers_are_left_out(tmp_path):
    model, path = nano(), tmp_path / "x.safetensors"
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        torch.optim.swa_utils.AveragedModel(model),
        torch.compile(nn.DataParallel(model), backend="eager"),
    ):
        normfree.save(wrapped, path)
        assert torch.equal(logits(normfree.load(path)), logits(model))
    refused("not made by create_model", normfree.save, Scaled(model), path)  # which is more than the network


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_sharded_networks_are_written_whole(tmp_path):
    """FSDP2, whose parameters are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nano()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        scalars = {p for p in model.parameters() if not p.ndim}  # which FSDP2 does not take
        for part in (*model.stages, model):
            fully_shard(part, mesh=mesh, ignored_params=scalars)
        assert all(hasattr(p, "full_tensor") for p in model.parameters() if p.ndim)
        normfree.save(model, tmp_path / "x.safetensors")
    finally:
        torch.distributed.destroy_process_group()
    again = normfree.load(tmp_path / "x.safetensors").state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "model.", "net.backbone."])
def test_prefixes_of_wrappers_are_understood(prefix, tmp_path):
    """In files of ours, as the version before wrote them, and in others."""
    model, path = nano(), tmp_path / "x.safetensors"
    assert model.info is not None
    state = {prefix + key: value for key, value in model.state_dict().items()}
    save_file(state, path, model.info.to_metadata())
    assert torch.equal(logits(normfree.load(path)), logits(model))
    torch.save({"state_dict": state | {"n_averaged": torch.tensor(3)}}, tmp_path / "x.pth")
    assert torch.equal(logits(normfree.load(tmp_path / "x.pth")), logits(model))


# --- state dicts and checkpoints ---


def test_a_state_dict_alone_is_recognised(tmp_path, capsys):
    model, path = nano(), tmp_path / "x.pth"
    state = model.state_dict()
    for content in (
        state,
        *({key: state} for key in ("model_state_dict", "state_dict", "model", "ema", "net", "mine")),
    ):
        torch.save(content, path)
        assert torch.equal(logits(normfree.load(path)), logits(model))
        assert torch.equal(logits(create_model("nfnet_nano", 5, weights=path).eval()), logits(model))
    save_file(state, tmp_path / "x.safetensors")
    capsys.readouterr()
    again = normfree.load(tmp_path / "x.safetensors")
    assert "x.safetensors records no options; assuming those of nfnet_nano: the defaults" in capsys.readouterr().err
    assert torch.equal(logits(again), logits(model))
    assert again.info is not None
    assert again.info.source == "state dict x.safetensors"
    normfree.save(again, tmp_path / "ours.safetensors")


def test_average_comes_before_weights(tmp_path):
    model, path = nano(), tmp_path / "x.pth"
    other = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "by_name": other}
    for key in ("state_dict_ema", "model_ema", "ema", "params_ema"):
        torch.save({"optimizer": momentum, "model": other, key: model.state_dict(), "rng": torch.get_rng_state()}, path)
        assert torch.equal(logits(normfree.load(path)), logits(model))
    torch.save({"optimizer": momentum, "run": {"model": model.state_dict()}}, path)
    _, notes = from_weights("nfnet_nano", 5, 3, path, {})
    assert "the weights are its 'run/model'" in notes
    torch.save({"one": other, "two": model.state_dict()}, path)
    refused("several state dicts .*'one', 'two'", normfree.load, path)
    torch.save({f"{name}.{key}": value for name in ("student", "teacher") for key, value in other.items()}, path)
    refused("several networks .*'student.', 'teacher.'", normfree.load, path)
    lightning = {f"model.{key}": value for key, value in model.state_dict().items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": lightning}, path)
    assert "left out: loss.weight" in from_weights("nfnet_nano", 5, 3, path, {})[1]


def test_options_that_a_state_dict_does_not_show(tmp_path):
    model, path = nano(width=(16, 32, 48, 48)), tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    again = create_model("nfnet_nano", 5, weights=path, width=(16, 32, 48, 48)).eval()
    assert torch.equal(logits(again), logits(model))
    refused("does not fit any network here: tensor .* give them in create_model", normfree.load, path)
    refused("does not fit nfnet_nano: tensor", create_model, "nfnet_nano", 5, weights=path)
    refused("does not fit nfnet_micro", create_model, "nfnet_micro", 5, weights=path)
    extractor = nano(features_only=True, out_indices=(0, 2))
    torch.save(extractor.state_dict(), path)
    again = create_model("nfnet_nano", weights=path, features_only=True, out_indices=(0, 2)).eval()
    assert all(torch.equal(a, b) for a, b in zip(logits(again), logits(extractor), strict=True))


@dataclasses.dataclass
class Options:
    lr: float = 0.1
    out: Path = Path("runs")


class Kind(enum.Enum):
    SMALL = 1


class AttributeDict(dict):
    pass


def everything_beside_tensors() -> dict:
    return {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x"), when=datetime.datetime(2026, 1, 1)),
        "options": Options(),
        "kind": Kind.SMALL,
        "hparams": AttributeDict(a=1),
        "metrics": collections.defaultdict(list, top1=[np.float32(1)]),
        "numpy": (np.random.default_rng(0).random(3), np.arange(3)),
        "more": [types.SimpleNamespace(a=1), {1, 2}, 1j, b"x", 2**99, collections.Counter("ab"), datetime.timedelta(1)],
        "class": Options,
        "dtype": torch.float32,
    }


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}])
def test_checkpoints_hold_all_sorts_of_things(options, tmp_path):
    model, path = nano(), tmp_path / "x.pth.tar"
    model.final_conv.bias = nn.Parameter(torch.randn(2, len(model.final_conv.bias)).half().float()[1])  # a view
    torch.save(everything_beside_tensors() | {"model": model.state_dict()}, path, **options)
    assert torch.equal(logits(normfree.load(path)), logits(model))


class Bomb:
    """Would leave a folder behind if it were unpickled in good faith."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_of_a_checkpoint_runs(tmp_path):
    state, path, trap = nano().state_dict(), tmp_path / "x.pth", tmp_path / "trap"
    run = f"import os; os.mkdir({str(trap)!r})"
    for bomb, name in ((Bomb(os.mkdir, str(trap)), r"\w+\.mkdir"), (Bomb(exec, run), r"\w+\.exec"),
                       (Bomb(torch.save, 1, str(trap)), "torch.serialization.save"),
                       (Bomb(subprocess.call, ["mkdir", str(trap)]), "subprocess.call")):  # fmt: skip
        for old in (False, True):
            for content in ({"model": state, "args": bomb}, {"model": state | {"x": bomb}}, bomb, [bomb]):
                torch.save(content, path, _use_new_zipfile_serialization=not old)
                refused(f"refused: a weight file has no business with {name}", normfree.load, path)
    torch.save({"model": nano()}, path)
    refused(r"refused: .* normfree\.models\.nfnet\.NFNet: save the network's state_dict", normfree.load, path)
    torch.save({"model": state | {"x": Options()}}, path)
    refused(r"refused: .*Options", normfree.load, path)
    assert not trap.exists()


def test_what_torch_load_would_run_is_refused_before(tmp_path, monkeypatch):
    """TorchScript goes to torch.jit, tar archives are unpacked, a reference to a module may write its source code."""
    path = tmp_path / "x.pth"
    for name in ("torch.jit.load", "torch.serialization.tarfile.open"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("this is code of the file"))
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save does
        for name, content in (("version", b"3"), ("data.pkl", b""), ("code/x.py", b""), ("constants.pkl", b"")):
            archive.writestr(f"x/{name}", content)
    refused("refused: .* TorchScript", normfree.load, path)
    for begins in (b"tar", OLD_TORCH):  # as the name of its first file, or as old files of torch.save
        with tarfile.TarFile(path, "w") as archive:
            for name in ("x" * len(begins), "storages", "tensors", "pickle"):
                archive.addfile(tarfile.TarInfo(name))
        content = bytearray(path.read_bytes())
        content[: len(begins)], content[148:156] = begins, b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        path.write_bytes(content)
        with tarfile.TarFile(path) as archive:
            assert len(archive.getnames()) == 4
        refused("damaged", normfree.load, path)

    class Module(pickle.Pickler):
        def persistent_id(self, value):
            return ("module", Options, "x.py", "source") if value == "here" else None

    with path.open("wb") as file:
        for value in (MAGIC_NUMBER, 1001, {}):
            pickle.dump(value, file, 2)
        Module(file, 2).dump({"model": "here"})
    refused("refused: .* a reference to 'module'", normfree.load, path)


def test_tensors_that_are_not_in_their_file(tmp_path):
    """Larger than their storage, of numbers that are missing or changed: memory that is not the file's is not read."""
    model, path = nano(), tmp_path / "x.pth"
    state = model.state_dict()
    for bad in (torch.zeros(1).expand(2**40), torch.zeros(3, dtype=torch.complex64)):
        torch.save(state | {"stem.conv0.bias": bad}, path)
        refused("damaged or not a weight file .*a tensor of", normfree.load, path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    start = content.rindex(b"\x80\x02]q")  # the names of the storages whose numbers follow
    path.write_bytes(content[:start] + pickle.dumps([], 2))
    refused("damaged .*have no numbers", normfree.load, path)
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.index(state["head.fc.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    refused("damaged .*checksum", normfree.load, path)


def test_torch_may_be_told_to_read_weights_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": nano().state_dict()}, tmp_path / "x.pth")
    assert torch.equal(logits(normfree.load(tmp_path / "x.pth")), logits(nano()))
    torch.save({"model": nano().state_dict(), "options": Options()}, tmp_path / "x.pth")
    refused("refused: .* TORCH_FORCE_WEIGHTS_ONLY_LOAD", normfree.load, tmp_path / "x.pth")


def test_damaged_files_of_every_kind(tmp_path):
    """Cut anywhere, or with bytes that are others: one line, or the whole network."""
    model = nano()
    torch.save({"model": model.state_dict()}, tmp_path / "new.pth")
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    normfree.save(model, tmp_path / "ours.safetensors")
    generator = np.random.default_rng(0)
    for name in ("new.pth", "old.pth", "plain.safetensors", "ours.safetensors"):
        whole = (tmp_path / name).read_bytes()
        damaged = [whole[:length] for length in (0, 1, 30, 3000, len(whole) // 2, len(whole) - 1)]
        for _ in range(10):
            content = bytearray(whole)
            content[generator.integers(0, 2000)] ^= 0x55
            damaged.append(bytes(content))
        for content in damaged:
            (tmp_path / "x").write_bytes(content)
            said = ""
            try:
                normfree.load(tmp_path / "x")
            except InputError as error:
                said = str(error)
            assert "\n" not in said
            assert said or len(content) == len(whole)


def test_a_run_folder_stands_for_its_best_weights(tmp_path):
    normfree.save(nano(), tmp_path / "best.safetensors")
    assert torch.equal(logits(normfree.load(tmp_path)), logits(nano()))
    (tmp_path / "best.safetensors").unlink()
    refused("a folder, with no best.safetensors", normfree.load, tmp_path)


def test_half_precision_files_start_a_run_in_float32(tmp_path):
    normfree.save(nano().bfloat16(), tmp_path / "x.safetensors")
    model = create_model("nfnet_nano", 7, weights=tmp_path / "x.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model).shape == (2, 7)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    (row,) = predict(str(tmp_path / "x.safetensors"), [str(tmp_path / "x.png")], device="cpu")
    assert len(row.top) == 1


@pytest.mark.parametrize("kind", ["ours", "state dict", "timm", "haiku"])
def test_loading_builds_no_network_twice(kind, tmp_path, monkeypatch):
    """The network that identified the file is filled; others of the same depth are built once, to be told apart."""
    path = tmp_path / "x"
    model = nano() if kind in ("ours", "state dict") else create_model("nf_resnet26", 5, **OPTIONS[kind])
    state = model.state_dict()
    if kind == "ours":
        normfree.save(model, path)
    elif kind == "haiku":
        write_haiku(path, to_haiku(state, "nf_resnet"))
    else:
        torch.save(state if kind == "state dict" else to_timm(state, "nf_resnet26"), path)
    built = []

    def build(*arguments):
        built.append(table.build(*arguments))
        return built[-1]

    monkeypatch.setattr("normfree.models.files.build", build)
    again = normfree.load(path)
    assert any(network is again for network in built)
    names = [network.info.architecture for network in built]
    assert sorted(names) == sorted(set(names))
    assert len(built) == 1 or kind == "state dict"
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


# --- the disk ---


def test_modes_follow_the_umask(tmp_path):
    model = create_model("nf_resnet26", 3, width=(16, 32, 48, 64))
    normfree.save(model, tmp_path / "in.safetensors")
    for umask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            normfree.save(model, tmp_path / "x.safetensors")
            for name in ("y.npz", "y.safetensors"):
                convert_weights(str(tmp_path / "in.safetensors"), str(tmp_path / name))
            write_timm(tmp_path / "y.pth", model.state_dict())
        finally:
            os.umask(before)
        for name in ("x.safetensors", "y.pth", "y.npz", "y.safetensors"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_links_are_written_through(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "x.safetensors")
    for _ in range(2):  # a link to nothing, and to a file
        normfree.save(nano(), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert torch.equal(logits(normfree.load(tmp_path / "deep" / "x.safetensors")), logits(nano()))


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    refused("cannot write .*folder: Is a directory", normfree.save, nano(), tmp_path / "folder")
    refused(
        "cannot write .*: (Not a directory|File exists)", normfree.save, nano(), tmp_path / "file" / "x.safetensors"
    )
    refused("cannot write .*: File name too long", normfree.save, nano(), tmp_path / ("x" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert not any((tmp_path / "folder").iterdir())


@contextmanager
def full_disk():
    """A limit on the size of files is a full disk that needs no disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.pth"])
def test_a_full_disk_leaves_what_was_there(name, tmp_path, capsys):
    """One line, exit code 1."""
    model = create_model("nf_resnet26", 3, width=(16, 32, 48, 64))
    normfree.save(model, tmp_path / "in.safetensors")
    path = tmp_path / name
    path.write_bytes(b"old")
    if name == "x.pth":  # of which convert makes none, since timm has no network of these widths
        with full_disk(), pytest.raises(OSError, match="File too large") as caught:
            write_timm(path, model.state_dict())
        assert caught.value.filename == str(path)
    else:
        with full_disk(), pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path / "in.safetensors"), str(path)])
        assert stop.value.code == 1
        assert capsys.readouterr().err == f"normfree: File too large: {path}\n"
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_at_the_last_moment(call, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    normfree.save(nano(), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        normfree.save(nano(3), path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# --- other channels, other classes ---


@pytest.mark.parametrize("name", ["nfnet_nano", "bn_nfnet_nano"])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_grey_images_see_the_same_function(name, eps, tmp_path):
    """Exactly, after the first convolution, at borders too: the filter's sum, standardized, times the new gain."""
    options = {} if eps is None or name.startswith("bn") else {"ws_eps": eps}
    torch.manual_seed(0)
    colour = create_model(name, 5, **options).double().eval()
    with torch.no_grad():
        for p in colour.stem.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    normfree.save(colour, tmp_path / "x.safetensors")
    image = torch.randn(2, 1, 40, 41, dtype=torch.float64)
    expected = logits(colour, image.expand(-1, 3, -1, -1))
    torch.set_default_dtype(torch.float64)
    try:
        grey = create_model(name, 5, 1, weights=tmp_path / "x.safetensors").eval()
        six = create_model(name, 5, 6, weights=tmp_path / "x.safetensors").eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(logits(grey, image), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(logits(six, image.expand(-1, 6, -1, -1)), expected, rtol=1e-10, atol=1e-12)
    conv = next(module for module in colour.modules() if isinstance(module, nn.Conv2d))
    summed = next(module for module in grey.modules() if isinstance(module, nn.Conv2d))
    assert torch.equal(summed.weight, conv.weight.sum(1, keepdim=True))


def test_other_channels_are_said_and_saved(tmp_path):
    normfree.save(nano(), tmp_path / "x.safetensors")
    model, notes = from_weights("nfnet_nano", 5, 1, tmp_path / "x.safetensors", {})
    assert any("stem.conv0 is adapted from 3 to 1 channels" in line for line in notes)
    assert model.info is not None
    assert model.info.mean == pytest.approx((0.449,))
    assert model.info.std == pytest.approx((0.226,))
    normfree.save(model, tmp_path / "grey.safetensors")
    assert normfree.load(tmp_path / "grey.safetensors").in_channels == 1
    again, _ = from_weights("nfnet_nano", 5, 4, tmp_path / "grey.safetensors", {})
    assert torch.equal(again.stem[0].weight[:, 3], model.stem[0].weight[:, 0] / 4)


def named(path: Path, *names: str) -> Path:
    model = nano(len(names))
    assert model.info is not None
    normfree.save(model, path, dataclasses.replace(model.info, class_names=names))
    return path


def test_rows_of_the_classifier_follow_their_classes(tmp_path):
    nfd = unicodedata.normalize("NFD", "é")
    path = named(tmp_path / "x.safetensors", "a", nfd, "c")
    old = read_weights(path)[0]["head.fc.weight"]
    model, notes = from_weights("nfnet_nano", 3, 3, path, {}, ["c", "d", "é"])
    new = model.head.fc.weight
    assert torch.equal(new[0], old[2])
    assert torch.equal(new[2], old[1])
    assert not any(torch.equal(new[1], row) for row in old)
    assert notes[-1] == "the classifier keeps its rows for 2 of 3 classes; new: d; left out: a"
    assert model.info is not None
    assert model.info.class_names == ("c", "d", "é")

    def said(*class_names: str) -> str:
        return from_weights("nfnet_nano", len(class_names), 3, path, {}, class_names)[1][-1]

    assert said("a", "é", "c") == "the classifier keeps its rows for 3 of 3 classes"
    assert said("x", "y", "z") == "the classifier is new: none of the 3 classes is among the file's"
    assert said("a", "b") == "the classifier keeps its rows for 1 of 2 classes; new: b; left out: é, c"


def test_classifiers_of_unnamed_classes(tmp_path):
    path = tmp_path / "x.safetensors"
    normfree.save(nano(3), path)
    model, notes = from_weights("nfnet_nano", 3, 3, path, {}, "abc")
    assert notes[-1] == "the classifier for 3 classes is kept, though the file does not name its classes"
    assert torch.equal(model.head.fc.weight, nano(3).head.fc.weight)
    assert from_weights("nfnet_nano", 2, 3, path, {}, "ab")[1][-1] == (
        "the classifier is new: 2 classes, where the file has 3"
    )
    normfree.save(nano(0), path)
    assert from_weights("nfnet_nano", 2, 3, path, {}, "ab")[1][-1] == (
        "the classifier is new: 2 classes, where the file has none"
    )
    _, notes = from_weights("nfnet_nano", 0, 3, path, {"activation": "relu"})
    assert notes[0].endswith("x.safetensors: activation=relu")
