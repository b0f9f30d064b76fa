#include <array>
#include <cmath>
#include <optional>

#include "kernels/attention_append.h"
#include "kernels/gated_cnn_step.h"
#include "kernels/glu_linear.h"
#include "kernels/linear.h"
#include "kernels/mamba2_step.h"
#include "kernels/mamba_step.h"
#include "kernels/mlstm_step.h"
#include "kernels/recurrent_step.h"
#include "kernels/s4_step.h"
#include "kernels/slstm_step.h"
#include "tests/testing/tensors.h"

using namespace krait;
using kernels::Epilogue;
using kernels::RopeStyle;

namespace {

double tolerance(DType t) { return t == DType::bf16 ? 2e-2 : t == DType::f32 ? 1e-5 : 1e-12; }

struct Maker {
  Device device;
  DType dtype;
  uint64_t seed = 1;
  Tensor narrow(const Shape& s, double std = 1) { return random_tensor(s, Normal{.std = std}, seed++, dtype).to(device); }
  Tensor wide(const Shape& s, double mean = 0, double std = 1) {
    return random_tensor(s, Normal{.mean = mean, .std = std}, seed++, accum_dtype(dtype)).to(device);
  }
};

std::vector<Tensor> run_mamba(Device device, DType dtype, int64_t b, int64_t e, int64_t n, int64_t r, int64_t k, bool bias) {
  Maker m{device, dtype};
  Tensor conv = m.narrow({b, k - 1, e}), h = m.wide({b, e, n});
  const kernels::MambaStepWeights w{m.narrow({e, k}), bias ? m.narrow({e}) : Tensor{}, m.narrow({r + 2 * n, e}, 0.1),
                                    m.narrow({e, r}, 0.3), m.wide({e}, -2), m.wide({e, n}, 0.5, 0.5), m.wide({e})};
  std::vector<Tensor> out;
  for (int step = 0; step < 3; ++step) out.push_back(kernels::mamba_step(conv, h, m.narrow({b, 2 * e}), w));
  out.push_back(conv);
  out.push_back(h);
  return out;
}

std::vector<Tensor> run_mamba2(Device device, DType dtype, int64_t b, int64_t heads, int64_t p, int64_t n, int64_t g, int64_t k,
                               bool norm_first) {
  Maker m{device, dtype};
  const int64_t e = heads * p, c = e + 2 * g * n;
  Tensor conv = m.narrow({b, k - 1, c}), h = m.wide({b, heads, p, n});
  const kernels::Mamba2StepWeights w{m.narrow({c, k}), m.narrow({c}), m.wide({heads}, -2), m.wide({heads}, 0.5, 0.5), m.wide({heads}),
                                     m.wide({e}, 1, 0.1), 0, 1e30, 1e-5, norm_first};
  std::vector<Tensor> out;
  for (int step = 0; step < 3; ++step) out.push_back(kernels::mamba2_step(conv, h, m.narrow({b, e + c + heads}), w));
  out.push_back(conv);
  out.push_back(h);
  return out;
}

struct MlstmSizes { int64_t b, heads, dq, side, taps; };

std::vector<Tensor> run_mlstm(Device device, DType dtype, const MlstmSizes& s, bool bias) {
  Maker m{device, dtype};
  const int64_t e = s.heads * s.dq, n = 2 * s.heads;
  Tensor conv = m.narrow({s.b, s.taps - 1, e});
  kernels::MlstmState state{m.wide({s.b, s.heads, s.dq, s.dq}, 0, 0.3), m.wide({s.b, s.heads, s.dq}, 0, 0.3), m.wide({s.b, s.heads})};
  const Shape map{e / s.side, s.side, s.side};
  const kernels::MlstmStepMapsWeights maps{m.narrow({e, s.taps}, 0.5), bias ? m.narrow({e}) : Tensor{},
                                           {m.narrow(map, 0.5), m.narrow(map, 0.5), m.narrow(map, 0.5), m.narrow({n, 3 * e}, 0.02)}};
  const kernels::MlstmStepOutputWeights output{m.wide({n}), m.wide({e}, 0, 0.3), m.narrow({e})};
  std::vector<Tensor> out;
  for (int step = 0; step < 3; ++step) {
    const Tensor up = m.narrow({s.b, 2 * e});
    const kernels::MlstmStepMaps in = kernels::mlstm_step_maps(conv, up.slice(1, 0, e), maps);
    out.push_back(kernels::mlstm_step_output(state, in, up.slice(1, e, 2 * e), output));
  }
  // Of the cell alone, with wide gates.
  const auto head = [&] { return m.narrow({s.b, s.heads, s.dq}); };
  const Tensor q = head(), k = head(), v = head();
  out.push_back(kernels::mlstm_step(q, k, v, m.wide({s.b, s.heads}, 0, 3), m.wide({s.b, s.heads}, 0, 3), state));
  for (const Tensor& t : {conv, state.c, state.n, state.m}) out.push_back(t);
  return out;
}

struct BehindSizes { int64_t b, heads, dq, steps; double gates; DType states = f32; };

// Outputs of steps whose states lie behind their positions on a GPU; with steps of a multiple of 16 the states as well.
std::vector<Tensor> run_mlstm_behind(Device device, DType dtype, const BehindSizes& s) {
  Maker m{device, dtype};
  const int64_t e = s.heads * s.dq, n = 2 * s.heads;
  Tensor conv = m.narrow({s.b, 3, e});
  kernels::MlstmState state{m.wide({s.b, s.heads, s.dq, s.dq}, 0, 0.3), m.wide({s.b, s.heads, s.dq}, 0, 0.3), m.wide({s.b, s.heads})};
  const Shape map{e / 4, 4, 4};
  const kernels::MlstmStepMapsWeights maps{m.narrow({e, 4}, 0.5), m.narrow({e}), {m.narrow(map, 0.5), m.narrow(map, 0.5), m.narrow(map, 0.5), m.narrow({n, 3 * e}, 0.02)}};
  const kernels::MlstmStepOutputWeights output{m.wide({n}, 0, s.gates), m.wide({e}, 0, 0.3), m.narrow({e})};
  kernels::MlstmRecent recent;
  if (device.is_cuda()) {
    recent = kernels::mlstm_recent(state, conv, maps);
    REQUIRE(recent.count.defined());
  }
  const auto round_state = [&] { state.c = device.is_cuda() ? state.c.to(s.states) : state.c.to(s.states).to(accum_dtype(dtype)); };
  round_state();
  std::vector<Tensor> out;
  for (int64_t step = 0; step < s.steps; ++step) {
    const Tensor up = m.narrow({s.b, 2 * e});
    kernels::MlstmStepMaps in = kernels::mlstm_step_maps(conv, up.slice(1, 0, e), maps);
    // Besides what the maps make of them: gates that jump from step to step.
    in.gates = m.wide({s.b, 3, n}, 0, s.gates);
    const Tensor z = up.slice(1, e, 2 * e);
    if (step % 16 == 15 && !device.is_cuda() && s.states != f32) {  // what a write rounds
      out.push_back(kernels::mlstm_step_output(state, in, z, output));
      round_state();
      continue;
    }
    out.push_back(recent.count.defined() ? kernels::mlstm_step_output(state, recent, in, z, output) : kernels::mlstm_step_output(state, in, z, output));
  }
  if (s.steps % 16 == 0) out.insert(out.end(), {state.c.to(f32), state.n, state.m});
  if (recent.count.defined()) {
    CHECK(recent.count.cpu().to_vector<int32_t>() == std::vector<int32_t>(static_cast<size_t>(s.b * s.heads), static_cast<int32_t>(s.steps % 16)));
    CHECK(recent.arrived.cpu().to_vector<int32_t>() == std::vector<int32_t>(static_cast<size_t>(s.b * s.heads)));
  }
  return out;
}

std::vector<Tensor> run_slstm(Device device, DType dtype, int64_t b, int64_t h, int64_t p, int64_t taps, kernels::SlstmForget forget) {
  Maker m{device, dtype};
  const int64_t d = h * p;
  Tensor conv = taps > 0 ? m.narrow({b, taps - 1, d}) : Tensor{};
  Tensor cell = zeros({b, 4, h, p}, accum_dtype(dtype), device);
  const auto map = [&] { return m.narrow({h, p, p}, 0.5 / std::sqrt(static_cast<double>(p))); };
  kernels::SlstmStepWeights w;
  if (taps > 0) {
    w.conv_weight = m.narrow({d, taps});
    w.conv_bias = m.narrow({d});
  }
  w.w_i = map();
  w.w_f = map();
  w.w_z = map();
  w.w_o = map();
  w.R = m.narrow({h, 4, p, p}, 0.5 / std::sqrt(static_cast<double>(p)));
  w.bias = m.wide({4, h, p});
  w.norm = m.wide({d}, 0, 0.3);
  w.forget = forget;
  std::vector<Tensor> out;
  for (int step = 0; step < 3; ++step) out.push_back(kernels::slstm_step(conv, cell, m.narrow({b, d}), w));
  if (taps > 0) out.push_back(conv);
  out.push_back(cell);
  return out;
}

std::vector<Tensor> run_attention(Device device, DType dtype, int64_t b, int64_t hq, int64_t hkv, int64_t d, bool rope, bool alibi,
                                  RopeStyle style) {
  Maker m{device, dtype};
  const int64_t capacity = 70;
  Tensor k = m.narrow({b, capacity, hkv, d}), v = m.narrow({b, capacity, hkv, d});
  kernels::AttentionAppend a{.hq = hq, .hkv = hkv, .style = style};
  if (rope) {
    const auto table = kernels::rope_table(capacity, d / 2, 10000, device, accum_dtype(dtype));
    a.cos = table.cos;
    a.sin = table.sin;
  }
  if (alibi) a.alibi_slopes = random_tensor({hq}, Uniform{0.01, 0.2}, 77, DType::f32).to(device);
  std::vector<Tensor> out;
  for (const int32_t p : {0, 1, 31, 69}) {
    const Tensor position = from_vector(std::vector<int32_t>(static_cast<size_t>(b), p)).to(device);
    out.push_back(kernels::attention_append(m.narrow({b, hq + 2 * hkv, d}), k, v, position, a));
  }
  out.push_back(k);
  out.push_back(v);
  return out;
}

struct S4Sizes { int64_t b, channels, copies, n, rank; };

std::vector<Tensor> run_s4(Device device, DType dtype, const S4Sizes& s, std::optional<kernels::Activation> f) {
  Maker m{device, dtype};
  const int64_t rows = s.channels * s.copies;
  const Shape vector{rows, s.n, 2};
  const auto small = [&](const Shape& shape) { return m.wide(shape, 0, 0.4); };
  kernels::S4System system{small(vector), small(vector), small(vector), m.wide({rows}), {}, {}};
  if (s.rank > 0) {
    system.M = small({rows, s.rank, s.n, 2});
    system.Q = m.wide({rows, s.rank, s.n, 2}, 0, 0.1);
  }
  Tensor x = m.wide(vector.inserted(0, s.b));
  std::vector<Tensor> out;
  for (int step = 0; step < 3; ++step) out.push_back(kernels::s4_step(x, m.narrow({s.b, s.channels}), system, f));
  out.push_back(x);
  return out;
}

std::vector<Tensor> run_recurrent(Device device, DType dtype, kernels::RecurrentCell cell, int64_t b, int64_t d, int64_t p) {
  Maker m{device, dtype};
  const int64_t rows = kernels::gates_of(cell) * p;
  const auto std_of = [](int64_t n) { return 1 / std::sqrt(static_cast<double>(n)); };
  const kernels::RecurrentStepWeights w{m.narrow({rows, d}, std_of(d)), m.narrow({rows, p}, std_of(p)), m.narrow({rows}), m.narrow({rows})};
  Tensor state = m.wide({b, kernels::states_of(cell), 1, p}, 0, 0.5);
  std::vector<Tensor> out;
  for (int step = 0; step < 3; ++step) out.push_back(kernels::recurrent_step(cell, state, m.narrow({b, d}), w));
  out.push_back(state);
  return out;
}

std::vector<Tensor> run_gated_cnn(Device device, DType dtype, int64_t b, int64_t f, int64_t c, int64_t taps) {
  Maker m{device, dtype};
  Tensor conv = m.narrow({b, taps - 1, c});
  const Tensor weight = m.narrow({c, taps}), bias = m.narrow({c});
  std::vector<Tensor> out;
  for (int step = 0; step < 3; ++step) out.push_back(kernels::gated_cnn_step(conv, m.narrow({b, 2 * f}), weight, bias));
  if (taps > 1) out.push_back(conv);
  return out;
}

void check_equal(const std::vector<Tensor>& cpu, const std::vector<Tensor>& gpu, DType dtype, double slack = 1) {
  for (size_t i = 0; i < cpu.size(); ++i) {
    INFO(name_of(dtype) << " result " << i);
    CHECK(relative_error(gpu[i].cpu(), cpu[i]) < slack * tolerance(dtype));
  }
}

}  // namespace

TEST_CASE("mamba_step: cuda equals cpu, outputs and states of three steps", "[cuda]") {
  for (const DType t : {f64, f32, bf16_type}) {
    check_equal(run_mamba(kCpu, t, 1, 96, 16, 6, 4, true), run_mamba(cuda_device(), t, 1, 96, 16, 6, 4, true), t);
    check_equal(run_mamba(kCpu, t, 3, 37, 5, 3, 2, false), run_mamba(cuda_device(), t, 3, 37, 5, 3, 2, false), t);
    if (t == f64) continue;  // has no kernels for many rows of its own
    check_equal(run_mamba(kCpu, t, 13, 96, 16, 6, 4, true), run_mamba(cuda_device(), t, 13, 96, 16, 6, 4, true), t);
    check_equal(run_mamba(kCpu, t, 64, 1536, 16, 48, 4, false), run_mamba(cuda_device(), t, 64, 1536, 16, 48, 4, false), t);
    check_equal(run_mamba(kCpu, t, 70, 40, 16, 64, 4, true), run_mamba(cuda_device(), t, 70, 40, 16, 64, 4, true), t);
  }
}

TEST_CASE("mamba2_step: cuda equals cpu, outputs and states of three steps", "[cuda]") {
  for (const DType t : {f64, f32, bf16_type}) {
    check_equal(run_mamba2(kCpu, t, 1, 3, 64, 128, 1, 4, false), run_mamba2(cuda_device(), t, 1, 3, 64, 128, 1, 4, false), t);
    check_equal(run_mamba2(kCpu, t, 3, 4, 20, 17, 2, 3, true), run_mamba2(cuda_device(), t, 3, 4, 20, 17, 2, 3, true), t);
    if (t == f64) continue;
    check_equal(run_mamba2(kCpu, t, 9, 8, 64, 128, 1, 4, false), run_mamba2(cuda_device(), t, 9, 8, 64, 128, 1, 4, false), t);
    check_equal(run_mamba2(kCpu, t, 65, 8, 19, 128, 1, 4, true), run_mamba2(cuda_device(), t, 65, 8, 19, 128, 1, 4, true), t);
    check_equal(run_mamba2(kCpu, t, 11, 4, 12, 128, 2, 4, true), run_mamba2(cuda_device(), t, 11, 4, 12, 128, 2, 4, true), t);
  }
}

TEST_CASE("mlstm_step: cuda equals cpu, outputs and states of three steps and of the cell alone", "[cuda]") {
  for (const DType t : {f64, f32, bf16_type})
    for (const MlstmSizes& s : {MlstmSizes{1, 4, 384, 4, 4}, {3, 2, 96, 4, 4}, {2, 3, 32, 4, 4}, {2, 1, 576, 4, 4}, {2, 5, 20, 4, 3}, {2, 2, 48, 24, 4}})
      for (const bool bias : {true, false}) {
        INFO(s.b << " rows, " << s.heads << " heads of " << s.dq);
        check_equal(run_mlstm(kCpu, t, s, bias), run_mlstm(cuda_device(), t, s, bias), t);
      }
}

TEST_CASE("mlstm_step: states behind their positions, cuda equals cpu, to the bit each time", "[cuda]") {
  for (const DType t : {f32, bf16_type})
    for (const BehindSizes& s : {BehindSizes{9, 4, 384, 32, 1}, {20, 4, 384, 18, 1}, {64, 4, 96, 18, 1}, {11, 1, 384, 48, 20}, {10, 3, 96, 48, 1}, {33, 2, 64, 35, 50}, {67, 5, 24, 32, 5}, {13, 1, 448, 16, 1}, {300, 2, 40, 32, 2}, {20, 4, 384, 32, 1, bf16_type}, {64, 4, 96, 35, 3, bf16_type}}) {
      INFO(s.b << " rows, " << s.heads << " heads of " << s.dq << ", " << s.steps << " steps, gates " << s.gates);
      const std::vector<Tensor> gpu = run_mlstm_behind(cuda_device(), t, s), again = run_mlstm_behind(cuda_device(), t, s);
      check_equal(run_mlstm_behind(kCpu, t, s), gpu, s.states == f32 ? t : s.states, t == f32 && s.states == f32 ? 20 : 1);  // on the CPU fp32 is up to 9e-5 from fp64
      for (size_t i = 0; i < gpu.size(); ++i) CHECK(relative_error(again[i], gpu[i]) == 0);
    }
}

TEST_CASE("mlstm_step: states are behind their positions for many rows alone", "[cuda]") {
  const auto count_of = [](int64_t b, int64_t d, int64_t taps, DType t) {
    const auto f = [&](const Shape& s, DType of) { return zeros(s, of, cuda_device()); };
    const kernels::MlstmState state{f({b, 2, d, d}, accum_dtype(t)), f({b, 2, d}, accum_dtype(t)), f({b, 2}, accum_dtype(t))};
    const Shape map{d / 2, 4, 4};
    return kernels::mlstm_recent(state, f({b, taps - 1, 2 * d}, t), {f({2 * d, taps}, t), {}, {f(map, t), f(map, t), f(map, t), f({4, 6 * d}, t)}}).count;
  };
  CHECK(count_of(9, 64, 4, f32).defined());
  CHECK_FALSE(count_of(8, 64, 4, f32).defined());
  CHECK_FALSE(count_of(9, 64, 3, f32).defined());
  CHECK_FALSE(count_of(9, 64, 4, f64).defined());
  CHECK_FALSE(count_of(9, 576, 4, bf16_type).defined());
  CHECK(count_of(9, 512, 4, bf16_type).defined());
  CHECK_FALSE(count_of(9, 512, 4, f32).defined());
  CHECK_FALSE(count_of(9, 20, 4, bf16_type).defined());
}

TEST_CASE("slstm_step: cuda equals cpu, outputs and states of three steps", "[cuda]") {
  using kernels::SlstmForget;
  for (const DType t : {f64, f32, bf16_type})
    for (const SlstmForget forget : {SlstmForget::sigmoid, SlstmForget::exp}) {
      check_equal(run_slstm(kCpu, t, 1, 4, 192, 4, forget), run_slstm(cuda_device(), t, 1, 4, 192, 4, forget), t);
      check_equal(run_slstm(kCpu, t, 6, 2, 72, 3, forget), run_slstm(cuda_device(), t, 6, 2, 72, 3, forget), t);
      check_equal(run_slstm(kCpu, t, 9, 3, 264, 0, forget), run_slstm(cuda_device(), t, 9, 3, 264, 0, forget), t);
      check_equal(run_slstm(kCpu, t, 2, 2, 13, 4, forget), run_slstm(cuda_device(), t, 2, 2, 13, 4, forget), t);
    }
}

TEST_CASE("s4_step: cuda equals cpu, outputs and states of three steps", "[cuda]") {
  using kernels::Activation;
  for (const DType t : {f64, f32, bf16_type})
    for (const S4Sizes& s : {S4Sizes{1, 96, 1, 32, 0}, {1, 40, 1, 32, 1}, {5, 35, 2, 31, 1}, {7, 33, 1, 5, 2}, {66, 12, 3, 16, 0}, {3, 9, 1, 64, 1}, {2, 5, 1, 100, 0}})
      for (const std::optional<Activation> f : {std::optional<Activation>(), std::optional(Activation::gelu_erf), std::optional(Activation::silu)}) {
        INFO(s.b << " rows, " << s.channels << " channels, " << s.copies << " copies, " << s.n << " states, rank " << s.rank);
        check_equal(run_s4(kCpu, t, s, f), run_s4(cuda_device(), t, s, f), t);
      }
}

TEST_CASE("recurrent_step: cuda equals cpu, outputs and states of three steps", "[cuda]") {
  using kernels::RecurrentCell;
  for (const DType t : {f64, f32, bf16_type})
    for (const RecurrentCell cell : {RecurrentCell::rnn, RecurrentCell::lstm, RecurrentCell::gru})
      for (const auto& [b, d, p] : std::vector<std::array<int64_t, 3>>{{1, 64, 72}, {3, 72, 40}, {8, 320, 320}, {9, 40, 24}, {17, 64, 72}, {70, 72, 136}, {2, 13, 7}}) {
        INFO(kernels::name_of(cell) << " " << b << " rows, " << d << " inputs, " << p << " units");
        check_equal(run_recurrent(kCpu, t, cell, b, d, p), run_recurrent(cuda_device(), t, cell, b, d, p), t);
      }
}

TEST_CASE("recurrent_step gives the same to the bit each time", "[cuda]") {
  for (const int64_t rows : {1, 13, 70}) {
    const auto run = [&] { return run_recurrent(cuda_device(), bf16_type, kernels::RecurrentCell::lstm, rows, 256, 1024); };
    const std::vector<Tensor> first = run(), second = run();
    for (size_t i = 0; i < first.size(); ++i) CHECK(relative_error(second[i], first[i]) == 0);
  }
}

TEST_CASE("recurrent_step: two decodings whose steps take turns are those of each alone", "[cuda]") {
  struct Decoding {
    Decoding(kernels::RecurrentCell c, int64_t rows, int64_t p) : cell(c), b(rows), m{cuda_device(), f32} {
      const int64_t n = kernels::gates_of(c) * p;
      w = {m.narrow({n, p}, 0.1), m.narrow({n, p}, 0.1), m.narrow({n}), m.narrow({n})};
      x = m.narrow({b, p});
      state = m.wide({b, kernels::states_of(c), 1, p}, 0, 0.5);
    }
    void step() { x = kernels::recurrent_step(cell, state, x, w); }
    std::vector<float> values() const { return state.cpu().to_vector<float>(); }
    kernels::RecurrentCell cell;
    int64_t b;
    Maker m;
    kernels::RecurrentStepWeights w;
    Tensor x, state;
  };
  const auto lstm = [] { return Decoding(kernels::RecurrentCell::lstm, 1, 264); };
  const auto gru = [] { return Decoding(kernels::RecurrentCell::gru, 13, 96); };
  Decoding a = lstm(), b = gru(), a_alone = lstm(), b_alone = gru();
  for (int i = 0; i < 5; ++i) a_alone.step();
  for (int i = 0; i < 5; ++i) b_alone.step();
  for (int i = 0; i < 5; ++i) {
    a.step();
    b.step();
  }
  CHECK(a.values() == a_alone.values());
  CHECK(b.values() == b_alone.values());
}

TEST_CASE("gated_cnn_step: cuda equals cpu, outputs and states of three steps", "[cuda]") {
  for (const DType t : {f64, f32, bf16_type})
    for (const auto& [b, f, c, taps] : std::vector<std::array<int64_t, 4>>{{1, 2048, 768, 7}, {3, 130, 48, 7}, {65, 17, 6, 1}, {2, 33, 33, 11}, {5, 300, 300, 4}}) {
      INFO(b << " rows, " << f << " channels, " << c << " of them convolved, " << taps << " taps");
      check_equal(run_gated_cnn(kCpu, t, b, f, c, taps), run_gated_cnn(cuda_device(), t, b, f, c, taps), t);
    }
}

TEST_CASE("glu_linear: cuda equals cpu", "[cuda]") {
  for (const DType t : {f64, f32, bf16_type})
    for (const auto& [rows, n, k] : std::vector<std::array<int64_t, 3>>{{1, 768, 768}, {2, 33, 1032}, {5, 7, 40}, {8, 70, 4104}, {9, 70, 64}, {3, 5, 7}})
      for (const bool biased : {true, false}) {
        const auto run = [&, rows = rows, n = n, k = k](Device device) {
          Maker m{device, t};
          return kernels::glu_linear(m.narrow({rows, k}), m.narrow({2 * n, k}, 1 / std::sqrt(static_cast<double>(k))), biased ? m.narrow({2 * n}) : Tensor{});
        };
        INFO(rows << " rows, " << n << " outputs, " << k << " inputs");
        check_equal({run(kCpu)}, {run(cuda_device())}, t);
      }
}

TEST_CASE("steps of S4, recurrent networks and gated convolutions name the shapes that do not fit") {
  Tensor x = zeros({2, 6, 4, 2}, DType::f32, kCpu), state = zeros({2, 2, 1, 5}, DType::f32, kCpu), conv = zeros({2, 3, 5}, DType::f32, kCpu);
  const auto f = [](const Shape& s) { return zeros(s, DType::f32, kCpu); };
  const kernels::S4System system{f({6, 4, 2}), f({6, 4, 2}), f({6, 4, 2}), {}, {}, {}};
  CHECK(contains(error_of([&] { kernels::s4_step(x, f({2, 4}), system, {}); }), "u is (2, 4), A (6, 4, 2)"));
  CHECK(contains(error_of([&] { kernels::s4_step(x, f({3, 6}), system, {}); }), "the state is float32 (2, 6, 4, 2)"));
  const kernels::RecurrentStepWeights w{f({20, 3}), f({20, 5}), f({20}), f({20})};
  CHECK(contains(error_of([&] { kernels::recurrent_step(kernels::RecurrentCell::gru, state, f({2, 3}), w); }), "expected 3 times as many rows as units"));
  CHECK(contains(error_of([&] { kernels::recurrent_step(kernels::RecurrentCell::lstm, state, f({3, 3}), w); }), "lstm_step: the state is"));
  CHECK(contains(error_of([&] { kernels::gated_cnn_step(conv, f({2, 8}), f({5, 4}), f({5})); }), "gated_cnn_step: the projection is (2, 8)"));
}

TEST_CASE("attention_append: cuda equals cpu, outputs and caches", "[cuda]") {
  for (const DType t : {f32, bf16_type}) {
    for (const int64_t d : {8, 64, 128, 24})
      check_equal(run_attention(kCpu, t, 2, 4, 2, d, true, false, RopeStyle::half),
                  run_attention(cuda_device(), t, 2, 4, 2, d, true, false, RopeStyle::half), t);
    check_equal(run_attention(kCpu, t, 1, 3, 3, 32, true, true, RopeStyle::interleaved),
                run_attention(cuda_device(), t, 1, 3, 3, 32, true, true, RopeStyle::interleaved), t);
  }
}

TEST_CASE("attention_append: a position past the cache gives NaN and changes nothing") {
  Tensor k = zeros({1, 4, 1, 8}, DType::f32, kCpu), v = zeros({1, 4, 1, 8}, DType::f32, kCpu);
  const Tensor o = kernels::attention_append(ones({1, 3, 8}, DType::f32, kCpu), k, v, from_vector<int32_t>({4}), {.hq = 1, .hkv = 1});
  CHECK(std::isnan(o.to_vector<float>()[0]));
  CHECK(k.to_vector<float>() == std::vector<float>(32, 0.0f));
}

TEST_CASE("linear of few rows: cuda equals cpu", "[cuda]") {
  for (const DType t : {f32, bf16_type})
    for (const int64_t rows : {1, 2, 5, 8, 9, 17, 33, 64, 65})
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 8}, {33, 768}, {3072, 768}, {7, 3080}, {80, 1536}, {768, 1536}})
        for (const Epilogue e : {Epilogue::none, Epilogue::gelu_tanh}) {
          const Tensor x = random_tensor({rows, k}, Normal{}, 1, t), w = random_tensor({n, k}, Normal{.std = 0.05}, 2, t);
          const Tensor bias = random_tensor({n}, Normal{}, 3, t);
          const Device gpu = cuda_device();
          const Tensor cpu = kernels::linear_forward(x, w, bias, e, false).y;
          const Tensor found = kernels::linear_forward(x.to(gpu), w.to(gpu), bias.to(gpu), e, false).y;
          INFO(name_of(t) << " rows " << rows << " n " << n << " k " << k);
          CHECK(relative_error(found.cpu(), cpu) < tolerance(t));
        }
}
