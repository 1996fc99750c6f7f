"""The authors' weight files: read without running code, translated exactly, refused by name."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import dill
import numpy as np
import pytest
import torch
from golden import build, load_golden, relative_error, to_images
from test_models import small

import normfree
from normfree.errors import InputError
from normfree.models import create_model
from normfree.weights.deepmind import from_haiku, haiku_name, read_haiku, to_haiku


def golden_tree(arrays, prefix="params/"):
    """The two-level mapping as the released code has it."""
    tree = {}
    for key, value in arrays.items():
        if key.startswith(prefix):
            module, _, name = key.removeprefix(prefix).rpartition("/")
            tree.setdefault(module, {})[name] = value
    return tree


@pytest.mark.parametrize(
    ("name", "family"),
    [("nfnet_tiny_gelu", "nfnet"), ("nf_resnet_tiny_se", "nf_resnet"), ("nf_regnet_tiny", "nf_regnet")],
)
def test_names_and_layout_of_the_released_code(name, family):
    arrays, config = load_golden(name)
    model = build(config).eval()
    state, report = from_haiku(golden_tree(arrays), model.state_dict(), family)
    assert (report.missing, report.unexpected, report.reshaped) == ([], [], [])
    assert len(report.matched) == len(model.state_dict())
    model.load_state_dict(state)
    with torch.no_grad():
        assert relative_error(model(to_images(arrays["input_0"])), arrays["output_0/logits"]) < 1e-5
    again = to_haiku(model.state_dict(), family)
    tree = golden_tree(arrays)
    assert again.keys() == tree.keys()
    for module in tree:
        assert again[module].keys() == tree[module].keys()
        assert all(np.array_equal(again[module][k], tree[module][k]) for k in tree[module])


@pytest.mark.parametrize("name", ["nfnet_f0", "nfnet_f6", "nf_resnet50", "nf_regnet_b1"])
def test_round_trip_is_exact(name):
    family = name.rpartition("_")[0] if name.startswith("nfnet") or "regnet" in name else "nf_resnet"
    state = small(name, num_classes=5).state_dict()
    back, report = from_haiku(to_haiku(state, family), state, family)
    assert len(report.matched) == len(state)
    assert all(torch.equal(back[k], state[k]) for k in state)


def write(path, tree, dump=dill.dumps):
    path.write_bytes(dump(tree))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_made_with_dill_loads(tmp_path, protocol):
    torch.manual_seed(0)
    model = small("nfnet_f0", num_classes=5).eval()
    tree = to_haiku(model.state_dict(), "nfnet")
    path = write(tmp_path / "F0_haiku.npz", tree, lambda t: dill.dumps(t, protocol=protocol))
    read = read_haiku(path)
    assert read.keys() == tree.keys()
    other = small("nfnet_f0", num_classes=5, weights=path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
    assert other.info is not None
    assert "F0_haiku.npz" in other.info.source


def test_numpys_old_names_and_haikus_mappings(tmp_path):
    """As written in 2021: numpy.core, FlatMapping. The globals of a pickle of today are renamed to those."""
    script = (
        "import sys, types, pickle, numpy as np\n"
        "module = types.ModuleType('haiku._src.data_structures')\n"
        "class FlatMapping(dict):\n"
        "    def __reduce__(self): return FlatMapping, (dict(self),)\n"
        "FlatMapping.__module__ = module.__name__\n"
        "module.FlatMapping = FlatMapping\n"
        "for name in ('haiku', 'haiku._src'): sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules[module.__name__] = module\n"
        "tree = FlatMapping({'a': FlatMapping({'w': np.arange(6, dtype=np.float32).reshape(2, 3)})})\n"
        "sys.stdout.buffer.write(pickle.dumps(tree, protocol=3))\n"
    )
    data = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data
    (tmp_path / "old.npz").write_bytes(old)
    assert np.array_equal(read_haiku(tmp_path / "old.npz")["a"]["w"], np.arange(6).reshape(2, 3))
    tree = OrderedDict(a={"w": np.ones((2, 3), np.float32)})
    assert read_haiku(write(tmp_path / "ordered.npz", tree))["a"]["w"].sum() == 6


class JaxArray:
    """What a pickle of a JAX array holds: numpy's own spelling, and what JAX knows of its type."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        rebuild, arguments, state = self.array.__reduce__()
        return _reconstruct_array, (rebuild, arguments, state, {"weak_type": False, "named_shape": {}})


def _reconstruct_array(*_):
    raise AssertionError("this would be code of the file")


def as_jax(value):
    return {key: as_jax(item) for key, item in value.items()} if isinstance(value, dict) else JaxArray(value)


def jax_pickle(tree):
    own = f"c{__name__}\n_reconstruct_array\n".encode()
    data = pickle.dumps(as_jax(tree), protocol=2)
    assert own in data
    return data.replace(own, b"cjax._src.array\n_reconstruct_array\n")


def nested(tree):
    """{"NFNet": {"~": {"stem_conv0": {"w": ...}}}}"""
    found: dict = {}
    for module, arrays in tree.items():
        place = found
        for part in module.split("/"):
            place = place.setdefault(part, {})
        place.update(arrays)
    return found


def other(tree):
    return {module: {name: np.zeros_like(array) for name, array in arrays.items()} for module, arrays in tree.items()}


def scalars(tree):
    """What arithmetic makes of arrays without dimensions."""
    return {
        m: {n: array[()] if array.ndim == 0 else array for n, array in arrays.items()} for m, arrays in tree.items()
    }


FORMS = {
    "scalars": lambda tree: pickle.dumps(scalars(tree)),
    "scalars of numpy 1": lambda tree: pickle.dumps(scalars(tree), 2).replace(b"numpy._core.", b"numpy.core."),
    "protocol 5": lambda tree: pickle.dumps(tree, 5),
    "(params, state)": lambda tree: pickle.dumps((tree, {})),
    "(params, state, count)": lambda tree: pickle.dumps((tree, {"NFNet/~/counter": {"n": np.int32(3)}}, 7)),
    "params": lambda tree: pickle.dumps({"params": tree, "state": {}, "step": np.int64(9)}),
    "the average": lambda tree: pickle.dumps({"_params": other(tree), "_opt": other(tree), "_ema_params": tree}),
    "nested": lambda tree: pickle.dumps({"opt": {"mu": nested(other(tree))}, "params": nested(tree)}),
    "jax": jax_pickle,
    "jax, (params, state)": lambda tree: jax_pickle({"0": tree, "1": {}}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_same_numbers(form, tmp_path):
    torch.manual_seed(0)
    state = small("nfnet_f0", num_classes=5).state_dict()
    tree = to_haiku(state, "nfnet")
    assert any(array.ndim == 0 for arrays in tree.values() for array in arrays.values())
    path = tmp_path / "x.npz"
    path.write_bytes(FORMS[form](tree))
    read = read_haiku(path)
    assert read.keys() == tree.keys()
    for module, arrays in tree.items():
        assert read[module].keys() == arrays.keys()
        assert all(np.array_equal(read[module][name], array) for name, array in arrays.items())
    loaded = small("nfnet_f0", num_classes=5, weights=path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


class Hostile:
    """Would leave a file behind if it were unpickled in good faith."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["top", "module", "leaf", "inside an array", "beside", "in a tuple"])
def test_nothing_runs(tmp_path, where):
    trap = tmp_path / "ran"
    bomb = Hostile(trap)
    tree = {
        "top": bomb,
        "module": {"a": bomb},
        "leaf": {"a": {"w": bomb}},
        "beside": {"params": {"a": {"w": np.ones(3, np.float32)}}, "step": bomb},
        "in a tuple": ({"a": {"w": np.ones(3, np.float32)}}, (bomb,)),
        "inside an array": {"a": {"w": np.array([bomb], dtype=object)}},
    }[where]
    path = write(tmp_path / "x.npz", tree, pickle.dumps)
    with pytest.raises(InputError, match=r"refused: .* (posix|nt)\.mkdir") as caught:
        read_haiku(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    pickle.loads(path.read_bytes())  # the trap is a real one
    assert trap.exists()


def test_what_is_no_weight_file(tmp_path):
    def refuse(data, message):
        path = tmp_path / "x.npz"
        path.write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            create_model("nfnet_nano", num_classes=3, weights=path)
        assert "\n" not in str(caught.value)

    whole = pickle.dumps({"a": {"w": np.ones(3, np.float32)}})
    refuse(whole[:-20], "damaged")
    refuse(whole, "of none of NFNet, NF_ResNet, NF_RegNet")
    refuse(pickle.dumps([1, 2]), "not a haiku weight file")
    refuse(pickle.dumps({"a": {"w": 1.0}}), "a/w is not an array of floats")
    refuse(pickle.dumps({"a": {"w": np.array(["x"])}}), "a/w is not an array of floats")
    refuse(pickle.dumps({"a": {"w": np.array([1])}}), "a/w is not an array of floats")
    refuse(pickle.dumps({"NFNet/~/a": {"w": np.ones(3)}, "date": "2021"}), "date is not an array of floats")
    refuse(pickle.dumps(np.ones(3)), "not a haiku weight file")
    refuse(pickle.dumps(({}, [], None)), "not a haiku weight file")
    loop: dict = {}
    loop["a"] = loop
    refuse(pickle.dumps(loop), "not a haiku weight file")
    refuse(dill.dumps({"a": lambda: 1}), "refused")


def test_report_names_what_differs():
    model = small("nfnet_nano", num_classes=4)
    tree = to_haiku(model.state_dict(), "nfnet")
    del tree["NFNet/~/linear"]["b"]
    tree["NFNet/~/extra"] = {"w": np.ones(3, np.float32)}
    tree["NFNet/~/final_conv"]["gain"] = np.ones(3, np.float32)
    _, report = from_haiku(tree, model.state_dict(), "nfnet")
    assert report.missing == ["head.fc.bias"]
    assert report.unexpected == ["NFNet/~/extra/w"]
    assert report.reshaped == [f"final_conv.gain (3,) for ({model.num_features},)"]
    assert "1 missing (head.fc.bias)" in str(report)


def test_another_number_of_classes_leaves_the_classifier_out(tmp_path):
    model = small("nfnet_f0", num_classes=5)
    path = write(tmp_path / "w.npz", to_haiku(model.state_dict(), "nfnet"))
    other = small("nfnet_f0", num_classes=3, weights=path)
    assert torch.equal(other.final_conv.weight, model.final_conv.weight)
    assert other.head.fc.weight.shape[0] == 3
    normfree.save(other, tmp_path / "ours.safetensors")
    assert normfree.load(tmp_path / "ours.safetensors").num_classes == 3
    with pytest.raises(InputError, match="haiku weight file of NFNet, not of bn_resnet50"):
        create_model("bn_resnet50", num_classes=5, weights=path)


def test_names():
    assert haiku_name("stem.conv3.gain", [], "nfnet") == ("NFNet/~/stem_conv3", "gain")
    assert haiku_name("stages.0.0.skip_gain", ["stages.0.0"], "nfnet") == ("NFNet/~/nf_block", "skip_gain")
