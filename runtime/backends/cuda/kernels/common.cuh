// What the kernels for batches and prompts share: sizes of the model, copies, matrix instructions, launches that overlap.
//
// Sizes and settings stand in front of this, as constants that many_source.py writes: D width, H heads, G key and value heads, DK, DV,
// F inner width, V vocabulary, WINDOW and so on.
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct Half { unsigned short bits; };    // fp16; conversions and arithmetic are written as instructions, so that no header is needed
struct Brain { unsigned short bits; };   // bfloat16

constexpr int HALF = DK / 2, E = H * DV;
constexpr int NP = 2 * (H + G) * HALF + G * DV + (GATED ? E : 0);  // outputs of the joined projections
constexpr int VALUE_AT = 2 * (H + G) * HALF, GATE_AT = VALUE_AT + G * DV;

// Where input k of a product with integers lies in its row of operands (layout.place).
__device__ __forceinline__ int placed_at(int k) { return (k & ~31) | ((k >> 2 & 3) << 3) | ((k >> 4 & 1) << 2) | (k & 3); }

// Formats of a matrix, and types of an operand.
enum { F32 = 0, F16 = 1, BF16 = 2, I8 = 3, I4 = 4 };

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, past the first-level cache; zeros where `valid` is false.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// Four floats, or one where rows are not aligned to 16 bytes; zeros where `valid` is false.
template <bool ALIGNED>
__device__ __forceinline__ void copy_floats(float* to, const float* from, bool valid) {
  if (ALIGNED) copy16(shared_address(to), from, valid);
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Where the sequences of one batch are, and what is kept of their last run. A captured run serves every batch: the host copies this
// to one address, which all kernels know, before the run.
struct Slots {
  float* state;     // (B, layers, H, DK, DV)
  i64* positions;   // (B), tokens read
  float* keys;      // (layers, B, G, WINDOW, DK), of the steps that the state does not have yet
  float* values;    // (layers, B, G, WINDOW, DV)
  int* counters;    // steps ever, steps since the rings were folded into the state
  float* logits;    // (B, V)
  int* found;       // (B), how many of the largest logits were found; -1: look at all
  int* tokens;      // (B, KEPT), the largest logits' tokens
  float* largest;   // (B, KEPT)
  float* draft_keys;    // (2, layers, B, G, DRAFTS, DK), of the tokens of the last pass that the state did not take; or null
  float* draft_values;  // (2, layers, B, G, DRAFTS, DV)
  int batch;            // B
  int side;             // which of the two is read; the other one is written
};
constexpr i64 LAYER_STATE = (i64)H * DK * DV, SLOT_STATE = LAYERS * LAYER_STATE;

// Programmatic dependent launch, on GPUs that have it. Every kernel calls `release_next` first. The next kernel may start when all
// blocks of this one have started; it then fetches what no running kernel writes: weights, and the state and rings of earlier steps.
// `await_previous` returns when the kernel in front has finished. That one waited too, so all kernels before it have finished. Every
// kernel must call it, and reads and writes everything else after it.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// c (16, 8) += a (16, k) b (k, 8), accumulated in float32; k is 16 for 16-bit operands and 8 for tf32.
__device__ __forceinline__ void mma_f16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_tf32(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 tf32(float x) {
  u32 r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// One float32 product on the tensor cores. EXACT: each operand is the sum of two tf32 numbers, and three of the four products are
// added; what is left out is 2^-22 of the product, so the result is as good as float32's.
template <bool EXACT>
__device__ __forceinline__ void mma_f32(float* c, float a0, float a1, float a2, float a3, float b0, float b1) {
  u32 A0 = tf32(a0), A1 = tf32(a1), A2 = tf32(a2), A3 = tf32(a3), B0 = tf32(b0), B1 = tf32(b1);
  if (EXACT) {
    u32 r0 = tf32(a0 - __uint_as_float(A0)), r1 = tf32(a1 - __uint_as_float(A1)), r2 = tf32(a2 - __uint_as_float(A2)),
        r3 = tf32(a3 - __uint_as_float(A3)), s0 = tf32(b0 - __uint_as_float(B0)), s1 = tf32(b1 - __uint_as_float(B1));
    mma_tf32(c, r0, r1, r2, r3, B0, B1);
    mma_tf32(c, A0, A1, A2, A3, s0, s1);
  }
  mma_tf32(c, A0, A1, A2, A3, B0, B1);
}

// An operand of the matrix products from float32: one rounding, and never infinite in fp16.
template <int TYPE>
struct Operand;
template <>
struct Operand<F32> {
  typedef float type;
  static __device__ __forceinline__ float from(float x) { return x; }
};
template <>
struct Operand<F16> {
  typedef Half type;
  static __device__ __forceinline__ Half from(float x) {
    Half r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x));
    return r;
  }
};
template <>
struct Operand<BF16> {
  typedef Brain type;
  static __device__ __forceinline__ Brain from(float x) {
    Brain r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
  }
};
__device__ __forceinline__ float float_of(float x) { return x; }
__device__ __forceinline__ float float_of(Half x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
__device__ __forceinline__ float float_of(Brain x) { return __uint_as_float((u32)x.bits << 16); }

// Pairs of fp16 numbers in one register.
__device__ __forceinline__ u32 pair_of(float x) {
  const u32 h = Operand<F16>::from(x).bits;
  return h | h << 16;
}
__device__ __forceinline__ u32 sub_pairs(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 mul_pairs(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 fma_pairs(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// The feed-forward's nonlinearity: ACTIVATION 0 silu, 1 gelu (exact), 2 relu.
__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }
__device__ __forceinline__ float activate(float x) {
  return ACTIVATION == 0 ? silu(x) : ACTIVATION == 1 ? 0.5f * x * (1.f + erff(x * 0.70710678118654752f)) : x > 0.f ? x : x * 0.f;
}
