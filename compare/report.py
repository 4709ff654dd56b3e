"""The report of a comparison: report.json with every number, report.html to read, and the figures as PNG files.

The HTML page is one file that needs nothing else: no script, no font, no address.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from retnet_export.compare.analysis import Pair, batch_rows, caveats, decode_rows, parameter_difference, rows, summary
from retnet_export.compare.plots import plots, png, svg
from retnet_export.compare.results import GENAI, LLAMA_CPP, RETNET, TRANSFORMER, Comparison, Measurement, Side
from retnet_export.runtime.bundle.schema import encode

JSON_NAME = "report.json"
RATIO = "RetNet is"
"""The Transformer's time over the RetNet's, as in "0.82× as fast"; an asterisk: onnxruntime-genai's time was the better one."""
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Column heads, and rows of cells."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #555; --rule: #ddd; --box: #f4f6f8;
        --retnet: #0072b2; --transformer: #d55e00; --genai: #009e73; --llama: #555 }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e8e8e8; --soft: #a8adb3; --rule: #3a3f45; --box: #20242a;
        --retnet: #56b4e9; --transformer: #e69f00; --genai: #2fc79a; --llama: #aaa } }
body { font: 16px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: var(--ink); background: var(--page);
       max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem }
.what { color: var(--soft); margin: 0 0 1.5rem }
.result { background: var(--box); border-left: 4px solid var(--retnet); padding: .9rem 1.1rem } .result p { margin: .2rem 0 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 1.5rem }
figure { margin: 0 } figure svg { width: 100%; height: auto } figcaption { color: var(--soft); font-size: .875rem }
figure h3 { font-size: 1rem; margin: 0 0 .25rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .925rem }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap }
th { white-space: pre-line }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom }
table.facts td:last-child { text-align: left; white-space: normal } .notes { font-size: .875rem; color: var(--soft) }
@media print { body { margin: 0; max-width: none } figure { break-inside: avoid } }
"""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write report.json, report.html and the PNG files into a folder; needs matplotlib."""
    figures = plots(comparison)
    for plot in figures:
        (folder / f"{plot.name}.png").write_bytes(png(plot))
    (folder / "report.html").write_text(page(comparison), encoding="utf-8")
    (folder / JSON_NAME).write_text(json.dumps(document(comparison), indent=1) + "\n", encoding="utf-8")


def document(comparison: Comparison) -> object:
    """report.json as a JSON value."""
    return encode(comparison)


def page(comparison: Comparison) -> str:
    """report.html."""
    models = f"{_million(comparison.retnet)} parameters, {comparison.retnet.weights} weights"
    figures = "".join(
        f"<figure><h3>{_text(plot.title)}</h3>{svg(plot)}<figcaption>{_text(plot.caption)}</figcaption></figure>"
        for plot in plots(comparison)
    )
    sections = [
        ("Figures", f'<div class="figures">{figures}</div>'),
        ("Decoding, one sequence", _table(latency_table(comparison))),
        ("Decoding, several sequences", _table(batch_table(comparison))),
        ("Reading a prompt", _table(prefill_table(comparison))),
        ("What was compared", _table(model_table(comparison))),
        ("How it was measured", _facts(facts(comparison)) + _notes(comparison)),
    ]
    body = "".join(f"<h2>{_text(title)}</h2>{content}" for title, content in sections if content)
    result = "".join(f"<p>{_text(sentence)}</p>" for sentence in summary(comparison))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(comparison.bundle)} against a Transformer</title><style>{STYLE}</style></head><body>"
        f"<h1>{_text(comparison.bundle)}: RetNet against a KV-cache Transformer</h1>"
        f'<p class="what">{_text(models)}; {_text(comparison.machine["processor"])}, {_text(comparison.machine["cores"])}; '
        f"{_text(comparison.machine['date'])}</p>"
        f'<div class="result">{result}</div>{body}</body></html>\n'
    )


def latency_table(comparison: Comparison) -> Table:
    """Time and memory of single sequences over context."""
    engines = [RETNET, TRANSFORMER, *_peers(comparison)]
    head = ["context", *(f"{engine}\nms (p95)" for engine in engines), RATIO, f"{RETNET}\nmemory", f"{TRANSFORMER}\nmemory"]
    return head, [
        [
            f"{row.cell.context:,}",
            *(_time(comparison.find(engine, row.cell)) for engine in engines),
            ratio(row),
            *(_resident(comparison.find(engine, row.cell)) for engine in (RETNET, TRANSFORMER)),
        ]
        for row in decode_rows(comparison)
    ]


def batch_table(comparison: Comparison) -> Table:
    """Throughput and memory over batch."""
    engines = [RETNET, TRANSFORMER, *(peer for peer in _peers(comparison) if peer != LLAMA_CPP)]
    head = ["batch", *(f"{engine}\ntokens/s" for engine in engines), RATIO, f"{RETNET}\nmemory", f"{TRANSFORMER}\nmemory"]
    found = batch_rows(comparison)
    return head, [
        [
            f"{row.cell.batch}",
            *(_rate(comparison.find(engine, row.cell)) for engine in engines),
            ratio(row),
            *(_resident(comparison.find(engine, row.cell)) for engine in (RETNET, TRANSFORMER)),
        ]
        for row in found
        if len(found) > 1
    ]


def prefill_table(comparison: Comparison) -> Table:
    """Tokens per second over the length of a prompt."""
    engines = [RETNET, TRANSFORMER, *_peers(comparison)]
    return ["prompt", *(f"{engine}\ntokens/s" for engine in engines), RATIO], [
        [f"{row.cell.tokens:,}", *(_rate(comparison.find(engine, row.cell)) for engine in engines), ratio(row)]
        for row in rows(comparison, "prefill")
    ]


def model_table(comparison: Comparison) -> Table:
    """Both models' sizes."""
    sides = (comparison.retnet, comparison.transformer)
    shapes = dict.fromkeys(name for side in sides for name in side.shape)
    lines = [
        ["parameters", f"{sides[0].parameters:,}", f"{sides[1].parameters:,} ({_change(parameter_difference(comparison))})"],
        ["weights", *(f"{side.weights}, {side.weights_bytes / 1e6:,.1f} MB" for side in sides)],
        ["one sequence", *(_sequence(side) for side in sides)],
        *([name, *(f"{side.shape[name]:,}" if name in side.shape else "–" for side in sides)] for name in shapes),
    ]
    return ["", RETNET, TRANSFORMER], lines


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Machine, versions, settings."""
    timings = [m.timing for m in comparison.measurements if m.timing is not None and m.engine != LLAMA_CPP]
    spread = sorted(timing.spread for timing in timings)
    listed = {name: value for name, value in comparison.settings.items() if value not in (None, (), [])}
    lines = [
        *comparison.machine.items(),
        ("versions", ", ".join(f"{name} {version}" for name, version in comparison.versions.items())),
        ("settings", ", ".join(f"{name} {_setting(value)}" for name, value in listed.items())),
        ("method", "a process for each engine and cell; warm-up; engines take turns in five rounds; medians over all runs"),
        ("contexts", "reached by filling state and cache with random numbers: speed does not depend on what they hold"),
    ]
    if spread:
        middle, most = spread[len(spread) // 2], spread[-1]
        lines.append(("spread", f"rounds of a cell differ by {100 * middle:.0f} % (median), {100 * most:.0f} % at most"))
    return lines


def ratio(row: Pair) -> str:
    """The Transformer's time over the RetNet's."""
    if row.advantage is None:
        return "–"
    return f"{row.advantage:.2f}× as fast" + (" *" if row.transformer.engine == GENAI else "")


def _peers(comparison: Comparison) -> list[str]:
    return [engine for engine in comparison.engines if engine in (GENAI, LLAMA_CPP)]


def _time(measurement: Measurement | None) -> str:
    if measurement is None or measurement.timing is None:
        return "not run"
    return f"{measurement.timing.median_ms:.2f} ({measurement.timing.p95_ms:.2f})"


def _rate(measurement: Measurement | None) -> str:
    return "not run" if measurement is None or measurement.tokens_per_second is None else f"{measurement.tokens_per_second:,.0f}"


def _resident(measurement: Measurement | None) -> str:
    return "–" if measurement is None or measurement.steady_bytes is None else f"{measurement.steady_bytes / 1e6:,.0f} MB"


def _sequence(side: Side) -> str:
    if side.bytes_per_token:
        return f"{side.bytes_per_token / 1e3:,.1f} kB a token"
    return f"{side.bytes_per_sequence / 1e6:,.1f} MB at any length"


def _setting(value: object) -> str:
    return " ".join(str(entry) for entry in value) if isinstance(value, (tuple, list)) else str(value)


def _change(share: float) -> str:
    """Such as "+0.3 %"; never "-0.0 %"."""
    percent = round(100 * share, 1)
    return f"{percent:+.1f} %" if percent else "0.0 %"


def _million(side: Side) -> str:
    return f"{side.parameters / 1e6:,.0f} million"


def _notes(comparison: Comparison) -> str:
    lines = [f"{m.engine}, {m.cell.name}: {m.note}" for m in comparison.measurements if m.note is not None and m.timing is None]
    lines += sorted({f"{m.engine}: {m.note}" for m in comparison.measurements if m.note is not None and m.timing is not None})
    lines += caveats(comparison)
    return f'<ul class="notes">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>'


def _table(table: Table) -> str:
    head, lines = table
    if not lines:
        return ""
    return (
        f'<div class="scroll"><table><thead><tr>{_cells("th", head)}</tr></thead><tbody>'
        + "".join(f"<tr>{_cells('td', line)}</tr>" for line in lines)
        + "</tbody></table></div>"
    )


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr>{_cells('td', pair)}</tr>" for pair in pairs)
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells)


def _text(value: str) -> str:
    return html.escape(value)
