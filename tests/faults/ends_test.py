"""A server told to stop under load, a disk that is full, a model whose files change in use."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest

import grpc

from harness import Server, completion, streamed
from vitals import FaultCase, answer

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
FILE_SHRANK = 74  # kFileShrankExitCode, EX_IOERR of sysexits.h


class Stopping(unittest.TestCase):
    def test_sigterm_under_load_lets_accepted_requests_finish_and_refuses_the_rest(self):
        clients, seats, tokens, limit = 24, 8, 60, 30
        server = Server("--max-running", str(seats), "--shutdown-timeout", f"{limit}s")
        self.addCleanup(server.kill)
        told = threading.Event()
        working = threading.Semaphore(0)  # clients whose first stream has ended

        def keep_asking():
            """(after SIGTERM?, status, tokens) of one stream after the other, the last of which was refused."""
            ends = []
            while not ends or ends[-1][1] == OK:
                received, code = 0, OK
                try:
                    for event in server.inference.StreamComplete(streamed(completion(max_tokens=tokens)), timeout=60):
                        received = max(received, event.usage.completion_tokens)
                except grpc.RpcError as error:
                    code = error.code()
                ends.append((told.is_set(), code, received))
                working.release()
            return ends

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            running = [pool.submit(keep_asking) for _ in range(clients)]
            self.assertTrue(all(working.acquire(timeout=20) for _ in range(seats)))
            begin = time.monotonic()
            told.set()
            server.signal(signal.SIGTERM)
            status = server.wait()
            took = time.monotonic() - begin
            ends = [end for client in running for end in client.result()]
        self.assertEqual(status, 0, "".join(server.log[-5:]))
        self.assertLess(took, limit)
        self.assertIn("stopped aborted_requests=0", server.log[-1])
        # All of the answer or none; and what was accepted was more than had a seat.
        self.assertEqual({(code, received) for _, code, received in ends}, {(OK, tokens), (UNAVAILABLE, 0)})
        self.assertGreater(sum(late and code == OK for late, code, _ in ends), seats)
        again = Server("--grpc", server.grpc, "--http", server.http)  # nothing holds its ports
        self.addCleanup(again.kill)
        self.assertEqual((again.grpc, again.http), (server.grpc, server.http))
        self.assertTrue(answer(again))


class FullDisk(FaultCase):
    @classmethod
    def rehearse(cls):
        super().rehearse()
        with tempfile.TemporaryDirectory() as folder:
            run = cls.needle(folder)
            if run.returncode or not os.path.exists(os.path.join(folder, "report.html")):
                raise RuntimeError(run.stderr)

    @classmethod
    def needle(cls, folder, before=()):
        """Writes a report of about 19 KB and eight results of about 1.4 KB each."""
        return subprocess.run(
            [*before, os.environ["LONGSPAN"], "needle", "--server", cls.server.grpc, "--lengths", "256",
             "--depths", "4", "--trials", "2", "--out", folder],
            capture_output=True, text=True, timeout=60, check=False)

    def test_a_report_on_a_full_device_is_an_error(self):
        with tempfile.TemporaryDirectory() as folder:
            os.symlink("/dev/full", os.path.join(folder, "report.html.new"))
            run = self.needle(folder)
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn(f"longspan needle: cannot write {folder}/report.html", run.stderr)

    def test_a_disk_that_fills_up_during_a_run_is_an_error(self):
        # In a mount namespace of its own, with which it goes. 24 KiB hold a report without results.
        mount = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs -o size=24k tmpfs "$0"; "$@"']
        with tempfile.TemporaryDirectory() as folder:
            probe = subprocess.run([*mount, folder, "true"], capture_output=True, text=True, check=False)
            if probe.returncode:
                self.skipTest("no mount of a small disk: " + probe.stderr.strip())
            run = self.needle(folder, [*mount, folder])
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn(f"longspan needle: cannot write to {folder}/results.jsonl", run.stderr)
        self.assertNotIn("8 of 8 cells", run.stderr)  # it did not go on


class ChangingModel(unittest.TestCase):
    """Weights are used where the files are mapped."""

    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.model = shutil.copytree("models/default", os.path.join(folder, "model"))
        self.server = Server("--model", self.model)
        self.addCleanup(self.server.kill)
        self.text = answer(self.server)
        self.assertTrue(self.text)
        self.weights = [os.path.join(self.model, name) for name in sorted(os.listdir(self.model))
                        if name.endswith(".safetensors")]

    def test_a_model_replaced_by_renaming_is_served_on_as_it_was(self):
        for path in self.weights:
            with open(path + ".new", "wb") as file:
                file.write(b"not weights")
            os.replace(path + ".new", path)
        self.assertEqual(answer(self.server), self.text)

    def test_a_model_truncated_in_use_ends_the_server_with_the_files_name(self):
        for path in self.weights:
            os.truncate(path, 4096)
        with self.assertRaises(grpc.RpcError) as caught:
            answer(self.server)
        self.assertEqual(caught.exception.code(), UNAVAILABLE)
        self.assertEqual(self.server.wait(), FILE_SHRANK)
        log = "".join(self.server.log)  # several threads may say so at once
        self.assertIn(self.model + "/model-0000", log)
        self.assertIn(": the file became shorter, or unreadable, while it was in use\n", log)


if __name__ == "__main__":
    unittest.main()
