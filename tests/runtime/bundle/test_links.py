"""Bundles where people have them from: a Hugging Face cache, whose files are links into `blobs`; other links are refused."""

import shutil

import pytest
import tiny

from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.bundle.files import sha256_of
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.bundle(tmp_path_factory.mktemp("original"), tiny.config(), chunk=8)


def cached(original, folder, inside="."):
    """The bundle as `huggingface_hub.snapshot_download` leaves it: links with relative targets into the repository's blobs."""
    repository = folder / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef" / inside
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    up = "/".join([".."] * len(snapshot.relative_to(repository).parts))
    for path in original.path.iterdir():
        blob = sha256_of(path)
        shutil.copyfile(path, repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"{up}/blobs/{blob}")
    return snapshot


@pytest.mark.parametrize("inside", [".", "bundles/tiny.retnet"])
@pytest.mark.parametrize("low_memory", [None, True, False])
def test_a_bundle_in_a_hugging_face_cache_runs(original, tmp_path, inside, low_memory):
    sessions = [
        load(path, "onnxruntime", low_memory=low_memory).session() for path in (original.path, cached(original, tmp_path, inside))
    ]
    for session in sessions:
        session.feed([3, 1, 4, 1, 5])
    assert (sessions[0].step([9]) == sessions[1].step([9])).all()


def test_what_a_link_leads_to_has_the_hash_of_the_manifest_even_if_files_are_not_hashed(original, tmp_path):
    snapshot = cached(original, tmp_path)
    blob = (snapshot / "weights.bin").resolve()
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.bin: its SHA-256 does not match the manifest"):
        open_bundle(snapshot, check_hashes=False)


@pytest.mark.parametrize("place", ["elsewhere", "models--somebody--tiny/elsewhere", "models--somebody--tiny/blobs/deeper"])
def test_links_to_anywhere_else_are_refused_with_what_to_do(original, tmp_path, place):
    snapshot = cached(original, tmp_path)
    (tmp_path / place).mkdir()
    shutil.move((snapshot / "weights.bin").resolve(), tmp_path / place / "weights")
    (snapshot / "weights.bin").unlink()
    (snapshot / "weights.bin").symlink_to(tmp_path / place / "weights")
    with pytest.raises(UserError, match=r"weights\.bin: a link that leaves the bundle, to .*weights; .* cp -rL .* COPY"):
        open_bundle(snapshot)


def test_a_bundle_outside_a_cache_may_not_link_into_blobs(original, tmp_path):
    (tmp_path / "blobs").mkdir()
    bundle = tmp_path / "tiny.retnet"
    shutil.copytree(original.path, bundle)
    shutil.move(bundle / "weights.bin", tmp_path / "blobs" / "weights")
    (bundle / "weights.bin").symlink_to("../blobs/weights")
    with pytest.raises(UserError, match="a link that leaves the bundle"):
        open_bundle(bundle)


def test_a_link_within_the_bundle_stays(original, tmp_path):
    bundle = tmp_path / "tiny.retnet"
    shutil.copytree(original.path, bundle)
    (bundle / "weights.bin").rename(bundle / "real")
    (bundle / "weights.bin").symlink_to("real")
    open_bundle(bundle)
