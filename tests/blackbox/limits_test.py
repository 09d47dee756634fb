"""Limits of connections and calls, each met on the wire, with the numbers that the caller is told."""

import struct
import time
import unittest

import grpc
from google.rpc import error_details_pb2
from longspan.v1 import inference_pb2

from harness import Server, completion, details
from http2 import ENHANCE_YOUR_CALM, GOAWAY, MAX_CONCURRENT_STREAMS, PING, SETTINGS, Http2, frame, settings


class Limits(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--max-concurrent-streams", "7", "--max-header-bytes", "2k", "--max-message-bytes", "64k",
                            "--max-prompt-bytes", "16k", "--max-connection-age", "2s", "--max-connection-age-grace", "1s",
                            "--keepalive-time", "1s")
        cls.addClassCleanup(cls.server.kill)

    def setUp(self):
        # Not one of the last test's, which may be at its end.
        self.channel = grpc.insecure_channel(self.server.grpc, (("grpc.use_local_subchannel_pool", 1),))
        self.addCleanup(self.channel.close)

    def complete(self, request, **how):
        method = self.channel.unary_unary("/longspan.v1.InferenceService/Complete",
                                          inference_pb2.CompleteRequest.SerializeToString,
                                          inference_pb2.CompleteResponse.FromString)
        with self.assertRaises(grpc.RpcError) as caught:
            method(request, timeout=10, **how)
        return caught.exception

    def test_a_message_that_is_too_large(self):
        error = self.complete(completion("x" * 70000))
        self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        self.assertRegex(error.details(), r"larger than max \(700\d\d vs. 65536\)")

    def test_a_prompt_that_is_too_large(self):
        error = self.complete(completion("x" * 20000))
        self.assertEqual(error.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("20000 bytes, the limit is 16384", error.details())
        self.assertEqual(details(error, error_details_pb2.BadRequest)[0].field_violations[0].field, "prompt")

    def test_headers_that_are_too_large(self):
        error = self.complete(completion(), metadata=(("x-much", "y" * 3000),))
        self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        self.assertRegex(error.details(), r"metadata has 3\d\d\d bytes, the limit is 2048")
        # Beyond twice the limit the call does not reach us.
        error = self.complete(completion(), metadata=(("x-much", "y" * 6000),))
        self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)

    def test_the_streams_of_a_connection_are_told_at_its_start(self):
        with Http2(self.server.grpc) as connection:
            told = settings(connection.next(SETTINGS))
        self.assertEqual(told[MAX_CONCURRENT_STREAMS], 7)

    def test_a_flood_of_pings_ends_the_connection(self):
        with Http2(self.server.grpc) as connection:
            connection.socket.sendall(frame(PING, b"12345678") * 10)
            payload = connection.next(GOAWAY)
        self.assertEqual(struct.unpack_from("!II", payload)[1], ENHANCE_YOUR_CALM)
        self.assertIn(b"too_many_pings", payload)

    def test_an_old_connection_is_told_to_go(self):
        begin = time.monotonic()
        with Http2(self.server.grpc) as connection:
            self.assertIsNotNone(connection.next(GOAWAY))
            self.assertLess(time.monotonic() - begin, 5)

    def test_a_silent_peer_is_pinged(self):
        begin = time.monotonic()
        with Http2(self.server.grpc) as connection:
            self.assertIsNotNone(connection.next(PING))
            self.assertLess(time.monotonic() - begin, 1.8)  # later ones are for its age


if __name__ == "__main__":
    unittest.main()
