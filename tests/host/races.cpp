// Runs every kernel of csrc/cuda/ under ThreadSanitizer. The sanitizer takes fibers for threads, and reports accesses that no
// barrier orders as races. The operators launch the kernels, as in any other test. With an argument, the program instead runs the
// kernel of probes.h with that bug. The results are not checked here: the Python tests do that.
#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "gpu.h"
#include "loss.cu"
#include "probes.h"
#include "prologue.cu"

using namespace clop::cuda;
using clop::Distance;
using clop::Positives;
using clop::Reduction;
using torch::headeronly::ScalarType;

namespace {

std::mt19937 generator(1);

// The options of an operator, all zero at first.
struct Given {
#define FIELD(kind, name) CLOP_PARAMETER_OF_##kind name = {};
  CLOP_OPTIONS(FIELD)
  CLOP_CUDA_SETTINGS(FIELD)
#undef FIELD
};
#define PASS(kind, name) , o.name
#define PASS_NO_TENSOR(kind, name) , std::nullopt
#define PASS_OPTIONS CLOP_OPTIONS(PASS) CLOP_NUMBERS(PASS_NO_TENSOR) CLOP_CUDA_SETTINGS(PASS)

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype = ScalarType::Float) {
  return torch::stable::empty(sizes, dtype);
}

template <class T, class Value>
Tensor filled(const std::vector<int64_t>& sizes, ScalarType dtype, Value&& value) {
  Tensor tensor = empty(sizes, dtype);
  T* const numbers = static_cast<T*>(tensor.mutable_data_ptr());
  for (int64_t k = 0; k < tensor.numel(); ++k) numbers[k] = T(value(k));
  return tensor;
}

Tensor normal(const std::vector<int64_t>& sizes) {
  std::normal_distribution<float> distribution;
  return filled<float>(sizes, ScalarType::Float, [&](int64_t) { return distribution(generator); });
}

Tensor integers(const std::vector<int64_t>& values) {
  return filled<int64_t>({int64_t(values.size())}, ScalarType::Long, [&](int64_t k) { return values[k]; });
}

// One step of a loss with two views and four classes, on a GPU of n_processors. With sides and labels, there is one view.
void step(int64_t n_rows, int64_t width, ScalarType compute_dtype, bool by_label, double temperature, int64_t n_processors,
          int64_t n_left = -1) {
  host::n_processors = n_processors;
  const int64_t n_views = n_left >= 0 && by_label ? 1 : 2, n_instances = n_rows / n_views, n_classes = 4;
  Given o;
  o.temperature = temperature, o.prototype_weight = 1.0, o.n_views = n_views;
  o.positives = int64_t(by_label ? Positives::label : Positives::instance), o.distance = int64_t(Distance::euclidean);
  o.reduction = int64_t(Reduction::mean), o.compute_dtype = compute_dtype, o.normalize = true, o.n_left = n_left;

  const Tensor embeddings = normal({n_rows, width}), prototypes = normal({n_classes, width});
  const Tensor labels = filled<int64_t>({n_instances}, ScalarType::Long, [&](int64_t b) { return b % n_classes; });
  const int64_t pitch = (width + 7) / 8 * 8;  // rows of zhat begin at multiples of 16 bytes; a number has at least 2 bytes
  const Tensor memory = empty({n_rows, pitch}, compute_dtype);
  const Tensor zhat = torch::stable::narrow(const_cast<Tensor&>(memory), 1, 0, width);
  const Tensor upstream = filled<float>({}, ScalarType::Float, [](int64_t) { return 1.0f; });

  const Tensor table = by_label ? groups(labels PASS_OPTIONS) : empty({3, 0}, ScalarType::Int);
  const auto [loss, norms, shift, inverse_total, negative, counts] =
      forward(embeddings, zhat, table, labels, prototypes PASS_OPTIONS);
  backward(upstream, std::nullopt, embeddings, zhat, norms, shift, inverse_total, negative, table, counts, labels, prototypes,
           true PASS_OPTIONS);

  if (by_label && n_views == 1) {
    pair_softmax(zhat, table PASS_OPTIONS);
    pair_gradient(zhat, table, normal({4, n_rows}) PASS_OPTIONS);
  }

  if (n_rows > 64) return;  // the other kernels do not depend on the shape
  const Tensor products = normal({n_rows, n_rows}), statistics = empty({4, n_rows}), sums = normal({n_rows, width});
  const auto [again, distances] = prologue(embeddings, zhat, table, labels, prototypes PASS_OPTIONS);
  panel_softmax(products, 0, 0, statistics, zhat, table, false PASS_OPTIONS);
  panel_loss(statistics, distances, zhat, table, labels, prototypes PASS_OPTIONS);
  const auto [laid_out, n_finished] = coefficients(std::nullopt, zhat, shift, inverse_total, negative, table PASS_OPTIONS);
  panel_pairs(products, 0, 0, laid_out, zhat, table PASS_OPTIONS);
  panel_finish(sums, n_finished, upstream, std::nullopt, embeddings, zhat, again, table, counts, labels, prototypes,
               true PASS_OPTIONS);

  host::n_processors = 1;  // so that prototype_kernel has few blocks
  const Tensor by_class = filled<int64_t>({n_rows}, ScalarType::Long, [](int64_t k) { return k; });
  const Tensor bounds = integers({0, n_rows / 4, n_rows / 2, n_rows / 2, n_rows});
  prototype_gradient(upstream, std::nullopt, zhat, counts, by_class, bounds, prototypes PASS_OPTIONS);
}

}  // namespace

int main(int n_arguments, char** arguments) {
  if (n_arguments > 1) {
    const std::vector<float> x(128, 1.0f);
    std::vector<float> y(128);
    const probes::Reverse p = {arguments[1], x.data(), y.data(), 128};
    launch(probes::reverse_kernel, 2, probes::kReversed, 4 * probes::kReversed, nullptr, p);
    return 0;
  }
  // Fibers are expensive under ThreadSanitizer, so the cases are small. 130 rows make two blocks of 128 rows, the second ragged;
  // on more than one processor two blocks share each. 34 rows make one block of rows.
  simt::set_order(simt::Order::forward, 0);
  step(130, 37, ScalarType::Float, true, 0.1, 1);
  step(130, 128, ScalarType::BFloat16, false, 0.01, 2);
  step(130, 256, ScalarType::Half, true, 0.1, 4);
  step(130, 64, ScalarType::BFloat16, true, 0.1, 1000, 57);
  simt::set_order(simt::Order::reverse, 0);
  step(34, 37, ScalarType::Float, true, 0.1, 1);
  step(34, 128, ScalarType::Float, false, 0.1, 1);
  step(34, 37, ScalarType::Float, false, 0.01, 1, 17);
  std::puts("no races");
  return 0;
}
