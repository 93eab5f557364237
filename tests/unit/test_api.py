"""``import cola_ray``: what it offers, how light it is, and the examples of its docstrings."""

import doctest
import importlib
import subprocess
import sys

import pytest

import cola_ray

EXAMPLES = ["cola_ray.cli", "cola_ray.model.conversion", "cola_ray.registry", "cola_ray.settings.algorithms",
            "cola_ray.settings.config", "cola_ray.settings.presets"]  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_do_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    shared = {} if name == "cola_ray.model.conversion" else None  # the model of one example is read by the next
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    examples = sorted((one for one in finder.find(module, name) if one.examples), key=lambda one: one.lineno)
    assert examples
    for example in examples:
        example.globs = shared if shared is not None else example.globs
        runner.run(example, clear_globs=False)
    assert runner.failures == 0


def test_every_public_name_is_there_and_explained():
    for name in cola_ray.__all__:
        found = getattr(cola_ray, name)
        assert name == "__version__" or (found.__doc__ and len(found.__doc__) > 40), name
    assert dir(cola_ray) == cola_ray.__all__
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        cola_ray.trainer  # noqa: B018


def test_what_is_asked_for_is_all_that_is_imported():
    words = (
        "import cola_ray, sys; assert not {'torch', 'pydantic', 'rich'} & {*sys.modules}; cola_ray.register; "
        "assert 'pydantic' not in sys.modules; cola_ray.preset; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", words], check=True)


def test_run_knows_the_commands_that_take_settings():
    with pytest.raises(ValueError, match=r"command = 'status': runs no settings; use one of pretrain, rl, agent"):
        cola_ray.run("status", cola_ray.preset("tiny"))
    with pytest.raises(cola_ray.ConfigError, match=r"rl.group_size = 1: grpo compares"):
        cola_ray.run("rl", cola_ray.override(cola_ray.preset("tiny"), {"rl.group_size": 1}))


def test_load_refuses_a_plain_llama(base_dir):
    with pytest.raises(ValueError, match="a 'llama' model, not one of CoLA's"):
        cola_ray.load(base_dir)
