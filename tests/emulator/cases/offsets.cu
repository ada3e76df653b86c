// Results whose offsets pass 2^31 elements: the stores of grouped_gemm on sm_90a at rows that no test could fill up to (133,152
// tokens of the model wrap a 32-bit offset). The memory is reserved and only touched where a case stores.
#include <sys/mman.h>

#include "cases.h"
#include "cuda/grouped_gemm_sm90.cuh"

namespace hebatron::cases {
namespace {

constexpr int kRows = 64, kColumns = 64;  // stored

template <class T>
class Reserved {
 public:
  explicit Reserved(size_t count) : bytes_(count * sizeof(T)) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("cannot reserve " + std::to_string(bytes_) + " bytes of addresses");
    p_ = static_cast<T*>(p);
  }
  ~Reserved() { munmap(p_, bytes_); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  T* get() const { return p_; }
  T* allow(const char* name, int64_t at, size_t count) const {
    emulator::allow_memory(p_ + at, count * sizeof(T), name);
    return p_ + at;
  }

 private:
  size_t bytes_;
  T* p_ = nullptr;
};

__global__ void store_far(HEBATRON_GRID_CONSTANT(sm90::Problem) p, int row, int left) {
  float acc[kColumns / 2];
  for (int i = 0; i < kColumns / 2; i++) acc[i] = float(int(threadIdx.x) % 7 - 3 + i);
  const sm90::Tile tile{0, row, row + kRows, left};
  sm90::store_rows<kColumns>(acc, p, tile, row, left);
}

// Rows from `row` of n columns, from column `left`, of `rows` in all: out and kept are read and written past 2^31, or the
// pieces of row sums are.
void far_rows(int n, int row, int left, int rows) {
  const int64_t last = int64_t(row + kRows - 1) * n + left + kColumns;
  const Reserved<__nv_bfloat16> out(static_cast<size_t>(last)), kept(static_cast<size_t>(last));
  const int64_t piece = int64_t(left / kColumns) * rows + row;
  const Reserved<float> pieces(static_cast<size_t>(piece + kRows)), scale(static_cast<size_t>(row + kRows));
  for (int r = 0; r < kRows; r++) {
    const int64_t begin = int64_t(row + r) * n + left;
    out.allow("out", begin, kColumns);
    __nv_bfloat16* its_kept = kept.allow("kept", begin, kColumns);
    for (int i = 0; i < kColumns; i++) its_kept[i] = bf16(float(r % 4 + 1));
    scale.get()[row + r] = 1.0f;
  }
  pieces.allow("pieces", piece, kRows);
  scale.allow("scale", row, kRows);
  sm90::Problem p{};
  p.out = out.get(), p.kept = kept.get(), p.pieces = pieces.get(), p.scale = scale.get();
  p.rows = rows, p.n = n, p.relu2 = true;
  run(store_far, 1, kWarpgroup, 0, 1, p, row, left);
  for (int r = 0; r < kRows; r++) {
    float sum = 0;
    for (int c = 0; c < kColumns; c++) {
      const int thread = r / 16 * 32 + r % 8 * 4 + c % 8 / 2, i = c / 8 * 4 + r % 16 / 8 * 2 + c % 2;  // of the fragment
      const float g = float(thread % 7 - 3 + i), was = float(r % 4 + 1);
      const float got = __bfloat162float(out.get()[int64_t(row + r) * n + left + c]);
      const float want = __bfloat162float(bf16(2.0f * sqrtf(was) * g));
      if (got != want) throw std::runtime_error("wrong: out at row " + std::to_string(row + r) + ", column " + std::to_string(left + c));
      sum += g * was;
    }
    if (pieces.get()[piece + r] != sum) throw std::runtime_error("wrong: the sum of row " + std::to_string(row + r));
  }
}

}  // namespace

void add_offset_cases(Cases& cases) {
  cases.push_back({"far_out", [] { far_rows(1 << 22, 512, 0, 1024); }});       // row 512 of 2^22 columns begins at 2^31
  cases.push_back({"far_pieces", [] { far_rows(1 << 12, 64, 2048, 1 << 26); }});  // so does piece 32 of 2^26 rows
}

}  // namespace hebatron::cases
