// wgmma: one warpgroup multiplies 64 x 64 by 64 x 64 tiles, K in steps, one stage.
#include "cases.h"

namespace hebatron::cases {
namespace {

constexpr int kSide = 64, kSteps = 3, kK = kSide * kSteps;
constexpr uint32_t kBytesTile = kSide * kSide * 2;

// Byte of element (row, k) in a K-major tile with the 128-byte swizzle.
HEBATRON_DEVICE uint32_t tile_offset(int row, int k) { return uint32_t(row * 128 + (((k / 8) ^ (row % 8)) * 16) + k % 8 * 2); }

// Where register i of thread t lies in the 64 x N accumulator.
HEBATRON_DEVICE int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
HEBATRON_DEVICE int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// A, (64, K), comes by TMA. B, (N, K), comes by TMA, by cp.async or by plain stores: the last two need a proxy fence.
enum class Source { tma, cp_async, stores };
enum class Gemm { right, release_before_wait, wait_one, no_proxy_fence, no_wgmma_fence, fence_without_sync, overwrite, left_open, different_operands };

template <Source source, Gemm bug>
__global__ void gemm(HEBATRON_GRID_CONSTANT(TensorMap) a, HEBATRON_GRID_CONSTANT(TensorMap) b, const uint4* b_rows, float* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  uint8_t *const tile_a = smem, *const tile_b = smem + kBytesTile;
  HEBATRON_SHARED(uint64_t, full, 1);
  HEBATRON_SHARED(uint64_t, empty, 1);
  const int t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, kWarpgroup);
    mbarrier_fence_init();
  }
  block_sync();
  float d[kSide / 2];
  for (int step = 0; step < kSteps; step++) {
    if (t >= kWarpgroup) {  // the producer's warp
      if (t == kWarpgroup) {
        mbarrier_wait(empty, (step & 1) ^ 1);
        mbarrier_arrive_expect(full, source == Source::tma ? 2 * kBytesTile : kBytesTile);
        tma_load_2d(tile_a, &a, full, step * kSide, 0);                                // LINE: gemm.load
        if (source == Source::tma) tma_load_2d(tile_b, &b, full, step * kSide, 0);
      }
      continue;
    }
    if (source != Source::tma) {
      for (int i = t; i < kSide * 8; i += kWarpgroup) {
        const uint4* from = b_rows + i / 8 * (kK / 8) + step * 8 + i % 8;
        const uint32_t at = tile_offset(i / 8, i % 8 * 8);
        if (source == Source::cp_async) cp_async_16(smem_address(tile_b) + at, from, true);  // LINE: gemm.copy
        else *reinterpret_cast<uint4*>(tile_b + at) = *from;                                   // LINE: gemm.store
      }
      if (source == Source::cp_async) cp_async_wait_all();
      if (bug != Gemm::no_proxy_fence) fence_proxy_async();
      if (bug != Gemm::fence_without_sync) named_barrier_sync(1, kWarpgroup);
    }
    mbarrier_wait(full, step & 1);
    if (bug != Gemm::no_wgmma_fence) wgmma_fence();
    for (int k = 0; k < kSide; k += 16) {
      const uint32_t skew = bug == Gemm::different_operands && t == 3 ? 32 : 0;
      wgmma_ss<0, 0>(d, wgmma_descriptor(smem_address(tile_a) + k * 2 + skew), wgmma_descriptor(smem_address(tile_b) + k * 2), step || k);  // LINE: gemm.wgmma
    }
    wgmma_commit();
    if (bug == Gemm::release_before_wait) mbarrier_arrive(empty);
    if (bug == Gemm::overwrite) tile_a[t * 16] = 0;  // LINE: gemm.overwrite
    if (bug == Gemm::wait_one) wgmma_wait<1>();
    else if (bug != Gemm::left_open || step < kSteps - 1) wgmma_wait<0>();
    if (bug != Gemm::release_before_wait) mbarrier_arrive(empty);
    if (source != Source::tma) named_barrier_sync(1, kWarpgroup);
  }
  if (t >= kWarpgroup) return;
  if (bug == Gemm::release_before_wait || bug == Gemm::wait_one) wgmma_wait<0>();
  for (int i = 0; i < kSide / 2; i++) out[fragment_row(t, i) * kSide + fragment_column(t, i)] = d[i];  // LINE: gemm.out
}
template <Source source, Gemm bug>
void run_gemm() {
  Tensor<__nv_bfloat16> a("a", kSide * kK, [](size_t i) { return bf16(small(i)); }), b("b", kSide * kK, [](size_t i) { return bf16(small(7 * i + 1)); });
  Tensor<float> out("out", kSide * kSide);
  TensorMapShape shape;
  shape.dim[0] = kK;
  shape.dim[1] = kSide;
  shape.stride[0] = kK * 2;
  shape.box[0] = shape.box[1] = kSide;
  run(gemm<source, bug>, 1, kWarpgroup + kWarp, 2 * kBytesTile, 1, tensor_map("case", a.get(), shape), tensor_map("case", b.get(), shape),
      reinterpret_cast<const uint4*>(b.get()), out.get());
  out.expect([](size_t i) {
    float sum = 0;
    for (size_t k = 0; k < kK; k++) sum += small(i / kSide * kK + k) * small(7 * (i % kSide * kK + k) + 1);
    return sum;
  });
}

// ---- A in registers: every row of A is ones, so a row of the result is the sum of B's 16 k ----
enum class Held { right, overwritten };

template <Held bug>
__global__ void held(const __nv_bfloat16* b, float* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  const int t = threadIdx.x;
  for (int i = t; i < kSide * 8; i += kWarpgroup) *reinterpret_cast<uint4*>(smem + i * 16) = reinterpret_cast<const uint4*>(b)[i];
  fence_proxy_async();
  block_sync();
  uint32_t ones[4];
  for (int i = 0; i < 4; i++) ones[i] = pack_bf16(1.0f, 1.0f);
  float d[kSide / 2];
  wgmma_fence();
  wgmma_rs<0>(d, ones, wgmma_descriptor(smem_address(smem)), false);  // LINE: held.wgmma
  wgmma_commit();
  if (bug == Held::overwritten && t == 77) ones[2] = 0;
  wgmma_wait<0>();  // LINE: held.wait
  for (int i = 0; i < kSide / 2; i++) out[fragment_row(t, i) * kSide + fragment_column(t, i)] = d[i];
}
template <Held bug>
void run_held() {
  Tensor<__nv_bfloat16> b("b", kSide * kSide, [](size_t i) { return bf16(small(i)); });
  Tensor<float> out("out", kSide * kSide);
  run(held<bug>, 1, kWarpgroup, kBytesTile, 1, b.get(), out.get());
  out.expect([](size_t i) {
    float sum = 0;
    for (size_t k = 0; k < 16; k++) sum += small(tile_offset(int(i % kSide), int(k)) / 2);
    return sum;
  });
}

// ---- mma.sync: A and B by ldmatrix out of plain shared memory, one warp, 16 x 8 x 16 ----
enum class Mma { right, no_warp_sync, misaligned };

template <Mma bug>
__global__ void mma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out) {
  HEBATRON_SHARED(uint4, rows, 48);  // A is 16 rows, B^T 8 rows of 16 elements
  const int lane = lane_id();
  for (int i = lane; i < 48; i += kWarp) rows[i] = reinterpret_cast<const uint4*>(i < 32 ? a + i * 8 : b + (i - 32) * 8)[0];  // LINE: mma.store
  if (bug != Mma::no_warp_sync) warp_sync();
  uint32_t fragment_a[4], fragment_b[2];
  const uint32_t skew = bug == Mma::misaligned ? 8 : 0;
  ldmatrix_x4(fragment_a, smem_address(rows) + lane % 16 * 32 + lane / 16 * 16 + skew);  // LINE: mma.load
  ldmatrix_x2(fragment_b, smem_address(rows + 32) + lane % 8 * 32 + lane / 8 % 2 * 16);
  float d[4] = {};
  mma_m16n8k16(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
template <Mma bug>
void run_mma() {
  Tensor<__nv_bfloat16> a("a", 256, [](size_t i) { return bf16(small(i)); }), b("b", 128, [](size_t i) { return bf16(small(5 * i + 2)); });
  Tensor<float> out("out", 128);
  run(mma<bug>, 1, kWarp, 0, 1, a.get(), b.get(), out.get());
  out.expect([](size_t i) {
    float sum = 0;
    for (size_t k = 0; k < 16; k++) sum += small(i / 8 * 16 + k) * small(5 * (i % 8 * 16 + k) + 2);
    return sum;
  });
}

}  // namespace

void add_matrix_cases(Cases& cases) {
  cases.push_back({"gemm", run_gemm<Source::tma, Gemm::right>});
  cases.push_back({"gemm/release_before_wait", run_gemm<Source::tma, Gemm::release_before_wait>});
  cases.push_back({"gemm/wait_one", run_gemm<Source::tma, Gemm::wait_one>});
  cases.push_back({"gemm/no_wgmma_fence", run_gemm<Source::tma, Gemm::no_wgmma_fence>});
  cases.push_back({"gemm/overwrite", run_gemm<Source::tma, Gemm::overwrite>});
  cases.push_back({"gemm/left_open", run_gemm<Source::tma, Gemm::left_open>});
  cases.push_back({"gemm/different_operands", run_gemm<Source::tma, Gemm::different_operands>});
  cases.push_back({"gemm_cp_async", run_gemm<Source::cp_async, Gemm::right>});
  cases.push_back({"gemm_cp_async/no_proxy_fence", run_gemm<Source::cp_async, Gemm::no_proxy_fence>});
  cases.push_back({"gemm_cp_async/fence_without_sync", run_gemm<Source::cp_async, Gemm::fence_without_sync>});
  cases.push_back({"gemm_stores", run_gemm<Source::stores, Gemm::right>});
  cases.push_back({"gemm_stores/no_proxy_fence", run_gemm<Source::stores, Gemm::no_proxy_fence>});
  cases.push_back({"held", run_held<Held::right>});
  cases.push_back({"held/overwritten", run_held<Held::overwritten>});
  cases.push_back({"mma", run_mma<Mma::right>});
  cases.push_back({"mma/no_warp_sync", run_mma<Mma::no_warp_sync>});
  cases.push_back({"mma/misaligned", run_mma<Mma::misaligned>});
}

}  // namespace hebatron::cases
