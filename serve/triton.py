"""A model repository for Triton Inference Server from a bundle.

Two models: NAME, which takes text and streams text by the scheduler of `serve` in Triton's Python backend, and NAME_step, the bare
step for Triton's ONNX Runtime (or TensorRT) backend, whose state Triton keeps for each sequence.

Rule: Triton pairs the state's inputs with its outputs in the order of their names, each list sorted for itself. So names must
sort alike, which is checked here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.files import new_folder
from retnet_export.runtime.bundle.manifest import StateSpec
from retnet_export.runtime.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    import onnx

MARKER = ".retnet-export-triton"
"""A file that every repository of ours has: --force replaces no other folder."""
BUNDLE = "bundle.retnet"
IMAGE = "nvcr.io/nvidia/tritonserver:25.08-py3"
"""What the README names. It was not run here."""
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class TritonOptions:
    """How a repository is set up.

    Attributes:
        name: of the text model; the step's is NAME_step. The bundle's if None.
        instances: copies of each model, on each GPU if there are several.
        max_batch: sequences that generate together in an instance.
        gpus: on which the models run; none: on the CPU.
        platform: what runs the step.
    """

    name: str | None = None
    instances: int = 1
    max_batch: int = 8
    gpus: Sequence[int] = ()
    platform: str = "onnxruntime"


def write_repository(bundle: Bundle, target: Path, options: TritonOptions, *, force: bool = False) -> None:
    """Write a model repository.

    Args:
        bundle: what is served; its files are linked into the repository, or copied where that cannot be done.
        target: the folder.
        options: how.
        force: replace an earlier repository.

    Raises:
        UserError: the folder is there, an option is out of its range, or the bundle's names of the state do not sort in pairs.
    """
    name = options.name or bundle.manifest.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"{name!r} is not a name for a model; use letters, digits, '-', '_' and '.'")
    if options.instances < 1 or options.max_batch < 1:
        raise UserError(f"instances is {options.instances} and max_batch {options.max_batch}, expected at least 1")
    check_pairs(bundle.manifest.state)
    with new_folder(target, marker=MARKER, force=force) as folder:
        (folder / MARKER).touch()
        text, step = folder / name / "1", folder / f"{name}_step" / "1"
        for each in (text, step):
            each.mkdir(parents=True)
        for path in sorted(path for path in bundle.path.rglob("*") if path.is_file()):
            _link(path, text / BUNDLE / path.relative_to(bundle.path))
        (text / "model.py").write_text(MODEL)
        (folder / name / "config.pbtxt").write_text(text_config(name, options))
        graph = bundle.manifest.graphs["decode"]
        (step / "model.onnx").write_bytes(step_graph(bundle).SerializeToString())
        _link(bundle.file("weights.bin"), step / "weights.bin")
        (folder / f"{name}_step" / "config.pbtxt").write_text(step_config(f"{name}_step", bundle, options))
        (folder / "README.md").write_text(_readme(name, options, graph.opset))
        deployment = KUBERNETES.replace("NAME", _dns(name)).replace("IMAGE", IMAGE).replace("GPUS", str(len(options.gpus)))
        (folder / "kubernetes.yaml").write_text(deployment)


MODEL = '''"""The model: everything is in the package retnet-export, which the server's Python must have."""

from retnet_export.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def text_config(name: str, options: TritonOptions) -> str:
    """config.pbtxt of the text model."""
    backend = "auto" if options.gpus else "onnxruntime"
    return f"""\
# Text or token ids in, pieces of text out as they are made. Requests are batched by the model itself, continuously.
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "prompt" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "tokens" data_type: TYPE_INT64 dims: [ -1 ] optional: true }}
]
output [
  {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "token" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "index" data_type: TYPE_INT32 dims: [ 1 ] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] }}
]
{_instances(options)}
parameters [
  {{ key: "backend" value {{ string_value: "{backend}" }} }},
  {{ key: "max_batch" value {{ string_value: "{options.max_batch}" }} }},
  {{ key: "max_queue" value {{ string_value: "256" }} }},
  {{ key: "cache_mb" value {{ string_value: "512" }} }},
  {{ key: "max_prompt" value {{ string_value: "32768" }} }},
  {{ key: "max_tokens" value {{ string_value: "4096" }} }}
]
"""


def step_config(name: str, bundle: Bundle, options: TritonOptions) -> str:
    """config.pbtxt of the step: a token id in, logits out, the state kept by Triton."""
    platform = {"onnxruntime": 'backend: "onnxruntime"', "tensorrt": 'platform: "tensorrt_plan"'}[options.platform]
    states = ",\n".join(_state(spec) for spec in bundle.manifest.state)
    return f"""\
# A step of one token a sequence. Triton keeps the state between the requests of a sequence, and batches those of several.
name: "{name}"
{platform}
max_batch_size: {options.max_batch}
input [ {{ name: "tokens" data_type: TYPE_INT64 dims: [ 1 ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ {bundle.manifest.model.vocab_size} ] }} ]
{_instances(options)}
sequence_batching {{
  max_sequence_idle_microseconds: 60000000
  oldest {{ max_candidate_sequences: {options.max_batch} }}
  state [
{states}
  ]
}}
"""


def _state(spec: StateSpec) -> str:
    about = f"data_type: {TYPES[spec.dtype]} dims: [ {', '.join(map(str, spec.shape[1:] or (1,)))} ]"
    zero = f'initial_state {{ name: "zero" {about} zero_data: true }}'
    return f'''    {{ input_name: "{spec.input}" output_name: "{spec.output}" {about} {zero} }}'''


def check_pairs(state: Sequence[StateSpec]) -> None:
    """Refuse names that would be paired wrongly.

    Raises:
        UserError: sorted outputs are not those of the sorted inputs.
    """
    outputs = [spec.output for spec in sorted(state, key=lambda spec: spec.input)]
    if outputs != sorted(outputs):
        raise UserError(
            "the names of the bundle's states do not sort alike as inputs and as outputs, and Triton would mix up the layers; "
            "export the checkpoint again with this version"
        )
    if any(spec.initial for spec in state):
        raise UserError("a state of the bundle does not begin with zeros, which the configuration for Triton cannot say")


def step_graph(bundle: Bundle) -> onnx.ModelProto:
    """decode.onnx with `position` as (B, 1): Triton's states have an axis beside the batch."""
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "writing the step's graph") from error

    model = onnx.load(bundle.file(bundle.manifest.graphs["decode"].file), load_external_data=False)
    graph: Any = model.graph
    for values in (graph.input, graph.output):
        for value in values:
            if value.name in ("position", "position_out"):
                value.type.tensor_type.shape.dim.add().dim_value = 1
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in ("position", "position_out"):
                    names[place] = f"{name}.of_batch"
    graph.initializer.append(helper.make_tensor("axis_one", TensorProto.INT64, [1], [1]))
    graph.node.insert(0, helper.make_node("Squeeze", ["position", "axis_one"], ["position.of_batch"], name="squeeze_position"))
    graph.node.append(
        helper.make_node("Unsqueeze", ["position_out.of_batch", "axis_one"], ["position_out"], name="unsqueeze_position")
    )
    return model


def _instances(options: TritonOptions) -> str:
    if options.gpus:
        return f"instance_group [ {{ kind: KIND_GPU count: {options.instances} gpus: [ {', '.join(map(str, options.gpus))} ] }} ]"
    return f"instance_group [ {{ kind: KIND_CPU count: {options.instances} }} ]"


def _link(source: Path, target: Path) -> None:
    """The same file in another place: bundles are replaced, never changed, so it may be the very file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _dns(name: str) -> str:
    """A name as Kubernetes takes it."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") or "retnet"


def _readme(name: str, options: TritonOptions, opset: int) -> str:
    gpu = "--gpus all " if options.gpus else ""
    extras = "cuda,serve" if options.gpus else "cpu,serve"
    plan = f"""
`{name}_step` is for TensorRT: build its plan in the same image, on the GPU that will run it.

    trtexec --onnx={name}_step/1/model.onnx --saveEngine={name}_step/1/model.plan --stronglyTyped \\
        --minShapes=… --optShapes=… --maxShapes=…   # every input's first axis: 1, {options.max_batch}, {options.max_batch}
"""
    return f"""\
# {name} on Triton Inference Server

    docker run --rm {gpu}-p 8000-8002:8000-8002 -v "$PWD":/models {IMAGE} \\
        bash -c "pip install 'retnet-export[{extras}]' 'numpy<2' && tritonserver --model-repository=/models"

    curl -N localhost:8000/v2/models/{name}/generate_stream \\
        -d '{{"prompt": "Once upon a time", "parameters": {{"max_tokens": 50, "temperature": "0.8", "seed": 7}}}}'

- `{name}` takes `prompt` (text) or `tokens` (ids), and gives for each piece: `text`, `token`, `index`, `finish_reason`.
  Sampling options are the request's parameters, by their names in `/v1/completions`. Pass those that are neither integers nor
  plain words as JSON in a string: `"temperature": "0.8"`, `"stop": "[\\"King\\"]"`.
- `{name}_step` takes `tokens`, one id, in a sequence (`sequence_id`, `sequence_start`, `sequence_end`), and gives `logits`. Triton
  keeps the state. Its graph is ONNX of opset {opset}.

docs/guides/triton.md of retnet-export lists what was tested and what was not.
{plan if options.platform == "tensorrt" else ""}"""


KUBERNETES = """\
# Triton with this repository on a volume; one replica a node, more of them behind the service.
apiVersion: apps/v1
kind: Deployment
metadata: { name: NAME }
spec:
  replicas: 1
  selector: { matchLabels: { app: NAME } }
  template:
    metadata: { labels: { app: NAME } }
    spec:
      containers:
        - name: triton
          image: IMAGE   # better: one of your own, with retnet-export in it
          command: [sh, -c, "pip install 'retnet-export[cpu,serve]' 'numpy<2' && exec tritonserver --model-repository=/models"]
          ports:
            - { name: http, containerPort: 8000 }
            - { name: grpc, containerPort: 8001 }
            - { name: metrics, containerPort: 8002 }
          readinessProbe: { httpGet: { path: /v2/health/ready, port: http }, periodSeconds: 5 }
          livenessProbe: { httpGet: { path: /v2/health/live, port: http }, periodSeconds: 10 }
          resources: { limits: { nvidia.com/gpu: GPUS } }
          volumeMounts:
            - { name: models, mountPath: /models, readOnly: true }
            - { name: memory, mountPath: /dev/shm }
      terminationGracePeriodSeconds: 60
      volumes:
        - name: models
          persistentVolumeClaim: { claimName: NAME-models }
        - name: memory
          emptyDir: { medium: Memory, sizeLimit: 1Gi }
---
apiVersion: v1
kind: Service
metadata: { name: NAME }
spec:
  selector: { app: NAME }
  ports:
    - { name: http, port: 8000, targetPort: http }
    - { name: grpc, port: 8001, targetPort: grpc }
    - { name: metrics, port: 8002, targetPort: metrics }
"""
