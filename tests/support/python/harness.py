"""What black-box tests say to a longspan process."""

import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from longspan.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from process import Process

INFERENCE = "longspan.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server(Process):
    """`connect` makes a channel to its address."""

    def __init__(self, *flags, connect=grpc.insecure_channel):
        super().__init__(*flags)
        self.channel = connect(self.grpc)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.health_stub = health_pb2_grpc.HealthStub(self.channel)

    def health(self, service):
        return self.health_stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status

    def wait_idle(self):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            load = self.admin.GetLoad(admin_pb2.GetLoadRequest())
            if not load.running_requests and not load.queued_requests and not load.used_cache_bytes:
                return True
            time.sleep(0.02)
        return False

    def kill(self):
        self.channel.close()
        super().kill()


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
