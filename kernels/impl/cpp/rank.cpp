// Scores of keys for one segment, by the definition of ranking/per_query.py: products with few numbers, reduced to
// maxima over the queries of a slot as they are made, and summed over slots. Logarithms are binary until the end.
#include "floats.h"
#include "halves.h"

namespace {

constexpr int SLOTS = 64, HALF = ROWS / 2;  // maxima of HALF rows and their products fit into the registers together
constexpr int TILE = 16;
static_assert(SLOTS % ROWS == 0 && SLOTS % TILE == 0);

}  // namespace

extern "C" {

// Strides count numbers. Keys and factors are contiguous.
struct Ranking {
  const void* query;          // [group, .., dim], float32 or bfloat16
  const float *factor, *key;  // factor [dim, few]; key [keys, few]
  const int64_t* positions;   // [heads, rows]: where the queries of head g stand behind `first`, at g modulo heads
  const uint8_t* key_mask;    // [keys], or null
  float* scores;              // [keys]: those before `end` are scored, the others get -infinity
  const uint16_t* half_key;   // the keys in bfloat16, if the products are
  int64_t query_head, query_row, group, heads, rows, first, dim, few, n_queries, n_keys, end, own_start, own_stop;
  int64_t stride, first_keys;  // the normaliser samples a key of each stride, and takes the first keys once
  int64_t sees;                // a query at position p sees in-segment keys below sees + p
  float scale, sample_weight;
  int32_t half_query;  // the query is bfloat16
  int32_t halves;      // products in tiles of bfloat16: what is kept of them decides an order, and no sum
};
}

namespace {

inline Vector or_zero(Vector x) { return x - x == 0.f ? x : Vector{}; }

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
  int64_t slot_rows, all_rows, few_columns, outside, own, columns, n_sampled, n_counted = 0;
  int64_t* sampled;  // keys outside the segment that the normaliser takes, those that count for a stride first
  float *query, *rows, *factor, *panels, *minus, *logits, *maxima, *weights, *minus_tiles;
  int64_t depth;  // numbers of a row in bfloat16
  uint16_t *half_rows, *half_panels;

  explicit Scores(const Ranking& ranking) : r(ranking) {
    slot_rows = whole(r.rows, SLOTS);
    all_rows = r.group * slot_rows;
    few_columns = whole(r.few, COLUMNS);
    own = r.own_stop - r.own_start;
    n_sampled = sample(nullptr);
    outside = whole(n_sampled, COLUMNS);
    columns = outside + whole(own, COLUMNS);
    depth = whole(r.few, 32);
    char* next = nullptr;
    for (const bool counts : {true, false}) {  // how much memory it takes, then where each part of it lies
      const auto part = [&](auto*& place, int64_t n) {
        if (!counts) place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(next);
        next += whole(n * sizeof(*place), 64);
      };
      part(query, ROWS * r.dim);
      part(rows, all_rows * few_columns);
      part(factor, r.dim * few_columns);
      part(panels, (r.halves ? columns : std::max(columns, whole(r.end, COLUMNS))) * r.few);
      part(minus, all_rows);
      part(logits, ROWS * columns);
      part(maxima, SLOTS * COLUMNS);
      part(weights, columns);
      part(sampled, n_sampled);
      part(half_rows, r.halves ? all_rows * depth : 0);
      part(half_panels, r.halves ? whole(r.end, COLUMNS) * depth : 0);
      part(minus_tiles, r.halves ? all_rows * TILE : 0);
      if (counts) next = memory.of(next - static_cast<char*>(nullptr));
    }
    sample(sampled);
  }

  // Lists the sampled keys, if there is a place for them, and counts them.
  int64_t sample(int64_t* to) {
    int64_t n = 0;
    const auto add = [&](int64_t j) {
      if (j >= r.own_start && j < r.own_stop) return;
      if (to) to[n] = j;
      ++n;
    };
    for (int64_t j = r.stride / 2; j < r.end; j += r.stride)
      if (j >= r.first_keys) add(j);
    n_counted = n;
    for (int64_t j = 0; j < std::min(r.first_keys, r.end); ++j) add(j);
    return n;
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

  int64_t position(int64_t head, int64_t i) const { return r.first + r.positions[head % r.heads * r.rows + i]; }

  void read_query(int64_t head, int64_t at, float* to) const {
    const int64_t from = head * r.query_head + at * r.query_row;
    if (!r.half_query) {
      std::memcpy(to, static_cast<const float*>(r.query) + from, 4 * r.dim);
      return;
    }
    for (int64_t d = 0; d < r.dim; ++d) {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(r.query)[from + d]) << 16;
      std::memcpy(to + d, &bits, 4);
    }
  }

  bool counts(int64_t head, int64_t i) const { return i < r.rows && position(head, i) < r.n_queries; }

  // Queries in few numbers, and what is taken off their logits: infinity for rows that do not count.
  void project() {
    for (int64_t p = 0; p < few_columns; p += COLUMNS)
      for (int64_t d = 0; d < r.dim; ++d)
        for (int64_t c = 0; c < COLUMNS; ++c)
          factor[p * r.dim + d * COLUMNS + c] = p + c < r.few ? r.factor[d * r.few + p + c] * r.scale : 0.f;
    for (int64_t head = 0; head < r.group; ++head)
      for (int64_t i = 0; i < slot_rows; i += ROWS) {
        for (int64_t k = 0; k < ROWS; ++k)
          if (counts(head, i + k))
            read_query(head, position(head, i + k), query + k * r.dim);
          else
            std::memset(query + k * r.dim, 0, 4 * r.dim);
        float* to = rows + (head * slot_rows + i) * few_columns;
        for (int64_t p = 0; p < few_columns; p += COLUMNS)
          product<ROWS, false>(query, r.dim, factor + p * r.dim, r.dim, to + p, few_columns);
        for (int64_t j = 0; j < ROWS * few_columns; j += LANES) store(to + j, or_zero(load(to + j)));
      }
  }

  // minus [rows]: the negative normaliser of each row.
  void normalise() {
    // What is added to a logit: a sample counts for all keys that it stands for, a hidden key for none.
    const bool own_hidden = r.key_mask;
    for (int64_t j = 0; j < outside; ++j) {
      const bool there = j < n_sampled && (!r.key_mask || r.key_mask[sampled[j]]);
      weights[j] = !there ? -INFINITE : j < n_counted ? r.sample_weight : 0.f;
    }
    for (int64_t j = 0; own_hidden && j < own; ++j) weights[outside + j] = r.key_mask[r.own_start + j] ? 0.f : -INFINITE;
    pack(sampled, 0, n_sampled, panels);
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
          product<ROWS, false>(rows + (head * slot_rows + i) * few_columns, few_columns, panels + begin * r.few, r.few,
                               logits + begin, columns);
        for (int64_t k = 0; k < ROWS; ++k) {
          of_rows[k] = -INFINITE;
          if (!counts(head, i + k) || !used) continue;
          float* x = logits + k * columns;
          for (int64_t j = 0; j < outside; ++j) x[j] += weights[j];
          for (int64_t j = outside; own_hidden && j < outside + seen[k]; ++j) x[j] += weights[j];
          std::fill(x + outside + seen[k], x + used, -INFINITE);
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

#ifdef HAS_HALVES
  // Rows, and all keys, in bfloat16; what is taken off a row stands in each column of its tile.
  void round() {
    std::memset(half_rows, 0, all_rows * depth * 2);
    for (int64_t i = 0; i < all_rows; ++i) {
      for (int64_t d = 0; d < r.few; ++d) half_rows[i * depth + d] = Halves::write(rows[i * few_columns + d]);
      std::fill(minus_tiles + i * TILE, minus_tiles + (i + 1) * TILE, minus[i]);
    }
    std::memset(half_panels, 0, whole(r.end, COLUMNS) * depth * 2);
    for (int64_t j = 0; j < r.end; ++j)
      Halves::key(r.half_key + j * r.few, r.few, j % COLUMNS, half_panels + j / COLUMNS * COLUMNS * depth);
  }

  // The same as `largest_of_slots` for TILE slots and as many keys of the panel, from column `c` on.
  void largest_of_tiles(int64_t slot, const uint16_t* panel, int64_t c) {
    alignas(64) float products[TILE * TILE];
    Vector high[TILE];
    for (int i = 0; i < TILE; ++i) high[i] = all(-INFINITE);
    for (int64_t row = slot; row < all_rows; row += SLOTS) {
      _tile_loadd(0, minus_tiles + row * TILE, 4 * TILE);
      for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(4, half_rows + row * depth + k, 2 * depth);
        _tile_loadd(6, panel + k * COLUMNS + 2 * c, 4 * COLUMNS);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, products, 4 * TILE);
      for (int i = 0; i < TILE; ++i) high[i] = larger(load(products + i * TILE), high[i]);
    }
    for (int i = 0; i < TILE; ++i) store(maxima + (slot + i) * COLUMNS + c, high[i]);
  }
#endif

  // The largest product of every slot with every key of the panel that begins at `begin`.
  void find_largest(int64_t begin) {
#ifdef HAS_HALVES
    if (r.halves) {
      for (int slot = 0; slot < SLOTS; slot += TILE)
        for (int c = 0; c < COLUMNS; c += TILE) largest_of_tiles(slot, half_panels + begin * depth, c);
      return;
    }
#endif
    for (int slot = 0; slot < SLOTS; slot += HALF) largest_of_slots(slot, panels + begin * r.few);
  }

  void run() {
    project();
    normalise();
    std::fill(r.scores + r.end, r.scores + r.n_keys, -INFINITE);
#ifdef HAS_HALVES
    if (r.halves) round(), Halves::begin();
#endif
    if (!r.halves) pack(nullptr, 0, r.end, panels);
    for (int64_t begin = 0; begin < r.end; begin += COLUMNS) {
      find_largest(begin);
      for (int v = 0; v < VECTORS; ++v) {
        Vector high = all(-INFINITE), total{};
        for (int slot = 0; slot < SLOTS; ++slot) high = larger(load(maxima + slot * COLUMNS + v * LANES), high);
        const Vector base = high == -INFINITE ? Vector{} : high;
        for (int slot = 0; slot < SLOTS; ++slot) total += exp2(load(maxima + slot * COLUMNS + v * LANES) - base);
        for (int64_t c = 0, j = begin + v * LANES; c < LANES && j < r.end; ++c, ++j)
          r.scores[j] = (std::log2(total[c]) + base[c]) * LN_2;
      }
    }
#ifdef HAS_HALVES
    if (r.halves) Halves::end();
#endif
  }
};

}  // namespace

extern "C" int s2o_rank(const Ranking* ranking) {
  return done([&] { Scores(*ranking).run(); });
}
