"""One comparison from a bundle to a result: the baseline is written, the engines are set up, every cell is measured."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from retnet_export.compare import machine
from retnet_export.compare.baseline import Baseline, baseline_for, write
from retnet_export.compare.engines import RetNetEngine, TransformerEngine
from retnet_export.compare.measure import Contender, measure, most_runs
from retnet_export.compare.peers import genai, llama_cpp
from retnet_export.compare.results import GENAI, LLAMA_CPP, REPORT_FORMAT, RETNET, TRANSFORMER, Cell, Comparison, Side
from retnet_export.runtime.backends import NAMES, registered
from retnet_export.runtime.backends.onnxruntime_api import best_variant
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.weights import parameters
from retnet_export.runtime.device.memory import available_memory
from retnet_export.runtime.errors import ArgumentError, UserError, one_of
from retnet_export.runtime.progress import Progress, silent

PEERS = {GENAI: genai.unavailable, LLAMA_CPP: llama_cpp.unavailable}
"""Outside engines by their name on the command line, and what says whether they are here."""

LONGEST = 1 << 20
"""The longest context: the table of the baseline's rotary angles grows with it."""


@dataclass(frozen=True)
class CompareOptions:
    """What a comparison measures.

    Attributes:
        contexts: tokens read before decoding is timed.
        prompts: lengths of prompts.
        batches: sequences that decode together, at `batch_context`.
        batch_context: their context.
        kv_heads: of the baseline; as many as query heads when None.
        cache: of the baseline: "compute" or "int8".
        memory_budget: bytes that either side may take; all that is free when None.
        seconds: time for an engine in a cell, about.
        threads: cores to use; all when None.
        backend: what runs the bundle.
        peers: outside engines to run, too.
    """

    contexts: tuple[int, ...] = (0, 512, 2048, 8192, 32768)
    prompts: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    batch_context: int = 2048
    kv_heads: int | None = None
    cache: str = "compute"
    memory_budget: int | None = None
    seconds: float = 2.0
    threads: int | None = None
    backend: str = "auto"
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values, least in (
            ("contexts", self.contexts, 0),
            ("prompts", self.prompts, 1),
            ("batches", self.batches, 1),
            ("batch_context", (self.batch_context,), 0),
        ):
            if wrong := [value for value in values if not least <= value <= LONGEST]:
                raise ArgumentError(name, f"holds {wrong[0]:,}, expected {least} to {LONGEST:,}")
        if not self.contexts:
            raise ArgumentError("contexts", "is empty, expected at least one, as in contexts=0,2048")
        if self.cache not in ("compute", "int8"):
            raise ArgumentError("cache", f"is {self.cache!r}, expected compute or int8")
        if self.backend not in NAMES:
            raise ArgumentError("backend", f"is {self.backend!r}, expected {one_of(NAMES)}")
        if not 0.05 <= self.seconds <= 600:
            raise ArgumentError("seconds", f"is {self.seconds:g}, expected 0.05 to 600")
        if unknown := [peer for peer in self.peers if peer not in PEERS]:
            raise ArgumentError("peers", f"is {unknown[0]!r}, expected {one_of(PEERS)}")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """What is done, each thing once."""
        decode = [Cell("decode", context, 1) for context in sorted(set(self.contexts))]
        batched = [Cell("decode", self.batch_context, batch) for batch in sorted(set(self.batches))]
        prefill = [Cell("prefill", 0, 1, tokens) for tokens in sorted(set(self.prompts))]
        return tuple(dict.fromkeys([*decode, *batched, *prefill]))

    @property
    def capacity(self) -> int:
        """The longest sequence that any cell reaches."""
        return max(max(cell.context, cell.tokens) + most_runs(cell) for cell in self.cells) + 8


def compare(bundle: Bundle, options: CompareOptions | None = None, *, progress: Progress = silent) -> Comparison:
    """Measure a bundle against its baseline.

    Raises:
        UserError: there is no fair baseline, the budget does not hold the weights, or a peer that was asked for is missing.
    """
    options = options or CompareOptions()
    for peer in options.peers:
        if (missing := PEERS[peer]()) is not None:
            raise UserError(f"peer {peer}: {missing}")
    pinned = machine.cores(options.threads)
    budget = options.memory_budget or available_memory() or LONGEST**2
    with tempfile.TemporaryDirectory(prefix="retnet-export-compare-") as folder:
        baseline = baseline_for(bundle, Path(folder), capacity=options.capacity, kv_heads=options.kv_heads, cache=options.cache)
        _check_budget(bundle, budget)
        progress("writing the baseline", 0.0)
        write(baseline)
        contenders = _contenders(bundle, baseline, options, len(pinned))
        found = measure(contenders, options.cells, seconds=options.seconds, budget=budget, cores=pinned, progress=progress)
        if LLAMA_CPP in options.peers:
            progress(LLAMA_CPP, 0.0)
            found += llama_cpp.measure_llama_cpp(baseline, options.cells, len(pinned))
        retnet, transformer = retnet_model(bundle, options.backend), transformer_model(baseline)
    return Comparison(
        format=REPORT_FORMAT,
        format_version=1,
        bundle=bundle.manifest.name,
        machine=machine.description(pinned),
        versions=machine.versions(),
        settings=asdict(options),
        retnet=retnet,
        transformer=transformer,
        measurements=found,
        memory_budget=budget,
    )


def _check_budget(bundle: Bundle, budget: int) -> None:
    weights = bundle.manifest.weights_bytes
    if budget < weights:
        raise UserError(
            f"the memory budget is {budget / 1e6:,.0f} MB, but the weights of {bundle.path} alone are {weights / 1e6:,.0f} MB; "
            "give a larger budget, or quantize the bundle"
        )


def _contenders(bundle: Bundle, baseline: Baseline, options: CompareOptions, threads: int) -> list[Contender]:
    retnet, transformer = retnet_model(bundle, options.backend), transformer_model(baseline)
    contenders = [
        Contender(RETNET, partial(RetNetEngine, bundle.path, options.backend, threads), partial(needed_bytes, retnet)),
        Contender(TRANSFORMER, partial(TransformerEngine, baseline, threads), partial(needed_bytes, transformer)),
    ]
    if GENAI in options.peers:
        contenders.append(
            Contender(
                GENAI,
                partial(genai.GenaiEngine, baseline, threads),
                partial(needed_bytes, transformer),
                partial(genai.refusal, baseline),
            )
        )
    return contenders


def needed_bytes(model: Side, cell: Cell) -> int:
    """An estimate of what a cell takes, to refuse what cannot fit: weights as stored and as packed, states or caches, logits."""
    longest = max(cell.context, cell.tokens) + most_runs(cell)
    per_sequence = model.buffers * model.sequence_bytes(longest) + 8 * model.shape["vocabulary"]
    return 2 * model.weights_bytes + cell.batch * per_sequence


def retnet_model(bundle: Bundle, backend: str = "auto") -> Side:
    """The bundle's side, on a backend."""
    manifest, config = bundle.manifest, bundle.manifest.model
    return Side(
        name=manifest.name,
        parameters=parameters(config),
        weights=manifest.precision.weights,
        weights_bytes=manifest.weights_bytes,
        buffers=_state_sets(bundle, backend),
        bytes_per_sequence=manifest.state_bytes,
        bytes_per_token=0,
        shape={
            "layers": config.num_layers,
            "width": config.hidden_size,
            "heads": config.num_heads,
            "key size": config.head_key_dim,
            "value size": config.head_value_dim,
            "feed-forward": config.ffn_size,
            "vocabulary": config.vocab_size,
        },
    )


def _state_sets(bundle: Bundle, backend: str) -> int:
    """Sets of state buffers of a running sequence. A comparison runs on given threads, for which "auto" is ONNX Runtime."""
    if (name := "onnxruntime" if backend == "auto" else backend) == "onnxruntime":
        graphs = bundle.manifest.variants[best_variant(bundle.manifest, "cpu")].graphs
        if not graphs["prefill"].chunks_in_place:  # an older version, or a state in float16
            return 2
    return registered(name).state_sets


def transformer_model(baseline: Baseline) -> Side:
    """The baseline's side."""
    config = baseline.config
    return Side(
        name="KV-cache Transformer",
        parameters=config.parameters,
        weights=baseline.weights,
        weights_bytes=baseline.weights_bytes,
        buffers=1,
        bytes_per_sequence=0,
        bytes_per_token=baseline.cache_bytes_per_token,
        shape={
            "layers": config.num_layers,
            "width": config.hidden_size,
            "heads": config.num_heads,
            "key-value heads": config.num_kv_heads,
            "head size": config.head_dim,
            "feed-forward": config.ffn_size,
            "vocabulary": config.vocab_size,
        },
    )
