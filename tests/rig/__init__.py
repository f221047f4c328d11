"""Real parts that stand for devices: Debian's adb server, an arm64 adbd and an arm64 sshd on an emulated processor."""
