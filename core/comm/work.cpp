#include "core/comm/work.h"

namespace krait::comm {

// The last copy waits: no tensor is given back while it is still being read or written.
Work::Work(std::shared_ptr<State> state)
    : state_(state ? std::shared_ptr<State>(state.get(), [owner = state](State* s) mutable {
        s->wait();
        owner.reset();
      }) : nullptr) {}

void Work::wait() {
  if (state_) state_->wait();
}

void check_tensor(const char* collective, const ProcessGroup& group, const Tensor& t) {
  KRAIT_CHECK(t.defined(), "{} of group '{}': the tensor is undefined", collective, group.name());
  KRAIT_CHECK(t.is_contiguous(), "{} of group '{}': {} is not contiguous", collective, group.name(), describe(t));
}

void check_parts(const char* collective, const ProcessGroup& group, const Tensor& whole, const Tensor& piece, int parts) {
  check_tensor(collective, group, whole);
  check_tensor(collective, group, piece);
  check_same(collective, whole, piece);
  KRAIT_CHECK(whole.numel() == piece.numel() * parts && whole.numel() % group.size() == 0,
              "{} of group '{}' of {}: {} does not fit {}", collective, group.name(), group.size(), describe(whole),
              describe(piece));
}

void check_exchange(const ProcessGroup& group, const Tensor& send, int to, const Tensor& receive, int from) {
  const auto is_member = [&](int r) { return r >= 0 && r < group.size(); };
  if (send.defined()) {
    check_tensor("exchange", group, send);
    KRAIT_CHECK(is_member(to), "exchange of group '{}' of {}: no member {}", group.name(), group.size(), to);
  }
  if (receive.defined()) {
    check_tensor("exchange", group, receive);
    KRAIT_CHECK(is_member(from), "exchange of group '{}' of {}: no member {}", group.name(), group.size(), from);
  }
}

void check_root(const char* collective, const ProcessGroup& group, int root) {
  KRAIT_CHECK(root >= 0 && root < group.size(), "{} of group '{}' of {}: no member {}", collective, group.name(),
              group.size(), root);
}

}  // namespace krait::comm
