// Threads by torch, turns by pthreads, and working memory. Compiled once, for any CPU of the architecture.
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace clop::cpu {

void run_parallel(int n_threads, void (*body)(void*, int), void* context) {
  if (n_threads == 1) return body(context, 0);
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(context, int(thread));
  });
}

void Turns::wait(int64_t owner, int64_t turn) {
  pthread_mutex_lock(&mutex_);
  while (turns_[owner] != turn) pthread_cond_wait(&passed_, &mutex_);
  pthread_mutex_unlock(&mutex_);
}

void Turns::pass(int64_t owner) {
  pthread_mutex_lock(&mutex_);
  ++turns_[owner];
  pthread_mutex_unlock(&mutex_);
  pthread_cond_broadcast(&passed_);
}

void* allocate(std::size_t bytes) {
  // Large blocks of memory get large pages, if the system leaves that choice to the program. A tile and the data that it reads
  // span more pages of 4 KB than a core can translate without a miss.
  constexpr std::size_t kCacheLine = 64, kLargePage = std::size_t(2) << 20;
  const std::size_t alignment = bytes >= kLargePage ? kLargePage : kCacheLine;
  const std::size_t rounded = (bytes / alignment + 1) * alignment;
  void* memory = rounded > bytes ? std::aligned_alloc(alignment, rounded) : nullptr;
  if (memory == nullptr) {
    throw std::runtime_error("clop_kernels: out of memory: the loss on the CPU could not get " + std::to_string(bytes) +
                             " bytes of working memory");
  }
#if defined(__linux__)
  if (alignment == kLargePage) madvise(memory, rounded, MADV_HUGEPAGE);  // advice: nothing depends on it
#endif
  return memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace clop::cpu
