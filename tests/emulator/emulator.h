// The emulator of CUDA kernels: what the bindings control, and what prim.h calls. docs/emulator.md says how it works.
//
// Every CUDA thread is a fiber. Blocks run together up to the residency of `Options`, all on one OS thread, so that a run
// with one seed is the same every time. The build with EMULATOR_CHECKED also follows every memory access of a kernel:
// out of bounds, shared memory nobody wrote, and data races are errors that name the kernel's lines.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

// When asynchronous work (cp.async, TMA, wgmma) is done: at issue, as late as the waits allow, or at random moments.
enum class Mode { eager, lazy, random };

struct Options {
  Mode mode = Mode::lazy;
  uint64_t seed = 0;  // of the thread order and of the random mode; 0: threads in index order
  int sms = 3;
  int compute_capability = 90;
  int bytes_shared = 232448;  // a block may use
  int max_resident_threads = 2048;
};
struct Statistics {
  uint64_t launches = 0, switches = 0, async_operations = 0, matrix_operations = 0;
};

Options& options();
Statistics take_statistics();
bool checked();
void allow_memory(const void* p, size_t bytes, const std::string& name);  // kernels may touch nothing else
void forget_memory();
bool memory_known(const void* p);  // inside an allowed range, or no range was allowed

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};
// Runs one grid to its end. Errors are thrown as std::runtime_error, with every fiber abandoned.
void launch(const char* name, Dim grid, Dim block, unsigned cluster, int bytes_dynamic, const std::function<void()>& kernel);

// What a kernel sees of its thread.
struct Place {
  Dim thread, block, threads_of_block, blocks_of_grid;
};
extern const Place* place;

// Below, one function per primitive of prim.cuh. They are never inlined: the address they return to is the kernel's line.
void* shared_array(const void* tag, size_t bytes, size_t alignment);  // static shared memory of the running block
void* dynamic_shared();
uint32_t shared_address(const void* p);
uint32_t map_to_rank(uint32_t address, uint32_t rank);
uint32_t load_cluster(uint32_t address);
void store_cluster(uint32_t address, uint32_t v);

uint64_t shuffle(uint64_t v, int lane);
uint32_t ballot(bool p);
void warp_sync();
bool elect_one();
void block_sync();
void named_barrier(int id, int threads, bool wait);
void cluster_arrive();
void cluster_wait();
uint32_t cluster_rank();
uint32_t cluster_size();

void fence_gpu();
// An atomic read-modify-write of 4 or 8 bytes: `change` computes the new value in place; returns nothing, `old` gets the old.
void atomic(void* p, size_t bytes, void* old, const std::function<void(void*)>& change);
uint32_t load_acquire(const uint32_t* p);
void store_release(uint32_t* p, uint32_t v);

void cp_async_16(uint32_t dst, const void* src, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);
void cp_async_wait_all();
void cp_async_arrive(uint64_t* barrier);

void ldmatrix(uint32_t* r, uint32_t row, int count, bool transposed);
void stmatrix(uint32_t row, const uint32_t* r, int count, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b);

void mbarrier_init(uint64_t* b, uint32_t arrivals);
void mbarrier_arrive(uint64_t* b, uint32_t bytes_expected, bool counts);  // counts: also one arrival
void mbarrier_arrive_rank(uint64_t* b, uint32_t rank);
bool mbarrier_test(uint64_t* b, uint32_t parity);
void mbarrier_wait(uint64_t* b, uint32_t parity);

void fence_proxy_async();
struct alignas(64) TensorMap {
  const char* base = nullptr;
  uint64_t dim[3] = {1, 1, 1}, stride[2] = {0, 0};
  uint32_t box[3] = {1, 1, 1};
  int rank = 2, bytes_element = 2, swizzle = 128;
  bool f32 = false;
};
void tma_load(void* dst, const TensorMap* map, uint64_t* b, const int* at, uint32_t ranks);  // ranks 0: this block alone
void tma_load_1d(void* dst, const void* src, uint32_t bytes, uint64_t* b);
void tma_store(const TensorMap* map, const void* src, const int* at, bool add);
void tma_store_1d(void* dst, const void* src, uint32_t bytes, bool add);
void tma_commit();
void tma_wait(int pending, bool reads_only);

void wgmma_fence();
void wgmma(float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int n, bool transpose_a, bool transpose_b, bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending);
void set_registers(int count, bool increase);

}  // namespace emulator
