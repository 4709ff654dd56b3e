"""`bench`: which tests it runs, what they do to a runner, and that every format says the same."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.compare.bench import Trial, run, trials_of
from retnet_export.runtime.errors import ArgumentError
from retnet_export.runtime.model import Model, load
from retnet_export.runtime.timing import Sample

FEW = ("-p", "8", "-n", "3", "-r", "2", "--threads", "1")


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_tests_are_named_as_llama_bench_names_them():
    names = [str(test) for test in trials_of([512], [128], [1, 8], [0, 2048])]
    assert names == [
        *("pp512", "tg128", "pp512 b8", "tg128 b8"),
        *("pp512 @ d2048", "tg128 @ d2048", "pp512 b8 @ d2048", "tg128 b8 @ d2048"),
    ]
    assert [str(test) for test in trials_of([0], [16], [1], [0])] == ["tg16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [0], [1], [0]), "there is nothing to test"),
        (([8], [8], [0], [0]), "has 0, expected 1 or more"),
        (([8], [8], [1], [-2]), "has -2, expected 0 or more"),
    ],
)
def test_what_cannot_be_tested_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        trials_of(*arguments)


class Counting:
    """A backend that notes what its runners are asked to do."""

    name = "counting"

    def __init__(self, backend):
        self._backend, self.positions = backend, []

    def open_runner(self, batch):
        runner, positions = self._backend.open_runner(batch), self.positions
        write = runner.write_state

        def write_state(slot, state):
            positions.append((slot, int(runner.read_state(slot)["position"][0])))
            write(slot, state)

        runner.write_state = write_state
        return runner


@pytest.mark.parametrize(("test", "read"), [(Trial(20, 0, 2, 5), 20), (Trial(0, 7, 3, 0), 7)])
def test_each_repetition_reads_its_tokens_from_the_same_state(example_bundle, test, read):
    backend = Counting(load(example_bundle.path, "onnxruntime", threads=1).backend)
    (speed,) = run(Model(example_bundle, backend), [test], 3)
    assert len(speed.tokens_per_second.values) == 3
    assert min(speed.tokens_per_second.values) > 0
    starts = [(slot, test.depth + (read if turn else 0)) for turn in range(4) for slot in range(test.batch)]
    assert backend.positions == starts


def test_every_format_says_the_same(example_bundle):
    document = json.loads(invoke(example_bundle.path, *FEW, "-b", "1,2", "--json").stdout)
    assert [result["test"] for result in document["results"]] == ["pp8", "tg3", "pp8 b2", "tg3 b2"]
    for result in document["results"]:
        assert result["tokens_per_second"] == pytest.approx(np.mean(result["samples"]))
        assert result["deviation"] == pytest.approx(np.std(result["samples"], ddof=1))
    assert {"processor", "date"} <= document["machine"].keys()
    rows = list(csv.DictReader(io.StringIO(invoke(example_bundle.path, *FEW, "--format", "csv").stdout)))
    assert [(row["test"], row["backend"], row["threads"]) for row in rows] == [
        ("pp8", "onnxruntime", "1"),
        ("tg3", "onnxruntime", "1"),
    ]
    assert all(row[name] == str(document["results"][0][name]) for row in rows for name in ("size_bytes", "parameters"))
    table = invoke(example_bundle.path, *FEW, "--format", "md").stdout.splitlines()
    assert len({len(line) for line in table}) == 1
    assert [cell.strip() for cell in table[0].strip("|").split("|")][-2:] == ["test", "t/s"]
    assert "tg3" in table[3]
    assert "±" in table[3]
    assert "pp8" in invoke(example_bundle.path, *FEW).stdout


def test_numbers_that_are_none_are_refused_by_their_flag(example_bundle):
    assert "--depths is '2k'" in " ".join(invoke(example_bundle.path, "--depths", "2k", code=2).output.split())
    assert "--batches has 0, expected 1 or more" in " ".join(invoke(example_bundle.path, "-b", "0", code=2).output.split())


def test_a_sample_says_what_its_values_say():
    sample = Sample([1.0, 2.0, 3.0, 10.0])
    assert (sample.mean, sample.median) == (4.0, 2.5)
    assert sample.deviation == pytest.approx(np.std([1, 2, 3, 10], ddof=1))
    assert Sample([5.0]).deviation == 0.0
    assert np.isnan(Sample([]).mean)
