#pragma once
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace krait::data {

/// Whether a program of that name is on PATH.
bool has_program(const std::string& name);

struct ProcessResult {
  int status = 0;      // exit status; 128 + signal when one ended it
  std::string errors;  // the end of what it wrote to standard error
};
/// Runs arguments[0], found on PATH, without a shell; standard input is empty. Standard output goes to `output` piece
/// by piece as it comes. `tick` is called at least every 100 ms meanwhile; when it throws, the process is ended.
/// Throws when there is no such program.
ProcessResult run_process(const std::vector<std::string>& arguments, const std::function<void(std::string_view)>& output,
                          const std::function<void()>& tick = {});

}  // namespace krait::data
