"""Images in, batches out."""

from normfree.data.loader import Batch, eval_batches, train_batches
from normfree.data.sources import (
    DATASET_NAMES,
    IMAGE_SUFFIXES,
    ArrayImages,
    FolderImages,
    ImageSet,
    UnreadableImage,
    find_images,
    has_validation,
    median_short_side,
    open_dataset,
    open_evaluation,
    read_image,
)
from normfree.data.transforms import EvalTransform, TrainTransform, normalize, sample_rng

__all__ = [
    "DATASET_NAMES",
    "IMAGE_SUFFIXES",
    "ArrayImages",
    "Batch",
    "EvalTransform",
    "FolderImages",
    "ImageSet",
    "TrainTransform",
    "UnreadableImage",
    "eval_batches",
    "find_images",
    "has_validation",
    "median_short_side",
    "normalize",
    "open_dataset",
    "open_evaluation",
    "read_image",
    "sample_rng",
    "train_batches",
]
