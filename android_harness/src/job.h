// A job: settings and requests in a text file; see README.md for the format.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pocketvlm {

struct Request {
  std::string id;
  std::string image;         // file of raw float32 pixels [3, S, S], relative to the job; empty = text only
  std::vector<int64_t> ids;  // the prompt; the image token's id stands V times where the image goes
};

struct Job {
  std::string folder;
  std::string model;
  int threads = 1;
  int max_new_tokens = 64;
  int64_t eos = -1;
  int64_t image_token = -1;
  int64_t context = 0;        // longest sequence, for engines whose files do not say it
  bool reuse_images = false;  // a picture that the request before had too is not encoded again
  double repeat_s = 0;        // the last request is repeated until this long after the timed ones began
  size_t repeat_from = 0;     // how many requests come before the timed ones
  std::vector<Request> requests;
};

// Reads `folder`/job.txt. Throws std::runtime_error that names file, line, value found and value expected.
Job read_job(const std::string& folder);

// Reads `count` little-endian floats. Throws std::runtime_error when the file has another size.
std::vector<float> read_floats(const std::string& path, int64_t count);

}  // namespace pocketvlm
