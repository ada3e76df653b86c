// The tile of the sm_90a kernels: the nearest measured one (grouped_gemm_tiles.inc), else the one whose waves over the chip
// take the fewest clocks. Host code alone, and pure: tested over all sizes without a GPU.
#include "cuda/grouped_gemm_sm90.h"
#include "cuda/grouped_gemm_tiles.inc"

namespace hebatron::cuda {
namespace {
using namespace sm90;

struct Shape {
  int64_t m, n, block_m;  // of a tile, and the rows of one block of its cluster
};
#define HEBATRON_SM90_SHAPE(M, N, BLOCK) Shape{M, N, BLOCK},
#define HEBATRON_SM90_SQUARE(M, N) Shape{M, N, M},
constexpr Shape kForward[] = {HEBATRON_SM90_TILES(HEBATRON_SM90_SHAPE)};
constexpr Shape kDgrad[] = {HEBATRON_SM90_DGRAD_TILES(HEBATRON_SM90_SHAPE)};
constexpr Shape kWgrad[] = {HEBATRON_SM90_WGRAD_TILES(HEBATRON_SM90_SQUARE)};

constexpr int64_t kFlopsPerClock = 4096;  // of an SM of H100, bf16
constexpr int64_t kBytesL2PerClock = 40;  // into an SM: A100's published 5,120 over 132 SMs; unmeasured on H100

// Waves over the chip times the clocks of a step of 64 k: those of the tensor cores or of the reads from L2, whichever are
// more. Every expert with rows ends in half a tile of rows that are not there.
int64_t cost_of(const TileProblem& p, const Shape& tile) {
  const int64_t blocks = tile.m / tile.block_m;
  int64_t down = p.experts * ceil_div(p.k, tile.m);
  if (p.use != TileUse::wgrad) {
    const int64_t used = std::min(p.rows, p.experts);
    down = std::max(used, ceil_div(p.rows, tile.m) + used / 2);
  }
  const int64_t waves = ceil_div(down * ceil_div(p.n, tile.n), std::max<int64_t>(p.sms / blocks, 1));
  const int64_t clocks_tensor = tile.block_m * tile.n * kStepK * 2 / kFlopsPerClock;
  const int64_t clocks_l2 = (tile.block_m + tile.n / blocks) * kBytesRow / kBytesL2PerClock;
  return waves * std::max(clocks_tensor, clocks_l2);
}

bool has_room(const TileProblem& p, const Shape& tile) {
  return p.use == TileUse::wgrad || p.experts <= max_experts(int(tile.block_m), int(tile.n));
}

template <size_t kCount>
GroupedGemmTile cheapest(const TileProblem& p, const Shape (&tiles)[kCount]) {
  const Shape* best = nullptr;
  int64_t best_cost = 0;
  for (const Shape& tile : tiles) {
    if (!has_room(p, tile)) continue;
    const int64_t cost = cost_of(p, tile);
    if (best && cost >= best_cost) continue;
    best = &tile;
    best_cost = cost;
  }
  return {best->m, best->n};
}

}  // namespace

GroupedGemmTile sm90_tile(const TileProblem& p, const std::vector<MeasuredTile>& measured) {
  // Nearest by the ratio of the rows, and no farther than a factor of 4: the grid of measured sizes is that wide.
  const MeasuredTile* nearest = nullptr;
  double nearest_ratio = 4.0;
  for (const MeasuredTile& found : measured) {
    const TileProblem& q = found.problem;
    if (q.use != p.use || q.sms != p.sms || q.experts != p.experts || q.k != p.k || q.n != p.n || p.rows == 0) continue;
    const double ratio = double(std::max(p.rows, q.rows)) / double(std::min(p.rows, q.rows));
    if (ratio > nearest_ratio || (nearest && ratio == nearest_ratio)) continue;
    nearest = &found;
    nearest_ratio = ratio;
  }
  if (nearest) return nearest->tile;
  switch (p.use) {
    case TileUse::k_major:
      return cheapest(p, kForward);
    case TileUse::n_major:
      return cheapest(p, kDgrad);
    case TileUse::wgrad:
      break;
  }
  return cheapest(p, kWgrad);
}

const std::vector<MeasuredTile>& measured_tiles() {
#define HEBATRON_SM90_MEASURED_TILE(USE, SMS, ROWS, EXPERTS, K, N, TILE_M, TILE_N) \
  {{TileUse::USE, ROWS, EXPERTS, K, N, SMS}, {TILE_M, TILE_N}},
  static const std::vector<MeasuredTile> table = {HEBATRON_SM90_MEASURED(HEBATRON_SM90_MEASURED_TILE)};
  return table;
}

}  // namespace hebatron::cuda
