// Rows of convolutions and of the kernels of S4 and S4D.
#include <cmath>

#include "autograd/causal_conv1d.h"
#include "autograd/fft_conv.h"
#include "autograd/s4_kernel.h"
#include "kernels/fft_conv.h"
#include "train/bench_kernels.h"

namespace krait::train::bench {

namespace {

KernelBench causal_conv1d_bench() {
  KernelBench k;
  k.op = "causal_conv1d";
  k.dtype = DType::bf16;
  k.check = {{{"B", 2}, {"L", 259}, {"C", 200}, {"K", 4}}};
  // The goal is 85 % of copy bandwidth: 0.038 and 0.096 ms at 3.1 TB/s.
  k.cuda = {{{{{"B", 8}, {"L", 2048}, {"C", 1536}, {"K", 4}}}, 0.040, 0.111},
            {{{{"B", 32}, {"L", 2048}, {"C", 1792}, {"K", 4}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    Vars in{Inputs::leaf(make.normal({s["B"], s["L"], s["C"]})), make.parameter(make.uniform({s["C"], s["K"]}, -0.5, 0.5)),
            make.parameter(make.uniform({s["C"]}, -0.5, 0.5))};
    return differentiable(in, [](const Vars& v) -> Vars { return {causal_conv1d(v[0], v[1], v[2], {}, true).y}; }, backward);
  };
  k.work = [](const Sizes& s, bool backward) {
    return Work{2 * product({s["B"], s["L"], s["C"]}) * (backward ? 5 : 2), 0};
  };
  return k;
}

KernelBench fft_conv_bench(DType dtype) {
  KernelBench k;
  k.op = "fft_conv";
  k.dtype = dtype;
  k.unit = Unit::fp32;
  k.check = {{{"B", 3}, {"H", 5}, {"L", 1024}}};
  k.cuda = dtype == DType::f32
               ? std::vector<KernelBench::Case>{{{{{"B", 64}, {"H", 128}, {"L", 1024}}}, 0.10, 0.35},
                                                {{{{"B", 16}, {"H", 256}, {"L", 4096}}}},
                                                {{{{"B", 4}, {"H", 256}, {"L", 16384}}}},
                                                {{{{"B", 1}, {"H", 256}, {"L", 65536}}}}}
               : std::vector<KernelBench::Case>{{{{{"B", 48}, {"H", 256}, {"L", 1024}}}},
                                                {{{{"B", 4}, {"H", 256}, {"L", 16384}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    Vars in{Inputs::leaf(make.normal({s["B"], s["L"], s["H"]})), Inputs::leaf(make.wide_normal({s["H"], s["L"]}, 0.1)),
            Inputs::leaf(make.wide_normal({s["H"]}))};
    return differentiable(in, [](const Vars& v) -> Vars { return {fft_conv(v[0], v[1], v[2])}; }, backward);
  };
  // Complex transforms of n points, 5 n log2 n each: two a sequence, and the kernel's; the backward makes three more.
  k.work = [element = dtype == DType::f32 ? 4.0 : 2.0](const Sizes& s, bool backward) {
    const int log2n = kernels::fft_conv_log2(s["L"]);
    const double u = product({s["B"], s["L"], s["H"]}), kernel = product({s["H"], s["L"]});
    const double flops = u * (10.0 * log2n + 6) + 5.0 * log2n * kernel;
    return Work{backward ? element * 5 * u + 4 * 3 * kernel : element * 2 * u + 4 * kernel, flops * (backward ? 2.5 : 1)};
  };
  return k;
}

// HiPPO-like: real parts -1/2, imaginary parts pi n.
struct Diagonal { Variable log_dt, log_A_re, A_im, B, C; };
Diagonal diagonal(Inputs& make, int64_t h, int64_t n) {
  return {Inputs::leaf(make.wide_uniform({h}, std::log(0.001), std::log(0.1))), Inputs::leaf(make.wide_normal({h, n}, 0.1, -0.7)),
          Inputs::leaf(make.wide_uniform({h, n}, 0, 3.14 * static_cast<double>(n))), Inputs::leaf(make.wide_normal({h, n, 2}, 0.1, 1)),
          Inputs::leaf(make.wide_normal({h, n, 2}, 0.7))};
}

KernelBench s4d_kernel_bench() {
  KernelBench k;
  k.op = "s4d_kernel";
  k.unit = Unit::fp32;
  k.check = {{{"H", 6}, {"N", 32}, {"L", 777}}};
  k.cuda = {{{{{"H", 256}, {"N", 64}, {"L", 16384}}}, 0.10, 0.25}, {{{{"H", 256}, {"N", 64}, {"L", 1024}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const Diagonal d = diagonal(make, s["H"], s["N"]);
    const int64_t l = s["L"];
    return differentiable({d.log_dt, d.log_A_re, d.A_im, d.B, d.C}, [l](const Vars& v) -> Vars {
      return {s4d_kernel(v[0], v[1], v[2], v[3], v[4], l, Discretization::zoh)};
    }, backward);
  };
  // A power and a complex product and sum per state and position.
  k.work = [](const Sizes& s, bool backward) {
    return Work{4 * product({s["H"], s["L"]}) * (backward ? 2 : 1), 8 * product({s["H"], s["N"], s["L"]}) * (backward ? 3 : 1)};
  };
  k.tolerance = 5e-4;
  return k;
}

KernelBench s4_kernel_bench() {
  KernelBench k;
  k.op = "s4_kernel";
  k.unit = Unit::fp32;
  k.check = {{{"H", 4}, {"N", 32}, {"L", 512}}};
  k.cuda = {{{{{"H", 256}, {"N", 64}, {"L", 1024}}}}, {{{{"H", 256}, {"N", 64}, {"L", 16384}}}}};
  k.make = [](Inputs& make, const Sizes& s, bool backward) {
    const Diagonal d = diagonal(make, s["H"], s["N"]);
    const Variable P = Inputs::leaf(make.wide_normal({s["H"], s["N"], 2}, 0.3, 0.3));
    const int64_t l = s["L"];
    return differentiable({d.log_dt, d.log_A_re, d.A_im, P, d.B, d.C}, [l](const Vars& v) -> Vars {
      return {s4_kernel(v[0], v[1], v[2], v[3], v[4], v[5], l)};
    }, backward);
  };
  // Four Cauchy sums over the states at half of the points.
  k.work = [](const Sizes& s, bool backward) {
    return Work{4 * product({s["H"], s["L"]}) * (backward ? 2 : 1), 18 * product({s["H"], s["N"], s["L"]}) * (backward ? 3 : 1)};
  };
  k.tolerance = 5e-4;
  return k;
}

}  // namespace

std::vector<KernelBench> convolution_benches() {
  return {causal_conv1d_bench(),
          on_cpu(causal_conv1d_bench(), {{{"B", 4}, {"L", 1024}, {"C", 1536}, {"K", 4}}}),
          fft_conv_bench(DType::f32),
          fft_conv_bench(DType::bf16),
          on_cpu(fft_conv_bench(DType::f32), {{{"B", 4}, {"H", 64}, {"L", 1024}}}),
          s4d_kernel_bench(),
          on_cpu(s4d_kernel_bench(), {{{"H", 64}, {"N", 32}, {"L", 1024}}}),
          s4_kernel_bench(),
          on_cpu(s4_kernel_bench(), {{{"H", 32}, {"N", 32}, {"L", 512}}})};
}

}  // namespace krait::train::bench
