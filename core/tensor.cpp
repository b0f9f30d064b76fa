#include "core/tensor.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/allocator.h"
#include "core/copy.h"
#include "core/stream.h"

namespace krait::core {

Storage::Storage(int64_t bytes, Device device)
    : data_(allocator(device).allocate(static_cast<size_t>(bytes))), bytes_(bytes), device_(device), owned_(true) {}

Storage::Storage(void* data, int64_t bytes, Device device, std::shared_ptr<void> keep_alive)
    : data_(data), bytes_(bytes), device_(device), keep_alive_(std::move(keep_alive)), owned_(false) {}

Storage::~Storage() {
  if (owned_ && data_) allocator(device_).deallocate(data_);
}

Tensor::Tensor(std::shared_ptr<Storage> storage, Shape shape, std::vector<int64_t> strides, int64_t offset, DType dtype)
    : storage_(std::move(storage)), shape_(std::move(shape)), strides_(std::move(strides)), offset_(offset),
      dtype_(dtype) {
  KRAIT_ASSERT(static_cast<int64_t>(strides_.size()) == shape_.ndim());
}

Device Tensor::device() const {
  KRAIT_ASSERT(defined(), "device() of an undefined tensor.");
  return storage_->device();
}

void* Tensor::raw_data() const {
  KRAIT_ASSERT(defined(), "data() of an undefined tensor.");
  return static_cast<std::byte*>(storage_->data()) + offset_ * size_of(dtype_);
}

std::vector<int64_t> contiguous_strides(const Shape& shape) {
  std::vector<int64_t> strides(static_cast<size_t>(shape.ndim()));
  int64_t step = 1;
  for (int64_t i = shape.ndim() - 1; i >= 0; --i) {
    strides[static_cast<size_t>(i)] = step;
    step *= std::max<int64_t>(shape[i], 1);
  }
  return strides;
}

bool Tensor::is_contiguous() const {
  if (numel() == 0) return true;
  int64_t step = 1;
  for (int64_t i = ndim() - 1; i >= 0; --i) {
    if (size(i) == 1) continue;
    if (stride(i) != step) return false;
    step *= size(i);
  }
  return true;
}

Tensor Tensor::slice(int64_t dim, int64_t begin, int64_t end) const {
  KRAIT_CHECK(begin >= 0 && begin <= end && end <= size(dim), "slice [{}, {}) is out of range for dimension {} of {}",
              begin, end, dim, shape_);
  return {storage_, shape_.with(dim, end - begin), strides_, offset_ + begin * stride(dim), dtype_};
}

Tensor Tensor::select(int64_t dim, int64_t index) const {
  const int64_t i = index < 0 ? index + size(dim) : index;
  return slice(dim, i, i + 1).squeeze(dim);
}

Tensor Tensor::transpose(int64_t a, int64_t b) const {
  std::vector<int64_t> order(static_cast<size_t>(ndim()));
  std::iota(order.begin(), order.end(), 0);
  std::swap(order[static_cast<size_t>(shape_.wrap(a))], order[static_cast<size_t>(shape_.wrap(b))]);
  return permute(order);
}

Tensor Tensor::permute(const std::vector<int64_t>& order) const {
  KRAIT_CHECK(static_cast<int64_t>(order.size()) == ndim(), "permute of {} got {} dimensions", shape_, order.size());
  Shape shape;
  std::vector<int64_t> strides;
  std::vector<bool> seen(order.size(), false);
  for (const int64_t d : order) {
    const auto w = static_cast<size_t>(shape_.wrap(d));
    KRAIT_CHECK(!seen[w], "permute of {} names dimension {} twice", shape_, d);
    seen[w] = true;
    shape.push_back(shape_[d]);
    strides.push_back(strides_[w]);
  }
  return {storage_, std::move(shape), std::move(strides), offset_, dtype_};
}

Tensor Tensor::unsqueeze(int64_t dim) const {
  const int64_t at = dim < 0 ? dim + ndim() + 1 : dim;
  std::vector<int64_t> strides = strides_;
  const Shape shape = shape_.inserted(at, 1);
  strides.insert(strides.begin() + at, at < ndim() ? size(at) * stride(at) : 1);
  return {storage_, shape, std::move(strides), offset_, dtype_};
}

Tensor Tensor::squeeze(int64_t dim) const {
  KRAIT_CHECK(size(dim) == 1, "squeeze: dimension {} of {} is not 1", dim, shape_);
  std::vector<int64_t> strides = strides_;
  strides.erase(strides.begin() + shape_.wrap(dim));
  return {storage_, shape_.without(dim), std::move(strides), offset_, dtype_};
}

Tensor Tensor::expand(const Shape& shape) const {
  KRAIT_CHECK(shape.ndim() >= ndim(), "expand: {} has more dimensions than {}", shape_, shape);
  std::vector<int64_t> strides(static_cast<size_t>(shape.ndim()), 0);
  for (int64_t i = 1; i <= ndim(); ++i) {
    KRAIT_CHECK(size(-i) == shape[-i] || size(-i) == 1, "expand: {} does not expand to {}", shape_, shape);
    strides[static_cast<size_t>(shape.ndim() - i)] = size(-i) == shape[-i] ? stride(-i) : 0;
  }
  return {storage_, shape, std::move(strides), offset_, dtype_};
}

namespace {
Shape resolve(const Shape& wanted, int64_t numel) {
  Shape out = wanted;
  int64_t known = 1, hole = -1;
  for (int64_t i = 0; i < out.ndim(); ++i) {
    if (out[i] == -1) {
      KRAIT_CHECK(hole < 0, "view: more than one -1 in {}", wanted);
      hole = i;
    } else {
      known *= out[i];
    }
  }
  if (hole >= 0) {
    KRAIT_CHECK(known > 0 && numel % known == 0, "view: {} values do not fill {}", numel, wanted);
    out[hole] = numel / known;
  }
  KRAIT_CHECK(out.numel() == numel, "view: {} values do not fill {}", numel, wanted);
  return out;
}

// Strides of `to` over the same memory, or nothing when a copy is needed.
std::optional<std::vector<int64_t>> view_strides(const Shape& from, const std::vector<int64_t>& strides,
                                                 const Shape& to) {
  if (from.numel() == 0) return contiguous_strides(to);
  std::vector<int64_t> out(static_cast<size_t>(to.ndim()), 0);
  int64_t j = to.ndim() - 1;
  for (int64_t i = from.ndim() - 1; i >= 0;) {
    // Join source dimensions that are adjacent in memory into one run.
    const int64_t base = strides[static_cast<size_t>(i)];
    int64_t run = from[i];
    while (--i >= 0 && (from[i] == 1 || run == 1 || strides[static_cast<size_t>(i)] == run * base)) {
      if (run == 1 && from[i] != 1) break;
      run *= from[i];
    }
    int64_t filled = 1;
    while (j >= 0 && filled < run) {
      out[static_cast<size_t>(j)] = filled * base;
      filled *= to[j--];
    }
    while (j >= 0 && to[j] == 1) out[static_cast<size_t>(j--)] = filled * base;
    if (filled != run) return std::nullopt;
  }
  while (j >= 0) out[static_cast<size_t>(j--)] = 1;
  return out;
}
}  // namespace

bool Tensor::can_view(const Shape& wanted) const {
  return view_strides(shape_, strides_, resolve(wanted, numel())).has_value();
}

Tensor Tensor::view(const Shape& wanted) const {
  const Shape to = resolve(wanted, numel());
  auto strides = view_strides(shape_, strides_, to);
  KRAIT_CHECK(strides.has_value(), "view: {} with these strides has no view as {}; use reshape", shape_, to);
  return {storage_, to, std::move(*strides), offset_, dtype_};
}

Tensor Tensor::reshape(const Shape& wanted) const {
  return can_view(wanted) ? view(wanted) : contiguous().view(wanted);
}

Tensor Tensor::flatten_leading(int64_t keep) const {
  KRAIT_CHECK(keep <= ndim(), "flatten_leading: {} has fewer than {} dimensions", shape_, keep);
  int64_t rows = 1;
  for (int64_t i = 0; i < ndim() - keep; ++i) rows *= size(i);
  Shape out{rows};
  for (int64_t i = ndim() - keep; i < ndim(); ++i) out.push_back(size(i));
  return reshape(out);
}

Tensor Tensor::contiguous() const { return is_contiguous() ? *this : clone(); }

Tensor Tensor::clone() const {
  Tensor out = empty(shape_, dtype_, device());
  copy_(out, *this);
  return out;
}

Tensor Tensor::to(Device target) const {
  if (target == device()) return *this;
  Tensor out = empty(shape_, dtype_, target);
  copy_(out, *this);
  return out;
}

Tensor Tensor::to(DType dtype) const {
  if (dtype == dtype_) return *this;
  Tensor out = empty(shape_, dtype, device());
  copy_(out, *this);
  return out;
}

double Tensor::item() const {
  KRAIT_CHECK(numel() == 1, "item() needs one value, found {}", shape_);
  return to(kCpu).to(DType::f64).data<double>()[0];
}

template <class T>
std::vector<T> Tensor::to_vector() const {
  const Tensor host = to(kCpu).to(dtype_of<T>).contiguous();
  std::vector<T> out(static_cast<size_t>(host.numel()));
  std::copy_n(host.data<T>(), host.numel(), out.begin());
  return out;
}
template std::vector<float> Tensor::to_vector<float>() const;
template std::vector<double> Tensor::to_vector<double>() const;
template std::vector<int32_t> Tensor::to_vector<int32_t>() const;
template std::vector<int64_t> Tensor::to_vector<int64_t>() const;
template std::vector<uint8_t> Tensor::to_vector<uint8_t>() const;

Tensor empty(const Shape& shape, DType dtype, Device device) {
  int64_t bytes = size_of(dtype);
  for (const int64_t d : shape) {
    KRAIT_CHECK(d >= 0, "a tensor of shape {} has a negative size", shape);
    KRAIT_CHECK(!__builtin_mul_overflow(bytes, d, &bytes), "a tensor of shape {} is larger than any memory", shape);
  }
  auto storage = std::make_shared<Storage>(bytes, device);
  return {std::move(storage), shape, contiguous_strides(shape), 0, dtype};
}

Tensor zeros(const Shape& shape, DType dtype, Device device) { return full(shape, 0.0, dtype, device); }
Tensor ones(const Shape& shape, DType dtype, Device device) { return full(shape, 1.0, dtype, device); }

Tensor full(const Shape& shape, double value, DType dtype, Device device) {
  Tensor out = empty(shape, dtype, device);
  fill_(out, value);
  return out;
}

Tensor arange(int64_t n, DType dtype, Device device) {
  Tensor out = empty({n}, dtype, device);
  if (n > 0) KRAIT_DISPATCH(device, arange(out));
  return out;
}

template <class T>
Tensor from_span(std::span<const T> values, const Shape& shape) {
  KRAIT_CHECK(static_cast<int64_t>(values.size()) == shape.numel(), "from_span: {} values do not fill {}",
              values.size(), shape);
  Tensor out = empty(shape, dtype_of<T>, kCpu);
  std::copy(values.begin(), values.end(), out.data<T>());
  return out;
}
template Tensor from_span<float>(std::span<const float>, const Shape&);
template Tensor from_span<double>(std::span<const double>, const Shape&);
template Tensor from_span<bf16>(std::span<const bf16>, const Shape&);
template Tensor from_span<int32_t>(std::span<const int32_t>, const Shape&);
template Tensor from_span<int64_t>(std::span<const int64_t>, const Shape&);
template Tensor from_span<uint8_t>(std::span<const uint8_t>, const Shape&);

void copy_(Tensor& dst, const Tensor& src) {
  KRAIT_CHECK(dst.shape() == src.shape(), "copy_: shapes differ: {} from {}", dst.shape(), src.shape());
  if (src.numel() == 0) return;
  if (dst.device() == src.device()) {
    KRAIT_DISPATCH(dst.device(), strided_copy(dst, src));
    return;
  }
  // Across devices only whole, contiguous blocks of one dtype travel; the rest happens on the source or target.
  const Tensor packed = src.to(dst.dtype()).contiguous();
  if (dst.is_contiguous()) {
#if KRAIT_WITH_CUDA
    cuda::transfer(dst.raw_data(), dst.device(), packed.raw_data(), packed.device(), packed.nbytes());
#else
    throw_no_cuda();
#endif
    return;
  }
  const Tensor staged = packed.to(dst.device());
  copy_(dst, staged);
}

void fill_(Tensor& t, double value) {
  if (t.numel() > 0) KRAIT_DISPATCH(t.device(), fill(t, value));
}

std::string describe(const Tensor& t) {
  return t.defined() ? fmt::format("{} {} {}", t.dtype(), t.shape(), t.device()) : "undefined";
}

void check_same(std::string_view op, const Tensor& a, const Tensor& b) {
  const fmt::string_view name(op.data(), op.size());
  KRAIT_CHECK(a.device() == b.device(), "{}: tensors on two devices: {} and {}", name, describe(a), describe(b));
  KRAIT_CHECK(a.dtype() == b.dtype(), "{}: dtypes differ: {} and {}", name, describe(a), describe(b));
}

}  // namespace krait::core
