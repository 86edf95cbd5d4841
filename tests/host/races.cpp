// Every kernel of csrc/cuda/ once more, under ThreadSanitizer: it takes the fibers for threads, and what no barrier orders for a race.
// With an argument, a kernel of probes.h with that bug. Numbers are not looked at: the Python tests do that.
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "loss.cu"
#include "probes.h"
#include "prologue.cu"

using namespace clop::cuda;

namespace {

std::mt19937 generator(1);

std::vector<float> normal(size_t n) {
  std::normal_distribution<float> distribution;
  std::vector<float> x(n);
  for (float& value : x) value = distribution(generator);
  return x;
}

void expect_success(int error) {
  if (error != 0) throw std::runtime_error("cudaError_t " + std::to_string(error));
}

// One step of a loss of two views and 4 classes; on a GPU of so many processors. With sides, labels are of one view.
void step(int64_t n_rows, int64_t width, Dtype dtype, bool by_label, float temperature, int64_t n_processors,
          int64_t n_left = -1) {
  const int64_t n_views = n_left >= 0 && by_label ? 1 : 2, n_instances = n_rows / n_views, n_classes = 4,
                n_padded = padded_rows(n_rows), n_blocks = most_blocks(n_rows);
  const std::vector<float> z = normal(n_rows * width), prototypes = normal(n_classes * width);
  std::vector<int64_t> labels(n_instances);
  for (int64_t b = 0; b < n_instances; ++b) labels[b] = b % n_classes;
  std::vector<int32_t> groups(3 * n_rows);
  // Rows of zhat begin at multiples of 16 bytes, of numbers of at most 4.
  const int64_t pitch = (width + 7) / 8 * 8;
  std::vector<float> zhat(n_rows * pitch), norms(n_rows), shift(n_rows), inverse_total(n_rows), negative(n_rows), counts(2);
  std::vector<float> loss(n_rows), distances(n_rows), partial_sums(kPartialSums * n_blocks), coefficients_memory(6 * n_padded),
      statistics(4 * n_rows);
  std::vector<float> grad(n_rows * width), sums = normal(n_rows * width), products = normal(n_rows * n_rows),
                                           pairs(n_rows * n_rows);
  std::vector<unsigned> n_finished(n_counters(n_rows), 77);
  const float upstream = 1.0f;
  float grad_temperature = 0.0f;

  Loss of = {};
  of.n_rows = n_rows, of.width = width, of.pitch = pitch, of.n_views = n_views, of.n_left = n_left, of.n_classes = n_classes;
  of.dtype = Dtype::float32, of.compute_dtype = dtype;
  of.groups = by_label ? groups.data() : nullptr;
  of.labels = labels.data(), of.prototypes = prototypes.data();
  of.scale = 1.44269504f / temperature, of.prototype_weight = 1.0f, of.distance = Distance::euclidean,
  of.reduction = Reduction::mean;

  Forward f = {};
  static_cast<Loss&>(f) = of;
  f.embeddings = z.data(), f.stride_z_row = width, f.stride_z_column = 1;
  f.loss = loss.data(), f.zhat = zhat.data(), f.norms = norms.data(), f.shift = shift.data();
  f.inverse_total = inverse_total.data(), f.negative = negative.data(), f.counts = counts.data();
  f.distances = distances.data(), f.partial_sums = partial_sums.data(), f.n_finished = n_finished.data();
  f.statistics = statistics.data();

  Backward b = {};
  static_cast<Loss&>(b) = of;
  b.upstream = &upstream, b.zhat = zhat.data(), b.norms = norms.data(), b.shift = shift.data();
  b.inverse_total = inverse_total.data(), b.negative = negative.data(), b.counts = counts.data();
  b.grad_z = grad.data(), b.grad_temperature = &grad_temperature;
  b.coefficients = coefficients_memory.data(), b.n_padded = n_padded;
  b.partial_sums = partial_sums.data(), b.n_finished = n_finished.data(), b.sums = sums.data();

  std::vector<float> split_sums(std::max(split_floats(f, n_processors), split_floats(b, n_processors)));
  f.split_sums = b.split_sums = split_sums.data();

  Grouping grouping = {n_instances, n_views, by_label ? n_left : -1, labels.data(), groups.data()};
  expect_success(group(grouping, nullptr));
  expect_success(forward(f, n_processors, nullptr));
  expect_success(backward(b, n_processors, nullptr));

  if (by_label && n_views == 1) {
    const std::vector<float> given = normal(4 * n_rows);
    f.pairs_alone = b.pairs_alone = true, b.given = given.data();
    split_sums.resize(std::max(split_floats(f, n_processors), split_floats(b, n_processors)));
    f.split_sums = b.split_sums = split_sums.data();
    expect_success(pair_softmax(f, n_processors, nullptr));
    expect_success(backward(b, n_processors, nullptr));
    f.pairs_alone = b.pairs_alone = false;
  }

  if (n_rows > 64) return;  // the rest does not depend on the shape
  Panel p = {};
  static_cast<Loss&>(p) = of;
  p.products = products.data(), p.n_panel_rows = p.n_panel_columns = n_rows, p.statistics = statistics.data();
  p.coefficients = coefficients_memory.data(), p.n_padded = n_padded, p.pairs = pairs.data();
  expect_success(panel_softmax(p, nullptr));
  expect_success(panel_loss(f, nullptr));
  expect_success(coefficients(b, nullptr));
  expect_success(panel_pairs(p, nullptr));
  expect_success(panel_finish(b, nullptr));

  std::vector<int64_t> by_class(n_rows), bounds = {0, n_rows / 4, n_rows / 2, n_rows / 2, n_rows};
  for (int64_t k = 0; k < n_rows; ++k) by_class[k] = k;
  std::vector<float> parts(2 * n_classes * width);
  PrototypeGradient g = {};
  static_cast<Loss&>(g) = of;
  g.upstream = &upstream, g.zhat = zhat.data(), g.counts = counts.data(), g.by_class = by_class.data(), g.bounds = bounds.data();
  g.n_parts = 2, g.partial_gradients = parts.data();
  expect_success(prototype_gradient(g, nullptr));
}

}  // namespace

int main(int n_arguments, char** arguments) {
  if (n_arguments > 1) {
    const std::vector<float> x = normal(128);
    std::vector<float> y(128);
    const probes::Reverse p = {arguments[1], x.data(), y.data(), 128};
    launch(probes::reverse_kernel, 2, probes::kReversed, 4 * probes::kReversed, nullptr, p);
    return 0;
  }
  // Fibers of ThreadSanitizer are dear: two blocks of 128 rows, the second ragged, each shared by two blocks on more than one
  // processor; and one.
  for (const int64_t n_rows : {130, 34}) {
    simt::set_order(n_rows > 128 ? simt::Order::forward : simt::Order::reverse, 0);
    step(n_rows, 37, Dtype::float32, true, 0.1f, 1);
    step(n_rows, 128, Dtype::bfloat16, false, 0.01f, 2);
    step(n_rows, 256, Dtype::float16, true, 0.1f, 4);
    step(n_rows, 128, Dtype::float32, false, 0.1f, 1);
    step(n_rows, 37, Dtype::float32, false, 0.01f, 1, n_rows / 2);
    step(n_rows, 64, Dtype::bfloat16, true, 0.1f, 1000, n_rows / 2 - 8);
  }
  std::puts("no races");
  return 0;
}
