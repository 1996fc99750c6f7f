"""Signal propagation at initialisation: a normalizer-free ResNet-50, its batch-normalized twin, and one uncorrected.

    python experiments/signal_propagation/run.py --images PHOTOS

Measures on noise and, where a folder of photographs is given, on those; writes results.json beside this file and the
pictures of docs/signal.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import normfree
from normfree.analysis.signal import SignalTable, plot_signal, read_images, set_skip_gains
from normfree.layers import WSConv2d
from normfree.models import Network

HERE = Path(__file__).parent
PICTURES = HERE.parents[1] / "docs" / "images"
PX, BATCH, SEED = 224, 32, 0
NF, NFNET = "nf_resnet50", "nfnet_f0"
BN, BN_RELEASED = "bn_resnet50, He", "bn_resnet50, as released"
UNCORRECTED = "uncorrected, He"


class PlainConv2d(WSConv2d):
    """The same convolution and padding with its weight as it is: not standardized, without γ and β."""

    def standardized_weight(self) -> Tensor:
        return self.weight


def he_init_(model: nn.Module) -> None:
    """N(0, 2 / fan_in) for every convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)


def uncorrected_resnet50() -> Network:
    """NF-ResNet-50 without its corrections: plain weights, γ = β = α = SkipInit gain = 1, He's initialisation."""
    model = normfree.create_model(NF, alpha=1.0)
    for name, conv in list(model.named_modules()):
        if isinstance(conv, WSConv2d):
            sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
            plain = PlainConv2d(*sizes, padding=conv.padding, groups=conv.groups)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    he_init_(model)
    return model


def build(label: str) -> Network:
    torch.manual_seed(SEED)
    model = uncorrected_resnet50() if label == UNCORRECTED else normfree.create_model(label.partition(",")[0])
    if label == BN:
        he_init_(model)
    set_skip_gains(model, 1.0)
    return model


def measure(photos: str | None) -> dict[str, SignalTable]:
    tables = {}
    for label in (NF, BN, BN_RELEASED, UNCORRECTED, NFNET):
        model = build(label)
        x = None
        if photos is not None:
            assert model.info is not None
            x = read_images(photos, model.info, PX, BATCH, SEED)
        tables[label] = normfree.signal_propagation(model, x, batch=BATCH, px=PX, seed=SEED)
        print(f"{label}\n{tables[label]}\n", flush=True)
    return tables


def draw(results: dict[str, dict[str, SignalTable]]) -> None:
    def picture(name: str, inputs: str, *labels: str) -> None:
        plot_signal({label: results[inputs][label] for label in labels}, PICTURES / f"signal-{name}.png")

    picture("resnet50-noise", "noise", NF, BN)
    picture("uncorrected", "noise", NF, BN, UNCORRECTED)
    if "photos" in results:
        picture("resnet50-photos", "photos", NF, BN)
        plot_signal(
            {f"{NFNET}, {inputs}": tables[NFNET] for inputs, tables in results.items()},
            PICTURES / "signal-nfnet_f0.png",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", help="folder of photographs")
    photos = parser.parse_args().images
    results = {"noise": measure(None)} | ({"photos": measure(photos)} if photos else {})
    draw(results)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "normfree": version("normfree")}
    tables = {inputs: {label: asdict(table) for label, table in all_.items()} for inputs, all_ in results.items()}
    record = {"seed": SEED, "batch": BATCH, "px": PX, "environment": environment, "tables": tables}
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
