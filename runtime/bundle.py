"""The bundle: a self-contained folder with graphs, weights and a manifest, that is either whole or absent.

    NAME.retnet/
        manifest.json     what is in the folder; everything a host needs to run it (this module's dataclasses)
        decode.onnx       one token per sequence
        prefill.onnx      a chunk of tokens per sequence, same state
        weights.bin       external data of the graphs, stored once
        tokenizer.json    when the checkpoint has one

A bundle is written into a temporary sibling and renamed into place. It is read with the size and hash of every file
checked; no name in a manifest may leave the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.files import sha256_of, write_atomically
from retnet_export.runtime.manifest import FORMAT, FORMAT_VERSION, FileRecord, Manifest
from retnet_export.runtime.schema import decode, encode

MANIFEST = "manifest.json"


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
        path: the folder.
        check_hashes: compare the SHA-256 of every file (about a second per gigabyte); sizes are always compared.
        progress: called with the number of bytes hashed since the last call.

    Raises:
        UserError: it is not a bundle, or a file is missing, changed, truncated, linked from outside, or unlisted names climb
            out of the folder.
    """
    path = Path(path)
    if not path.is_dir():
        hint = "; it is a file, expected a folder that `retnet-export export` wrote" if path.exists() else ""
        raise UserError(f"{path}: no such bundle{hint}")
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise UserError(f"{path}: not a bundle, it has no {MANIFEST}; make one with `retnet-export export CHECKPOINT -o {path}`")
    manifest = _read_manifest(manifest_path)
    for name, record in manifest.files.items():
        _check_file(path, name, record, check_hashes, progress)
    return Bundle(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the bundle is damaged, export it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path}: not a retnet-export manifest: the field 'format' is not {FORMAT!r}")
    if document.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: bundle format {document.get('format_version')!r}, this version of retnet-export reads {FORMAT_VERSION}; "
            "export the checkpoint again with this version"
        )
    manifest = decode(Manifest, document, str(path))
    named = [(f"graphs.{name}.file", graph.file) for name, graph in manifest.graphs.items()]
    if manifest.tokenizer is not None:
        named.append(("tokenizer.file", manifest.tokenizer.file))
    for where, name in named:
        if name not in manifest.files:
            raise UserError(f"{path}: {where} is {name!r}, which is not among the bundle's files")
    for graph_name in ("decode", "prefill"):
        if graph_name not in manifest.graphs:
            raise UserError(f"{path}: the bundle has no {graph_name} graph; export the checkpoint again")
    _check_state(path, manifest)
    return manifest


def _check_state(path: Path, manifest: Manifest) -> None:
    for graph_name, graph in manifest.graphs.items():
        inputs = {spec.name: spec for spec in graph.inputs}
        outputs = {spec.name: spec for spec in graph.outputs}
        if len(inputs) != len(graph.inputs) or len(outputs) != len(graph.outputs):
            raise UserError(f"{path}: graph {graph_name!r} names an input or output twice")
        for spec in manifest.state:
            for kind, name, table in (("input", spec.input, inputs), ("output", spec.output, outputs)):
                found = table.get(name)
                if found is None or found.dtype != spec.dtype or found.shape != spec.shape:
                    raise UserError(
                        f"{path}: state {spec.input!r} is {spec.dtype}{list(spec.shape)}, but graph {graph_name!r} has "
                        + (f"no {kind} {name!r}" if found is None else f"{kind} {name!r} as {found.dtype}{list(found.shape)}")
                    )
    config = manifest.model
    expected = (config.num_heads, config.head_key_dim, config.head_value_dim)
    layers = [spec for spec in manifest.state if spec.input.startswith("state.")]
    if len(layers) != config.num_layers or any(spec.shape[1:] != expected for spec in layers):
        raise UserError(
            f"{path}: the state has {len(layers)} layers of shapes {sorted({spec.shape[1:] for spec in layers})} a sequence, "
            f"the model configuration asks for {config.num_layers} of {expected}"
        )


def _check_file(root: Path, name: str, record: FileRecord, check_hash: bool, progress: Callable[[int], None] | None) -> None:
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or name in ("", ".", MANIFEST) or "\\" in name or "\0" in name:
        raise UserError(f"{root / MANIFEST}: the file name {name!r} is not a plain name inside the bundle")
    path = root / relative
    if not path.is_file():
        raise UserError(f"{path}: missing; the manifest lists it, so the bundle is incomplete: copy or export it again")
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{path}: a link that leaves the bundle; a bundle must hold its own files")
    size = path.stat().st_size
    if size != record.bytes:
        raise UserError(
            f"{path}: {size:,} bytes, the manifest says {record.bytes:,}; "
            "the file is truncated or replaced: copy or export it again"
        )
    if check_hash and sha256_of(path, progress) != record.sha256:
        raise UserError(
            f"{path}: its SHA-256 is not the one in the manifest; the file is damaged or replaced: copy or export it again"
        )


def record_files(folder: Path, known: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Size and hash of every file of a folder but its manifest; `known` records are taken as they are."""
    known = known or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        name: known[name] if name in known else FileRecord((folder / name).stat().st_size, sha256_of(folder / name))
        for name in names
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json so that a reader sees the old one or the new one, never a part."""
    write_atomically(folder / MANIFEST, (json.dumps(encode(manifest), indent=2) + "\n").encode())
