"""Writes releases.json: the classes, members and signatures of real TensorRT modules, by release.

    python make.py MODULE [MODULE …]

run once for each release, with that release importable; the file is added to. Full TensorRT's binding module needs libraries of
some gigabytes to run, but none to be looked at: its wheel (tensorrt-cu12-bindings, tensorrt-cu13-bindings; one megabyte) imports
beside three empty shared libraries that have the nine C functions it links against, each returning null:

    for name in nvinfer nvonnxparser nvinfer_plugin: gcc -shared -fPIC -Wl,-soname,lib$name.so.10 -o lib$name.so.10 empty.c

    createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParserRefitter_INTERNAL
    createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

CLASSES = (
    *("Builder", "BuilderFlag", "ComputeCapability", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy"),
    *("IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILogger", "INetworkDefinition"),
    *("IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache", "ITopKLayer", "LayerInformationFormat"),
    *("MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity", "Runtime"),
    *("TensorIOMode", "TopKOperation"),
)


def surface(module) -> dict[str, dict[str, str]]:
    """Members of each class: a signature, "property", or "value N" of an enum."""
    classes = {}
    for name in CLASSES:
        kind = getattr(module, name, None)
        if kind is not None:
            members = [member for member in dir(kind) if not member.startswith("_")]
            classes[name] = {member: describe(kind, member) for member in members}
    return classes


def describe(kind, member: str) -> str:
    value = getattr(kind, member)
    if isinstance(value, kind):
        return f"value {int(value)}"
    signatures = re.findall(rf"^(?:\d+\. )?({member}\(.*->.*)$", value.__doc__ or "", re.MULTILINE) if callable(value) else []
    return " | ".join(re.sub(r"\b\w+(?:_bindings)?\.tensorrt(?:_rtx)?\.", "", line) for line in signatures) or "property"


if __name__ == "__main__":
    path = Path(__file__).with_name("releases.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:]:
        module = importlib.import_module(name)
        release = f"{'tensorrt-rtx' if 'rtx' in name else 'tensorrt'} {module.__version__}"
        known[release] = surface(module)
    path.write_text(json.dumps(dict(sorted(known.items())), indent=0, sort_keys=True) + "\n")
