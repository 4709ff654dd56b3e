"""`retnet-export inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from retnet_export.commands.compile import print_anatomy
from retnet_export.commands.export import print_summary
from retnet_export.commands.options import BundlePath, Json
from retnet_export.commands.output import print_json, print_table, size

if TYPE_CHECKING:
    from retnet_export.runtime.bundle.bundle import Bundle


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Compare every file of a bundle with its checksum and describe the bundle."""
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.engines import read_engines
    from retnet_export.runtime.bundle.schema import encode
    from retnet_export.runtime.bundle.weights import parameters

    opened = open_bundle(bundle)
    engines = read_engines(opened)
    if as_json:
        document = cast(dict[str, object], encode(opened.manifest))
        counted = {"parameters": parameters(opened.manifest.model), "engines": [encode(record) for record in engines]}
        print_json({**document, **counted})
        return
    manifest = opened.manifest
    print_summary(f"{bundle}: complete; every file matches its checksum", opened)
    print_table("", [("runs here", _variant_here(opened))])
    rows = [(name, f"{size(record.bytes)}  sha256 {record.sha256[:16]}…") for name, record in manifest.files.items()]
    print_table("\nfiles", rows)
    decode = manifest.graphs["decode"]
    for title, specs in (("inputs", decode.inputs), ("outputs", decode.outputs)):
        print_table(
            f"\n{title} of {decode.file}",
            [(spec.name, f"{spec.dtype} ({', '.join('batch' if n == -1 else str(n) for n in spec.shape)})") for spec in specs],
        )
    built = [
        (
            record.stem,
            f"{record.target} {record.version}, compute capability {', '.join(record.compute_capabilities)}, batch up to "
            f"{record.max_batch}, {size(sum(file.bytes for file in record.files.values()))}",
        )
        for record in engines
    ]
    print_table("\nengines", built or [("none", "`retnet-export compile` builds them, for a GPU")])
    for record in engines:
        print_anatomy(record)
    checked = manifest.verification
    verdict = "not yet; run `retnet-export verify`" if checked is None else ("passed" if checked.get("passed") else "FAILED")
    print_table("\nrecord", [("verified", verdict), *((name, str(value)) for name, value in manifest.provenance.items())])


def _variant_here(bundle: Bundle) -> str:
    """Which variant the installed ONNX Runtime takes on the CPU."""
    try:
        import onnxruntime
    except ImportError:
        return "nothing on the CPU: onnxruntime is not installed"
    from retnet_export.runtime.backends.onnxruntime_api import best_variant

    if bundle.manifest.precision.compute == "bfloat16":
        return "nothing on the CPU: ONNX Runtime has no products of bfloat16 there"
    return f"{best_variant(bundle.manifest, 'cpu')} on the CPU, ONNX Runtime {onnxruntime.__version__}"
