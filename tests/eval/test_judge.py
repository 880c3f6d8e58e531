import ast
import json
import urllib.error
import urllib.request

import pytest
from fake_judge import fake_judge

from eval import judge as judge_module
from eval.benchmarks import find_benchmark
from eval.judge import Judge, judge_report, serve
from llava.config import JudgeConfig
from llava.errors import UserError

KEY = "sk-very-secret"
ACTIVITYNET = find_benchmark("activitynetqa")
QUESTION = {"model": "judge", "messages": [{"role": "user", "content": "Is it right?"}], "max_tokens": 64}


@pytest.fixture(autouse=True)
def _key_and_no_pauses(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge_module, "PAUSES", (0, 0))


def verdict(reply):
    return ast.literal_eval(reply["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("{'pred': 'yes', 'score': 4}", {"pred": "yes", "score": 4}),
        ('```json\n{"pred": "No", "score": "2"}\n```', {"pred": "no", "score": 2}),
        ("{''pred'': 'yes', ''score'': 4.8}", {"pred": "yes", "score": 4.8}),
    ],
)
def test_a_verdict_in_any_form_reaches_the_task_in_the_form_that_it_reads(tmp_path, said, expected):
    with fake_judge(lambda _: said) as (url, _):
        judge = Judge(JudgeConfig(url, "judge"), ACTIVITYNET, tmp_path)
        assert verdict(judge.reply(QUESTION)) == expected
        assert (judge.verdicts, judge.unusable, judge.models) == (1, 0, {"fake-1"})


@pytest.mark.parametrize(
    "said", ["I cannot say.", "{'pred': 'yes'}", "{'pred': 'yes', 'score': 45}", (400, "filtered")]
)
def test_a_reply_without_a_verdict_counts_as_the_worst_and_is_counted(tmp_path, said):
    with fake_judge(lambda _: said) as (url, _):
        judge = Judge(JudgeConfig(url, "judge"), ACTIVITYNET, tmp_path)
        assert verdict(judge.reply(QUESTION)) == {"pred": "no", "score": 0}
        assert (judge.verdicts, judge.unusable) == (1, 1)


def test_a_verdict_is_asked_for_once_until_all_are_forgotten(tmp_path):
    with fake_judge(lambda _: "{'pred': 'yes', 'score': 5}") as (url, requests):
        config = JudgeConfig(url, "judge")
        for resume, asked in ((True, 1), (True, 1), (False, 2)):
            assert verdict(Judge(config, ACTIVITYNET, tmp_path, resume).reply(QUESTION))["score"] == 5
            assert len(requests) == asked
        Judge(JudgeConfig(url, "another"), ACTIVITYNET, tmp_path).reply(QUESTION)
        assert len(requests) == 3
        path, headers, body = requests[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == QUESTION
    assert not any(KEY in file.read_text() for file in tmp_path.iterdir())


def test_an_overloaded_judge_is_asked_again(tmp_path):
    answers = iter([(429, "slow down"), (503, ""), "{'pred': 'yes', 'score': 3}"])
    with fake_judge(lambda _: next(answers)) as (url, _):
        assert verdict(Judge(JudgeConfig(url, "judge"), ACTIVITYNET, tmp_path).reply(QUESTION))["score"] == 3


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((401, f"Incorrect key {KEY}"), ["refuses the key", "OPENAI_API_KEY"]),
        ((404, f"no model judge for {KEY}"), ["404", "no model judge", "evaluation.judge.model"]),
        ((500, "broken"), ["500", "broken"]),
        ((200, "<html>"), ["does not speak", "evaluation.judge.base_url"]),
        ((200, "[]"), ["does not speak", "evaluation.judge.base_url"]),
    ],
)
def test_a_judge_that_does_not_answer_is_found_out_before_work_begins(tmp_path, said, words):
    with fake_judge(lambda _: said) as (url, _):
        judge = Judge(JudgeConfig(url, "judge"), ACTIVITYNET, tmp_path)
        with pytest.raises(UserError) as error:
            judge.check()
    assert all(word in str(error.value) for word in [url, *words]), str(error.value)
    assert KEY not in str(error.value)


def test_a_judge_out_of_reach_is_a_user_error(tmp_path):
    with fake_judge(lambda _: "") as (url, _):
        pass
    with pytest.raises(UserError, match=r"cannot be reached.*evaluation\.judge\.base_url"):
        Judge(JudgeConfig(url, "judge"), ACTIVITYNET, tmp_path).check()


def test_without_a_key_the_message_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError) as error:
        Judge(JudgeConfig(model="some-judge"), ACTIVITYNET, tmp_path / "verdicts")
    for word in (
        "activitynetqa",
        "OPENAI_API_KEY",
        "some-judge",
        "https://api.openai.com/v1",
        "evaluation.judge.base_url",
    ):
        assert word in str(error.value)
    assert not list(tmp_path.iterdir())


def test_tasks_ask_without_the_key_and_a_judge_that_stays_away_ends_the_run(tmp_path, monkeypatch):
    said = ["{'pred': 'yes', 'score': 1}"]
    events = []
    with fake_judge(lambda _: said[0]) as (url, requests):
        config = JudgeConfig(url, "judge")
        judge = Judge(config, ACTIVITYNET, tmp_path)
        with serve(judge, events.append) as environment:
            assert KEY not in environment.values()
            for name, value in environment.items():
                monkeypatch.setenv(name, value)

            def ask(text, key=environment["OPENAI_API_KEY"]):
                body = {"model": "judge", "messages": [{"role": "user", "content": text}]}
                headers = {"Authorization": f"Bearer {key}"}
                post = urllib.request.Request(environment["OPENAI_API_URL"], json.dumps(body).encode(), headers)
                with urllib.request.urlopen(post) as response:
                    return verdict(json.load(response))

            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask("first", key="guessed")
            assert ask("first") == {"pred": "yes", "score": 1}
            assert events == [{"setting": "verdicts", "rank": 0, "done": 1, "total": 0}]
            report = judge_report(config)
            assert report == {"base_url": url, "model": "judge", "verdicts": 1, "unusable": 0, "models": ["fake-1"]}
            assert judge_report(config)["verdicts"] == 0

            said[0] = (429, "quota exceeded")
            with pytest.raises(urllib.error.HTTPError, match="503"):
                ask("second")
            assert "quota exceeded" in events[-1]["error"]
            assert "run the same command again" in events[-1]["error"]
            assert len(requests) == 1 + 3
