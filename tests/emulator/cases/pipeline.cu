// A TMA pipeline: one warp loads tiles, another sums them. Each stage has two mbarriers: full (bytes arrived) and empty
// (everybody has read it). Phases alternate; the wait for the empty stage passes at once in the first round.
#include "cases.h"

namespace hebatron::cases {
namespace {

constexpr int kTiles = 7, kStages = 2, kRows = 8, kColumns = 64;
constexpr uint32_t kBytesTile = kRows * kColumns * 2;

enum class Pipeline {
  right,
  no_wait_on_empty,
  no_wait_on_full,
  early_release,
  wrong_phase,
  too_few_bytes,   // of those that arrive are expected
  too_many_bytes,  // are expected, which never arrive
  two_arrivals,
  no_fence_init,
  no_init,
  misaligned_tile,
};

template <Pipeline bug>
__global__ void pipeline(HEBATRON_GRID_CONSTANT(TensorMap) map, float* out) {
  HEBATRON_DYNAMIC_SHARED(stages);
  HEBATRON_SHARED(uint64_t, full, kStages);
  HEBATRON_SHARED(uint64_t, empty, kStages);
  const int lane = lane_id();
  if (threadIdx.x == 0 && bug != Pipeline::no_init) {
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(full + s, 1);  // LINE: pipeline.init
      mbarrier_init(empty + s, kWarp);
    }
    if (bug != Pipeline::no_fence_init) mbarrier_fence_init();
  }
  block_sync();
  float sum = 0;
  for (int tile = 0; tile < kTiles; tile++) {
    const int s = tile % kStages, round = tile / kStages;
    uint8_t* const stage = stages + s * kBytesTile + (bug == Pipeline::misaligned_tile ? 128 : 0);
    if (threadIdx.x == 0) {
      const int wrong = bug == Pipeline::too_few_bytes ? -16 : bug == Pipeline::too_many_bytes ? 16 : 0;
      if (bug != Pipeline::no_wait_on_empty) mbarrier_wait(empty + s, (round & 1) ^ 1);  // LINE: pipeline.empty
      mbarrier_arrive_expect(full + s, kBytesTile + wrong);                      // LINE: pipeline.expect
      if (bug == Pipeline::two_arrivals) mbarrier_arrive(full + s);              // LINE: pipeline.second_arrival
      tma_load_2d(stage, &map, full + s, 0, tile * kRows);                       // LINE: pipeline.load
    } else if (threadIdx.x >= kWarp) {
      const bool flip = bug == Pipeline::wrong_phase;
      if (bug != Pipeline::no_wait_on_full) mbarrier_wait(full + s, (round & 1) ^ flip);  // LINE: pipeline.full
      if (bug == Pipeline::early_release) mbarrier_arrive(empty + s);
      for (int row = 0; row < kRows; row++) {
        const auto* words = reinterpret_cast<const __nv_bfloat16*>(stages + s * kBytesTile) + row * kColumns;
        for (int i = 0; i < 2; i++) sum += float(tile + 1) * widen(words[((lane / 4) ^ row) * 8 + lane % 4 * 2 + i]);  // LINE: pipeline.read
      }
      if (bug != Pipeline::early_release) mbarrier_arrive(empty + s);
    }
  }
  if (threadIdx.x >= kWarp) out[lane] = sum;
}
template <Pipeline bug>
void run_pipeline() {
  Tensor<__nv_bfloat16> in("in", kTiles * kRows * kColumns, [](size_t i) { return bf16(small(i)); });
  Tensor<float> out("out", kWarp);
  TensorMapShape shape;
  shape.dim[0] = kColumns;
  shape.dim[1] = kTiles * kRows;
  shape.stride[0] = kColumns * 2;
  shape.box[0] = kColumns;
  shape.box[1] = kRows;
  const TensorMap map = tensor_map("case", in.get(), shape);
  run(pipeline<bug>, 1, 64, kStages * kBytesTile + 1024, 1, map, out.get());
  out.expect([](size_t lane) {
    float sum = 0;
    for (size_t row = 0; row < kTiles * kRows; row++)
      for (size_t i = 0; i < 2; i++) sum += float(row / kRows + 1) * small(row * kColumns + lane * 2 + i);
    return sum;
  });
}

// ---- one bulk copy of bytes in a row ----
enum class Bulk { right, past_tensor, past_shared, no_wait, misaligned };

template <Bulk bug>
__global__ void bulk(const float* in, float* out) {
  HEBATRON_SHARED(float4, buffer, 64);
  HEBATRON_SHARED(uint64_t, full, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(full, 1024);
    const int shift = bug == Bulk::past_tensor ? 4 : bug == Bulk::misaligned ? 1 : 0;
    tma_load_1d(buffer + (bug == Bulk::past_shared ? 2 : 0), in + shift, 1024, full);  // LINE: bulk.load
  }
  block_sync();
  if (bug != Bulk::no_wait) mbarrier_wait(full, 0);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = reinterpret_cast<const float*>(buffer)[threadIdx.x * 4 + i];  // LINE: bulk.read
  if (bug == Bulk::no_wait) mbarrier_wait(full, 0);
}
template <Bulk bug>
void run_bulk() {
  Tensor<float> in("in", 256, small), out("out", 256);
  run(bulk<bug>, 1, 64, 0, 1, in.get(), out.get());
  out.expect(small);
}

}  // namespace

void add_pipeline_cases(Cases& cases) {
  cases.push_back({"pipeline", run_pipeline<Pipeline::right>});
  cases.push_back({"pipeline/no_wait_on_empty", run_pipeline<Pipeline::no_wait_on_empty>});
  cases.push_back({"pipeline/no_wait_on_full", run_pipeline<Pipeline::no_wait_on_full>});
  cases.push_back({"pipeline/early_release", run_pipeline<Pipeline::early_release>});
  cases.push_back({"pipeline/wrong_phase", run_pipeline<Pipeline::wrong_phase>});
  cases.push_back({"pipeline/too_few_bytes", run_pipeline<Pipeline::too_few_bytes>});
  cases.push_back({"pipeline/too_many_bytes", run_pipeline<Pipeline::too_many_bytes>});
  cases.push_back({"pipeline/two_arrivals", run_pipeline<Pipeline::two_arrivals>});
  cases.push_back({"pipeline/no_fence_init", run_pipeline<Pipeline::no_fence_init>});
  cases.push_back({"pipeline/no_init", run_pipeline<Pipeline::no_init>});
  cases.push_back({"pipeline/misaligned_tile", run_pipeline<Pipeline::misaligned_tile>});
  cases.push_back({"bulk", run_bulk<Bulk::right>});
  cases.push_back({"bulk/past_tensor", run_bulk<Bulk::past_tensor>});
  cases.push_back({"bulk/past_shared", run_bulk<Bulk::past_shared>});
  cases.push_back({"bulk/no_wait", run_bulk<Bulk::no_wait>});
  cases.push_back({"bulk/misaligned", run_bulk<Bulk::misaligned>});
}

}  // namespace hebatron::cases
