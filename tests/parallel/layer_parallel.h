#pragma once
// One process against a tensor group: the same layer, the same first values, a share on every rank.
#include <algorithm>
#include <cmath>
#include <map>
#include <string>

#include "core/comm/collectives.h"
#include "core/random.h"
#include "kernels/elementwise.h"
#include "layers/model.h"
#include "tests/parallel/world.h"
#include "tests/testing/tensors.h"
#include "train/yaml.h"

namespace krait::layers {

inline ModelConfig model_of(const std::string& yaml) {
  ConfigNode section = train::parse_yaml(yaml, "model");
  return read_model_config(section);
}

inline StoreOptions store_options(DType dtype, Device device = kCpu) {
  return {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype, .seed = 5};
}

/// Away from the start, where many gates and norms are constant.
inline void stir(ParameterStore& full) {
  for (auto& [name, value, whole, shard] : full.parts(full.master())) {
    if (name.find("grid") != std::string::npos) continue;  // knots must rise
    const Tensor noise = random_tensor(whole, Normal{.std = 0.2}, name.size() + 17);
    copy_(value, kernels::add(value, noise.to(value.dtype()).to(value.device())));
  }
  full.refresh_compute();
}

inline std::map<std::string, Tensor> masters_of(const ParameterStore& full) {
  std::map<std::string, Tensor> values;
  for (const auto& [name, value] : full.named_masters()) values[name] = value.cpu().to(DType::f64).clone();
  return values;
}

inline double largest(const Tensor& t) {
  double most = 0;
  for (const double v : t.to_vector<double>()) most = std::isnan(v) ? INFINITY : std::max(most, std::abs(v));
  return most;
}

/// Every gradient is this rank's piece of the full one; over the ranks, primary pieces make up each parameter once.
inline void check_gradients(ParameterStore& shard, ParameterStore& one, double tolerance) {
  const auto found = shard.parts(shard.grad()), wanted = one.parts(one.grad());
  REQUIRE(found.size() == wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    INFO(wanted[i].name << " on rank " << world()->rank());
    REQUIRE(found[i].name == wanted[i].name);
    REQUIRE(found[i].whole == wanted[i].whole);
    const Tensor want = local_values(wanted[i].value, found[i].shard);
    // A share may be all zeros where the whole is not: errors are measured against the whole.
    const double scale = std::max(1e-6, largest(wanted[i].value));
    REQUIRE(found[i].value.shape() == want.shape());
    const double error = largest(kernels::sub(found[i].value, want));
    CHECK(error / scale < tolerance);
  }
  const auto squares = [](const Tensor& flat, const std::vector<std::pair<int64_t, int64_t>>& ranges) {
    double sum = 0;
    for (const auto& [begin, end] : ranges)
      for (const double g : flat.slice(0, begin, end).to_vector<double>()) sum += g * g;
    return sum;
  };
  Tensor norm = full({}, squares(shard.grad(), shard.primary_ranges()), DType::f64, kCpu);
  norm = comm::all_reduce(norm, *world());
  const double want = squares(one.grad(), {{0, one.numel()}});
  CHECK(std::abs(norm.item() - want) <= 2 * tolerance * want);
}

}  // namespace krait::layers
