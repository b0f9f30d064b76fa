#include "data/hdf5.h"

#include <numeric>
#include <thread>

#include "tests/data/temp_dir.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;
using krait::testing::TempDir;

TEST_CASE("arrays, attributes and bytes come back from a file") {
  const TempDir dir;
  std::vector<float> matrix(6);
  std::iota(matrix.begin(), matrix.end(), 0.5f);
  {
    hdf5::File file = hdf5::File::create(dir / "a.h5");
    file.set_attribute("step", 12345678901234);
    file.set_attribute("loss", 1.25);
    file.set_attribute("name", "naïve");
    file.set_attribute("name", "replaced");
    file.set_attribute("empty", "");
    hdf5::Group group = file.create_group("model");
    group.write("w", std::span<const float>(matrix), {2, 3});
    group.write("none", std::span<const double>(), {0, 4});
    group.write_bytes("blob", std::string("a\0b", 3));
    group.write_bytes("nothing", "");
    hdf5::Dataset grows =
        group.create_dataset("ids", hdf5::Type::u16, {0}, {.chunk = {4}, .extendable = true, .checksum = true});
    for (int32_t i = 0; i < 10; ++i) grows.append(std::span<const int32_t>(std::vector<int32_t>{i, i + 100}));
    file.close();
  }
  const hdf5::File file = hdf5::File::open(dir / "a.h5", "a test file");
  CHECK(file.int_attribute("step") == 12345678901234);
  CHECK(file.double_attribute("loss") == 1.25);
  CHECK(file.string_attribute("name") == "replaced");
  CHECK(file.string_attribute("empty").empty());
  CHECK_FALSE(file.has_attribute("other"));
  const hdf5::Group group = file.group("model");
  CHECK(group.names() == std::vector<std::string>{"blob", "ids", "none", "nothing", "w"});
  CHECK(group.read<float>("w") == matrix);
  CHECK(group.dataset("w").shape() == std::vector<int64_t>{2, 3});
  CHECK(group.read<double>("none").empty());
  CHECK(group.read_bytes("blob") == std::string("a\0b", 3));
  CHECK(group.read_bytes("nothing").empty());
  const hdf5::Dataset ids = group.dataset("ids");
  CHECK(ids.type() == hdf5::Type::u16);
  std::vector<int32_t> some(5);
  ids.read_rows(3, 5, std::span<int32_t>(some));
  CHECK(some == std::vector<int32_t>{101, 2, 102, 3, 103});
}

TEST_CASE("what is missing or of another kind is named with file and place") {
  const TempDir dir;
  {
    hdf5::File file = hdf5::File::create(dir / "a.h5");
    file.set_attribute("name", "x");
    file.write("w", std::span<const float>(std::vector<float>{1, 2}), {2});
    file.close();
  }
  const hdf5::File file = hdf5::File::open(dir / "a.h5", "a test file");
  CHECK(contains(error_of([&] { (void)file.int_attribute("name"); }), "a.h5: /: the attribute name is not an integer"));
  CHECK(contains(error_of([&] { (void)file.int_attribute("step"); }), "the attribute step is missing"));
  CHECK(contains(error_of([&] { (void)file.group("model"); }), "a.h5: /: the group model is missing"));
  CHECK(contains(error_of([&] { (void)file.dataset("v"); }), "the data set v is missing"));
  CHECK(contains(error_of([&] { (void)file.read_bytes("w"); }), "a.h5: /w: holds float32, expected uint8"));
  std::vector<float> three(3);
  CHECK(
      contains(error_of([&] { file.dataset("w").read(std::span<float>(three)); }), "3 values were passed for 2 rows"));
  CHECK(contains(error_of([&] { file.dataset("w").read_rows(1, 3, std::span<float>(three)); }),
                 "rows [1, 4) of 2 do not exist"));
  CHECK(contains(error_of([&] { (void)hdf5::File::open(dir / "none.h5", "a token store"); }),
                 "no such file; expected a token store"));
  testing::write_file(dir / "text.h5", "just text");
  CHECK(contains(error_of([&] { (void)hdf5::File::open(dir / "text.h5", "a token store"); }), "is not an HDF5 file"));
  CHECK(contains(error_of([&] { (void)hdf5::File::open(dir.path().string(), "a token store"); }), "is a directory"));
  CHECK(contains(error_of([&] { (void)hdf5::File::create(dir / "no/such/dir.h5"); }), "cannot create the file"));
}

TEST_CASE("a full disk is an error, not a crash") {
  if (!std::filesystem::exists("/dev/full")) return;
  const std::string message = error_of([] {
    hdf5::File file = hdf5::File::create("/dev/full");
    file.write("w", std::span<const float>(std::vector<float>(100000)), {100000});
    file.close();
  });
  CHECK(contains(message, "/dev/full"));
}

TEST_CASE("several threads may read one file and write another") {
  const TempDir dir;
  std::vector<int64_t> values(200000);
  std::iota(values.begin(), values.end(), 0);
  {
    hdf5::File file = hdf5::File::create(dir / "a.h5");
    file.write("v", std::span<const int64_t>(values), {200000}, {.chunk = {1000}, .checksum = true});
    file.close();
  }
  const hdf5::File file = hdf5::File::open(dir / "a.h5", "a test file");
  const hdf5::Dataset set = file.dataset("v");
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      std::vector<int64_t> part(777);
      for (int64_t i = 0; i < 50; ++i) {
        const int64_t first = (i * 3967 + static_cast<int64_t>(t) * 991) % 190000;
        set.read_rows(first, 777, std::span<int64_t>(part));
        wrong[t] += part.front() != first || part.back() != first + 776;
      }
      hdf5::File out = hdf5::File::create(dir / ("b" + std::to_string(t)));
      out.write("v", std::span<const int64_t>(values), {200000});
      out.close();
    });
  for (auto& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>{0, 0, 0, 0});
}
