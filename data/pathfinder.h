#pragma once
#include <cstdint>
#include <vector>

#include "data/random_stream.h"

namespace krait::data {

/// Pathfinder (Linsley et al. 2018; settings of the Long Range Arena's 32 x 32 images): dashed curves, two discs on
/// curve ends, and the question whether the same curve ends in both. Lengths in pixels.
struct PathfinderOptions {
  int64_t size = 32;
  int64_t padding = 1;         // border without curves
  double paddle_length = 2, paddle_thickness = 0.5, paddle_margin = 1;
  double marker_radius = 1.5;
  int64_t contour_length = 14;  // paddles of each of the two target curves
  double seed_distance = 7;     // between their origins
  double continuity = 1;        // larger: straighter
  int64_t distractor_length = 4, n_distractors = 5;
  double contrast = 1.5;        // paddle contrast 0.75 x snake contrast 2; clipped at white
  int64_t antialias = 2;        // drawn so many times larger, shrunk with Lanczos
};
/// The options for images of 32 x 32, or scaled up for larger ones (128: "Path-X").
PathfinderOptions pathfinder_options(int64_t size);

struct Point {
  double x = 0, y = 0;
};
struct Paddle {
  Point tip, end;
};
struct PathfinderImage {
  std::vector<uint8_t> pixels;  // (size, size)
  bool connected = false;
  Point markers[2];
  std::vector<std::vector<Paddle>> curves;  // the two targets first
  int64_t attempts = 0;                     // images begun until one came out
};
PathfinderImage draw_pathfinder(const PathfinderOptions& options, RandomStream& random);

}  // namespace krait::data
