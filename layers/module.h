#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autograd/variable.h"
#include "core/random.h"

namespace krait::layers {

/// How a parameter gets its first values: called with an fp64 CPU tensor and the key of the parameter's own
/// random stream (run seed and full name), so that values depend on neither device, order nor other parameters.
using Initializer = std::function<void(Tensor& value, uint64_t key)>;
Initializer normal(double std, double mean = 0.0);
Initializer uniform(double low, double high);
Initializer constant(double value);

/// What the optimizer and the precision policy must know of a parameter.
struct ParameterOptions {
  bool decay = true;       // weight decay applies
  double lr_scale = 1.0;   // multiplies the learning rate
  bool keep_fp32 = false;  // used in fp32 also when the model computes in bf16 (norms, decay rates, time steps)
  bool trainable = true;
  bool embedding = false;  // looked up, not multiplied; decayed only with optimizer.decay_embeddings
};

/// [begin, end) of a dimension of a whole parameter. `primary`: this process's copy is the one that counts in norms and
/// is written to checkpoints; of all processes of a tensor group exactly one has it.
struct ShardRange {
  int64_t begin = 0, end = 0;
  bool primary = true;
};

/// What a process of a tensor group holds of a parameter: the ranges, side by side, of one dimension. Several where a
/// matrix has sections that are cut apart (the rows of x and of z). No ranges: the whole, on every process.
struct Shard {
  int64_t dim = 0;
  std::vector<ShardRange> ranges;  // ascending
};
/// The shape that is left of the whole, and the values (a view of `whole` for a single range).
Shape local_shape(const Shape& whole, const Shard& shard);
Tensor local_values(const Tensor& whole, const Shard& shard);

/// One named part of a parameter along its first dimension. Most parameters have a single part; a fused
/// projection (q, k, v) has one per public name, stored as one matrix.
struct ParameterPart {
  std::string name;  // relative to the module: "wq.weight"
  int64_t rows = 0;  // of the whole
  Initializer init;  // of the whole, so that values are those of one process
  Shard shard = {};
};

struct ParameterData {
  std::vector<ParameterPart> parts;
  Shape shape;  // of the whole; `value` has what this process holds
  ParameterOptions options;
  Variable value;  // what layers compute with; undefined until a ParameterStore holds the module
  std::function<void()> before_use;  // makes `value` whole where it is not kept so; empty: always whole
};

/// Handle on a parameter; passes as the Variable of its current value.
class Parameter {
 public:
  Parameter() = default;
  explicit Parameter(std::shared_ptr<ParameterData> data) : data_(std::move(data)) {}
  operator const Variable&() const { return variable(); }  // NOLINT: stands for its value
  const Variable& variable() const;
  bool defined() const { return data_ != nullptr; }
  const Shape& shape() const { return data_->shape; }  // of the whole

 private:
  std::shared_ptr<ParameterData> data_;
};

struct NamedParameter {
  std::string prefix;  // of the module that owns it, with a trailing dot, or empty
  std::shared_ptr<ParameterData> data;
};

/// A part of a model: parameters and submodules in registration order.
class Module {
 public:
  virtual ~Module() = default;
  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  /// All parameters of this module and below, in registration order. Shared ones appear once.
  std::vector<NamedParameter> parameters() const;
  /// Dropout and the like act only in training.
  bool training() const { return training_; }
  void set_training(bool on);
  /// Whether this process's copies of the parameters that no shard names are the primary ones.
  void set_primary(bool on);

 protected:
  /// Shapes are those of the whole parameter.
  Parameter parameter(std::string name, const Shape& shape, Initializer init, ParameterOptions options = {},
                      Shard shard = {});
  /// A fused parameter: parts are stacked along dimension 0, each of shape (rows, trailing...). Parts that are cut
  /// along another dimension must all be, by the same ranges.
  Parameter stacked_parameter(std::vector<ParameterPart> parts, const Shape& trailing, ParameterOptions options = {});
  /// Makes a submodule. An empty name adds its parameters without a prefix of their own.
  template <class M, class... A>
  std::shared_ptr<M> child(std::string name, A&&... arguments) {
    auto module = std::make_shared<M>(std::forward<A>(arguments)...);
    add_child(std::move(name), module);
    return module;
  }
  void add_child(std::string name, std::shared_ptr<Module> module);

 private:
  struct Entry {
    std::string name;
    std::shared_ptr<ParameterData> parameter;  // one of the two
    std::shared_ptr<Module> module;
  };
  void collect(const std::string& prefix, std::vector<NamedParameter>& out) const;
  std::vector<Entry> entries_;
  bool training_ = false;
};

}  // namespace krait::layers
