"""The backend `cuda`: a portable bundle on an NVIDIA GPU, with kernels of our own, compiled for this GPU and this model.

Rule: a step of one sequence is one launch; batches, prompts and scores are captured lists of launches (many.py); all read the same
weights. The state lies on the device once and is updated in place; what crosses to the host is a token in and the 64 largest
logits, which kernels put in the host's memory; all logits when asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from retnet_export.runtime.backends.base import PassCost
from retnet_export.runtime.backends.cuda.buffers import Size, ring_bytes
from retnet_export.runtime.backends.cuda.compiler import Kernels, cache_folder, compile_kernels, compiler_version, library
from retnet_export.runtime.backends.cuda.many import ROWS_AT_ONCE, Many
from retnet_export.runtime.backends.cuda.many_model import ManyKernels, device_model, many_source
from retnet_export.runtime.backends.cuda.many_source import WINDOW
from retnet_export.runtime.backends.cuda.plan import (
    THREADS,
    DeviceLimits,
    StepPlan,
    plan_step,
    state_and_scratch_bytes,
    too_old,
    unsupported,
)
from retnet_export.runtime.backends.cuda.runner import CudaRunner, StepStructure
from retnet_export.runtime.backends.cuda.sources import UnsupportedError
from retnet_export.runtime.backends.cuda.weights import DeviceWeights
from retnet_export.runtime.backends.registration import Registration
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.device import cuda, kernels
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import Tolerance

SPARE_BYTES = 64 << 20
"""Left free when weights are loaded: code, streams, and what CUDA takes for itself."""


PASS_COST = PassCost(fixed=0.85, token=0.035, again=False)
"""1.5B in INT4 on an H100, where a pass costs most: two rows take 1.9 steps, eight 2.0, sixteen 2.4 (docs/lab/speculation.md).
`fixed` is 0.3 for 1.5B in fp16 and 0.35 for 7.8B in INT4, `token` 0.02."""


def device_limits(index: int = 0) -> DeviceLimits:
    """What CUDA says of a GPU.

    Raises:
        UserError: there is none, or it cannot launch blocks together.
    """
    device = cuda.device(index)
    if not kernels.attribute("CooperativeLaunch", index):
        raise UserError(f"{device.name}: no cooperative launch, which the backend 'cuda' needs")
    return DeviceLimits(device.compute_capability, device.multiprocessors, kernels.attribute("MaxSharedMemoryPerBlockOptin", index))


def unavailable() -> str | None:
    """Why no bundle can run here with these kernels, or None."""
    if (reason := cuda.unavailable()) is not None:
        return reason
    try:
        limits = device_limits()
        compiler_version()
    except (UserError, RuntimeError, OSError) as error:
        return str(error)
    return too_old(limits)


def _facts() -> Mapping[str, str]:
    """What compiles the kernels, and where they are kept."""
    if unavailable() is not None:
        return {}
    major, minor = compiler_version()
    return {"NVRTC": f"{major}.{minor} ({library()})", "compiled kernels": str(cache_folder())}


class CudaBackend:
    """A portable bundle on this machine's GPU.

    Runners may be used by different threads, each by one at a time: their steps take turns on the GPU.

    Args:
        bundle: the bundle.
        ptx: a compute capability whose code, as PTX, is to run instead of this GPU's own: a test of what another GPU would run.
        weights: in place of the bundle's own, for benchmarks.

    Raises:
        UnsupportedError: the kernels cannot run this bundle; another backend can.
        UserError: there is no GPU, NVRTC is missing, or the weights do not fit.
    """

    name, variant = "cuda", "portable"

    def __init__(self, bundle: Bundle, *, ptx: tuple[int, int] | None = None, weights: DeviceWeights | None = None) -> None:
        self.manifest, self.path = bundle.manifest, bundle.path
        config = bundle.manifest.model
        reason = unsupported(config)
        if reason is None and (bundle.manifest.quantization or {}).get("activations"):
            reason = "its activations are quantized"
        if reason is not None:
            raise UnsupportedError(f"{bundle.path}: the backend 'cuda' cannot run it: {reason}")
        limits = self._limits = device_limits()
        if ptx is not None:
            limits = self._limits = DeviceLimits(ptx, limits.multiprocessors, min(limits.shared_bytes, 163 << 10))
        self._ptx = ptx is not None
        self.weights = DeviceWeights.of(bundle) if weights is None else weights
        sources = self.weights.sources
        self.plan: StepPlan = plan_step(
            config,
            bundle.manifest.precision.compute,
            sources.layouts,
            sources.embedding.layout,
            self.weights.layer_vectors,
            self.weights.model_vectors,
            limits,
        )
        self._source = many_source(self.weights, limits)
        self._check_memory()
        self.kernels: Kernels = compile_kernels("step.cu", self.plan.constants, limits.capability, ptx=ptx is not None)
        self.stream = shared_stream()
        self.weights.load(self.stream, cuda.device().compute_capability)
        self.step_function = kernels.Module(self.kernels.image).function("step", self.plan.shared_bytes)
        if self.step_function.blocks_at_once(THREADS) < 1:
            raise UserError(
                f"the backend 'cuda' needs {self.plan.shared_bytes:,} bytes of shared memory and {THREADS} threads a block: this "
                "GPU, or the part of it that this process may use, has less"
            )
        self.mail = cuda.DeviceBuffer(8 * self.plan.packets)
        self.control = cuda.DeviceBuffer(8)
        self.tile_largest = cuda.DeviceBuffer(4 * sources.head.layout.tiles)
        for buffer in (self.mail, self.control, self.tile_largest):
            self.stream.fill(buffer, 0)
        self.stream.synchronize()

    @functools.cached_property
    def many(self) -> Many:
        """What runs batches and prompts; made when one is first asked for."""
        launcher = ManyKernels(self._source, self.stream, self._limits, ptx=self._ptx)
        return Many(device_model(self.weights, self._source), launcher, self.stream)

    @property
    def chunk_tokens(self) -> int:
        return ROWS_AT_ONCE

    @property
    def pass_cost(self) -> PassCost:
        return PASS_COST

    def _check_memory(self) -> None:
        """Whether weights, one sequence and runs of few rows fit; longer prompts take what is left (many.py)."""
        memory, weights = cuda.memory_info(), self.weights
        work = state_and_scratch_bytes(self.plan, weights.config) + Size.for_runs_of(1).bytes_of(self._source)
        needed = weights.bytes + max(weights.largest, work) + SPARE_BYTES
        if needed > memory.free:
            raise cuda.CudaMemoryError(
                f"{self.path}: needs {needed:,} bytes on the GPU ({weights.bytes:,} of weights, {weights.largest:,} while loading "
                f"them and {work:,} for a sequence afterwards), {memory.free:,} of {memory.total:,} are free; close other programs "
                "or quantize the bundle"
            )

    def _check_batch(self, batch: int) -> None:
        """Whether a batch's states, logits, rings and runs fit into what is free."""
        c, size = self.weights.config, Size.for_runs_of(batch)
        made = self.__dict__["many"].size if "many" in self.__dict__ else Size(0, 0, 0)
        needed = batch * (4 * c.state_elements + 4 * c.vocab_size) + (sum(ring_bytes(self._source, batch)) if batch > 1 else 0)
        needed += 0 if made.enough_for(size) else size.bytes_of(self._source)
        memory = cuda.memory_info()
        if needed > memory.free:
            raise cuda.CudaMemoryError(
                f"{self.path}: {batch} sequences need {needed:,} bytes on the GPU beside the weights, {memory.free:,} of "
                f"{memory.total:,} are free; take a smaller batch or close other programs"
            )

    def structure(self) -> StepStructure:
        """The kernel's argument, as far as it is the same for all sequences."""
        weights, places = self.weights, self.weights.places
        scales = weights.model_vectors["embedding.scales" if places.embedding != places.head else "head.scales"]
        model = places.vectors + 4 * weights.layer_vectors.size * weights.config.num_layers
        return StepStructure(
            layers=weights.address(0),
            head=weights.address(places.head),
            embedding=weights.address(places.embedding),
            embedding_scales=0 if scales < 0 else weights.address(model + 4 * scales),
            vectors=weights.address(places.vectors),
            phases=weights.address(places.phases),
            mail=self.mail.address,
            control=self.control.address,
            tile_largest=self.tile_largest.address,
        )

    def open_runner(self, batch: int) -> CudaRunner:
        fixed = self.manifest.graphs["decode"].inputs[0].shape[0]
        if batch < 1 or fixed not in (-1, batch):
            raise UserError(f"{self.path}: exported for batch {fixed}, asked for {batch}; export it without a fixed batch")
        self._check_batch(batch)
        return CudaRunner(self, batch)


def shared_stream() -> cuda.Stream:
    """The stream of every model of the process: their steps use all of the GPU, so they could not overlap anyway."""
    with cuda.LOCK:
        return _one_stream()


@functools.cache
def _one_stream() -> cuda.Stream:
    return cuda.Stream()


REGISTRATIONS = (
    Registration(
        name="cuda",
        open=lambda bundle, threads, low_memory: CudaBackend(bundle),
        unavailable=unavailable,
        purposes={"generate on an NVIDIA GPU (cuda)": unavailable},
        state_passes=2.0,  # read and written in place
        basis="a roofline fitted to this project's measurements of its own kernels on an H100",
        tolerances={
            "float32": Tolerance(1e-4, "float32 rounding; sums in another order than on the CPU"),
            "float16": Tolerance(5e-2, "as on the CPU: weights and operands rounded to 11 bits, sums and state in float32"),
        },
        facts=_facts,
        state_passes_of_batches=1 + 1 / WINDOW,  # read at each step, written once in so many
    ),
)
