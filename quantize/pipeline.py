"""From a bundle to a smaller one: quantize one matrix after another, rewrite both graphs in one pass, hash the files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retnet_export.quantize.activations import activation_ranges, check_options
from retnet_export.quantize.formats import Bits, Format, Quantized
from retnet_export.quantize.methods import METHODS, Awq, Gram, Method, RoundToNearest
from retnet_export.runtime.bundle.bundle import MANIFEST, Bundle, open_bundle
from retnet_export.runtime.bundle.files import new_folder, sha256_of
from retnet_export.runtime.bundle.manifest import Manifest, StateSpec
from retnet_export.runtime.errors import ArgumentError, MissingExtraError, PrecisionWarning, UserError, one_of
from retnet_export.runtime.numerics import first_not_finite
from retnet_export.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from retnet_export.graph.weights_file import WeightsFile
    from retnet_export.quantize.rewrite import Role
    from retnet_export.quantize.store import MatrixStore

WEIGHTS: Mapping[str, Bits] = {"int8": 8, "int4": 4, "fp8": 8}
TABLES = ("int8", "int4", "keep")
"""Formats of embedding and head; "keep" leaves the matrix as it is."""
GROUP_SIZES = (16, 32, 64, 128, 256)
DEFAULT_INT4_GROUP = 64
ENOUGH_TOKENS = 4096
"""Of a calibration text: below, gptq lost to rounding to nearest on the bundled model, in perplexity or in KL."""
Judge = Callable[[Bundle], Mapping[str, object]]


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of `retnet-export quantize`.

    Attributes:
        weights: int8, int4 or fp8, of all matrices but embedding and head.
        group_size: inputs that share a scale; None: all of an output for int8, 64 for int4.
        method: rtn, gptq or awq, for the same matrices; embedding and head are rounded to nearest.
        embedding, head: int8, int4 or keep; one and the same if the head is the embedding. The head also fp8.
        calibration: the text that gptq, awq and activations need.
        state: fp16, or None to leave it.
        activations: int8 or fp8, of what flows into the products with such weights; None to leave it.
    """

    weights: str = "int4"
    group_size: int | None = None
    method: str = "rtn"
    embedding: str = "int8"
    head: str = "int8"
    calibration: Path | None = None
    state: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, str, Iterable[str]], ...] = (
            ("weights", self.weights, WEIGHTS),
            ("method", self.method, METHODS),
            ("embedding", self.embedding, TABLES),
            ("head", self.head, (*TABLES, "fp8")),
            ("state", self.state or "fp16", ("fp16",)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ArgumentError(name, f"is {value!r}, expected {one_of(allowed)}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ArgumentError("group_size", f"is {self.group_size}, expected {one_of(map(str, GROUP_SIZES))}")
        check_options(self)
        if METHODS[self.method].calibrated and self.calibration is None:
            raise ArgumentError(
                "method",
                f"is {self.method!r}, which looks at activations: give a text of the kind that the model will continue, "
                "calibration=FILE",
            )
        if not METHODS[self.method].calibrated and self.calibration is not None and self.activations is None:
            raise ArgumentError(
                "calibration", f"cannot be combined with method={self.method}, which looks at no text; choose gptq or awq"
            )

    def format_of(self, role: Role, scale: str) -> Format | None:
        """The format of a matrix by what it is for; None: it stays as it is."""
        chosen = {"weights": self.weights, "head": self.head}.get(role, self.embedding)
        if chosen == "fp8":
            return Format(WEIGHTS[chosen], None, scale, floating=True)
        if role == "weights":
            bits = WEIGHTS[self.weights]
            return Format(bits, self.group_size or (DEFAULT_INT4_GROUP if bits == 4 else None), scale)
        if chosen == "keep":
            return None
        return Format(WEIGHTS[chosen], self.group_size or DEFAULT_INT4_GROUP if chosen == "int4" else None, scale)


def quantize_bundle(
    source: Bundle,
    target: str | Path,
    options: QuantizeOptions,
    *,
    force: bool = False,
    judge: Judge | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Write a quantized copy of a bundle.

    Args:
        source: a bundle with float weights.
        target: the folder to make.
        options: formats and methods.
        force: replace an existing bundle.
        judge: measures the new bundle before it takes its place; what it says is recorded as "evaluation".
        progress: receives stage and share done.

    Raises:
        UserError: the source is quantized already, options do not fit it, the calibration text is unfit, `judge` refuses the
            result, or the target cannot be written; nothing is left behind, and what was there before stays.
    """
    try:
        from retnet_export.graph.loading import load_graph
    except ImportError as error:
        raise MissingExtraError("onnx-ir", "export", "quantizing") from error
    from retnet_export.graph.card import write_card
    from retnet_export.graph.derived import write_derived_bundle
    from retnet_export.graph.retnet import warn_of_slow_heads
    from retnet_export.graph.weights_file import WeightsFile
    from retnet_export.quantize.rewrite import matrices, products, quantize_graph, store_state_as_float16

    _check_source(source, target, options)
    manifest = source.manifest
    warn_of_slow_heads(manifest.model, options.state or "fp32")
    graphs = {name: load_graph(source, spec.file) for name, spec in manifest.graphs.items()}
    plan = _plan(source, matrices(graphs["decode"]), graphs["decode"], options)
    calibration = None if options.calibration is None else _calibration(source, options.calibration)
    tokens = None if calibration is None else calibration.pop("tokens")
    if tokens is not None and METHODS[options.method].calibrated and tokens.size < ENOUGH_TOKENS:
        warnings.warn(
            f"calibrated on {tokens.size:,} tokens of {calibration['file']}, which are few: {options.method} may be worse than "  # type: ignore[index]
            f"rounding to nearest, as it was measured to be below {ENOUGH_TOKENS:,} (docs/lab/quantization.md); "
            "give more text, of the kinds that the model will continue, and compare with --evaluate",
            PrecisionWarning,
            stacklevel=2,
        )
    with new_folder(target, marker=MANIFEST, force=force) as folder:
        ranges = None
        if options.activations is not None and tokens is not None:
            progress("measuring activations", 0.0)
            measured = {node: name for node, name in products(graphs["decode"]).items() if _has(plan, name, options.activations)}
            ranges = activation_ranges(source, graphs["decode"], tokens, measured)
        with WeightsFile(folder / "weights.bin") as file:
            job = _Quantization(source, graphs["decode"], plan, METHODS[options.method](), file, progress)
            job.run(tokens if METHODS[options.method].calibrated else None)
            for model in graphs.values():
                quantize_graph(model, job.store.stored, ranges)
                _move_weights(model, file, job.vectors)
                if options.state == "fp16":
                    store_state_as_float16(model)
            weights = file.record()
        write_derived_bundle(
            source,
            folder,
            target,
            graphs,
            weights,
            state=_half_state(manifest) if options.state else manifest.state,
            precision=replace(
                manifest.precision,
                weights="float8" if options.weights == "fp8" else options.weights,
                state="float16" if options.state else manifest.precision.state,
            ),
            quantization={
                "weights": options.weights,
                "group_size": options.format_of("weights", "float32").group_size,  # type: ignore[union-attr]
                "method": options.method,
                "embedding": options.embedding,
                "head": options.head,
                "activations": options.activations,
                "activation_ranges": ranges,
                "calibration": calibration,
                "relative_weight_error": job.errors,
                "source": {"name": manifest.name, "weights_sha256": manifest.files["weights.bin"].sha256},
            },
        )
        result = open_bundle(folder, check_hashes=False)
        if judge is not None:
            evaluation = judge(result)
            result = result.with_manifest(quantization={**(result.manifest.quantization or {}), "evaluation": evaluation})
        write_card(folder, result.manifest)
    return Bundle(Path(target), result.manifest)


def _half_state(manifest: Manifest) -> tuple[StateSpec, ...]:
    return tuple(spec if spec.layer is None else replace(spec, dtype="float16") for spec in manifest.state)


def _check_source(source: Bundle, target: str | Path, options: QuantizeOptions) -> None:
    manifest = source.manifest
    if manifest.quantization is not None:
        raise UserError(
            f"{source.path}: already quantized ({manifest.precision.weights}); quantizing twice only loses "
            "quality; give the bundle that `export` wrote"
        )
    if Path(target).resolve() == source.path.resolve():
        raise UserError(f"{target}: the output is the input; choose another name")
    config = manifest.model
    if config.tied_embeddings and options.embedding != options.head:
        raise UserError(
            f"{source.path}: the head is the embedding, one matrix, so --embedding {options.embedding} and --head {options.head} "
            "cannot differ; give both options the same value"
        )
    if config.tied_embeddings and options.embedding == "int4":
        raise UserError(f"{source.path}: the head is the embedding, and no four-bit form is fast for both; choose int8 or keep")
    if options.embedding != "keep" and config.hidden_size % (32 // WEIGHTS[options.embedding]):
        raise UserError(
            f"{source.path}: width {config.hidden_size} is not a multiple of {32 // WEIGHTS[options.embedding]}, as "
            f"embedding={options.embedding} needs; choose embedding=keep"
        )
    if options.method == "awq" and config.post_norm:
        raise UserError(
            f"{source.path}: awq needs a norm directly before each matrix, which a post-norm model does not have; choose gptq"
        )
    if options.calibration is not None and manifest.precision.compute == "bfloat16":
        raise UserError(
            f"{source.path}: calibration runs the graph, which needs float32 or float16; export it so, or use no --calibration"
        )
    if options.state is not None and manifest.precision.state != "float32":
        raise UserError(f"{source.path}: its state is already {manifest.precision.state}")


@dataclass(frozen=True)
class _Planned:
    """One matrix and its new format."""

    role: Role
    format: Format


def _has(plan: Mapping[str, _Planned], name: str, form: str) -> bool:
    """Whether a matrix is to have this format."""
    return name in plan and plan[name].format.name == form


def _plan(source: Bundle, found: Mapping[str, Role], decode: ir.Model, options: QuantizeOptions) -> dict[str, _Planned]:
    from retnet_export.quantize.rewrite import check_groups

    plan, shapes = {}, {}
    for name, role in found.items():
        tensor = decode.graph.initializers[name].const_value
        assert tensor is not None
        form = options.format_of(role, str(tensor.numpy().dtype))
        if form is not None:
            plan[name] = _Planned(role, form)
            inputs, outputs = (int(size) for size in tensor.shape)  # type: ignore[arg-type]
            if form.group_size is not None:
                shapes[name] = (outputs, inputs) if role in ("embedding", "tied") else (inputs, outputs)
    if not plan:
        raise UserError(f"{source.path}: its graphs have no matrix to quantize")
    group = options.group_size or DEFAULT_INT4_GROUP
    check_groups(shapes, Format(4, group), f"{source.path}: --group-size")
    return plan


def _calibration(source: Bundle, path: Path) -> dict[str, Any]:
    """The calibration text, and what the manifest says of it."""
    from retnet_export.quantize.calibration import calibration_tokens
    from retnet_export.runtime.model import load

    tokens = calibration_tokens(load(source.path, check_hashes=False), path)
    return {"file": path.name, "sha256": sha256_of(path), "sequences": tokens.shape[0], "length": tokens.shape[1], "tokens": tokens}


class _Quantization:
    """One run over all matrices of a bundle.

    Attributes:
        store: the quantized matrices.
        vectors: norm weights and biases that have changed, by name.
        errors: relative root mean square error of the weights, the mean over the matrices of each role.
    """

    def __init__(
        self, source: Bundle, decode: ir.Model, plan: Mapping[str, _Planned], method: Method, file: WeightsFile, progress: Progress
    ) -> None:
        from retnet_export.quantize.store import MatrixStore

        self._source, self._decode, self._plan, self._method, self._progress = source, decode, plan, method, progress
        self.store: MatrixStore = MatrixStore(file)
        self.vectors: dict[str, np.ndarray[Any, Any]] = {}
        self._errors: dict[str, list[float]] = {}

    @property
    def errors(self) -> dict[str, float]:
        return {role: float(np.mean(errors)) for role, errors in self._errors.items()}

    def run(self, tokens: np.ndarray[Any, Any] | None) -> None:
        """Quantize everything; layer by layer first where a calibration text says what flows into them."""
        if tokens is not None:
            self._run_layers(tokens)
        for name in self._plan:
            if name not in self.store.stored:
                self._quantize(name, self._read(name), RoundToNearest(), None)

    def _run_layers(self, tokens: np.ndarray[Any, Any]) -> None:
        from retnet_export.quantize.calibration import LayerRunner
        from retnet_export.quantize.folding import fold_input_scales

        config = self._source.manifest.model
        runner = LayerRunner(self._source, self._decode, tokens)
        for index in range(runner.count):
            weights = {name: self._read(name) for name in runner.weight_names(index)}
            names = [name for name in weights if name in self._plan]
            grams = runner.grams(index, weights, names)
            if isinstance(self._method, Awq):
                formats = {name: self._plan[name].format for name in names}
                self.vectors |= fold_input_scales(config, f"layers.{index}", weights, grams, formats, self._method)
            for name in names:
                stored = weights[name]
                quantized = self._quantize(name, stored.astype(np.float32), self._method, grams[name])
                weights[name] = quantized.dequantized().astype(stored.dtype)
            runner.advance(index, weights)

    def _quantize(self, name: str, weight: np.ndarray[Any, Any], method: Method, gram: Gram | None) -> Quantized:
        planned = self._plan[name]
        weight = np.asarray(weight, np.float32)
        if first_not_finite(weight) is not None:
            raise UserError(f"{self._source.path}: {name} holds values that are not finite; export the checkpoint again")
        if planned.role in ("embedding", "tied"):
            weight = np.ascontiguousarray(weight.T)
        quantized = method.quantize(weight, planned.format, gram)
        self.store.put(name, planned.role, quantized)
        self._errors.setdefault(planned.role, []).append(quantized.relative_error(weight))
        self._progress("quantizing", len(self.store.stored) / len(self._plan))
        return quantized

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        tensor = self._decode.graph.initializers[name].const_value
        assert tensor is not None
        return np.array(tensor.numpy())


def _move_weights(model: ir.Model, file: WeightsFile, changed: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Let every external tensor of a graph refer to the new weights file."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not file.holds(tensor):
            moved = changed.get(name)
            value.const_value = file.tensor(name, lambda moved=moved, tensor=tensor: tensor.numpy() if moved is None else moved)  # type: ignore[misc]
