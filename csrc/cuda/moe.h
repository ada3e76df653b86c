// What the files of the expert layer on CUDA ask of each other.
#pragma once
#include "hebatron/ops.h"

namespace hebatron::cuda {

// Where the sorted rows come from and where they went. By row: order, its slot t * K + k; tokens, its t; scale, its weight.
// By slot: position, its row. By expert: offsets, the cumulative ends. What is null is not written.
struct MoeTables {
  int64_t* order;
  int32_t* tokens;
  float* scale;
  int32_t* position;
  int32_t* offsets;
};

// The tables of `slots` ids, in one launch up to 2,048 slots and two beyond; weights belong to the slots and may be null.
int64_t moe_tables_workspace(int64_t slots, int64_t experts);
void moe_tables(const char* op, const int64_t* ids, const float* weights, int64_t slots, int64_t top_k, int64_t experts,
                const MoeTables& tables, void* workspace, const Exec& exec);
// Blocks of 256 threads that take four of `count` elements each.
inline unsigned blocks_of_four(int64_t count) { return unsigned((count + 1023) / 1024); }

void check_moe_tables(const char* op, int64_t tokens, int64_t top_k, int64_t experts);

}  // namespace hebatron::cuda
