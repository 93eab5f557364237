"""Several real nodes: learner, engines and services on separate ones; one node is lost, and one joins."""

import os
import signal
import tempfile

import pytest
from ray.cluster_utils import Cluster
from runs import SHORT_PRETRAINING, Run, descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 40  # half a second each, so that some are left when a new engine has started


@pytest.fixture
def cluster(monkeypatch):
    # This process chose its mode when it imported Ray, and its nodes must agree with it.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Otherwise this cluster would be the machine's newest, and other runs on the machine would query it instead of
    # their own. The path is short because sockets are made below it.
    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="nodes-"))
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"service": 1}})
    yield cluster
    cluster.shutdown()


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


def titles_below(node):
    return " ".join(args for _, _, args in descendants(raylet(node)))


def test_a_run_outlives_the_loss_of_its_rollout_node(cluster, tmp_path):
    learner = cluster.add_node(num_cpus=2, resources={"learner": 2})
    rollout = cluster.add_node(num_cpus=1, resources={"rollout": 1})
    groups = ["--cluster.address", cluster.address, "--cluster.learner-group", "learner", "--cluster.rollout-group",
              "rollout", "--cluster.service-group", "service"]  # fmt: skip
    short = ["--rl.max-steps", str(STEPS), "--rl.prompts-per-step", "16", "--rl.eval-problems", "32",
             "--rl.eval-every", "0"]  # fmt: skip
    run = Run("rl_math", tmp_path, *SHORT_PRETRAINING, *short, *groups)
    try:
        run.wait_for_step("reward/mean", 2)
        assert "ray::RayTrainWorker" in titles_below(learner)
        assert "ray::RolloutWorker" in titles_below(rollout)
        assert "ray::Controller" in titles_below(cluster.head_node)
        assert "ray::RolloutWorker" not in titles_below(learner) + titles_below(cluster.head_node)
        # When a machine is lost, all of its processes end at once, without a message.
        for pid in [raylet(rollout), *(pid for pid, _, _ in descendants(raylet(rollout)))]:
            os.kill(pid, signal.SIGKILL)
        cluster.remove_node(rollout, allow_graceful=False)
        newcomer = cluster.add_node(num_cpus=1, resources={"rollout": 1})
        run.wait_for_step("rollout/worker_losses", max(run.series("reward/mean")) + 3)
        assert "ray::RolloutWorker" in titles_below(newcomer)
        run.finish()
    finally:
        run.end()
    assert max(run.series("rollout/worker_losses").values()) == 1
    assert sorted(run.series("reward/mean")) == list(range(1, STEPS + 1))
