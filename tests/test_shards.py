"""Tar shards: packing and reading them back, their order, remote ones, damaged ones."""

from __future__ import annotations

import doctest
import http.server
import io
import multiprocessing
import os
import pickle
import pwd
import signal
import tarfile
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from normfree.data import (
    LabelledImages,
    TrainTransform,
    UnreadableImage,
    eval_batches,
    open_dataset,
    open_evaluation,
    train_batches,
)
from normfree.data import pack as pack_module
from normfree.data import remote as remote_module
from normfree.data import shards as shards_module
from normfree.data import splits as splits_module
from normfree.data.loader import EvalFunction
from normfree.data.pack import pack
from normfree.data.shards import Index, ShardImages, expand_braces, find_shards, scan
from normfree.data.splits import split_files
from normfree.data.transforms import EvalTransform, sample_rng
from normfree.errors import InputError

SHARD_MB = 0.02


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMFREE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_module, "_RETRY_SECONDS", (0.01, 0.01))
    return tmp_path / "cache"


def draw_folder(root: Path, per_class: int = 20, suffixes: tuple[str, ...] = ("jpg", "png", "webp")) -> Path:
    """`per_class` noisy pictures for each of cat, dog and eel, and a fifth of that to validate on."""
    rng = np.random.default_rng(0)
    for part, count in (("train", per_class), ("val", per_class // 5)):
        for name in ("cat", "dog", "eel"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 17, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number:02d}.{suffixes[number % len(suffixes)]}")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "photos")


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    assert pack(str(folder), str(tmp_path / "packed"), shard_mb=SHARD_MB) == []
    return tmp_path / "packed"


def stored(images: LabelledImages) -> ShardImages:
    assert isinstance(images.samples, ShardImages)
    return images.samples


def contents(images: Any) -> Counter:
    """What a set holds, whatever its order: (class, pixels)."""
    return Counter((images.class_names[t], images.read(i).tobytes()) for i, t in enumerate(images.targets))


def complaint(call: Any, *args: Any, match: str, **kwargs: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


# --- packing and reading back ---


def test_round_trip(folder: Path, packed: Path) -> None:
    for ours, theirs in zip(open_dataset(str(packed)), open_dataset(str(folder)), strict=True):
        assert ours.class_names == theirs.class_names == ("cat", "dog", "eel")
        assert len(stored(ours).shards) >= 2
        assert contents(ours) == contents(theirs)
        assert sorted(map(ours.source, range(len(ours)))) == sorted(
            Path(str(theirs.source(i))).read_bytes() for i in range(len(theirs))
        )
        assert [ours.size(i) for i in range(len(ours))] == [(17, 20)] * len(ours)
        # image for image in the order of the folder, though neighbours in a shard are of mixed classes
        assert list(ours.targets) == list(theirs.targets)
    train = open_dataset(str(packed))[0]
    on_disk = np.lexsort((stored(train).offsets, stored(train).places))
    assert len({train.targets[i] for i in on_disk[:10]}) == 3
    assert open_evaluation(str(packed), ["eel", "dog", "cat"]).class_names == ("eel", "dog", "cat")


def test_packing_is_deterministic_for_any_number_of_workers(folder: Path, packed: Path, tmp_path: Path) -> None:
    pack(str(folder), str(tmp_path / "again"), shard_mb=SHARD_MB, workers=2)
    for path in sorted(packed.glob("*.tar")):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        assert path.stat().st_size < 2 * SHARD_MB * 1e6
    assert sorted(p.name for p in packed.iterdir()) == sorted(p.name for p in (tmp_path / "again").iterdir())


def test_packed_arrays_are_bit_identical(tmp_path: Path) -> None:
    pack("mnist5k", str(tmp_path / "digits"))
    for ours, theirs in zip(open_dataset(str(tmp_path / "digits")), open_dataset("mnist5k"), strict=True):
        names = {theirs.name(i).removeprefix("mnist5k/"): i for i in range(len(theirs))}
        for index in range(0, len(ours), 41):
            twin = names[ours.name(index).rpartition("-")[2]]
            assert np.array_equal(np.asarray(ours.read(index, 1)), np.asarray(theirs.read(twin, 1)))
            assert ours.targets[index] == theirs.targets[twin]


def test_pack_makes_smaller(tmp_path: Path) -> None:
    for name, size in (("a/big", (400, 100)), ("a/low", (30, 90)), ("b/big", (100, 333)), ("b/low", (20, 20))):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", size, (9, 99, 9, 128)).save(tmp_path / "in" / f"{name}.png")
    pack(str(tmp_path / "in"), str(tmp_path / "out"), px=50, quality=80)
    train, validation = open_dataset(str(tmp_path / "out"))
    every = [images.size(i) for images in (train, validation) for i in range(len(images))]
    assert sorted(every) == [(20, 20), (30, 90), (50, 166), (200, 50)]
    with tarfile.open(stored(train).shards[0]) as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"jpg", "cls"}
    assert train.read(0).getpixel((0, 0)) == pytest.approx((132, 177, 132), abs=3)  # over white


def test_pack_leaves_out_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (folder / "train/cat/03.jpg").write_bytes(b"")
    (folder / "train/dog/04.png").write_bytes(b"no image")
    left_out = pack(str(folder), str(tmp_path / "out"), shard_mb=SHARD_MB)
    assert sorted(left_out) == [
        "train/cat/03.jpg: the file is empty",
        "train/dog/04.png: not an image in a known format",
    ]
    assert len(open_dataset(str(tmp_path / "out"))[0]) == 58


def test_pack_goes_on_after_a_kill(folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "killed"
    write, begun = pack_module._write_shard, []

    def killing(path: str, *args: Any) -> None:
        begun.append(path)
        if len(begun) == 3:
            Path(f"{path}.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "_write_shard", killing)
        arguments = dict(target=pack, args=(str(folder), str(out)), kwargs=dict(shard_mb=SHARD_MB))
        process = multiprocessing.get_context("fork").Process(**arguments)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    partial = Path(f"{out}.partial")
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert len(before) == 2
    assert not out.exists()
    complaint(pack, str(folder), str(out), shard_mb=2 * SHARD_MB, match="begun with other images or settings")
    shown: list[tuple[int, int]] = []
    pack(str(folder), str(out), shard_mb=SHARD_MB, show=lambda *seen: shown.append(seen))
    assert shown[0][0] > 10  # it did not begin anew
    assert shown[-1] == (72, 72)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert [(p.name, p.read_bytes()) for p in sorted(out.glob("*.tar"))] == [
        (p.name, p.read_bytes()) for p in sorted(packed.glob("*.tar"))
    ]
    complaint(pack, str(folder), str(out), match="exists; nothing was written")


def test_docstring_examples() -> None:
    for module in (shards_module, splits_module):
        results = doctest.testmod(module)
        assert (results.failed, results.attempted) == (0, 1)


# --- what shards look like ---


def test_shards_of_others_are_read_by_their_headers(packed: Path) -> None:
    with_index = open_dataset(str(packed))[0]
    for path in packed.glob("*.npz"):
        path.unlink()
    for _ in range(2):  # scanned, then remembered
        ours = open_dataset(str(packed))[0]
        assert ours.class_names == ("0", "1", "2")
        in_order = ours.subset(np.argsort(stored(ours).keys).tolist())
        for name in ("places", "offsets", "sizes", "keys"):
            assert np.array_equal(getattr(stored(in_order), name), getattr(stored(with_index), name))
        assert in_order.targets == with_index.targets


def test_scan_happens_once(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in packed.glob("*.npz"):
        path.unlink()
    open_dataset(str(packed))
    monkeypatch.setattr("normfree.data.shards.scan", lambda *_: pytest.fail("scanned again"))
    open_dataset(str(packed))
    shard = next(packed.glob("*.tar"))
    os.utime(shard, (1, 1))  # a shard of another time is another shard
    with pytest.raises(pytest.fail.Exception, match="scanned again"):
        open_dataset(str(packed))


def test_labels_in_every_form(tmp_path: Path) -> None:
    numbers = {f"{i:02d}.jpg": png() for i in range(12)} | {f"{i:02d}.cls": b"%d\n" % i for i in range(12)}
    images = open_evaluation(write_tar(tmp_path / "n.tar", numbers), [str(i) for i in range(12)])
    assert list(images.targets) == list(range(12))  # not in the order of the alphabet
    words = {
        "deep/er/a.PNG": png(1),
        "deep/er/a.json": b'{"label": "zebra", "other": 1}',
        "b.png": png(2),
        "b.cls": b"ant",
        "b.json": b"not json",
        "c.png": png(3),
        "c.json": b'{"class": "yak"}',
        "c.txt": b"a caption",
        "c.mask.png": png(4),
        "alone.cls": b"nothing",
    }
    found = scan(write_tar(tmp_path / "w.tar", words))
    assert [tuple(pair) for pair in zip(found.keys, found.labels, strict=True)] == [
        (b"deep/er/a", b"zebra"),
        (b"b", b"ant"),
        (b"c", b"yak"),
    ]
    images = open_evaluation(str(tmp_path / "w.tar"), ["ant", "yak", "zebra"])
    assert [images.read(i, 1).getpixel((0, 0)) for i in range(3)] == [1, 2, 3]
    assert images.name(0) == "w.tar/deep/er/a"


CLASHES = {  # members of a shard, and what is said of them
    "two formats": (["000.jpg", "000.png", "000.cls"], "000.jpg and 000.png are both the image 000"),
    "one name twice": (
        ["000.jpg", "000.cls", "001.jpg", "001.cls", "000.jpg"],
        "000.jpg and 000.jpg are both the image",
    ),
    "letter case": (["000.JPG", "000.jpg", "000.cls"], "000.JPG and 000.jpg are both the image 000"),
    "in a folder": (
        ["a/000.jpg", "./000.jpg", "a/000.webp", "a/000.cls"],
        "a/000.jpg and a/000.webp are both the image",
    ),
    "two views": (
        ["000.left.jpg", "000.right.jpg", "000.cls"],
        "000.left.jpg and 000.right.jpg are both the image 000",
    ),
    "number and number": (["000.jpg", "000.cls", "000.json"], "000.cls says 0, 000.json says 7"),
    "the other way round": (["000.jpg", "000.json", "000.cls"], "000.json says 7, 000.cls says 0"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_members_that_contradict_each_other_are_named(case: str, tmp_path: Path) -> None:
    names, complains = CLASHES[case]
    shard = str(tmp_path / "x.tar")
    with tarfile.open(shard, "w") as tar:
        for name in names:
            content = {"cls": b"0", "json": b'{"label": 7}'}.get(name.rpartition(".")[2]) or png()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    complaint(scan, shard, match=f"x.tar: {complains}")


def test_members_that_go_together(tmp_path: Path) -> None:
    """A number and a name, a repeated label, fields beside the image, dots in a name, what macOS adds."""
    members = {
        "0.jpg": png(0),
        "0.seg.png": png(50),
        "0.depth.png": png(60),
        "0.cls": b"0",
        "0.json": b'{"label": "ant"}',
        "1.v2.png": png(10),
        "1.json": b'{"label": 1}',
        "1.cls": b"1",
        "2.png": png(20),
        "2.cls": b" ",
        "2.json": b'{"label": 2}',
        "._2.png": b"of the Finder",
    }
    found = scan(write_tar(tmp_path / "x.tar", members))
    assert dict(zip(found.keys.tolist(), found.labels.tolist(), strict=True)) == {b"0": b"0", b"1": b"1", b"2": b"2"}
    images = open_evaluation(str(tmp_path / "x.tar"), ["0", "1", "2"])
    assert sorted(images.read(i).getpixel((0, 0))[0] for i in range(3)) == [0, 10, 20]  # type: ignore
    twice = [write_tar(tmp_path / f"{name}.tar", {"0.png": png(), "0.cls": b"0"}) for name in "ab"]
    assert len(open_evaluation(str(tmp_path / "{a,b}.tar"), ["0"])) == len(twice)


def test_long_and_foreign_names(tmp_path: Path) -> None:
    long = "ü" * 150
    images = open_evaluation(write_tar(tmp_path / "x.tar", {f"{long}.png": png(7), f"{long}.cls": "ö".encode()}), ["ö"])
    assert images.name(0) == f"x.tar/{long}"
    assert images.read(0, 1).getpixel((0, 0)) == 7


def test_parts_by_name(tmp_path: Path) -> None:
    def shard(name: str, labels: bytes = b"ab") -> None:
        members = {f"{i}.png": png(i) for i in range(len(labels))}
        members |= {f"{i}.cls": labels[i : i + 1] for i in range(len(labels))}
        write_tar(tmp_path / name, members)

    shard("one/train-0.tar")
    shard("one/imagenet1k-train-1.tar")
    shard("one/validation-0.tar", b"b")
    train, validation = open_dataset(str(tmp_path / "one"))
    assert (len(train), len(validation), list(validation.targets)) == (4, 1, [1])
    assert train.notes == (
        "1 of 2 classes have no validation images: 'a'",
        "few validation images: one is 100 % of the accuracy",
    )
    shard("two/train/0.tar")
    shard("two/test/0.tar")
    (tmp_path / "two/models/old").mkdir(parents=True)
    train, validation = open_dataset(str(tmp_path / "two"))
    assert (len(train), len(validation)) == (2, 2)
    assert "test images serve for validation" in train.notes[0]
    shard("three/0.tar", b"ab" * 100)
    train, validation = open_dataset(str(tmp_path / "three"), validation_fraction=0.2)
    assert set(train.targets) == set(validation.targets) == {0, 1}
    assert (len(train) + len(validation), 20 < len(validation) < 60) == (200, True)
    assert contents(train) + contents(validation) == contents(open_evaluation(str(tmp_path / "three"), ["a", "b"]))
    assert open_evaluation(str(tmp_path / "three"), ["a", "b"], held_out=0.2).source(1) == validation.source(1)
    # an archive beside class folders is no shard
    (tmp_path / "four/train/a").mkdir(parents=True)
    shard("four/photos.tar")
    complaint(open_dataset, str(tmp_path / "four"), match="class folders but no images")
    assert split_files(["valid/0.tar"]) == {"valid": ["valid/0.tar"]}
    shard("five/val-0.tar")
    complaint(open_dataset, str(tmp_path / "five"), match="to validate on but none to train on")


def test_patterns(packed: Path) -> None:
    shards = sorted(str(path) for path in packed.glob("train-*.tar"))
    last = len(shards) - 1
    assert find_shards(f"{packed}/train-{{000000..{last:06d}}}.tar") == shards
    assert find_shards(f"{packed}/train-*.tar") == shards
    train, validation = open_dataset(f"{packed}/{{train-*,validation-{{000000..000001}}}}.tar")
    assert (len(train), len(stored(validation).shards)) == (60, 2)
    complaint(find_shards, f"{packed}/train-{{000000..000099}}.tar", match=f"no such shard: .* \\({last + 1} are there")
    complaint(find_shards, f"{packed}/nothing-*.tar", match="no such shard: .*nothing")
    complaint(open_dataset, "http://127.0.0.1:1/folder", match="give the tar shards that are there")
    complaint(open_dataset, "http://127.0.0.1:1/*.tar", match="web server does not list its files")


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 4))
def test_braces(first: int, count: int, width: int) -> None:
    names = [f"a-{n:0{width}d}.tar" for n in range(first, first + count + 1)]
    assert expand_braces(f"a-{{{first:0{width}d}..{first + count:0{width}d}}}.tar") == names
    nested = expand_braces(f"{{a-{{{first:0{width}d}..{first + count:0{width}d}}},b}}.tar")
    assert set(nested) == {*names, "b.tar"}
    assert len(nested) == len(names) + 1


# --- order ---


def big_set(shards: int, per_shard: int) -> LabelledImages:
    count = shards * per_shard
    samples = ShardImages(
        shards=tuple(f"{i}.tar" for i in range(shards)),
        places=np.repeat(np.arange(shards, dtype=np.int32), per_shard),
        offsets=np.arange(count),
        sizes=np.ones(count, np.int64),
        keys=np.array([b"n04399382_12345"] * count),
    )
    return LabelledImages(samples=samples, targets=array("i", [0] * count), class_names=("a", "b"))


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_order_is_a_permutation_that_stays_local(shards: int, per_shard: int, seed: int) -> None:
    images = big_set(shards, per_shard)
    order = images.order(sample_rng(seed, 0, 0, 1))
    assert sorted(order.tolist()) == list(range(shards * per_shard))
    assert np.array_equal(order, images.order(sample_rng(seed, 0, 0, 1)))
    if shards <= 16:  # as in a folder
        assert np.array_equal(order, sample_rng(seed, 0, 0, 1).permutation(shards * per_shard))
    window = 16 * per_shard
    for start in range(0, len(order), window):
        assert len(set(stored(images).places[order[start : start + window]])) <= 16


def test_order_is_random_across_and_within_shards() -> None:
    images = big_set(64, 50)
    first, second = (images.order(sample_rng(0, epoch, 0, 1)) for epoch in (0, 1))
    windows = [set(stored(images).places[order[:800]].tolist()) for order in (first, second)]
    assert windows[0] != windows[1]
    assert all(len(window) == 16 for window in windows)
    assert (
        len(set(stored(images).places[first[:160]].tolist())) == 16
    )  # of 800: all sixteen shards, but for one in 10^4
    assert np.mean(np.diff(first) == 1) < 0.02


def test_a_million_images_are_cheap_to_send_to_a_worker() -> None:
    images = big_set(1000, 1280)
    sent = pickle.dumps(images)
    assert len(sent) < 1_280_000 * 50
    assert len(pickle.loads(sent)) == 1_280_000


def test_stream_is_the_same_for_any_workers_and_from_any_step(packed: Path) -> None:
    images = open_dataset(str(packed))[0]

    def stream(workers: int, start: int = 0) -> list[Any]:
        transform = TrainTransform(8)
        steps = dict(batch_size=7, seed=3, start_step=start, stop_step=20)
        return list(train_batches(images, transform, workers=workers, **steps))

    alone = stream(0)
    assert Counter(i for batch in alone for i in batch.indices.tolist()[: 60 - 7 * 8])  # epochs straddle batches
    for workers in (0, 1, 2):
        for a, b in zip(alone[11:], stream(workers, start=11), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.targets, b.targets)
            assert torch.equal(a.indices, b.indices)
    seen = [i for batch in alone for i in batch.indices.tolist()]
    assert sorted(seen[:60]) == sorted(seen[60:120]) == list(range(60))
    assert seen[:60] == images.order(sample_rng(3, 0, 0, 1)).tolist()


# --- remote ---


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts the answers, and breaks some when told to."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sent: Counter[str] = Counter()
        self.faults: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        fault = self.server.faults.pop(0) if self.server.faults and path.suffix == ".tar" else ""
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        content = path.read_bytes()
        self.server.sent[path.name] += not fault
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:1000] if fault == "cut" else content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(packed: Path) -> Iterator[Server]:
    with Server(packed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pattern(server: Server, packed: Path) -> str:
    last = {part: len(list(packed.glob(f"{part}-*.tar"))) - 1 for part in ("train", "validation")}
    names = ",".join(f"{part}-{{000000..{number:06d}}}" for part, number in last.items())
    return f"{server.address}/{{{names}}}.tar"


def test_remote_shards_are_fetched_once_when_touched(server: Server, packed: Path, cache: Path) -> None:
    train, validation = open_dataset(pattern(server, packed))
    assert not any(name.endswith(".tar") for name in server.sent)  # the indices beside them were enough
    assert train.class_names == ("cat", "dog", "eel")
    train.read(0)
    first = os.path.basename(stored(train).shards[stored(train).places[0]])
    assert [name for name in server.sent if name.endswith(".tar")] == [first]
    for ours, theirs in zip((train, validation), open_dataset(str(packed)), strict=True):
        assert contents(ours) == contents(theirs)
    again = open_dataset(pattern(server, packed))[0]
    assert contents(again) == contents(train)
    assert set(server.sent.values()) == {1}
    assert not list(cache.rglob("*.partial"))


def test_remote_shards_without_indices(server: Server, packed: Path) -> None:
    for path in packed.glob("*.npz"):
        path.unlink()
    assert open_dataset(pattern(server, packed))[0].class_names == ("0", "1", "2")
    assert sum(server.sent.values()) == len(list(packed.glob("*.tar")))
    server.shutdown()
    assert len(open_dataset(pattern(server, packed))[0]) == 60  # all is here now


def test_workers_share_one_copy(server: Server, packed: Path) -> None:
    images = open_dataset(pattern(server, packed))[0]
    transform: EvalFunction = EvalTransform(8)
    alone = list(eval_batches(open_dataset(str(packed))[0], transform, batch_size=4, workers=0))
    several = list(eval_batches(images, transform, batch_size=4, workers=2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, several, strict=True))
    assert set(server.sent.values()) == {1}


def _read_all(address: str, start: Any, queue: Any) -> None:
    images = open_dataset(address)[0]
    start.wait()
    queue.put(sum(len(images.source(i)) for i in range(len(images))))


def test_ranks_that_start_at_once_share_one_copy(server: Server, packed: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, queue = context.Barrier(3), context.Queue()
    arguments = (pattern(server, packed), start, queue)
    ranks = [context.Process(target=_read_all, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    totals = [queue.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    local = open_dataset(str(packed))[0]
    assert totals == [sum(len(local.source(i)) for i in range(60))] * 3
    assert set(server.sent.values()) == {1}


def test_passing_failures_are_tried_again(server: Server, packed: Path, capsys: pytest.CaptureFixture) -> None:
    train = open_dataset(pattern(server, packed))[0]
    server.faults = ["503", "cut"]
    assert contents(train) == contents(open_dataset(str(packed))[0])
    said = capsys.readouterr().err
    assert "503" in said
    assert "bytes before the end" in said or "Incomplete" in said
    assert said.count("trying again") == 2


def test_lasting_failures_are_one_line(server: Server, packed: Path) -> None:
    train = open_dataset(pattern(server, packed))[0]
    server.faults = ["503"] * 3
    complaint(train.read, 0, match=r"cannot read http.*train-00000\d.tar .*503.*: check its name, the network")
    server.faults = ["403", "403"]
    complaint(train.read, 0, match="403")
    assert server.faults == ["403"]  # not tried again
    server.faults = []
    complaint(open_dataset, f"{server.address}/no-such.tar", match="cannot read .*no-such.tar .*404")
    complaint(open_dataset, "s4://bucket/a.tar", match="cannot read s4://bucket/a.tar .*s4")


def test_lasting_failures_in_a_worker_end_it(server: Server, packed: Path) -> None:
    train = open_dataset(pattern(server, packed))[0]
    steps = dict(seed=0, start_step=0, stop_step=2)
    for batches in (
        lambda: train_batches(train, TrainTransform(8), batch_size=8, workers=1, **steps),
        lambda: eval_batches(train, EvalTransform(8), batch_size=8, workers=1),
    ):
        server.faults, said = ["404"] * 5, ""
        try:
            list(batches())
        except InputError as error:
            said = str(error)
        assert "404" in said
        # a worker that an error keeps alive would be waited for without end when the process exits
        assert multiprocessing.active_children() == []


def test_old_copies_make_room(server: Server, packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_dataset(pattern(server, packed))[0]
    sizes = [(packed / os.path.basename(shard)).stat().st_size for shard in stored(images).shards]
    assert len(sizes) >= 4
    monkeypatch.setenv("NORMFREE_CACHE_GB", "much")
    complaint(images.source, 0, match="NORMFREE_CACHE_GB is 'much'; give the gigabytes")
    monkeypatch.setenv("NORMFREE_CACHE_GB", f"{2.5 * max(sizes) / 1e9:f}")  # room for two
    firsts = [int(np.argmax(stored(images).places == shard)) for shard in range(4)]
    for shard in (0, 1, 0, 2):  # 1 is the one not used for longest when 2 comes
        for path in (cache / "copies").glob("*.tar"):
            used = path.stat().st_mtime_ns - 10**9
            os.utime(path, ns=(used, used))  # a second goes by, whatever the clock of the file system
        images.source(firsts[shard])
    copies = sorted(path.name.split("-", 1)[1] for path in (cache / "copies").glob("*.tar"))
    assert copies == ["train-000000.tar", "train-000002.tar"]
    assert contents(images) == contents(open_dataset(str(packed))[0])  # it comes again
    assert sum(path.stat().st_size for path in (cache / "copies").glob("*.tar")) <= 2.5 * max(sizes)


def test_other_stores_through_fsspec(packed: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for path in packed.iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    for spec in ("memory://bucket/*.tar", "memory://bucket/{train,validation}-*.tar"):
        for ours, theirs in zip(open_dataset(spec), open_dataset(str(packed)), strict=True):
            assert contents(ours) == contents(theirs)
    complaint(open_dataset, "memory://bucket/gone-*.tar", match="no such shard")
    complaint(open_dataset, "memory://bucket/gone.tar", match="cannot read memory://bucket/gone.tar")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    complaint(open_dataset, "~/photos", match="no such folder: ~/photos")
    assert remote_module.data_folder().name == "cache"
    monkeypatch.delenv("NORMFREE_DATA")
    complaint(remote_module.data_folder, match="no such home folder; set NORMFREE_DATA to a folder")
    complaint(open_dataset, "http://127.0.0.1:1/a.tar", match="no such home folder; set NORMFREE_DATA to a folder")


# --- damage ---


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    whole = Path(write_tar(tmp_path / "whole.tar", {f"{i}.{s}": png() for i in range(9) for s in ("png", "cls")}))
    content = whole.read_bytes()
    header = content.index(b"5.png")
    for name, bad, match in (
        ("cut", content[: len(content) // 3], "cut.tar is damaged|cut off"),
        ("cut-at-a-header", content[:header], "cut off or damaged after 5 images"),
        ("cut-in-a-header", content[: header + 100], "cut off or damaged after 5 images"),
        ("bad-header", content[:header] + b"\xff" * 512 + content[header + 512 :], "cut off or damaged after 5 images"),
        ("empty", b"", "damaged, or no uncompressed tar .*empty file"),
        ("text", b"hello " * 1000, "damaged, or no uncompressed tar"),
        ("gzip", __import__("gzip").compress(content), "damaged, or no uncompressed tar"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(bad)
        complaint(scan, str(tmp_path / f"{name}.tar"), match=match)
    complaint(scan, write_tar(tmp_path / "e.tar", {}), match="has no images KEY.jpg")
    for label in ({}, {"a.cls": b" "}, {"a.json": b"[]"}, {"a.json": b'{"x": 1}'}, {"a.json": b"{"}):
        shard = write_tar(tmp_path / "l.tar", {"a.png": png()} | label)
        complaint(scan, shard, match=r"image a of .*l.tar has no label: it needs a.cls, or a.json with")


def test_what_changes_under_a_set(packed: Path) -> None:
    images = open_dataset(str(packed))[0]
    shard = Path(stored(images).shards[0])
    content = shard.read_bytes()
    inside = sorted(np.flatnonzero(stored(images).places == 0).tolist(), key=lambda i: int(stored(images).offsets[i]))
    shard.write_bytes(content[: int(stored(images).offsets[inside[3]]) + 10])
    images.read(inside[0])
    with pytest.raises(UnreadableImage, match=r"train-000000.tar/\d{7}-train-.*: its shard is cut off before it"):
        images.read(inside[3])
    complaint(open_dataset, str(packed), match="is not the index of the shard beside it")
    shard.unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        images.source(inside[0])
    shard.write_bytes(content)
    index = packed / "train-000000.npz"
    index.write_bytes(index.read_bytes()[:200])
    complaint(open_dataset, str(packed), match="train-000000.npz is no index of a shard, or is damaged")
    np.savez(index, keys=np.array([b"x"]))
    complaint(open_dataset, str(packed), match="train-000000.npz is no index of a shard")
    np.savez(index, keys=np.array([{"an": "object"}], dtype=object))  # would have to be unpickled
    complaint(open_dataset, str(packed), match="train-000000.npz is no index of a shard")


def test_a_damaged_memory_is_made_anew(packed: Path, cache: Path) -> None:
    for path in packed.glob("*.npz"):
        path.unlink()
    before = contents(open_dataset(str(packed))[0])
    remembered = list((cache / "indexes").iterdir())
    assert remembered
    for path in remembered:
        path.write_bytes(b"half")
    assert contents(open_dataset(str(packed))[0]) == before


def test_shards_of_different_packs_do_not_mix(packed: Path) -> None:
    index = Index.load(packed / "train-000001.npz")
    assert index is not None
    index._replace(classes=np.array([b"x", b"y", b"z"])).save(packed / "train-000001.npz")
    complaint(open_dataset, str(packed), match="come from packs with different classes")


def test_pack_complaints(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for wrong in (dict(shard_mb=0), dict(quality=0), dict(quality=101), dict(px=0)):
        complaint(pack, str(folder), out, match="--shard-mb is more than 0", **wrong)
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    complaint(pack, str(folder), out, match="none of the 72 images of .* could be read, the first is .*empty")
    assert not Path(out).exists()
