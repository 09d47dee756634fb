"""deploy/kubernetes rendered by kubectl and held to the schemas of Kubernetes and of the custom resources used."""

import json
import re
import subprocess
import unittest

import kubernetes_validate
import yaml

import stack

KUBERNETES = stack.ROOT / "deploy/kubernetes"
PLACES = [KUBERNETES / "base", *sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))]
VERSION = "1.32"

# The custom resources' fields as their CRDs have them, as far as deploy/kubernetes uses them: a name that is not here is a
# mistake or belongs here. ... takes anything (it is checked by what reads it).
STRING, NUMBER = str, int
LABELS = {str: str}
ENDPOINT = {"port": STRING, "path": STRING, "interval": STRING, "relabelings": [{"targetLabel": STRING, "replacement": STRING}]}
CUSTOM = {
    "monitoring.coreos.com/v1 ServiceMonitor": {"selector": {"matchLabels": LABELS}, "sampleLimit": NUMBER, "endpoints": [ENDPOINT]},
    "monitoring.coreos.com/v1 PodMonitor": {"selector": {"matchLabels": LABELS}, "sampleLimit": NUMBER, "podMetricsEndpoints": [ENDPOINT]},
    "monitoring.coreos.com/v1 PrometheusRule": {"groups": ...},
    "keda.sh/v1alpha1 ScaledObject": {
        "scaleTargetRef": {"name": STRING},
        "minReplicaCount": NUMBER, "maxReplicaCount": NUMBER, "pollingInterval": NUMBER, "cooldownPeriod": NUMBER,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {
            "stabilizationWindowSeconds": NUMBER, "policies": [{"type": STRING, "value": NUMBER, "periodSeconds": NUMBER}]}}}},
        "triggers": [{"type": STRING, "metadata": {"serverAddress": STRING, "query": STRING, "threshold": STRING}}],
    },
    "inference.networking.k8s.io/v1 InferencePool": {
        "selector": {"matchLabels": LABELS}, "targetPorts": [{"number": NUMBER}], "appProtocol": STRING,
        "endpointPickerRef": {"name": STRING, "port": {"number": NUMBER}, "failureMode": STRING},
    },
}


def misfits(value, shape, where):
    """What of `value` does not have `shape`: unknown fields and wrong types."""
    if shape is ...:
        return
    if isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for i, item in enumerate(value):
            yield from misfits(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where} is no object"
            return
        for key, item in value.items():
            if str in shape:
                yield from misfits(item, shape[str], f"{where}.{key}")
            elif key in shape:
                yield from misfits(item, shape[key], f"{where}.{key}")
            else:
                yield f"{where}.{key} is not known"
    elif type(value) is not shape:
        yield f"{where} is {value!r}, not {shape.__name__}"


def render(place):
    done = subprocess.run(["kubectl", "kustomize", str(place)], text=True, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


class Rendered(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.rendered = {place.name: render(place) for place in PLACES}

    def find(self, place, kind, name="longspan"):
        (found,) = [r for r in self.rendered[place] if r["kind"] == kind and r["metadata"]["name"] == name]
        return found

    def container(self, place):
        (container,) = self.find(place, "Deployment")["spec"]["template"]["spec"]["containers"]
        return container

    def test_there_is_every_overlay(self):
        self.assertEqual(set(self.rendered), {"base", "cpu", "cuda", "keda", "inferencepool", "monitoring"})

    def test_every_resource_has_only_fields_that_its_schema_knows(self):
        for place, resources in self.rendered.items():
            for resource in resources:
                kind = f"{resource['apiVersion']} {resource['kind']}"
                with self.subTest(place=place, kind=kind, name=resource["metadata"]["name"]):
                    if kind in CUSTOM:
                        self.assertEqual(list(misfits(resource["spec"], CUSTOM[kind], "spec")), [])
                        self.assertLessEqual(set(resource), {"apiVersion", "kind", "metadata", "spec"})
                    else:
                        kubernetes_validate.validate(resource, VERSION, strict=True)

    def test_the_checks_find_an_unknown_field_and_a_wrong_type(self):
        deployment = json.loads(json.dumps(self.find("base", "Deployment")))
        deployment["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
        with self.assertRaises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(deployment, VERSION, strict=True)
        pool = {"targetPorts": [{"number": "50051"}], "targetPort": 1}
        self.assertEqual(len(list(misfits(pool, CUSTOM["inference.networking.k8s.io/v1 InferencePool"], "spec"))), 2)

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
                    elif r["kind"] in ("PodDisruptionBudget", "InferencePool", "PodMonitor"):
                        self.assertEqual(len(selects(spec["selector"]["matchLabels"])), 1)
                    elif r["kind"] == "NetworkPolicy":
                        self.assertEqual(len(selects(spec["podSelector"]["matchLabels"])), 1)
                    elif r["kind"] == "ServiceMonitor":
                        services = [s for s in resources if s["kind"] == "Service" and
                                    spec["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()]
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

    # Server::DrainAndStop gives cancelled requests 5 s and ~Server open connections 2 s.
    def test_a_pod_is_killed_only_after_the_server_has_had_its_time(self):
        for place in self.rendered:
            with self.subTest(place=place):
                pod = self.find(place, "Deployment")["spec"]["template"]["spec"]
                container = self.container(place)
                value = {entry["name"]: entry["value"] for entry in container["env"]}
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

    def test_the_operator_names_the_jobs_as_prometheus_own_configuration_does(self):
        own = yaml.safe_load((stack.ROOT / "deploy/prometheus/prometheus.yml").read_text())
        jobs = {job["job_name"]: job.get("metrics_path", "/metrics") for job in own["scrape_configs"]}
        for overlay, kind, field in (("monitoring", "ServiceMonitor", "endpoints"), ("inferencepool", "PodMonitor", "podMetricsEndpoints")):
            endpoints = self.find(overlay, kind)["spec"][field]
            named = {rule["replacement"]: e["path"] for e in endpoints for rule in e["relabelings"] if rule["targetLabel"] == "job"}
            self.assertEqual(named, {name: jobs[name] for name in named}, overlay)
            self.assertIn("longspan", named)
            self.assertEqual(len(named), len(endpoints))

    def test_the_operators_rules_are_prometheus_own(self):
        own = yaml.safe_load((stack.ROOT / "deploy/prometheus/rules/longspan.yml").read_text())
        self.assertEqual(self.find("monitoring", "PrometheusRule")["spec"], own)

    def test_the_dashboards_are_grafanas_own(self):
        data = self.find("monitoring", "ConfigMap", "longspan-dashboards")["data"]
        folder = stack.ROOT / "deploy/grafana/dashboards"
        self.assertEqual(data, {path.name: path.read_text() for path in folder.glob("*.json")})


if __name__ == "__main__":
    unittest.main()
