"""deploy/kubernetes rendered by kubectl and held to the schemas of Kubernetes and of the custom resources used."""

import copy
import json
import os
import pathlib
import re
import subprocess
import unittest

import jsonschema
import kubernetes_validate
import pydantic
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as operator

import stack

KUBERNETES = stack.ROOT / "deploy/kubernetes"
PLACES = [KUBERNETES / "base", *sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))]
# Overlays of one's own: on cuda, with these components.
COMBINED = {"pool": ["monitoring", "keda", "inferencepool"], "closed": ["monitoring", "keda", "secured"],
            "closed pods": ["podmonitor", "secured"]}
VERSION = "1.32"

# Made from the CRDs of KEDA 2.16 and of the Prometheus operator 0.80.
MODELS = {
    "keda.sh/v1alpha1 ScaledObject": keda.ScaledObject,
    "monitoring.coreos.com/v1 PodMonitor": operator.PodMonitor,
    "monitoring.coreos.com/v1 PrometheusRule": operator.PrometheusRule,
    "monitoring.coreos.com/v1 ServiceMonitor": operator.ServiceMonitor,
}


def closed(**fields):
    """The schema of an object with these fields, each of them and no other."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


# No package has the CRD of the Inference Extension: these are the fields that deploy/kubernetes uses, as release 1.5 has them.
PORT = closed(number={"type": "integer", "minimum": 1, "maximum": 65535})
POOL = closed(
    apiVersion={"const": "inference.networking.k8s.io/v1"}, kind={"const": "InferencePool"}, metadata={"type": "object"},
    spec=closed(
        selector=closed(matchLabels={"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 64}),
        targetPorts={"type": "array", "items": PORT, "minItems": 1, "maxItems": 8},
        appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
        endpointPickerRef=closed(name={"type": "string"}, port=PORT, failureMode={"enum": ["FailOpen", "FailClose"]})))


def check(resource):
    """Raises if a field is not known, is missing or has the wrong form."""
    kind = f"{resource['apiVersion']} {resource['kind']}"
    if kind in MODELS:
        MODELS[kind].model_validate(resource, strict=True, extra="forbid")
    elif resource["kind"] == "InferencePool":
        jsonschema.validate(resource, POOL)
    else:
        kubernetes_validate.validate(resource, VERSION, strict=True)


def render(place):
    done = subprocess.run(["kubectl", "kustomize", str(place)], text=True, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def combine(components):
    with stack.scratch() as folder:
        here = os.path.relpath(KUBERNETES, os.path.realpath(folder))
        own = {"resources": [f"{here}/overlays/cuda"], "components": [f"{here}/components/{name}" for name in components]}
        pathlib.Path(folder, "kustomization.yaml").write_text(json.dumps(own))
        return render(folder)


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


class Rendered(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.rendered = {place.name: render(place) for place in PLACES}
        cls.rendered |= {name: combine(components) for name, components in COMBINED.items()}

    def find(self, place, kind, name="longspan"):
        (found,) = [r for r in self.rendered[place] if r["kind"] == kind and r["metadata"]["name"] == name]
        return found

    def container(self, place):
        (container,) = self.find(place, "Deployment")["spec"]["template"]["spec"]["containers"]
        return container

    def test_there_is_every_overlay(self):
        components = {path.parent.name for path in KUBERNETES.glob("components/*/kustomization.yaml")}
        self.assertEqual(components, {"keda", "inferencepool", "monitoring", "podmonitor", "secured"})
        self.assertEqual({place.name for place in PLACES}, {"base", "cpu", "cuda"} | components)
        self.assertEqual(set().union(*COMBINED.values()), components)

    def test_no_overlay_counts_a_server_twice(self):
        for place, resources in self.rendered.items():
            monitors = [r["kind"] for r in resources if r["kind"] in ("ServiceMonitor", "PodMonitor")]
            self.assertLessEqual(len(monitors), 1, place)

    def test_where_keys_are_asked_for_every_scrape_shows_one(self):
        for place, kind, field in (("closed", "ServiceMonitor", "endpoints"),
                                   ("closed pods", "PodMonitor", "podMetricsEndpoints")):
            for scrape in self.find(place, kind)["spec"][field]:
                self.assertEqual(scrape["authorization"], {"credentials": {"name": "longspan-keys", "key": "scraper"}})

    def test_both_monitors_scrape_alike(self):
        pods = self.find("podmonitor", "PodMonitor")["spec"]["podMetricsEndpoints"]
        self.assertEqual(pods, self.find("monitoring", "ServiceMonitor")["spec"]["endpoints"])

    def test_every_resource_is_as_its_schema_says(self):
        for place, resources in self.rendered.items():
            for resource in resources:
                with self.subTest(place=place, kind=resource["kind"], name=resource["metadata"]["name"]):
                    check(resource)

    def test_the_schemas_know_what_is_wrong(self):
        errors = (kubernetes_validate.ValidationError, jsonschema.ValidationError, pydantic.ValidationError)
        for place, kind, path, wrong in (
                ("base", "Deployment", "template.spec.containers.0", {"readOnlyRootFilesystem": True}),
                ("base", "Service", "ports.0", {"port": "50051"}),
                ("keda", "ScaledObject", "triggers.0", {"queries": "up"}),
                ("keda", "ScaledObject", "", {"maxReplicaCount": "8"}),
                ("inferencepool", "InferencePool", "", {"targetPort": 1}),
                ("inferencepool", "InferencePool", "targetPorts.0", {"number": "50051"}),
                ("monitoring", "ServiceMonitor", "endpoints.0.relabelings.0", {"action": "rename"}),
                ("monitoring", "ServiceMonitor", "endpoints.0", {"every": "5s"}),
                ("monitoring", "ServiceMonitor", "endpoints.0", {"interval": "5 seconds"}),
                ("podmonitor", "PodMonitor", "podMetricsEndpoints.0", {"every": "5s"}),
                ("monitoring", "PrometheusRule", "groups.1.rules.0", {"four": "1m"})):
            with self.subTest(kind=kind, wrong=wrong):
                resource = copy.deepcopy(self.find(place, kind))
                at = resource["spec"]
                for step in path.split(".") if path else ():
                    at = at[int(step) if step.isdigit() else step]
                at.update(wrong)
                with self.assertRaises(errors):
                    check(resource)

    def test_every_selector_selects_pods_and_every_reference_is_there(self):
        for place, resources in self.rendered.items():
            pods = [r["spec"]["template"] for r in resources if r["kind"] == "Deployment"]
            names = {(r["kind"], r["metadata"]["name"]) for r in resources}
            selects = lambda labels: [p for p in pods if labels.items() <= p["metadata"]["labels"].items()]
            for r in resources:
                with self.subTest(place=place, kind=r["kind"], name=r["metadata"]["name"]):
                    spec = r.get("spec", {})
                    if r["kind"] == "Service":
                        (pod,) = selects(spec["selector"])
                        ports = {p["name"] for c in pod["spec"]["containers"] for p in c["ports"]}
                        self.assertLessEqual({p["targetPort"] for p in spec["ports"]}, ports)
                    elif r["kind"] in ("PodDisruptionBudget", "InferencePool"):
                        self.assertEqual(len(selects(spec["selector"]["matchLabels"])), 1)
                    elif r["kind"] == "NetworkPolicy":
                        self.assertEqual(len(selects(spec["podSelector"]["matchLabels"])), 1)
                    elif r["kind"] == "ServiceMonitor":
                        services = [s for s in resources if s["kind"] == "Service" and
                                    spec["selector"]["matchLabels"].items() <= s["metadata"].get("labels", {}).items()]
                        self.assertEqual(len(services), 1)
                    elif r["kind"] == "ScaledObject":
                        self.assertIn(("Deployment", spec["scaleTargetRef"]["name"]), names)
                    if r["kind"] == "InferencePool":
                        self.assertIn(("Service", spec["endpointPickerRef"]["name"]), names)
            for pod in pods:
                for volume in pod["spec"].get("volumes", []):
                    if "persistentVolumeClaim" in volume:
                        self.assertIn(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]), names)
                    if "configMap" in volume:
                        self.assertIn(("ConfigMap", volume["configMap"]["name"]), names)

    def test_every_server_may_do_nothing_that_it_need_not(self):
        for place in self.rendered:
            with self.subTest(place=place):
                pod = self.find(place, "Deployment")["spec"]["template"]["spec"]
                container = self.container(place)
                self.assertIs(pod["automountServiceAccountToken"], False)
                self.assertIs(pod["securityContext"]["runAsNonRoot"], True)
                self.assertEqual(pod["securityContext"]["runAsUser"], 10001)
                self.assertEqual(container["securityContext"], {
                    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}})
                self.assertIn("memory", container["resources"]["limits"])
                for mount in container.get("volumeMounts", []):
                    self.assertIs(mount["readOnly"], True)

    def test_every_environment_variable_is_a_flag_of_the_server(self):
        help_text = subprocess.run([stack.LONGSPAN, "serve", "--help"], text=True, capture_output=True, check=True).stdout
        flags = {"LONGSPAN_" + flag.upper().replace("-", "_") for flag in re.findall(r"^  --([a-z-]+)", help_text, re.M)}
        for place in self.rendered:
            used = {entry["name"] for entry in self.container(place)["env"]}
            self.assertLessEqual(used, flags, place)

    def test_a_secured_server_starts_from_its_secrets_and_asks_for_a_key_over_tls(self):
        container = self.container("secured")
        folder = pathlib.Path(self.enterContext(stack.scratch()))
        secrets = {mount["mountPath"]: folder / mount["name"] for mount in container["volumeMounts"]}
        for secret in secrets.values():
            secret.mkdir()
        (folder / "keys/keys").write_text("lsk-0123456789abcdef name=scraper\n")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=longspan", "-addext",
                        "subjectAltName=IP:127.0.0.1", "-keyout", "tls.key", "-out", "tls.crt"], cwd=folder / "tls", check=True, capture_output=True)
        environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        for mounted, here in secrets.items():
            environment = {name: value.replace(mounted, str(here)) for name, value in environment.items()}
        command = [stack.LONGSPAN, "serve", "--grpc", "0.0.0.0:0", "--http", "0.0.0.0:0", "--withdrawal-grace", "0s"]
        server = stack.Server(self.enterContext(stack.process(command, folder / "log", env=environment)), folder / "log")
        grpc, http = (address.replace("0.0.0.0", "127.0.0.1") for address in (server.grpc, server.http))

        key, authority = ["--api-key", "lsk-0123456789abcdef"], ["--ssl-ca-certs", str(folder / "tls/tls.crt")]
        for flags, served in ((key + authority, True), (authority, False), (key, False)):
            asked = subprocess.run([stack.LONGSPAN, "models", "--server", grpc, *flags], capture_output=True, check=False)
            self.assertEqual(asked.returncode == 0, served, flags)
        self.assertEqual(stack.get(f"http://{http}{container['readinessProbe']['httpGet']['path']}"), "ready\n")
        with self.assertRaisesRegex(OSError, "401"):
            stack.get(f"http://{http}/metrics")

    # Server::DrainAndStop gives cancelled requests 5 s and ~Server open connections 2 s.
    def test_a_pod_is_killed_only_after_the_server_has_had_its_time(self):
        for place in self.rendered:
            with self.subTest(place=place):
                pod = self.find(place, "Deployment")["spec"]["template"]["spec"]
                container = self.container(place)
                value = {entry["name"]: entry.get("value") for entry in container["env"]}
                withdrawal = seconds(value["LONGSPAN_WITHDRAWAL_GRACE"])
                stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
                needs = stop + withdrawal + seconds(value["LONGSPAN_SHUTDOWN_TIMEOUT"]) + 5 + 2
                self.assertGreaterEqual(pod["terminationGracePeriodSeconds"], needs)
                # A balancer that goes by readiness alone has noticed before requests are refused.
                probe = container["readinessProbe"]
                self.assertGreaterEqual(stop + withdrawal, probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"])

    def test_compose_waits_for_the_drain_too(self):
        help_text = subprocess.run([stack.LONGSPAN, "serve", "--help"], text=True, capture_output=True, check=True).stdout
        default = {name: re.search(rf"--{name} TIME.*?\[(\w+)\]", help_text, re.S)[1] for name in ("withdrawal-grace", "shutdown-timeout")}
        compose = yaml.safe_load((stack.ROOT / "deploy/compose.yaml").read_text())
        waits = seconds(compose["services"]["longspan"]["stop_grace_period"])
        zero_is_plain = lambda text: 0 if text == "0" else seconds(text)
        self.assertGreaterEqual(waits, sum(map(zero_is_plain, default.values())) + 5 + 2)

    # The picker starts with nothing less, and refuses every gRPC call with the parser that it takes by default.
    def test_the_picker_has_what_it_names_and_reads_no_body(self):
        resources = self.rendered["inferencepool"]
        container, = self.find("inferencepool", "Deployment", "longspan-picker")["spec"]["template"]["spec"]["containers"]
        told = dict(argument.removeprefix("--").split("=") for argument in container["args"])
        self.assertIn(("InferencePool", told["pool-name"]), {(r["kind"], r["metadata"]["name"]) for r in resources})
        port, = [port["containerPort"] for port in self.container("inferencepool")["ports"] if port["name"] == "http"]
        self.assertEqual(int(told["model-server-metrics-port"]), port)
        config = yaml.safe_load(self.find("inferencepool", "ConfigMap", "longspan-picker")["data"]["config.yaml"])
        plugins = {plugin["type"] for plugin in config["plugins"]}
        used = {plugin["pluginRef"] for profile in config["schedulingProfiles"] for plugin in profile["plugins"]}
        self.assertEqual(used | {config["parser"]["pluginRef"]}, plugins)
        self.assertEqual(config["parser"]["pluginRef"], "passthrough-parser")

    def test_the_operator_names_the_jobs_as_prometheus_own_configuration_does(self):
        own = yaml.safe_load((stack.ROOT / "deploy/prometheus/prometheus.yml").read_text())
        jobs = {job["job_name"]: job.get("metrics_path", "/metrics") for job in own["scrape_configs"]}
        endpoints = self.find("monitoring", "ServiceMonitor")["spec"]["endpoints"]
        named = {rule["replacement"]: e["path"] for e in endpoints for rule in e["relabelings"] if rule["targetLabel"] == "job"}
        self.assertEqual(named, jobs)

    def test_the_operators_rules_are_prometheus_own(self):
        own = yaml.safe_load((stack.ROOT / "deploy/prometheus/rules/longspan.yml").read_text())
        self.assertEqual(self.find("monitoring", "PrometheusRule")["spec"], own)

    def test_the_dashboards_are_grafanas_own(self):
        data = self.find("monitoring", "ConfigMap", "longspan-dashboards")["data"]
        folder = stack.ROOT / "deploy/grafana/dashboards"
        self.assertEqual(data, {path.name: path.read_text() for path in folder.glob("*.json")})


if __name__ == "__main__":
    unittest.main()
