// The matrix instructions: fragments of a warp (ldmatrix, stmatrix, mma.sync), and the warpgroup's wgmma.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace emulator {

static float bf16(uint32_t bits) {
  bits <<= 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// ---- ldmatrix, stmatrix, mma.sync ----
static const char kLoadMatrix[] = "ldmatrix", kStoreMatrix[] = "stmatrix", kMma[] = "mma_m16n8k16";

struct MatrixArgument {
  uint32_t row;
  uint32_t* r;
};

static void move_word(uint32_t& word, const MatrixArgument* const* rows, int lane, bool transposed, bool to_shared) {
  for (int half = 0; half < 2; half++) {
    const int row = transposed ? lane % 4 * 2 + half : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + half;
    char* at = shared_pointer(rows[row]->row, 16) + column * 2;
    uint16_t value = uint16_t(word >> (16 * half));
    if (to_shared) {
      memcpy(at, &value, 2);
    } else {
      memcpy(&value, at, 2);
      word = half ? (word & 0xffff) | uint32_t(value) << 16 : value;
    }
  }
}

static void move_matrices(const char* operation, uint32_t row, uint32_t* r, int count, bool transposed, bool to_shared) {
  if (self->id % 32 < 8 * count) {  // the lanes whose row address counts
    if (row % 16) fail(std::string(operation) + ": a row's address must be a multiple of 16");
    access(shared_pointer(row, 16), 16, to_shared ? Access::write : Access::read, thread_actor());
  }
  MatrixArgument argument{row, r};
  warp_collective(operation, &argument, [=](Warp& all, int lanes) {
    if (lanes != 32) fail(std::string(operation) + " needs a whole warp");
    auto** arguments = reinterpret_cast<MatrixArgument**>(all.argument);
    for (int matrix = 0; matrix < count; matrix++)
      for (int lane = 0; lane < 32; lane++) move_word(arguments[lane]->r[matrix], arguments + 8 * matrix, lane, transposed, to_shared);
  });
}

void ldmatrix(uint32_t* r, uint32_t row, int count, bool transposed) {
  EMULATOR_ENTER();
  move_matrices(kLoadMatrix, row, r, count, transposed, false);
}
void stmatrix(uint32_t row, const uint32_t* r, int count, bool transposed) {
  EMULATOR_ENTER();
  uint32_t words[4];
  memcpy(words, r, size_t(count) * 4);
  move_matrices(kStoreMatrix, row, words, count, transposed, true);
}

struct MmaArgument {
  float* d;
  const uint32_t *a, *b;
};

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
  EMULATOR_ENTER();
  MmaArgument argument{d, a, b};
  warp_collective(kMma, &argument, [](Warp& all, int lanes) {
    if (lanes != 32) fail("mma_m16n8k16 needs a whole warp");
    statistics.matrix_operations++;
    float A[16][16], B[8][16];
    for (int lane = 0; lane < 32; lane++) {
      const auto& m = *static_cast<MmaArgument*>(all.argument[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) A[group + i % 2 * 8][pair + i / 2 * 8 + half] = bf16(m.a[i] >> 16 * half & 0xffff);
      for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++) B[group][pair + i * 8 + half] = bf16(m.b[i] >> 16 * half & 0xffff);
    }
    for (int lane = 0; lane < 32; lane++) {
      const auto& m = *static_cast<MmaArgument*>(all.argument[lane]);
      for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += A[lane / 4 + i / 2 * 8][k] * B[lane % 4 * 2 + i % 2][k];
        m.d[i] += sum;
      }
    }
  });
}

// ---- wgmma ----
namespace {

const char kWgmma[] = "wgmma", kWgmmaFence[] = "wgmma_fence", kWgmmaCommit[] = "wgmma_commit", kRegisters[] = "setmaxnreg";

Warpgroup& warpgroup_collective(const char* operation, const std::function<void(Warpgroup&)>& work) {
  Warpgroup& g = self->block->warpgroups[size_t(self->id) / 128];
  if (self->id / 128 * 128 + 128 > int(self->block->threads.size())) fail(std::string(operation) + " needs a whole warpgroup of 128 threads");
  if (g.arrived && g.operation != operation)
    fail(std::string("the threads of a warpgroup are in different operations: ") + operation + " here, " + g.operation + " at " + line_of(g.line));
  g.operation = operation;
  g.line = self->line;
  const uint64_t generation = g.generation;
  if (++g.arrived == 128) {
    work(g);
    g.arrived = 0;
    g.generation++;
    progress++;
  } else {
    wait_until(operation, &g, generation, [](const Thread& t) { return static_cast<const Warpgroup*>(t.waits_on)->generation != t.ready_value; });
  }
  return g;
}

// Where element (row of M or N, k) of a 64 x 16 or N x 16 operand lies; whole 16-byte runs lie along k or along the rows.
uint32_t element_offset(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t offset = transposed ? start + uint32_t(row / 64) * leading + uint32_t(k / 8) * stride + uint32_t(k % 8) * 128 + uint32_t(row % 64) * 2
                                     : start + uint32_t(row / 8) * stride + uint32_t(row % 8) * 128 + uint32_t(k) * 2;
  return uint32_t(swizzled(offset, 128));
}

// Calls use(shared offset, row, k) for every 16-byte run.
template <class Use>
void for_runs(uint64_t descriptor, bool transposed, int rows, Use use) {
  if (transposed)
    for (int k = 0; k < 16; k++)
      for (int row = 0; row < rows; row += 8) use(element_offset(descriptor, true, row, k), row, k);
  else
    for (int row = 0; row < rows; row++)
      for (int k = 0; k < 16; k += 8) use(element_offset(descriptor, false, row, k), row, k);
}

void read_operand(const Block& block, uint64_t descriptor, bool transposed, int rows, float* out) {  // out[k][row]
  for_runs(descriptor, transposed, rows, [&](uint32_t offset, int row, int k) {
    uint16_t v[8];
    memcpy(v, block.shared + offset, 16);
    for (int i = 0; i < 8; i++) out[size_t(transposed ? k : k + i) * size_t(rows) + size_t(transposed ? row + i : row)] = bf16(v[i]);
  });
}

void run_wgmma(const Block& block, const Wgmma& w) {
  statistics.matrix_operations++;
  static float A[16 * 64], B[16 * 256], C[64 * 256];
  if (w.from_registers) {
    for (int t = 0; t < 128; t++)
      for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
          const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8 + half;
          A[k * 64 + row] = bf16(w.a_registers[t][i] >> 16 * half & 0xffff);
        }
  } else {
    read_operand(block, w.a, w.transpose_a, 64, A);
  }
  read_operand(block, w.b, w.transpose_b, w.n, B);
  for (int m = 0; m < 64; m++) {
    float* c = C + m * w.n;
    std::fill(c, c + w.n, 0.0f);
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < w.n; n++) c[n] += A[k * 64 + m] * B[k * w.n + n];
  }
  for (int t = 0; t < 128; t++)
    for (int i = 0; i < w.n / 2; i++) {
      const int m = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + t % 4 * 2 + i % 2;
      w.d[t][i] = (w.accumulate ? w.d[t][i] : 0.0f) + C[m * w.n + n];
    }
}

void check_descriptor(uint64_t descriptor, const Block& block, bool transposed, int rows) {
  if (descriptor >> 62 != 1) fail("wgmma: the emulator knows the 128-byte swizzle only (layout type 1)");
  if (descriptor >> 49 & 7) fail("wgmma: the descriptor's base offset must be 0 (atoms start at multiples of 1,024)");
  for_runs(descriptor, transposed, rows, [&](uint32_t offset, int, int) {
    if (offset + 16 > block.bytes_used) fail("wgmma: the operand reaches past the block's shared memory");
  });
}

}  // namespace

void wgmma_fence() {
  EMULATOR_ENTER();
  warpgroup_collective(kWgmmaFence, [](Warpgroup& g) { g.fenced = true; });
}

void wgmma(float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int n, bool transpose_a, bool transpose_b, bool accumulate) {
  EMULATOR_ENTER();
  Warpgroup& mine = self->block->warpgroups[size_t(self->id) / 128];
  const Wgmma wanted{{}, {}, a_registers != nullptr, transpose_a, transpose_b, accumulate, a, b, n, self->line};
  Wgmma& w = mine.next;
  if (mine.arrived == 0) w = wanted;
  if (w.a != a || w.b != b || w.n != n || w.accumulate != accumulate) fail("wgmma: the threads of a warpgroup give different operands");
  w.d[self->id % 128] = d;
  if (a_registers) {
    memcpy(w.a_registers[self->id % 128], a_registers, 16);
    self->fragments.push_back({mine.group_steps.size(), a_registers, {a_registers[0], a_registers[1], a_registers[2], a_registers[3]}, self->line});
  }
  warpgroup_collective(kWgmma, [&](Warpgroup& g) {
    Block& block = *self->block;
    if (!g.fenced) fail("wgmma without wgmma_fence before it");
    if (!g.next.from_registers) check_descriptor(a, block, transpose_a, 64);
    check_descriptor(b, block, transpose_b, n);
    if (checked()) {
      if (g.actor < 0) g.actor = add_actor(block, "wgmma of warpgroup " + std::to_string(self->id / 128));
      const Clocks* warps[4];  // each warp works on its own: what one of them does not know is not ordered
      for (int warp = 0; warp < 4; warp++) warps[warp] = &block.threads[size_t(self->id / 128 * 128 + warp * 32)]->clocks;
      const Clocks known = meet(warps, 4);
      Actor actor = async_actor(g.actor, ++g.step);
      actor.known = &known;
      const auto enter = [&](uint32_t offset, int, int) { access(block.shared + offset, 16, Access::read, actor); };
      if (!g.next.from_registers) for_runs(a, transpose_a, 64, enter);
      for_runs(b, transpose_b, n, enter);
    }
    if (current.mode == Mode::eager)
      run_wgmma(block, g.next);
    else
      g.open.push_back(g.next);
  });
}

static void run_group(Warpgroup& g) {
  for (const Wgmma& w : g.groups.front()) run_wgmma(*self->block, w);
  g.groups.pop_front();
  progress++;
}

void wgmma_commit() {
  EMULATOR_ENTER();
  warpgroup_collective(kWgmmaCommit, [](Warpgroup& g) {
    g.groups.push_back(std::move(g.open));
    g.open.clear();
    g.group_steps.push_back(g.step);
    while (current.mode == Mode::random && !g.groups.empty() && random_chance(3)) run_group(g);
  });
}

void wgmma_wait(int pending) {
  EMULATOR_ENTER();
  Warpgroup& g = self->block->warpgroups[size_t(self->id) / 128];
  maybe_preempt();
  while (int(g.groups.size()) > pending) run_group(g);
  if (pending == 0) g.fenced = false;
  self->waited_groups = std::max(self->waited_groups, g.group_steps.size() - std::min(g.group_steps.size(), size_t(pending)));
  for (; !self->fragments.empty() && self->fragments.front().group < self->waited_groups; self->fragments.pop_front()) {
    const Fragment& f = self->fragments.front();
    if (memcmp(f.at, f.word, sizeof f.word)) fail("A's registers were changed before wgmma_wait, of the wgmma at " + line_of(f.line));
  }
  if (int(g.group_steps.size()) > pending) know(self->clocks, *self->block, g.actor, g.group_steps[g.group_steps.size() - 1 - size_t(pending)], true);
}

// ---- setmaxnreg: the warpgroups of a block share what it was launched with ----
static int registers_at_launch(const Block& b) {  // of a thread, by __launch_bounds__(threads, 1)
  return std::min(65536 / int(b.threads.size()) / 8 * 8, 256);
}

void set_registers(int count, bool increase) {
  EMULATOR_ENTER();
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg takes multiples of 8 from 24 to 256, got " + std::to_string(count));
  warpgroup_collective(kRegisters, [=](Warpgroup& g) {
    const int now = g.registers ? g.registers : registers_at_launch(*self->block);
    if (increase ? count < now : count > now) fail("setmaxnreg: " + std::to_string(count) + (increase ? " is no increase from " : " is no decrease from ") + std::to_string(now));
    g.registers = count;
  });
}

void check_registers(const Block& b) {
  int wanted = 0, there = 0;
  for (const Warpgroup& g : b.warpgroups) {
    wanted += g.registers ? g.registers : registers_at_launch(b);
    there += registers_at_launch(b);
  }
  if (wanted > there) fail("the warpgroups ask for " + std::to_string(wanted * 128) + " registers, and the block has " + std::to_string(there * 128) + ": setmaxnreg waits for ever");
}

}  // namespace emulator
