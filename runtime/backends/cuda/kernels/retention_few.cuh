// Retention of a few tokens a sequence, in float32: a pass over a draft, or a short prompt. A block has COLUMNS columns of one head's
// state in shared memory, reads them once for all tokens, and writes them once:
//
//   o_t = γ^(t+1) q_t S + Σ_{m ≤ t} γ^(t-m) (q_t·k_m) v_m        for each token t that has a row
//   S ← γⁿ S + Σ_{m < n} γ^(n-1-m) k_mᵀ v_m                      n = `length`: later tokens are drafts and leave no trace
//
// Keys and values of drafts are kept. If the next pass begins with some of these tokens, they were right: then they have no row, and
// enter the state from what was kept. There are two sides, one that is read and one that is written.
//
// The same sums as S_t = γ S_{t-1} + k_tᵀ v_t (equation 6) in another order. The block rotates its head's q and k itself. The state does
// not depend on the kernel in front, so it is fetched before waiting for it. A warp takes every eighth token: a lane is a column of
// the state while q_t meets S, and an earlier token while q_t meets the keys, so no sum crosses threads.
#pragma once
#include "common.cuh"

struct RetentionFew {
  const float* projections;  // (M, NP)
  const float* angles;       // (M, 2, DK / 2)
  const float* powers;       // (H, POWERS)
  const Slots* slots;
  float* o;                  // (M, H, DV)
  const i64* lengths;        // (B), tokens that the state takes
  const int* needed;         // (B), rows of a sequence
  const int* starts;         // (B), its first row
  const int* kept;           // (B), tokens in front of its rows, drafts of the last pass; with the rows at least `length`, at most TOKENS
  int layer;
};

constexpr int FEW_THREADS = 256, FEW_WARPS = FEW_THREADS / 32;
template <int TOKENS, int COLUMNS>
struct FewShared {
  static constexpr int ROWS = (DK + 3) / 4 * 4;                  // of the state, and floats of a query; zeros from DK on
  static constexpr int KEY = ROWS / 4 % 2 ? ROWS : ROWS + 4;     // floats of a key: 16 bytes of eight keys are in different banks
  static constexpr int STATE = ROWS * COLUMNS, QUERIES = TOKENS * ROWS, KEYS = TOKENS * KEY;
  static_assert(TOKENS <= 32 && COLUMNS <= 32, "a lane a token, a lane a column");
};

// Outputs of rows first, first + FEW_WARPS, ... (N of them, as far as there are so many), by a warp; row j is token kept + j. `out` is
// where the first one goes, and `columns` of its columns exist.
template <int TOKENS, int COLUMNS, int N>
__device__ __forceinline__ void few_outputs(const float* S, const float* q, const float* k, const float* v, const float* powers, int first,
                                            int needed, int kept, float* out, int columns) {
  typedef FewShared<TOKENS, COLUMNS> L;
  const int lane = threadIdx.x % 32;
  const bool is_column = lane < COLUMNS, is_token = lane < kept + needed;
  float sum[N], score[N];
  const float* query[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int row = first + i * FEW_WARPS;
    sum[i] = score[i] = 0.f, query[i] = q + (row < needed ? row : first) * L::ROWS;
  }
#pragma unroll 4
  for (int d = 0; d < L::ROWS; d += 4) {
    float s[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) s[x] = is_column ? S[(d + x) * COLUMNS + lane] : 0.f;
    const float4 key = is_token ? *(const float4*)(k + lane * L::KEY + d) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float4 u = *(const float4*)(query[i] + d);
      sum[i] += u.x * s[0], sum[i] += u.y * s[1], sum[i] += u.z * s[2], sum[i] += u.w * s[3];
      score[i] += u.x * key.x, score[i] += u.y * key.y, score[i] += u.z * key.z, score[i] += u.w * key.w;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int row = first + i * FEW_WARPS, token = kept + row;
    if (row >= needed) break;
    sum[i] *= powers[token + 1];
    score[i] *= lane <= token ? powers[token - lane] : 0.f;
    for (int m = 0; m <= token; ++m) sum[i] += __shfl_sync(~0u, score[i], m) * v[m * COLUMNS + lane % COLUMNS];
    if (is_column && lane < columns) out[(i64)i * FEW_WARPS * H * DV + lane] = sum[i];
  }
}

template <int TOKENS, int COLUMNS>
__device__ __forceinline__ void retention_few_of(const RetentionFew& p) {
  typedef FewShared<TOKENS, COLUMNS> L;
  constexpr int VECTOR = DV % 4 ? 1 : 4, ACROSS = COLUMNS / VECTOR, GROUPS = FEW_THREADS / ACROSS, AT_ONCE = 8;
  extern __shared__ __align__(128) float shared[];
  __shared__ float powers[TOKENS + 1];
  float *S = shared, *q = S + L::STATE, *k = q + L::QUERIES, *v = k + L::KEYS;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int h = blockIdx.y, b = blockIdx.z, kv = h / (H / G), c0 = blockIdx.x * COLUMNS;
  release_next();
  float* state = p.slots->state + b * SLOT_STATE + p.layer * LAYER_STATE + (i64)h * DK * DV;
#pragma unroll 4
  for (int i = tid; i < L::ROWS * ACROSS; i += FEW_THREADS) {
    const int d = i / ACROSS, c = i % ACROSS * VECTOR;
    const bool valid = d < DK && c0 + c < DV;
    copy_floats<VECTOR == 4>(S + d * COLUMNS + c, valid ? state + (i64)d * DV + c0 + c : state, valid);
  }
  commit();
  if (tid <= TOKENS) powers[tid] = p.powers[h * POWERS + tid];
  if (L::ROWS != DK)
    for (int j = tid; j < TOKENS; j += FEW_THREADS)
      for (int d = DK; d < L::ROWS; ++d) q[j * L::ROWS + d] = k[j * L::KEY + d] = 0.f;
  await_previous();
  const int length = (int)p.lengths[b], needed = p.needed[b], kept = p.kept[b], tokens = kept + needed;
  const i64 first_row = p.starts[b];
  const Slots slots = *p.slots;
  const i64 place = ((i64)p.layer * slots.batch + b) * G + kv, sides = (i64)LAYERS * slots.batch * G;
  const i64 read = slots.side * sides + place, written = (slots.side ^ 1) * sides + place;  // of drafts, DRAFTS each
#pragma unroll 4
  for (int i = tid; i < needed * 2 * HALF; i += FEW_THREADS) {
    const int j = i / (2 * HALF), e = i % (2 * HALF);
    const bool is_key = e >= HALF;
    const int pair = is_key ? e - HALF : e, at = (is_key ? H + kv : h) * HALF + pair;
    const float *row = p.projections + (first_row + j) * NP, *angle = p.angles + (first_row + j) * 2 * HALF;
    const float x = row[at], y = row[(H + G) * HALF + at], cosine = angle[pair], sine = angle[HALF + pair];
    float* to = is_key ? k + (kept + j) * L::KEY : q + j * L::ROWS;
    to[pair] = x * cosine - y * sine, to[HALF + pair] = y * cosine + x * sine;
  }
  for (int i = tid; i < kept * DK; i += FEW_THREADS) k[i / DK * L::KEY + i % DK] = slots.draft_keys[read * DRAFTS * DK + i];
  for (int i = tid; i < tokens * COLUMNS; i += FEW_THREADS) {
    const int j = i / COLUMNS, c = i % COLUMNS;
    if (c0 + c >= DV) v[i] = 0.f;
    else if (j < kept) v[i] = slots.draft_values[(read * DRAFTS + j) * DV + c0 + c];
    else v[i] = p.projections[(first_row + j - kept) * NP + VALUE_AT + kv * DV + c0 + c];
  }
  wait_copies<0>();
  __syncthreads();

  const int drafts = slots.draft_keys == nullptr ? 0 : tokens - length < DRAFTS ? tokens - length : DRAFTS;
  if (h % (H / G) == 0) {
    if (blockIdx.x == 0)
      for (int i = tid; i < drafts * DK; i += FEW_THREADS) slots.draft_keys[written * DRAFTS * DK + i] = k[(length + i / DK) * L::KEY + i % DK];
    for (int i = tid; i < drafts * COLUMNS; i += FEW_THREADS)
      if (c0 + i % COLUMNS < DV) slots.draft_values[(written * DRAFTS + i / COLUMNS) * DV + c0 + i % COLUMNS] = v[length * COLUMNS + i];
  }

  for (int first = warp; first < needed; first += 4 * FEW_WARPS) {
    const int left = (needed - first + FEW_WARPS - 1) / FEW_WARPS;
    float* out = p.o + ((first_row + first) * H + h) * DV + c0;
    if (left == 1) few_outputs<TOKENS, COLUMNS, 1>(S, q, k, v, powers, first, needed, kept, out, DV - c0);
    else if (left == 2) few_outputs<TOKENS, COLUMNS, 2>(S, q, k, v, powers, first, needed, kept, out, DV - c0);
    else few_outputs<TOKENS, COLUMNS, 4>(S, q, k, v, powers, first, needed, kept, out, DV - c0);
  }

  const int across = tid % ACROSS * VECTOR, group = tid / ACROSS;
  if (length == 0 || c0 + across >= DV) return;
  for (int first = group; first < DK; first += AT_ONCE * GROUPS) {
    float u[AT_ONCE][VECTOR];
    int row[AT_ONCE];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
      row[r] = first + r * GROUPS < DK ? first + r * GROUPS : first;
#pragma unroll
      for (int x = 0; x < VECTOR; ++x) u[r][x] = powers[length] * S[row[r] * COLUMNS + across + x];
    }
#pragma unroll 2
    for (int m = 0; m < length; ++m) {
      float value[VECTOR];
#pragma unroll
      for (int x = 0; x < VECTOR; ++x) value[x] = powers[length - 1 - m] * v[m * COLUMNS + across + x];
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) {
        const float key = k[m * L::KEY + row[r]];
#pragma unroll
        for (int x = 0; x < VECTOR; ++x) u[r][x] += key * value[x];
      }
    }
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
      if (first + r * GROUPS >= DK) break;
      float* to = state + (i64)row[r] * DV + c0 + across;
      if (VECTOR == 4) *(float4*)to = make_float4(u[r][0], u[r][VECTOR > 1 ? 1 : 0], u[r][VECTOR > 2 ? 2 : 0], u[r][VECTOR > 3 ? 3 : 0]);
      else to[0] = u[r][0];
    }
  }
}
#define RETENTION_FEW(NAME, TOKENS, COLUMNS) \
  extern "C" __global__ void __launch_bounds__(FEW_THREADS) NAME(const __grid_constant__ RetentionFew p) { retention_few_of<TOKENS, COLUMNS>(p); }
