#include "core/parallel.h"

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "tests/testing/catch.h"

using namespace krait;

TEST_CASE("parallel_for visits every index once, whatever the threads and the grain") {
  for (const int threads : {1, 2, 5})
    for (const int64_t grain : {1, 7, 1000})
      for (const int64_t n : {0, 1, 6, 101}) {
        set_num_threads(threads);
        std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
        parallel_for(3, 3 + n, grain, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) ++seen[static_cast<size_t>(i - 3)];
        });
        for (auto& s : seen) CHECK(s == 1);
      }
  set_num_threads(0);
}

TEST_CASE("small work runs inline, and pieces have at least the grain") {
  set_num_threads(4);
  std::atomic<int> pieces = 0;
  parallel_for(0, 100, 100, [&](int64_t, int64_t) { ++pieces; });
  CHECK(pieces == 1);
  pieces = 0;
  parallel_for(0, 100, 50, [&](int64_t, int64_t) { ++pieces; });
  CHECK(pieces == 2);
  set_num_threads(0);
}

TEST_CASE("nested calls run inline") {
  set_num_threads(2);
  std::atomic<int64_t> sum = 0;
  parallel_for(0, 8, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      int calls = 0;
      parallel_for(0, 10, 1, [&](int64_t a, int64_t b) {
        ++calls;
        sum += b - a;
      });
      if (calls != 1) sum = -1000000;
    }
  });
  CHECK(sum == 80);
  set_num_threads(0);
}

TEST_CASE("an exception of a piece reaches the caller") {
  set_num_threads(3);
  CHECK_THROWS_AS(parallel_for(0, 30, 1, [](int64_t first, int64_t) {
                    if (first >= 10) throw std::runtime_error("piece");
                  }),
                  std::runtime_error);
  CHECK_THROWS_AS(parallel_for(0, 1, 1, [](int64_t, int64_t) { throw std::runtime_error("inline"); }),
                  std::runtime_error);
  set_num_threads(0);
}

TEST_CASE("set_num_threads(0) restores the default") {
  const int usual = num_threads();
  set_num_threads(1);
  CHECK(num_threads() == 1);
  set_num_threads(0);
  CHECK(num_threads() == usual);
}

TEST_CASE("every piece runs once, also while another thread starts work of its own") {
  set_num_threads(3);
  const auto rounds = [] {
    for (int round = 0; round < 2000; ++round) {
      const int64_t n = round % 23;
      std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
      run_pieces(n, [&](int64_t piece, int thread) {
        seen[static_cast<size_t>(piece)] += thread >= 0 && thread < 3 ? 1 : 100;
      });
      for (auto& s : seen)
        if (s != 1) return false;
    }
    return true;
  };
  bool other = false;
  std::thread second([&] { other = rounds(); });
  CHECK(rounds());
  second.join();
  CHECK(other);
  set_num_threads(0);
}

TEST_CASE("pieces of few units are as many as the threads, or equal shares of them") {
  CHECK(piece_count(3, 4) == 3);
  CHECK(piece_count(5, 4) == 4);
  CHECK(piece_count(11, 4) == 8);
  CHECK(piece_count(1000, 4) == 16);
}
