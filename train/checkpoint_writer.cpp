#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <future>
#include <nlohmann/json.hpp>
#include <thread>

#include "data/hdf5.h"
#include "train/agreement.h"
#include "train/build_info.h"
#include "train/checkpoint.h"
#include "train/checkpoint_format.h"
#include "train/crc32c.h"
#include "train/files.h"
#include "train/progress.h"

namespace krait::train {
namespace fs = std::filesystem;
namespace hdf5 = data::hdf5;
namespace {

// Hidden names of what is not yet, or no longer, a checkpoint.
constexpr const char* kUnfinished = ".writing-";
constexpr const char* kRemoved = ".removed-";

std::string shard_name(int rank, int size) { return fmt::format("shard-{:04d}-of-{:04d}.h5", rank, size); }
// What a rank leaves beside its file to tell rank 0 that it is complete, or will never be.
std::string done_name(int rank) { return fmt::format(".done-{:04d}", rank); }
std::string failed_name(int rank) { return fmt::format(".failed-{:04d}", rank); }

void remove_quietly(const std::string& path) {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

/// A checkpoint disappears at once, however long deleting its files takes.
void remove_checkpoint(const std::string& directory, const std::string& name) {
  const std::string doomed = directory + "/" + kRemoved + name;
  remove_quietly(doomed);
  if (::rename((directory + "/" + name).c_str(), doomed.c_str()) == 0) remove_quietly(doomed);
}

void check_space(const std::string& directory, int64_t bytes) {
  const fs::space_info space = fs::space(directory);
  if (space.available < static_cast<uintmax_t>(bytes)) {
    throw Error(fmt::format("{}: disk full: needs {}, {} free", directory, human_bytes(bytes),
                            human_bytes(static_cast<int64_t>(space.available))));
  }
}

std::string piece_json(const TensorPiece& p) {
  return nlohmann::ordered_json{{"shape", p.whole.dims()}, {"dim", p.dim}, {"ranges", p.ranges}, {"flat", p.flat}}.dump();
}

void write_shard(const std::string& path, const std::vector<NamedTensor>& tensors, const std::string& meta) {
  hdf5::File file = hdf5::File::create(path);
  file.set_attribute("format", checkpoint::kFormat);
  file.set_attribute("format_version", checkpoint::kVersion);
  file.write_bytes("meta", meta);
  {
    hdf5::Group group = file.create_group("tensors");
    for (const NamedTensor& t : tensors) {
      const hdf5::Type type = checkpoint::storage_type(t.value.dtype());
      const Tensor local = t.value.cpu().contiguous(), value = t.piece ? local.view({-1}) : local;
      hdf5::Dataset dataset = group.create_dataset(t.name, type, value.shape().dims());
      dataset.set_attribute("dtype", name_of(value.dtype()));
      if (t.piece) dataset.set_attribute("piece", piece_json(*t.piece));
      if (value.numel() > 0) dataset.write_rows(0, dataset.rows(), type, value.raw_data());
    }
  }
  file.close();
  FileDescriptor::open(path, O_RDONLY).sync();
}

/// Renames `from` to `to`; a checkpoint already there is exchanged in the same instant and then removed.
void publish(const std::string& directory, const std::string& from, const std::string& name) {
  const std::string to = directory + "/" + name;
  if (::rename(from.c_str(), to.c_str()) < 0) {
    if (errno != EEXIST && errno != ENOTEMPTY) check_posix(-1, to + ": cannot be published");
    if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) {
      remove_quietly(from);
    } else {  // a file system without exchange
      remove_checkpoint(directory, name);
      check_posix(::rename(from.c_str(), to.c_str()), to + ": cannot be published");
    }
  }
  sync_directory(directory);
}

void point_best_at(const std::string& directory, const std::string& name) {
  const std::string temporary = directory + "/" + kUnfinished + "best";
  ::unlink(temporary.c_str());
  check_posix(::symlink(name.c_str(), temporary.c_str()), temporary + ": cannot be made");
  check_posix(::rename(temporary.c_str(), (directory + "/best").c_str()), directory + "/best: cannot be replaced");
  sync_directory(directory);
}

}  // namespace

struct CheckpointWriter::Job {
  int64_t step = 0, bytes = 0;  // bytes: of all ranks
  std::vector<NamedTensor> tensors;
  std::string meta, unfinished;  // the hidden directory
  bool is_best = false;
  std::thread thread;
  std::promise<void> wrote;  // the own file; then rank 0 goes on to publish
  std::future<void> written = wrote.get_future();
  std::atomic<bool> cancelled{false}, failed{false};
  std::exception_ptr publish_error;
};

namespace {

Error write_error(int64_t step, const std::string& what) {
  return Error(fmt::format("the checkpoint of step {} could not be written: {}\n"
                           "       earlier checkpoints are untouched; once that is mended, continue with --resume", step, what));
}

}  // namespace

CheckpointWriter::CheckpointWriter(std::string directory, const CheckpointOptions& options, comm::GroupPtr world)
    : directory_(std::move(directory)), options_(options), world_(std::move(world)) {
  if (world_->rank() > 0) return;
  fs::create_directories(directory_);
  check_posix(::access(directory_.c_str(), W_OK | X_OK), directory_ + ": checkpoints cannot be written there");
  std::vector<std::string> leftovers;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory_)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kUnfinished) || name.starts_with(kRemoved)) leftovers.push_back(entry.path().string());
  }
  for (const std::string& path : leftovers) remove_quietly(path);
}

CheckpointWriter::~CheckpointWriter() {
  if (!job_) return;
  if (world_->size() > 1) job_->cancelled = true;
  job_->thread.join();
}

void CheckpointWriter::save(int64_t step, const std::vector<NamedTensor>& tensors, const std::string& meta, bool is_best) {
  finish();
  auto job = std::make_unique<Job>();
  job->step = step;
  job->meta = meta;
  job->is_best = is_best;
  job->unfinished = directory_ + "/" + kUnfinished + checkpoint_name(step);
  job->bytes = 1 << 16;
  for (const NamedTensor& t : tensors) job->bytes += t.value.nbytes();
  if (world_->size() > 1) {  // the others need the directory; a single rank makes it on the writer's thread
    const Tensor total = full({1}, static_cast<double>(job->bytes), DType::f64, kCpu);
    world_->all_reduce(total).wait();
    job->bytes = static_cast<int64_t>(total.data<double>()[0]);
    std::exception_ptr failure;
    try {
      if (world_->rank() == 0) prepare(*job);
    } catch (const std::exception& e) {
      failure = std::make_exception_ptr(write_error(step, e.what()));
    }
    throw_together(*world_, failure);
  }

  job->tensors.reserve(tensors.size());
  for (const NamedTensor& t : tensors) {
    const bool copy = options_.async && t.value.device().is_cpu();
    job->tensors.push_back({t.name, copy ? t.value.clone() : t.value.cpu(), t.piece});
  }
  job_ = std::move(job);
  start(*job_);
  if (!options_.async) finish();
}

void CheckpointWriter::prepare(const Job& job) {
  check_space(directory_, job.bytes);
  remove_quietly(job.unfinished);
  fs::create_directory(job.unfinished);
}

void CheckpointWriter::start(Job& job) {
  job.thread = std::thread([this, &job] {
    const int rank = world_->rank();
    try {
      if (world_->size() == 1) prepare(job);
      const std::string file = job.unfinished + "/" + shard_name(rank, world_->size());
      write_shard(file, job.tensors, job.meta);
      int64_t bytes = 0;
      const uint32_t crc = crc32c_file(file, &bytes);
      write_file_atomic(job.unfinished + "/" + done_name(rank),
                        nlohmann::json{{"bytes", bytes}, {"crc32c", fmt::format("{:08x}", crc)}, {"tensors", job.tensors.size()}}.dump());
      job.wrote.set_value();
    } catch (const std::exception& e) {
      const int fd = ::open((job.unfinished + "/" + failed_name(rank)).c_str(), O_CREAT | O_WRONLY, 0644);
      if (fd >= 0) ::close(fd);
      job.failed = true;
      job.wrote.set_exception(std::make_exception_ptr(write_error(job.step, e.what())));
      return;
    }
    if (rank > 0) return;
    try {
      publish_when_complete(job);
    } catch (const std::exception& e) {
      job.publish_error = std::make_exception_ptr(write_error(job.step, e.what()));
      job.failed = true;
    }
  });
}

// The ranks share a file system, and nothing else outside of the training thread.
void CheckpointWriter::publish_when_complete(Job& job) {
  nlohmann::ordered_json files = nlohmann::ordered_json::array();
  int64_t tensors = 0;
  for (int r = 0; r < world_->size(); ++r) {
    const std::string done = job.unfinished + "/" + done_name(r);
    for (int waited = 0; !fs::exists(done); ++waited) {
      if (job.cancelled || fs::exists(job.unfinished + "/" + failed_name(r))) return;  // finish() has the error
      std::this_thread::sleep_for(std::chrono::milliseconds(std::min(1 + waited, 50)));
    }
    const auto written = nlohmann::json::parse(read_file(done));
    files.push_back({{"name", shard_name(r, world_->size())}, {"bytes", written.at("bytes")}, {"crc32c", written.at("crc32c")}});
    tensors += written.at("tensors").get<int64_t>();
    fs::remove(done);
  }
  nlohmann::ordered_json manifest;
  manifest["format"] = checkpoint::kFormat;
  manifest["format_version"] = checkpoint::kVersion;
  manifest["step"] = job.step;
  manifest["tensors"] = tensors;  // or pieces of them
  manifest["krait_version"] = kVersion;
  manifest["files"] = files;
  write_file_atomic(job.unfinished + "/" + checkpoint::kManifest, manifest.dump(2) + "\n");
  const std::string name = checkpoint_name(job.step);
  publish(directory_, job.unfinished, name);
  if (job.is_best) point_best_at(directory_, name);
  prune(job.step);
}

bool CheckpointWriter::failed() const { return job_ && job_->failed; }

void CheckpointWriter::finish() {
  if (!job_) return;
  const std::unique_ptr<Job> job = std::move(job_);
  std::exception_ptr failure;
  try {
    job->written.get();
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  const auto end = [&] {
    job->thread.join();
    if (world_->rank() == 0) remove_quietly(job->unfinished);  // no longer there when it was published
  };
  try {
    throw_together(*world_, failure);
  } catch (const std::exception&) {
    job->cancelled = true;
    end();
    throw;
  }
  end();
  if (job->publish_error) std::rethrow_exception(job->publish_error);
}

void CheckpointWriter::prune(int64_t newest) {
  std::error_code none;
  const std::string best = fs::read_symlink(directory_ + "/best", none).filename().string();
  int64_t kept = 0;
  std::vector<CheckpointInfo> all = list_checkpoints(directory_, false);
  for (auto info = all.rbegin(); info != all.rend(); ++info) {
    // Later ones were damaged when this run resumed before them; they are replaced when it gets there.
    if (info->step > newest || ++kept <= options_.keep_latest) continue;
    const std::string name = checkpoint_name(info->step);
    if (options_.keep_best && name == best) continue;
    remove_checkpoint(directory_, name);
  }
}

}  // namespace krait::train
