// What CuTe says of fragments, swizzled tiles and descriptors, for tests/emulator/test_cute.py: an oracle that shares
// nothing with the emulator. Compiled by the host compiler against CUTLASS's and CUDA's headers; no nvcc, no GPU.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <cstring>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace cute;
using Element = bfloat16_t;

namespace {

// out[thread][value]: the element's number, rows first.
template <class Layout>
int list_fragment(const Layout& layout, int* out) {
  const int threads = size<0>(layout), values = size<1>(layout);
  for (int t = 0; t < threads; t++)
    for (int v = 0; v < values; v++) out[t * values + v] = int(layout(t, v));
  return threads * values;
}

// offsets[row][k] in elements, and of each slice of 16 k its descriptor without the address, and its start in bytes.
template <SM90::GMMA::Major kMajor, class Atom, int kRows>
int list_tile(Atom atom, Int<kRows>, int* offsets, uint64_t* descriptors, int* starts) {
  const auto layout = tile_to_shape(atom, Shape<Int<kRows>, _64>{});
  const auto plain = as_position_independent_swizzle_layout(layout);
  for (int row = 0; row < kRows; row++)
    for (int k = 0; k < 64; k++) offsets[row * 64 + k] = int(plain(row, k));
  alignas(1024) static Element memory[256 * 64];
  const auto tile = make_tensor(make_smem_ptr(memory), layout);
  for (int step = 0; step < 4; step++) {  // CuTe complains that a host has no shared addresses: starts[] says them instead
    const auto slice = local_tile(tile, Shape<Int<kRows>, _16>{}, make_coord(0, step));
    const GmmaDescriptor descriptor = SM90::GMMA::make_gmma_desc<kMajor>(slice);
    std::memcpy(descriptors + step, &descriptor, 8);
    starts[step] = int(reinterpret_cast<const char*>(raw_pointer_cast(slice.data())) - reinterpret_cast<const char*>(memory));
  }
  return kRows * 64;
}

}  // namespace

// "wgmma_d" for one N, "wgmma_a" (from registers), "mma_a", "mma_b", "mma_c". Returns how many elements, 0: unknown.
EXPORTED int fragment(const char* name, int n, int* out) {
  using Mma = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  const std::string wanted = name;
  if (wanted == "wgmma_a") return list_fragment(SM90::GMMA::ALayout_64x16{}, out);
  if (wanted == "mma_a") return list_fragment(Mma::ALayout{}, out);
  if (wanted == "mma_b") return list_fragment(Mma::BLayout{}, out);
  if (wanted == "mma_c") return list_fragment(Mma::CLayout{}, out);
  if (n == 8) return list_fragment(SM90::GMMA::CLayout_64xN<8>{}, out);
  if (n == 64) return list_fragment(SM90::GMMA::CLayout_64xN<64>{}, out);
  if (n == 128) return list_fragment(SM90::GMMA::CLayout_64xN<128>{}, out);
  if (n == 208) return list_fragment(SM90::GMMA::CLayout_64xN<208>{}, out);
  if (n == 256) return list_fragment(SM90::GMMA::CLayout_64xN<256>{}, out);
  return 0;
}

EXPORTED int tile(int rows, int mn_major, int* offsets, uint64_t* descriptors, int* starts) {
  constexpr auto kK = SM90::GMMA::Major::K, kMN = SM90::GMMA::Major::MN;
  const SM90::GMMA::Layout_K_SW128_Atom<Element> k;
  const SM90::GMMA::Layout_MN_SW128_Atom<Element> mn;
  if (mn_major) {
    if (rows == 64) return list_tile<kMN>(mn, _64{}, offsets, descriptors, starts);
    if (rows == 128) return list_tile<kMN>(mn, _128{}, offsets, descriptors, starts);
    if (rows == 256) return list_tile<kMN>(mn, _256{}, offsets, descriptors, starts);
    return 0;
  }
  if (rows == 8) return list_tile<kK>(k, _8{}, offsets, descriptors, starts);
  if (rows == 64) return list_tile<kK>(k, _64{}, offsets, descriptors, starts);
  if (rows == 128) return list_tile<kK>(k, _128{}, offsets, descriptors, starts);
  if (rows == 208) return list_tile<kK>(k, Int<208>{}, offsets, descriptors, starts);
  if (rows == 256) return list_tile<kK>(k, _256{}, offsets, descriptors, starts);
  return 0;
}
