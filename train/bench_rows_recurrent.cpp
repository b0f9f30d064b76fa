// Rows of xLSTM: the chunkwise matrix memory, and sLSTM over whole sequences.
#include "autograd/mlstm.h"
#include "autograd/slstm.h"
#include "train/bench_kernels.h"

namespace krait::train::bench {

namespace {

KernelBench mlstm_bench() {
  KernelBench k;
  k.op = "mlstm";
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.check = {{{"B", 2}, {"NH", 2}, {"L", 301}, {"QK", 128}, {"V", 256}}};
  k.cuda = {{{{{"B", 8}, {"NH", 4}, {"L", 8192}, {"QK", 128}, {"V", 256}}}, 0.7, 2.4},
            {{{{"B", 8}, {"NH", 4}, {"L", 2048}, {"QK", 128}, {"V", 256}}}},
            {{{{"B", 8}, {"NH", 4}, {"L", 2048}, {"QK", 384}, {"V", 384}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const int64_t b = s["B"], l = s["L"], h = s["NH"];
    Vars in{Inputs::leaf(make.normal({b, l, h, s["QK"]})), Inputs::leaf(make.normal({b, l, h, s["QK"]})),
            Inputs::leaf(make.normal({b, l, h, s["V"]})), Inputs::leaf(make.wide_normal({b, l, h}, 1, -1)),
            Inputs::leaf(make.wide_normal({b, l, h}, 1, 3))};
    return differentiable(in, [](const Vars& v) -> Vars { return {mlstm(v[0], v[1], v[2], v[3], v[4]).h}; }, backward);
  };
  // Inside chunks of 64 the causal half of two products, and the state in and out; h and dh are fp32.
  k.work = [](const Sizes& s, bool backward) {
    const double blh = product({s["B"], s["L"], s["NH"]});
    const auto qk = static_cast<double>(s["QK"]), v = static_cast<double>(s["V"]);
    const double flops = blh * (64 * (qk + v) + 4 * qk * v);
    return Work{blh * (backward ? 2 * (6 * qk + 3 * v) + 4 * (2 * v + 6) : 2 * (2 * qk + v) + 4 * (v + 2)),
                flops * (backward ? 3.5 : 1)};
  };
  k.tolerance = 4e-2;
  return k;
}

KernelBench slstm_bench() {
  KernelBench k;
  k.op = "slstm";
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.check = {{{"B", 3}, {"L", 65}, {"H", 2}, {"P", 192}}};
  k.cuda = {{{{{"B", 8}, {"L", 1024}, {"H", 4}, {"P", 192}}}, 3, 7}, {{{{"B", 32}, {"L", 2048}, {"H", 4}, {"P", 192}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const int64_t b = s["B"], l = s["L"], h = s["H"], p = s["P"];
    Vars in{Inputs::leaf(make.normal({b, l, 4, h, p})), make.parameter(make.normal({h, 4, p, p}, 0.05)),
            make.parameter(make.wide_normal({4, h, p}, 0.5))};
    return differentiable(in, [](const Vars& v) -> Vars { return {slstm(v[0], v[1], v[2], {}, {}).y}; }, backward);
  };
  k.work = [](const Sizes& s, bool backward) {
    const double units = product({s["B"], s["L"], s["H"], s["P"]});
    return Work{2 * units * (backward ? 14 : 5), 8 * units * static_cast<double>(s["P"]) * (backward ? 3 : 1)};
  };
  k.tolerance = 4e-2;
  return k;
}

}  // namespace

std::vector<KernelBench> recurrent_benches() {
  return {mlstm_bench(), on_cpu(mlstm_bench(), {{{"B", 2}, {"NH", 4}, {"L", 512}, {"QK", 64}, {"V", 64}}}),
          slstm_bench(), on_cpu(slstm_bench(), {{{"B", 2}, {"L", 256}, {"H", 4}, {"P", 64}}})};
}

}  // namespace krait::train::bench
