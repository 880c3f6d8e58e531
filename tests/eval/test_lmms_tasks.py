import inspect
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lmms_eval", reason="needs the extra `eval`")

from tenacity import Future, RetryError

from eval import lmms_tasks
from eval.benchmarks import BENCHMARKS, Benchmark, find_benchmark
from llava.errors import UserError

MVBENCH = find_benchmark("mvbench")


@given(st.integers(0, 30), st.integers(1, 7))
def test_results_of_several_processes_are_aggregated_in_the_order_of_the_documents(count, processes):
    """lmms-eval strings together what the processes return, process r having every document of r, r + processes ..."""
    aggregation = {"plain": lambda results: results, "with_args": lambda results, args: (results, args)}
    lmms_tasks.in_document_order({"task": SimpleNamespace(aggregation=lambda: aggregation)}, processes)
    documents = list(range(count))
    gathered = [document for rank in range(processes) for document in documents[rank::processes]]
    assert aggregation["plain"](gathered) == documents
    assert aggregation["with_args"](gathered, args="args") == (documents, "args")
    assert "args" in inspect.signature(aggregation["with_args"]).parameters  # by which lmms-eval decides


def test_an_unknown_task_is_a_user_error():
    with pytest.raises(UserError, match="no task 'videonone'"):
        lmms_tasks.load_tasks(Benchmark("videonone", "videonone", folder="videomme"))


@pytest.mark.parametrize("benchmark", [*BENCHMARKS, Benchmark("mine", "mine")], ids=lambda benchmark: benchmark.name)
def test_data_that_cannot_be_loaded_are_one_message_with_the_command(benchmark, monkeypatch):
    def unreachable(*_):
        error = Future.construct(1, ConnectionError("Couldn't reach the hub"), has_exception=True)
        raise RetryError(error)

    monkeypatch.setattr(lmms_tasks, "_task_manager", lambda _: SimpleNamespace(all_tasks=[benchmark.task]))
    monkeypatch.setattr(lmms_tasks, "get_task_dict", unreachable)
    monkeypatch.setattr(lmms_tasks, "get_token", lambda: "token")
    monkeypatch.setenv("HF_HOME", "/home")
    with pytest.raises(UserError, match=r"ConnectionError: Couldn't reach the hub.*hf auth login") as error:
        lmms_tasks.load_tasks(benchmark)
    if benchmark.dataset:
        for words in (f"hf download --repo-type dataset {benchmark.dataset}", f"/home/{benchmark.unpacked}"):
            assert words in str(error.value)
    assert ("--revision video" in str(error.value)) == (benchmark is MVBENCH)


def test_a_missing_login_is_found_out_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(lmms_tasks, "_task_manager", lambda _: SimpleNamespace(all_tasks=["mvbench"]))
    monkeypatch.setattr(lmms_tasks, "get_task_dict", lambda *_: {"task": "loaded"})
    monkeypatch.setattr(lmms_tasks, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(lmms_tasks, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"no login.*hf auth login"):
        lmms_tasks.load_tasks(MVBENCH)
    (tmp_path / "mvbench_video").mkdir()
    assert lmms_tasks.load_tasks(MVBENCH) == {"task": "loaded"}


def task_with(videos):
    def doc_to_visual(document):
        if document is None:
            raise SystemExit("video path:/data/gone.mp4 does not exist")
        return [document]

    return SimpleNamespace(eval_docs_no_media=videos, doc_to_visual=doc_to_visual)


def test_missing_videos_are_counted_by_task_and_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "here.mp4").write_text("")
    here, gone = str(tmp_path / "here.mp4"), str(tmp_path / "gone.mp4")
    tasks = {"pose": task_with([here, gone, None]), "action": task_with([here, here, gone])}
    lmms_tasks.check_videos(MVBENCH, tasks, limit=1)
    lmms_tasks.check_videos(MVBENCH, {"action": tasks["action"]}, limit=2)
    with pytest.raises(UserError) as error:
        lmms_tasks.check_videos(MVBENCH, tasks, limit=None)
    for words in ("3 of 6", "pose: 2, action: 1", gone, MVBENCH.download, f"{tmp_path}/mvbench_video", MVBENCH.advice):
        assert words in str(error.value)
