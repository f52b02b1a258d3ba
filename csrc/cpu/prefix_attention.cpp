#include "dove/prefix_attention.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "dove/parallel.h"
#include "simd.h"

// Queries are in the lanes, as rows are in vq_lookup: a panel holds kPanelQueries of them channel by channel, and a
// key's or value's element is the same for all. So keys and values are read as they lie, in the cache too, the softmax
// goes over keys without a reduction over lanes, and what is masked costs nothing but on the diagonal. Over blocks of
// keys the largest score, the sum and the output are kept and corrected (Milakov and Gimelshein, 2018). A query's
// result depends on its own keys alone, but the blocks of keys start at the row's first key whatever the batch.
namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// Registers: kKeys x 2 or kChannels x 2 sums, 2 vectors of queries and one element.
#if defined(__AVX512F__)
constexpr int kKeys = 12;
constexpr int kChannels = 8;
#else
constexpr int kKeys = 6;
constexpr int kChannels = 4;
#endif
constexpr int kVectors = 2;
constexpr int kPanelQueries = kVectors * kLanes;
// So few queries leave most lanes of a panel empty: they are taken one by one.
constexpr int64_t kFewQueries = kLanes / 4;
// Keys whose scores are held at a time: 12 KB of them with AVX-512.
constexpr int64_t kBlockKeys = 96;
// A thread gets at least so many multiply-adds: some 20 us.
constexpr int64_t kGrain = int64_t{1} << 20;

constexpr float kNone = -__builtin_inff();

// Rows of channels in fp32, `stride` elements apart.
struct Rows {
  const float* data;
  int64_t stride;

  const float* operator[](int64_t row) const { return data + row * stride; }
};

// A run of keys and their values.
struct Segment {
  Rows keys;
  Rows values;
  int64_t count;
};

template <typename T>
void copy_row(const T* source, float* target, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(target + c, load(source + c));
  if (c < count) store_part(target + c, load_part(source + c, count - c), count - c);
}

template <typename T>
void copy_row(const float* source, T* target, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(target + c, load(source + c));
  if (c < count) store_part(target + c, load_part(source + c, count - c), count - c);
}

void copy_row(const float* source, float* target, int64_t count) { std::memcpy(target, source, count * sizeof(float)); }

// The row turned by the tables' row at `position`, in fp32 and rounded to T.
template <typename T>
void rotate_row(const PrefixAttentionParams& p, const T* source, int64_t position, float* target) {
  const float* cos = p.cos + position * p.rotary_dim;
  const float* sin = p.sin + position * p.rotary_dim;
  const int64_t half = p.rotary_dim / 2;
  copy_row(source, target, p.head_dim);
  for (int64_t c = 0; c < half; ++c) {
    const float first = target[c], second = target[c + half];
    target[c] = first * cos[c] - second * sin[c];
    target[c + half] = second * cos[c + half] + first * sin[c + half];
  }
  if constexpr (!std::is_same_v<T, float>) {
    T rounded[kLanes];
    for (int64_t c = 0; c < p.rotary_dim; c += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, p.rotary_dim - c);
      copy_row(target + c, rounded, count);
      copy_row(rounded, target + c, count);
    }
  }
}

// One thread's memory.
struct Scratch {
  std::vector<float> keys;     // new keys, turned; for 16-bit dtypes the cached ones before them
  std::vector<float> values;   // 16-bit dtypes only
  std::vector<float> panel;    // (head_dim, kPanelQueries)
  std::vector<float> scores;   // (kBlockKeys, kPanelQueries)
  std::vector<float> out;      // (head_dim, kPanelQueries)
  std::vector<float> row;      // (head_dim,)
  std::vector<float> weights;  // (keys,) of one query, and kLanes behind them
};

// scores[key] = q . k for kCount keys from `keys` on; kUsed vectors of the panel.
template <int kUsed, int kCount>
void score_keys(int64_t head_dim, const float* panel, Rows keys, int64_t first, float* scores) {
  Vec sums[kCount][kUsed];
  const float* key = keys[first];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) sums[i][v] = Vec{};
  }
  for (int64_t c = 0; c < head_dim; ++c) {
    Vec queries[kUsed];
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) queries[v] = load(panel + c * kPanelQueries + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const Vec element = broadcast(key[i * keys.stride + c]);
#pragma GCC unroll 2
      for (int v = 0; v < kUsed; ++v) sums[i][v] = fma(queries[v], element, sums[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) store(scores + i * kPanelQueries + v * kLanes, sums[i][v]);
  }
}

// out[channel] = out[channel] * correction + sum over keys of scores[key] * value[channel], kCount channels.
template <int kUsed, int kCount>
void add_values(const float* scores, Rows values, int64_t first, int64_t count, int64_t channel, const Vec* correction,
                float* out) {
  Vec sums[kCount][kUsed];
  float* target = out + channel * kPanelQueries;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) sums[i][v] = load(target + i * kPanelQueries + v * kLanes) * correction[v];
  }
  for (int64_t key = 0; key < count; ++key) {
    const float* value = values[first + key] + channel;
    Vec weights[kUsed];
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) weights[v] = load(scores + key * kPanelQueries + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Vec element = broadcast(value[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kUsed; ++v) sums[i][v] = fma(weights[v], element, sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kUsed; ++v) store(target + i * kPanelQueries + v * kLanes, sums[i][v]);
  }
}

// The softmax's state of a panel's queries.
template <int kUsed>
struct Softmax {
  Vec largest[kUsed];
  Vec sum[kUsed];
};

// Keys [first, first + count) of a segment, count <= kBlockKeys. A query in lane i sees those with first + j <=
// last_visible + i; `masked`: some of them see less than all.
template <int kUsed>
void attend_block(int64_t head_dim, const Segment& segment, int64_t first, int64_t count, bool masked,
                  int64_t last_visible, Scratch& s, Softmax<kUsed>& softmax) {
  float* scores = s.scores.data();
  int64_t key = 0;
  for (; key + kKeys <= count; key += kKeys) {
    score_keys<kUsed, kKeys>(head_dim, s.panel.data(), segment.keys, first + key, scores + key * kPanelQueries);
  }
  for (; key < count; ++key) {
    score_keys<kUsed, 1>(head_dim, s.panel.data(), segment.keys, first + key, scores + key * kPanelQueries);
  }
  if (masked) {
    for (int64_t j = 0; j < count; ++j) {
      // Lanes before `hidden` do not see the key.
      const int64_t hidden = std::min<int64_t>(first + j - last_visible, kUsed * kLanes);
      for (int64_t lane = 0; lane < hidden; ++lane) scores[j * kPanelQueries + lane] = kNone;
    }
  }
  Vec correction[kUsed];
  for (int v = 0; v < kUsed; ++v) {
    float* column = scores + v * kLanes;
    // Not below the lowest finite number: a query that has seen no key yet gets exp(-inf) = 0 weights, not NaN.
    Vec largest = maximum(softmax.largest[v], broadcast(-3.0e38f));
    for (int64_t j = 0; j < count; ++j) {
      const Vec score = load(column + j * kPanelQueries);
      largest = select(score <= largest, largest, score);  // NaN is kept
    }
    Vec sum = Vec{};
    for (int64_t j = 0; j < count; ++j) {
      const Vec weight = exp(load(column + j * kPanelQueries) - largest);
      store(column + j * kPanelQueries, weight);
      sum += weight;
    }
    correction[v] = exp(softmax.largest[v] - largest);
    softmax.sum[v] = softmax.sum[v] * correction[v] + sum;
    softmax.largest[v] = largest;
  }
  int64_t channel = 0;
  for (; channel + kChannels <= head_dim; channel += kChannels) {
    add_values<kUsed, kChannels>(scores, segment.values, first, count, channel, correction, s.out.data());
  }
  for (; channel < head_dim; ++channel) {
    add_values<kUsed, 1>(scores, segment.values, first, count, channel, correction, s.out.data());
  }
}

// A row and a head.
template <typename T>
struct Row {
  const PrefixAttentionParams& p;
  int64_t row;
  int64_t head;
  int64_t begin = p.cu_seqlens[row];
  int64_t length = p.cu_seqlens[row + 1] - begin;
  int64_t start = p.k_cache == nullptr ? 0 : p.starts[row];
  // Elements before the row's part of a cache.
  int64_t cached = p.k_cache == nullptr ? 0 : (p.slots[row] * p.heads + head) * p.max_positions * p.head_dim;

  const T* q(int64_t j) const { return at(p.q, p.q_stride, j); }
  const T* k(int64_t j) const { return at(p.k, p.k_stride, j); }
  const T* v(int64_t j) const { return at(p.v, p.v_stride, j); }

 private:
  const T* at(const void* base, const int64_t* stride, int64_t j) const {
    return static_cast<const T*>(base) + (begin + j) * stride[0] + head * stride[1];
  }
};

// Queries [first, first + count) of a row, count <= kUsed * kLanes, against all segments.
template <int kUsed, typename T>
void attend_panel(const Row<T>& r, int64_t first, int64_t count, const Segment (&segments)[2], Scratch& s) {
  const PrefixAttentionParams& p = r.p;
  std::fill(s.panel.begin(), s.panel.end(), 0.0f);
  std::fill(s.out.begin(), s.out.end(), 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    rotate_row(p, r.q(first + i), r.start + first + i, s.row.data());
    for (int64_t c = 0; c < p.head_dim; ++c) s.panel[c * kPanelQueries + i] = s.row[c] * p.scale;
  }
  Softmax<kUsed> softmax;
  for (int v = 0; v < kUsed; ++v) {
    softmax.largest[v] = broadcast(kNone);
    softmax.sum[v] = Vec{};
  }
  for (const Segment& segment : segments) {
    const bool is_new = &segment == &segments[1];
    const int64_t seen = is_new && p.causal ? std::min(segment.count, first + count) : segment.count;
    for (int64_t key = 0; key < seen; key += kBlockKeys) {
      const int64_t keys = std::min(kBlockKeys, seen - key);
      const bool masked = is_new && p.causal && key + keys > first + 1;
      attend_block<kUsed>(p.head_dim, segment, key, keys, masked, first, s, softmax);
    }
  }
  for (int v = 0; v < kUsed; ++v) {
    // A query that sees no key has the sum 0 and gets zeros.
    const Vec inverse = select(softmax.sum[v] == Vec{}, Vec{}, broadcast(1.0f) / softmax.sum[v]);
    for (int64_t c = 0; c < p.head_dim; ++c) {
      float* at = s.out.data() + c * kPanelQueries + v * kLanes;
      store(at, load(at) * inverse);
    }
  }
  T* out = static_cast<T*>(p.out) + ((r.begin + first) * p.heads + r.head) * p.head_dim;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < p.head_dim; ++c) s.row[c] = s.out[c * kPanelQueries + i];
    copy_row(s.row.data(), out + i * p.heads * p.head_dim, p.head_dim);
  }
}

inline float dot(const float* a, const float* b, int64_t count) {
  Vec sums = Vec{};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) sums = fma(load(a + c), load(b + c), sums);
  if (c < count) sums = fma(load_part(a + c, count - c), load_part(b + c, count - c), sums);
  return sum(sums);
}

// out[channel] = sum over keys of weights[key] * value[channel] for kCount vectors of channels; of one, its first
// `used` <= kLanes.
template <int kCount>
void mix_values(const float* weights, const Segment (&segments)[2], const int64_t* seen, int64_t channel, int64_t used,
                float* out) {
  Vec sums[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) sums[i] = Vec{};
  for (int part = 0; part < 2; ++part) {
    for (int64_t key = 0; key < seen[part]; ++key) {
      const float* value = segments[part].values[key] + channel;
      const Vec weight = broadcast(*weights++);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const Vec elements = used == kLanes ? load(value + i * kLanes) : load_part(value, used);
        sums[i] = fma(weight, elements, sums[i]);
      }
    }
  }
  for (int i = 0; i < kCount; ++i) {
    used == kLanes ? store(out + i * kLanes, sums[i]) : store_part(out, sums[i], used);
  }
}

// One query, with the channels in the lanes.
template <typename T>
void attend_query(const Row<T>& r, int64_t query, const Segment (&segments)[2], Scratch& s) {
  const PrefixAttentionParams& p = r.p;
  const int64_t visible = p.causal ? std::min(segments[1].count, query + 1) : segments[1].count;
  const int64_t seen[2] = {segments[0].count, visible};
  const int64_t keys = seen[0] + seen[1];
  s.weights.assign(keys + kLanes, kNone);
  rotate_row(p, r.q(query), r.start + query, s.row.data());
  float* weight = s.weights.data();
  float largest = -3.0e38f;
  for (int part = 0; part < 2; ++part) {
    for (int64_t key = 0; key < seen[part]; ++key) {
      *weight = dot(s.row.data(), segments[part].keys[key], p.head_dim) * p.scale;
      largest = *weight <= largest ? largest : *weight;
      ++weight;
    }
  }
  Vec sums = Vec{};
  for (int64_t key = 0; key < keys; key += kLanes) {
    const Vec part = exp(load(s.weights.data() + key) - broadcast(largest));
    store(s.weights.data() + key, part);
    sums += part;
  }
  const float total = sum(sums);
  const Vec inverse = broadcast(total == 0.0f ? 0.0f : 1.0f / total);
  for (int64_t key = 0; key < keys; key += kLanes) {
    store(s.weights.data() + key, load(s.weights.data() + key) * inverse);
  }
  int64_t c = 0;
  for (; c + 4 * kLanes <= p.head_dim; c += 4 * kLanes) {
    mix_values<4>(s.weights.data(), segments, seen, c, kLanes, s.row.data() + c);
  }
  for (; c < p.head_dim; c += kLanes) {
    mix_values<1>(s.weights.data(), segments, seen, c, std::min<int64_t>(kLanes, p.head_dim - c), s.row.data() + c);
  }
  copy_row(s.row.data(), static_cast<T*>(p.out) + ((r.begin + query) * p.heads + r.head) * p.head_dim, p.head_dim);
}

// Queries [first, last) of a row and head. Their keys and values go into the cache; those of other queries that they
// see are computed again, so that items do not wait for each other.
template <typename T>
void attend(const Row<T>& r, int64_t first, int64_t last, Scratch& s) {
  const PrefixAttentionParams& p = r.p;
  constexpr bool wide = std::is_same_v<T, float>;
  int64_t new_keys = p.causal ? last : r.length;
  if (p.key_lengths != nullptr) new_keys = std::clamp<int64_t>(p.key_lengths[r.row], 0, r.length);
  // Room for the keys of [first, last) too, which the cache gets even where nothing sees them.
  const int64_t prepared = std::max(new_keys, p.k_cache == nullptr ? 0 : last);
  const int64_t before = wide ? 0 : r.start;
  s.keys.resize((before + prepared) * p.head_dim);
  if (!wide) s.values.resize((before + prepared) * p.head_dim);
  T* k_cache = static_cast<T*>(p.k_cache) + r.cached;
  T* v_cache = static_cast<T*>(p.v_cache) + r.cached;
  if (!wide) {
    copy_row(k_cache, s.keys.data(), before * p.head_dim);
    copy_row(v_cache, s.values.data(), before * p.head_dim);
  }
  for (int64_t j = 0; j < prepared; ++j) {
    float* key = s.keys.data() + (before + j) * p.head_dim;
    rotate_row(p, r.k(j), r.start + j, key);
    if (!wide) copy_row(r.v(j), s.values.data() + (before + j) * p.head_dim, p.head_dim);
    if (p.k_cache != nullptr && j >= first && j < last) {
      copy_row(key, k_cache + (r.start + j) * p.head_dim, p.head_dim);
      std::memcpy(v_cache + (r.start + j) * p.head_dim, r.v(j), p.head_dim * sizeof(T));
    }
  }
  Segment segments[2];
  const Rows keys{s.keys.data(), p.head_dim};
  if constexpr (wide) {
    segments[0] = {{k_cache, p.head_dim}, {v_cache, p.head_dim}, r.start};
    segments[1] = {keys, {r.v(0), p.v_stride[0]}, new_keys};
  } else {
    const Rows values{s.values.data(), p.head_dim};
    segments[0] = {keys, values, before};
    segments[1] = {{keys[before], p.head_dim}, {values[before], p.head_dim}, new_keys};
  }
  for (int64_t query = first; query < last; query += kPanelQueries) {
    const int64_t count = std::min<int64_t>(kPanelQueries, last - query);
    if (count <= kFewQueries) {
      for (int64_t i = 0; i < count; ++i) attend_query(r, query + i, segments, s);
    } else if (count <= kLanes) {
      attend_panel<1>(r, query, count, segments, s);
    } else {
      attend_panel<kVectors>(r, query, count, segments, s);
    }
  }
}

// What one thread takes at a time: some queries of one row and head.
struct Item {
  int32_t row;
  int32_t first;
  int32_t last;
};

template <typename T>
void run(const PrefixAttentionParams& p) {
  // Rows and heads are enough for the threads, or a row's queries are divided too, in whole panels.
  const int64_t wanted = (p.num_threads + p.rows * p.heads - 1) / (p.rows * p.heads);
  std::vector<Item> items;
  int64_t work = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t length = p.cu_seqlens[row + 1] - p.cu_seqlens[row];
    const int64_t panels = (length + kPanelQueries - 1) / kPanelQueries;
    const int64_t parts = std::min(wanted, panels);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = panels * part / parts * kPanelQueries;
      const int64_t last = std::min(panels * (part + 1) / parts * kPanelQueries, length);
      items.push_back({static_cast<int32_t>(row), static_cast<int32_t>(first), static_cast<int32_t>(last)});
    }
    const int64_t keys = length + (p.k_cache == nullptr ? 0 : p.starts[row]);
    work += 2 * panels * kPanelQueries * keys * p.head_dim * p.heads;
  }
  const int64_t count = static_cast<int64_t>(items.size()) * p.heads;
  if (count == 0) return;
  // Long and short rows: a thread that is done takes more, so more ranges than threads.
  const int threads = static_cast<int>(std::clamp<int64_t>(work / kGrain, 1, p.num_threads));
  parallel_items(count, threads, [&](auto next) {
    Scratch s;
    s.panel.resize(p.head_dim * kPanelQueries);
    s.out.resize(p.head_dim * kPanelQueries);
    s.scores.resize(kBlockKeys * kPanelQueries);
    s.row.resize(p.head_dim);
    for (int64_t index; (index = next()) >= 0;) {
      const Item& item = items[index / p.heads];
      attend(Row<T>{p, item.row, index % p.heads}, item.first, item.last, s);
    }
  });
}

}  // namespace

void prefix_attention(const PrefixAttentionParams& params) {
  if (params.rows == 0 || params.heads == 0) return;
  with_element_type(params.dtype, [&](auto element) { run<decltype(element)>(params); });
}

}  // namespace dove::DOVE_ISA_NAMESPACE
