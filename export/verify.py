"""Verification of an export: compares the parallel form in torch with the ONNX graph, token by token, on real text.

The parallel form is what was trained; the graph is what will run. At every position the logits are compared, and the
token that greedy decoding would take. Where the two best logits are closer than the error itself, either is right: such
positions are ties and are counted apart. Prefill then reads the same text, and is compared after every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.weights import parameters
from retnet_export.runtime.errors import ArgumentError, MissingExtraError, UserError
from retnet_export.runtime.generate.tokenizer import Tokenizer
from retnet_export.runtime.model import Model
from retnet_export.runtime.numerics import Error, Tolerance, measure, spread, tolerance
from retnet_export.runtime.progress import Progress, silent

PASSAGE = """\
If music be the food of love, play on,
Give me excess of it; that, surfeiting,
The appetite may sicken and so die.
That strain again, it had a dying fall;
O, it came o'er my ear like the sweet sound
That breathes upon a bank of violets,
Stealing and giving odour. Enough; no more;
'Tis not so sweet now as it was before.
O spirit of love, how quick and fresh art thou,
That, notwithstanding thy capacity
Receiveth as the sea, nought enters there,
Of what validity and pitch soever,
But falls into abatement and low price
Even in a minute! So full of shapes is fancy,
That it alone is high fantastical.

Now it came to pass in the days when the judges ruled, that there was a famine in the land. And a certain man of
Bethlehemjudah went to sojourn in the country of Moab, he, and his wife, and his two sons. And the name of the man was
Elimelech, and the name of his wife Naomi, and the name of his two sons Mahlon and Chilion, Ephrathites of
Bethlehemjudah. And they came into the country of Moab, and continued there. And Elimelech Naomi's husband died; and she
was left, and her two sons. And they took them wives of the women of Moab; the name of the one was Orpah, and the name of
the other Ruth: and they dwelled there about ten years.
"""
"""Twelfth Night, act 1, scene 1, and Ruth, chapter 1 (King James Bible): public domain, and not in the bundled model's training."""


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        tokens: positions compared.
        source: what was read.
        error: of all logits.
        relative_error_by_position: max error at each position over the reference's standard deviation, so that drift shows.
        agreements: positions where both take the same token.
        ties: positions where they differ, but the reference's two candidates are closer than the error there.
        disagreements: the other positions where they differ.
        tolerance: the largest relative error accepted, and why.
        prefill_error: of the logits after each chunk that prefill reads.
        clamp_error: with torchscale's score normalisation, the error against the parallel form with its row clamp, which no
            recurrent form has; None otherwise.
        by_layer: whether the graphs were run a layer at a time.
        passed: both errors within tolerance and no disagreement.
    """

    tokens: int
    source: str
    error: Error
    relative_error_by_position: tuple[float, ...]
    agreements: int
    ties: int
    disagreements: tuple[int, ...]
    tolerance: float
    reason: str
    prefill_error: Error
    clamp_error: Error | None
    passed: bool
    by_layer: bool = False

    def drift(self) -> list[float]:
        """The largest relative error in each eighth of the text: it must not grow."""
        parts = np.array_split(np.array(self.relative_error_by_position), min(8, self.tokens))
        return [float(part.max()) for part in parts]


def verify(
    model: Model, checkpoint: Checkpoint, *, text: str | None = None, tokens: int = 512, progress: Progress = silent
) -> Verification:
    """Compare a bundle on its backend with the checkpoint it came from.

    Args:
        text: what to read; a public-domain passage when None, random tokens if the bundle has no tokenizer.
        tokens: how many tokens at most.

    Raises:
        UserError: bundle and checkpoint describe different models, or the text has fewer than two tokens.
    """
    bundle = model.bundle
    ids, source = _tokens(bundle, text, tokens)
    references = _references(bundle, checkpoint, ids, progress)
    session = model.session()
    stepped = np.empty_like(references[0])
    for position, token in enumerate(ids):
        stepped[position] = session.step([int(token)])[0]
        progress("stepping the graph", (position + 1) / len(ids))
    prefilled = model.session()
    after_chunk = []
    ends = _chunk_ends(bundle, len(ids))
    for chunk in np.split(ids, ends[:-1]):
        prefilled.feed(chunk.tolist())
        assert prefilled.logits is not None
        after_chunk.append(prefilled.logits[0].copy())
    allowed = tolerance(bundle.manifest.precision.compute, model.backend.name)
    return judged(stepped, np.stack(after_chunk), ends, references, source, allowed)


def verify_by_layer(
    bundle: Bundle, checkpoint: Checkpoint, *, text: str | None = None, tokens: int = 512, progress: Progress = silent
) -> Verification:
    """Like `verify`, with one layer of the checkpoint and one layer of each graph in memory at a time, on ONNX Runtime.

    Every node and weight of both graphs is run. What it cannot show is how another backend computes them.
    """
    from retnet_export.export.layerwise import logits_by_layer

    ids, source = _tokens(bundle, text, tokens)
    references = _references(bundle, checkpoint, ids, progress)
    stepped = logits_by_layer(bundle, "decode", ids, progress=lambda share: progress("decode, layer by layer", share))
    after_chunk = logits_by_layer(bundle, "prefill", ids, progress=lambda share: progress("prefill, layer by layer", share))
    allowed = tolerance(bundle.manifest.precision.compute, "onnxruntime")
    return judged(stepped, after_chunk, _chunk_ends(bundle, len(ids)), references, source, allowed, by_layer=True)


def memory_needed(bundle: Bundle) -> int:
    """Bytes that ONNX Runtime takes, at most, for both graphs on the CPU: each session packs the weights, as float32 if halves."""
    manifest = bundle.manifest
    if manifest.quantization is not None:
        return 2 * manifest.weights_bytes
    return 2 * 4 * parameters(manifest.model)


def _references(
    bundle: Bundle, checkpoint: Checkpoint, ids: NDArray[np.int64], progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Logits (T, V) of the parallel form without the row clamp, and with it where the model has one."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch", "verifying against the parallel form") from error
    from retnet_export.export.model import parallel_by_layer

    if checkpoint.config != bundle.manifest.model:
        raise UserError(f"{bundle.path} was not exported from {checkpoint.path}: their model configurations differ")
    results = parallel_by_layer(
        checkpoint.config,
        checkpoint.weight,
        torch.from_numpy(ids)[None],
        clamps=(False, True) if checkpoint.config.score_norm else (False,),
        progress=lambda share: progress("parallel form", share),
    )
    plain, *clamped = (result[0].numpy() for result in results)
    return plain, clamped[0] if clamped else None


def _chunk_ends(bundle: Bundle, length: int) -> list[int]:
    """Where prefill stops in a text of `length` tokens."""
    size = bundle.manifest.graphs["prefill"].chunk_size
    return [*range(size, length, size), length]


def judged(
    stepped: NDArray[np.float32],
    after_chunk: NDArray[np.float32],
    chunk_ends: Sequence[int],
    references: tuple[NDArray[np.float32], NDArray[np.float32] | None],
    source: str,
    allowed: Tolerance,
    by_layer: bool = False,
) -> Verification:
    """Judge logits (T, V), and those after each chunk, against the references (T, V) without and with the row clamp."""
    reference, clamped = references
    error = measure(stepped, reference)
    prefill_error = measure(after_chunk, reference[np.array(chunk_ends) - 1])
    per_position = np.abs(stepped - reference).max(-1)
    mine, theirs = stepped.argmax(-1), reference.argmax(-1)
    rows = np.arange(len(reference))
    margin = reference[rows, theirs] - reference[rows, mine]
    differs = mine != theirs
    # Both logits may be off by the position's error, so a margin of twice that error decides nothing; but an error beyond
    # the tolerance is no excuse.
    tied = differs & (margin <= 2 * np.minimum(per_position, allowed.relative * spread(reference)))
    wrong = tuple(int(index) for index in np.flatnonzero(differs & ~tied))
    return Verification(
        tokens=len(reference),
        source=source,
        error=error,
        relative_error_by_position=tuple(float(value) for value in per_position / spread(reference)),
        agreements=int((~differs).sum()),
        ties=int(tied.sum()),
        disagreements=wrong,
        tolerance=allowed.relative,
        reason=allowed.reason,
        prefill_error=prefill_error,
        clamp_error=None if clamped is None else measure(stepped, clamped),
        passed=max(error.relative, prefill_error.relative) <= allowed.relative and not wrong,
        by_layer=by_layer,
    )


def _tokens(bundle: Bundle, text: str | None, most: int) -> tuple[NDArray[np.int64], str]:
    spec = bundle.manifest.tokenizer
    if spec is None:
        if text is not None:
            raise ArgumentError("text", f"cannot be read: {bundle.path} has no tokenizer; verify it without a text")
        generator = np.random.default_rng(0)
        random = generator.integers(0, bundle.manifest.model.vocab_size, most, dtype=np.int64)
        return random, "random tokens (the bundle has no tokenizer)"
    ids = Tokenizer(bundle.file(spec.file), spec).encode(PASSAGE if text is None else text, prefix=True)[:most]
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens, expected at least 2 to verify on")
    return np.array(ids, np.int64), "Twelfth Night 1.1 and Ruth 1" if text is None else "the given text"
