from normfree.weights.file import ModelInfo, read_weights, write_weights

__all__ = ["ModelInfo", "read_weights", "write_weights"]
