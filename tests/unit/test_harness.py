"""The evaluation harness's model class: its scores against a plain forward pass."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="make evals installs it")

from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.studies import harness
from cola_ray.studies.harness import HarnessModel, _until


@pytest.fixture(scope="module")
def model_dir(cola, tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("cola")
    cola.save_pretrained(path)
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)
    return path


@pytest.mark.parametrize("likelihood", ["base", "marginal", "greedy"])
def test_a_continuation_is_scored_token_by_token(model_dir, cola, likelihood):
    model = HarnessModel(str(model_dir), likelihood, batch_size=2)
    pairs = [("a b c", " d e"), ("a", " f"), ("h g f e", " d")]
    encoded = [(pair, *model._encode_pair(*pair)) for pair in pairs]
    for (_, context, said), (score, greedy) in zip(encoded, model._loglikelihood_tokens(encoded), strict=True):
        ids = torch.tensor([[*context, *said]])
        with torch.no_grad():
            e = cola.encode(ids)
            log_probs = cola.token_log_probs(e[0], cola.policy_logits(e)[0], likelihood)
        at = range(len(context) - 1, len(context) + len(said) - 1)
        assert score == pytest.approx(sum(float(log_probs[i, ids[0, i + 1]]) for i in at), rel=1e-5)
        assert greedy == all(int(log_probs[i].argmax()) == int(ids[0, i + 1]) for i in at)


def test_a_request_says_where_its_text_ends():
    assert _until({"until": ["\n", ""]}) == _until({"until": "\n"}) == ("\n",)
    assert _until({}) == _until({"until": None}) == ()


@pytest.mark.parametrize(("given", "asked"), [(-1, None), (0, 0), (5, 5)])
def test_the_harness_is_asked_for_as_many_examples_as_the_settings_say(given, asked, monkeypatch):
    seen = {}
    monkeypatch.setattr(harness, "HarnessModel", lambda *_: type("Model", (), {"close": lambda self: None})())
    monkeypatch.setattr(harness, "TaskManager", lambda **_: None)
    monkeypatch.setattr(
        harness,
        "simple_evaluate",
        lambda model, **said: (
            seen.update(said) or {name: {} for name in ("results", "versions", "n-shot", "n-samples")}
        ),
    )
    config = override(preset("tiny"), {"harness.tasks": ("arc_easy",), "harness.num_fewshot": given})
    assert harness.score(config, "base")["results"] == {}
    assert seen["num_fewshot"] == asked
