// From a matrix as the bundle stores it to its place on the device, as layout.py defines it; a thread makes one word of 32 bits.
// The bundle has (K, N), or (N, K) of an embedding; four-bit integers two a byte, the first in the low half.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Kind { F32 = 0, F16 = 1, BF16 = 2, I8 = 3, I4 = 4 };
struct Matrix {
  const u8* from;
  u8* to;
  u64 run_bytes;          // of a tile of integers, scales included
  int kind, rows, columns, padded_rows, runs, by_rows, interleaved;
  int grain, group, scale_bytes;  // of scales
};

__device__ int source_row(const Matrix& m, int row) {  // -1: padding
  if (!m.interleaved) return row < m.rows ? row : -1;
  const int half = m.rows / 2, within = row / 16 * 8 + row % 8;
  return within < half ? within + half * (row / 8 % 2) : -1;
}

__device__ u64 at_float(const Matrix& m, int row, int word) {  // of words of 32 bits: 32 a row and run
  const int in = word % 32;
  return ((u64)(row / 16) * m.runs + word / 32) * 2048 + row / 8 % 2 * 1024 + in / 16 * 512 + row % 8 * 64 + in % 16 * 4;
}

extern "C" __global__ void lay_out(const Matrix m) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const int words = m.runs * (m.kind < I8 ? 32 : 16);  // of a row
  if (row >= m.padded_rows) return;
  const int n = source_row(m, row);
  for (int word = blockIdx.y * blockDim.y + threadIdx.y; word < words; word += gridDim.y * blockDim.y) {
    auto index = [&](int k) { return m.by_rows ? (u64)n * m.columns + k : (u64)k * m.rows + n; };
    u32 v = 0;
    u64 at;
    if (m.kind == F32) {
      if (n >= 0 && word < m.columns) v = ((const u32*)m.from)[index(word)];
      at = at_float(m, row, word);
    } else if (m.kind < I8) {
      for (int j = 0; j < 2; ++j)
        if (n >= 0 && 2 * word + j < m.columns) v |= (u32)((const u16*)m.from)[index(2 * word + j)] << 16 * j;
      at = at_float(m, row, word);
    } else {
      const int run = word / 16, t = word % 16 / 4, i = word % 4;
      if (m.kind == I8) {
        for (int j = 0; j < 4; ++j) {
          const int k = run * 64 + i / 2 * 32 + i % 2 * 16 + t * 4 + j;
          v |= (u32)(n >= 0 && k < m.columns ? m.from[index(k)] ^ 0x80 : 0x80) << 8 * j;
        }
      } else {
        for (int e = 0; e < 8; ++e) {
          const int k = run * 128 + i * 32 + e / 4 * 16 + t * 4 + e % 4;
          u32 q = 8;
          if (n >= 0 && k < m.columns) { u64 p = index(k); q = (m.from[p / 2] >> 4 * (p % 2) & 15) ^ 8; }
          v |= q << 4 * (e / 2 + e % 2 * 4);
        }
      }
      at = ((u64)(row / 16) * m.runs + run) * m.run_bytes + row / 8 % 2 * 512 + (row % 8 * 4 + t) * 16 + i * 4;
    }
    *(u32*)(m.to + at) = v;
  }
}

// Scales by group, (K / group, N) or (N, K / group), behind the values of their runs.
extern "C" __global__ void lay_out_scales(const Matrix m) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const int run_columns = m.kind == I8 ? 64 : 128, each = run_columns / m.grain, groups = m.columns / m.group;
  if (row >= m.padded_rows) return;
  const int n = source_row(m, row);
  for (int i = blockIdx.y * blockDim.y + threadIdx.y; i < m.runs * each; i += gridDim.y * blockDim.y) {
    const int run = i / each, within = i % each, k = run * run_columns + within * m.grain;
    u32 v = 0;
    if (n >= 0 && k < m.columns) {
      const u64 from = m.by_rows ? (u64)n * groups + k / m.group : (u64)(k / m.group) * m.rows + n;
      v = m.scale_bytes == 4 ? ((const u32*)m.from)[from] : ((const u16*)m.from)[from];
    }
    u8* to = m.to + ((u64)(row / 16) * m.runs + run) * m.run_bytes + 1024 + (within * 16 + row % 8 * 2 + row / 8 % 2) * m.scale_bytes;
    if (m.scale_bytes == 4) *(u32*)to = v; else *(u16*)to = (u16)v;
  }
}
