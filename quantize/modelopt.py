"""What runs nvidia-modelopt's ONNX quantizer: a process of its own, in a folder of its own.

Rule: it sees a copy. The quantizer (0.47) rewrites the graph it is given, leaves files of the size of the model in the working
directory, replaces functions of `onnxruntime.quantization`, and holds the whole model several times; none of this must
reach the bundle or the process that quantizes it. What comes out is one number a product: the largest magnitude that flows into it.

    python -m retnet_export.quantize.modelopt FOLDER
        reads   decode.onnx, weights.bin, tokens.npy, job.json {range, products}
        writes  scales.json {version, largest: {product: magnitude}}
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime

GRAPH, TOKENS, JOB, SCALES = "decode.onnx", "tokens.npy", "job.json", "scales.json"
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Steps:
    """A calibration data reader: the inputs of every step over the text, with the state that the steps before left.

    Args:
        session: the float graph.
        tokens: (B, T).
    """

    def __init__(self, session: onnxruntime.InferenceSession, tokens: NDArray[np.int64]) -> None:
        self._session, self._tokens = session, tokens
        self._outputs = [output.name for output in session.get_outputs()]
        self.rewind()

    def rewind(self) -> None:
        """Begin again, with empty states."""
        self._step = 0
        self._carried: dict[str, NDArray[Any]] = {
            spec.name: np.zeros((len(self._tokens), *spec.shape[1:]), NUMPY[spec.type])
            for spec in self._session.get_inputs()
            if spec.name != "tokens"
        }

    def get_first(self) -> Mapping[str, NDArray[Any]]:
        """The inputs of the first step; the quantizer takes shapes from them."""
        return {"tokens": self._tokens[:, :1], **self._carried}

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        """The inputs of the next step; None behind the last."""
        if self._step == self._tokens.shape[1]:
            return None
        feeds = {"tokens": self._tokens[:, self._step : self._step + 1], **self._carried}
        results = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        self._carried = {name: results[f"{name}_out"] for name in self._carried}
        self._step += 1
        return feeds


def main(folder: Path) -> None:
    """Do the job that lies in a folder, which is the working directory."""
    import modelopt
    import onnxruntime
    from modelopt.onnx.quantization import quantize
    from onnxruntime.quantization import CalibrationDataReader

    job = json.loads((folder / JOB).read_text())
    # Before the quantizer, which rewrites the file.
    session = onnxruntime.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    tokens, batch = np.load(folder / TOKENS), session.get_inputs()[0].shape[0]
    # A graph for a fixed batch gets so many rows, some twice if there are fewer.
    reader = Steps(session, np.resize(tokens, (batch, tokens.shape[1])) if isinstance(batch, int) else tokens)
    CalibrationDataReader.register(Steps)
    quantize(
        str(folder / GRAPH),
        quantize_mode="int8",
        calibration_method=job["range"],
        calibration_data_reader=reader,
        calibration_eps=["cpu"],
        nodes_to_quantize=[f"^{re.escape(name)}$" for name in job["products"]],
        # The graph's own types stay, whichever they are.
        high_precision_dtype="fp32",
        use_external_data_format=True,
        output_path=str(folder / "quantized.onnx"),
        # Products of one row are left out otherwise, and decode has no others.
        enable_gemv_detection_for_trt=False,
        log_level="WARNING",
    )
    scales = activation_scales(folder / "quantized.onnx", job["products"])
    largest = {name: 127 * scale for name, scale in scales.items()}
    (folder / SCALES).write_text(json.dumps({"version": modelopt.__version__, "largest": largest}))


def activation_scales(path: Path, products: Sequence[str]) -> dict[str, float]:
    """The scale of QuantizeLinear before each product of a graph that the quantizer wrote; none where it left a product out."""
    import onnx_ir as ir

    found: dict[str, float] = {}
    for node in ir.load(path).graph:
        dequantize = node.inputs[0].producer() if node.name in products and node.inputs[0] is not None else None
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            scale = dequantize.inputs[1]
            assert scale is not None
            assert scale.const_value is not None
            assert node.name is not None
            found[node.name] = float(scale.const_value.numpy())
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
