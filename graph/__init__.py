"""Writing ONNX graphs: the builder, the weights file, and the RetNet in its decode and prefill form."""
