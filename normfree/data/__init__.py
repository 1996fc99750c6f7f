"""Images in, batches out."""

from normfree.data.images import (
    IMAGE_SUFFIXES,
    ArrayImages,
    FolderImages,
    LabelledImages,
    Samples,
    UnreadableImage,
    cached,
    changed,
    content_sample,
    count_sampled,
    fits_in_memory,
    inventory,
    read_image,
)
from normfree.data.loader import Batch, eval_batches, ordered_batches, stream_batches, train_batches
from normfree.data.mixing import Mixing
from normfree.data.named import DATASET_NAMES
from normfree.data.randaugment import RandAugment
from normfree.data.sources import find_images, has_validation, look_at, open_dataset, open_evaluation
from normfree.data.transforms import EvalTransform, TrainTransform, normalize, sample_rng

__all__ = [
    "DATASET_NAMES",
    "IMAGE_SUFFIXES",
    "ArrayImages",
    "Batch",
    "EvalTransform",
    "FolderImages",
    "LabelledImages",
    "Mixing",
    "RandAugment",
    "Samples",
    "TrainTransform",
    "UnreadableImage",
    "cached",
    "changed",
    "content_sample",
    "count_sampled",
    "eval_batches",
    "find_images",
    "fits_in_memory",
    "has_validation",
    "inventory",
    "look_at",
    "normalize",
    "open_dataset",
    "open_evaluation",
    "ordered_batches",
    "read_image",
    "sample_rng",
    "stream_batches",
    "train_batches",
]
