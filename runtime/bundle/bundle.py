"""The bundle: a self-contained folder with graphs, weights and a manifest, that is either complete or absent.

    NAME.retnet/
        manifest.json     what is in the folder; everything a host needs to run it (manifest.py), and its own hash
        decode.onnx       one token per sequence
        prefill.onnx      a chunk of tokens per sequence, same state
        decode.NAME.onnx, prefill.NAME.onnx     the same with the operators of one runtime, and so for each variant
        weights.bin       external data of all graphs, stored once
        tokenizer.json    when the checkpoint has one

A bundle is written into a temporary sibling and renamed into place. It is read with the size and hash of every file
checked; no name in a manifest may leave the folder.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retnet_export.runtime.bundle.external_data import external_locations
from retnet_export.runtime.bundle.files import restore_old, sha256_of, write_atomically
from retnet_export.runtime.bundle.manifest import FORMAT, FORMAT_VERSION, FileRecord, Manifest
from retnet_export.runtime.bundle.schema import encode, not_finite
from retnet_export.runtime.bundle.seal import read_sealed, sealed
from retnet_export.runtime.bundle.validation import check_manifest
from retnet_export.runtime.errors import UserError

MANIFEST = "manifest.json"
CARD = "README.md"
"""For readers; not in the manifest, so that it can be edited."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest and files have been checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of one of the files that the manifest lists."""
        return self.path / name

    def with_manifest(self, **changes: object) -> Bundle:
        """Rewrite the manifest with some fields replaced; atomically, the other files stay as they are."""
        manifest = replace(self.manifest, **changes)  # type: ignore[arg-type]
        write_manifest(self.path, manifest)
        return Bundle(self.path, manifest)


def open_bundle(path: str | Path, *, check_hashes: bool = True, progress: Callable[[int], None] | None = None) -> Bundle:
    """Read a bundle and check it.

    Args:
        check_hashes: compare the SHA-256 of every file (about a second per gigabyte); sizes are always compared.
        progress: called with the number of bytes hashed since the last call.

    Raises:
        UserError: it is not a bundle, its manifest contradicts itself, or a file is missing, changed, truncated, or outside
            the folder: by its name, by a link other than those of a Hugging Face cache, or as the place of a graph's weights.
    """
    path = Path(path)
    if not path.is_dir() and (old := restore_old(path)) is not None:
        raise UserError(
            f"{path}: no such bundle, but {old} has its old content: another command is replacing it, or was killed before it "
            "could move it back; wait, or move it back"
        )
    if not path.is_dir():
        hint = "; it is a file, expected a folder that `retnet-export export` wrote" if path.exists() else "; is the path right?"
        raise UserError(f"{path}: no such bundle{hint}")
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise UserError(f"{path}: not a bundle, it has no {MANIFEST}; make one with `retnet-export export CHECKPOINT -o {path}`")
    manifest = _read_manifest(manifest_path)
    for name, record in manifest.files.items():
        _check_file(path, name, record, check_hashes, progress)
    bundle = Bundle(path, manifest)
    _check_external_data(bundle)
    return bundle


def _read_manifest(path: Path) -> Manifest:
    def again(document: Mapping[str, object]) -> str:
        found = document.get("format_version")
        if isinstance(found, int) and found > FORMAT_VERSION:
            return "it comes from a newer version: pip install --upgrade retnet-export"
        quantized = ", into another folder, and `retnet-export quantize` from there" if document.get("quantization") else ""
        return f"make it again: retnet-export export CHECKPOINT -o {shlex.quote(str(path.parent))} --force{quantized}"

    manifest = read_sealed(Manifest, path, FORMAT, FORMAT_VERSION, "copy the bundle or export it again", again)
    try:
        check_manifest(manifest, MANIFEST)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return manifest


def _check_file(root: Path, name: str, record: FileRecord, check_hash: bool, progress: Callable[[int], None] | None) -> None:
    path = root / name
    try:
        if not path.is_file():
            raise UserError(f"{path}: missing; the manifest lists it, so the bundle is incomplete: copy or export it again")
        real = path.resolve()
        linked = not real.is_relative_to(root.resolve())
        if linked and real.parent != _blobs(root):
            raise UserError(
                f"{path}: a link that leaves the bundle, to {real}; only a bundle in a Hugging Face cache may have links, into its "
                f"blobs. Copy it with the files that its links lead to: cp -rL {shlex.quote(str(root))} COPY"
            )
        size = path.stat().st_size
        if size != record.bytes:
            raise UserError(
                f"{path}: {size:,} bytes, the manifest says {record.bytes:,}; "
                "the file is truncated or was replaced: copy or export it again"
            )
        # What a link leads to is shared with other snapshots: it is never taken by its size alone.
        if (check_hash or linked) and sha256_of(path, progress) != record.sha256:
            raise UserError(
                f"{path}: its SHA-256 does not match the manifest; the file is damaged or was replaced: copy or export it again"
            )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _blobs(root: Path) -> Path | None:
    """Where the files of a bundle are that lies in a Hugging Face cache: NAME/snapshots/REVISION/… has links into NAME/blobs."""
    snapshots = next((folder for folder in root.resolve().parents if folder.name == "snapshots"), None)
    blobs = None if snapshots is None else snapshots.parent / "blobs"
    return blobs if blobs is not None and blobs.is_dir() and not blobs.is_symlink() else None


def _check_external_data(bundle: Bundle) -> None:
    """The graphs' weights must be in files of the bundle, which have been checked."""
    graphs = (graph for variant in bundle.manifest.variants.values() for graph in variant.graphs.values())
    for path in (bundle.file(graph.file) for graph in graphs):
        try:
            locations = external_locations(path.read_bytes())
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if strange := sorted(locations - set(bundle.manifest.files)):
            raise UserError(f"{path}: the graph looks for its weights in {strange[0]!r}, which is not one of the bundle's files")


def record_files(folder: Path, known: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Size and hash of every file of a folder but its manifest and its card; `known` records are taken as they are."""
    known = known or {}
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, CARD)
    )
    return {
        name: known[name] if name in known else FileRecord((folder / name).stat().st_size, sha256_of(folder / name))
        for name in names
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically: a reader sees the old file or the new one.

    Raises:
        UserError: a figure in it is not finite, which no reader would take; the old manifest stays.
        OSError: the folder cannot be written.
    """
    document = encode(manifest)
    assert isinstance(document, dict)
    if strange := not_finite(document):
        raise UserError(f"{folder}: {strange[0]} would be {strange[1]} in its manifest, so nothing was recorded")
    write_atomically(folder / MANIFEST, sealed(document))
