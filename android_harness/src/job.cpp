#include "job.h"

#include <fstream>
#include <sstream>
#include <stdexcept>

namespace pocketvlm {
namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& found, const std::string& expected) {
  throw std::runtime_error(where + ": " + found + " found, " + expected + " expected");
}

Request read_request(std::istringstream& words, const std::string& where) {
  Request request;
  if (!(words >> request.id >> request.image)) {
    refuse(where, "an incomplete request", "request ID IMAGE_FILE|- TOKEN_ID...");
  }
  if (request.image == "-") {
    request.image.clear();
  }
  for (int64_t id; words >> id;) {
    request.ids.push_back(id);
  }
  if (!words.eof() || request.ids.empty()) {
    refuse(where, "something that is not a token id, or none", "at least one token id");
  }
  return request;
}

template <typename Value>
void read_value(std::istringstream& words, Value& value, const std::string& where) {
  if (!(words >> value) || !(words >> std::ws).eof()) {
    refuse(where, "no value or more than one", "exactly one value");
  }
}

}  // namespace

Job read_job(const std::string& folder) {
  const std::string path = folder + "/job.txt";
  std::ifstream file(path);
  if (!file) {
    refuse(path, "no readable file", "a job");
  }
  Job job;
  job.folder = folder;
  int number = 0;
  for (std::string line; std::getline(file, line);) {
    const std::string where = path + ":" + std::to_string(++number);
    std::istringstream words(line);
    std::string key;
    if (!(words >> key)) {
      continue;
    }
    if (key == "model") {
      read_value(words, job.model, where);
    } else if (key == "threads") {
      read_value(words, job.threads, where);
    } else if (key == "max_new_tokens") {
      read_value(words, job.max_new_tokens, where);
    } else if (key == "eos") {
      read_value(words, job.eos, where);
    } else if (key == "image_token") {
      read_value(words, job.image_token, where);
    } else if (key == "context") {
      read_value(words, job.context, where);
    } else if (key == "reuse_images") {
      read_value(words, job.reuse_images, where);
    } else if (key == "repeat_s") {
      read_value(words, job.repeat_s, where);
    } else if (key == "repeat_from") {
      read_value(words, job.repeat_from, where);
    } else if (key == "request") {
      job.requests.push_back(read_request(words, where));
    } else {
      refuse(where, "'" + key + "'", "model, threads, max_new_tokens, eos, image_token, context, reuse_images, repeat_s, repeat_from or request");
    }
  }
  if (job.model.empty() || job.eos < 0 || job.requests.empty() || job.max_new_tokens < 1) {
    refuse(path, "a job without model, eos, request or with max_new_tokens below 1", "all of them");
  }
  return job;
}

std::vector<float> read_floats(const std::string& path, int64_t count) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) {
    refuse(path, "no readable file", std::to_string(count) + " floats");
  }
  const auto bytes = static_cast<int64_t>(file.tellg());
  if (bytes != count * static_cast<int64_t>(sizeof(float))) {
    refuse(path, std::to_string(bytes) + " bytes", std::to_string(count * static_cast<int64_t>(sizeof(float))));
  }
  std::vector<float> values(static_cast<size_t>(count));
  file.seekg(0).read(reinterpret_cast<char*>(values.data()), bytes);
  if (!file) {
    refuse(path, "a read error", std::to_string(bytes) + " bytes");
  }
  return values;
}

}  // namespace pocketvlm
