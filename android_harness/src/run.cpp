// Answers a job's requests and writes results.txt in its folder line by line as it goes.

#include "run.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "job.h"
#include "model.h"

namespace {

using pocketvlm::Job;
using pocketvlm::Model;
using pocketvlm::Request;
using Clock = std::chrono::steady_clock;

struct Answer {
  std::vector<int64_t> tokens;
  double vision_ms = -1;  // below 0: no picture was encoded
  double prefill_ms = 0;
  double ttft_ms = 0;
  std::vector<double> decode_ms;
};

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// What the kernel says of this process after a key of /proc/self/status, without blanks before it.
std::string status_of(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(key + ":", 0) == 0) {
      return line.substr(line.find_first_not_of(" \t", key.size() + 1));
    }
  }
  throw std::runtime_error("/proc/self/status: no " + key + " line found");
}

// Highest resident memory of this process so far, in KiB.
long peak_memory_kib() { return std::stol(status_of("VmHWM")); }

// The prompt's embeddings [N, D] with the vision tokens [V, D] where the image token stands.
std::vector<float> prompt_embeddings(Model& model, const Job& job, const Request& request,
                                     const std::vector<float>& vision) {
  const int64_t width = model.sizes().hidden;
  const auto count = static_cast<int64_t>(request.ids.size());
  std::vector<int64_t> ids = request.ids;
  if (!vision.empty()) {
    const auto places = std::count(ids.begin(), ids.end(), job.image_token);
    if (places != model.sizes().vision_tokens) {
      throw std::runtime_error("request " + request.id + ": " + std::to_string(places) + " image tokens found, " +
                               std::to_string(model.sizes().vision_tokens) + " expected");
    }
    std::replace(ids.begin(), ids.end(), job.image_token, int64_t{0});
  }
  std::vector<float> embeddings(static_cast<size_t>(count * width));
  model.embed(ids.data(), count, embeddings.data());
  auto token = vision.begin();
  for (int64_t i = 0; i < count && !vision.empty(); ++i) {
    if (request.ids[static_cast<size_t>(i)] == job.image_token) {
      std::copy(token, token + width, embeddings.begin() + i * width);
      token += width;
    }
  }
  return embeddings;
}

int64_t largest(const std::vector<float>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// Seconds since the device started, sleep included: the clock of /proc/uptime, so that sensor readings can be matched.
double uptime() {
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The picture in use: its pixels, and its vision tokens [V, D] once it was encoded; both empty without a picture.
struct Picture {
  std::string name;
  std::vector<float> pixels;
  std::vector<float> tokens;
};

// Greedy answer to one request, as vlm/runtimes/base.py's `generate`.
Answer answer(Model& model, const Job& job, const Request& request, Picture& picture) {
  const pocketvlm::Sizes& sizes = model.sizes();
  Answer result;
  const auto start = Clock::now();
  if (!picture.pixels.empty() && picture.tokens.empty()) {
    picture.tokens.resize(static_cast<size_t>(sizes.vision_tokens * sizes.hidden));
    model.encode_image(picture.pixels.data(), picture.tokens.data(), nullptr);
    result.vision_ms = ms_since(start);
  }
  const std::vector<float>& vision = picture.tokens;
  auto before = Clock::now();
  std::vector<float> logits(static_cast<size_t>(sizes.vocabulary));
  std::vector<float> embeddings = prompt_embeddings(model, job, request, vision);
  const auto count = static_cast<int64_t>(request.ids.size());
  model.reset();
  model.forward(embeddings.data(), count, logits.data());
  int64_t token = largest(logits);
  result.prefill_ms = ms_since(before);
  result.ttft_ms = ms_since(start);
  const auto limit = static_cast<size_t>(std::min<int64_t>(job.max_new_tokens, sizes.context - count));
  while (token != job.eos && limit > 0) {
    result.tokens.push_back(token);
    if (result.tokens.size() >= limit) {
      break;
    }
    before = Clock::now();
    model.embed(&token, 1, embeddings.data());
    model.forward(embeddings.data(), 1, logits.data());
    token = largest(logits);
    result.decode_ms.push_back(ms_since(before));
  }
  return result;
}

void write_answer(std::FILE* out, const Request& request, const std::string& id, const Answer& answer) {
  std::fprintf(out, "answer %s end_s %.3f", id.c_str(), uptime());
  if (answer.vision_ms >= 0) {
    std::fprintf(out, " vision_ms %.3f", answer.vision_ms);
  }
  std::fprintf(out, " prefill_ms %.3f prefill_tokens %zu ttft_ms %.3f decode_ms", answer.prefill_ms, request.ids.size(),
               answer.ttft_ms);
  for (const double ms : answer.decode_ms) {
    std::fprintf(out, " %.3f", ms);
  }
  std::fprintf(out, " tokens");
  for (const int64_t token : answer.tokens) {
    std::fprintf(out, " %lld", static_cast<long long>(token));
  }
  std::fprintf(out, "\n");
  std::fflush(out);
}

void ask(Model& model, const Job& job, const Request& request, const std::string& id, Picture& picture, std::FILE* out) {
  if (!job.reuse_images || picture.name != request.image) {
    picture = {request.image, {}, {}};
  }
  if (!request.image.empty() && picture.pixels.empty()) {
    picture.pixels = pocketvlm::read_floats(job.folder + "/" + request.image, model.sizes().pixels);
  }
  write_answer(out, request, id, answer(model, job, request, picture));
}

void run(const Job& job, std::FILE* out) {
  std::fprintf(out, "cpus %s\n", status_of("Cpus_allowed_list").c_str());
  const auto start = Clock::now();
  const std::unique_ptr<Model> model = pocketvlm::open_model(job.model, job.threads, job.context);
  std::fprintf(out, "load_ms %.3f\nstart_s %.3f\n", ms_since(start), uptime());
  std::fflush(out);
  auto first = Clock::now();
  Picture picture;
  size_t count = 0;
  for (const Request& request : job.requests) {
    if (count == job.repeat_from) {
      first = Clock::now();
    }
    ask(*model, job, request, request.id, picture, out);
    ++count;
  }
  const Request& last = job.requests.back();
  for (int again = 1; ms_since(first) < 1e3 * job.repeat_s; ++again) {
    ask(*model, job, last, last.id + "+" + std::to_string(again), picture, out);
    ++count;
  }
  std::fprintf(out, "vm_hwm_kib %ld\ndone %zu\n", peak_memory_kib(), count);
}

}  // namespace

int pocketvlm::run_job(const std::string& folder) {
  Job job;
  try {
    job = read_job(folder);
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s\n", problem.what());
    return 2;
  }
  const std::string path = job.folder + "/results.txt";
  std::FILE* out = std::fopen(path.c_str(), "w");
  if (out == nullptr) {
    std::fprintf(stderr, "%s: cannot be written\n", path.c_str());
    return 2;
  }
  try {
    run(job, out);
  } catch (const std::exception& problem) {
    std::fprintf(out, "failed %s\n", problem.what());
    std::fclose(out);
    std::fprintf(stderr, "%s\n", problem.what());
    return 1;
  }
  const bool written = std::ferror(out) == 0;
  if (std::fclose(out) != 0 || !written) {
    std::fprintf(stderr, "%s: writing failed (disk full?)\n", path.c_str());
    return 1;
  }
  return 0;
}
