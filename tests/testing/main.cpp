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

// HDF5 keeps free lists until its clean-up at exit, which data/hdf5.cpp turns off.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5"; }

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
