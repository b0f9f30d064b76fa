#include "core/comm/mpi/pmi.h"

#include <cstdio>
#include <cstring>
#include <unordered_map>

#include "core/comm/mpi/frame.h"

namespace krait::comm {
namespace {

constexpr int kSuccess = 0, kFail = -1;

struct Job {
  Star* star = nullptr;
  int rank = 0, size = 1;
  std::vector<std::string> news;  // keys and values in turn, that the other ranks have not seen
  std::unordered_map<std::string, std::string> values;
};
Job job;

int give(int* place, int value) {
  *place = value;
  return kSuccess;
}

int give(char* place, int length, const std::string& text) {
  if (static_cast<size_t>(length) <= text.size()) return kFail;
  std::memcpy(place, text.c_str(), text.size() + 1);
  return kSuccess;
}

}  // namespace

void serve_pmi(Star& star, int rank, int size) { job = {&star, rank, size, {}, {}}; }

}  // namespace krait::comm

using namespace krait::comm;

int PMI_Init(int* spawned) { return give(spawned, 0); }
int PMI_Initialized(int* initialized) { return give(initialized, job.star != nullptr); }
int PMI_Finalize() { return kSuccess; }
int PMI_Abort(int status, const char*) { job.star->end_job(status); }

int PMI_Get_size(int* size) { return give(size, job.size); }
int PMI_Get_rank(int* rank) { return give(rank, job.rank); }
int PMI_Get_universe_size(int* size) { return give(size, job.size); }
int PMI_Get_appnum(int* number) { return give(number, 0); }
int PMI_Get_clique_size(int* size) { return give(size, static_cast<int>(job.star->local_ranks().size())); }
int PMI_Get_clique_ranks(int* ranks, int length) {
  const std::vector<int>& local = job.star->local_ranks();
  if (static_cast<size_t>(length) < local.size()) return kFail;
  std::copy(local.begin(), local.end(), ranks);
  return kSuccess;
}

int PMI_KVS_Get_my_name(char* name, int length) { return give(name, length, "krait"); }
int PMI_KVS_Get_name_length_max(int* length) { return give(length, 64); }
int PMI_KVS_Get_key_length_max(int* length) { return give(length, 256); }
// More than a rank ever puts (some 10 kB): Open MPI 4.1 reads memory that it has freed when it cuts values.
int PMI_KVS_Get_value_length_max(int* length) { return give(length, 1 << 18); }

int PMI_KVS_Put(const char*, const char* key, const char* value) {
  job.news.insert(job.news.end(), {key, value});
  return kSuccess;
}
int PMI_KVS_Commit(const char*) { return kSuccess; }

// What was put before is known to all after it.
int PMI_Barrier() {
  const auto parts = job.star->all_gather(pack(job.news));
  job.news.clear();
  for (const std::string& part : parts) {
    auto news = unpack(part);
    if (!news || news->size() % 2 != 0) return kFail;
    for (size_t i = 0; i < news->size(); i += 2) job.values[(*news)[i]] = std::move((*news)[i + 1]);
  }
  return kSuccess;
}

int PMI_KVS_Get(const char*, const char* key, char* value, int length) {
  const auto found = job.values.find(key);
  return found == job.values.end() ? kFail : give(value, length, found->second);
}
