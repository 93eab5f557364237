"""Twenty Questions and Guess My City: tables, questions, rules, demonstrations."""

import http.server
import json
import sys
import threading
import types
from pathlib import Path

import pytest

from cola_ray.settings.config import TaskConfig, is_environment
from cola_ray.tasks import make_environment
from cola_ray.tasks.adventures import TextWorld
from cola_ray.tasks.environment import HELD_OUT, Replayed
from cola_ray.tasks.guessing import (
    INVALID,
    REFUSAL,
    GuessCity,
    TwentyQuestions,
    article,
    cities_table,
    city_oracle,
    names,
    nearest_answer,
    objects_table,
    phrases,
    table_oracle,
)


@pytest.fixture
def played(monkeypatch):
    """Files of the games that have been played, in the place of TextWorld, which writes each with a compiler."""
    files = []
    state = types.SimpleNamespace(feedback="x", policy_commands=[], admissible_commands=[], score=0)
    game = types.SimpleNamespace(reset=lambda: state)
    made = types.SimpleNamespace(compile_game=lambda _, options: Path(options.path).write_text("game"))
    world = types.SimpleNamespace(
        GameOptions=types.SimpleNamespace, EnvInfos=lambda **_: None, generator=made,
        start=lambda file, _: files.append(Path(file)) or game,
        challenges=types.SimpleNamespace(CHALLENGES={"tw-coin_collector": (None, lambda *_: None)}),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "textworld", world)
    monkeypatch.setitem(sys.modules, "textworld.challenges", world.challenges)
    return files


def test_held_out_games_are_not_those_of_training(played):
    for first in (0, HELD_OUT):
        for seed in range(first, first + 40):
            TextWorld(games=3).reset(seed=seed)
    train, heldout = {*played[:40]}, {*played[40:]}
    assert (len(train), len(heldout), len(train | heldout)) == (3, 3, 6), "each is made once in a process"


def thing(name):
    return next(thing for thing in (*objects_table(), *cities_table()) if name in thing.names)


def test_the_tables_are_the_papers_size_and_tell_everything_apart():
    objects = objects_table()
    assert len(objects) == 157
    assert len({frozenset(thing.attributes) for thing in objects}) == 157
    assert len(cities_table()) == 91
    assert len({tuple(city.attributes.values()) for city in cities_table()}) == 91


def test_plain_questions_ask_for_their_attribute():
    for attribute, question in phrases()[1].items():
        for hidden in objects_table():
            expected = "Yes." if attribute in hidden.attributes else "No."
            assert table_oracle(hidden, question) == expected, (question, hidden.names)


def test_every_name_wins_and_names_nothing_else():
    for hidden in objects_table():
        for name in hidden.names:
            question = f"Is it {article(name)}?"
            assert names(question, hidden)
            assert [other for other in objects_table() if table_oracle(other, question) == "Yes."] == [hidden]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("does it have four LEGS", "Yes."),
        ("Is it a living thing?", "Yes."),
        ("Is it bigger than a car?", "No."),
        ("Is it not a dog?", "No."),
        ("Is it not edible?", "Yes."),
        ("Is it a cat?", "No."),
        ("How do you do?", INVALID),
        ("", INVALID),
    ],
)
def test_free_questions_about_a_dog(question, answer):
    assert table_oracle(thing("dog"), question) == answer


def play(game, questions, seed=0):
    game.reset(seed=seed)
    return [game.step(question) for question in questions]


def test_rewards_and_ends_are_the_papers():
    game = TwentyQuestions()
    _, info = game.reset(seed=3)
    hidden = info["hidden"]
    *asked, won = play(game, ["Is it alive?", "nonsense", f"Is it {article(hidden)}?"], seed=3)
    assert [(reward, terminated, truncated) for _, reward, terminated, truncated, _ in asked] == [
        (-1, False, False)
    ] * 2
    assert won[:4] == ("Yes.\n", 0.0, True, False)
    limit = play(game, ["Is it alive?"] * 20, seed=3)
    assert sum(step[1] for step in limit) == -20
    assert [step[2] for step in limit] == [False] * 20
    assert [step[3] for step in limit] == [False] * 19 + [True], "a limit truncates, it does not terminate"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Yes", "Yes."), ("yes, it is", "Yes."), ("**No**, never", "No."),
        ('"No."', "No."), ("Not a question", INVALID),
        ("None of these", INVALID), ("Nobody knows", INVALID), ("Yesterday", INVALID), ("Invalid question!", INVALID),
        ("", INVALID), ("I think yes", INVALID),
    ],
)  # fmt: skip
def test_an_endpoint_answers_in_whole_words(said, answer):
    assert nearest_answer(said, ("Yes.", "No.", INVALID)) == answer


@pytest.mark.parametrize(
    "question", ["Is it not alive?", "Isn't it alive?", "Isn\u2019t it alive?", "Alive it is not."]
)
def test_negations_of_any_spelling(question):
    dog = next(thing for thing in objects_table() if "alive" in thing.attributes)
    assert (table_oracle(dog, "Is it alive?"), table_oracle(dog, question)) == ("Yes.", "No.")


def test_a_negated_name_does_not_win():
    game = TwentyQuestions()
    _, info = game.reset(seed=3)
    assert not game.step(f"Is it not {article(info['hidden'])}?")[2]


def test_state_goes_on_in_another_game():
    one, other = TwentyQuestions(), TwentyQuestions()
    play(one, ["Is it alive?", "Is it round?"], seed=11)
    other.set_state(one.get_state())
    assert other.step("Is it soft?") == one.step("Is it soft?")
    assert other.turn == 3


def test_any_gymnasium_style_environment_is_saved_by_replay():
    class Counter:
        def reset(self, *, seed=None, options=None):
            self.total = seed
            return f"{self.total}", {}

        def step(self, text):
            self.total += int(text)
            return f"{self.total}", 1.0, self.total > 100, False, {}

    one, other = Replayed(Counter(), 3), Replayed(Counter(), 3)
    assert one.reset(seed=5)[0] == "5"
    assert one.step("1")[:4] == ("6", 1.0, False, False)
    one.step("2")
    other.set_state(one.get_state())
    assert other.step("3")[:4] == ("11", 1.0, False, True)


def test_cities_answer_in_sentences():
    paris = thing("Paris")
    assert city_oracle(paris, "What country is it in?") == "My city is in France."
    assert city_oracle(paris, "Which language do they speak?") == "People there speak French."
    assert city_oracle(paris, "What is it famous for?") == "Visitors come to see the Eiffel Tower."
    assert city_oracle(paris, "Is it a capital city?") == "Yes, it is a capital."
    assert city_oracle(paris, "Is it London?") == "No."


def test_an_oracle_that_tells_the_city_is_not_heard():
    game = GuessCity(oracle=lambda hidden, question: f"Well, it is {hidden.names[0]}!")
    game.reset(seed=0)
    assert game.step("Where are you from?")[0] == f"{REFUSAL}\n"


@pytest.mark.parametrize(("skill", "low", "high"), [(0.3, -18, -16), (1.0, -8, -6.5)])
def test_demonstrations_are_as_good_as_asked(skill, low, high):
    """A perfect player halves what is left: log2(157) = 7.3 questions before the guess."""
    dialogues = TwentyQuestions(skill=skill).demonstrations(300, seed=0)
    assert dialogues == TwentyQuestions(skill=skill).demonstrations(300, seed=0)
    returns = []
    for dialogue in dialogues:
        last_question, last_answer = dialogue.turns[-1]
        won = last_answer == "Yes.\n" and any(names(last_question, thing) for thing in objects_table())
        returns.append(-(len(dialogue.turns) - won))
    assert low < sum(returns) / len(returns) < high


# --- text adventures, where their packages are installed --------------------------------------------------------------


def test_textworld_pays_for_its_coin_and_saves_by_replay():
    pytest.importorskip("textworld")
    from cola_ray.tasks.adventures import TextWorld

    game = TextWorld(level=2, games=1)
    opening, info = game.reset(seed=0)
    assert "retrieve the coin" in opening or "coin" in opening
    rewards = []
    while True:
        state, way = game.get_state(), info["way"]
        _, reward, terminated, truncated, info = game.step(way[0])
        rewards.append(reward)
        if terminated:
            break
        assert not truncated
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    again = TextWorld(level=2, games=1)
    again.set_state(state)
    assert again.step(way[0])[1:3] == (1.0, True)
    assert all(dialogue.turns for dialogue in game.demonstrations(3, seed=0))


def test_a_missing_game_file_is_named():
    pytest.importorskip("jericho")
    from cola_ray.tasks.adventures import Jericho

    with pytest.raises(ValueError, match=r"task.game = 'nowhere.z5': no such z-machine file"):
        Jericho("nowhere.z5")


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server does, with what the last message asks it to say."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        system, question = (message["content"] for message in asked["messages"])
        said = "yes, it is" if "apple" in system and "fruit" in question else "I would rather not say"
        body = {
            "id": "1", "object": "chat.completion", "created": 0, "model": asked["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
        }  # fmt: skip
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


def test_an_endpoint_answers_in_place_of_the_table(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        game = make_environment(TaskConfig(name="twenty_questions", oracle="some-model"))
        game.set_state(("apple", 0))
        assert game.step("Is it a fruit?")[0] == "Yes.\n", "one of the three answers, whatever else was said"
        assert game.step("What is it?")[0] == "Invalid Question.\n"
        server.shutdown()


def test_an_environment_of_ones_own_is_known_by_its_step():
    name = "cola_ray.tasks.guessing:GuessCity"
    assert is_environment(name)
    assert make_environment(TaskConfig(name=name, options={"skill": 0.1})).skill == 0.1
    assert not is_environment("cola_ray.tasks.verifiable:Arithmetic")
    assert not is_environment("no_such_module:Thing")


def test_an_unknown_option_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"task.options.objcts = 3: twenty_questions takes objects, .*skill"):
        make_environment(TaskConfig(name="twenty_questions", options={"objcts": 3}))
