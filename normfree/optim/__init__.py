from normfree.optim.agc import AGC, AGCStats, adaptive_clip_grad_, unitwise_norm
from normfree.optim.ema import EMA
from normfree.optim.groups import param_groups
from normfree.optim.sam import SAM, ascent_size
from normfree.optim.schedule import warmup_cosine
from normfree.optim.sgd import SGD_AGC

__all__ = [
    "AGC",
    "EMA",
    "SAM",
    "SGD_AGC",
    "AGCStats",
    "adaptive_clip_grad_",
    "ascent_size",
    "param_groups",
    "unitwise_norm",
    "warmup_cosine",
]
