"""Kernels from source to machine code: compiled by NVRTC for one GPU, kept in the user's cache.

Rule: the key of a cached kernel is everything that went in (source, constants, architecture, compiler), and its file carries a
checksum, so a stale or damaged one is never run: it is compiled again. A cache that cannot be written costs time, not the run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from retnet_export.runtime.bundle.files import write_atomically
from retnet_export.runtime.errors import BackendWarning, MissingExtraError, UserError

CHECKSUM_BYTES = 32
CACHE_VARIABLE = "RETNET_EXPORT_CACHE"
"""Environment variable that names another folder for compiled kernels."""
PREPROCESSED = re.compile(r"COMPUTE|ACTIVATION|P[0-9]")
"""Constants that the preprocessor needs; the others are C++ constants, so that a name cannot hit anything else."""


@dataclass(frozen=True)
class Kernels:
    """Machine code.

    Attributes:
        image: the cubin, or PTX where the compiler was asked for that.
        log: what the compiler said; empty if it came from the cache.
        cached: whether it came from the cache.
    """

    image: bytes
    log: str
    cached: bool


@functools.cache
def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingExtraError("cuda-bindings", "cuda", "compiling kernels for an NVIDIA GPU") from error
    return nvrtc  # type: ignore[no-any-return]


def compiler_version() -> tuple[int, int]:
    """The version of NVRTC.

    Raises:
        UserError: its library is not found.
    """
    nvrtc = _nvrtc()
    try:
        code, major, minor = nvrtc.nvrtcVersion()
    except (RuntimeError, OSError) as error:
        raise UserError(
            "the library NVRTC, which compiles the kernels of the backend 'cuda', was not found: pip install 'retnet-export[cuda]' "
            "(or, on a Jetson, install JetPack's cuda-nvrtc package)"
        ) from error
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UserError(f"NVRTC does not work here: nvrtcVersion answered {code}")
    return int(major), int(minor)


def library() -> str:
    """Where NVRTC was loaded from."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return str(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        return f"found by cuda-bindings ({type(error).__name__} while asking where)"


def supported_capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capabilities that this NVRTC can compile for."""
    compiler_version()
    nvrtc = _nvrtc()
    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, archs = nvrtc.nvrtcGetSupportedArchs()
    return tuple(divmod(arch, 10) for arch in archs[:count])


def source(name: str, constants: Mapping[str, str]) -> str:
    """A kernel's source with its constants in front."""

    def line(key: str, value: str) -> str:
        if PREPROCESSED.fullmatch(key):
            return f"#define {key} {value}"
        kind = "float" if value.endswith("f") else "unsigned long long" if value.endswith("ull") else "int"
        return f"constexpr {kind} {key} = {value};"

    lines = [line(key, value) for key, value in constants.items()]
    return "\n".join([*lines, '#line 1 "' + name + '"', files(__package__).joinpath(name).read_text()])


def compile_kernels(name: str, constants: Mapping[str, str], capability: tuple[int, int], *, ptx: bool = False) -> Kernels:
    """Compile one source file of this package, or take it from the cache.

    Args:
        name: "step.cu".
        constants: what the source is compiled with.
        capability: of the GPU.
        ptx: intermediate code for a GPU of this or a later capability, which its driver translates, instead of machine code.

    Raises:
        UserError: NVRTC is missing or does not know the GPU.
        RuntimeError: the source does not compile, which is a fault of ours.
    """
    return compile_text(name, source(name, constants), capability, ptx=ptx)


def compile_text(name: str, text: str, capability: tuple[int, int], *, ptx: bool = False) -> Kernels:
    """Compile a source text, or take it from the cache; as `compile_kernels`, whose `name` is what messages call it."""
    version = compiler_version()
    architecture = f"{'compute' if ptx else 'sm'}_{capability[0]}{capability[1]}"
    options = [f"-arch={architecture}", "-std=c++17", "-default-device", "--ptxas-options=-v"]
    key = hashlib.sha256("\0".join([text, *options, str(version)]).encode()).hexdigest()
    path = cache_folder() / f"{Path(name).stem}-{architecture}-{key[:32]}.bin"
    if (image := _read(path)) is not None:
        return Kernels(image, "", True)
    if not ptx and capability not in supported_capabilities():
        known = ", ".join(f"{major}.{minor}" for major, minor in supported_capabilities())
        raise UserError(
            f"NVRTC {version[0]}.{version[1]} compiles for compute capability {known}, "
            f"not for this GPU's {capability[0]}.{capability[1]}; "
            "install a newer one: pip install -U nvidia-cuda-nvrtc"
        )
    image, log = _compile(name, text, options, ptx)
    _write(path, image)
    return Kernels(image, log, False)


def _compile(name: str, text: str, options: list[str], ptx: bool) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    success = nvrtc.nvrtcResult.NVRTC_SUCCESS
    code, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
    if code != success:
        raise RuntimeError(f"NVRTC: {code}")
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytes(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        message = log.rstrip(b"\0\n").decode(errors="replace")
        if code != success:
            raise RuntimeError(f"NVRTC cannot compile {name} ({code}):\n{message[:4000]}")
        _, size = nvrtc.nvrtcGetPTXSize(program) if ptx else nvrtc.nvrtcGetCUBINSize(program)
        image = bytes(size)
        (code,) = nvrtc.nvrtcGetPTX(program, image) if ptx else nvrtc.nvrtcGetCUBIN(program, image)
        if code != success:
            raise RuntimeError(f"NVRTC produced no code for {name}: {code}")
        return image, message
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retnet-export" / "kernels"


def _read(path: Path) -> bytes | None:
    """A cached kernel; None if there is none, or it is not what was written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(
            f"{path}: the compiled kernel cannot be read ({error.strerror}), compiling it again", BackendWarning, stacklevel=3
        )
        return None
    if hashlib.sha256(content[CHECKSUM_BYTES:]).digest() != content[:CHECKSUM_BYTES]:
        warnings.warn(f"{path}: the compiled kernel is damaged, compiling it again", BackendWarning, stacklevel=3)
        return None
    return content[CHECKSUM_BYTES:]


def _write(path: Path, image: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(image).digest() + image)
    except OSError as error:
        warnings.warn(
            f"{path.parent}: cannot store compiled kernels there ({error.strerror}), so every start compiles them again; "
            f"set {CACHE_VARIABLE} to a writable folder",
            BackendWarning,
            stacklevel=3,
        )
