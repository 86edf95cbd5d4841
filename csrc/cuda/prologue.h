// First launch of the CUDA loss: what host code needs to call it. Knows neither torch nor CUDA's headers.
#pragma once

#include "loss.h"

namespace clop::cuda {

// N rows, D wide; B = N / n_views instances; K prototypes. A position is an index into the rows as sorted by group. The
// values of `order` are trusted; labels are cut to the prototypes that there are.
struct Prologue {
  const void* embeddings;                 // (N, D) dtype; row v * B + b is view v of instance b
  int64_t stride_z_row, stride_z_column;  // in elements
  const int32_t* order;                   // (N,), the row at each position. Null: position b * n_views + v holds row v * B + b,
                                          // or with sides position k row k
  const int64_t* labels;                  // (B,), negative: unlabelled. Not read without prototypes
  const float* prototypes;                // (K, D) contiguous, or null
  void* zhat;                             // (N, D) compute_dtype, by position, rows `pitch` numbers apart, as in Loss
  float* norms;                           // (N,), by position, not clamped
  float* distances;                       // (N,), by position: 0 for a row without label, NaN for one that is not finite
  unsigned* n_finished;                   // (n_counters(N),), set to zero, for the launch that follows; or null
  int64_t n_rows, n_views, n_classes, width, pitch;
  Dtype dtype, compute_dtype;
  Distance distance;
  bool normalize;  // else zhat is z, rounded
  bool has_sides;
};

// Both return a cudaError_t: 0, or why the kernel could not be launched, or has no code for the current device.
int launch_prologue(const Prologue& prologue, CUstream_st* stream);
int find_prologue();

}  // namespace clop::cuda
