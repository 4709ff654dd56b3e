"""The proof of an export: the parallel form in torch against the ONNX graph stepped token by token, on real text.

The parallel form is what was trained; the graph is what will run. At every position the logits are compared, and the
token that greedy decoding would take. Where the two best logits are closer than the error itself, either is right: such
positions are ties and are counted apart. Prefill then reads the same text, and is compared after every chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.pipeline import Progress
from retnet_export.runtime.bundle import Bundle
from retnet_export.runtime.errors import MissingExtraError, UserError
from retnet_export.runtime.model import Model
from retnet_export.runtime.numerics import TOLERANCES, Error, measure

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
    """What `verify` found.

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

    def drift(self) -> list[float]:
        """The largest relative error in each eighth of the text: it must not grow."""
        parts = np.array_split(np.array(self.relative_error_by_position), min(8, self.tokens))
        return [float(part.max()) for part in parts]


def verify(
    model: Model,
    checkpoint: Checkpoint,
    *,
    text: str | None = None,
    tokens: int = 512,
    progress: Progress = lambda stage, share: None,
) -> Verification:
    """Compare a bundle on its backend with the checkpoint it came from.

    Args:
        model: the bundle, loaded.
        checkpoint: the checkpoint.
        text: what to read; a public-domain passage when None, random tokens if the bundle has no tokenizer.
        tokens: how many tokens at most.
        progress: is told what goes on.

    Raises:
        UserError: bundle and checkpoint describe different models, or the text has fewer than two tokens.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch", "verifying against the parallel form") from error
    from retnet_export.export.model import RetNet

    bundle = model.bundle
    if checkpoint.config != bundle.manifest.model:
        raise UserError(f"{bundle.path} was not made from {checkpoint.path}: their model configurations differ")
    ids, source = _tokens(model, text, tokens)
    progress("parallel form", 0.0)
    reference_model = RetNet.from_weights(checkpoint.config, checkpoint.read)
    with torch.no_grad():
        batch = torch.from_numpy(ids)[None]
        reference = reference_model.parallel(batch, clamp_rows=False)[0].numpy()
        clamped = reference_model.parallel(batch)[0].numpy() if checkpoint.config.score_norm else None
    session = model.session()
    actual = np.empty_like(reference)
    for position, token in enumerate(ids):
        actual[position] = session.step([int(token)])[0]
        progress("stepping the graph", (position + 1) / len(ids))
    prefilled = model.session()
    chunk_size = bundle.manifest.graphs["prefill"].chunk_size
    ends = [*range(chunk_size, len(ids), chunk_size), len(ids)]
    after_chunk = np.empty((len(ends), reference.shape[1]), np.float32)
    for row, end in enumerate(ends):
        prefilled.feed(ids[chunk_size * row : end].tolist())
        after_chunk[row] = prefilled.logits
    prefill_error = measure(after_chunk, reference[np.array(ends) - 1])
    return compare(actual, reference, prefill_error, source, tolerance_key(model.backend.name, bundle), clamped)


def tolerance_key(backend: str, bundle: Bundle) -> str:
    """The row of the tolerance table for a bundle on a backend."""
    return f"{backend}-{bundle.manifest.precision.compute}"


def compare(
    actual: NDArray[np.float32],
    reference: NDArray[np.float32],
    prefill_error: Error,
    source: str,
    tolerance_name: str,
    clamped: NDArray[np.float32] | None = None,
) -> Verification:
    """Judge logits (T, V) against the reference's."""
    error = measure(actual, reference)
    per_position = np.abs(actual - reference).max(-1)
    mine, theirs = actual.argmax(-1), reference.argmax(-1)
    rows = np.arange(len(reference))
    margin = reference[rows, theirs] - reference[rows, mine]
    differs = mine != theirs
    tolerance = TOLERANCES[tolerance_name]
    # Both logits may be off by the position's error, so a margin of twice that error decides nothing; but an error beyond
    # the tolerance is no excuse.
    tied = differs & (margin <= 2 * np.minimum(per_position, tolerance.relative * reference.std()))
    wrong = tuple(int(index) for index in np.flatnonzero(differs & ~tied))
    return Verification(
        tokens=len(reference),
        source=source,
        error=error,
        relative_error_by_position=tuple(float(value) for value in per_position / reference.std()),
        agreements=int((~differs).sum()),
        ties=int(tied.sum()),
        disagreements=wrong,
        tolerance=tolerance.relative,
        reason=tolerance.reason,
        prefill_error=prefill_error,
        clamp_error=None if clamped is None else measure(actual, clamped),
        passed=max(error.relative, prefill_error.relative) <= tolerance.relative and not wrong,
    )


def _tokens(model: Model, text: str | None, most: int) -> tuple[NDArray[np.int64], str]:
    manifest = model.bundle.manifest
    if text is None and manifest.tokenizer is None:
        generator = np.random.default_rng(0)
        return generator.integers(0, manifest.model.vocab_size, most, dtype=np.int64), "random tokens (the bundle has no tokenizer)"
    ids = model.tokenizer.encode(PASSAGE if text is None else text)[:most]
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens, expected at least 2 to verify on")
    return np.array(ids, np.int64), "Twelfth Night 1.1 and Ruth 1" if text is None else "the given text"
