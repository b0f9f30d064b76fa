#include "train/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace krait::train {

std::string human_count(double value) {
  for (const char* unit : {"", " k", " M", " G"}) {
    if (std::abs(value) < 999.5 || unit == std::string_view(" G")) {
      return fmt::format("{:.{}f}{}", value, std::abs(value) < 99.95 && *unit ? 1 : 0, unit);
    }
    value /= 1000;
  }
  return {};
}

std::string human_bytes(int64_t bytes) {
  double value = static_cast<double>(bytes);
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; value >= 1023.5 && unit + 1 < std::size(units); ++unit) value /= 1024;
  return fmt::format("{:.{}f} {}", value, unit > 0 && value < 99.95 ? 1 : 0, units[unit]);
}

std::string human_time(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto s = std::llround(std::min(seconds, 1e9));
  if (s < 3600) return fmt::format("{}:{:02d}", s / 60, s % 60);
  return fmt::format("{}:{:02d}:{:02d}", s / 3600, s / 60 % 60, s % 60);
}

std::string progress_line(const StepMetrics& m, int64_t total_steps, double seconds_left) {
  return fmt::format("step {}/{}  loss {:.4f}  ppl {}  {} tokens/s  MFU {}  mem {}  ETA {}", m.step, total_steps, m.loss,
                     human_ppl(m.ppl()), human_count(m.tokens_per_s), m.mfu ? fmt::format("{:.1f} %", 100 * *m.mfu) : "n/a",
                     human_bytes(m.mem_bytes), human_time(seconds_left));
}

Progress::Progress(int64_t total_steps, int64_t first_step, std::FILE* out, bool live, double pause)
    : total_(total_steps),
      first_(first_step),
      out_(out),
      terminal_(live && ::isatty(::fileno(out)) == 1),
      pause_(terminal_ ? 0.2 : pause),
      start_(Clock::now()) {}

void Progress::step(const StepMetrics& m) {
  const double elapsed = seconds_since(start_);
  const double done = static_cast<double>(m.step - first_);
  const std::string line = progress_line(m, total_, done > 0 ? elapsed / done * static_cast<double>(total_ - m.step) : INFINITY);
  if (!terminal_) return note(line);
  live_ = line;
  show();
}

void Progress::evaluation(const EvalMetrics& m) {
  note(fmt::format("step {}  {}: {}", m.step, m.split, describe(m)));
}

void Progress::evaluating(const std::string& split, double share) {
  const auto now = Clock::now();
  if (share <= 0 || share >= 1) {
    evaluation_start_ = evaluation_shown_ = now;
    if (std::exchange(evaluating_, {}).empty()) return;
    clear();
    return show();
  }
  if (seconds_since(evaluation_shown_) < pause_ && !(terminal_ && evaluating_.empty())) return;
  evaluation_shown_ = now;
  const std::string line = fmt::format("evaluating {}: {:.0f} %  ETA {}", split, 100 * share,
                                       human_time(seconds_since(evaluation_start_) * (1 - share) / share));
  if (!terminal_) return note(line);
  evaluating_ = line;
  show();
}

void Progress::note(const std::string& text) {
  clear();
  std::fprintf(out_, "%s\n", text.c_str());
  show();
  std::fflush(out_);
}

void Progress::finish() {
  if (!std::exchange(evaluating_, {}).empty()) clear();  // of one that has failed
  if (terminal_ && !live_.empty()) {
    std::fputc('\n', out_);
    live_.clear();
  }
  std::fflush(out_);
}

void Progress::clear() {
  if (terminal_) std::fputs("\r\x1b[K", out_);
}

void Progress::show() {
  const std::string& line = evaluating_.empty() ? live_ : evaluating_;
  if (!terminal_ || line.empty()) return;
  winsize size{};
  const bool known = ::ioctl(::fileno(out_), TIOCGWINSZ, &size) == 0 && size.ws_col > 10;
  clear();
  std::fputs(line.substr(0, known ? size.ws_col - 1u : 119u).c_str(), out_);
  std::fflush(out_);
}

}  // namespace krait::train
