"""The card says what the manifest says, in the form that the Hub reads; whoever edits it leaves the bundle whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from conftest import EXAMPLE, ROOT

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.graph.card import card
from retnet_export.quantize.evaluation import evaluate
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.bundle.weights import parameters
from retnet_export.runtime.model import load

ModelCard = pytest.importorskip("huggingface_hub").ModelCard


@pytest.fixture(scope="module")
def quantized(example_bundle, tmp_path_factory):
    """The bundled model in INT4, judged on a text."""
    from dataclasses import asdict

    target = tmp_path_factory.mktemp("card") / "classics-int4.retnet"

    def judge(made):
        return asdict(evaluate(load(made.path), EXAMPLE / "held-out.txt", against=load(example_bundle.path), tokens=256))

    return quantize_bundle(example_bundle, target, QuantizeOptions(), judge=judge)


def from_the_hub(bundle):
    return replace(bundle.manifest, provenance={**bundle.manifest.provenance, "checkpoint": "user/my-retnet@0123abcd"})


def test_the_hub_reads_the_base_model_and_that_it_is_quantized(quantized, example_bundle):
    data = ModelCard(card(from_the_hub(quantized))).data
    assert data.base_model == "user/my-retnet"
    assert data.base_model_relation == "quantized"
    assert (data.library_name, data.pipeline_tag) == ("retnet-export", "text-generation")
    assert {"retnet", "onnx", "int4"} <= set(data.tags)
    plain = ModelCard(card(from_the_hub(example_bundle))).data
    assert plain.base_model == "user/my-retnet"
    assert "base_model_relation" not in plain.to_dict()


def test_a_checkpoint_that_is_not_from_the_hub_is_no_base_model(example_bundle):
    text = (example_bundle.path / "README.md").read_text()
    assert ModelCard(text).data.base_model is None
    assert "made from `classics`" in text


def test_the_table_of_quality_is_what_was_measured(quantized):
    text = (quantized.path / "README.md").read_text()
    record = quantized.manifest.quantization["evaluation"]
    assert f"| perplexity a token | {record['perplexity']:.3f} |" in text
    assert f"| same best token | {100 * record['comparison']['agreement']:.2f} % |" in text
    assert "On 256 tokens of `held-out.txt`:" in text


def test_sizes_are_the_manifests(quantized, example_bundle):
    for bundle in (quantized, example_bundle):
        text = (bundle.path / "README.md").read_text()
        assert f"| parameters | {parameters(bundle.manifest.model):,} |" in text
        assert f"{bundle.manifest.weights_bytes / 1e6:,.1f} MB" in text
        assert f"{bundle.manifest.state_bytes / 1e6:,.2f} MB a sequence" in text
    assert parameters(example_bundle.manifest.model) == sum(
        open_checkpoint(EXAMPLE).weight(name).size for name in ("embedding.weight", *weights_but_the_embedding(example_bundle))
    )


def weights_but_the_embedding(bundle):
    from retnet_export.graph.weights import weight_shapes

    return [name for name in weight_shapes(bundle.manifest.model) if name != "embedding.weight"]


def test_an_edited_card_leaves_the_bundle_whole(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.CONFIGS["fla"])
    (bundle.path / "README.md").write_text("# My own words")
    assert "README.md" not in open_bundle(bundle.path).manifest.files
    (bundle.path / "README.md").unlink()
    open_bundle(bundle.path)


def test_a_bundle_without_a_tokenizer_is_run_with_token_ids(tmp_path):
    text = (tiny.bundle(tmp_path, tiny.CONFIGS["fla"]).path / "README.md").read_text()
    assert "token ids in, token ids out" in text
    assert "retnet-export generate" not in text


def test_the_extras_that_the_card_names_exist():
    listed = (Path(ROOT) / "pyproject.toml").read_text()
    assert "\nhub = [" in listed
    assert "\ncpu = [" in listed
