// A team of threads for one step at a time.
#pragma once
#include "matrix.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif

static inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// A team of threads that runs one function at a time; the caller is its first member. Waiting threads spin
// for a moment, then sleep, so that other processes can use the core.
class Pool {
 public:
  const int threads;

  explicit Pool(int n) : threads(n) {
    for (int t = 1; t < n; t++) workers.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    call = nullptr;
    job.fetch_add(1);
    job.notify_all();
    for (auto& worker : workers) worker.join();
  }
  // Calls function(t) on every thread t.
  template <class Function> void run(Function function) {
    call = [](void* f, int t) { (*(Function*)f)(t); };
    argument = &function;
    job.fetch_add(1, std::memory_order_release);
    job.notify_all();
    function(0);
    barrier();
  }
  // Waits for every thread, then resets `take`.
  void barrier() {
    const uint32_t now = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < uint32_t(threads)) return wait(phase, now);
    arrived.store(0, std::memory_order_relaxed);
    taken.store(0, std::memory_order_relaxed);
    phase.store(now + 1, std::memory_order_release);
    phase.notify_all();
  }
  // Takes the next few of `total` pieces of work, from … to - 1; false when none are left. The fewer remain,
  // the fewer are taken at once, so that all threads finish together, even if one was interrupted.
  bool take(int total, int& from, int& to) {
    uint32_t first = taken.load(std::memory_order_relaxed);
    do {
      from = to = int(first);
      if (from >= total) return false;
      to += std::max(std::min((total - from) / (2 * threads), 8) & ~1, 1);
    } while (!taken.compare_exchange_weak(first, uint32_t(to), std::memory_order_relaxed));
    return true;
  }

 private:
  std::vector<std::thread> workers;
  alignas(64) std::atomic<uint32_t> job{0};
  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> phase{0};
  alignas(64) std::atomic<uint32_t> taken{0};
  void (*call)(void*, int) = nullptr;
  void* argument = nullptr;

  static void wait(std::atomic<uint32_t>& value, uint32_t old) {
    using clock = std::chrono::steady_clock;
    const auto end = clock::now() + std::chrono::microseconds(50);
    do {
      for (int i = 0; i < 16; i++, relax())
        if (value.load(std::memory_order_acquire) != old) return;
    } while (clock::now() < end);
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  }
  void work(int t) {
#if defined(__linux__)
    // OpenMP pins the creating thread, and its children would inherit that one core.
    if (getenv("OMP_PROC_BIND") || getenv("GOMP_CPU_AFFINITY") || getenv("KMP_AFFINITY")) {
      cpu_set_t all;
      memset(&all, 0xff, sizeof all);
      sched_setaffinity(0, sizeof all, &all);
    }
#endif
    for (uint32_t seen = 0;; seen++) {
      wait(job, seen);
      if (!call) return;
      call(argument, t);
      barrier();
    }
  }
};

// Gives every thread a part of `count` pieces of work.
template <class Work> static void in_parallel(int count, int threads, Work work) {
  Pool pool(threads);
  pool.run([&](int) {
    for (int from, to; pool.take(count, from, to);)
      for (; from < to; from++) work(from);
  });
}
