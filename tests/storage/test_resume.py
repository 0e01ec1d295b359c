import pytest

from mopcompress.errors import DataError, NumericalError, OutputError, StorageError, UsageError
from mopcompress.storage.resume import clear_job, has_job, resumable_job, write_job

JOB = {"model": "sha256", "seed": 0, "recipe": {"steps": 3}}


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def interrupt(target, job=JOB, error=KilledError):
    """Leave the work of an interrupted job behind."""

    def work():
        with resumable_job(target, job, print, restart_on_mismatch=False) as folder:
            write_job(job, folder)
            (folder / "work").write_text("half")
            raise error

    with pytest.raises(error):
        work()


def resume(target, job=JOB, *, restart_on_mismatch=False):
    """Return the messages, and the names of the files that the job finds."""
    messages = []
    with resumable_job(target, job, messages.append, restart_on_mismatch=restart_on_mismatch) as folder:
        return messages, {path.name for path in folder.iterdir()} - {"LOCK"}


@pytest.mark.parametrize("error", [KilledError, StorageError, KeyboardInterrupt])
def test_the_same_job_finds_its_work(tmp_path, error):
    interrupt(tmp_path / "out", error=error)
    assert resume(tmp_path / "out") == ([], {"work", "job.json"})


def test_a_finished_job_leaves_nothing(tmp_path):
    assert resume(tmp_path / "out") == ([], set())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [DataError, NumericalError, UsageError])
def test_an_error_that_would_come_again_removes_the_work(tmp_path, error):
    interrupt(tmp_path / "out", error=error)
    assert not list(tmp_path.iterdir())


def test_another_job_names_the_differences_and_keeps_the_work(tmp_path):
    interrupt(tmp_path / "out")
    with pytest.raises(OutputError, match=r"another job \(recipe.steps was 3, is 4; seed was 0, is 1\)"):
        resume(tmp_path / "out", JOB | {"seed": 1, "recipe": {"steps": 4}})
    assert (tmp_path / ".out.unfinished" / "work").read_text() == "half"


def test_another_job_restarts_when_that_is_asked_for(tmp_path):
    interrupt(tmp_path / "out")
    messages, names = resume(tmp_path / "out", JOB | {"seed": 1}, restart_on_mismatch=True)
    assert names == set()
    assert len(messages) == 1
    assert "cannot go on here (seed was 0, is 1): beginning again" in messages[0]


def test_a_job_is_compared_as_json_stores_it(tmp_path):
    interrupt(tmp_path / "out", {"rates": (1, 2)})
    assert resume(tmp_path / "out", {"rates": [1, 2]})[0] == []


@pytest.mark.parametrize("count", [6, 7])
def test_six_differences_are_named_and_the_others_counted(tmp_path, count):
    interrupt(tmp_path / "out", dict.fromkeys("abcdefg"[:count], 0))
    with pytest.raises(OutputError) as caught:
        resume(tmp_path / "out", dict.fromkeys("abcdefg"[:count], 1))
    assert str(caught.value).count("was 0, is 1") == 6
    assert ("and 1 more" in str(caught.value)) == (count == 7)


def test_two_processes_cannot_work_on_one_output(tmp_path):
    with (
        resumable_job(tmp_path / "out", JOB, print, restart_on_mismatch=False),
        pytest.raises(OutputError, match="in use by another run"),
    ):
        resume(tmp_path / "out")


def test_clearing_a_job_leaves_the_lock(tmp_path):
    write_job(JOB, tmp_path)
    (tmp_path / "LOCK").touch()
    assert has_job(tmp_path)
    clear_job(tmp_path)
    assert not has_job(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]
