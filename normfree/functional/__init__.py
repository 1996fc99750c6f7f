"""What the layers compute, with gradients written by hand where autograd's would take more time or memory.

`dispatch.py` has the table of conditions under which a native kernel runs. PyTorch's operations compute the same
everywhere else: compiled, exported, traced, under `torch.func`, in forward mode, and for second derivatives.
"""

from torch import fx

from normfree.functional.conv import Pads, conv2d
from normfree.functional.pointwise import avg_pool2x2, gated_sum, gelu, spatial_mean
from normfree.functional.standardize import Options, standardize, standardize_all, widened

__all__ = [
    "Options",
    "Pads",
    "avg_pool2x2",
    "conv2d",
    "gated_sum",
    "gelu",
    "spatial_mean",
    "standardize",
    "standardize_all",
    "widened",
]

# leaves of a graph that torch.fx traces: their branches depend on tensors, for which fx has symbols
for name in ("standardize", "spatial_mean", "avg_pool2x2", "gated_sum", "conv2d"):
    fx.wrap(name)
