#include "kernels/cuda/few_steps.h"

#include <algorithm>
#include <utility>

#include "core/stream.h"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/few_draw.h"
#include "kernels/cuda/rows_scan.h"
#include "kernels/cuda/rows_state.h"
#include "kernels/cuda/step_map.h"

namespace krait::kernels::cuda {

namespace {

bool same(const Tensor& a, const Tensor& b) { return a.raw_data() == b.raw_data() && a.numel() == b.numel(); }
bool reads(const Gemm& g, const Tensor& x) { return x.raw_data() == g.a && x.size(-1) == g.k && x.numel() == g.m * g.k && g.lda == g.k; }

// The rows alone.
void finish(const FewInput& in, int rows, int k, Stream stream) {
  FewLinear work{};
  work.in = in;
  work.rows = rows;
  work.k = k;
  few_linear(work, true, stream);
}

}  // namespace

bool FewSteps::norm(Tensor& y, Tensor& sum, Tensor& rstd, const Tensor& x, const Tensor& residual, const Tensor& w, double eps) {
  const int64_t k = x.size(-1), rows = x.numel() / k;
  if (x.dtype() != DType::bf16 || (residual.defined() && residual.dtype() != DType::bf16) || rows > kFewRows || k > kFewWidth || k % 128 != 0 ||
      !aligned(y, sum, x, residual, w))
    return false;
  FewInput in{};
  if (const Parts* parts = std::get_if<Parts>(&waiting_); parts != nullptr && same(parts->y, x)) {
    const Parts taken = std::get<Parts>(std::exchange(waiting_, {}));
    in = taken.in;
    scale_gated(taken);
    held_.push_back(taken.y);
  } else {
    current_stream(device_);  // what waits is launched
    in.made = x.data<bf16>();
    held_.push_back(x);
  }
  in.residual = pointer_or_null<bf16>(residual);
  in.weight = w.data<float>();
  in.eps = static_cast<float>(eps);
  in.sum = pointer_or_null<bf16>(sum);
  in.normed = y.data<bf16>();
  in.rstd = pointer_or_null<float>(rstd);
  held_.insert(held_.end(), {y, sum, rstd, residual, w});
  waiting_ = Norm{in, static_cast<int>(rows), static_cast<int>(k), y};
  return true;
}

bool FewSteps::linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  constexpr int64_t kMaxColumns = 8192;  // beyond, too many blocks would make the rows for themselves
  if (g.dtype != DType::bf16 || g.ldb != g.k || g.ldc != g.n || epilogue != Epilogue::none) return false;
  if (const Norm* norm = std::get_if<Norm>(&waiting_)) {
    if (!reads(g, norm->y)) return false;
    if (g.n > kMaxColumns) return head(y, g, bias);
    NormedMap next{};
    RowsLinear& alone = next.map.alone = step_map_of<RowsLinear>(g, y, bias, epilogue);
    if (!rows_linear_fits(alone)) return false;
    next.work.in = norm->in;
    next.work.w = alone.w;
    next.work.bias = alone.bias;
    next.work.y = alone.y;
    next.work.rows = alone.rows;
    next.work.n = alone.n;
    next.work.k = alone.k;
    next.map.y = y;
    next.map.x = norm->y;
    held_.push_back(bias);
    waiting_ = std::move(next);
    return true;
  }
  if (g.n > kFewWidth || g.n % 128 != 0 || bias.defined() || reinterpret_cast<uintptr_t>(g.b) % 16 != 0) return false;
  if (const Scan* scan = std::get_if<Scan>(&waiting_); scan != nullptr && reads(g, scan->y)) {
    FewScan work = std::get<Scan>(std::exchange(waiting_, {})).work;
    const Tensor part = empty({few_parts(g.k), g.m, g.n}, DType::f32, device_);
    work.w = static_cast<const bf16*>(g.b);
    work.part = part.data<float>();
    work.d = static_cast<int>(g.n);
    few_scan(work, current_stream(device_));
    add_parts({}, y, g, part);
    return true;
  }
  if (const State* state = std::get_if<State>(&waiting_); state != nullptr && reads(g, state->y)) {
    State taken = std::get<State>(std::exchange(waiting_, {}));
    FewState& work = taken.work;
    const Tensor part = empty({few_parts(g.k), g.m, g.n}, DType::f32, device_), squares = empty({g.m, few_parts(g.k)}, DType::f32, device_);
    work.w = static_cast<const bf16*>(g.b);
    work.part = part.data<float>();
    work.squares = squares.data<float>();
    work.d = static_cast<int>(g.n);
    few_state(work, current_stream(device_));
    Parts parts{};
    parts.in.squares = work.squares;
    parts.in.squares_eps = taken.eps;
    parts.in.width = static_cast<int>(g.k);
    parts.gated = {work.squares, static_cast<int>(few_parts(g.k)), taken.eps, taken.y.data<bf16>(), nullptr};
    parts.gated_y = taken.y;
    parts.weighted = taken.weighted;
    taken = {};
    add_parts(std::move(parts), y, g, part);
    held_.push_back(squares);
    return true;
  }
  return false;
}

// A wide map behind its norm.
bool FewSteps::head(Tensor& y, const Gemm& g, const Tensor& bias) {
  const FewMap work = step_map_of<FewMap>(g, y, bias, Epilogue::none);
  if (!few_map_fits(work)) return false;
  held_ = {flush(), bias};
  waiting_ = Head{work, y};
  return true;
}

bool FewSteps::draw(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits) {
  const Head* head = std::get_if<Head>(&waiting_);
  if (head == nullptr || !draws_from(head->work, logits)) return false;
  const Head taken = std::get<Head>(std::exchange(waiting_, {}));
  few_map_draw(taken.work, true, made, last, position, step, logits, current_stream(device_));
  held_.clear();
  return true;
}

// Behind a launch: what it left of y waits.
void FewSteps::add_parts(Parts parts, Tensor& y, const Gemm& g, const Tensor& part) {
  parts.in.part = part.data<float>();
  parts.in.parts = static_cast<int>(part.size(0));
  parts.in.made_out = y.data<bf16>();
  parts.rows = static_cast<int>(g.m);
  parts.k = static_cast<int>(g.n);
  parts.y = y;
  held_ = {part};
  waiting_ = std::move(parts);
}

// The gated norm's rows themselves, where somebody else has them.
void FewSteps::scale_gated(const Parts& parts) {
  if (parts.gated.squares != nullptr && parts.gated_y.use_count() > 1)
    scale_rows(parts.gated, parts.weighted.data<bf16>(), parts.rows, parts.in.width, current_stream(device_));
}

// Overlapped unless the convolution's state may still be on its way: the first kernel of a scope, and a layer that is met
// again, wait for everything before them.
void FewSteps::start(FewLinear& work, const void* conv) {
  const bool again = std::find(states_.begin(), states_.end(), conv) != states_.end();
  if (again) states_.clear();
  const bool overlapped = !states_.empty();
  states_.push_back(conv);
  few_linear(work, overlapped, current_stream(device_));
  held_.clear();
}

bool FewSteps::mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  const NormedMap* normed = std::get_if<NormedMap>(&waiting_);
  const int64_t rows = xz.size(0), e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1), outputs = r + 2 * n;
  if (normed == nullptr || !same(normed->map.y, xz) || n != kScanStates || r > kScanMaxRank || r % 4 != 0 || w.conv_weight.size(1) != kFewTaps ||
      e % kFewColumns != 0 || !aligned(h, w.A_log, w.dt_proj, w.conv_weight, w.x_proj))
    return false;
  FewLinear work = std::get<NormedMap>(std::exchange(waiting_, {})).work;
  const int64_t parts = e / kFewColumns;
  const Tensor mixed = empty({rows, e}, DType::bf16, device_), part = empty({rows, parts, outputs}, DType::f32, device_);
  convolve(work, conv, w, 0, e);
  work.mixed = mixed.data<bf16>();
  work.project = w.x_proj.data<bf16>();
  work.part = part.data<float>();
  work.outputs = static_cast<int>(outputs);
  start(work, work.conv);
  const FewScan scan{rows_scan_of(y, h, mixed, xz, part, w), nullptr, nullptr, 0};
  held_ = {y, h, mixed, xz, part, w.dt_proj, w.dt_bias, w.A_log, w.D};
  waiting_ = Scan{scan, y};
  return true;
}

bool FewSteps::mamba2_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  const NormedMap* normed = std::get_if<NormedMap>(&waiting_);
  if (normed == nullptr || !same(normed->map.y, zxbcdt) || h.dtype() != DType::f32 || !rows_state_fits(h, zxbcdt, w) || h.size(2) % 16 != 0 ||
      !aligned(w.conv_weight))
    return false;
  FewLinear work = std::get<NormedMap>(std::exchange(waiting_, {})).work;
  const int64_t rows = h.size(0), e = h.size(1) * h.size(2), channels = w.conv_weight.size(0);
  const Tensor mixed = empty({rows, channels}, DType::bf16, device_), weighted = empty({rows, e}, DType::bf16, device_);
  convolve(work, conv, w, e, e + channels);
  work.mixed = mixed.data<bf16>();
  start(work, work.conv);
  const FewState state{rows_state_of(weighted, {}, h, nullptr, mixed, zxbcdt, w), nullptr, nullptr, 0};
  held_ = {h, mixed, zxbcdt, w.dt_bias, w.A_log, w.D, w.norm_weight};
  waiting_ = State{state, y, weighted, static_cast<float>(w.eps)};
  return true;
}

bool FewSteps::take_map(Map& map) {
  if (!std::holds_alternative<NormedMap>(waiting_)) return false;
  const NormedMap taken = std::get<NormedMap>(std::exchange(waiting_, {}));
  finish(taken.work.in, taken.work.rows, taken.work.k, current_stream(device_));
  held_.clear();
  map = taken.map;
  return true;
}

Tensor FewSteps::flush() {
  if (std::holds_alternative<std::monostate>(waiting_)) return {};
  const auto waiting = std::exchange(waiting_, {});  // the launches ask for the stream themselves
  const auto held = std::exchange(held_, {});
  Tensor normed;
  if (const Norm* norm = std::get_if<Norm>(&waiting)) {
    finish(norm->in, norm->rows, norm->k, current_stream(device_));
    normed = norm->y;
  } else if (const Scan* scan = std::get_if<Scan>(&waiting)) {
    rows_scan(scan->work, current_stream(device_));
  } else if (const State* state = std::get_if<State>(&waiting)) {
    RowsState a = state->work;
    const Tensor squares = empty({a.rows, a.heads}, DType::f32, device_);
    a.squares = squares.data<float>();
    rows_state(a, current_stream(device_));
    scale_rows({a.squares, a.heads, state->eps, state->y.data<bf16>(), nullptr}, a.weighted, a.rows, a.heads * a.p, current_stream(device_));
  } else if (const Parts* parts = std::get_if<Parts>(&waiting)) {
    finish(parts->in, parts->rows, parts->k, current_stream(device_));
    scale_gated(*parts);
  } else if (const Head* head = std::get_if<Head>(&waiting)) {
    few_map(head->work, true, current_stream(device_));
  }
  return normed;
}

}  // namespace krait::kernels::cuda
