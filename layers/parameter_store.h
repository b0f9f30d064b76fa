#pragma once
#include <functional>
#include <string>
#include <vector>

#include "layers/module.h"

namespace krait::layers {

struct StoreOptions {
  Device device = kCpu;
  DType master = DType::f32;   // f32, or f64 for tests
  DType compute = DType::f32;  // f32, bf16, or f64 with an f64 master
  uint64_t seed = 0;
  /// How the flat buffers are cut for collectives: a bucket ends with the parameter that fills it, and its length is
  /// a multiple of `granule`. 0: one bucket. Embeddings, whose gradients are the backward pass's last, share none with
  /// what follows them.
  int64_t bucket = 0;   // elements
  int64_t granule = 0;  // 0: kAlignment, which divides it
  /// Beside a compute copy, parameters used in fp32 come first, in buckets of their own.
  bool fp32_apart = false;
  bool gradients = true;  // false: values alone, to evaluate and to generate
};

/// All parameters of a model in a few flat buffers, in registration order (but see fp32_apart): one fused optimizer launch, bucketed
/// reduction, trivial sharding. Each parameter begins at a multiple of kAlignment elements; the gaps stay zero.
///   master  (n) fp32: what the optimizer updates and checkpoints hold
///   grad    (n) fp32: backward adds to it; the optimizer zeroes it (undefined without StoreOptions::gradients)
///   compute (n) bf16: copy of master for the matrix products (undefined when compute == master dtype)
class ParameterStore {
 public:
  static constexpr int64_t kAlignment = 64;

  /// Lays out, initialises and binds the module's parameters.
  ParameterStore(Module& module, const StoreOptions& options);

  struct Entry {
    std::string name;        // full name of the first part
    int64_t offset, length;  // in elements of the flat buffers
    Shape shape;             // of what this process holds
    ParameterOptions options;
  };
  const std::vector<Entry>& entries() const { return entries_; }
  /// The variable of an entry, for hooks and other buffers.
  Variable& variable(size_t entry) { return parameters_[entry].data->value; }
  ParameterData& data(size_t entry) { return *parameters_[entry].data; }

  struct Bucket {
    int64_t begin = 0, end = 0;         // of the flat buffers
    size_t first_entry = 0, entries = 0;
    bool fp32 = false;                  // the values that layers use are in master, not in compute
  };
  const std::vector<Bucket>& buckets() const { return buckets_; }
  /// How many there are up to the one with the embedding: those that the forward pass wants first, and of which the
  /// backward pass is done only when it ends. At least 1.
  size_t outer_buckets() const;
  int64_t numel() const { return numel_; }                      // flat length, gaps included
  int64_t parameter_count() const { return parameter_count_; }  // of the whole model, without gaps
  const StoreOptions& options() const { return options_; }

  Tensor& master() { return master_; }
  Tensor& grad() { return grad_; }
  Tensor& compute() { return compute_; }
  /// Keeps of the master weights only those in fp32 buckets, which come first (fp32_apart), in their place: somebody
  /// else updates the masters and writes compute.
  void release_masters();
  /// Moves gradients (compute copies) into a buffer of the same length and dtype.
  void move_grads(Tensor to);
  void move_compute(Tensor to);
  /// Lets the gradients go: `make` gives an entry's buffer, zeroed, when the first contribution comes.
  void release_grads(const std::function<Tensor(size_t entry)>& make);
  /// Lets the values that layers use go, and what holds them: somebody else sets them before each use.
  void release_values();
  /// An entry in a buffer laid out like the flat ones from element `begin` on.
  Tensor view(const Tensor& buffer, size_t entry, int64_t begin = 0) const;
  /// compute = master, rounded. After loading; the optimizer keeps both in step otherwise.
  void refresh_compute();

  struct NamedTensor {
    std::string name;
    Tensor value;
  };
  /// Views into the buffers, one per public name (parts of fused parameters apart).
  std::vector<NamedTensor> named_masters() const { return named(master_); }
  std::vector<NamedTensor> named_grads() const { return named(grad_); }
  /// The same cut of any buffer that is laid out like them (optimizer state).
  std::vector<NamedTensor> named(const Tensor& flat) const;
  /// With what a part is of the whole: local range k of `value` along shard.dim is range k of the whole parameter.
  /// shard.ranges is never empty; a scalar's is {0, 1} of a dimension it has not.
  struct NamedPart {
    std::string name;
    Tensor value;
    Shape whole;
    Shard shard;
  };
  std::vector<NamedPart> parts(const Tensor& flat) const;
  /// The flat ranges [begin, end), joined where they touch, of elements whose copy here is the primary one: what this
  /// process adds to a norm over all processes of its tensor group. Gaps, which are zero, may be inside.
  std::vector<std::pair<int64_t, int64_t>> primary_ranges() const;
  /// The parameter with this public name; throws with the known names otherwise.
  Tensor named_master(const std::string& name) const;

 private:
  StoreOptions options_;
  std::vector<Entry> entries_;
  std::vector<NamedParameter> parameters_;
  std::vector<Bucket> buckets_;
  int64_t numel_ = 0, parameter_count_ = 0;
  Tensor master_, grad_, compute_;
};

}  // namespace krait::layers
