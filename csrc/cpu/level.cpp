// The passes of the loss on one SIMD level. The build compiles this file once for each level, with the compiler flags of that
// level; CLOP_LEVEL is the level's name and namespace.

#include "loss.h"
#include "pairs.h"

namespace clop::cpu {
namespace CLOP_LEVEL {
namespace {

// The rows that the products read, in T: the given rows, or a copy if the given rows are in half precision.
template <class T>
struct Zhat {
  Zhat(const Pairs& pairs, const void* given)
      : copy(pairs.compute_dtype == kDtypeOf<T> ? 0 : pairs.n_rows * pairs.width),
        // Only the forward pass writes through this pointer, and it owns the rows.
        rows(pairs.compute_dtype == kDtypeOf<T> ? const_cast<T*>(static_cast<const T*>(given)) : static_cast<T*>(copy)) {}

  // Fills the copy from rows that the forward pass has written.
  void read(const Pairs& pairs, const void* given) {
    if (pairs.compute_dtype == kDtypeOf<T>) return;
    for_ranges(pairs.n_rows, 4.0 * pairs.width, pairs.n_threads, [&](int64_t begin, int64_t end, int) {
      read_row(pairs.compute_dtype, given, begin * pairs.width, 1, (end - begin) * pairs.width, rows + begin * pairs.width);
    });
  }

  Buffer<T> copy;
  T* rows;
};

// The label at a position: -1 if it has no label, or if there are no prototypes.
int64_t label_of(const Loss& loss, int64_t k) {
  return loss.labels == nullptr || loss.prototypes == nullptr ? -1 : loss.labels[instance_of(loss, row_of(loss, k))];
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// Reads, normalises and rounds the rows [begin, end), and measures their distances to their prototypes (0 for rows without a
// label).
template <class T>
void prologue(const Forward& f, int64_t begin, int64_t end, T* zhat, T* distances) {
  for (int64_t k = begin; k < end; ++k) {
    T* const row = zhat + k * f.width;
    read_row(f.dtype, f.embeddings, row_of(f, k) * f.row_stride, f.column_stride, f.width, row);
    static_cast<T*>(f.norms)[k] = f.normalize ? normalize(f.width, row) : T(norm_of(f.width, row));
    if (f.compute_dtype != kDtypeOf<T>) {
      write_row(f.compute_dtype, f.zhat, k * f.width, f.width, row);
      read_row(f.compute_dtype, f.zhat, k * f.width, 1, f.width, row);
    }
    const int64_t label = label_of(f, k);
    distances[k] = label < 0 ? 0 : distance_to(f.distance, f.width, row, static_cast<const T*>(f.prototypes) + label * f.width);
  }
}

// Whether row k is in A, the rows with a contrastive term. These are the anchors; with negatives_only they are the rows that have
// negatives. `total` is the row's sum over pairs, or the inverse of that sum. A NaN counts as "in A", so that it shows in the
// loss.
template <class T>
bool is_anchor(const Loss& loss, int64_t k, T total) {
  return loss.negatives_only ? total != 0 : positives_of(loss, run_of(loss, k)) > 0;
}

// lse_i - mean_p s_ip, in a form in which cancellation loses no more digits than the rounding of the statistics already has.
template <class T>
double contrastive_term(Softmax<T>& softmax, int64_t row, int64_t n_positives) {
  const double negative = softmax.negative[row], positive = softmax.positive[row];
  if (n_positives == 1 && negative < positive) return __builtin_log1p(negative / positive);
  const double mean_positive = softmax.positive_logits[row] / double(n_positives > 1 ? n_positives : 1);
  return (double(softmax.shift[row]) - mean_positive + __builtin_log2(negative + positive)) / kLog2E;
}

template <class T>
void forward(const Forward& f) {
  const int64_t n = f.n_rows;
  Zhat<T> zhat(f, f.zhat);
  Buffer<T> distances(n);
  for_ranges(n, 10.0 * f.width, f.n_threads,
             [&](int64_t begin, int64_t end, int) { prologue<T>(f, begin, end, zhat.rows, distances); });
  Softmax<T> softmax(n);
  {
    Rows<T> rows(f, zhat.rows, static_cast<const T*>(f.norms), /*with_panels=*/false);
    softmax_of_pairs(rows, f.n_threads, softmax);
  }

  const auto total_of = [&](int64_t k) { return T(softmax.negative[k] + softmax.positive[k]); };
  Buffer<double> contrastive(n);
  for_ranges(n, 200.0, f.n_threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t k = begin; k < end; ++k) {
      static_cast<T*>(f.shift)[k] = softmax.shift[k];
      static_cast<T*>(f.negative)[k] = T(softmax.negative[k]);
      const bool in_loss = is_anchor(f, k, total_of(k));
      static_cast<T*>(f.inverse_total)[k] = in_loss ? 1 / total_of(k) : 0;
      if (in_loss) {
        contrastive[k] = contrastive_term(softmax, k, positives_of(f, run_of(f, k)));
        continue;
      }
      // A plain zero, unless the row holds a NaN or an Inf: these must stay visible.
      contrastive[k] = 0;
      for (int64_t d = 0; d < f.width; ++d) contrastive[k] += 0.0 * zhat.rows[k * f.width + d];
    }
  });

  double n_anchors = 0, n_labelled = 0, contrastive_sum = 0, distance_sum = 0;
  for (int64_t k = 0; k < n; ++k) {
    n_anchors += is_anchor(f, k, total_of(k));
    n_labelled += label_of(f, k) >= 0;
    contrastive_sum += contrastive[k];
    distance_sum += distances[k];
  }
  static_cast<T*>(f.counts)[0] = T(n_anchors);
  static_cast<T*>(f.counts)[1] = T(n_labelled);
  T* const loss = static_cast<T*>(f.loss);
  switch (f.reduction) {
    case Reduction::mean:
      *loss = T(contrastive_sum / (n_anchors > 1 ? n_anchors : 1) +
                f.prototype_weight * (distance_sum / (n_labelled > 1 ? n_labelled : 1)));
      break;
    case Reduction::sum:
      *loss = T(contrastive_sum + f.prototype_weight * distance_sum);
      break;
    case Reduction::none:
      for (int64_t k = 0; k < n; ++k) loss[row_of(f, k)] = T(contrastive[k] + f.prototype_weight * distances[k]);
      break;
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

// The upstream gradients of a row's contrastive term and of its prototype term.
template <class T>
class Upstream {
 public:
  explicit Upstream(const Backward& b) : b_(b), shares_{1, 1} {
    if (b.reduction != Reduction::mean) return;
    for (int term = 0; term < 2; ++term) {
      const double count = static_cast<const T*>(b.counts)[term];
      if (count > 1) shares_[term] = 1 / count;
    }
  }
  double contrastive(int64_t k) const {
    return is_anchor(b_, k, static_cast<const T*>(b_.inverse_total)[k]) ? of(k) * shares_[0] : 0.0;
  }
  double prototype(int64_t k) const { return label_of(b_, k) >= 0 ? of(k) * shares_[1] * b_.prototype_weight : 0.0; }

 private:
  double of(int64_t k) const { return static_cast<const T*>(b_.grad_loss)[b_.reduction == Reduction::none ? row_of(b_, k) : 0]; }
  const Backward& b_;
  double shares_[2];
};

template <class T>
void set_coefficients(const Backward& b, const Upstream<T>& upstream, Coefficients<T>& coefficients) {
  for (int64_t k = 0; k < b.n_rows; ++k) {
    const double w = upstream.contrastive(k), a = w * static_cast<const T*>(b.inverse_total)[k];
    const int64_t n_positives = positives_of(b, run_of(b, k));
    const T negative = static_cast<const T*>(b.negative)[k];
    coefficients.a[k] = T(a);
    coefficients.b[k] = n_positives == 1 ? 0 : T(a);
    coefficients.c[k] = n_positives == 1 ? T(a * negative) : n_positives > 1 ? T(w / double(n_positives)) : 0;
    coefficients.shift[k] = static_cast<const T*>(b.shift)[k];
  }
}

// Turns sum_j M_ij zhat_j, given in `row`, into the gradient of the raw row, in place. Returns zhat . dL_contrastive/dzhat, the
// row's share of the temperature's gradient.
template <class T>
double finish_row(const Backward& b, T norm, const T* zhat, const T* target, double pull, T* row) {
  double share = 0;  // in double, because the shares of different rows cancel
  if (b.grad_temperature != nullptr)
    for (int64_t d = 0; d < b.width; ++d) share += double(zhat[d]) * double(row[d]);
  share /= b.temperature;
  if (b.grad_embeddings == nullptr) return share;
  for (int64_t d = 0; d < b.width; ++d) row[d] = T(row[d] / b.temperature);
  if (target != nullptr) {
    const T length = b.distance == Distance::euclidean ? distance_to(b.distance, b.width, zhat, target) : T(0);
    for (int64_t d = 0; d < b.width; ++d) row[d] += T(pull) * distance_gradient(b.distance, length, zhat[d], target[d]);
  }
  if (!b.normalize) return share;
  // zhat = z / max(|z|, kEps<T>). Unless |z| is below kEps, the derivative of the norm removes the radial part of the gradient.
  const bool is_tiny = norm < kEps<T>;
  const T radial = is_tiny ? 0 : dot(b.width, zhat, row), divisor = is_tiny ? kEps<T> : norm;
  for (int64_t d = 0; d < b.width; ++d) {
    T x = (row[d] - radial * zhat[d]) / divisor;
    if (is_tiny && b.dtype == Dtype::float16)
      x = x > kLargestFloat16<T> ? kLargestFloat16<T> : x < -kLargestFloat16<T> ? -kLargestFloat16<T> : x;
    row[d] = x;
  }
  return share;
}

// Each thread owns some columns and visits all rows. The sums therefore need no locks, and their order is fixed.
template <class T>
void prototype_gradient(const Backward& b, const Upstream<T>& upstream, const T* zhat) {
  T* const grad = static_cast<T*>(b.grad_prototypes);
  const T* const prototypes = static_cast<const T*>(b.prototypes);
  std::memset(grad, 0, b.n_classes * b.width * sizeof(T));
  Buffer<T> lengths(b.distance == Distance::euclidean ? b.n_rows : 0);
  if (b.distance == Distance::euclidean)
    for_ranges(b.n_rows, 4.0 * b.width, b.n_threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t k = begin; k < end; ++k)
        if (const int64_t label = label_of(b, k); label >= 0)
          lengths[k] = distance_to(b.distance, b.width, zhat + k * b.width, prototypes + label * b.width);
    });
  for_ranges(b.width, 10.0 * b.n_rows, b.n_threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t k = 0; k < b.n_rows; ++k) {
      const int64_t label = label_of(b, k);
      if (label < 0) continue;
      const T pull = T(upstream.prototype(k)), length = b.distance == Distance::euclidean ? lengths[k] : T(0);
      for (int64_t d = begin; d < end; ++d) {
        const T z = zhat[k * b.width + d], target = prototypes[label * b.width + d];
        // The gradient in c is the negative of the gradient in zhat, except for the cosine distance, where it is -zhat.
        grad[label * b.width + d] -=
            pull * (b.distance == Distance::cosine ? z : distance_gradient(b.distance, length, z, target));
      }
    }
  });
}

template <class T>
void backward(const Backward& b) {
  const int64_t n = b.n_rows;
  const Upstream<T> upstream(b);
  Zhat<T> zhat(b, b.zhat);
  zhat.read(b, b.zhat);
  if (b.grad_prototypes != nullptr) prototype_gradient<T>(b, upstream, zhat.rows);
  if (b.grad_embeddings == nullptr && b.grad_temperature == nullptr) return;

  const int64_t padded_width = round_up(b.width, kWidthColumns<T>);
  Buffer<T> grad(n * padded_width);
  {
    Rows<T> rows(b, zhat.rows, static_cast<const T*>(b.norms), /*with_panels=*/true);
    Coefficients<T> coefficients(rows.padded_rows);
    set_coefficients<T>(b, upstream, coefficients);
    gradient_of_pairs<T>(rows, b.n_threads, coefficients, grad);
  }

  Buffer<double> shares(n);
  for_ranges(n, 12.0 * b.width, b.n_threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t k = begin; k < end; ++k) {
      T* const row = grad + k * padded_width;
      const int64_t label = label_of(b, k);
      const T* const target = label < 0 ? nullptr : static_cast<const T*>(b.prototypes) + label * b.width;
      const T norm = static_cast<const T*>(b.norms)[k];
      shares[k] = finish_row<T>(b, norm, zhat.rows + k * b.width, target, upstream.prototype(k), row);
      if (b.grad_embeddings != nullptr) write_row(b.dtype, b.grad_embeddings, row_of(b, k) * b.width, b.width, row);
    }
  });
  if (b.grad_temperature == nullptr) return;
  // s_ij is linear in 1/tau and in each of its two rows. Hence dL/dtau = -1/(2 tau) sum_i zhat_i . dL/dzhat_i.
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += shares[k];
  *static_cast<T*>(b.grad_temperature) = T(sum / (-2 * b.temperature));
}

// ---- the separate passes over pairs ----------------------------------------------------------------------------------

template <class T>
void pair_softmax(const PairSoftmax& p) {
  Zhat<T> zhat(p, p.zhat);
  zhat.read(p, p.zhat);
  Rows<T> rows(p, zhat.rows, /*norms=*/nullptr, /*with_panels=*/false);
  Softmax<T> softmax(rows.n_results);
  softmax_of_pairs(rows, p.n_threads, softmax);
  for (int64_t k = 0; k < rows.n_results; ++k) {
    static_cast<T*>(p.shift)[k] = softmax.shift[k];
    static_cast<T*>(p.negative)[k] = T(softmax.negative[k]);
    static_cast<T*>(p.positive)[k] = T(softmax.positive[k]);
    static_cast<T*>(p.positive_logits)[k] = T(softmax.positive_logits[k]);
  }
}

template <class T>
void pair_gradient(const PairGradient& p) {
  Zhat<T> zhat(p, p.zhat);
  zhat.read(p, p.zhat);
  Rows<T> rows(p, zhat.rows, /*norms=*/nullptr, /*with_panels=*/true);
  Coefficients<T> coefficients(rows.padded_rows);
  T* const parts[] = {coefficients.a, coefficients.b, coefficients.c, coefficients.shift};
  for (int k = 0; k < 4; ++k) std::memcpy(parts[k], static_cast<const T*>(p.coefficients) + k * p.n_rows, p.n_rows * sizeof(T));

  // The sums go straight into the result, unless the kernel pads rows to a greater width.
  Buffer<T> padded(rows.padded_width > p.width ? rows.n_results * rows.padded_width : 0);
  T *const grad = static_cast<T*>(p.grad), *const sums = rows.padded_width > p.width ? static_cast<T*>(padded) : grad;
  gradient_of_pairs<T>(rows, p.n_threads, coefficients, sums);
  for (int64_t k = 0; sums != grad && k < rows.n_results; ++k)
    std::memcpy(grad + k * p.width, sums + k * rows.padded_width, p.width * sizeof(T));
}

// ---- the level's table of functions ------------------------------------------------------------------------------------

void forward_any(const Forward& f) { f.compute_dtype == Dtype::float64 ? forward<double>(f) : forward<float>(f); }

void backward_any(const Backward& b) { b.compute_dtype == Dtype::float64 ? backward<double>(b) : backward<float>(b); }

void pair_softmax_any(const PairSoftmax& p) {
  p.compute_dtype == Dtype::float64 ? pair_softmax<double>(p) : pair_softmax<float>(p);
}

void pair_gradient_any(const PairGradient& p) {
  p.compute_dtype == Dtype::float64 ? pair_gradient<double>(p) : pair_gradient<float>(p);
}

template <class T>
void exp2_of(int64_t n, const T* x, T* result) {
  for (int64_t k = 0; k < n; ++k) result[k] = exp2<T>(broadcast(x[k]))[0];
}

void exp2_any(Dtype dtype, int64_t n, const void* x, void* result) {
  if (dtype == Dtype::float64)
    exp2_of(n, static_cast<const double*>(x), static_cast<double*>(result));
  else
    exp2_of(n, static_cast<const float*>(x), static_cast<float*>(result));
}

}  // namespace

#define CLOP_STRING_OF(x) #x
#define CLOP_STRING(x) CLOP_STRING_OF(x)

const Level kLevel = {CLOP_STRING(CLOP_LEVEL), forward_any, backward_any, pair_softmax_any, pair_gradient_any, exp2_any};

}  // namespace CLOP_LEVEL
}  // namespace clop::cpu
