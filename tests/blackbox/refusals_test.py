"""Requests that cannot be served: each is told its field, its value and the limit, and the server serves on."""

import math
import unittest

import grpc
from google.rpc import error_details_pb2
from longspan.v1 import inference_pb2, needle_pb2

from harness import Server, completion, details, streamed

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CONTEXT, VOCABULARY, MAX_TOKENS = 16384, 8192, 8
LARGEST = 2**32 - 1
# Of each count: the most that it may be. min_tokens is bounded by the request's own max_tokens.
COUNTS = {"sampling.n": 64, "sampling.top_k": 2**30, "stopping.min_tokens": MAX_TOKENS, "output.logprobs": 20,
          "output.prompt_logprobs": 20}
# Of each float: a value below what it may be, and the most that it may be.
FLOATS = {"sampling.temperature": (-0.5, 100), "sampling.top_p": (0, 1), "sampling.min_p": (-0.5, 1),
          "sampling.presence_penalty": (-2.5, 2), "sampling.frequency_penalty": (-2.5, 2),
          "sampling.repetition_penalty": (0, 2)}
NOT_UTF8 = {"a lone continuation": b"a\x80", "a lead without its rest": b"caf\xc3", "an overlong form": b"\xc0\x80",
            "a surrogate": b"\xed\xa0\x80", "beyond Unicode": b"\xf4\x90\x80\x80"}


def asking(path, value):
    """A request that would be served but for one field: 'sampling.n'."""
    request = completion(max_tokens=MAX_TOKENS)
    holder, _, name = path.rpartition(".")
    setattr(getattr(request, holder) if holder else request, name, value)
    return request


def of_tokens(ids, **fields):
    request = completion(max_tokens=1, **fields)
    request.token_ids.SetInParent()  # and text is not set
    request.token_ids.ids.extend(ids)
    return request


def field(number, content):
    """A short string or message on the wire, by its number; client libraries do not send strings that are not UTF-8."""
    return bytes([number << 3 | 2, len(content)]) + content


class Refusals(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(cls.server.kill)

    def tearDown(self):
        self.assertIsNone(self.server.process.poll(), "".join(self.server.log[-5:]))
        self.assertEqual(self.server.inference.Complete(completion(), timeout=10).usage.completion_tokens, 8)
        self.assertTrue(self.server.wait_idle(), "a request left something behind")

    def refuses(self, call, path, message):
        """The call is told the field, and a message of this form about it; its details."""
        with self.assertRaises(grpc.RpcError) as caught:
            call()
        error = caught.exception
        self.assertEqual(error.code(), INVALID, error.details())
        self.assertRegex(error.details(), message)
        bad, = details(error, error_details_pb2.BadRequest)
        self.assertEqual(bad.field_violations[0].field.partition("[")[0], path)  # a list's may have a place
        return error

    def refuses_both(self, request, path, message):
        """As one answer and as a stream."""
        with self.subTest(path, message=message):
            inference = self.server.inference
            self.refuses(lambda: inference.Complete(request, timeout=20), path, message)
            return self.refuses(lambda: list(inference.StreamComplete(streamed(request), timeout=20)), path, message)

    def refuses_bytes(self, request, path, message, method="InferenceService/Complete"):
        with self.subTest(path, request=request):
            self.refuses(lambda: self.server.channel.unary_unary(f"/longspan.v1.{method}")(request, timeout=20), path, message)

    def test_counts_above_their_limits(self):
        for path, most in COUNTS.items():
            for value in (most + 1, 2**31, LARGEST):
                self.refuses_both(asking(path, value), path, rf"^{path}: is {value}, must be from \d+ to {most}$")

    def test_counts_of_nothing(self):
        for path in ("sampling.n", "stopping.max_tokens", "truncate_prompt_tokens"):
            self.refuses_both(asking(path, 0), path, rf"^{path}: is 0, must be .*\b1\b")

    def test_floats_that_are_no_numbers_or_beyond_their_limits(self):
        for path, (below, most) in FLOATS.items():
            for value in (math.nan, math.inf, -math.inf, below, most + 0.5):
                self.refuses_both(asking(path, value), path, rf"^{path}: is {value:g}, must be .*\b{most}$")
        for value in (math.nan, math.inf, -math.inf, -100.5, 100.5):
            request = completion()
            request.sampling.logit_bias[7] = value
            self.refuses_both(request, "sampling.logit_bias", rf": is {value:g}, must be from -100 to 100$")

    def test_floats_of_needle_runs(self):
        def refused(path, message, **fields):
            run = {"context_lengths": [256], "depth_percents": [50], **fields}
            method = self.server.channel.unary_stream("/longspan.v1.NeedleService/RunNeedle")
            request = needle_pb2.RunNeedleRequest(**run).SerializeToString()
            with self.subTest(path, message=message):
                self.refuses(lambda: list(method(request, timeout=20)), path, message)

        for value in (math.nan, math.inf, -math.inf, -0.5, 100.5):
            refused("depth_percents", rf"^depth_percents: has {value:g}, must be from 0 to 100$", depth_percents=[50, value])
        for path, (below, most) in FLOATS.items():
            for value in (math.nan, math.inf, below, most + 0.5):
                sampling = inference_pb2.SamplingOptions(**{path.partition(".")[2]: value})
                refused(path, rf"^{path}: is {value:g}, must be .*\b{most}$", sampling=sampling)

    def test_lists_that_are_too_long(self):
        biases = completion()
        biases.sampling.logit_bias.update(dict.fromkeys(range(1025), 1.0))
        self.refuses_both(biases, "sampling.logit_bias", r"has 1025 entries, the limit is 1024$")
        for stops, message in ((["x"] * 17, "has 17 strings, the limit is 16$"),
                               (["x"] * 1000000, "has 1000000 strings, the limit is 16$"),
                               (["x" * 1025], r"has 1025 bytes.*, the limit is 1024$"),
                               (["x", ""], "empty")):
            request = completion()
            request.stopping.stop.extend(stops)
            self.refuses_both(request, "stopping.stop", message)
        request = completion()
        request.stopping.stop_token_ids.extend([5] * 257)
        self.refuses_both(request, "stopping.stop_token_ids", "has 257 ids, the limit is 256$")

    def test_tokens_that_are_not_in_the_vocabulary(self):
        for token in (VOCABULARY, 2**31, LARGEST):
            message = rf": token id {token} is not in the vocabulary of {VOCABULARY}$"
            self.refuses_both(of_tokens([5, token]), "prompt", message)
            biased, stopped = completion(), completion()
            biased.sampling.logit_bias[token] = 1
            stopped.stopping.stop_token_ids.append(token)
            self.refuses_both(biased, "sampling.logit_bias", message)
            self.refuses_both(stopped, "stopping.stop_token_ids", message)

    def test_prompts_of_nothing(self):
        nothing = completion()
        nothing.ClearField("text")
        self.refuses_both(nothing, "prompt", "^prompt: is not set$")
        self.refuses_both(completion(""), "prompt", "^prompt: is empty$")
        self.refuses_both(of_tokens([]), "prompt", "^prompt: has no tokens$")
        self.refuses_both(of_tokens([], truncate_prompt_tokens=LARGEST), "prompt", "^prompt: has no tokens$")

    def test_prompts_that_leave_the_context_no_room(self):
        def refused(request, prompt, max_tokens):
            error = self.refuses_both(
                request, "prompt", rf"^prompt: has {prompt} tokens and max_tokens is {max_tokens}, "
                                   rf"{prompt + max_tokens} together; the context holds {CONTEXT}$")
            self.assertEqual(details(error, error_details_pb2.ErrorInfo)[0].reason, "CONTEXT_LENGTH_EXCEEDED")

        for count in (CONTEXT, 20000, 5000000):
            refused(of_tokens([5] * count), count, 1)
        text = completion("word " * 20000, max_tokens=1)
        refused(text, len(self.server.inference.Tokenize(inference_pb2.TokenizeRequest(text=text.text)).token_ids), 1)
        for max_tokens in (CONTEXT - 2, 2**31, LARGEST):
            request = of_tokens([5, 6, 7])
            request.stopping.max_tokens = max_tokens
            refused(request, 3, max_tokens)
        request.stopping.max_tokens = CONTEXT - 3  # fits
        stream = self.server.inference.StreamComplete(streamed(request))
        self.assertEqual(next(stream).prompt.prompt_tokens, 3)
        stream.cancel()

    # Not refused: the prompt has no more.
    def test_truncation_to_more_than_the_prompt_has_keeps_all_of_it(self):
        whole = self.server.inference.Complete(completion())
        for keep in (2**31 - 1, 2**31, LARGEST):
            answer = self.server.inference.Complete(completion(truncate_prompt_tokens=keep))
            self.assertEqual((answer.usage, answer.choices), (whole.usage, whole.choices))
        long = self.server.inference.Complete(of_tokens([5] * 20000, truncate_prompt_tokens=10))
        self.assertEqual(long.usage.prompt_tokens, 10)

    # Each id can become the text of the longest token: the answer to a message of 57 MiB has 429 MiB.
    def test_more_tokens_than_a_text_may_have(self):
        request = inference_pb2.DetokenizeRequest(token_ids=[6029] * 30000000)
        self.refuses(lambda: self.server.inference.Detokenize(request, timeout=60), "token_ids",
                     r"^token_ids: has 30000000 (ids|tokens), the limit is \d+$")

    def test_text_that_is_not_utf8(self):
        text, message = field(3, b"x"), "not valid UTF-8"
        for text_of in NOT_UTF8.values():
            self.refuses_bytes(field(3, text_of), "text", message)
            self.refuses_bytes(text + field(6, field(3, text_of)), "stopping.stop", message)
            self.refuses_bytes(text + field(1, text_of), "request_id", message)
            self.refuses_bytes(text + field(2, text_of), "model", message)
            self.refuses_bytes(text + field(9, text_of), "cache_salt", message)
            self.refuses_bytes(field(2, text_of), "text", message, "InferenceService/Tokenize")
            self.refuses_bytes(field(2, field(2, text_of)), "messages.content", message, "InferenceService/Chat")

    def test_bytes_that_are_no_message(self):
        cut = completion().SerializeToString()[:-1]
        for request in (b"\xff\xff\xff", b"\x7b" * 10000, cut):  # no field, groups without end, a message cut short
            self.refuses_bytes(request, "request", "^request: is not a message of this method$")


if __name__ == "__main__":
    unittest.main()
