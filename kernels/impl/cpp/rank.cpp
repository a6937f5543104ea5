// Scores of keys for one segment, by the definition of ranking/per_query.py: products with few numbers, reduced to
// maxima over the queries of a slot as they are made, and summed over slots. Logarithms are binary until the end.
#include "simd.h"

namespace {

constexpr int SLOTS = 64, HALF = ROWS / 2;  // maxima of HALF rows and their products fit into the registers together
static_assert(SLOTS % ROWS == 0);

}  // namespace

extern "C" {

// Strides count numbers. Keys and factors are contiguous.
struct Ranking {
  const float *query, *factor, *key;  // query [group, .., dim]; factor [dim, few]; key [keys, few]
  const int64_t* positions;           // [heads, rows]: where the queries of head g stand, at g modulo heads
  const uint8_t* key_mask;            // [keys], or null
  const int64_t* sampled;             // keys that the normaliser samples, those that count once last
  float* scores;                      // [keys], filled up to `end`
  int64_t query_head, query_row, group, heads, rows, dim, few, n_queries, end, n_sampled, n_once, own_start, own_stop;
  int64_t sees;  // a query at position p sees in-segment keys below sees + p
  float scale, sample_weight;
};
}

namespace {

inline float or_zero(float x) { return std::isfinite(x) ? x : 0.f; }

// log2 of the sum of 2^x over n numbers, whose memory is reused; n is whole vectors.
float log2_sum(float* x, int64_t n) {
  Vector high = load(x);
  for (int64_t j = LANES; j < n; j += LANES) high = larger(load(x + j), high);
  const float highest = largest(high), base = highest == -INFINITE ? 0.f : highest;
  Vector total{};
  for (int64_t j = 0; j < n; j += LANES) total += exp2(load(x + j) - base);
  return std::log2(sum(total)) + base;
}

struct Scores {
  const Ranking& r;
  int64_t slot_rows, all_rows, few_columns, outside, own, columns;
  float *query, *rows, *factor, *panels, *minus, *logits, *maxima;

  explicit Scores(const Ranking& ranking) : r(ranking) {
    slot_rows = whole(r.rows, SLOTS);
    all_rows = r.group * slot_rows;
    few_columns = whole(r.few, COLUMNS);
    own = r.own_stop - r.own_start;
    outside = whole(r.n_sampled, COLUMNS);
    columns = outside + whole(own, COLUMNS);
    const int64_t sizes[] = {ROWS * r.dim, all_rows * few_columns, r.dim * few_columns,
                             std::max(columns, whole(r.end, COLUMNS)) * r.few, all_rows, ROWS * columns, SLOTS * COLUMNS};
    float** parts[] = {&query, &rows, &factor, &panels, &minus, &logits, &maxima};
    int64_t total = 0;
    for (int64_t size : sizes) total += whole(size, 16);
    float* next = memory.of(total);
    for (int i = 0; i < 7; ++i) *parts[i] = next, next += whole(sizes[i], 16);
  }

  // Keys [n] into panels of COLUMNS keys; `index` says which, or they begin at `first`. Empty columns are zero.
  void pack(const int64_t* index, int64_t first, int64_t n, float* to) {
    for (int64_t begin = 0; begin < n; begin += COLUMNS)
      for (int64_t c = 0; c < COLUMNS; ++c) {
        const bool real = begin + c < n;
        const float* from = r.key + (real ? (index ? index[begin + c] : first + begin + c) : 0) * r.few;
        for (int64_t d = 0; d < r.few; ++d) to[begin * r.few + d * COLUMNS + c] = real ? from[d] : 0.f;
      }
  }

  int64_t position(int64_t head, int64_t i) const { return r.positions[head % r.heads * r.rows + i]; }

  // Queries in few numbers, and what is taken off their logits: infinity for rows that do not count.
  void project() {
    for (int64_t p = 0; p < few_columns; p += COLUMNS)
      for (int64_t d = 0; d < r.dim; ++d)
        for (int64_t c = 0; c < COLUMNS; ++c)
          factor[p * r.dim + d * COLUMNS + c] = p + c < r.few ? r.factor[d * r.few + p + c] * r.scale : 0.f;
    for (int64_t head = 0; head < r.group; ++head)
      for (int64_t i = 0; i < slot_rows; i += ROWS) {
        for (int64_t k = 0; k < ROWS; ++k)
          for (int64_t d = 0; d < r.dim; ++d) {
            const bool real = i + k < r.rows && position(head, i + k) < r.n_queries;
            query[k * r.dim + d] =
                real ? r.query[head * r.query_head + position(head, i + k) * r.query_row + d] : 0.f;
          }
        float* to = rows + (head * slot_rows + i) * few_columns;
        for (int64_t p = 0; p < few_columns; p += COLUMNS)
          product<ROWS>(query, r.dim, factor + p * r.dim, r.dim, to + p, few_columns, nullptr);
        for (int64_t j = 0; j < ROWS * few_columns; ++j) to[j] = or_zero(to[j]);
      }
  }

  // minus [rows]: the negative normaliser of each row.
  void normalise() {
    pack(r.sampled, 0, r.n_sampled, panels);
    pack(nullptr, r.own_start, own, panels + outside * r.few);
    for (int64_t head = 0; head < r.group; ++head)
      for (int64_t i = 0; i < slot_rows; i += ROWS) {
        float* of_rows = minus + head * slot_rows + i;
        int64_t most = 0, seen[ROWS];
        for (int64_t k = 0; k < ROWS; ++k) {
          seen[k] = i + k < r.rows ? std::clamp<int64_t>(r.sees + position(head, i + k) - r.own_start, 0, own) : 0;
          most = std::max(most, seen[k]);
        }
        const int64_t used = outside + whole(most, COLUMNS);
        for (int64_t begin = 0; begin < used; begin += COLUMNS)
          product<ROWS>(rows + (head * slot_rows + i) * few_columns, few_columns, panels + begin * r.few, r.few,
                        logits + begin, columns, nullptr);
        for (int64_t k = 0; k < ROWS; ++k) {
          of_rows[k] = -INFINITE;
          if (i + k >= r.rows || position(head, i + k) >= r.n_queries || !used) continue;
          float* x = logits + k * columns;
          for (int64_t j = 0; j < outside; ++j) {
            if (j >= r.n_sampled || (r.key_mask && !r.key_mask[r.sampled[j]])) x[j] = -INFINITE;
            if (j < r.n_sampled - r.n_once) x[j] += r.sample_weight;
          }
          for (int64_t j = outside; j < used; ++j)
            if (j - outside >= seen[k] || (r.key_mask && !r.key_mask[r.own_start + j - outside])) x[j] = -INFINITE;
          const float found = log2_sum(x, used);
          of_rows[k] = found == -INFINITE ? -INFINITE : -found;
        }
      }
  }

  // The largest products of HALF slots with the keys of a panel.
  void largest_of_slots(int64_t slot, const float* panel) {
    Vector high[HALF][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < HALF; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) high[i][v] = all(-INFINITE);
    for (int64_t row = slot; row < all_rows; row += SLOTS) {
      const float* a = rows + row * few_columns;
      Vector sums[HALF][VECTORS];
#pragma GCC unroll 8
      for (int i = 0; i < HALF; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[i][v] = all(minus[row + i]);
      for (int64_t k = 0; k < r.few; ++k) {
        Vector b[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) b[v] = load(panel + k * COLUMNS + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < HALF; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) sums[i][v] += a[i * few_columns + k] * b[v];
      }
#pragma GCC unroll 8
      for (int i = 0; i < HALF; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) high[i][v] = larger(sums[i][v], high[i][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < HALF; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) store(maxima + (slot + i) * COLUMNS + v * LANES, high[i][v]);
  }

  void run() {
    project();
    normalise();
    pack(nullptr, 0, r.end, panels);
    for (int64_t begin = 0; begin < r.end; begin += COLUMNS) {
      for (int slot = 0; slot < SLOTS; slot += HALF) largest_of_slots(slot, panels + begin * r.few);
      for (int v = 0; v < VECTORS; ++v) {
        Vector high = all(-INFINITE), total{};
        for (int slot = 0; slot < SLOTS; ++slot) high = larger(load(maxima + slot * COLUMNS + v * LANES), high);
        const Vector base = high == -INFINITE ? Vector{} : high;
        for (int slot = 0; slot < SLOTS; ++slot) total += exp2(load(maxima + slot * COLUMNS + v * LANES) - base);
        for (int64_t c = 0, j = begin + v * LANES; c < LANES && j < r.end; ++c, ++j)
          r.scores[j] = (std::log2(total[c]) + base[c]) * LN_2;
      }
    }
  }
};

}  // namespace

extern "C" void s2o_rank(const Ranking* ranking) { Scores(*ranking).run(); }
