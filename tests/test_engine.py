"""What the loop must not do: keep what is not finite, go on with other data, share a folder, lose a run's place."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import records, same_run, small_run

from normfree.config import save_config
from normfree.data.images import changed, inventory
from normfree.data.sources import open_dataset
from normfree.engine import checkpoint, loop
from normfree.engine.checkpoint import save_checkpoint
from normfree.engine.log import RunLog
from normfree.engine.loop import Diverged, Interrupted, train
from normfree.engine.run import evaluation_command
from normfree.errors import InputError
from normfree.files import working_in
from normfree.optim.sgd import SGD_AGC, sgd_step_
from normfree.tasks.classification import Classification, build, resume, start


def poison_gradient(monkeypatch, layer: str, step: int, value: float = float("inf")) -> None:
    """One number of a gradient is not finite in a step, counted from 0, whatever the loss."""
    original = loop._gradients

    def gradients(task, update, sam, plan, batch, seed, at):
        loss = original(task, update, sam, plan, batch, seed, at)
        if at == step:
            grad = dict(task.model.named_parameters())[layer].grad
            grad[(0,) * grad.ndim] = value
        return loss

    monkeypatch.setattr(loop, "_gradients", gradients)


@pytest.mark.parametrize("clipping", [None, 0.1])
@pytest.mark.parametrize("layer", ["stages.1.0.conv1.weight", "head.fc.weight", "stages.0.0.skip_gain"])
def test_a_gradient_that_is_not_finite_makes_no_step_and_no_file(photos, tmp_path, monkeypatch, clipping, layer):
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    run = replace(run, optim=replace(run.optim, clipping=clipping, lr=0.01))
    poison_gradient(monkeypatch, layer, step=12)
    with pytest.raises(Diverged, match=rf"^step 13: the gradient of {layer} is not finite"):
        start(run, folder)
    assert max(record["step"] for record in records(folder, "train")) == 12
    files = list(folder.rglob("*.safetensors"))
    assert len(files) >= 2  # of the first epoch
    assert all(value.isfinite().all() for file in files for value in load_file(file).values())


@pytest.mark.parametrize("check_every", [1, 4, 100])
def test_nothing_is_updated_from_the_first_bad_step_on_however_late_it_is_seen(
    photos, tmp_path, monkeypatch, check_every
):
    """As on a device, which is not asked after every step: the flag stays there, and holds the updates back."""
    run = small_run(photos, epochs=2, log_every=100)
    job = build(run)
    task, plan = job.task, replace(job.plan, check_every=check_every)
    seen = {}
    original = loop._gradients

    def gradients(task, update, sam, plan, batch, seed, step):
        seen.setdefault(step, {k: v.clone() for k, v in task.model.state_dict().items()})
        return original(task, update, sam, plan, batch, seed, step)

    monkeypatch.setattr(loop, "_gradients", gradients)
    poison_gradient(monkeypatch, "stages.2.0.conv0.weight", step=5)
    with pytest.raises(Diverged, match=r"^step 6: the gradient of stages\.2\.0\.conv0\.weight"):
        train(task, job.update, plan, new(tmp_path, run), run.seed)
    assert max(seen) == {1: 5, 4: 7, 100: 8}[check_every]  # after 9 steps an epoch is over, and evaluated
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, seen[5][name]), name
    assert any(not torch.equal(seen[4][name], seen[5][name]) for name in seen[5])


def new(tmp_path: Path, run) -> Path:
    save_config(run, tmp_path / "config.json")
    return tmp_path


@pytest.mark.parametrize("check_every", [1, 4])
def test_the_layer_is_found_by_repeating_the_step_as_it_was(photos, tmp_path, monkeypatch, check_every):
    """A layer whose output is not finite for one draw of dropout only: with other random numbers it would be missed."""
    run = small_run(photos, epochs=2, log_every=100)
    job = build(run)
    task, plan = job.task, replace(job.plan, check_every=check_every)
    torch.manual_seed(run.seed * 1_000_003 + 6)
    expected = torch.rand(1)
    block = task.model.stages[2][0]
    original = block.forward

    def forward(x):
        state = torch.get_rng_state()
        torch.manual_seed(torch.initial_seed())
        drawn = torch.rand(1)
        torch.set_rng_state(state)
        return original(x) * (float("nan") if torch.equal(drawn, expected) else 1.0)

    monkeypatch.setattr(block, "forward", forward)
    with pytest.raises(Diverged, match=r"^step 7: the output of stages\.2\.0 "):
        train(task, job.update, plan, new(tmp_path, run), run.seed)


def test_weights_that_overflow_are_neither_evaluated_nor_kept(photos, tmp_path, monkeypatch):
    """Finite gradients, finite rate, and an update that is beyond float32 in the last step of an epoch."""
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    original = SGD_AGC.step

    def step(self, *args, ema_step=0, **options):
        original(self, *args, ema_step=ema_step, **options)
        if ema_step == 17:
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(SGD_AGC, "step", step)
    with pytest.raises(Diverged, match=r"^step 18: model \S+ is not finite"):
        start(run, folder)
    assert [record["step"] for record in records(folder, "eval")] == [9]
    assert all(v.isfinite().all() for file in folder.rglob("*.safetensors") for v in load_file(file).values())


def test_gradients_beyond_the_range_of_a_norm_are_finite():
    assert loop._all_finite([torch.full((10,), 1e30), torch.zeros(3)])
    assert not loop._all_finite([torch.tensor([1.0, float("nan")]), torch.zeros(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("alike", [True, False], ids=["fused", "one by one"])
def test_a_held_step_changes_nothing_and_another_is_a_step(dtype, nesterov, alike):
    torch.manual_seed(0)
    last = torch.channels_last if alike else torch.contiguous_format

    def tensors(order=torch.channels_last):
        return [torch.randn(5, 7, dtype=dtype), torch.randn(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=order)]

    params, grads, momenta = tensors(), tensors(last), tensors()
    options = dict(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)

    def stepped(hold, grads):
        p, g, m = ([t.clone() for t in each] for each in (params, grads, momenta))
        sgd_step_(p, g, m, **options, hold=hold)
        return p + m

    for expected, found in zip(stepped(None, grads), stepped(torch.tensor(False), grads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    bad = [torch.full_like(grad, float("nan")) for grad in grads]
    for before, found in zip(params + momenta, stepped(torch.tensor(True), bad), strict=True):
        assert torch.equal(found, before)


def test_sgd_agc_obeys_hold():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD_AGC([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step(hold=torch.tensor(True))
    assert torch.equal(p, torch.ones(3))
    optimizer.step(hold=torch.tensor(False))
    assert not torch.equal(p, torch.ones(3))


# --- the data of a run ---


def interrupted(run, folder: Path, after: int, monkeypatch) -> None:
    """A run that was stopped by a signal after so many steps."""
    with monkeypatch.context() as patch:
        original = Classification.batches

        def batches(self, steps, shard):
            for count, batch in enumerate(original(self, steps, shard), 1):
                if count == after:
                    os.kill(os.getpid(), 15)
                yield batch

        patch.setattr(Classification, "batches", batches)
        with pytest.raises(Interrupted):
            start(run, folder)


def remove_two(photos):
    (photos / "train" / "red" / "03.jpg").unlink()
    (photos / "train" / "red" / "04.jpg").unlink()


def swap_names(photos):
    (photos / "train" / "red").rename(photos / "train" / "new")
    (photos / "train" / "green").rename(photos / "train" / "red")
    (photos / "train" / "new").rename(photos / "train" / "green")


def rename_class(photos):
    for part in ("train", "validation"):
        (photos / part / "red").rename(photos / part / "rot")


CHANGES = {
    "removed": (remove_two, "class 'red' has 22 train images and had 24"),
    "added": (
        lambda photos: shutil.copy(photos / "train" / "red" / "00.jpg", photos / "validation" / "blue" / "99.jpg"),
        "class 'blue' has 7 validation images and had 6",
    ),
    "class renamed": (rename_class, "class 'red' is gone"),
    "class added": (
        lambda photos: shutil.copytree(photos / "train" / "red", photos / "train" / "x"),
        "class 'x' is new",
    ),
    "image renamed": (
        lambda photos: (photos / "train" / "red" / "00.jpg").rename(photos / "train" / "red" / "77.jpg"),
        "class 'red' has other train images, or the same in another order",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_resumed_on_other_data(photos, tmp_path, monkeypatch, change):
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    interrupted(run, folder, 5, monkeypatch)
    before = (folder / "log.jsonl").read_bytes()
    make, said = CHANGES[change]
    make(photos)
    with pytest.raises(
        InputError, match=f"the images of .* are not those that the run was begun with: {said}"
    ) as caught:
        resume(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "log.jsonl").read_bytes() == before


def test_a_run_that_does_not_know_its_data_is_resumed_with_a_warning(photos, tmp_path, monkeypatch, capsys):
    run = small_run(photos, epochs=2)
    start(run, tmp_path / "straight")
    interrupted(run, tmp_path / "run", 5, monkeypatch)
    (tmp_path / "run" / "data.json").unlink()
    resume(tmp_path / "run")
    assert "does not say which images it was begun with" in capsys.readouterr().err
    same_run(tmp_path / "straight", tmp_path / "run")
    assert (tmp_path / "run" / "data.json").exists()
    (tmp_path / "run" / "data.json").write_text("{")
    with pytest.raises(InputError, match=r"data\.json cannot be used"):
        resume(tmp_path / "run")


def test_an_inventory_sees_labels_order_and_classes(photos):
    train, validation = open_dataset(str(photos))
    before = inventory(train=train, validation=validation)
    assert json.loads(json.dumps(before)) == before
    assert changed(before, before) is None
    turned = train.subset(range(len(train) - 1, -1, -1))
    assert "in another order" in changed(before, inventory(train=turned, validation=validation))
    swapped = replace(train, class_names=train.class_names[::-1])
    assert changed(before, inventory(train=swapped, validation=validation)) is not None
    assert (
        changed(
            before,
            inventory(train=replace(train, samples=replace(train.samples, root="/elsewhere")), validation=validation),
        )
        is None
    )


def test_images_that_cannot_be_read_are_counted_as_if_there_had_been_no_interruption(
    photos, tmp_path, monkeypatch, capsys
):
    for name in ("red/00", "red/01", "blue/02"):
        (photos / "train" / f"{name}.jpg").write_bytes(b"nothing")
    run = small_run(photos, epochs=3)
    start(run, tmp_path / "straight")
    interrupted(run, tmp_path / "run", 12, monkeypatch)
    first = records(tmp_path / "run", "unreadable")
    resume(tmp_path / "run")
    assert 0 < len(first) <= 3
    said = [record["name"] for record in records(tmp_path / "run", "unreadable")]
    assert said == [record["name"] for record in records(tmp_path / "straight", "unreadable")]
    assert len(said) == 3
    strict = replace(run, data=replace(run.data, max_unreadable=0.035))  # two of 72, not three
    interrupted(strict, tmp_path / "strict", first[0]["step"], monkeypatch)
    with pytest.raises(InputError, match=r"3 of 72 training images cannot be read"):
        resume(tmp_path / "strict")


# --- the folder of a run ---


def test_a_disk_that_is_full_is_one_line_and_what_is_there_stays_whole(photos, tmp_path, monkeypatch, capsys):
    """The system's own limit on the size of a file stands for the full disk: it fails in the same place."""
    folder = tmp_path / "run"
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from normfree import cli\n"
        "from normfree.config import load_config\n"
        "from normfree.engine import loop\n"
        "from normfree.tasks import classification\n"
        "original = loop.save_checkpoint\n"
        "def save(folder, step, *rest):\n"
        "    if step == 18: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    return original(folder, step, *rest)\n"
        "loop.save_checkpoint = save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "cli.VERBS['train'] = lambda a: classification.start(load_config(a[0]), Path(a[1]))\n"
        "cli.main(['train', *sys.argv[1:]])"
    )
    run = small_run(photos, epochs=3)
    save_config(run, tmp_path / "config.json")
    command = [sys.executable, "-c", code, str(tmp_path / "config.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.fullmatch(r"normfree: .* too large: .*step-00000018", done.stderr.splitlines()[-1])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000009"]
    resume(folder)
    start(run, tmp_path / "straight")
    same_run(tmp_path / "straight", folder)


def test_a_checkpoint_that_fails_leaves_nothing_beside_the_last(tmp_path, monkeypatch):
    tensors = {"a": torch.zeros(3)}
    save_checkpoint(tmp_path, 1, tensors, {}, keep=2)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, tensors, {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    original = Path.rename
    monkeypatch.setattr(checkpoint, "sync", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("renamed"), original(self, to))[1])
    save_checkpoint(tmp_path, 1, {"a": torch.zeros(3)}, {}, keep=1)
    before = events[: events.index("renamed")]
    assert {"manifest.json", "partial-00000001"} <= set(before)
    assert before[-1] == "partial-00000001"
    assert events[-1] == tmp_path.name


def test_folders_need_not_be_synced_where_the_system_cannot(tmp_path, monkeypatch):
    original = os.open

    def no_folders(path, *args, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(os, "open", no_folders)
    checkpoint.sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        checkpoint.sync(tmp_path / "missing")


def test_a_checkpoint_holds_no_second_copy_on_the_device(tmp_path, monkeypatch):
    """What it hands on lies on the CPU, whatever the device."""
    from torch.distributed import checkpoint as dcp

    found = []
    monkeypatch.setattr(dcp, "save", lambda state, **options: found.extend(state.values()))

    class Elsewhere(torch.Tensor):
        """Stands for a tensor on a device: `cpu` is its only way off."""

        def cpu(self):
            return self.as_subclass(torch.Tensor).clone()

    tensor = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).as_subclass(Elsewhere)
    checkpoint._write_tensors(tmp_path, {"a": tensor})
    assert [type(value) for value in found] == [torch.Tensor]
    assert found[0].is_contiguous()


def test_one_process_works_in_a_folder(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("normfree.files._LOCK_SECONDS", 0.2)
    run, folder = small_run(photos, epochs=1.5), tmp_path / "run"
    start(run, folder)
    code = (
        "import time; from pathlib import Path; from normfree.files import working_in\n"
        f"with working_in(Path({str(folder)!r})): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="another process is working in"):
            resume(folder)
    finally:
        other.kill()
        other.communicate()
    resume(folder)  # a process that was killed holds nothing
    with working_in(folder):
        pass


def test_the_log_is_whole_at_every_moment_of_a_resume(tmp_path, monkeypatch):
    """A kill while the lines after the checkpoint are dropped leaves the old log or the new one."""
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines))
    seen = []
    original = Path.write_text

    def write_text(self, *args, **options):
        seen.append(path.read_text())
        done = original(self, *args, **options)
        seen.append(path.read_text())
        return done

    monkeypatch.setattr(Path, "write_text", write_text)
    log = RunLog(tmp_path, 3)
    log.close()
    assert seen
    assert all(text in ("".join(lines), "".join(lines[:3])) for text in seen)
    assert path.read_text() == "".join(lines[:3])


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    log = RunLog(tmp_path)
    log.write("eval", 1, loss=float("nan"), top1=float("inf"), images=3)
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert {"loss": None, "top1": None, "images": 3}.items() <= json.loads(line, parse_constant=refuse).items()


def test_the_log_says_what_the_numbers_depend_on_and_a_resume_what_is_another(photos, tmp_path, monkeypatch, capsys):
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    interrupted(run, folder, 5, monkeypatch)
    (begun,) = records(folder, "start")
    names = {"device", "kernels", "threads", "vectors", "torch", "torchvision", "numpy", "pillow", "normfree"}
    assert names <= begun.keys()
    assert begun["torch"] == torch.__version__.split("+")[0] or begun["torch"] == torch.__version__
    capsys.readouterr()
    here = loop.environment(torch.device("cpu"))
    monkeypatch.setattr(loop, "environment", lambda device: here | {"threads": 77, "numpy": "9.9"})
    resume(folder)
    said = capsys.readouterr().err
    assert f"threads 77, was {here['threads']}" in said
    assert f"numpy 9.9, was {here['numpy']}" in said
    assert "torch " not in said.replace("torchvision", "")


def test_a_reader_that_fails_leaves_a_checkpoint_of_the_last_step(photos, tmp_path, monkeypatch, capsys):
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    start(run, tmp_path / "straight")
    original = Classification.batches

    def batches(self, steps, shard):
        for step, batch in enumerate(original(self, steps, shard), steps.start):
            if step == 12:
                raise RuntimeError("a worker is gone")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "batches", batches)
        with pytest.raises(RuntimeError, match="a worker is gone"):
            start(run, folder)
    assert (folder / "checkpoints" / "step-00000012").is_dir()
    assert f"continue with: normfree train --resume {folder}" in capsys.readouterr().err
    resume(folder)
    same_run(tmp_path / "straight", folder)


def test_a_finished_run_does_not_need_its_data_any_more(photos, tmp_path):
    run, folder = small_run(photos, epochs=1.5), tmp_path / "run"
    start(run, folder)
    shutil.rmtree(photos)
    command = evaluation_command(run, folder / "best.safetensors")
    assert command == f"normfree eval {folder / 'best.safetensors'} {photos}"


def test_the_bar_says_what_it_does(photos, tmp_path, monkeypatch):
    notes = []
    original = loop.ProgressBar.update

    def update(self, done, note=None):
        original(self, done, note)
        notes.append((done, self.note))

    monkeypatch.setattr(loop.ProgressBar, "update", update)
    start(small_run(photos, epochs=2, log_every=100), tmp_path / "run")
    evaluating = [i for i, (_, note) in enumerate(notes) if note.startswith("evaluating")]
    assert evaluating
    training = [note for i, (done, note) in enumerate(notes) if 9 < done < 18]
    assert training
    assert not any("evaluating" in note or "checkpoint" in note for note in training)
