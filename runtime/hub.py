"""Repositories of the Hugging Face Hub by name, where a path could stand: `user/name`, `user/name@revision`, `hf://user/name`.

Rule: a local folder of that name wins, and `huggingface_hub` does the rest: its cache, its progress bars, its tokens, its offline
mode. Only files that are wanted are downloaded; what was downloaded is found again without a network.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from retnet_export.runtime.errors import MissingExtraError, UserError

SCHEME = "hf://"
NAME = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")
MANIFEST = "manifest.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Repository:
    """A repository at a revision.

    Attributes:
        name: "user/name".
        revision: a branch, a tag or a commit; the default branch when None.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def repository(given: str | Path) -> Repository | None:
    """The repository that a name means; None if it is a path.

    `user/name` is a path if it is there, or if `user` is a folder here: a misspelt path must not be looked up on the Hub.
    """
    text = str(given)
    # A Path makes one slash of two.
    scheme = next((scheme for scheme in (SCHEME, "hf:/") if text.startswith(scheme)), "")
    match = NAME.fullmatch(text.removeprefix(scheme))
    if scheme and match is None:
        raise UserError(f"{text}: expected {SCHEME}user/name or {SCHEME}user/name@revision")
    if match is None or (not scheme and (os.path.lexists(text) or os.path.isdir(text.partition("/")[0]))):
        return None
    return Repository(match["repository"], match["revision"])


def bundle_folder(given: str | Path) -> Path:
    """A bundle's folder; of a repository, its snapshot in the cache, with the files that the manifest lists.

    Raises:
        UserError: the repository is not there, is no bundle, or cannot be reached.
    """
    if (found := repository(given)) is None:
        return Path(given)
    manifest = download(found, lambda files: [MANIFEST], f"it is not a bundle: it has no {MANIFEST}")
    try:
        listed = json.loads((manifest / MANIFEST).read_bytes()).get("files")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{found}: its {MANIFEST} is not a bundle's: {error}") from error
    if not isinstance(listed, dict):
        raise UserError(f"{found}: its {MANIFEST} is not a bundle's: it lists no files")
    return download(
        found, lambda files: [MANIFEST, *(name for name in listed if isinstance(name, str))], "files of the bundle are missing"
    )


def download(found: Repository, wanted: Callable[[Iterable[str]], Iterable[str]], without: str) -> Path:
    """Bring files of a repository into the cache.

    Args:
        found: the repository.
        wanted: chooses among the names of its files.
        without: what it means if one is not there.

    Returns:
        The snapshot's folder, whose files are links. Without a network, what an earlier download left there.

    Raises:
        UserError: it is not there, needs a token, has not what is wanted, or cannot be reached.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download, utils
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError("huggingface-hub", "hub", f"downloading {found}") from error

    if not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]  # documented, but not in its __all__

    def cached() -> Path:
        # Whether the files that are wanted are there is for those to say who open them: others never will be.
        return Path(snapshot_download(found.name, revision=found.revision, local_files_only=True, allow_patterns=["."]))

    try:
        info = _asked(found, lambda: HfApi().model_info(found.name, revision=found.revision))
    except _UnreachableError as unreachable:
        try:
            return cached()
        except (LocalEntryNotFoundError, FileNotFoundError) as error:
            raise UserError(f"{found}: is not a local folder, not in the cache, and {unreachable}") from error
    names = [sibling.rfilename for sibling in info.siblings or ()]
    chosen = list(dict.fromkeys(wanted(names)))
    if missing := [name for name in chosen if name not in names]:
        held = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(f"{found}: {without}: {', '.join(missing[:4])} not found; the repository holds {held}")
    patterns = [re.sub(r"([\[\]*?])", r"[\1]", name) for name in chosen]
    try:
        # By its name and not by its commit: only then does the cache record which commit the name meant.
        return Path(_asked(found, lambda: snapshot_download(found.name, revision=found.revision, allow_patterns=patterns)))
    except _UnreachableError as error:
        raise UserError(f"{found}: the download stopped: {error}; run the command again, it continues where it stopped") from error


def repository_of(path: Path) -> str | None:
    """The repository, and its commit, whose snapshot in a cache a folder is: "user/name@commit"; None if it is none."""
    folder = path.absolute()
    if folder.parent.name != "snapshots" or not folder.parents[1].name.startswith("models--"):
        return None
    return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/')}@{folder.name}"


class _UnreachableError(Exception):
    """The Hub does not answer, or may not be asked."""


def _asked(found: Repository, ask: Callable[[], T]) -> T:
    """What the Hub answers, with its refusals as messages.

    Raises:
        UserError: it refuses.
        _UnreachableError: it does not answer.
    """
    from huggingface_hub import constants, errors

    # The base of the Hub's own errors is that of its HTTP client, which is another one from version to version.
    network: tuple[type[Exception], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    page = f"{constants.ENDPOINT}/{found.name}"
    try:
        return ask()
    except errors.GatedRepoError as error:
        raise UserError(
            f"{found}: gated: accept its terms at {page}, then log in (`hf auth login`, or a token in HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{found}: the repository exists, the revision does not; see {page}/refs") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{found}: not a local folder and not a repository at {constants.ENDPOINT}; is the name right? "
            "A private one needs a token (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{found}: not a name of a repository: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise _UnreachableError("HF_HUB_OFFLINE is set; unset it to download") from error
    except network as error:
        raise _UnreachableError(f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:200] or type(error).__name__
