// Catch2's runner, plus one rule: a selection of [cuda] cases on a machine without a GPU is skipped, not passed.
#if KRAIT_CATCH_MAJOR >= 3
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#include <cstdio>
#include <cstring>

#include "core/device.h"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const char* at = std::strstr(argv[i], "[cuda]");
    const bool selects = at && (at == argv[i] || at[-1] != '~');
    if (selects && krait::cuda_device_count() == 0) {
      std::puts("SKIPPED: no CUDA device on this machine");
      return 77;
    }
  }
  return Catch::Session().run(argc, argv);
}
