// The vision tower and projector as an ONNX graph, for the engines whose artifacts have one; and what they share.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

namespace pocketvlm {

using Shape = std::vector<int64_t>;

// Opens a graph, as vlm/runtimes/_onnx_session.py: `threads` of its own pool, and whether idle ones keep their
// processors for a while, which only the pool that works most may. Throws std::runtime_error that names the file.
Ort::Session open_session(const std::string& path, int threads, bool spins = true);

// Shape of an input or output; dimensions that vary are negative.
Shape input_shape(const Ort::Session& session, size_t index);
Shape output_shape(const Ort::Session& session, size_t index);

// Copies a result after checking its size. Throws std::runtime_error.
void copy_floats(const Ort::Value& value, int64_t count, float* out);

// A tensor over somebody else's memory.
template <typename Value>
Ort::Value tensor(const Value* data, const Shape& shape) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  return Ort::Value::CreateTensor<Value>(memory, const_cast<Value*>(data), static_cast<size_t>(count), shape.data(),
                                         shape.size());
}

class OnnxVision {
 public:
  OnnxVision(const std::string& path, int threads);

  int64_t pixels() const;                            // elements of the picture
  int64_t tokens() const { return tokens_.at(1); }   // V
  int64_t hidden() const { return tokens_.at(2); }   // D

  // pixels [1, 3, S, S] -> tokens [V, D].
  void encode(const float* pixels, float* tokens);

 private:
  Ort::Session session_;
  Shape pixels_;  // [1, 3, S, S]
  Shape tokens_;  // [1, V, D]
};

}  // namespace pocketvlm
