"""Agreement with the authors' released code (float32, CPU)."""

import pytest
import torch
import torch.nn.functional as F
from golden import build, load_golden, relative_error, to_images, to_state
from torch import Tensor

from normfree.models import NFNet
from normfree.optim import EMA, SGD_AGC, param_groups, warmup_cosine


def block_statistics(model: NFNet, images: Tensor) -> dict[str, float]:
    """The released code's signal metrics: k = 0 is the stem, k + 1 the output of block k, res_* its branch's end."""
    blocks = [block for stage in model.stages for block in stage.children()]
    seen, handles = {}, []

    def keep(key):
        return lambda module, args, output: seen.__setitem__(key, output)

    for key, module in [("out_0", model.stem)] + [(f"out_{k + 1}", block) for k, block in enumerate(blocks)]:
        handles.append(module.register_forward_hook(keep(key)))
    for k, block in enumerate(blocks):
        handles.append(block.conv2.register_forward_hook(keep(f"conv2_{k}")))
        handles.append(block.se.register_forward_hook(keep(f"se_{k}")))
    model(images)
    for handle in handles:
        handle.remove()

    def channel_var(x: Tensor) -> float:
        return x.var((0, 2, 3), correction=0).mean().item()

    statistics = {}
    for k in range(len(blocks) + 1):
        statistics[f"avg_sq_mean_{k}"] = seen[f"out_{k}"].mean((0, 2, 3)).square().mean().item()
        statistics[f"avg_var_{k}"] = channel_var(seen[f"out_{k}"])
    for k in range(len(blocks)):
        statistics[f"res_avg_var_{k}"] = channel_var(2 * seen[f"se_{k}"] * seen[f"conv2_{k}"])
    return statistics


@pytest.mark.parametrize("side", [0, 1], ids=["64x64", "61x67"])
@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "one_conv"])
def test_forward(name, side):
    arrays, config = load_golden(f"nfnet_tiny_{name}")
    model = build(config).eval()
    model.load_state_dict(to_state(arrays, "params/", config["depth"]))
    images = to_images(arrays[f"input_{side}"])
    with torch.no_grad():
        pool = model.forward_head(model.forward_features(images), pre_logits=True)
        assert relative_error(pool, arrays[f"output_{side}/pool"]) < 1e-5
        assert relative_error(model(images), arrays[f"output_{side}/logits"]) < 1e-5
        statistics = block_statistics(model, images)
    expected = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"output_{side}/") and "avg" in k}
    assert statistics.keys() == expected.keys()
    for key, value in statistics.items():
        assert value == pytest.approx(float(expected[key]), rel=1e-5), key


def test_ten_training_steps():
    """Gradients, losses, learning rates, clipped units, parameters and EMA over ten steps of the authors' loop."""
    arrays, config = load_golden("train_nfnet_tiny")
    _, sizes = load_golden("nfnet_tiny_gelu")
    depth = sizes["depth"]
    model = build(sizes)
    model.load_state_dict(to_state(arrays, "params_initial/", depth))
    optimizer = SGD_AGC(
        param_groups(model, config["weight_decay"], config["clipping"]),
        lr=0.0,
        momentum=config["momentum"],
        eps=config["eps"],
    )
    ema = EMA(model, config["ema_decay"])
    num_classes, smoothing = sizes["num_classes"], config["label_smoothing"]
    for step in range(config["steps"]):
        lr = warmup_cosine(
            step, peak_lr=config["max_lr"], total_steps=config["steps"], warmup_steps=config["warmup_steps"]
        )
        assert lr == pytest.approx(arrays["learning_rates"][step], rel=1e-6, abs=1e-12)
        labels, other, ratio = (torch.from_numpy(arrays[k][step]) for k in ("labels", "mix_labels", "ratio"))
        target = ratio[:, None] * F.one_hot(labels.long(), num_classes)
        target = target + (1 - ratio[:, None]) * F.one_hot(other.long(), num_classes)
        target = (1 - smoothing) * target + smoothing / num_classes
        loss = F.cross_entropy(model(to_images(arrays["images"][step])), target)
        assert loss.item() == pytest.approx(float(arrays["losses"][step]), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            grads = to_state(arrays, "grads_step0/", depth)
            for name, p in model.named_parameters():
                assert p.grad is not None
                assert relative_error(p.grad, grads[name]) < 1e-5, name
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        ema.update(step)
        assert optimizer.stats.clipped_fraction == arrays["clipped_fraction"][step]
    final, averaged = to_state(arrays, "params_final/", depth), to_state(arrays, "ema_final/", depth)
    for name, p in model.named_parameters():
        assert relative_error(p.detach(), final[name]) < 1e-5, name
        assert relative_error(ema.shadow[name], averaged[name]) < 1e-5, name
