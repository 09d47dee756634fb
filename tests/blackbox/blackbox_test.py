"""What a stranger's gRPC client sees of a longspan process: the default model, the wire, exit codes."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import unittest

import grpc
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from longspan.v1 import attention_pb2, attention_pb2_grpc, inference_pb2

from harness import INFERENCE, NOT_SERVING, SERVING, Server, completion, details, streamed


class BlackBox(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(cls.server.kill)

    def setUp(self):
        self.inference = self.server.inference

    def tearDown(self):
        self.assertTrue(self.server.wait_idle(), "a request left something behind")

    def refused(self, code, call):
        with self.assertRaises(grpc.RpcError) as caught:
            call()
        self.assertEqual(caught.exception.code(), code, caught.exception.details())
        return caught.exception

    def test_a_unary_answer_counts_its_tokens(self):
        answer = self.inference.Complete(completion(max_tokens=8, request_id="mine"))
        self.assertEqual(answer.request_id, "mine")
        self.assertEqual(answer.usage.completion_tokens, 8)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 8)
        self.assertEqual(answer.choices[0].finish_reason, inference_pb2.FINISH_REASON_LENGTH)
        self.assertTrue(answer.choices[0].text)

    def test_a_stream_says_what_the_unary_call_says(self):
        whole = self.inference.Complete(completion(max_tokens=24))
        events = list(self.inference.StreamComplete(streamed(completion(max_tokens=24))))
        self.assertEqual(events[0].WhichOneof("event"), "prompt")
        self.assertEqual(events[-1].WhichOneof("event"), "usage")
        text = "".join(e.delta.text for e in events if e.WhichOneof("event") == "delta")
        self.assertEqual(text, whole.choices[0].text)
        self.assertEqual(events[-1].usage, whole.usage)

    def test_tokens_come_back_as_the_text_they_were(self):
        text = "naïve café — 日本語 🙂  two  spaces"
        ids = self.inference.Tokenize(inference_pb2.TokenizeRequest(text=text, add_special_tokens=False)).token_ids
        self.assertEqual(self.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids)).text, text)

    def test_a_cancelled_stream_frees_its_cache(self):
        before = self.server.metric('longspan_requests_total{outcome="cancelled"}')
        stream = self.inference.StreamComplete(streamed(completion(max_tokens=8000)))
        next(stream)
        stream.cancel()
        self.assertTrue(self.server.wait_idle())
        self.assertEqual(self.server.metric('longspan_requests_total{outcome="cancelled"}'), before + 1)

    def test_abort_ends_a_request_by_its_id(self):
        stream = self.inference.StreamComplete(streamed(completion(max_tokens=8000, request_id="to-abort")))
        next(stream)
        answer = self.inference.Abort(inference_pb2.AbortRequest(request_ids=["to-abort", "unknown"]))
        self.assertEqual(list(answer.aborted_request_ids), ["to-abort"])
        self.refused(grpc.StatusCode.CANCELLED, lambda: list(stream))

    def test_a_deadline_ends_a_request(self):
        begin = time.monotonic()
        self.refused(grpc.StatusCode.DEADLINE_EXCEEDED,
                     lambda: self.inference.Complete(completion(max_tokens=16000), timeout=0.3))
        self.assertLess(time.monotonic() - begin, 5)

    def test_health_names_the_process_and_the_service(self):
        self.assertEqual(self.server.health(""), SERVING)
        self.assertEqual(self.server.health(INFERENCE), SERVING)
        self.refused(grpc.StatusCode.NOT_FOUND, lambda: self.server.health("no.such.Service"))

    def test_reflection_lists_every_service(self):
        services = ProtoReflectionDescriptorDatabase(self.server.channel).get_services()
        for name in ("InferenceService", "AttentionService", "NeedleService", "ModelService", "AdminService"):
            self.assertIn("longspan.v1." + name, services)
        self.assertIn("grpc.health.v1.Health", services)

    def test_a_bad_field_is_named_in_the_details(self):
        request = completion()
        request.sampling.temperature = float("nan")
        error = self.refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: self.inference.Complete(request))
        bad, = details(error, error_details_pb2.BadRequest)
        self.assertEqual(bad.field_violations[0].field, "sampling.temperature")

    def test_a_prompt_beyond_the_context_says_both_numbers(self):
        error = self.refused(grpc.StatusCode.INVALID_ARGUMENT,
                             lambda: self.inference.Complete(completion(max_tokens=20000)))
        info, = details(error, error_details_pb2.ErrorInfo)
        self.assertEqual(info.reason, "CONTEXT_LENGTH_EXCEEDED")
        self.assertIn("16384", error.details())
        self.assertIn("20000", error.details())

    def test_an_unknown_model_is_not_found(self):
        self.refused(grpc.StatusCode.NOT_FOUND, lambda: self.inference.Complete(completion(model="gpt-5")))

    def test_a_request_id_in_flight_is_taken(self):
        stream = self.inference.StreamComplete(streamed(completion(max_tokens=8000, request_id="twice")))
        next(stream)
        self.refused(grpc.StatusCode.ALREADY_EXISTS,
                     lambda: self.inference.Complete(completion(request_id="twice")))
        stream.cancel()

    def test_a_model_without_a_chat_form_refuses_to_chat(self):
        request = inference_pb2.ChatRequest(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
        self.refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: self.inference.Chat(request))

    def test_spans_of_every_layer_and_head_are_served(self):
        self.inference.Complete(completion(max_tokens=40))
        stub = attention_pb2_grpc.AttentionServiceStub(self.server.channel)
        snapshot = stub.GetAttentionSpans(attention_pb2.GetAttentionSpansRequest()).snapshot
        self.assertGreater(snapshot.observed_tokens, 0)
        self.assertEqual(len(snapshot.layers), 10)
        self.assertEqual({len(layer.mean_tokens) for layer in snapshot.layers}, {6})

    def test_promtool_finds_nothing_wrong_with_the_pages(self):
        self.inference.Complete(completion(max_tokens=20))
        for path in ("/metrics", "/metrics/attention"):
            lines = self.server.page(path).splitlines(keepends=True)
            ours = "".join(line for line in lines if "vllm:" not in line)
            self.assertIn("longspan_", ours)
            check = subprocess.run(["promtool", "check", "metrics"], input=ours, text=True, capture_output=True)
            self.assertEqual((check.returncode, check.stdout + check.stderr), (0, ""), path)


class Ending(unittest.TestCase):
    """SIGTERM, each time to a server of its own."""

    @contextlib.contextmanager
    def loaded(self, tokens, *flags):
        """A server with four streams under way, each past its first event."""
        server = Server(*flags)
        try:
            streams = [server.inference.StreamComplete(streamed(completion(max_tokens=tokens))) for _ in range(4)]
            for stream in streams:
                next(stream)
            yield server, streams
        finally:
            server.kill()

    def test_sigterm_lets_accepted_requests_finish(self):
        with self.loaded(300, "--withdrawal-grace", "300ms") as (server, streams):
            server.signal(signal.SIGTERM)
            end = time.monotonic() + 5
            while server.health(INFERENCE) != NOT_SERVING:
                self.assertLess(time.monotonic(), end, "still ready after SIGTERM")
            self.assertEqual(server.health(""), SERVING)
            for stream in streams:
                self.assertEqual(list(stream)[-1].usage.completion_tokens, 300)
            self.assertEqual(server.wait(), 0)

    def test_new_requests_are_unavailable_after_the_grace(self):
        with self.loaded(4000, "--withdrawal-grace", "0s", "--shutdown-timeout", "60s") as (server, streams):
            server.signal(signal.SIGTERM)
            end = time.monotonic() + 5
            with self.assertRaises(grpc.RpcError) as caught:
                while time.monotonic() < end:
                    server.inference.Complete(completion(max_tokens=1))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
            for stream in streams:
                stream.cancel()
            self.assertEqual(server.wait(), 0)

    def test_what_outlasts_the_shutdown_timeout_is_cut_off(self):
        with self.loaded(16000, "--withdrawal-grace", "0s", "--shutdown-timeout", "500ms") as (server, streams):
            begin = time.monotonic()
            server.signal(signal.SIGTERM)
            for stream in streams:
                with self.assertRaises(grpc.RpcError) as caught:
                    list(stream)
                self.assertIn(caught.exception.code(), (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED))
            server.wait()
            self.assertLess(time.monotonic() - begin, 10)

    def test_a_second_sigterm_quits(self):
        with self.loaded(16000, "--shutdown-timeout", "60s") as (server, _):
            server.signal(signal.SIGTERM)
            time.sleep(0.3)
            begin = time.monotonic()
            server.signal(signal.SIGTERM)
            server.wait()
            self.assertLess(time.monotonic() - begin, 10)

    def test_an_idle_server_stops_at_once(self):
        server = Server("--withdrawal-grace", "0s")
        self.addCleanup(server.kill)
        server.page("/metrics")
        begin = time.monotonic()
        server.signal(signal.SIGTERM)
        self.assertEqual(server.wait(), 0)
        self.assertLess(time.monotonic() - begin, 3)

    def test_a_port_in_use_is_named(self):
        server = Server()
        self.addCleanup(server.kill)
        second = subprocess.run([os.environ["LONGSPAN"], "serve", "--grpc", server.grpc, "--http", "127.0.0.1:0"],
                                capture_output=True, text=True, timeout=30)
        self.assertNotEqual(second.returncode, 0)
        self.assertIn(server.grpc, second.stderr)


class Chatting(unittest.TestCase):
    """Gemma 3 270M, beside llama.cpp's form of the same chats and its greedy answers (tests/golden/gemma_chat.py)."""

    # Where the golden's first token leads the second by less, rounding may choose: tests/golden/gemma_greedy/README.md.
    NEAR_TIE = 0.5

    @classmethod
    def setUpClass(cls):
        model = subprocess.run(["models/get", "gemma-3-270m"], check=True, text=True, stdout=subprocess.PIPE)
        cls.server = Server("--model", model.stdout.strip())
        cls.addClassCleanup(cls.server.kill)
        with open("tests/golden/gemma_chat/golden.json", encoding="utf-8") as file:
            cls.chats = json.load(file)["chats"]

    def request(self, chat, max_tokens, **sampling):
        return inference_pb2.ChatRequest(
            base=inference_pb2.CompleteRequest(
                sampling=inference_pb2.SamplingOptions(temperature=0, **sampling),
                stopping=inference_pb2.StoppingOptions(max_tokens=max_tokens, ignore_eos=not sampling),
                output=inference_pb2.OutputOptions(return_token_ids=True)),
            messages=[inference_pb2.ChatMessage(**message) for message in chat["messages"]])

    def test_messages_become_the_references_tokens(self):
        for chat in self.chats:
            ids = self.server.inference.Tokenize(inference_pb2.TokenizeRequest(chat=self.request(chat, 1))).token_ids
            self.assertEqual(list(ids), chat["prompt"])

    def test_answers_are_the_references_up_to_a_near_tie(self):
        compared = 0
        for chat in self.chats:
            answer = self.server.inference.Chat(self.request(chat, len(chat["tokens"])))
            self.assertEqual(answer.base.usage.prompt_tokens, len(chat["prompt"]))
            self.assertEqual([m.role for m in answer.messages], ["assistant"])
            self.assertEqual(answer.messages[0].content, answer.base.choices[0].text)
            sure = next((i for i, lead in enumerate(chat["leads"]) if lead < self.NEAR_TIE), len(chat["leads"]))
            self.assertEqual(list(answer.base.choices[0].token_ids)[:sure], chat["tokens"][:sure])
            compared += sure
        self.assertGreater(compared, 20)

    def test_a_streamed_answer_is_the_unary_one(self):
        request = self.request(self.chats[0], 16)
        whole = self.server.inference.Chat(request)
        events = list(self.server.inference.StreamChat(inference_pb2.StreamChatRequest(request=request)))
        self.assertEqual({event.role for event in events}, {"assistant"})
        self.assertEqual("".join(event.base.delta.text for event in events), whole.messages[0].content)

    # Where a template is a program, what fills it can be an attack.
    def test_arguments_of_the_template_are_refused_with_their_count(self):
        request = self.request(self.chats[0], 1)
        request.template_kwargs.update({"chat_template": "{{ messages }}", "tokenize": False})
        tokenize = inference_pb2.TokenizeRequest(chat=request)
        for call in (lambda: self.server.inference.Chat(request), lambda: self.server.inference.Tokenize(tokenize)):
            with self.assertRaises(grpc.RpcError) as caught:
                call()
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertRegex(caught.exception.details(), r"^template_kwargs: has 2 entries, but the template '\w+' takes none$")
            bad, = details(caught.exception, error_details_pb2.BadRequest)
            self.assertEqual(bad.field_violations[0].field, "template_kwargs")

    def test_the_end_of_a_turn_ends_the_answer(self):
        end_of_turn = self.chats[0]["prompt"][-5]
        answer = self.server.inference.Chat(self.request(self.chats[0], 16, logit_bias={end_of_turn: 100}))
        self.assertEqual(answer.base.choices[0].finish_reason, inference_pb2.FINISH_REASON_STOP)
        self.assertEqual(answer.messages[0].content, "")


class Bench(unittest.TestCase):
    def test_bench_counts_every_ops_time_bytes_and_operations(self):
        run = subprocess.run([os.environ["LONGSPAN"], "bench", "--json", "--repeats", "1", "--tokens", "4",
                              "--prompts", "64", "--batches", "1,2"], capture_output=True, text=True, timeout=120)
        self.assertEqual(run.returncode, 0, run.stderr)
        result = json.loads(run.stdout)
        self.assertGreater(result["read_bytes_per_second"], 1e8)
        self.assertGreater(result["operations_per_second"], 1e8)
        self.assertEqual([phase["name"] for phase in result["phases"]],
                         ["prefill 64", "decode, 1 sequence at 32", "decode, 2 sequences at 32",
                          "prefill 64 beside 2 decoding"])
        for phase in result["phases"]:
            self.assertGreater(phase["tokens_per_second"], 0)
            for op in ("MatMul", "Attention", "RmsNorm"):
                self.assertTrue(all(value > 0 for value in phase["ops"][op].values()), (phase["name"], op))
        # One product of 64 rows with every weight of the ten layers, five operations for each number activated; the
        # vocabulary only for the last row.
        layers = 10 * (384 * (6 + 2 + 2) * 64 + 6 * 64 * 384 + 384 * 960)
        ops = result["phases"][0]["ops"]
        self.assertEqual(ops["MatMul"]["flops"], 2 * (64 * layers + 384 * 8192))
        self.assertEqual(ops["GatedMatMul"]["flops"], 64 * 10 * (2 * 2 * 384 * 960 + 5 * 960))

    def test_one_more_repetition_times_each_op_and_changes_no_other_figure(self):
        run = self.bench_shape("--prompts", "48", "--contexts", "40", "--repeats", "2", "--page-tokens", "16")
        self.assertEqual(run.returncode, 0, run.stderr)
        prefill, decode, _ = json.loads(run.stdout)["phases"]
        self.assertEqual(len(prefill["runs"]), 2)

        def total(ops, key):
            return sum(op[key] for op in ops.values())
        for key in ("calls", "bytes", "flops"):  # of two repetitions and of one
            self.assertEqual(total(prefill["ops"], key), 2 * total(prefill["timed_ops"], key))
        self.assertLessEqual(total(prefill["timed_ops"], "nanoseconds"), 1e9 * prefill["timed_seconds"])
        # Of 48 tokens each sees all before it, or 16 at most; four operations a pair and dimension of 4 heads of 16.
        timed = prefill["timed_ops"]
        self.assertEqual(timed["Attention full"]["flops"], 4 * 4 * 16 * (48 * 49 // 2))
        self.assertEqual(timed["Attention window 16"]["flops"], 4 * 4 * 16 * (16 * 17 // 2 + 32 * 16))
        self.assertEqual(timed["GatedMatMul BF16 64x96+96"]["calls"], 2)
        # Two sequences of 41 tokens and what they decoded until they were looked at: three pages of 16 or more in the
        # full layer, two in the window's ring; 2 heads of 16.
        pages, rest = divmod(decode["cache_bytes"], 16 * 2 * 2 * 16 * 2)
        self.assertEqual(rest, 0)
        self.assertGreaterEqual(pages, 2 * (3 + 2))
        self.assertEqual(decode["preemptions"], 0)
        plain = json.loads(self.bench_shape("--prompts", "48", "--ops=false").stdout)["phases"][0]
        self.assertEqual((plain["timed_ops"], plain["timed_seconds"]), ({}, 0))
        self.assertGreater(plain["ops"]["MatMul"]["calls"], 0)

    SHAPE = {"model_type": "swa_hybrid", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
             "tie_word_embeddings": False, "max_position_embeddings": 1024}

    def bench_shape(self, *flags, **changes):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        path = pathlib.Path(folder, "config.json")
        path.write_text(json.dumps(self.SHAPE | changes))
        return subprocess.run([os.environ["LONGSPAN"], "bench", "--shape", path, "--json", "--tokens", "4", "--batches", "2",
                               *flags], capture_output=True, text=True, timeout=120)

    def test_a_shape_is_measured_without_its_weights(self):
        run = self.bench_shape("--prompts", "32,3x32", "--contexts", "40,5x50", "--repeats", "2")
        self.assertEqual(run.returncode, 0, run.stderr)
        result = json.loads(run.stdout)
        self.assertIn("(random bf16 weights) on cpu", result["machine"])
        prefill, three, two_at_40, five_at_50, beside = result["phases"]
        self.assertEqual([phase["name"] for phase in result["phases"]],
                         ["prefill 32", "prefill 3 x 32", "decode, 2 sequences at 40", "decode, 5 sequences at 50",
                          "prefill 32 beside 2 decoding"])
        self.assertEqual([len(phase["runs"]) for phase in result["phases"]], [2] * 5)
        gate_up = 2 * 2 * 64 * 96
        layers = 2 * (2 * 64 * (4 + 2) * 16 + 3 * 64 * 96)
        self.assertEqual(prefill["ops"]["MatMul"]["flops"], 2 * 2 * (32 * (layers - gate_up) + 64 * 300))
        self.assertEqual(three["ops"]["MatMul"]["flops"], 3 * 2 * 2 * (32 * (layers - gate_up) + 64 * 300))
        # bf16 matrices and F32 norms but not the embedding table; keys and values of 2 heads of 16 in two bytes.
        weights = 2 * (layers + 64 * 300) + 4 * 64 * (2 * 2 + 1)
        for phase, batch, context in (two_at_40, 2, 40), (five_at_50, 5, 50):
            self.assertEqual(phase["bytes_per_step"], weights + batch * 2 * 2 * 16 * 2 * (16 + context))

    def test_a_shape_that_cannot_be_is_refused_with_the_numbers(self):
        for changes, flags, status, words in (
                ({"head_dim": -1}, (), 1, ("config.json", "head_dim", "-1")),
                ({"model_type": "mamba2"}, (), 1, ("recurrent mixer mamba2",)),
                ({}, ("--weights", "q4_k"), 1, ("64", "Q4_K", "256")),
                ({}, ("--max-context", "100"), 2, ("'prefill 128'", "129", "100")),
                ({}, ("--cache-bytes", "64k"), 2, ("bytes of cache", "--cache-bytes")),
                ({}, ("--prompts", "0x32"), 2, ("--prompts", "0x32"))):
            run = self.bench_shape(*flags, **changes)
            self.assertEqual(run.returncode, status, run.stderr)
            for word in words:
                self.assertIn(word, run.stderr)
        run = subprocess.run([os.environ["LONGSPAN"], "bench", "--shape", "gemma9"], capture_output=True, text=True)
        self.assertEqual(run.returncode, 1)
        self.assertIn("gemma3-27b, gemma3-4b, gpt-oss-20b-attention", run.stderr)


if __name__ == "__main__":
    unittest.main()
