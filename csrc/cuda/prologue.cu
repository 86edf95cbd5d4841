// The launcher of the prologue: it chooses the instance of the kernel for a call.

#include "prologue.cuh"

namespace clop::cuda {
namespace {

constexpr int64_t kLargestInt = 0x7fffffff;  // positions are int32 in `groups`; a grid has at most as many blocks

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class In, class Out, bool kIsAligned, int kThreads>
cudaError_t launch_as(const Prologue& p, cudaStream_t stream) {
  constexpr int kRows = kBlockThreads<kThreads> / kThreads;
  const auto n_blocks = static_cast<unsigned>((p.n_rows + kRows - 1) / kRows);
  return launch(prologue_kernel<In, Out, kIsAligned, kThreads>, n_blocks, kBlockThreads<kThreads>, kSharedBytes<kThreads>, stream,
                p);
}

template <class In, class Out>
cudaError_t launch_as(const Prologue& p, cudaStream_t stream) {
  constexpr int kVec = kVecOf<In>;
  const bool has_aligned_rows = p.column_stride == 1 && p.row_stride % kVec == 0 && p.width % kVec == 0 &&
                                is_aligned(p.embeddings) && is_aligned(p.prototypes);
  if (!has_aligned_rows) {
    if (p.width <= 32 * kHeld * kVec) return launch_as<In, Out, false, 32>(p, stream);
    return launch_as<In, Out, false, 256>(p, stream);
  }
  if (p.width <= 8 * kHeld * kVec) return launch_as<In, Out, true, 8>(p, stream);
  if (p.width <= 32 * kHeld * kVec) return launch_as<In, Out, true, 32>(p, stream);
  return launch_as<In, Out, true, 256>(p, stream);
}

template <class In>
cudaError_t launch_as(const Prologue& p, cudaStream_t stream) {
  switch (p.compute_dtype) {
    case Dtype::float64:
      break;
    case Dtype::float32:
      return launch_as<In, float>(p, stream);
    case Dtype::float16:
      return launch_as<In, __half>(p, stream);
    case Dtype::bfloat16:
      return launch_as<In, __nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int prologue(const Prologue& p, CUstream_st* stream) {
  if (p.n_rows < 0 || p.n_rows > kLargestInt || p.width < 1) return cudaErrorInvalidValue;
  if (p.n_views < 1 || p.n_views > kLargestInt || p.n_rows % p.n_views != 0) return cudaErrorInvalidValue;
  if (p.prototypes != nullptr && (p.labels == nullptr || p.n_classes < 1)) return cudaErrorInvalidValue;
  if (p.n_rows == 0) return cudaSuccess;  // a grid of no blocks is an error
  switch (p.dtype) {
    case Dtype::float64:
      break;
    case Dtype::float32:
      return launch_as<float>(p, stream);
    case Dtype::float16:
      return launch_as<__half>(p, stream);
    case Dtype::bfloat16:
      return launch_as<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

int find_prologue() { return find(prologue_kernel<float, float, false, 32>); }

}  // namespace clop::cuda
