"""The launch scripts: their form, their dry runs, and their runs with stand-ins for gcloud, srun and xpk."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jax._src.clusters import SlurmCluster

from medrlvr_jax.config import load as configs

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
TRAINERS = {  # the scripts that take [--dry-run] CONFIG, with the variables that they need
    "gpu_1x.sh": {},
    "cpu_fake8.sh": {},
    "slurm_gpu.sbatch": {},
    "tpu_pod.sh": {"NAME": "pod", "ZONE": "us-west4-a", "TPU": "v5litepod-16", "NFS": "10.0.0.2:/runs"},
    "gke_xpk.sh": {
        "NAME": "job",
        "ZONE": "us-west4-a",
        "TPU": "v5litepod-16",
        "CLUSTER": "tpus",
        "IMAGE": "img:1",
        "SLICES": "2",
    },
}
OUTSIDE = ("gcloud", "xpk", "srun", "scontrol", "medrlvr", "python3", "git", "mkdir", "sleep")


def command(folder: Path, name: str, text: str) -> None:
    """Write a stand-in command for the PATH. `text`: its Python or shell code."""
    shell = f"#!{shutil.which('bash')}\n" if not text.startswith("import") else f"#!{sys.executable}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(shell + text)
    (folder / name).chmod(0o755)


def launch(
    name: str, *arguments: str, bin: Path, script: Path = LAUNCH, **variables: str
) -> subprocess.CompletedProcess:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "RUNS") and not k.startswith("SLURM")
    }
    env = kept | {"PATH": f"{bin}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", str(script / name), *arguments], env=env, capture_output=True, text=True, timeout=120
    )


# --- form
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", TRAINERS)
def test_the_header_has_command_and_needs(name):
    lines = (LAUNCH / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert re.fullmatch(
        rf"# ([A-Z]+=\S+ )*(bash|sbatch) launch/{name} \[--dry-run\] CONFIG\.yaml \[a\.b=value …\]", lines[1]
    )
    header = [line for line in lines[2:] if line.startswith("# ")]
    assert header[1].startswith("# Needs: ")
    assert [sum(line.startswith(f"# {word}: ") for line in header) for word in ("Variables", "Again")] == [
        1,
        1,
    ]
    assert "set -euo pipefail" in lines
    assert max(map(len, lines)) <= 140


# --- dry runs
# --------------------------------------------------------------------------------------------------------

CONFIG = ("configs/quickstart.yaml", "steps=1", "data.path=a b")
DRY = {
    "gpu_1x.sh": [
        r"ensure_venv .\[cuda\]",
        r"env XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 XLA_FLAGS=--xla_gpu_dot_merger_threshold_mb=0 "
        r"medrlvr train configs/quickstart.yaml runs=runs steps=1 data.path=a\ b",
    ],
    "cpu_fake8.sh": [
        "ensure_venv .",
        "env JAX_PLATFORMS=cpu PJRT_NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=8 "
        r"medrlvr train configs/quickstart.yaml runs=runs steps=1 data.path=a\ b",
    ],
    "slurm_gpu.sbatch": [
        "source .venv/bin/activate",
        "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        "export XLA_FLAGS=--xla_gpu_dot_merger_threshold_mb=0",
        "srun --kill-on-bad-exit=1 --cpus-per-task=8 "
        r"medrlvr train --distributed configs/quickstart.yaml runs=runs mesh.slices=2 steps=1 data.path=a\ b",
    ],
    "tpu_pod.sh": [
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-west4-a --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite",
        "wait_until_active",
        "mkdir -p .cache",
        "git archive --format=tar.gz --prefix=medrlvr_jax/ --output=.cache/medrlvr_jax.tar.gz HEAD",
        "gcloud compute tpus tpu-vm scp .cache/medrlvr_jax.tar.gz pod: --zone=us-west4-a --worker=all",
        "gcloud compute tpus tpu-vm ssh pod --zone=us-west4-a --worker=all --command="
        "bash <(tar xzOf medrlvr_jax.tar.gz medrlvr_jax/launch/tpu_worker.sh) "
        r"/mnt/runs 10.0.0.2:/runs train --distributed configs/quickstart.yaml runs=/mnt/runs steps=1 data.path=a\ b",
    ],
    "gke_xpk.sh": [
        "xpk workload delete --workload=job --cluster=tpus --zone=us-west4-a",
        "xpk workload create --workload=job --cluster=tpus --zone=us-west4-a --tpu-type=v5litepod-16 --num-slices=2 --docker-image=img:1 "
        r"--command=exec medrlvr train --distributed configs/quickstart.yaml runs=/runs mesh.slices=2 steps=1 data.path=a\ b "
        "--max-restarts=100 --restart-on-exit-codes=1 --termination-grace-period-seconds=300",
    ],
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_dry_run_prints_the_commands_and_runs_none(name, tmp_path):
    for program in OUTSIDE:
        command(tmp_path / "bin", program, f"echo {program} $* >>{tmp_path}/called")
    done = launch(name, "--dry-run", *CONFIG, bin=tmp_path / "bin", XLA_FLAGS="", **TRAINERS[name])
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("+ ") for line in done.stdout.splitlines()]
    if name in ("tpu_pod.sh", "gke_xpk.sh"):  # one argument holds a command line: unquote once
        lines = [re.sub(r"\\(.)", r"\1", line) for line in lines]
    assert lines == DRY[name]
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert called in ("", "git cat-file -e HEAD:configs/quickstart.yaml\n")  # which only looks


@pytest.mark.parametrize("name", TRAINERS)
def test_without_a_config_the_usage_is_shown(name, tmp_path):
    done = launch(name, "--dry-run", bin=tmp_path, **TRAINERS[name])
    assert done.returncode != 0 and f"launch/{name} [--dry-run] CONFIG.yaml" in done.stderr


# --- SLURM
# -----------------------------------------------------------------------------------------------------------

SRUN = """import os, subprocess, sys
words = [w for w in sys.argv[1:]]
while words[0].startswith("-"):
    words.pop(0)
n, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
step = {"SLURM_STEP_NODELIST": "localhost,node[2-4]", "SLURM_STEP_NUM_NODES": str(n // per_node)}
tasks = [
    subprocess.Popen(words, env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % per_node)}) for i in range(n)
]
sys.exit(max(t.wait() for t in tasks))
"""
MEDRLVR = """import jax, json, os, sys
jax.distributed.initialize()
from jax._src.distributed import global_state
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
seen = [jax.process_index(), jax.process_count(), global_state.coordinator_address, CUDA_VISIBLE_DEVICES.value]
open(f"seen-{jax.process_index()}.json", "w").write(json.dumps([*seen, sys.argv[1:]]))
sys.exit(int(os.environ["STATUS"]))
"""


def free_job() -> int:
    """Return a job number whose port (in SlurmCluster: 61,440 + number modulo 4,096) is free."""
    for job in range(7000 + os.getpid() % 1000, 12000):
        with socket.socket(socket.AF_INET6) as s:
            if s.connect_ex(("::1", job % 4096 + 61440)):
                return job
    raise RuntimeError("no free port")


@pytest.mark.parametrize("per_node, status, devices", [(2, 0, ["0", "1"]), (1, 143, ["0,1,2,3", "0,1,2,3"])])
def test_slurm_tasks_find_each_other(tmp_path, per_node, status, devices):
    """Two real processes connect. A task per GPU takes the GPU of its number, a task per node all of them. A
    stopped run is requeued.
    """
    (tmp_path / "launch").symlink_to(LAUNCH)
    command(tmp_path / ".venv" / "bin", "activate", "")
    command(tmp_path / "bin", "srun", SRUN)
    command(tmp_path / "bin", "medrlvr", MEDRLVR)
    command(tmp_path / "bin", "scontrol", f"echo $* >>{tmp_path}/requeued")
    job = free_job()
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(job),
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": str(per_node),
    }
    slurm |= {"SLURM_JOB_NUM_NODES": str(2 // per_node), "SLURM_GPUS_ON_NODE": "4"}
    done = launch(
        "slurm_gpu.sbatch",
        "c.yaml",
        "steps=1",
        bin=tmp_path / "bin",
        STATUS=str(status),
        RUNS="/share/runs",
        **slurm,
    )
    assert done.returncode == status, done.stderr
    words = [
        "train",
        "--distributed",
        "c.yaml",
        "runs=/share/runs",
        f"mesh.slices={2 // per_node}",
        "steps=1",
    ]
    where = f"localhost:{job % 4096 + 61440}"
    for i in (0, 1):
        assert json.loads((tmp_path / f"seen-{i}.json").read_text()) == [i, 2, where, devices[i], words]
    requeued = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert requeued == (f"requeue {job}\n" if status == 143 else "")


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[07-08]", "gpu07"), ("gpu[3,7-9],h1", "gpu3"), ("a1,b[1-2]", "a1"), ("solo", "solo")],
)
def test_slurm_coordinator_is_the_first_node(monkeypatch, nodes, first):
    values = {"JOB_ID": "5000", "NTASKS": "2", "PROCID": "1", "LOCALID": "0", "STEP_NODELIST": nodes}
    for key, value in values.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert SlurmCluster.is_env_present()
    assert SlurmCluster.get_coordinator_address(None, None) == f"{first}:{5000 % 4096 + 61440}"
    assert (
        SlurmCluster.get_process_count(),
        SlurmCluster.get_process_id(),
        SlurmCluster.get_local_process_id(),
    ) == (2, 1, 0)


# --- Cloud TPU
# -------------------------------------------------------------------------------------------------------

GCLOUD = """import os, subprocess, sys
from pathlib import Path
here, words = Path(os.environ["CLOUD"]), sys.argv[3:]
log = open(here / "log", "a"); print(" ".join(words[:2]), file=log)
states = (here / "states").read_text().split() if (here / "states").exists() else []
if words[1] == "describe":
    if not states:
        sys.exit("NOT_FOUND")
    print(states[0])
    (here / "states").write_text(" ".join(states[1:] or states))
elif words[1] == "create":
    (here / "states").write_text("ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif words[1] == "delete":
    (here / "states").unlink()
elif words[1] == "scp":
    for worker in ("w0", "w1"):
        subprocess.run(["cp", words[2], here / worker], check=True)
else:
    line = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
    workers = [subprocess.Popen(["bash", "-c", line], env=os.environ | {"HOME": str(here / w)}, cwd=here / w) for w in ("w0", "w1")]
    sys.exit(max(w.wait() for w in workers))
"""
UV = """mkdir -p .venv/bin
cp "$HOME"/../bin/true .venv/bin/python
echo >.venv/bin/activate
"""


@pytest.fixture
def cloud(tmp_path):
    """Make a project with two workers. Their `medrlvr` appends its arguments to ~/ran, and waits while ~/busy
    exists.
    """
    for worker in ("w0", "w1"):
        command(tmp_path / worker / ".local" / "bin", "uv", UV)
    for name in ("true", "sleep", "python"):
        command(tmp_path / "bin", name, "exit 0")
    command(tmp_path / "bin", "gcloud", GCLOUD)
    train = f"""echo "$@" >>~/ran
        echo begun
        trap "rm -f ~/busy" TERM
        while [[ -e ~/busy ]]; do {shutil.which("sleep")} 0.05; done
        echo done
        exit $(cat ~/status)"""
    command(tmp_path / "bin", "medrlvr", train)
    for worker in ("w0", "w1"):
        (tmp_path / worker / "status").write_text("0")

    def launch_pod() -> subprocess.CompletedProcess:
        (tmp_path / "log").write_text("")
        variables = TRAINERS["tpu_pod.sh"] | {"NFS": "", "RUNS": "/share", "CLOUD": str(tmp_path)}
        return launch("tpu_pod.sh", "configs/quickstart.yaml", "steps=1", bin=tmp_path / "bin", **variables)

    return tmp_path, launch_pod


def asked(cloud: Path) -> list[str]:
    return [line.split()[1] for line in (cloud / "log").read_text().splitlines() if "describe" not in line]


def test_tpu_pod_is_made_once_and_trains_on_every_worker(cloud):
    here, launch_pod = cloud
    words = "train --distributed configs/quickstart.yaml runs=/share steps=1\n"
    first = launch_pod()
    assert first.returncode == 0, first.stderr
    assert asked(here) == ["create", "scp", "ssh"]
    assert "WAITING_FOR_RESOURCES" in first.stdout and first.stdout.count("done") == 2
    assert [(here / w / "ran").read_text() for w in ("w0", "w1")] == [words] * 2
    assert (here / "w0" / "medrlvr_jax" / "configs" / "quickstart.yaml").exists()

    (here / "w1" / "status").write_text("1")  # again: no new slice; one worker fails, and so does the command
    assert launch_pod().returncode == 1
    assert asked(here) == ["scp", "ssh"]
    assert (here / "w0" / "ran").read_text() == words * 2

    (here / "states").write_text("SUSPENDED")  # preempted
    (here / "w1" / "status").write_text("0")
    assert launch_pod().returncode == 0
    assert asked(here) == ["delete", "create", "scp", "ssh"]

    (here / "states").write_text("PROVISIONING FAILED")
    failed = launch_pod()
    assert failed.returncode == 1 and "pod: FAILED" in failed.stdout
    assert asked(here) == []


def test_a_running_tpu_training_is_followed_and_a_stopped_one_returns_its_status(cloud):
    home = cloud[0] / "w0"
    (home / "busy").touch()
    (home / "status").write_text("143")
    env = os.environ | {"HOME": str(home), "PATH": f"{cloud[0] / 'bin'}:{os.environ['PATH']}"}
    env.pop("VIRTUAL_ENV", None)
    archive = [
        "git",
        "archive",
        "--format=tar.gz",
        "--prefix=medrlvr_jax/",
        f"--output={home}/medrlvr_jax.tar.gz",
        "HEAD",
        "launch",
    ]
    subprocess.run(archive, cwd=ROOT, check=True)
    worker = ["bash", str(LAUNCH / "tpu_worker.sh"), "/share", "", "train", "c.yaml"]
    with subprocess.Popen(worker, env=env, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdout.readline() == "begun\n"
        first.kill()  # the connection breaks
    with subprocess.Popen(worker, env=env, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout and second.stdout.readline() == "begun\n"
        os.killpg(int((home / "medrlvr.pid").read_text()), signal.SIGTERM)  # the header's save and stop
        assert second.stdout.read().endswith("done\n") and second.wait() == 143
    assert (home / "ran").read_text() == "train c.yaml\n"  # started once


def test_quickstart_passes_its_arguments_on(tmp_path):
    bin, called = tmp_path / "bin", tmp_path / "called"
    command(bin, "python", "")  # -m pip: nothing is installed
    command(bin, "medrlvr", f'printf "%s|" "$@" >>{called}\n')
    done = launch("quickstart.sh", "runs=/some where", bin=bin, VIRTUAL_ENV="here")
    assert done.returncode == 0, done.stderr
    assert called.read_text() == "train|configs/quickstart.yaml|runs=/some where|"


def test_nfs_is_mounted_where_the_runs_go(tmp_path):
    done = launch(
        "tpu_pod.sh", "--dry-run", CONFIG[0], "runs=/elsewhere", bin=tmp_path, **TRAINERS["tpu_pod.sh"]
    )
    assert done.returncode == 0 and "tpu_worker.sh) /elsewhere 10.0.0.2:/runs train" in done.stdout.replace(
        "\\", ""
    ), done.stdout


# --- Kubernetes
# ------------------------------------------------------------------------------------------------------

JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int}


def faults(schema: dict, value, path: str = "") -> list[str]:
    """List the fields that a server with `schema` would refuse, and those of which the pruned schema has only
    the name.
    """
    if not schema:
        return [f"{path}: in the CRD, but pruned from jobset_schema.json; put it back"]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not isinstance(value, tuple(TYPES[k] for k in kinds)):
        return [f"{path}: {value!r} is not of type {kinds}"]
    out = (
        [f"{path}: {value!r} is not one of {schema['enum']}"]
        if value not in schema.get("enum", [value])
        else []
    )
    if isinstance(value, int) and value < schema.get("minimum", value):
        out.append(f"{path}: {value} is below {schema['minimum']}")
    if isinstance(value, list):
        return out + [
            f for i, item in enumerate(value) for f in faults(schema["items"], item, f"{path}[{i}]")
        ]
    if isinstance(value, dict) and path != ".metadata":  # which is Kubernetes' own
        out += [f"{path}.{k}: needed" for k in schema.get("required", ()) if k not in value]
        for key, item in value.items():
            known = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            out += [f"{path}.{key}: no such field"] if known is None else faults(known, item, f"{path}.{key}")
    return out


def test_the_jobset_is_valid_for_its_crd():
    schema = json.loads((ROOT / "tests" / "data" / "jobset_schema.json").read_text())
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert faults(schema, JOBSET) == []
    spoilt = json.loads(json.dumps(JOBSET))
    del spoilt["spec"]["failurePolicy"]["rules"][0]["name"]
    job = spoilt["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"] = "4"
    job["template"]["spec"]["terminationGracePeriod"] = 300
    assert [f.split(":")[0].rsplit(".", 1)[1] for f in faults(schema, spoilt)] == [
        "name",
        "parallelism",
        "terminationGracePeriod",
    ]


def test_the_jobset_requests_its_slice_and_has_a_valid_command():
    job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"]
        == job["completions"]
        == across * down // container["resources"]["limits"]["google.com/tpu"]
    )
    assert pod["volumes"][0]["name"] == container["volumeMounts"][0]["name"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    program, verb, flag, path, *overrides = container["command"]
    assert (program, verb, flag) == ("medrlvr", "train", "--distributed")
    assert configs.load(ROOT / path, overrides).runs == container["volumeMounts"][0]["mountPath"]
