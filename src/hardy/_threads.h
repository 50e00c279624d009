// Threads for the compiled library's calls, the same ones for all of them.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace hardy {

// Threads that take part in calls. They are made once, stay awake for a moment after a call, since the steps of a rollout
// follow closely on one another, and then sleep. Nothing tells when the last call has been, so they never end.
class Helpers {
  public:
    // One caller at a time has the helpers; whoever asks meanwhile works alone.
    class Turn {
      public:
        // Asks for so many helpers.
        explicit Turn(size_t wanted) {
            if (wanted == 0) return;
            helpers_ = &of_this_process();
            lock_ = std::unique_lock<std::mutex>(helpers_->turn_, std::try_to_lock);
            if (lock_.owns_lock()) threads_ += helpers_->at_least(wanted);
        }

        // That work together, the caller among them.
        size_t threads() const { return threads_; }

        // Calls work() on each of these threads, once.
        template <class Work>
        void run(const Work& work) {
            if (threads_ == 1)
                work();
            else
                helpers_->run(threads_ - 1, work);
        }

      private:
        Helpers* helpers_ = nullptr;
        std::unique_lock<std::mutex> lock_;
        size_t threads_ = 1;
    };

  private:
    static constexpr std::chrono::microseconds AWAKE{1000};

    static Helpers& of_this_process() {
        static std::mutex mutex;
        static Helpers* helpers = nullptr;
        const std::lock_guard<std::mutex> lock(mutex);
        // A forked process has its parent's memory, but not its threads.
        if (helpers == nullptr || helpers->process_ != getpid()) helpers = new Helpers;
        return *helpers;
    }

    // How many of `wanted` helpers there are, once those that lack have been made.
    size_t at_least(size_t wanted) {
        try {
            for (; count_ < wanted; ++count_) std::thread(&Helpers::serve, this, count_, round_.load()).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: those there are do all of it.
        }
        return std::min(count_, wanted);
    }

    template <class Work>
    void run(size_t wanted, const Work& work) {
        call_ = [](const void* work) { (*static_cast<const Work*>(work))(); };
        work_ = &work;
        wanted_ = wanted;
        pending_ = count_;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ++round_;
        }
        wake_.notify_all();
        work();
        while (pending_ > 0) std::this_thread::yield();
    }

    [[noreturn]] void serve(size_t index, int64_t seen) {
        for (;; ++seen) {
            const auto begin = std::chrono::steady_clock::now();
            while (round_ == seen && std::chrono::steady_clock::now() - begin < AWAKE) std::this_thread::yield();
            if (round_ == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen; });
            }
            if (index < wanted_) call_(work_);
            --pending_;
        }
    }

    const pid_t process_ = getpid();
    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::atomic<int64_t> round_{0};
    std::atomic<size_t> pending_{0};
    size_t count_ = 0, wanted_ = 0;
    void (*call_)(const void*) = nullptr;
    const void* work_ = nullptr;
};

// Runs task(0) to task(count - 1) on at most `threads` threads; false if memory ran out.
template <class Task>
bool share_out(size_t count, int64_t threads, const Task& task) {
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    Helpers::Turn turn(std::max<size_t>(1, std::min(static_cast<size_t>(threads), count)) - 1);
    turn.run([&] {
        try {
            for (size_t i = next++; i < count; i = next++) task(i);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    return !failed;
}

}  // namespace hardy
