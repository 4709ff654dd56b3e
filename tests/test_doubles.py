"""Whatever the doubles have, the real modules have, with the same signatures."""

from __future__ import annotations

import enum
import inspect
import re

import cuda_double
import pytest
import tensorrt_double
from tensorrt_api import make as api
from tensorrt_api.differences import DIFFERENCES

from retnet_export.runtime.backends.tensorrt_api import load_module, version_of

RELEASES = tensorrt_double.RELEASES


def names_in(signature: str) -> list[str]:
    """Parameter names of "f(self: C, a: int, b: E = <E.X: 0>) -> C"."""
    plain = re.sub(r" = (<[^>]*>|[^,)]*)", "", signature.split(" -> ")[0])
    return re.findall(r"(\w+): ", plain.partition("self: ")[2])


def members_of_double():
    for kind in tensorrt_double.CLASSES:
        for name, member in vars(kind).items():
            if not name.startswith("_") and not isinstance(member, str):
                yield kind, name, member


@pytest.mark.parametrize("release", RELEASES)
def test_every_member_of_the_double_is_in_every_release_with_its_signature(release):
    only_rtx = {"set_compute_capability", "num_compute_capabilities"}
    for kind, name, member in members_of_double():
        known = RELEASES[release][kind.__name__]
        if name in only_rtx and "rtx" not in release:
            assert name not in known
            continue
        assert name in known, f"{kind.__name__}.{name}"
        if callable(member) and not isinstance(member, enum.Enum):
            ours = [parameter for parameter in inspect.signature(member).parameters if parameter != "self"]
            theirs = [names_in(text) for text in known[name].split(" | ")]
            # Abstract methods that we implement have no signature there.
            assert known[name] == "property" or ours in theirs, f"{kind.__name__}.{name}: {ours} is none of {theirs}"
        elif isinstance(member, enum.Enum) and kind.__name__ not in ("BuilderFlag", "NetworkDefinitionCreationFlag"):
            assert known[name] == f"value {member.value}", f"{kind.__name__}.{name}"


def test_the_recorded_api_is_that_of_the_installed_tensorrt_rtx():
    module = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    release = f"tensorrt-rtx {module.__version__}"
    if release not in RELEASES:
        pytest.skip(f"{release} is not among the recorded releases")
    assert api.surface(module) == RELEASES[release]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.attribute)
def test_the_table_of_differences_is_true(difference):
    kind, _, name = difference.attribute.partition(".")
    for release, classes in RELEASES.items():
        product, version = release.split()
        major, minor = map(int, version.split(".")[:2])
        if product == "tensorrt-rtx":
            expected = difference.rtx
        else:
            expected = difference.first is not None and (major, minor) >= difference.first and major <= (difference.last or major)
        assert (name in classes[kind]) is expected, release


def test_real_networks_give_the_names_and_shapes_that_the_double_gives(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    import tiny

    real = load_module("tensorrt-rtx")
    double = tensorrt_double.make_double(f"tensorrt-rtx {real.__version__}", cuda_double.CudaDouble())
    path = tiny.bundle(tmp_path, tiny.CONFIGS["torchscale"]).path / "prefill.onnx"
    seen = []
    for module in (real, double):
        network, _ = parsed(module, path)
        logits = next(tensor for tensor in outputs_of(network) if tensor.name == "logits")
        network.mark_output(network.add_topk(logits, module.TopKOperation.MAX, 7, 1 << (len(logits.shape) - 1)).get_output(0))
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        described = [
            [(tensor.name, tensor.dtype.name, tuple(tensor.shape)) for tensor in side] for side in (inputs, outputs_of(network))
        ]
        described[1][-1] = ("", *described[1][-1][1:])  # the added output is not named yet
        seen.append(described)
    assert seen[0] == seen[1]


def test_real_parsers_name_the_node_that_the_double_names(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    import onnx

    value = onnx.helper.make_tensor_value_info("x", 1, [2])
    result = onnx.helper.make_tensor_value_info("y", 1, [2])
    node = onnx.helper.make_node("MatMulNBits", ["x"], ["y"], name="layers.0.ffn.up", domain="com.microsoft")
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [result]), opset_imports=opsets), tmp_path / "m.onnx"
    )
    real = load_module("tensorrt-rtx")
    double = tensorrt_double.make_double(f"tensorrt-rtx {real.__version__}", cuda_double.CudaDouble())
    for module in (real, double):
        _, parser = parsed(module, tmp_path / "m.onnx")
        assert parser.num_errors == 1
        assert (parser.get_error(0).node_name(), parser.get_error(0).node_operator()) == ("layers.0.ffn.up", "MatMulNBits")


def parsed(module, path):
    class Quiet(module.ILogger):
        def __init__(self):
            module.ILogger.__init__(self)

        def log(self, severity, message):
            pass

    logger = Quiet()
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    parser.parse_from_file(str(path))
    KEPT.append((logger, builder, network))
    return network, parser


KEPT: list[tuple[object, ...]] = []
"""Real networks need their builder alive."""


def outputs_of(network):
    return [network.get_output(index) for index in range(network.num_outputs)]


def test_the_cuda_double_has_the_names_and_codes_of_cuda_bindings():
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    for name, member in vars(cuda_double.CudaDouble).items():
        if not name.startswith("cuda"):
            continue
        assert hasattr(real, name), name
        if inspect.isfunction(member):
            ours = [parameter for parameter in inspect.signature(member).parameters if parameter != "self"]
            theirs = re.match(r"\w+\((.*?)\)", getattr(real, name).__doc__ or "")
            assert theirs is not None, name
            assert len(ours) == len([part for part in theirs[1].split(",") if part.strip()]), f"{name}: {ours} and {theirs[1]}"
        elif inspect.isclass(member):
            for code in member:
                assert getattr(getattr(real, name), code.name).value == code.value


def test_versions_are_read_as_numbers():
    for text, numbers in (("10.3.0", (10, 3, 0)), ("11.4.0.106", (11, 4, 0, 106)), ("10.5.0.post1", (10, 5, 0))):
        module = type("Module", (), {"__version__": text})
        assert version_of(module) == numbers


NEEDED_OF_FULL_TENSORRT = {
    "Builder": ("build_serialized_network", "create_optimization_profile"),
    "BuilderFlag": ("TF32",),
    "DataType": ("INT4", "INT8", "FP8", "INT64", "BF16"),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "IBuilderConfig": ("add_optimization_profile", "profiling_verbosity", "progress_monitor", "set_memory_pool_limit"),
    "ICudaEngine": ("create_engine_inspector", "get_device_memory_size_for_profile_v2"),
    "IExecutionContext": ("set_device_memory", "set_input_shape", "set_optimization_profile_async", "set_tensor_address"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "LayerInformationFormat": ("JSON",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("parse", "parse_from_file"),
    "ProfilingVerbosity": ("DETAILED",),
}
"""What compiling and running rest on: strong typing, four-bit weights, profiles with empty graphs, progress, the list of layers."""


@pytest.mark.parametrize("release", RELEASES)
def test_what_compiling_rests_on_is_in_every_release_from_jetpack_6_2s_on(release):
    for kind, members in NEEDED_OF_FULL_TENSORRT.items():
        assert set(members) <= set(RELEASES[release][kind]), kind
