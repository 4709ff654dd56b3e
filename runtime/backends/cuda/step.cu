// One token of one sequence, as one cooperative launch: every block, one a multiprocessor, runs all products of the step.
//
// Each warp streams the weights of its own rows through a ring in shared memory. Weights do not depend on activations, so the ring runs
// ahead of the products, and memory never waits for the chain of dependent operations:
//
//     norm -> q, k, v, gate -> state, read-out -> head norm, gate -> output -> norm -> gate, up -> down -> next layer ... -> head -> top 64
//
// There is no barrier of all blocks. A block sends what others need in packets of 8 bytes: a value, and a tag for launch and layer.
// A reader reads the packet again and again until it has the right tag, so the value and its arrival are one memory access. A
// packet's place is written again two layers later. By then every block has read it: no block finishes layer l + 1 before it has all
// rows of q, k, v, gate of that layer, every block makes some of them, and makes them after it has read layer l.
//
// A product is cut into tiles of 16 rows. Blocks take tiles in turn; inside a block, warps share the inputs of a tile (layout.py
// says how weights lie). 16-bit products use mma.m16n8k16 with eight equal columns of B; sums are float32. Partial sums are added
// in shared memory.
//
// Everything about the model is a constant (plan.py writes them). No header is included, so NVRTC needs none.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Kind { F32 = 0, F16 = 1, BF16 = 2, I8 = 3, I4 = 4 };
constexpr int WARPS = 16, THREADS = 512, TOP = 64, CANDIDATES = 1024;
constexpr int HALF = DK / 2, E = H * DV, ROTATED = (H + KV) * HALF, VALUES = 2 * ROTATED, GATES = VALUES + KV * DV;
constexpr u32 FULL = ~0u, PATIENCE = 1u << 25;  // turns of waiting before a launch gives up: seconds

constexpr int up(int a, int b) { return (a + b - 1) / b; }
constexpr int size_of(int kind) { return kind == F32 ? 4 : 2; }

template <int KIND_, int ROWS_, int COLUMNS_, int GRAIN_, int SCALE_, int SPLIT_, int RUNS_, int INTERLEAVED_>
struct Product {
  static constexpr int KIND = KIND_, ROWS = ROWS_, COLUMNS = COLUMNS_, GRAIN = GRAIN_, SCALE = SCALE_, SPLIT = SPLIT_;
  static constexpr bool INTEGER = KIND >= I8, INTERLEAVED = INTERLEAVED_;
  static constexpr int RUN = KIND == F32 ? 32 : KIND == I4 ? 128 : 64;        // inputs of a run
  static constexpr int GROUPS = GRAIN ? RUN / GRAIN : 0;                      // scales of a row in a run
  static constexpr int RUN_BYTES = INTEGER ? 1024 + GROUPS * 16 * size_of(SCALE) : 2048;
  static constexpr int PIECE_RUNS = RUNS_, PIECE_BYTES = RUN_BYTES * PIECE_RUNS, PIECE_COLUMNS = RUN * PIECE_RUNS;  // what a slot holds
  static constexpr int RUNS = up(COLUMNS, RUN), PIECES = RUNS / PIECE_RUNS;
  static constexpr int TILES = INTERLEAVED ? up(ROWS / 2, 8) : up(ROWS, 16);
  static constexpr u64 TILE_BYTES = (u64)RUNS * RUN_BYTES;
  static constexpr int MINE = up(TILES, GRID);                                // tiles of a block, at most
  static constexpr int ABREAST = WARPS / SPLIT;                               // tiles that the warps of a block read at once
  static constexpr int ROOM = PARTS / SPLIT < 32 ? PARTS / SPLIT : 32;
  static constexpr int PASS = MINE < ROOM ? up(MINE, ABREAST) * ABREAST : ROOM / ABREAST * ABREAST;  // tiles between two sums
  static_assert(RUNS % PIECE_RUNS == 0 && SPLIT <= PIECES && WARPS % SPLIT == 0 && PASS > 0 && PASS <= 32, "split");
};
typedef Product<P0> Projections;
typedef Product<P1> Out;
typedef Product<P2> GateUp;
typedef Product<P3> Down;
typedef Product<P4> Head;
constexpr bool ALIKE = Projections::PIECE_BYTES == STAGE && Out::PIECE_BYTES == STAGE && GateUp::PIECE_BYTES == STAGE && Down::PIECE_BYTES == STAGE && Head::PIECE_BYTES == STAGE;

#if COMPUTE == 0
typedef float X;
#else
typedef u16 X;
#endif
constexpr bool HALVES = COMPUTE != F32 && !INNER_NORM && F % 2 == 0;  // hidden values travel two to a packet, as the product takes them
constexpr int HIDDEN_PACKETS = HALVES ? F / 2 : F;
constexpr int SLICES = up(DV, SLICE), UNITS = H * SLICES;              // parts of the state that a block takes: SLICE columns of a head
constexpr int VEC = DV % 4 == 0 ? 4 : DV % 2 == 0 ? 2 : 1, ACROSS = SLICE / VEC, GROUPED = THREADS / ACROSS, PER = up(DK, GROUPED);
constexpr int STATS = HEAD_NORM == 2 ? 2 : 1;                          // packets of a unit about its outputs
static_assert(ACROSS <= 32 && (ACROSS & (ACROSS - 1)) == 0, "slice");
static_assert(GRID <= Projections::TILES, "every block must have rows of q, k, v, gate, or packets could be lost");

constexpr int even(int n) { return (n + 1) / 2 * 2; }
constexpr int MAIL_PROJECTIONS = 0, MAIL_HEADS = MAIL_PROJECTIONS + even(Projections::ROWS), MAIL_STATS = MAIL_HEADS + even(E);
constexpr int MAIL_OUT = MAIL_STATS + even(UNITS * STATS), MAIL_HIDDEN = MAIL_OUT + even(D), MAIL_DOWN = MAIL_HIDDEN + even(HIDDEN_PACKETS);
constexpr int MAIL_SIDE = MAIL_DOWN + even(D);                         // packets of one side; layers take turns on two

struct Result { u32 overflow; int tokens[TOP]; float logits[TOP]; };
struct Params {
  const u8 *layers, *head, *embedding;
  const float *embedding_scales, *vectors;
  const u32* phases;      // how far each rotary pair turns a token, of 2^32
  float* state;           // (L, H, DK, DV)
  long long* position;
  u64* mail;
  u32* control;           // tag of the last launch; blocks that have finished
  float* logits;
  u32* tile_largest;      // of the head's tiles, as ordered keys
  Result* result;         // in the host's memory
  int token;
};
struct Plan { u64 offset; u32 jump, count, length, step; };  // a warp's share of a product; jump: from the end of a part to the next

// Shared memory: the ring, then these.
struct Shared {
  Plan plans[5][WARPS];
  float parts[2][PARTS * 16];
  float q[DK], k[DK], v[SLICE], gate[SLICE], sums[WARPS][SLICE];
  float cosine[HALF], sine[HALF], red[2][WARPS], root[H], mean[H];
  u32 flag, count;
};

// ---- 16-bit numbers
__device__ __forceinline__ float low(u32 v) {
#if COMPUTE == 2
  return __uint_as_float(v << 16);
#else
  float f; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v)); return f;
#endif
}
__device__ __forceinline__ u32 two(float a, float b) {  // a in the low half
  u32 v;
#if COMPUTE == 2
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(v) : "f"(a), "f"(b));
#else
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(v) : "f"(a), "f"(b));
#endif
  return v;
}
template <int KIND> __device__ __forceinline__ float stored(const void* at, long i) {
  if (KIND == F32) return ((const float*)at)[i];
  u16 v = ((const u16*)at)[i];
  if (KIND == BF16) return __uint_as_float((u32)v << 16);
  float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f;
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if COMPUTE == 2
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Elements 2i and 2i + 1 of a word of eight nibbles, as two halves.
template <int I> __device__ __forceinline__ u32 nibbles(u32 w) {
  u32 h, v;
#if COMPUTE == 2
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(h) : "r"(w >> (4 * I)));        // 128 + n
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(h), "r"(0x3f803f80), "r"(0xc308c308));  // - 136
#else
  if (I & 1) {
    asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(h) : "r"(w >> (I ? 4 * (I - 1) : 0)));  // 1024 + 16 n
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(h), "r"(0x2c002c00), "r"(0xd480d480));   // / 16 - 72
  } else {
    asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(h) : "r"(w >> (4 * I)));        // 1024 + n
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(h), "r"(0x64086408));                        // - 1032
  }
#endif
  return v;
}
// Bytes 2i and 2i + 1 of a word, as two halves.
template <int I> __device__ __forceinline__ u32 bytes(u32 w) {
#if COMPUTE == 2
  float a = __uint_as_float(__byte_perm(w, 0x4b000000, 0x7650 + 2 * I)) - 8388736.f, b = __uint_as_float(__byte_perm(w, 0x4b000000, 0x7651 + 2 * I)) - 8388736.f;
  return two(a, b);
#else
  u32 h = __byte_perm(w, 0x64646464, I ? 0x4342 : 0x4140), v;  // 1024 + n
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(h), "r"(0x64806480));  // - 1152
  return v;
#endif
}

// ---- memory
__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(u32 to, const u8* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void send(u64* to, u32 bits, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)tag << 32 | bits) : "memory");
}
__device__ __forceinline__ void send(u64* to, float value, u32 tag) { send(to, __float_as_uint(value), tag); }
__device__ __forceinline__ u64 look(const u64* at) {
  u64 v; asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory"); return v;
}
__device__ __forceinline__ void look2(const u64* at, u64& a, u64& b) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at) : "memory");
}
__device__ __forceinline__ bool is(u64 packet, u32 tag) { return (u32)(packet >> 32) == tag; }
__device__ __forceinline__ float value(u64 packet) { return __uint_as_float((u32)packet); }
__device__ __forceinline__ void lose_patience(u32& turns) { if (++turns > PATIENCE) asm volatile("trap;"); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
  return v;
}
__device__ __forceinline__ float swish(float v) { return v / (1 + __expf(-v)); }
__device__ __forceinline__ float activation(float v) {
#if ACTIVATION == 0
  return swish(v);
#elif ACTIVATION == 1
  return 0.5f * v * (1 + erff(v * 0.70710678f));
#else
  return v > 0 || v != v ? v : 0.f;
#endif
}
__device__ __forceinline__ u32 ordered(float v) {  // larger key, larger logit; NaN before all
  if (v != v) return FULL;
  u32 bits = __float_as_uint(v + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ int place(int k) { return (k & ~31) | (k >> 2 & 3) << 3 | (k >> 4 & 1) << 2 | (k & 3); }

struct Worker {
  const Params& p;
  Shared& s;
  const u8* ring;
  X* x;
  const int t = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 ring_at, tag0;
  int slot = 0, red = 0, side = 0;
  // The next piece to fetch.
  const u8* at;
  u32 left, units, step;
  int phase = 0;

  __device__ __forceinline__ Worker(const Params& p_, Shared& s_, const u8* ring_, X* x_) : p(p_), s(s_), ring(ring_), x(x_) {
    ring_at = address(ring) + warp * SLOTS * STAGE + lane * 16;
    ring += warp * SLOTS * STAGE;
  }

  // ---- the ring
  __device__ __forceinline__ void settle() {
    for (; phase <= 4 * L; ++phase) {
      int kind = phase == 4 * L ? 4 : phase & 3;
      const Plan& q = s.plans[kind][warp];
      if (q.count) {
        at = (kind == 4 ? p.head : p.layers + (u64)(phase >> 2) * LAYER_BYTES) + q.offset;
        units = q.count; left = q.length; step = q.step;
        return;
      }
    }
  }
  __device__ __forceinline__ void fetch(int into) {
    if (phase <= 4 * L) {
      const u32 to = ring_at + into * STAGE;
      const u8* from = at + lane * 16;
#pragma unroll
      for (int o = 0; o < STAGE; o += 512)
        if (o + lane * 16 < (ALIKE ? STAGE : step)) copy16(to + o, from + o);
      at += ALIKE ? STAGE : step;
      if (--left == 0) {
        if (--units) { const Plan& q = s.plans[phase == 4 * L ? 4 : phase & 3][warp]; at += q.jump; left = q.length; }
        else { ++phase; settle(); }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <class P> __device__ __forceinline__ void plan(int kind, u64 base) {
    if (lane == 0) {
      int part = warp % P::SPLIT, first = blockIdx.x + GRID * (warp / P::SPLIT), begin = part * P::PIECES / P::SPLIT;
      Plan& q = s.plans[kind][warp];
      q.offset = base + first * P::TILE_BYTES + (u64)begin * P::PIECE_BYTES;
      q.count = first < P::TILES ? (P::TILES - first + P::ABREAST * GRID - 1) / (P::ABREAST * GRID) : 0;
      q.length = (part + 1) * P::PIECES / P::SPLIT - begin;
      q.step = P::PIECE_BYTES;
      q.jump = (u32)(P::ABREAST * GRID * P::TILE_BYTES) - q.length * P::PIECE_BYTES;
    }
  }
  __device__ __forceinline__ void begin() {
    plan<Projections>(0, BASE0); plan<Out>(1, BASE1); plan<GateUp>(2, BASE2); plan<Down>(3, BASE3); plan<Head>(4, 0);
    __syncwarp();
    settle();
    for (int i = 0; i < SLOTS; ++i) fetch(i);
  }

  // ---- products
  template <class P> __device__ __forceinline__ void accumulate(const u8* w, const X* xs, float (&acc)[4], float& r0, float& r1) {
    const int g = lane / 4, q = lane % 4;
    if constexpr (!P::INTEGER) {
      uint4 a[2], b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int o = i * 512 + lane * 16;
        a[i] = *(const uint4*)(w + o); b[i] = *(const uint4*)(w + 1024 + o);
      }
#if COMPUTE == 0
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float4 v = *(const float4*)(xs + i * 16 + q * 4);
        r0 += __uint_as_float(a[i].x) * v.x + __uint_as_float(a[i].y) * v.y + __uint_as_float(a[i].z) * v.z + __uint_as_float(a[i].w) * v.w;
        r1 += __uint_as_float(b[i].x) * v.x + __uint_as_float(b[i].y) * v.y + __uint_as_float(b[i].z) * v.z + __uint_as_float(b[i].w) * v.w;
      }
#else
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 v = *(const uint4*)(xs + i * 32 + q * 8);
        mma(acc, a[i].x, b[i].x, a[i].y, b[i].y, v.x, v.y);
        mma(acc, a[i].z, b[i].z, a[i].w, b[i].w, v.z, v.w);
      }
#endif
    } else {
#pragma unroll
      for (int run = 0; run < P::PIECE_RUNS; ++run, w += P::RUN_BYTES, xs += P::RUN) {
        uint4 av = *(const uint4*)(w + lane * 16), bv = *(const uint4*)(w + 512 + lane * 16);
        const u32 a[4] = {av.x, av.y, av.z, av.w}, b[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
        for (int i = 0; i < P::RUN / 32; ++i) {
#if COMPUTE == 0
          float part0[2] = {0, 0}, part1[2] = {0, 0};  // of the first and the second 16 inputs
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            float4 v4 = *(const float4*)(xs + i * 32 + q * 8 + m * 4);
            const float v[4] = {v4.x, v4.y, v4.z, v4.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if constexpr (P::KIND == I4) {
                const int shift = 4 * (2 * m + j / 2) + 16 * (j % 2);
                part0[m] += (float)((int)(a[i] >> shift & 15) - 8) * v[j];
                part1[m] += (float)((int)(b[i] >> shift & 15) - 8) * v[j];
              } else {
                part0[m] += (float)((int)(a[2 * i + m] >> 8 * j & 255) - 128) * v[j];
                part1[m] += (float)((int)(b[2 * i + m] >> 8 * j & 255) - 128) * v[j];
              }
            }
          }
#else
          uint4 v = *(const uint4*)(xs + i * 32 + q * 8);
#endif
#pragma unroll
          for (int m = 0; m < 2; ++m) {
#if COMPUTE != 0
            const u32 v0 = m ? v.z : v.x, v1 = m ? v.w : v.y;
            if constexpr (P::KIND == I4) {
              if (m == 0) mma(acc, nibbles<0>(a[i]), nibbles<0>(b[i]), nibbles<1>(a[i]), nibbles<1>(b[i]), v0, v1);
              else mma(acc, nibbles<2>(a[i]), nibbles<2>(b[i]), nibbles<3>(a[i]), nibbles<3>(b[i]), v0, v1);
            } else {
              const u32 aw = a[(2 * i + m) & 3], bw = b[(2 * i + m) & 3];
              mma(acc, bytes<0>(aw), bytes<0>(bw), bytes<1>(aw), bytes<1>(bw), v0, v1);
            }
#else
            acc[0] += part0[m]; acc[2] += part1[m];
#endif
            if constexpr (P::GRAIN != 0) {
              if ((i * 32 + m * 16 + 16) % P::GRAIN == 0) {
                const int group = (i * 32 + m * 16) / P::GRAIN;
                const u8* scales = w + 1024 + (group * 16 + g * 2) * size_of(P::SCALE);
                float s0, s1;
                if (P::SCALE == F32) { float2 f = *(const float2*)scales; s0 = f.x; s1 = f.y; }
                else { s0 = stored<P::SCALE>(scales, 0); s1 = stored<P::SCALE>(scales, 1); }
                r0 += s0 * acc[0]; r1 += s1 * acc[2];
                acc[0] = acc[1] = acc[2] = acc[3] = 0;
              }
            }
          }
        }
      }
    }
  }
  // The product of x with every tile of this block; `done(first, parts)` gets the partial sums of tiles first, first + 1, ... of the block.
  template <class P, class Done> __device__ __forceinline__ void product(Done done) {
    constexpr bool SHARED_SLOT = P::INTEGER;  // of floats, a thread copies just what it reads
    const int part = warp % P::SPLIT, begin = part * P::PIECES / P::SPLIT, count = (part + 1) * P::PIECES / P::SPLIT - begin;
#pragma unroll 1
    for (int first = 0; first < P::MINE; first += P::PASS) {
      float* parts = s.parts[side];
      side ^= 1;
#pragma unroll 1
      for (int j = warp / P::SPLIT; j < P::PASS; j += P::ABREAST) {
        if (blockIdx.x + (first + j) * GRID >= P::TILES) break;
        const X* xs = x + begin * P::PIECE_COLUMNS;
        float acc[4] = {0, 0, 0, 0}, r0 = 0, r1 = 0;
#pragma unroll 1
        for (int n = 0; n < count; ++n, xs += P::PIECE_COLUMNS) {
          asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
          if (SHARED_SLOT) __syncwarp();
          accumulate<P>(ring + slot * STAGE, xs, acc, r0, r1);
          if (SHARED_SLOT) __syncwarp();
          fetch(slot);
          if (++slot == SLOTS) slot = 0;
        }
        r0 += acc[0]; r1 += acc[2];
#if COMPUTE == 0
        r0 += __shfl_xor_sync(FULL, r0, 1); r0 += __shfl_xor_sync(FULL, r0, 2);
        r1 += __shfl_xor_sync(FULL, r1, 1); r1 += __shfl_xor_sync(FULL, r1, 2);
#endif
        if (lane % 4 == 0) {
          float* to = parts + (j * P::SPLIT + part) * 16 + lane / 4;
          to[0] = r0; to[8] = r1;
        }
      }
      __syncthreads();
      done(first, parts);
    }
  }
  template <class P> __device__ __forceinline__ float total(const float* parts, int j, int row, int n, const float* scales, const float* bias) {
    float v = 0;
#pragma unroll
    for (int i = 0; i < P::SPLIT; ++i) v += parts[(j * P::SPLIT + i) * 16 + row];
    if (P::INTEGER && P::GRAIN == 0) v *= scales[n];
    return bias ? v + bias[n] : v;
  }
  // The usual end of a product: a packet for each row.
  template <class P> __device__ __forceinline__ void send_rows(const float* parts, int first, u64* mail, u32 tag, const float* scales, const float* bias) {
    if (t < P::PASS * 16) {
      int j = t / 16, n = (blockIdx.x + (first + j) * GRID) * 16 + t % 16;
      if (n < P::ROWS) send(mail + n, total<P>(parts, j, t % 16, n, scales, bias), tag);
    }
  }

  // ---- activations
  template <class P> __device__ __forceinline__ void put2(int k, float a, float b) {  // inputs k and k + 1 of x, k even
    const int at = P::INTEGER ? place(k) : k;
#if COMPUTE == 0
    *(float2*)(x + at) = make_float2(a, b);
#else
    *(u32*)(x + at) = two(a, b);
#endif
  }
  __device__ __forceinline__ float block_sum(float v) {
    v = warp_sum(v);
    float* r = s.red[red];
    red ^= 1;
    if (lane == 0) r[warp] = v;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += r[w];
    return sum;
  }
  static constexpr int PAIRS = up(D / 2, THREADS);
  float residual[PAIRS][2];
  __device__ __forceinline__ bool mine(int i, int size) const { return i * THREADS + t < size; }

  template <int N> struct Affine { float w[N][2], b[N][2]; };
  template <int N> __device__ __forceinline__ void load_affine(Affine<N>& a, int size, int weight, int bias, int layer) const {
    const float* v = p.vectors + (u64)layer * VECTORS;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (mine(i, size / 2)) {
        float2 w = weight < 0 ? make_float2(1, 1) : *(const float2*)(v + weight + 2 * (i * THREADS + t));
        float2 b = bias < 0 ? make_float2(0, 0) : *(const float2*)(v + bias + 2 * (i * THREADS + t));
        a.w[i][0] = w.x; a.w[i][1] = w.y; a.b[i][0] = b.x; a.b[i][1] = b.y;
      }
  }
  // out = norm(in) over `size` values, two a thread and turn. kind 1: RMS, 2: mean subtracted.
  template <int N, int KIND, bool BIAS> __device__ __forceinline__ void norm(const float (&in)[N][2], float (&out)[N][2], int size, float eps, const Affine<N>& a) {
    float mean = 0, sum = 0;
    if (KIND == 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) if (mine(i, size / 2)) sum += in[i][0] + in[i][1];
      mean = block_sum(sum) / size;
      sum = 0;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) if (mine(i, size / 2)) { float u = in[i][0] - mean, v = in[i][1] - mean; sum += u * u + v * v; }
    float r = rsqrtf(block_sum(sum) / size + eps);
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) { out[i][j] = (in[i][j] - mean) * r * a.w[i][j]; if (BIAS) out[i][j] += a.b[i][j]; }
  }
  // x <- N values of each thread, zeros behind them up to the product's padded inputs.
  template <class P, int N> __device__ __forceinline__ void put(const float (&v)[N][2]) {
#pragma unroll
    for (int i = 0; i < up(P::RUNS * P::RUN / 2, THREADS); ++i) {
      int k = 2 * (i * THREADS + t);
      if (k < P::RUNS * P::RUN) {
        bool real = i < N && k < P::COLUMNS;
        put2<P>(k, real ? v[i < N ? i : 0][0] : 0.f, real ? v[i < N ? i : 0][1] : 0.f);
      }
    }
    __syncthreads();
  }
  // Pairs of packets: out[i] are those of pair (first + i) * THREADS + t of `size` packets. Waits for all of them.
  template <int N> __device__ __forceinline__ void receive(const u64* mail, u32 tag, int first, int size, u64 (&a)[N], u64 (&b)[N]) const {
    // Only those that are missing are read again: reads take time of the memory that the weights need.
    u32 turns = 0, missing = (1u << N) - 1;
    do {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        int k = 2 * ((first + i) * THREADS + t);
        if ((missing >> i & 1) && k < size) look2(mail + k, a[i], b[i]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        int k = 2 * ((first + i) * THREADS + t);
        if (k >= size || (is(a[i], tag) && (k + 1 >= size || is(b[i], tag)))) missing &= ~(1u << i);
      }
      if (missing) lose_patience(turns);
    } while (missing);
  }
  __device__ __forceinline__ float wait_for(const u64* at, u32 tag) const {
    u32 turns = 0;
    u64 v;
    while (!is(v = look(at), tag)) lose_patience(turns);
    return value(v);
  }
  // residual <- alpha residual + what the blocks sent.
  __device__ __forceinline__ void add(const u64* mail, u32 tag) {
    u64 a[PAIRS], b[PAIRS];
    receive<PAIRS>(mail, tag, 0, D, a, b);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      residual[i][0] = RESIDUAL_SCALE * residual[i][0] + value(a[i]);
      residual[i][1] = RESIDUAL_SCALE * residual[i][1] + value(b[i]);
    }
  }
  // After a block of a layer: add what it gave, norm it (post-norm), and norm it into x for the product P.
  template <class P, bool NORM> __device__ __forceinline__ void turn(bool more, const u64* mail, u32 tag, int post_w, int post_b, int post_layer, int w, int b, int layer) {
    constexpr bool BIAS = NORM_KIND == 2;
    Affine<PAIRS> affine, post;
    if (NORM) load_affine<PAIRS>(affine, D, w, b, layer);
    if (more) {
      if (POST_NORM) load_affine<PAIRS>(post, D, post_w, post_b, post_layer);
      add(mail, tag);
      if (POST_NORM) norm<PAIRS, NORM_KIND, BIAS>(residual, residual, D, NORM_EPS, post);
    }
    if (NORM) {
      float v[PAIRS][2];
      norm<PAIRS, NORM_KIND, BIAS>(residual, v, D, NORM_EPS, affine);
      put<P, PAIRS>(v);
    } else put<P, PAIRS>(residual);
  }
  __device__ __forceinline__ float embedded(long token, int k) const {
    if constexpr (EMBEDDING_KIND < I8) {
      constexpr int WORDS = 16 / size_of(EMBEDDING_KIND), RUN = 8 * WORDS;  // elements of 16 bytes; inputs of a run
      const int row = token % 16, in = k % RUN, c = in / WORDS;
      const u8* run = p.embedding + (token / 16 * up(D, RUN) + k / RUN) * 2048;
      return stored<EMBEDDING_KIND>(run + row / 8 * 1024 + c / 4 * 512 + row % 8 * 64 + c % 4 * 16, in % WORDS);
    }
    constexpr int RUN = EMBEDDING_KIND == I4 ? 128 : 64, GROUPS = EMBEDDING_GRAIN ? RUN / (EMBEDDING_GRAIN ? EMBEDDING_GRAIN : 1) : 0;
    constexpr int RUN_BYTES = 1024 + GROUPS * 16 * size_of(EMBEDDING_SCALE);
    const u8* run = p.embedding + (token / 16 * up(D, RUN) + k / RUN) * RUN_BYTES;
    int row = token % 16, in = k % RUN, element = (in >> 4 & 1) * 4 + (in & 3), word = in / 32;
    const u8* lane16 = run + row / 8 * 512 + (row % 8 * 4 + (in >> 2 & 3)) * 16;
    float v;
    if (EMBEDDING_KIND == I4) v = (float)((int)(((const u32*)lane16)[word] >> (4 * (element / 2) + 16 * (element % 2)) & 15) - 8);
    else v = (float)((int)lane16[word * 8 + element] - 128);
    if (EMBEDDING_GRAIN == 0) return v * p.embedding_scales[token];
    return v * stored<EMBEDDING_SCALE>(run + 1024, in / (EMBEDDING_GRAIN ? EMBEDDING_GRAIN : 1) * 16 + row % 8 * 2 + row / 8);
  }
  __device__ __forceinline__ void embed() {
    const long token = p.token;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int k = 2 * (i * THREADS + t) + j;
        residual[i][j] = k < D ? embedded(token, k) * EMBEDDING_SCALING : 0.f;
      }
    if (EMBEDDING_NORM) {
      Affine<PAIRS> affine;
      load_affine<PAIRS>(affine, D, EMBEDDING_NORM_W, EMBEDDING_NORM_B, L);
      norm<PAIRS, NORM_KIND, NORM_KIND == 2>(residual, residual, D, NORM_EPS, affine);
    }
  }

  // ---- retention
  __device__ __forceinline__ float* state_at(int layer, int unit, int r, bool& any) const {
    int h = unit / SLICES, column = unit % SLICES * SLICE + t % ACROSS * VEC, row = t / ACROSS + r * GROUPED;
    any = unit < UNITS && row < DK && column < DV;
    return p.state + (((u64)layer * H + h) * DK + row) * DV + column;
  }
  __device__ __forceinline__ void load_state(int layer, int unit, float (&to)[PER][VEC]) const {
#pragma unroll
    for (int r = 0; r < PER; ++r) {
      bool any;
      const float* at = state_at(layer, unit, r, any);
      if (any) {
        if constexpr (VEC == 4) { float4 v = __ldcs((const float4*)at); to[r][0] = v.x; to[r][1] = v.y; to[r][2] = v.z; to[r][3] = v.w; }
        else if constexpr (VEC == 2) { float2 v = __ldcs((const float2*)at); to[r][0] = v.x; to[r][1] = v.y; }
        else to[r][0] = __ldcs(at);
      }
    }
  }
  // Brings what is needed soon into the second-level cache. Loads return in order, so a packet that has come would be seen only after
  // older loads from memory; therefore such data is prefetched, and loaded when the packets have come.
  __device__ __forceinline__ void prefetch_state(int layer, int unit) const {
#pragma unroll
    for (int r = 0; r < PER; ++r) {
      bool any;
      const float* at = state_at(layer, unit, r, any);
      if (any && t % ACROSS * VEC % 32 == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
    }
  }
  __device__ __forceinline__ void prefetch_vectors(int layer) const {
    const int at = (t * GRID + blockIdx.x) * 32;
    if (at < (layer == L ? MODEL_VECTORS : VECTORS)) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.vectors + (u64)layer * VECTORS + at));
  }
  __device__ __forceinline__ void retain(int layer, int unit, u64* mail, u32 tag) {
    const int h = unit / SLICES, slice = unit % SLICES, kv = h / (H / KV), first = slice * SLICE;
    const float* vectors = p.vectors + (u64)layer * VECTORS;
    for (int e = t; e < 2 * HALF; e += THREADS) {
      const bool key = e >= HALF;
      const int i = key ? e - HALF : e;
      const u64* from = mail + MAIL_PROJECTIONS + (key ? H * HALF + kv * HALF : h * HALF) + i;
      float a = wait_for(from, tag), b = wait_for(from + ROTATED, tag), c = s.cosine[i], d = s.sine[i];
      float* to = key ? s.k : s.q;
      to[i] = a * c - b * d; to[HALF + i] = b * c + a * d;
    }
    {
      const int e = THREADS - 1 - t, c = first + e % SLICE;
      if (e < 2 * SLICE && c < DV) {
        if (e < SLICE) s.v[e] = wait_for(mail + MAIL_PROJECTIONS + VALUES + kv * DV + c, tag);
        else if (HEAD_NORM == 1) {
          float w = HEAD_NORM_W < 0 ? 1.f : vectors[HEAD_NORM_W + (HEAD_AFFINE == 2 ? h * DV : 0) + c];
          s.gate[e - SLICE] = OUTPUT_GATE ? w * swish(wait_for(mail + MAIL_PROJECTIONS + GATES + h * DV + c, tag)) : w;
        } else s.gate[e - SLICE] = 1;
      }
    }
    float S[PER][VEC];
    load_state(layer, unit, S);
    if (unit + GRID < UNITS) prefetch_state(layer, unit + GRID);
    __syncthreads();
    const float gamma = p.vectors[(u64)L * VECTORS + GAMMA + h];
    float o[VEC], v[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) { o[j] = 0; v[j] = s.v[t % ACROSS * VEC + j]; }
#pragma unroll
    for (int r = 0; r < PER; ++r) {
      bool any;
      float* at = state_at(layer, unit, r, any);
      if (any) {
        const int row = t / ACROSS + r * GROUPED;
        const float k = s.k[row], q = s.q[row];
#pragma unroll
        for (int j = 0; j < VEC; ++j) { S[r][j] = gamma * S[r][j] + k * v[j]; o[j] += q * S[r][j]; }
        if constexpr (VEC == 4) __stcs((float4*)at, make_float4(S[r][0], S[r][1], S[r][2], S[r][3]));
        else if constexpr (VEC == 2) __stcs((float2*)at, make_float2(S[r][0], S[r][1]));
        else __stcs(at, S[r][0]);
      }
    }
#pragma unroll
    for (int off = ACROSS; off < 32; off <<= 1)
#pragma unroll
      for (int j = 0; j < VEC; ++j) o[j] += __shfl_xor_sync(FULL, o[j], off);
    if (lane < ACROSS)
#pragma unroll
      for (int j = 0; j < VEC; ++j) s.sums[warp][lane * VEC + j] = o[j];
    __syncthreads();
    if (warp == 0) {
      const bool any = lane < SLICE && first + lane < DV;
      float sum = 0;
      if (any)
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += s.sums[w][lane];
      if (any) send(mail + MAIL_HEADS + h * DV + first + lane, sum * s.gate[lane], tag);
      if (HEAD_NORM == 1) {
        float square = warp_sum(sum * sum);
        if (lane == 0) send(mail + MAIL_STATS + unit, square, tag);
      } else {
        const int n = DV - first < SLICE ? DV - first : SLICE;
        float mean = warp_sum(sum) / n, away = any ? sum - mean : 0.f, square = warp_sum(away * away);
        if (lane == 0) { send(mail + MAIL_STATS + 2 * unit, mean, tag); send(mail + MAIL_STATS + 2 * unit + 1, square, tag); }
      }
    }
  }
  // 1 / sqrt(mean square + eps) of a head, and its mean, from what its units sent; by a whole warp.
  __device__ __forceinline__ void head_statistics(int h, float first_a, float first_b, const u64* mail, u32 tag, long long position) {
    float eps = HEAD_EPS;
    if (SCORE_NORM) {
      const float* globals = p.vectors + (u64)L * VECTORS;
      eps = -expm1f((float)(position + 1) * globals[LOG_GAMMA + h]) * globals[EPS_PER_HEAD + h];
    }
    float a = first_a, b = first_b;
    if (HEAD_NORM == 1) {
      for (int i = lane + 32; i < SLICES; i += 32) a += wait_for(mail + MAIL_STATS + h * SLICES + i, tag);
      a = warp_sum(a);
      if (lane == 0) s.root[h] = rsqrtf(a / DV + eps);
    } else {
      float sum = 0, square = 0;
      for (int i = lane; i < SLICES; i += 32) {
        const int n = DV - i * SLICE < SLICE ? DV - i * SLICE : SLICE;
        sum += n * (i == lane ? a : wait_for(mail + MAIL_STATS + 2 * (h * SLICES + i), tag));
      }
      const float mean = warp_sum(sum) / DV;
      for (int i = lane; i < SLICES; i += 32) {
        const int n = DV - i * SLICE < SLICE ? DV - i * SLICE : SLICE;
        float m = i == lane ? a : wait_for(mail + MAIL_STATS + 2 * (h * SLICES + i), tag);
        square += (i == lane ? b : wait_for(mail + MAIL_STATS + 2 * (h * SLICES + i) + 1, tag)) + n * (m - mean) * (m - mean);
      }
      square = warp_sum(square);
      if (lane == 0) { s.root[h] = rsqrtf(square / DV + eps); s.mean[h] = mean; }
    }
  }
  __device__ __forceinline__ float joined(int layer, int e, float o, const u64* mail, u32 tag) const {
    if (e >= E) return 0.f;
    const int h = e / DV;
    if (HEAD_NORM == 1) return o * s.root[h];
    const float* vectors = p.vectors + (u64)layer * VECTORS;
    const int c = HEAD_AFFINE == 2 ? e : e % DV;
    float y = (o - s.mean[h]) * s.root[h];
    if (HEAD_NORM_W >= 0) y = y * vectors[HEAD_NORM_W + c] + (HEAD_NORM_B >= 0 ? vectors[HEAD_NORM_B + c] : 0.f);
    return OUTPUT_GATE ? y * swish(wait_for(mail + MAIL_PROJECTIONS + GATES + e, tag)) : y;
  }
  // x <- the heads' normed and gated outputs.
  __device__ __forceinline__ void join(int layer, const u64* mail, u32 tag, long long position) {
    constexpr int ALL = up(Out::RUNS * Out::RUN / 2, THREADS), N = ALL < 4 ? ALL : 4;
#pragma unroll
    for (int first = 0; first < ALL; first += N) {
      u64 a[N], b[N];
      if (first == 0) {
        // The statistics of this warp's head are read in the same turn.
        const bool asks = warp < H && lane < SLICES;
        const u64* stats = mail + MAIL_STATS + STATS * (warp * SLICES + lane);
        u64 sa = 0, sb = 0;
        receive<N>(mail + MAIL_HEADS, tag, 0, E, a, b);
        u32 turns = 0;
        if (asks)
          for (;;) {
            sa = look(stats);
            if (STATS == 2) sb = look(stats + 1);
            if (is(sa, tag) && (STATS == 1 || is(sb, tag))) break;
            lose_patience(turns);
          }
        __syncwarp();
        for (int h = warp; h < H; h += WARPS) {
          float fa = asks ? value(sa) : 0.f, fb = asks ? value(sb) : 0.f;
          if (h != warp && lane < SLICES) {
            fa = wait_for(mail + MAIL_STATS + STATS * (h * SLICES + lane), tag);
            if (STATS == 2) fb = wait_for(mail + MAIL_STATS + STATS * (h * SLICES + lane) + 1, tag);
          }
          head_statistics(h, fa, fb, mail, tag, position);
        }
        __syncthreads();
      } else receive<N>(mail + MAIL_HEADS, tag, first, E, a, b);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        int k = 2 * ((first + i) * THREADS + t);
        if (k < Out::RUNS * Out::RUN)
          put2<Out>(k, joined(layer, k, value(a[i]), mail, tag), joined(layer, k + 1, value(b[i]), mail, tag));
      }
    }
    __syncthreads();
  }

  // ---- feed-forward
  __device__ __forceinline__ void send_hidden(const float* parts, int first, u64* mail, u32 tag, int layer) {
    const float* vectors = p.vectors + (u64)layer * VECTORS;
    constexpr int EACH = GateUp::INTERLEAVED ? 8 : 16;  // hidden values of a tile
    if (t < up(GateUp::PASS * EACH, 32) * 32) {
      const int j = t / EACH, row = t % EACH, tile = blockIdx.x + (first + j) * GRID, n = tile * EACH + row;
      const bool any = j < GateUp::PASS && n < F;
      float v = 0;
      if (any) {
        v = activation(total<GateUp>(parts, j, row, tile * 16 + row, vectors + SCALES2, BIAS2 < 0 ? nullptr : vectors + BIAS2));
        if (GateUp::INTERLEAVED) v *= total<GateUp>(parts, j, row + 8, tile * 16 + row + 8, vectors + SCALES2, BIAS2 < 0 ? nullptr : vectors + BIAS2);
      }
      if (HALVES) {
        float right = __shfl_down_sync(FULL, v, 1);
        if (any && row % 2 == 0) send(mail + MAIL_HIDDEN + n / 2, two(v, right), tag);
      } else if (any) send(mail + MAIL_HIDDEN + n, v, tag);
    }
  }
  // x <- the hidden values, normed if the model norms them.
  __device__ __forceinline__ void take_hidden(const u64* mail, u32 tag, int layer) {
    if constexpr (HALVES) {
      constexpr int ALL = up(Down::RUNS * Down::RUN / 4, THREADS), N = ALL < 4 ? ALL : 4;  // pairs of packets: four inputs
#pragma unroll
      for (int first = 0; first < ALL; first += N) {
        u64 a[N], b[N];
        receive<N>(mail + MAIL_HIDDEN, tag, first, HIDDEN_PACKETS, a, b);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          int k = 4 * ((first + i) * THREADS + t);
          u32 lo = k < F ? (u32)a[i] : 0, hi = k + 2 < F ? (u32)b[i] : 0;
          if (k < Down::RUNS * Down::RUN) *(uint2*)(x + (Down::INTEGER ? place(k) : k)) = make_uint2(lo, hi);
        }
      }
      __syncthreads();
    } else {
      constexpr int N = up(F / 2 + F % 2, THREADS);
      u64 a[N], b[N];
      receive<N>(mail + MAIL_HIDDEN, tag, 0, F, a, b);
      float v[N][2];
#pragma unroll
      for (int i = 0; i < N; ++i) { v[i][0] = value(a[i]); v[i][1] = 2 * (i * THREADS + t) + 1 < F ? value(b[i]) : 0.f; }
      if constexpr (INNER_NORM != 0) {
        Affine<N> affine;
        load_affine<N>(affine, F, INNER_NORM_W, INNER_NORM_B, layer);
        norm<N, INNER_NORM, INNER_NORM == 2>(v, v, F, NORM_EPS, affine);
      }
      put<Down, N>(v);
    }
  }

  // ---- the largest logits
  __device__ __forceinline__ void send_logits(const float* parts, int first) {
    if (t < up(Head::PASS * 16, 32) * 32) {
      const int j = t / 16, tile = blockIdx.x + (first + j) * GRID, n = tile * 16 + t % 16;
      u32 key = 0;
      if (j < Head::PASS && n < V) {
        float v = total<Head>(parts, j, t % 16, n, p.vectors + (u64)L * VECTORS + SCALES4, nullptr);
        p.logits[n] = v;
        key = ordered(v);
      }
#pragma unroll
      for (int o = 8; o; o >>= 1) { u32 other = __shfl_xor_sync(FULL, key, o); key = key > other ? key : other; }
      if (t % 16 == 0 && j < Head::PASS && tile < Head::TILES) p.tile_largest[tile] = key;
    }
  }
  __device__ __forceinline__ int block_count(int v) {
    v = __reduce_add_sync(FULL, v);
    int* r = (int*)s.red[red];
    red ^= 1;
    if (lane == 0) r[warp] = v;
    __syncthreads();
    int sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += r[w];
    return sum;
  }
  // Run by the block that finishes last. A logit of the 64 largest is no smaller than the 64th largest of the tiles' largest.
  __device__ __forceinline__ void choose(u8* room) {
    u32* keys = (u32*)room;
    u64* list = (u64*)(room + up(Head::TILES, 4) * 16);
    for (int i = t; i < Head::TILES; i += THREADS) keys[i] = __ldcg(p.tile_largest + i);
    if (t == 0) s.count = 0;
    __syncthreads();
    u32 floor = 0;
    if (Head::TILES > TOP)
      for (u32 bit = 1u << 31; bit >> 16; bit >>= 1) {  // to seven bits of mantissa: a few candidates more, half the turns
        int n = 0;
        for (int i = t; i < Head::TILES; i += THREADS) n += keys[i] >= (floor | bit);
        if (block_count(n) >= TOP) floor |= bit;
      }
    for (int i = t / 16; i < Head::TILES; i += THREADS / 16) {
      const int n = i * 16 + t % 16;
      if (keys[i] >= floor && n < V) {
        u32 key = ordered(__ldcg(p.logits + n));
        if (key >= floor) {
          u32 at = atomicAdd(&s.count, 1u);
          if (at < CANDIDATES) list[at] = (u64)key << 32 | (u32)~n;
        }
      }
    }
    __syncthreads();
    const u32 found = s.count, count = found < CANDIDATES ? found : CANDIDATES;
    for (u32 i = t; i < count; i += THREADS) {
      u64 me = list[i];
      u32 rank = 0;
      for (u32 j = 0; j < count; ++j) rank += list[j] > me;
      if (rank < TOP) {
        int n = (int)~(u32)me;
        p.result->tokens[rank] = n;
        p.result->logits[rank] = __ldcg(p.logits + n);
      }
    }
    if (t == 0) p.result->overflow = found > CANDIDATES;  // many equal logits: the host looks at all of them
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) step(const Params p) {
  extern __shared__ __align__(128) u8 room[];
  X* x = (X*)(room + WARPS * SLOTS * STAGE);
  Shared& s = *(Shared*)(room + WARPS * SLOTS * STAGE + X_BYTES);
  Worker w(p, s, room, x);
  const int t = w.t;
  w.begin();
  const u32 epoch = *(volatile u32*)p.control;
  const long long position = *(volatile long long*)p.position;
  for (int i = t; i < HALF; i += THREADS)  // the angle is an integer phase, exact at any position
    sincospif((float)(int)((u32)position * p.phases[i]) * 4.656612873077393e-10f, &s.sine[i], &s.cosine[i]);
  w.embed();
#pragma unroll 1
  for (int l = 0; l < L; ++l) {
    const u32 tag = epoch + 1 + l;
    u64 *mail = p.mail + (l & 1) * MAIL_SIDE, *before = p.mail + (~l & 1) * MAIL_SIDE;
    const float* vectors = p.vectors + (u64)l * VECTORS;
    w.prefetch_state(l, blockIdx.x);
    w.prefetch_vectors(l + 1);
    w.turn<Projections, !POST_NORM>(l > 0, before + MAIL_DOWN, tag - 1, FFN_NORM_W, FFN_NORM_B, l - 1, RETENTION_NORM_W, RETENTION_NORM_B, l);
    w.product<Projections>([&](int first, const float* parts) {
      w.send_rows<Projections>(parts, first, mail + MAIL_PROJECTIONS, tag, vectors + SCALES0, BIAS0 < 0 ? nullptr : vectors + BIAS0);
    });
#pragma unroll 1
    for (int unit = blockIdx.x; unit < UNITS; unit += GRID) {
      w.retain(l, unit, mail, tag);
      __syncthreads();
    }
    w.join(l, mail, tag, position);
    w.product<Out>([&](int first, const float* parts) {
      w.send_rows<Out>(parts, first, mail + MAIL_OUT, tag, vectors + SCALES1, BIAS1 < 0 ? nullptr : vectors + BIAS1);
    });
    w.turn<GateUp, !POST_NORM>(true, mail + MAIL_OUT, tag, RETENTION_NORM_W, RETENTION_NORM_B, l, FFN_NORM_W, FFN_NORM_B, l);
    w.product<GateUp>([&](int first, const float* parts) { w.send_hidden(parts, first, mail, tag, l); });
    w.take_hidden(mail, tag, l);
    w.product<Down>([&](int first, const float* parts) {
      w.send_rows<Down>(parts, first, mail + MAIL_DOWN, tag, vectors + SCALES3, BIAS3 < 0 ? nullptr : vectors + BIAS3);
    });
  }
  w.turn<Head, FINAL_NORM>(true, p.mail + (~L & 1) * MAIL_SIDE + MAIL_DOWN, epoch + L, FFN_NORM_W, FFN_NORM_B, L - 1, FINAL_NORM_W, FINAL_NORM_B, L);
  w.product<Head>([&](int first, const float* parts) { w.send_logits(parts, first); });
  __syncthreads();
  if (t == 0) {
    __threadfence();
    s.flag = atomicAdd(p.control + 1, 1u) == GRID - 1;
  }
  __syncthreads();
  if (s.flag) {
    __threadfence();
    w.choose(room);
    if (t == 0) {
      p.control[1] = 0;
      *p.control = epoch + L + 1;
      *p.position = position + 1;
    }
  }
}
