// What is done to rows of activations between products: embedding and angles, residual sums and norms, head norms and gates.
//
// The residual stream and every sum are float32; a row is rounded once, where it becomes an operand of a product.
#pragma once
#include "common.cuh"

constexpr int ROW_THREADS = 256, PER_THREAD = (D + ROW_THREADS - 1) / ROW_THREADS;

__device__ __forceinline__ float block_sum(float v) {
  __shared__ float sums[ROW_THREADS / 32];
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.f;
#pragma unroll
  for (int w = 0; w < ROW_THREADS / 32; ++w) v += sums[w];
  return v;
}

// The norm of the residual stream over values of one row, spread over the block: element i · ROW_THREADS + thread.
template <int N, int PER>
__device__ __forceinline__ void norm_row(float (&v)[PER], const float* weight, const float* bias, float eps) {
  const int t = threadIdx.x;
  if (NORM_LAYER) {
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < PER; ++i) s += v[i];
    const float mean = block_sum(s) / N;
#pragma unroll
    for (int i = 0; i < PER; ++i) v[i] = i * ROW_THREADS + t < N ? v[i] - mean : 0.f;
  }
  float s = 0.f;
#pragma unroll
  for (int i = 0; i < PER; ++i) s += v[i] * v[i];
  const float r = rsqrtf(block_sum(s) / N + eps);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int d = i * ROW_THREADS + t;
    if (d < N) v[i] = v[i] * r * weight[d] + (NORM_LAYER ? bias[d] : 0.f);
  }
}

// One weight of a matrix that lies on the device as layout.py says.
template <int FORMAT, int GRAIN, int SCALE>
__device__ __forceinline__ float weight_at(const u8* w, const float* row_scales, int runs, int row, int k) {
  if (FORMAT <= BF16) {
    constexpr int BYTES = FORMAT == F32 ? 4 : 2, RUN = 128 / BYTES;
    const int byte = k % RUN * BYTES, half = row / 8 % 2, g = row % 8;
    const u8* at = w + ((i64)(row / 16) * runs + k / RUN) * 2048 + half * 1024 + byte / 64 * 512 + g * 64 + byte % 64;
    return FORMAT == F32 ? *(const float*)at : FORMAT == F16 ? float_of(*(const Half*)at) : float_of(*(const Brain*)at);
  }
  constexpr int RUN = FORMAT == I4 ? 128 : 64, SB = SCALE == F32 ? 4 : 2, GROUPS = GRAIN ? RUN / (GRAIN ? GRAIN : 1) : 0;
  const int half = row / 8 % 2, g = row % 8, within = k % RUN, e = (k / 16 % 2) * 4 + k % 4;
  const u8* run = w + ((i64)(row / 16) * runs + k / RUN) * (1024 + GROUPS * 16 * SB);
  const u8* mine = run + half * 512 + g * 64 + (k / 4 % 4) * 16;
  float v;
  if (FORMAT == I8) v = (float)mine[within / 32 * 8 + e] - 128.f;
  else v = (float)(((const u32*)mine)[within / 32] >> (4 * (e / 2 + (e & 1) * 4)) & 15) - 8.f;
  if (GRAIN == 0) return v * row_scales[row];
  const u8* s = run + 1024 + ((within / (GRAIN ? GRAIN : 1) * 8 + g) * 2 + half) * SB;
  return v * (SCALE == F32 ? *(const float*)s : SCALE == F16 ? float_of(*(const Half*)s) : float_of(*(const Brain*)s));
}

struct Embed {
  const u8* table;
  const float* row_scales;
  const float *norm_weight, *norm_bias;  // of the norm after the embedding
  const u32* phase_per_token;            // (DK / 2), parts of 2^32 of a turn
  const i64* tokens;                     // (M)
  const Slots* slots;
  const int *slot_of, *index_of;         // (M): whose token a row is, and which of those it brings
  float* x;                              // (M, D)
  float* angles;                         // (M, 2, DK / 2): cos, sin
  int runs;
};
// One block a token: its row of the embedding, and the angle of each rotary pair at its position.
template <int FORMAT, int GRAIN, int SCALE>
__device__ __forceinline__ void embed_of(const Embed& p) {
  const int m = blockIdx.x, t = threadIdx.x;
  release_next();
  await_previous();
  i64 token = p.tokens[m];
  if (token < 0 || token >= V) token = 0;  // padding may hold anything
  float v[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int d = i * ROW_THREADS + t;
    v[i] = d < D ? weight_at<FORMAT, GRAIN, SCALE>(p.table, p.row_scales, p.runs, (int)token, d) * EMBEDDING_SCALE : 0.f;
  }
  if (EMBEDDING_NORM) norm_row<D>(v, p.norm_weight, p.norm_bias, NORM_EPS);
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i)
    if (i * ROW_THREADS + t < D) p.x[(i64)m * D + i * ROW_THREADS + t] = v[i];
  const u64 position = (u64)(p.slots->positions[p.slot_of[m]] + p.index_of[m]);
  for (int pair = t; pair < HALF; pair += ROW_THREADS) {
    const u32 phase = (u32)(position * p.phase_per_token[pair]);  // modulo a full turn, 2^32
    float sine, cosine;
    sincosf((float)phase * (float)(6.283185307179586 / 4294967296.0), &sine, &cosine);
    p.angles[(i64)m * 2 * HALF + pair] = cosine;
    p.angles[(i64)m * 2 * HALF + HALF + pair] = sine;
  }
}
#define EMBED(NAME, FORMAT, GRAIN, SCALE) \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS) NAME(const __grid_constant__ Embed p) { embed_of<FORMAT, GRAIN, SCALE>(p); }

struct Norm {
  float* x;             // (M, D), the residual stream; written if `keep`
  const float* added;   // (parts, M, D), what the block in front gave
  const float *weight, *bias;
  void* out;            // operands, a row every `stride`
  const int* rows;      // the rows wanted, one a block, or null: all
  int parts, total, stride, normed, keep, placed;
};
// One block a row: x = α·x + what was added, then its norm as an operand; after the sum instead (DeepNorm), if POST_NORM, and then
// the norm is the residual stream. `normed` 0 leaves the norm out.
template <int OUT>
__device__ __forceinline__ void norm_of(const Norm& p) {
  const int t = threadIdx.x;
  release_next();
  await_previous();
  const i64 row = p.rows ? p.rows[blockIdx.x] : blockIdx.x;
  float v[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int d = i * ROW_THREADS + t;
    v[i] = d < D ? p.x[row * D + d] : 0.f;
    if (p.parts && RESIDUAL_SCALE != 1.0f) v[i] *= RESIDUAL_SCALE;
  }
  for (int part = 0; part < p.parts; part += 4) {  // four parts' loads in flight
    float a[4][PER_THREAD];
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) {
        const int d = i * ROW_THREADS + t;
        a[q][i] = part + q < p.parts && d < D ? p.added[((i64)(part + q) * p.total + row) * D + d] : 0.f;
      }
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) v[i] += a[q][i];
  }
  if (p.keep && !(POST_NORM && p.normed)) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
      if (i * ROW_THREADS + t < D) p.x[row * D + i * ROW_THREADS + t] = v[i];
  }
  if (p.normed) norm_row<D>(v, p.weight, p.bias, NORM_EPS);
  if (p.keep && POST_NORM && p.normed) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
      if (i * ROW_THREADS + t < D) p.x[row * D + i * ROW_THREADS + t] = v[i];
  }
  typename Operand<OUT>::type* out = (typename Operand<OUT>::type*)p.out + (i64)blockIdx.x * p.stride;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int d = i * ROW_THREADS + t;
    if (d < D) out[p.placed ? placed_at(d) : d] = Operand<OUT>::from(v[i]);
  }
}
#define NORM(NAME, OUT) \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS) NAME(const __grid_constant__ Norm p) { norm_of<OUT>(p); }

struct Inner {
  const float* hidden;  // (M, F)
  const float *weight, *bias;
  void* out;
  int stride, placed;
};
// One block a row: the norm inside the feed-forward (sub-LN).
template <int OUT>
__device__ __forceinline__ void inner_of(const Inner& p) {
  const int t = threadIdx.x;
  release_next();
  await_previous();
  const float* from = p.hidden + (i64)blockIdx.x * F;
  float s = 0.f;
  for (int d = t; d < F; d += ROW_THREADS) s += from[d];
  const float mean = INNER_NORM == 2 ? block_sum(s) / F : 0.f;
  s = 0.f;
  for (int d = t; d < F; d += ROW_THREADS) s += (from[d] - mean) * (from[d] - mean);
  const float r = rsqrtf(block_sum(s) / F + NORM_EPS);
  typename Operand<OUT>::type* out = (typename Operand<OUT>::type*)p.out + (i64)blockIdx.x * p.stride;
  for (int d = t; d < F; d += ROW_THREADS) {
    const float v = (from[d] - mean) * r * p.weight[d] + (INNER_NORM == 2 ? p.bias[d] : 0.f);
    out[p.placed ? placed_at(d) : d] = Operand<OUT>::from(v);
  }
}
#define INNER(NAME, OUT) \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS) NAME(const __grid_constant__ Inner p) { inner_of<OUT>(p); }

struct Heads {
  const float* o;            // (M, H, DV)
  const float* projections;  // (M, NP)
  const float *weight, *bias;
  const float* log_gamma;    // (H)
  const Slots* slots;
  const int *slot_of, *index_of;
  void* out;
  int stride, total, placed;
};
// One warp a head of a token: its norm, times the swish of the gate. The scale of q·k, and torchscale's 1/√Σγ, are in eps: norm(c·o)
// with eps is norm(o) with eps/c².
template <int OUT>
__device__ __forceinline__ void head_row(const Heads& p, int m, int h) {
  constexpr int PER = (DV + 31) / 32;
  const int lane = threadIdx.x % 32;
  const float* o = p.o + ((i64)m * H + h) * DV;
  const float* gate = p.projections + (i64)m * NP + GATE_AT + h * DV;
  float v[PER], gates[PER], s = 0.f;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const bool valid = i * 32 + lane < DV;
    v[i] = valid ? __ldcg(o + i * 32 + lane) : 0.f;
    gates[i] = GATED && valid ? gate[i * 32 + lane] : 0.f;
  }
  if (HEAD_LAYER) {
#pragma unroll
    for (int i = 0; i < PER; ++i) s += v[i];
    const float mean = warp_sum(s) / DV;
#pragma unroll
    for (int i = 0; i < PER; ++i) v[i] = i * 32 + lane < DV ? v[i] - mean : 0.f;
    s = 0.f;
  }
#pragma unroll
  for (int i = 0; i < PER; ++i) s += v[i] * v[i];
  float eps = HEAD_EPS;
  if (SCORE_NORM) {  // Σ_{m<n} γ^m = (1 - γⁿ) / (1 - γ)
    const float read = (float)(p.slots->positions[p.slot_of[m]] + p.index_of[m] + 1);
    eps *= -expm1f(read * p.log_gamma[h]) / -expm1f(p.log_gamma[h]);
  }
  const float r = rsqrtf(warp_sum(s) / DV + eps);
  typename Operand<OUT>::type* out = (typename Operand<OUT>::type*)p.out + (i64)m * p.stride;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int c = i * 32 + lane, at = h * DV + c;
    if (c >= DV) continue;
    float y = v[i] * r;
    if (HEAD_AFFINE) y = y * p.weight[HEAD_AFFINE == 2 ? at : c] + (HEAD_LAYER ? p.bias[HEAD_AFFINE == 2 ? at : c] : 0.f);
    if (GATED) y *= silu(gates[i]);
    out[p.placed ? placed_at(at) : at] = Operand<OUT>::from(y);
  }
}
template <int OUT>
__device__ __forceinline__ void heads_of(const Heads& p) {
  const int index = blockIdx.x * (ROW_THREADS / 32) + threadIdx.x / 32, m = index / H, h = index % H;
  release_next();
  await_previous();
  if (m < p.total) head_row<OUT>(p, m, h);
}
#define HEADS(NAME, OUT) \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS) NAME(const __grid_constant__ Heads p) { heads_of<OUT>(p); }

struct Rotate {
  const float* projections;  // (M, NP)
  const float* angles;       // (M, 2, DK / 2)
  float* rotated;            // (M, H + G, DK): queries, then keys
};
// One block a row: queries and keys of a prompt turned by their angles, each head's channels side by side. ROUND: to tf32, since that
// is what the tensor cores take.
template <bool ROUND>
__device__ __forceinline__ void rotate_of(const Rotate& p) {
  release_next();
  await_previous();
  const i64 m = blockIdx.x;
  const float *row = p.projections + m * NP, *angle = p.angles + m * 2 * HALF;
  float* out = p.rotated + m * (H + G) * DK;
#pragma unroll 4
  for (int i = threadIdx.x; i < (H + G) * HALF; i += ROW_THREADS) {
    const int head = i / HALF, pair = i % HALF;
    const float x = row[i], y = row[(H + G) * HALF + i], cosine = angle[pair], sine = angle[HALF + pair];
    const float first = x * cosine - y * sine, second = y * cosine + x * sine;
    out[head * DK + pair] = ROUND ? __uint_as_float(tf32(first)) : first;
    out[head * DK + HALF + pair] = ROUND ? __uint_as_float(tf32(second)) : second;
  }
}
#define ROTATE(NAME, ROUND) \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS) NAME(const __grid_constant__ Rotate p) { rotate_of<ROUND>(p); }

struct Advance {
  const Slots* slots;
  const i64* lengths;  // (slots in use)
  int count;
};
// The last kernel of a prompt; a step's is `top`, which does the same.
extern "C" __global__ void advance(const __grid_constant__ Advance p) {
  release_next();
  await_previous();
  for (int b = threadIdx.x; b < p.count; b += blockDim.x) p.slots->positions[b] += p.lengths[b];
}
