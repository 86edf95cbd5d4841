// Tiles of rows in shared memory, and their products on matrix units, for both passes over pairs.
//
// A tile is kRows rows of kRowBytes bytes, with D padded by zeros. It is copied from memory 16 bytes at a time, whatever D is,
// and only the bytes of D are read. Its 16-byte chunks are swizzled: chunk c of row r lies at place c ^ (r % 8). Two accesses
// touch eight rows at once: the load of a matrix unit's operand, and a transposed read down the rows. The swizzle puts these
// eight rows into different banks.
//
// Both products read the operands in steps of 32 bytes of k: two 16-byte chunks, that is, 16 numbers of 16 bits or 8 of 32 bits.
//
//     S = q k^T       A: rows of q          (16 x step)    B: rows of k, as they are       (8 x step)
//     G += M k        A: M, from registers  (16 x step)    B: the columns of k, transposed (8 x step)
#pragma once

#include "numbers.cuh"

namespace clop::cuda {

// ---- tiles -------------------------------------------------------------------------------------------------------------

constexpr int kChunkBytes = 16, kStepBytes = 32;

// A tile in shared memory: where its chunks and numbers are.
template <int kRowBytes_>
struct Tile {
  static constexpr int kRowBytes = kRowBytes_;
  static_assert(kRowBytes % 128 == 0, "the swizzle permutes eight chunks");

  unsigned char* base;

  // The place of a chunk, in bytes from the base.
  __device__ static int place(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes); }
  __device__ unsigned char* chunk(int row, int chunk) const { return base + place(row, chunk); }
  // Chunk 2 step + half of row `first` + `row`, in a form that takes few registers and instructions. The compiler knows `step`
  // and `first`, a multiple of eight. A lane then needs only one of four places and an immediate offset.
  __device__ unsigned char* half_step(int first, int row, int step, int half) const {
    const int of_lane = row * kRowBytes + (half ^ (row & 7)) * kChunkBytes;
    return base + (of_lane ^ (step % 4 * kStepBytes)) + (first * kRowBytes + step / 4 * (4 * kStepBytes));
  }
  // The number in a row and column.
  template <class T>
  __device__ const T* at(int row, int column) const {
    constexpr int kPerChunk = kChunkBytes / sizeof(T);
    return reinterpret_cast<const T*>(chunk(row, column / kPerChunk)) + column % kPerChunk;
  }
};

// One thread's share of the copies of tiles. The tiles are kRows rows of zhat, (N, D), and follow each other in memory. Numbers
// past the last row or column become zero.
//
// Every row begins at a whole chunk of memory, `pitch` numbers after the previous row. If a row ends inside a chunk, only the
// row's bytes of that chunk are read. A copy of 0 bytes reads nothing, wherever it points. Addresses advance from tile to tile,
// because computing them anew takes more instructions than the copies.
template <class T, int kRows, int kThreads, class Tile>
struct Copies {
  static constexpr int kPerChunk = kChunkBytes / sizeof(T), kChunks = Tile::kRowBytes / kChunkBytes, kAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kAtOnce == 0, "every thread copies equally many chunks, all of one column");
  static_assert(kAtOnce % 8 == 0, "the swizzle is the same in all rows of a thread");

  const T* from;
  int n_left;  // rows from `from` on; 0 if the chunk is past the last column
  int place, bytes, pitch;
  bool is_whole;  // whether the width is a whole number of chunks

  __device__ Copies(const T* zhat, int first_row, int end_row, int width, int pitch) : pitch(pitch) {
    const int chunk = threadIdx.x % kChunks, row = first_row + int(threadIdx.x) / kChunks;
    place = Tile::place(threadIdx.x / kChunks, chunk);
    bytes = min(max((width - chunk * kPerChunk) * int(sizeof(T)), 0), kChunkBytes);
    from = zhat + int64_t(row) * pitch + chunk * kPerChunk;
    n_left = bytes > 0 ? end_row - row : 0;
    is_whole = width % kPerChunk == 0;
  }
  // Begins to copy the next tile into `tile`.
  __device__ void begin(Tile tile) {
#pragma unroll
    for (int i = 0; i < kRows / kAtOnce; ++i) {
      unsigned char* const to = tile.base + place + i * kAtOnce * Tile::kRowBytes;
      const bool is_row = i * kAtOnce < n_left;
      if (is_whole)
        copy_async(to, from, is_row ? kChunkBytes : 0);
      else
        copy_async(to, from, is_row ? bytes : 0);
      from += int64_t(kAtOnce) * pitch;
    }
    n_left -= kRows;
  }
};

// ---- products ------------------------------------------------------------------------------------------------------------

// The fragments: which numbers of A, B and C a lane holds in one instruction. The layouts are those of multiply() in
// tests/host/simt.cpp. C is 16 x 8 floats. With g = lane / 4 and t = lane % 4, a lane's c[2 h + e] is in row g + 8 h and column 2
// t + e.
//
// A kind of product has
//     A a_of(words), B b_of(words)        operands from the words that load_matrices gives
//     A a_of_result(c)                    an operand from kResultTiles neighbouring results
//     load_transposed(b, tile, row, column, lane)
//                                         B of the columns [column, column + 8) and the next 8; k are the rows from `row` on
//     multiply(c, a, b)                   c += a b
//     kIsExact                            whether products are as good as in float32; log2(e) / tau is then two floats

// 16-bit numbers: what bfloat16 and float16 have in common.

template <class T>
struct Words16 {
  using Element = T;
  static constexpr int kResultTiles = 2;
  static constexpr bool kIsExact = false;
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };

  __device__ static A a_of(const uint32_t (&word)[4]) { return {{word[0], word[1], word[2], word[3]}}; }
  __device__ static B b_of(uint32_t word0, uint32_t word1) { return {{word0, word1}}; }

  template <class Tile>
  __device__ static void load_transposed(B (&b)[2], Tile tile, int row, int column, int lane) {
    uint32_t word[4];
    load_matrices_transposed(word, tile.half_step(row, lane % 16, column / 16, lane / 16));
    b[0] = {{word[0], word[1]}};
    b[1] = {{word[2], word[3]}};
  }
};

struct Bf16 : Words16<__nv_bfloat16> {
  __device__ static A a_of_result(const float (*c)[4]) {
    return {{pack_bf16(c[0][0], c[0][1]), pack_bf16(c[0][2], c[0][3]), pack_bf16(c[1][0], c[1][1]), pack_bf16(c[1][2], c[1][3])}};
  }
  __device__ static void multiply(float (&c)[4], const A& a, const B& b) { mma_bf16(c, a.word, b.word[0], b.word[1]); }
};

struct F16 : Words16<__half> {
  __device__ static A a_of_result(const float (*c)[4]) {
    return {{pack_f16(c[0][0], c[0][1]), pack_f16(c[0][2], c[0][3]), pack_f16(c[1][0], c[1][1]), pack_f16(c[1][2], c[1][3])}};
  }
  __device__ static void multiply(float (&c)[4], const A& a, const B& b) { mma_f16(c, a.word, b.word[0], b.word[1]); }
};

// 32-bit numbers, each split into kParts TF32 numbers. One part is the rounded number. Two parts hold 22 bits, and the three
// larger of their four products together are as good as a float product.
template <int kParts>
struct Tf32 {
  static_assert(kParts == 1 || kParts == 2);
  using Element = float;
  static constexpr int kResultTiles = 1;
  static constexpr bool kIsExact = kParts > 1;
  struct A {
    uint32_t word[kParts][4];
  };
  struct B {
    uint32_t word[kParts][2];
  };

  template <int kWords>
  __device__ static void split(uint32_t (&parts)[kParts][kWords], int index, float x) {
    if constexpr (kParts == 1) {
      parts[0][index] = round_to_tf32(x);
    } else {
      // This takes three instructions; round_to_tf32 takes four, and would be needed twice. It handles NaN, but here `rest` keeps
      // a NaN anyway. The units drop the bits of `rest` that they do not read, whatever its sign.
      const uint32_t rounded = (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
      parts[0][index] = rounded;
      parts[1][index] = __float_as_uint(x - __uint_as_float(rounded));
    }
  }

  __device__ static A a_of(const uint32_t (&word)[4]) {
    A a;
#pragma unroll
    for (int w = 0; w < 4; ++w) split(a.word, w, __uint_as_float(word[w]));
    return a;
  }
  __device__ static B b_of(uint32_t word0, uint32_t word1) {
    B b;
    split(b.word, 0, __uint_as_float(word0));
    split(b.word, 1, __uint_as_float(word1));
    return b;
  }

  // Here k runs in the order 0, 2, 4, 6, 1, 3, 5, 7. In this order a lane of A holds the same numbers as a lane of the result.
  __device__ static A a_of_result(const float (*c)[4]) {
    A a;
    split(a.word, 0, c[0][0]);
    split(a.word, 1, c[0][2]);
    split(a.word, 2, c[0][1]);
    split(a.word, 3, c[0][3]);
    return a;
  }
  template <class Tile>
  __device__ static void load_transposed(B (&b)[2], Tile tile, int row, int column, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int w = 0; w < 2; ++w)
        split(b[n].word, w, reinterpret_cast<const float*>(tile.half_step(row, 2 * t + w, column / 8 + n, g / 4))[g % 4]);
  }

  __device__ static void multiply(float (&c)[4], const A& a, const B& b) {
#pragma unroll
    for (int part = kParts - 1; part > 0; --part) {  // the small products first
      mma_tf32(c, a.word[part], b.word[0][0], b.word[0][1]);
      mma_tf32(c, a.word[0], b.word[part][0], b.word[part][1]);
    }
    mma_tf32(c, a.word[0], b.word[0][0], b.word[0][1]);
  }
};

// Loads the words of one A operand: step `step` of 16 rows of a tile, from row `first` + `row` on. The compiler knows `first`.
template <class Tile>
__device__ void load_a(uint32_t (&word)[4], Tile tile, int first, int row, int step, int lane) {
  load_matrices(word, tile.half_step(first, row + lane % 16, step, lane / 16));
}

// Loads the words of two B operands: rows [row, row + 8) of a tile, and the next 8 rows.
template <class Tile>
__device__ void load_b(uint32_t (&word)[4], Tile tile, int row, int step, int lane) {
  load_matrices(word, tile.half_step(row, lane / 16 * 8 + lane % 8, step, lane / 8 % 2));
}

}  // namespace clop::cuda
