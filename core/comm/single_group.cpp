#include "core/comm/work.h"

namespace krait::comm {
namespace {

class SingleGroup final : public ProcessGroup {
 public:
  explicit SingleGroup(std::string name) : ProcessGroup(0, 1, std::move(name)) {}

  Work all_reduce(Tensor t, Reduce) override {
    check_tensor("all_reduce", *this, t);
    return {};
  }
  Work all_gather(const Tensor& piece, Tensor whole) override { return copy("all_gather", whole, piece); }
  Work reduce_scatter(const Tensor& whole, Tensor piece) override { return copy("reduce_scatter", piece, whole); }
  Work all_to_all(const Tensor& send, Tensor receive) override { return copy("all_to_all", receive, send); }
  Work broadcast(Tensor t, int root) override {
    check_tensor("broadcast", *this, t);
    check_root("broadcast", *this, root);
    return {};
  }
  Work exchange(const Tensor& send, int to, Tensor receive, int from) override {
    check_exchange(*this, send, to, receive, from);
    KRAIT_CHECK(send.defined() == receive.defined(), "exchange of group '{}' of one: {} alone", name_,
                send.defined() ? "a send" : "a receive");
    return send.defined() ? copy("exchange", receive, send) : Work();
  }
  void barrier() override {}
  GroupPtr split(int, const std::string& name) override { return single_group(name); }

 private:
  Work copy(const char* collective, Tensor& to, const Tensor& from) {
    check_parts(collective, *this, to, from, 1);
    if (to.raw_data() == from.raw_data()) return {};
    Tensor flat = to.view({to.numel()});
    copy_(flat, from.view({from.numel()}));
    return {};
  }
};

}  // namespace

GroupPtr single_group(const std::string& name) { return std::make_shared<SingleGroup>(name); }

}  // namespace krait::comm
