#pragma once
#include <cstdint>
#include <mutex>
#include <optional>
#include <source_location>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"

/// HDF5 files with every return code checked. Used for token stores and checkpoints.
/// The distribution's library is not thread-safe: every call here holds the process's one HDF5 lock, taken per
/// call (long reads and writes release it between pieces), so objects may be used from any thread.
/// HDF5's own error printing is off; its innermost message is folded into krait::Error.
namespace krait::data::hdf5 {

/// The lock. Take it around direct calls of the C library. Recursive: the functions below may be called under it.
std::recursive_mutex& mutex();

using Id = int64_t;  // hid_t, without its header

/// Element types of data sets. `other` is what this wrapper does not read.
enum class Type : uint8_t { u8, u16, u32, u64, i32, i64, f32, f64, other };
std::string_view name_of(Type type);
int64_t size_of(Type type);

template <class T>
struct type_of_impl;
template <>
struct type_of_impl<uint8_t> {
  static constexpr Type value = Type::u8;
};
template <>
struct type_of_impl<uint16_t> {
  static constexpr Type value = Type::u16;
};
template <>
struct type_of_impl<uint32_t> {
  static constexpr Type value = Type::u32;
};
template <>
struct type_of_impl<uint64_t> {
  static constexpr Type value = Type::u64;
};
template <>
struct type_of_impl<int32_t> {
  static constexpr Type value = Type::i32;
};
template <>
struct type_of_impl<int64_t> {
  static constexpr Type value = Type::i64;
};
template <>
struct type_of_impl<float> {
  static constexpr Type value = Type::f32;
};
template <>
struct type_of_impl<double> {
  static constexpr Type value = Type::f64;
};
template <class T>
inline constexpr Type type_of = type_of_impl<std::remove_cv_t<T>>::value;

/// Throws Error "<what>: <HDF5's innermost message>" when status is negative; returns it otherwise.
Id check(Id status, std::string_view what, std::source_location where = std::source_location::current());

/// Owns one identifier of the library.
class Handle {
 public:
  using Close = int (*)(Id);
  Handle() = default;
  Handle(Id id, Close close) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept;
  ~Handle() { reset(); }
  Id id() const { return id_; }
  bool valid() const { return id_ >= 0; }
  /// Closes; the status is what the library answered (a failed flush shows here).
  int reset() noexcept;

 private:
  Id id_ = -1;
  Close close_ = nullptr;
};

/// What files, groups and data sets have in common: a place in a file, and attributes.
/// Strings are fixed-length UTF-8; keep attributes below 64 KB, longer text belongs in a data set.
class Node {
 public:
  const std::string& file() const { return file_; }
  const std::string& path() const { return path_; }  // "/train/tokens"
  /// "runs/a.h5: /train/tokens", for messages.
  std::string where() const { return file_ + ": " + path_; }
  Id id() const { return handle_.id(); }

  bool has_attribute(const std::string& name) const;
  void set_attribute(const std::string& name, int64_t value);
  void set_attribute(const std::string& name, double value);
  void set_attribute(const std::string& name, std::string_view value);
  void set_attribute(const std::string& name, const char* value) { set_attribute(name, std::string_view(value)); }
  void set_attribute(const std::string& name, int value) { set_attribute(name, int64_t{value}); }
  /// Throw an Error that names file, object and attribute when it is missing or of another kind.
  int64_t int_attribute(const std::string& name) const;
  double double_attribute(const std::string& name) const;
  std::string string_attribute(const std::string& name) const;

 protected:
  Node() = default;
  Node(Handle handle, std::string file, std::string path)
      : handle_(std::move(handle)), file_(std::move(file)), path_(std::move(path)) {}
  Handle handle_;
  std::string file_, path_;
};

struct DatasetOptions {
  std::vector<int64_t> chunk = {};  // empty: contiguous, fixed size
  bool extendable = false;          // the first dimension may grow; needs a chunk
  bool checksum = false;            // Fletcher-32 for each chunk, verified when read; needs a chunk
};

/// An n-dimensional array in row-major order. Rows are slices of the first dimension.
class Dataset : public Node {
 public:
  Dataset() = default;
  Type type() const { return type_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t rows() const { return shape_.empty() ? 1 : shape_[0]; }
  int64_t numel() const;

  /// Reads or writes rows [first, first + count); the buffer holds exactly that many, in `memory_type`, converted
  /// by the library when the stored type differs.
  void read_rows(int64_t first, int64_t count, Type memory_type, void* out) const;
  void write_rows(int64_t first, int64_t count, Type memory_type, const void* in);
  template <class T>
  void read_rows(int64_t first, int64_t count, std::span<T> out) const {
    expect_size(count, static_cast<int64_t>(out.size()));
    read_rows(first, count, type_of<T>, out.data());
  }
  /// The whole array; the number of values must be equal.
  template <class T>
  void read(std::span<T> out) const {
    read_rows(0, rows(), out);
  }
  template <class T>
  std::vector<T> read() const {
    std::vector<T> out(static_cast<size_t>(numel()));
    read_rows(0, rows(), std::span<T>(out));
    return out;
  }
  template <class T>
  void write(std::span<const T> in) {
    expect_size(rows(), static_cast<int64_t>(in.size()));
    write_rows(0, rows(), type_of<T>, in.data());
  }
  /// Adds rows at the end of an extendable data set.
  void append_rows(int64_t count, Type memory_type, const void* in);
  template <class T>
  void append(std::span<const T> in) {
    append_rows(static_cast<int64_t>(in.size()) / row_size(), type_of<T>, in.data());
  }
  int64_t row_size() const;  // values in a row

 private:
  friend class Group;
  Dataset(Handle handle, std::string file, std::string path);
  void expect_size(int64_t rows, int64_t values) const;
  Type type_ = Type::other;
  std::vector<int64_t> shape_;
};

class Group : public Node {
 public:
  Group() = default;
  bool has(const std::string& name) const;  // a group or a data set of that name
  std::vector<std::string> names() const;   // members, sorted
  Group create_group(const std::string& name);
  Group group(const std::string& name) const;  // throws when missing
  Dataset create_dataset(const std::string& name, Type type, const std::vector<int64_t>& shape,
                         const DatasetOptions& options = {});
  Dataset dataset(const std::string& name) const;  // throws when missing

  template <class T>
  void write(const std::string& name, std::span<const T> values, const std::vector<int64_t>& shape,
             const DatasetOptions& options = {}) {
    create_dataset(name, type_of<T>, shape, options).write(values);
  }
  template <class T>
  std::vector<T> read(const std::string& name) const {
    return dataset(name).template read<T>();
  }
  /// Any bytes, as a uint8 data set of one dimension. May be empty.
  void write_bytes(const std::string& name, std::string_view bytes);
  std::string read_bytes(const std::string& name) const;

 protected:
  using Node::Node;
};

/// A file is its root group.
class File : public Group {
 public:
  File() = default;
  /// Replaces what is there. Publish atomically by writing to a temporary name and renaming after close().
  static File create(const std::string& path);
  /// Read-only. `expected` says what the file should be, and how one is made, for the message when it is missing,
  /// not HDF5 or cut short: "a token store (made by `krait data prepare`)".
  static File open(const std::string& path, std::string_view expected);
  /// Flushes and closes; throws when the library cannot (disk full). Objects of the file must be gone.
  /// The destructor closes too, silently: call this for a file that was written.
  void close();

 private:
  using Group::Group;
};

}  // namespace krait::data::hdf5
