#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

// Exchanges between the members of a group over which sequences lie in contiguous pieces: member s holds positions
// [s l, (s + 1) l) of each, as x (b, l, ...). Every member makes the same calls in the same order, also in backward.

/// The `rows` positions in front of the own piece, (b, rows, ...): zeros before the sequence's start. Pieces shorter
/// than `rows` come from several members. With segments (b, l) int32, the documents of x, rows of another document
/// than that of the piece's first position are zero: what a causal convolution takes as its initial state.
/// dx = what the halos of the members to the right send back. Undefined in a group of one and for rows = 0.
Variable halo_from_left(const Variable& x, int64_t rows, const comm::GroupPtr& group, const Tensor& segments = {});

/// The same for functions that hold x, and its gradient, inside wider tensors: on tensors of any strides, off the tape.
class LeftHalo {
 public:
  LeftHalo() = default;
  LeftHalo(const Tensor& x, int64_t rows, const comm::GroupPtr& group, const Tensor& segments);
  /// Undefined as above.
  const Tensor& rows() const { return rows_; }
  /// What a causal convolution takes as its initial state: the halo, or `carried` (may be undefined), which belongs in front
  /// of the first member's piece.
  Tensor history(const Tensor& carried) const;
  /// dx += what the halos of the members to the right send back. A call of all members.
  void add_gradient(const Tensor& dx, const Tensor& dhalo) const;

 private:
  Tensor masked(const Tensor& t) const;
  comm::GroupPtr group_;
  int64_t length_ = 0;
  Tensor rows_, kept_;  // kept (b, rows, 1, ...): 1 where the document goes on in the own piece
};

/// Throws where pieces are too short for a state that is carried into them: a halo of `rows` reaches beyond the first.
void check_halo_with_carried(int64_t length, int64_t rows, const comm::ProcessGroup& group);

// A chain of values from each member to its right neighbour, for recurrences that cannot be split otherwise.
/// The state that the left neighbour hands on with send_right; its gradient goes back there. Undefined on member 0,
/// which starts from zero. `like`: a variable of the computation that the state enters; it gets no gradient from here.
Variable receive_from_left(const Variable& like, const Shape& shape, DType dtype, const comm::GroupPtr& group);
/// Hands `state` to the right neighbour (the last member: to nobody) and returns y, by which the state's gradient, when
/// it comes back, takes part in this member's backward.
Variable send_right(const Variable& y, const Variable& state, const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait
