// prefix_attention against loops over rows, heads, queries and keys in double; caches hold NaN where nothing is cached.

#include "check.h"
#include "dove/prefix_attention.h"

namespace {

using check::Array;
using check::Dtype;
using check::Random;
using Vector = std::vector<double>;

struct Size {
  int64_t rows;
  int64_t longest;
  int64_t heads;
  int64_t head_dim;
  int threads;
};

// (total, heads, head_dim) with gaps between heads and between entries.
struct Entries {
  Array data;
  int64_t strides[2];

  static Entries normal(Random& random, Dtype dtype, int64_t total, int64_t heads, int64_t head_dim) {
    const int64_t head = head_dim + random.between(0, 3), entry = heads * head + random.between(0, 3);
    Array data(dtype, total == 0 ? 0 : (total - 1) * entry + (heads - 1) * head + head_dim);
    for (int64_t i = 0; i < total * heads; ++i) {
      for (int64_t c = 0; c < head_dim; ++c) data.set(i / heads * entry + i % heads * head + c, random.normal());
    }
    return {std::move(data), {entry, head}};
  }

  Vector row(int64_t entry, int64_t head, int64_t head_dim) const {
    Vector values(head_dim);
    for (int64_t c = 0; c < head_dim; ++c) values[c] = data[entry * strides[0] + head * strides[1] + c];
    return values;
  }
};

// The softmax of one query over the first `seen` keys; zeros if there are none.
Vector attend(const Vector& query, const std::vector<Vector>& keys, const std::vector<Vector>& values, int64_t seen,
              double scale) {
  Vector weights(seen), out(query.size());
  double largest = -check::kInfinity, sum = 0;
  for (int64_t j = 0; j < seen; ++j) {
    for (size_t c = 0; c < query.size(); ++c) weights[j] += query[c] * keys[j][c] * scale;
    largest = std::max(largest, weights[j]);
  }
  for (double& weight : weights) {
    weight = std::exp(weight - largest);
    sum += weight;
  }
  for (int64_t j = 0; j < seen; ++j) {
    for (size_t c = 0; c < query.size(); ++c) out[c] += weights[j] / sum * values[j][c];
  }
  return out;
}

struct Result {
  Array out, k_cache, v_cache;
};

void check_size(Random& random, dove::Isa isa, Dtype dtype, const Size& size) {
  const auto [rows, longest, heads, head_dim, threads] = size;
  const int64_t half = random.between(0, head_dim / 2), rotary_dim = 2 * half;
  const bool cached = random.coin(), causal = random.coin(), cut = !cached && random.coin();
  const double scale = random.one_of({1.0, 3.0}) / std::sqrt(static_cast<double>(head_dim));
  std::vector<int32_t> cu_seqlens{0}, slots, starts, key_lengths;
  int64_t positions = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t length = random.one_of({int64_t{0}, int64_t{1}, random.between(0, longest)});
    cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(length));
    slots.push_back(static_cast<int32_t>(rows - row));
    starts.push_back(cached ? static_cast<int32_t>(random.between(0, 2 * longest)) : 0);
    key_lengths.push_back(static_cast<int32_t>(random.between(0, length)));
    positions = std::max(positions, starts.back() + length);
  }
  const int64_t total = cu_seqlens.back(), max_positions = positions + random.between(0, 2);
  check::next_problem("%s, %d rows, %d entries, %d heads of %d, %d turned, %s, %s, %s, %d threads", check::name(dtype),
                      int(rows), int(total), int(heads), int(head_dim), int(rotary_dim),
                      cached ? "a cache" : "no cache", causal ? "causal" : "not causal",
                      cut ? "key lengths" : "all keys", threads);
  const Entries q = Entries::normal(random, dtype, total, heads, head_dim);
  const Entries k = Entries::normal(random, dtype, total, heads, head_dim);
  const Entries v = Entries::normal(random, dtype, total, heads, head_dim);
  const Array cos = Array::normal(random, Dtype::kFloat32, positions * rotary_dim);
  const Array sin = Array::normal(random, Dtype::kFloat32, positions * rotary_dim);
  const int64_t cache_size = cached ? (rows + 1) * heads * max_positions * head_dim : 0;
  Array k_before(dtype, cache_size), v_before(dtype, cache_size);
  const auto in_cache = [&](int64_t row, int64_t head, int64_t position) {
    return ((slots[row] * heads + head) * max_positions + position) * head_dim;
  };
  for (int64_t row = 0; row < rows && cached; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < starts[row] * head_dim; ++i) {
        k_before.set(in_cache(row, head, 0) + i, random.normal());
        v_before.set(in_cache(row, head, 0) + i, random.normal());
      }
    }
  }

  Result truth{Array(dtype, total * heads * head_dim), k_before, v_before};
  const auto turned = [&](Vector x, int64_t position) {
    for (int64_t c = 0; c < half; ++c) {
      const int64_t first = position * rotary_dim + c, second = first + half;
      const double a = x[c], b = x[c + half];
      x[c] = a * cos[first] - b * sin[first];
      x[c + half] = b * cos[second] + a * sin[second];
    }
    return x;
  };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = cu_seqlens[row], length = cu_seqlens[row + 1] - begin, start = starts[row];
    for (int64_t head = 0; head < heads; ++head) {
      std::vector<Vector> keys, values;
      for (int64_t j = 0; j < start; ++j) {
        keys.emplace_back();
        values.emplace_back();
        for (int64_t c = 0; c < head_dim; ++c) {
          keys[j].push_back(k_before[in_cache(row, head, j) + c]);
          values[j].push_back(v_before[in_cache(row, head, j) + c]);
        }
      }
      for (int64_t j = start; j < start + length; ++j) {
        keys.push_back(turned(k.row(begin + j - start, head, head_dim), j));
        values.push_back(v.row(begin + j - start, head, head_dim));
        for (int64_t c = 0; c < head_dim && cached; ++c) {
          truth.k_cache.set(in_cache(row, head, j) + c, keys[j][c]);
          truth.v_cache.set(in_cache(row, head, j) + c, values[j][c]);
        }
      }
      for (int64_t query = 0; query < length; ++query) {
        const int64_t seen = causal ? start + query + 1 : start + length;
        const Vector out = attend(turned(q.row(begin + query, head, head_dim), start + query), keys, values,
                                  cut ? std::min<int64_t>(seen, key_lengths[row]) : seen, scale);
        for (int64_t c = 0; c < head_dim; ++c) truth.out.set(((begin + query) * heads + head) * head_dim + c, out[c]);
      }
    }
  }

  const auto run = [&](dove::Isa which) {
    Result result{Array(dtype, total * heads * head_dim), k_before, v_before};
    DOVE_CPU_KERNEL(prefix_attention)
    ({q.data.data(),
      k.data.data(),
      v.data.data(),
      {q.strides[0], q.strides[1]},
      {k.strides[0], k.strides[1]},
      {v.strides[0], v.strides[1]},
      result.out.data(),
      cu_seqlens.data(),
      cos.floats(),
      sin.floats(),
      cached ? result.k_cache.data() : nullptr,
      cached ? result.v_cache.data() : nullptr,
      cached ? slots.data() : nullptr,
      cached ? starts.data() : nullptr,
      cut ? key_lengths.data() : nullptr,
      max_positions,
      rows,
      heads,
      head_dim,
      rotary_dim,
      static_cast<float>(scale),
      causal,
      dtype,
      threads},
     which);
    return result;
  };
  const auto compare = [&](const Result& ours, const Result& theirs) {
    close("out", ours.out, theirs.out.values(), check::tolerance(dtype), ours.out.size());
    close("k_cache", ours.k_cache, theirs.k_cache.values(), check::tolerance(dtype), head_dim);
    close("v_cache", ours.v_cache, theirs.v_cache.values(), 0, head_dim);
  };
  const Result ours = run(isa);
  compare(ours, truth);
  compare(ours, run(dove::Isa::kBaseline));
}

void check_all(dove::Isa isa) {
  Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (int trial = 0; trial < 150; ++trial) {
      const int64_t head_dim = random.one_of({random.between(1, 40), int64_t{64}, int64_t{129}});
      check_size(random, isa, dtype, {random.between(0, 4), random.between(1, 70), random.between(1, 3), head_dim, 3});
    }
    // One row and one head: its queries are divided among the threads.
    check_size(random, isa, dtype, {1, 250, 1, 40, 4});
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
