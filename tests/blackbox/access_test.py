"""Keys and certificates, as operators give them and as clients and strangers meet them."""

import os
import shutil
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import grpc
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from longspan.v1 import admin_pb2, attention_pb2, inference_pb2, needle_pb2, needle_pb2_grpc

from harness import INFERENCE, SERVING, Server, completion, details, streamed

ALICE, BOB, ROOT = "alice-secret-0123456789", "bob-secret-0123456789", "root-secret-0123456789"
UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
FOR_ADMINS = {"/longspan.v1.AdminService/GetServerInfo", "/longspan.v1.AdminService/GetLoad",
              "/longspan.v1.AdminService/Drain", "/longspan.v1.AdminService/Resume",
              "/longspan.v1.AttentionService/ResetAttentionSpans"}


def bearer(key):
    return (("authorization", f"Bearer {key}"),)


def methods():
    """Path and shape of every method of our API."""
    for file in (admin_pb2, attention_pb2, inference_pb2, needle_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}", method.server_streaming


def code_of(channel, path, streaming, metadata):
    """How a call with an empty request ends."""
    try:
        if streaming:
            for _ in channel.unary_stream(path)(b"", metadata=metadata, timeout=10):
                break  # some go on for ever
        else:
            channel.unary_unary(path)(b"", metadata=metadata, timeout=10)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def longspan(*arguments, **environment):
    return subprocess.run([os.environ["LONGSPAN"], *arguments], capture_output=True, text=True, timeout=60,
                          env={**os.environ, **environment}, check=False)


class Keys(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.file = os.path.join(cls.folder, "keys")
        cls.write(f"{ALICE} name=alice max-requests=1", f"{BOB} name=bob tokens-per-minute=60", f"{ROOT} admin")
        cls.server = Server("--api-key-file", cls.file)
        cls.addClassCleanup(cls.server.kill)

    @classmethod
    def write(cls, *lines):
        with open(cls.file + ".new", "w", encoding="ascii") as file:
            file.write("\n".join(lines))
        os.replace(cls.file + ".new", cls.file)

    def refused(self, code, call):
        with self.assertRaises(grpc.RpcError) as caught:
            call()
        self.assertEqual(caught.exception.code(), code, caught.exception.details())
        return caught.exception

    def test_every_method_asks_for_a_key(self):
        count = 0
        for path, streaming in methods():
            for metadata in ((), bearer("not-a-key-0123456789"), (("authorization", ALICE),), bearer(ALICE) * 2):
                self.assertEqual(code_of(self.server.channel, path, streaming, metadata), UNAUTHENTICATED, path)
            count += 1
        self.assertGreaterEqual(count, 20)

    def test_admins_methods_are_denied_to_others(self):
        denied = {path for path, streaming in methods()
                  if code_of(self.server.channel, path, streaming, bearer(ALICE)) == DENIED}
        self.assertEqual(denied, FOR_ADMINS)
        self.assertEqual(self.server.health(INFERENCE), SERVING)  # Drain was asked for
        self.server.admin.GetLoad(admin_pb2.GetLoadRequest(), metadata=bearer(ROOT))

    def test_health_is_open(self):
        self.assertEqual(self.server.health(""), SERVING)
        self.assertEqual(self.server.page("/health"), "ready\n")

    def test_reflection_asks_for_a_key(self):
        self.refused(UNAUTHENTICATED, ProtoReflectionDescriptorDatabase(self.server.channel).get_services)
        method = self.server.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        answers = method(iter([b"\x3a\x01*"]), metadata=bearer(ALICE))  # list_services: "*"
        self.assertIn(b"longspan.v1.InferenceService", next(answers))

    def test_pages_ask_for_a_key(self):
        for path in ("/metrics", "/metrics/attention", "/metrics/attention/heads", "/version"):
            with self.assertRaises(urllib.error.HTTPError) as caught:
                self.server.page(path)
            self.assertEqual(caught.exception.code, 401, path)
            self.assertEqual(caught.exception.headers["WWW-Authenticate"], "Bearer")
            request = urllib.request.Request(f"http://{self.server.http}{path}", headers=dict(
                [("Authorization", f"Bearer {ALICE}")]))
            with urllib.request.urlopen(request, timeout=10) as answer:
                self.assertEqual(answer.status, 200)

    def test_a_keys_requests_at_once_are_bounded(self):
        stream = self.server.inference.StreamComplete(streamed(completion(max_tokens=8000)), metadata=bearer(ALICE))
        next(stream)
        error = self.refused(grpc.StatusCode.RESOURCE_EXHAUSTED,
                             lambda: self.server.inference.Complete(completion(), metadata=bearer(ALICE)))
        self.assertEqual(error.details(), "key 'alice' has 1 requests in flight, the limit is 1")
        self.assertEqual(details(error, error_details_pb2.ErrorInfo)[0].reason, "KEY_LIMIT")
        self.assertEqual(details(error, error_details_pb2.RetryInfo)[0].retry_delay.ToMilliseconds(), 500)
        self.assertIn(("grpc-retry-pushback-ms", "500"), list(error.trailing_metadata()))
        self.server.inference.Complete(completion(), metadata=bearer(ROOT))
        stream.cancel()
        end = time.monotonic() + 10
        while True:  # until the stream's request has ended and its place is back
            try:
                self.server.inference.Complete(completion(max_tokens=1), metadata=bearer(ALICE))
                break
            except grpc.RpcError as error:
                self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
                self.assertLess(time.monotonic(), end)
        for _ in range(20):  # one after the other: each gives its place back before its client knows
            self.server.inference.Complete(completion(max_tokens=1), metadata=bearer(ALICE))

    def test_a_keys_tokens_a_minute_are_bounded(self):
        answer = self.server.inference.Complete(completion(max_tokens=80), metadata=bearer(BOB))
        owed = answer.usage.total_tokens - 60
        error = self.refused(grpc.StatusCode.RESOURCE_EXHAUSTED,
                             lambda: self.server.inference.Complete(completion(), metadata=bearer(BOB)))
        wait = details(error, error_details_pb2.RetryInfo)[0].retry_delay.ToMilliseconds()
        self.assertGreater(wait, (owed - 5) * 1000)  # one token a second comes back
        self.assertLessEqual(wait, (owed + 1) * 1000)
        self.assertIn("its 60 tokens a minute", error.details())

    def test_a_key_ends_its_own_requests_only(self):
        stream = self.server.inference.StreamComplete(
            streamed(completion(max_tokens=8000, request_id="roots")), metadata=bearer(ROOT))
        next(stream)
        abort = inference_pb2.AbortRequest(request_ids=["roots"])
        self.assertEqual(list(self.server.inference.Abort(abort, metadata=bearer(ALICE)).aborted_request_ids), [])
        self.assertEqual(list(self.server.inference.Abort(abort, metadata=bearer(ROOT)).aborted_request_ids), ["roots"])

    def test_a_keys_needle_runs_are_its_own_and_keep_to_its_limits(self):
        needle = needle_pb2_grpc.NeedleServiceStub(self.server.channel)
        run = needle_pb2.RunNeedleRequest(run_id="alices", context_lengths=[256], depth_percents=[0, 50, 100],
                                          concurrency=3)
        events = list(needle.RunNeedle(run, metadata=bearer(ALICE)))
        cells = [event.cell for event in events if event.HasField("cell")]
        self.assertEqual([cell.error for cell in cells], ["", "", ""])
        self.refused(grpc.StatusCode.NOT_FOUND, lambda: needle.GetNeedleRun(
            needle_pb2.GetNeedleRunRequest(run_id="alices"), metadata=bearer(BOB)))
        for key, seen in ((ALICE, ["alices"]), (BOB, []), (ROOT, ["alices"])):
            listed = needle.ListNeedleRuns(needle_pb2.ListNeedleRunsRequest(), metadata=bearer(key))
            self.assertEqual([item.run_id for item in listed.items], seen)

    def test_the_command_line_sends_a_key(self):
        asked = ("models", "--server", self.server.grpc)
        refused = longspan(*asked)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("UNAUTHENTICATED", refused.stderr)
        self.assertEqual(longspan(*asked, "--api-key", ALICE).returncode, 0)
        self.assertEqual(longspan(*asked, LONGSPAN_API_KEY=ALICE).returncode, 0)
        self.assertEqual(longspan("health", "--server", self.server.grpc).returncode, 0)

    # By its name the last: it takes the keys of the others away.
    def test_zz_a_changed_file_is_read_again_and_no_secret_is_logged(self):
        self.write("carol-secret-0123456789 name=carol")
        end = time.monotonic() + 10
        while code_of(self.server.channel, f"/{INFERENCE}/Abort", False, bearer("carol-secret-0123456789")) \
                != grpc.StatusCode.OK:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.1)
        self.assertEqual(code_of(self.server.channel, f"/{INFERENCE}/Abort", False, bearer(ALICE)), UNAUTHENTICATED)
        log = "".join(self.server.log)
        self.assertIn("key=alice", log)
        self.assertNotIn("secret", log)


class Bind(unittest.TestCase):
    def test_others_are_let_in_only_with_keys_or_when_told_so(self):
        for flag in ("--grpc", "--http"):
            refused = longspan("serve", flag, "0.0.0.0:0")
            self.assertEqual(refused.returncode, 2)
            self.assertIn(f"{flag} 0.0.0.0:0 is reached from other machines", refused.stderr)
        server = Server("--grpc", "0.0.0.0:0", "--insecure")
        self.addCleanup(server.kill)
        self.assertRegex(server.grpc, r"^0\.0\.0\.0:")

    def test_a_bad_file_of_keys_is_named(self):
        refused = longspan("serve", "--api-key-file", "/no/such/file")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("--api-key-file: /no/such/file: No such file or directory", refused.stderr)


class Certificates:
    """Made by openssl in a folder; each is NAME.pem and NAME.key."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, file):
        return os.path.join(self.folder, file)

    def read(self, file):
        with open(self[file], "rb") as opened:
            return opened.read()

    def openssl(self, *arguments):
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

    def authority(self, name):
        self.openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem",
                     "-days", "2", "-subj", f"/CN={name}")

    def signed(self, name, authority, *, expired=False):
        """For 127.0.0.1; an expired one was good for a day, ten days ago."""
        self.openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr",
                     "-subj", f"/CN={name}")
        with open(self["extensions"], "w", encoding="ascii") as file:
            file.write("subjectAltName = IP:127.0.0.1, DNS:localhost\n")
        with open(self["ca.cnf"], "w", encoding="ascii") as file:
            file.write("[ca]\ndefault_ca = own\n[own]\nnew_certs_dir = .\ndatabase = index\nrand_serial = yes\n"
                       "default_md = sha256\npolicy = any\nunique_subject = no\n[any]\ncommonName = supplied\n")
        with open(self["index"], "w", encoding="ascii"):
            pass
        now = time.time()
        begin, end = (now - 10 * 86400, now - 9 * 86400) if expired else (now - 86400, now + 2 * 86400)
        stamp = "%Y%m%d%H%M%SZ"
        self.openssl("ca", "-batch", "-config", "ca.cnf", "-cert", f"{authority}.pem", "-keyfile", f"{authority}.key",
                     "-in", f"{name}.csr", "-out", f"{name}.pem", "-notext", "-extfile", "extensions",
                     "-startdate", time.strftime(stamp, time.gmtime(begin)),
                     "-enddate", time.strftime(stamp, time.gmtime(end)))


class Tls(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.files = Certificates(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.files.authority("ca")
        cls.files.authority("other")
        cls.files.signed("server", "ca")
        cls.files.signed("client", "ca")
        cls.files.signed("stranger", "other")
        cls.files.signed("old", "ca", expired=True)

    def serve(self, *flags, name="server"):
        server = Server("--ssl-certfile", self.files[f"{name}.pem"], "--ssl-keyfile", self.files[f"{name}.key"], *flags)
        self.addCleanup(server.kill)
        return server

    def outcome(self, server, authority="ca", client=None):
        """OK, or UNAVAILABLE where the handshake failed."""
        credentials = grpc.ssl_channel_credentials(
            self.files.read(f"{authority}.pem"),
            self.files.read(f"{client}.key") if client else None,
            self.files.read(f"{client}.pem") if client else None)
        # A connection of its own each time, not the last one's.
        options = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.secure_channel(server.grpc, credentials, options) as channel:
            return code_of(channel, "/longspan.v1.ModelService/ListModels", False, ()).name

    def test_a_client_that_trusts_the_signer_is_served(self):
        server = self.serve()
        self.assertEqual(self.outcome(server), "OK")
        asked = ("models", "--server", server.grpc)
        self.assertEqual(longspan(*asked, "--ssl-ca-certs", self.files["ca.pem"]).returncode, 0)
        self.assertEqual(longspan(*asked, "--ssl-ca-certs", self.files["other.pem"]).returncode, 1)
        self.assertEqual(longspan(*asked).returncode, 1)

    def test_a_client_of_another_signer_or_without_tls_is_not(self):
        server = self.serve()
        self.assertEqual(self.outcome(server, authority="other"), "UNAVAILABLE")
        with grpc.insecure_channel(server.grpc) as channel:
            self.assertEqual(code_of(channel, "/longspan.v1.ModelService/ListModels", False, ()).name, "UNAVAILABLE")
        self.assertEqual(self.outcome(server), "OK")

    def test_an_expired_certificate_is_not_taken(self):
        self.assertEqual(self.outcome(self.serve(name="old")), "UNAVAILABLE")

    def test_a_required_client_certificate_must_be_there_and_good(self):
        server = self.serve("--ssl-ca-certs", self.files["ca.pem"], "--ssl-cert-reqs", "2")
        self.assertEqual(self.outcome(server), "UNAVAILABLE")
        self.assertEqual(self.outcome(server, client="stranger"), "UNAVAILABLE")
        self.assertEqual(self.outcome(server, client="old"), "UNAVAILABLE")
        self.assertEqual(self.outcome(server, client="client"), "OK")
        ours = longspan("models", "--server", server.grpc, "--ssl-ca-certs", self.files["ca.pem"],
                        "--ssl-certfile", self.files["client.pem"], "--ssl-keyfile", self.files["client.key"])
        self.assertEqual(ours.returncode, 0, ours.stderr)

    def test_an_optional_client_certificate_may_be_missing_but_not_bad(self):
        server = self.serve("--ssl-ca-certs", self.files["ca.pem"], "--ssl-cert-reqs", "1")
        self.assertEqual(self.outcome(server), "OK")
        self.assertEqual(self.outcome(server, client="client"), "OK")
        self.assertEqual(self.outcome(server, client="stranger"), "UNAVAILABLE")

    def test_a_renewed_certificate_is_taken_without_a_restart(self):
        self.files.signed("renewed", "ca")
        server = self.serve(name="renewed")
        self.assertEqual(self.outcome(server), "OK")
        self.files.signed("renewed", "other")
        end = time.monotonic() + 30
        while self.outcome(server, authority="other") != "OK":
            self.assertLess(time.monotonic(), end, "the new certificate is not used")
            time.sleep(0.5)
        self.assertEqual(self.outcome(server), "UNAVAILABLE")

    def test_renewed_authorities_of_clients_are_taken_without_a_restart(self):
        trusted = self.files["trusted.pem"]
        shutil.copy(self.files["ca.pem"], trusted)
        server = self.serve("--ssl-ca-certs", trusted, "--ssl-cert-reqs", "2")
        self.assertEqual(self.outcome(server, client="client"), "OK")
        shutil.copy(self.files["other.pem"], trusted)
        end = time.monotonic() + 30
        while self.outcome(server, client="stranger") != "OK":
            self.assertLess(time.monotonic(), end, "the new authorities are not used")
            time.sleep(0.5)
        self.assertEqual(self.outcome(server, client="client"), "UNAVAILABLE")

    def test_health_beside_a_server_with_certificates_needs_only_the_environment(self):
        server = self.serve()
        done = longspan("health", "--server", server.grpc, LONGSPAN_SSL_CERTFILE=self.files["server.pem"],
                        LONGSPAN_SSL_KEYFILE=self.files["server.key"], LONGSPAN_CLIENT_SSL_CA_CERTS=self.files["ca.pem"])
        self.assertEqual((done.returncode, done.stdout[:5]), (0, "ready"), done.stderr)

    def test_keys_are_asked_for_over_tls_too(self):
        with open(self.files["keys"], "w", encoding="ascii") as file:
            file.write(f"{ALICE}\n")
        server = self.serve("--api-key-file", self.files["keys"])
        asked = ("models", "--server", server.grpc, "--ssl-ca-certs", self.files["ca.pem"])
        self.assertIn("UNAUTHENTICATED", longspan(*asked).stderr)
        self.assertEqual(longspan(*asked, LONGSPAN_API_KEY=ALICE).returncode, 0)

    def test_files_that_cannot_serve_are_named(self):
        cert, key = self.files["server.pem"], self.files["server.key"]
        for flags, why in (
                (("--ssl-certfile", cert), "--ssl-certfile needs --ssl-keyfile"),
                (("--ssl-certfile", "/no/file", "--ssl-keyfile", key), "--ssl-certfile: /no/file: No such file"),
                (("--ssl-certfile", cert, "--ssl-keyfile", self.files["index"]), "is not a PEM file"),
                (("--ssl-certfile", cert, "--ssl-keyfile", self.files["client.key"]), "is not the key of"),
                (("--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-cert-reqs", "2"), "needs --ssl-ca-certs"),
                (("--ssl-ca-certs", cert), "--ssl-ca-certs needs --ssl-certfile")):
            refused = longspan("serve", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags)
            self.assertEqual(refused.returncode, 2, refused.stderr)
            self.assertIn(why, refused.stderr)


if __name__ == "__main__":
    unittest.main()
