"""Whether two checkouts train alike: the losses of their first steps, bit for bit, for every recipe and data set.

    git worktree add ../before COMMIT
    python benchmarks/same_numbers.py ../before . --data cifar10 photos --out same.json

Every case is one `normfree train` with the same options in both checkouts, one thread each. Recipes keep all that they
say of augmentation, optimizer and precision; their networks are thinned, and batch and pixels reduced, so that a CPU
can take the steps. Data sets are trained on as `normfree train DATA` chooses. Exit code 1 if a loss differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

REDUCED = "--batch-size 8 --train-px 48 --eval-px 64"
THIN = {  # by how names of networks begin
    ("nfnet_nano",): "",
    ("nfnet", "bn_nfnet"): "--depth 1 1 1 1 --width 64 64 64 64 --group-width 16",
    ("nf_regnet",): "--depth 1 1 1 1 --width 32 32 64 64 --group-width 16",
    ("nf_resnet", "bn_resnet"): "--depth 1 1 1 1 --width 64 64 128 128",
}
# Runs inside a checkout: stdin is a list of [case, arguments], stdout a line [case, losses or the reason] for each.
WORKER = """
import contextlib, json, sys, tempfile
from pathlib import Path
from normfree.cli import main
for case, args in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                main(["train", *args, "--log-every", "1", "--eval-every", "1e9", "--out", str(run)])
            lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
            result = [line["loss"] for line in lines if line["kind"] == "train"]
        except SystemExit as stop:
            result = f"exit code {stop.code}"
    print(json.dumps([case, result]), flush=True)
"""


def cases(root: Path, data: list[str], images: str, steps: int, pattern: str) -> list[tuple[str, list[str]]]:
    """Names of the cases and arguments of `train`; recipes are those of the checkout `root`."""
    code = "import json; from normfree.recipes import RECIPES\n"
    code += "print(json.dumps({name: recipe('x').model.model for name, recipe in RECIPES.items()}))"
    recipes = json.loads(run(root, code, ""))
    length = ["--steps", str(steps), "--warmup-steps", str(steps // 5)]
    found = [(f"train {path}", [str(Path(path).resolve()) if Path(path).exists() else path, *length]) for path in data]
    for name, model in recipes.items():
        thin = next(options for names, options in THIN.items() if model.startswith(names))
        found.append((f"recipe {name}", [images, "--recipe", name, *REDUCED.split(), *thin.split(), *length]))
    return [(name, args) for name, args in found if fnmatch(name, pattern)]


def run(root: Path, code: str, stdin: str) -> str:
    """Standard output of Python code that imports the normfree of a checkout."""
    env = os.environ | {"PYTHONPATH": str(root.resolve()), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code], input=stdin, env=env, cwd=folder, capture_output=True, text=True
        )
    if done.returncode:
        sys.exit(f"{root}: {done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one, whose recipes are taken")
    parser.add_argument("--data", nargs="*", default=[], help="data sets to train on as chosen, beside mnist5k")
    parser.add_argument("--images", default="mnist5k", help="the images that recipes train on")
    parser.add_argument("--cases", default="*", help="pattern of the cases to run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    todo = cases(args.after, ["mnist5k", *args.data], args.images, args.steps, args.cases)
    sides = [
        dict(map(json.loads, run(root, WORKER, json.dumps(todo)).splitlines())) for root in (args.before, args.after)
    ]
    rows = []
    print(f"{'case':<34}{'steps':>6}{'first loss':>12}{'last loss':>12}  result")
    for name, options in todo:
        before, after = (side[name] for side in sides)
        if isinstance(before, str) or isinstance(after, str):
            result, first, last, steps = f"before: {before}; after: {after}", "", "", 0
        else:
            different = [i for i, pair in enumerate(zip(before, after, strict=False), 1) if pair[0] != pair[1]]
            same = len(before) == len(after) and not different
            result = "equal" if same else f"step {different[0] if different else min(len(before), len(after))} differs"
            first, last, steps = f"{after[0]:.4f}", f"{after[-1]:.4f}", len(after)
        rows.append({"case": name, "options": options, "result": result, "before": before, "after": after})
        print(f"{name:<34}{steps:>6}{first:>12}{last:>12}  {result}")
    equal = sum(row["result"] == "equal" for row in rows)
    print(f"{equal} of {len(rows)} cases are equal")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(equal != len(rows))


if __name__ == "__main__":
    main()
