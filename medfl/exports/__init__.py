"""A run's encoder for other programs: ONNX, a MONAI bundle and a model card, each compared with the original."""
