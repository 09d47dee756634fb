"""A longspan process on free ports. Python's own library is all that it needs."""

import os
import re
import subprocess
import threading
import urllib.request


class Process:
    """`longspan serve` of $LONGSPAN, ready; `log` are the lines that it has written."""

    def __init__(self, *flags):
        self.process = subprocess.Popen(
            [os.environ["LONGSPAN"], "serve", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags],
            stderr=subprocess.PIPE, text=True)
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            ready = re.search(r" INFO ready grpc=(\S+) http=(\S+)", line)
            if ready:
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(self.log))
        self.grpc, self.http = ready.groups()
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self.reader.start()

    def page(self, path):
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, series):
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.page("/metrics"), re.MULTILINE)
        return float(found.group(1))

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        status = self.process.wait(timeout=60)
        self.reader.join()
        return status

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()
