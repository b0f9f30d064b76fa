// Attention through the graph interface of cuDNN 9: the operations of attention are listed one by one, and cuDNN
// matches the pattern and fuses it. Plans are kept per problem (shapes, strides, mask).
#include <cudnn.h>

#include <algorithm>
#include <array>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "core/cuda/check.h"
#include "core/stream.h"
#include "kernels/cuda/attention_own.h"

namespace krait::kernels::cuda {

namespace {

constexpr size_t kOldestVersion = 90300;
constexpr size_t kAnyLengthVersion = 91600;  // older ones need extra masks for lk % 128 != 0

void check(cudnnStatus_t status, std::source_location where = std::source_location::current()) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  char detail[1024] = "";
  cudnnGetLastErrorString(detail, sizeof detail);
  throw_error(fmt::format("cuDNN error {} at {}:{}: {}", cudnnGetErrorString(status), where.file_name(), where.line(),
                          detail));
}

class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type) { check(cudnnBackendCreateDescriptor(type, &handle_)); }
  ~Descriptor() {
    if (handle_) cudnnBackendDestroyDescriptor(handle_);
  }
  Descriptor(Descriptor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  cudnnBackendDescriptor_t get() const { return handle_; }
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count, const void* values,
           std::source_location where = std::source_location::current()) {
    check(cudnnBackendSetAttribute(handle_, name, type, count, values), where);
  }
  template <class T>
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, const T& value,
           std::source_location where = std::source_location::current()) {
    set(name, type, 1, &value, where);
  }
  void set(cudnnBackendAttributeName_t name, const Descriptor& value,
           std::source_location where = std::source_location::current()) {
    const cudnnBackendDescriptor_t d = value.get();
    set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &d, where);
  }
  void finalize(std::source_location where = std::source_location::current()) {
    check(cudnnBackendFinalize(handle_), where);
  }

 private:
  cudnnBackendDescriptor_t handle_ = nullptr;
};

using Dims = std::array<int64_t, 4>;

// What the caller's memory is called in a graph.
enum Uid : int64_t { kQ = 1, kK, kV, kO, kStats, kDo, kDq, kDk, kDv, kScale, kMinusInfinity, kOne, kDelta, kFirstVirtual };

struct Value {
  const Descriptor* tensor;
  Dims dims;
};

Dims packed(const Dims& d) { return {d[1] * d[2] * d[3], d[2] * d[3], d[3], 1}; }
Dims swapped(Dims d) {
  std::swap(d[2], d[3]);
  return d;
}

// Lists tensors and operations; owns their descriptors.
class Graph {
 public:
  Value tensor(int64_t uid, cudnnDataType_t type, const Dims& dims, const Dims& strides, bool is_virtual = false,
               bool by_value = false) {
    Descriptor& t = descriptors_.emplace_back(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    t.set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, type);
    t.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims.data());
    t.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides.data());
    t.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, uid);
    t.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, int64_t{16});
    t.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, is_virtual);
    t.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, by_value);
    t.finalize();
    return {&t, dims};
  }
  Value scalar(int64_t uid) { return tensor(uid, CUDNN_DATA_FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1}, false, true); }
  Value intermediate(const Dims& dims, cudnnDataType_t type = CUDNN_DATA_FLOAT) {
    return tensor(next_++, type, dims, packed(dims), true);
  }

  void matmul(const Value& a, const Value& b, const Value& c) {
    Descriptor& m = descriptors_.emplace_back(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    m.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
    m.finalize();
    Descriptor& op = operation(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, *a.tensor);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, *b.tensor);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, *c.tensor);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, m);
    op.finalize();
  }

  // y = mode(x, b), or for BINARY_SELECT: t ? x : b
  void pointwise(cudnnPointwiseMode_t mode, const Value& x, const Value* b, const Value* t, const Value& y,
                 cudnnDataType_t compute = CUDNN_DATA_FLOAT, int64_t axis = -1) {
    Descriptor& p = descriptors_.emplace_back(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    p.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, mode);
    p.set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, compute);
    if (axis >= 0) p.set(CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, axis);
    p.finalize();
    Descriptor& op = operation(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, p);
    op.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, *x.tensor);
    if (b) op.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *b->tensor);
    if (t) op.set(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, *t->tensor);
    op.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, *y.tensor);
    op.finalize();
  }
  Value unary(cudnnPointwiseMode_t mode, const Value& x) {
    const Value y = intermediate(x.dims);
    pointwise(mode, x, nullptr, nullptr, y);
    return y;
  }
  Value binary(cudnnPointwiseMode_t mode, const Value& x, const Value& b) {
    const Value y = intermediate(x.dims);
    pointwise(mode, x, &b, nullptr, y);
    return y;
  }

  void reduce(cudnnReduceTensorOp_t mode, const Value& x, const Value& y) {
    Descriptor& r = descriptors_.emplace_back(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    r.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, mode);
    r.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
    r.finalize();
    Descriptor& op = operation(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, r);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, *x.tensor);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, *y.tensor);
    op.finalize();
  }

  // The same values seen with the last two dimensions exchanged.
  Value transpose(const Value& x, const Dims& strides, cudnnDataType_t type) {
    const Value y = tensor(next_++, type, swapped(x.dims), strides, true);
    Descriptor& op = operation(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, *x.tensor);
    op.set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, *y.tensor);
    op.finalize();
    return y;
  }

  // Scores above the diagonal become -infinity.
  Value causal(const Value& s) {
    const auto index = [&](int64_t axis) {
      const Value y = intermediate(s.dims, CUDNN_DATA_INT32);
      pointwise(CUDNN_POINTWISE_GEN_INDEX, s, nullptr, nullptr, y, CUDNN_DATA_FLOAT, axis);
      return y;
    };
    const Value row = index(2), column = index(3), keep = intermediate(s.dims, CUDNN_DATA_BOOLEAN);
    pointwise(CUDNN_POINTWISE_CMP_GE, row, &column, nullptr, keep, CUDNN_DATA_BOOLEAN);
    const Value none = scalar(kMinusInfinity), y = intermediate(s.dims);
    pointwise(CUDNN_POINTWISE_BINARY_SELECT, s, &none, &keep, y);
    return y;
  }

  std::vector<cudnnBackendDescriptor_t> operations() const {
    std::vector<cudnnBackendDescriptor_t> all;
    for (const Descriptor* op : operations_) all.push_back(op->get());
    return all;
  }

 private:
  Descriptor& operation(cudnnBackendDescriptorType_t type) {
    Descriptor& op = descriptors_.emplace_back(type);
    operations_.push_back(&op);
    return op;
  }
  std::deque<Descriptor> descriptors_;  // addresses stay
  std::vector<const Descriptor*> operations_;
  int64_t next_ = kFirstVirtual;
};

cudnnHandle_t handle_of(Device device) {
  static std::map<int, cudnnHandle_t> handles;  // live as long as the process
  cudnnHandle_t& h = handles[device.index];
  if (!h) {
    krait::check(cudaSetDevice(device.index));
    check(cudnnCreate(&h));
  }
  check(cudnnSetStream(h, static_cast<cudaStream_t>(current_stream(device).handle)));
  return h;
}

// Streams that parts of one job run on side by side: what one part leaves idle at its end, another fills.
class Lanes {
 public:
  static constexpr size_t kCount = 2;
  static Lanes& of(Device device) {
    static std::map<int, std::unique_ptr<Lanes>> all;  // live as long as the process
    std::unique_ptr<Lanes>& lanes = all[device.index];
    if (!lanes) lanes = std::make_unique<Lanes>();
    return *lanes;
  }
  Lanes() {
    for (Lane& l : lanes_) {
      if (&l != &lanes_[0]) krait::check(cudaStreamCreateWithFlags(&l.stream, cudaStreamNonBlocking));
      krait::check(cudaEventCreateWithFlags(&l.event, cudaEventDisableTiming));
    }
  }
  /// Lane 0 is the stream itself. The others begin behind what is queued on it, and it goes on behind them.
  cudaStream_t stream(size_t lane) const { return lanes_[lane].stream; }
  void fork(cudaStream_t from, size_t count) {
    lanes_[0].stream = from;
    if (count > 1) krait::check(cudaEventRecord(lanes_[0].event, from));
    for (size_t i = 1; i < count; ++i) krait::check(cudaStreamWaitEvent(lanes_[i].stream, lanes_[0].event));
  }
  void join(size_t count) {
    for (size_t i = 1; i < count; ++i) {
      krait::check(cudaEventRecord(lanes_[i].event, lanes_[i].stream));
      krait::check(cudaStreamWaitEvent(lanes_[0].stream, lanes_[i].event));
    }
  }

 private:
  struct Lane {
    cudaStream_t stream = nullptr;
    cudaEvent_t event = nullptr;
  };
  std::array<Lane, kCount> lanes_;
};

struct Plan {
  Graph graph;  // the plan refers to its descriptors
  std::vector<Descriptor> kept;
  std::unique_ptr<Descriptor> plan;
  int64_t workspace = 0;

  // The first of cuDNN's suggestions, best first, that it can build.
  void build(cudnnHandle_t handle) {
    const auto operations = graph.operations();
    Descriptor& all = kept.emplace_back(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    all.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, handle);
    all.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<int64_t>(operations.size()),
            operations.data());
    all.finalize();
    Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, all);
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, CUDNN_HEUR_MODE_A);
    heuristics.finalize();
    int64_t count = 0;
    check(cudnnBackendGetAttribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0,
                                   &count, nullptr));
    std::vector<Descriptor> engines;
    std::vector<cudnnBackendDescriptor_t> raw;
    for (int64_t i = 0; i < count; ++i) raw.push_back(engines.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).get());
    check(cudnnBackendGetAttribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                   count, &count, raw.data()));  // leaves out those that cannot run here
    std::string reason = "no engine of cuDNN takes this problem on this device";
    for (int64_t i = 0; i < count; ++i) {
      try {
        auto candidate = std::make_unique<Descriptor>(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
        candidate->set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, handle);
        candidate->set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, engines[static_cast<size_t>(i)]);
        candidate->finalize();
        int64_t one = 1;
        check(cudnnBackendGetAttribute(candidate->get(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1,
                                       &one, &workspace));
        kept.push_back(std::move(engines[static_cast<size_t>(i)]));
        plan = std::move(candidate);
        return;
      } catch (const Error& e) {
        reason = e.what();
      }
    }
    throw_error(reason);
  }

  Tensor scratch(Device device) const { return empty({workspace}, DType::u8, device); }

  // scratch: at least `workspace` bytes.
  void execute(cudnnHandle_t handle, const Tensor& scratch, const std::map<int64_t, void*>& memory) const {
    std::vector<int64_t> uids;
    std::vector<void*> pointers;
    for (const auto& [uid, pointer] : memory) {
      uids.push_back(uid);
      pointers.push_back(pointer);
    }
    void* scratch_data = workspace > 0 ? scratch.raw_data() : nullptr;
    Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
    pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, static_cast<int64_t>(uids.size()), uids.data());
    pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, static_cast<int64_t>(pointers.size()),
             pointers.data());
    pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &scratch_data);
    pack.finalize();
    check(cudnnBackendExecute(handle, plan->get(), pack.get()));
  }
};

// (b, l, h, d) as cuDNN's (b, h, l, d).
Dims dims_of(const Tensor& t) { return {t.size(0), t.size(2), t.size(1), t.size(3)}; }
Dims strides_of(const Tensor& t) { return {t.stride(0), t.stride(2), t.stride(1), 1}; }

// Forward: softmax(scale q k^T) v and lse.
void list_forward(Graph& g, const Tensor& o, const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal) {
  const int64_t b = q_.size(0), h = q_.size(2), lq = q_.size(1), lk = k_.size(1);
  const Dims scores{b, h, lq, lk}, rows{b, h, lq, 1};
  const Value q = g.tensor(kQ, CUDNN_DATA_BFLOAT16, dims_of(q_), strides_of(q_));
  const Value kt = g.tensor(kK, CUDNN_DATA_BFLOAT16, swapped(dims_of(k_)), swapped(strides_of(k_)));
  const Value v = g.tensor(kV, CUDNN_DATA_BFLOAT16, dims_of(v_), strides_of(v_));
  Value s = g.intermediate(scores);
  g.matmul(q, kt, s);
  s = g.binary(CUDNN_POINTWISE_MUL, s, g.scalar(kScale));
  if (causal) s = g.causal(s);
  const Value top = g.intermediate(rows), sum = g.intermediate(rows);
  g.reduce(CUDNN_REDUCE_TENSOR_MAX, s, top);
  const Value e = g.unary(CUDNN_POINTWISE_EXP, g.binary(CUDNN_POINTWISE_SUB, s, top));
  g.reduce(CUDNN_REDUCE_TENSOR_ADD, e, sum);
  const Value log_sum = g.unary(CUDNN_POINTWISE_LOG, sum);
  const Value lse = g.tensor(kStats, CUDNN_DATA_FLOAT, rows, packed(rows));
  g.pointwise(CUDNN_POINTWISE_ADD, top, &log_sum, nullptr, lse);
  const Value p = g.intermediate(scores, CUDNN_DATA_BFLOAT16);
  g.pointwise(CUDNN_POINTWISE_DIV, e, &sum, nullptr, p);
  g.matmul(p, v, g.tensor(kO, CUDNN_DATA_BFLOAT16, dims_of(o), strides_of(o)));
}

// Backward. dq comes straight from a product with dS, not from a sum in global memory: that is the form for which
// cuDNN keeps dP in its workspace and uses no atomics.
void list_backward(Graph& g, const Tensor& dq_, const Tensor& dk_, const Tensor& dv_, const Tensor& do_t,
                   const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& o_, bool causal) {
  const int64_t b = q_.size(0), h = q_.size(2), hkv = k_.size(2), lq = q_.size(1), lk = k_.size(1), d = q_.size(3);
  const Dims scores{b, h, lq, lk}, rows{b, h, lq, 1}, scores_t{h * lq * lk, lq * lk, 1, lk};
  const auto io = [&](int64_t uid, const Tensor& t) {
    return g.tensor(uid, CUDNN_DATA_BFLOAT16, dims_of(t), strides_of(t));
  };
  const auto io_transposed = [&](int64_t uid, const Tensor& t) {
    return g.tensor(uid, CUDNN_DATA_BFLOAT16, swapped(dims_of(t)), swapped(strides_of(t)));
  };
  const Value q = io(kQ, q_), kt = io_transposed(kK, k_), vt = io_transposed(kV, v_), o = io(kO, o_);
  const Value do_ = io(kDo, do_t), scale = g.scalar(kScale);
  const Value lse = g.tensor(kStats, CUDNN_DATA_FLOAT, rows, packed(rows));

  // D = rowsum(do o)
  const Value row_sum = g.intermediate(rows), one = g.scalar(kOne);
  g.reduce(CUDNN_REDUCE_TENSOR_ADD, g.binary(CUDNN_POINTWISE_MUL, do_, o), row_sum);
  const Value delta = g.tensor(kDelta, CUDNN_DATA_FLOAT, rows, packed(rows));
  g.pointwise(CUDNN_POINTWISE_MUL, row_sum, &one, nullptr, delta);

  // P = exp(scale q k^T - lse)
  Value s = g.intermediate(scores);
  g.matmul(q, kt, s);
  s = g.binary(CUDNN_POINTWISE_MUL, s, scale);
  s = g.binary(CUDNN_POINTWISE_SUB, s, lse);
  if (causal) s = g.causal(s);
  const Value p = g.unary(CUDNN_POINTWISE_EXP, s);

  // With fewer key heads the products are made per query head and summed.
  const auto key_gradient = [&](const Value& a, const Value& rhs, const Value& out) {
    if (h == hkv) {
      g.matmul(a, rhs, out);
      return;
    }
    const Value every_head = g.intermediate({b, h, lk, d}, CUDNN_DATA_BFLOAT16);
    g.matmul(a, rhs, every_head);
    g.reduce(CUDNN_REDUCE_TENSOR_ADD, every_head, out);
  };
  key_gradient(g.transpose(p, scores_t, CUDNN_DATA_BFLOAT16), do_, io(kDv, dv_));

  // dS = scale P (do v^T - D)
  Value ds = g.intermediate(scores);
  g.matmul(do_, vt, ds);
  ds = g.binary(CUDNN_POINTWISE_SUB, ds, delta);
  ds = g.binary(CUDNN_POINTWISE_MUL, ds, p);
  ds = g.binary(CUDNN_POINTWISE_MUL, ds, scale);
  key_gradient(g.transpose(ds, scores_t, CUDNN_DATA_BFLOAT16), q, io(kDk, dk_));
  g.matmul(ds, g.transpose(kt, strides_of(k_), CUDNN_DATA_BFLOAT16), io(kDq, dq_));
}

std::mutex& cudnn_mutex() {
  static std::mutex m;
  return m;
}

void warn_once(const char* direction, const std::string& reason) {
  static std::set<std::string> said;
  if (said.insert(direction + reason).second)
    fmt::print(stderr, "warning: cuDNN attention {} is not available here, Krait's own kernel serves: {}\n", direction,
               reason);
}

// The plan of this problem, built at its first call; null when cuDNN cannot.
template <class F>
Plan* plan_of(const char* direction, bool causal, const std::vector<Tensor>& tensors, cudnnHandle_t handle, F&& list) {
  static std::map<std::vector<int64_t>, std::unique_ptr<Plan>> plans;
  std::vector<int64_t> key{direction[0], causal, tensors[0].device().index};
  for (const Tensor& t : tensors) {
    for (const int64_t n : t.shape()) key.push_back(n);
    for (const int64_t n : t.strides()) key.push_back(n);
  }
  if (const auto found = plans.find(key); found != plans.end()) return found->second.get();
  auto plan = std::make_unique<Plan>();
  try {
    list(plan->graph);
    plan->build(handle);
  } catch (const Error& e) {
    warn_once(direction, e.what());
    plan.reset();
  }
  return (plans[key] = std::move(plan)).get();
}

bool aligned(const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.raw_data()) % 16 != 0) return false;
  for (int64_t i = 0; i < 3; ++i)
    if (t.stride(i) % 8 != 0) return false;
  return true;
}

// What one call of the backward takes: rows of the batch, and key heads of a row with their query heads. More than one
// row only with all heads. No rows: the workspace of a single key head is too large. lanes: calls side by side.
struct Share {
  int64_t rows, key_heads;
  size_t lanes;
};

// cuDNN keeps dP of every query head, padded to its tiles. Two calls side by side with 512 MiB each take no longer than
// one with everything; smaller ones take longer, the more so the longer the sequence. Shares are as equal as they can
// be: there are at most two sizes, each a plan of its own.
Share backward_share(const Tensor& q, const Tensor& k, int64_t bytes) {
  constexpr int64_t kLane = int64_t{512} << 20;
  const auto padded = [](int64_t l, int64_t to) { return (l + to - 1) / to * to; };
  const int64_t b = q.size(0), hkv = k.size(2);
  const int64_t of_head = q.size(2) / hkv * padded(q.size(1), 64) * padded(k.size(1), 128) * 2, of_row = hkv * of_head;
  const auto equal = [](int64_t all, int64_t most) {
    if (most == 0) return int64_t{0};
    const int64_t parts = (all + most - 1) / most;
    return (all + parts - 1) / parts;
  };
  for (const size_t lanes : {Lanes::kCount, size_t{1}}) {
    const int64_t each = lanes > 1 ? std::min(kLane, bytes / static_cast<int64_t>(lanes)) : bytes;
    if (const int64_t rows = equal(b, each / of_row)) return {rows, hkv, lanes};
    if (const int64_t heads = equal(hkv, each / of_head)) return {1, heads, lanes};
  }
  return {0, 0, 0};
}

int capability(Device device) {
  static std::map<int, int> known;
  const std::lock_guard lock(cudnn_mutex());
  const auto [at, fresh] = known.try_emplace(device.index, 0);
  if (fresh) at->second = device_info(device).compute_capability;
  return at->second;
}

float g_one = 1.0f, g_minus_infinity = -std::numeric_limits<float>::infinity();  // scalars that graphs read

}  // namespace

bool attention_cudnn_supported(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const int64_t lq = q.size(1), lk = k.size(1), d = q.size(3);
  const bool plain = !options.alibi_slopes.defined() && !options.q_segments.defined() &&
                     !options.k_length.defined() && options.window == 0 && options.dropout.p == 0;
  const bool mask = !options.causal || (lq == lk && options.q_offset == 0);
  const size_t version = cudnnGetVersion();
  const bool length = version >= kAnyLengthVersion || (version >= kOldestVersion && lq % 128 == 0 && lk % 128 == 0);
  return q.dtype() == DType::bf16 && plain && mask && length && d % 8 == 0 && d <= 128 && lq > 1 && lk > 1 &&
         aligned(q) && aligned(k) && aligned(v) && capability(q.device()) >= 80;
}

bool attention_cudnn_backward_supported(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const AttentionOptions& options) {
  return attention_cudnn_supported(q, k, v, options) && capability(q.device()) / 10 == 9 &&
         backward_share(q, k, options.vendor_bytes).rows > 0;
}

bool attention_forward_cudnn(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const AttentionOptions& options) {
  const std::lock_guard lock(cudnn_mutex());
  const cudnnHandle_t handle = handle_of(q.device());
  const Plan* plan = plan_of("forward", options.causal, {q, k, v, o}, handle,
                             [&](Graph& g) { list_forward(g, o, q, k, v, options.causal); });
  if (!plan) return false;
  float scale = static_cast<float>(options.scale);
  std::map<int64_t, void*> memory{{kQ, q.raw_data()}, {kK, k.raw_data()},     {kV, v.raw_data()},
                                  {kO, o.raw_data()}, {kStats, lse.raw_data()}, {kScale, &scale}};
  if (options.causal) memory[kMinusInfinity] = &g_minus_infinity;
  plan->execute(handle, plan->scratch(q.device()), memory);
  return true;
}

bool attention_backward_cudnn(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options) {
  for (const Tensor& t : {do_, o, dq, dk, dv})
    if (!aligned(t)) return false;
  const std::lock_guard lock(cudnn_mutex());
  const cudnnHandle_t handle = handle_of(q.device());
  struct Part {
    Tensor q, k, v, o, lse, do_, dq, dk, dv;
    const Plan* plan;
  };
  std::vector<Part> parts;
  const Share share = backward_share(q, k, options.vendor_bytes);
  const int64_t b = q.size(0), hkv = k.size(2), group = q.size(2) / hkv;
  for (int64_t row = 0; row < b; row += share.rows)
    for (int64_t head = 0; head < hkv; head += share.key_heads) {
      const int64_t end_row = std::min(b, row + share.rows), end_head = std::min(hkv, head + share.key_heads);
      const auto keys = [&](const Tensor& t) { return t.slice(0, row, end_row).slice(2, head, end_head); };
      const auto queries = [&](const Tensor& t) {
        return t.slice(0, row, end_row).slice(2, head * group, end_head * group);
      };
      Part p{queries(q), keys(k), keys(v), queries(o), lse.slice(0, row, end_row).slice(1, head * group, end_head * group),
             queries(do_), queries(dq), keys(dk), keys(dv), nullptr};
      p.plan = plan_of("backward", options.causal, {p.q, p.k, p.v, p.o, p.do_, p.dq, p.dk, p.dv}, handle, [&](Graph& g) {
        list_backward(g, p.dq, p.dk, p.dv, p.do_, p.q, p.k, p.v, p.o, options.causal);
      });
      if (!p.plan) return false;
      parts.push_back(std::move(p));
    }
  const size_t count = std::min(parts.size(), share.lanes);
  std::vector<Tensor> scratch(count), delta(count);
  for (size_t i = 0; i < count; ++i) {  // the first part is the largest
    scratch[i] = parts[0].plan->scratch(q.device());
    delta[i] = empty(parts[0].lse.shape(), DType::f32, q.device());
  }
  Lanes& lanes = Lanes::of(q.device());
  lanes.fork(static_cast<cudaStream_t>(current_stream(q.device()).handle), count);
  float scale = static_cast<float>(options.scale);
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& p = parts[i];
    const size_t lane = i % count;
    std::map<int64_t, void*> memory{{kQ, p.q.raw_data()},   {kK, p.k.raw_data()},       {kV, p.v.raw_data()},
                                    {kO, p.o.raw_data()},   {kStats, p.lse.raw_data()}, {kDo, p.do_.raw_data()},
                                    {kDq, p.dq.raw_data()}, {kDk, p.dk.raw_data()},     {kDv, p.dv.raw_data()},
                                    {kScale, &scale},       {kOne, &g_one},             {kDelta, delta[lane].raw_data()}};
    if (options.causal) memory[kMinusInfinity] = &g_minus_infinity;
    check(cudnnSetStream(handle, lanes.stream(lane)));
    p.plan->execute(handle, scratch[lane], memory);
  }
  lanes.join(count);
  return true;
}

std::string attention_cudnn_version() {
  const size_t v = cudnnGetVersion();
  return fmt::format("cuDNN {}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}

}  // namespace krait::kernels::cuda
