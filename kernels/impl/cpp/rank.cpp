// Scores of keys for one segment, by the definition of ranking/per_query.py: products with few numbers, reduced to
// maxima over the queries of a slot as they are made, and summed over slots. Logarithms are binary until the end.
//
// Rows of queries stand in panels of WIDTH columns, so that a product has KEYS rows, the keys as they lie in memory. The
// panels of the same slots are neighbours: they stay in the nearest cache while keys pass.
#include "floats.h"
#include "halves.h"

namespace {

constexpr int SLOTS = 64, KEY_BLOCK = 256;

}  // namespace

extern "C" {

// Strides count numbers. Keys and factors are contiguous.
struct Ranking {
  const void* query;         // [group, .., dim], float32 or bfloat16
  const float* factor;       // [dim, few]
  const void* key;           // [keys, depth], float32 or bfloat16: few numbers, then zeros; there is memory behind them
  const int64_t* positions;  // [heads, rows]: where the queries of head g stand behind `first`, at g modulo heads
  const uint8_t* key_mask;   // [keys], or null
  float* scores;             // [keys]: those before `end` are scored, the others get -infinity
  int64_t query_head, query_row, group, heads, rows, first, dim, few, n_queries, n_keys, end, own_start, own_stop;
  int64_t stride, first_keys;  // the normaliser samples a key of each stride, and takes the first keys once
  int64_t sees;                // a query at position p sees in-segment keys below sees + p
  float scale, sample_weight;
  int32_t half_query;  // the query is bfloat16
  int32_t halves;      // keys are bfloat16, as products are: what is kept of them decides an order, and no sum
};
}

namespace {

inline Vector or_zero(Vector x) { return x - x == 0.f ? x : Vector{}; }

struct FloatProducts : Floats {
  static constexpr int KEYS = ROWS / 2, WIDTH = COLUMNS;  // maxima and products fit into the registers together

  // Numbers [n] of a row, into a column of a panel.
  static void put(const float* row, int64_t n, float* panel, int64_t column) {
    for (int64_t d = 0; d < n; ++d) panel[d * WIDTH + column] = row[d];
  }

  // to [KEYS, WIDTH]: the largest of keys [KEYS, depth] . panel + more [WIDTH] of n panels and as many `more`.
  static void largest(const float* keys, int64_t depth, const float* panel, const float* more, int64_t n, float* to,
                      int64_t to_row) {
    Vector high[KEYS][VECTORS], sums[KEYS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) high[i][v] = all(-INFINITE);
    for (; n--; panel += depth * WIDTH, more += WIDTH) {
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[i][v] = load(more + v * LANES);
      for (int64_t k = 0; k < depth; ++k) {
        Vector b[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) b[v] = load(panel + k * WIDTH + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) sums[i][v] += keys[i * depth + k] * b[v];
      }
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) high[i][v] = larger(sums[i][v], high[i][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) store(to + i * to_row + v * LANES, high[i][v]);
  }
};

#ifdef HAS_HALVES
struct HalfProducts : Halves {
  static constexpr int KEYS = 16, WIDTH = 16;

  // As that of `FloatProducts`; a panel holds pairs.
  static void put(const float* row, int64_t n, uint16_t* panel, int64_t column) {
    uint16_t numbers[64] = {};
    write(row, n, numbers);
    for (int64_t d = 0; d < n; d += 2) std::memcpy(panel + d * WIDTH + 2 * column, numbers + d, 4);
  }

  // As that of `FloatProducts`, for a depth of 32 or 64. Maxima are taken of tiles that were stored a while ago.
  static void largest(const uint16_t* keys, int64_t depth, const uint16_t* panel, const float* more, int64_t n,
                      float* to, int64_t to_row) {
    constexpr int64_t RING = 4, LATE = 2;
    alignas(64) float ring[RING][KEYS * WIDTH];
    Vector high[KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) high[i] = all(-INFINITE);
    _tile_loadd(4, keys, 2 * depth);
    if (depth > 32) _tile_loadd(5, keys + 32, 2 * depth);
    for (int64_t p = 0; p < n + LATE; ++p, panel += depth * WIDTH) {
      if (p < n) {
        _tile_zero(0);
        _tile_loadd(6, panel, 4 * WIDTH);
        _tile_dpbf16ps(0, 4, 6);
        if (depth > 32) {
          _tile_loadd(7, panel + 32 * WIDTH, 4 * WIDTH);
          _tile_dpbf16ps(0, 5, 7);
        }
        _tile_stored(0, ring[p % RING], 4 * WIDTH);
      }
      if (p < LATE) continue;
      const float* products = ring[(p - LATE) % RING];
      const Vector add = load(more + (p - LATE) * WIDTH);
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; ++i) high[i] = larger(load(products + i * WIDTH) + add, high[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) store(to + i * to_row, high[i]);
  }
};
#endif

template <typename Kind>
struct Scores {
  typedef typename Kind::Number Number;
  static constexpr int64_t KEYS = Kind::KEYS, WIDTH = Kind::WIDTH;
  static_assert(SLOTS % WIDTH == 0 && WIDTH % ROWS == 0 && KEY_BLOCK % KEYS == 0 && KEY_BLOCK % LANES == 0);

  const Ranking& r;
  int64_t slot_rows, all_rows, blocks, few_columns, depth, outside, columns, n_counted = 0;
  int64_t* sampled;  // keys of the normaliser: those that count for a stride, the first ones, and the segment's own
  float *query, *rows, *factor, *minus, *logits, *maxima, *weights;
  Number *panels, *sampled_keys;

  explicit Scores(const Ranking& ranking) : r(ranking) {
    slot_rows = whole(r.rows, SLOTS);
    all_rows = r.group * slot_rows;
    blocks = all_rows / SLOTS;
    few_columns = whole(r.few, COLUMNS);
    depth = whole(r.few, Kind::STEP);
    columns = whole(sample(nullptr), KEYS);
    char* next = nullptr;
    for (const bool counts : {true, false}) {  // how much memory it takes, then where each part of it lies
      const auto part = [&](auto*& place, int64_t n) {
        if (!counts) place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(next);
        next += whole(n * sizeof(*place), 64);
      };
      part(query, ROWS * r.dim);
      part(rows, ROWS * few_columns);
      part(factor, r.dim * few_columns);
      part(panels, all_rows * depth);
      part(minus, all_rows);
      part(sampled, columns);
      part(sampled_keys, columns * depth);
      part(logits, columns * WIDTH);
      part(weights, columns);
      part(maxima, KEY_BLOCK * SLOTS);
      if (counts) next = memory.of(next - static_cast<char*>(nullptr));
    }
    sample(sampled);
  }

  // Lists the keys of the normaliser, if there is a place for them, and counts them.
  int64_t sample(int64_t* to) {
    int64_t n = 0;
    const auto add = [&](int64_t j) {
      if (to) to[n] = j;
      ++n;
    };
    const auto add_outside = [&](int64_t j) {
      if (j < r.own_start || j >= r.own_stop) add(j);
    };
    for (int64_t j = r.stride / 2; j < r.end; j += r.stride)
      if (j >= r.first_keys) add_outside(j);
    n_counted = n;
    for (int64_t j = 0; j < std::min(r.first_keys, r.end); ++j) add_outside(j);
    outside = n;
    for (int64_t j = r.own_start; j < r.own_stop; ++j) add(j);
    return n;
  }

  int64_t position(int64_t head, int64_t i) const { return r.first + r.positions[head % r.heads * r.rows + i]; }
  bool counts(int64_t head, int64_t i) const { return i < r.rows && position(head, i) < r.n_queries; }
  const Number* key(int64_t j) const { return static_cast<const Number*>(r.key) + j * depth; }

  void read_query(int64_t head, int64_t at, float* to) const {
    const int64_t from = head * r.query_head + at * r.query_row, dim = r.dim;
    if (!r.half_query) {
      std::memcpy(to, static_cast<const float*>(r.query) + from, 4 * dim);
      return;
    }
    const uint16_t* half = static_cast<const uint16_t*>(r.query) + from;
    for (int64_t d = 0; d < dim; ++d) to[d] = read(half[d]);
  }

  // Queries in few numbers, in panels.
  void project() {
    for (int64_t p = 0; p < few_columns; p += COLUMNS)
      for (int64_t d = 0; d < r.dim; ++d)
        for (int64_t c = 0; c < COLUMNS; ++c)
          factor[p * r.dim + d * COLUMNS + c] = p + c < r.few ? r.factor[d * r.few + p + c] * r.scale : 0.f;
    if (depth > r.few) std::memset(panels, 0, all_rows * depth * sizeof(Number));
    for (int64_t row = 0; row < all_rows; row += ROWS) {
      const int64_t head = row / slot_rows, i = row % slot_rows;
      for (int64_t k = 0; k < ROWS; ++k)
        if (counts(head, i + k))
          read_query(head, position(head, i + k), query + k * r.dim);
        else
          std::memset(query + k * r.dim, 0, 4 * r.dim);
      for (int64_t p = 0; p < few_columns; p += COLUMNS)
        product<ROWS, false>(query, r.dim, factor + p * r.dim, r.dim, rows + p, few_columns);
      for (int64_t j = 0; j < ROWS * few_columns; j += LANES) store(rows + j, or_zero(load(rows + j)));
      Number* panel = panels + (row % SLOTS / WIDTH * blocks + row / SLOTS) * WIDTH * depth;
      for (int64_t k = 0; k < ROWS; ++k) Kind::put(rows + k * few_columns, r.few, panel, row % WIDTH + k);
    }
  }

  // minus [rows], in the order of panels: the negative normaliser of each row, -infinity for rows that do not count.
  void normalise() {
    const int64_t n = outside + r.own_stop - r.own_start;
    for (int64_t j = 0; j < columns; ++j) {
      const bool there = j < n && (!r.key_mask || r.key_mask[sampled[j]]);
      // What is added to a logit: a sample counts for all keys that it stands for, a hidden key for none.
      weights[j] = !there ? -INFINITE : j < n_counted ? r.sample_weight : 0.f;
      if (j < n)
        std::memcpy(sampled_keys + j * depth, key(sampled[j]), depth * sizeof(Number));
      else
        std::memset(sampled_keys + j * depth, 0, depth * sizeof(Number));
    }
    const float nothing[WIDTH] = {};
    for (int64_t p = 0; p < all_rows / WIDTH; ++p) {
      const int64_t row = p % blocks * SLOTS + p / blocks * WIDTH, head = row / slot_rows, i = row % slot_rows;
      float seen[WIDTH];  // in-segment keys that a row sees
      int64_t most = 0;
      for (int64_t c = 0; c < WIDTH; ++c) {
        const int64_t sees = counts(head, i + c) ? r.sees + position(head, i + c) - r.own_start : 0;
        most = std::max(most, std::clamp<int64_t>(sees, 0, n - outside));
        seen[c] = std::clamp<int64_t>(sees, 0, n - outside);
      }
      const int64_t used = outside + most;
      for (int64_t j = 0; j < used; j += KEYS)
        Kind::largest(sampled_keys + j * depth, depth, panels + p * WIDTH * depth, nothing, 1, logits + j * WIDTH, WIDTH);
      for (int64_t c = 0; c < WIDTH; c += LANES) {
        const Vector limit = load(seen + c);
        Vector high = all(-INFINITE), total{};
        for (int64_t j = 0; j < used; ++j) {
          Vector x = load(logits + j * WIDTH + c) + weights[j];
          if (j >= outside) x = limit > static_cast<float>(j - outside) ? x : all(-INFINITE);
          store(logits + j * WIDTH + c, x);
          high = larger(x, high);
        }
        const Vector base = high == -INFINITE ? Vector{} : high;
        for (int64_t j = 0; j < used; ++j) total += exp2(load(logits + j * WIDTH + c) - base);
        store(minus + p * WIDTH + c, high == -INFINITE ? high : -(log2(total) + base));
      }
      for (int64_t c = 0; c < WIDTH; ++c)
        if (!counts(head, i + c)) minus[p * WIDTH + c] = -INFINITE;
    }
  }

  // Scores of the keys from `first` on, KEY_BLOCK at most.
  void score(int64_t first) {
    const int64_t n = std::min<int64_t>(KEY_BLOCK, r.end - first);
    for (int64_t slot = 0; slot < SLOTS; slot += WIDTH) {
      const int64_t p = slot / WIDTH * blocks;
      for (int64_t j = 0; j < n; j += KEYS)
        Kind::largest(key(first + j), depth, panels + p * WIDTH * depth, minus + p * WIDTH, blocks,
                      maxima + j * SLOTS + slot, SLOTS);
    }
    float highest[KEY_BLOCK], totals[KEY_BLOCK];
    for (int64_t j = 0; j < n; ++j) {
      const float* x = maxima + j * SLOTS;
      Vector high = load(x), total{};
      for (int64_t slot = LANES; slot < SLOTS; slot += LANES) high = larger(load(x + slot), high);
      highest[j] = largest(high);
      const float base = highest[j] == -INFINITE ? 0.f : highest[j];
      for (int64_t slot = 0; slot < SLOTS; slot += LANES) total += exp2(load(x + slot) - base);
      totals[j] = sum(total);
    }
    for (int64_t j = 0; j < n; j += LANES) {
      const Vector high = load(highest + j);
      store(totals + j, high == -INFINITE ? high : (log2(load(totals + j)) + high) * LN_2);
    }
    std::memcpy(r.scores + first, totals, 4 * n);
  }

  void run() {
    Kind::begin();
    project();
    normalise();
    for (int64_t first = 0; first < r.end; first += KEY_BLOCK) score(first);
    Kind::end();
    std::fill(r.scores + r.end, r.scores + r.n_keys, -INFINITE);
  }
};

}  // namespace

extern "C" int s2o_rank(const Ranking* ranking) {
#ifdef HAS_HALVES
  if (ranking->halves) return done([&] { Scores<HalfProducts>(*ranking).run(); });
#endif
  return done([&] { Scores<FloatProducts>(*ranking).run(); });
}
