"""deploy/Dockerfile's cpu target, built for real and run as it asks to be run."""

import contextlib
import filecmp
import json
import os
import re
import signal
import stat
import subprocess
import threading
import time
import unittest

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import image
import stack

BASE = "localhost/longspan-test-base:bookworm"
IMAGE = "localhost/longspan-test:cpu"

# A container by hand: own processes and mounts, read-only root, the image's user, no new privileges. The server is the
# first process of its namespace, as in any container.
CONTAINER = """set -e
mount --bind "$1" "$1"
mount --bind "$2" "$1/models"
mount -o remount,bind,ro "$1/models"
mount -o remount,bind,ro "$1"
mount --bind /dev "$1/dev"
mount -t proc proc "$1/proc"
root=$1 user=$3
shift 3
exec setpriv --no-new-privs chroot --userspec="$user" "$root" "$@"
"""


def contained(root, user, *command):
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "bash", "-c", CONTAINER,
            "container", str(root), str(stack.ROOT / "models/default"), user, "/usr/bin/env", "-i", *command]


class CpuImage(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        version = subprocess.run([stack.LONGSPAN, "--version"], capture_output=True, text=True, check=True).stdout
        cls.revision = re.search(r"\((\w+)\)", version)[1]
        image.make_base(BASE)
        image.build("cpu", IMAGE, "--build-arg", f"CPU_BASE={BASE}", "--build-arg", f"REVISION={cls.revision}")
        cls.config = image.inspect(IMAGE)["Docker"]["config"]
        container, cls.root = image.mount(IMAGE)
        cls.addClassCleanup(image.buildah, "rm", container)

    @contextlib.contextmanager
    def server(self, *flags):
        folder = self.enterContext(stack.scratch())
        environment = [*self.config["Env"], "LONGSPAN_LOG_FORMAT=json", "LONGSPAN_INSECURE=true"]
        # Not the image's ports: another server may have them here, where all share one network.
        command = [*self.config["Entrypoint"], *self.config["Cmd"], "--grpc", "0.0.0.0:0", "--http", "0.0.0.0:0", *flags]
        log = os.path.join(folder, "server.log")
        begin = time.monotonic()
        with stack.process(contained(self.root, self.config["User"], *environment, *command), log) as child:
            server = stack.Server(child, log)
            server.seconds = time.monotonic() - begin
            server.grpc, server.http = (a.replace("0.0.0.0", "127.0.0.1") for a in (server.grpc, server.http))
            with open(f"/proc/{child.pid}/task/{child.pid}/children") as children:
                server.pid = int(children.read().split()[0])
            yield server
            if child.poll() is None:  # unshare itself takes no SIGTERM
                os.kill(server.pid, signal.SIGTERM)
                self.assertEqual(child.wait(timeout=60), 0)

    def test_says_how_it_wants_to_be_run(self):
        self.assertEqual(self.config["User"], "10001:10001")
        self.assertEqual(self.config["StopSignal"], "SIGTERM")
        self.assertEqual(self.config["Entrypoint"], ["longspan"])
        self.assertEqual(self.config["Cmd"], ["serve"])
        self.assertEqual(self.config["Healthcheck"]["Test"], ["CMD", "longspan", "health"])
        self.assertEqual(set(self.config["ExposedPorts"]), {"50051/tcp", "8000/tcp"})
        self.assertEqual(self.config["Labels"]["org.opencontainers.image.revision"], self.revision)

    def test_adds_less_than_150_mb_to_its_base(self):
        container, base = image.mount(BASE)
        self.addCleanup(image.buildah, "rm", container)
        added = (image.size(self.root) - image.size(base)) / 1e6
        print(f"the image adds {added:.0f} MB", flush=True)
        self.assertLess(added, 150)

    def test_leaves_its_user_nothing_to_write_to(self):
        seen, writable = 0, []
        for folder, _, names in os.walk(self.root):
            for name in ["", *names]:
                at = os.lstat(os.path.join(folder, name))
                seen += 1
                if stat.S_ISLNK(at.st_mode) or stat.S_ISCHR(at.st_mode):
                    continue
                if at.st_mode & stat.S_IWOTH or 10001 in (at.st_uid, at.st_gid):
                    writable.append("/" + os.path.relpath(os.path.join(folder, name), self.root).rstrip("/"))
        self.assertGreater(seen, 1000)
        # The usual ones, which a read-only root closes too.
        self.assertLessEqual(set(writable), {"/tmp", "/var/tmp", "/run/lock"})

    def test_holds_the_binary_that_this_tree_builds_elsewhere(self):
        folder = self.enterContext(stack.scratch())
        stripped = os.path.join(folder, "longspan")
        image.run("strip", "-o", stripped, stack.LONGSPAN)
        self.assertTrue(filecmp.cmp(stripped, self.root / "usr/local/bin/longspan", shallow=False))

    def test_bill_of_materials_is_valid_and_names_every_library_that_the_server_loads(self):
        text = image.run(str(stack.ROOT / "deploy/sbom"), str(self.root))
        self.assertIsNone(JsonStrictValidator(SchemaVersion.V1_5).validate_str(text))
        bill = json.loads(text)
        named = {component["name"] for component in bill["components"]}
        loaded = image.run("chroot", str(self.root), "ldd", "/usr/local/bin/longspan")
        libraries = re.findall(r"=> (\S+)", loaded)
        self.assertGreater(len(libraries), 40)
        owners = image.run("chroot", str(self.root), "sh", "-c", 'for f; do dpkg -S "$(realpath "$f")" || dpkg -S "${f#/usr}"; done', "sh",
                           *(library.replace("/lib/", "/usr/lib/", 1) if library.startswith("/lib/") else library for library in libraries))
        packages = {line.split(":")[0] for line in owners.splitlines()}
        self.assertGreater(len(packages), 8)
        self.assertLessEqual(packages, named)
        self.assertIn("sentencepiece", named)

    def test_serves_within_3_seconds_completes_finds_a_needle_and_counts(self):
        with self.server() as server:
            print(f"ready after {server.seconds:.2f} s", flush=True)
            self.assertLess(server.seconds, 3)
            with open(f"/proc/{server.pid}/status") as file:
                status = dict(line.rstrip().split(":", 1) for line in file)
            self.assertEqual(status["Uid"].split(), ["10001"] * 4)
            self.assertEqual(int(status["CapEff"], 16) | int(status["CapPrm"], 16), 0)
            self.assertEqual(int(status["NoNewPrivs"]), 1)
            text = server.client("complete", "--prompt", "Once upon a time there was a", "--max-tokens", "20")
            self.assertGreater(len(text.split()), 5)
            needle = server.client("needle", "--lengths", "512", "--depths", "3", "--seed", "1", "--no-save")
            self.assertIn("mean score 1.000", needle)
            page = stack.get(f"http://{server.http}/metrics")
            self.assertIn('longspan_needle_score{context_length="512",depth="50"} 1', page)
            self.assertRegex(page, r"longspan_generation_tokens_total [1-9]")
            self.assertIn(f'commit="{self.revision}"', page)
            check = self.config["Healthcheck"]["Test"][1:]
            path = f"LONGSPAN_SERVER={server.grpc}"
            subprocess.run(contained(self.root, self.config["User"], *self.config["Env"], path, *check), check=True)

    def test_serves_a_model_mounted_at_models(self):
        with self.server("--model", "/models", "--model-name", "mounted") as server:
            self.assertIn("mounted", server.client("models"))

    def test_finishes_what_it_has_accepted_when_told_to_stop(self):
        with self.server() as server:
            texts = []
            client = threading.Thread(target=lambda: texts.append(
                server.client("complete", "--prompt", "Once", "--max-tokens", "400", "--ignore-eos")))
            client.start()
            running = lambda: "longspan_requests_running 1" in stack.get(f"http://{server.http}/metrics")
            stack.wait_for("a running request", running, 20)
            os.kill(server.pid, signal.SIGTERM)
            stack.wait_for("a server that is not ready", lambda: not self.healthy(server), 5)
            client.join()
            self.assertEqual(server.child.wait(timeout=60), 0, server.log.read_text())
            self.assertEqual(len(texts), 1)
            self.assertEqual(server.lines()[-1]["event"], "stopped")
            self.assertEqual(server.lines()[-1]["aborted_requests"], 0)

    def healthy(self, server):
        try:
            return stack.get(f"http://{server.http}/health") == "ready\n"
        except OSError:
            return False


if __name__ == "__main__":
    unittest.main()
