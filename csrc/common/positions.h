// Where rows and their positives are. A position is an index into the rows sorted by side and by positive group; see
// clop_kernels/groups.py.
//
// `Pairs` is the struct of either backend. It has n_rows, the options, and `groups`: a (3, N) int32 table of order, starts and
// ends. If `groups` is null, the views of one instance form a group; with sides, an instance has one view on each side. `Index`
// is the integer type of positions: int64_t on the CPU, int on a GPU. There N is below 2^31, and 32-bit divisions take a fraction
// of the registers.
#pragma once

#include <cstdint>

#include "types.h"

namespace clop {

template <class Index>
struct UnsignedOf;
template <>
struct UnsignedOf<int> {
  using type = unsigned;
};
template <>
struct UnsignedOf<int64_t> {
  using type = uint64_t;
};

// The row of the embeddings at a position.
template <class Index, class Pairs>
CLOP_INLINE Index row_of(const Pairs& p, Index position) {
  if (p.groups != nullptr) return p.groups[position];
  if (p.n_left >= 0) return position;
  using Unsigned = typename UnsignedOf<Index>::type;
  const auto n_views = Unsigned(p.n_views), index = Unsigned(position);
  return Index(index % n_views * (Unsigned(p.n_rows) / n_views) + index / n_views);
}

// The instance that a row is a view of.
template <class Index, class Pairs>
CLOP_INLINE Index instance_of(const Pairs& p, Index row) {
  using Unsigned = typename UnsignedOf<Index>::type;
  return Index(Unsigned(row) % (Unsigned(p.n_rows) / Unsigned(p.n_views)));
}

// The positions from `start` up to, but not including, `end`.
template <class Index>
struct alignas(2 * sizeof(Index)) RunOf {
  Index start, end;
};

template <class Index>
CLOP_INLINE bool holds(const RunOf<Index>& run, Index position) {
  return position >= run.start && position < run.end;
}

// The same run, with positions counted from `origin`.
template <class Index>
CLOP_INLINE RunOf<Index> counted_from(Index origin, const RunOf<Index>& run) {
  return {run.start - origin, run.end - origin};
}

// The positive run of a position. Without sides this is its whole group, which includes the position itself. A position past the
// end has an empty run. From one position of a side to the next, `start` and `end` are both non-decreasing.
template <class Index, class Pairs>
CLOP_INLINE RunOf<Index> run_of(const Pairs& p, Index position) {
  if (position >= p.n_rows) return {0, 0};
  if (p.groups != nullptr) return {p.groups[p.n_rows + position], p.groups[2 * p.n_rows + position]};
  if (p.n_left >= 0) {
    const auto n_left = Index(p.n_left), other = position < n_left ? position + n_left : position - n_left;
    return {other, other + 1};
  }
  using Unsigned = typename UnsignedOf<Index>::type;
  const auto n_views = Index(p.n_views), start = Index(Unsigned(position) / Unsigned(n_views)) * n_views;
  return {start, start + n_views};
}

// The number of positives in a positive run.
template <class Index, class Pairs>
CLOP_INLINE Index positives_of(const Pairs& p, const RunOf<Index>& run) {
  return p.negatives_only ? 0 : run.end - run.start - (p.n_left < 0 ? 1 : 0);
}

// False if nothing is compared: no row can have a positive, and the loss does not sum over negatives only. The prototype term
// then stands alone. clop_kernels/backends/contract.py has the same rule.
template <class Pairs>
CLOP_INLINE bool has_pairs(const Pairs& p) {
  return p.groups != nullptr || p.n_views > 1 || p.negatives_only;
}

}  // namespace clop
