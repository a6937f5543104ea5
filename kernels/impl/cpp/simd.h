// Vectors as the compiler knows them (GCC and Clang), so that one source serves AVX-512, AVX2 and 128-bit machines.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Numbers of a vector, rows of a product and vectors of its columns: as many sums as the machine's registers hold.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, VECTORS = 2;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4, VECTORS = 2;
#else
constexpr int LANES = 4, ROWS = 4, VECTORS = 2;
#endif
constexpr int COLUMNS = LANES * VECTORS;
constexpr float INFINITE = INFINITY, LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
inline void store(float* x, Vector value) { *reinterpret_cast<Unaligned*>(x) = value; }
inline Vector all(float x) { return x - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Half of a vector's numbers, then half of those, down to one.
template <int N, typename Pair>
inline float reduced(const float* x, Pair pair) {
  if constexpr (N == 1) {
    return *x;
  } else {
    typedef float Half __attribute__((vector_size(2 * N), aligned(4)));
    const Half low = *reinterpret_cast<const Half*>(x), high = *reinterpret_cast<const Half*>(x + N / 2);
    const Half joint = pair(low, high);
    float next[N / 2];
    std::memcpy(next, &joint, 2 * N);
    return reduced<N / 2>(next, pair);
  }
}

inline float largest(Vector x) {
  float numbers[LANES];
  store(numbers, x);
  return reduced<LANES>(numbers, [](auto a, auto b) { return a > b ? a : b; });
}

inline float sum(Vector x) {
  float numbers[LANES];
  store(numbers, x);
  return reduced<LANES>(numbers, [](auto a, auto b) { return a + b; });
}

// 2^x for x <= 0, to 3 units in the last place; 0 below 2^-126, NaN for NaN.
inline Vector exp2(Vector x) {
#ifdef __AVX512DQ__
  const Vector rest = (Vector)_mm512_reduce_ps((__m512)x, 1);  // x less the integer below it
#else
  const Vector shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x - 0.5f + shift, rest = x - (shifted - shift);
#endif
  Vector p = all(1.86713005e-3f);
  p = p * rest + 9.01703071e-3f;
  p = p * rest + 5.57999127e-2f;
  p = p * rest + 2.40164444e-1f;
  p = p * rest + 6.93151295e-1f;
  p = p * rest + 1.f;
#ifdef __AVX512DQ__
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (Vector)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
#else
  const Vector scaled = (Vector)((Integers)p + ((Integers)shifted << 23));
  return x < -126.f ? Vector{} : (x == x ? scaled : x);
#endif
}

// log2 of finite numbers from 1 on, to 1e-7; 128 for infinity.
inline Vector log2(Vector x) {
  const Integers power = ((Integers)x - 0x3f3504f3) >> 23;  // of two, beside a factor from sqrt(1/2) to sqrt(2)
  const Vector factor = (Vector)((Integers)x - (power << 23)), t = (factor - 1.f) / (factor + 1.f), square = t * t;
  Vector p = all(2 * LOG2_E / 7);  // of the series, whose next term is below 4e-8
  p = p * square + 2 * LOG2_E / 5;
  p = p * square + 2 * LOG2_E / 3;
  p = p * square + 2 * LOG2_E;
  return p * t + __builtin_convertvector(power, Vector);
}

// Rows of so many bytes, COLUMNS of them, into a panel [words, COLUMNS] of 32 bits, each into a column; the rest is zero.
inline void transpose(const void* const* rows, int64_t bytes, int64_t words, void* panel) {
#ifdef __AVX512BW__
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < COLUMNS; c += 16)
    for (int64_t w = 0; w < words; w += 16) {
      const __mmask64 there = bytes - 4 * w < 64 ? (__mmask64(1) << (bytes - 4 * w)) - 1 : ~__mmask64(0);
      __m512i x[16], y[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        x[i] = _mm512_maskz_loadu_epi8(there, static_cast<const char*>(rows[c + i]) + 4 * w);
#pragma GCC unroll 4
      for (int round = 0; round < 4; ++round) {  // each interleaves the first half of the rows with the second
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          y[2 * i] = _mm512_permutex2var_epi32(x[i], low, x[i + 8]);
          y[2 * i + 1] = _mm512_permutex2var_epi32(x[i], high, x[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) x[i] = y[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (w + i < words) _mm512_storeu_si512(static_cast<uint32_t*>(panel) + (w + i) * COLUMNS + c, x[i]);
    }
#else
  std::memset(panel, 0, 4 * words * COLUMNS);
  for (int64_t c = 0; c < COLUMNS; ++c)
    for (int64_t at = 0; at < bytes; at += 4)
      std::memcpy(static_cast<char*>(panel) + at * COLUMNS + 4 * c, static_cast<const char*>(rows[c]) + at,
                  std::min<int64_t>(bytes - at, 4));
#endif
}

// A number of float32, or the bits of one of bfloat16.
inline float read(float x) { return x; }
inline float read(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// Whether no number [n] is NaN or infinite: none has an exponent of ones.
template <typename Number>
inline bool finite(const Number* x, int64_t n) {
  typedef std::conditional_t<sizeof(Number) == 4, uint32_t, uint16_t> Bits;
  constexpr Bits EXPONENT = sizeof(Number) == 4 ? 0x7f800000 : 0x7f80;
  Bits most = 0;
  for (int64_t d = 0; d < n; ++d) {
    Bits bits;
    std::memcpy(&bits, x + d, sizeof(Bits));
    most = std::max<Bits>(most, bits & EXPONENT);
  }
  return most < EXPONENT;
}

inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 3);
}

inline Vector tanh(Vector x) {
  const Vector size = x < 0.f ? -x : x, square = x * x, falling = exp2(size * (-2 * LOG2_E));
  const Vector large = (1.f - falling) / (1.f + falling);
  Vector p = all(62.f / 2835);  // of the series, whose next term is below 1e-8 of x up to a quarter
  p = p * square - 17.f / 315;
  p = p * square + 2.f / 15;
  p = p * square - 1.f / 3;
  p = p * square + 1.f;
  return size < 0.25f ? x * p : (x < 0.f ? -large : large);
}

struct Memory {
  char* data = nullptr;
  int64_t size = 0;
  char* of(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = whole(bytes, 64);
      data = static_cast<char*>(std::aligned_alloc(64, size));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
  ~Memory() { std::free(data); }
};
thread_local Memory memory;  // fresh memory would cost page faults in every segment

// What Python sees: 0, or 1 where memory ran out.
template <typename Work>
int done(Work work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
