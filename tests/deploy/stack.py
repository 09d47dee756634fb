"""A real server and a real Prometheus with deploy/prometheus, both on loopback and gone at the end."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
LONGSPAN = os.environ.get("LONGSPAN", str(ROOT / "build/release/longspan"))


def get(url, timeout=10):
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode()


def wait_for(what, condition, seconds):
    """condition() once it is true; what() names the failure. Errors of the condition count as not yet."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, KeyError, IndexError, ValueError):
            if value := condition():
                return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(command, log, **options):
    with open(log, "wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


class Server:
    def __init__(self, child, log):
        self.child, self.log = child, pathlib.Path(log)
        ready = wait_for(f"a ready line in {log}", lambda: self._ready(), 60)
        self.grpc, self.http = ready["grpc"], ready["http"]

    def _ready(self):
        if self.child.poll() is not None:
            raise AssertionError(f"the server ended with {self.child.returncode}:\n{self.log.read_text()}")
        return next((line for line in self.lines() if line["event"] == "ready"), None)

    def lines(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def client(self, *arguments, timeout=300):
        done = subprocess.run([LONGSPAN, arguments[0], "--server", self.grpc, *arguments[1:]], text=True,
                              capture_output=True, timeout=timeout)
        assert done.returncode == 0, f"{arguments} exited {done.returncode}: {done.stderr}"
        return done.stdout


@contextlib.contextmanager
def serve(folder, *flags):
    log = os.path.join(folder, "server.log")
    command = [LONGSPAN, "serve", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-format", "json", *flags]
    with process(command, log) as child:
        yield Server(child, log)


class Prometheus:
    def __init__(self, url):
        self.url = url
        self.started = time.time()

    def api(self, path, **parameters):
        answer = json.loads(get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expression):
        """The one value of an instant query; IndexError if there is none."""
        return float(self.api("query", query=expression)["result"][0]["value"][1])

    def alert_states(self):
        groups = self.api("rules", type="alert")["groups"]
        return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}

    def evaluate(self, expression, instant):
        """What promtool gets for a panel's expression: [{metric, value | values}]."""
        end = time.time()
        where = ["instant"] if instant else ["range", f"--start={self.started:.0f}", f"--end={end:.0f}", "--step=5s"]
        done = subprocess.run(["promtool", "query", *where, "-o", "json", self.url, expand(expression, end - self.started)],
                              text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{expression}: {done.stderr}"
        return json.loads(done.stdout)


def expand(expression, seconds):
    """Grafana's variables as it would fill them: all servers, four scrapes, the time shown."""
    filled = (expression.replace("$instance", ".*").replace("$__rate_interval", "1m")
              .replace("$__range", f"{max(60, round(seconds))}s"))
    assert "$" not in filled, filled
    return filled


@contextlib.contextmanager
def prometheus(folder, targets):
    """deploy/prometheus as it is, but for the servers to scrape."""
    config = os.path.join(folder, "prometheus")
    shutil.copytree(ROOT / "deploy/prometheus", config)
    pathlib.Path(config, "targets/longspan.json").write_text(json.dumps([{"targets": targets}]))
    port = free_port()
    command = ["prometheus", f"--config.file={config}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with process(command, os.path.join(folder, "prometheus.log")):
        url = f"http://127.0.0.1:{port}"
        wait_for("a ready Prometheus", lambda: "Ready" in get(f"{url}/-/ready"), 30)
        yield Prometheus(url)


def panels():
    """(dashboard, panel) for every panel that is shipped."""
    for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            yield dashboard, panel


def finite(series):
    values = series.get("values") or [series["value"]]
    return [float(value) for _, value in values if re.fullmatch(r"[-+0-9.e]+", value)]


def scratch():
    return tempfile.TemporaryDirectory(prefix="longspan-test-")
