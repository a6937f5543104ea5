// Products in float32, by vectors: ROWS queries with COLUMNS keys or numbers of a value at a time.
#pragma once
#include "simd.h"

namespace {

// c [M, COLUMNS] (+)= a [M, depth] . panel [depth, COLUMNS]
template <int M, bool ADDS>
inline void product(const float* a, int64_t a_row, const float* panel, int64_t depth, float* c, int64_t c_row) {
  Vector sums[M][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = ADDS ? load(c + i * c_row + v * LANES) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector b[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) b[v] = load(panel + k * COLUMNS + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += a[i * a_row + k] * b[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(c + i * c_row + v * LANES, sums[i][v]);
}

struct Floats {
  typedef float Number;
  static constexpr int64_t BLOCK = ROWS, STEP = 1;  // queries of a product; keys and dims come in multiples of STEP
  static constexpr bool IN_PLACE = true;  // weights take the place of their logits

  static void begin() {}
  static void end() {}

  // Numbers [n] of values into the rows of a panel [1, COLUMNS]; the rest is zero.
  static constexpr int64_t TOGETHER = 1;  // values
  static void values(const float* const* from, int64_t n, float* panel) {
    std::memcpy(panel, *from, 4 * std::min<int64_t>(n, COLUMNS));
    for (int64_t d = n; d < COLUMNS; ++d) panel[d] = 0.f;
  }

  static void weight(Vector p, float* to) { store(to, p); }
  static void write(const float* from, int64_t n, float* to) { std::memcpy(to, from, 4 * n); }

  // logits [BLOCK, columns] = query [BLOCK, dims] . panels
  static void logits(const float* query, const float* panels, int64_t dims, int64_t columns, float* to) {
    for (int64_t j = 0; j < columns; j += COLUMNS)
      product<ROWS, false>(query, dims, panels + j * dims, dims, to + j, columns);
  }

  // output [BLOCK, value_columns] += weights [BLOCK, columns] . panels, each of n keys, of which `depth` count
  static void add(const float* weights, int64_t columns, const float* panels, int64_t n, int64_t depth,
                  int64_t value_columns, float* output) {
    for (int64_t p = 0; p < value_columns; p += COLUMNS)
      product<ROWS, true>(weights, columns, panels + p * n, depth, output + p, value_columns);
  }
};

}  // namespace
