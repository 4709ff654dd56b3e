// Enough of CUDA to run a kernel of kernels/*.cuh on a CPU, a thread for a thread: barriers of a block and of its warps, shuffles, one
// block after the other. Copies are made at once, so waiting for them is nothing. A race between threads may go unseen here.
#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct Place { int x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline thread_local Place threadIdx, blockIdx, gridDim, blockDim;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) alignas(n)

inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline float exchanged[32][32];
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }
inline float __shfl_sync(u32, float value, int from) {
  const int warp = threadIdx.x / 32;
  exchanged[warp][threadIdx.x % 32] = value;
  __syncwarp();
  const float other = exchanged[warp][from % 32];
  __syncwarp();
  return other;
}
inline void commit() {}
template <int N> inline void wait_copies() {}
inline void await_previous() {}
inline void release_next() {}
template <bool ALIGNED> inline void copy_floats(float* to, const float* from, bool valid) {
  for (int i = 0; i < (ALIGNED ? 4 : 1); ++i) to[i] = valid ? from[i] : 0.f;
}

template <class Kernel, class Parameters>
void launch(Kernel kernel, Place grid, int threads, const Parameters& p) {
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) {
        block_barrier = std::make_unique<std::barrier<>>(threads);
        warp_barriers.clear();
        for (int warp = 0; warp < threads / 32; ++warp) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
        std::vector<std::thread> all;
        for (int t = 0; t < threads; ++t)
          all.emplace_back([&, t] {
            threadIdx = {t, 0, 0}, blockIdx = {x, y, z}, gridDim = grid, blockDim = {threads, 1, 1};
            kernel(p);
            block_barrier->arrive_and_drop();
            warp_barriers[t / 32]->arrive_and_drop();
          });
        for (std::thread& each : all) each.join();
      }
}
