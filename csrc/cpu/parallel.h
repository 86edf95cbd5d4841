// Threads, turns and memory: the services that a SIMD level calls but must not contain, because parallel.cpp is compiled once for
// any CPU of the architecture. Only that file knows that the threads are torch's.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace clop::cpu {

// Runs body(context, thread) for each thread from 0 to n_threads - 1 on torch's own threads, and returns when all have run. If
// torch has fewer threads, some of them run several bodies, one after the other. `body` must not throw.
//
// Threads of our own would share the cores with torch's threads, which spin for a while after each operator and wait for the
// next. That made the loss 1.7 times as slow at N = 1024, and with OMP_WAIT_POLICY=active 1.5 times as slow at any N.
void run_parallel(int n_threads, void (*body)(void* context, int thread), void* context);

// Lets tasks add to shared sums in a fixed order. Each of n owners (for example a block of rows) has a sum, to which its tasks
// add in an order that is known beforehand. The bits of the sum are therefore the same for any number of threads. A task waits
// only for tasks that were handed out before it, so there is no deadlock.
class Turns {
 public:
  explicit Turns(int64_t n) : turns_(n) {}
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;
  void wait(int64_t owner, int64_t turn);
  void pass(int64_t owner);

 private:
  // Not std::condition_variable: its wait() needs a newer libstdc++ than the wheels promise to run with.
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

// Allocates memory aligned to 64 bytes, and never returns null. Throws a std::runtime_error that states the size asked for.
void* allocate(std::size_t bytes);
void release(void* memory);

}  // namespace clop::cpu
