// S2O forward of one segment in float32: pass 1 over its own keys, pass 2 over ranked keys until its tiles stop.
//
// A segment is G heads of `rows` queries that share a ranking. A chunk of keys is gathered once, into panels of
// COLUMNS keys or values, and serves every tile that has not stopped. Logits are binary; a row keeps its largest logit
// and its sum, and the output before the division. The rule is that of core/stop_rule.py. No library is called.
#include "simd.h"

namespace {

constexpr int64_t TILE_LEN = 128, OWN_STEP = 256;
constexpr float TAIL_SHARE = 0.2f;
static_assert(TILE_LEN % ROWS == 0 && OWN_STEP % COLUMNS == 0);

}  // namespace

extern "C" {

// Strides count numbers, not bytes. The last stride of query, key, value and output is 1.
struct Segment {
  const float *query, *key, *value, *mean_value, *tau;
  const uint8_t* key_mask;  // [keys], or null
  const int32_t* index;     // ranked prefix keys
  float *output, *lse, *tail, *unvisited;  // tail and unvisited may be null
  int32_t* computed;
  int64_t query_head, query_row, key_row, value_row, output_head, output_row, lse_head, lse_row, tail_head, tail_row;
  int64_t unvisited_head, computed_head;  // of tiles: their stride is 1
  int64_t group, rows, dim, value_dim, count, chunk_len;
  int64_t own_start, own_stop, sees;  // row i of the segment sees in-segment keys below sees + i
  float scale, softcap;  // no cap: 0
  int32_t resume;  // tiles whose estimate is not below tau go on from what output, lse, tail and computed hold
};
}

namespace {

struct Work {
  const Segment& s;
  int64_t tiles, padded_rows, value_columns, widest;
  float *query, *output, *highest, *mass, *gain, *left_out, *keys, *values, *logits, *factors;
  bool finite;

  explicit Work(const Segment& segment) : s(segment) {
    tiles = (s.rows + TILE_LEN - 1) / TILE_LEN;
    padded_rows = whole(s.rows, ROWS);
    value_columns = whole(s.value_dim, COLUMNS);
    widest = whole(std::max(std::min(s.chunk_len, s.count), OWN_STEP), COLUMNS);
    const int64_t all_rows = s.group * padded_rows;
    const int64_t sizes[] = {all_rows * s.dim, all_rows * value_columns, all_rows, all_rows, all_rows, all_rows,
                             widest * s.dim, widest * value_columns, widest * ROWS, ROWS};
    float** parts[] = {&query, &output, &highest, &mass, &gain, &left_out, &keys, &values, &logits, &factors};
    int64_t total = 0;
    for (int64_t size : sizes) total += whole(size, 16);
    float* next = memory.of(total);
    for (int i = 0; i < 10; ++i) *parts[i] = next, next += whole(sizes[i], 16);
  }

  int64_t tile_rows(int64_t tile) const { return std::min(TILE_LEN, s.rows - tile * TILE_LEN); }

  // Queries of a tile, scaled so that products are binary logarithms; empty rows of the last block are zero.
  void read_queries(int64_t head, int64_t tile) {
    const int64_t first = tile * TILE_LEN, stop = std::min(first + TILE_LEN, padded_rows);
    const float scale = s.scale * LOG2_E;
    for (int64_t i = first; i < stop; ++i) {
      float* to = query + (head * padded_rows + i) * s.dim;
      const float* from = s.query + head * s.query_head + i * s.query_row;
      for (int64_t d = 0; d < s.dim; ++d) to[d] = i < s.rows ? from[d] * scale : 0.f;
    }
  }

  // Keys and values [n] into panels; `index` says which rows, or they begin at `first`. Empty columns are zero.
  void gather(const int32_t* index, int64_t first, int64_t n) {
    finite = true;
    Vector check{};
    for (int64_t begin = 0; begin < n; begin += COLUMNS) {
      float* panel = keys + begin * s.dim;
      for (int64_t c = 0; c < COLUMNS; ++c) {
        if (begin + c >= n) {
          for (int64_t d = 0; d < s.dim; ++d) panel[d * COLUMNS + c] = 0.f;
          continue;
        }
        const float* from = s.key + (index ? index[begin + c] : first + begin + c) * s.key_row;
        for (int64_t d = 0; d < s.dim; ++d) panel[d * COLUMNS + c] = from[d];
      }
    }
    const int64_t panels = value_columns / COLUMNS;
    for (int64_t j = 0; j < n; ++j) {
      const float* from = s.value + (index ? index[j] : first + j) * s.value_row;
      for (int64_t p = 0; p < panels; ++p) {
        float* to = values + p * n * COLUMNS + j * COLUMNS;
        const int64_t real = std::min<int64_t>(COLUMNS, s.value_dim - p * COLUMNS);
        if (real == COLUMNS) {
          for (int v = 0; v < VECTORS; ++v) {
            const Vector x = load(from + p * COLUMNS + v * LANES);
            store(to + v * LANES, x);
            check += x * 0.f;
          }
          continue;
        }
        for (int64_t c = 0; c < COLUMNS; ++c) to[c] = c < real ? from[p * COLUMNS + c] : 0.f;
        for (int v = 0; v < VECTORS; ++v) check += load(to + v * LANES) * 0.f;
      }
    }
    finite = sum(check) == 0.f;
  }

  // Merge the first `depth` of n gathered keys into M rows. Row i sees `seen[i]` of them, where given: in-segment
  // keys from `first` on, of which the key mask may hide some.
  template <int M>
  void merge(int64_t row, int64_t n, int64_t depth, const int64_t* seen, int64_t first) {
    const int64_t columns = whole(depth, COLUMNS);
    for (int64_t begin = 0; begin < columns; begin += COLUMNS)
      product<M>(query + row * s.dim, s.dim, keys + begin * s.dim, s.dim, logits + begin, columns, nullptr);
    const float cap = s.softcap * LOG2_E;
    for (int64_t j = 0; cap && j < M * columns; j += LANES)
      store(logits + j, tanh(load(logits + j) * (1.f / cap)) * cap);
    for (int i = 0; i < M; ++i) {
      float* x = logits + i * columns;
      const int64_t stop = seen ? std::min(std::max<int64_t>(seen[i], 0), depth) : depth;
      for (int64_t j = stop; j < columns; ++j) x[j] = -INFINITE;
      if (seen && s.key_mask)
        for (int64_t j = 0; j < stop; ++j) x[j] = s.key_mask[first + j] ? x[j] : -INFINITE;
      Vector high = load(x);
      for (int64_t j = LANES; j < columns; j += LANES) high = larger(load(x + j), high);
      const float before = highest[row + i], now = std::max(before, largest(high));
      const float base = now == -INFINITE ? 0.f : now;
      Vector total{};
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector p = exp2(load(x + j) - base);
        store(x + j, p);
        total += p;
      }
      const float brought = sum(total), kept = before == -INFINITE ? 0.f : std::exp2(before - base);
      const float joint = mass[row + i] * kept + brought, share = brought / joint;
      highest[row + i] = now;
      mass[row + i] = joint;
      gain[row + i] = share == share ? share : 0.f;
      factors[i] = kept;
    }
    for (int64_t p = 0; p < value_columns; p += COLUMNS)
      product<M>(logits, columns, values + p * n, depth, output + row * value_columns + p, value_columns, factors);
  }

  // Pass 1 of all tiles.
  void own_keys() {
    for (int64_t first = s.own_start; first < s.own_stop; first += OWN_STEP) {
      const int64_t n = std::min(OWN_STEP, s.own_stop - first);
      gather(nullptr, first, n);
      for (int64_t head = 0; head < s.group; ++head)
        for (int64_t i = 0; i < padded_rows; i += ROWS) {
          const int64_t row = head * padded_rows + i;
          int64_t seen[ROWS];
          for (int64_t r = 0; r < ROWS; ++r) seen[r] = std::min(s.sees + i + r - first, n);
          if (seen[ROWS - 1] <= 0) continue;
          if (finite)
            merge<ROWS>(row, n, seen[ROWS - 1], seen, first);
          else  // nothing times NaN is NaN: a row must not touch what it does not see
            for (int64_t r = 0; r < ROWS; ++r)
              if (seen[r] > 0) merge<1>(row + r, n, seen[r], seen + r, first);
        }
    }
  }

  // Pass 2: tiles visit chunks until the stop rule holds, from the key on that `visited` says; it returns the keys
  // visited. A negative number: the tile does not take part.
  void ranked(int64_t* visited, float* left_out, float* estimate) {
    bool can_stop = false;
    for (int64_t head = 0; head < s.group; ++head) can_stop |= s.tau[head] > 0;
    can_stop &= s.count >= 2 * s.chunk_len;
    const int64_t all_tiles = s.group * tiles;
    bool* going = static_cast<bool*>(alloca(all_tiles));
    for (int64_t t = 0; t < all_tiles; ++t) going[t] = visited[t] >= 0;
    for (int64_t start = 0; start < s.count; start += s.chunk_len) {
      const int64_t stop = std::min(start + s.chunk_len, s.count), n = stop - start;
      bool any = false, later = false;
      for (int64_t t = 0; t < all_tiles; ++t) {
        any |= going[t] && visited[t] == start;
        later |= going[t] && visited[t] > start;
      }
      if (!any && !later) break;
      if (!any) continue;
      gather(s.index + start, 0, n);
      const double reached = start + s.chunk_len;
      const double to_come = reached / s.chunk_len * std::max(std::log(s.count / reached), 0.0);
      for (int64_t t = 0; t < all_tiles; ++t) {
        if (!going[t] || visited[t] != start) continue;
        const int64_t head = t / tiles, first = head * padded_rows + t % tiles * TILE_LEN, rows = tile_rows(t % tiles);
        for (int64_t i = 0; i < rows; i += ROWS) merge<ROWS>(first + i, n, n, nullptr, 0);
        visited[t] = stop;
        if (!can_stop) continue;
        float unvisited = static_cast<float>(to_come);
        if (start) unvisited *= *std::max_element(gain + first, gain + first + rows);
        if (!(unvisited < s.tau[head])) continue;
        going[t] = false;
        estimate[t] = unvisited;
        for (int64_t i = 0; start && i < rows; ++i)  // the first chunk's gain is not used
          left_out[first + i] = std::min(gain[first + i] * static_cast<float>(to_come), 1.f) * TAIL_SHARE;
      }
    }
  }

  void run() {
    const int64_t all_rows = s.group * padded_rows, all_tiles = s.group * tiles;
    int64_t* visited = static_cast<int64_t*>(alloca(8 * all_tiles));
    float* estimate = static_cast<float*>(alloca(4 * all_tiles));
    std::fill(output, output + all_rows * value_columns, 0.f);
    std::fill(highest, highest + all_rows, -INFINITE);
    std::fill(mass, mass + all_rows, 0.f);
    std::fill(left_out, left_out + all_rows, 0.f);
    std::fill(estimate, estimate + all_tiles, -1.f);
    for (int64_t t = 0; t < all_tiles; ++t) {
      visited[t] = s.resume ? going_on(t / tiles, t % tiles) : 0;
      if (visited[t] >= 0) read_queries(t / tiles, t % tiles);
    }
    if (!s.resume) own_keys();
    ranked(visited, left_out, estimate);
    for (int64_t t = 0; t < all_tiles; ++t)
      if (visited[t] >= 0) write(t / tiles, t % tiles, visited[t], estimate[t]);
  }

  // In-segment keys of a tile: no query of it sees further than its last one.
  int64_t own(int64_t tile) const {
    return std::min(std::max(s.sees - 1 + (tile + 1) * TILE_LEN, s.own_start), s.own_stop) - s.own_start;
  }

  // Reads the state of a tile whose estimate is not below tau, and says how many ranked keys it has visited; else -1.
  int64_t going_on(int64_t head, int64_t tile) {
    if (s.unvisited[head * s.unvisited_head + tile] < s.tau[head]) return -1;
    for (int64_t i = 0; i < tile_rows(tile); ++i) {
      const int64_t at = tile * TILE_LEN + i, row = head * padded_rows + at;
      const float share = s.tail[head * s.tail_head + at * s.tail_row];
      const float lse = s.lse[head * s.lse_head + at * s.lse_row] - std::log1p(share);
      const float* from = s.output + head * s.output_head + at * s.output_row;
      highest[row] = lse * LOG2_E;
      mass[row] = lse == -INFINITE ? 0.f : 1.f;
      for (int64_t d = 0; d < s.value_dim; ++d)
        output[row * value_columns + d] = from[d] * (1.f + share) - share * s.mean_value[d];
    }
    return s.computed[head * s.computed_head + tile] - own(tile);
  }

  void write(int64_t head, int64_t tile, int64_t visited, float estimate) {
    for (int64_t i = 0; i < tile_rows(tile); ++i) {
      const int64_t at = tile * TILE_LEN + i, row = head * padded_rows + at;
      const float share = left_out[row], over = mass[row] == 0.f ? 0.f : 1.f / mass[row];
      float* to = s.output + head * s.output_head + at * s.output_row;
      for (int64_t d = 0; d < s.value_dim; ++d) {
        const float mean = output[row * value_columns + d] * over;
        to[d] = share == 0.f ? mean : (mean + share * s.mean_value[d]) / (1.f + share);
      }
      s.lse[head * s.lse_head + at * s.lse_row] = (highest[row] + std::log2(mass[row])) * LN_2 + std::log1p(share);
      if (s.tail) s.tail[head * s.tail_head + at * s.tail_row] = share;
    }
    s.computed[head * s.computed_head + tile] = static_cast<int32_t>(own(tile) + visited);
    if (s.unvisited) s.unvisited[head * s.unvisited_head + tile] = estimate;
  }
};

}  // namespace

extern "C" void s2o_attend(const Segment* segment) { Work(*segment).run(); }
