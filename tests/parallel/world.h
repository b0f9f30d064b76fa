#pragma once
#include "core/comm/process_group.h"
#include "tests/testing/catch.h"

namespace krait::testing {

/// All ranks that mpirun started for these tests. Every rank runs the same cases; the first failed check of any rank
/// ends all of them, for its rank would be out of step with the others.
const comm::GroupPtr& world();

}  // namespace krait::testing

namespace krait {
using namespace testing;
}
