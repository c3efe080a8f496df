// Memory that is not cleared and is used again.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace {

// An array that is not cleared and that keeps its memory when it shrinks.
template <typename T>
class Buffer {
  public:
    T* resize(size_t count) {
        if (count > capacity_) {
            std::free(data_);
            capacity_ = 0;
            data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
            if (!data_) throw std::bad_alloc();
            capacity_ = count;
        }
        return data_;
    }
    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    size_t bytes() const { return capacity_ * sizeof(T); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

  private:
    T* data_ = nullptr;
    size_t capacity_ = 0;
};

// Fresh memory costs a page fault every 4 KiB, which is as much as the work itself: keep a few for the next call.
template <typename T>
class Pool {
  public:
    T* take() {
        std::lock_guard<std::mutex> guard(lock_);
        if (free_.empty()) return new T();
        T* item = free_.back().release();
        free_.pop_back();
        return item;
    }
    void give(T* item) {
        std::unique_ptr<T> owned(item);
        std::lock_guard<std::mutex> guard(lock_);
        if (free_.size() < 2) free_.push_back(std::move(owned));
    }

  private:
    std::mutex lock_;
    std::vector<std::unique_ptr<T>> free_;
};

}  // namespace
