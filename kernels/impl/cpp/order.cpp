// Ranked keys of one segment, by core/plan.py's order_keys: stable, by the first ORDER_BITS bits of a score, in two
// passes of counting.
#include "simd.h"

extern "C" {

// Strides count numbers. Scores, flags and indices are contiguous in their last dimension.
struct Order {
  const float* scores;        // [rankings, n_keys]
  const uint8_t* non_finite;  // [rankings, n_keys]: these come first
  const uint8_t* key_mask;    // [n_keys], or null
  int32_t *index, *count;     // index [rankings, ..], of which count are written
  int64_t score_head, non_finite_head, index_head;
  int64_t rankings, end, own_start, own_stop;  // keys before `end` that are none of the segment's own
};
}

namespace {

constexpr int DIGIT_BITS = 10, DIGITS = 1 << DIGIT_BITS, ORDER_BITS = 2 * DIGIT_BITS;

// A number of ORDER_BITS bits that falls where the score rises.
inline uint32_t falling(float score, bool non_finite) {
  constexpr float MOST = 3.4028234663852886e38f;
  score = score != score ? 0.f : std::min(std::max(score, -MOST), MOST);
  if (non_finite) score = INFINITE;
  int32_t bits;
  std::memcpy(&bits, &score, 4);
  return (1 << (ORDER_BITS - 1)) - 1 - ((bits ^ (bits >> 31 & 0x7fffffff)) >> (32 - ORDER_BITS));
}

void order(const Order& o) {
  uint64_t* listed = reinterpret_cast<uint64_t*>(memory.of(2 * o.end * sizeof(uint64_t)));
  uint64_t* sorted = listed + o.end;
  for (int64_t ranking = 0; ranking < o.rankings; ++ranking) {
    const float* scores = o.scores + ranking * o.score_head;
    const uint8_t* non_finite = o.non_finite + ranking * o.non_finite_head;
    int32_t* index = o.index + ranking * o.index_head;
    int64_t low[DIGITS] = {}, high[DIGITS] = {}, n = 0;
    for (int64_t j = 0; j < o.end; ++j) {
      if (j == o.own_start && o.own_stop > j) j = o.own_stop;
      if (j >= o.end || (o.key_mask && !o.key_mask[j])) continue;
      const uint64_t code = falling(scores[j], non_finite[j]);
      listed[n++] = code << 32 | j;
      ++low[code % DIGITS];
      ++high[code / DIGITS];
    }
    int64_t low_before = 0, high_before = 0;
    for (int64_t digit = 0; digit < DIGITS; ++digit) {
      low_before += std::exchange(low[digit], low_before);
      high_before += std::exchange(high[digit], high_before);
    }
    for (int64_t i = 0; i < n; ++i) sorted[low[(listed[i] >> 32) % DIGITS]++] = listed[i];
    for (int64_t i = 0; i < n; ++i) index[high[sorted[i] >> (32 + DIGIT_BITS)]++] = static_cast<int32_t>(sorted[i]);
    *o.count = static_cast<int32_t>(n);
  }
}

}  // namespace

extern "C" int s2o_order(const Order* o) {
  return done([&] { order(*o); });
}
