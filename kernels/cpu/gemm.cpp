#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "core/parallel.h"
#include "core/tensor.h"
#include "kernels/cpu/vector_bytes.h"

// Blocked product after Goto & van de Geijn 2008, for the shapes of small models, where packing and threading cost
// more than the library's arithmetic. b is packed into panels of kNR columns by all threads, for all of them. Contiguous rows
// of a are read where they lie: their elements are broadcast one by one, so packing would only save address
// arithmetic. Contiguous columns are packed by each thread, since walking them touches a page per element.
namespace krait::kernels::cpu {

namespace {

constexpr int kLanes = static_cast<int>(kVectorBytes / sizeof(float));
// AVX-512: 24 accumulators, 2 of b, 1 of a: 27 of 32 registers. AVX: 12 + 2 + 1 of 16.
constexpr int kMR = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 8;
constexpr int kNR = 2 * kLanes;
constexpr int64_t kRows = 8 * kMR;         // rows of a that stay in the second-level cache
constexpr int64_t kDepth = 768;            // k is cut into pieces of at most this
constexpr int64_t kPacked = 1 << 20;       // floats of packed b: 4 MiB, third-level cache
constexpr int64_t kPanels = 8;             // of b, packed together

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float VecUnaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(int32_t))));

Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

struct Tile {
  int64_t k;
  const float* a;
  int64_t a_row, a_col;
  const float* b;  // packed
  float* c;
  int64_t ldc;
  int64_t columns;  // of c that exist
  float alpha, beta;
};

void finish(float* c, Vec v, float alpha, float beta) {
  v *= alpha;
  if (beta != 0.0f) v += beta * load(c);
  store(c, v);
}

// MR rows by NV vectors of c in registers. kRowA: a's rows are contiguous, else its columns.
template <int MR, int NV, bool kRowA>
void micro(const Tile& t) {
  Vec acc[MR][NV] = {};
  const float* a = t.a;
  const float* b = t.b;
  const int64_t a_row = kRowA ? t.a_row : 1;
  const int64_t a_col = kRowA ? 1 : t.a_col;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) __builtin_prefetch(t.c + i * t.ldc + v * kLanes, 1);  // there when the sums are
#pragma GCC unroll 2
  for (int64_t p = 0; p < t.k; ++p) {
    Vec bv[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) bv[v] = *reinterpret_cast<const Vec*>(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const float s = a[i * a_row];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] += s * bv[v];
    }
    a += a_col;
    b += NV * kLanes;
  }
  if (t.columns == NV * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) finish(t.c + i * t.ldc + v * kLanes, acc[i][v], t.alpha, t.beta);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    float row[NV * kLanes];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(row + v * kLanes, acc[i][v] * t.alpha);
    float* c = t.c + i * t.ldc;
    for (int64_t j = 0; j < t.columns; ++j) c[j] = row[j] + (t.beta != 0.0f ? t.beta * c[j] : 0.0f);
  }
}

using Micro = void (*)(const Tile&);
// rows: 1 to kMR.
template <int NV, bool kRowA>
Micro micro_of(int64_t rows) {
  static constexpr auto kAll = []<size_t... R>(std::index_sequence<R...>) {
    return std::array<Micro, kMR>{micro<static_cast<int>(R) + 1, NV, kRowA>...};
  }(std::make_index_sequence<kMR>());
  return kAll[static_cast<size_t>(rows - 1)];
}
Micro micro_of(int64_t rows, int nv, bool row_a) {
  if (nv == 2) return row_a ? micro_of<2, true>(rows) : micro_of<2, false>(rows);
  return row_a ? micro_of<1, true>(rows) : micro_of<1, false>(rows);
}

template <int S>
void swap_bit(Vec (&r)[kLanes]) {
  Mask low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = (l & S) ? kLanes + l - S : l;
    high[l] = (l & S) ? kLanes + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vec a = r[i], b = r[i + S];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + S] = __builtin_shuffle(a, b, high);
  }
}

void transpose_block(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  Vec r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = load(from + i * from_stride);
  swap_bit<1>(r);
  swap_bit<2>(r);
  if constexpr (kLanes > 4) swap_bit<(kLanes > 4 ? 4 : 1)>(r);
  if constexpr (kLanes > 8) swap_bit<(kLanes > 8 ? 8 : 1)>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, r[i]);
}

// Rows that lie apart are not foreseen by the machine.
constexpr int64_t kAhead = 12;
void prefetch_row(const float* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(row + i);
}

// Contiguous rows of b to `panels` panels of kNR columns, `apart` floats from one to the next: k rows of `columns`
// values in all. Neighbouring panels are filled together, since a row of one alone is two cache lines of a page.
void pack_panels(float* to, int64_t apart, const float* b, int64_t row_stride, int64_t k, int64_t columns) {
  const int64_t full = columns / kNR, rest = columns % kNR, width = rest > kLanes ? kNR : kLanes;
  for (int64_t p = 0; p < k; ++p) {
    const float* from = b + p * row_stride;
    if (p + kAhead < k) prefetch_row(from + kAhead * row_stride, columns);
    for (int64_t q = 0; q < full; ++q) {
      float* row = to + q * apart + p * kNR;
      store(row, load(from + q * kNR));
      store(row + kLanes, load(from + q * kNR + kLanes));
    }
    if (rest == 0) continue;
    float* row = to + full * apart + p * width;
    for (int64_t j = 0; j < rest; ++j) row[j] = from[full * kNR + j];
    for (int64_t j = rest; j < width; ++j) row[j] = 0.0f;
  }
}

// Contiguous columns of b to k rows of `columns` <= kNR values, zeros behind.
void pack_transposed(float* to, const float* b, int64_t col_stride, int64_t k, int64_t columns) {
  const int64_t width = columns > kLanes ? kNR : kLanes;
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    const float* from = b + j * col_stride;
    int64_t p = 0;
    for (; p + kLanes <= k; p += kLanes) transpose_block(to + p * width + j, width, from + p, col_stride);
    for (; p < k; ++p)
      for (int64_t q = 0; q < kLanes; ++q) to[p * width + j + q] = from[q * col_stride + p];
  }
  for (; j < width; ++j)
    for (int64_t p = 0; p < k; ++p) to[p * width + j] = j < columns ? b[j * col_stride + p] : 0.0f;
}

// Rows whose addresses are a multiple of 4 KiB apart fall into one set of the first cache, which holds fewer than kMR.
bool rows_collide(int64_t row_stride) { return row_stride % 1024 == 0; }

// From one packed tile of a to the next: 64 bytes more than the tile. A column is written to all tiles, whose addresses would
// else be a multiple of 4 KiB apart and fall into one set of the first cache.
int64_t tile_size(int64_t k) { return k * kMR + 16; }

// Columns of a to tiles of kMR rows that are contiguous for each k. All tiles of a column together: they share lines.
void pack_columns(float* to, const float* a, int64_t a_col, int64_t k, int64_t rows) {
  for (int64_t p = 0; p < k; ++p) {
    const float* from = a + p * a_col;
    if (p + kAhead < k) prefetch_row(from + kAhead * a_col, rows);
    float* tile = to + p * kMR;
    int64_t i = 0;
    for (; i + kMR <= rows; i += kMR, tile += tile_size(k)) std::memcpy(tile, from + i, kMR * sizeof(float));
    for (int64_t r = i; r < rows; ++r) tile[r - i] = from[r];
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads along rows and columns of c so that the busiest has the fewest tiles.
struct Grid {
  int64_t rows = 1, columns = 1;
};
Grid thread_grid(int64_t row_tiles, int64_t column_tiles, int64_t threads) {
  Grid best;
  int64_t least = row_tiles * column_tiles;
  for (int64_t r = 1; r <= threads; ++r) {
    const int64_t c = threads / r;
    const int64_t busiest = divide_up(row_tiles, r) * divide_up(column_tiles, c);
    if (busiest < least || (busiest == least && r * c < best.rows * best.columns)) {
      least = busiest;
      best = {r, c};
    }
  }
  return best;
}

}  // namespace

void sgemm(int64_t m, int64_t n, int64_t k, float alpha, MatrixRef a, MatrixRef b, float beta, float* c, int64_t ldc,
           const BlockDone& done) {
  if (m == 0 || n == 0) return;
  const bool row_a = a.col_stride == 1, spread_a = row_a && rows_collide(a.row_stride) && m >= kMR && n > kNR;
  const int64_t pieces = std::max<int64_t>(1, divide_up(k, kDepth));
  const int64_t depth = divide_up(divide_up(k, pieces), kLanes) * kLanes;
  const int64_t width = std::max<int64_t>(kNR, std::min(divide_up(n, kNR) * kNR, kPacked / std::max<int64_t>(depth, 1) / kNR * kNR));
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const int64_t threads = in_parallel() || flops < 4e5 ? 1 : num_threads();
  const Grid grid = thread_grid(divide_up(m, kMR), divide_up(std::min(n, width), kNR), threads);
  const int64_t team = grid.rows * grid.columns;
  const int64_t a_row = spread_a ? depth + kLanes : a.row_stride;
  const int64_t own = spread_a ? kRows * a_row : row_a ? 0 : kRows / kMR * tile_size(depth);  // floats of copied a per thread
  const Tensor buffer = empty({depth * width + threads * own}, DType::f32, kCpu);
  float* packed = buffer.data<float>();
  // A thread's rows in a few pieces, so that another one can help.
  const int64_t tiles = divide_up(m, kMR), parts = team == 1 ? 1 : std::clamp<int64_t>(tiles * kMR / grid.rows / kRows, 1, 4);
  const int64_t row_pieces = grid.rows * parts;

  for (int64_t j0 = 0; j0 < n; j0 += width) {
    const int64_t nj = std::min(width, n - j0), panels = divide_up(nj, kNR);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t p0 = piece * depth, np = std::max<int64_t>(0, std::min(depth, k - p0));
      const auto pack = [&](int64_t part, int64_t count) {
        const int64_t pack_end = panels * (part + 1) / count, together = b.col_stride == 1 ? kPanels : 1;
        for (int64_t q = panels * part / count; q < pack_end; q += together) {
          const int64_t columns = std::min(nj, std::min(q + together, pack_end) * kNR) - q * kNR;
          const float* from = b.data + p0 * b.row_stride + (j0 + q * kNR) * b.col_stride;
          if (b.col_stride == 1)
            pack_panels(packed + q * kNR * depth, kNR * depth, from, b.row_stride, np, columns);
          else
            pack_transposed(packed + q * kNR * depth, from, b.col_stride, np, columns);
        }
      };
      // Block (gr, gc) of row_pieces x grid.columns.
      const auto multiply = [&](int64_t gr, int64_t gc, int64_t thread) {
        float* packed_a = packed + depth * width + thread * own;
        const int64_t i_begin = tiles * gr / row_pieces * kMR, i_end = std::min(m, tiles * (gr + 1) / row_pieces * kMR);
        const int64_t q_begin = panels * gc / grid.columns, q_end = panels * (gc + 1) / grid.columns;
        if (q_begin == q_end) return;
        for (int64_t i0 = i_begin; i0 < i_end; i0 += kRows) {
          const int64_t i1 = std::min(i_end, i0 + kRows);
          if (!row_a) pack_columns(packed_a, a.data + i0 + p0 * a.col_stride, a.col_stride, np, i1 - i0);
          for (int64_t i = i0; spread_a && i < i1; ++i)
            std::memcpy(packed_a + (i - i0) * a_row, a.data + i * a.row_stride + p0, static_cast<size_t>(np) * sizeof(float));
          for (int64_t q = q_begin; q < q_end; ++q) {
            const int64_t columns = std::min<int64_t>(kNR, nj - q * kNR);
            Tile t{np, nullptr, a_row, kMR, packed + q * kNR * depth, nullptr, ldc, columns, alpha,
                   piece == 0 ? beta : 1.0f};
            for (int64_t i = i0; i < i1; i += kMR) {
              t.a = spread_a ? packed_a + (i - i0) * a_row
                    : row_a  ? a.data + i * a.row_stride + p0
                             : packed_a + (i - i0) / kMR * tile_size(np);
              t.c = c + i * ldc + j0 + q * kNR;
              micro_of(std::min<int64_t>(kMR, i1 - i), columns > kLanes ? 2 : 1, row_a)(t);
            }
          }
          if (done && piece == pieces - 1) done(i0, i1, j0 + q_begin * kNR, std::min(n, j0 + q_end * kNR));
        }
      };
      if (team == 1) {
        pack(0, 1);
        multiply(0, 0, 0);
        continue;
      }
      // Few panels: each thread's share at once, since neighbours are packed together.
      run_pieces(threads, [&](int64_t part, int) { pack(part, threads); });
      run_pieces(row_pieces * grid.columns, [&](int64_t i, int thread) {
        // A share of the pieces is one thread's cell of the grid.
        const int64_t cell = i / parts;
        multiply(cell / grid.columns * parts + i % parts, cell % grid.columns, thread);
      });
    }
  }
}

}  // namespace krait::kernels::cpu
