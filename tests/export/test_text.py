"""What an export takes over of text: how it begins, where it ends, and the chat template, as Hugging Face reads the same files."""

from __future__ import annotations

import json
import warnings

import pytest
from conftest import edit_json
from tokenizers import Tokenizer, processors
from tokenizers_made import write

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.export.text import read_text_settings
from retnet_export.runtime.errors import CheckpointWarning, UserError
from retnet_export.runtime.model import load

VOCABULARY = 1200


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer that puts <s> before a text."""
    write("llama, legacy", tmp_path)
    return tmp_path


def add_no_bos(folder) -> None:
    edit_json(folder / "tokenizer.json", post_processor=None)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("bos_in_config", [1, None])
def test_a_text_begins_as_with_transformers(folder, adds, bos_in_config):
    transformers = pytest.importorskip("transformers")
    if not adds:
        add_no_bos(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}))
    expected = transformers.AutoTokenizer.from_pretrained(folder)("Hello").input_ids
    text = read_text_settings(folder, {"bos_token_id": bos_in_config}, VOCABULARY)
    bare = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Hello", add_special_tokens=False).ids
    assert [*text.prefix_ids, *bare] == expected
    assert text.prefix_ids == ((1,) if adds else ())


def test_how_a_text_begins_can_be_chosen(folder):
    assert read_text_settings(folder, {}, VOCABULARY, "none").prefix_ids == ()
    assert read_text_settings(folder, {}, VOCABULARY, "</s>").prefix_ids == (2,)
    assert read_text_settings(folder, {}, VOCABULARY, "7").prefix_ids == (7,)
    for absent in ("<absent>", "1200"):
        with pytest.raises(UserError, match="not a token of this model"):
            read_text_settings(folder, {}, VOCABULARY, absent)


def test_several_tokens_may_begin_a_text_and_what_follows_it_is_left_out(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = processors.TemplateProcessing("<|user|> <s> $A </s>", special_tokens=[("<|user|>", 3), ("<s>", 1), ("</s>", 2)])
    tokenizer.post_processor = template
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.warns(CheckpointWarning, match="it puts '</s>' after a text"):
        assert read_text_settings(folder, {}, VOCABULARY).prefix_ids == (3, 1)


def test_a_text_ends_at_the_tokens_of_all_files(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1199, 256]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>", "special": true}}')
    assert read_text_settings(folder, {"eos_token_id": 5}, VOCABULARY).eos_ids == (5, 1199, 256, 2)
    assert read_text_settings(None, {"eos_token_id": [5, 6]}, VOCABULARY).eos_ids == (5, 6)


@pytest.mark.parametrize("token", [-1, VOCABULARY, "</s>", True])
def test_an_end_that_is_no_token_is_left_out_with_a_warning(folder, token):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [token, 256]}))
    with pytest.warns(
        CheckpointWarning, match="generation_config.json: the end-of-text token .* is not in the vocabulary of 1,200"
    ):
        assert read_text_settings(folder, {}, VOCABULARY).eos_ids == (256,)


def test_files_without_anything_of_this_bring_no_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_text_settings(folder, {"eos_token_id": None, "bos_token_id": None}, VOCABULARY).eos_ids == ()


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        (None, None, None),
        ("in config", None, "in config"),
        ("in config", "in file", "in file"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
    ],
)
def test_the_chat_template_is_the_one_that_transformers_takes(folder, config, file, expected):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    assert read_text_settings(folder, {}, VOCABULARY).chat_template == expected


def test_a_bundle_brings_it_all_to_the_runtime(checkpoint, tmp_path):
    pytest.importorskip("jinja2")
    edit_json(checkpoint / "config.json", bos_token_id=1)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [4095, 256]}')
    (checkpoint / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "The", "chat_template": "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"})
    )
    bundle = export_bundle(open_checkpoint(checkpoint), tmp_path / "b.retnet", ExportOptions(bos="65"))
    model = load(bundle.path, "onnxruntime", threads=1)
    assert model.chat_template.render([{"content": "end"}]) == "The end"
    assert model.ends == (4095, 256)
    assert model.session().encode("In the beginning") == [65, *model.tokenizer.encode("In the beginning")]
    for end in model.ends:
        session = model.session()
        session.feed("In the beginning")
        generation = session.pieces(logit_bias={end: 1000.0})
        assert list(generation) == []
        assert generation.finish == "end of text"
        assert generation.ended_by == end


def test_a_tokenizer_of_another_model_is_refused(folder):
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    read_text_settings(folder, {}, size)
    with pytest.raises(
        UserError, match=rf"3 of its tokens, as .* with the id {size - 1}, are beyond .* of {size - 3:,}: it belongs to another"
    ):
        read_text_settings(folder, {}, size - 3)


def test_an_added_token_without_a_row_is_warned_of_and_a_text_with_it_is_refused(checkpoint, tmp_path):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    with pytest.warns(CheckpointWarning, match=r"vocabulary of 4,096 has no room for '<pad>', which were added"):
        bundle = export_bundle(open_checkpoint(checkpoint), tmp_path / "padded.retnet")
    session = load(bundle.path, "onnxruntime").session()
    session.feed("In the beginning")
    with pytest.raises(UserError, match="4096"):
        session.feed("In the <pad> beginning")
