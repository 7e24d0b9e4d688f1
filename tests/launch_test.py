"""What starts runs elsewhere: scripts that parse, manifests that are YAML, commands that peftax takes."""

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from string import Template

import pytest
import yaml

from peftax import cli

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
VALUES = {
    "IMAGE": "image",
    "CLAIM": "claim",
    "CONFIG": "default",
    "WORKDIR": "/shared/run",
    "NAME": "peftax",
    "ACCELERATOR": "kind",
    "TOPOLOGY": "4x4",
    "HOSTS": "4",
    "CHIPS": "4",
    "GPUS": "8",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111, "not executable"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("file", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_manifests_start_peftax_in_every_pod(file):
    text = (LAUNCH / file).read_text()
    named = set(re.findall(r"export (.*)", text)[0].split()) | set(re.findall(r"export (.*)", text)[1].split())
    assert {n.partition("=")[0] for n in named if "=" in n} >= set(re.findall(r"\$\{(\w+)\}", text))  # told at the top
    made = yaml.safe_load(Template(text).safe_substitute(VALUES))
    (group,) = made["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    assert job["completionMode"] == "Indexed" and made["spec"]["failurePolicy"]["maxRestarts"] > 0
    (container,) = job["template"]["spec"]["containers"]
    start, name, *words = container["command"]
    assert (LAUNCH.parent / start).exists() and name == "peftax"
    args, rest = cli._parser().parse_known_args([w.replace("$(PROCESS)", "3") for w in words])
    assert (args.command, args.config, args.workdir, rest) == ("train", "default", "/shared/run", [])
    if file == "gke_gpu.yaml":
        assert (args.processes, args.process) == (4, 3)
        host, _, port = args.coordinator.partition(":")
        assert host == f"peftax-{group['name']}-0-0.peftax"  # JobSet's name of the first pod
        assert int(port) in [p["containerPort"] for p in container["ports"]]


def test_a_pod_that_is_stopped_is_not_done(tmp_path):
    pod = LAUNCH / "pod.sh"
    assert [subprocess.run([pod, "bash", "-c", f"exit {n}"]).returncode for n in (0, 3)] == [0, 3]
    saves = f"trap 'touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/on; while :; do sleep 0.01; done"
    started = subprocess.Popen([pod, "bash", "-c", saves])
    while not (tmp_path / "on").exists():
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    assert started.wait(10) == 143 and (tmp_path / "saved").exists()
