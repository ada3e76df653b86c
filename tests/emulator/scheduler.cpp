// Fibers, the launch loop, the lines that reports name, and everything threads wait for together: warps, barriers, clusters.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "runtime.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

const Place* place = nullptr;
Thread* self = nullptr;
Statistics statistics;
Options current;
uint64_t progress = 0;
char* arena = nullptr;
size_t bytes_arena = 0;

namespace {

constexpr size_t kBytesStack = 256 * 1024, kBytesGuard = 4096;
constexpr int kSpinRounds = 64;  // rounds without progress after which spinning threads count as stuck

Options requested;
uint64_t random_state = 1;
std::vector<char*> free_stacks;
std::vector<std::unique_ptr<Block>> blocks;  // all of the launch, for reports
std::vector<Block*> slots;                   // resident, by slot
struct Deferred {
  Block* block;
  const void* line;  // that issued it
  std::function<void()> work;
};
std::vector<Deferred> deferred;
const void* deferred_line = nullptr;  // while its work is done
const std::function<void()>* kernel_body = nullptr;
std::string failure;
int one_in = 1;  // random mode: chance per resumed thread that work in flight is done

#ifdef __x86_64__
void* scheduler_stack = nullptr;
__attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
void prepare(Thread& t, void (*entry)()) {
  void** top = reinterpret_cast<void**>(t.stack + kBytesStack - 64);
  *--top = nullptr;  // where entry would return to: it never does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  t.stack_pointer = top;
}
void to_scheduler() { switch_stack(&self->stack_pointer, scheduler_stack); }
void to_thread(Thread& t) { switch_stack(&scheduler_stack, t.stack_pointer); }
#else
ucontext_t scheduler_context;
void prepare(Thread& t, void (*entry)()) {
  auto* context = new (t.stack) ucontext_t;  // at the far end of its own stack
  getcontext(context);
  context->uc_stack.ss_sp = t.stack + sizeof *context;
  context->uc_stack.ss_size = kBytesStack - sizeof *context;
  makecontext(context, entry, 0);
  t.stack_pointer = context;
}
void to_scheduler() { swapcontext(static_cast<ucontext_t*>(self->stack_pointer), &scheduler_context); }
void to_thread(Thread& t) { swapcontext(&scheduler_context, static_cast<ucontext_t*>(t.stack_pointer)); }
#endif

void thread_entry() {
  try {
    (*kernel_body)();
    check_thread_end(*self);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  self->done = true;
  self->block->live--;
  progress++;
  to_scheduler();
  __builtin_trap();
}

char* take_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kBytesStack + kBytesGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stack of a thread");
  mprotect(memory, kBytesGuard, PROT_NONE);
  return static_cast<char*>(memory) + kBytesGuard;
}

std::string where(Dim d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

Dim index_of(uint64_t number, Dim size) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / (uint64_t(size.x) * size.y))};
}

struct Launch {
  Dim grid, block;
  unsigned cluster;
  int threads;
  size_t bytes_dynamic;
  uint64_t total, next = 0;
};

void admit_cluster(Launch& launch, size_t first_slot) {
  auto barrier = std::make_shared<ClusterBarrier>();
  std::vector<Block*> members;
  for (unsigned rank = 0; rank < launch.cluster; rank++) {
    blocks.push_back(std::make_unique<Block>());
    Block& b = *blocks.back();
    b.number = uint32_t(launch.next++);
    b.index = index_of(b.number, launch.grid);
    b.slot = int(first_slot + rank);
    b.rank = rank;
    b.cluster_size = launch.cluster;
    b.cluster_barrier = barrier;
    b.shared = arena + b.slot * kBytesSlot;
    b.bytes_dynamic = b.bytes_used = launch.bytes_dynamic;
    b.live = launch.threads;
    if (current.mode == Mode::random) b.one_round_in = 1 << (random_number() % 4 * 2);
    b.warps.resize((launch.threads + 31) / 32);
    b.warpgroups.resize((launch.threads + 127) / 128);
    memset(b.shared, 0xff, kBytesSlot);  // NaN in every float format
    memory_begin_block(b);
    slots[b.slot] = &b;
    members.push_back(&b);
    for (int i = 0; i < launch.threads; i++) {
      b.threads.push_back(std::make_unique<Thread>());
      Thread& t = *b.threads.back();
      t.id = i;
      t.block = &b;
      t.place = {index_of(i, launch.block), b.index, launch.block, launch.grid};
      t.stack = take_stack();
      prepare(t, thread_entry);
      if (checked()) {
        add_actor(b, "thread " + std::to_string(i));
        t.clocks.generic.at(b.number, i) = 1;
      }
    }
  }
  for (Block* b : members) b->cluster = members;
}

void retire(Block& b) {
  for (auto& t : b.threads) free_stacks.push_back(t->stack);
  b.threads.clear();
  b.warps.clear();
  b.warpgroups.clear();
  b.mbarriers.clear();
  slots[b.slot] = nullptr;
}

void run_deferred(size_t i) {
  Deferred work = std::move(deferred[i]);
  deferred.erase(deferred.begin() + long(i));
  deferred_line = work.line;
  work.work();
  deferred_line = nullptr;
  progress++;
}

size_t pick_deferred() { return current.mode == Mode::random ? random_number() % deferred.size() : 0; }

void resume(Thread& t) {
  self = &t;
  place = &t.place;
  statistics.switches++;
  to_thread(t);
  self = nullptr;
  place = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, std::vector<int>> stuck;
  for (const Block* b : slots) {
    if (!b) continue;
    for (const auto& t : b->threads) {
      if (t->done) continue;
      stuck["block " + where(b->index) + " " + (t->waits_for ? t->waits_for : "?") + " at " + line_of(t->line) + describe_wait(*t)].push_back(t->id);
    }
  }
  std::string text = "emulator: deadlock, every thread waits:";
  for (const auto& [what, ids] : stuck) {
    text += "\n  " + std::to_string(ids.size()) + (ids.size() == 1 ? " thread (" : " threads (") + std::to_string(ids.front());
    if (ids.size() > 1) text += " to " + std::to_string(ids.back());
    text += ") of " + what;
  }
  throw std::runtime_error(text);
}

void run(Launch& launch) {
  std::vector<Thread*> order;
  int idle_rounds = 0;
  uint64_t progress_before = ~0ull;
  bool changed = true, wake = false;
  while (true) {
    for (size_t s = 0; s + launch.cluster <= slots.size() && launch.next < launch.total; s += launch.cluster) {
      if (slots[s]) continue;
      admit_cluster(launch, s);
      changed = true;
    }
    if (changed) {
      order.clear();
      for (Block* b : slots)
        if (b)
          for (auto& t : b->threads)
            if (!t->done) order.push_back(t.get());
      changed = false;
    }
    if (order.empty()) return;
    if (current.seed)
      for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
    bool worked = false, skipped = false;
    for (Block* b : slots)
      if (b) b->awake = wake || b->one_round_in == 1 || random_chance(b->one_round_in);
    for (Thread* t : order) {
      if (t->done || (t->ready && !t->ready(*t))) continue;
      if (!t->block->awake) {
        skipped = true;
        continue;
      }
      if (!t->spins) worked = true;
      resume(*t);
      if (current.mode == Mode::random && !deferred.empty() && random_chance(one_in)) run_deferred(pick_deferred());
    }
    for (size_t s = 0; s < slots.size(); s += launch.cluster) {
      bool ended = slots[s] != nullptr;
      for (unsigned r = 0; ended && r < launch.cluster; r++) ended = slots[s + r]->live == 0;
      if (!ended) continue;
      for (unsigned r = 0; r < launch.cluster; r++) {
        for (const Deferred& d : deferred)
          if (d.block == slots[s + r]) throw std::runtime_error("emulator: block " + where(d.block->index) + " ended with TMA or cp.async copies in flight");
        if (!slots[s + r]->unwritten.empty()) throw std::runtime_error(slots[s + r]->unwritten);
        retire(*slots[s + r]);
      }
      changed = true;
    }
    wake = !worked && (skipped || wake);  // whoever waits may wait for a block that was left alone: all, until one works
    if (worked || skipped || progress != progress_before) {
      idle_rounds = 0;
    } else if (!deferred.empty()) {
      run_deferred(pick_deferred());
    } else if (++idle_rounds > kSpinRounds) {
      report_deadlock();
    }
    progress_before = progress;
  }
}

void clear_launch() {
  for (Block* b : slots)
    if (b) retire(*b);
  memory_end_launch();
  blocks.clear();
  slots.clear();
  deferred.clear();
  deferred_line = nullptr;
  failure.clear();
  self = nullptr;
  place = nullptr;
}

}  // namespace

// ---- the lines of a kernel ----
std::string line_of(const void* return_address) {
  Dl_info info;
  if (!return_address || !dladdr(return_address, &info) || !info.dli_fname) return "an unknown line";
  static std::unordered_map<const void*, std::string> known;
  auto [entry, fresh] = known.try_emplace(return_address);
  if (!fresh) return entry->second;
  char command[1024];
  const size_t offset = size_t(static_cast<const char*>(return_address) - static_cast<const char*>(info.dli_fbase)) - 1;
  snprintf(command, sizeof command, "addr2line -f -i -C -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  std::string found, helper;
  if (FILE* pipe = popen(command, "r")) {
    char function[4096], place[4096];
    while (fgets(function, sizeof function, pipe) && fgets(place, sizeof place, pipe)) {
      std::string file = place, name = function;
      file = file.substr(0, file.find_first_of(" \n"));
      const size_t slash = file.find_last_of('/');
      const std::string base = file.substr(slash + 1, file.rfind(':') - slash - 1);  // npos + 1 is 0
      if (base == "prim.h") continue;  // the primitive's own body, inlined into the kernel
      for (const char* root : {"/csrc/", "/tests/", "/bench/"}) {
        const size_t at = file.rfind(root);
        if (at != std::string::npos) file = file.substr(at + 1);
      }
      if (base == "prim.cuh") {  // a helper that kernels share: its line, and the kernel's that called it
        if (helper.empty()) helper = file;
        continue;
      }
      for (size_t at; (at = name.find("(anonymous namespace)::")) != std::string::npos;) name.erase(at, 23);
      name = name.substr(0, name.find_first_of("(<\n"));
      const size_t colon = name.rfind("::"), space = name.rfind(' ');
      if (colon != std::string::npos) name = name.substr(colon + 2);
      else if (space != std::string::npos) name = name.substr(space + 1);
      found = file + " (" + name + ")";
      break;
    }
    pclose(pipe);
  }
  if (!helper.empty()) found += (found.empty() ? "" : ", in ") + helper;
  if (found.empty()) {
    snprintf(command, sizeof command, "%s+0x%zx (no line: is addr2line installed?)", info.dli_fname, offset);
    found = command;
  }
  return entry->second = found;
}

Options& options() { return requested; }
Statistics take_statistics() {
  const Statistics taken = statistics;
  statistics = {};
  return taken;
}

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}
bool random_chance(int n) { return random_number() % uint64_t(n) == 0; }

std::string name_of(const Thread& t) { return "thread " + std::to_string(t.id) + " of block " + where(t.block->index); }

void fail(const std::string& message) {
  std::string text = "emulator: " + message;
  if (self) text += "\n  " + name_of(*self) + " at " + line_of(self->line);
  if (!self && deferred_line) text += "\n  work that was issued at " + line_of(deferred_line);
  throw std::runtime_error(text);
}

void abandon(const std::string& message) {
  failure = message;
  to_scheduler();
  __builtin_trap();
}

Block* block_of_slot(size_t slot) { return slot < slots.size() ? slots[slot] : nullptr; }
const Block* block_of_number(uint32_t number) {
  for (const auto& b : blocks)
    if (b->number == number) return b.get();
  return nullptr;
}

void defer(Block* block, std::function<void()> work) {
  statistics.async_operations++;
  progress++;
  if (current.mode == Mode::eager)
    work();
  else
    deferred.push_back({block, self->line, std::move(work)});
}

void launch(const char* name, Dim grid, Dim block, unsigned cluster, int bytes_dynamic, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  current = requested;
  statistics.launches++;
  Launch l{grid, block, cluster, int(block.x * block.y * block.z), size_t(bytes_dynamic), uint64_t(grid.x) * grid.y * grid.z};
  auto need = [&](bool ok, const char* what) {
    if (!ok) throw std::runtime_error(std::string("emulator: ") + name + ": " + what);
  };
  need(l.threads >= 1 && l.threads <= 1024, "a block must have 1 to 1,024 threads");
  need(l.total >= 1 && grid.y <= 65535 && grid.z <= 65535, "the grid must be at least one block, y and z at most 65,535");
  need(bytes_dynamic >= 0 && bytes_dynamic <= current.bytes_shared, "the dynamic shared memory is more than a block may use");
  need(cluster >= 1 && cluster <= 8 && grid.x % cluster == 0, "the cluster must divide the grid along x and have at most 8 blocks");

  random_state = 0x9e3779b97f4a7c15ull ^ ((current.seed + 1) * 0xd1342543de82ef95ull);
  one_in = 1 << (random_number() % 7 * 2);
  const int per_sm = std::min({2048 / l.threads, (current.bytes_shared + 1024) / (bytes_dynamic + 1024), 32});
  uint64_t resident = std::min({uint64_t(current.sms) * per_sm, uint64_t(current.max_resident_threads) / l.threads, l.total});
  resident = std::max<uint64_t>(resident / cluster, 1) * cluster;
  if (resident * kBytesSlot > bytes_arena) {
    if (arena) munmap(arena, bytes_arena);
    bytes_arena = resident * kBytesSlot;
    void* memory = mmap(nullptr, bytes_arena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    need(memory != MAP_FAILED, "no memory for the blocks' shared memory");
    arena = static_cast<char*>(memory);
  }
  slots.assign(resident, nullptr);
  memory_begin_launch(__builtin_frame_address(0));
  kernel_body = &kernel;
  struct Ending {
    ~Ending() { clear_launch(); }
  } ending;
  run(l);
}

void wait_until(const char* waits_for, const void* waits_on, uint64_t value, bool (*ready)(const Thread&)) {
  Thread& t = *self;
  t.waits_for = waits_for;
  t.waits_on = waits_on;
  t.ready_value = value;
  t.ready = ready;
  t.spins = false;
  while (!ready(t)) to_scheduler();
  t.ready = nullptr;
  t.waits_for = nullptr;
}

void spin(const char* waits_for, const void* waits_on) {
  self->waits_for = waits_for;
  self->waits_on = waits_on;
  self->spins = true;
  to_scheduler();
  self->waits_for = nullptr;
}

void maybe_preempt() {
  if (current.mode != Mode::random || !random_chance(4)) return;
  self->spins = false;
  self->waits_for = "preempted";
  to_scheduler();
  self->waits_for = nullptr;
}

// ---- warps ----
Warp& warp_collective(const char* operation, void* argument, const std::function<void(Warp&, int)>& work) {
  Warp& w = self->block->warps[size_t(self->id) / 32];
  const int lanes = std::min(32, int(self->block->threads.size()) - self->id / 32 * 32);
  if (w.arrived && w.operation != operation)
    fail(std::string("the lanes of a warp are in different collectives: ") + operation + " here, " + w.operation + " at " + line_of(w.line));
  w.operation = operation;
  w.line = self->line;
  w.argument[self->id % 32] = argument;
  const uint64_t generation = w.generation;
  if (++w.arrived == lanes) {
    work(w, lanes);
    w.arrived = 0;
    w.generation++;
    progress++;
  } else {
    wait_until(operation, &w, generation, [](const Thread& t) { return static_cast<const Warp*>(t.waits_on)->generation != t.ready_value; });
  }
  return w;
}

namespace {
const char kShuffle[] = "a shuffle", kBallot[] = "ballot", kWarpSync[] = "warp_sync", kElect[] = "elect_one";

}  // namespace

uint64_t shuffle(uint64_t v, int lane) {
  EMULATOR_ENTER();
  Warp& w = warp_collective(kShuffle, &v, [](Warp& all, int lanes) {
    for (int i = 0; i < lanes; i++) all.value[i] = *static_cast<uint64_t*>(all.argument[i]);
  });
  return w.value[lane & 31];
}

uint32_t ballot(bool p) {
  EMULATOR_ENTER();
  Warp& w = warp_collective(kBallot, &p, [](Warp& all, int lanes) {
    all.value[0] = 0;
    for (int i = 0; i < lanes; i++) all.value[0] |= uint64_t(*static_cast<bool*>(all.argument[i])) << i;
  });
  return uint32_t(w.value[0]);
}

void warp_sync() {
  EMULATOR_ENTER();
  Warp& mine = self->block->warps[self->id / 32];
  Clocks& clocks = mine.clocks[mine.generation & 1];
  release(clocks);
  warp_collective(kWarpSync, nullptr, [](Warp& all, int) { all.clocks[(all.generation + 1) & 1].clear(); });
  acquire(clocks);
}

bool elect_one() {
  EMULATOR_ENTER();
  warp_collective(kElect, nullptr, [](Warp&, int) {});
  return self->id % 32 == 0;
}

// ---- blocks and clusters ----
static void barrier(int id, int threads, bool wait) {
  const int all = int(self->block->threads.size());
  if (id < 0 || id > 15) fail("a named barrier must be 0 to 15, got " + std::to_string(id));
  if (threads < 1 || threads > all || (id && threads % 32)) fail("a named barrier must count whole warps of the block, got " + std::to_string(threads));
  Barrier& b = self->block->barriers[id];
  if (b.arrived && b.expected != threads)
    fail("barrier " + std::to_string(id) + " counts " + std::to_string(threads) + " threads here and " + std::to_string(b.expected) + " elsewhere");
  b.expected = threads;
  const uint64_t generation = b.generation;
  Clocks& clocks = b.clocks[generation & 1];
  release(clocks);
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.generation++;
    b.clocks[b.generation & 1].clear();
    progress++;
  } else if (wait) {
    wait_until(id ? "named_barrier_sync" : "block_sync", &b, generation,
               [](const Thread& t) { return static_cast<const Barrier*>(t.waits_on)->generation != t.ready_value; });
  }
  if (wait) acquire(clocks);
  maybe_preempt();
}

void named_barrier(int id, int threads, bool wait) {
  EMULATOR_ENTER();
  barrier(id, threads, wait);
}
void block_sync() {
  EMULATOR_ENTER();
  barrier(0, int(self->block->threads.size()), true);
}

void cluster_arrive() {
  EMULATOR_ENTER();
  ClusterBarrier& b = *self->block->cluster_barrier;
  self->cluster_generation = b.generation;
  release(b.clocks[b.generation & 1]);
  if (++b.arrived == int(self->block->cluster_size * self->block->threads.size())) {
    b.arrived = 0;
    b.generation++;
    b.clocks[b.generation & 1].clear();
    progress++;
  }
}

void cluster_wait() {
  EMULATOR_ENTER();
  ClusterBarrier& b = *self->block->cluster_barrier;
  const uint64_t generation = self->cluster_generation;
  wait_until("cluster_wait", &b, generation, [](const Thread& t) { return static_cast<const ClusterBarrier*>(t.waits_on)->generation != t.ready_value; });
  acquire(b.clocks[generation & 1]);
}

uint32_t cluster_rank() { return self->block->rank; }
uint32_t cluster_size() { return self->block->cluster_size; }

void check_lives(const Block& b) {
  if (b.live == 0) fail("the shared memory of block " + where(b.index) + " is used after its end: cluster_sync must stand before that");
}

}  // namespace emulator
