"""Weights from and to the Hub, against a local server that speaks the paths which huggingface_hub uses."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_hub import CONFIG, TOKEN, WEIGHTS, Client, FakeHub, git_sha1, sha256
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from normfree.errors import InputError
from normfree.weights.hub import HubURI, is_hub_uri, parse_uri


@pytest.fixture(scope="module")
def server():
    server = FakeHub()
    yield server
    server.stop()


@pytest.fixture
def hub(server):
    server.reset()
    return server


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    """Starts clients that share one cache."""
    cache, clients = tmp_path_factory.mktemp("cache"), []

    def start(site=server.site, **options):
        clients.append(Client(site, cache, **options))
        return clients[-1]

    yield start
    for client in clients:
        client.stop()


@pytest.fixture(scope="module")
def client(start):
    return start()


@pytest.fixture(scope="module")
def offline(start):
    return start(HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def unreachable(start):
    """A client whose HF_ENDPOINT is a port that nobody listens at; held, so that nobody else is given it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield start(f"http://127.0.0.1:{held.getsockname()[1]}")


# ---- addresses


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("hf://timm/dm_nfnet_f0.dm_in1k", ("timm/dm_nfnet_f0.dm_in1k", None, None)),
        ("hf://a/b@v1.0", ("a/b", "v1.0", None)),
        ("hf://a/b/x.bin", ("a/b", None, "x.bin")),
        ("hf://a/b@main/f0/x@2.bin", ("a/b", "main", "f0/x@2.bin")),
        ("hf://a/b@refs/pr/3/x.bin", ("a/b", "refs/pr/3", "x.bin")),
        ("hf://a/b@new%2Fidea/x.bin", ("a/b", "new/idea", "x.bin")),
    ],
)
def test_parts_of_an_address(uri, parts):
    assert is_hub_uri(uri)
    assert parse_uri(uri) == HubURI(*parts)


words = st.lists(st.text("aZ0_", min_size=1, max_size=4), min_size=1, max_size=3).map("-".join)
paths = st.lists(words, min_size=1, max_size=3).map("/".join)


@given(words, words, st.none() | words, st.none() | paths)
def test_an_address_gives_back_its_parts(owner, name, revision, file):
    uri = f"hf://{owner}/{name}" + (f"@{revision}" if revision else "") + (f"/{file}" if file else "")
    assert parse_uri(uri) == HubURI(f"{owner}/{name}", revision, file)


@pytest.mark.parametrize(
    "uri",
    [
        "hf://",
        "hf://a",
        "hf://a/",
        "hf://a/b/",
        "hf://a/b@",
        "hf://a/b@/x",
        "hf://a/b//x",
        "hf://a/b/../x",
        "a/b",
        "hf://datasets/a/b",
        "hf://.a/b",
        "hf://a/b c",
        "hf://a/b\n",
        "https://huggingface.co/a/b",
    ],
)
def test_a_malformed_address_is_refused_with_an_example(uri):
    with pytest.raises(InputError, match=r"as in hf://timm/dm_nfnet_f0\.dm_in1k") as raised:
        parse_uri(uri)
    assert "\n" not in str(raised.value)


def test_paths_are_no_addresses():
    assert not is_hub_uri(Path("hf://a/b"))
    assert not is_hub_uri("weights/f0.safetensors")


# ---- reading


def test_download_is_byte_for_byte_and_comes_from_the_cache_afterwards(hub, client, offline, unreachable):
    path = client.fetch(hub.uri)
    assert path.read_bytes() == WEIGHTS
    assert load_file(path)["head.weight"].sum() == 3000 * 2999 / 2
    assert path.is_relative_to(client.cache)
    assert path.name == "model.safetensors"
    assert client.blobs(hub.repo) == [sha256(WEIGHTS)]
    keys = {(on_site, key) for _, _, key, on_site in hub.log}
    assert keys == {(True, f"Bearer {TOKEN}"), (False, None)}  # the token goes to HF_ENDPOINT and to no other host

    hub.log.clear()
    assert client.fetch(hub.uri) == path
    assert {method for method, *_ in hub.log} == {"HEAD"}  # asked whether it changed, not downloaded
    hub.log.clear()
    assert offline.fetch(hub.uri) == unreachable.fetch(hub.uri) == path
    assert not hub.log


def test_files_revisions_and_candidates(hub, client, offline):
    old = save({"w": np.zeros(2, np.float32)})
    hub.repos[hub.repo] |= {"v0/first": {"pytorch_model.bin": b"old"}, "v1": {"f0/ema.safetensors": old, "b.bin": b"b"}}
    first = client.fetch(f"{hub.uri}@v0%2Ffirst")
    assert first.read_bytes() == b"old"
    assert client.fetch(f"{hub.uri}@v1/f0/ema.safetensors").read_bytes() == old
    assert client.fetch(f"{hub.uri}@v1", names=["a.bin", "b.bin"]).read_bytes() == b"b"
    with pytest.raises(InputError, match=r"no file model.safetensors or pytorch_model.bin at revision v1: .*/FILE"):
        client.fetch(f"{hub.uri}@v1")
    assert offline.fetch(f"{hub.uri}@v0%2Ffirst") == first  # the second candidate is found there too


def test_config(hub, client, offline):
    hub.repos |= {"a/none": {"main": {"x": b""}}, "a/b": {"main": {"config.json": b"{oops"}}}
    hub.repos["a/c"] = {"main": {"config.json": b"[1]"}}
    for reader in (client, offline):  # what a repository lacks is remembered in the cache
        assert reader.call("fetch_config", uri=hub.uri) == CONFIG
        assert reader.call("fetch_config", uri="hf://a/none") is None
    for name in "bc":
        with pytest.raises(InputError, match=f"config.json of a/{name} is no JSON object"):
            client.call("fetch_config", uri=f"hf://a/{name}")
    with pytest.raises(InputError, match="no repository a/d"):
        client.call("fetch_config", uri="hf://a/d")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://a/missing", "SITE has no repository a/missing, or it is private: .*`hf auth login`.*HF_TOKEN"),
        ("URI/x.bin", "has no file x.bin at revision main: name one"),
        ("URI@v9", "has no revision 'v9': name a branch, tag or commit"),
        ("hf://a/gated", "a/gated is gated: ask for access at SITE/a/gated, then .*HF_TOKEN"),
        ("hf://a/gated401", "a/gated401 is gated: ask for access at SITE/a/gated401, then .*HF_TOKEN"),
        ("hf://a/private", "has no repository a/private, or it is private: .*HF_TOKEN"),
        ("hf://a/closed", "has no repository a/closed, or it is private: .*HF_TOKEN"),
        ("hf://a/busy", "SITE answered 500 for a/busy"),
        ("hf://a/no", "SITE answered 403 for a/no .*HF_TOKEN"),
        ("hf://a/b--c", "a/b--c failed .*Cannot have -- or .."),
    ],
)
def test_what_is_not_there_is_said(hub, client, uri, message):
    hub.refusals = {"a/gated": (403, "GatedRepo"), "a/private": (401, "RepoNotFound"), "a/closed": (401, "")}
    hub.refusals |= {"a/gated401": (401, "GatedRepo"), "a/busy": (500, ""), "a/no": (403, "")}
    with pytest.raises(InputError, match=message.replace("SITE", hub.site)):
        client.fetch(uri.replace("URI", hub.uri))


def test_offline_and_not_in_the_cache(hub, offline):
    with pytest.raises(InputError, match=f"HF_HUB_OFFLINE is set and {hub.repo} is not in the cache .*unset it"):
        offline.fetch(hub.uri)


def test_unreachable_server_is_named_without_long_retries(hub, start, unreachable):
    with pytest.raises(InputError, match=r"no connection to http://127.0.0.1:\d+ .*HF_ENDPOINT"):
        unreachable.fetch(hub.uri)
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []

        def hang_up():
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    connection, _ = server.accept()
                    asked.append(connection.close())

        threading.Thread(target=hang_up, daemon=True).start()
        client = start(f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(InputError, match=r"127\.0\.0\.1"):
            client.fetch(hub.uri)
    assert 1 <= len(asked) <= 2  # huggingface_hub alone tries six times, for 23 s; a request itself may connect twice


def test_a_server_that_is_no_hub(hub, client, monkeypatch):
    monkeypatch.setattr(hub, "resolve", lambda *_: (200, {}, b"<html>Please log in to the hotel's network</html>"))
    with pytest.raises(InputError, match=f"downloading from {hub.repo} failed .*X-Repo-Commit"):
        client.fetch(hub.uri)


# ---- integrity


@pytest.mark.parametrize(("name", "hash_of"), [("model.safetensors", sha256), ("config.json", git_sha1)])
def test_a_wrong_hash_is_refused_and_the_next_try_downloads_anew(hub, client, name, hash_of):
    content = hub.files[name]
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    good, bad = hash_of(content), hash_of(flipped)
    hub.sent = {name: flipped, good: flipped}
    with pytest.raises(InputError, match=f"{name} is damaged .hash {bad[:12]}, where the Hub lists {good[:12]}"):
        client.fetch(f"{hub.uri}/{name}")
    assert client.blobs(hub.repo) == []
    hub.sent.clear()
    assert client.fetch(f"{hub.uri}/{name}").read_bytes() == content


def test_a_file_damaged_in_the_cache_is_refused_also_offline(hub, client, offline, tmp_path):
    path = client.fetch(hub.uri)
    blob, shared = path.resolve(), tmp_path / "shared"
    shutil.move(blob, shared)
    blob.symlink_to(shared)  # as where repositories share their blobs
    shared.write_bytes(WEIGHTS[:-4])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        offline.fetch(hub.uri)
    assert not any(os.path.lexists(place) for place in (path, blob, shared))
    assert client.fetch(hub.uri).read_bytes() == WEIGHTS


def test_a_file_whose_tag_is_no_hash_is_taken(hub, client, monkeypatch):
    monkeypatch.setattr(hub, "resolve", lambda *_: (200, {"X-Repo-Commit": "c" * 40, "ETag": '"version-7"'}, b"w"))
    assert client.fetch(f"{hub.uri}/x.txt").read_bytes() == b"w"
    assert client.blobs(hub.repo) == ["version-7"]


def test_a_file_of_the_wrong_size_is_refused(hub, client):
    hub.sent[sha256(WEIGHTS)] = WEIGHTS[:-1]
    message = f"should be of size {len(WEIGHTS)} but has size {len(WEIGHTS) - 1}"
    with pytest.raises(InputError, match=f"downloading from {hub.repo} failed .*{message}"):
        client.fetch(hub.uri)
    assert client.blobs(hub.repo) == []
    hub.sent.clear()
    assert client.fetch(hub.uri).read_bytes() == WEIGHTS


def test_a_download_that_breaks_off_goes_on(hub, client):
    hub.dropped = 1
    assert client.fetch(hub.uri).read_bytes() == WEIGHTS
    assert [on_site for method, *_, on_site in hub.log if method == "GET"] == [False, False]


# ---- writing


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "best.safetensors"
    path.write_bytes(WEIGHTS)
    return str(path)


def test_what_is_pushed_is_what_is_fetched(hub, client, file):
    card = "---\nlicense: apache-2.0\n---\n# A network – ours\n"
    uri = f"{hub.uri}.new"
    url = client.call("push", path=file, uri=uri, card=card, private=True)
    assert url == f"{hub.site}/{hub.repo}.new/commit/abc"
    assert hub.repos[f"{hub.repo}.new"]["main"] == {"model.safetensors": WEIGHTS, "README.md": card.encode()}
    assert hub.visibility == "private"
    assert sum("/commit/" in path for _, path, *_ in hub.log) == 1
    assert client.fetch(uri).read_bytes() == WEIGHTS
    assert client.fetch(f"{uri}/README.md").read_text() == card


def test_push_to_a_named_file_without_a_card(hub, client, file):
    client.call("push", path=file, uri=f"{hub.uri}/f1/ema.safetensors")
    assert hub.files.keys() == {"model.safetensors", "config.json", "f1/ema.safetensors"}
    assert hub.visibility == "public"


def test_push_to_a_store_that_refuses(hub, client, file, monkeypatch):
    answer = hub.answer
    monkeypatch.setattr(hub, "answer", lambda how, *rest: (403, {}, b"") if how == "PUT" else answer(how, *rest))
    with pytest.raises(InputError, match=f"no permission to write to {hub.repo}"):
        client.call("push", path=file, uri=hub.uri)


def test_push_that_cannot_be(hub, start, client, offline, unreachable, file):
    bob = start(HF_TOKEN="hf_of_bob")
    with pytest.raises(InputError, match=f"no permission to write to {hub.repo} at {hub.site}: .*write access"):
        bob.call("push", path=file, uri=hub.uri)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and nothing can be uploaded"):
        offline.call("push", path=file, uri=hub.uri)
    with pytest.raises(InputError, match=r"no connection to http://127.0.0.1:\d+"):
        unreachable.call("push", path=file, uri=hub.uri)
    with pytest.raises(InputError, match=r"no file '.*nothing.safetensors' to upload"):
        client.call("push", path=f"{file}/nothing.safetensors", uri=hub.uri)
    assert hub.files.keys() == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("name", ["fetch", "fetch_config", "push"])
def test_without_the_library_the_remedy_is_named(start, hub, file, name):
    without = start(library="without")
    with pytest.raises(InputError, match=r'pip install "normfree\[hub\]"'):
        without.call(name, uri=hub.uri, **({"path": file} if name == "push" else {}))


# ---- the command line


def test_timm_weights_from_the_hub_and_ours_to_it(hub, start, tmp_path):
    """A repository of timm's: its config.json says how pictures are prepared; then one of ours, pushed and read."""
    timm = pytest.importorskip("timm", reason="timm's network is the reference: pip install timm")
    torch = pytest.importorskip("torch")
    theirs = timm.create_model("nf_regnet_b0", num_classes=7).eval()
    config = {
        "architecture": "nf_regnet_b0",
        "num_classes": 7,
        "pretrained_cfg": {
            "input_size": [3, 160, 160],
            "test_input_size": [3, 208, 208],
            "crop_pct": 0.9,
            "test_crop_pct": 0.95,
            "crop_mode": "center",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.2, 0.2],
            "license": "apache-2.0",
        },
    }
    hub.files["model.safetensors"] = save({k: v.numpy() for k, v in theirs.state_dict().items()}, {"format": "pt"})
    hub.files["config.json"] = json.dumps(config).encode()
    environment = start().environment | {"OMP_NUM_THREADS": "1"}

    def convert(source, out):
        command = [sys.executable, "-m", "normfree", "convert", source, str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    import normfree

    said = convert(hub.uri, tmp_path / "ours.safetensors")
    assert "0 missing, 0 unexpected" in said
    ours = normfree.load(tmp_path / "ours.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), rtol=1e-4, atol=1e-6)
    info = ours.info
    assert (info.train_px, info.eval_px, info.eval_crop, info.crop_fraction) == (160, 208, "center", 0.95)
    assert (info.mean, info.std, info.licence) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "apache-2.0")

    pushed = f"{hub.uri}.ours"
    assert f"pushed to {hub.site}/{hub.repo}.ours/commit/" in convert(str(tmp_path / "ours.safetensors"), pushed)
    files = hub.repos[f"{hub.repo}.ours"]["main"]
    assert f'normfree.load("{pushed}")' in files["README.md"].decode()
    convert(pushed, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    hub.files["config.json"] = b'{"pretrained_cfg": {}}'
    command = [sys.executable, "-m", "normfree", "convert", hub.uri, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "its config.json is not one of timm's" in done.stderr
