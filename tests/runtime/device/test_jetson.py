"""Parsers of Jetson texts, on texts of real boards. Each is labelled with its board, its release, and where it was published."""

from __future__ import annotations

import time

import pytest

from retnet_export.runtime.device import doctor, jetson

NV_TEGRA_RELEASE = {
    # Jetson Orin (a NeoEdge NG4500 box), JetPack 6.2; documentation of the box
    "36.4.3": (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
        "# KERNEL_VARIANT: oot\n"
        "TARGET_USERSPACE_LIB_DIR=nvidia\n"
        "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n",
        "6.1 or 6.2",
    ),
    # Jetson Orin Nano Engineering Reference Developer Kit Super, JetPack 6.2.1; a benchmark report of 2026-09-01
    "36.4.7": (
        "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, DATE: Thu Sep 18 22:54:44 UTC 2025\n"
        "# KERNEL_VARIANT: oot\n",
        "6.1 or 6.2",
    ),
    # Jetson AGX Thor Developer Kit, JetPack 7.0; github.com/rbonghi/jetson_stats issue 711
    "38.2.0": (
        "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: Fri Aug 22 00:55:42 UTC 2025\n",
        "7.0",
    ),
    # Jetson AGX Orin Developer Kit, JetPack 7.2; github.com/rbonghi/jetson_stats issue 864
    "39.2.0": (
        "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, DATE: Mon Jun  1 09:28:48 PM UTC 2026\n",
        "7.2",
    ),
}


@pytest.mark.parametrize("release", NV_TEGRA_RELEASE)
def test_the_release_file_of_a_real_board_gives_l4t_and_jetpack(release):
    text, jetpack = NV_TEGRA_RELEASE[release]
    assert jetson.l4t_version(text) == release
    assert jetson.jetpack_of(release) == jetpack


def test_an_agx_orin_has_no_rail_for_all_so_three_are_added():
    assert jetson.total_power_mw({"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 3268, "VIN_SYS_5V0": 5500}) == 13907


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN\n0\n", "MAXN"),  # Jetson Nano, JetPack 4; notes of a user
        ("NV Power Mode: MAXN_SUPER\n2\n", "MAXN_SUPER"),  # Orin Nano Super, JetPack 6.2; issues and notes of users
        ("NVPM ERROR: failed to open /dev/nvhost\n", None),
    ],
)
def test_the_power_mode_is_what_nvpmodel_calls_it(text, mode):
    assert jetson.power_mode(text) == mode


@pytest.mark.parametrize("text", ["", "hello", "# R (release)", "RAM lots"])
def test_texts_that_nobody_knows_give_none(text):
    assert jetson.l4t_version(text) is None
    assert jetson.power_mode(text) is None


def test_an_l4t_from_the_future_belongs_to_the_newest_jetpack_known_and_an_ancient_one_to_none():
    assert jetson.jetpack_of("40.1.0") == "7.2"
    assert jetson.jetpack_of("21.5") is None


def sensors(folder, **rails):
    """The files of an INA3221 as Linux shows them, in millivolts and milliamperes."""
    folder.mkdir()
    for channel, (name, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        (folder / f"in{channel}_label").write_text(f"{name}\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")


def test_energy_is_power_times_time(tmp_path):
    sensors(tmp_path / "hwmon1", VDD_IN=(5000, 2000), VDD_SOC=(5000, 300))
    assert jetson.read_rails(tmp_path) == {"VDD_IN": 10000, "VDD_SOC": 1500}
    began = time.perf_counter()
    with jetson.PowerMeter(tmp_path, interval_s=0.01) as meter:
        time.sleep(0.1)
    elapsed = time.perf_counter() - began
    assert meter.joules is not None
    assert 0.5 * 10 * 0.1 < meter.joules <= 10 * elapsed


def test_without_sensors_there_is_no_energy(tmp_path):
    with jetson.PowerMeter(tmp_path) as meter:
        pass
    assert meter.joules is None


def test_doctor_on_a_jetson_names_board_release_and_power(tmp_path, monkeypatch):
    (tmp_path / "release").write_text(NV_TEGRA_RELEASE["36.4.7"][0])
    # /proc/device-tree/model ends with a null character
    (tmp_path / "model").write_text("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0")
    sensors(tmp_path / "hwmon0", VDD_IN=(5016, 1446))
    monkeypatch.setattr(jetson, "RELEASE", tmp_path / "release")
    monkeypatch.setattr(jetson, "MODEL", tmp_path / "model")
    monkeypatch.setattr(jetson, "read_rails", lambda: {"VDD_IN": 7253})
    facts = doctor.examine()["jetson"]
    assert facts["board"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert facts["JetPack"] == "6.1 or 6.2"
    assert facts["power"] == "7.3 W (VDD_IN)"


def test_doctor_says_for_every_backend_whether_it_works_and_what_would_mend_it():
    works = doctor.examine()["works"]
    for backend in ("onnxruntime", "cuda", "tensorrt", "tensorrt-rtx"):
        (remedy,) = (remedy for purpose, remedy in works.items() if f"({backend})" in purpose)
        assert remedy is None or len(remedy) > 10


def test_doctor_with_tensorrt_names_the_gpu_and_the_versions(monkeypatch):
    import tensorrt_double

    tensorrt_double.install(monkeypatch)
    report = doctor.examine()
    assert report["gpu"]["compute capability"] == "8.7"
    assert report["gpu"]["tensorrt"] == "10.3.0"
    assert report["works"]["run and compile on this GPU (tensorrt)"] is None


def test_doctor_survives_a_broken_tensorrt(monkeypatch):
    import sys
    from types import ModuleType

    broken = ModuleType("tensorrt")
    broken.Builder, broken.__version__ = object, "not a version"
    monkeypatch.setitem(sys.modules, "tensorrt", broken)
    assert "too old" in (doctor.examine()["works"]["run and compile on this GPU (tensorrt)"] or "")
