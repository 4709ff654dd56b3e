"""Checkpoints, tokenizers and bundles by their name on the Hub, from a server that speaks its protocol on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import EXAMPLE
from hub_server import COMMIT, TOKEN, Hub

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.verify import PASSAGE, verify_by_layer
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.hub import Repository, repository, repository_of

GOLDEN = Path(__file__).parents[1] / "golden"
Result = namedtuple("Result", "stdout stderr")
NAMES = {"whole": EXAMPLE, "sharded": GOLDEN / "syncdoth-lm-decay", "torch": GOLDEN / "torchscale-default"}


@pytest.fixture
def hub(tmp_path, example_bundle) -> Iterator[Hub]:
    """A Hub of the bundled model, of shards, of a .pt file, and of a bundle; each with files that nobody needs."""
    pages = tmp_path / "pages"
    for name, source in (*NAMES.items(), ("bundle", example_bundle.path)):
        shutil.copytree(source, pages / name)
        (pages / name / "README.md").write_text("# A model\n")
        (pages / name / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        (pages / name / "onnx").mkdir()
        (pages / name / "onnx" / "model.onnx").write_bytes(b"not needed")
    (pages / "whole" / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (pages / "nothing").mkdir()
    (pages / "nothing" / "notes.txt").write_text("nothing to export")
    with Hub({f"user/{path.name}": path for path in pages.iterdir()}) as server:
        yield server


@pytest.fixture
def start(hub, tmp_path) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts the command line of a user whose Hub is `hub`, with a cache of its own, in the folder `here`."""
    (tmp_path / "here").mkdir()

    def command(*arguments: object, **settings: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "no_proxy": "*"} | settings
        line = [sys.executable, "-m", "retnet_export", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, stdout=pipe, stderr=pipe, env=environment, cwd=tmp_path / "here")

    return command


@pytest.fixture
def run(start) -> Callable[..., Result]:
    """Runs it to its end."""

    def command(*arguments: object, code: int = 0, **settings: str) -> Result:
        process = start(*arguments, **settings)
        output, errors = (text.decode() for text in process.communicate(timeout=120))
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        return Result(output, errors)

    return command


def downloaded(hub: Hub) -> set[str]:
    return {name for name, _ in hub.downloads}


@pytest.mark.parametrize("name", ["user/whole", "hf://user/whole", "user/whole@v1", f"hf://user/whole@{COMMIT}"])
def test_a_checkpoint_is_exported_by_name_and_no_more_than_it_needs_is_downloaded(hub, run, tmp_path, name):
    run("export", name, "-o", "my.retnet")
    assert downloaded(hub) == {"config.json", "tokenizer.json", "model.safetensors"}
    made = open_bundle(tmp_path / "here" / "my.retnet")
    assert made.manifest.provenance["checkpoint"] == f"user/whole@{COMMIT}"
    assert made.manifest.tokenizer is not None


def test_shards_are_downloaded_by_their_index(hub, run, tmp_path):
    run("export", "user/sharded", "-o", "my.retnet")
    assert downloaded(hub) == {
        *("config.json", "model.safetensors.index.json"),
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    }
    run("verify", "my.retnet", "--checkpoint", "user/sharded", "--tokens", 16)


def test_a_file_of_torch_alone_is_found(hub, run):
    run("export", "user/torch", "-o", "my.retnet")
    assert downloaded(hub) == {"args.json", "model.pt"}


def test_what_was_downloaded_once_is_neither_downloaded_again_nor_needs_a_network(hub, run, tmp_path):
    run("export", "user/whole", "-o", "first.retnet")
    count = len(hub.downloads)
    run("export", "user/whole", "-o", "second.retnet")
    assert len(hub.downloads) == count
    run("export", "user/whole", "-o", "third.retnet", HF_HUB_OFFLINE="1")
    hub.close()
    run("export", "user/whole", "-o", "fourth.retnet")
    weights = {(tmp_path / "here" / f"{name}.retnet" / "weights.bin").read_bytes() for name in ("first", "third", "fourth")}
    assert len(weights) == 1


def test_without_a_network_a_name_that_is_not_in_the_cache_is_refused(hub, run):
    message = run("export", "user/whole", "-o", "my.retnet", HF_HUB_OFFLINE="1", code=1).stderr
    assert "user/whole: is not a local folder, not in the cache, and HF_HUB_OFFLINE is set" in message
    hub.close()
    message = run("export", "user/whole", "-o", "my.retnet", code=1).stderr
    assert f"is not a local folder, not in the cache, and {hub.url} cannot be reached" in message


def test_a_gated_repository_says_where_to_ask_and_is_read_with_a_token(hub, run, tmp_path):
    hub.gated.add("user/whole")
    message = run("export", "user/whole", "-o", "my.retnet", code=1).stderr
    assert f"user/whole: gated: accept its terms at {hub.url}/user/whole, then log in (`hf auth login`" in message
    assert list((tmp_path / "here").iterdir()) == []
    run("export", "user/whole", "-o", "my.retnet", HF_TOKEN=TOKEN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/absent", "user/absent: not a local folder and not a repository at"),
        ("user/whole@nowhere", "user/whole@nowhere: the repository exists, the revision does not"),
        ("user/nothing", "user/nothing: no weights; is it a checkpoint?"),
        ("hf://user", "hf://user: expected hf://user/name or hf://user/name@revision"),
    ],
)
def test_a_missing_name_is_named(run, name, message):
    assert message in run("export", name, "-o", "my.retnet", code=1).stderr


FIRST_PIECE = 10_500_000
"""Bytes of model.safetensors (11.3 MB) after which there is a piece on the disk: huggingface_hub writes 10 MiB at once."""


def test_an_interrupted_download_continues(hub, run):
    hub.cut["model.safetensors"] = FIRST_PIECE
    run("export", "user/whole", "-o", "my.retnet")
    starts = [first for name, first in hub.downloads if name == "model.safetensors"]
    assert starts == [0, 10 << 20]


def test_a_download_that_was_interrupted_leaves_no_bundle_and_the_next_one_completes_it(hub, run, start, tmp_path):
    hub.stall["model.safetensors"] = FIRST_PIECE
    process = start("export", "user/whole", "-o", "my.retnet")
    assert hub.stalled.wait(60)
    time.sleep(0.5)  # until the first piece is written
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in errors
    assert not (tmp_path / "here" / "my.retnet").exists()
    run("export", "user/whole", "-o", "my.retnet")
    starts = [first for name, first in hub.downloads if name == "model.safetensors"]
    assert len(starts) == 2
    open_bundle(tmp_path / "here" / "my.retnet")


def test_a_local_folder_of_that_name_wins(hub, run, tmp_path):
    shutil.copytree(NAMES["torch"], tmp_path / "here" / "user" / "whole")
    assert "torchscale" in run("export", "user/whole", "-o", "my.retnet").stdout
    message = run("export", "user/sharded", "-o", "other.retnet", code=1).stderr
    assert "user/sharded: no such file or folder" in message  # `user` is a folder here: a path, and a misspelt one
    assert hub.downloads == []
    run("export", "hf://user/sharded", "-o", "other.retnet")


@pytest.mark.slow
def test_a_tokenizer_may_be_another_repositorys(hub, run, tmp_path):
    (hub.repositories["user/whole"] / "tokenizer.json").unlink()
    run("export", "user/whole", "-o", "none.retnet")
    assert open_bundle(tmp_path / "here" / "none.retnet").manifest.tokenizer is None
    shutil.copy(EXAMPLE / "tokenizer.json", hub.repositories["user/nothing"])
    for name in ("user/nothing", EXAMPLE, EXAMPLE / "tokenizer.json"):
        run("export", "user/whole", "-o", "other.retnet", "--tokenizer", name, "--force")
        made = open_bundle(tmp_path / "here" / "other.retnet")
        assert made.file("tokenizer.json").read_bytes() == (EXAMPLE / "tokenizer.json").read_bytes()
    assert "notes.txt" not in downloaded(hub)
    message = run("export", "user/whole", "-o", "third.retnet", "--tokenizer", "/absent", code=1).stderr
    assert "/absent: no such file or folder; expected a folder with tokenizer.json" in message


@pytest.mark.slow
def test_a_bundle_runs_by_name_in_every_command_that_takes_one(hub, run, tmp_path, example_bundle):
    text = ("--prompt", "In the beginning", "--max-new-tokens", 8, "--temperature", 0)
    expected = run("generate", example_bundle.path, *text).stdout
    assert run("generate", "user/bundle", *text).stdout == expected
    assert downloaded(hub) == {"manifest.json", *example_bundle.manifest.files}
    assert json.loads(run("inspect", "user/bundle@v1", "--json").stdout)["name"] == example_bundle.manifest.name
    run("quantize", "hf://user/bundle", "-o", "small.retnet")
    held_out = EXAMPLE / "held-out.txt"
    run("evaluate", "small.retnet", "--against", "user/bundle", "--text", held_out, "--tokens", 128)
    run("plan", "user/bundle", "--device", "orin-nano-8gb")
    run("generate", "user/bundle", *text, HF_HUB_OFFLINE="1")


def test_a_bundle_whose_file_was_changed_on_the_way_is_refused(hub, run):
    weights = hub.repositories["user/bundle"] / "weights.bin"
    weights.write_bytes(bytes(100) + weights.read_bytes()[100:])
    message = run("generate", "user/bundle", "--prompt", "In", code=1).stderr
    assert "weights.bin: its SHA-256 does not match the manifest" in message


def test_a_repository_that_is_no_bundle_is_refused(run):
    message = run("generate", "user/whole", "--prompt", "In", code=1).stderr
    assert "user/whole: it is not a bundle: it has no manifest.json" in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fla-hub/retnet-1.3B-100B", Repository("fla-hub/retnet-1.3B-100B")),
        ("hf://a/b@refs/pr/1", Repository("a/b", "refs/pr/1")),
        (Path("hf://a/b"), Repository("a/b")),
        ("/a/b", None),
        ("./a/b", None),
        ("../b", None),
        ("a/b/c", None),
        ("name.retnet", None),
        ("a/b@", None),
    ],
)
def test_names_and_paths_are_told_apart(given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repository(given) == expected


def test_a_path_that_is_there_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert repository("a/b") is None
    assert repository("hf://a/b") == Repository("a/b")
    with pytest.raises(UserError, match="expected hf://user/name"):
        repository("hf://a")


def test_a_snapshot_says_whose_it_is(tmp_path):
    assert repository_of(tmp_path / "models--user--my-model" / "snapshots" / COMMIT) == f"user/my-model@{COMMIT}"
    assert repository_of(tmp_path / "my-model") is None


@pytest.mark.slow
def test_what_runs_a_bundle_a_layer_at_a_time_follows_the_links_of_a_cache(tmp_path, example_bundle):
    """ONNX Runtime and onnx-ir open no link that leaves a graph's folder."""
    root = tmp_path / "models--user--bundle"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in example_bundle.path.iterdir() if path.is_file())):
        shutil.copy(file, root / "blobs" / f"{number:040x}")
        os.symlink(f"../../blobs/{number:040x}", snapshot / file.name)
    (tmp_path / "text.txt").write_text(PASSAGE)
    linked, options = open_bundle(snapshot), QuantizeOptions(method="gptq", calibration=tmp_path / "text.txt")
    made = [
        quantize_bundle(source, tmp_path / f"{number}.retnet", options) for number, source in enumerate((example_bundle, linked))
    ]
    assert made[0].manifest.files["weights.bin"] == made[1].manifest.files["weights.bin"]
    assert verify_by_layer(linked, open_checkpoint(EXAMPLE), tokens=8).passed
