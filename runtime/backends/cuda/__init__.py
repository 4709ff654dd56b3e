"""RetNet steps in CUDA kernels of our own, compiled for the GPU at hand when first used: no ONNX Runtime, no TensorRT, no torch."""
