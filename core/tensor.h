#pragma once
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/shape.h"

namespace krait {
inline namespace core {

/// Bytes on one device, freed with the last tensor that refers to them.
class Storage {
 public:
  Storage(int64_t bytes, Device device);
  /// Memory owned by somebody else; `release` is called with the last reference.
  Storage(void* data, int64_t bytes, Device device, std::shared_ptr<void> keep_alive);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }

 private:
  void* data_;
  int64_t bytes_;
  Device device_;
  std::shared_ptr<void> keep_alive_;
  bool owned_;
};

/// An n-dimensional array: shape, strides (in elements), dtype, device, shared storage.
/// Copying a Tensor copies the view, never the data. Knows nothing of gradients.
class Tensor {
 public:
  Tensor() = default;  // undefined
  Tensor(std::shared_ptr<Storage> storage, Shape shape, std::vector<int64_t> strides, int64_t offset, DType dtype);

  bool defined() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int64_t size(int64_t dim) const { return shape_[dim]; }
  int64_t ndim() const { return shape_.ndim(); }
  int64_t numel() const { return shape_.numel(); }
  const std::vector<int64_t>& strides() const { return strides_; }
  int64_t stride(int64_t dim) const { return strides_[static_cast<size_t>(shape_.wrap(dim))]; }
  int64_t offset() const { return offset_; }
  DType dtype() const { return dtype_; }
  Device device() const;
  int64_t nbytes() const { return numel() * size_of(dtype_); }
  const std::shared_ptr<Storage>& storage() const { return storage_; }
  bool is_contiguous() const;
  /// How many tensors share the storage: 1 means that writing in place is seen by nobody else.
  int64_t use_count() const { return storage_ ? storage_.use_count() : 0; }

  /// Address of element (0, ..., 0). The type must match the dtype.
  template <class T>
  T* data() const {
    KRAIT_ASSERT(dtype_of<T> == dtype_, "a {} tensor was read as {}", dtype_, dtype_of<T>);
    return static_cast<T*>(raw_data());
  }
  void* raw_data() const;

  // Views: share the storage.
  Tensor slice(int64_t dim, int64_t begin, int64_t end) const;
  Tensor select(int64_t dim, int64_t index) const;  // removes the dimension
  Tensor transpose(int64_t a, int64_t b) const;
  Tensor permute(const std::vector<int64_t>& order) const;
  Tensor unsqueeze(int64_t dim) const;
  Tensor squeeze(int64_t dim) const;  // the size must be 1
  /// Size-1 dimensions repeated without copying (stride 0); leading dimensions may be added.
  Tensor expand(const Shape& shape) const;
  /// One size may be -1. Throws when the strides do not allow a view.
  Tensor view(const Shape& shape) const;
  /// A view where possible, else a contiguous copy.
  Tensor reshape(const Shape& shape) const;
  /// (d0, d1, ..., dn) -> (d0*...*dk, rest): all leading dimensions joined, the last `keep` kept.
  Tensor flatten_leading(int64_t keep = 1) const;
  bool can_view(const Shape& shape) const;

  // Copies, unless nothing changes.
  Tensor contiguous() const;
  Tensor to(Device device) const;
  Tensor to(DType dtype) const;
  Tensor clone() const;  // always a contiguous copy
  Tensor cpu() const { return to(kCpu); }

  /// The only value of a one-element tensor, as double. Waits for the device.
  double item() const;
  /// All values in row-major order, converted. Waits for the device.
  template <class T>
  std::vector<T> to_vector() const;

 private:
  std::shared_ptr<Storage> storage_;
  Shape shape_;
  std::vector<int64_t> strides_;
  int64_t offset_ = 0;
  DType dtype_ = DType::f32;
};

std::vector<int64_t> contiguous_strides(const Shape& shape);

// Creation. `empty` leaves the values undefined.
Tensor empty(const Shape& shape, DType dtype, Device device);
Tensor zeros(const Shape& shape, DType dtype, Device device);
Tensor full(const Shape& shape, double value, DType dtype, Device device);
Tensor ones(const Shape& shape, DType dtype, Device device);
Tensor arange(int64_t n, DType dtype, Device device);
inline Tensor empty_like(const Tensor& t) { return empty(t.shape(), t.dtype(), t.device()); }
inline Tensor zeros_like(const Tensor& t) { return zeros(t.shape(), t.dtype(), t.device()); }
inline Tensor empty_like(const Tensor& t, DType dtype) { return empty(t.shape(), dtype, t.device()); }

/// Copies values into a new CPU tensor of dtype_of<T>.
template <class T>
Tensor from_span(std::span<const T> values, const Shape& shape);
template <class T>
Tensor from_vector(const std::vector<T>& values, const Shape& shape) {
  return from_span(std::span<const T>(values), shape);
}
template <class T>
Tensor from_vector(const std::vector<T>& values) {
  return from_vector(values, Shape{static_cast<int64_t>(values.size())});
}

// In place. Any strides, dtypes and devices; shapes must be equal.
/// dst = src, converted. Host-to-device copies of pageable memory wait for the copy, not for the device.
void copy_(Tensor& dst, const Tensor& src);
void fill_(Tensor& t, double value);
inline void zero_(Tensor& t) { fill_(t, 0.0); }

/// "f32 (2, 3) cuda:0", for messages.
std::string describe(const Tensor& t);

/// Same dtype and device, else Error that names the operation and both tensors.
void check_same(std::string_view op, const Tensor& a, const Tensor& b);
template <class... Rest>
void check_same(std::string_view op, const Tensor& a, const Tensor& b, const Rest&... rest) {
  check_same(op, a, b);
  check_same(op, a, rest...);
}

}  // namespace core
}  // namespace krait
