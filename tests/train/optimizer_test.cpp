#include "train/optimizer.h"

#include <cmath>

#include "core/stream.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::train;
using kernels::SegmentSpec;

namespace {

const std::vector<SegmentSpec> kSegments{{0, 100, 1, 0.1}, {128, 72, 0.5, 0}};

Tensor start(Device device) { return random_tensor({200}, Normal{}, 1, DType::f32).to(device).clone(); }

// Minimises sum (p - 1)^2 / 2.
std::vector<float> descend(const OptimizerOptions& options, double lr, int steps, Device device) {
  Tensor param = start(device), grad = zeros({200}, DType::f32, device);
  Optimizer optimizer(options, param, grad, {}, {{0, 200, 1, 0}});
  for (int s = 0; s < steps; ++s) {
    std::vector<float> g = param.to_vector<float>();
    for (float& x : g) x -= 1;
    copy_(grad, from_vector(g));
    optimizer.step(lr * (steps - s) / steps, s, kernels::grad_norm(grad, 100, optimizer.skipped_steps()));
  }
  return param.to_vector<float>();
}

void check_descent(Device device) {
  const auto close_to_one = [](const std::vector<float>& p) {
    for (const float x : p)
      if (std::abs(x - 1) > 0.05f) return false;
    return true;
  };
  CHECK(close_to_one(descend({.type = OptimizerType::adamw}, 0.03, 400, device)));
  CHECK(close_to_one(descend({.type = OptimizerType::sgd}, 0.1, 200, device)));
  CHECK(close_to_one(descend({.type = OptimizerType::sgd, .momentum = 0.9}, 0.02, 400, device)));
  CHECK(close_to_one(descend({.type = OptimizerType::sgd, .momentum = 0.9, .nesterov = true}, 0.02, 400, device)));
  CHECK(close_to_one(descend({.type = OptimizerType::lion, .beta1 = 0.9, .beta2 = 0.99}, 0.03, 600, device)));
}

}  // namespace

TEST_CASE("every optimizer finds the minimum of a parabola") { check_descent(kCpu); }
TEST_CASE("every optimizer finds the minimum of a parabola on a GPU", "[cuda]") { check_descent(cuda_device()); }

TEST_CASE("state copied into a fresh optimizer continues with the same bits") {
  for (const OptimizerOptions& options :
       {OptimizerOptions{}, OptimizerOptions{.type = OptimizerType::sgd, .momentum = 0.9},
        OptimizerOptions{.type = OptimizerType::lion}}) {
    const auto gradient = [](int s) { return random_tensor({200}, Normal{}, 100 + static_cast<uint64_t>(s), DType::f32); };
    Tensor param = start(kCpu), grad = zeros({200}, DType::f32, kCpu);
    Optimizer whole(options, param, grad, {}, kSegments);
    Tensor saved;
    std::vector<std::pair<std::string, Tensor>> state;
    for (int s = 0; s < 6; ++s) {
      if (s == 3) {
        saved = param.clone();
        for (const auto& [name, t] : whole.state()) state.emplace_back(name, t.clone());
      }
      copy_(grad, gradient(s));
      whole.step(0.01, s);
    }
    Tensor grad_again = zeros({200}, DType::f32, kCpu);
    Optimizer resumed(options, saved, grad_again, {}, kSegments);
    REQUIRE(resumed.state().size() == state.size());
    for (size_t i = 0; i < state.size(); ++i) {
      CHECK(resumed.state()[i].first == state[i].first);
      Tensor into = resumed.state()[i].second;
      copy_(into, state[i].second);
    }
    for (int s = 3; s < 6; ++s) {
      copy_(grad_again, gradient(s));
      resumed.step(0.01, s);
    }
    CHECK(saved.to_vector<float>() == param.to_vector<float>());
  }
}

TEST_CASE("state has the names a checkpoint uses") {
  Tensor param = start(kCpu), grad = zeros({200}, DType::f32, kCpu);
  std::vector<std::string> names;
  const Optimizer optimizer({}, param, grad, {}, kSegments);
  for (const auto& [name, t] : optimizer.state()) names.push_back(name);
  CHECK(names == std::vector<std::string>{"optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.skipped_steps"});
  CHECK(contains(error_of([] { optimizer_type_from_name("adam"); }), "known: adamw, sgd, lion"));
}

TEST_CASE("what a run's memory is checked for is the state that there will be") {
  for (const OptimizerType type : {OptimizerType::adamw, OptimizerType::sgd, OptimizerType::lion})
    for (const double momentum : {0.0, 0.9}) {
      const Tensor param = zeros({64}, DType::f32, kCpu), grad = zeros({64}, DType::f32, kCpu);
      const Optimizer optimizer({.type = type, .momentum = momentum}, param, grad, {}, {{0, 64, 1.0, 0.0}});
      CHECK(states_per_parameter(type, momentum) == static_cast<int>(optimizer.state().size()) - 1);  // and what was skipped
    }
}

TEST_CASE("a captured step replays with new learning rates", "[cuda]") {
  const Device device = cuda_device();
  const auto gradient = random_tensor({200}, Normal{}, 9, DType::f32).to(device);
  Tensor a = start(device), b = start(device);
  Tensor grad_a = gradient.clone(), grad_b = gradient.clone();
  Tensor bf16_copy = zeros({200}, DType::bf16, device);
  Optimizer eager({}, a, grad_a, {}, kSegments), captured({}, b, grad_b, bf16_copy, kSegments);
  CapturedGraph graph(device);
  captured.prepare(0.5, 0);  // overwritten before the first replay
  synchronize(device);
  graph.begin();
  {
    const kernels::GradNorm clip = kernels::grad_norm(grad_b, 1.0, captured.skipped_steps());
    captured.update(clip, /*zero_grad=*/false);
  }
  graph.end();
  for (int s = 0; s < 4; ++s) {
    const double lr = 0.01 * (s + 1);
    eager.step(lr, s, kernels::grad_norm(grad_a, 1.0, eager.skipped_steps()), false);
    captured.prepare(lr, s);
    graph.replay();
  }
  CHECK(a.to_vector<float>() == b.to_vector<float>());
  CHECK(bf16_copy.to_vector<float>() == b.to(DType::bf16).to_vector<float>());
}
