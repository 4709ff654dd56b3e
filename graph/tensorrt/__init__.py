"""The forms of the portable graphs for which TensorRT makes few kernels that move few bytes.

Rule: nothing here is stored in a bundle. An engine is built from these forms, and the bundle keeps the portable ones, which
other runtimes take. What each form saves was read from the engines that TensorRT builds (docs/lab/tensorrt.md).
"""
