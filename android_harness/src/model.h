// One sequence's model: vision tower, embedding table and decoder with its key-value cache, whatever engine runs them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace pocketvlm {

// Sizes of the model's tensors, read from its files.
struct Sizes {
  int64_t pixels;         // elements of the picture, 3 * S * S
  int64_t vision_tokens;  // V
  int64_t patches;        // P; 0 when the program does not return patch features
  int64_t vision_width;   // width of the patch features
  int64_t hidden;         // D
  int64_t vocabulary;
  int64_t context;  // longest sequence in tokens
};

// Not thread-safe: one caller at a time. Every member throws std::exception that names the file or method and the cause.
class Model {
 public:
  virtual ~Model() = default;

  const Sizes& sizes() const { return sizes_; }

  // pixels [1, 3, S, S] -> tokens [V, D] and features [P, vision_width] (skipped when null).
  virtual void encode_image(const float* pixels, float* tokens, float* features) = 0;

  // ids [n] -> embeddings [n, D].
  virtual void embed(const int64_t* ids, int64_t n, float* embeddings) = 0;

  // Empties the key-value cache: positions start at 0 again.
  virtual void reset() = 0;

  // Appends embeddings [n, D] and writes the last position's logits [vocabulary].
  virtual void forward(const float* embeddings, int64_t n, float* logits) = 0;

 protected:
  Sizes sizes_{};
};

// Opens a model with `threads` threads; `context` is the longest sequence where the files do not say it (else 0). Each
// engine's source defines it, and a program is linked with one of them.
std::unique_ptr<Model> open_model(const std::string& path, int threads, int64_t context);

}  // namespace pocketvlm
