// What kernels may touch, who touched it last, and whether that was ordered: bounds, shared memory nobody wrote, data races.
//
// A race is two accesses to a byte, one of them a write, that no chain of barriers orders. Every actor has a clock of the
// steps it knows to be finished (vector clocks); every word of memory remembers the accesses that are not yet covered by a
// later one. The async proxy (TMA, wgmma) sees a plain or cp.async write only through the thread's second clock, which
// fence_proxy_async moves. Accesses of kernel code arrive through the hooks that g++ -fsanitize=thread calls; no sanitizer
// runtime is linked.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "runtime.h"

namespace emulator {

// ---- clocks ----
uint32_t& Clock::at(uint32_t block, uint32_t actor) {
  for (auto& [number, steps] : blocks)
    if (number == block) {
      if (steps.size() <= actor) steps.resize(actor + 1);
      return steps[actor];
    }
  blocks.push_back({block, std::vector<uint32_t>(actor + 1)});
  return blocks.back().second[actor];
}

uint32_t Clock::get(uint32_t block, uint32_t actor) const {
  for (const auto& [number, steps] : blocks)
    if (number == block) return actor < steps.size() ? steps[actor] : 0;
  return 0;
}

void Clock::join(const Clock& other) {
  for (const auto& [number, theirs] : other.blocks) {
    if (theirs.empty()) continue;
    at(number, uint32_t(theirs.size() - 1));
    for (auto& [mine_number, mine] : blocks) {
      if (mine_number != number) continue;
      for (size_t i = 0; i < theirs.size(); i++) mine[i] = std::max(mine[i], theirs[i]);
    }
  }
}

void Clocks::join(const Clocks& other) {
  generic.join(other.generic);
  async.join(other.async);
}
void Clocks::clear() {
  generic.blocks.clear();
  async.blocks.clear();
}

static Clock meet(const Clock* const* of, int count) {
  Clock result;
  for (const auto& [number, steps] : of[0]->blocks) {
    std::vector<uint32_t> known = steps;
    for (int i = 1; i < count; i++)
      for (size_t actor = 0; actor < known.size(); actor++) known[actor] = std::min(known[actor], of[i]->get(number, uint32_t(actor)));
    result.blocks.push_back({number, std::move(known)});
  }
  return result;
}

Clocks meet(const Clocks* const* of, int count) {
  Clocks result;
  if (!checked()) return result;
  std::vector<const Clock*> generic, async;
  for (int i = 0; i < count; i++) {
    generic.push_back(&of[i]->generic);
    async.push_back(&of[i]->async);
  }
  result.generic = meet(generic.data(), count);
  result.async = meet(async.data(), count);
  return result;
}

#ifdef EMULATOR_CHECKED
bool checked() { return true; }
#else
bool checked() { return false; }
#endif

void release(Clocks& to) {
  if (!checked()) return;
  to.join(self->clocks);
  self->clocks.generic.at(self->block->number, uint32_t(self->id))++;
}
void acquire(const Clocks& from) {
  if (checked()) self->clocks.join(from);
}
void know(Clocks& to, const Block& block, int64_t actor, uint32_t step, bool async) {
  if (!checked() || actor < 0) return;
  uint32_t& known = to.generic.at(block.number, uint32_t(actor));
  known = std::max(known, step);
  if (!async) return;
  uint32_t& seen = to.async.at(block.number, uint32_t(actor));
  seen = std::max(seen, step);
}

Actor thread_actor() {
  Actor a;
  if (!checked()) return a;
  a.block = self->block->number;
  a.id = uint32_t(self->id);
  a.step = self->clocks.generic.get(a.block, a.id);
  a.known = &self->clocks;
  a.line = self->line;
  return a;
}
Actor async_actor(int64_t id, uint32_t step) {
  Actor a = thread_actor();
  a.id = uint32_t(id);
  a.step = step;
  a.async = true;
  return a;
}
int64_t add_actor(Block& block, const std::string& name) {
  if (!checked()) return -1;
  block.actors.push_back({name, 0});
  return int64_t(block.actors.size()) - 1;
}
uint32_t next_step(Block& block, int64_t actor) { return checked() ? ++block.actors[size_t(actor)].step : 0; }
int64_t free_actor(Block& block, const Clocks& known, const char* name) {
  if (!checked()) return -1;
  for (size_t i = block.threads.size(); i < block.actors.size(); i++)
    if (block.actors[i].name == name && known.generic.get(block.number, uint32_t(i)) >= block.actors[i].step) return int64_t(i);
  return add_actor(block, name);
}

// fence.proxy.async: what the thread knows by now, the async proxy sees as well.
void fence_proxy_async() {
  EMULATOR_ENTER();
  if (!checked()) return;
  self->clocks.async.join(self->clocks.generic);
  self->clocks.generic.at(self->block->number, uint32_t(self->id))++;
}

// ---- memory and who touched it ----
namespace {

struct Record {
  uint32_t block, actor, step;
  uint8_t bytes;  // of the word, a bit each
  Access kind;
  bool async;
  const void* line;
  uint32_t next;
};
struct Cell {
  uint32_t writes = 0, reads = 0;  // lists of records; atomics stand among the writes
};
struct Range {
  uintptr_t begin, end;
  std::string name;
  std::vector<Cell> cells;
};

std::vector<Range> ranges;
std::vector<std::vector<Cell>> slot_cells;      // by resident slot
std::vector<std::vector<uint8_t>> slot_written;  // bytes of each word that somebody wrote
std::vector<Record> pool(1);                    // 0 is no record
uint32_t free_records = 0;
std::unordered_map<const void*, Clocks> published;  // by store_release, fence_gpu and atomics
std::vector<std::pair<const void*, size_t>> statics;  // tag and offset of static shared memory, the same in every block
size_t bytes_statics = 0;                              // where it ends
uintptr_t stack_low, stack_high, image_low, image_high;

const char image_anchor = 0;

void find_image() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        uintptr_t low = ~uintptr_t(0), high = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          low = std::min(low, uintptr_t(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr));
          high = std::max(high, uintptr_t(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz));
        }
        const uintptr_t here = reinterpret_cast<uintptr_t>(&image_anchor);
        if (here < low || here >= high) return 0;
        image_low = low;
        image_high = high;
        return 1;
      },
      nullptr);
}

uint32_t new_record(const Record& r) {
  if (free_records) {
    const uint32_t i = free_records;
    free_records = pool[i].next;
    pool[i] = r;
    return i;
  }
  pool.push_back(r);
  return uint32_t(pool.size() - 1);
}
void push(uint32_t& list, uint8_t bytes, Access kind, const Actor& a) {
  list = new_record({a.block, a.id, a.step, bytes, kind, a.async, a.line, list});
}
// Takes the records that `covered` names out of a list.
template <class Covered>
void prune(uint32_t& list, Covered covered) {
  for (uint32_t* at = &list; *at;) {
    Record& r = pool[*at];
    if (covered(r)) {
      const uint32_t gone = *at;
      *at = r.next;
      r.next = free_records;
      free_records = gone;
    } else {
      at = &r.next;
    }
  }
}

bool needs_fence(const Record& r, const Actor& a) { return a.async && !r.async && r.kind != Access::read; }
bool ordered(const Record& r, const Actor& a) {
  if (r.block == a.block && r.actor == a.id && r.step == a.step) return true;
  const Clock& clock = needs_fence(r, a) ? a.known->async : a.known->generic;
  return clock.get(r.block, r.actor) >= r.step;
}

std::string describe(uint32_t block, uint32_t actor, Access kind, const void* line) {
  const Block* b = block_of_number(block);
  std::string text = kind == Access::read ? "read by " : kind == Access::write ? "write by " : "atomic by ";
  text += b && actor < b->actors.size() ? b->actors[actor].name : "?";
  if (b) text += " of block (" + std::to_string(b->index.x) + ", " + std::to_string(b->index.y) + ", " + std::to_string(b->index.z) + ")";
  return text + " at " + line_of(line);
}

std::string locate(uintptr_t p) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(arena);
  if (p >= base && p < base + bytes_arena) return "shared memory at offset " + std::to_string((p - base) % kBytesSlot);
  for (const Range& r : ranges)
    if (p >= r.begin && p < r.end) return r.name + " at byte " + std::to_string(p - r.begin);
  return "memory";
}

[[noreturn]] void report_race(uintptr_t p, const Record& r, Access kind, const Actor& a) {
  std::string text = "emulator: data race in " + locate(p);
  text += "\n  " + describe(r.block, r.actor, r.kind, r.line);
  text += "\n  " + describe(a.block, a.id, kind, a.line);
  const bool fence = needs_fence(r, a) && a.known->generic.get(r.block, r.actor) >= r.step;
  text += fence ? "\n  the second goes through the async proxy, and no fence_proxy_async stands between them"
                : "\n  nothing orders the two";
  throw std::runtime_error(text);
}

[[noreturn]] void report_bounds(uintptr_t p, size_t bytes, Access kind, const Actor& a) {
  std::string text = "emulator: out of bounds: " + std::to_string(bytes) + " bytes " + describe(a.block, a.id, kind, a.line);
  const Range* nearest = nullptr;
  uintptr_t distance = ~uintptr_t(0);
  for (const Range& r : ranges) {
    const uintptr_t d = p < r.begin ? r.begin - p : p - std::min(p, r.end);
    if (d < distance) distance = d, nearest = &r;
  }
  if (nearest && distance < (1u << 24)) {
    text += "\n  " + std::to_string(distance) + " bytes " + (p < nearest->begin ? "before " : "past the end of ") + nearest->name + " (" +
            std::to_string(nearest->end - nearest->begin) + " bytes)";
  } else {
    text += "\n  in no tensor of the call, nor in shared memory";
  }
  throw std::runtime_error(text);
}

void access_word(Cell& cell, uintptr_t word, uint8_t bytes, Access kind, const Actor& a) {
  for (uint32_t i = cell.writes; i; i = pool[i].next) {
    const Record& r = pool[i];
    if ((r.bytes & bytes) && !(kind == Access::atomic && r.kind == Access::atomic) && !ordered(r, a)) report_race(word, r, kind, a);
  }
  if (kind == Access::read) {
    int seen = 0;
    for (uint32_t i = cell.reads; i && seen < 8; i = pool[i].next, seen++) {
      Record& r = pool[i];
      if (r.block == a.block && r.actor == a.id && r.bytes == bytes && r.async == a.async) {
        r.step = a.step;
        r.line = a.line;
        return;
      }
    }
    if (seen == 8) prune(cell.reads, [&](const Record& r) { return (r.bytes & ~bytes) == 0 && r.async == a.async && ordered(r, a); });
    push(cell.reads, bytes, kind, a);
    return;
  }
  for (uint32_t i = cell.reads; i; i = pool[i].next) {
    const Record& r = pool[i];
    if ((r.bytes & bytes) && !ordered(r, a)) report_race(word, r, kind, a);
  }
  if (kind == Access::write) {
    const auto covered = [&](const Record& r) { return (r.bytes & ~bytes) == 0; };
    prune(cell.writes, covered);
    prune(cell.reads, covered);
  } else {
    prune(cell.writes, [&](const Record& r) { return r.kind == Access::atomic && r.block == a.block && r.actor == a.id && (r.bytes & ~bytes) == 0; });
  }
  push(cell.writes, bytes, kind, a);
}

// Calls use(cell, word address, bytes of the word) for every word of the access.
template <class Use>
void for_words(std::vector<Cell>& cells, uintptr_t base, uintptr_t p, size_t bytes, Use use) {
  const uintptr_t end = p + bytes;
  for (uintptr_t word = p & ~uintptr_t(3); word < end; word += 4) {
    uint8_t mask = 0xf;
    if (word < p) mask = uint8_t(mask & 0xf << (p - word));
    if (word + 4 > end) mask = uint8_t(mask & 0xf >> (word + 4 - end));
    use(cells[(word - base) / 4], word, mask);
  }
}

}  // namespace

void allow_memory(const void* p, size_t bytes, const std::string& name) {
  if (!p || !bytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (const Range& r : ranges)
    if (begin >= r.begin && begin + bytes <= r.end) return;
  Range range{begin, begin + bytes, name, {}};
  // A tensor that spans others allowed before it replaces them; partial overlap cannot happen between storages.
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(), [&](const Range& r) { return r.begin >= begin && r.end <= begin + bytes; }), ranges.end());
  ranges.insert(std::lower_bound(ranges.begin(), ranges.end(), begin, [](const Range& r, uintptr_t at) { return r.begin < at; }), std::move(range));
}
void forget_memory() { ranges.clear(); }
bool memory_known(const void* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (ranges.empty()) return true;
  return std::any_of(ranges.begin(), ranges.end(), [&](const Range& r) { return at >= r.begin && at < r.end; });
}

void memory_begin_launch(const void* stack_frame) {
  stack_low = reinterpret_cast<uintptr_t>(stack_frame) - (64 << 10);
  stack_high = reinterpret_cast<uintptr_t>(stack_frame) + (1 << 20);  // the caller's frames: the kernel's parameters
  if (!image_high) find_image();
  statics.clear();
  bytes_statics = 0;
  if (!checked()) return;
  const size_t slots = bytes_arena / kBytesSlot;
  slot_cells.resize(slots);
  slot_written.resize(slots);
  for (Range& r : ranges) r.cells.assign((r.end - (r.begin & ~uintptr_t(3)) + 3) / 4, {});
}

void memory_end_launch() {
  pool.resize(1);
  free_records = 0;
  published.clear();
  for (Range& r : ranges) r.cells.clear();
  slot_cells.clear();
  slot_written.clear();
}

void memory_begin_block(Block& b) {
  b.bytes_used = std::max(b.bytes_used, bytes_statics);
  if (!checked()) return;
  slot_cells[size_t(b.slot)].assign(kBytesSlot / 4, {});
  slot_written[size_t(b.slot)].assign(kBytesSlot / 4, 0);
}

void access(const void* pointer, size_t bytes, Access kind, const Actor& a) {
  if (!checked() || !bytes) return;
  const uintptr_t p = reinterpret_cast<uintptr_t>(pointer), base = reinterpret_cast<uintptr_t>(arena);
  if (p >= base && p < base + bytes_arena) {
    const size_t slot = (p - base) / kBytesSlot, offset = (p - base) % kBytesSlot;
    const Block* owner = block_of_slot(slot);
    const Block* mine = block_of_number(a.block);
    if (!owner || !mine || owner->cluster != mine->cluster) report_bounds(p, bytes, kind, a);
    if (offset + bytes > owner->bytes_used)
      throw std::runtime_error("emulator: out of bounds: " + std::to_string(bytes) + " bytes " + describe(a.block, a.id, kind, a.line) +
                               "\n  at offset " + std::to_string(offset) + " of " + std::to_string(owner->bytes_used) + " bytes of shared memory");
    std::vector<uint8_t>& written = slot_written[slot];
    for_words(slot_cells[slot], base + slot * kBytesSlot, p, bytes, [&](Cell& cell, uintptr_t word, uint8_t mask) {
      uint8_t& done = written[(word - base) % kBytesSlot / 4];
      if (kind == Access::read && (mask & ~done) && owner->unwritten.empty())  // told at the block's end: a race says more
        block_of_slot(slot)->unwritten = "emulator: " + locate(word) + " is read before anybody wrote it\n  " + describe(a.block, a.id, kind, a.line);
      done |= kind == Access::read ? 0 : mask;
      access_word(cell, word, mask, kind, a);
    });
    return;
  }
  for (Range& r : ranges) {
    if (p < r.begin || p >= r.end) continue;
    if (p + bytes > r.end) report_bounds(r.end, p + bytes - r.end, kind, a);
    for_words(r.cells, r.begin & ~uintptr_t(3), p, bytes, [&](Cell& cell, uintptr_t word, uint8_t mask) { access_word(cell, word, mask, kind, a); });
    return;
  }
  report_bounds(p, bytes, kind, a);
}

// ---- shared memory ----
bool is_shared(const void* p) { return p >= arena && p < arena + bytes_arena; }

void* dynamic_shared() { return self->block->shared; }

void* shared_array(const void* tag, size_t bytes, size_t alignment) {
  EMULATOR_ENTER();
  Block& b = *self->block;
  for (const auto& [known, offset] : statics)
    if (known == tag) return b.shared + offset;
  const size_t offset = (b.bytes_used + std::max<size_t>(alignment, 16) - 1) / std::max<size_t>(alignment, 16) * std::max<size_t>(alignment, 16);
  // on a GPU the statics come first and the dynamic memory, declared on 1,024 bytes, behind them: ptxas rounds the statics up
  const size_t bytes_first = b.bytes_dynamic ? (offset + bytes - b.bytes_dynamic + 1023) / 1024 * 1024 : offset + bytes;
  if (bytes_first + b.bytes_dynamic > size_t(current.bytes_shared)) fail("static and dynamic shared memory together are more than a block may use");
  bytes_statics = offset + bytes;
  statics.push_back({tag, offset});
  for (size_t slot = 0; slot < bytes_arena / kBytesSlot; slot++)
    if (Block* resident = block_of_slot(slot)) resident->bytes_used = bytes_statics;
  return b.shared + offset;
}

uint32_t shared_address(const void* p) {
  EMULATOR_ENTER();
  const char* at = static_cast<const char*>(p);
  if (at < self->block->shared || at > self->block->shared + self->block->bytes_used) fail("the pointer is not in this block's shared memory");
  return uint32_t(at - self->block->shared) | self->block->rank << 24;
}

char* shared_pointer(uint32_t address, size_t bytes) {
  const uint32_t rank = address >> 24, offset = address & 0xffffff;
  if (rank >= self->block->cluster.size()) fail("the shared address names rank " + std::to_string(rank) + " of a smaller cluster");
  Block* b = self->block->cluster[rank];
  check_lives(*b);
  if (offset + bytes > b->bytes_used) fail("the shared address " + std::to_string(offset) + " + " + std::to_string(bytes) + " is past the block's " + std::to_string(b->bytes_used) + " bytes");
  return b->shared + offset;
}

uint32_t map_to_rank(uint32_t address, uint32_t rank) { return (address & 0xffffff) | rank << 24; }
uint32_t load_cluster(uint32_t address) {
  EMULATOR_ENTER();
  const char* p = shared_pointer(address, 4);
  access(p, 4, Access::read, thread_actor());
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}
void store_cluster(uint32_t address, uint32_t v) {
  EMULATOR_ENTER();
  char* p = shared_pointer(address, 4);
  access(p, 4, Access::write, thread_actor());
  memcpy(p, &v, 4);
}

// ---- order between blocks ----
void fence_gpu() {
  EMULATOR_ENTER();
  if (checked()) {
    self->clocks.join(self->acquired);
    self->acquired.clear();
    self->released.clear();
    release(self->released);
  }
  maybe_preempt();
}

void atomic(void* p, size_t bytes, void* old, const std::function<void(void*)>& change) {
  EMULATOR_ENTER();
  if (!checked() && is_shared(p) && !(p >= self->block->shared && p < self->block->shared + self->block->bytes_used)) fail("atomic past the block's shared memory");
  access(p, bytes, Access::atomic, thread_actor());
  memcpy(old, p, bytes);
  change(p);
  progress++;
  if (checked()) {
    Clocks& order = published[p];
    self->acquired.join(order);
    order.join(self->released);
  }
  maybe_preempt();
}

uint32_t load_acquire(const uint32_t* p) {
  EMULATOR_ENTER();
  if (self->last_acquired == p && self->last_value == *p)
    spin("load_acquire", p);  // the same answer twice: it polls
  else
    maybe_preempt();
  self->last_acquired = p;
  self->last_value = *p;
  access(p, 4, Access::atomic, thread_actor());
  if (checked()) acquire(published[p]);
  return *p;
}

void store_release(uint32_t* p, uint32_t v) {
  EMULATOR_ENTER();
  access(p, 4, Access::atomic, thread_actor());
  *p = v;
  progress++;
  if (checked()) {
    published[p].clear();  // whoever reads this value is ordered after this thread, not after earlier writers
    release(published[p]);
  }
  maybe_preempt();
}

}  // namespace emulator

// ---- the hooks of -fsanitize=thread and of -fsanitize=undefined; no library of theirs is linked ----
#ifdef EMULATOR_CHECKED
using emulator::Access;

static inline void touch(const void* p, size_t bytes, Access kind, const void* line) {
  emulator::Thread* t = emulator::self;
  if (!t || t->inside) return;  // host code, or the emulator's own
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at - reinterpret_cast<uintptr_t>(t->stack) < (256 << 10)) return;  // its own stack: registers and local memory
  if (at - reinterpret_cast<uintptr_t>(&t->place) < sizeof t->place) return;  // threadIdx and its kin
  if (at - emulator::stack_low < emulator::stack_high - emulator::stack_low) return;
  if (at - emulator::image_low < emulator::image_high - emulator::image_low) return;
  const emulator::Inside inside;
  t->line = line;
  try {
    emulator::access(p, bytes, kind, emulator::thread_actor());
  } catch (const std::exception& error) {  // g++ takes the hooks for functions that never throw
    emulator::abandon(error.what());
  }
}

extern "C" {
#define HEBATRON_HOOK(bytes)                                                                                   \
  void __tsan_read##bytes(void* p) { touch(p, bytes, Access::read, __builtin_return_address(0)); }             \
  void __tsan_write##bytes(void* p) { touch(p, bytes, Access::write, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* p) { touch(p, bytes, Access::read, __builtin_return_address(0)); }   \
  void __tsan_unaligned_write##bytes(void* p) { touch(p, bytes, Access::write, __builtin_return_address(0)); }
HEBATRON_HOOK(1)
HEBATRON_HOOK(2)
HEBATRON_HOOK(4)
HEBATRON_HOOK(8)
HEBATRON_HOOK(16)
void __tsan_read_range(void* p, size_t bytes) { touch(p, bytes, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { touch(p, bytes, Access::write, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
static void undefined(const SourceLocation* at, const char* what) {
  std::string file = at->file;
  for (const char* root : {"/csrc/", "/tests/", "/bench/"})
    if (file.rfind(root) != std::string::npos) file = file.substr(file.rfind(root) + 1);
  const std::string text = std::string("emulator: ") + what + " at " + file + ":" + std::to_string(at->line);
  if (!emulator::self) throw std::runtime_error(text);
  emulator::abandon(text + "\n  " + emulator::name_of(*emulator::self));
}
#define HEBATRON_UNDEFINED(name, what) \
  void __ubsan_handle_##name(SourceLocation* at, ...) { undefined(at, what); }
HEBATRON_UNDEFINED(type_mismatch_v1, "a vector is read or written at an address that is no multiple of its size,")
HEBATRON_UNDEFINED(out_of_bounds, "an array index is out of bounds")
HEBATRON_UNDEFINED(shift_out_of_bounds, "a shift is out of range")
HEBATRON_UNDEFINED(add_overflow, "a signed sum overflows")
HEBATRON_UNDEFINED(sub_overflow, "a signed difference overflows")
HEBATRON_UNDEFINED(mul_overflow, "a signed product overflows")
HEBATRON_UNDEFINED(negate_overflow, "a negation overflows")
HEBATRON_UNDEFINED(divrem_overflow, "a division by zero or overflow")
}
#endif
