"""A longspan process on free ports, and what its black-box tests say to it."""

import os
import re
import subprocess
import threading
import time
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from longspan.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

INFERENCE = "longspan.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A longspan process on free ports; `connect` makes a channel to its address."""

    def __init__(self, *flags, connect=grpc.insecure_channel):
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
        self.channel = connect(self.grpc)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.health_stub = health_pb2_grpc.HealthStub(self.channel)

    def health(self, service):
        return self.health_stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status

    def page(self, path):
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, series):
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.page("/metrics"), re.MULTILINE)
        return float(found.group(1))

    def wait_idle(self):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            load = self.admin.GetLoad(admin_pb2.GetLoadRequest())
            if not load.running_requests and not load.queued_requests and not load.used_cache_bytes:
                return True
            time.sleep(0.02)
        return False

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        status = self.process.wait(timeout=60)
        self.reader.join()
        return status

    def kill(self):
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()


def completion(text="Once upon a time", max_tokens=8, **fields):
    return inference_pb2.CompleteRequest(
        text=text,
        sampling=inference_pb2.SamplingOptions(temperature=0),
        stopping=inference_pb2.StoppingOptions(max_tokens=max_tokens, ignore_eos=True),
        **fields)


def streamed(request):
    return inference_pb2.StreamCompleteRequest(request=request, include_usage=True)


def details(error, kind):
    """The details of one type in an error's google.rpc.Status."""
    status = rpc_status.from_call(error)
    found = []
    for packed in status.details if status else []:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found
