"""onnxruntime-genai on the baseline's own graph and weights: does an engine of other projects run it faster?

Its figures include what it does around the graph: building the mask and choosing the token.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.compare.baseline import Baseline
from retnet_export.compare.engines import TransformerEngine
from retnet_export.compare.results import Cell
from retnet_export.runtime.backends.onnxruntime_api import ACTIVATION_ENTRY
from retnet_export.runtime.errors import UserError

MOST_CONTEXT = 8192
"""It has no way to a context but to read it, so longer ones would take minutes."""


def unavailable() -> str | None:
    """What to do to have it, or None if it is here."""
    try:
        import onnxruntime_genai  # noqa: F401
    except ImportError:
        return "onnxruntime-genai is not installed: pip install onnxruntime-genai"
    return None


def refusal(baseline: Baseline, cell: Cell) -> str | None:
    """Why it cannot do a cell, or None."""
    if cell.context > MOST_CONTEXT:
        return f"reaches a context only by reading it; not attempted beyond {MOST_CONTEXT:,}"
    if baseline.cache != "compute":
        return "not run with an INT8 cache"
    return None


class GenaiEngine:
    """The baseline in onnxruntime-genai on the CPU.

    Args:
        baseline: its files; a configuration is written beside them.
        threads: CPU threads.

    Raises:
        UserError: it is not installed.
    """

    def __init__(self, baseline: Baseline, threads: int) -> None:
        if (missing := unavailable()) is not None:
            raise UserError(missing)
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        document = json.dumps(genai_config(baseline, threads), indent=2)
        (baseline.folder / "genai_config.json").write_text(document)
        self._baseline = baseline
        self._model = onnxruntime_genai.Model(str(baseline.folder))

    def open(self, batch: int, context: int, tokens: int) -> None:
        self._batch, self._capacity = batch, context + tokens + 2
        generator = np.random.default_rng(0)
        self._generator = self._new_generator()
        if context:
            self._append(generator.integers(0, self._baseline.config.vocab_size, context))

    def step(self) -> None:
        if self._generator.token_count() == 0:
            self._generator.append_tokens(self._prompt(np.zeros(1, np.int64)))
        self._generator.generate_next_token()

    def prefill(self, tokens: int) -> None:
        self._generator = self._new_generator()
        self._append(np.zeros(tokens, np.int64))

    def _append(self, tokens: NDArray[np.int64]) -> None:
        # As for our own engine: in pieces, which only a single sequence can be read in.
        piece = TransformerEngine.PREFILL_CHUNK if self._batch == 1 else len(tokens)
        for start in range(0, len(tokens), piece):
            self._generator.append_tokens(self._prompt(tokens[start : start + piece]))

    def _new_generator(self) -> Any:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=self._capacity,
            min_length=self._capacity,
            batch_size=self._batch,
            do_sample=False,
            past_present_share_buffer=True,
        )
        return self._library.Generator(self._model, parameters)

    def _prompt(self, tokens: NDArray[np.int64]) -> NDArray[np.int32]:
        return np.repeat(tokens.astype(np.int32)[None], self._batch, 0)


def genai_config(baseline: Baseline, threads: int) -> dict[str, object]:
    """genai_config.json. Source: onnxruntime.ai/docs/genai/reference/config.html.

    It gives entries of `session_options` that it does not know to ONNX Runtime, so products round activations as in the others.
    """
    config = baseline.config
    options = {"log_id": "onnxruntime-genai", "intra_op_num_threads": threads, **dict([ACTIVATION_ENTRY]), "provider_options": []}
    return {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": baseline.capacity,
            "bos_token_id": 0,
            # It stops at this token, which min_length keeps from being chosen.
            "eos_token_id": config.vocab_size - 1,
            "pad_token_id": config.vocab_size - 1,
            "decoder": {
                "session_options": options,
                "filename": baseline.genai_graph.name,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": config.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": baseline.capacity, "past_present_share_buffer": True, "do_sample": False},
    }
