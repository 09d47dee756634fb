"""What can be said of deploy/Dockerfile without building it; the cpu target is built by image_slow_test."""

import re
import unittest

import stack

TEXT = (stack.ROOT / "deploy/Dockerfile").read_text()


def stages():
    """{stage: its instructions, without comments}"""
    found = {}
    for line in re.sub(r"\\\n\s*", " ", TEXT).splitlines():
        if start := re.match(r"FROM (\S+) AS (\S+)$", line):
            found[start[2]] = [f"FROM {start[1]}"]
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


class Dockerfile(unittest.TestCase):
    # The cuda target cannot be built where its base images are not; what is built for cpu vouches for it.
    def test_cuda_stages_are_the_cpu_stages_but_for_base_preset_and_device(self):
        replacements = [("build-cuda", "build-cpu"), ("${CUDA_BUILD_BASE}", "${CPU_BASE}"), ("${CUDA_BASE}", "${CPU_BASE}"),
                        ("--preset cuda", "--preset release"), ("build/cuda", "build/release"), ("models, CUDA", "models, CPU"),
                        (" LONGSPAN_DEVICE=cuda:0 NVIDIA_DRIVER_CAPABILITIES=compute,utility", ""), ("start-period=10m", "start-period=5m")]
        def as_cpu(lines):
            text = "\n".join(lines)
            for cuda, cpu in replacements:
                text = text.replace(cuda, cpu)
            return text.split("\n")
        found = stages()
        self.assertEqual(as_cpu(found["build-cuda"]), found["build-cpu"])
        self.assertEqual(as_cpu(found["cuda"]), found["cpu"])

    def test_every_base_is_an_argument_pinned_to_a_tag(self):
        bases = dict(re.findall(r"^ARG (\w+_BASE)=(\S+)$", TEXT, re.M))
        self.assertEqual(set(bases), set(re.findall(r"^FROM \$\{(\w+)\}", TEXT, re.M)))
        for image in bases.values():
            self.assertRegex(image, r"^[a-z.]+/[a-z/]+:[a-z]*-?[0-9][\w.-]+$")
        self.assertEqual(len(re.findall(r"^FROM ", TEXT, re.M)), len(stages()))

    # Debian's buildah cannot read them.
    def test_has_no_heredocs(self):
        self.assertNotIn("<<", TEXT)


if __name__ == "__main__":
    unittest.main()
