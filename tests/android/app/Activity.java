package android.app;

/** What org.pocketvlm.bench.Bench needs of Android's class of this name, with Android's values. */
public class Activity {
    public static final int RESULT_CANCELED = 0;
    public static final int RESULT_OK = -1;
}
