from normfree.weights.file import IMAGENET_MEAN, IMAGENET_STD, ModelInfo, read_weights, write_weights

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ModelInfo", "read_weights", "write_weights"]
