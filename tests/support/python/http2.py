"""HTTP/2 by the frame (RFC 9113), for what no client library would send."""

import socket
import struct

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
END_STREAM, END_HEADERS = 0x1, 0x4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 0x3, 0x4, 0x5  # settings
ACK = 0x1  # of SETTINGS and PING
ENHANCE_YOUR_CALM = 0xB
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind, payload=b"", flags=0, stream=0):
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def settings(payload):
    """The {identifier: value} of a SETTINGS payload."""
    return dict(struct.unpack_from("!HI", payload, at) for at in range(0, len(payload), 6))


def grpc_call(path, message, stream=1):
    """The frames of a gRPC call."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost",
              "content-type": "application/grpc", "te": "trailers"}
    block = b"".join(b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in field) for field in fields.items())
    body = struct.pack("!BI", 0, len(message)) + message
    return frame(HEADERS, block, END_HEADERS, stream) + frame(DATA, body, END_STREAM, stream)


class Http2:
    """A connection that speaks frames; `told` are settings by their identifiers."""

    def __init__(self, address, told=None, narrow=False):
        self.socket = dial(address, narrow)
        payload = b"".join(struct.pack("!HI", *setting) for setting in (told or {}).items())
        self.socket.sendall(PREFACE + frame(SETTINGS, payload))
        self.stream = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.socket.close()

    def frames(self):
        """(kind, flags, payload) of each frame until the connection ends."""
        while len(head := self.stream.read(9)) == 9:
            yield head[3], head[4], self.stream.read(int.from_bytes(head[:3], "big"))

    def next(self, kind):
        """The payload of the next frame of that kind; None if the connection ends before."""
        return next((payload for found, _, payload in self.frames() if found == kind), None)


def dial(address, narrow=False):
    """A socket to HOST:PORT. `narrow` takes small segments into a small buffer, so that the peer soon has to wait."""
    host, port = address.rsplit(":", 1)
    made = socket.socket()
    try:
        if narrow:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        made.settimeout(10)
        made.connect((host, int(port)))
    except BaseException:
        made.close()
        raise
    return made
