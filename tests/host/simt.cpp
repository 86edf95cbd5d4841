// The scheduler behind simt.h, and the instructions of a warp.
#include "simt.h"

#include <sys/mman.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CLOP_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

// ---- contexts ----------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Pushes the registers that a function must preserve, stores the stack pointer in *save, and continues where `load` was saved.
// ucontext would make a system call each time, for the signal mask.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kLanes = 32, kMostThreads = 1024;

class Context {
 public:
  // Prepares a call of `entry`, which never returns.
  void prepare(unsigned char* stack, void (*entry)()) {
    stack_ = stack;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // its last thread never returned from its frames
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // aligns the stack as a call does
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    at_ = top;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = kStackBytes;
    makecontext(&at_, entry, 0);
#endif
  }

  void switch_to(Context& other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.size_);
#endif
#if defined(__x86_64__)
    simt_switch(&at_, other.at_);
#else
    swapcontext(&at_, &other.at_);
#endif
    arrive();
  }

  // Must be the first call after a switch.
  void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    const void* from;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack_, &from, &size);
    if (is_main) return;
    // The first switch away from the scheduler tells where the scheduler's stack is.
    if (main_of_ != nullptr) main_of_->stack_ = static_cast<unsigned char*>(const_cast<void*>(from)), main_of_->size_ = size;
#endif
  }

  bool is_main = false;
  Context* main_of_ = nullptr;

 private:
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
  unsigned char* stack_ = nullptr;
  size_t size_ = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
#endif
};

// ---- the state of the block that runs ------------------------------------------------------------------------------------

enum class State { ready, at_barrier, in_warp, done };

struct Thread {
  Context context;
  State state;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> landed;
  void* tsan_fiber;
};

struct Warp {
  Op op;
  unsigned n_arrived;
  uint32_t in[kLanes][10], out[kLanes][4];
};

struct Block {
  const std::function<void()>* kernel;
  unsigned index, n_blocks, n_threads, n_at_barrier, n_done, current;
  unsigned char* shared;
  size_t shared_bytes;
  std::string error;
  Context scheduler;
  void* tsan_scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

Block block;
// ThreadSanitizer's order of a launch: all threads begin after it, and it ends after all of them. Blocks have no order among
// themselves.
[[maybe_unused]] char launched, finished;
Order order = Order::forward;
std::mt19937_64 shuffler;

// Stacks are kept from launch to launch. The page below each is protected: a stack that overflows must not reach its neighbour.
unsigned char* stack_of(unsigned thread) {
  constexpr size_t kPage = 4096;
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for a stack");
    mprotect(memory, kPage, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(memory) + kPage);
  }
  return stacks[thread];
}

void to_scheduler() {
#if defined(CLOP_TSAN)
  __tsan_switch_to_fiber(block.tsan_scheduler, 1);
#endif
  block.threads[block.current].context.switch_to(block.scheduler);
}

void resume(unsigned thread) {
  block.current = thread;
#if defined(CLOP_TSAN)
  __tsan_switch_to_fiber(block.threads[thread].tsan_fiber, 1);
#endif
  block.scheduler.switch_to(block.threads[thread].context);
}

void wait_as(State state) {
  block.threads[block.current].state = state;
  to_scheduler();
}

void run_thread() {
  block.threads[block.current].context.arrive();
#if defined(CLOP_TSAN)
  __tsan_acquire(&launched);
#endif
  (*block.kernel)();
#if defined(CLOP_TSAN)
  __tsan_release(&finished);
#endif
  ++block.n_done;
  wait_as(State::done);
}

// Runs the lanes of a warp that are ready, each until it waits. Returns whether any lane ran.
bool run_warp(unsigned warp) {
  const unsigned first = warp * kLanes, count = std::min(block.n_threads - first, unsigned(kLanes));
  unsigned lanes[kLanes];
  for (unsigned k = 0; k < count; ++k) lanes[k] = order == Order::reverse ? count - 1 - k : k;
  if (order == Order::shuffled) std::shuffle(lanes, lanes + count, shuffler);
  bool any = false;
  for (unsigned k = 0; k < count && block.error.empty(); ++k)
    if (block.threads[first + lanes[k]].state == State::ready) {
      any = true;
      resume(first + lanes[k]);
    }
  return any;
}

void run_block() {
  const unsigned n_warps = block.warps.size();
  std::vector<unsigned> warps(n_warps);
  while (block.n_done < block.n_threads) {
    for (unsigned k = 0; k < n_warps; ++k) warps[k] = order == Order::reverse ? n_warps - 1 - k : k;
    if (order == Order::shuffled) std::shuffle(warps.begin(), warps.end(), shuffler);
    bool any = false;
    for (const unsigned warp : warps)
      while (run_warp(warp)) any = true;
    if (!block.error.empty()) throw std::runtime_error("simt: " + block.error);
    if (!any) {
      const bool at_barrier = block.n_at_barrier > 0;
      throw std::runtime_error(at_barrier && block.n_done > 0
                                   ? "simt: threads wait at a barrier that others have passed by and left"
                                   : "simt: deadlock: lanes wait for others of their warp, which have left or wait elsewhere");
    }
  }
}

// ---- instructions of a warp ----------------------------------------------------------------------------------------------

float value_of(Op op, uint32_t word, int half) {
  if (op == Op::mma_tf32) return __uint_as_float(word & ~0x1fffu);  // the units read no more bits
  const uint16_t bits = uint16_t(word >> 16 * half);
  return op == Op::mma_bf16 ? __bfloat162float({bits}) : __half2float({bits});
}

double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// sum + row . column, as an A100 adds. Products are exact. Every term, also the sum so far, is cut off toward zero, one bit below
// the last place of a float as large as the largest term. The total is cut off again when it becomes a float. Newer units keep
// more bits and take more terms at once. (Khattak and Mikaitis, arXiv 2512.07004.)
float add_products(float sum, const float* row, const float* column, int n) {
  constexpr int kBits = 23 + 1;
  double terms[9] = {sum}, largest = std::fabs(sum);
  for (int k = 0; k < n; ++k) {
    terms[1 + k] = double(row[k]) * double(column[k]);
    largest = std::fmax(largest, std::fabs(terms[1 + k]));
  }
  double total = 0.0;
  for (int k = 0; k <= n; ++k) total += terms[k];
  if (largest == 0.0 || !std::isfinite(total)) return float(total);
  const int exponent = std::ilogb(largest);
  const double scale = power_of_two(kBits - exponent);  // a normal number, because the terms are products of floats
  total = 0.0;
  for (int k = 0; k <= n; ++k) total += std::trunc(terms[k] * scale);
  total /= scale;
  const float nearest = float(total);
  if (std::isinf(nearest)) return nearest;
  return std::fabs(nearest) > std::fabs(total) ? std::nextafter(nearest, 0.0f) : nearest;
}

// D = A B + C for m16n8k16 of 16-bit numbers and m16n8k8 of TF32, with the fragment layouts of the PTX ISA. Let g = lane / 4 and
// t = lane % 4. Word w of A is in row g + 8 (w % 2); word w of B is in column g. A TF32 word is number k = t + 4 w' of its row; a
// 16-bit word is the pair k = 2 t + 8 w' and the next. Here w' = w / 2 in A and w' = w in B. C: rows g and g + 8, columns 2 t and
// 2 t + 1.
void multiply(Op op, Warp& warp) {
  const int per_word = op == Op::mma_tf32 ? 1 : 2, depth = 8 * per_word;
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < per_word; ++half) {
      for (int w = 0; w < 4; ++w) a[g + 8 * (w % 2)][per_word * (t + 4 * (w / 2)) + half] = value_of(op, warp.in[lane][w], half);
      for (int w = 0; w < 2; ++w) b[g][per_word * (t + 4 * w) + half] = value_of(op, warp.in[lane][4 + w], half);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int e = 0; e < 4; ++e) {
      const float *const row = a[lane / 4 + 8 * (e / 2)], *const column = b[2 * (lane % 4) + e % 2];
      float sum = __uint_as_float(warp.in[lane][6 + e]);
      for (int k = 0; k < depth; k += depth / 2) sum = add_products(sum, row + k, column + k, depth / 2);
      warp.out[lane][e] = __float_as_uint(sum);
    }
}

// Four matrices of 8 rows of 16 bytes. Lanes 8 m to 8 m + 7 bring the rows of matrix m. As they are, a lane gets word t of row g
// of each matrix; transposed, it gets the 16-bit numbers g of rows 2 t and 2 t + 1.
void distribute(Warp& warp, bool transposed) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int g = lane / 4, t = lane % 4;
      const auto half = [&](int row) { return warp.in[8 * m + row][g / 2] >> 16 * (g % 2) & 0xffffu; };
      warp.out[lane][m] = transposed ? half(2 * t) | half(2 * t + 1) << 16 : warp.in[8 * m + g][t];
    }
}

void execute(Warp& warp) {
  switch (warp.op) {
    case Op::synchronize:
      return;
    case Op::shuffle_xor:
      for (int lane = 0; lane < kLanes; ++lane) warp.out[lane][0] = warp.in[lane ^ int(warp.in[lane][1])][0];
      return;
    case Op::load_matrices:
      return distribute(warp, false);
    case Op::load_matrices_transposed:
      return distribute(warp, true);
    default:
      return multiply(warp.op, warp);
  }
}

}  // namespace

// ---- what simt.h declares --------------------------------------------------------------------------------------------------

bool launches = true;

void set_order(Order new_order, uint64_t seed) {
  order = new_order;
  shuffler.seed(seed);
}

void launch(unsigned n_blocks, unsigned n_threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (n_threads == 0 || n_threads % kLanes != 0 || n_threads > kMostThreads)
    throw std::runtime_error("simt: a block of " + std::to_string(n_threads) +
                             " threads; expected a multiple of 32, 1024 at most");
  if (shared_bytes > 227 * 1024) throw std::runtime_error("simt: " + std::to_string(shared_bytes) + " bytes of shared memory");
  // A separate allocation, so that AddressSanitizer knows where it ends.
  const std::unique_ptr<void, void (*)(void*)> shared(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128), std::free);
  block.kernel = &kernel;
  block.n_blocks = n_blocks;
  block.n_threads = n_threads;
  block.shared = static_cast<unsigned char*>(shared.get());
  block.shared_bytes = shared_bytes;
  block.scheduler = Context();
  block.scheduler.is_main = true;
#if defined(CLOP_TSAN)
  block.tsan_scheduler = __tsan_get_current_fiber();
  __tsan_release(&launched);
#endif
  std::vector<unsigned> indices(n_blocks);
  for (unsigned k = 0; k < n_blocks; ++k) indices[k] = order == Order::reverse ? n_blocks - 1 - k : k;
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), shuffler);
  for (const unsigned index : indices) {
    block.index = index;
    for (size_t i = 0; i < shared_bytes; ++i) block.shared[i] = 0xff;  // a NaN in every format
    block.n_at_barrier = block.n_done = 0;
    block.error.clear();
    block.threads = std::vector<Thread>(n_threads);
    block.warps = std::vector<Warp>(n_threads / kLanes);
    for (unsigned k = 0; k < n_threads; ++k) {
      Thread& thread = block.threads[k];
      thread.state = State::ready;
      thread.context.main_of_ = &block.scheduler;
      thread.context.prepare(stack_of(k), run_thread);
#if defined(CLOP_TSAN)
      thread.tsan_fiber = __tsan_create_fiber(0);
#endif
    }
    run_block();
#if defined(CLOP_TSAN)
    __tsan_acquire(&finished);
    for (Thread& thread : block.threads) __tsan_destroy_fiber(thread.tsan_fiber);
#endif
  }
  block.shared = nullptr;
}

Index thread_index() { return {block.current}; }
Index block_index() { return {block.index}; }
Index grid_size() { return {block.n_blocks}; }
unsigned char* shared_memory() { return block.shared; }

bool is_shared(const void* address) { return address >= block.shared && address < block.shared + block.shared_bytes; }

void fail(const char* what) {
  if (block.error.empty())
    block.error =
        std::string(what) + " (block " + std::to_string(block.index) + ", thread " + std::to_string(block.current) + ")";
  for (;;) wait_as(State::done);
}

void synchronize_block() {
#if defined(CLOP_TSAN)
  __tsan_release(&block.n_at_barrier);
#endif
  if (++block.n_at_barrier < block.n_threads) {
    wait_as(State::at_barrier);
  } else {
    block.n_at_barrier = 0;
    for (Thread& thread : block.threads)
      if (thread.state == State::at_barrier) thread.state = State::ready;
  }
#if defined(CLOP_TSAN)
  __tsan_acquire(&block.n_at_barrier);
#endif
}

void exchange(Op op, const uint32_t* in, int n_in, uint32_t* out, int n_out) {
  const unsigned lane = block.current % kLanes, first = block.current - lane;
  Warp& warp = block.warps[block.current / kLanes];
  if (warp.n_arrived == 0)
    warp.op = op;
  else if (warp.op != op)
    fail("lanes of a warp meet in different instructions");
  for (int i = 0; i < n_in; ++i) warp.in[lane][i] = in[i];
#if defined(CLOP_TSAN)
  if (op == Op::synchronize) __tsan_release(&warp);
#endif
  if (++warp.n_arrived < kLanes) {
    wait_as(State::in_warp);
  } else {
    execute(warp);
    warp.n_arrived = 0;
    for (unsigned k = 0; k < kLanes; ++k)
      if (block.threads[first + k].state == State::in_warp) block.threads[first + k].state = State::ready;
  }
#if defined(CLOP_TSAN)
  if (op == Op::synchronize) __tsan_acquire(&warp);
#endif
  for (int i = 0; i < n_out; ++i) out[i] = warp.out[lane][i];
}

void begin_copy(const Copy& copy) { block.threads[block.current].uncommitted.push_back(copy); }

void commit_copies() {
  Thread& thread = block.threads[block.current];
  thread.groups.push_back(std::move(thread.uncommitted));
  thread.uncommitted.clear();
}

bool next_landed_copy(int groups_left, Copy& copy) {
  Thread& thread = block.threads[block.current];
  while (thread.landed.empty()) {
    if (int(thread.groups.size()) <= groups_left) return false;
    thread.landed = std::move(thread.groups.front());
    thread.groups.pop_front();
  }
  copy = thread.landed.back();
  thread.landed.pop_back();
  return true;
}

void acquire_release(void* address) {
#if defined(CLOP_TSAN)
  __tsan_acquire(address);
  __tsan_release(address);
#else
  (void)address;
#endif
}

}  // namespace simt
