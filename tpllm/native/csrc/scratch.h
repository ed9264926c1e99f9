// Memory that a thread keeps between calls, one buffer for each purpose, and a second one where a product feeds another.
enum class Slot { kPairs, kFloats, kBytes, kSums, kRowScales, kUnitScales, kInner, kAccumulators, kPanel, kAttention, kPartials, kCount };

class Scratch {
 public:
  ~Scratch() {
    for (auto& layer : buffers_)
      for (auto& buffer : layer) std::free(buffer.data);
  }
  // Aligned memory of at least num_bytes; what it held is gone.
  void* get(Slot slot, size_t num_bytes, int layer = 0) {
    Buffer& buffer = buffers_[layer][static_cast<int>(slot)];
    if (buffer.size < num_bytes) {
      std::free(buffer.data);
      buffer.size = (num_bytes + 4095) / 4096 * 4096;
      buffer.data = std::aligned_alloc(4096, buffer.size);
      if (!buffer.data) std::abort();  // no memory: there is no one to tell on a thread of the pool
    }
    return buffer.data;
  }
  template <class T>
  T* get(Slot slot, int64_t count, int layer = 0) {
    return static_cast<T*>(get(slot, static_cast<size_t>(count) * sizeof(T), layer));
  }

 private:
  struct Buffer { void* data = nullptr; size_t size = 0; };
  Buffer buffers_[2][static_cast<int>(Slot::kCount)];
};

static Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}
