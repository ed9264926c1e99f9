// Work shared by the threads of a pool that is not ours: XLA's own, or a stand-in in the driver.
//
// A team runs phases in order. Each phase is a number of chunks that whoever is there takes one by one, so that no thread waits for one that
// has not begun: tasks that the pool runs late find every chunk taken. The state lies on the heap, for such tasks outlive the call.
//
// A thread first takes the chunks of its own span, one after the other, and then helps with the others': memory is read faster by threads that
// each go on where they are than by threads that take turns (on two cores of an EPYC 9005 by a quarter, at chunks of 64 KB).
//
// To wake a sleeping thread takes some 50 us on a virtual machine, as long as a small product itself. So a thread of the pool that has helped
// stays in the lobby for a while, where the next call finds it awake.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "scratch.h"

namespace tpllm {

constexpr int kSpins = 20000;  // some 100 us of waiting for a chunk under way, before yielding
constexpr std::chrono::microseconds kStay{200}, kStayBusy{20};  // in the lobby; how much of it without yielding

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

class Job {
 public:
  virtual ~Job() = default;
  virtual void take_part() = 0;
};

// Where helpers wait for work. One for the process: a helper serves whoever calls.
class Lobby {
 public:
  static Lobby& instance() {
    static Lobby* lobby = new Lobby;  // never destroyed: threads of the pool may outlive everything
    return *lobby;
  }

  // Asks for helpers; those that are not in the lobby come from the pool.
  void invite(Pool& pool, const std::shared_ptr<Job>& job, int64_t count) {
    int64_t missing;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      invitations_.insert(invitations_.end(), count, job);
      num_invitations_.store(static_cast<int64_t>(invitations_.size()), std::memory_order_release);
      missing = static_cast<int64_t>(invitations_.size()) - num_waiting_ - num_coming_;
      if (missing > 0) num_coming_ += missing;
    }
    for (int64_t i = 0; i < missing; ++i) pool.schedule([] { instance().enter(); });
  }

 private:
  std::mutex mutex_;
  std::deque<std::shared_ptr<Job>> invitations_;
  std::atomic<int64_t> num_invitations_{0};
  int64_t num_waiting_ = 0, num_coming_ = 0;

  void enter() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      --num_coming_, ++num_waiting_;
    }
    while (true) {
      const auto arrival = std::chrono::steady_clock::now();
      while (num_invitations_.load(std::memory_order_acquire) == 0) {
        for (int i = 0; i < 8; ++i) pause_cpu();
        const auto waited = std::chrono::steady_clock::now() - arrival;
        if (waited > kStay) break;
        if (waited > kStayBusy) std::this_thread::yield();
      }
      std::shared_ptr<Job> job;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (invitations_.empty()) {
          if (std::chrono::steady_clock::now() - arrival <= kStay) continue;  // somebody else took it
          --num_waiting_;
          return;
        }
        job = std::move(invitations_.front());
        invitations_.pop_front();
        num_invitations_.store(static_cast<int64_t>(invitations_.size()), std::memory_order_release);
        --num_waiting_;
      }
      job->take_part();
      job.reset();
      std::lock_guard<std::mutex> lock(mutex_);
      ++num_waiting_;
    }
  }
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
    auto state = std::make_shared<State>(std::move(phases), helpers + 1);
    Lobby::instance().invite(pool_, state, helpers);
    state->take_part();
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  struct State : Job {
    State(std::vector<std::pair<int64_t, Work>> given, int64_t num_spans)
        : phases(std::move(given)), spans(num_spans), taken(phases.size() * num_spans), done(phases.size()) {}

    void take_part() override {
      FlushDenormals flush;
      std::optional<ScratchLease> lease;  // once there is something to do: who comes late needs none
      const int64_t seat = num_seats.fetch_add(1, std::memory_order_relaxed);
      for (size_t i = 0; i < phases.size(); ++i) {
        for (int64_t turn = 0; turn < spans; ++turn) work_on(i, (seat + turn) % spans, lease);
        for (int spin = 0; done[i].value.load(std::memory_order_acquire) < phases[i].first; ++spin) {
          if (spin < kSpins) pause_cpu();
          else std::this_thread::yield();
        }
      }
    }

   private:
    void work_on(size_t phase, int64_t span, std::optional<ScratchLease>& lease) {
      const auto& [count, work] = phases[phase];
      const int64_t begin = count * span / spans, end = count * (span + 1) / spans;
      for (int64_t chunk; (chunk = begin + taken[phase * spans + span].value.fetch_add(1, std::memory_order_relaxed)) < end;) {
        if (!lease) lease.emplace();
        work(chunk);
        done[phase].value.fetch_add(1, std::memory_order_acq_rel);
      }
    }

    const std::vector<std::pair<int64_t, Work>> phases;
    const int64_t spans;
    std::vector<Counter> taken, done;  // taken: [phases][spans]
    std::atomic<int64_t> num_seats{0};
  };

  ScratchLease lease_;  // of the calling thread, while the call goes on
  Pool& pool_;
  int64_t size_;
};

}  // namespace tpllm
