"""The shipped Prometheus configuration, rules and dashboards, run by the real programs against a real server."""

import subprocess
import time
import unittest

import stack


class Monitoring(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(stack.scratch())
        cls.server = cls.enterClassContext(stack.serve(folder, "--attention-sample-every", "1"))
        cls.prometheus = cls.enterClassContext(stack.prometheus(folder, [cls.server.http]))
        begin = time.monotonic()
        # Every counter must move between two scrapes, and the slow job scrapes every 15 s.
        while time.monotonic() - begin < 20:
            cls.server.client("complete", "--prompt", "Once upon a time there was a king", "--max-tokens", "100", "--ignore-eos")
        cls.server.client("needle", "--lengths", "256,512", "--depths", "2", "--seed", "1", "--no-save")
        stack.wait_for("a needle score in Prometheus", lambda: cls.prometheus.value("count(longspan_needle_score)") == 4, 30)
        scrapes = 'min(count_over_time(longspan_attention_head_span_tokens[5m]))'
        stack.wait_for("three scrapes of every head", lambda: cls.prometheus.value(scrapes) >= 3, 60)
        recorded = 'count(instance:longspan_rpc_faults:ratio_rate5m)'
        stack.wait_for("a recorded rule", lambda: cls.prometheus.value(recorded) == 1, 30)

    def test_prometheus_has_a_span_of_a_full_layers_head(self):
        span = self.prometheus.value('max(longspan_attention_head_span_tokens{kind="full"})')
        self.assertGreater(span, 1)

    def test_prometheus_has_the_needle_score_of_every_cell(self):
        scores = self.prometheus.api("query", query="longspan_needle_score")["result"]
        cells = {(s["metric"]["context_length"], s["metric"]["depth"]) for s in scores}
        self.assertEqual(cells, {("256", "0"), ("256", "100"), ("512", "0"), ("512", "100")})

    def test_no_scrape_fails_or_is_cut(self):
        self.assertEqual(self.prometheus.value('min(up{job=~"longspan.*"})'), 1)
        self.assertEqual(self.prometheus.value("count(up)"), 2)

    def test_every_panel_has_numbers(self):
        count = 0
        for dashboard, panel in stack.panels():
            for target in panel["targets"]:
                with self.subTest(dashboard=dashboard["title"], panel=panel["title"], ref=target["refId"]):
                    result = self.prometheus.evaluate(target["expr"], target.get("instant", False))
                    self.assertTrue(any(stack.finite(series) for series in result), result)
                    count += 1
        self.assertGreater(count, 20)

    def test_no_alert_is_up_while_all_is_well(self):
        states = self.prometheus.alert_states()
        self.assertEqual(set(states.values()), {"inactive"}, states)
        self.assertEqual(len(states), 8)

    def test_one_log_line_says_how_a_request_ended(self):
        lines = [line for line in self.server.lines() if line["event"] == "request ended"]
        self.assertGreater(len(lines), 0)
        for line in lines:
            self.assertEqual((line["level"], line["method"], line["code"]), ("info", "StreamComplete", "OK"))
            self.assertEqual(line["completion_tokens"], 100)
            self.assertTrue(line["request_id"])

    # By its name the last: it ends the server.
    def test_when_the_server_is_gone_an_alert_is_pending(self):
        self.server.child.terminate()
        self.assertEqual(self.server.child.wait(timeout=60), 0)
        stack.wait_for("LongspanDown pending", lambda: self.prometheus.alert_states()["LongspanDown"] == "pending", 60)


class Configuration(unittest.TestCase):
    def check(self, *command):
        done = subprocess.run(command, text=True, capture_output=True, cwd=stack.ROOT, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def test_promtool_accepts_configuration_and_rules(self):
        self.assertIn("13 rules found", self.check("promtool", "check", "config", "deploy/prometheus/prometheus.yml"))

    def test_every_alert_fires_on_its_trouble_and_is_silent_beside_it(self):
        self.check("promtool", "test", "rules", "tests/deploy/rules_test.yml")


if __name__ == "__main__":
    unittest.main()
