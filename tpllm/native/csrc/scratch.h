// Memory that kernels keep between calls. Whoever works on one has a set of buffers for that time: there are as many sets as threads that ever worked
// at once, not as threads that ever did, of which XLA has many. The largest set is taken first, so that one grows to what a call needs, and the others
// to what its helpers do.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace tpllm {

// One buffer for each purpose, and a second one where a product feeds another.
enum class Slot { kPairs, kFloats, kBytes, kSums, kRowScales, kUnitScales, kInner, kAccumulators, kPanel, kAttention, kPartials, kCount };

class Scratch {
 public:
  // Aligned memory of at least num_bytes; what it held is gone.
  void* get(Slot slot, size_t num_bytes, int layer = 0) {
    Buffer& buffer = buffers_[layer][static_cast<int>(slot)];
    if (buffer.size < num_bytes) {
      std::free(buffer.data);
      total_ -= buffer.size;
      buffer.size = (num_bytes + 4095) / 4096 * 4096;
      total_ += buffer.size;
      buffer.data = std::aligned_alloc(4096, buffer.size);
      if (!buffer.data) std::abort();  // no memory: there is no one to tell on a thread of the pool
    }
    return buffer.data;
  }
  template <class T>
  T* get(Slot slot, int64_t count, int layer = 0) {
    return static_cast<T*>(get(slot, static_cast<size_t>(count) * sizeof(T), layer));
  }
  size_t total() const { return total_; }

 private:
  struct Buffer { void* data = nullptr; size_t size = 0; };
  size_t total_ = 0;
  Buffer buffers_[2][static_cast<int>(Slot::kCount)];
};

inline thread_local Scratch* own_scratch = nullptr;
inline Scratch& scratch() { return *own_scratch; }

// Gives this thread a set, unless it has one already, until the end of the scope.
class ScratchLease {
 public:
  ScratchLease() : is_first_(own_scratch == nullptr) {
    if (!is_first_) return;
    Shelf& shelf = Shelf::instance();
    std::lock_guard<std::mutex> lock(shelf.mutex);
    if (shelf.sets.empty()) {
      own_scratch = new Scratch;
    } else {
      const auto largest = std::max_element(shelf.sets.begin(), shelf.sets.end(), [](Scratch* a, Scratch* b) { return a->total() < b->total(); });
      own_scratch = *largest;
      shelf.sets.erase(largest);
    }
  }
  ~ScratchLease() {
    if (!is_first_) return;
    Shelf& shelf = Shelf::instance();
    std::lock_guard<std::mutex> lock(shelf.mutex);
    shelf.sets.push_back(own_scratch);
    own_scratch = nullptr;
  }
  ScratchLease(const ScratchLease&) = delete;

 private:
  struct Shelf {
    std::mutex mutex;
    std::vector<Scratch*> sets;
    static Shelf& instance() {
      static Shelf* shelf = new Shelf;  // never destroyed: threads of the pool may outlive everything
      return *shelf;
    }
  };
  bool is_first_;
};

}  // namespace tpllm
