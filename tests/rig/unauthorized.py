"""A device that asks every computer for a key and accepts none, like a locked phone: `python unauthorized.py PORT`."""

import socket
import struct
import sys
import threading

HEADER = 24
TOKEN, SIGNATURE = 1, 2


def message(command: bytes, first: int, second: int, data: bytes = b"") -> bytes:
    """One message of adb's protocol."""
    number = int.from_bytes(command, "little")
    return struct.pack("<6I", number, first, second, len(data), sum(data), number ^ 0xFFFFFFFF) + data


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes; fewer when the other side has gone."""
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def serve(connection: socket.socket) -> None:
    """Answer one computer: a token for its greeting, another for each signature, silence for its key."""
    while len(header := receive(connection, HEADER)) == HEADER:
        command, first, _, length, _, _ = struct.unpack("<6I", header)
        receive(connection, length)
        name = command.to_bytes(4, "little")
        if name == b"CNXN" or (name == b"AUTH" and first == SIGNATURE):
            connection.sendall(message(b"AUTH", TOKEN, 0, b"\x11" * 20))


def main(port: int) -> None:
    """Listen on 127.0.0.1."""
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
