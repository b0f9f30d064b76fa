#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/error.h"

namespace krait {
inline namespace core {

/// Sizes of a tensor's dimensions, outermost first. All indexing is 64-bit.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : dims_(dims) {}
  explicit Shape(std::vector<int64_t> dims) : dims_(std::move(dims)) {}

  int64_t ndim() const { return static_cast<int64_t>(dims_.size()); }
  int64_t numel() const;
  /// Negative indices count from the end.
  int64_t operator[](int64_t dim) const { return dims_[static_cast<size_t>(wrap(dim))]; }
  int64_t& operator[](int64_t dim) { return dims_[static_cast<size_t>(wrap(dim))]; }
  /// dim in [-ndim, ndim) to [0, ndim); throws otherwise.
  int64_t wrap(int64_t dim) const;

  Shape drop_last(int64_t count = 1) const;      // without the last dimensions
  Shape append(int64_t size) const;              // one more trailing dimension
  Shape with(int64_t dim, int64_t size) const;   // one size replaced
  Shape without(int64_t dim) const;              // one dimension removed
  Shape inserted(int64_t dim, int64_t size) const;

  const std::vector<int64_t>& dims() const { return dims_; }
  auto begin() const { return dims_.begin(); }
  auto end() const { return dims_.end(); }
  void push_back(int64_t size) { dims_.push_back(size); }
  std::string str() const;  // "(2, 3, 4)"
  friend bool operator==(const Shape&, const Shape&) = default;

 private:
  std::vector<int64_t> dims_;
};

/// NumPy broadcasting of two shapes; throws naming both when they do not fit.
Shape broadcast_shapes(const Shape& a, const Shape& b);

}  // namespace core
}  // namespace krait

template <>
struct fmt::formatter<krait::Shape> : fmt::formatter<fmt::string_view> {
  template <class Context>
  auto format(const krait::Shape& shape, Context& ctx) const {
    return fmt::formatter<fmt::string_view>::format(shape.str(), ctx);
  }
};
