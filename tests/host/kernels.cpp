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

// A field that is not given is one that the kernels at hand must not read.
#define FIELD(name) \
  if (fields.contains(#name)) set(p.name, fields[#name]);

void set_loss(Loss& p, const py::dict& fields) {
  FIELD(n_rows) FIELD(width) FIELD(n_views) FIELD(n_classes) FIELD(dtype) FIELD(compute_dtype) FIELD(is_tf32) FIELD(groups)
  FIELD(labels) FIELD(prototypes) FIELD(temperature) FIELD(scale) FIELD(scale_rest) FIELD(prototype_weight) FIELD(distance)
  FIELD(reduction)
}

Forward forward_of(const py::dict& fields) {
  Forward p = {};
  set_loss(p, fields);
  FIELD(embeddings) FIELD(stride_z_row) FIELD(stride_z_column) FIELD(loss) FIELD(zhat) FIELD(norms) FIELD(shift) FIELD(total)
  FIELD(negative) FIELD(counts) FIELD(distances) FIELD(partial_sums) FIELD(n_finished) FIELD(statistics)
  return p;
}

Backward backward_of(const py::dict& fields) {
  Backward p = {};
  set_loss(p, fields);
  FIELD(upstream) FIELD(weights) FIELD(zhat) FIELD(norms) FIELD(shift) FIELD(total) FIELD(negative) FIELD(counts) FIELD(grad_z)
  FIELD(grad_temperature) FIELD(coefficients) FIELD(n_padded) FIELD(partial_sums) FIELD(n_finished) FIELD(sums)
  return p;
}

Panel panel_of(const py::dict& fields) {
  Panel p = {};
  set_loss(p, fields);
  FIELD(products) FIELD(first_row) FIELD(first_column) FIELD(n_panel_rows) FIELD(n_panel_columns) FIELD(statistics)
  FIELD(coefficients) FIELD(n_padded) FIELD(pairs)
  return p;
}

PrototypeGradient prototype_gradient_of(const py::dict& fields) {
  PrototypeGradient p = {};
  set_loss(p, fields);
  FIELD(upstream) FIELD(weights) FIELD(zhat) FIELD(counts) FIELD(by_class) FIELD(bounds) FIELD(n_parts) FIELD(partial_gradients)
  return p;
}

Prologue prologue_of(const py::dict& fields) {
  Prologue p = {};
  FIELD(embeddings) FIELD(stride_z_row) FIELD(stride_z_column) FIELD(order) FIELD(labels) FIELD(prototypes) FIELD(zhat) FIELD(norms)
  FIELD(distances) FIELD(n_finished) FIELD(n_rows) FIELD(n_views) FIELD(n_classes) FIELD(width) FIELD(dtype) FIELD(compute_dtype)
  FIELD(distance)
  return p;
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
  m.def("prologue", [](const py::dict& fields) { return launch_prologue(prologue_of(fields), nullptr); });
  m.def("forward", [](const py::dict& fields, int64_t n_processors) { return forward(forward_of(fields), n_processors, nullptr); });
  m.def("backward", [](const py::dict& fields, int64_t n_processors) { return backward(backward_of(fields), n_processors, nullptr); });
  m.def("prototype_gradient", [](const py::dict& fields) { return prototype_gradient(prototype_gradient_of(fields), nullptr); });
  m.def("panel_softmax", [](const py::dict& fields) { return panel_softmax(panel_of(fields), nullptr); });
  m.def("panel_loss", [](const py::dict& fields) { return panel_loss(forward_of(fields), nullptr); });
  m.def("coefficients", [](const py::dict& fields) { return coefficients(backward_of(fields), nullptr); });
  m.def("panel_pairs", [](const py::dict& fields) { return panel_pairs(panel_of(fields), nullptr); });
  m.def("panel_finish", [](const py::dict& fields) { return panel_finish(backward_of(fields), nullptr); });
  define_probes(m);
}
