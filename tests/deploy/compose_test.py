"""deploy/compose.yaml with what it mounts: Prometheus' configuration, Grafana's provisioning and the dashboards."""

import json
import pathlib
import subprocess
import unittest
from urllib.parse import urlsplit

import yaml

import stack

DEPLOY = stack.ROOT / "deploy"
PROVISIONING = "/etc/grafana/provisioning"  # where Grafana's image looks


def config(*files):
    """What docker-compose makes of the files: paths are absolute, mounts are HOST:CONTAINER:MODE."""
    names = [argument for file in files for argument in ("-f", str(DEPLOY / file))]
    done = subprocess.run(["docker-compose", *names, "config"], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def references(value):
    """Every datasource that a dashboard names, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key == "datasource":
            yield item
        else:
            yield from references(item)


class Compose(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.services = config("compose.yaml")
        cls.dashboards = {path.name: json.loads(path.read_text()) for path in (DEPLOY / "grafana/dashboards").glob("*.json")}

    def mounts(self, service):
        """{path in the container: path here}, without the volumes that compose makes."""
        volumes = [volume.split(":") for volume in self.services[service]["volumes"]]
        return {inside: pathlib.Path(here) for here, inside, _ in volumes if here.startswith("/")}

    def here(self, service, inside):
        """The file here that a path in a container is."""
        (found,) = [here / pathlib.PurePath(inside).relative_to(mount) for mount, here in self.mounts(service).items()
                    if pathlib.PurePath(inside).is_relative_to(mount)]
        return found

    def provisioned(self, kind):
        """The one entry that Grafana is provisioned with."""
        (file,) = self.here("grafana", f"{PROVISIONING}/{kind}s").glob("*.yml")
        (entry,) = yaml.safe_load(file.read_text())[{"dashboard": "providers", "datasource": "datasources"}[kind]]
        return entry

    def reaches(self, address):
        """Whether HOST:PORT is a service and a port that it publishes, as all do."""
        host, port = address.split(":")
        return port in {p.split("/")[0].split(":")[-1] for p in self.services[host]["ports"]}

    def test_every_mounted_path_is_there(self):
        paths = [path for service in self.services for path in self.mounts(service).values()]
        self.assertEqual(len(paths), 4)
        for path in paths:
            self.assertTrue(path.is_dir(), path)

    def test_the_gpu_file_asks_for_a_gpu_and_the_cuda_image(self):
        server = config("compose.yaml", "compose.gpu.yaml")["longspan"]
        (device,) = server["deploy"]["resources"]["reservations"]["devices"]
        self.assertEqual((device["driver"], device["count"]), ("nvidia", 1))
        self.assertEqual(server["build"]["target"], "cuda")
        self.assertEqual(server["volumes"], self.services["longspan"]["volumes"])

    def test_prometheus_finds_its_rules_and_scrapes_the_server(self):
        flags = dict(flag.lstrip("-").split("=") for flag in self.services["prometheus"]["command"])
        file = self.here("prometheus", flags["config.file"])
        prometheus = yaml.safe_load(file.read_text())
        for pattern in prometheus["rule_files"]:
            self.assertTrue(list(file.parent.glob(pattern)), pattern)
        for job in prometheus["scrape_configs"]:
            (discovery,) = job["file_sd_configs"]
            groups = [group for pattern in discovery["files"] for path in file.parent.glob(pattern)
                      for group in json.loads(path.read_text())]
            targets = [target for group in groups for target in group["targets"]]
            self.assertEqual([target for target in targets if self.reaches(target)], targets)
            self.assertGreater(len(targets), 0)

    def test_grafana_finds_the_dashboards_where_its_provisioning_looks(self):
        folder = self.here("grafana", self.provisioned("dashboard")["options"]["path"])
        self.assertEqual({path.name for path in folder.glob("*.json")}, set(self.dashboards))
        home = self.services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        self.assertTrue(self.here("grafana", home).is_file(), home)

    def test_grafanas_datasource_is_the_prometheus_beside_it(self):
        source = self.provisioned("datasource")
        self.assertEqual(source["type"], "prometheus")
        self.assertTrue(self.reaches(urlsplit(source["url"]).netloc), source["url"])

    # Grafana knows "default" by its value and text, and takes for it the datasource of the type that is the default.
    def test_dashboards_ask_the_chosen_datasource_which_is_at_first_the_default_one(self):
        source = self.provisioned("datasource")
        for name, dashboard in self.dashboards.items():
            (variable,) = [v for v in dashboard["templating"]["list"] if v["type"] == "datasource"]
            chosen = {"type": variable["query"], "uid": f"${{{variable['name']}}}"}
            self.assertEqual([reference for reference in references(dashboard) if reference != chosen], [], name)
            self.assertEqual([panel["title"] for panel in dashboard["panels"] if "datasource" not in panel], [], name)
            self.assertEqual(variable["current"], {"text": "default", "value": "default"})
            self.assertEqual((source["isDefault"], source["type"]), (True, variable["query"]))


if __name__ == "__main__":
    unittest.main()
