// The largest KEPT logits of each row, largest first, equal ones by token, NaN before all.
//
// The KEPT-th largest of the threads' own largest bounds the KEPT-th largest of the row from below, so only few values pass it. They
// are sorted with their tokens. More than fit (many equal ones) sets found[row] to -1, and the host looks at the whole row.
#pragma once
#include "common.cuh"

constexpr int KEPT = 64, TOP_THREADS = 1024, CANDIDATES = 1024;
struct Top {
  const float* logits;  // (rows, V)
  const Slots* slots;   // where the results go
  const int* places;    // (rows), whose logits a row is
  int step;             // whether this is the last kernel of a step: then positions and counters go on
};
__device__ __forceinline__ u32 order_of(float x) {  // larger for larger numbers; NaN is the largest
  const u32 bits = __float_as_uint(x);
  return x != x ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 order) {
  return order == 0xffffffffu ? __uint_as_float(0x7fffffffu) : __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}
template <class T>
__device__ __forceinline__ void sort_descending(T* x) {  // TOP_THREADS numbers, one a thread
  const int i = threadIdx.x;
  for (int size = 2; size <= TOP_THREADS; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      const int other = i ^ step;
      if (other > i) {
        const T a = x[i], b = x[other];
        if ((a < b) == ((i & size) == 0)) x[i] = b, x[other] = a;
      }
    }
  __syncthreads();
}
extern "C" __global__ void __launch_bounds__(TOP_THREADS) top(const __grid_constant__ Top p) {
  __shared__ u64 candidates[CANDIDATES];
  __shared__ int count;
  u32* largest = (u32*)candidates;
  const int tid = threadIdx.x, row = blockIdx.x, kept = V < KEPT ? V : KEPT;
  release_next();
  await_previous();
  const Slots slots = *p.slots;
  const int place = p.places[row];
  const float* logits = p.logits + (i64)row * V;
  float* kept_logits = slots.logits + (i64)place * V;
  u32 mine = 0;
  for (int i = tid; i < V; i += TOP_THREADS) {
    const float logit = logits[i];
    const u32 o = order_of(logit);
    mine = o > mine ? o : mine;
    kept_logits[i] = logit;
  }
  largest[tid] = mine;
  if (tid == 0) {
    count = 0;
    if (p.step) slots.positions[row] += 1;
    if (p.step && row == 0) slots.counters[0] += 1, slots.counters[1] += 1;
  }
  sort_descending(largest);
  const u32 bound = largest[KEPT - 1];
  __syncthreads();
  candidates[tid] = 0;
  __syncthreads();
  for (int i = tid; i < V; i += TOP_THREADS) {
    const u32 o = order_of(logits[i]);
    if (o >= bound) {
      const int at = atomicAdd(&count, 1);
      if (at < CANDIDATES) candidates[at] = (u64)o << 32 | (u32)~i;
    }
  }
  sort_descending(candidates);
  if (tid < kept) {
    slots.tokens[place * KEPT + tid] = (int)~(u32)candidates[tid];
    slots.largest[place * KEPT + tid] = value_of((u32)(candidates[tid] >> 32));
  }
  if (tid == 0) slots.found[place] = count > CANDIDATES ? -1 : kept;
}
