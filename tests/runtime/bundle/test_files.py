"""A folder is whole or absent, whoever is killed and whoever else writes the same one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.runtime.bundle.bundle import MANIFEST, open_bundle
from retnet_export.runtime.bundle.files import new_folder
from retnet_export.runtime.errors import UserError

WRITER = """
import os, sys, tempfile
from pathlib import Path
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.bundle.files import new_folder

target, force, pause = sys.argv[1], sys.argv[2] == "--force", sys.argv[3]

def wait(where):
    if where == pause:
        print(where, flush=True)
        sys.stdin.readline()

rename, mkdtemp = os.rename, tempfile.mkdtemp

def slow_rename(source, destination):
    rename(source, destination)
    wait("the old one is aside" if ".old-" in str(destination) else "the new one is there")

def slow_mkdtemp(**options):
    folder = mkdtemp(**options)
    wait("a folder is made and not locked")
    return folder

os.rename, tempfile.mkdtemp = slow_rename, slow_mkdtemp
try:
    with new_folder(target, marker="manifest.json", force=force) as folder:
        wait("writing")
        Path(folder, "manifest.json").write_text("of the writer")
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def writer(tmp_path):
    """Starts a process that writes a folder and stops where it is told to; it goes on after a line."""
    running = []

    def start(target: Path, pause: str, force: str = "--force") -> subprocess.Popen:
        paths = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target), force, pause],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            text=True,
        )
        running.append(process)
        assert process.stdout.readline() == pause + "\n", process.stderr.read()
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def write(target: Path, content: str, *, force: bool = False) -> None:
    with new_folder(target, marker=MANIFEST, force=force) as folder:
        (folder / MANIFEST).write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def bundle(tmp_path):
    return tiny.bundle(tmp_path, tiny.config()).path


def test_a_bundle_whose_replacement_was_killed_comes_back_with_the_next_command(bundle, writer):
    kill(writer(bundle, "the old one is aside"))
    assert not bundle.exists()
    result = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    open_bundle(bundle)
    assert not [name for name in names(bundle.parent) if ".old-" in name]


def test_a_bundle_whose_replacement_was_killed_comes_back_before_another_is_written(bundle, writer):
    kill(writer(bundle, "the old one is aside"))
    with pytest.raises(UserError, match="exists already"):
        write(bundle, "another")
    open_bundle(bundle)
    write(bundle, "another", force=True)
    assert names(bundle.parent) == [bundle.name]


def test_an_old_bundle_goes_when_the_new_one_had_come_before_the_kill(bundle, writer):
    kill(writer(bundle, "the new one is there"))
    assert len(names(bundle.parent)) == 2
    write(bundle, "another", force=True)
    assert names(bundle.parent) == [bundle.name]
    assert (bundle / MANIFEST).read_text() == "another"


def test_a_bundle_that_is_being_replaced_is_named_and_not_touched(bundle, writer):
    process = writer(bundle, "the old one is aside")
    with pytest.raises(UserError, match=r"no such bundle, but \S+/\.tiny\.retnet\.old-\S+ has its old content: another command"):
        open_bundle(bundle)
    process.communicate("\n")
    assert process.returncode == 0
    assert names(bundle.parent) == [bundle.name]
    assert (bundle / MANIFEST).read_text() == "of the writer"


def test_an_old_bundle_that_cannot_be_moved_back_is_named(bundle, writer, monkeypatch):
    kill(writer(bundle, "the old one is aside"))

    def refuse(source, destination):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=r"\.old-\S+/tiny\.retnet has its old content"):
        open_bundle(bundle)
    assert not bundle.exists()


def test_a_folder_that_another_process_has_made_and_not_yet_locked_may_go_and_is_made_again(tmp_path, writer):
    target = tmp_path / "new"
    process = writer(target, "a folder is made and not locked")
    (unlocked,) = tmp_path.iterdir()
    write(target, "of the other")
    assert not unlocked.exists()
    _, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    assert (target / MANIFEST).read_text() == "of the writer"
    assert names(tmp_path) == ["new"]


def test_a_folder_that_was_made_meanwhile_is_not_replaced_without_force(tmp_path, writer):
    target = tmp_path / "new"
    process = writer(target, "writing", force="")
    write(target, "of the other")
    _, errors = process.communicate("\n")
    assert process.returncode == 1
    assert "new: another process has created it in the meantime; nothing was kept" in errors
    assert (target / MANIFEST).read_text() == "of the other"
    assert names(tmp_path) == ["new"]


def test_two_processes_that_clean_up_the_same_leftover_both_go_on(tmp_path, writer, monkeypatch):
    target = tmp_path / "new"
    kill(writer(target, "writing"))
    left, really_open = set(tmp_path.glob(".new.partial-*")), os.open
    assert left

    def open_too_late(path, *arguments, **options):
        if path in left:
            left.remove(path)
            shutil.rmtree(path)  # as the other process would, between the look and the lock
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_too_late)
    write(target, "mine")
    assert names(tmp_path) == ["new"]
