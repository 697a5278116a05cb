"""Jobs as the tools of clusters spell them: one function a tool, (job) -> text.

JobSet: jobset.sigs.k8s.io's reference of v1alpha2 and GKE's pages on TPU slices; xpk,
SkyPilot, Ray and slurm: their own documentation. TPU hosts find each other by what
their platform tells JAX; others are told by --coordinator, --process and --processes.
"""

import json
import shlex

import yaml

from stagecraft.errors import UserError
from stagecraft.pods.job import Job

# Cloud TPU's names count chips, those of v5p and tpu7x TensorCores.
_TPU_TYPES = {
    "v5e": ("v5litepod", 1),
    "v6e": ("v6e", 1),
    "v5p": ("v5p", 2),
    "tpu7x": ("tpu7x", 2),
}


def tpu_type(job: Job) -> str:
    """Returns Cloud TPU's name of one slice: v5litepod-256."""
    name, cores = _TPU_TYPES[job.topology.chip.name]
    return f"{name}-{job.topology.chips // job.topology.slices * cores}"


def _on_tpu(job):
    return job.topology.chip.platform == "tpu"


def _dump(value, *comments):
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.safe_dump(value, sort_keys=False, width=1000)


def gke(job: Job) -> str:
    """A JobSet: one Job a slice, one pod a host; preemptions restart it uncounted."""
    _needs_image(job, "gke")
    hosts = job.topology.hosts // job.topology.slices
    # A pod that its node took down fails the Job by this rule, and the JobSet restarts
    # without counting it.
    disrupted = {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget"}],
    }
    preempted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    spec = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [disrupted]},
        "template": {"spec": _gke_pod(job)},
    }
    workers = {
        "name": "workers",
        "replicas": job.topology.slices,
        "template": {"spec": spec},
    }
    metadata = {"name": job.name}
    if _on_tpu(job):
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    value = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [preempted]},
            "replicatedJobs": [workers],
        },
    }
    comments = ["kubectl apply -f THIS_FILE"]
    if job.passed:
        names = " ".join(f'--from-literal={n}="${n}"' for n in job.passed)
        comments.append(f"before: kubectl create secret generic {job.name}-env {names}")
    return _dump(value, *comments)


def _gke_pod(job):
    """Returns the spec of the pod of one host."""
    container = {
        "name": "run",
        "image": job.image,
        "command": ["bash", "-c", _gke_command(job)],
        "env": _gke_environment(job),
        "ports": [{"containerPort": job.port}],
        "resources": {"limits": _gke_limits(job)},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": _gke_nodes(job),
        "containers": [container],
    }
    if _on_tpu(job):
        container["ports"].append({"containerPort": 8471})  # of libtpu
        container["securityContext"] = {"privileged": True}
    else:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    if job.volume:
        claim, _, path = job.volume.partition(":")
        container["volumeMounts"] = [{"name": "storage", "mountPath": path}]
        source = {"claimName": claim}
        pod["volumes"] = [{"name": "storage", "persistentVolumeClaim": source}]
    return pod


def _needs_image(job, tool):
    if not job.image:
        raise UserError(
            f"--image is missing: --on={tool} runs containers; build one from "
            "docs/containers and push it where the cluster pulls from"
        )


def _gke_command(job):
    if _on_tpu(job):
        return f"exec {job.line()}"
    first = f"{job.name}-workers-0-0.{job.name}"
    return f"exec {job.numbered(first, '$JOB_COMPLETION_INDEX')}"


def _gke_environment(job):
    env = [{"name": n, "value": v} for n, v in job.environment.items()]
    for name in job.passed:
        source = {"secretKeyRef": {"name": f"{job.name}-env", "key": name}}
        env.append({"name": name, "valueFrom": source})
    return env


def _gke_limits(job):
    resource = "google.com/tpu" if _on_tpu(job) else "nvidia.com/gpu"
    return {resource: job.topology.host_chips}


def _gke_nodes(job):
    chip, nodes = job.topology.chip, {}
    if _on_tpu(job):
        nodes["cloud.google.com/gke-tpu-accelerator"] = chip.accelerator
        shape = "x".join(map(str, job.topology.shape))
        nodes["cloud.google.com/gke-tpu-topology"] = shape
    else:
        nodes["cloud.google.com/gke-accelerator"] = chip.accelerator
    if job.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
    return nodes


def xpk(job: Job) -> str:
    """A script of one xpk command, for TPU slices on a cluster that xpk made."""
    _needs_image(job, "xpk")
    if not _on_tpu(job):
        raise UserError(
            f"--on=xpk: starts TPU slices here, not {job.topology.name}; use --on=gke"
        )
    if not job.cluster:
        raise UserError("--cluster is missing: the name of the cluster that xpk made")
    words = [
        "xpk workload create",
        f"--cluster={shlex.quote(job.cluster)}",
        f"--workload={job.name}",
        f"--tpu-type={tpu_type(job)}",
        f"--num-slices={job.topology.slices}",
        f"--docker-image={shlex.quote(job.image)}",
        f"--max-restarts={job.restarts}",
        f"--termination-grace-period-seconds={job.grace}",
    ]
    words += [f"--env {shlex.quote(f'{n}={v}')}" for n, v in job.environment.items()]
    # Expanded where this script runs: the values are in no file.
    words += [f'--env "{name}=${{{name}:?}}"' for name in job.passed]
    words.append(f"--command {shlex.quote(job.line())}")
    body = " \\\n  ".join(words)
    return f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n"


def slurm(job: Job) -> str:
    """An sbatch script, one task a host; it requeues itself, as often as it may."""
    if _on_tpu(job):
        raise UserError(
            f"--on=slurm: has GPUs, not {job.topology.name}; use --on=gke or xpk"
        )
    options = {
        "job-name": job.name,
        "nodes": job.topology.hosts,
        "ntasks-per-node": 1,
        "gres": f"gpu:{job.topology.host_chips}",
        "partition": job.partition,
        "signal": f"TERM@{job.grace}",
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
        "exclusive": None,
        "requeue": None,
    }
    lines = ["#!/usr/bin/env bash"]
    for key, value in options.items():
        if value != "":
            lines.append(
                f"#SBATCH --{key}" + (f"={value}" if value is not None else "")
            )
    lines += [
        "# sbatch passes the environment it is called in on to the job.",
        "set -uo pipefail",
        *(f': "${{{name}:?}}"' for name in job.passed),
        *(f"export {n}={shlex.quote(v)}" for n, v in job.environment.items()),
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export first",
    ]
    run = job.numbered("$first", "$SLURM_PROCID")
    lines += [
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(f'exec {run}')}",
        "status=$?",
        "# 2 is what a user can put right: another try would end the same.",
        'if [ "$status" -ne 0 ] && [ "$status" -ne 2 ] \\',
        f'  && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


_RAY = '''"""ray job submit --working-dir . -- python THIS_FILE"""

import os
import socket
import subprocess

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

HOSTS, PORT, RESTARTS = {hosts}, {port}, {restarts}
COMMAND = {command}
RESOURCES = {resources}
ENVIRONMENT = {environment}
# Passed on from where the job is submitted; their values are in no file.
PASSED = {passed}

ray.init()
environment = ENVIRONMENT | {{name: os.environ[name] for name in PASSED}}
group = placement_group([RESOURCES] * HOSTS, strategy="{strategy}")
ray.get(group.ready())


def on(index):
    """Options of a task on one host of the group."""
    place = PlacementGroupSchedulingStrategy(group, index)
    more = {{k: v for k, v in RESOURCES.items() if k not in ("CPU", "GPU")}}
    cpus, gpus = RESOURCES["CPU"], RESOURCES.get("GPU", 0)
    return dict(
        scheduling_strategy=place, num_cpus=cpus, num_gpus=gpus, resources=more
    )


@ray.remote
def address():
    return ray.util.get_node_ip_address()


@ray.remote(max_retries=0)
def run(process, coordinator):
    words = list(COMMAND)
    if HOSTS > 1:
        words += [f"--coordinator={{coordinator}}:{{PORT}}"]
        words += [f"--process={{process}}", f"--processes={{HOSTS}}"]
    done = subprocess.run(words, env=os.environ | environment)
    if done.returncode:
        host = socket.gethostname()
        raise RuntimeError(f"process {{process}} on {{host}}: exit {{done.returncode}}")


coordinator = ray.get(address.options(**on(0)).remote())
for attempt in range(RESTARTS + 1):
    tasks = [run.options(**on(i)).remote(i, coordinator) for i in range(HOSTS)]
    try:
        ray.get(tasks)
        break
    except ray.exceptions.RayError as error:
        # The others have ended by themselves, or are ended here.
        for task in tasks:
            ray.cancel(task, force=True)
        print(f"attempt {{attempt + 1}}: {{error}}", flush=True)
        if attempt == RESTARTS:
            raise
'''


def ray(job: Job) -> str:
    """A Ray job: a script that starts one task on each host of a placement group."""
    chips, resources = job.topology.host_chips, {"CPU": 1}
    resources["TPU" if _on_tpu(job) else "GPU"] = chips
    return _RAY.format(
        hosts=job.topology.hosts,
        port=job.port,
        restarts=job.restarts,
        command=json.dumps(list(job.command), indent=4),
        resources=json.dumps(resources),
        environment=json.dumps(job.environment),
        passed=json.dumps(list(job.passed)),
        strategy="STRICT_SPREAD",
    )


def skypilot(job: Job) -> str:
    """SkyPilot's task; a managed job (sky jobs launch) recovers from preemption."""
    resources = {"use_spot": job.spot}
    if _on_tpu(job):
        if job.topology.slices > 1:
            raise UserError(
                f"--on=skypilot: starts one slice, not {job.topology.name}; use gke"
            )
        kind = tpu_type(job)
        resources |= {"accelerators": f"tpu-{kind}:1", "cloud": "gcp"}
        run, nodes = job.line(), 1
    else:
        chip = job.topology.chip.name.upper()
        resources["accelerators"] = f"{chip}:{job.topology.host_chips}"
        first = '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)'
        run, nodes = job.numbered(first, "$SKYPILOT_NODE_RANK"), job.topology.hosts
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    resources["job_recovery"] = {"max_restarts_on_errors": job.restarts}
    task = {"name": job.name, "resources": resources, "num_nodes": nodes}
    if job.environment:
        task["envs"] = dict(job.environment)
    if job.passed:  # null: set by --secret, or refused
        task["secrets"] = dict.fromkeys(job.passed)
    task["run"] = f"{run}\n"
    secrets = "".join(f" --secret {name}" for name in job.passed)
    return _dump(task, f"sky jobs launch THIS_FILE{secrets}")


def ssh(job: Job) -> str:
    """A loop over machines that have the package: all end when one ends badly."""
    count = job.topology.hosts
    if len(job.hosts) != count:
        raise UserError(
            f"--hosts: {job.topology.name} has {count} hosts, got {len(job.hosts)}"
        )
    send = f" -o SendEnv={','.join(job.passed)}" if job.passed else ""
    values = " ".join(f"{n}={shlex.quote(v)}" for n, v in job.environment.items())
    run = job.numbered(job.hosts[0].rpartition("@")[2], "PROCESS")
    prefix = f"env {values} " if values else ""
    return f"""#!/usr/bin/env bash
# One process on each machine; -tt ends them with this script.
set -uo pipefail
hosts=({" ".join(map(shlex.quote, job.hosts))})
command={shlex.quote(prefix + run)}
{"".join(f': "${{{name}:?}}"' + chr(10) for name in job.passed)}\
pids=()
end() {{ kill "${{pids[@]}}" 2> /dev/null; wait; }}
trap 'end; exit 143' INT TERM
status=1
for attempt in $(seq 0 {job.restarts}); do
  pids=()
  for i in "${{!hosts[@]}}"; do
    ssh -tt -o BatchMode=yes{send} "${{hosts[$i]}}" "${{command/PROCESS/$i}}" &
    pids+=($!)
  done
  status=0
  for _ in "${{pids[@]}}"; do
    wait -n || {{ status=$?; break; }}
  done
  end
  [ "$status" -eq 0 ] && break
  echo "attempt $((attempt + 1)) ended with status $status" >&2
done
exit "$status"
"""


# tool: (function, ending of its file, what submits it).
TOOLS = {
    "gke": (gke, "yaml", ("kubectl", "apply", "-f")),
    "xpk": (xpk, "sh", ("bash",)),
    "slurm": (slurm, "sbatch", ("sbatch",)),
    "ray": (
        ray,
        "py",
        ("ray", "job", "submit", "--working-dir", ".", "--", "python"),
    ),
    "skypilot": (skypilot, "yaml", ("sky", "jobs", "launch", "--yes")),
    "ssh": (ssh, "sh", ("bash",)),
}
