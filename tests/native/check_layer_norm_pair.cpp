// layer_norm_pair against loops in double: totals bit by bit, as they are sums of three in fp32; norms of those totals.

#include "check.h"
#include "dove/layer_norm_pair.h"

namespace {

using check::Array;
using check::Dtype;
using check::Random;

struct Size {
  int64_t rows;
  int64_t width;
  int addends;
  bool pair;
  int threads;
};

struct Norms {
  Array total, y1, y2, mean, rstd;
};

void check_size(Random& random, dove::Isa isa, Dtype dtype, const Size& size) {
  const auto [rows, width, addends, pair, threads] = size;
  check::next_problem("%s, %d rows of %d, %d addends, %s, %d threads", check::name(dtype), int(rows), int(width),
                      addends, pair ? "pair" : "single", threads);
  constexpr double eps = 1e-5;
  dove::LayerNormPairParams params{};
  std::vector<Array> terms;
  for (int i = 0; i <= addends; ++i) {
    params.row_strides[i] = width + random.between(0, 5);
    terms.push_back(Array::normal(random, dtype, rows, width, params.row_strides[i], i == 0 ? 3 : 0));
    params.terms[i] = terms.back().data();
  }
  std::vector<Array> affine;
  for (int i = 0; i < 4; ++i) affine.push_back(Array::normal(random, Dtype::kFloat32, width, 0.5));
  params.weight1 = affine[0].floats();
  params.bias1 = affine[1].floats();
  params.weight2 = pair ? affine[2].floats() : nullptr;
  params.bias2 = pair ? affine[3].floats() : nullptr;
  params.rows = rows;
  params.width = width;
  params.eps = static_cast<float>(eps);
  params.dtype = dtype;
  params.num_threads = threads;

  // What is not asked for stays empty.
  const auto make = [&] {
    return Norms{Array(dtype, addends ? rows * width : 0), Array(dtype, rows * width),
                 Array(dtype, pair ? rows * width : 0), Array(Dtype::kFloat32, rows), Array(Dtype::kFloat32, rows)};
  };
  Norms truth = make();
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> values(width);
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < width; ++c) {
      const auto term = [&](int i) { return static_cast<float>(terms[i][row * params.row_strides[i] + c]); };
      const float added = addends > 1 ? term(1) + term(2) : addends > 0 ? term(1) : 0.0f;
      values[c] = addends > 0 ? added + term(0) : term(0);
      if (addends > 0) {
        truth.total.set(row * width + c, values[c]);
        values[c] = truth.total[row * width + c];
      }
      mean += values[c] / static_cast<double>(width);
    }
    for (const double value : values) variance += (value - mean) * (value - mean) / static_cast<double>(width);
    const double rstd = 1 / std::sqrt(variance + eps);
    truth.mean.set(row, mean);
    truth.rstd.set(row, rstd);
    for (int64_t c = 0; c < width; ++c) {
      const double normal = (values[c] - mean) * rstd;
      truth.y1.set(row * width + c, normal * affine[0][c] + affine[1][c]);
      if (pair) truth.y2.set(row * width + c, normal * affine[2][c] + affine[3][c]);
    }
  }

  const auto run = [&](dove::Isa which) {
    Norms out = make();
    params.total = addends ? out.total.data() : nullptr;
    params.y1 = out.y1.data();
    params.y2 = pair ? out.y2.data() : nullptr;
    params.mean = out.mean.floats();
    params.rstd = out.rstd.floats();
    DOVE_CPU_KERNEL(layer_norm_pair)(params, which);
    return out;
  };
  const auto compare = [&](const Norms& ours, const Norms& theirs) {
    close("total", ours.total, theirs.total.values(), 0, width);
    close("y1", ours.y1, theirs.y1.values(), check::tolerance(dtype), width);
    close("y2", ours.y2, theirs.y2.values(), check::tolerance(dtype), width);
    close("mean", ours.mean, theirs.mean.values(), check::tolerance(Dtype::kFloat32), rows);
    close("rstd", ours.rstd, theirs.rstd.values(), check::tolerance(Dtype::kFloat32), rows);
  };
  const Norms ours = run(isa);
  compare(ours, truth);
  compare(ours, run(dove::Isa::kBaseline));
}

void check_all(dove::Isa isa) {
  Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (const int addends : {0, 1, 2}) {
      for (const bool pair : {false, true}) {
        for (int trial = 0; trial < 60; ++trial) {
          check_size(random, isa, dtype, {random.between(0, 5), random.between(1, 150), addends, pair, 3});
        }
        // Enough elements for several threads.
        check_size(random, isa, dtype, {131, 1003, addends, pair, 4});
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
