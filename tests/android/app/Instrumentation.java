package android.app;

import android.os.Bundle;

/** What org.pocketvlm.bench.Bench needs of Android's class of this name; `finish` prints what `am instrument` would. */
public class Instrumentation {
    public void onCreate(Bundle arguments) {}

    public void start() {
        new Thread(this::onStart).start();
    }

    public void onStart() {}

    public void finish(int resultCode, Bundle results) {
        System.out.println("INSTRUMENTATION_CODE: " + resultCode + " code=" + results.getInt("code"));
    }
}
