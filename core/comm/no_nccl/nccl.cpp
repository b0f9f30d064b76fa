// CUDA tensors in groups of several processes in a build without NCCL.
#include "core/comm/backend.h"
#include "core/comm/job.h"

namespace krait::comm {

NcclStart make_nccl_group(const ProcessGroup& group, Device, const Share&, const Beside&) {
  throw_error(fmt::format("group '{}' of {} ranks: collectives of CUDA tensors need NCCL, which this build lacks; install "
                          "libnccl-dev, or configure with -DNCCL_ROOT=DIR (holding include/nccl.h), and build again",
                          group.name(), group.size()));
}
void watch_device(Device, const std::string&) {}
std::string nccl_version() { return "not in this build"; }

}  // namespace krait::comm
