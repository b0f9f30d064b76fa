#include "kernels/step_scope.h"

#include <cmath>

#include "kernels/attention_append.h"
#include "kernels/elementwise.h"
#include "kernels/feed_forward.h"
#include "kernels/layer_norm.h"
#include "kernels/linear.h"
#include "kernels/mamba2_step.h"
#include "kernels/mamba_step.h"
#include "kernels/mlstm_step.h"
#include "kernels/rms_norm.h"
#include "kernels/sample.h"
#include "kernels/slstm_step.h"
#include "kernels/step_embedding.h"
#include "tests/testing/tensors.h"

using namespace krait;
using kernels::Epilogue;
using kernels::StepScope;

namespace {

// Inputs of a GPU's device, the same for every run.
struct Maker {
  Device device;
  uint64_t seed = 1;
  Tensor narrow(const Shape& s, double std = 1) { return random_tensor(s, Normal{.std = std}, seed++, bf16_type).to(device); }
  Tensor wide(const Shape& s, double mean = 0, double std = 1) { return random_tensor(s, Normal{.mean = mean, .std = std}, seed++, f32).to(device); }
};

// What `work` returns on the CPU, and on the GPU with its operations gathered; all of it twice, to the bit.
void check_gathered(const std::function<std::vector<Tensor>(Maker)>& work, int64_t rows = 1, double slack = 1, bool scans = false) {
  const std::vector<Tensor> cpu = work({kCpu});
  const auto gathered = [&] {
    StepScope together(cuda_device(), rows, scans);
    std::vector<Tensor> out = work({cuda_device()});
    together.finish();
    for (Tensor& t : out) t = t.cpu();
    return out;
  };
  const std::vector<Tensor> gpu = gathered(), again = gathered();
  REQUIRE(gpu.size() == cpu.size());
  for (size_t i = 0; i < cpu.size(); ++i) {
    INFO("result " << i);
    CHECK(relative_error(gpu[i], cpu[i]) < slack * (cpu[i].dtype() == f32 ? 1e-2 : 2e-2));
    CHECK(relative_error(again[i], gpu[i]) == 0);
  }
}

Tensor linear(const Tensor& x, const Tensor& w, const Tensor& bias = {}, Epilogue e = Epilogue::none) {
  return kernels::linear_forward(x, w, bias, e, false).y;
}

/// What the next layer's map reads: the norm of the residual stream, with `pending` (may be undefined) added to it.
Tensor next_normed(const Tensor& pending, Tensor& residual, const Tensor& norm) {
  if (!pending.defined()) return kernels::rms_norm_forward(residual, norm, 1e-5).y;
  const auto both = kernels::add_rms_norm_forward(pending, residual, norm, 1e-5);
  residual = both.residual;
  return both.y;
}

}  // namespace

TEST_CASE("a step of few rows: norms and linear maps equal the cpu's", "[cuda]") {
  struct Sizes { int64_t rows, k, n; bool centred; };
  for (const auto& [rows, k, n, centred] :
       {Sizes{1, 8, 1, false}, Sizes{1, 768, 33, true}, Sizes{1, 768, 3072, false}, Sizes{1, 1032, 70, true}, Sizes{1, 1536, 40, false},
        Sizes{1, 2048, 131, true}, Sizes{1, 768, 5003, false}, Sizes{2, 768, 300, true}, Sizes{2, 8, 7, false}, Sizes{3, 1032, 70, false},
        Sizes{3, 264, 19, true}, Sizes{8, 768, 300, false}, Sizes{8, 2048, 131, true}}) {
    INFO("rows " << rows << " k " << k << " n " << n << " centred " << centred);
    check_gathered([&, rows = rows, k = k, n = n, centred = centred](Maker m) {
      const Tensor x = m.narrow({rows, k}), residual = m.narrow({rows, k}), w = m.wide({k}, 1, 0.2), b = m.wide({k}, 0, 0.2);
      const Tensor up = m.narrow({n, k}, 0.05), bias = m.narrow({n}), down = m.narrow({k, k}, 0.05);
      Tensor sum, y;
      if (centred) {
        const auto out = kernels::add_layer_norm_forward(x, residual, w, b, 1e-5, 0.5);
        sum = out.residual, y = out.y;
      } else {
        const auto out = kernels::add_rms_norm_forward(x, residual, w, 1e-5);
        sum = out.residual, y = out.y;
      }
      const Tensor wide = linear(y, up, bias, centred ? Epilogue::gelu_tanh : Epilogue::none), same = linear(y, down);
      const auto alone = kernels::rms_norm_forward(same, w, 1e-5);  // followed by no linear map
      return std::vector<Tensor>{sum, y, wide, same, alone.y, alone.rstd};
    });
  }
}

TEST_CASE("a step of few rows: wide inputs, and many operations", "[cuda]") {
  check_gathered([](Maker m) {
    const Tensor w = m.narrow({300, 3072}, 0.02), back = m.narrow({3072, 300}, 0.05);
    Tensor x = m.narrow({1, 3072});
    for (int i = 0; i < 5; ++i)  // 300 is no multiple of 8: the way back is launched by itself
      x = kernels::rms_norm_forward(linear(linear(x, w), back), m.wide({3072}, 1, 0), 1e-5).y;
    return std::vector<Tensor>{x};
  });
  check_gathered([](Maker m) {
    const Tensor x = m.narrow({2, 256}), w = m.narrow({256, 256}, 0.08);
    std::vector<Tensor> out;
    for (int i = 0; i < 150; ++i) out.push_back(linear(kernels::rms_norm_forward(x, m.wide({256}, 1, 0.1), 1e-5).y, w));
    return out;
  });
}

TEST_CASE("a step of few rows: mamba_step equals the cpu's", "[cuda]") {
  struct Sizes { int64_t b, e, n, r, k; bool bias; };
  for (const Sizes& s : {Sizes{1, 1536, 16, 48, 4, true}, Sizes{1, 96, 16, 6, 4, false}, Sizes{3, 40, 5, 3, 4, true}, Sizes{8, 1536, 16, 48, 4, true},
                         Sizes{2, 37, 5, 3, 2, false}, Sizes{5, 256, 16, 128, 4, true}}) {
    INFO("b " << s.b << " e " << s.e << " n " << s.n << " r " << s.r);
    check_gathered([&](Maker m) {
      Tensor conv = m.narrow({s.b, s.k - 1, s.e}), h = m.wide({s.b, s.e, s.n});
      const kernels::MambaStepWeights w{m.narrow({s.e, s.k}), s.bias ? m.narrow({s.e}) : Tensor{}, m.narrow({s.r + 2 * s.n, s.e}, 0.03),
                                        m.narrow({s.e, s.r}, 0.1), m.wide({s.e}, -2), m.wide({s.e, s.n}, 0.5, 0.5), m.wide({s.e})};
      std::vector<Tensor> out;
      for (int step = 0; step < 4; ++step) out.push_back(kernels::mamba_step(conv, h, m.narrow({s.b, 2 * s.e}), w));
      out.insert(out.end(), {conv, h});
      return out;
    });
  }
}

TEST_CASE("a step of scans: blocks of Mamba equal the cpu's", "[cuda]") {
  struct Sizes { int64_t b, d, e, r; bool bias; };
  for (const Sizes& s : {Sizes{1, 768, 1536, 48, true}, Sizes{2, 768, 1536, 48, false}, Sizes{3, 768, 1536, 64, true}, Sizes{2, 384, 96, 4, true}, Sizes{1, 96, 192, 8, false},
                         Sizes{3, 128, 80, 8, true}, Sizes{5, 768, 1536, 48, true}, Sizes{64, 768, 1536, 48, true}, Sizes{9, 768, 1536, 48, false}, Sizes{33, 768, 1536, 48, true}, Sizes{40, 160, 288, 20, true}, Sizes{65, 256, 512, 16, true},
                         Sizes{200, 96, 192, 8, false}, Sizes{64, 1024, 2048, 64, true}, Sizes{17, 64, 80, 4, true}, Sizes{12, 160, 40, 5, true}}) {
    INFO("b " << s.b << " d " << s.d << " e " << s.e << " r " << s.r);
    check_gathered([&](Maker m) {
      constexpr int64_t n = 16;
      struct Layer { Tensor norm, in, back, conv, h; kernels::MambaStepWeights w; };
      std::vector<Layer> layers;  // whoever makes tensors ends the gathering
      for (int layer = 0; layer < 3; ++layer)
        layers.push_back({m.wide({s.d}, 1, 0.2), m.narrow({2 * s.e, s.d}, 0.04), m.narrow({s.d, s.e}, 0.03), m.narrow({s.b, 3, s.e}), m.wide({s.b, s.e, n}),
                          {m.narrow({s.e, 4}), s.bias ? m.narrow({s.e}) : Tensor{}, m.narrow({s.r + 2 * n, s.e}, 0.03), m.narrow({s.e, s.r}, 0.1),
                           m.wide({s.e}, -2), m.wide({s.e, n}, 0.5, 0.5), m.wide({s.e})}});
      const Tensor last_norm = m.wide({s.d}, 1, 0.2), head = m.narrow({9000, s.d}, 0.05);
      Tensor residual = m.narrow({s.b, s.d}), pending;
      std::vector<Tensor> out, states;
      for (Layer& l : layers) {
        const Tensor x = next_normed(pending, residual, l.norm);
        const Tensor y = kernels::mamba_step(l.conv, l.h, linear(x, l.in), l.w);
        pending = linear(y, l.back);
        out.insert(out.end(), {x, pending});
        if (&l == &layers.front()) out.push_back(y);  // further on roundings add up to 7 % of single values, on any two ways
        states.insert(states.end(), {l.conv, l.h});
      }
      const auto last = kernels::add_rms_norm_forward(pending, residual, last_norm, 1e-5);
      out.push_back(linear(last.y, head));
      out.insert(out.end(), {last.residual, last.y, kernels::add(last.y, last.y)});
      out.insert(out.end(), states.begin(), states.end());
      return out;
    }, s.b, 3, true);
  }
}

TEST_CASE("a step of scans: blocks of Mamba-2 equal the cpu's, with plain states and with states behind their positions", "[cuda]") {
  struct Sizes { int64_t b, d, heads, p; bool D_each; DType states; };
  for (const Sizes& s : {Sizes{1, 768, 24, 64, false, f32}, Sizes{2, 768, 24, 64, true, bf16_type}, Sizes{3, 128, 3, 48, false, f32}, Sizes{2, 256, 8, 24, false, f32}, Sizes{4, 96, 3, 24, true, f32}, Sizes{64, 768, 24, 64, false, f32}, Sizes{9, 768, 24, 64, true, bf16_type}, Sizes{33, 96, 3, 24, false, f32}, Sizes{33, 96, 8, 24, false, f32},
                         Sizes{130, 64, 16, 8, true, bf16_type}})
    for (const bool behind : {false, true}) {
      INFO("b " << s.b << " d " << s.d << " heads " << s.heads << " p " << s.p << " behind " << behind);
      const auto work = [&](Maker m) {
        const int64_t e = s.heads * s.p, n = 128, c = e + 2 * n;
        Tensor conv = m.narrow({s.b, 3, c}), h = m.wide({s.b, s.heads, s.p, n});
        const kernels::Mamba2StepWeights w{m.narrow({c, 4}), m.narrow({c}), m.wide({s.heads}, -2), m.wide({s.heads}, 0.5, 0.5),
                                           s.D_each ? m.wide({s.heads, s.p}) : m.wide({s.heads}), m.wide({e}, 1, 0.1), 0, 1e30, 1e-5, false};
        kernels::RecentPositions recent;
        if (behind && m.device.is_cuda()) {
          recent = kernels::recent_positions(h, conv, w);
          CHECK(recent.count.defined() == (s.heads % 8 == 0));
          if (recent.count.defined()) h = h.to(s.states);
        }
        const Tensor norm = m.wide({s.d}, 1, 0.2), in = m.narrow({e + c + s.heads, s.d}, 0.04), back = m.narrow({s.d, e}, 0.03);
        Tensor residual = m.narrow({s.b, s.d}), pending;
        std::vector<Tensor> out;
        for (int step = 0; step < 18; ++step) {
          Tensor x;
          if (step % 3 != 0) {
            const auto both = kernels::add_rms_norm_forward(pending, residual, norm, 1e-5);
            residual = both.residual, x = both.y;
          } else {
            residual = m.narrow({s.b, s.d});
            x = kernels::rms_norm_forward(residual, norm, 1e-5).y;
          }
          const Tensor zxbcdt = linear(x, in);
          const Tensor y = recent.count.defined() ? kernels::mamba2_step(conv, h, recent, zxbcdt, w) : kernels::mamba2_step(conv, h, zxbcdt, w);
          pending = linear(y, back);
          out.push_back(residual);
          if (step % 4 == 0) out.insert(out.end(), {x, y, pending});
        }
        out.push_back(conv);
        if (!behind) out.push_back(h);
        return out;
      };
      check_gathered(work, s.b, 3, true);
    }
}

TEST_CASE("a step of scans: layers of Mamba-2 with positions in front of their states equal the cpu's", "[cuda]") {
  struct Sizes { int64_t b, d, heads, tokens; bool D_each, bias, held, narrow; };
  for (const Sizes& s : {Sizes{40, 96, 8, 35, true, false, false, true}, Sizes{33, 768, 24, 18, false, true, true, true}, Sizes{48, 736, 16, 6, true, true, true, true},
                         Sizes{64, 768, 24, 18, false, true, false, true}, Sizes{64, 768, 24, 18, true, true, false, false}, Sizes{37, 160, 16, 35, false, false, true, false}}) {
    INFO("b " << s.b << " d " << s.d << " heads " << s.heads << " narrow " << s.narrow);
    check_gathered([&](Maker m) {
      const int64_t p = 64, e = s.heads * p, n = 128, c = e + 2 * n;
      struct Layer { Tensor norm, in, back, conv, h; kernels::Mamba2StepWeights w; kernels::RecentPositions recent; };
      std::vector<Layer> layers;
      for (int i = 0; i < 3; ++i) {
        Layer l{m.wide({s.d}, 1, 0.2), m.narrow({e + c + s.heads, s.d}, 0.04), m.narrow({s.d, e}, 0.03), m.narrow({s.b, 3, c}), m.wide({s.b, s.heads, p, n}),
                {m.narrow({c, 4}), s.bias ? m.narrow({c}) : Tensor{}, m.wide({s.heads}, -2), m.wide({s.heads}, 0.5, 0.5),
                 s.D_each ? m.wide({s.heads, p}) : m.wide({s.heads}), m.wide({e}, 1, 0.1), 0, 1e30, 1e-5, false}, {}};
        if (m.device.is_cuda()) {
          l.recent = kernels::recent_positions(l.h, l.conv, l.w);
          REQUIRE(l.recent.count.defined());
          if (s.narrow) l.h = l.h.to(bf16_type);
        }
        layers.push_back(std::move(l));
      }
      const Tensor last_norm = m.wide({s.d}, 1, 0.2);
      std::vector<Tensor> out;
      for (int token = 0; token < s.tokens; ++token) {
        Tensor residual = m.narrow({s.b, s.d}), pending;
        for (Layer& l : layers) {
          const Tensor x = next_normed(pending, residual, l.norm);
          const Tensor in = linear(x, l.in);
          const Tensor y = l.recent.count.defined() ? kernels::mamba2_step(l.conv, l.h, l.recent, in, l.w) : kernels::mamba2_step(l.conv, l.h, in, l.w);
          pending = linear(y, l.back);
          if (s.held && token % 5 == 0) {
            out.insert(out.end(), {x, in, pending});
            if (&l == &layers.front()) out.push_back(y);
          }
        }
        const auto last = kernels::add_rms_norm_forward(pending, residual, last_norm, 1e-5);
        out.insert(out.end(), {last.residual, kernels::add(last.y, last.y)});
      }
      for (const Layer& l : layers) out.push_back(l.conv);
      return out;
    }, s.b, 3, true);
  }
}

TEST_CASE("a step of many rows: maps that share their input, and maps with nothing beside them, equal the cpu's", "[cuda]") {
  for (const int64_t rows : {1, 3, 9, 31, 64, 130})
    check_gathered([&](Maker m) {
      const Tensor residual = m.narrow({rows, 256}), norm = m.wide({256}, 1, 0.2), w = m.narrow({256, 256}, 0.06), gate = m.narrow({512, 256}, 0.06);
      const Tensor bias = m.narrow({256});
      const Tensor first = linear(kernels::rms_norm_forward(residual, norm, 1e-5).y, w, bias, Epilogue::gelu_tanh);
      const auto both = kernels::add_rms_norm_forward(first, residual, norm, 1e-5);
      const Tensor a = linear(both.y, gate), b = linear(both.y, w), c = linear(both.y, w, bias);
      return std::vector<Tensor>{first, both.residual, both.y, a, b, c, kernels::add(both.y, c)};
    }, rows, 2, true);
}

TEST_CASE("a step of many rows: LayerNorm in front of maps that share it, of gated units, of nothing, equals the cpu's", "[cuda]") {
  struct Sizes { int64_t rows, d, n; double mean; };
  for (const Sizes& s : {Sizes{9, 256, 256, 0}, Sizes{31, 768, 300, 3}, Sizes{64, 768, 2304, 0}, Sizes{65, 1024, 4096, 1}, Sizes{130, 256, 512, 0}, Sizes{16, 160, 44, 20}})
    for (const bool biased : {true, false}) {
      INFO("rows " << s.rows << " d " << s.d << " n " << s.n << " biased " << biased);
      check_gathered([&](Maker m) {
        const Tensor x = m.narrow({s.rows, s.d}), residual = kernels::add(m.narrow({s.rows, s.d}), full({s.rows, s.d}, s.mean, bf16_type, m.device));
        const Tensor w = m.wide({s.d}, 0, 0.2), b = biased ? m.wide({s.d}, 0, 0.2) : Tensor{};
        const Tensor in = m.narrow({s.d, s.d}, 0.06), up = m.narrow({s.n, s.d}, 0.06), gate = m.narrow({4 * (s.n / 4), s.d}, 0.06), bias = m.narrow({s.n});
        const auto first = kernels::layer_norm_forward(x, w, b, 1e-5, 1);
        const auto both = kernels::add_layer_norm_forward(linear(first.y, in), residual, w, b, 1e-5, 1);
        const Tensor a = linear(both.y, up, bias, Epilogue::gelu_tanh), c = linear(both.y, in);
        const auto second = kernels::add_layer_norm_forward(c, both.residual, w, b, 1e-5, 1);
        const auto units = kernels::gated_units_forward(second.y, gate, {});
        const auto third = kernels::add_layer_norm_forward(linear(second.y, in), second.residual, w, b, 1e-5, 1);  // no map behind it
        return std::vector<Tensor>{first.y, both.residual, both.y, both.rstd, a, c, second.residual, second.y, units.h, units.pre, third.residual, third.y, third.rstd};
      }, s.rows, 3);
    }
}

TEST_CASE("a step of few rows: mamba2_step and the map behind it equal the cpu's", "[cuda]") {
  struct Sizes { int64_t b, heads, p, n, g, k; bool norm_first, D_each; };
  for (const Sizes& s : {Sizes{1, 24, 64, 128, 1, 4, false, false}, Sizes{1, 3, 64, 128, 1, 4, true, true}, Sizes{3, 8, 20, 20, 1, 3, true, false},
                         Sizes{8, 24, 64, 128, 1, 4, false, false}, Sizes{2, 4, 20, 20, 2, 4, false, false}, Sizes{2, 8, 32, 256, 1, 4, false, true}}) {
    INFO("b " << s.b << " heads " << s.heads << " p " << s.p << " n " << s.n << " g " << s.g);
    check_gathered([&](Maker m) {
      const int64_t e = s.heads * s.p, c = e + 2 * s.g * s.n;
      Tensor conv = m.narrow({s.b, s.k - 1, c}), h = m.wide({s.b, s.heads, s.p, s.n});
      const kernels::Mamba2StepWeights w{m.narrow({c, s.k}), m.narrow({c}), m.wide({s.heads}, -2), m.wide({s.heads}, 0.5, 0.5),
                                         s.D_each ? m.wide({s.heads, s.p}) : m.wide({s.heads}), m.wide({e}, 1, 0.1), 0, 1e30, 1e-5, s.norm_first};
      const Tensor out_proj = m.narrow({200, e}, 0.03);
      std::vector<Tensor> out;
      for (int step = 0; step < 4; ++step) {
        out.push_back(kernels::mamba2_step(conv, h, m.narrow({s.b, e + c + s.heads}), w));
        if (step % 2 == 0) out.push_back(linear(out.back(), out_proj));
      }
      out.insert(out.end(), {conv, h});
      return out;
    });
  }
}

TEST_CASE("a step of few rows: attention_append equals the cpu's", "[cuda]") {
  struct Sizes { int64_t b, hq, hkv, d; bool rope, alibi; kernels::RopeStyle style; };
  for (const Sizes& s : {Sizes{1, 12, 12, 64, false, false, kernels::RopeStyle::half}, Sizes{2, 4, 2, 64, true, false, kernels::RopeStyle::half}, Sizes{2, 4, 2, 64, true, false, kernels::RopeStyle::interleaved},
                         Sizes{1, 3, 3, 32, true, true, kernels::RopeStyle::interleaved}, Sizes{8, 20, 20, 8, true, false, kernels::RopeStyle::half},
                         Sizes{1, 2, 1, 24, true, false, kernels::RopeStyle::half}, Sizes{3, 2, 1, 256, false, true, kernels::RopeStyle::half},
                         Sizes{9, 12, 12, 64, true, false, kernels::RopeStyle::half}, Sizes{17, 12, 1, 64, true, false, kernels::RopeStyle::half}, Sizes{9, 6, 2, 64, true, false, kernels::RopeStyle::interleaved},
                         Sizes{10, 4, 1, 128, true, false, kernels::RopeStyle::half}, Sizes{65, 2, 2, 128, false, false, kernels::RopeStyle::half}, Sizes{9, 2, 1, 64, true, true, kernels::RopeStyle::half},
                         Sizes{9, 4, 2, 24, true, false, kernels::RopeStyle::half}}) {
    INFO("b " << s.b << " hq " << s.hq << " d " << s.d);
    check_gathered([&](Maker m) {
      const int64_t capacity = 400;
      Tensor k = m.narrow({s.b, capacity, s.hkv, s.d}), v = m.narrow({s.b, capacity, s.hkv, s.d});
      kernels::AttentionAppend a{.hq = s.hq, .hkv = s.hkv, .style = s.style};
      if (s.rope) {
        const auto table = kernels::rope_table(capacity, s.d / 2, 10000, m.device, f32);
        a.cos = table.cos, a.sin = table.sin;
      }
      if (s.alibi) a.alibi_slopes = random_tensor({s.hq}, Uniform{0.01, 0.2}, 77, f32).to(m.device);
      std::vector<Tensor> out;
      for (const int32_t p : {0, 1, 63, 64, 127, 128, 160, 320, 399}) {
        const Tensor position = from_vector(std::vector<int32_t>(static_cast<size_t>(s.b), p)).to(m.device);
        out.push_back(kernels::attention_append(m.narrow({s.b, s.hq + 2 * s.hkv, s.d}), k, v, position, a));
      }
      out.insert(out.end(), {k, v});
      return out;
    }, s.b);
  }
}

TEST_CASE("a step: attention_append depends neither on the capacity of the cache nor on how many rows there are", "[cuda]") {
  struct Sizes { int64_t rows, more, hkv, d; };
  for (const auto& [rows, more, hkv, d] : {Sizes{2, 8, 2, 64}, Sizes{2, 2, 2, 128}, Sizes{9, 70, 4, 64}, Sizes{9, 11, 2, 64}, Sizes{10, 33, 1, 128}}) {
    const auto outputs = [&, rows = rows, hkv = hkv, d = d](int64_t b, int64_t capacity) {
      Maker m{cuda_device()};
      Tensor k = zeros({b, capacity, hkv, d}, bf16_type, m.device), v = zeros_like(k);
      const auto of_rows = [&](const Shape& shape) {  // the first rows are the same for every b
        const Tensor first = m.narrow(shape);
        std::vector<Tensor> parts;
        Tensor all = zeros(shape.with(0, b), bf16_type, m.device);
        for (int64_t at = 0; at < b; at += rows) {
          Tensor to = all.slice(0, at, std::min(b, at + rows));
          copy_(to, first.slice(0, 0, to.size(0)));
        }
        return all;
      };
      Tensor front_k = k.slice(1, 0, 700), front_v = v.slice(1, 0, 700);
      copy_(front_k, of_rows({rows, 700, hkv, d}));
      copy_(front_v, of_rows({rows, 700, hkv, d}));
      StepScope together(m.device, b);
      std::vector<Tensor> out;
      for (const int32_t p : {0, 79, 80, 161, 319, 320, 321, 640, 699}) {
        const Tensor position = from_vector(std::vector<int32_t>(static_cast<size_t>(b), p)).to(m.device);
        out.push_back(kernels::attention_append(of_rows({rows, 4 + 2 * hkv, d}), k, v, position, {.hq = 4, .hkv = hkv}));
      }
      together.finish();
      for (Tensor& t : out) t = t.slice(0, 0, rows).contiguous().cpu();
      return out;
    };
    const std::vector<Tensor> tight = outputs(rows, 700), roomy = outputs(rows, 5000), many = outputs(more, 700);
    for (size_t i = 0; i < tight.size(); ++i) {
      INFO("rows " << rows << " d " << d << " result " << i);
      CHECK(relative_error(roomy[i], tight[i]) == 0);
      CHECK(relative_error(many[i], tight[i]) == 0);
    }
  }
}

TEST_CASE("a step of few rows: layers of Mamba equal the cpu's", "[cuda]") {
  struct Sizes { int64_t d, e, n, r; };
  for (const auto& [d, e, n, r] : {Sizes{768, 1536, 16, 48}, Sizes{264, 520, 6, 4}, Sizes{1032, 2064, 16, 64}, Sizes{64, 96, 5, 3}}) {
    INFO("d " << d << " e " << e << " n " << n << " r " << r);
    check_gathered([&, d = d, e = e, n = n, r = r](Maker m) {
      Tensor x = m.narrow({1, d}), residual = m.narrow({1, d});
      std::vector<Tensor> out;
      for (int layer = 0; layer < 2; ++layer) {
        const auto normed = kernels::add_rms_norm_forward(x, residual, m.wide({d}, 1, 0.2), 1e-5);
        residual = normed.residual;
        const Tensor xz = linear(normed.y, m.narrow({2 * e, d}, 0.05));
        Tensor conv = m.narrow({1, 3, e}), h = m.wide({1, e, n});
        const kernels::MambaStepWeights w{m.narrow({e, 4}),          layer == 1 ? Tensor{} : m.narrow({e}), m.narrow({r + 2 * n, e}, 0.03), m.narrow({e, r}, 0.1),
                                          m.wide({e}, -2), m.wide({e, n}, 0.5, 0.5),               m.wide({e})};
        const Tensor y = kernels::mamba_step(conv, h, xz, w);
        x = linear(y, m.narrow({d, e}, 0.03));
        out.insert(out.end(), {residual, xz, y, x, conv, h});
      }
      out.push_back(linear(kernels::add_rms_norm_forward(x, residual, m.wide({d}, 1, 0.2), 1e-5).y, m.narrow({5003, d}, 0.05)));
      return out;
    });
  }
}

TEST_CASE("a step of few rows: layers of Mamba-2 equal the cpu's", "[cuda]") {
  struct Sizes { int64_t d, heads, p, n; bool norm_first, D_each; };
  for (const auto& [d, heads, p, n, norm_first, D_each] :
       {Sizes{768, 24, 64, 128, false, false}, Sizes{264, 8, 20, 20, true, false}, Sizes{1024, 32, 64, 256, false, true}, Sizes{64, 6, 16, 64, false, false}}) {
    INFO("d " << d << " heads " << heads << " p " << p << " n " << n);
    check_gathered([&, d = d, heads = heads, p = p, n = n, norm_first = norm_first, D_each = D_each](Maker m) {
      const int64_t e = heads * p, c = e + 2 * n;
      Tensor x = m.narrow({1, d}), residual = m.narrow({1, d});
      std::vector<Tensor> out;
      for (int layer = 0; layer < 2; ++layer) {
        const auto normed = kernels::add_rms_norm_forward(x, residual, m.wide({d}, 1, 0.2), 1e-5);
        residual = normed.residual;
        const Tensor in = linear(normed.y, m.narrow({e + c + heads, d}, 0.05));
        Tensor conv = m.narrow({1, 3, c}), h = m.wide({1, heads, p, n});
        const kernels::Mamba2StepWeights w{m.narrow({c, 4}), m.narrow({c}), m.wide({heads}, -2), m.wide({heads}, 0.5, 0.5),
                                           D_each ? m.wide({heads, p}) : m.wide({heads}), m.wide({e}, 1, 0.1), 0, 1e30, 1e-5, norm_first};
        const Tensor y = kernels::mamba2_step(conv, h, in, w);
        x = linear(y, m.narrow({d, e}, 0.03));
        out.insert(out.end(), {residual, in, y, x, conv, h});
      }
      return out;
    });
  }
}

TEST_CASE("a step of few rows: blocks with attention whose weights come in between equal the cpu's", "[cuda]") {
  struct Sizes { int64_t d, hq, hkv, head, wide; int32_t position; bool rope, alibi; kernels::RopeStyle style; };
  for (const Sizes& s : {Sizes{768, 12, 12, 64, 3072, 319, false, false, kernels::RopeStyle::half}, Sizes{256, 4, 2, 64, 512, 17, true, false, kernels::RopeStyle::half},
                         Sizes{96, 3, 3, 32, 264, 0, true, true, kernels::RopeStyle::interleaved}, Sizes{1024, 8, 2, 128, 2816, 1100, true, false, kernels::RopeStyle::half},
                         Sizes{48, 2, 1, 24, 40, 700, true, true, kernels::RopeStyle::half}}) {
    INFO("d " << s.d << " hq " << s.hq << " position " << s.position);
    check_gathered([&](Maker m) {
      const int64_t capacity = 1200, inner = s.hq * s.head;
      kernels::AttentionAppend a{.hq = s.hq, .hkv = s.hkv, .style = s.style};
      if (s.rope) {
        const auto table = kernels::rope_table(capacity, s.head / 2, 10000, m.device, f32);
        a.cos = table.cos, a.sin = table.sin;
      }
      if (s.alibi) a.alibi_slopes = random_tensor({s.hq}, Uniform{0.01, 0.2}, 77, f32).to(m.device);
      const Tensor position = from_vector(std::vector<int32_t>{s.position}).to(m.device);
      Tensor x = m.narrow({1, s.d}), residual = m.narrow({1, s.d});
      std::vector<Tensor> out;
      for (int layer = 0; layer < 2; ++layer) {
        const auto first = kernels::add_layer_norm_forward(x, residual, m.wide({s.d}, 1, 0.2), m.wide({s.d}, 0, 0.2), 1e-5);
        const Tensor qkv = linear(first.y, m.narrow({(s.hq + 2 * s.hkv) * s.head, s.d}, 0.05), m.narrow({(s.hq + 2 * s.hkv) * s.head}, 0.1));
        Tensor k = m.narrow({1, capacity, s.hkv, s.head}), v = m.narrow({1, capacity, s.hkv, s.head});
        const Tensor o = kernels::attention_append(qkv.view({1, s.hq + 2 * s.hkv, s.head}), k, v, position, a);
        x = linear(o.view({1, inner}), m.narrow({s.d, inner}, 0.05), m.narrow({s.d}, 0.1));
        const auto second = kernels::add_layer_norm_forward(x, first.residual, m.wide({s.d}, 1, 0.2), m.wide({s.d}, 0, 0.2), 1e-5);
        residual = second.residual;
        const Tensor wide = linear(second.y, m.narrow({s.wide, s.d}, 0.05), m.narrow({s.wide}, 0.1), Epilogue::gelu_tanh);
        x = linear(wide, m.narrow({s.d, s.wide}, 0.03), m.narrow({s.d}, 0.1));
        out.insert(out.end(), {qkv, o, residual, wide, x, k, v});
      }
      return out;
    });
  }
}

// Weights stand ready before the step, so that neighbours meet: nothing else uses the stream between them.
TEST_CASE("a step of few rows: blocks of mLSTM and sLSTM equal the cpu's", "[cuda]") {
  struct Sizes { int64_t b, d, heads, vocab; };
  for (const Sizes& s : {Sizes{1, 768, 4, 999}, Sizes{3, 768, 4, 999}, Sizes{8, 256, 2, 70}, Sizes{2, 1024, 4, 70}, Sizes{2, 264, 1, 70}}) {
    INFO("b " << s.b << " d " << s.d);
    check_gathered([&](Maker m) {
      const int64_t e = 2 * s.d, n = 2 * s.heads, p = s.d / s.heads;
      struct Weights { Tensor norm, up, down, conv; kernels::MlstmStepMapsWeights maps; kernels::MlstmStepOutputWeights output; kernels::MlstmState state; };
      const Shape block{e / 4, 4, 4};
      std::vector<Weights> layers;
      for (int i = 0; i < 2; ++i)
        layers.push_back({m.wide({s.d}, 0, 0.2), m.narrow({2 * e, s.d}, 0.05), m.narrow({s.d, e}, 0.03), m.narrow({s.b, 3, e}),
                          {m.narrow({e, 4}, 0.5), i == 0 ? m.narrow({e}, 0.1) : Tensor{}, {m.narrow(block, 0.5), m.narrow(block, 0.5), m.narrow(block, 0.5), m.narrow({n, 3 * e}, 0.02)}},
                          {m.wide({n}), m.wide({e}, 0, 0.3), m.narrow({e})},
                          {m.wide({s.b, s.heads, e / s.heads, e / s.heads}, 0, 0.3), m.wide({s.b, s.heads, e / s.heads}, 0, 0.3), m.wide({s.b, s.heads})}});
      const double std = 0.5 / std::sqrt(static_cast<double>(p));
      const Shape map{s.heads, p, p};
      const kernels::SlstmStepWeights cell{m.narrow({s.d, 4}), m.narrow({s.d}), m.narrow(map, std), m.narrow(map, std), m.narrow(map, std), m.narrow(map, std),
                                           m.narrow({s.heads, 4, p, p}, std), m.wide({4, s.heads, p}), m.wide({s.d}, 0, 0.3)};
      Tensor cell_conv = m.narrow({s.b, 3, s.d}), cell_state = zeros({s.b, 4, s.heads, p}, f32, m.device);
      const Tensor slstm_norm = m.wide({s.d}, 0, 0.2), last_norm = m.wide({s.d}, 0, 0.2), head = m.narrow({s.vocab, s.d}, 0.05);
      const std::vector<Tensor> tokens{m.narrow({s.b, s.d}), m.narrow({s.b, s.d})};
      std::vector<Tensor> out;
      for (const Tensor& token : tokens) {  // the second meets the states again
        Tensor residual = token, pending;
        const auto normed = [&](const Tensor& w) {
          if (!pending.defined()) return kernels::layer_norm_forward(residual, w, {}, 1e-5, 1).y;
          const auto both = kernels::add_layer_norm_forward(pending, residual, w, {}, 1e-5, 1);
          residual = both.residual;
          out.push_back(residual);
          return both.y;
        };
        for (Weights& w : layers) {
          const Tensor up = linear(normed(w.norm), w.up);
          const kernels::MlstmStepMaps in = kernels::mlstm_step_maps(w.conv, up.slice(1, 0, e), w.maps);
          const Tensor y = kernels::mlstm_step_output(w.state, in, up.slice(1, e, 2 * e), w.output);
          pending = linear(y, w.down);
          out.insert(out.end(), {up, in.q, in.k, in.v, in.x_c, y, pending});
        }
        pending = kernels::slstm_step(cell_conv, cell_state, normed(slstm_norm), cell);
        out.push_back(linear(normed(last_norm), head));
      }
      for (const Weights& w : layers) out.insert(out.end(), {w.conv, w.state.c, w.state.n, w.state.m});
      out.insert(out.end(), {cell_conv, cell_state});
      return out;
    }, s.b, 3);
  }
}

TEST_CASE("a step of many rows: blocks of mLSTM with positions in front of their states equal the cpu's", "[cuda]") {
  struct Sizes { int64_t b, d, heads, tokens; };
  for (const Sizes& s : {Sizes{9, 768, 4, 18}, Sizes{66, 384, 2, 34}, Sizes{33, 96, 2, 35}, Sizes{130, 64, 4, 32}}) {
    INFO("b " << s.b << " d " << s.d);
    check_gathered([&](Maker m) {
      const int64_t e = 2 * s.d, n = 2 * s.heads, p = e / s.heads;
      struct Layer { Tensor norm, up, down, conv; kernels::MlstmStepMapsWeights maps; kernels::MlstmStepOutputWeights output; kernels::MlstmState state; kernels::MlstmRecent recent; };
      const Shape block{e / 4, 4, 4};
      // States that are mostly what they were: of one position's k alone, q . k near zero turns the normed head around.
      std::vector<float> gates(static_cast<size_t>(n), -2.0f);
      std::fill(gates.begin() + s.heads, gates.end(), 4.0f);
      std::vector<Layer> layers;
      for (int i = 0; i < 2; ++i) {
        Layer l{m.wide({s.d}, 0, 0.2), m.narrow({2 * e, s.d}, 0.05), m.narrow({s.d, e}, 0.003), m.narrow({s.b, 3, e}),
                {m.narrow({e, 4}, 0.5), i == 0 ? m.narrow({e}, 0.1) : Tensor{}, {m.narrow(block, 0.5), m.narrow(block, 0.5), m.narrow(block, 0.5), m.narrow({n, 3 * e}, 0.02)}},
                {from_vector(gates).to(m.device), m.wide({e}, 0, 0.3), m.narrow({e})},
                {m.wide({s.b, s.heads, p, p}, 0, 0.3), m.wide({s.b, s.heads, p}, 0, 0.3), m.wide({s.b, s.heads})}, {}};
        if (m.device.is_cuda()) {
          l.recent = kernels::mlstm_recent(l.state, l.conv, l.maps);
          REQUIRE(l.recent.count.defined());
        }
        layers.push_back(std::move(l));
      }
      std::vector<Tensor> tokens, out;
      for (int64_t i = 0; i < s.tokens; ++i) tokens.push_back(m.narrow({s.b, s.d}));
      for (const Tensor& token : tokens) {  // nothing else uses the stream between them
        Tensor residual = token, pending;
        for (Layer& l : layers) {
          Tensor x;
          if (pending.defined()) {
            const auto both = kernels::add_layer_norm_forward(pending, residual, l.norm, {}, 1e-5, 1);
            residual = both.residual, x = both.y;
          } else {
            x = kernels::layer_norm_forward(residual, l.norm, {}, 1e-5, 1).y;
          }
          const Tensor up = linear(x, l.up);
          const kernels::MlstmStepMaps in = kernels::mlstm_step_maps(l.conv, up.slice(1, 0, e), l.maps);
          const Tensor z = up.slice(1, e, 2 * e);
          const Tensor y = l.recent.count.defined() ? kernels::mlstm_step_output(l.state, l.recent, in, z, l.output) : kernels::mlstm_step_output(l.state, in, z, l.output);
          pending = linear(y, l.down);
          if (&l == &layers.front()) out.insert(out.end(), {y, pending});
        }
        out.push_back(pending);
      }
      for (const Layer& l : layers) {
        out.push_back(l.conv);
        if (s.tokens % 16 == 0) out.insert(out.end(), {l.state.c, l.state.n, l.state.m});
      }
      return out;
    }, s.b, 8);
  }
}

// Weights stand ready before the step, so that neighbours meet: nothing else uses the stream between them.
TEST_CASE("a step of few rows: blocks with attention equal the cpu's", "[cuda]") {
  struct Sizes { int64_t b, d, hq, hkv, head, wide, capacity; int32_t position; bool centred, rope, gated; kernels::RopeStyle style = kernels::RopeStyle::half; };
  for (const Sizes& s : {Sizes{1, 768, 12, 12, 64, 3072, 320, 319, true, false, false}, Sizes{2, 768, 12, 12, 64, 3072, 320, 0, true, false, false},
                         Sizes{1, 768, 12, 4, 64, 2048, 320, 200, false, true, true}, Sizes{3, 768, 12, 12, 64, 3072, 320, 64, true, false, false},
                         Sizes{5, 256, 4, 2, 64, 512, 70, 69, false, true, true, kernels::RopeStyle::interleaved}, Sizes{8, 768, 12, 12, 64, 2048, 320, 31, false, true, true},
                         Sizes{2, 1024, 8, 2, 128, 4096, 1200, 1100, true, true, false}, Sizes{1, 1024, 16, 16, 64, 2816, 1200, 1199, false, true, true},
                         Sizes{2, 512, 8, 8, 64, 1000, 33, 33, false, true, true}, Sizes{3, 264, 3, 3, 88, 264, 90, 40, true, false, false},
                         // Many rows.
                         Sizes{64, 768, 12, 12, 64, 3072, 96, 70, true, false, false}, Sizes{64, 768, 12, 12, 64, 2048, 96, 95, false, true, true},
                         Sizes{9, 768, 12, 12, 64, 3072, 330, 329, true, false, false}, Sizes{17, 768, 12, 1, 64, 2048, 330, 321, false, true, true},
                         Sizes{63, 512, 8, 2, 64, 1000, 40, 0, true, true, true}, Sizes{65, 256, 4, 4, 64, 512, 40, 17, true, true, false, kernels::RopeStyle::interleaved},
                         Sizes{9, 1024, 8, 2, 128, 4096, 400, 399, true, true, false}, Sizes{33, 512, 4, 4, 128, 520, 170, 161, false, true, true},
                         Sizes{12, 384, 6, 2, 64, 1000, 700, 650, true, false, true}, Sizes{10, 264, 3, 3, 88, 264, 90, 40, true, false, false},
                         Sizes{130, 128, 2, 1, 64, 256, 24, 20, true, true, true}, Sizes{11, 200, 2, 2, 64, 300, 24, 20, true, false, false}}) {
    INFO("b " << s.b << " d " << s.d << " hq " << s.hq << " head " << s.head << " position " << s.position);
    check_gathered([&](Maker m) {
      constexpr int kLayers = 2;
      const int64_t inner = s.hq * s.head, all = (s.hq + 2 * s.hkv) * s.head;
      kernels::AttentionAppend a{.hq = s.hq, .hkv = s.hkv, .style = s.style};
      if (s.rope) {
        const auto table = kernels::rope_table(s.capacity, s.head / 2, 10000, m.device, f32);
        a.cos = table.cos, a.sin = table.sin;
      }
      const Tensor position = from_vector(std::vector<int32_t>(static_cast<size_t>(s.b), std::min(s.position, static_cast<int32_t>(s.capacity) - 1))).to(m.device);
      struct Weights { Tensor n1, b1, n2, b2, qkv, qkv_bias, out, out_bias, up, up_bias, down, k, v; };
      std::vector<Weights> layers;
      for (int i = 0; i < kLayers; ++i)
        layers.push_back({m.wide({s.d}, 1, 0.2), m.wide({s.d}, 0, 0.2), m.wide({s.d}, 1, 0.2), m.wide({s.d}, 0, 0.2), m.narrow({all, s.d}, 0.05), m.narrow({all}, 0.1),
                          m.narrow({s.d, inner}, 0.05), m.narrow({s.d}, 0.1), m.narrow({s.gated ? 2 * s.wide : s.wide, s.d}, 0.05), m.narrow({s.wide}, 0.1),
                          m.narrow({s.d, s.wide}, 0.03), m.narrow({s.b, s.capacity, s.hkv, s.head}), m.narrow({s.b, s.capacity, s.hkv, s.head})});
      const Tensor head = m.narrow({999, s.d}, 0.05), last_norm = m.wide({s.d}, 1, 0.2), last_bias = m.wide({s.d}, 0, 0.2);
      Tensor residual = m.narrow({s.b, s.d}), pending;
      std::vector<Tensor> out;
      const auto normed = [&](const Tensor& w, const Tensor& b) {
        if (!pending.defined()) return s.centred ? kernels::layer_norm_forward(residual, w, b, 1e-5).y : kernels::rms_norm_forward(residual, w, 1e-5).y;
        Tensor y;
        if (s.centred) {
          const auto both = kernels::add_layer_norm_forward(pending, residual, w, b, 1e-5);
          residual = both.residual, y = both.y;
          out.push_back(both.rstd);  // means are small beside what the values' rounding does to them
        } else {
          const auto both = kernels::add_rms_norm_forward(pending, residual, w, 1e-5);
          residual = both.residual, y = both.y;
          out.push_back(both.rstd);
        }
        out.insert(out.end(), {pending, residual, y});
        return y;
      };
      for (Weights& w : layers) {
        const Tensor qkv = linear(normed(w.n1, w.b1), w.qkv, s.centred ? w.qkv_bias : Tensor{});
        const Tensor o = kernels::attention_append(qkv.view({s.b, s.hq + 2 * s.hkv, s.head}), w.k, w.v, position, a);
        pending = linear(o.view({s.b, inner}), w.out, s.centred ? w.out_bias : Tensor{});
        const Tensor x = normed(w.n2, w.b2);
        const Tensor units = s.gated ? kernels::gated_units_forward(x, w.up, {}).h : linear(x, w.up, w.up_bias, Epilogue::gelu_tanh);
        pending = linear(units, w.down, s.centred ? w.out_bias : Tensor{});
        out.insert(out.end(), {qkv, o, units});
      }
      const Tensor logits = linear(normed(last_norm, last_bias), head);
      out.push_back(logits);
      for (const Weights& w : layers) out.insert(out.end(), {w.k, w.v});
      return out;
    }, s.b, 3);
  }
}

TEST_CASE("a step of many rows: a wide head equals the cpu's", "[cuda]") {
  struct Sizes { int64_t rows, k, n; bool centred, summed; };
  for (const auto& [rows, k, n, centred, summed] : {Sizes{9, 768, 50304, false, true}, Sizes{33, 768, 8194, true, true}, Sizes{64, 768, 9001, false, true},
                                                    Sizes{64, 736, 9002, false, true}, Sizes{16, 1024, 8200, false, false}, Sizes{50, 96, 20000, false, true},
                                                    Sizes{63, 1280, 8330, true, false}, Sizes{64, 1536, 8330, false, true}, Sizes{65, 256, 9000, false, true}}) {
    INFO("rows " << rows << " k " << k << " n " << n << " centred " << centred << " summed " << summed);
    check_gathered([&, rows = rows, k = k, n = n, centred = centred, summed = summed](Maker m) {
      const Tensor x = m.narrow({rows, k}), residual = m.narrow({rows, k}), w = m.wide({k}, 1, 0.2), b = m.wide({k}, 0, 0.2);
      const Tensor map = m.narrow({k, k}, 0.04), head = m.narrow({n, k}, 0.05);
      std::vector<Tensor> out;
      Tensor y;
      if (centred) {
        const auto normed = kernels::add_layer_norm_forward(linear(kernels::rms_norm_forward(x, w, 1e-5).y, map), residual, w, b, 1e-5);
        y = normed.y;
        out.insert(out.end(), {normed.residual, normed.rstd});
      } else {
        const auto normed = kernels::add_rms_norm_forward(linear(kernels::rms_norm_forward(x, w, 1e-5).y, map), residual, w, 1e-5);
        y = normed.y;
        out.insert(out.end(), {normed.residual, normed.rstd});
      }
      if (summed) out.push_back(y);  // also somebody else's
      const Tensor logits = linear(y, head);
      out.push_back(logits);
      if (summed) out.push_back(kernels::add(logits, logits));
      return out;
    }, rows);
  }
}

TEST_CASE("a step of many rows: the embedding and what stands behind it equal the cpu's", "[cuda]") {
  enum class Behind { rms, layer, map, nothing };
  struct Sizes { int64_t rows, d; bool placed; Behind behind; };
  for (const auto& [rows, d, placed, behind] : {Sizes{9, 768, false, Behind::rms}, Sizes{64, 768, true, Behind::rms}, Sizes{33, 2056, false, Behind::rms},
                                                Sizes{130, 64, true, Behind::rms}, Sizes{64, 96, false, Behind::layer}, Sizes{12, 128, true, Behind::map},
                                                Sizes{17, 72, false, Behind::nothing}, Sizes{10, 100, true, Behind::rms}}) {
    INFO("rows " << rows << " d " << d << " placed " << placed << " behind " << static_cast<int>(behind));
    check_gathered([&, rows = rows, d = d, placed = placed, behind = behind](Maker m) {
      const Tensor table = m.narrow({500, d}), places = m.narrow({40, d}), w = m.wide({d}, 1, 0.2), b = m.wide({d}, 0, 0.2), up = m.narrow({96, d}, 0.05);
      std::vector<int64_t> tokens;
      std::vector<int32_t> positions;
      for (int64_t i = 0; i < rows; ++i) tokens.push_back(i * 37 % 500), positions.push_back(static_cast<int32_t>(i * 7 % 40));
      const Tensor x = kernels::step_embedding(table, from_vector(tokens, {rows, 1}).to(m.device), placed ? places : Tensor(),
                                               placed ? from_vector(positions).to(m.device) : Tensor())
                           .view({rows, d});
      std::vector<Tensor> out{x};
      Tensor y = x;
      if (behind == Behind::rms) {
        const auto normed = kernels::rms_norm_forward(x, w, 1e-5);
        y = normed.y;
        out.push_back(normed.rstd);
        if (rows != 9) out.push_back(y);
      } else if (behind == Behind::layer) {
        y = kernels::layer_norm_forward(x, w, b, 1e-5).y;
        out.push_back(y);
      }
      if (behind != Behind::nothing) out.push_back(linear(y, up));
      return out;
    }, rows);
  }
}

TEST_CASE("a step of few rows: what the head draws is the first of the likeliest", "[cuda]") {
  struct Sizes { int64_t rows, k, n, v; bool scans; };
  for (const auto& [rows, k, n, v, scans] : {Sizes{1, 768, 50304, 50257, false}, Sizes{1, 768, 50304, 50257, true}, Sizes{3, 768, 9001, 9001, true},
                                             Sizes{8, 768, 50304, 50257, false}, Sizes{5, 1024, 6400, 6337, false}, Sizes{2, 256, 7000, 3, false},
                                             Sizes{2, 768, 300, 299, false}, Sizes{2, 768, 300, 299, true}, Sizes{9, 768, 9000, 9000, false},
                                             Sizes{64, 768, 50304, 50257, true}, Sizes{33, 96, 9002, 9001, true}, Sizes{50, 736, 12000, 3, false},
                                             Sizes{64, 768, 50304, 50304, false}, Sizes{6, 768, 9000, 8999, true}, Sizes{65, 768, 9000, 9000, false}}) {
    INFO("rows " << rows << " k " << k << " n " << n << " v " << v << " scans " << scans);
    Maker m{cuda_device()};
    const Tensor x = m.narrow({rows, k}), w = m.wide({k}, 1, 0.2), head = m.narrow({n, k}, 0.05);
    Tensor half = head.slice(0, n / 2, n / 2 * 2);  // every logit of the first half comes twice: the first is drawn
    copy_(half, head.slice(0, 0, n / 2));
    Tensor made = zeros({rows, 2}, DType::i64, m.device), last = zeros({rows, 1}, DType::i64, m.device);
    Tensor position = zeros({rows}, DType::i32, m.device), step = zeros({1}, DType::i64, m.device);
    for (int64_t i = 0; i < 3; ++i) {
      const auto draw = [&] {
        const Tensor logits = linear(kernels::rms_norm_forward(x, w, 1e-5).y, head).slice(-1, 0, v);
        kernels::sample_next(made, last, position, step, logits, {.temperature = 0});
        return logits;
      };
      const std::vector<int64_t> before = last.cpu().to_vector<int64_t>();
      StepScope together(m.device, rows, scans);
      const Tensor logits = i < 2 ? draw() : Tensor{};
      if (i == 2) draw();  // logits that nobody holds
      together.finish();
      if (i < 2)
        CHECK(last.cpu().to_vector<int64_t>() == kernels::sample(logits.cpu(), zeros({1}, DType::i64, kCpu), {.temperature = 0}).to_vector<int64_t>());
      else
        CHECK(last.cpu().to_vector<int64_t>() == before);
    }
    CHECK(step.cpu().to_vector<int64_t>() == std::vector<int64_t>{3});
    for (const int32_t p : position.cpu().to_vector<int32_t>()) CHECK(p == 3);
    CHECK(made.select(1, 1).contiguous().cpu().to_vector<int64_t>() == last.cpu().to_vector<int64_t>());
  }
}
