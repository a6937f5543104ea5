// Products in bfloat16 with sums in float32, by the tiles of a CPU with AMX: 32 queries with 32 keys at a time.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_HALVES 1

namespace {

struct Halves {
  typedef uint16_t Number;
  static constexpr int64_t BLOCK = 32, STEP = 32;
  static constexpr bool IN_PLACE = false;

  // Linux lends tiles to a process that asks.
  static bool allowed() {
    static const bool lent = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return lent;
  }

  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  static void end() { _tile_release(); }

  // A panel holds pairs: [numbers / 2, COLUMNS, 2].
  static constexpr int64_t TOGETHER = 2;
  static void values(const uint16_t* const* from, int64_t n, uint16_t* panel) {
    const __mmask32 there = n < COLUMNS ? (__mmask32(1) << n) - 1 : ~__mmask32(0);
    const __m512i even = _mm512_maskz_loadu_epi16(there, from[0]), odd = _mm512_maskz_loadu_epi16(there, from[1]);
    for (int half = 0; half < 2; ++half) {
      const auto wide = [&](__m512i x) {
        return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
      };
      _mm512_storeu_si512(panel + half * COLUMNS, _mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16)));
    }
  }

  // c [32, 32] (+)= a [32, depth] . panel; rows of a and c are this many numbers long.
  template <bool ADDS>
  static void product(const uint16_t* a, int64_t a_row, const uint16_t* panel, int64_t depth, float* c, int64_t c_row) {
    if (ADDS) {
      _tile_loadd(0, c, 4 * c_row);
      _tile_loadd(1, c + 16, 4 * c_row);
      _tile_loadd(2, c + 16 * c_row, 4 * c_row);
      _tile_loadd(3, c + 16 * c_row + 16, 4 * c_row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, 2 * a_row);
      _tile_loadd(5, a + 16 * a_row + k, 2 * a_row);
      _tile_loadd(6, panel + k * COLUMNS, 4 * COLUMNS);
      _tile_loadd(7, panel + k * COLUMNS + 32, 4 * COLUMNS);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * c_row);
    _tile_stored(1, c + 16, 4 * c_row);
    _tile_stored(2, c + 16 * c_row, 4 * c_row);
    _tile_stored(3, c + 16 * c_row + 16, 4 * c_row);
  }

  static void weight(Vector p, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)p));
  }

  // Numbers [n], to the nearest; there is memory behind them.
  static void write(const float* from, int64_t n, uint16_t* to) {
    for (int64_t d = 0; d < n; d += LANES) {
      const __mmask16 there = n - d < LANES ? (1 << (n - d)) - 1 : 0xffff;
      _mm256_mask_storeu_epi16(to + d, there, (__m256i)_mm512_cvtneps_pbh((__m512)load(from + d)));
    }
  }

  static void logits(const uint16_t* query, const uint16_t* panels, int64_t dims, int64_t columns, float* to) {
    for (int64_t j = 0; j < columns; j += COLUMNS)
      product<false>(query, dims, panels + j * dims, dims, to + j, columns);
  }

  static void add(const uint16_t* weights, int64_t columns, const uint16_t* panels, int64_t n, int64_t depth,
                  int64_t value_columns, float* output) {
    for (int64_t p = 0; p < value_columns; p += COLUMNS)
      product<true>(weights, columns, panels + p * n, whole(depth, STEP), output + p, value_columns);
  }
};

}  // namespace
#endif
