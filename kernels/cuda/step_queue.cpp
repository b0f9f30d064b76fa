#include "kernels/cuda/step_queue.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "core/stream.h"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/gathering.h"
#include "kernels/cuda/rows_queue.h"
#include "kernels/cuda/step_program.h"
#include "kernels/cuda/step_solo.h"
#include "kernels/step_scope.h"

namespace krait::kernels::cuda {

namespace {

// What the blocks of a device's launches meet by: its launches follow each other on one stream.
struct Meeting {
  Tensor counters;  // arrivals at barriers; beginnings of programs of one row
  Tensor pairs;
};
Meeting meeting_of(Device device) {
  static std::mutex mutex;
  static auto* all = new std::map<int, Meeting>;
  const std::lock_guard lock(mutex);
  Meeting& meeting = (*all)[device.index];
  if (!meeting.pairs.defined() && !is_capturing(device))
    meeting = {zeros({2}, DType::i64, device), zeros({kSoloSlotPairs}, DType::i64, device)};
  return meeting;
}

StepOp operation(StepKind kind, int64_t rows) {
  StepOp op{};
  op.kind = kind;
  op.rows = static_cast<int>(rows);
  return op;
}

class StepQueue final : public GatheredSteps {
 public:
  StepQueue(Device device, Meeting meeting) : device_(device), meeting_(std::move(meeting)), blocks_(step_blocks(device)) {
    program_.counter = reinterpret_cast<unsigned long long*>(meeting_.counters.data<int64_t>());
    solo_.counter = program_.counter + 1;
    solo_.pairs = reinterpret_cast<unsigned long long*>(meeting_.pairs.data<int64_t>());
  }

  void flush() override {
    if (count_ == 0) return;
    program_.count = std::exchange(count_, 0);  // the launch itself asks for the stream
    operations += program_.count;
    ++launches;
    if (plan_solo(solo_, program_, blocks_))
      run_solo(solo_, device_, blocks_);
    else
      run_steps(program_, device_);
    held_.clear();
  }

  /// Tensors that the operation works on outlive its launch: none of them shares memory with a neighbour's.
  void add(const StepOp& op, std::initializer_list<Tensor> tensors) {
    if (count_ == kMaxStepOps) flush();
    program_.ops[count_++] = op;
    for (const Tensor& t : tensors)
      if (t.defined()) held_.push_back(t);
  }

  /// What the last operation does to rows at `x` alone becomes part of the linear map that reads them.
  void add_linear(StepOp op, const Tensor& y) {
    if (count_ > 0) {
      const StepOp& last = program_.ops[count_ - 1];
      if (last.kind == StepKind::input && last.linear.x == op.linear.x && last.rows == op.rows && last.linear.k == op.linear.k &&
          op.linear.x_row == op.linear.k) {
        const LinearStep linear = op.linear;
        op = last;
        op.kind = StepKind::linear;
        op.linear = linear;
        op.linear.input = last.linear.input;
        --count_;
      }
    }
    add(op, {y});
  }

  /// Whether an operation that waits here works on this memory.
  bool works_on(const void* p) const {
    const auto* at = static_cast<const char*>(p);
    for (const Tensor& t : held_) {
      const auto* begin = static_cast<const char*>(t.raw_data());
      if (at >= begin && at < begin + t.nbytes()) return true;
    }
    return false;
  }

  /// Before an operation that reads this state ahead: one between it and the operation that writes the state.
  void apart_from(const bf16* state) {
    if (count_ == 0) return;
    const StepOp& last = program_.ops[count_ - 1];
    const bool scans = last.kind == StepKind::mamba_scan && last.scan.conv == state;
    const bool gates = (last.kind == StepKind::input || last.kind == StepKind::linear) && last.linear.input == StepInput::gated && last.gated.conv == state;
    const bool attends = last.kind == StepKind::attention && last.attention.k_cache == state;
    if (scans || gates || attends) add(operation(StepKind::pause, 1), {});
  }

  Device device() const { return device_; }

 private:
  Device device_;
  Meeting meeting_;
  int blocks_;
  StepProgram program_{};
  SoloProgram solo_{};
  int count_ = 0;
  std::vector<Tensor> held_;
};

// A map of rows of k values by w (n, k).
bool linear_fits(int64_t rows, int64_t n, int64_t k) {
  return rows >= 1 && rows <= kMaxStepRows && k % 8 == 0 && rows * k * 2 <= kStepRowBytes && k * 2 <= kStepStageBytes &&
         n < (int64_t{1} << 24);
}

// y (rows, k), made of what the operation names elsewhere.
LinearStep rows_of(StepInput input, const Tensor& y) {
  LinearStep l{};
  l.x = y.data<bf16>();
  l.k = static_cast<int>(y.size(-1));
  l.x_row = l.k;
  l.input = input;
  return l;
}

}  // namespace

void gather_steps(std::unique_ptr<GatheredSteps>& steps, Device device, int64_t rows, bool scans) {
  if (rows > kMaxStepRows || scans) {
    steps = gather_rows(device);
    return;
  }
  static const bool able = device_info(device).compute_capability >= 90;
  if (!able) return;
  if (Meeting meeting = meeting_of(device); meeting.pairs.defined()) steps = std::make_unique<StepQueue>(device, std::move(meeting));
}

bool gather_norm(bool centred, Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual,
                 const Tensor& w, const Tensor& b, double eps) {
  StepQueue* const queue = gathering<StepQueue>(x.device());
  const int64_t k = x.size(-1), rows = x.numel() / k;
  if (queue == nullptr || x.dtype() != DType::bf16 || (residual.defined() && residual.dtype() != DType::bf16) || !norm_fits(rows, k) ||
      !aligned(y, sum, x, residual, w, b))
    return false;
  StepOp op = operation(StepKind::input, rows);
  op.linear = rows_of(StepInput::norm, y);
  op.norm = {x.data<bf16>(),       pointer_or_null<bf16>(residual), y.data<bf16>(),    pointer_or_null<bf16>(sum),       pointer_or_null<float>(mean),
             rstd.data<float>(), w.data<float>(),         pointer_or_null<float>(b), static_cast<float>(eps), centred ? 1 : 0};
  queue->add(op, {y, sum, mean, rstd, x, residual});
  return true;
}

bool gather_linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  StepQueue* const queue = gathering<StepQueue>(g.device);
  if (queue == nullptr || g.dtype != DType::bf16 || g.ldb != g.k || g.lda % 8 != 0 || !linear_fits(g.m, g.n, g.k) || queue->works_on(g.b))
    return false;
  StepOp op = operation(StepKind::linear, g.m);
  op.linear = {static_cast<const bf16*>(g.a), static_cast<const bf16*>(g.b), pointer_or_null<bf16>(bias), y.data<bf16>(), g.lda, g.ldc,
               static_cast<int>(g.n), static_cast<int>(g.k), epilogue, StepInput::plain};
  queue->add_linear(op, y);
  return true;
}

bool gather_mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  StepQueue* const queue = gathering<StepQueue>(xz.device());
  const int64_t rows = xz.size(0), e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1), outputs = r + 2 * n;
  if (queue == nullptr || xz.dtype() != DType::bf16 || w.conv_weight.size(1) != 4 || n > kScanLanes || r > kScanLanes * kScanRanks ||
      e % 8 != 0 || !linear_fits(rows, outputs, e) || !aligned(xz, conv, w.conv_weight, w.conv_bias, w.x_proj))
    return false;
  Tensor dbc = empty({rows, outputs}, xz.dtype(), xz.device());
  StepOp project = operation(StepKind::linear, rows);
  project.linear = {nullptr, w.x_proj.data<bf16>(), nullptr, dbc.data<bf16>(), e, outputs,
                    static_cast<int>(outputs), static_cast<int>(e), Epilogue::none, StepInput::convolved};
  project.convolved = {xz.data<bf16>(), conv.data<bf16>(), w.conv_weight.data<bf16>(), pointer_or_null<bf16>(w.conv_bias)};
  queue->apart_from(conv.data<bf16>());
  queue->add(project, {xz, conv, dbc});
  StepOp scan = operation(StepKind::mamba_scan, rows);
  scan.scan = {y.data<bf16>(), conv.data<bf16>(), h.data<float>(), xz.data<bf16>(), dbc.data<bf16>(), w.conv_weight.data<bf16>(),
               pointer_or_null<bf16>(w.conv_bias), w.dt_proj.data<bf16>(), w.dt_bias.data<float>(), w.A_log.data<float>(), w.D.data<float>(),
               static_cast<int>(e), static_cast<int>(n), static_cast<int>(r)};
  queue->add(scan, {y, conv, h, xz, dbc});
  return true;
}

bool gather_mamba2_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  StepQueue* const queue = gathering<StepQueue>(zxbcdt.device());
  const int64_t rows = h.size(0), heads = h.size(1), p = h.size(2), n = h.size(3), e = heads * p;
  const int64_t channels = w.conv_weight.size(0), groups = (channels - e) / (2 * n), input = zxbcdt.size(1);
  if (queue == nullptr || zxbcdt.dtype() != DType::bf16 || !norm_fits(rows, e) || groups != 1 || w.conv_weight.size(1) != 4 || n % 4 != 0 || n > 128 * kStateQuads ||
      (rows > 1 && input % 8 != 0) || rows * 2 * n * 4 > kStepRowBytes ||
      !aligned(zxbcdt, h, w.norm_weight, w.conv_weight))
    return false;
  Tensor u = empty({rows, e}, zxbcdt.dtype(), zxbcdt.device());
  StepOp state = operation(StepKind::mamba2_state, rows);
  state.state = {u.data<bf16>(), h.data<float>(), conv.data<bf16>(), zxbcdt.data<bf16>(), w.conv_weight.data<bf16>(),
                 pointer_or_null<bf16>(w.conv_bias), w.dt_bias.data<float>(), w.A_log.data<float>(), w.D.data<float>(),
                 static_cast<float>(w.dt_low), static_cast<float>(w.dt_high), static_cast<int>(heads), static_cast<int>(p),
                 static_cast<int>(n), static_cast<int>(groups), static_cast<int>(channels), static_cast<int>(input),
                 w.D.ndim() == 1 ? 1 : static_cast<int>(p)};
  queue->apart_from(conv.data<bf16>());
  queue->add(state, {u, h, conv, zxbcdt});
  StepOp gate = operation(StepKind::input, rows);
  gate.linear = rows_of(StepInput::gated, y);
  gate.gated = {u.data<bf16>(), zxbcdt.data<bf16>(), y.data<bf16>(), conv.data<bf16>(), w.norm_weight.data<float>(),
                static_cast<float>(w.eps), w.norm_first ? 1 : 0, static_cast<int>(channels), static_cast<int>(input)};
  queue->add(gate, {y, u, zxbcdt, conv});
  return true;
}

bool gather_attention_append(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position,
                             const AttentionAppend& a) {
  StepQueue* const queue = gathering<StepQueue>(qkv.device());
  const int64_t rows = qkv.size(0), d = qkv.size(2);
  if (queue == nullptr || qkv.dtype() != DType::bf16 || rows > kMaxStepRows || d % 8 != 0 || d > 256 || !aligned(k_cache, v_cache))
    return false;
  int lanes = 1;
  while (lanes * 8 < d) lanes *= 2;
  StepOp op = operation(StepKind::attention, rows);
  op.attention = {o.data<bf16>(), k_cache.data<bf16>(), v_cache.data<bf16>(), qkv.data<bf16>(), position.data<int32_t>(),
                  pointer_or_null<float>(a.cos), pointer_or_null<float>(a.sin), pointer_or_null<float>(a.alibi_slopes), qkv.stride(0),
                  static_cast<int>(k_cache.size(1)), static_cast<int>(a.hq), static_cast<int>(a.hkv), static_cast<int>(d),
                  a.cos.defined() ? static_cast<int>(a.cos.size(1)) : 0, a.style == RopeStyle::interleaved ? 1 : 0, lanes,
                  static_cast<float>(a.scale)};
  queue->apart_from(k_cache.data<bf16>());
  queue->add(op, {o, qkv, k_cache, v_cache, position});
  return true;
}

}  // namespace krait::kernels::cuda
