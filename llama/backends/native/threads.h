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

// A team of threads that runs one function at a time; the caller is its first member. The function consists of
// phases whose pieces the members share. Nobody waits for a member, only for the pieces that one has taken: where
// other processes hold a core, those who run go on alone. Waiting threads spin for a moment, then sleep.
class Pool {
 public:
  const int threads;

  explicit Pool(int n) : threads(n), members(n) {
    for (int t = 1; t < n; t++) workers.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    begin(nullptr, nullptr);
    for (auto& worker : workers) worker.join();
  }
  // Calls function(t) on the caller and on every thread t that wakes before the end.
  template <class Function> void run(Function function) {
    begin([](void* f, int t) { (*(Function*)f)(t); }, &function);
    function(0);
    for (uint32_t inside = door.fetch_or(CLOSED) | CLOSED; inside != CLOSED; inside = door.load(std::memory_order_acquire))
      wait(door, inside);
  }
  // A phase: calls work(from, to) for parts of `total` pieces, and returns when all are done. Every thread has the
  // same phases; one that comes to a phase after its end does nothing in it.
  template <class Work> void phase(int t, int total, Work work) {
    if (total <= 0) return;
    const uint32_t now = members[t].phase++;
    uint32_t finished = 0;
    for (int from, to; take(t, now, total, from, to); finished += to - from) work(from, to);
    if (!finished || done.fetch_add(finished, std::memory_order_acq_rel) + finished < uint32_t(total)) return wait(current, now);
    done.store(0, std::memory_order_relaxed);
    for (Member& member : members) member.taken.store(uint64_t(now + 1) << 32, std::memory_order_relaxed);
    current.store(now + 1, std::memory_order_release);
    current.notify_all();
  }

 private:
  static constexpr uint32_t CLOSED = 1u << 31;
  struct alignas(64) Member {
    uint32_t phase = 0;
    std::atomic<uint64_t> taken{0};  // phase, and how many pieces of this member's part were taken, 32 bits each
  };
  std::vector<std::thread> workers;
  std::vector<Member> members;
  alignas(64) std::atomic<uint32_t> job{0};
  alignas(64) std::atomic<uint32_t> door{CLOSED};  // how many workers are inside of the function
  alignas(64) std::atomic<uint32_t> current{0};    // phase
  alignas(64) std::atomic<uint32_t> done{0};       // pieces of it
  uint32_t first = 0;                              // phase of the function
  void (*call)(void*, int) = nullptr;
  void* argument = nullptr;

  void begin(void (*function)(void*, int), void* of) {
    call = function, argument = of;
    first = members[0].phase = current.load(std::memory_order_relaxed);
    door.store(0, std::memory_order_release);
    job.fetch_add(1, std::memory_order_release);
    job.notify_all();
  }
  // Takes the next few pieces of a phase, from … to - 1; false when none are left. Every thread has a part of them,
  // which it takes in order, as memory is read fastest so, and then helps the others. The fewer remain of a part,
  // the fewer are taken at once, so that all threads finish together, even if one was interrupted.
  bool take(int t, uint32_t now, int total, int& from, int& to) {
    for (int i = 0; i < threads; i++) {
      const int64_t owner = (t + i) % threads, begin = total * owner / threads, end = total * (owner + 1) / threads;
      uint64_t taken = members[owner].taken.load(std::memory_order_relaxed);
      do {
        from = to = int(begin + uint32_t(taken));
        if (taken >> 32 != now || from >= end) break;
        to += std::max(std::min((int(end) - from) / 2, 8), 1);
      } while (!members[owner].taken.compare_exchange_weak(taken, taken + (to - from), std::memory_order_relaxed));
      if (to > from) return true;
    }
    return false;
  }
  static void wait(std::atomic<uint32_t>& value, uint32_t old) {
    using clock = std::chrono::steady_clock;
    const auto end = clock::now() + std::chrono::microseconds(50);
    do {
      for (int i = 0; i < 16; i++, relax())
        if (value.load(std::memory_order_acquire) != old) return;
    } while (clock::now() < end);
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  }
  bool enter() {
    for (uint32_t inside = door.load(std::memory_order_relaxed); !(inside & CLOSED);)
      if (door.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) return true;
    return false;
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
    for (uint32_t seen = 0;;) {
      wait(job, seen);
      seen = job.load(std::memory_order_relaxed);
      if (!enter()) continue;  // too late
      if (!call) return;
      members[t].phase = first;
      call(argument, t);
      if (door.fetch_sub(1, std::memory_order_release) == CLOSED + 1) door.notify_all();
    }
  }
};

// Gives every thread a part of `count` pieces of work.
template <class Work> static void in_parallel(int count, int threads, Work work) {
  Pool pool(threads);
  pool.run([&](int t) {
    pool.phase(t, count, [&](int from, int to) {
      for (; from < to; from++) work(from);
    });
  });
}
