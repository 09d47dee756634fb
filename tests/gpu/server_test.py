#!/usr/bin/env python3
"""The whole server with the default model on $LONGSPAN_DEVICE, with the command line as its client, so that nothing but
Python's own library and the binary $LONGSPAN are needed.

usage: LONGSPAN=build/cuda/longspan LONGSPAN_DEVICE=cuda:0 tests/gpu/server_test.py [unittest arguments]
"""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import unittest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "support/python"))
from process import Process

LAYERS, HEADS = 10, 6
RETRIEVAL_LAYER, RETRIEVAL_HEADS = 5, {0, 1, 2, 3, 5}  # models/default/README.md, by another implementation


def client(server, *arguments):
    return [os.environ["LONGSPAN"], *arguments, "--server", server.grpc]


def completion(server, *flags, tokens):
    return client(server, "complete", "--prompt", "Once upon a time", "--temperature", "0", "--ignore-eos",
                  "--max-tokens", str(tokens), *flags)


class Serving(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Process()
        cls.addClassCleanup(cls.server.kill)

    def ask(self, command, timeout=300):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        return answer.stdout

    def test_the_device_is_the_one_that_was_asked_for(self):
        ready = next(line for line in self.server.log if " INFO ready " in line)
        self.assertIn(f'device="{os.environ["LONGSPAN_DEVICE"]} (', ready)
        self.ask(client(self.server, "health"))

    def test_a_stream_brings_the_tokens_of_the_whole_answer(self):
        whole = json.loads(self.ask(completion(self.server, "--json", tokens=200)))
        events = [json.loads(line) for line in self.ask(completion(self.server, "--jsonl", tokens=200)).splitlines()]
        deltas = [event["delta"] for event in events if "delta" in event]
        self.assertGreater(len(deltas), 1)
        self.assertEqual("".join(delta.get("text", "") for delta in deltas), whole["choices"][0]["text"])
        self.assertEqual(events[-1]["usage"]["completion_tokens"], 200)

    def test_needles_are_found_from_1k_to_16k_by_the_heads_of_one_full_layer(self):
        grid = ("--lengths", "1k,2k,4k,8k,16000", "--depths", "5", "--seed", "11")
        summary = json.loads(self.ask(client(self.server, "needle", *grid, "--no-save", "--json")))
        self.assertEqual(summary["cells"], 25)
        self.assertGreaterEqual(summary["mean_score"], 0.95)
        heads = summary["retrieval_heads"]
        self.assertEqual({(head["layer"], head["kind"]) for head in heads}, {(RETRIEVAL_LAYER, "full")})
        self.assertLessEqual(RETRIEVAL_HEADS, {head["head"] for head in heads})

    def test_metrics_show_every_heads_attention(self):
        self.ask(completion(self.server, tokens=100))
        page = self.server.page("/metrics/attention")
        seen = re.findall(r'^longspan_attention_span_observations_total\{layer="(\d+)".*head="(\d+)"\} ([1-9]\S*)$', page,
                          re.MULTILINE)
        self.assertEqual({(int(layer), int(head)) for layer, head, _ in seen},
                         {(layer, head) for layer in range(LAYERS) for head in range(HEADS)})
        self.assertGreater(self.server.metric("longspan_attention_sampled_steps_total"), 0)
        self.assertEqual(self.server.metric('longspan_kv_cache_bytes{state="used"}'), 0)


class Stopping(unittest.TestCase):
    def test_sigterm_under_load_lets_accepted_requests_finish(self):
        clients, tokens = 8, 4000
        server = Process("--shutdown-timeout", "120s")
        self.addCleanup(server.kill)
        streams = [subprocess.Popen(completion(server, "--jsonl", tokens=tokens), stdout=subprocess.PIPE, text=True)
                   for _ in range(clients)]
        for stream in streams:
            stream.stdout.readline()
        self.assertEqual([stream.poll() for stream in streams], [None] * clients)
        server.signal(signal.SIGTERM)
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:  # none waits for another's reader
            events = list(pool.map(lambda stream: stream.communicate(timeout=300)[0].splitlines(), streams))
        self.assertEqual([stream.returncode for stream in streams], [0] * clients)
        self.assertEqual([json.loads(event[-1])["usage"]["completion_tokens"] for event in events], [tokens] * clients)
        self.assertEqual(server.wait(), 0, "".join(server.log[-5:]))
        self.assertIn("stopped aborted_requests=0", server.log[-1])


if __name__ == "__main__":
    unittest.main()
