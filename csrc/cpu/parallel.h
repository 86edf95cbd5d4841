// Threads, turns and memory: what a SIMD level may call but not contain, since parallel.cpp is compiled once, for any CPU of the
// architecture. Only that file knows that the threads are torch's.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace clop::cpu {

// Runs body(context, thread) for each thread from 0 to n_threads - 1 on torch's own threads, and returns when all have run. Threads of
// ours would share the cores with torch's, which after each operator spin a while for the next: at N = 1024 that made the loss 1.7
// times as slow, and with OMP_WAIT_POLICY=active 1.5 times at any N. Where there are fewer threads, some run several of the
// bodies, one after the other. `body` must not throw.
void run_parallel(int n_threads, void (*body)(void* context, int thread), void* context);

// Each of n owners is taken by tasks in an order that is known before; so what they add to it is added in that order, and the
// sum is the same bits for any number of threads. A task waits only for tasks that were handed out before it: no deadlock.
class Turns {
 public:
  explicit Turns(int64_t n) : turns_(n) {}
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;
  void wait(int64_t owner, int64_t turn);
  void pass(int64_t owner);

 private:
  // Not std::condition_variable, whose wait() needs a newer libstdc++ than the wheels promise to do with.
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t passed_ = PTHREAD_COND_INITIALIZER;
  std::vector<int64_t> turns_;
};

// Hands out 0, 1, 2, ...
class Counter {
 public:
  int64_t next() { return __atomic_fetch_add(&value_, 1, __ATOMIC_RELAXED); }

 private:
  int64_t value_ = 0;
};

// 64-byte aligned; throws std::runtime_error that says how much was asked for. Never null.
void* allocate(std::size_t bytes);
void release(void* memory);

}  // namespace clop::cpu
