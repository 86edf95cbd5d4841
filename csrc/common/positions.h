// What is known of a position, an index into the rows as sorted by side and positive group; see clop_kernels/groups.py.
//
// `Pairs` is the struct of either backend: n_rows and options, and groups, (3, N) int32 order, starts and ends, or null where the views
// of an instance are a group, with sides one view a side. `Index` is what it counts positions in: int64_t, or on a GPU, where N is
// below 2^31, int, for 32-bit divisions take a fraction of the registers.
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

// The row of the embeddings that is at a position.
template <class Index, class Pairs>
CLOP_INLINE Index row_of(const Pairs& p, Index position) {
  if (p.groups != nullptr) return p.groups[position];
  if (p.n_left >= 0) return position;
  using Unsigned = typename UnsignedOf<Index>::type;
  const auto n_views = Unsigned(p.n_views), index = Unsigned(position);
  return Index(index % n_views * (Unsigned(p.n_rows) / n_views) + index / n_views);
}

// The instance whose view a row is.
template <class Index, class Pairs>
CLOP_INLINE Index instance_of(const Pairs& p, Index row) {
  using Unsigned = typename UnsignedOf<Index>::type;
  return Index(Unsigned(row) % (Unsigned(p.n_rows) / Unsigned(p.n_views)));
}

// Positions from `start` on, and before `end`.
template <class Index>
struct alignas(2 * sizeof(Index)) RunOf {
  Index start, end;
};

template <class Index>
CLOP_INLINE bool holds(const RunOf<Index>& run, Index position) {
  return position >= run.start && position < run.end;
}

// The run with positions counted from `origin`.
template <class Index>
CLOP_INLINE RunOf<Index> counted_from(Index origin, const RunOf<Index>& run) {
  return {run.start - origin, run.end - origin};
}

// The run of positions that holds the positives of a position, without sides its group, itself included; of one past the end an
// empty run. From position to position of a side neither end goes back.
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

// How many of a run are positives.
template <class Index, class Pairs>
CLOP_INLINE Index positives_of(const Pairs& p, const RunOf<Index>& run) {
  return p.negatives_only ? 0 : run.end - run.start - (p.n_left < 0 ? 1 : 0);
}

// False where no row can have a positive, so that there is nothing to compare; as in clop_kernels/backends/contract.py.
template <class Pairs>
CLOP_INLINE bool has_pairs(const Pairs& p) {
  return p.groups != nullptr || p.n_views > 1 || p.negatives_only;
}

}  // namespace clop
