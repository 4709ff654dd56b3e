"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from retnet_export.runtime.errors import UserError

PARTIAL, OLD = "partial", "old"
"""Part of the hidden names beside a folder: of the new one while it is written, of the old one while it is replaced."""
STORAGE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def sha256_of_bytes(content: bytes | memoryview) -> str:
    """SHA-256 of bytes in memory, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_text(path: Path) -> str:
    """A UTF-8 file, without the mark that some editors put in front.

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except IsADirectoryError as error:
        raise UserError(f"{path}: a folder, expected a text file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it first, as with `iconv -f LATIN1 -t UTF-8`"
        ) from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; an existing one stays until the new one is on the disk."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def new_folder(target: str | Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends, and vanishes if the block fails.

    Args:
        marker: a file that every such folder has; `force` replaces only a folder that has it, or an empty one.
        force: replace an existing folder.

    Raises:
        UserError: the target exists and `force` is false, it is something that `force` must not delete, or its parent is no
            writable folder.
    """
    target = Path(os.path.abspath(target))
    restore_old(target)
    if os.path.lexists(target):
        if not force:
            raise UserError(f"{target}: exists already; choose another name, or give force=True to replace it")
        if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
            raise UserError(f"{target}: exists and is not a bundle, so force=True does not replace it; choose another name")
    above = next(folder for folder in target.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"{target}: cannot be written: {above} is not a folder; choose another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary, lock = _locked_sibling(target, PARTIAL)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror} ({error.filename})") from error
    try:
        os.chmod(temporary, 0o755)
        try:
            yield temporary
        except OSError as error:
            if error.errno not in STORAGE_FAULTS:
                raise
            raise UserError(f"{target}: cannot be written: {error.strerror}; nothing was kept") from error
        except UserError as error:
            if str(temporary) not in str(error):
                raise
            # The folder that it speaks of will be gone.
            raise UserError(str(error).replace(str(temporary), str(target))) from error
        if not force and os.path.lexists(target):
            raise UserError(f"{target}: another process has created it in the meantime; nothing was kept")
        _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)


def restore_old(target: str | Path) -> Path | None:
    """Repair what a kill during `--force` left: restore the old folder if there is no new one, else remove it.

    Returns:
        Where the old folder still lies if there is no other: another process is replacing it at this moment, or it cannot be moved.
    """
    target = Path(os.path.abspath(target))
    for aside in _siblings(target, OLD):
        if (lock := _lock(aside)) is None:
            continue
        with contextlib.suppress(OSError):  # the folder cannot be written, or another process was faster
            if not os.path.lexists(target) and (aside / target.name).exists():
                os.rename(aside / target.name, target)
            shutil.rmtree(aside)
        _unlock(lock)
    if os.path.lexists(target):
        return None
    return next((old for aside in _siblings(target, OLD) if (old := aside / target.name).exists()), None)


def _locked_sibling(target: Path, what: str) -> tuple[Path, int | None]:
    """A new hidden folder beside `target`, and its lock; None on a file system that has no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.{what}-"))
        # Until it is locked it looks abandoned, and another process may just be removing it: then another one is made.
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            _flock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:
            os.close(descriptor)
            return folder, None
        if os.path.lexists(folder):
            return folder, descriptor
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Take the lock of a folder that is there, which the system releases when a process ends, however it ends.

    None: another process holds it, the folder has gone, or the file system has no locks and nobody can say.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        _flock(descriptor)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _flock(descriptor: int) -> None:
    import fcntl  # not on Windows, where bundles can be read

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _siblings(target: Path, what: str) -> list[Path]:
    return [path for path in target.parent.glob(f".{glob.escape(target.name)}.{what}-*") if path.is_dir()]


def _remove_abandoned(target: Path) -> None:
    """Remove what a process that was killed while it wrote `target` has left beside it; what another still writes stays."""
    for folder in _siblings(target, PARTIAL):
        if (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _replace_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    # A folder cannot be renamed over a full one: the old one steps aside, and comes back if the second rename fails. If this
    # process is killed between the two, `restore_old` brings it back.
    aside, lock = _locked_sibling(target, OLD)
    os.rename(target, aside / target.name)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside / target.name, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _unlock(lock)
