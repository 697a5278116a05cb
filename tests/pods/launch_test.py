"""Manifests of every tool: whole, valid in their tool's form, and without secrets."""

import ast
import subprocess

import jsonschema
import pytest
import yaml

from stagecraft import chips
from stagecraft.errors import UserError
from stagecraft.pods import launch
from stagecraft.pods.job import Job, environment
from stagecraft.pods.manifests import TOOLS
from tests.command_line import stagecraft

COMMAND = ("stagecraft", "run", "--config=quickstart:tiny", "--workdir=gs://b/it's")


def job(topology="h200:16", **changes):
    whole = dict(
        name="sft-8b",
        command=COMMAND,
        topology=chips.parse(topology),
        image="registry.example/stagecraft:1",
        environment={"JAX_TRACEBACK_FILTERING": "off"},
        passed=("HF_TOKEN",),
        hosts=("user@a", "b"),
        cluster="pod",
    )
    return Job(**whole | changes)


def words(line):
    """The words that a shell makes of a line."""
    script = f"printf '%s\\n' {line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    return done.stdout.splitlines()


def written(tool, tmp_path, *args, **changes):
    return launch.write(job(*args, **changes), tool, tmp_path / "job").read_text()


def _exactly(required, **optional):
    """An object with these keys and no others."""
    keys = required | optional
    return dict(
        type="object",
        properties=keys,
        required=list(required),
        additionalProperties=False,
    )


_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_ENV = _exactly(
    {"name": _TEXT},
    value=_TEXT,
    valueFrom=_exactly({"secretKeyRef": _exactly({"name": _TEXT, "key": _TEXT})}),
)
_CONTAINER = _exactly(
    {"name": _TEXT, "image": _TEXT},
    command={"type": "array", "items": _TEXT},
    env={"type": "array", "items": _ENV},
    ports={"type": "array", "items": _exactly({"containerPort": _COUNT})},
    resources=_exactly({}, limits={"type": "object"}),
    securityContext=_exactly({}, privileged={"type": "boolean"}),
    volumeMounts={
        "type": "array",
        "items": _exactly({"name": _TEXT, "mountPath": _TEXT}),
    },
)
_POD = _exactly(
    # What a Job's podFailurePolicy asks of its pods.
    {
        "containers": {"type": "array", "items": _CONTAINER},
        "restartPolicy": {"const": "Never"},
    },
    terminationGracePeriodSeconds=_COUNT,
    nodeSelector=_TEXTS,
    tolerations={"type": "array"},
    volumes={"type": "array"},
)
_FAILS = _exactly(
    {"action": {"enum": ["FailJob", "Ignore", "Count", "FailIndex"]}},
    onPodConditions={"type": "array", "items": _exactly({"type": _TEXT}, status=_TEXT)},
)
_JOB = _exactly(
    {"template": _exactly({"spec": _POD})},
    parallelism=_COUNT,
    completions=_COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit=_COUNT,
    podFailurePolicy=_exactly({"rules": {"type": "array", "items": _FAILS}}),
)
_RULE = _exactly(
    {
        "name": {
            "type": "string",
            "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        },
        "action": {
            "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
        },
    },
    onJobFailureReasons={
        "items": {
            "enum": [
                *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
                *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
            ]
        }
    },
    targetReplicatedJobs={"type": "array", "items": _TEXT},
)
# From the references of jobset.x-k8s.io/v1alpha2 and of Kubernetes' Job and Pod: the
# keys that they have and require. Not the CRD itself, which is ten thousand lines.
JOBSET = _exactly(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": _exactly({"name": _TEXT}, annotations=_TEXTS, labels=_TEXTS),
        "spec": _exactly(
            {
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": _exactly(
                        {"name": _TEXT, "template": _exactly({"spec": _JOB})},
                        replicas=_COUNT,
                    ),
                }
            },
            network=_exactly({}, enableDNSHostnames={"type": "boolean"}),
            failurePolicy=_exactly(
                {}, maxRestarts=_COUNT, rules={"type": "array", "items": _RULE}
            ),
        ),
    }
)


@pytest.mark.parametrize("topology", ["v5e:16x16", "2xv5e:16x16", "h200:8", "h200:64"])
def test_gke(topology, tmp_path):
    text = written(
        "gke", tmp_path, topology, volume="runs:/runs", spot=True, restarts=5
    )
    value, t = yaml.safe_load(text), chips.parse(topology)
    jsonschema.validate(value, JOBSET)
    [workers] = value["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert workers["replicas"] * spec["parallelism"] == t.hosts
    assert spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    [chips_of_a_host] = container["resources"]["limits"].values()
    assert chips_of_a_host * t.hosts == t.chips
    assert value["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    *shell, line = container["command"]
    assert shell == ["bash", "-c"] and words(line)[1:5] == list(COMMAND)
    several = "--coordinator=sft-8b-workers-0-0.sft-8b:8476"
    # TPU hosts find each other; one host has none to find.
    assert (several in words(line)) == (topology == "h200:64")


def test_a_key_that_jobset_does_not_have_is_seen():
    value = yaml.safe_load(TOOLS["gke"][0](job()))
    value["spec"]["failurePolicy"]["restarts"] = 3
    with pytest.raises(jsonschema.ValidationError, match="restarts"):
        jsonschema.validate(value, JOBSET)


@pytest.mark.parametrize(
    "tool, topology", [("slurm", "h200:16"), ("ssh", "h200:16"), ("xpk", "v5p:8x8x8")]
)
def test_scripts_parse(tool, topology, tmp_path):
    text = written(tool, tmp_path, topology)
    subprocess.run(["bash", "-n", str(tmp_path / "job")], check=True)
    assert "--config=quickstart:tiny" in text


def test_slurm(tmp_path):
    text = written("slurm", tmp_path, partition="gpu", restarts=2)
    # What a user must put right is not tried again.
    assert '"$status" -ne 2 ]' in text and "-lt 2 ]; then" in text
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nodes=2", "#SBATCH --gres=gpu:8", "#SBATCH --partition=gpu"} <= {
        *options
    }
    # What each task's shell runs, with slurm's own variables.
    run = next(line for line in text.splitlines() if line.startswith("srun"))
    inner = words(run.removeprefix("srun --kill-on-bad-exit=1 "))[2]
    shown = inner.replace("exec ", r"printf '%s\n' ")
    script = f"first=n0 SLURM_PROCID=1; {shown}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    *command, first, process, processes = done.stdout.splitlines()
    assert command == list(COMMAND)
    assert (first, process) == ("--coordinator=n0:8476", "--process=1")
    assert processes == "--processes=2"


def test_ssh_starts_each_host_with_its_number(tmp_path):
    path = launch.write(job(restarts=1), "ssh", tmp_path / "job")
    log, bin_ = tmp_path / "log", tmp_path / "bin"
    bin_.mkdir()
    # In the place of ssh: says what it was asked, and fails on b the first time.
    (bin_ / "ssh").write_text(
        f'#!/bin/bash\necho "$@" >> {log}\n[ -e {log}.again ] && exit 0\n'
        f'case "$*" in *" b "*) for _ in {{1..200}}; do\n'
        f'grep -q "user@a " {log} && break; sleep .05; done\n'
        f"touch {log}.again; exit 7;; esac\nexec sleep 30\n"
    )
    (bin_ / "ssh").chmod(0o755)
    where = {"PATH": f"{bin_}:/usr/bin:/bin", "HF_TOKEN": "unseen"}
    done = subprocess.run(
        [str(path)], env=where, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0 and "attempt 1 ended with status 7" in done.stderr
    lines = log.read_text().splitlines()
    assert len(lines) == 4  # both, twice
    assert all("SendEnv=HF_TOKEN" in line and "unseen" not in line for line in lines)
    assert {line.partition("--process=")[2] for line in lines} == {
        "0 --processes=2",
        "1 --processes=2",
    }
    assert "HF_TOKEN" in written("ssh", tmp_path) and "unseen" not in path.read_text()


def test_xpk(tmp_path):
    text = written("xpk", tmp_path, "2xv5e:16x16")
    assert "--tpu-type=v5litepod-256" in text and "--num-slices=2" in text
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "xpk").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    (bin_ / "xpk").chmod(0o755)
    where = {"PATH": f"{bin_}:/usr/bin:/bin", "HF_TOKEN": "from outside"}
    done = subprocess.run(
        [str(tmp_path / "job")], env=where, capture_output=True, text=True, check=True
    )
    asked = done.stdout.splitlines()
    assert "HF_TOKEN=from outside" in asked and asked[:2] == ["workload", "create"]
    assert words(asked[asked.index("--command") + 1]) == list(COMMAND)
    where.pop("HF_TOKEN")
    done = subprocess.run([str(tmp_path / "job")], env=where, capture_output=True)
    assert done.returncode and b"HF_TOKEN" in done.stderr


def test_skypilot(tmp_path):
    task = yaml.safe_load(written("skypilot", tmp_path))
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H200:8"
    assert task["secrets"] == {"HF_TOKEN": None}
    script = f'SKYPILOT_NODE_IPS=$"ip0\\nip1" SKYPILOT_NODE_RANK=1\n{task["run"]}'
    script = script.replace('$"ip0\\nip1"', "$'ip0\\nip1'")
    assert "--processes=2" in task["run"]
    shown = script.replace("stagecraft run", "printf '%s\\n' stagecraft run", 1)
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True)
    assert done.stdout.splitlines()[-3:-1] == ["--coordinator=ip0:8476", "--process=1"]
    tpu = yaml.safe_load(written("skypilot", tmp_path, "v6e:16x16"))
    assert tpu["resources"]["accelerators"] == "tpu-v6e-256:1" and tpu["num_nodes"] == 1
    with pytest.raises(UserError, match="one slice"):
        TOOLS["skypilot"][0](job("2xv5e:16x16"))


def test_ray(tmp_path):
    tree = ast.parse(written("ray", tmp_path, restarts=2))
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target, names = node.targets[0], None
            names = [e.id for e in getattr(target, "elts", [target])]
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            values |= dict(
                zip(names, value if len(names) > 1 else [value], strict=True)
            )
    assert values["COMMAND"] == list(COMMAND)
    assert (values["HOSTS"], values["RESTARTS"]) == (2, 2)
    assert values["RESOURCES"] == {"CPU": 1, "GPU": 8} and values["PASSED"] == [
        "HF_TOKEN"
    ]


SECRET = "hf_" + "a1B2c3D4e5" * 3


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "changes",
    [
        dict(environment={"ANY": SECRET}),
        dict(environment={"WANDB_API_KEY": "short"}),
        dict(environment={"A": "https://user:word@host/x"}),
        dict(command=(*COMMAND, f"--config.tokenizer.path={SECRET}")),
        dict(image=f"registry/{SECRET}"),
    ],
)
def test_secrets_are_refused(tool, changes, tmp_path):
    topology = "v5e:16x16" if tool == "xpk" else "h200:16"
    with pytest.raises(UserError, match="secret") as refusal:
        launch.write(job(topology, **changes), tool, tmp_path / "job")
    assert SECRET not in str(refusal.value) and not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "tool, changes, says",
    [
        ("gke", dict(image=""), "--image is missing"),
        ("gke", dict(name="Big Job"), "--name="),
        ("gke", dict(passed=("a-b",)), "no name of an environment variable"),
        ("gke", dict(volume="runs"), "expected CLAIM:/PATH"),
        ("ssh", dict(hosts=("a",)), "has 2 hosts, got 1"),
        ("xpk", dict(), "use --on=gke"),
        ("gek", dict(), "did you mean 'gke'"),
    ],
)
def test_what_a_tool_cannot_run_is_refused(tool, changes, says, tmp_path):
    with pytest.raises(UserError, match=says):
        launch.write(job(**changes), tool, tmp_path / "job")


def test_the_command_checks_the_config_first(tmp_path):
    to = tmp_path / "job.sh"
    flags = ["--on=ssh", "--topology=h200:8", "--hosts=a", f"--to={to}"]
    config = ["--config=quickstart:tiny", "--config.seed=3"]
    status, out, _ = stagecraft("launch", *config, *flags, "--workdir=/shared/a")
    assert status == 0 and out.strip() == str(to)
    assert (
        "--config=quickstart:tiny --config.seed=3 --workdir=/shared/a" in to.read_text()
    )
    to.unlink()
    wrong = [*config, "--config.mesh.data=3", *flags, "--workdir=/shared/a"]
    status, _, error = stagecraft("launch", *wrong)
    assert status == 2 and "needs 3 devices, but 8 are available" in error
    assert not to.exists()
    status, _, error = stagecraft("launch", *config, *flags)
    assert status == 2 and "--workdir is missing" in error


def test_environment_is_read():
    assert environment("") == ({}, ())
    assert environment("A=1, B ,C=x=y") == ({"A": "1", "C": "x=y"}, ("B",))


def test_submit_needs_its_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="kubectl is not here"):
        launch.submit(job(), "gke", tmp_path / "job")
