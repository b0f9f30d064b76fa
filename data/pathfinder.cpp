#include "data/pathfinder.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>

#include "core/error.h"
#include "data/generated_task.h"
#include "data/task_kinds.h"

namespace krait::data {
namespace {

using std::numbers::pi;

Point operator+(Point a, Point b) { return {a.x + b.x, a.y + b.y}; }
Point operator-(Point a, Point b) { return {a.x - b.x, a.y - b.y}; }
Point operator*(double s, Point p) { return {s * p.x, s * p.y}; }
double length_of(Point p) { return std::sqrt(p.x * p.x + p.y * p.y); }
Point direction(double angle) { return {std::cos(angle), std::sin(angle)}; }

double distance(Point p, const Paddle& s) {
  const Point d = s.end - s.tip, q = p - s.tip;
  const double square = d.x * d.x + d.y * d.y;
  const double t = square > 0 ? std::clamp((q.x * d.x + q.y * d.y) / square, 0.0, 1.0) : 0.0;
  return length_of(q - t * d);
}

/// Which pixels are taken, and which lie within the margin of one that is. The centre of pixel (i, j) is (i, j).
class Mask {
 public:
  explicit Mask(const PathfinderOptions& o) : n_(o.size), core_(o.paddle_thickness / 2 + 0.5), margin_(o.paddle_margin) {
    taken_.assign(static_cast<size_t>(n_ * n_), 0);
    near_ = taken_;
    for (int64_t y = 0; y < n_; ++y)
      for (int64_t x = 0; x < n_; ++x)
        if (std::min({x, y, n_ - 1 - x, n_ - 1 - y}) < o.padding) taken_[at(x, y)] = near_[at(x, y)] = 1;
  }
  bool near(int64_t x, int64_t y) const { return x < 0 || y < 0 || x >= n_ || y >= n_ || near_[at(x, y)] != 0; }
  int64_t free_pixels() const { return std::count(near_.begin(), near_.end(), 0); }

  /// Whether the paddle with its margin meets nothing and stays inside.
  bool fits(const Paddle& paddle) const {
    for (const Point p : {paddle.tip, paddle.end})
      if (p.x < 0 || p.y < 0 || p.x > static_cast<double>(n_ - 1) || p.y > static_cast<double>(n_ - 1)) return false;
    bool free = true;
    around(paddle, core_ + margin_, [&](size_t i, double x, double y) {
      free = free && (taken_[i] == 0 || distance({x, y}, paddle) > core_ + margin_);
    });
    return free;
  }
  void add(const Paddle& paddle) {
    around(paddle, core_ + margin_, [&](size_t i, double x, double y) {
      const double d = distance({x, y}, paddle);
      if (d <= core_ + margin_) near_[i] = 1;
      if (d <= core_) taken_[i] = 1;
    });
  }

 private:
  size_t at(int64_t x, int64_t y) const { return static_cast<size_t>(y * n_ + x); }
  template <class F>  // f(pixel, x, y) for those in the rectangle `reach` around the paddle
  void around(const Paddle& p, double reach, F f) const {
    const auto low = [&](double a, double b) { return std::max<int64_t>(0, static_cast<int64_t>(std::ceil(std::min(a, b) - reach))); };
    const auto high = [&](double a, double b) { return std::min<int64_t>(n_ - 1, static_cast<int64_t>(std::floor(std::max(a, b) + reach))); };
    for (int64_t y = low(p.tip.y, p.end.y); y <= high(p.tip.y, p.end.y); ++y)
      for (int64_t x = low(p.tip.x, p.end.x); x <= high(p.tip.x, p.end.x); ++x)
        f(at(x, y), static_cast<double>(x), static_cast<double>(y));
  }

  int64_t n_;
  double core_, margin_;
  std::vector<uint8_t> taken_, near_;
};

constexpr int kStartTries = 4, kDistractorTries = 4;

/// A curve under way. Its last paddle is not in the mask yet, so that the next may come near it.
class Curve {
 public:
  Curve(const PathfinderOptions& o, Point tip, double angle) : o_(&o), angle_(angle) {
    paddles_.push_back({tip, tip + o.paddle_length * direction(angle)});
  }
  const std::vector<Paddle>& paddles() const { return paddles_; }
  const Paddle& last() const { return paddles_.back(); }

  /// Adds a paddle; false when there is no place.
  bool grow(const Mask& mask, RandomStream& random) {
    const Point heading = direction(angle_), pivot = last().end + o_->paddle_margin * heading;
    const double radius = o_->paddle_length + o_->paddle_margin;
    struct Candidate {
      double sum, angle;  // of the weights up to here
      Paddle paddle;
    };
    std::vector<Candidate> candidates;
    double total = 0;
    for (auto y = static_cast<int64_t>(std::floor(pivot.y - radius - 1)); y <= pivot.y + radius + 1; ++y)
      for (auto x = static_cast<int64_t>(std::floor(pivot.x - radius - 1)); x <= pivot.x + radius + 1; ++x) {
        const Point d = Point{static_cast<double>(x), static_cast<double>(y)} - pivot;
        if (std::abs(length_of(d) - radius) > 0.5 || mask.near(x, y)) continue;
        if (o_->continuity >= 1 && d.x * heading.x + d.y * heading.y <= 0) continue;  // weight 0 beyond a right angle
        const double angle = std::atan2(d.y, d.x);
        const double cosine = std::cos(std::min(o_->continuity * std::abs(std::remainder(angle - angle_, 2 * pi)), pi / 2));
        if (cosine < 1e-3) continue;
        const Paddle paddle{pivot + o_->paddle_margin * direction(angle), pivot + radius * direction(angle)};
        if (!mask.fits(paddle)) continue;
        total += cosine * cosine;
        candidates.push_back({total, angle, paddle});
      }
    if (candidates.empty()) return false;
    const double drawn = random.unit() * total;
    const Candidate& chosen = *std::find_if(candidates.begin(), candidates.end() - 1, [&](const Candidate& c) { return c.sum > drawn; });
    paddles_.push_back(chosen.paddle);
    angle_ = chosen.angle;
    return true;
  }

 private:
  const PathfinderOptions* o_;
  double angle_;
  std::vector<Paddle> paddles_;
};

double whole_degrees(RandomStream& random) { return static_cast<double>(random.below(360)) * pi / 180; }

bool draw_targets(const PathfinderOptions& o, Mask& mask, RandomStream& random, PathfinderImage& image) {
  const auto border = static_cast<int64_t>(std::ceil(2 * o.seed_distance));
  const auto coordinate = [&] { return static_cast<double>(random.between(border, o.size - 1 - border)); };
  const Point origin{coordinate(), coordinate()};
  std::vector<Curve> curves;
  for (int attempt = 0; attempt < kStartTries && curves.size() < 2; ++attempt) {
    const Point tip = curves.empty() ? origin : origin + o.seed_distance * direction(2 * pi * random.unit());
    Curve curve(o, tip, whole_degrees(random));
    if (!mask.fits(curve.last())) continue;
    if (curves.size() == 1) {  // the first one's paddle is not in the mask yet
      Mask both = mask;
      both.add(curves[0].last());
      if (!both.fits(curve.last())) continue;
    }
    curves.push_back(std::move(curve));
  }
  if (curves.size() < 2) return false;
  for (int64_t i = 1; i < o.contour_length; ++i)
    for (size_t c = 0; c < 2; ++c) {
      // The other curve's last paddle is no place for this one.
      Mask with_other = mask;
      with_other.add(curves[1 - c].last());
      if (!curves[c].grow(with_other, random)) return false;
      mask.add(curves[c].paddles()[curves[c].paddles().size() - 2]);
    }
  for (const Curve& curve : curves) {
    mask.add(curve.last());
    image.curves.push_back(curve.paddles());
  }
  return true;
}

void draw_distractors(const PathfinderOptions& o, Mask& mask, RandomStream& random, PathfinderImage& image) {
  const auto one = [&]() -> bool {
    Mask trial = mask;
    const Point tip{static_cast<double>(random.below(o.size)), static_cast<double>(random.below(o.size))};
    Curve curve(o, tip, whole_degrees(random));
    if (!trial.fits(curve.last())) return false;
    for (int64_t i = 1; i < o.distractor_length; ++i) {
      const Paddle before = curve.last();
      if (!curve.grow(trial, random)) return false;
      trial.add(before);
    }
    trial.add(curve.last());
    mask = std::move(trial);
    image.curves.push_back(curve.paddles());
    return true;
  };
  for (int64_t i = 0; i < o.n_distractors; ++i) {
    if (mask.free_pixels() * 100 < o.size * o.size) return;
    for (int attempt = 0; attempt < kDistractorTries; ++attempt)
      if (one()) break;
  }
}

/// One axis of the Lanczos-3 filter that shrinks `s` times: out[i] = sum_k weight[k] in[i s + first + k].
struct Lanczos {
  std::vector<float> weights;
  int64_t first = 0;
  explicit Lanczos(int64_t s) {
    const auto sinc = [](double x) { return x == 0 ? 1.0 : std::sin(pi * x) / (pi * x); };
    first = -3 * s;
    double sum = 0;
    std::vector<double> w;
    for (int64_t k = first; k < 4 * s; ++k) {
      const double x = (static_cast<double>(k) + 0.5) / static_cast<double>(s) - 0.5;  // from the output pixel's centre
      w.push_back(std::abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0.0);
      sum += w.back();
    }
    for (const double value : w) weights.push_back(static_cast<float>(value / sum));
  }
};

// (rows, n s) -> (n, rows), shrunk along the row: twice gives the image the right way round.
std::vector<float> shrink(const std::vector<float>& in, int64_t rows, int64_t n, int64_t s, const Lanczos& filter) {
  std::vector<float> out(static_cast<size_t>(n * rows));
  const auto taps = static_cast<int64_t>(filter.weights.size()), width = n * s;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t begin = i * s + filter.first;
      float sum = 0;
      for (int64_t k = std::max<int64_t>(0, -begin); k < std::min(taps, width - begin); ++k)
        sum += filter.weights[static_cast<size_t>(k)] * in[static_cast<size_t>(row * width + begin + k)];
      out[static_cast<size_t>(i * rows + row)] = sum;
    }
  return out;
}

std::vector<uint8_t> render(const PathfinderOptions& o, const PathfinderImage& image) {
  const int64_t s = o.antialias, n = o.size, large = n * s;
  const double scale = static_cast<double>(s), half = o.paddle_thickness * scale / 2 + 0.5;
  std::vector<float> canvas(static_cast<size_t>(large * large), 0.0f);
  const auto to_large = [&](Point p) { return Point{(p.x + 0.5) * scale - 0.5, (p.y + 0.5) * scale - 0.5}; };
  for (const auto& curve : image.curves)
    for (const Paddle& small : curve) {
      const Paddle p{to_large(small.tip), to_large(small.end)};
      const auto low = [&](double a, double b) { return std::max<int64_t>(0, static_cast<int64_t>(std::floor(std::min(a, b) - half))); };
      const auto high = [&](double a, double b) { return std::min<int64_t>(large - 1, static_cast<int64_t>(std::ceil(std::max(a, b) + half))); };
      for (int64_t y = low(p.tip.y, p.end.y); y <= high(p.tip.y, p.end.y); ++y)
        for (int64_t x = low(p.tip.x, p.end.x); x <= high(p.tip.x, p.end.x); ++x) {
          const double d = distance({static_cast<double>(x), static_cast<double>(y)}, p);
          float& pixel = canvas[static_cast<size_t>(y * large + x)];
          pixel = std::max(pixel, static_cast<float>(std::clamp(half - d, 0.0, 1.0)));
        }
    }
  const Lanczos filter(s);
  const std::vector<float> gray = s == 1 ? canvas : shrink(shrink(canvas, large, n, s, filter), n, n, s, filter);
  std::vector<uint8_t> pixels(gray.size());
  for (size_t i = 0; i < gray.size(); ++i) {
    const double value = std::clamp(static_cast<double>(gray[i]) * o.contrast, 0.0, 1.0);
    pixels[i] = static_cast<uint8_t>(std::lround(255 * value));
  }
  for (const Point marker : image.markers)
    for (int64_t y = 0; y < n; ++y)
      for (int64_t x = 0; x < n; ++x)
        if (length_of(Point{static_cast<double>(x), static_cast<double>(y)} - marker) <= o.marker_radius)
          pixels[static_cast<size_t>(y * n + x)] = 255;
  return pixels;
}

class Pathfinder final : public Generator {
 public:
  explicit Pathfinder(const PathfinderOptions& options) : o_(options) {}
  int64_t grain() const override { return 1; }
  void generate(Split, RandomStream& random, ExampleRow& row) const override {
    const PathfinderImage image = draw_pathfinder(o_, random);
    row.label = image.connected;
    for (size_t i = 0; i < image.pixels.size(); ++i) row.inputs[i] = static_cast<float>(image.pixels[i]) / 127.5f - 1.0f;
  }

 private:
  PathfinderOptions o_;
};

}  // namespace

PathfinderOptions pathfinder_options(int64_t size) {
  PathfinderOptions o;
  o.size = size;
  if (size <= 32) return o;
  const double scale = static_cast<double>(size) / 32;
  o.seed_distance = std::round(size * 20 / 128.0);
  o.contour_length = static_cast<int64_t>(std::lround(14 * scale));
  o.distractor_length = o.contour_length / 3;
  o.n_distractors = static_cast<int64_t>(std::lround(5 * scale));
  o.marker_radius = 1.5 * std::sqrt(scale);
  return o;
}

PathfinderImage draw_pathfinder(const PathfinderOptions& o, RandomStream& random) {
  constexpr int64_t kAttempts = 100000;
  PathfinderImage image;
  image.connected = random.coin();  // before the curves: what is hard to draw does not change the balance
  for (;;) {
    Mask mask(o);
    image.curves.clear();
    KRAIT_CHECK(++image.attempts <= kAttempts,
                "pathfinder: no two curves of {} paddles were found in {} x {} pixels after {} attempts; lower contour_length",
                o.contour_length, o.size, o.size, kAttempts);
    if (!draw_targets(o, mask, random, image)) continue;
    draw_distractors(o, mask, random, image);
    break;
  }
  const size_t origin = random.coin() ? 1 : 0;
  image.markers[0] = image.curves[origin].front().tip;
  image.markers[1] = image.curves[image.connected ? origin : 1 - origin].back().end;
  image.pixels = render(o, image);
  return image;
}

TaskPtr make_pathfinder(OptionReader& options) {
  int64_t size = 32;
  ExampleCounts counts{.train = 160000, .valid = 20000, .test = 20000};
  options.read("image_size", size, between(16, 1024));
  PathfinderOptions o = pathfinder_options(size);
  options.read("contour_length", o.contour_length, between(1, 10000));
  options.read("distractor_length", o.distractor_length, between(1, 10000));
  options.read("n_distractors", o.n_distractors, between(0, 10000));
  options.read("paddle_length", o.paddle_length, between(0.5, 100));
  options.read("paddle_thickness", o.paddle_thickness, between(0.1, 100));
  options.read("paddle_margin", o.paddle_margin, between(0, 100));
  options.read("marker_radius", o.marker_radius, between(0.5, 100));
  options.read("seed_distance", o.seed_distance, between(1, 1000));
  options.read("continuity", o.continuity, between(0, 100));
  options.read("contrast", o.contrast, between(0.01, 100));
  options.read("antialias", o.antialias, between(1, 8));
  read_counts(options, counts);
  read_fixed_context(options, size * size);
  const double most = (static_cast<double>(size) - 1) / 4;
  if (o.seed_distance > most) {
    options.fail("seed_distance", fmt::format("{} leaves no start twice as far from every border of {} pixels", o.seed_distance, size),
                 fmt::format("{} or less", std::floor(most)));
  }
  const TaskShape shape{.kind = TaskShape::Kind::labels, .input_features = 1, .n_classes = 2, .context = size * size,
                        .eval_context = size * size};
  return generated_task("pathfinder", shape, counts, std::make_shared<Pathfinder>(o));
}

}  // namespace krait::data
