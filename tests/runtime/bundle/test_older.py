"""A bundle of another format is refused with what to do about it."""

import json

import pytest
import tiny

from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.bundle.manifest import FORMAT_VERSION
from retnet_export.runtime.errors import UserError


def refusal(bundle, **changes):
    """What is said of the bundle with other fields in its manifest."""
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        open_bundle(bundle.path)
    return str(caught.value)


def test_a_bundle_of_an_older_version_names_the_command_that_makes_it_again(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config())
    said = refusal(bundle, format_version=1)
    assert f"bundle format 1, this version of retnet-export reads {FORMAT_VERSION}; make it again: retnet-export export" in said
    assert f"export CHECKPOINT -o {bundle.path}" in said
    assert "`retnet-export quantize`" in refusal(bundle, format_version=1, quantization={"weights": "int8"})


def test_a_bundle_of_a_newer_version_asks_for_that_version(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config())
    assert "it comes from a newer version: pip install --upgrade retnet-export" in refusal(bundle, format_version=1000)


@pytest.mark.parametrize("strange", [None, "3", []])
def test_a_format_that_is_no_number_is_refused(tmp_path, strange):
    bundle = tiny.bundle(tmp_path, tiny.config())
    assert f"bundle format {strange!r}" in refusal(bundle, format_version=strange, precision=strange, variants=strange)
