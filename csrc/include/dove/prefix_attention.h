#pragma once

#include <cstdint>

#include "dove/dispatch.h"
#include "dove/dtype.h"

namespace dove {

// Attention of ragged rows of new positions to what each has cached and to each other. An entry (heads, head_dim) of q,
// k and v has adjacent channels; strides are in elements. Positions: entry j of a row is at start + j.
struct PrefixAttentionParams {
  const void* q;  // (total, heads, head_dim) each, before rotary
  const void* k;
  const void* v;
  int64_t q_stride[2];  // from entry to entry, from head to head
  int64_t k_stride[2];
  int64_t v_stride[2];
  void* out;                  // (total, heads, head_dim) contiguous: written
  const int32_t* cu_seqlens;  // (rows + 1,): from 0 to total, non-decreasing
  const float* cos;           // (positions, rotary_dim) each: every row fits
  const float* sin;
  void* k_cache;  // (slots, heads, max_positions, head_dim) each, or null: no cache
  void* v_cache;
  const int32_t* slots;        // (rows,): different ones
  const int32_t* starts;       // (rows,): cached positions
  const int32_t* key_lengths;  // (rows,), or null: all of a row's new positions are keys; only without a cache
  int64_t max_positions;
  int64_t rows;
  int64_t heads;
  int64_t head_dim;
  int64_t rotary_dim;
  float scale;
  bool causal;
  Dtype dtype;
  int num_threads;
};

DOVE_DECLARE_CPU_KERNEL(prefix_attention, PrefixAttentionParams)

}  // namespace dove
