"""The commands of the binary as scripts use them: what is on stdout, what the environment says, how they exit."""

import json
import os
import subprocess
import tempfile
import time
import unittest

from harness import Server, completion


def longspan(*arguments, **environment):
    return subprocess.run([os.environ["LONGSPAN"], *arguments], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


class Commands(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--log-format", "text", "--log-prompt-bytes", "10")
        cls.addClassCleanup(cls.server.kill)

    def ask(self, command, *arguments, **environment):
        """What a client command prints, having succeeded; with the environment that a server beside it has."""
        beside = {"LONGSPAN_MODEL": "/models/of/the/server", "LONGSPAN_SSL_CERTFILE": "/certificates/of/the/server",
                  "LONGSPAN_SSL_KEYFILE": "/keys/of/the/server", "LONGSPAN_SERVER": self.server.grpc}
        done = longspan(command, *arguments, **{**beside, **environment})
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def logged(self, *parts):
        """The server's line that has them all; another thread reads what it says."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            for line in list(self.server.log):
                if all(part in line for part in parts):
                    return line
            time.sleep(0.02)
        return self.fail(f"no line with {parts}")

    def test_clients_share_an_environment_with_a_server(self):
        text = self.ask("complete", "--prompt", "Once", "--max-tokens", "4", "--temperature", "0", "--json")
        self.assertEqual(json.loads(text)["usage"]["completion_tokens"], 4)

    def test_bench_measures_a_model_though_a_server_is_in_the_environment(self):
        result = json.loads(self.ask("bench", "--json", "--repeats", "1", "--tokens", "2", "--prompts", "16",
                                     "--batches", "1", LONGSPAN_MODEL=""))
        self.assertIn("phases", result)

    def test_health_as_json_tells_the_load(self):
        health = json.loads(self.ask("health", "--json"))
        self.assertIs(health["ready"], True)
        self.assertEqual(health["load"]["running_requests"], 0)
        self.assertGreater(int(health["load"]["total_kv_blocks"]), 0)

    def test_describe_as_json_adds_up(self):
        described = json.loads(self.ask("describe", "--json", "--context", "1000"))
        # 5 window layers of 64 tokens and 5 full ones; keys and values of 2 heads of 64, bf16.
        token = 2 * 2 * 64 * 2
        self.assertEqual([layer["cache_bytes_per_token"] for layer in described["layers"]], [token] * 10)
        self.assertEqual(described["cache_bytes"], token * (5 * 64 + 5 * 1000))
        self.assertEqual(described["missing"], [])

    def test_a_needle_run_is_attached_to_by_its_name_alone(self):
        grid = ("--lengths", "256,300", "--depths", "0,50", "--trials", "1", "--no-save")
        first = json.loads(self.ask("needle", "--run-id", "named", "--detach", "--json", *grid))
        again = json.loads(self.ask("needle", "--run-id", "named", "--no-save", "--json"))
        self.assertEqual(again["cells"], 4)
        for key in ("run_id", "mean_score", "by_length", "by_depth"):
            self.assertEqual(again[key], first[key], key)

    def test_a_prompts_beginning_is_logged_where_asked_for(self):
        self.server.inference.Complete(completion("Tell it as it was", max_tokens=1, request_id="logged"))
        self.assertIn('text="Tell it as"', self.logged(" prompt ", "request_id=logged"))
        self.assertNotIn("as it was", "".join(self.server.log))

    def test_the_trace_of_a_call_is_logged(self):
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        self.server.inference.Complete(completion(max_tokens=1, request_id="traced"), metadata=(("traceparent", trace),))
        self.logged("request_id=traced", trace)

    def test_a_refused_request_is_logged_by_its_id(self):
        done = longspan("complete", "--server", self.server.grpc, "--prompt", "x", "--max-tokens", "20000")
        self.assertEqual(done.returncode, 1)
        self.assertNotIn("is a server running there", done.stderr)
        with self.assertRaises(Exception):
            self.server.inference.Complete(completion(max_tokens=20000, request_id="too-long"))
        self.logged("request_id=too-long", "INVALID_ARGUMENT")


class Exits(unittest.TestCase):
    def test_a_broken_model_file_is_a_failure_and_a_wrong_flag_is_wrong_use(self):
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(b"GGUF but no more")
            file.flush()
            broken = longspan("serve", "--model", file.name, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
        self.assertEqual(broken.returncode, 1, broken.stderr)
        self.assertIn(file.name, broken.stderr)
        wrong = longspan("serve", "--max-running", "many")
        self.assertEqual(wrong.returncode, 2, wrong.stderr)

    def test_a_failed_start_is_a_json_line_where_lines_are_json(self):
        failed = longspan("serve", "--model", "/nowhere", "--log-format", "json")
        lines = [json.loads(line) for line in failed.stderr.splitlines()]
        self.assertEqual([line["level"] for line in lines], ["error"])
        self.assertIn("/nowhere", lines[0]["message"])

    def test_only_a_server_that_cannot_be_reached_is_asked_about(self):
        unreachable = longspan("health", "--server", "127.0.0.1:1", "--timeout", "1s")
        self.assertEqual(unreachable.returncode, 1)
        self.assertIn("is a server running there", unreachable.stderr)


if __name__ == "__main__":
    unittest.main()
