package android.os;

import java.util.HashMap;
import java.util.Map;

/** What org.pocketvlm.bench.Bench needs of Android's class of this name. */
public final class Bundle {
    private final Map<String, Object> values = new HashMap<>();

    public String getString(String key) {
        return (String) values.get(key);
    }

    public int getInt(String key) {
        return (int) values.getOrDefault(key, 0);
    }

    public void putString(String key, String value) {
        values.put(key, value);
    }

    public void putInt(String key, int value) {
        values.put(key, value);
    }
}
