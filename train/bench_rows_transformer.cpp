// Rows of transformers: attention, projections, feed-forward parts, mixtures, the head with its loss; KAN layers.
#include "autograd/activation.h"
#include "autograd/attention.h"
#include "autograd/cross_entropy.h"
#include "autograd/kan.h"
#include "autograd/linear.h"
#include "kernels/grouped_matmul.h"
#include "train/bench_kernels.h"

namespace krait::train::bench {

namespace {

KernelBench attention_bench() {
  KernelBench k;
  k.op = "attention";
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.check = {{{"B", 2}, {"H", 3}, {"L", 321}, {"D", 64}}};
  k.cuda = {{{{{"B", 16}, {"H", 12}, {"L", 1024}, {"D", 64}}}, 0.084, 0.430},
            {{{{"B", 16}, {"H", 12}, {"L", 2048}, {"D", 64}}}},
            {{{{"B", 8}, {"H", 16}, {"L", 4096}, {"D", 64}}}, 0.65, 2.62},
            {{{{"B", 8}, {"H", 16}, {"L", 4096}, {"D", 128}}}, 0.93, 4.12}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const Shape shape{s["B"], s["L"], s["H"], s["D"]};
    Vars in{Inputs::leaf(make.normal(shape)), Inputs::leaf(make.normal(shape)), Inputs::leaf(make.normal(shape))};
    return differentiable(in, [](const Vars& v) -> Vars { return {attention(v[0], v[1], v[2])}; }, backward);
  };
  // Counted causal: half of both products; five products backward beside the two forward.
  k.work = [](const Sizes& s, bool backward) {
    const double qkv = product({s["B"], s["L"], s["H"], s["D"]});
    return Work{2 * qkv * (backward ? 12 : 4), 2 * qkv * static_cast<double>(s["L"]) * (backward ? 3.5 : 1)};
  };
  return k;
}

KernelBench linear_bench(const char* op, Epilogue epilogue) {
  KernelBench k;
  k.op = op;
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.check = {{{"R", 130}, {"I", 96}, {"O", 136}}};
  k.cuda = epilogue == Epilogue::none ? std::vector<KernelBench::Case>{{{{{"R", 16384}, {"I", 768}, {"O", 2304}}}},
                                                                       {{{{"R", 16384}, {"I", 3072}, {"O", 768}}}}}
                                      : std::vector<KernelBench::Case>{{{{{"R", 16384}, {"I", 768}, {"O", 3072}}}}};
  k.make = [epilogue](Inputs& make, const Sizes& s, bool backward) {
    Vars in{Inputs::leaf(make.normal({s["R"], s["I"]})), make.parameter(make.normal({s["O"], s["I"]}, 0.03)),
            make.parameter(make.normal({s["O"]}, 0.1))};
    return differentiable(in, [epilogue](const Vars& v) -> Vars { return {linear(v[0], v[1], v[2], epilogue)}; }, backward);
  };
  k.work = [](const Sizes& s, bool backward) {
    const double x = product({s["R"], s["I"]}), y = product({s["R"], s["O"]}), w = product({s["I"], s["O"]});
    return Work{2 * (backward ? 3 * x + 2 * y + 6 * w : x + y + w), 2 * x * static_cast<double>(s["O"]) * (backward ? 3 : 1)};
  };
  return k;
}

KernelBench swiglu_bench() {
  KernelBench k;
  k.op = "swiglu";
  k.dtype = DType::bf16;
  k.check = {{{"R", 67}, {"F", 264}}};
  k.cuda = {{{{{"R", 16384}, {"F", 2048}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    return differentiable({Inputs::leaf(make.normal({s["R"], 2 * s["F"]}))},
                          [](const Vars& v) -> Vars { return {swiglu_packed(v[0])}; }, backward);
  };
  k.work = [](const Sizes& s, bool backward) { return Work{2 * product({s["R"], s["F"]}) * (backward ? 8 : 3), 0}; };
  return k;
}

KernelBench grouped_matmul_bench() {
  KernelBench k;
  k.op = "grouped_matmul";
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.backward_row = false;
  k.check = {{{"E", 4}, {"R", 300}, {"I", 64}, {"O", 96}}};
  k.cuda = {{{{{"E", 8}, {"R", 16384}, {"I", 768}, {"O", 2048}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool) -> Run {
    const int64_t e = s["E"], r = s["R"];
    Tensor offsets = empty({e + 1}, DType::i32, kCpu);
    for (int64_t i = 0; i <= e; ++i)  // uneven groups
      offsets.data<int32_t>()[i] = static_cast<int32_t>(i == 0 || i == e ? r * i / e : r * i / e + (i % 2 ? r / (8 * e) : 0));
    const kernels::RowGroups groups{offsets.to(make.device()), r, {}, 1};
    return [a = make.normal({r, s["I"]}), w = make.normal({e, s["O"], s["I"]}, 0.03), groups]() -> std::vector<Tensor> {
      return {kernels::grouped_matmul(a, kernels::Gather::no, w, groups)};
    };
  };
  k.work = [](const Sizes& s, bool) {
    return Work{2 * (product({s["R"], s["I"]}) + product({s["R"], s["O"]}) + product({s["E"], s["I"], s["O"]})),
                2 * product({s["R"], s["I"], s["O"]})};
  };
  return k;
}

KernelBench head_bench() {
  KernelBench k;
  k.op = "head_cross_entropy";
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.check = {{{"R", 70}, {"D", 64}, {"V", 520}}};
  k.cuda = {{{{{"R", 16384}, {"D", 768}, {"V", 50304}}}, 2.3, 6.2}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const Tensor targets = make.integers({s["R"]}, s["V"]);
    Vars in{Inputs::leaf(make.normal({s["R"], s["D"]})), make.parameter(make.normal({s["V"], s["D"]}, 0.03))};
    return differentiable(in, [targets](const Vars& v) -> Vars { return {linear_cross_entropy(v[0], v[1], targets).loss}; },
                          backward);
  };
  k.work = [](const Sizes& s, bool backward) {
    const double x = product({s["R"], s["D"]}), w = product({s["V"], s["D"]});
    return Work{2 * (backward ? 2 * x + 6 * w : x + w), 2 * x * static_cast<double>(s["V"]) * (backward ? 3 : 1)};
  };
  return k;
}

KernelBench kan_bench() {
  KernelBench k;
  k.op = "kan";
  k.unit = Unit::tf32;
  k.check = {{{"B", 130}, {"I", 20}, {"O", 24}, {"G", 5}, {"K", 3}}};
  k.cuda = {{{{{"B", 16384}, {"I", 256}, {"O", 256}, {"G", 5}, {"K", 3}}}, 0.20, 0.60},
            {{{{"B", 16384}, {"I", 64}, {"O", 64}, {"G", 5}, {"K", 3}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const int64_t i = s["I"], o = s["O"], g = s["G"], order = s["K"], knots = g + 2 * order + 1;
    Tensor line = empty({1, knots}, DType::f64, kCpu);  // uniform over [-1, 1], as layers begin
    for (int64_t j = 0; j < knots; ++j)
      line.data<double>()[j] = -1 + 2.0 * static_cast<double>(j - order) / static_cast<double>(g);
    const Tensor grid = line.to(DType::f32).to(make.wide()).to(make.device()).expand({i, knots}).contiguous();
    Vars in{Inputs::leaf(make.uniform({s["B"], i}, -0.95, 0.95)), make.parameter(make.normal({o, i}, 0.06)),
            make.parameter(make.normal({o, i, g + order}, 0.1)), make.parameter(make.normal({o, i}, 0.06, 0.1))};
    return differentiable(in, [grid, order](const Vars& v) -> Vars { return {kan(v[0], {v[1], v[2], v[3], grid, order})}; },
                          backward);
  };
  // As a product with all bases and silu: 2 (G + k + 1) a edge, what a peer's dense product does.
  k.work = [](const Sizes& s, bool backward) {
    const double rows = 4 * product({s["B"]}), edge = static_cast<double>(s["G"] + s["K"] + 1);
    const double weights = 4 * product({s["I"], s["O"]}) * (edge + 1);
    return Work{rows * static_cast<double>(s["I"] + s["O"]) * (backward ? 2 : 1) + weights * (backward ? 3 : 1),
                2 * edge * product({s["B"], s["I"], s["O"]}) * (backward ? 3 : 1)};
  };
  return k;
}

}  // namespace

std::vector<KernelBench> transformer_benches() {
  return {attention_bench(),
          on_cpu(attention_bench(), {{{"B", 4}, {"H", 4}, {"L", 256}, {"D", 32}}}),
          linear_bench("linear", Epilogue::none),
          on_cpu(linear_bench("linear", Epilogue::none), {{{"R", 1024}, {"I", 512}, {"O", 512}}}),
          linear_bench("linear_gelu", Epilogue::gelu_tanh),
          on_cpu(linear_bench("linear_gelu", Epilogue::gelu_tanh), {{{"R", 1024}, {"I", 256}, {"O", 1024}}}),
          swiglu_bench(),
          on_cpu(swiglu_bench(), {{{"R", 4096}, {"F", 1024}}}),
          grouped_matmul_bench(),
          on_cpu(grouped_matmul_bench(), {{{"E", 4}, {"R", 1024}, {"I", 128}, {"O", 256}}}),
          head_bench(),
          on_cpu(head_bench(), {{{"R", 512}, {"D", 128}, {"V", 8192}}}),
          kan_bench(),
          on_cpu(kan_bench(), {{{"B", 1024}, {"I", 64}, {"O", 64}, {"G", 5}, {"K", 3}}})};
}

}  // namespace krait::train::bench
