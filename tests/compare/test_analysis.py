"""Sentences and crossings that the analysis makes of given numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retnet_export.compare import analysis
from retnet_export.compare.measure import timing
from retnet_export.compare.report import model_table
from retnet_export.compare.results import GENAI, REPORT_FORMAT, RETNET, TRANSFORMER, Cell, Comparison, Measurement, Side


def model(**changes: object) -> Side:
    sizes = {
        "name": "m",
        "parameters": 1_000_000,
        "weights": "float32",
        "weights_bytes": 4_000_000,
        "buffers": 1,
        "bytes_per_sequence": 0,
        "bytes_per_token": 0,
        "shape": {"vocabulary": 100},
    }
    return Side(**(sizes | changes))


def comparison(retnet_ms: dict[int, float], transformer_ms: dict[int, float], **genai_ms: float) -> Comparison:
    """A comparison with these times by context: a state of 1 MB, a cache of 10 kB a token."""

    def measurements(engine: str, times: dict[int, float], base: int, per_token: int) -> list[Measurement]:
        return [
            Measurement(
                engine, Cell("decode", context, 1), timing([[ms]] * 5), base + per_token * context, base + per_token * context
            )
            for context, ms in times.items()
        ]

    return Comparison(
        format=REPORT_FORMAT,
        format_version=1,
        bundle="m",
        machine={},
        versions={},
        settings={"batch_context": 1000},
        retnet=model(buffers=2, bytes_per_sequence=1_000_000),
        transformer=model(bytes_per_token=10_000),
        measurements=(
            *measurements(RETNET, retnet_ms, 12_000_000, 0),
            *measurements(TRANSFORMER, transformer_ms, 10_000_000, 10_000),
            *measurements(GENAI, {int(context[1:]): ms for context, ms in genai_ms.items()}, 0, 0),
        ),
        memory_budget=110_000_000,
    )


def test_the_break_even_context_is_interpolated_between_the_contexts_measured():
    # The ratio goes from 0.8 to 1.6: it is 1 a quarter of the way.
    assert analysis.faster_from(comparison({0: 10, 2000: 10}, {0: 8, 2000: 16})) == 500


def test_a_retnet_that_is_always_faster_is_so_from_the_first_context():
    assert analysis.faster_from(comparison({0: 10, 2000: 10}, {0: 11, 2000: 16})) == 0


def test_a_crossing_that_is_taken_back_does_not_count():
    assert analysis.faster_from(comparison({0: 10, 1000: 10, 2000: 10}, {0: 8, 1000: 12, 2000: 9})) is None


def test_what_fits_counts_both_sets_of_state_buffers():
    fits = analysis.capacity(comparison({0: 10}, {0: 10}))
    # 110 MB less 10 MB of weights: 2 MB a RetNet sequence, 10 MB a Transformer's of 1,000 tokens.
    assert (fits.retnet_batch, fits.transformer_batch) == (50, 10)


@pytest.mark.parametrize(("genai_ms", "engine"), [(9.0, GENAI), (9.2, TRANSFORMER)])
def test_a_peer_that_is_faster_by_more_than_a_tenth_is_what_the_retnet_is_compared_with(genai_ms, engine):
    (row,) = analysis.decode_rows(comparison({0: 10}, {0: 10}, c0=genai_ms))
    assert row.transformer.engine == engine


def test_the_result_is_three_short_sentences():
    assert analysis.summary(comparison({0: 10, 2000: 10}, {0: 8, 2000: 16})) == (
        "The RetNet takes 10.0 ms a token at an empty context, 0.80× as fast as the Transformer; at a context of 2,000 tokens it "
        "is 1.60× as fast (faster from about 500 tokens on).",
        "Its state is 1.0 MB at any length; the cache grows by 10.0 kB a token and is 20× as large at 2,000 tokens.",
        "0.1 GB hold 50 RetNet sequences of any length, or 10 Transformer sequences of 1,000 tokens.",
    )


def test_quality_is_printed_beside_speed():
    result = replace(comparison({0: 10}, {0: 10}), perplexity=12.345, text="ruth.txt")
    assert "The RetNet's perplexity on ruth.txt is 12.35." in analysis.caveats(result)


def test_a_comparison_without_times_says_so():
    assert analysis.summary(comparison({}, {}))[0] == "Neither model could be timed."


@pytest.mark.parametrize(("parameters", "said"), [(1_016_000, "1.6 % more"), (970_000, "3.0 % fewer"), (1_005_000, None)])
def test_the_report_says_that_a_transformer_has_another_size(parameters, said):
    made = replace(comparison({0: 1.0}, {0: 1.0}), transformer=model(parameters=parameters, bytes_per_token=10_000))
    text = " ".join(analysis.caveats(made))
    assert (f"The Transformer has {said} parameters than the RetNet" in text) if said else "parameters" not in text
    assert f"({100 * (parameters / 1_000_000 - 1):+.1f} %)" in model_table(made)[1][0][2]
