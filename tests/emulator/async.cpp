// Work that a thread starts and others finish: mbarriers, cp.async, TMA. What such work reads and writes is entered
// into the race detector when it is issued, with what the issuer knew then; the data itself moves when the mode says so.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runtime.h"

namespace emulator {

// ---- mbarrier ----
namespace {

constexpr int kBytesBias = 1 << 22;
struct Word {
  uint64_t phase : 1, expected : 20, pending : 20, bytes : 23;  // bytes still to come, biased: copies may come first
};
static_assert(sizeof(Word) == 8);

Block& owner_of(const void* p) { return *block_of_slot(size_t(static_cast<const char*>(p) - arena) / kBytesSlot); }

Clocks* clocks_of(uint64_t* b) {
  for (auto& [address, clocks] : owner_of(b).mbarriers)
    if (address == b) return clocks.get();
  return nullptr;
}

Word* word_of(uint64_t* b) {
  if (!is_shared(b) || reinterpret_cast<uintptr_t>(b) % 8) fail("an mbarrier must be 8 bytes of shared memory, aligned");
  if (!clocks_of(b)) fail("the mbarrier at shared offset " + std::to_string(size_t(reinterpret_cast<char*>(b) - arena) % kBytesSlot) + " is used before mbarrier_init");
  return reinterpret_cast<Word*>(b);
}

std::string describe(const uint64_t* b) {
  Word w;
  memcpy(&w, b, 8);
  const size_t offset = size_t(reinterpret_cast<const char*>(b) - arena) % kBytesSlot;
  return "the mbarrier at shared offset " + std::to_string(offset) + " (phase " + std::to_string(int(w.phase)) + ", waits for " +
         std::to_string(int(w.pending)) + " of " + std::to_string(int(w.expected)) + " arrivals and " + std::to_string(int(w.bytes) - kBytesBias) + " bytes)";
}

void complete(uint64_t* b) {
  Word* w = reinterpret_cast<Word*>(b);
  if (w->pending == 0 && w->bytes < kBytesBias) fail("more bytes arrived than were expected at " + describe(b));
  if (w->pending || w->bytes != kBytesBias) return;
  w->phase ^= 1;
  w->pending = w->expected;
  clocks_of(b)[w->phase].clear();
  progress++;
}

void take_arrival(uint64_t* b) {
  Word* w = reinterpret_cast<Word*>(b);
  if (w->pending == 0) fail("one arrival too many at " + describe(b));
  w->pending--;
}

}  // namespace

void mbarrier_init(uint64_t* b, uint32_t arrivals) {
  EMULATOR_ENTER();
  if (!is_shared(b) || reinterpret_cast<uintptr_t>(b) % 8) fail("an mbarrier must be 8 bytes of shared memory, aligned");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("an mbarrier must expect 1 to 1,048,575 arrivals, got " + std::to_string(arrivals));
  access(b, 8, Access::write, thread_actor());
  Word w{};
  w.expected = w.pending = arrivals;
  w.bytes = kBytesBias;
  memcpy(b, &w, 8);
  auto& all = self->block->mbarriers;
  all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& entry) { return entry.first == b; }), all.end());
  all.push_back({b, std::make_unique<Clocks[]>(2)});
}

static void arrive(uint64_t* b, uint32_t bytes, bool counts) {
  Word* w = word_of(b);
  access(b, 8, Access::atomic, thread_actor());
  release(clocks_of(b)[w->phase]);
  if (counts) take_arrival(b);
  w->bytes = w->bytes + bytes;
  complete(b);
  maybe_preempt();
}

void mbarrier_arrive(uint64_t* b, uint32_t bytes, bool counts) {
  EMULATOR_ENTER();
  arrive(b, bytes, counts);
}
void mbarrier_arrive_rank(uint64_t* b, uint32_t rank) {
  EMULATOR_ENTER();
  arrive(reinterpret_cast<uint64_t*>(shared_pointer(map_to_rank(shared_address(b), rank), 8)), 0, true);
}

static bool passed(const Thread& t) {
  return reinterpret_cast<const Word*>(t.waits_on)->phase != t.ready_value;
}

bool mbarrier_test(uint64_t* b, uint32_t parity) {
  EMULATOR_ENTER();
  Word* w = word_of(b);
  access(b, 8, Access::atomic, thread_actor());
  if (w->phase == (parity & 1)) {
    spin("mbarrier_test", b);
    return false;
  }
  acquire(clocks_of(b)[parity & 1]);
  return true;
}

void mbarrier_wait(uint64_t* b, uint32_t parity) {
  EMULATOR_ENTER();
  word_of(b);
  access(b, 8, Access::atomic, thread_actor());
  wait_until("mbarrier_wait", b, parity & 1, passed);
  acquire(clocks_of(b)[parity & 1]);
  maybe_preempt();
}

std::string describe_wait(const Thread& t) {
  if (!t.waits_for) return "";
  const std::string what = t.waits_for;
  if (what == "mbarrier_wait") return " for parity " + std::to_string(t.ready_value) + " of " + describe(static_cast<const uint64_t*>(t.waits_on));
  if (what == "mbarrier_test") return " of " + describe(static_cast<const uint64_t*>(t.waits_on));
  if (what == "block_sync" || what == "named_barrier_sync") {
    const auto& b = *static_cast<const Barrier*>(t.waits_on);
    return ": " + std::to_string(b.arrived) + " of " + std::to_string(b.expected) + " threads have arrived";
  }
  if (what == "cluster_wait" || what == "load_acquire") return "";
  return ": " + std::to_string(static_cast<const Warp*>(t.waits_on)->arrived) + " lanes have arrived";
}

// ---- cp.async ----
static void copy(Copy& c) {
  if (c.done) return;
  c.done = true;
  if (c.valid)
    memcpy(c.dst, c.src, 16);
  else
    memset(c.dst, 0, 16);
}

void cp_async_16(uint32_t dst, const void* src, bool valid) {
  EMULATOR_ENTER();
  if (dst % 16 || (valid && reinterpret_cast<uintptr_t>(src) % 16)) fail("cp_async_16 moves 16 bytes between addresses that are multiples of 16");
  Copy c{shared_pointer(dst, 16), src, valid, false};
  if (checked()) {
    if (self->copy_actor < 0) self->copy_actor = add_actor(*self->block, "cp.async of thread " + std::to_string(self->id));
    Actor a = thread_actor();
    a.id = uint32_t(self->copy_actor);
    a.step = self->copy_step;
    if (valid) access(src, 16, Access::read, a);
    access(c.dst, 16, Access::write, a);
  }
  if (current.mode == Mode::eager || (current.mode == Mode::random && random_chance(2)))
    copy(c);
  self->copies.push_back(c);
}

void cp_async_commit() {
  EMULATOR_ENTER();
  self->groups.push_back(std::move(self->copies));
  self->copies.clear();
  self->copy_step++;
}

static void wait_copies(int pending) {
  while (int(self->groups.size()) > pending) {
    for (Copy& c : self->groups.front()) copy(c);
    self->groups.pop_front();
  }
  const uint32_t open = self->copy_step;  // the group not committed; those before it are 1 .. open - 1
  if (open > uint32_t(pending) + 1) know(self->clocks, *self->block, self->copy_actor, open - 1 - uint32_t(pending), false);
}
void cp_async_wait(int pending) {
  EMULATOR_ENTER();
  wait_copies(pending);
}
void cp_async_wait_all() {  // what was not committed as well
  EMULATOR_ENTER();
  cp_async_commit();
  wait_copies(0);
}

void cp_async_arrive(uint64_t* b) {
  EMULATOR_ENTER();
  word_of(b);
  access(b, 8, Access::atomic, thread_actor());
  std::vector<Copy> all;
  for (const auto& group : self->groups) all.insert(all.end(), group.begin(), group.end());
  all.insert(all.end(), self->copies.begin(), self->copies.end());
  self->groups.clear();
  self->copies.clear();
  Block* block = self->block;
  const int64_t actor = self->copy_actor;
  const uint32_t step = self->copy_step++;
  defer(block, [=]() mutable {
    for (Copy& c : all) copy(c);
    know(clocks_of(b)[reinterpret_cast<Word*>(b)->phase], *block, actor, step, false);
    take_arrival(b);
    complete(b);
  });
}

// ---- TMA ----
namespace {

void check_tile(const TensorMap& map, const void* shared, const char* what) {
  const size_t offset = size_t(static_cast<const char*>(shared) - arena) % kBytesSlot;
  if (!is_shared(shared)) fail(std::string(what) + " needs shared memory on one side");
  if (offset % 128) fail(std::string(what) + ": the shared address must be a multiple of 128");
  if (map.swizzle == 128 && offset % 1024) fail(std::string(what) + ": a tile in the 128-byte swizzle must start at a multiple of 1,024");
  if (reinterpret_cast<uintptr_t>(&map) % 64) fail(std::string(what) + ": the tensor map must be 64-byte aligned (HEBATRON_GRID_CONSTANT)");
}

uint32_t bytes_of(const TensorMap& map) { return map.box[0] * map.box[1] * map.box[2] * uint32_t(map.bytes_element); }

// Calls use(shared offset within the tile, device address or null where outside the tensor) for each 16 bytes' elements.
template <class Use>
void for_elements(const TensorMap& map, const int* at, uint32_t tile_offset, Use use) {
  const uint32_t bytes_row = map.box[0] * uint32_t(map.bytes_element);
  uint32_t offset = 0;
  for (uint32_t z = 0; z < map.box[2]; z++)
    for (uint32_t y = 0; y < map.box[1]; y++)
      for (uint32_t x = 0; x < map.box[0]; x++, offset += uint32_t(map.bytes_element)) {
        const int64_t c[3] = {int64_t(at[0]) + x, int64_t(at[1]) + y, map.rank > 2 ? int64_t(at[2]) + z : 0};
        bool inside = true;
        for (int d = 0; d < map.rank; d++) inside = inside && c[d] >= 0 && uint64_t(c[d]) < map.dim[d];
        const char* p = map.base + c[0] * map.bytes_element + (inside ? c[1] * int64_t(map.stride[0]) + c[2] * int64_t(map.stride[1]) : 0);
        use(swizzled(tile_offset + offset, map.swizzle) - tile_offset, inside ? p : nullptr);
      }
  (void)bytes_row;
}

// The tile's accesses for the race detector: runs of elements that lie together are entered as one.
void enter_tile(const TensorMap& map, const int* at, char* shared, Access on_shared, Access on_device, const Actor& shared_actor, const Actor& device_actor) {
  if (!checked()) return;
  const char *run = nullptr, *end = nullptr;
  const uint32_t offset = uint32_t(size_t(shared - arena) % kBytesSlot);
  for_elements(map, at, offset, [&](size_t, const char* p) {
    if (p && p == end) {
      end += map.bytes_element;
      return;
    }
    if (run) access(run, size_t(end - run), on_device, device_actor);
    run = p;
    end = p ? p + map.bytes_element : nullptr;
  });
  if (run) access(run, size_t(end - run), on_device, device_actor);
  access(shared, bytes_of(map), on_shared, shared_actor);
}

void finish_load(uint64_t* b, const Block& issuer, int64_t actor, uint32_t step, uint32_t bytes) {
  Word* w = reinterpret_cast<Word*>(b);
  know(clocks_of(b)[w->phase], issuer, actor, step, true);
  w->bytes = w->bytes - bytes;
  complete(b);
}

}  // namespace

void tma_load(void* dst, const TensorMap* map, uint64_t* b, const int* at, uint32_t ranks) {
  EMULATOR_ENTER();
  check_tile(*map, dst, "tma_load");
  const TensorMap m = *map;
  const uint32_t here = shared_address(dst), barrier = shared_address(b), bytes = bytes_of(m);
  Block* issuer = self->block;
  const int64_t actor = free_actor(*issuer, self->clocks, "a TMA load");
  const uint32_t step = next_step(*issuer, actor);
  std::vector<std::pair<char*, uint64_t*>> targets;
  for (uint32_t rank = 0; rank < issuer->cluster.size(); rank++) {
    if (ranks ? !(ranks >> rank & 1) : rank != issuer->rank) continue;
    auto* target = shared_pointer(map_to_rank(here, rank), bytes);
    auto* its_barrier = reinterpret_cast<uint64_t*>(shared_pointer(map_to_rank(barrier, rank), 8));
    word_of(its_barrier);
    access(its_barrier, 8, Access::atomic, async_actor(actor, step));
    enter_tile(m, at, target, Access::write, Access::read, async_actor(actor, step), async_actor(actor, step));
    targets.push_back({target, its_barrier});
  }
  if (ranks >> issuer->cluster.size()) fail("tma_load: the multicast names ranks outside the cluster");
  const int corner[3] = {at[0], at[1], at[2]};
  defer(issuer, [=] {
    for (const auto& [target, its_barrier] : targets) {
      check_lives(owner_of(target));
      char* tile = target;
      for_elements(m, corner, here & 0xffffff, [&](size_t offset, const char* p) {
        if (p)
          memcpy(tile + offset, p, size_t(m.bytes_element));
        else
          memset(tile + offset, 0, size_t(m.bytes_element));
      });
      finish_load(its_barrier, *issuer, actor, step, bytes);
    }
  });
}

void tma_load_1d(void* dst, const void* src, uint32_t bytes, uint64_t* b) {
  EMULATOR_ENTER();
  if (bytes % 16 || reinterpret_cast<uintptr_t>(src) % 16 || shared_address(dst) % 16) fail("tma_load_1d: addresses and size must be multiples of 16");
  word_of(b);
  char* target = shared_pointer(shared_address(dst), bytes);
  Block* issuer = self->block;
  const int64_t actor = free_actor(*issuer, self->clocks, "a TMA load");
  const uint32_t step = next_step(*issuer, actor);
  if (checked()) {
    access(b, 8, Access::atomic, async_actor(actor, step));
    access(src, bytes, Access::read, async_actor(actor, step));
    access(target, bytes, Access::write, async_actor(actor, step));
  }
  defer(issuer, [=] {
    memcpy(target, src, bytes);
    finish_load(b, *issuer, actor, step, bytes);
  });
}

static void add_store(BulkStore store) {
  store.group = self->store_group;
  statistics.async_operations++;
  if (current.mode == Mode::eager || (current.mode == Mode::random && random_chance(2))) {
    store.data = store.read();
    store.done_reading = true;
  }
  self->stores.push_back(std::move(store));
}

static std::pair<Actor, Actor> store_actors() {  // of the reads of shared memory, and of the writes of device memory
  if (!checked()) return {};
  if (self->read_actor < 0) {
    self->read_actor = add_actor(*self->block, "a TMA store of thread " + std::to_string(self->id));
    self->write_actor = add_actor(*self->block, "a TMA store of thread " + std::to_string(self->id));
  }
  return {async_actor(self->read_actor, self->store_group), async_actor(self->write_actor, self->store_group)};
}

static void store_elements(const TensorMap& m, char* to, const char* from, bool add) {
  if (!add) {
    memcpy(to, from, size_t(m.bytes_element));
  } else if (m.f32) {
    float sum, more;
    memcpy(&sum, to, 4);
    memcpy(&more, from, 4);
    sum += more;
    memcpy(to, &sum, 4);
  } else {
    uint32_t sum = 0, more = 0;  // bf16 as the high half of an fp32
    memcpy(reinterpret_cast<char*>(&sum) + 2, to, 2);
    memcpy(reinterpret_cast<char*>(&more) + 2, from, 2);
    float x, y;
    memcpy(&x, &sum, 4);
    memcpy(&y, &more, 4);
    x += y;
    memcpy(&sum, &x, 4);
    const uint16_t rounded = uint16_t((sum + 0x7fff + (sum >> 16 & 1)) >> 16);
    memcpy(to, &rounded, 2);
  }
}

void tma_store(const TensorMap* map, const void* src, const int* at, bool add) {
  EMULATOR_ENTER();
  check_tile(*map, src, "tma_store");
  const TensorMap m = *map;
  const uint32_t here = shared_address(src) & 0xffffff;
  char* tile = shared_pointer(here | self->block->rank << 24, bytes_of(m));
  const auto [reader, writer] = store_actors();
  enter_tile(m, at, tile, Access::read, add ? Access::atomic : Access::write, reader, writer);
  const int corner[3] = {at[0], at[1], at[2]};
  BulkStore store;
  store.read = [=] { return std::vector<char>(tile, tile + bytes_of(m)); };
  store.write = [=](const std::vector<char>& data) {
    for_elements(m, corner, here, [&](size_t offset, const char* p) {
      if (p) store_elements(m, const_cast<char*>(p), data.data() + offset, add);
    });
  };
  add_store(std::move(store));
}

void tma_store_1d(void* dst, const void* src, uint32_t bytes, bool add) {
  EMULATOR_ENTER();
  if (bytes % 16 || reinterpret_cast<uintptr_t>(dst) % 16 || shared_address(src) % 16) fail("tma_store_1d: addresses and size must be multiples of 16");
  const char* from = shared_pointer(shared_address(src), bytes);
  if (checked()) {
    const auto [reader, writer] = store_actors();
    access(from, bytes, Access::read, reader);
    access(dst, bytes, add ? Access::atomic : Access::write, writer);
  }
  BulkStore store;
  store.read = [=] { return std::vector<char>(from, from + bytes); };
  store.write = [=](const std::vector<char>& data) {
    TensorMap m;
    m.f32 = true;
    m.bytes_element = 4;
    for (uint32_t i = 0; i < bytes; i += 4) store_elements(m, static_cast<char*>(dst) + i, data.data() + i, add);
  };
  add_store(std::move(store));
}

void tma_commit() {
  EMULATOR_ENTER();
  self->store_group++;
}

static void finish_stores(int pending, bool reads_only) {
  const int64_t last = int64_t(self->store_group) - 1 - pending;  // the newest group that must be finished
  for (BulkStore& s : self->stores) {
    if (int64_t(s.group) > last) continue;
    s.waited_for = true;
    if (s.done_reading) continue;
    s.data = s.read();
    s.done_reading = true;
  }
  if (last > 0) know(self->clocks, *self->block, self->read_actor, uint32_t(last), true);
  if (reads_only) return;
  while (!self->stores.empty() && int64_t(self->stores.front().group) <= last) {
    self->stores.front().write(self->stores.front().data);
    self->stores.pop_front();
  }
  if (last > 0) know(self->clocks, *self->block, self->write_actor, uint32_t(last), true);
}

void tma_wait(int pending, bool reads_only) {
  EMULATOR_ENTER();
  finish_stores(pending, reads_only);
}

void check_thread_end(Thread& t) {
  const bool in_flight = std::any_of(t.groups.begin(), t.groups.end(), [](const std::vector<Copy>& group) { return !group.empty(); });
  if (!t.copies.empty() || in_flight) fail("the thread ends with cp.async copies it has not waited for");
  for (const BulkStore& s : t.stores)
    if (s.group >= t.store_group) fail("the thread ends with TMA stores it has not committed");
  const bool unread = std::any_of(t.stores.begin(), t.stores.end(), [](const BulkStore& s) { return !s.waited_for; });
  if (unread) fail("the thread ends before its TMA stores have read shared memory: tma_wait_read is missing");
  finish_stores(0, false);
  const Warpgroup& g = t.block->warpgroups[size_t(t.id) / 128];
  if (!g.open.empty() || t.waited_groups < g.group_steps.size()) fail("the thread ends with wgmma it has not waited for");
  if (t.block->live == 1) check_registers(*t.block);
}

}  // namespace emulator
