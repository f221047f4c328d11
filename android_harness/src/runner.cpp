// pocketvlm-runner JOB_FOLDER: answers the job's requests and writes JOB_FOLDER/results.txt line by line as it goes.
// Exit code: 0 done, 1 the model failed, 2 the job or the command line is wrong.

#include <cstdio>

#include "run.h"

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: pocketvlm-runner JOB_FOLDER\n");
    return 2;
  }
  return pocketvlm::run_job(arguments[1]);
}
