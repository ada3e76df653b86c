// What the emulator's three files share: threads, blocks, clocks, and the scheduler's waiting.
#pragma once
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

[[noreturn]] void fail(const std::string& message);  // ends the launch with this message, the place and the line
uint64_t random_number();
bool random_chance(int one_in);
std::string line_of(const void* return_address);  // "csrc/cuda/norm.cu:80 (forward)"

// ---- clocks (memory.cpp) ----
// An actor is whatever acts on its own: a thread, a thread's cp.async, a TMA copy, a warpgroup's wgmma. A clock says up to
// which of their steps the actors of each block are known to have finished.
struct Clock {
  std::vector<std::pair<uint32_t, std::vector<uint32_t>>> blocks;  // (block, step by actor)
  void join(const Clock& other);
  uint32_t& at(uint32_t block, uint32_t actor);
  uint32_t get(uint32_t block, uint32_t actor) const;
};
// Generic: what is ordered before. Async: the part of it the async proxy sees as well (it passes fence_proxy_async).
struct Clocks {
  Clock generic, async;
  void join(const Clocks& other);
  void clear();
};
enum class Access : uint8_t { read, write, atomic };
// One who accesses memory: whose step it is, by what knowledge, through which proxy, at which line.
struct Actor {
  uint32_t block = 0, id = 0, step = 0;
  const Clocks* known = nullptr;
  bool async = false;
  const void* line = nullptr;
};

struct Block;
struct Thread;

// ---- threads ----
struct Copy {  // one cp.async of 16 bytes
  char* dst;
  const void* src;
  bool valid, done;
};
struct BulkStore {  // one TMA store: shared memory is read first, device memory written later
  uint64_t group;
  std::function<std::vector<char>()> read;
  std::function<void(const std::vector<char>&)> write;
  std::vector<char> data;
  bool done_reading = false, waited_for = false;
};
struct Fragment {  // A's registers of a wgmma: they must stay what they are until its group is waited for
  size_t group;
  const uint32_t* at;
  uint32_t word[4];
  const void* line;
};
struct Thread {
  Place place;
  Block* block = nullptr;
  int id = 0;  // in the block
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool done = false, spins = false;
  int inside = 0;  // primitives
  const void* line = nullptr;  // of the primitive it is in
  const char* waits_for = nullptr;
  const void* waits_on = nullptr;
  bool (*ready)(const Thread&) = nullptr;
  uint64_t ready_value = 0;
  const void* last_acquired = nullptr;  // where load_acquire looked last, and what it found
  uint32_t last_value = 0;
  Clocks clocks, released, acquired;  // the last two: by fence_gpu, and by relaxed atomics before the next fence
  std::vector<Copy> copies;                // cp.async not committed
  std::deque<std::vector<Copy>> groups;    // committed
  std::deque<BulkStore> stores;
  uint32_t store_group = 1;  // the one being filled
  int64_t copy_actor = -1, read_actor = -1, write_actor = -1;
  uint64_t cluster_generation = 0;
  uint32_t copy_step = 1;    // of the copies not committed
  size_t waited_groups = 0;  // of its warpgroup's wgmma
  std::deque<Fragment> fragments;
};

struct Warp {
  const char* operation = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  void* argument[32] = {};
  uint64_t value[32] = {};
  const void* line = nullptr;
  Clocks clocks[2];
};
struct Barrier {
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
  Clocks clocks[2];
};
struct Wgmma {
  float* d[128];
  uint32_t a_registers[128][4];
  bool from_registers, transpose_a, transpose_b, accumulate;
  uint64_t a, b;
  int n;
  const void* line;
};
struct Warpgroup {
  const char* operation = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  const void* line = nullptr;
  bool fenced = false;
  int registers = 0;  // of a thread, by setmaxnreg; 0: as launched
  Wgmma next;                           // while its threads gather
  std::vector<Wgmma> open;              // issued, not committed
  std::deque<std::vector<Wgmma>> groups;  // committed, not done
  int64_t actor = -1;
  uint32_t step = 0;                    // of the last one issued
  std::vector<uint32_t> group_steps;    // the last step of every group committed
};
struct ClusterBarrier {
  int arrived = 0;
  uint64_t generation = 0;
  Clocks clocks[2];
};
struct ActorInfo {
  std::string name;
  uint32_t step = 0;
};
struct Block {
  uint32_t number = 0;  // of the launch
  Dim index;
  int slot = 0, live = 0;
  int one_round_in = 1;  // random mode: its threads are resumed in one round of so many, so that blocks overtake each other
  bool awake = true;
  uint32_t rank = 0, cluster_size = 1;
  std::vector<Block*> cluster;
  std::shared_ptr<ClusterBarrier> cluster_barrier;
  char* shared = nullptr;
  size_t bytes_dynamic = 0, bytes_used = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[16];
  std::vector<ActorInfo> actors;  // threads first
  std::vector<std::pair<uint64_t*, std::unique_ptr<Clocks[]>>> mbarriers;
  std::string unwritten;  // the first read of shared memory that nobody had written
};

// ---- scheduler.cpp ----
extern Thread* self;
extern Statistics statistics;
extern Options current;      // the options of the running launch
extern uint64_t progress;    // moves whenever something happened that could free a waiting thread
constexpr size_t kBytesSlot = 256 * 1024;
extern char* arena;          // shared memory of all resident blocks, kBytesSlot each
extern size_t bytes_arena;
Block* block_of_slot(size_t slot);
const Block* block_of_number(uint32_t number);
// Suspends the running thread until ready(thread); `waits_for` and `waits_on` are for the report of a deadlock.
void wait_until(const char* waits_for, const void* waits_on, uint64_t value, bool (*ready)(const Thread&));
void spin(const char* waits_for, const void* waits_on);  // lets others run; without progress anywhere it is a deadlock
void maybe_preempt();                                    // in random mode, lets others run now and then
std::string name_of(const Thread& thread);
[[noreturn]] void abandon(const std::string& message);  // ends the launch from where no exception may pass
// All lanes of the running warp meet; the last one does `work(warp, lanes)`.
Warp& warp_collective(const char* operation, void* argument, const std::function<void(Warp&, int)>& work);
// Work in flight, done when the mode says so; `block` may not end before it.
void defer(Block* block, std::function<void()> work);
std::string describe_wait(const Thread& thread);  // async.cpp: the state of what it waits on
void check_lives(const Block& block);      // its shared memory is about to be used: no block does so after its end
void check_registers(const Block& block);  // matrix.cpp: what setmaxnreg gave must have been there

// ---- memory.cpp ----
void memory_begin_launch(const void* stack_frame);
void memory_end_launch();
void memory_begin_block(Block& block);
inline size_t swizzled(size_t offset, int swizzle) { return swizzle == 128 ? offset ^ (offset >> 7 & 7) << 4 : offset; }
char* shared_pointer(uint32_t address, size_t bytes);  // of the running block, or of its cluster by the rank bits
bool is_shared(const void* p);
void release(Clocks& to);           // the running thread publishes what it knows and did
void acquire(const Clocks& from);
void know(Clocks& to, const Block& block, int64_t actor, uint32_t step, bool async);  // that this step is finished
Clocks meet(const Clocks* const* of, int count);  // what all of them know
Actor thread_actor();
Actor async_actor(int64_t id, uint32_t step);  // work of the running thread that goes through the async proxy
int64_t add_actor(Block& block, const std::string& name);
int64_t free_actor(Block& block, const Clocks& known, const char* name);  // one whose steps are all known
uint32_t next_step(Block& block, int64_t actor);
void access(const void* p, size_t bytes, Access kind, const Actor& actor);
void check_thread_end(Thread& thread);  // async.cpp: nothing may be left in flight

// Inside a primitive the hooks are deaf: the linker may give the emulator an instrumented copy of a library template.
struct Inside {
  Thread& thread;
  Inside() : thread(*self) { thread.inside++; }
  ~Inside() { thread.inside--; }
};
#define EMULATOR_ENTER() \
  const ::emulator::Inside inside_; \
  if (inside_.thread.inside == 1) inside_.thread.line = __builtin_return_address(0)

}  // namespace emulator
