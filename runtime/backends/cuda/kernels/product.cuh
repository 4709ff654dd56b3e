// y = x Wᵀ on tensor cores, for any number of tokens: weights are the operand A (16 outputs a tile), tokens the columns (8 a tile).
//
// W stays as layout.py lays it out. Its bytes go through a ring of stages in shared memory (cp.async) and become operands in
// registers. The inputs that one matrix instruction sums are not adjacent, but they are the same for W and x, which is all that a
// sum asks. A thread takes 16 bytes of x for every 32 inputs; x that meets integers is stored in the order of layout.place.
//
//   block: BM outputs × BN tokens × a part of K;  warps: WM × WN over the tile, WK over the runs of a stage (summed in the end)
//   warp: MT × NT tiles of 16 × 8;  stage: RSTEP runs a warp
//
// Kinds of result: PLAIN float32 (part, token, output), summed by who reads; GLU act(gate)·up, whose tiles have eight outputs of
// gate and the same eight of up; ACT act(y). Weights do not depend on the kernel in front, so their first stages are fetched
// before waiting for it.
#pragma once
#include "common.cuh"

struct Product {
  const u8* weights;      // as layout.py says
  const float* scales;    // (padded N), one an output in the device's order, or null
  const float* bias;      // (padded N) in the device's order, or null
  const void* x;          // operands (M, K), a row every x_stride elements, zeros from K on
  void* y;                // a row every y_stride elements
  int tokens, outputs, runs, x_stride, y_stride, parts;
  int placed;             // whether the operands that GLU and ACT write meet integers next
};
enum { PLAIN = 0, GLU = 1, ACT = 2 };

template <int FORMAT>
struct Stored {
  static constexpr bool INTEGER = FORMAT == I8 || FORMAT == I4;
  static constexpr int RUN = FORMAT == F32 ? 32 : FORMAT == I4 ? 128 : 64;  // inputs of a run
  static constexpr int UK = FORMAT == F32 ? 4 : 8;                           // inputs of 16 bytes of x
  static constexpr int UNITS = RUN / UK / 4;                                  // 16 bytes of x a thread and run
};

// Makes operands of a thread's eight weights of an output, the unit-th part of its 16 bytes: two for each of two instructions. The bits
// of an integer n are put into those of the fp16 number 1024 + n; minus 1024 and the zero point it is exact; then it is scaled.
template <int FORMAT>
__device__ __forceinline__ void operands(const u32* words, int unit, u32 first, u32 second, bool scaled, u32* a) {
  if (FORMAT == I8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 w = words[unit * 2 + i];
      a[2 * i] = sub_pairs(__byte_perm(w, 0x64646464u, 0x4140), 0x64806480u);  // 1152
      a[2 * i + 1] = sub_pairs(__byte_perm(w, 0x64646464u, 0x4342), 0x64806480u);
    }
  } else {
    const u32 w = words[unit], v = w >> 8;
    u32 h[4];
    asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(h[0]) : "r"(w));
    asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(h[1]) : "r"(w));
    asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(h[2]) : "r"(v));
    asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(h[3]) : "r"(v));
    a[0] = sub_pairs(h[0], 0x64086408u), a[2] = sub_pairs(h[2], 0x64086408u);                                     // 1032
    a[1] = fma_pairs(h[1], 0x2c002c00u, 0xd480d480u), a[3] = fma_pairs(h[3], 0x2c002c00u, 0xd480d480u);  // 1/16, -72
  }
  if (scaled) a[0] = mul_pairs(a[0], first), a[1] = mul_pairs(a[1], first), a[2] = mul_pairs(a[2], second), a[3] = mul_pairs(a[3], second);
}

// GRAIN: inputs of a run that share a scale (layout.granularity), 0 without; SCALE: the scales' type.
template <int FORMAT, int GRAIN, int SCALE, int WM, int WN, int WK, int MT, int NT, int RSTEP, int STAGES>
struct Tile {
  typedef Stored<FORMAT> S;
  static constexpr int THREADS = 32 * WM * WN * WK, BM = 16 * MT * WM, BN = 8 * NT * WN, TILES = MT * WM;
  static constexpr int RUNS = RSTEP * WK;  // runs of a stage
  static constexpr int SCALE_BYTES = SCALE == F32 ? 4 : 2, RUN_BYTES = (S::INTEGER ? 1024 : 2048) + (GRAIN ? S::RUN / (GRAIN ? GRAIN : 1) * 16 * SCALE_BYTES : 0);
  static constexpr int PIECE = RUNS * RUN_BYTES / 16, A_COPIES = TILES * PIECE;  // 16 bytes each, of a tile and of all
  static constexpr int X_CHUNKS = RUNS * S::RUN / S::UK, X_COPIES = BN * X_CHUNKS;
  static constexpr int STAGE = (A_COPIES + X_COPIES) * 16;
  static constexpr int REDUCE = (WK - 1) * WM * WN * MT * NT * 4 * 32 * 4;
  static constexpr int SHARED = STAGES * STAGE > REDUCE ? STAGES * STAGE : REDUCE;
  // Where 16 bytes of a row of x lie: neither the copies nor the reads of a warp (two rows by four) have bank conflicts.
  static __device__ __forceinline__ int x_place(int row, int c) { return row * X_CHUNKS + (c ^ ((row & 1) << 2)); }
};

template <class T, int FORMAT, int GRAIN, int SCALE, int WM, int WN, int WK, int MT, int NT, int RSTEP, int STAGES, int KIND, int OUT>
__device__ __forceinline__ void product_of(const Product& p) {
  typedef Stored<FORMAT> S;
  extern __shared__ __align__(128) u8 ring[];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int wm = warp % WM, wn = warp / WM % WN, wk = warp / (WM * WN);
  const int token0 = blockIdx.x * T::BN, tile0 = blockIdx.y * T::TILES;
  const int tiles = KIND == GLU ? (p.outputs / 2 + 7) / 8 : (p.outputs + 15) / 16;
  const int stages = (p.runs + T::RUNS - 1) / T::RUNS, first = (int)((i64)stages * blockIdx.z / p.parts),
            count = (int)((i64)stages * (blockIdx.z + 1) / p.parts) - first;
  const u32 at = shared_address(ring);

  auto load_weights = [&](int s) {
    const int run0 = (first + s) * T::RUNS;
    const u32 to = at + (s % STAGES) * T::STAGE;
#pragma unroll
    for (int i = 0; i < (T::A_COPIES + T::THREADS - 1) / T::THREADS; ++i) {
      const int index = i * T::THREADS + tid;
      if (T::A_COPIES % T::THREADS && index >= T::A_COPIES) break;
      const int tile = index / T::PIECE, c = index % T::PIECE;
      const bool valid = tile0 + tile < tiles && run0 * T::RUN_BYTES + c * 16 < p.runs * T::RUN_BYTES;
      copy16(to + index * 16, valid ? p.weights + ((i64)(tile0 + tile) * p.runs + run0) * T::RUN_BYTES + c * 16 : p.weights, valid);
    }
  };
  auto load_x = [&](int s) {
    const int from = (first + s) * T::X_CHUNKS;
    const u32 to = at + (s % STAGES) * T::STAGE + T::A_COPIES * 16;
#pragma unroll
    for (int i = 0; i < (T::X_COPIES + T::THREADS - 1) / T::THREADS; ++i) {
      const int index = i * T::THREADS + tid, row = index / T::X_CHUNKS, c = index % T::X_CHUNKS;
      if (T::X_COPIES % T::THREADS && index >= T::X_COPIES) break;
      const bool valid = token0 + row < p.tokens && (from + c) * S::UK < p.x_stride;
      copy16(to + T::x_place(row, c) * 16, (const u8*)p.x + (valid ? (i64)(token0 + row) * p.x_stride * (16 / S::UK) + (i64)(from + c) * 16 : 0), valid);
    }
  };

  float acc[MT][NT][4];
#pragma unroll
  for (int i = 0; i < MT * NT * 4; ++i) (&acc[0][0][0])[i] = 0.f;
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s)
    if (s < count) load_weights(s);
  release_next();
  await_previous();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < count) load_x(s);
    commit();
  }
  for (int s = 0; s < count; ++s) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    if (s + STAGES - 1 < count) load_weights(s + STAGES - 1), load_x(s + STAGES - 1);
    commit();
    const u8* a_at = ring + (s % STAGES) * T::STAGE;
    const uint4* x_at = (const uint4*)(a_at + T::A_COPIES * 16);
#pragma unroll
    for (int step = 0; step < RSTEP; ++step) {
      const int run = wk * RSTEP + step;
      u32 raw[MT][2][4];
      u32 scale[MT][2][2];
#pragma unroll
      for (int unit = 0; unit < S::UNITS; ++unit) {
        u32 a[MT][2][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const int tile = wm * MT + m;
          const u8* from = a_at + (tile * T::RUNS + run) * T::RUN_BYTES;
          if (!S::INTEGER) {
#pragma unroll
            for (int h = 0; h < 2; ++h) *(uint4*)a[m][h] = *(const uint4*)(from + h * 1024 + unit * 512 + lane * 16);
            continue;
          }
          if (unit == 0) {
            *(uint4*)raw[m][0] = *(const uint4*)(from + lane * 16);
            *(uint4*)raw[m][1] = *(const uint4*)(from + 512 + lane * 16);
          }
          if (GRAIN) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {  // the two instructions' 16 inputs each
              constexpr int grain = GRAIN ? GRAIN : 1;
              if ((unit * 32 + j * 16) % grain == 0) {
                const u8* pair = from + 1024 + (((unit * 32 + j * 16) / grain * 8 + g) * 2) * T::SCALE_BYTES;
                if (SCALE == F16) {
                  const u32 both = *(const u32*)pair;
                  scale[m][0][j] = __byte_perm(both, 0, 0x1010), scale[m][1][j] = __byte_perm(both, 0, 0x3232);
                } else if (SCALE == BF16) {
                  const u32 both = *(const u32*)pair;
                  scale[m][0][j] = pair_of(__uint_as_float(both << 16)), scale[m][1][j] = pair_of(__uint_as_float(both & 0xffff0000u));
                } else {
                  const float2 both = *(const float2*)pair;
                  scale[m][0][j] = pair_of(both.x), scale[m][1][j] = pair_of(both.y);
                }
                if (grain > 16 && j == 0) scale[m][0][1] = scale[m][0][0], scale[m][1][1] = scale[m][1][0];
              }
            }
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) operands<FORMAT>(raw[m][h], unit, scale[m][h][0], scale[m][h][1], GRAIN > 0, a[m][h]);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const uint4 b = x_at[T::x_place((wn * NT + n) * 8 + g, (run * S::UNITS + unit) * 4 + t)];
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            float* c = acc[m][n];
            u32(*w)[4] = a[m];
            if (FORMAT == F32) {
              mma_f32<true>(c, __uint_as_float(w[0][0]), __uint_as_float(w[1][0]), __uint_as_float(w[0][1]), __uint_as_float(w[1][1]),
                            __uint_as_float(b.x), __uint_as_float(b.y));
              mma_f32<true>(c, __uint_as_float(w[0][2]), __uint_as_float(w[1][2]), __uint_as_float(w[0][3]), __uint_as_float(w[1][3]),
                            __uint_as_float(b.z), __uint_as_float(b.w));
            } else if (FORMAT == BF16) {
              mma_bf16(c, w[0][0], w[1][0], w[0][1], w[1][1], b.x, b.y);
              mma_bf16(c, w[0][2], w[1][2], w[0][3], w[1][3], b.z, b.w);
            } else {
              mma_f16(c, w[0][0], w[1][0], w[0][1], w[1][1], b.x, b.y);
              mma_f16(c, w[0][2], w[1][2], w[0][3], w[1][3], b.z, b.w);
            }
          }
        }
      }
    }
  }

  if (WK > 1) {  // the warps that took other inputs hand over their sums
    wait_copies<0>();
    __syncthreads();
    float* sums = (float*)ring;
    const int mine = (warp % (WM * WN)) * MT * NT * 128 + lane;
    if (wk > 0) {
#pragma unroll
      for (int i = 0; i < MT * NT * 4; ++i) sums[(wk - 1) * (WM * WN * MT * NT * 128) + mine + i * 32] = (&acc[0][0][0])[i];
    }
    __syncthreads();
    if (wk > 0) return;
#pragma unroll
    for (int other = 0; other < WK - 1; ++other)
#pragma unroll
      for (int i = 0; i < MT * NT * 4; ++i) (&acc[0][0][0])[i] += sums[other * (WM * WN * MT * NT * 128) + mine + i * 32];
  }

  typedef typename Operand<OUT>::type Result;
  constexpr bool PER_OUTPUT = S::INTEGER && GRAIN == 0;
  Result* y = (Result*)p.y + (KIND == PLAIN ? (i64)blockIdx.z * p.tokens * p.y_stride : 0);
  const bool biased = p.bias && (KIND != PLAIN || blockIdx.z == 0);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const int tile = tile0 + wm * MT + m;
    if (tile >= tiles) continue;
    float scale[2], bias[2];
    int output[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      output[h] = KIND == GLU ? tile * 8 + g : tile * 16 + h * 8 + g;
      const bool exists = output[h] < (KIND == GLU ? p.outputs / 2 : p.outputs);
      scale[h] = PER_OUTPUT ? p.scales[tile * 16 + h * 8 + g] : 1.f;
      bias[h] = biased && exists ? p.bias[tile * 16 + h * 8 + g] : 0.f;
      if (!exists) output[h] = -1;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = token0 + (wn * NT + n) * 8 + 2 * t + i;
        if (token >= p.tokens) continue;
        Result* row = y + (i64)token * p.y_stride;
        const float r0 = acc[m][n][i] * scale[0] + bias[0], r1 = acc[m][n][2 + i] * scale[1] + bias[1];
        if (KIND == GLU) {
          if (output[0] >= 0) row[p.placed ? placed_at(output[0]) : output[0]] = Operand<OUT>::from(activate(r0) * r1);
        } else {
          if (output[0] >= 0) row[KIND == ACT && p.placed ? placed_at(output[0]) : output[0]] = Operand<OUT>::from(KIND == ACT ? activate(r0) : r0);
          if (output[1] >= 0) row[KIND == ACT && p.placed ? placed_at(output[1]) : output[1]] = Operand<OUT>::from(KIND == ACT ? activate(r1) : r1);
        }
      }
  }
}

// NAME, format, grain, scales' type; warps over outputs, tokens and inputs; tiles of a warp; runs of a stage; stages; blocks a
// multiprocessor; kind, result
#define PRODUCT(NAME, FORMAT, GRAIN, SCALE, WM, WN, WK, MT, NT, RSTEP, STAGES, BLOCKS, KIND, OUT)                                \
  extern "C" __global__ void __launch_bounds__(32 * WM * WN * WK, BLOCKS) NAME(const __grid_constant__ Product p) {              \
    product_of<Tile<FORMAT, GRAIN, SCALE, WM, WN, WK, MT, NT, RSTEP, STAGES>, FORMAT, GRAIN, SCALE, WM, WN, WK, MT, NT, RSTEP,   \
               STAGES, KIND, OUT>(p);                                                                                            \
  }
