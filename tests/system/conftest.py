"""One short run from nothing, whose start model and curve all system tests share."""

import pytest
from runs import SHORT_PRETRAINING, SHORT_RL, Run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Base, actions, policy and five RL steps; every other run with these settings must have the same curve."""
    run = Run("rl_math", tmp_path_factory.mktemp("run"), *SHORT_PRETRAINING, *SHORT_RL)
    run.finish()
    return run


@pytest.fixture(scope="session")
def model(finished):
    """The model that the short run started RL from."""
    return str(finished.start)
