package org.pocketvlm.bench;

import android.app.Activity;
import android.app.Instrumentation;
import android.os.Bundle;

/**
 * Runs one job in an app's process, scheduled as apps are: {@code am instrument -w -e job FOLDER
 * org.pocketvlm.bench/org.pocketvlm.bench.Bench}. The runner's exit code is the result "code".
 */
public final class Bench extends Instrumentation {
    private static final int WRONG_JOB = 2;

    private String job;

    @Override
    public void onCreate(Bundle arguments) {
        super.onCreate(arguments);
        job = arguments.getString("job");
        start();
    }

    @Override
    public void onStart() {
        super.onStart();
        int code = job == null ? WRONG_JOB : Runner.run(job);
        Bundle results = new Bundle();
        results.putInt("code", code);
        finish(code == 0 ? Activity.RESULT_OK : Activity.RESULT_CANCELED, results);
    }
}
