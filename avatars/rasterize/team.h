// Threads that work through one call together.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Threads that run one function together and wait for each other. With OpenMP they are those of torch, which would
// otherwise go on spinning for work on the very cores that are needed here; without, they live for one call.
class Team {
  public:
    explicit Team(int size) : size_(std::max(1, size)) {}

    template <typename Work>
    void run(const Work& work) {
        if (size_ == 1) {  // also the way in a forked process, where OpenMP has no threads
            work();
            return;
        }
#ifdef _OPENMP
#pragma omp parallel num_threads(size_)
        {
            if (omp_get_thread_num() == 0) start(omp_get_num_threads());
            wait_for_start();
            work();
        }
#else
        std::vector<std::thread> others;
        int started = 1;
        for (; started < size_; ++started) {
            try {
                others.emplace_back([&work, this] {
                    wait_for_start();
                    work();
                });
            } catch (const std::system_error&) {  // no more threads to be had: go on with those that there are
                break;
            }
        }
        start(started);
        work();
        for (auto& thread : others) thread.join();
#endif
    }

    // Calls task(i) for i in [0, count), spread over the team, and waits until all are done.
    template <typename Task>
    void each(int64_t count, const Task& task) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        wait();
    }

    // Calls task on one thread while the others wait. A failure stops the whole team at the same place.
    template <typename Task>
    void once(const Task& task) {
        if (next_.fetch_add(1, std::memory_order_relaxed) == 0) {
            try {
                task();
            } catch (const std::bad_alloc&) {
                failed_.store(true);
            }
        }
        wait();
    }

    bool failed() const { return failed_.load(); }
    void fail() { failed_.store(true); }

  private:
    void start(int size) {
        size_ = size;
        open_.store(true, std::memory_order_release);
    }
    void wait_for_start() const {
        while (!open_.load(std::memory_order_acquire)) std::this_thread::yield();
    }
    void wait() {
        const int round = round_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            next_.store(0, std::memory_order_relaxed);
            waiting_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            if (spins > 64) std::this_thread::yield();
    }

    int size_;
    std::atomic<bool> open_{false}, failed_{false};
    std::atomic<int64_t> next_{0};
    std::atomic<int> waiting_{0}, round_{0};
};

}  // namespace
