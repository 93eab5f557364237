"""The files of cluster/ and docker/, against the schemas of those who read them.

KubeRay's own fields are listed here, with their types, as its custom resource definitions (ray.io/v1) have them; what
lies in pods and services is checked by Kubernetes' schemas, strictly: an unknown field is an error.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cola_ray.settings.config import ClusterConfig

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.34"


def closed(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
TEXT, YES, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
POD = {"type": "object", "required": ["spec"]}  # Kubernetes' own, checked apart
HEAD = closed(["template"], serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, headService={},
              enableIngress=YES, rayStartParams=TEXTS, resources=TEXTS, labels=TEXTS, template=POD)  # fmt: skip
WORKERS = closed(["groupName", "maxReplicas", "minReplicas", "template"], groupName=TEXT, replicas=NUMBER,
                 minReplicas=NUMBER, maxReplicas=NUMBER, numOfHosts=NUMBER, idleTimeoutSeconds=NUMBER, suspend=YES,
                 rayStartParams=TEXTS, resources=TEXTS, labels=TEXTS, scaleStrategy={}, template=POD)  # fmt: skip
CLUSTER = closed(["headGroupSpec"], rayVersion=TEXT, enableInTreeAutoscaling=YES, autoscalerOptions={}, suspend=YES,
                 headServiceAnnotations=TEXTS, gcsFaultToleranceOptions={}, managedBy=TEXT, headGroupSpec=HEAD,
                 authOptions=closed(mode={"enum": ["disabled", "token"]}, enableK8sTokenAuth=YES),
                 workerGroupSpecs={"type": "array", "items": WORKERS})  # fmt: skip
JOB = closed([], activeDeadlineSeconds=NUMBER, backoffLimit=NUMBER, clusterSelector=TEXTS, entrypoint=TEXT,
             entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=TEXT,
             jobId=TEXT, managedBy=TEXT, metadata=TEXTS, rayClusterSpec=CLUSTER, runtimeEnvYAML=TEXT,
             shutdownAfterJobFinishes=YES, submitterConfig={}, submitterPodTemplate=POD, suspend=YES,
             submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
             ttlSecondsAfterFinished=NUMBER, deletionStrategy={})  # fmt: skip
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}


def documents(name):
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


@functools.cache
def cluster():
    return next(one for one in documents("raycluster.yaml") if one["kind"] == "RayCluster")


def groups():
    return [cluster()["spec"]["headGroupSpec"], *cluster()["spec"]["workerGroupSpecs"]]


def check_pod(template):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-a-group"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_manifests(name):
    for document in documents(name):
        if document["kind"] in SPECS:
            assert document["apiVersion"] == "ray.io/v1"
            jsonschema.validate(document["spec"], SPECS[document["kind"]])
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_pods_of_all_groups():
    for group in groups():
        check_pod(group["template"])


def test_a_slip_in_a_pod_or_a_group_is_seen():
    broken = json.loads(json.dumps(groups()[1]))
    broken["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(broken["template"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(groups()[1] | {"maxReplica": 3}, WORKERS)


def test_authentication_is_on_and_nothing_runs_as_root():
    assert cluster()["spec"]["authOptions"]["mode"] == "token"
    for group in groups():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not any(container["securityContext"]["allowPrivilegeEscalation"] for container in pod["containers"])


def heads():
    """Every way that a head is started in these files, as the words behind ``ray start --head``."""
    params = cluster()["spec"]["headGroupSpec"]["rayStartParams"]
    found = {"raycluster.yaml": [f"--{name}={value}" for name, value in params.items()]}
    for name in ("launcher.yaml", "slurm.sh"):
        text = (ROOT / "cluster" / name).read_text()
        lines = [line for line in text.splitlines() if "--head" in line and not line.lstrip().startswith("#")]
        assert lines, name
        found |= {f"{name} {i}": line.split() for i, line in enumerate(lines)}
    return found


def test_no_dashboard_answers_without_a_token():
    """One that is bound to more than the loopback is behind a token, and so are the ports that have no host."""
    for name, words in heads().items():
        hosts = [word.partition("=")[2] for word in words if word.startswith("--dashboard-host")]
        assert name == "raycluster.yaml" or set(hosts) <= {"127.0.0.1"}, name
    launcher = yaml.safe_load((ROOT / "cluster" / "launcher.yaml").read_text())
    options = launcher["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert "--env RAY_AUTH_TOKEN" in options, "its value is the caller's"
    slurm = (ROOT / "cluster" / "slurm.sh").read_text()
    assert re.search(r"^RAY_AUTH_MODE=token$", slurm, re.MULTILINE)
    assert re.search(r"^export RAY_AUTH_MODE RAY_AUTH_TOKEN$", slurm, re.MULTILINE)
    assert slurm.index("export RAY_AUTH_MODE") < slurm.index("ray start --block")


def test_the_pinned_ray_asks_for_the_token_on_its_dashboard(monkeypatch):
    import asyncio

    import aiohttp.web
    from ray._private.authentication import authentication_utils
    from ray._private.authentication.http_token_authentication import get_token_auth_middleware

    monkeypatch.setattr(authentication_utils, "is_token_auth_enabled", lambda: True)
    asked = type("Request", (), {"path": "/api/jobs/", "headers": {}, "cookies": {}})()

    async def answer(_):
        return aiohttp.web.Response(status=200)

    done = asyncio.run(get_token_auth_middleware(aiohttp)(asked, answer))
    assert done.status == 401


def test_nothing_outside_the_cluster_reaches_its_ports():
    (policy,) = [one for one in documents("raycluster.yaml") if one["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": cluster()["metadata"]["name"]}
    opened = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert opened == [[{"port": 8080}]], "metrics alone"
    submitters = [
        one["podSelector"]["matchLabels"] for rule in policy["spec"]["ingress"] for one in rule.get("from", ())
    ]
    job = documents("rayjob.yaml")[0]["metadata"]["name"]
    assert {"batch.kubernetes.io/job-name": job} in submitters


def test_the_job_names_groups_that_the_cluster_has():
    offered = {
        name
        for group in cluster()["spec"]["workerGroupSpecs"]
        for name in json.loads(json.loads(group["rayStartParams"]["resources"]))
    }
    entrypoint = documents("rayjob.yaml")[0]["spec"]["entrypoint"]
    named = dict(re.findall(r"--cluster\.(\w+)-group (\w+)", entrypoint))
    assert set(named) == {field.removesuffix("_group") for field in ClusterConfig.model_fields if "_group" in field}
    assert set(named.values()) == offered


def test_the_job_asks_for_no_more_than_there_is():
    entrypoint = documents("rayjob.yaml")[0]["spec"]["entrypoint"]
    asked = {
        "learner": int(re.search(r"--cluster.learner-ranks (\d+)", entrypoint)[1]),
        "rollout": int(re.search(r"--rollout.num-workers (\d+)", entrypoint)[1]),
    }
    for group in cluster()["spec"]["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) * group["replicas"]
        assert asked.get(group["groupName"], 0) <= gpus


def test_the_entrypoint_is_a_command_line_that_the_job_takes():
    words = documents("rayjob.yaml")[0]["spec"]["entrypoint"].split()
    from cola_ray.cli.arguments import from_command_line

    flags = [word for word in words[2:] if word != "/results/pretrain-llama-3.1-8b/model"]
    flags.remove("--model.path")
    config = from_command_line("plan", flags)
    assert (config.cluster.learner_group, config.resume) == ("learner", True)


def test_launcher():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster" / "launcher.yaml").read_text())
    validate_config(prepare_config(config))


def test_no_secret_stands_in_a_file():
    for path in [*(ROOT / "cluster").iterdir(), *(ROOT / "docker").iterdir()]:
        assert not re.search(r"hf_[A-Za-z0-9]{20}|sk-[A-Za-z0-9]{20}|AKIA[A-Z0-9]{16}", path.read_text()), path


def test_grafana_asks_for_metrics_that_are_documented():
    board = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    documented = (ROOT / "docs" / "metrics.md").read_text()
    documented = {re.sub(r"\W", "_", name) for name in re.findall(r"`([\w/<>]+)`", documented)}
    for panel in board["panels"]:
        for target in panel["targets"]:
            name = re.search(r"ray_cola_ray_(\w+)", target["expr"])[1]
            assert name in documented, name


def test_slurm_script_is_valid_shell():
    subprocess.run(["bash", "-n", ROOT / "cluster" / "slurm.sh"], check=True)


@pytest.mark.parametrize(("nodes", "learner_nodes"), [(2, 1), (5, 2)])
def test_slurm_uses_every_gpu_of_the_allocation(nodes, learner_nodes, tmp_path):
    """The script itself, over commands that write down what they are asked."""
    asked = tmp_path / "asked"
    fakes = {
        "scontrol": f"seq -f node%g 0 {nodes - 1}",
        "srun": f'case "$*" in *hostname*) echo 10.0.0.1;; *) echo "$@" >> {asked};; esac',
        "ray": "exit 0",
        "python": f'case "$*" in *ray.init*) echo {nodes};; *) echo 00ff;; esac',
        "job": f'echo "job $RAY_ADDRESS $@" >> {asked}',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "n",
                   "LEARNER_NODES": str(learner_nodes), "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip
    script = ["bash", ROOT / "cluster" / "slurm.sh", "job", "--preset", "tiny"]
    subprocess.run(script, env=environment, check=True, timeout=30)
    lines = asked.read_text().splitlines()
    started = [line for line in lines if "ray start" in line]
    held = [json.loads(re.search(r"--resources (\{.*?\})", line)[1]) for line in started]
    assert len(started) == nodes
    assert all("--num-gpus 4" in line for line in started)
    (head,) = [line for line in started if "--head" in line]
    assert "node0" in head
    assert {"service": 64, "learner": 4} in held
    for name, count in (("learner", learner_nodes), ("rollout", nodes - learner_nodes)):
        assert sum(one.get(name, 0) for one in held) == 4 * count
    (job,) = [line for line in lines if line.startswith("job")]
    assert job.startswith("job 10.0.0.1:6379 --preset tiny --cluster.learner-group learner")
    few = subprocess.run(script, env=environment | {"LEARNER_NODES": str(nodes)}, capture_output=True, check=False)
    assert few.returncode == 2


def compose():
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def test_image_and_pins_have_one_cuda():
    pinned = re.search(
        r"^cuda-toolkit==(\d+\.\d+\.\d+)", (ROOT / "requirements" / "gpu.txt").read_text(), re.MULTILINE
    )[1]
    named = re.findall(r"nvidia/cuda:(\d+\.\d+\.\d+)-", (ROOT / "docker" / "Dockerfile").read_text())
    composed = re.findall(r"nvidia/cuda:(\d+\.\d+\.\d+)-", json.dumps(compose()))
    assert {*named, *composed} == {pinned}


def test_compose_runs_a_job_on_the_gpus_of_one_machine():
    from cola_ray.cli.arguments import from_command_line

    (service,) = compose()["services"].values()
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert service["volumes"] == ["results:/results"]
    assert set(compose()["volumes"]) == {"results"}
    build = service["build"]
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).is_file()
    arguments = re.findall(r"^ARG (\w+)", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    assert set(build["args"]) <= set(arguments)
    words = service["command"].split()
    assert (ROOT / words[1]).is_file()
    config = from_command_line("plan", words[2:])
    assert config.cluster.use_gpu
    assert config.output_dir.startswith("/results/")
    assert service["cap_drop"] == ["ALL"]


def test_dockerfile_lints():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_takes_what_it_copies():
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    kept = re.findall(r"^!([\w.]+)/?$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} == set(kept)
    assert all((ROOT / name).exists() for name in kept)
