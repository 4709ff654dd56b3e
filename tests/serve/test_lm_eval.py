"""EleutherAI's evaluation harness against the server: its perplexity of a text is that of `evaluate`."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys

import pytest
from conftest import ROOT
from serving import server

from retnet_export.quantize.evaluation import evaluate

if folder := os.environ.get("RETNET_LM_EVAL"):  # where it was installed apart, with what it needs
    sys.path.append(folder)
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval, the evaluation harness, is not installed")
pytest.importorskip("transformers", reason="transformers, whose tokenizer the harness uses, is not installed")


def test_its_perplexity_of_a_text_is_that_of_evaluate(writer, example_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    text = (ROOT / "examples" / "classics" / "held-out.txt").read_text()
    texts = [text[:1500].strip(), text[2000:3000].strip()]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    shutil.copyfile(example_bundle.path / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (line,) = writer.tokenizer.encode("\n")
    task = ConfigurableTask(
        config={
            "task": "local_text",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        }
    )
    with server(writer) as (address, _):
        harness = LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model="classics",
            tokenizer=str(tmp_path),
            custom_prefix_token_id=line,
            max_length=4096,
            batch_size=2,
        )
        results = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=0, log_samples=False)
    perplexity = results["results"]["local_text"]["byte_perplexity,none"]
    # `evaluate` predicts every token after the first: with a line break before it, every token of the text.
    nats = 0.0
    for text in texts:
        assert writer.tokenizer.encode("\n" + text) == [line, *writer.tokenizer.encode(text)]
        (tmp_path / "text.txt").write_text("\n" + text)
        nats += len(writer.tokenizer.encode(text)) * math.log(evaluate(writer, tmp_path / "text.txt").perplexity)
    assert perplexity == pytest.approx(math.exp(nats / sum(len(text.encode()) for text in texts)), rel=1e-4)
