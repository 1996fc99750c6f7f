"""The command line: `normfree VERB …`. Each verb parses its options and calls one function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from normfree.config import MAX_WORKERS, ClassificationRun, DetectionRun, load_config, options_of, with_options
from normfree.errors import InputError, check_range, nearest, quoted
from normfree.files import check_writable

HELP = """\
usage: normfree VERB ...

Image networks without normalization layers.

  train [DATA]            train a classifier on an image folder; without DATA, on 5,000 packaged digits
  train DATA --init WEIGHTS   fine-tune published weights, or your own, on your images: hf://timm/eca_nfnet_l0.ra2_in1k
  eval WEIGHTS DATA       accuracy of a weight file, in total and per class, at one or several resolutions
  eval WEIGHTS DATA --probe   what its features are worth for other classes: neighbours and a linear classifier
  predict WEIGHTS PATH... labels for images and folders of images
  embed WEIGHTS PATH...   features of images and folders of images: Parquet, NumPy or CSV
  detect train DATA       train a detector: Mask R-CNN on COCO annotations, or boxes alone
  detect eval WEIGHTS DATA    average precision of a detector, in total, by size and per class
  detect predict WEIGHTS PATH...  boxes, masks and scores for images and folders, and pictures of them
  average RUN             the mean of the weights in the last checkpoints of a run
  convert IN OUT          weights of the authors, of timm and of the Hub to ours, and back
  data check DATA         read every image: what is broken, odd, there twice, in training and validation
  data pack DATA OUT      the images as tar shards, for large data sets and slow disks
  models [PATTERN]        the networks: parameters, multiply-adds, published accuracy and weights
  signal MODEL...         mean and variance of the activations, block by block; several networks side by side

`normfree VERB --help`, or `normfree help VERB`, lists the options of a verb; `normfree --version` says which versions
are installed, and whether the kernels for CPUs are in use.
"""


@dataclass(frozen=True)
class Train:
    """Train a classifier, or fine-tune one with --init. Without DATA: 5,000 packaged digits, minutes on a laptop."""

    run: ClassificationRun = field(default_factory=ClassificationRun)
    recipe: str | None = None
    """Recipe that the defaults come from, such as nfnet_f0, nfnet_f0_baseline or mnist5k; None: they are chosen for the
    images and the machine, with reasons."""
    resume: str | None = None
    """Run folder to continue, from its last checkpoint; with --epochs or --steps, to a new length."""
    out: str | None = None
    """Run folder to create; None: runs/DATA-MODEL-1, or the next free number."""


@dataclass(frozen=True)
class TrainDetector:
    """Train a detector, Mask R-CNN on a normalizer-free network, with COCO annotations."""

    run: DetectionRun = field(default_factory=DetectionRun)
    recipe: str | None = None
    """Recipe that the defaults come from, such as coco_nfnet_f0 or detect_small; None: they are chosen for the images
    and the machine, with reasons."""
    resume: str | None = None
    """Run folder to continue, from its last checkpoint; with --epochs or --steps, to a new length."""
    out: str | None = None
    """Run folder to create; None: runs/DATA-BACKBONE-1, or the next free number."""


def train(args: Sequence[str]) -> None:
    run, outcome = _train(Train, "train", args, "normfree.tasks.classification", "normfree.tasks.choice")
    from normfree.engine.run import evaluation_command

    best = outcome.folder / "best.safetensors"
    metric, what = ("balanced", "mean over classes") if "balanced" in outcome.last else ("top1", "top-1")
    end, best_epoch = outcome.last[metric], f"epoch {outcome.best_epoch:.3g}"
    print(f"validation {what} {end:.2f} % at the end, {outcome.best:.2f} % at best ({best_epoch})")
    _say_next(outcome, f"predict {quoted(best)} IMAGE_OR_FOLDER ...", evaluation_command(run, best))


def detect_train(args: Sequence[str]) -> None:
    """Trains a detector."""
    modules = "normfree.tasks.detection.task", "normfree.tasks.detection.choice"
    run, outcome = _train(TrainDetector, "detect train", args, *modules)
    best = outcome.folder / "best.safetensors"
    metric = "mask_ap" if "mask_ap" in outcome.last else "box_ap"
    figures = [f"{name.replace('_', ' ').replace('ap', 'AP')} {100 * v:.2f} %" for name, v in outcome.last.items()]
    kept = [figure for figure in figures if figure.split()[1] in ("AP", "AP50")]
    at_best = f"{100 * outcome.best:.2f} % {metric.replace('_', ' ').replace('ap', 'AP')}"
    print(f"validation {', '.join(kept)} at the end; {at_best} at best (epoch {outcome.best_epoch:.3g})")
    from normfree.engine.run import evaluation_command

    predict = f"detect predict {quoted(best)} IMAGE_OR_FOLDER ... --pictures FOLDER"
    _say_next(outcome, predict, evaluation_command(run, best, "normfree detect eval"))
    print(f"pictures         {outcome.folder / 'pictures'}")


def _train(
    target: type[Train | TrainDetector], verb: str, args: Sequence[str], task_module: str, choice_module: str
) -> tuple[Any, Any]:
    """Trains as the options of `target` say; returns the run and its outcome."""
    options: Any = parse(target, verb, args)
    task, choice = importlib.import_module(task_module), importlib.import_module(choice_module)
    from normfree.engine.device import keep_freed_memory

    keep_freed_memory()
    given = given_options(args)
    if options.resume is None:
        values = {name: value for name, value in options_of(options.run).items() if name in given | {"path"}}
        default = options_of(target().run)["path"]
        if "init" in given and default and values["path"] == default not in args:  # DATA is not given
            values = choice.data_of_init(values)
        run, reasons, weights = choice.choose_recipe(options.recipe, values)
        out = None if options.out is None else Path(options.out)
        return run, task.start(run, out, [reason.text for reason in reasons], weights)
    folder = Path(options.resume)
    if not (folder / "config.json").is_file():
        raise InputError(f"--resume {folder}: no run is there (config.json is missing)")
    if given & {"recipe", "out"}:
        raise InputError(f"--resume {folder} continues a run as it is, in its folder: leave out --recipe and --out")
    saved = load_config(folder / "config.json", type(options.run))
    run = parse(target, verb, args, replace(options, run=saved)).run
    if given >= {"epochs", "steps"}:
        raise InputError("--epochs and --steps are two lengths of the run: give one of them")
    if "epochs" in given:  # `steps` of the saved run would be its length
        run = with_options(run, {"steps": None})
    return run, task.resume(folder, run)


def _say_next(outcome: Any, predict: str, evaluate: str) -> None:
    folder = outcome.folder
    print(f"weights          {folder / 'best.safetensors'} and {folder / 'last.safetensors'}")
    print(f"predict          normfree {predict}")
    print(f"evaluate         {evaluate}")
    print(f"curves           tensorboard --logdir {quoted(folder)}")


def given_options(args: Sequence[str]) -> set[str]:
    """Names of the options on a command line that `parse` has accepted."""
    words = (token.split("=")[0].replace("-", "_") for token in args if token.startswith("--"))
    return {word.removeprefix("__").removeprefix("no_") for word in words}


def evaluate(
    weights: Annotated[str, Positional, arg(metavar="WEIGHTS")],
    data: Annotated[str, Positional, arg(metavar="DATA")],
    px: tuple[int, ...] | None = None,
    probe: bool = False,
    held_out: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | None = None,
    plot: str | None = None,
) -> None:
    """Accuracy and loss of a weight file on an image folder (its validation split, if it has one) or a packaged set.

    Args:
        weights: Weight file of any kind, run folder, or hf://OWNER/NAME; without --probe, with class names.
        data: Image folder with the classes of the weights, or `mnist5k`; with --probe, with any classes.
        px: Side of the images in pixels, 8 to 4096, or several sides to compare; None: what the weights say.
        probe: What the frozen features are worth: nearest neighbours and a linear classifier on the training images,
            whatever the classes of the weights. Features are kept for the next time.
        held_out: Of a folder without a validation split, take only the share that training held out. With --probe: the
            share to hold out; None: 0.1.
        seed: The seed of that training, or of what --probe holds out; None: 0.
        device: cuda, mps or cpu; None: the first that is there.
        workers: Processes that read images; None: one less than the cores.
        out: File for the whole report. .json: everything, with the confusion matrix; .csv: a row for each class, or for
            each of several --px.
        plot: Picture of the accuracy over several --px, ending in .png, .svg or .pdf.
    """
    if probe:
        from normfree.tasks.probe import probe_lines, probe_weights

        probes = probe_weights(weights, data, px, held_out, seed, device, workers, out, plot)
        _not_counted(line for found in probes for line in found.unreadable)
        print(*probe_lines(probes), sep="\n")
        return
    from normfree.tasks.accuracy import evaluate_resolutions, resolution_table, score_table

    results = evaluate_resolutions(weights, data, px, held_out, seed, device, workers, out, plot)
    _not_counted(line for found in results for line in found.accuracy.unreadable)
    if len(results) > 1:
        print(*resolution_table(results), sep="\n")
        return
    accuracy, info = results[0].accuracy, results[0].info
    print(*score_table(accuracy.scores(info.class_names)), *accuracy.mistakes(info.class_names), sep="\n")
    top5 = f", top-5 {accuracy.top5_percent:.2f} %" if info.num_classes > 5 else ""
    figures = f"top-1 {accuracy.top1_percent:.2f} %{top5}, loss {accuracy.loss:.4g}"
    print(f"{figures} on {accuracy.num_images} images at {info.eval_px} px")


def _not_counted(unreadable: Iterable[str]) -> None:
    for line in dict.fromkeys(unreadable):
        print(f"warning: not counted: {line}", file=sys.stderr)


def predict(
    weights: Annotated[str, Positional, arg(metavar="WEIGHTS")],
    paths: Annotated[tuple[str, ...], Positional, arg(metavar="PATH...")],
    out: str | None = None,
    top: int = 1,
    device: str | None = None,
    workers: int = 0,
) -> None:
    """Label images: a table on standard output, or a file.

    Args:
        weights: Weight file that normfree wrote.
        paths: Images and folders of images.
        out: File to write, ending in .csv or .jsonl; None: standard output.
        top: How many classes to give for each image.
        device: cuda, mps or cpu; None: the first that is there.
        workers: Processes that read images.
    """
    if not paths:
        raise InputError("predict needs images: normfree predict WEIGHTS PATH ...")
    from normfree.deploy.predict import write_predictions

    write_predictions(weights, paths, out, top, device, workers)


def embed(
    weights: Annotated[str, Positional, arg(metavar="WEIGHTS")],
    paths: Annotated[tuple[str, ...], Positional, arg(metavar="PATH...")],
    out: str,
    px: int | None = None,
    device: str | None = None,
    workers: int = 0,
) -> None:
    """Features of images: what the network gives to its classifier, pooled and not normalised.

    Args:
        weights: Weight file of any kind, run folder, or hf://OWNER/NAME; with or without a classifier.
        paths: Images and folders of images.
        out: File to write, ending in .parquet, .npy (with the paths in a .json beside it) or .csv.
        px: Side of the images in pixels, 8 to 4096; None: what the weights say.
        device: cuda, mps or cpu; None: the first that is there.
        workers: Processes that read images.
    """
    if not paths:
        raise InputError("embed needs images: normfree embed WEIGHTS PATH ... --out FILE")
    from normfree.deploy.embed import write_embeddings

    unreadable = write_embeddings(weights, paths, out, px, device, workers)
    print(f"wrote {out}{f'; {unreadable} images could not be read' if unreadable else ''}")


def detect_eval(
    weights: Annotated[str, Positional, arg(metavar="WEIGHTS")],
    data: Annotated[str, Positional, arg(metavar="DATA")],
    held_out: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | None = None,
    results: str | None = None,
) -> None:
    """Average precision and losses of a detector on annotated images: the validation images, or those of one file.

    Args:
        weights: Weight file of a detector, or its run folder.
        data: Folder with COCO annotations beside its images, a Roboflow export or Pascal VOC, or one COCO file (.json).
        held_out: Of data without validation images, take only the share that training held out.
        seed: The seed of that training; None: 0.
        device: cuda, mps or cpu; None: the first that is there.
        workers: Processes that read images; None: one less than the cores.
        out: File to write all figures to, as JSON.
        results: File to write the detections to, in COCO's format for results (.json).
    """
    from normfree.tasks.detection.evaluation import evaluate_weights

    found = evaluate_weights(weights, data, held_out, seed, device, workers, out, results)
    for line in found.unreadable:
        print(f"warning: not counted: {line}", file=sys.stderr)
    losses = ", ".join(f"{name.removeprefix('loss_')} {value:.4g}" for name, value in found.losses.items())
    print(*found.lines(), sep="\n")
    print(f"{len(found.counts)} images, {len(found.results)} detections{losses and f'; {losses}'}")


def detect_predict(
    weights: Annotated[str, Positional, arg(metavar="WEIGHTS")],
    paths: Annotated[tuple[str, ...], Positional, arg(metavar="PATH...")],
    out: str | None = None,
    pictures: str | None = None,
    min_score: float | None = None,
    draw_score: float = 0.5,
    device: str | None = None,
    workers: int = 0,
) -> None:
    """Find objects in images: a table on standard output, or a file; and pictures with the objects drawn.

    Args:
        weights: Weight file of a detector, or its run folder.
        paths: Images and folders of images.
        out: File to write: .json, COCO results; .jsonl, a line for each image; .csv, a row for each object.
        pictures: New folder for the images with boxes, masks, names and scores drawn.
        min_score: Least score of what is given, 0 to 1; None: the detector's.
        draw_score: Least score of what is drawn, 0 to 1.
        device: cuda, mps or cpu; None: the first that is there.
        workers: Processes that read images.
    """
    if not paths:
        raise InputError("detect predict needs images: normfree detect predict WEIGHTS PATH ...")
    from normfree.deploy.detect import write_detections

    write_detections(weights, paths, out, pictures, min_score, draw_score, device, workers)


def models(pattern: Annotated[str, Positional, arg(metavar="PATTERN")] = "*") -> None:
    """The networks as a table; multiply-adds are for one image at the training and at the test pixels.

    Args:
        pattern: Shell pattern for the names, such as "nfnet_f*".
    """
    from normfree.analysis.zoo import zoo

    rows = zoo(pattern)
    sizes = f"{'model':<15}{'params':>10}{'train px':>10}{'GMACs':>9}{'test px':>9}{'GMACs':>9}"
    print(f"{sizes}  {'published ImageNet top-1':<26}weights for --init")
    for row in rows:
        print(
            f"{row.name:<15}{row.params / 1e6:>8.2f} M{row.train_px:>10}{row.train_macs / 1e9:>9.2f}"
            f"{row.test_px:>9}{row.test_macs / 1e9:>9.2f}  {row.published or '-':<26}{row.weights or '-'}"
        )


def convert(
    source: Annotated[str, Positional, arg(metavar="IN")],
    out: Annotated[str, Positional, arg(metavar="OUT")],
    format: Literal["normfree", "timm", "deepmind"] | None = None,
    model: str | None = None,
) -> None:
    """Convert weights of the authors, of timm and of the Hub to ours, and back. Outputs stay the same.

    Args:
        source: Weight file: ours, an authors' .npz, a timm .safetensors or .pth; or hf://OWNER/NAME.
        out: File to write, or hf://OWNER/NAME to push to.
        format: None: by the ending of OUT: .npz deepmind; .pth, .pt, .bin timm; else normfree.
        model: Our name of the network, where IN does not tell.
    """
    from normfree.deploy.convert import convert_weights

    done = convert_weights(source, out, format, model)
    print(f"{source}: {done.info.architecture}, {done.info.num_classes} classes")
    for line in (*([done.report] if done.report else []), *done.notes):
        print(line)
    print(f"wrote {out}")


def average(
    run: Annotated[str, Positional, arg(metavar="RUN")],
    last: int | None = None,
    out: str | None = None,
    raw: bool = False,
) -> None:
    """The mean of the weights in the last checkpoints of a run, as a weight file. Training must have kept them.

    Args:
        run: Run folder of a classifier or a detector.
        last: How many checkpoints; None: all that are there.
        out: Weight file to write, ending in .safetensors; None: average.safetensors in the run folder.
        raw: Weights as they were trained; else their moving averages, as in best.safetensors and last.safetensors.
    """
    from normfree.deploy.average import average_run

    done = average_run(run, last, out, raw)
    for line in done.damaged:
        print(f"warning: {line}", file=sys.stderr)
    kind = "weights as they were trained" if raw else "moving averages of the weights"
    print(f"{done}: {kind}")
    print(f"wrote {done.path}")


def signal(
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL...")],
    data: str | None = None,
    px: int | None = None,
    batch: int = 16,
    seed: int = 0,
    skip_gain: float | None = None,
    plot: str | None = None,
    json: str | None = None,
    device: str | None = None,
) -> None:
    """Signal propagation: what each residual block does to the mean and variance of the activations.

    Args:
        models: Networks: names of the zoo, weight files, timm:NAME, torchvision:NAME; all but files at initialisation.
        data: Folder of images, or `mnist5k`; None: noise N(0, 1).
        px: Side of the images in pixels; None: each network's own.
        batch: Images to measure on.
        seed: Of the initialisation, the noise and the choice of images.
        skip_gain: Value to set the SkipInit gains to; None: 1 at initialisation, as they are in weight files.
        plot: Picture to write, ending in .png, .svg or .pdf.
        json: File to write the numbers to.
        device: cuda, mps or cpu; None: the first that is there.
    """
    from normfree.analysis.signal import report_signal

    options = dict(data=data, px=px, batch=batch, seed=seed, skip_gain=skip_gain, device=device)
    report_signal(models, plot, json, **options)


def check_data(
    data: Annotated[str, Positional, arg(metavar="DATA")], out: str | None = None, workers: int | None = None
) -> None:
    """Read every image of a data set. Exit code 1 if one cannot be read, or is in training and in validation.

    Args:
        data: What `normfree train` or `detect train` takes: an image folder, tar shards, COCO annotations, a name, ...
        out: File to write the whole report to, as JSON.
        workers: Processes that read; None: one less than the cores.
    """
    check_writable(out)
    from normfree.data.check import check, report_lines
    from normfree.engine.log import progress

    with progress("check") as show:
        report = check(data, workers=readers(workers), show=show)
    print(*report_lines(report), sep="\n")
    if out is not None:
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    if report["unreadable"] or report["leaks"]:
        sys.exit(1)


def pack_data(
    data: Annotated[str, Positional, arg(metavar="DATA")],
    out: Annotated[str, Positional, arg(metavar="OUT")],
    shard_mb: float = 256,
    px: int | None = None,
    quality: int = 90,
    workers: int | None = None,
) -> None:
    """Write a data set as tar shards, training and validation. If interrupted, repeat the command to continue.

    Args:
        data: What `normfree train` takes: an image folder, a name, ...
        out: Folder to create.
        shard_mb: Size of a shard in MB, about.
        px: Make larger images smaller, to this short side in pixels; None: every file as it is.
        quality: Of the JPEG files that are written with --px.
        workers: Processes that read; None: one less than the cores.
    """
    from normfree.data.pack import pack
    from normfree.engine.log import progress

    with progress("pack") as show:
        left_out = pack(data, out, shard_mb=shard_mb, px=px, quality=quality, workers=readers(workers), show=show)
    for line in left_out:
        print(f"warning: left out: {line}", file=sys.stderr)
    print(f"wrote {out}; train on it: normfree train {quoted(out)}")


def readers(workers: int | None) -> int:
    """Number of processes for work that is mostly reading."""
    check_range("workers", workers, 0, MAX_WORKERS)
    return max(1, (os.cpu_count() or 2) - 1) if workers is None else workers


def verb(name: str, function: Callable[..., None]) -> Callable[[Sequence[str]], None]:
    """Parses the arguments of `function`, then calls it: parsing has its own standard error."""

    @functools.wraps(function)
    def later(*values: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(function, *values, **options)

    return lambda args: parse(later, name, args)()


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": verb("eval", evaluate),
    "predict": verb("predict", predict),
    "embed": verb("embed", embed),
    "detect train": detect_train,
    "detect eval": verb("detect eval", detect_eval),
    "detect predict": verb("detect predict", detect_predict),
    "data check": verb("data check", check_data),
    "data pack": verb("data pack", pack_data),
    "models": verb("models", models),
    "signal": verb("signal", signal),
    "convert": verb("convert", convert),
    "average": verb("average", average),
}


def parse(target: Callable[..., Any], verb: str, args: Sequence[str], default: Any = None) -> Any:
    """Calls `target`, a class or function, with what tyro reads in `args`; errors are one line."""
    import tyro

    known = sorted(option_names(target))
    for token in args:
        name = token.split("=")[0].replace("_", "-")
        if token.startswith("--") and name not in (*known, "--help"):
            raise InputError(f"{verb} has no option {token.split('=')[0]}{nearest(name, known)}")
    if {"-h", "--help"} & set(args):
        _join_lines(target)
    given = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(target, prog=f"normfree {verb}", args=args, config=(OmitArgPrefixes,), **given)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_first_sentence(box.getvalue(), verb)) from None


def _join_lines(target: Any) -> None:
    """Gives tyro the docstrings of a dataclass's fields on one line each: it would keep their line breaks."""
    import docstring_parser

    if not dataclasses.is_dataclass(target):
        return
    parsed = [docstring_parser.parse_from_object(cls) for cls in reversed(typing.cast(Any, target).__mro__[:-1])]
    texts = {p.arg_name: p.description or "" for docstring in parsed for p in docstring.params}
    for option in dataclasses.fields(target):
        _join_lines(typing.get_type_hints(target)[option.name])
        option.metadata = types.MappingProxyType({"help": " ".join(texts.get(option.name, "").split())})


def option_names(target: Any) -> Iterator[str]:
    """Every --option of a function or dataclass, with the --no- form of flags."""
    for name, hint in typing.get_type_hints(target).items():
        if dataclasses.is_dataclass(hint):
            yield from option_names(hint)
        elif name != "return" and typing.get_origin(hint) is not typing.ClassVar:
            flag = name.replace("_", "-")
            yield f"--{flag}"
            if hint is bool:
                yield f"--no-{flag}"


def _first_sentence(box: str, verb: str) -> str:
    """tyro's framed message, up to its first rule, on one line; tyro offers it in no other form."""
    lines = (re.sub(r"[╭╮╰╯│]", "", line).strip() for line in box.splitlines()[1:])
    message = itertools.takewhile(lambda line: line.strip("─"), lines)
    return " ".join(message) or f"these options cannot be used; see normfree {verb} --help"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0; 1 the run failed; 2 bad input; 128 + n stopped by signal n."""
    args = sys.argv[1:] if args is None else list(args)
    for stream in (sys.stdout, sys.stderr):  # file names may not be valid in UTF-8 or the locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(args)
        sys.stdout.flush()
    except InputError as error:
        _fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
        _drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except OSError as error:
        _drop_output()
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        _fail(f"{error.strerror or error}: {name}" if name else str(error), 1)
    except RuntimeError as error:
        from normfree.data.loader import WorkerDied
        from normfree.engine.loop import Diverged, Interrupted

        if not isinstance(error, Diverged | Interrupted | WorkerDied):
            raise
        remedy = ""
        if isinstance(error, Diverged):
            remedy = ". Lower --lr, lengthen --warmup-epochs or lower --clipping; the last checkpoint is from before"
            remedy += "" if error.skipped else ", and --resume with --on-nonfinite skip goes on without such steps"
        _fail(f"{error}{remedy}", error.exit_code if isinstance(error, Interrupted) else 1)


def _run(args: Sequence[str]) -> None:
    if args[:1] == ["help"] and len(args) > 1:
        args = [*args[1:], "--help"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if args[0] in ("-V", "--version", "version"):
        from normfree.native import status
        from normfree.weights.file import package_version

        print(f"normfree {package_version()}, torch {version('torch')}\nkernels {status()}")
        return
    words = 2 if args[0] in ("data", "detect") else 1
    name = " ".join(args[:words])
    if words == 2 and args[1:2] in (["-h"], ["--help"]):
        print(*(line for line in HELP.splitlines() if line.startswith(f"  {args[0]} ")), sep="\n")
        return
    if name not in VERBS:
        raise InputError(f"no verb {name!r}{nearest(name, VERBS)}; there are {', '.join(VERBS)}")
    VERBS[name](args[words:])


def _drop_output() -> None:
    """Redirects standard output, which cannot be written to, to nowhere: Python would try to flush it at exit."""
    with contextlib.suppress(OSError, ValueError):  # no such file descriptor, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> typing.NoReturn:
    print("normfree:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(code)
