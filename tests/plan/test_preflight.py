from __future__ import annotations

import pytest
import tiny

from retnet_export.plan.preflight import check_groups
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.errors import UserError


def test_int8_in_groups_is_refused_for_full_tensorrt_alone(tmp_path):
    plain = tiny.bundle(tmp_path, tiny.config(), precision="fp16")
    grouped = quantize_bundle(
        plain, tmp_path / "groups.retnet", QuantizeOptions("int8", group_size=16, embedding="keep", head="keep")
    )
    by_output = quantize_bundle(plain, tmp_path / "outputs.retnet", QuantizeOptions("int8"))
    with pytest.raises(
        UserError, match="INT8 weights with a scale for every 16 inputs; tensorrt takes such groups of INT4 weights only"
    ):
        check_groups(grouped.path, grouped.manifest, "tensorrt")
    check_groups(grouped.path, grouped.manifest, "tensorrt-rtx")
    check_groups(by_output.path, by_output.manifest, "tensorrt")
    check_groups(plain.path, plain.manifest, "tensorrt")
