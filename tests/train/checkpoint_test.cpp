#include "train/checkpoint.h"

#include <cmath>

#include <sys/resource.h>
#include <sys/wait.h>

#include <bit>
#include <chrono>
#include <csignal>
#include <cstring>

#include "tests/testing/catch.h"
#include "tests/train/temporary_directory.h"
#include "train/files.h"

using namespace krait;
using namespace krait::train;
using krait::testing::TemporaryDirectory;
using krait::testing::write_text;
namespace fs = std::filesystem;

namespace {

// Every storage type, with bit patterns that a conversion would change: NaN payloads, denormals, -0.
std::vector<NamedTensor> sample() {
  const auto f32 = from_vector<float>({std::bit_cast<float>(0x7FC12345u), -0.0f, 1e-42f, 1.5f, 0.1f, -INFINITY}, {2, 3});
  Tensor b16 = empty({4}, DType::bf16, kCpu), half = empty({2}, DType::f16, kCpu), flag = empty({3}, DType::boolean, kCpu);
  for (int i = 0; i < 4; ++i) static_cast<uint16_t*>(b16.raw_data())[i] = static_cast<uint16_t>(0x7FC0 + 37 * i);
  for (int i = 0; i < 2; ++i) static_cast<uint16_t*>(half.raw_data())[i] = static_cast<uint16_t>(0x7E01 + i);
  for (int i = 0; i < 3; ++i) static_cast<uint8_t*>(flag.raw_data())[i] = i % 2 == 0;
  return {{"layers.0.wq.weight", f32},
          {"bf16", b16},
          {"half", half},
          {"flag", flag},
          {"step", from_vector<int64_t>({INT64_MIN + 1}, Shape{})},
          {"f64", from_vector<double>({0.1, std::bit_cast<double>(0x7FF8000000000123ull)}, {2, 1})},
          {"transposed", from_vector<float>({1, 2, 3, 4, 5, 6}, {2, 3}).transpose(0, 1)},
          {"i32", from_vector<int32_t>({-7}, {1})},
          {"empty", empty({0, 4}, DType::f32, kCpu)}};
}

bool same_bits(const Tensor& a, const Tensor& b) {
  const Tensor x = a.contiguous(), y = b.contiguous();
  return x.shape() == y.shape() && x.dtype() == y.dtype() &&
         (x.numel() == 0 || std::memcmp(x.raw_data(), y.raw_data(), static_cast<size_t>(x.nbytes())) == 0);
}

std::vector<int64_t> steps_in(const std::string& directory) {
  std::vector<int64_t> steps;
  for (const CheckpointInfo& info : list_checkpoints(directory, true)) {
    CHECK(info.problem.empty());
    steps.push_back(info.step);
  }
  return steps;
}

int hidden_entries(const std::string& directory) {
  int count = 0;
  for (const auto& entry : fs::directory_iterator(directory)) count += entry.path().filename().string()[0] == '.';
  return count;
}

void save_one(const std::string& directory, int64_t step, bool best = false, const CheckpointOptions& options = {}) {
  CheckpointWriter writer(directory, options);
  writer.save(step, sample(), fmt::format("{{\"step\":{}}}", step), best);
  writer.finish();
}

}  // namespace

TEST_CASE("checkpoint: every dtype comes back bit for bit") {
  for (const bool async : {false, true}) {
    const TemporaryDirectory tmp;
    save_one(tmp / "c", 1000, false, {.async = async});
    const CheckpointReader reader(tmp / "c/step-00001000");
    CHECK(reader.step() == 1000);
    CHECK(reader.meta() == "{\"step\":1000}");
    const auto tensors = sample();
    CHECK(reader.names().size() == tensors.size());
    for (const NamedTensor& t : tensors) {
      INFO(t.name);
      CHECK(same_bits(reader.read(t.name), t.value));
    }
    CHECK(hidden_entries(tmp / "c") == 0);
  }
}

TEST_CASE("checkpoint: an asynchronous save has taken its copies when it returns") {
  const TemporaryDirectory tmp;
  CheckpointWriter writer(tmp / "c", {.async = true});
  Tensor value = full({1000}, 1.0, DType::f32, kCpu);
  writer.save(1, {{"w", value}}, "{}", false);
  fill_(value, 2.0);
  writer.finish();
  CHECK(CheckpointReader(tmp / "c/step-00000001").read("w").to_vector<float>() == std::vector<float>(1000, 1.0f));
}

TEST_CASE("checkpoint: reading into a model checks names, shapes and dtypes before it writes") {
  const TemporaryDirectory tmp;
  CheckpointWriter writer(tmp / "c", {.async = false});
  writer.save(3, {{"model.a", ones({2, 2}, DType::f32, kCpu)}, {"model.b", ones({3}, DType::f32, kCpu)}, {"adam.m", ones({1}, DType::f32, kCpu)}},
              "{}", false);
  const std::string path = tmp / "c/step-00000003";
  const CheckpointReader reader(path);
  Tensor a = zeros({2, 2}, DType::f32, kCpu), b = zeros({3}, DType::f32, kCpu);
  CHECK(error_of([&] { reader.read_into({{"a", a}, {"b", zeros({4}, DType::f32, kCpu)}}, "model."); }) ==
        path + ": model.b is float32 (3,), the model expects float32 (4,); was it made with another config?");
  CHECK(error_of([&] { reader.read_into({{"a", a}, {"b", zeros({3}, DType::f64, kCpu)}}, "model."); }) ==
        path + ": model.b is float32 (3,), the model expects float64 (3,); was it made with another config?");
  CHECK(contains(error_of([&] { reader.read_into({{"a", a}}, "model."); }), "holds tensor model.b, which the model does not have"));
  CHECK(contains(error_of([&] { reader.read_into({{"a", a}, {"b", b}, {"c", b}}, "model."); }),
                 "holds no tensor model.c, which the model has"));
  CHECK(a.to_vector<float>() == std::vector<float>(4, 0.0f));
  reader.read_into({{"a", a}, {"b", b}}, "model.");
  CHECK(a.to_vector<float>() == std::vector<float>(4, 1.0f));
}

TEST_CASE("checkpoint: the latest are kept, and the best") {
  const TemporaryDirectory tmp;
  CheckpointWriter writer(tmp / "c", {.keep_latest = 2, .keep_best = true, .async = true});
  for (int64_t step = 10; step <= 50; step += 10) writer.save(step, sample(), "{}", step == 20);
  writer.finish();
  CHECK(steps_in(tmp / "c") == std::vector<int64_t>{20, 40, 50});
  CHECK(fs::read_symlink(tmp / "c/best") == "step-00000020");
  CHECK(best_checkpoint(tmp / "c")->step == 20);
  CHECK(latest_checkpoint(tmp / "c")->step == 50);
  writer.save(60, sample(), "{}", true);
  writer.finish();
  CHECK(steps_in(tmp / "c") == std::vector<int64_t>{50, 60});
  CHECK(best_checkpoint(tmp / "c")->step == 60);
}

TEST_CASE("checkpoint: saving a step again replaces it") {
  const TemporaryDirectory tmp;
  save_one(tmp / "c", 5);
  CheckpointWriter writer(tmp / "c", {.async = false});
  writer.save(5, {{"w", ones({1}, DType::f32, kCpu)}}, "again", false);
  CHECK(CheckpointReader(tmp / "c/step-00000005").meta() == "again");
  CHECK(hidden_entries(tmp / "c") == 0);
}

TEST_CASE("checkpoint: damage is found, named, and stepped over") {
  const TemporaryDirectory tmp;
  const std::string good = tmp / "c/step-00000001", bad = tmp / "c/step-00000002", shard = bad + "/shard-0000-of-0001.h5";
  save_one(tmp / "c", 1);
  const auto message = [&](auto damage) {
    save_one(tmp / "c", 2);
    damage();
    std::vector<std::string> skipped;
    const auto latest = latest_checkpoint(tmp / "c", &skipped);
    REQUIRE(latest);
    CHECK(latest->step == 1);
    REQUIRE(skipped.size() == 1);
    const std::string direct = error_of([&] { CheckpointReader reader(bad); });
    CHECK(direct == skipped[0]);
    fs::remove_all(bad);
    return direct;
  };
  const std::string truncated = message([&] { fs::resize_file(shard, 100); });
  CHECK(contains(truncated, shard + ": damaged checkpoint: 100 bytes, expected "));
  const std::string flipped = message([&] {
    std::string bytes = read_file(shard);
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
    write_text(shard, bytes);
  });
  CHECK(contains(flipped, shard + ": damaged checkpoint: checksum "));
  CHECK(contains(message([&] { fs::remove(shard); }), shard + ": damaged checkpoint: the file is missing"));
  CHECK(contains(message([&] { fs::remove(bad + "/manifest.json"); }), bad + "/manifest.json: damaged checkpoint: the file is missing"));
  CHECK(contains(message([&] { write_text(bad + "/manifest.json", "{\"format\":"); }), bad + "/manifest.json: damaged checkpoint: "));
  CHECK(contains(message([&] { write_text(bad + "/manifest.json", "[]"); }), bad + "/manifest.json: damaged checkpoint: "));
  CHECK(contains(message([&] { write_text(bad + "/manifest.json", R"({"format":"krait.checkpoint","format_version":0})"); }),
                 "format version 0, this build reads 1 to 2"));
  CHECK(CheckpointReader(good).step() == 1);
  CHECK(error_of([&] { CheckpointReader reader(tmp / "c/none"); }) == (tmp / "c/none") + ": no such checkpoint");
  CHECK_FALSE(latest_checkpoint(tmp / "nothing"));
}

TEST_CASE("checkpoint: one of a newer format is not stepped over, which would replace it") {
  const TemporaryDirectory tmp;
  for (const int64_t step : {1, 2}) save_one(tmp / "c", step);
  const std::string manifest = tmp / "c/step-00000002/manifest.json";
  write_text(manifest, R"({"format":"krait.checkpoint","format_version":99})");
  std::vector<std::string> skipped;
  CHECK(error_of([&] { latest_checkpoint(tmp / "c", &skipped); }) ==
        manifest + ": format version 99, this build reads 1 to 2\n"
                   "       try the Krait that wrote it; to use an earlier checkpoint, move this one out of the run");
  CHECK(error_of([&] { best_checkpoint(tmp / "c", &skipped); }).starts_with(manifest));
  CHECK(skipped.empty());
  CHECK(list_checkpoints(tmp / "c", true)[1].newer);
}

TEST_CASE("checkpoint: a damaged later one does not push a good one out") {
  const TemporaryDirectory tmp;
  for (const int64_t step : {1, 100}) save_one(tmp / "c", step);
  fs::resize_file(tmp / "c/step-00000100/shard-0000-of-0001.h5", 10);
  save_one(tmp / "c", 2, false, {.keep_latest = 1});
  CHECK(latest_checkpoint(tmp / "c")->step == 2);
}

TEST_CASE("checkpoint: a full disk gives one error, leaves no trace, harms nothing") {
  const TemporaryDirectory tmp;
  save_one(tmp / "c", 1);
  const std::string before = read_file(tmp / "c/step-00000001/shard-0000-of-0001.h5");
  const std::vector<NamedTensor> large{{"w", zeros({1 << 20}, DType::f32, kCpu)}};
  for (const bool async : {false, true}) {
    for (const rlim_t limit : {rlim_t{0}, rlim_t{100'000}, rlim_t{4 << 20}}) {
      CheckpointWriter writer(tmp / "c", {.async = async});
      // A limit on the size of files stands in for a disk that fills up in the middle of a write.
      rlimit old{};
      REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
      const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
      const rlimit low{limit, old.rlim_max};
      REQUIRE(::setrlimit(RLIMIT_FSIZE, &low) == 0);
      std::string message;
      try {
        writer.save(2, large, "{}", true);
        writer.finish();
      } catch (const Error& e) {
        message = e.what();
      }
      ::setrlimit(RLIMIT_FSIZE, &old);
      std::signal(SIGXFSZ, old_handler);
      INFO("limit " << limit << " async " << async << ": " << message);
      CHECK(contains(message, "the checkpoint of step 2 could not be written: "));
      CHECK(contains(message, "File too large"));
      CHECK(contains(message, "earlier checkpoints are untouched"));
      CHECK(hidden_entries(tmp / "c") == 0);
      CHECK(steps_in(tmp / "c") == std::vector<int64_t>{1});
      CHECK_FALSE(fs::exists(fs::symlink_status(tmp / "c/best")));
    }
  }
  CHECK(read_file(tmp / "c/step-00000001/shard-0000-of-0001.h5") == before);
  // With room again, the same process can save.
  save_one(tmp / "c", 2);
  CHECK(steps_in(tmp / "c") == std::vector<int64_t>{1, 2});
}

TEST_CASE("checkpoint: an error of the writer thread surfaces at the next save") {
  const TemporaryDirectory tmp;
  CheckpointWriter writer(tmp / "c", {.async = true});
  fs::remove_all(tmp / "c");
  writer.save(1, sample(), "{}", false);
  CHECK(contains(error_of([&] { writer.save(2, sample(), "{}", false); }), "the checkpoint of step 1 could not be written"));
  fs::create_directory(tmp / "c");
  writer.save(3, sample(), "{}", false);
  writer.finish();
  CHECK(steps_in(tmp / "c") == std::vector<int64_t>{3});
}

TEST_CASE("checkpoint: killed at any instant, what is published is whole") {
  const TemporaryDirectory tmp;
  const auto tensors = sample();
  save_one(tmp / "c", 0);
  for (int round = 0; round < 12; ++round) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      try {
        CheckpointWriter writer(tmp / "c", {.async = false});
        for (int64_t step = 1;; ++step) writer.save(step % 7, tensors, "{}", step % 3 == 0);
      } catch (...) {
        ::_exit(1);
      }
    }
    ::usleep(static_cast<useconds_t>(20'000 + 3'700 * round));
    ::kill(child, SIGKILL);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    for (const CheckpointInfo& info : list_checkpoints(tmp / "c", true)) CHECK(info.problem == "");
    const auto latest = latest_checkpoint(tmp / "c");
    REQUIRE(latest);
    CHECK(same_bits(CheckpointReader(latest->path).read("bf16"), tensors[1].value));
  }
  const CheckpointWriter cleaner(tmp / "c", {});
  CHECK(hidden_entries(tmp / "c") == 0);
}
