#pragma once

namespace krait {
inline namespace core {

/// First thing in main: starts the program again, as the same process, with GOMP_SPINCOUNT in its environment, unless that
/// or OMP_WAIT_POLICY is there. Threads of GCC's OpenMP wait by spinning, some 20 ms before they sleep, on the very
/// processor that the thread they wait for may need; the library reads how long before any code of ours runs.
/// Returns when there is nothing to do or the system does not allow it.
void let_waiting_threads_sleep(char** argv);

}  // namespace core
}  // namespace krait
