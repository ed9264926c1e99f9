// Work shared by the threads of a pool that is not ours: XLA's own, or a stand-in in the driver.
//
// A team runs phases in order. Each phase is a number of chunks that whoever is there takes one by one, so that no thread waits for one that
// has not begun: tasks that the pool runs late find every chunk taken. The state lies on the heap, for such tasks outlive the call.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tpllm {

constexpr int kSpins = 20000;  // some 100 us

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Denormals count as zero on every thread while kernels run: vdpbf16ps knows no other way, and results may not depend on the thread.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t num_threads() const = 0;
  virtual void schedule(std::function<void()> task) = 0;
};

class Team {
 public:
  using Work = std::function<void(int64_t chunk)>;

  // At most max_threads threads, the calling one among them, work on it; 0 for as many as the pool has.
  Team(Pool& pool, int64_t max_threads) : pool_(pool), size_(pool.num_threads()) {
    if (max_threads > 0 && max_threads < size_) size_ = max_threads;
    if (size_ < 1) size_ = 1;
  }

  int64_t size() const { return size_; }

  // Runs phases one after the other; returns when all is done.
  void run(std::vector<std::pair<int64_t, Work>> phases) {
    int64_t widest = 0;
    for (const auto& phase : phases) widest = phase.first > widest ? phase.first : widest;
    const int64_t helpers = (widest < size_ ? widest : size_) - 1;
    if (helpers <= 0) {
      FlushDenormals flush;
      for (const auto& [count, work] : phases)
        for (int64_t chunk = 0; chunk < count; ++chunk) work(chunk);
      return;
    }
    auto state = std::make_shared<State>(std::move(phases));
    for (int64_t i = 0; i < helpers; ++i) pool_.schedule([state] { state->take_part(); });
    state->take_part();
  }

 private:
  struct Phase {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  struct State {
    explicit State(std::vector<std::pair<int64_t, Work>> given) : phases(std::move(given)), progress(phases.size()) {}

    void take_part() {
      FlushDenormals flush;
      for (size_t i = 0; i < phases.size(); ++i) {
        const int64_t count = phases[i].first;
        for (int64_t chunk; (chunk = progress[i].next.fetch_add(1, std::memory_order_relaxed)) < count;) {
          phases[i].second(chunk);
          progress[i].done.fetch_add(1, std::memory_order_acq_rel);
        }
        for (int spins = 0; progress[i].done.load(std::memory_order_acquire) < count; ++spins) {
          if (spins < kSpins) pause_cpu();
          else std::this_thread::yield();
        }
      }
    }

    std::vector<std::pair<int64_t, Work>> phases;
    std::vector<Phase> progress;
  };

  Pool& pool_;
  int64_t size_;
};

}  // namespace tpllm
