// Threads that share the parts of one job after another.
//
// A part belongs to whoever takes it; nobody waits for a thread that has taken none. So a worker
// that the system has set aside delays a job by at most one part. Waiting is short spinning, then
// sleep: on a shared machine a spinning thread keeps away the very one that it waits for.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace forebay {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    using Work = void (*)(void *context, long part, int thread);

    // For ever: its threads may run until the process ends.
    static Pool &instance() {
        static Pool *pool = new Pool;
        return *pool;
    }

    int threads() const { return threads_; }

    void resize(int threads) {
        std::lock_guard<std::mutex> turn(turn_);
        threads_ = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
        while (int(workers_.size()) + 1 < threads_) {
            int number = int(workers_.size()) + 1;
            workers_.emplace_back([this, number] { serve(number); });
            workers_.back().detach();
        }
    }

    // Calls work(context, part, thread) for each part; thread 0 is the caller.
    void run(long parts, Work work, void *context) {
        if (threads_ == 1 || parts <= 1) {
            for (long part = 0; part < parts; part++) work(context, part, 0);
            return;
        }
        work_ = work;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        job_ = (job_ + 1) & 0xffffff;
        ticket_.store(uint64_t(job_) << 40 | uint64_t(parts) << 20, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst)) {
            { std::lock_guard<std::mutex> hold(sleep_); }
            wake_.notify_all();
        }
        while (take(0)) {
        }
        await(uint32_t(parts));
    }

    // Whoever calls kernels holds this: jobs come one at a time.
    std::mutex &turn() { return turn_; }

    static constexpr int MOST_THREADS = 64;
    static constexpr long MOST_PARTS = (1 << 20) - 1 - MOST_THREADS;

  private:
    // The ticket: number of the job (24 bits), its parts (20), the next part to be taken (20).
    static bool open(uint64_t ticket) { return (ticket & 0xfffff) < (ticket >> 20 & 0xfffff); }

    bool take(int thread) {
        if (!open(ticket_.load(std::memory_order_acquire))) return false;
        uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
        if (!open(ticket)) return false;
        // The job cannot end before this part is done, so its work stands.
        uint32_t parts = ticket >> 20 & 0xfffff;
        work_(context_, long(ticket & 0xfffff), thread);
        if (done_.fetch_add(1, std::memory_order_seq_cst) + 1 == parts && awaited_.load()) {
            { std::lock_guard<std::mutex> hold(sleep_); }
            finished_.notify_one();
        }
        return true;
    }

    void await(uint32_t parts) {
        auto begin = std::chrono::steady_clock::now();
        while (done_.load(std::memory_order_acquire) != parts) {
            relax();
            if (std::chrono::steady_clock::now() - begin < CALLER_SPIN) continue;
            std::unique_lock<std::mutex> hold(sleep_);
            awaited_.store(true);
            finished_.wait(hold, [&] { return done_.load() == parts; });
            awaited_.store(false);
        }
    }

    void serve(int number) {
        auto idle = std::chrono::steady_clock::now();
        for (;;) {
            if (number < threads_ && take(number)) {
                idle = std::chrono::steady_clock::now();
                continue;
            }
            relax();
            if (number < threads_ && std::chrono::steady_clock::now() - idle < WORKER_SPIN)
                continue;
            std::unique_lock<std::mutex> hold(sleep_);
            sleeping_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(hold, [&] { return number < threads_ && open(ticket_.load()); });
            sleeping_.fetch_sub(1);
            idle = std::chrono::steady_clock::now();
        }
    }

    static constexpr std::chrono::microseconds CALLER_SPIN{30};
    //: Between two operators of a step pass about 10 us, between two steps about 1 ms.
    static constexpr std::chrono::microseconds WORKER_SPIN{100};

    std::atomic<int> threads_{1};
    std::vector<std::thread> workers_;
    std::mutex turn_;
    uint32_t job_ = 0;
    Work work_ = nullptr;
    void *context_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    std::atomic<bool> awaited_{false};
    alignas(64) std::atomic<int> sleeping_{0};
    std::mutex sleep_;
    std::condition_variable wake_, finished_;
};

// `body(part, thread)` for each of `parts`, shared by the pool; the caller holds its turn.
template <class Body>
void shared(long parts, Body &&body) {
    Pool::instance().run(
        parts,
        [](void *context, long part, int thread) {
            (*static_cast<std::remove_reference_t<Body> *>(context))(part, thread);
        },
        &body);
}

}  // namespace forebay
