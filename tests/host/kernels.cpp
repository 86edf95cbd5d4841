// The kernels of csrc/cuda/ and their launchers, compiled for a CPU, as a Python module; simt.h runs them. Structs are given as
// dictionaries of their fields, pointers as addresses or None.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "loss.cu"
#include "probes.h"
#include "prologue.cu"

namespace py = pybind11;
using namespace clop::cuda;

namespace {

template <class T>
void set(T& field, const py::handle& value) {
  if constexpr (std::is_pointer_v<T>)
    field = value.is_none() ? nullptr : reinterpret_cast<T>(value.cast<uintptr_t>());
  else if constexpr (std::is_enum_v<T>)
    field = T(value.cast<int>());
  else
    field = value.cast<T>();
}

// A field that is not given is one that the kernels at hand must not read.
#define FIELD(name) \
  if (fields.contains(#name)) set(p.name, fields[#name]);

void set_loss(Loss& p, const py::dict& fields){FIELD(n_rows) FIELD(width) FIELD(n_views) FIELD(n_classes) FIELD(dtype)
                                                   FIELD(compute_dtype) FIELD(pitch) FIELD(is_tf32) FIELD(groups) FIELD(labels)
                                                       FIELD(prototypes) FIELD(temperature) FIELD(scale) FIELD(scale_rest)
                                                           FIELD(prototype_weight) FIELD(distance) FIELD(reduction)
                                                               FIELD(normalize) FIELD(n_left) FIELD(negatives_only)
                                                                   FIELD(pairs_alone)}

Forward forward_of(const py::dict& fields) {
  Forward p = {};
  set_loss(p, fields);
  FIELD(embeddings)
  FIELD(stride_z_row)
  FIELD(stride_z_column) FIELD(loss) FIELD(zhat) FIELD(norms) FIELD(shift) FIELD(inverse_total) FIELD(negative) FIELD(counts)
      FIELD(distances) FIELD(partial_sums) FIELD(n_finished) FIELD(split_sums) FIELD(statistics) return p;
}

Backward backward_of(const py::dict& fields) {
  Backward p = {};
  set_loss(p, fields);
  FIELD(upstream)
  FIELD(weights)
  FIELD(zhat) FIELD(norms) FIELD(shift) FIELD(inverse_total) FIELD(negative) FIELD(counts) FIELD(given) FIELD(grad_z)
      FIELD(grad_temperature) FIELD(coefficients) FIELD(n_padded) FIELD(partial_sums) FIELD(n_finished) FIELD(split_sums)
          FIELD(sums) return p;
}

Panel panel_of(const py::dict& fields) {
  Panel p = {};
  set_loss(p, fields);
  FIELD(products)
  FIELD(first_row)
  FIELD(first_column) FIELD(n_panel_rows) FIELD(n_panel_columns) FIELD(statistics) FIELD(coefficients) FIELD(n_padded)
      FIELD(pairs) return p;
}

PrototypeGradient prototype_gradient_of(const py::dict& fields) {
  PrototypeGradient p = {};
  set_loss(p, fields);
  FIELD(upstream)
  FIELD(weights) FIELD(zhat) FIELD(counts) FIELD(by_class) FIELD(bounds) FIELD(n_parts) FIELD(partial_gradients) return p;
}

Prologue prologue_of(const py::dict& fields) {
  Prologue p = {};
  FIELD(embeddings)
  FIELD(stride_z_row)
  FIELD(stride_z_column) FIELD(order) FIELD(labels) FIELD(prototypes) FIELD(zhat) FIELD(norms) FIELD(distances) FIELD(n_finished)
      FIELD(n_rows) FIELD(n_views) FIELD(n_classes) FIELD(width) FIELD(pitch) FIELD(dtype) FIELD(compute_dtype) FIELD(distance)
          FIELD(normalize) FIELD(has_sides) return p;
}

// How a launch is split: the blocks that share left rows and right rows, and all blocks.
template <class Pass>
std::tuple<int, int, int64_t> shares_of(const Pass& p, int64_t n_processors) {
  Plan plan = {};
  with_shape(p, [&](auto tag) {
    plan = plan_of<typename decltype(tag)::Shape>(p, n_processors);
    return cudaSuccess;
  });
  return {plan.split.of_left, plan.split.of_right, plan.n_blocks};
}

// ---- the kernels that the harness itself is tested with -------------------------------------------------------------------

using Floats = py::array_t<float, py::array::c_style>;

Floats run_mma(const std::string& kind, Floats a, Floats b, Floats c) {
  const probes::Mma p = {kind, a.data(), b.data(), c.mutable_data()};
  launch(probes::mma_kernel, 1, 32, 24 * 32, nullptr, p);
  return c;
}

Floats run_reverse(const std::string& bug, Floats x) {
  const int n = int(x.size());
  // Allocations of their own, for AddressSanitizer to see their ends.
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
  m.def("most_blocks", &most_blocks);
  m.def("padded_rows", &padded_rows);
  m.def("n_counters", &n_counters);
  m.def("softmax_shares",
        [](const py::dict& fields, int64_t n_processors) { return shares_of(forward_of(fields), n_processors); });
  m.def("gradient_shares",
        [](const py::dict& fields, int64_t n_processors) { return shares_of(backward_of(fields), n_processors); });
  m.def("softmax_split_floats",
        [](const py::dict& fields, int64_t n_processors) { return split_floats(forward_of(fields), n_processors); });
  m.def("gradient_split_floats",
        [](const py::dict& fields, int64_t n_processors) { return split_floats(backward_of(fields), n_processors); });
  m.def("group", [](const py::dict& fields) {
    Grouping p = {};
    FIELD(n_instances) FIELD(n_views) FIELD(n_left) FIELD(labels) FIELD(groups) return group(p, nullptr);
  });
  m.def("prologue", [](const py::dict& fields) { return launch_prologue(prologue_of(fields), nullptr); });
  m.def("forward",
        [](const py::dict& fields, int64_t n_processors) { return forward(forward_of(fields), n_processors, nullptr); });
  m.def("pair_softmax",
        [](const py::dict& fields, int64_t n_processors) { return pair_softmax(forward_of(fields), n_processors, nullptr); });
  m.def("backward",
        [](const py::dict& fields, int64_t n_processors) { return backward(backward_of(fields), n_processors, nullptr); });
  m.def("prototype_gradient", [](const py::dict& fields) { return prototype_gradient(prototype_gradient_of(fields), nullptr); });
  m.def("panel_softmax", [](const py::dict& fields) { return panel_softmax(panel_of(fields), nullptr); });
  m.def("panel_loss", [](const py::dict& fields) { return panel_loss(forward_of(fields), nullptr); });
  m.def("coefficients", [](const py::dict& fields) { return coefficients(backward_of(fields), nullptr); });
  m.def("panel_pairs", [](const py::dict& fields) { return panel_pairs(panel_of(fields), nullptr); });
  m.def("panel_finish", [](const py::dict& fields) { return panel_finish(backward_of(fields), nullptr); });
  m.def("mma", &run_mma);
  m.def("reverse", &run_reverse);
  m.def("sum_by_shuffles", &sum_by_shuffles);
}
