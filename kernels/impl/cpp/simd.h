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
  const Vector shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x + shift, rest = x - (shifted - shift);
  Vector p = all(1.5403530e-4f);
  p = p * rest + 1.3333558e-3f;
  p = p * rest + 9.6181291e-3f;
  p = p * rest + 5.5504109e-2f;
  p = p * rest + 2.4022651e-1f;
  p = p * rest + 6.9314718e-1f;
  p = p * rest + 1.f;
  const Vector scaled = (Vector)((Integers)p + ((Integers)shifted << 23));
  return x < -126.f ? Vector{} : (x == x ? scaled : x);
}

// log2 of numbers from 1 on, to 1e-7.
inline Vector log2(Vector x) {
  const Integers power = ((Integers)x - 0x3f3504f3) >> 23;  // of two, beside a factor from sqrt(1/2) to sqrt(2)
  const Vector factor = (Vector)((Integers)x - (power << 23)), t = (factor - 1.f) / (factor + 1.f), square = t * t;
  Vector p = all(2 * LOG2_E / 7);  // of the series, whose next term is below 4e-8
  p = p * square + 2 * LOG2_E / 5;
  p = p * square + 2 * LOG2_E / 3;
  p = p * square + 2 * LOG2_E;
  return p * t + __builtin_convertvector(power, Vector);
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
