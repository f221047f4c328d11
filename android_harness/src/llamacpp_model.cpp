// llama.cpp: its decoder on a .gguf, fed with embeddings; the vision tower runs in ONNX Runtime, since llama.cpp's own is
// wrong for LLaVA towers. Text enters as embeddings too, looked up in the .gguf's table, as vlm/runtimes/llamacpp.py.

#include <fcntl.h>
#include <ggml-backend.h>
#include <ggml.h>
#include <gguf.h>
#include <llama.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "model.h"
#include "onnx_vision.h"

namespace pocketvlm {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

// Folder of this program's file, or of the loader that was started with it: where a bundle has the backends.
std::string own_folder() {
  std::array<char, 4096> path{};
  const ssize_t length = readlink("/proc/self/exe", path.data(), path.size() - 1);
  const std::string whole(path.data(), length > 0 ? static_cast<size_t>(length) : 0);
  return whole.substr(0, whole.rfind('/'));
}

// The embedding table of a .gguf, row by row from the file: it is not held in memory a second time.
class Rows {
 public:
  explicit Rows(const std::string& path) : file_(open(path.c_str(), O_RDONLY)) {
    gguf_context* meta = gguf_init_from_file(path.c_str(), {true, nullptr});
    const int64_t id = meta == nullptr ? -1 : gguf_find_tensor(meta, "token_embd.weight");
    if (file_ < 0 || id < 0) {
      fail(path + ": no readable .gguf with token_embd.weight; export the artifact again");
    }
    type_ = gguf_get_tensor_type(meta, id);
    offset_ = gguf_get_data_offset(meta) + gguf_get_tensor_offset(meta, id);
    gguf_free(meta);
  }
  ~Rows() { close(file_); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  // Row `id` of `width` values, dequantized.
  void read(int64_t id, int64_t width, float* out) const {
    const size_t bytes = ggml_row_size(type_, width);
    std::vector<char> row(bytes);
    if (pread(file_, row.data(), bytes, static_cast<off_t>(offset_ + static_cast<size_t>(id) * bytes)) !=
        static_cast<ssize_t>(bytes)) {
      fail(std::string("token_embd.weight: a row cannot be read: ") + std::strerror(errno));
    }
    if (type_ == GGML_TYPE_F32) {
      std::memcpy(out, row.data(), bytes);
    } else {
      ggml_get_type_traits(type_)->to_float(row.data(), out, width);
    }
  }

 private:
  int file_;
  ggml_type type_ = GGML_TYPE_F32;
  size_t offset_ = 0;
};

class LlamaModel final : public Model {
 public:
  LlamaModel(const std::string& folder, int threads, int64_t context)
      : vision_(folder + "/vision_encoder.onnx", threads), rows_(folder + "/decoder.gguf") {
    if (context < 1) {
      fail("context: the longest sequence is expected in the job");
    }
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    ggml_backend_load_all_from_path(own_folder().c_str());
    if (ggml_backend_dev_count() == 0) {
      ggml_backend_load_all();
    }
    llama_backend_init();
    llama_model_params how = llama_model_default_params();
    how.n_gpu_layers = 0;
    model_ = llama_model_load_from_file((folder + "/decoder.gguf").c_str(), how);
    if (model_ == nullptr) {
      fail(folder + "/decoder.gguf: llama.cpp cannot load it; export the artifact again");
    }
    llama_context_params room = llama_context_default_params();
    room.n_ctx = room.n_batch = room.n_ubatch = static_cast<uint32_t>(context);
    room.n_threads = room.n_threads_batch = threads;
    context_ = llama_init_from_model(model_, room);
    if (context_ == nullptr) {
      fail("llama.cpp cannot hold a context of " + std::to_string(context) + " tokens: not enough memory");
    }
    sizes_.pixels = vision_.pixels();
    sizes_.vision_tokens = vision_.tokens();
    sizes_.hidden = vision_.hidden();
    sizes_.vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    sizes_.context = context;
    if (llama_model_n_embd(model_) != sizes_.hidden) {
      fail(folder + ": vision tower and decoder have different widths; export the artifact again");
    }
    batch_ = llama_batch_init(static_cast<int32_t>(context), static_cast<int32_t>(sizes_.hidden), 1);
    for (int64_t i = 0; i < context; ++i) {
      batch_.n_seq_id[i] = 1;
      batch_.seq_id[i][0] = 0;
    }
  }

  ~LlamaModel() override {
    llama_batch_free(batch_);
    llama_free(context_);
    llama_model_free(model_);
  }

  void encode_image(const float* pixels, float* tokens, float*) override { vision_.encode(pixels, tokens); }

  void embed(const int64_t* ids, int64_t n, float* embeddings) override {
    for (int64_t i = 0; i < n; ++i) {
      if (ids[i] < 0 || ids[i] >= sizes_.vocabulary) {
        fail("token id " + std::to_string(ids[i]) + ": the vocabulary has " + std::to_string(sizes_.vocabulary) +
             " entries");
      }
      rows_.read(ids[i], sizes_.hidden, embeddings + i * sizes_.hidden);
    }
  }

  void reset() override {
    llama_memory_clear(llama_get_memory(context_), false);
    position_ = 0;
  }

  void forward(const float* embeddings, int64_t n, float* logits) override {
    if (n < 1 || position_ + n > sizes_.context) {
      fail("the sequence would have " + std::to_string(position_ + n) + " tokens, the context holds " +
           std::to_string(sizes_.context));
    }
    std::copy(embeddings, embeddings + n * sizes_.hidden, batch_.embd);
    for (int64_t i = 0; i < n; ++i) {
      batch_.pos[i] = static_cast<llama_pos>(position_ + i);
      batch_.logits[i] = i == n - 1;
    }
    batch_.n_tokens = static_cast<int32_t>(n);
    if (const int32_t code = llama_decode(context_, batch_); code != 0) {
      fail("llama.cpp refused " + std::to_string(n) + " positions (code " + std::to_string(code) + ")");
    }
    const float* found = llama_get_logits_ith(context_, -1);
    std::copy(found, found + sizes_.vocabulary, logits);
    position_ += n;
  }

 private:
  OnnxVision vision_;
  Rows rows_;
  llama_model* model_ = nullptr;
  llama_context* context_ = nullptr;
  llama_batch batch_{};
  int64_t position_ = 0;
};

}  // namespace

std::unique_ptr<Model> open_model(const std::string& path, int threads, int64_t context) {
  return std::make_unique<LlamaModel>(path, threads, context);
}

}  // namespace pocketvlm
