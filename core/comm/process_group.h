#pragma once
#include <memory>
#include <string>

#include "core/tensor.h"

namespace krait::comm {

enum class Reduce { sum, max };

/// A collective under way. The tensors it was given are kept alive until it has finished.
class Work {
 public:
  struct State;
  Work() = default;
  explicit Work(std::shared_ptr<State> state);
  /// CPU tensors: returns when the result is there. CUDA tensors: the current stream waits, the host does not.
  /// Also done by the destructor of the last copy.
  void wait();

 private:
  std::shared_ptr<State> state_;
};

/// Some of the job's processes, in a fixed order. MPI serves CPU tensors, NCCL serves CUDA tensors (on a stream of its
/// own that starts after the current stream's work; may be captured in a graph).
/// Every member must make the same calls in the same order, with the same shapes and dtypes. Tensors are contiguous and
/// floating (bf16 too) or integer; bf16 sums are rounded once per addition. A group of one copies or does nothing.
/// A failure or a time-out ends the whole job with one message that names rank, group and collective.
class ProcessGroup {
 public:
  virtual ~ProcessGroup() = default;
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }  // "data", "tensor", ...: for messages

  /// t = the sum (maximum) of every member's t, in place.
  [[nodiscard]] virtual Work all_reduce(Tensor t, Reduce op = Reduce::sum) = 0;
  /// whole (size * n elements) = every member's piece (n), in rank order.
  [[nodiscard]] virtual Work all_gather(const Tensor& piece, Tensor whole) = 0;
  /// piece (n) = this member's part of the sum of every member's whole (size * n).
  [[nodiscard]] virtual Work reduce_scatter(const Tensor& whole, Tensor piece) = 0;
  /// Part r of `send` goes to member r; part r of `receive` comes from member r. Equal parts.
  [[nodiscard]] virtual Work all_to_all(const Tensor& send, Tensor receive) = 0;
  [[nodiscard]] virtual Work broadcast(Tensor t, int root) = 0;
  /// Sends to one member and receives from one (a halo, a ring). An undefined tensor: nothing on that side.
  [[nodiscard]] virtual Work exchange(const Tensor& send, int to, Tensor receive, int from) = 0;
  virtual void barrier() = 0;
  /// The members with the same colour, ordered by rank here. A call of all members.
  virtual std::shared_ptr<ProcessGroup> split(int color, const std::string& name) = 0;

 protected:
  ProcessGroup(int rank, int size, std::string name) : rank_(rank), size_(size), name_(std::move(name)) {}
  int rank_, size_;
  std::string name_;
};
using GroupPtr = std::shared_ptr<ProcessGroup>;

/// A group of this process alone; needs no MPI.
GroupPtr single_group(const std::string& name);

/// How the job's processes are laid out: data x sequence x tensor, tensor fastest.
struct Mesh {
  GroupPtr world, data, sequence, tensor;
  GroupPtr replicas;  // data x sequence: the ranks that hold the same piece of the parameters and sum its gradients
};
/// Of one process.
Mesh single_mesh();
/// data * sequence * tensor must be the world's size. A call of all ranks.
Mesh make_mesh(const GroupPtr& world, int data, int sequence, int tensor);

}  // namespace krait::comm
