"""How the step kernel is cut to a model and a device: the constants that step.cu is compiled with.

Rule: everything about the model and the device that the kernel needs is a constant here, and nothing else is, so the constants are
the key of a compiled kernel. Work is dealt so that the warp with the most to read has the least; what a device lacks is refused
with numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retnet_export.runtime.backends.cuda.layout import BITS, MatrixLayout
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.errors import UserError

OLDEST = (8, 0)
"""The first compute capability with cp.async and mma.m16n8k16."""
WARPS = 16
THREADS = 32 * WARPS
TOP = 64
"""Logits that a step chooses itself."""
CANDIDATES = 1024
"""Logits among which it chooses them; more only if many are equal."""
MOST_PARTS = 128
"""Partial sums of 16 rows, at most, between two sums over warps."""
MOST_SLOTS = 3
"""More in flight only makes everything else that asks for memory wait longer (docs/lab/step-h100.md)."""
FEWEST_SLOTS = 2
"""Pieces of weights that a warp must be able to hold."""
KINDS: Mapping[str, int] = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}
PRODUCTS = ("projections", "out", "up", "down", "head")
"""The products of a step, in the order in which a layer needs them."""


@dataclass(frozen=True)
class DeviceLimits:
    """What the kernel needs to know of a GPU.

    Attributes:
        capability: major and minor.
        multiprocessors: how many.
        shared_bytes: shared memory that a block may have, at most.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @property
    def architecture(self) -> str:
        """As compilers name it: "sm_87"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Vectors:
    """Where the small float32 tensors of a layer, and those of the whole model, lie: offsets in floats; -1 for those it lacks.

    Attributes:
        offsets: by name.
        size: floats of a layer, or of the model.
    """

    offsets: Mapping[str, int]
    size: int

    def __getitem__(self, name: str) -> int:
        return self.offsets.get(name, -1)


def place_vectors(sizes: Mapping[str, int]) -> Vectors:
    """One after another, each at a multiple of four floats."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // 4) * 4
    return Vectors(offsets, end)


@dataclass(frozen=True)
class Split:
    """How a product is dealt to a block's warps.

    Attributes:
        warps: that share a tile, each a part of its inputs; a power of two.
        piece_runs: runs that a warp fetches at once.
    """

    warps: int
    piece_runs: int


def split(layout: MatrixLayout, blocks: int) -> Split:
    """The split whose busiest warp has the least to read; of equal ones that with the largest pieces, then the fewest sums."""
    tiles = -(-layout.tiles // blocks)

    def cost(candidate: Split) -> tuple[int, int, int]:
        pieces = layout.tile_runs // candidate.piece_runs
        rounds = -(-tiles // (WARPS // candidate.warps))
        return rounds * -(-pieces // candidate.warps) * candidate.piece_runs, -candidate.piece_runs, candidate.warps

    fitting = [
        Split(warps, runs)
        for runs in ((1, 2) if layout.integer else (1,))
        if layout.tile_runs % runs == 0
        for warps in (1, 2, 4, 8, 16)
        if warps <= layout.tile_runs // runs
    ]
    return min(fitting, key=cost)


@dataclass(frozen=True)
class StepPlan:
    """The step kernel for one model on one device.

    Attributes:
        device: the device.
        blocks: thread blocks, one a multiprocessor.
        constants: what step.cu is compiled with.
        shared_bytes: dynamic shared memory of a block.
        layer_bytes: from the weights of one layer to those of the next.
        bases: where each product's weights begin in a layer.
        packets: 8-byte packets of the mail, both sides.
        slice: columns of a head's state that a block takes at once.
        slots: pieces that a warp's ring holds.
    """

    device: DeviceLimits
    blocks: int
    constants: Mapping[str, str]
    shared_bytes: int
    layer_bytes: int
    bases: tuple[int, ...]
    packets: int
    slice: int
    slots: int


def too_old(device: DeviceLimits) -> str | None:
    """Why the kernels cannot run on a device, whatever the model, or None."""
    if device.capability >= OLDEST:
        return None
    major, minor = device.capability
    return f"the backend 'cuda' needs compute capability {OLDEST[0]}.{OLDEST[1]} or later, this GPU has {major}.{minor}"


def unsupported(config: ModelConfig) -> str | None:
    """Why the kernel cannot run a model, or None."""
    for name in ("hidden_size", "ffn_size"):
        if getattr(config, name) % 2:
            return f"{name} is {getattr(config, name)}, an odd number"
    return None


def plan_step(
    config: ModelConfig,
    compute: str,
    layouts: Mapping[str, MatrixLayout],
    embedding: MatrixLayout,
    layer_vectors: Vectors,
    model_vectors: Vectors,
    device: DeviceLimits,
) -> StepPlan:
    """Deal the work and write the constants.

    Args:
        config: the architecture.
        compute: "float32", "float16" or "bfloat16": of the operands of products.
        layouts: of the five products, by `PRODUCTS`.
        embedding: of the embedding.
        layer_vectors: of a layer's vectors.
        model_vectors: of the model's.
        device: where it is to run.

    Raises:
        UserError: the device has too little shared memory, or is too old.
    """
    if (reason := too_old(device)) is not None:
        raise UserError(reason)
    blocks = min(device.multiprocessors, layouts["projections"].tiles)
    splits = {name: split(layouts[name], blocks) for name in PRODUCTS}
    bases, end = [], 0
    for name in PRODUCTS[:4]:
        bases.append(end)
        end += -(-layouts[name].bytes // 256) * 256
    stage = max(_piece_bytes(layouts[name], splits[name]) for name in PRODUCTS)
    parts = max(_parts(layouts[name], splits[name], blocks) for name in PRODUCTS)
    columns = _slice(config, blocks)
    x_bytes = max(layout.padded_columns for layout in layouts.values()) * (4 if compute == "float32" else 2)
    fixed = x_bytes + _shared_struct_bytes(config, parts, columns)
    slots = min((device.shared_bytes - fixed) // (WARPS * stage), MOST_SLOTS)
    choosing = -(-layouts["head"].tiles // 4) * 16 + 8 * CANDIDATES
    if slots < FEWEST_SLOTS or choosing > WARPS * slots * stage:
        needed = fixed + max(FEWEST_SLOTS * WARPS * stage, choosing)
        raise UserError(
            f"the backend 'cuda' needs {needed:,} bytes of shared memory a block for this model, "
            f"the GPU has {device.shared_bytes:,}"
        )
    constants = {
        **_model_constants(config, compute),
        **{f"P{index}": _product_constants(layouts[name], splits[name]) for index, name in enumerate(PRODUCTS)},
        **{f"BASE{index}": base for index, base in enumerate(bases)},
        **_vector_constants(layer_vectors, model_vectors),
        "EMBEDDING_KIND": KINDS[embedding.kind],
        "EMBEDDING_GRAIN": embedding.granularity,
        "EMBEDDING_SCALE": KINDS[embedding.scale],
        "GRID": blocks,
        "SLOTS": slots,
        "STAGE": stage,
        "PARTS": parts,
        "SLICE": columns,
        "X_BYTES": x_bytes,
        "LAYER_BYTES": f"{end}ull",
    }
    return StepPlan(
        device,
        blocks,
        {name: str(value) for name, value in constants.items()},
        WARPS * slots * stage + fixed,
        end,
        tuple(bases),
        2 * _mail_packets(config, layouts, columns),
        columns,
        slots,
    )


def _piece_bytes(layout: MatrixLayout, split: Split) -> int:
    return layout.run_bytes * split.piece_runs


def _parts(layout: MatrixLayout, split: Split, blocks: int) -> int:
    """Partial sums of one pass: of all tiles of a block if they fit, else as many as do."""
    abreast = WARPS // split.warps
    rounds = -(-layout.tiles // blocks // abreast)
    return int(min(max(rounds, 1) * abreast * split.warps, MOST_PARTS)) if rounds else WARPS


def _slice(config: ModelConfig, blocks: int) -> int:
    """Columns of a head's state that a block takes at once: whole float4s, so that the busiest block has the fewest."""
    vector = 4 if config.head_value_dim % 4 == 0 else 2 if config.head_value_dim % 2 == 0 else 1

    def cost(columns: int) -> tuple[int, int]:
        units = config.num_heads * -(-config.head_value_dim // columns)
        return -(-units // blocks) * columns, -columns

    return min((columns for columns in (32, 16, 8) if columns >= vector), key=cost)


def _shared_struct_bytes(config: ModelConfig, parts: int, columns: int) -> int:
    """Of `Shared` in step.cu."""
    plans = 5 * WARPS * 32
    floats = (
        2 * parts * 16 + 2 * config.head_key_dim + (2 + WARPS) * columns + config.head_key_dim + 2 * WARPS + 2 * config.num_heads
    )
    return -(-(plans + 4 * (floats + 2)) // 16) * 16


def _mail_packets(config: ModelConfig, layouts: Mapping[str, MatrixLayout], columns: int) -> int:
    """At least what step.cu needs of one side."""
    units = config.num_heads * -(-config.head_value_dim // columns)
    counts = (layouts["projections"].rows, config.value_size, 2 * units, config.hidden_size, config.ffn_size, config.hidden_size)
    return sum(-(-count // 2) * 2 for count in counts)


def _product_constants(layout: MatrixLayout, split: Split) -> str:
    return ", ".join(
        str(int(value))
        for value in (
            KINDS[layout.kind],
            layout.rows,
            layout.columns,
            layout.granularity,
            KINDS[layout.scale],
            split.warps,
            split.piece_runs,
            layout.interleaved,
        )
    )


def _model_constants(config: ModelConfig, compute: str) -> dict[str, object]:
    norms = {"none": 0, "rms": 1, "layer": 2}
    return {
        "COMPUTE": KINDS[compute],
        "D": config.hidden_size,
        "V": config.vocab_size,
        "L": config.num_layers,
        "H": config.num_heads,
        "KV": config.num_kv_heads,
        "DK": config.head_key_dim,
        "DV": config.head_value_dim,
        "F": config.ffn_size,
        "NORM_KIND": norms[config.norm],
        "NORM_EPS": _float(config.norm_eps),
        "HEAD_NORM": norms[config.head_norm],
        "HEAD_AFFINE": {"none": 0, "shared": 1, "per_head": 2}[config.head_norm_affine],
        "HEAD_EPS": _float(config.head_norm_eps / config.score_scale**2),
        "SCORE_NORM": int(config.score_norm),
        "OUTPUT_GATE": int(config.output_gate),
        "ACTIVATION": {"silu": 0, "gelu": 1, "relu": 2}[config.ffn_activation],
        "INNER_NORM": norms[config.ffn_inner_norm],
        "POST_NORM": int(config.post_norm),
        "RESIDUAL_SCALE": _float(config.residual_scale),
        "EMBEDDING_SCALING": _float(config.embedding_scale),
        "EMBEDDING_NORM": int(config.embedding_norm),
        "FINAL_NORM": int(config.final_norm),
    }


LAYER_VECTORS: Mapping[str, str] = {
    "RETENTION_NORM_W": "retention_norm.weight",
    "RETENTION_NORM_B": "retention_norm.bias",
    "HEAD_NORM_W": "retention.head_norm.weight",
    "HEAD_NORM_B": "retention.head_norm.bias",
    "FFN_NORM_W": "ffn_norm.weight",
    "FFN_NORM_B": "ffn_norm.bias",
    "INNER_NORM_W": "ffn.inner_norm.weight",
    "INNER_NORM_B": "ffn.inner_norm.bias",
    "BIAS0": "projections.bias",
    "BIAS1": "out.bias",
    "BIAS2": "up.bias",
    "BIAS3": "down.bias",
    "SCALES0": "projections.scales",
    "SCALES1": "out.scales",
    "SCALES2": "up.scales",
    "SCALES3": "down.scales",
}
MODEL_VECTORS: Mapping[str, str] = {
    "EMBEDDING_NORM_W": "embedding_norm.weight",
    "EMBEDDING_NORM_B": "embedding_norm.bias",
    "FINAL_NORM_W": "norm.weight",
    "FINAL_NORM_B": "norm.bias",
    "SCALES4": "head.scales",
    "GAMMA": "gamma",
    "LOG_GAMMA": "log_gamma",
    "EPS_PER_HEAD": "eps_per_head",
}


def _vector_constants(layer: Vectors, model: Vectors) -> dict[str, object]:
    return {
        "VECTORS": layer.size,
        "MODEL_VECTORS": model.size,
        **{constant: layer[name] for constant, name in LAYER_VECTORS.items()},
        **{constant: model[name] for constant, name in MODEL_VECTORS.items()},
    }


def _float(value: float) -> str:
    return f"{value:.9e}f"


def state_and_scratch_bytes(plan: StepPlan, config: ModelConfig) -> int:
    """Device memory of one sequence beside the weights: state, packets, logits."""
    return 4 * config.state_elements + 8 * plan.packets + 4 * config.vocab_size * 2 + 4096


def weight_bytes(layout: MatrixLayout) -> int:
    """Bytes that a step reads of a matrix."""
    return layout.rows * layout.columns * BITS[layout.kind] // 8
