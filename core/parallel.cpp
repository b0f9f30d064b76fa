#include "core/parallel.h"

#include <cblas.h>
extern "C" void openblas_set_num_threads(int);

namespace krait::core {

namespace {
int default_threads() {
  static const int n = omp_get_max_threads();
  return n;
}
int& current_num_threads() {
  static int n = default_threads();
  return n;
}
}  // namespace

void set_num_threads(int n) {
  current_num_threads() = n < 1 ? default_threads() : n;
  openblas_set_num_threads(current_num_threads());
  omp_set_num_threads(current_num_threads());
}

int num_threads() { return current_num_threads(); }

}  // namespace krait::core
