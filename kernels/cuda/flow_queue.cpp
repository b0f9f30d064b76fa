#include "kernels/cuda/flow_queue.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "core/stream.h"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/flow_program.h"
#include "kernels/step_scope.h"

namespace krait::kernels::cuda::flow {

namespace {

// What the launches of a device share: they follow each other on one stream.
struct Exchange {
  Tensor history, slots;
};
Exchange exchange_of(Device device) {
  static std::mutex mutex;
  static auto* all = new std::map<int, Exchange>;
  const std::lock_guard lock(mutex);
  Exchange& e = (*all)[device.index];
  if (!e.history.defined() && !is_capturing(device)) {
    e.history = zeros({static_cast<int64_t>(sizeof(StepHistory) / sizeof(int64_t))}, DType::i64, device);
    e.slots = full({2 * kStepSlotBytes / static_cast<int64_t>(sizeof(int64_t))}, -1, DType::i64, device);
  }
  return e;
}

StepOp operation(StepKind kind, int64_t rows) {
  StepOp op{};
  op.kind = kind;
  op.rows = static_cast<int>(rows);
  return op;
}

StepResult result(const Tensor& t, int64_t row) { return {t.defined() ? t.data<bf16>() : nullptr, -1, static_cast<int>(row)}; }

// An operation's tensors that later operations of the launch may read.
enum class Gives { y, input, sum };  // its own values; its input rows; the sum that a norm is of

class StepQueue final : public GatheredSteps {
 public:
  StepQueue(Device device, const Exchange& exchange) : device_(device), exchange_(exchange) {
    program_.history = reinterpret_cast<StepHistory*>(exchange_.history.data<int64_t>());
    program_.slots = reinterpret_cast<bf16*>(exchange_.slots.data<int64_t>());
  }

  void flush() override {
    if (count_ == 0) return;
    program_.count = std::exchange(count_, 0);  // the launch itself asks for the stream
    program_.used = std::exchange(used_, 0) * static_cast<int>(sizeof(bf16));
    operations += program_.count;
    ++launches;
    given_.clear();
    run_steps(program_, device_);
    held_.clear();
    written_.clear();
  }

  /// Rows that an operation will read.
  struct Wanted {
    const bf16* from;
    int64_t row, columns;  // elements between rows, and of each
  };

  /// Room for what comes next, which will write these states in place, read these rows and give `values` of its own.
  void begin(std::initializer_list<Tensor> states, std::initializer_list<Wanted> rows, int64_t values = 0) {
    constexpr int kMost = 3;  // operations of one call
    bool apart = count_ + kMost > kMaxStepOps;
    for (const Tensor& t : states) apart = apart || writes(t.raw_data());
    for (const Wanted& w : rows) {
      const Given* g = given(w.from);
      if (g != nullptr) values += g->rows * g->row;
      apart = apart || (g == nullptr ? writes(w.from) : !g->has(w));
    }
    if (apart || (used_ + values) * 2 + 4096 > kStepSlotBytes) flush();
  }

  /// Tensors that the operation works on outlive its launch: none of them shares memory with a neighbour's.
  StepOp& add(const StepOp& op, std::initializer_list<Tensor> reads, std::initializer_list<Tensor> writes) {
    KRAIT_ASSERT(count_ < kMaxStepOps);
    for (const Tensor& t : reads)
      if (t.defined()) held_.push_back(t);
    for (const Tensor& t : writes)
      if (t.defined()) written_.push_back(t);
    return program_.ops[count_++] = op;
  }
  /// The last operation's y and so on may be read.
  void gives(Gives what, const StepResult& r, int64_t rows, int64_t columns) {
    if (r.to != nullptr) given_.push_back({r.to, rows, r.row, columns, count_ - 1, what, false});
  }

  /// Rows that an operation reads, `row` apart: from a slot where an operation of this launch makes them.
  StepValues read(const bf16* p, int64_t row) {
    StepValues v{p, -1, static_cast<int>(row)};
    if (const Given* g = given(p)) v.slot = slot_of(*g) + static_cast<int>(p - g->begin);
    return v;
  }
  StepValues read(const Tensor& t, int64_t row) { return read(t.data<bf16>(), row); }

  /// Values of a linear map of which some columns pass a convolution; the map does that itself if it is of this launch.
  StepValues mixed(const Tensor& x, int64_t rows, int64_t n, const MixedStep& m, const Tensor& conv) {
    Given* const g = given(x.data<bf16>());
    StepOp* op = g != nullptr ? &program_.ops[g->op] : nullptr;
    if (op == nullptr || op->kind != StepKind::linear || g->what != Gives::y || op->rows != rows || op->linear.n != n ||
        op->linear.epilogue != Epilogue::none || op->linear.y.slot >= 0 || op->linear.y.to != x.data<bf16>() || op->linear.y.row != n) {
      StepOp alone = operation(StepKind::convolve, rows);
      alone.linear.x = read(x, n);
      alone.linear.y = {nullptr, take(rows * n), static_cast<int>(n)};
      alone.linear.n = static_cast<int>(n);
      op = &add(alone, {x}, {});
    } else {
      g->mixed = true;
      op->linear.y.slot = take(rows * n);
    }
    op->linear.mixed = m;
    written_.push_back(conv);
    return {x.data<bf16>(), op->linear.y.slot, static_cast<int>(n)};
  }

  /// What the last operation does to rows at `x` alone becomes part of the linear map that reads them.
  bool joins(StepOp& op, const bf16* x) {
    if (count_ == 0) return false;
    const StepOp& last = program_.ops[count_ - 1];
    if (last.kind != StepKind::input || last.linear.x.from != x || last.rows != op.rows || last.linear.k != op.linear.k ||
        op.linear.x.row != op.linear.k)
      return false;
    LinearStep linear = op.linear;
    linear.input = last.linear.input;
    op = last;
    op.kind = StepKind::linear;
    op.linear = linear;
    --count_;
    return true;
  }

  /// Whether an operation that waits here writes this memory.
  bool writes(const void* p) const {
    const auto* at = static_cast<const char*>(p);
    for (const Tensor& t : written_) {
      const auto* begin = static_cast<const char*>(t.raw_data());
      if (at >= begin && at < begin + t.nbytes()) return true;
    }
    return false;
  }

  Device device() const { return device_; }

 private:
  struct Given {
    const bf16* begin;
    int64_t rows, row, columns;
    int op;
    Gives what;
    bool mixed;  // its slot does not hold the tensor's values
    bool has(const Wanted& w) const { return (rows == 1 || w.row == row) && w.from - begin + w.columns <= columns; }
  };
  Given* given(const bf16* p) {
    for (Given& g : given_)
      if (p >= g.begin && p < g.begin + g.rows * g.row && !g.mixed) return &g;
    return nullptr;
  }
  int slot_of(const Given& g) {
    StepOp& op = program_.ops[g.op];
    StepResult* r = nullptr;
    if (g.what == Gives::sum)
      r = &op.norm.sum;
    else if (g.what == Gives::input)
      r = op.linear.input == StepInput::norm ? &op.norm.y : &op.gated.y;
    else
      r = op.kind == StepKind::linear ? &op.linear.y : op.kind == StepKind::mamba_scan ? &op.scan.y : op.kind == StepKind::mamba2_state ? &op.state.u : &op.attention.o;
    if (r->slot < 0) r->slot = take(g.rows * g.row);
    return r->slot;
  }
  int take(int64_t values) {
    constexpr int kLine = 64;
    const int at = used_;
    used_ += static_cast<int>((values + kLine - 1) / kLine) * kLine;
    KRAIT_ASSERT(used_ * static_cast<int64_t>(sizeof(bf16)) <= kStepSlotBytes);
    return at;
  }

  Device device_;
  Exchange exchange_;
  StepProgram program_{};
  int count_ = 0, used_ = 0;
  std::vector<Tensor> held_, written_;
  std::vector<Given> given_;
};

StepQueue* current_queue(Device device) {
  auto* queue = dynamic_cast<StepQueue*>(current_deferred());
  return queue != nullptr && queue->device() == device ? queue : nullptr;
}

template <class T>
T* pointer(const Tensor& t) {
  return t.defined() ? t.data<T>() : nullptr;
}

// A map of rows of k values by w (n, k).
bool linear_fits(int64_t rows, int64_t n, int64_t k) {
  return rows >= 1 && rows <= kMaxStepRows && k % 8 == 0 && rows * k * 2 <= kStepRowBytes && step_pitch(static_cast<int>(k)) <= kStepStageBytes &&
         n < (int64_t{1} << 24);
}

// y (rows, k), made of what the operation names elsewhere.
LinearStep rows_of(StepInput input, const Tensor& y) {
  LinearStep l{};
  l.k = static_cast<int>(y.size(-1));
  l.x = {y.data<bf16>(), -1, l.k};
  l.input = input;
  return l;
}

}  // namespace

void gather_steps(std::unique_ptr<GatheredSteps>& steps, Device device) {
  static const bool able = device_info(device).compute_capability >= 90;
  if (!able) return;
  if (const Exchange e = exchange_of(device); e.history.defined()) steps = std::make_unique<StepQueue>(device, e);
}

bool gather_norm(bool centred, Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual,
                 const Tensor& w, const Tensor& b, double eps) {
  StepQueue* const queue = current_queue(x.device());
  const int64_t k = x.size(-1), rows = x.numel() / k;
  if (queue == nullptr || x.dtype() != DType::bf16 || (residual.defined() && residual.dtype() != DType::bf16) || !norm_fits(rows, k) ||
      !aligned(y, sum, x, residual, w, b))
    return false;
  queue->begin({}, {{x.data<bf16>(), k, k}, {pointer<bf16>(residual), k, k}});
  StepOp op = operation(StepKind::input, rows);
  op.linear = rows_of(StepInput::norm, y);
  op.norm = {queue->read(x, k), residual.defined() ? queue->read(residual, k) : StepValues{nullptr, -1, 0}, result(y, k), result(sum, k),
             pointer<float>(mean), rstd.data<float>(), w.data<float>(), pointer<float>(b), static_cast<float>(eps), centred ? 1 : 0};
  queue->add(op, {x, residual}, {y, sum, mean, rstd});
  queue->gives(Gives::input, op.norm.y, rows, k);
  queue->gives(Gives::sum, op.norm.sum, rows, k);
  return true;
}

bool gather_linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  StepQueue* const queue = current_queue(g.device);
  const auto* const x = static_cast<const bf16*>(g.a);
  if (queue == nullptr || g.dtype != DType::bf16 || g.ldb != g.k || g.lda % 8 != 0 || !linear_fits(g.m, g.n, g.k) || queue->writes(g.b))
    return false;
  StepOp op = operation(StepKind::linear, g.m);
  op.linear.x.row = static_cast<int>(g.lda);
  op.linear.k = static_cast<int>(g.k);
  const bool joined = queue->joins(op, x);
  if (!joined) {
    queue->begin({}, {{x, g.lda, g.k}});
    op.linear.x = queue->read(x, g.lda);
  }
  op.linear.w = static_cast<const bf16*>(g.b);
  op.linear.bias = pointer<bf16>(bias);
  op.linear.y = result(y, g.ldc);
  op.linear.n = static_cast<int>(g.n);
  op.linear.epilogue = epilogue;
  queue->add(op, {}, {y});
  queue->gives(Gives::y, op.linear.y, g.m, g.n);
  return true;
}

bool gather_mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  StepQueue* const queue = current_queue(xz.device());
  const int64_t rows = xz.size(0), e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1), outputs = r + 2 * n;
  if (queue == nullptr || xz.dtype() != DType::bf16 || w.conv_weight.size(1) != 4 || n > kScanLanes || r > kScanLanes * kScanRanks ||
      e % 8 != 0 || !linear_fits(rows, outputs, e) ||
      !aligned(xz, conv, w.conv_weight, w.conv_bias, w.x_proj))
    return false;
  Tensor dbc = empty({rows, outputs}, xz.dtype(), xz.device());
  queue->begin({conv, h}, {{xz.data<bf16>(), 2 * e, 2 * e}}, rows * (2 * e + outputs));
  const StepValues mixed = queue->mixed(xz, rows, 2 * e, {conv.data<bf16>(), w.conv_weight.data<bf16>(), pointer<bf16>(w.conv_bias), 0, static_cast<int>(e)}, conv);
  StepOp project = operation(StepKind::linear, rows);
  project.linear.x = mixed;
  project.linear.y = result(dbc, outputs);
  project.linear.w = w.x_proj.data<bf16>();
  project.linear.n = static_cast<int>(outputs);
  project.linear.k = static_cast<int>(e);
  queue->add(project, {xz, conv}, {dbc});
  queue->gives(Gives::y, project.linear.y, rows, outputs);
  StepOp scan = operation(StepKind::mamba_scan, rows);
  scan.scan = {result(y, e), mixed, queue->read(dbc, outputs), h.data<float>(), w.dt_proj.data<bf16>(), w.dt_bias.data<float>(),
               w.A_log.data<float>(), w.D.data<float>(), static_cast<int>(e), static_cast<int>(n), static_cast<int>(r)};
  queue->add(scan, {xz}, {y, h});
  queue->gives(Gives::y, scan.scan.y, rows, e);
  return true;
}

bool gather_mamba2_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  StepQueue* const queue = current_queue(zxbcdt.device());
  const int64_t rows = h.size(0), heads = h.size(1), p = h.size(2), n = h.size(3), e = heads * p;
  const int64_t channels = w.conv_weight.size(0), groups = (channels - e) / (2 * n), input = zxbcdt.size(1);
  if (queue == nullptr || zxbcdt.dtype() != DType::bf16 || !norm_fits(rows, e, 2) || groups != 1 || w.conv_weight.size(1) != 4 || n % 4 != 0 || n > 4 * kStateLanes * kStateQuads ||
      (rows > 1 && input % 8 != 0) || rows * 2 * n * 4 > kStepRowBytes ||
      !aligned(zxbcdt, h, w.norm_weight, w.conv_weight))
    return false;
  Tensor u = empty({rows, e}, zxbcdt.dtype(), zxbcdt.device());
  queue->begin({conv, h}, {{zxbcdt.data<bf16>(), input, input}}, rows * (input + e));
  const StepValues mixed = queue->mixed(zxbcdt, rows, input, {conv.data<bf16>(), w.conv_weight.data<bf16>(), pointer<bf16>(w.conv_bias), static_cast<int>(e), static_cast<int>(channels)}, conv);
  StepOp state = operation(StepKind::mamba2_state, rows);
  state.state = {result(u, e), mixed, h.data<float>(), w.dt_bias.data<float>(), w.A_log.data<float>(), w.D.data<float>(),
                 static_cast<float>(w.dt_low), static_cast<float>(w.dt_high), static_cast<int>(heads), static_cast<int>(p),
                 static_cast<int>(n), static_cast<int>(groups), w.D.ndim() == 1 ? 1 : static_cast<int>(p)};
  queue->add(state, {zxbcdt}, {u, h});
  queue->gives(Gives::y, state.state.u, rows, e);
  StepOp gate = operation(StepKind::input, rows);
  gate.linear = rows_of(StepInput::gated, y);
  gate.gated = {queue->read(u, e), mixed, result(y, e), w.norm_weight.data<float>(), static_cast<float>(w.eps), w.norm_first ? 1 : 0};
  queue->add(gate, {zxbcdt}, {y});
  queue->gives(Gives::input, gate.gated.y, rows, e);
  return true;
}

bool gather_attention_append(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position,
                             const AttentionAppend& a) {
  StepQueue* const queue = current_queue(qkv.device());
  const int64_t rows = qkv.size(0), d = qkv.size(2);
  if (queue == nullptr || qkv.dtype() != DType::bf16 || rows > kMaxStepRows || d % 8 != 0 || d > 256 || !aligned(k_cache, v_cache))
    return false;
  int lanes = 1;
  while (lanes * 8 < d) lanes *= 2;
  queue->begin({k_cache, v_cache}, {{qkv.data<bf16>(), qkv.stride(0), (a.hq + 2 * a.hkv) * d}});
  StepOp op = operation(StepKind::attention, rows);
  op.attention = {result(o, a.hq * d), queue->read(qkv, qkv.stride(0)), k_cache.data<bf16>(), v_cache.data<bf16>(), position.data<int32_t>(),
                  pointer<float>(a.cos), pointer<float>(a.sin), pointer<float>(a.alibi_slopes),
                  static_cast<int>(k_cache.size(1)), static_cast<int>(a.hq), static_cast<int>(a.hkv), static_cast<int>(d),
                  a.cos.defined() ? static_cast<int>(a.cos.size(1)) : 0, a.style == RopeStyle::interleaved ? 1 : 0, lanes,
                  static_cast<float>(a.scale)};
  queue->add(op, {qkv, position}, {o, k_cache, v_cache});
  queue->gives(Gives::y, op.attention.o, rows, a.hq * d);
  return true;
}

}  // namespace krait::kernels::cuda::flow
