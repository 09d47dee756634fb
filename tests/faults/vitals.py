"""What must be as before once a fault has passed: the answer, memory, descriptors, the cache's books."""

import concurrent.futures
import os
import re
import resource
import time
import unittest

from harness import Server, completion

CACHE = 32 << 20
IDLE = ("longspan_requests_running", "longspan_requests_waiting", "longspan_tokens_waiting", "longspan_draining",
        'longspan_kv_cache_bytes{state="used"}', 'longspan_kv_blocks{kind="paged",state="used"}',
        'longspan_kv_blocks{kind="ring",state="used"}')
FREE = ('longspan_kv_cache_bytes{state="free"}', 'longspan_kv_blocks{kind="paged",state="free"}',
        'longspan_kv_blocks{kind="ring",state="free"}')


def rss(server):
    with open(f"/proc/{server.process.pid}/status", encoding="ascii") as file:
        return int(re.search(r"^VmRSS:\s+(\d+) kB$", file.read(), re.MULTILINE).group(1)) << 10


def descriptors(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def eventually(read, good, seconds):
    """The first good value that read() gives, or its last one when the time is over."""
    end = time.monotonic() + seconds
    while not good(value := read()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def gauges(server, names):
    page = server.page("/metrics")
    return {name: float(re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE).group(1)) for name in names}


def answer(server):
    return server.inference.Complete(completion(max_tokens=16), timeout=30).choices[0].text


class FaultCase(unittest.TestCase):
    """Tests of one server, each of which must leave it as the first found it."""
    FLAGS = ()
    # Beyond the level after a rehearsal: code first used by a fault, and what the allocator keeps in its arenas between
    # blocks that live: 15 to 18 MB after a stream that nobody reads, the first time, and 20 after all tests. A connection
    # has 19 KiB: 5,000 leaked ones are seen, a few only by their descriptors.
    RSS_TOLERANCE = 28 << 20

    @classmethod
    def setUpClass(cls):
        # For some hundred connections at once, here and in the server, which inherits it.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
        cls.server = Server("--cache-bytes", str(CACHE), *cls.FLAGS)
        cls.addClassCleanup(cls.server.kill)
        cls.free = gauges(cls.server, FREE)
        cls.rehearse()
        cls.text = answer(cls.server)
        if not cls.text or not cls.server.wait_idle() or min(cls.free.values()) <= 0:
            raise RuntimeError(f"not a server to begin with: {cls.text!r}, {cls.free}")
        cls.files = descriptors(cls.server)
        cls.memory = rss(cls.server)

    @classmethod
    def rehearse(cls):
        """Makes most of the cache resident, which stays so: its use by a fault is not a leak."""
        prompt = completion("word " * 1600, max_tokens=50)  # so that the first is there until the last has been read
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: cls.server.inference.Complete(prompt, timeout=60), range(6)))

    def tearDown(self):
        self.assertIsNone(self.server.process.poll(), "".join(self.server.log[-5:]))
        self.assertEqual(answer(self.server), self.text)
        self.assertTrue(self.server.wait_idle(), "a request left something behind")
        self.assertEqual(gauges(self.server, IDLE), dict.fromkeys(IDLE, 0.0))
        self.assertEqual(gauges(self.server, FREE), self.free)
        files = eventually(lambda: descriptors(self.server), lambda n: n == self.files, 10)
        self.assertEqual(files, self.files, "open descriptors")
        gained = eventually(lambda: rss(self.server) - self.memory, lambda n: n <= self.RSS_TOLERANCE, 5)
        self.assertLessEqual(gained, self.RSS_TOLERANCE, "bytes of resident memory gained")
