// Retention of one token a sequence, with the state written every WINDOW steps instead of at each.
//
//   o = γ^(j+1) q S + Σ_{i ≤ j} γ^(j-i) (q·k_i) v_i          S as it was j steps ago; k_i, v_i of the steps since, in a ring
//   S ← γ^(j+1) S + Σ_{i ≤ j} γ^(j-i) k_iᵀ v_i               when j = WINDOW - 1; a layer at a time, so that all steps cost alike
//
// The same sums as S_n = γ S_{n-1} + k_nᵀ v_n (equation 6) in another order; float32 throughout, γ's powers from a table that the host
// made in float64. Two kernels: one rotates q and k, fills the ring and weighs its tokens; the other streams the states.
#pragma once
#include "common.cuh"

struct RingPlace {
  int j;      // tokens in the ring before this one
  bool fold;  // whether this step folds it into the state
};
// Counters are written by the last kernel of a step, so all of the next step's may read them at any time.
__device__ __forceinline__ RingPlace ring_place(const Slots& slots, int layer) {
  const int turn = (slots.counters[0] + layer * WINDOW / LAYERS) % WINDOW, since = slots.counters[1];
  return {since < turn ? since : turn, turn == WINDOW - 1};
}

struct Ring {
  const float* projections;  // (B, NP)
  const float* angles;       // (B, 2, DK / 2)
  const float* powers;       // (H, POWERS), γ^n
  float* queries;            // (B, H, DK), rotated
  float* weights;            // (B, H, WINDOW): γ^(j-i) q·k_i
  const Slots* slots;
  int layer;
};
constexpr int RING_THREADS = 128;
extern "C" __global__ void __launch_bounds__(RING_THREADS) ring_step(const __grid_constant__ Ring p) {
  constexpr int WARPS = RING_THREADS / 32, EACH = (WINDOW + WARPS - 1) / WARPS, PER = (DK + 31) / 32;
  __shared__ float q[DK], k[DK];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, h = blockIdx.x, b = blockIdx.y, kv = h / (H / G);
  release_next();
  const Slots slots = *p.slots;
  const int j = ring_place(slots, p.layer).j;
  const i64 place = ((i64)p.layer * slots.batch + b) * G + kv;
  float *keys = slots.keys + place * WINDOW * DK, *values = slots.values + place * WINDOW * DV;
  float old[EACH][PER];  // what earlier steps wrote
#pragma unroll
  for (int n = 0; n < EACH; ++n)
#pragma unroll
    for (int i = 0; i < PER; ++i) old[n][i] = warp + n * WARPS < j && i * 32 + lane < DK ? keys[(warp + n * WARPS) * DK + i * 32 + lane] : 0.f;
  await_previous();
  const float *row = p.projections + (i64)b * NP, *angle = p.angles + (i64)b * 2 * HALF;
  const bool writes = h % (H / G) == 0;
  for (int e = tid; e < 2 * HALF; e += RING_THREADS) {
    const bool is_key = e >= HALF;
    const int pair = is_key ? e - HALF : e, at = (is_key ? H + kv : h) * HALF + pair;
    const float x = row[at], y = row[(H + G) * HALF + at], cosine = angle[pair], sine = angle[HALF + pair];
    const float first = x * cosine - y * sine, second = y * cosine + x * sine;
    float* to = is_key ? k : q;
    to[pair] = first, to[HALF + pair] = second;
    float* out = is_key ? keys + j * DK : p.queries + ((i64)b * H + h) * DK;
    if (!is_key || writes) out[pair] = first, out[HALF + pair] = second;
  }
  if (writes)
    for (int c = tid; c < DV; c += RING_THREADS) values[j * DV + c] = row[VALUE_AT + kv * DV + c];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int i = warp + n * WARPS;
    if (i > j) break;
    float dot = 0.f;
#pragma unroll
    for (int c = 0; c < PER; ++c)
      if (c * 32 + lane < DK) dot += q[c * 32 + lane] * (i == j ? k[c * 32 + lane] : old[n][c]);
    dot = warp_sum(dot);
    if (lane == 0) p.weights[((i64)b * H + h) * WINDOW + i] = p.powers[h * POWERS + j - i] * dot;
  }
}

struct RetentionStep {
  const Slots* slots;
  const float* powers;   // (H, POWERS)
  const float* queries;  // (B, H, DK)
  const float* weights;  // (B, H, WINDOW)
  float* o;              // (B, H, DV)
  int layer, count;      // slots in use
};

// A unit of work is COLUMNS columns of one head of one slot. A block takes units in turn, and has the next one's state on the way
// while it works on one. Each thread fetches just the elements that it uses.
template <int COLUMNS, bool FOLD>
struct StepShared {
  static constexpr int VECTOR = DV % 4 ? 1 : 4, THREADS = 256, ACROSS = COLUMNS / VECTOR, GROUPS = THREADS / ACROSS;
  static constexpr int ROWS = ((DK + GROUPS - 1) / GROUPS + 3) / 4 * 4, STATE = ROWS * GROUPS * COLUMNS, QUERY = ROWS * GROUPS;
  static constexpr int STAGE = STATE + QUERY + WINDOW + WINDOW * COLUMNS;  // floats
};
template <int COLUMNS, bool FOLD>
__device__ __forceinline__ void retention_step_of(const RetentionStep& p) {
  typedef StepShared<COLUMNS, FOLD> L;
  constexpr int VECTOR = L::VECTOR, THREADS = L::THREADS, ACROSS = L::ACROSS, ROWS = L::ROWS;
  constexpr int BLOCKS = (DV + COLUMNS - 1) / COLUMNS;
  static_assert(ACROSS <= 32 && COLUMNS <= 32, "a row within a warp, and a warp for the columns");
  extern __shared__ __align__(128) float stages[];
  __shared__ float partial[THREADS / 32][COLUMNS];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, across = tid % ACROSS, group = tid / ACROSS;
  release_next();
  const Slots slots = *p.slots;
  const RingPlace place = ring_place(slots, p.layer);
  float* state = slots.state + p.layer * LAYER_STATE;
  const i64 rings = (i64)p.layer * slots.batch * G * WINDOW;
  const float *ring_keys = slots.keys + rings * DK, *ring_values = slots.values + rings * DV;
  const int last = FOLD ? place.j - 1 : place.j;
  if (FOLD && place.j == 0) return;
  const int units = p.count * H * BLOCKS;

  auto fetch_state = [&](int unit, float* stage) {
    const int column = unit % BLOCKS * COLUMNS + across * VECTOR;
    const int head = unit / BLOCKS;
    const float* from = state + head / H * SLOT_STATE + (i64)(head % H) * DK * DV + column;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = group * ROWS + r;
      const bool valid = column < DV && row < DK;
      copy_floats<VECTOR == 4>(stage + row * COLUMNS + across * VECTOR, valid ? from + (i64)row * DV : state, valid);
    }
  };
  auto fetch_rest = [&](int unit, float* stage) {
    const int head = unit / BLOCKS, kv = head / H * G + head % H / (H / G), c0 = unit % BLOCKS * COLUMNS;
    float *q = stage + L::STATE, *weight = q + L::QUERY, *value = weight + WINDOW;
    if (!FOLD) {
      for (int i = tid; i < L::QUERY; i += THREADS) copy_floats<false>(q + i, p.queries + (i64)head * DK + (i < DK ? i : 0), i < DK);
      for (int i = tid; i <= last; i += THREADS) copy_floats<false>(weight + i, p.weights + (i64)head * WINDOW + i, true);
    }
    for (int i = tid; i < (last + 1) * COLUMNS; i += THREADS) {
      const int c = c0 + i % COLUMNS;
      copy_floats<false>(value + i, ring_values + ((i64)kv * WINDOW + i / COLUMNS) * DV + (c < DV ? c : 0), c < DV);
    }
  };

  int unit = blockIdx.x, side = 0;
  if (unit < units) fetch_state(unit, stages);
  await_previous();
  if (unit < units) fetch_rest(unit, stages);
  commit();
  for (; unit < units; unit += gridDim.x, side ^= 1) {
    const int next = unit + gridDim.x;
    if (next < units) fetch_state(next, stages + (side ^ 1) * L::STAGE), fetch_rest(next, stages + (side ^ 1) * L::STAGE);
    commit();
    wait_copies<1>();
    __syncthreads();
    const float *S = stages + side * L::STAGE, *q = S + L::STATE, *weight = q + L::QUERY, *value = weight + WINDOW;
    const int head = unit / BLOCKS, h = head % H, c0 = unit % BLOCKS * COLUMNS;
    const float* powers = p.powers + h * POWERS;
    if (!FOLD) {
      float o[VECTOR];
#pragma unroll
      for (int x = 0; x < VECTOR; ++x) o[x] = 0.f;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int row = group * ROWS + r;
        const float qr = q[row];
        const float* s = S + row * COLUMNS + across * VECTOR;
        if (VECTOR == 4) {
          const float4 v = *(const float4*)s;
          o[0] += qr * v.x, o[VECTOR > 1 ? 1 : 0] += qr * v.y, o[VECTOR > 2 ? 2 : 0] += qr * v.z, o[VECTOR > 3 ? 3 : 0] += qr * v.w;
        } else {
          o[0] += qr * s[0];
        }
      }
#pragma unroll
      for (int offset = ACROSS; offset < 32; offset *= 2)
#pragma unroll
        for (int x = 0; x < VECTOR; ++x) o[x] += __shfl_xor_sync(~0u, o[x], offset);
      if (lane < ACROSS) {
#pragma unroll
        for (int x = 0; x < VECTOR; ++x) partial[warp][across * VECTOR + x] = o[x];
      }
      __syncthreads();
      if (tid < COLUMNS && c0 + tid < DV) {
        float sum = 0.f, read = 0.f;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) sum += partial[w][tid];
#pragma unroll
        for (int i = 0; i < WINDOW; ++i)
          if (i <= last) read += weight[i] * value[i * COLUMNS + tid];
        p.o[(i64)head * DV + c0 + tid] = powers[last + 1] * sum + read;
      }
    }
    const int column = c0 + across * VECTOR;
    if ((FOLD || place.fold) && column < DV) {
      const float* keys = ring_keys + ((i64)(head / H) * G + h / (H / G)) * WINDOW * DK;
      float* to = state + head / H * SLOT_STATE + (i64)h * DK * DV + column;
#pragma unroll 1
      for (int row = group * ROWS; row < group * ROWS + ROWS && row < DK; row += 4) {  // four rows at a time leave registers for loads
        float u[4][VECTOR];
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int x = 0; x < VECTOR; ++x) u[r][x] = powers[last + 1] * S[(row + r) * COLUMNS + across * VECTOR + x];
#pragma unroll 8
        for (int i = 0; i <= last; ++i) {
          float k[4];
          if (DK % 4 == 0) {
            const float4 four = *(const float4*)(keys + i * DK + row);
            k[0] = four.x, k[1] = four.y, k[2] = four.z, k[3] = four.w;
          } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) k[r] = row + r < DK ? keys[i * DK + row + r] : 0.f;
          }
          const float power = powers[last - i];
#pragma unroll
          for (int x = 0; x < VECTOR; ++x) {
            const float v = power * value[i * COLUMNS + across * VECTOR + x];
#pragma unroll
            for (int r = 0; r < 4; ++r) u[r][x] += k[r] * v;
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (row + r >= DK) continue;
          if (VECTOR == 4) *(float4*)(to + (i64)(row + r) * DV) = make_float4(u[r][0], u[r][VECTOR > 1 ? 1 : 0], u[r][VECTOR > 2 ? 2 : 0], u[r][VECTOR > 3 ? 3 : 0]);
          else to[(i64)(row + r) * DV] = u[r][0];
        }
      }
    }
    __syncthreads();
  }
}
extern "C" __global__ void __launch_bounds__(256, STEP_BLOCKS) retention_step(const __grid_constant__ RetentionStep p) {
  retention_step_of<STEP_COLUMNS, false>(p);
}
// The state as it is now, and empty rings: before a prompt, and before the host reads or writes a state.
extern "C" __global__ void __launch_bounds__(256, STEP_BLOCKS) retention_fold(const __grid_constant__ RetentionStep p) {
  retention_step_of<STEP_COLUMNS, true>(p);
}
