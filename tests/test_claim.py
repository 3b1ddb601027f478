"""One run at a time in a folder: who comes second is refused in one line and touches nothing."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

from ldm.cli import run
from ldm.output.claim import Claim
from tests.training_runs import RECIPE, ROOT, environment

HOLD = "import sys; from ldm.output.claim import Claim; held = Claim(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@contextmanager
def claimed_by_another(folder):
    """By a process that is killed in the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=environment(), cwd=ROOT, **pipes)
    try:
        assert other.stdout.readline() == "held\n"
        yield
    finally:
        other.kill()
        other.communicate()


def test_a_claim_holds_until_its_process_is_gone(tmp_path):
    folder = tmp_path / "new" / "folder"
    with claimed_by_another(folder), pytest.raises(ValueError, match="another run is at work in it; wait until it has ended"):
        Claim(folder)
    assert list(folder.iterdir()) == []
    Claim(folder).release()


def test_a_process_may_claim_again_what_is_its_own(tmp_path):
    first, second = Claim(tmp_path), Claim(tmp_path)
    second.release()  # which was never its owner
    with pytest.raises(AssertionError), claimed_by_another(tmp_path):
        pass
    first.release()
    with claimed_by_another(tmp_path):
        pass


def test_who_forgets_a_claim_lets_go_of_it(tmp_path):
    held = Claim(tmp_path)
    del held
    with claimed_by_another(tmp_path):
        pass


@pytest.mark.parametrize("command", ["train", "txt2img"])
def test_commands_refuse_a_folder_where_another_run_is_at_work(command, tmp_path, tiny_native, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "prompts.txt").write_text("a cube\na sphere")
    words = {
        "train": ["autoencoder", "--recipe", tmp_path / "recipe.toml", "--set", "data.count=4"],
        "txt2img": ["--model", tiny_native, "--from-file", tmp_path / "prompts.txt", "--resume", "--steps", "1", "--seed", "1"],
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".00000-1.png.partial").write_bytes(b"of the other run")
    with claimed_by_another(tmp_path / "run"):
        assert run([str(word) for word in (command, *words[command], "--out", tmp_path / "run", "--device", "cpu", "-q")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ldm: {tmp_path / 'run'}: another run is at work in it")
    assert (tmp_path / "run" / ".00000-1.png.partial").read_bytes() == b"of the other run"
