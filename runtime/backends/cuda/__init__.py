"""RetNet steps in CUDA kernels, compiled for this machine's GPU at first use; needs no ONNX Runtime, TensorRT or torch."""
