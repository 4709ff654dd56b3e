"""Build the sdist and the wheel of the last commit twice, and keep them only if both times give the same bytes.

Rule: what is built is what is committed, at the commit's time. The tree is exported to an empty folder, so untracked files
and the output of earlier builds are in neither. setuptools takes SOURCE_DATE_EPOCH for wheels; the times and the
owners in an sdist are set here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Build into dist/; 1 if the two builds differ."""
    os.umask(0o022)  # a wheel keeps the modes of its files
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct").decode())
    with tempfile.TemporaryDirectory() as folder:
        built = [_build(Path(folder) / name, epoch) for name in ("first", "second")]
        digests = [{file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} for files in built]
        if digests[0] != digests[1]:
            print(f"two builds of one commit differ: {digests}", file=sys.stderr)
            return 1
        target = ROOT / "dist"
        target.mkdir(exist_ok=True)
        for file in built[0]:
            shutil.copy(file, target / file.name)
            print(f"{digests[0][file.name]}  dist/{file.name}")
    return 0


def _build(folder: Path, epoch: int) -> list[Path]:
    """The sdist, and the wheel that is made from it."""
    source, out = folder / "source", folder / "out"
    source.mkdir(parents=True)
    archive = folder / "source.tar"
    archive.write_bytes(_git("archive", "HEAD"))
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch)}
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout}\n{done.stderr}")
    for sdist in out.glob("*.tar.gz"):
        normalise(sdist, epoch)
    return sorted(out.iterdir())


def normalise(sdist: Path, epoch: int) -> None:
    """Write a .tar.gz again with its members in order, at one time, of nobody."""
    with tarfile.open(sdist) as before:
        members = [(member, before.extractfile(member)) for member in sorted(before.getmembers(), key=lambda each: each.name)]
        contents = [(member, None if file is None else file.read()) for member, file in members]
    with (
        sdist.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=epoch, fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member, content in contents:
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            after.addfile(member, None if content is None else io.BytesIO(content))


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout


if __name__ == "__main__":
    raise SystemExit(main())
