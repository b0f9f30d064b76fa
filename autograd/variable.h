#pragma once
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace krait {
inline namespace autograd {

class Variable;
/// Gradients for the inputs of a recorded function, in their order. An undefined tensor means zero, or that the
/// function has already added its part to the input's gradient buffer (see Variable::accumulates_in_place).
using Grads = std::vector<Tensor>;
using Vars = std::vector<Variable>;

/// A tensor and its place on the tape. Copies share both.
class Variable {
 public:
  Variable() = default;
  /// A leaf. With requires_grad its gradient is collected by backward().
  explicit Variable(Tensor data, bool requires_grad = false);

  bool defined() const { return node_ != nullptr || data_.defined(); }
  const Tensor& data() const { return data_; }
  const Shape& shape() const { return data_.shape(); }
  int64_t size(int64_t dim) const { return data_.size(dim); }
  int64_t ndim() const { return data_.ndim(); }
  DType dtype() const { return data_.dtype(); }
  Device device() const { return data_.device(); }
  bool requires_grad() const { return node_ != nullptr; }
  bool is_leaf() const;
  /// Same value, off the tape.
  Variable detach() const { return Variable(data_); }

  /// Collected gradient of a leaf; undefined before the first backward unless a buffer was given.
  const Tensor& grad() const;
  /// Gives the leaf a buffer that backward() adds to: any floating dtype (fp32 for bf16 parameters), same shape.
  void set_grad(Tensor buffer);
  /// The same with a buffer that is made (zeroed, by `make`) when it is first asked for; drop_grad() lets it go, and
  /// the next backward pass makes another.
  void set_grad_source(std::function<Tensor()> make);
  void drop_grad();
  void clear_grad();
  /// True when this is a leaf whose gradient buffer is set: a backward function may then add its part to grad()
  /// itself (a matrix product with beta = 1, a scatter) and return an undefined tensor for this input.
  bool accumulates_in_place() const;
  /// grad() where accumulates_in_place(), else undefined.
  Tensor grad_in_place() const { return accumulates_in_place() ? grad() : Tensor(); }
  /// Called after a leaf's gradient received its last contribution of a backward pass (reduction overlap).
  void on_grad_ready(std::function<void()> hook);

  /// Replaces the value of a leaf, e.g. by a view into flat parameter storage.
  void set_data(Tensor data);

  struct Node;
  const std::shared_ptr<Node>& node() const { return node_; }
  size_t output_index() const { return index_; }

 private:
  friend Variable make_output(Tensor, std::shared_ptr<Node>, size_t);
  Tensor data_;
  std::shared_ptr<Node> node_;  // producer, or the leaf's own node; null when no gradient is wanted
  size_t index_ = 0;            // which output of the producer
};

using BackwardOne = std::function<Grads(const Tensor& dy)>;
/// Output gradients come in the order of the outputs; an undefined tensor means that output was not used.
using BackwardMany = std::function<Grads(const std::vector<Tensor>& dy)>;

/// Puts a computed output on the tape when any input requires a gradient (and recording is on).
/// The closure may hold tensors it needs; it is destroyed as soon as it has run.
Variable record(std::string_view name, const Vars& inputs, const Tensor& output, BackwardOne backward);
Vars record(std::string_view name, const Vars& inputs, const std::vector<Tensor>& outputs, BackwardMany backward);
/// For a function without a gradient: throws when an input requires one and recording is on.
void require_no_grad(std::string_view name, const Vars& inputs);

/// Runs the tape from `loss` (one value; dloss = 1, or `seed` of the loss's shape for any output) and frees it on
/// the way: a node's saved tensors go as soon as its backward has run. Gradients of leaves are added up.
/// Functions run in reverse order of recording, so results do not depend on timing.
void backward(const Variable& loss, const Tensor& seed = {});
void backward(const Vars& outputs, const std::vector<Tensor>& seeds);

/// While alive, nothing is recorded on this thread.
class NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool previous_;
};
bool recording();
/// Whether a function of these inputs goes on the tape, so that what its backward needs is worth keeping.
bool wants_grad(const Vars& inputs);

/// Activation checkpointing (Chen et al. 2016): runs f without recording and again, recorded, in backward.
/// f must depend on its inputs and parameters alone; random numbers repeat because they are counter-based.
Vars recompute(const std::function<Vars(const Vars&)>& f, const Vars& inputs);

}  // namespace autograd
}  // namespace krait
