// Tiles of rows in shared memory, and their products on matrix units: what the passes over pairs share.
//
// A tile is kRows rows of kRowBytes bytes, D padded with zeros. It comes from memory 16 bytes at a time, whatever D is, and no
// more than the bytes of D. Its 16-byte chunks are swizzled: chunk c of row r lies at place c ^ (r % 8), so that the eight rows
// which a matrix unit takes in at once, and the rows that a transposed read goes down, lie in different banks.
//
// Both products read the operands in steps of 32 bytes of k, 16 numbers of 16 bits or 8 of 32, two 16-byte chunks:
//
//     S = q k^T       A: rows of q          (16 x step)    B: rows of k, as they are       (8 x step)
//     G += M k        A: M, from registers  (16 x step)    B: the columns of k, transposed (8 x step)
#pragma once

#include "numbers.cuh"

namespace clop::cuda {

// ---- tiles -------------------------------------------------------------------------------------------------------------

constexpr int kChunkBytes = 16, kStepBytes = 32;

template <int kRowBytes_>
struct Tile {
  static constexpr int kRowBytes = kRowBytes_;
  static_assert(kRowBytes % 128 == 0, "the swizzle permutes eight chunks");

  unsigned char* base;

  // Where a chunk is, in bytes from the base.
  __device__ static int place(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes); }
  __device__ unsigned char* chunk(int row, int chunk) const { return base + place(row, chunk); }
  // Chunk 2 step + half of row `first` + `row`, in a form that takes few registers and instructions: of a step and a multiple of
  // eight `first` that are known to the compiler, a lane needs one of four places and an immediate offset.
  __device__ unsigned char* half_step(int first, int row, int step, int half) const {
    const int of_lane = row * kRowBytes + (half ^ (row & 7)) * kChunkBytes;
    return base + (of_lane ^ (step % 4 * kStepBytes)) + (first * kRowBytes + step / 4 * (4 * kStepBytes));
  }
  // The number at a column.
  template <class T>
  __device__ const T* at(int row, int column) const {
    constexpr int kPerChunk = kChunkBytes / sizeof(T);
    return reinterpret_cast<const T*>(chunk(row, column / kPerChunk)) + column % kPerChunk;
  }
};

// What a thread copies of tiles of kRows rows of zhat, (N, D), that follow each other in memory; zeros past the last row and column.
// Every row begins at a whole chunk of memory, `pitch` numbers behind the one before, and of its last chunk only what belongs to it
// is read. A copy of no bytes reads nothing, wherever it points. Addresses go on from tile to tile, for to make them anew costs more
// instructions than the copies.
template <class T, int kRows, int kThreads, class Tile>
struct Copies {
  static constexpr int kPerChunk = kChunkBytes / sizeof(T), kChunks = Tile::kRowBytes / kChunkBytes, kAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kAtOnce == 0, "every thread copies as many chunks of one column");
  static_assert(kAtOnce % 8 == 0, "a thread has the same place in all rows");

  const T* from;
  int n_left;  // rows from there on; none where the chunk is past the last column
  int place, bytes, pitch;
  bool is_whole;  // whether all chunks are

  __device__ Copies(const T* zhat, int first_row, int end_row, int width, int pitch) : pitch(pitch) {
    const int chunk = threadIdx.x % kChunks, row = first_row + int(threadIdx.x) / kChunks;
    place = Tile::place(threadIdx.x / kChunks, chunk);
    bytes = min(max((width - chunk * kPerChunk) * int(sizeof(T)), 0), kChunkBytes);
    from = zhat + int64_t(row) * pitch + chunk * kPerChunk;
    n_left = bytes > 0 ? end_row - row : 0;
    is_whole = width % kPerChunk == 0;
  }
  // Begins to copy the next tile.
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

// The parts of a lane in the operands and the result of one instruction, by the layouts of multiply() in tests/host/simt.cpp. C is
// 16 x 8 floats; with g = lane / 4, t = lane % 4 a lane has c[2 h + e], row g + 8 h and column 2 t + e.
//
// A kind of product has
//     A a_of(words), B b_of(words)        from the words that load_matrices gives
//     A a_of_result(c)                    from kResultTiles results side by side
//     load_transposed(b, tile, row, column, lane)
//                                         B of the columns [column, column + 8) and the next 8, k the rows from `row` on
//     multiply(c, a, b)                   c += a b
// and kIsExact, whether products are so exact that log2(e) / tau must be the sum of two floats.

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

// 32-bit numbers, as kParts numbers of TF32 each: one is the number rounded; two hold 22 bits, and their three larger products
// are as good as a float's.
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
      // Three instructions, where round_to_tf32 takes four, twice: it looks for NaN, which here the rest keeps, and units drop what
      // they do not read of the rest, of either sign.
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

  // k comes in another order, 0, 2, 4, 6, 1, 3, 5, 7: the one in which a lane has of A what it has of the result.
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
    for (int part = kParts - 1; part > 0; --part) {  // the small ones first
      mma_tf32(c, a.word[part], b.word[0][0], b.word[0][1]);
      mma_tf32(c, a.word[0], b.word[part][0], b.word[part][1]);
    }
    mma_tf32(c, a.word[0], b.word[0][0], b.word[0][1]);
  }
};

// The words of the A operand of step `step`, of 16 rows of a tile: those from `first`, known to the compiler, plus `row` on.
template <class Tile>
__device__ void load_a(uint32_t (&word)[4], Tile tile, int first, int row, int step, int lane) {
  load_matrices(word, tile.half_step(first, row + lane % 16, step, lane / 16));
}

// The words of two B operands: of rows [row, row + 8) of a tile and of the next 8.
template <class Tile>
__device__ void load_b(uint32_t (&word)[4], Tile tile, int row, int step, int lane) {
  load_matrices(word, tile.half_step(row, lane / 16 * 8 + lane % 8, step, lane / 8 % 2));
}

}  // namespace clop::cuda
