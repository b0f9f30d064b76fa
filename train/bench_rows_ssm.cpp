// Rows of state-space models: selective scan, Mamba-2's mixer and its scan.
#include <limits>

#include "autograd/mamba2_inner.h"
#include "autograd/selective_scan.h"
#include "autograd/ssd.h"
#include "train/bench_kernels.h"

namespace krait::train::bench {

namespace {

Run selective_scan_run(Inputs& make, const Sizes& s, bool backward) {
  const int64_t b = s["B"], e = s["D"], l = s["L"], n = s["N"];
  const Tensor A = make.wide_uniform({e, n}, -16, -1);
  Vars in{Inputs::leaf(make.normal({b, l, e})),       Inputs::leaf(make.normal({b, l, e}, 0.5)),
          Inputs::leaf(A),                            Inputs::leaf(make.normal({b, l, n})),
          Inputs::leaf(make.normal({b, l, n})),       Inputs::leaf(make.wide_normal({e})),
          Inputs::leaf(make.normal({b, l, e})),       Inputs::leaf(make.wide_normal({e}, 0.5, -4))};
  return differentiable(in, [](const Vars& v) -> Vars {
    SelectiveScanArguments a{v[0], v[1], v[2], v[3], v[4]};
    a.D = v[5];
    a.z = v[6];
    a.dt_bias = v[7];
    return {selective_scan(a).y};
  }, backward);
}

KernelBench selective_scan_bench() {
  KernelBench k;
  k.op = "selective_scan";
  k.dtype = DType::bf16;
  k.unit = Unit::fp32;
  k.check = {{{"B", 2}, {"D", 96}, {"L", 301}, {"N", 16}}};
  k.cuda = {{{{{"B", 32}, {"D", 1536}, {"L", 2048}, {"N", 16}}}, 0.9, 3.5},
            {{{{"B", 8}, {"D", 1536}, {"L", 2048}, {"N", 16}}}},
            {{{{"B", 1}, {"D", 2048}, {"L", 131072}, {"N", 16}}}}};
  k.make = selective_scan_run;
  // x, dt, z, y (and dy, dx, ddt, dz); per state an exponential, its argument, and five operations.
  k.work = [](const Sizes& s, bool backward) {
    const double ble = product({s["B"], s["L"], s["D"]}), bln = product({s["B"], s["L"], s["N"]});
    return Work{2 * (backward ? 11 * ble + 6 * bln : 4 * ble + 2 * bln),
                ble * static_cast<double>(s["N"]) * (backward ? 22 : 7)};
  };
  k.tolerance = 3e-2;
  return k;
}

// conv + SSD + gated norm: everything between Mamba-2's two projections.
Run ssd_mixer_run(Inputs& make, const Sizes& s, bool backward) {
  const int64_t b = s["B"], l = s["L"], h = s["H"], p = s["P"], n = s["N"], e = h * p, c = e + 2 * n;
  Vars in{Inputs::leaf(make.normal({b, l, e + c + h})), make.parameter(make.uniform({c, 4}, -0.5, 0.5)),
          make.parameter(make.uniform({c}, -0.5, 0.5)), make.parameter(make.wide_normal({h}, 0.5, -4)),
          make.parameter(make.wide_uniform({h}, 0, 2.7)), make.parameter(make.wide_normal({h})),
          make.parameter(make.wide_normal({e}, 0.1, 1))};
  return differentiable(in, [=](const Vars& v) -> Vars {
    Mamba2InnerArguments a{v[0], v[1], v[2], v[3], v[4], v[5], v[6], {}, {}};
    a.sizes = {h, 1, n};
    a.dt_high = std::numeric_limits<double>::infinity();
    return {mamba2_inner(a).y};
  }, backward);
}

double ssd_flops(const Sizes& s, bool backward) {
  const int64_t chunk = std::min<int64_t>(256, s["L"]);
  const double per_token = product({chunk, s["N"]}) + product({chunk, s["P"], s["H"]}) + 4 * product({s["N"], s["P"], s["H"]});
  return product({s["B"], s["L"]}) * per_token * (backward ? 3.5 : 1);
}

KernelBench ssd_mixer_bench() {
  KernelBench k;
  k.op = "ssd_mixer";
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.check = {{{"B", 2}, {"L", 300}, {"H", 3}, {"P", 64}, {"N", 128}}};
  k.cuda = {{{{{"B", 32}, {"L", 2048}, {"H", 24}, {"P", 64}, {"N", 128}}}, 0.9, 3.6},
            {{{{"B", 8}, {"L", 2048}, {"H", 24}, {"P", 64}, {"N", 128}}}}};
  k.make = ssd_mixer_run;
  k.work = [](const Sizes& s, bool backward) {
    const double in = product({s["B"], s["L"]}) * static_cast<double>(2 * s["H"] * s["P"] + 2 * s["N"] + s["H"]);
    const double out = product({s["B"], s["L"], s["H"], s["P"]});
    return Work{2 * (backward ? 3 * in + 2 * out : in + out), ssd_flops(s, backward)};
  };
  k.tolerance = 4e-2;
  return k;
}

Run ssd_run(Inputs& make, const Sizes& s, bool backward) {
  const int64_t b = s["B"], l = s["L"], h = s["H"], p = s["P"], n = s["N"];
  Vars in{Inputs::leaf(make.normal({b, l, h, p})), Inputs::leaf(make.wide_uniform({b, l, h}, 0.001, 0.1)),
          Inputs::leaf(make.wide_uniform({b, l, h}, -0.5, 0)), Inputs::leaf(make.normal({b, l, 1, n})),
          Inputs::leaf(make.normal({b, l, 1, n})), Inputs::leaf(make.wide_normal({h}))};
  return differentiable(in, [](const Vars& v) -> Vars { return {ssd(v[0], v[1], v[2], v[3], v[4], v[5], {}).y}; }, backward);
}

KernelBench ssd_bench() {
  KernelBench k;
  k.op = "ssd";
  k.dtype = DType::bf16;
  k.unit = Unit::bf16;
  k.check = {{{"B", 2}, {"L", 300}, {"H", 3}, {"P", 64}, {"N", 128}}};
  k.cuda = {{{{{"B", 8}, {"L", 2048}, {"H", 32}, {"P", 64}, {"N", 128}}}},
            {{{{"B", 1}, {"L", 131072}, {"H", 32}, {"P", 64}, {"N", 128}}}}};
  k.make = ssd_run;
  k.work = [](const Sizes& s, bool backward) {
    const double x = product({s["B"], s["L"], s["H"], s["P"]}), bc = 2 * product({s["B"], s["L"], s["N"]});
    const double gates = 2 * product({s["B"], s["L"], s["H"]});
    return Work{2 * (backward ? 5 * x + 3 * bc : 2 * x + bc) + 4 * gates * (backward ? 3 : 1), ssd_flops(s, backward)};
  };
  k.tolerance = 3e-2;
  return k;
}

}  // namespace

std::vector<KernelBench> ssm_benches() {
  return {selective_scan_bench(),
          on_cpu(selective_scan_bench(), {{{"B", 2}, {"D", 256}, {"L", 512}, {"N", 16}}}),
          ssd_mixer_bench(),
          on_cpu(ssd_mixer_bench(), {{{"B", 2}, {"L", 512}, {"H", 4}, {"P", 64}, {"N", 64}}}),
          ssd_bench(),
          on_cpu(ssd_bench(), {{{"B", 2}, {"L", 512}, {"H", 4}, {"P", 64}, {"N", 64}}})};
}

}  // namespace krait::train::bench
