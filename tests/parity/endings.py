"""What ends a completion: one check for engines of both action spaces."""

import dataclasses

import numpy as np
import pytest

from cola_ray.rollout.engine import Request

LOG_PROB_TOLERANCE = 5e-5  # a forced token may lie at -30, where float32 has six digits


def check_what_ends_a_completion(engine, reference, stop_token, monkeypatch):
    """Each ends a completion exactly: a string, a second end token, and a string that began earlier in the response.

    Args:
        reference: ``reference(request)`` returns PyTorch's (tokens, ..., log-probabilities).
        stop_token: the engine's end token.
    """
    prompt = list(range(20, 40))
    whole = Request(prompt, 5, 1.0, 0, 12)
    tokens, *_, log_probs = reference(whole)
    tokens = [int(token) for token in tokens]
    text = engine.endings.text(tokens)
    length = next(n for n in range(4, 12) if text.find(text[n - 2 : n]) == n - 2)
    stop = text[length - 2 : length]

    def check(completion, start):
        assert completion.token_ids.tolist() == tokens[start:length]
        assert not completion.truncated
        assert len(completion.actions) == len(completion.versions) == length - start
        np.testing.assert_allclose(completion.log_probs, log_probs[start:length], atol=LOG_PROB_TOLERANCE)
        if completion.hidden_states is not None:
            assert len(completion.hidden_states) == len(prompt) + length - 1

    check(engine.generate([dataclasses.replace(whole, stop=("no", stop))])[0], 0)
    assert dataclasses.replace(engine.endings, strings=(stop,)).text(tokens) == text[: length - 2]
    begun = length - 1  # in the middle of the string
    later = Request([*prompt, *tokens[:begun]], 5, 1.0, 0, 12 - begun, stop=(stop,), response_prefix=begun)
    check(engine.generate([later])[0], begun)
    for exactly in (length, length + 1):  # the limit is at the string's last token, or after it
        check(engine.generate([dataclasses.replace(whole, stop=(stop,), max_new_tokens=exactly)])[0], 0)
    cut = engine.generate([dataclasses.replace(whole, stop=(stop,), max_new_tokens=length - 1)])[0]
    assert cut.truncated
    assert cut.token_ids.tolist() == tokens[: length - 1]
    monkeypatch.setattr(
        engine, "endings", dataclasses.replace(engine.endings, token_ids=(stop_token, tokens[length - 1]))
    )
    ended = engine.generate([whole])[0]
    assert ended.token_ids.tolist() == tokens[: tokens.index(tokens[length - 1]) + 1]
    assert not ended.truncated
    monkeypatch.setattr(engine, "endings", dataclasses.replace(engine.endings, tokenizer=None))
    with pytest.raises(ValueError, match="the engine has no tokenizer"):
        engine.submit(dataclasses.replace(whole, stop=("x",)))
