// llama.cpp as a rival of bench/bench_model.py: llama_rival MODEL.gguf THREADS answers one line for each line it reads, as
// the Python rivals of bench/rivals.py do. Times are of llama_decode and llama_synchronize alone, in seconds.
//   logits ID...            the last token's logits
//   prefill TOKENS          seconds of one prompt of random tokens, the last token's logits included
//   open SEQUENCES CONTEXT  a cache for `decode`, filled
//   decode STEPS            seconds of so many tokens, one at a time, after one another
//   resident | peak         bytes of this process now | the most since the last `peak`
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

[[noreturn]] static void fail(const std::string& what) {
  std::cerr << "llama_rival: " << what << std::endl;
  std::exit(1);
}

static llama_context* open_context(llama_model* model, int tokens, int threads) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = tokens;
  params.n_batch = tokens;
  params.n_ubatch = 512;
  params.n_threads = params.n_threads_batch = threads;
  params.no_perf = true;
  llama_context* context = llama_init_from_model(model, params);
  if (!context) fail("no context of " + std::to_string(tokens) + " tokens");
  return context;
}

static double decode(llama_context* context, std::vector<llama_token> ids) {
  const double begin = now();
  if (llama_decode(context, llama_batch_get_one(ids.data(), ids.size()))) fail("llama_decode refused");
  llama_synchronize(context);
  return now() - begin;
}

static std::vector<llama_token> random_ids(int count, int entries) {
  std::vector<llama_token> ids(count);
  for (llama_token& id : ids) id = rand() % entries;
  return ids;
}

static long status_bytes(const std::string& name) {  // a line of /proc/self/status, there in kB
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind(name, 0) == 0) return 1024 * std::stol(line.substr(name.size() + 1));
  fail("no " + name + " in /proc/self/status");
}

int main(int count, char** arguments) {
  if (count != 3) fail("takes MODEL.gguf THREADS");
  llama_log_set([](ggml_log_level level, const char* text, void*) { if (level >= GGML_LOG_LEVEL_ERROR) std::cerr << text; }, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(arguments[1], llama_model_default_params());
  if (!model) fail(std::string("cannot load ") + arguments[1]);
  const int threads = std::atoi(arguments[2]), entries = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_context* kept = nullptr;
  std::map<int, llama_context*> prompts;
  std::cout << "ready" << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    if (verb == "logits") {
      std::vector<llama_token> ids;
      for (int id; words >> id;) ids.push_back(id);
      llama_context* context = open_context(model, std::max<int>(ids.size(), 256), threads);
      decode(context, ids);
      const float* logits = llama_get_logits_ith(context, -1);
      for (int i = 0; i < entries; i++) std::cout << logits[i] << (i + 1 < entries ? ' ' : '\n');
      llama_free(context);
    } else if (verb == "prefill") {
      int tokens;
      words >> tokens;
      llama_context*& context = prompts[tokens];  // kept: a new one's memory comes in page by page while it is timed
      if (!context) context = open_context(model, tokens, threads);
      llama_memory_clear(llama_get_memory(context), true);
      std::cout << decode(context, random_ids(tokens, entries)) << '\n';
    } else if (verb == "open") {
      int sequences, tokens;
      words >> sequences >> tokens;
      if (sequences != 1) fail("decodes one sequence");
      if (kept) llama_free(kept);
      kept = open_context(model, tokens + 1024, threads);
      std::cout << decode(kept, random_ids(tokens, entries)) << '\n';
    } else if (verb == "decode") {
      int steps;
      words >> steps;
      double taken = 0;
      for (int i = 0; i < steps; i++) taken += decode(kept, random_ids(1, entries));
      std::cout << taken << '\n';
    } else if (verb == "resident") {
      std::cout << status_bytes("VmRSS:") << '\n';
    } else if (verb == "peak") {
      std::cout << status_bytes("VmHWM:") << '\n';
      std::ofstream("/proc/self/clear_refs") << 5;  // from here on the peak counts anew
    } else {
      fail("unknown line: " + line);
    }
    usleep(10000);  // idle OpenMP threads spin for some milliseconds: not while the next rival is timed
    std::cout << std::flush;
  }
}
