// wgmma.mma_async: the four warps of a warpgroup multiply 64 x 16 by 16 x N, bf16, into N / 2 fp32 registers a thread.
// Inline PTX wants every register of the accumulator by number, so the preprocessor builds the operand lists from decades:
// HEBATRON_NAMES_104 is "%0, ... %103" and HEBATRON_VALUES_104 is "+f"(d[0]), ... "+f"(d[103]).
#pragma once

namespace hebatron::cuda {

HEBATRON_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HEBATRON_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
HEBATRON_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Ties registers to this place. After wgmma_wait: what reads the accumulator cannot be moved ahead of the wait. Before
// wgmma_fence: what writes the accumulator or A's registers cannot be moved behind the fence, which orders it before the product.
template <int kCount>
HEBATRON_DEVICE void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
HEBATRON_DEVICE void wgmma_hold(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// clang-format off
#define HEBATRON_N2(p) "%" #p "0, %" #p "1"
#define HEBATRON_N4(p) HEBATRON_N2(p) ", %" #p "2, %" #p "3"
#define HEBATRON_N6(p) HEBATRON_N4(p) ", %" #p "4, %" #p "5"
#define HEBATRON_N8(p) HEBATRON_N6(p) ", %" #p "6, %" #p "7"
#define HEBATRON_N10(p) HEBATRON_N8(p) ", %" #p "8, %" #p "9"
#define HEBATRON_V2(p) "+f"(d[p##0]), "+f"(d[p##1])
#define HEBATRON_V4(p) HEBATRON_V2(p), "+f"(d[p##2]), "+f"(d[p##3])
#define HEBATRON_V6(p) HEBATRON_V4(p), "+f"(d[p##4]), "+f"(d[p##5])
#define HEBATRON_V8(p) HEBATRON_V6(p), "+f"(d[p##6]), "+f"(d[p##7])
#define HEBATRON_V10(p) HEBATRON_V8(p), "+f"(d[p##8]), "+f"(d[p##9])
#define HEBATRON_N40 HEBATRON_N10() ", " HEBATRON_N10(1) ", " HEBATRON_N10(2) ", " HEBATRON_N10(3)
#define HEBATRON_N80 HEBATRON_N40 ", " HEBATRON_N10(4) ", " HEBATRON_N10(5) ", " HEBATRON_N10(6) ", " HEBATRON_N10(7)
#define HEBATRON_N100 HEBATRON_N80 ", " HEBATRON_N10(8) ", " HEBATRON_N10(9)
#define HEBATRON_NAMES_4 HEBATRON_N4()
#define HEBATRON_NAMES_8 HEBATRON_N8()
#define HEBATRON_NAMES_16 HEBATRON_N10() ", " HEBATRON_N6(1)
#define HEBATRON_NAMES_32 HEBATRON_N10() ", " HEBATRON_N10(1) ", " HEBATRON_N10(2) ", " HEBATRON_N2(3)
#define HEBATRON_NAMES_48 HEBATRON_N40 ", " HEBATRON_N8(4)
#define HEBATRON_NAMES_52 HEBATRON_N40 ", " HEBATRON_N10(4) ", " HEBATRON_N2(5)
#define HEBATRON_NAMES_56 HEBATRON_N40 ", " HEBATRON_N10(4) ", " HEBATRON_N6(5)
#define HEBATRON_NAMES_64 HEBATRON_N40 ", " HEBATRON_N10(4) ", " HEBATRON_N10(5) ", " HEBATRON_N4(6)
#define HEBATRON_NAMES_80 HEBATRON_N80
#define HEBATRON_NAMES_88 HEBATRON_N80 ", " HEBATRON_N8(8)
#define HEBATRON_NAMES_96 HEBATRON_N80 ", " HEBATRON_N10(8) ", " HEBATRON_N6(9)
#define HEBATRON_NAMES_104 HEBATRON_N100 ", " HEBATRON_N4(10)
#define HEBATRON_NAMES_112 HEBATRON_N100 ", " HEBATRON_N10(10) ", " HEBATRON_N2(11)
#define HEBATRON_NAMES_116 HEBATRON_N100 ", " HEBATRON_N10(10) ", " HEBATRON_N6(11)
#define HEBATRON_NAMES_128 HEBATRON_N100 ", " HEBATRON_N10(10) ", " HEBATRON_N10(11) ", " HEBATRON_N8(12)
#define HEBATRON_V40 HEBATRON_V10(), HEBATRON_V10(1), HEBATRON_V10(2), HEBATRON_V10(3)
#define HEBATRON_V80 HEBATRON_V40, HEBATRON_V10(4), HEBATRON_V10(5), HEBATRON_V10(6), HEBATRON_V10(7)
#define HEBATRON_V100 HEBATRON_V80, HEBATRON_V10(8), HEBATRON_V10(9)
#define HEBATRON_VALUES_4 HEBATRON_V4()
#define HEBATRON_VALUES_8 HEBATRON_V8()
#define HEBATRON_VALUES_16 HEBATRON_V10(), HEBATRON_V6(1)
#define HEBATRON_VALUES_32 HEBATRON_V10(), HEBATRON_V10(1), HEBATRON_V10(2), HEBATRON_V2(3)
#define HEBATRON_VALUES_48 HEBATRON_V40, HEBATRON_V8(4)
#define HEBATRON_VALUES_52 HEBATRON_V40, HEBATRON_V10(4), HEBATRON_V2(5)
#define HEBATRON_VALUES_56 HEBATRON_V40, HEBATRON_V10(4), HEBATRON_V6(5)
#define HEBATRON_VALUES_64 HEBATRON_V40, HEBATRON_V10(4), HEBATRON_V10(5), HEBATRON_V4(6)
#define HEBATRON_VALUES_80 HEBATRON_V80
#define HEBATRON_VALUES_88 HEBATRON_V80, HEBATRON_V8(8)
#define HEBATRON_VALUES_96 HEBATRON_V80, HEBATRON_V10(8), HEBATRON_V6(9)
#define HEBATRON_VALUES_104 HEBATRON_V100, HEBATRON_V4(10)
#define HEBATRON_VALUES_112 HEBATRON_V100, HEBATRON_V10(10), HEBATRON_V2(11)
#define HEBATRON_VALUES_116 HEBATRON_V100, HEBATRON_V10(10), HEBATRON_V6(11)
#define HEBATRON_VALUES_128 HEBATRON_V100, HEBATRON_V10(10), HEBATRON_V10(11), HEBATRON_V8(12)

// HEBATRON_WGMMA(N, accumulators, and the numbers of the operands that follow them)
#define HEBATRON_WGMMA(N, R, I0, I1, I2, I3, I4, I5, I6)                                                              \
  template <int kTransA, int kTransB>                                                                                     \
  HEBATRON_DEVICE void wgmma_ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {                                 \
    asm volatile("{\n.reg .pred P;\nsetp.ne.b32 P, %" #I2 ", 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HEBATRON_NAMES_##R "}, %" #I0 ", %" #I1     \
                 ", P, 1, 1, %" #I3 ", %" #I4 ";\n}"                                                                      \
                 : HEBATRON_VALUES_##R                                                                                    \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransA), "n"(kTransB));                                     \
  }                                                                                                                       \
  template <int kTransB>                                                                                                  \
  HEBATRON_DEVICE void wgmma_rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                     \
    asm volatile("{\n.reg .pred P;\nsetp.ne.b32 P, %" #I5 ", 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HEBATRON_NAMES_##R "}, {%" #I0 ", %" #I1    \
                 ", %" #I2 ", %" #I3 "}, %" #I4 ", P, 1, 1, %" #I6 ";\n}"                                                 \
                 : HEBATRON_VALUES_##R                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kTransB));               \
  }
HEBATRON_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
HEBATRON_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
HEBATRON_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
HEBATRON_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
HEBATRON_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
HEBATRON_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58)
HEBATRON_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
HEBATRON_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
HEBATRON_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
HEBATRON_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
HEBATRON_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
HEBATRON_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
HEBATRON_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
HEBATRON_WGMMA(232, 116, 116, 117, 118, 119, 120, 121, 122)
HEBATRON_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
// clang-format on
#undef HEBATRON_WGMMA

}  // namespace hebatron::cuda
