// The Python module of the harness. It compiles the kernels of csrc/cuda/ and their launchers for a CPU, where simt.h runs them,
// and lets a test set and ask things of this simulated GPU. The operators are in runtime.cpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <tuple>

#include "gpu.h"
#include "loss.h"
#include "simt.h"

namespace {

// How the last launch of a pass over pairs was split: how many blocks share left rows, how many share right rows, and how many
// there are.
using Shares = std::tuple<int, int, int64_t>;
std::map<std::string, Shares> shares;

template <class Pass>
void remember(const char* pass, const Pass& p, unsigned n_blocks) {
  shares[pass] = {p.split.of_left, p.split.of_right, n_blocks};
}

}  // namespace

template <>
struct simt::Observer<clop::cuda::Forward> {
  static void see(const clop::cuda::Forward& p, unsigned n_blocks) { remember("softmax", p, n_blocks); }
};
template <>
struct simt::Observer<clop::cuda::Backward> {
  static void see(const clop::cuda::Backward& p, unsigned n_blocks) { remember("gradient", p, n_blocks); }
};

#include "loss.cu"
#include "probes.h"
#include "prologue.cu"

namespace py = pybind11;
using namespace clop::cuda;

namespace {

// The plan of a gradient in bfloat16 without sides, on a GPU with n_processors: its shares, and the length of split_sums.
std::tuple<Shares, int64_t> gradient_plan(int64_t n_rows, int64_t width, int64_t n_processors) {
  static const int32_t groups = 0;
  Backward p = {};
  p.n_rows = n_rows, p.width = width, p.n_views = 1, p.n_left = -1, p.groups = &groups, p.compute_dtype = clop::Dtype::bfloat16;
  Plan plan = {};
  with_shape(p, [&](auto tag) {
    plan = plan_of<typename decltype(tag)::Shape>(p, n_processors);
    return cudaSuccess;
  });
  return {Shares(plan.split.of_left, plan.split.of_right, plan.n_blocks), split_floats(p, n_processors)};
}

// ---- kernels that test the harness itself ---------------------------------------------------------------------------------

using Floats = py::array_t<float, py::array::c_style>;

Floats run_mma(const std::string& kind, Floats a, Floats b, Floats c) {
  const probes::Mma p = {kind, a.data(), b.data(), c.mutable_data()};
  launch(probes::mma_kernel, 1, 32, 24 * 32, nullptr, p);
  return c;
}

Floats run_reverse(const std::string& bug, Floats x) {
  const int n = int(x.size());
  // Separate allocations, so that AddressSanitizer sees where they end.
  std::unique_ptr<float[]> from(new float[n]), to(new float[n]);
  std::copy(x.data(), x.data() + n, from.get());
  std::fill(to.get(), to.get() + n, -1.0f);
  const probes::Reverse p = {bug, from.get(), to.get(), n};
  const auto n_blocks = unsigned((n + probes::kReversed - 1) / probes::kReversed);
  launch(probes::reverse_kernel, n_blocks, probes::kReversed, 4 * probes::kReversed, nullptr, p);
  return Floats(n, to.get());
}

float sum_by_shuffles(Floats x) {
  float sum = 0;
  const float* const from = x.data();
  simt::launch(1, 32, 0, [&] {
    float mine = from[threadIdx.x];
    for (int apart = 16; apart > 0; apart /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, apart);
    if (threadIdx.x == 7) sum = mine;
  });
  return sum;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("set_order", [](const std::string& order, uint64_t seed) {
    simt::set_order(order == "forward"   ? simt::Order::forward
                    : order == "reverse" ? simt::Order::reverse
                                         : simt::Order::shuffled,
                    seed);
  });
  m.def("set_n_processors", [](int64_t n_processors) { host::n_processors = n_processors; });
  m.def("set_launches", [](bool launches) { simt::launches = launches; });
  m.def("shares", [] { return shares; });
  m.def("gradient_plan", &gradient_plan);
  m.def("mma", &run_mma);
  m.def("reverse", &run_reverse);
  m.def("sum_by_shuffles", &sum_by_shuffles);
}
