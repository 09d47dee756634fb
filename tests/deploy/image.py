"""Builds container images without a daemon or a registry: debootstrap makes the base, buildah the rest."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORE = ROOT / "build" / "images"
MIRROR = "http://deb.debian.org"
SOURCES = f"""deb {MIRROR}/debian bookworm main
deb {MIRROR}/debian bookworm-updates main
deb {MIRROR}/debian-security bookworm-security main
"""
# As the registry's image has it: apt keeps neither packages nor its index.
NO_CACHE = """DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
APT::Update::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
"""


def run(*command, **options):
    """The command's standard output; on failure its output is shown and the test fails."""
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if done.returncode != 0:
        tail = (done.stdout + done.stderr)[-6000:]
        raise AssertionError(f"{' '.join(map(str, command))} exited {done.returncode}:\n{tail}")
    return done.stdout


def buildah(*arguments, **options):
    return run("buildah", "--root", str(STORE / "root"), "--runroot", str(STORE / "run"), "--storage-driver", driver(),
               *arguments, **options)


@functools.cache
def driver():
    """overlay where this kernel and file system allow it, else vfs, which copies every layer whole."""
    with tempfile.TemporaryDirectory(dir=ensure(STORE)) as folder:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(os.path.join(folder, name))
        options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
        merged = os.path.join(folder, "merged")
        if subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], capture_output=True).returncode:
            return "vfs"
        run("umount", merged)
        return "overlay"


def ensure(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_base(tag):
    """A stand-in for debian:bookworm-slim, made once; takes the certificate authorities that this machine trusts."""
    if tag in buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    tree = STORE / "base"
    shutil.rmtree(tree, ignore_errors=True)
    ensure(STORE)
    run("debootstrap", "--variant=minbase", "bookworm", str(tree), f"{MIRROR}/debian")
    (tree / "etc/apt/sources.list").write_text(SOURCES)
    (tree / "etc/apt/apt.conf.d/docker-clean").write_text(NO_CACHE)
    authorities = ensure(tree / "usr/local/share/ca-certificates")
    for certificate in pathlib.Path("/usr/local/share/ca-certificates").glob("*.crt"):
        shutil.copy(certificate, authorities)
    for left in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(tree / left)
        os.mkdir(tree / left)
    container = buildah("from", "scratch").strip()
    buildah("add", "-q", container, str(tree), "/")
    buildah("config", "--cmd", "bash", container)
    buildah("commit", "-q", "--rm", container, tag)
    shutil.rmtree(tree)


def build(target, tag, *arguments):
    buildah("bud", "--isolation", "chroot", "--pull-never", "--layers", "--format", "docker",
            "--file", str(ROOT / "deploy/Dockerfile"), "--target", target, "--tag", tag, *arguments, str(ROOT))


def inspect(tag):
    return json.loads(buildah("inspect", "--type", "image", tag))


def mount(tag):
    """(container, folder) of a container whose file system lies at the folder; remove with `buildah rm`."""
    container = buildah("from", "--pull-never", tag).strip()
    return container, pathlib.Path(buildah("mount", container).strip())


def size(folder):
    return sum(os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(folder) for name in names)
