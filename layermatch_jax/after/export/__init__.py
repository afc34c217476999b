"""Models as files that run without this package: StableHLO (jax alone) and ONNX (onnxruntime)."""
