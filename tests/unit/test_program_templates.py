"""Conversations with tools under the kinds of chat templates that models have: what was sampled stays as it was."""

import itertools
import json

import pytest
from test_chat import make_tokenizer
from test_programs import TOOLS_TEMPLATE, utterance

from cola_ray.rollout.conversation import Conversation
from cola_ray.rollout.program_requests import RefusedError
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.endings import Endings

# Each is what matters here of a family's, in few words.
STRICT_MISTRAL = (  # v0.3 and Nemo: texts alternate; ids have 9 characters; tools at the last question
    "{{ bos_token }}{% set ns = namespace(index=0) %}{% set asked = messages | selectattr('role', 'equalto', 'user') %}"
    "{% set last = (asked | list)[-1] %}"
    "{% for m in messages %}{% if m.role != 'tool' and m.tool_calls is not defined %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == last %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs have length 9') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}{{ ', ' if not loop.last else ']' }}"
    "{% endfor %}{{ eos_token }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs have length 9') }}"
    '{% endif %}{{ \'[TOOL_RESULTS] {"content": \' + m.content + \', "call_id": "\' + m.tool_call_id + \'"}'
    "[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
PLAIN_MISTRAL = (  # as vLLM's examples have it: a call's text is the content's
    "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{{ '[TOOL_CALLS]' + m.content | string + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
LLAMA_3 = (  # one call at a time, and no text with it
    "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for m in messages %}{% if m.role != 'tool' and 'tool_calls' not in m %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}"
    "{% endif %}{% set call = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
FAMILIES = {"strict Mistral": (STRICT_MISTRAL, "<|eot_id|>"), "Mistral": (PLAIN_MISTRAL, "<|eot_id|>"),
            "Llama 3": (LLAMA_3, "<|eot_id|>"), "Hermes": (TOOLS_TEMPLATE, "<|im_end|>")}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


class Calls:
    """Finds ``CALL {...}`` in a text, and gives ids as Mistral's parser does."""

    def check(self, tools):
        pass

    def within(self, text, tools):
        before, called, call = text.partition("CALL ")
        if not called:
            return {}
        function = {"name": "add", "arguments": call}
        calls = [{"id": f"abcdefg0{n}", "type": "function", "function": function} for n in range(1 + call.count("7"))]
        return {"content": before or None, "tool_calls": calls}


def conversation(template, end):
    tokenizer = make_tokenizer(template)
    tokenizer.eos_token = end
    chat = ChatTokenizer(tokenizer, "")
    return Conversation(chat, Endings(tokenizer, (tokenizer.eos_token_id,)), Calls()), chat


def test_tools_that_the_model_would_not_see_or_could_not_call_are_refused():
    body = {"messages": [{"role": "user", "content": "go"}], "tools": [TOOL]}
    shown, chat = conversation(LLAMA_3, "<|eot_id|>")
    assert "add" in chat.tokenizer.decode(shown.state(body).ids)
    hidden, _ = conversation("{% for m in messages %}{{ m.content }}{% endfor %}", "<|eot_id|>")
    with pytest.raises(RefusedError, match="template does not show them; describe them in a message"):
        hidden.state(body)
    shown.calls = None
    with pytest.raises(RefusedError, match=r"set task.tool_parser to the format"):
        shown.state(body)
    assert shown.state(body | {"tool_choice": "none"}).ids, "which offers none"


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_results_and_texts_go_on_from_what_was_sampled(family):
    """Two questions, of which the first takes three calls, two of them at once."""
    talk, chat = conversation(*FAMILIES[family])
    messages, states = [{"role": "user", "content": "3 + 4 + 5 ="}], []
    for text in ['So CALL {"a": 3,  "b": 4}', 'CALL {"a": 7, "b": 5}', "  It is 12.", "You are welcome."]:
        body = {"messages": messages, "tools": [TOOL]}
        state = talk.state(body)
        assert state.retokenised == 0
        ids = [token for letter in text for token in chat.text_ids(letter)]  # otherwise than the text's own
        states.append((state.ids, [*ids, chat.end], text))
        message = talk.answer(body, state, [utterance(state.ids, states[-1][1])])["choices"][0]["message"]
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "7"} for call in message.get("tool_calls", [])
        ]
        messages = [*messages, message, *(results or [{"role": "user", "content": "Thanks."}])]
    for (before, said, text), (after, *_) in itertools.pairwise(states):
        moved = family == "strict Mistral" and text.startswith("  It")  # the tools, to the new question
        whole = [*before, *said]
        assert (after[: len(whole)] == whole) is not moved
    whole = chat.tokenizer.decode(states[-1][0])
    assert all(whole.count(text) == 1 for *_, text in states[:-1])
    assert "call00000" not in whole


def test_what_a_template_refuses_is_said():
    talk, _ = conversation(*FAMILIES["strict Mistral"])
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 3})}}
    asked = {"role": "user", "content": "3 + 4 ="}
    for messages, part in [
        ([asked, {"role": "assistant", "content": None, "tool_calls": [call]}], "length 9"),
        ([asked, asked], "must alternate"),
    ]:
        with pytest.raises(RefusedError, match=part):
            talk.state({"messages": messages, "tools": [TOOL]})
