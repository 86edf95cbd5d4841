// The kernels of csrc/cuda/ and their launchers, compiled for a CPU, as a Python module; simt.h runs them. Structs are given as
// dictionaries of their fields, pointers as addresses or None.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

#define FIELD(name) set(p.name, fields[#name]);

void set_loss(Loss& p, const py::dict& fields) {
  FIELD(n_rows) FIELD(width) FIELD(n_views) FIELD(n_classes) FIELD(dtype) FIELD(compute_dtype) FIELD(is_tf32) FIELD(groups)
  FIELD(labels) FIELD(prototypes) FIELD(temperature) FIELD(scale) FIELD(scale_rest) FIELD(prototype_weight) FIELD(distance)
  FIELD(reduction)
}

int run_forward(const py::dict& fields, int64_t n_processors) {
  Forward p;
  set_loss(p, fields);
  FIELD(embeddings) FIELD(stride_z_row) FIELD(stride_z_column) FIELD(loss) FIELD(zhat) FIELD(norms) FIELD(shift) FIELD(total)
  FIELD(negative) FIELD(counts) FIELD(distances) FIELD(partial_sums) FIELD(n_finished)
  return forward(p, n_processors, nullptr);
}

int run_backward(const py::dict& fields, int64_t n_processors) {
  Backward p;
  set_loss(p, fields);
  FIELD(upstream) FIELD(weights) FIELD(zhat) FIELD(norms) FIELD(shift) FIELD(total) FIELD(negative) FIELD(counts) FIELD(grad_z)
  FIELD(grad_temperature) FIELD(coefficients) FIELD(n_padded) FIELD(partial_sums) FIELD(n_finished)
  return backward(p, n_processors, nullptr);
}

int run_prototype_gradient(const py::dict& fields) {
  PrototypeGradient p;
  set_loss(p, fields);
  FIELD(upstream) FIELD(weights) FIELD(zhat) FIELD(counts) FIELD(by_class) FIELD(bounds) FIELD(n_parts) FIELD(partial_gradients)
  return prototype_gradient(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("set_order", [](const std::string& order, uint64_t seed) {
    simt::set_order(order == "forward"   ? simt::Order::forward
                    : order == "reverse" ? simt::Order::reverse
                                         : simt::Order::shuffled,
                    seed);
  });
  m.def("n_blocks_of", &n_blocks_of);
  m.def("forward", &run_forward);
  m.def("backward", &run_backward);
  m.def("prototype_gradient", &run_prototype_gradient);
  define_probes(m);
}
