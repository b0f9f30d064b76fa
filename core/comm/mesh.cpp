#include "core/comm/process_group.h"

namespace krait::comm {

Mesh single_mesh() {
  return {single_group("world"), single_group("data"), single_group("sequence"), single_group("tensor"),
          single_group("replicas")};
}

Mesh make_mesh(const GroupPtr& world, int data, int sequence, int tensor) {
  KRAIT_CHECK(data >= 1 && sequence >= 1 && tensor >= 1 && int64_t{data} * sequence * tensor == world->size(),
              "a mesh of data {} x sequence {} x tensor {} has {} ranks, but {} were started", data, sequence, tensor,
              int64_t{data} * sequence * tensor, world->size());
  if (world->size() == 1) return single_mesh();
  const int t = world->rank() % tensor, s = world->rank() / tensor % sequence, d = world->rank() / (tensor * sequence);
  const auto along = [&](int size, int color, const char* name) {
    return size == 1 ? single_group(name) : world->split(color, name);
  };
  return {world, along(data, s * tensor + t, "data"), along(sequence, d * tensor + t, "sequence"),
          along(tensor, d * sequence + s, "tensor"), along(data * sequence, t, "replicas")};
}

}  // namespace krait::comm
