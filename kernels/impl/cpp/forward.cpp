// S2O forward of one segment: pass 1 over its own keys, pass 2 over ranked keys until its tiles stop.
//
// A segment is G heads of `rows` queries that share a ranking. A chunk of keys is gathered once, into panels that its
// products read in order, and serves every tile that has not stopped. A row keeps its largest product, its mass, and the
// output before the division. Products are scaled, to binary logarithms, once the largest is taken off: the largest is
// then zero at any magnitude, however the compiler fuses what it rounds. The rule is that of core/stop_rule.py. No
// library is called.
#include "floats.h"
#include "halves.h"

namespace {

constexpr int64_t TILE_LEN = 128, OWN_STEP = 256;

}  // namespace

extern "C" {

// Strides count numbers, not bytes. The last stride of query, key, value and output is 1; they are float32, or all of
// them bfloat16.
struct Segment {
  const void *query, *key, *value;
  const float *mean_value, *tau;
  const uint8_t* key_mask;  // [keys], or null
  const int32_t* index;     // ranked prefix keys
  const int64_t *from, *below;  // row i sees in-segment keys from[i] to below[i] - 1, or, if null, below sees + i
  void* output;
  float *lse, *tail, *unvisited;  // tail and unvisited may be null
  int32_t* computed;
  int64_t query_head, query_row, key_row, value_row, output_head, output_row, lse_head, lse_row, tail_head, tail_row;
  int64_t unvisited_head, computed_head;  // of tiles: their stride is 1
  int64_t group, rows, dim, value_dim, count, chunk_len;
  int64_t own_start, own_stop, sees;
  float scale, softcap, tail_share;  // scale: 1e-18 to 1e18; softcap: 0 for none; tail_share: TAIL_SHARE of the stop rule
  int32_t wide;    // the output is float32 anyhow
  int32_t resume;  // tiles whose estimate is not below tau go on from what output, lse, tail and computed hold
};
}

namespace {

template <typename Kind>
struct Work {
  typedef typename Kind::Number Number;
  static constexpr int64_t BLOCK = Kind::BLOCK;
  static_assert(TILE_LEN % BLOCK == 0 && COLUMNS % Kind::STEP == 0);

  const Segment& s;
  int64_t tiles, padded_rows, dims, value_columns;
  float scale;  // from products, or capped logits, to binary logarithms
  Number *query, *keys, *values, *nothing, *weights;  // weights: the numbers that logits become, of the same memory in float32
  float *output, *highest, *mass, *gain, *left_out, *logits, *estimate;  // estimate, visited, going: of tiles
  int64_t* visited;
  bool* going;
  const int32_t* index;  // which keys were gathered: these of the ranking, or those from `first_key` on
  int64_t to_fetch, fetch_stop;
  int64_t first_key, *spoiled, n_spoiled;  // gathered keys whose value is not finite

  explicit Work(const Segment& segment) : s(segment) {
    tiles = (s.rows + TILE_LEN - 1) / TILE_LEN;
    padded_rows = whole(s.rows, BLOCK);
    dims = whole(s.dim, Kind::STEP);
    value_columns = whole(s.value_dim, COLUMNS);
    scale = s.softcap ? 1.f : s.scale * LOG2_E;
    const int64_t widest = whole(std::max(std::min(s.chunk_len, s.count), OWN_STEP), COLUMNS);
    const int64_t all_rows = s.group * padded_rows;
    char* next = nullptr;
    for (const bool counts : {true, false}) {  // how much memory it takes, then where each part of it lies
      const auto part = [&](auto*& place, int64_t n) {
        if (!counts) place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(next);
        next += whole(n * sizeof(*place), 64);
      };
      part(query, all_rows * dims);
      part(keys, widest * dims);
      part(values, widest * value_columns);
      part(nothing, std::max(dims, value_columns));
      part(output, all_rows * value_columns);
      part(highest, all_rows);
      part(mass, all_rows);
      part(gain, all_rows);
      part(left_out, all_rows);
      part(logits, widest * BLOCK);
      part(weights, Kind::IN_PLACE ? 0 : widest * BLOCK);
      part(spoiled, widest);
      part(estimate, s.group * tiles);
      part(visited, s.group * tiles);
      part(going, s.group * tiles);
      if (counts) next = memory.of(next - static_cast<char*>(nullptr));
    }
    if constexpr (Kind::IN_PLACE) weights = logits;
    std::memset(nothing, 0, std::max(dims, value_columns) * sizeof(Number));
  }

  int64_t tile_rows(int64_t tile) const { return std::min(TILE_LEN, s.rows - tile * TILE_LEN); }

  void read_queries(int64_t head, int64_t tile) {
    const int64_t first = tile * TILE_LEN, stop = std::min(first + TILE_LEN, padded_rows);
    Number* to = query + (head * padded_rows + first) * dims;
    std::memset(to, 0, (stop - first) * dims * sizeof(Number));
    const Number* from = static_cast<const Number*>(s.query) + head * s.query_head + first * s.query_row;
    for (int64_t i = 0; i < tile_rows(tile); ++i)
      std::memcpy(to + i * dims, from + i * s.query_row, s.dim * sizeof(Number));
  }

  const Number* value(int64_t j) const {
    return static_cast<const Number*>(s.value) + (index ? index[j] : first_key + j) * s.value_row;
  }

  // Keys and values [n] into panels. Empty places are zero, and so are values that are not finite: nothing times NaN
  // is NaN, so they are added by themselves to the rows that see them.
  void gather(const int32_t* ranked, int64_t first, int64_t n) {
    const int64_t padded = whole(n, COLUMNS);
    index = ranked, first_key = first, n_spoiled = 0;
    for (int64_t begin = 0; begin < padded; begin += COLUMNS) {
      const void* from[COLUMNS];
      for (int64_t c = 0; c < COLUMNS; ++c) {
        const int64_t j = begin + c;
        from[c] = j < n ? static_cast<const Number*>(s.key) + (index ? index[j] : first + j) * s.key_row : nothing;
      }
      transpose(from, s.dim * sizeof(Number), dims * sizeof(Number) / 4, keys + begin * dims);
    }
    for (int64_t j = 0; j < padded; j += Kind::TOGETHER) {
      const Number* from[Kind::TOGETHER];
      for (int64_t i = 0; i < Kind::TOGETHER; ++i) {
        const bool there = j + i < n, kept = there && finite(value(j + i), s.value_dim);
        if (there && !kept) spoiled[n_spoiled++] = j + i;
        from[i] = kept ? value(j + i) : nothing;
      }
      for (int64_t p = 0; p < value_columns; p += COLUMNS) {
        Kind::values(from, s.value_dim - p, values + p * padded + j * COLUMNS);
        for (auto& x : from) x += COLUMNS;
      }
    }
  }

  // Fetches one more ranked key of the next chunk, and its value: a few at a time, while other work goes on.
  void fetch() {
    if (to_fetch >= fetch_stop) return;
    const int64_t j = s.index[to_fetch++];
    prefetch(static_cast<const Number*>(s.key) + j * s.key_row, s.dim * sizeof(Number));
    prefetch(static_cast<const Number*>(s.value) + j * s.value_row, s.value_dim * sizeof(Number));
  }

  bool hidden(int64_t j) const { return !index && s.key_mask && !s.key_mask[first_key + j]; }

  // Merge the first `depth` of n gathered keys into a block of rows; row i sees those from from[i] on and below seen[i],
  // all if not given.
  void merge(int64_t row, int64_t n, int64_t depth, const int64_t* from = nullptr, const int64_t* seen = nullptr) {
    constexpr int64_t PADDED = BLOCK > LANES ? BLOCK : LANES;
    const int64_t columns = whole(depth, COLUMNS);
    float now[PADDED], base[PADDED], kept[PADDED], brought[PADDED];
    Kind::logits(query + row * dims, keys, dims, columns, logits);
    if (s.softcap) {
      const float most = std::min(s.softcap, 1e18f);  // its inverse stays a normal number; it caps nothing
      const float cap = most * LOG2_E, inner = s.scale / most;
      for (int64_t j = 0; j < BLOCK * columns; j += LANES) store(logits + j, tanh(load(logits + j) * inner) * cap);
    }
    for (int64_t i = 0; i < BLOCK; ++i) {
      float* x = logits + i * columns;
      const int64_t stop = seen ? std::min(std::max<int64_t>(seen[i], 0), depth) : depth;
      for (int64_t j = 0; from && j < std::min(from[i], stop); ++j) x[j] = -INFINITE;
      for (int64_t j = stop; j < columns; ++j) x[j] = -INFINITE;
      if (!index && s.key_mask)
        for (int64_t j = 0; j < stop; ++j) x[j] = hidden(j) ? -INFINITE : x[j];
      Vector high = load(x);
      for (int64_t j = LANES; j < columns; j += LANES) high = larger(load(x + j), high);
      now[i] = std::max(highest[row + i], largest(high));
      base[i] = now[i] == -INFINITE ? 0.f : now[i];
      kept[i] = (highest[row + i] - base[i]) * scale;
      highest[row + i] = now[i];
    }
    for (int64_t i = 0; i < BLOCK; i += LANES) store(kept + i, exp2(load(kept + i)));
    for (int64_t i = 0; i < BLOCK; ++i) {
      float* x = logits + i * columns;
      Vector total{};
      fetch();
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector p = exp2((load(x + j) - base[i]) * scale);
        Kind::weight(p, weights + i * columns + j);
        total += p;
      }
      brought[i] = sum(total);
    }
    for (int64_t i = 0; i < BLOCK; ++i) {
      mass[row + i] = mass[row + i] * kept[i] + brought[i];
      const float share = brought[i] / mass[row + i];
      gain[row + i] = share == share ? share : 0.f;
    }
    float* out = output + row * value_columns;
    for (int64_t i = 0; i < BLOCK; ++i)
      for (int64_t d = 0; kept[i] != 1.f && d < value_columns; d += LANES)
        store(out + i * value_columns + d, load(out + i * value_columns + d) * kept[i]);
    Kind::add(weights, columns, values, whole(n, COLUMNS), depth, value_columns, out);
    for (int64_t k = 0; k < n_spoiled; ++k)
      for (int64_t i = 0; i < BLOCK; ++i)
        if ((!seen || (from[i] <= spoiled[k] && spoiled[k] < seen[i])) && !hidden(spoiled[k]))
          for (int64_t d = 0; d < s.value_dim; ++d)
            out[i * value_columns + d] += read(weights[i * columns + spoiled[k]]) * read(value(spoiled[k])[d]);
  }

  // Pass 1 of all tiles.
  void own_keys() {
    for (int64_t first = s.own_start; first < s.own_stop; first += OWN_STEP) {
      const int64_t n = std::min(OWN_STEP, s.own_stop - first);
      gather(nullptr, first, n);
      for (int64_t head = 0; head < s.group; ++head)
        for (int64_t i = 0; i < padded_rows; i += BLOCK) {
          int64_t from[BLOCK], seen[BLOCK], least = n, most = 0;
          for (int64_t r = 0; r < BLOCK; ++r) {
            const int64_t at = std::min(i + r, s.rows - 1);
            from[r] = s.from ? s.from[at] - first : 0;
            seen[r] = std::min((s.below ? s.below[at] : s.sees + at) - first, n);
            least = std::min(least, from[r]);
            most = std::max(most, seen[r]);
          }
          if (most > std::max<int64_t>(least, 0)) merge(head * padded_rows + i, n, most, from, seen);
        }
    }
  }

  // Pass 2: tiles visit chunks until the stop rule holds. `visited` says from which key on, and then where they stopped;
  // a negative number means that a tile does not take part.
  void ranked() {
    bool can_stop = false;
    for (int64_t head = 0; head < s.group; ++head) can_stop |= s.tau[head] > 0;
    can_stop &= s.count >= 2 * s.chunk_len;
    const int64_t all_tiles = s.group * tiles;
    for (int64_t t = 0; t < all_tiles; ++t) going[t] = visited[t] >= 0;
    for (int64_t start = 0; start < s.count; start += s.chunk_len) {
      const int64_t stop = std::min(start + s.chunk_len, s.count), n = stop - start;
      bool now = false, later = false;
      for (int64_t t = 0; t < all_tiles; ++t) {
        now |= going[t] && visited[t] == start;
        later |= going[t] && visited[t] > start;
      }
      if (!now && !later) break;
      if (!now) continue;
      gather(s.index + start, 0, n);
      to_fetch = stop, fetch_stop = std::min(stop + s.chunk_len, s.count);
      const double reached = start + s.chunk_len;
      const double to_come = reached / s.chunk_len * std::max(std::log(s.count / reached), 0.0);
      for (int64_t t = 0; t < all_tiles; ++t) {
        if (!going[t] || visited[t] != start) continue;
        const int64_t head = t / tiles, first = head * padded_rows + t % tiles * TILE_LEN, rows = tile_rows(t % tiles);
        for (int64_t i = 0; i < rows; i += BLOCK) merge(first + i, n, n);
        visited[t] = stop;
        if (!can_stop) continue;
        float unvisited = static_cast<float>(to_come);
        if (start) unvisited *= *std::max_element(gain + first, gain + first + rows);
        if (!(unvisited < s.tau[head])) continue;
        going[t] = false;
        estimate[t] = unvisited;
        for (int64_t i = 0; start && i < rows; ++i)  // the first chunk's gain is not used
          left_out[first + i] = std::min(gain[first + i] * static_cast<float>(to_come), 1.f) * s.tail_share;
      }
    }
  }

  void run() {
    const int64_t all_rows = s.group * padded_rows, all_tiles = s.group * tiles;
    std::fill(output, output + all_rows * value_columns, 0.f);
    std::fill(highest, highest + all_rows, -INFINITE);
    std::fill(mass, mass + all_rows, 0.f);
    std::fill(left_out, left_out + all_rows, 0.f);
    std::fill(estimate, estimate + all_tiles, -1.f);
    for (int64_t t = 0; t < all_tiles; ++t) {
      visited[t] = s.resume ? going_on(t / tiles, t % tiles) : 0;
      if (visited[t] >= 0) read_queries(t / tiles, t % tiles);
    }
    Kind::begin();
    to_fetch = 0, fetch_stop = std::min(s.chunk_len, s.count);
    if (!s.resume) own_keys();
    ranked();
    Kind::end();
    for (int64_t t = 0; t < all_tiles; ++t)
      if (visited[t] >= 0) write(t / tiles, t % tiles);
  }

  float written(int64_t place) const {
    return s.wide ? static_cast<const float*>(s.output)[place] : read(static_cast<const Number*>(s.output)[place]);
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
      const int64_t place = head * s.output_head + at * s.output_row;
      highest[row] = lse * LOG2_E / scale;
      mass[row] = lse == -INFINITE ? 0.f : 1.f;
      for (int64_t d = 0; d < s.value_dim; ++d)
        output[row * value_columns + d] = written(place + d) * (1.f + share) - share * s.mean_value[d];
    }
    return s.computed[head * s.computed_head + tile] - own(tile);
  }

  void write(int64_t head, int64_t tile) {
    for (int64_t i = 0; i < tile_rows(tile); ++i) {
      const int64_t at = tile * TILE_LEN + i, row = head * padded_rows + at;
      const float share = left_out[row], over = mass[row] == 0.f ? 0.f : 1.f / mass[row];
      const int64_t place = head * s.output_head + at * s.output_row;
      float* mean = output + row * value_columns;
      for (int64_t d = 0; d < s.value_dim; ++d) mean[d] *= over;
      for (int64_t d = 0; share != 0.f && d < s.value_dim; ++d)
        mean[d] = (mean[d] + share * s.mean_value[d]) / (1.f + share);
      if (s.wide)
        Floats::write(mean, s.value_dim, static_cast<float*>(s.output) + place);
      else
        Kind::write(mean, s.value_dim, static_cast<Number*>(s.output) + place);
      s.lse[head * s.lse_head + at * s.lse_row] = (highest[row] * scale + std::log2(mass[row])) * LN_2 + std::log1p(share);
      if (s.tail) s.tail[head * s.tail_head + at * s.tail_row] = share;
    }
    s.computed[head * s.computed_head + tile] = static_cast<int32_t>(own(tile) + visited[head * tiles + tile]);
    if (s.unvisited) s.unvisited[head * s.unvisited_head + tile] = estimate[head * tiles + tile];
  }
};

}  // namespace

extern "C" int s2o_attend(const Segment* segment) {
  return done([&] { Work<Floats>(*segment).run(); });
}

// Whether this machine multiplies bfloat16 in tiles; only then s2o_attend_halves may be called.
extern "C" int s2o_has_halves() {
#ifdef HAS_HALVES
  return Halves::allowed();
#else
  return 0;
#endif
}

extern "C" int s2o_attend_halves(const Segment* segment) {
#ifdef HAS_HALVES
  return done([&] { Work<Halves>(*segment).run(); });
#else
  return segment == nullptr;
#endif
}
