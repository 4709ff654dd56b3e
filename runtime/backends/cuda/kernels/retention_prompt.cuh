// Retention of many tokens a sequence, chunkwise (equation 7), on tensor cores: a block has COLUMNS columns of one head's state in
// shared memory, and takes SPAN tokens at a time:
//
//   P = Q Kᵀ ⊙ D        O = P V + (Q ⊙ ξ) S        S ← γⁿ S + (K ⊙ ζ)ᵀ V        n = SPAN, or what is left of `length`
//
// D_jm = γ^(j-m) for j ≥ m, else 0;  ξ_j = γ^(j+1);  ζ_m = γ^(n-1-m) for m < n, else 0. Sums are float32. EXACT: operands are split
// in two tf32 parts, as good as float32 (float32 models). Otherwise q, k, v, P and the S that is read are rounded to tf32, whose ten
// bits are what fp16 projections have anyway; S itself is never rounded: its old value is the float32 accumulator that the update
// adds to.
//
// A token beyond `length` (a draft, or padding before a row that is wanted) sees all tokens before it, and leaves no trace: the state
// after `length` tokens is written. Tokens that are not needed are not read.
#pragma once
#include "common.cuh"

struct RetentionPrompt {
  const float* rotated;      // (M, H + G, DK), queries and keys, rounded to tf32 unless EXACT
  const float* projections;  // (M, NP)
  const float* powers;       // (H, POWERS)
  const Slots* slots;
  float* o;                  // (M, H, DV)
  const i64* lengths;        // (B), tokens that the state takes
  const int* needed;         // (B), rows of a sequence: at least `length`
  const int* starts;         // (B), its first row
  int layer;
};

template <int SPAN, int COLUMNS, int BUFFERS>
struct PromptShared {
  static constexpr int K_ROWS = (DK + 15) / 16 * 16;
  static constexpr int ROW = K_ROWS + (40 - K_ROWS % 32) % 32;     // ≡ 8 modulo 32: pairs at (row g, column 2t) are in different banks
  static constexpr int P_ROW = SPAN + (40 - SPAN % 32) % 32;
  static constexpr int WIDE = COLUMNS + (36 - COLUMNS % 32) % 32;  // ≡ 4: (row 2t, column g) are
  static constexpr int TOKENS = 2 * SPAN * ROW + SPAN * WIDE;      // q, k, v of a span
};

// One product of a warp, an operand pair of adjacent inputs a thread. A or B READY: already rounded to tf32, so nothing is left to do.
template <bool EXACT, bool A_READY, bool B_READY>
__device__ __forceinline__ void mma_pairs(float* c, float2 top, float2 bottom, float b0, float b1) {
  if (EXACT) mma_f32<true>(c, top.x, bottom.x, top.y, bottom.y, b0, b1);
  else
    mma_tf32(c, A_READY ? __float_as_uint(top.x) : tf32(top.x), A_READY ? __float_as_uint(bottom.x) : tf32(bottom.x),
             A_READY ? __float_as_uint(top.y) : tf32(top.y), A_READY ? __float_as_uint(bottom.y) : tf32(bottom.y),
             B_READY ? __float_as_uint(b0) : tf32(b0), B_READY ? __float_as_uint(b1) : tf32(b1));
}

template <int SPAN, int COLUMNS, int BUFFERS, int WARPS, bool EXACT>
__device__ __forceinline__ void retention_prompt_of(const RetentionPrompt& p) {
  typedef PromptShared<SPAN, COLUMNS, BUFFERS> L;
  constexpr int THREADS = 32 * WARPS, BANDS = SPAN / 16, SHARE = WARPS / BANDS;  // warps of a band of 16 tokens
  constexpr int SCORES = SPAN / 8, TILES = SCORES + COLUMNS / 8, PER = (TILES + SHARE - 1) / SHARE;
  extern __shared__ __align__(128) float shared[];
  float *P = shared + BUFFERS * L::TOKENS, *S = P + SPAN * L::P_ROW;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int h = blockIdx.y, b = blockIdx.z, kv = h / (H / G), c0 = blockIdx.x * COLUMNS;
  const float* powers = p.powers + h * POWERS;
  float* state = p.slots->state + b * SLOT_STATE + p.layer * LAYER_STATE + (i64)h * DK * DV;
  release_next();
  for (int i = tid; i < L::K_ROWS * COLUMNS; i += THREADS) {
    const int d = i / COLUMNS, c = i % COLUMNS;
    S[d * L::WIDE + c] = d < DK && c0 + c < DV ? state[(i64)d * DV + c0 + c] : 0.f;
  }
  if (L::K_ROWS != DK)
    for (int i = tid; i < BUFFERS * 2 * SPAN; i += THREADS)
      for (int d = DK; d < L::K_ROWS; ++d) shared[i / (2 * SPAN) * L::TOKENS + i % (2 * SPAN) * L::ROW + d] = 0.f;
  await_previous();
  const int length = (int)p.lengths[b], needed = p.needed[b];
  const i64 first_row = p.starts[b];

  auto fetch = [&](int start, float* to) {
    constexpr bool ALIGNED = DK % 4 == 0, ALIGNED_V = DV % 4 == 0 && VALUE_AT % 4 == 0 && NP % 4 == 0;
    constexpr int N = ALIGNED ? 4 : 1, N_V = ALIGNED_V ? 4 : 1, ACROSS = DK / N, ACROSS_V = COLUMNS / N_V;
#pragma unroll 4
    for (int i = tid; i < 2 * SPAN * ACROSS; i += THREADS) {
      const int j = i / ACROSS, d = i % ACROSS * N, token = start + j % SPAN;
      const bool valid = token < needed;
      copy_floats<ALIGNED>(to + j * L::ROW + d, p.rotated + ((first_row + (valid ? token : 0)) * (H + G) + (j < SPAN ? h : H + kv)) * DK + d, valid);
    }
    for (int i = tid; i < SPAN * ACROSS_V; i += THREADS) {
      const int j = i / ACROSS_V, c = i % ACROSS_V * N_V;
      const bool valid = start + j < needed && c0 + c < DV;
      copy_floats<ALIGNED_V>(to + 2 * SPAN * L::ROW + j * L::WIDE + c,
                             p.projections + (first_row + (valid ? start + j : 0)) * NP + VALUE_AT + kv * DV + (valid ? c0 + c : 0), valid);
    }
  };

  if (needed > 0) fetch(0, shared);
  commit();
  for (int start = 0, side = 0; start < needed; start += SPAN, side ^= BUFFERS - 1) {
    const float *q = shared + side * L::TOKENS, *k = q + SPAN * L::ROW, *v = k + SPAN * L::ROW;
    if (BUFFERS == 2) {
      if (start + SPAN < needed) fetch(start + SPAN, shared + (side ^ 1) * L::TOKENS);
      commit();
    }
    wait_copies<BUFFERS - 1>();
    __syncthreads();
    // Scores and the part of the state, a band of 16 tokens and some tiles of eight columns a warp: first those of K, then those of S.
    const int band = warp % BANDS, share = warp / BANDS, row = band * 16 + g;
    float acc[PER][4];
#pragma unroll
    for (int i = 0; i < PER * 4; ++i) (&acc[0][0])[i] = 0.f;
    if (share < TILES) {
#pragma unroll 4
      for (int d = 0; d < L::K_ROWS; d += 8) {
        const float2 top = *(const float2*)(q + row * L::ROW + d + 2 * t), bottom = *(const float2*)(q + (row + 8) * L::ROW + d + 2 * t);
#pragma unroll
        for (int i = 0; i < PER; ++i) {
          const int tile = share + i * SHARE;
          if (tile < SCORES) {
            if (tile * 8 > band * 16 + 15) continue;  // later tokens
            const float2 x = *(const float2*)(k + (tile * 8 + g) * L::ROW + d + 2 * t);
            mma_pairs<EXACT, true, true>(acc[i], top, bottom, x.x, x.y);
          } else if (tile < TILES) {
            const float* x = S + (d + 2 * t) * L::WIDE + (tile - SCORES) * 8 + g;
            mma_pairs<EXACT, true, false>(acc[i], top, bottom, x[0], x[L::WIDE]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int tile = share + i * SHARE;
      if (tile >= TILES) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = row + (e / 2) * 8, m = tile * 8 + 2 * t + e % 2;
        if (tile < SCORES) {
          const float score = j >= m ? acc[i][e] * powers[j - m] : 0.f;
          P[j * L::P_ROW + m] = EXACT ? score : __uint_as_float(tf32(score));
        } else {
          acc[i][e] *= powers[j + 1];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int tile = share + i * SHARE;
      if (tile < SCORES || tile >= TILES) continue;
      const int column = (tile - SCORES) * 8;
      for (int m = 0; m < band * 16 + 16; m += 8) {
        const float *a = P + row * L::P_ROW + m + 2 * t, *x = v + (m + 2 * t) * L::WIDE + column + g;
        mma_pairs<EXACT, true, false>(acc[i], *(const float2*)a, *(const float2*)(a + 8 * L::P_ROW), x[0], x[L::WIDE]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = start + row + (e / 2) * 8, c = c0 + column + 2 * t + e % 2;
        if (j < needed && c < DV) p.o[((first_row + j) * H + h) * DV + c] = acc[i][e];
      }
    }
    // The state after `count` of these tokens. If `length` ends within them, that state is written, and drafts continue from the other.
    const bool ends = length > start && length <= start + SPAN, more = start + SPAN < needed;
    for (int pass = ends ? 0 : 1; pass < (more ? 2 : 1); ++pass) {
      const int count = pass == 0 ? length - start : SPAN;
      const float kept = powers[count];
      for (int block = warp; block < L::K_ROWS / 16; block += WARPS) {
        float u[COLUMNS / 8][4];
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 old = *(const float2*)(S + (block * 16 + g + e * 8) * L::WIDE + n * 8 + 2 * t);
            u[n][2 * e] = kept * old.x, u[n][2 * e + 1] = kept * old.y;
          }
#pragma unroll 2
        for (int m = 0; m < count; m += 8) {
          const int i = m + 2 * t;
          const float z0 = i < count ? powers[count - 1 - i] : 0.f, z1 = i + 1 < count ? powers[count - 2 - i] : 0.f;
          const float *x = k + i * L::ROW + block * 16 + g, *y = x + L::ROW;
          const float2 top = make_float2(x[0] * z0, y[0] * z1), bottom = make_float2(x[8] * z0, y[8] * z1);
#pragma unroll
          for (int n = 0; n < COLUMNS / 8; ++n)
            mma_pairs<EXACT, false, false>(u[n], top, bottom, v[i * L::WIDE + n * 8 + g], v[(i + 1) * L::WIDE + n * 8 + g]);
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int d = block * 16 + g + e * 8, c = n * 8 + 2 * t;
            if (pass == 1) {
              *(float2*)(S + d * L::WIDE + c) = make_float2(u[n][2 * e], u[n][2 * e + 1]);
            } else if (d < DK) {
              if (c0 + c < DV) state[(i64)d * DV + c0 + c] = u[n][2 * e];
              if (c0 + c + 1 < DV) state[(i64)d * DV + c0 + c + 1] = u[n][2 * e + 1];
            }
          }
      }
    }
    __syncthreads();
    if (BUFFERS == 1) {
      if (start + SPAN < needed) fetch(start + SPAN, shared);
      commit();
    }
  }
}
#define RETENTION_PROMPT(NAME, SPAN, COLUMNS, BUFFERS, WARPS, EXACT)                                          \
  extern "C" __global__ void __launch_bounds__(32 * WARPS) NAME(const __grid_constant__ RetentionPrompt p) {  \
    retention_prompt_of<SPAN, COLUMNS, BUFFERS, WARPS, EXACT>(p);                                             \
  }
