package org.pocketvlm.bench;

/** The C++ runner in this process. */
public final class Runner {
    static {
        System.loadLibrary("pocketvlm_bench");
    }

    private Runner() {}

    /**
     * Answers the requests of a job folder and writes results.txt into it.
     *
     * @param folder with job.txt and the pictures it names, readable and writable
     * @return 0 done, 1 the model failed, 2 the job is wrong; the reason is in results.txt or on stderr
     */
    public static native int run(String folder);
}
