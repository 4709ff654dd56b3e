// One decode step of a layer's retention, from the projections' output to the operand of the output projection, in one kernel:
//
//     q, k rotated by (cos, sin);  S' = γ S + kᵀ v;  o = q S';  y = swish(gate) · o / √(mean o² + eps) · weight
//
// The state is read once and written once, 16 bytes a thread and load, all loads of a block in flight before the first use.
// A head's Dv columns are shared out to the blocks of one thread block cluster, which adds up mean o² through distributed
// shared memory, so that norm and gate need no second kernel.
//
// Layout: projections (B, 2·H·half | 2·H·half | H·Dv | H·Dv) fp16 = first channels of q and k, second channels of q and k,
// v, gate, as graph/blocks.py joins them; state (B, H, Dk, Dv) fp32; y (B, H·Dv) fp16.
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kVector = 4;  // floats of a 16-byte access

template <int DK, int DV, int COLUMNS>
__global__ void __launch_bounds__(kThreads) RetentionStep(
    const half* __restrict__ projections, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
    const float* __restrict__ gamma, const float* __restrict__ weight, const float* __restrict__ before,
    float* __restrict__ after, half* __restrict__ y, int heads, float eps) {
  constexpr int kHalf = DK / 2;
  constexpr int kAcross = COLUMNS / kVector;      // threads side by side on one row
  constexpr int kGroups = kThreads / kAcross;     // rows in flight
  constexpr int kRows = DK / kGroups;             // rows of a thread
  static_assert(DK % kGroups == 0 && DV % COLUMNS == 0, "sizes");
  __shared__ float q_rotated[DK], k_rotated[DK];
  __shared__ float partial[kThreads / 32][COLUMNS];
  __shared__ float square_sum;

  const int part = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int across = threadIdx.x % kAcross, group = threadIdx.x / kAcross;
  const int column = part * COLUMNS + across * kVector;
  const size_t base = (static_cast<size_t>(sequence) * heads + head) * DK * DV + column;

  float4 s[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    s[r] = __ldcs(reinterpret_cast<const float4*>(before + base + static_cast<size_t>(group + r * kGroups) * DV));
  }

  // Everything above overlaps the kernel before, everything below reads what it wrote. The next kernel may start its own loads
  // only now, so at most two kernels run at once, and none reads a state that is still being written.
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();

  const size_t width = static_cast<size_t>(heads) * (2 * DK + 2 * DV);
  const half* row = projections + sequence * width;
  if (threadIdx.x < DK) {
    const bool is_key = threadIdx.x >= kHalf;
    const int pair = threadIdx.x % kHalf;
    const int channel = (is_key ? heads * kHalf : 0) + head * kHalf + pair;
    const float first = __half2float(row[channel]), second = __half2float(row[2 * heads * kHalf + channel]);
    const float c = cos_table[sequence * kHalf + pair], n = sin_table[sequence * kHalf + pair];
    float* target = is_key ? k_rotated : q_rotated;
    target[pair] = first * c - second * n;
    target[kHalf + pair] = second * c + first * n;
  }
  if (threadIdx.x == 0) square_sum = 0.0f;
  const half* v_row = row + static_cast<size_t>(heads) * 2 * DK + head * DV;
  const float2 v01 = __half22float2(*reinterpret_cast<const half2*>(v_row + column));
  const float2 v23 = __half22float2(*reinterpret_cast<const half2*>(v_row + column + 2));
  const float g = gamma[head];
  __syncthreads();

  float4 o = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = group + r * kGroups;
    const float k = k_rotated[i], q = q_rotated[i];
    float4 t = s[r];
    t.x = g * t.x + k * v01.x, t.y = g * t.y + k * v01.y, t.z = g * t.z + k * v23.x, t.w = g * t.w + k * v23.y;
    o.x += q * t.x, o.y += q * t.y, o.z += q * t.z, o.w += q * t.w;
    __stcs(reinterpret_cast<float4*>(after + base + static_cast<size_t>(i) * DV), t);
  }

  // Add up the row groups: within a warp by shuffles, across warps through shared memory.
#pragma unroll
  for (int offset = 16; offset >= kAcross; offset /= 2) {
    o.x += __shfl_down_sync(~0u, o.x, offset), o.y += __shfl_down_sync(~0u, o.y, offset);
    o.z += __shfl_down_sync(~0u, o.z, offset), o.w += __shfl_down_sync(~0u, o.w, offset);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < kAcross) *reinterpret_cast<float4*>(&partial[warp][lane * kVector]) = o;
  __syncthreads();
  float read = 0.0f;
  if (threadIdx.x < COLUMNS) {
#pragma unroll
    for (int each = 0; each < kThreads / 32; ++each) read += partial[each][threadIdx.x];
    float square = read * read;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) square += __shfl_down_sync(~0u, square, offset);
    if (lane == 0) atomicAdd(&square_sum, square);
  }

  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  if (threadIdx.x < COLUMNS) {
    float total = 0.0f;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) total += *cluster.map_shared_rank(&square_sum, rank);
    const int out = part * COLUMNS + threadIdx.x;
    const float gate = __half2float(v_row[static_cast<size_t>(heads) * DV + out]);
    const float normed = read * rsqrtf(total / DV + eps) * weight[out];
    y[(static_cast<size_t>(sequence) * heads + head) * DV + out] = __float2half(normed * gate / (1.0f + __expf(-gate)));
  }
  cluster.sync();  // no block may leave while another still reads its sum
}

template <int DK, int DV, int COLUMNS>
static cudaError_t Launch(const void* projections, const float* cos_table, const float* sin_table, const float* gamma,
                          const float* weight, const float* before, float* after, void* y, int batch, int heads, float eps,
                          bool overlap, cudaStream_t stream) {
  auto kernel = RetentionStep<DK, DV, COLUMNS>;
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (code != cudaSuccess) return code;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = DV / COLUMNS, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(DV / COLUMNS, heads, batch);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = attributes, config.numAttrs = overlap ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<const half*>(projections), cos_table, sin_table, gamma, weight, before,
                            after, static_cast<half*>(y), heads, eps);
}

// Returns a cudaError_t; `columns` chooses how a head is shared out: Dv / columns blocks. With `overlap` the
// launch may begin, and load its state, before the kernel in front of it on the stream has ended.
extern "C" int retention_step(const void* projections, const float* cos_table, const float* sin_table, const float* gamma,
                              const float* weight, const float* before, float* after, void* y, int batch, int heads, int columns,
                              float eps, int overlap, cudaStream_t stream) {
  switch (columns) {
    case 32: return Launch<256, 512, 32>(projections, cos_table, sin_table, gamma, weight, before, after, y, batch, heads, eps, overlap, stream);
    case 64: return Launch<256, 512, 64>(projections, cos_table, sin_table, gamma, weight, before, after, y, batch, heads, eps, overlap, stream);
    case 128: return Launch<256, 512, 128>(projections, cos_table, sin_table, gamma, weight, before, after, y, batch, heads, eps, overlap, stream);
    default: return cudaErrorInvalidValue;
  }
}
