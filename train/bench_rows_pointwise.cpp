// Rows bound by memory: norms, elementwise functions, embedding, optimizer.
#include "autograd/elementwise.h"
#include "autograd/embedding.h"
#include "autograd/layer_norm.h"
#include "autograd/activation.h"
#include "autograd/rms_norm.h"
#include "kernels/adamw.h"
#include "kernels/elementwise.h"
#include "kernels/grad_norm.h"
#include "train/bench_kernels.h"

namespace krait::train::bench {

namespace {

/// A function of rows (R, C) that reads and writes so many times their size.
struct RowFunction {
  const char* op;
  int64_t inputs;           // (R, C) each
  int64_t parameters;       // (C) each, fp32
  double forward, backward;  // tensors of (R, C) moved
  std::function<Vars(const Vars&)> f;
};

struct RowsCase {
  int64_t rows, width;
  double goal_forward = 0, goal_backward = 0;
};

KernelBench rows_bench(const RowFunction& r, const std::vector<RowsCase>& cases) {
  KernelBench k;
  k.op = r.op;
  k.dtype = DType::bf16;
  k.check = {{{"R", 131}, {"C", 200}}};
  for (const RowsCase& c : cases) k.cuda.push_back({{{{"R", c.rows}, {"C", c.width}}}, c.goal_forward, c.goal_backward});
  k.make = [r](Inputs& make, const Sizes& s, bool backward) {
    Vars in;
    for (int64_t i = 0; i < r.inputs; ++i) in.push_back(Inputs::leaf(make.normal({s["R"], s["C"]})));
    for (int64_t i = 0; i < r.parameters; ++i) in.push_back(make.parameter(make.wide_normal({s["C"]}, 0.1, 1)));
    return differentiable(in, r.f, backward);
  };
  k.work = [r](const Sizes& s, bool backward) {
    return Work{2 * product({s["R"], s["C"]}) * (backward ? r.forward + r.backward : r.forward), 0};
  };
  return k;
}

KernelBench embedding_bench() {
  KernelBench k;
  k.op = "embedding";
  k.dtype = DType::bf16;
  k.check = {{{"R", 100}, {"V", 37}, {"D", 72}}};
  k.cuda = {{{{{"R", 16384}, {"V", 50304}, {"D", 768}}}}, {{{{"R", 65536}, {"V", 50304}, {"D", 768}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const Tensor tokens = make.integers({s["R"]}, s["V"]);
    return differentiable({make.parameter(make.normal({s["V"], s["D"]}))},
                          [tokens](const Vars& v) -> Vars { return {embedding(v[0], tokens)}; }, backward);
  };
  // Backward: dy read, and the rows of the fp32 gradient that tokens name read and written.
  k.work = [](const Sizes& s, bool backward) {
    const double rows = product({s["R"], s["D"]});
    return Work{rows * (backward ? 4 + 2 + 8 : 4), 0};
  };
  return k;
}

KernelBench adamw_bench() {
  KernelBench k;
  k.op = "adamw";
  k.backward_row = false;
  k.check = {{{"N", 5000}}};
  // 85 % of copy bandwidth over 30 bytes a parameter: p, m, v, g read, p, m, v written, bf16 copy written.
  k.cuda = {{{{{"N", 124475904}}}, 1.42, 0}};
  k.make = [](Inputs& make, const Sizes& s, bool) -> Run {
    const int64_t n = s["N"];
    kernels::FlatUpdate u;
    u.param = make.normal({n});
    u.grad = make.normal({n}, 0.01);
    const Tensor m = make.normal({n}, 0.01), v = make.uniform({n}, 1e-4, 2e-4);
    if (make.compute() == DType::f32) u.compute = empty({n}, DType::bf16, make.device());
    u.hyper = from_vector(std::vector<double>{1e-3, 1.1, 1.2}).to(make.device());
    const auto segments = kernels::make_optimizer_segments({{0, n, 1.0, 0.1}}, n, make.device());
    return [=]() -> std::vector<Tensor> {
      kernels::adamw_(u, m, v, segments, {});
      return {u.param, m, v};
    };
  };
  k.work = [](const Sizes& s, bool) { return Work{30 * product({s["N"]}), 0}; };
  return k;
}

KernelBench grad_norm_bench() {
  KernelBench k;
  k.op = "grad_norm";
  k.backward_row = false;
  k.check = {{{"N", 40000}}};
  k.cuda = {{{{{"N", 124475904}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool) -> Run {
    return [x = make.normal({s["N"]})]() -> std::vector<Tensor> { return {kernels::grad_norm(x, 1.0).values}; };
  };
  k.work = [](const Sizes& s, bool) { return Work{4 * product({s["N"]}), 0}; };
  return k;
}

KernelBench add_bench() {
  KernelBench k;
  k.op = "add";
  k.dtype = DType::bf16;
  k.backward_row = false;
  k.check = {{{"N", 5001}}};
  k.cuda = {{{{{"N", 50331648}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool) -> Run {
    return [a = make.normal({s["N"]}), b = make.normal({s["N"]})]() -> std::vector<Tensor> { return {kernels::add(a, b)}; };
  };
  k.work = [](const Sizes& s, bool) { return Work{6 * product({s["N"]}), 0}; };
  return k;
}

}  // namespace

std::vector<KernelBench> pointwise_benches() {
  // Backward of a norm: x and dy read, dx written; with a residual, its gradient read and one more written.
  const RowFunction rms{"rms_norm", 1, 1, 2, 3, [](const Vars& v) -> Vars { return {rms_norm(v[0], v[1], 1e-5)}; }};
  const RowFunction layer{"layer_norm", 1, 2, 2, 3, [](const Vars& v) -> Vars { return {layer_norm(v[0], v[1], v[2], 1e-5)}; }};
  const RowFunction add_rms{"add_rms_norm", 2, 1, 4, 4, [](const Vars& v) -> Vars {
                              const AddNorm n = add_rms_norm(v[0], v[1], v[2], 1e-5);
                              return {n.residual, n.y};
                            }};
  const RowFunction add_layer{"add_layer_norm", 2, 2, 4, 4, [](const Vars& v) -> Vars {
                                const AddNorm n = add_layer_norm(v[0], v[1], v[2], v[3], 1e-5);
                                return {n.residual, n.y};
                              }};
  const RowFunction gelu_rows{"gelu", 1, 0, 2, 3, [](const Vars& v) -> Vars { return {gelu(v[0], GeluForm::tanh)}; }};
  const RowFunction silu_rows{"silu", 1, 0, 2, 3, [](const Vars& v) -> Vars { return {silu(v[0])}; }};
  const Sizes small{{{"R", 4096}, {"C", 768}}};
  // 16,384 rows are the peers' sizes; a step of GPT-2 124M at B64 has 65,536 of width 768.
  return {rows_bench(rms, {{16384, 768, 0.020, 0.063}, {65536, 768}, {16384, 4096, 0.094, 0.298}}),
          on_cpu(rows_bench(rms, {}), small),
          rows_bench(layer, {{16384, 768, 0.020, 0.063}, {65536, 768}, {16384, 4096}}),
          on_cpu(rows_bench(layer, {}), small),
          rows_bench(add_rms, {{16384, 768}, {65536, 768}, {16384, 4096}}),
          on_cpu(rows_bench(add_rms, {}), small),
          rows_bench(add_layer, {{65536, 768}}),
          rows_bench(gelu_rows, {{16384, 3072}}),
          on_cpu(rows_bench(gelu_rows, {}), small),
          rows_bench(silu_rows, {{16384, 3072}}),
          on_cpu(rows_bench(silu_rows, {}), small),
          add_bench(),
          on_cpu(add_bench(), {{{"N", 16777216}}}),
          embedding_bench(),
          on_cpu(embedding_bench(), {{{"R", 4096}, {"V", 8192}, {"D", 256}}}),
          adamw_bench(),
          on_cpu(adamw_bench(), {{{"N", 8388608}}}),
          grad_norm_bench(),
          on_cpu(grad_norm_bench(), {{{"N", 8388608}}})};
}

}  // namespace krait::train::bench
