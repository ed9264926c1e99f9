"""Shell completion, asked of a real bash."""
import contextlib
import shutil
import subprocess

import pytest
import shtab

from tpllm.cli.main import main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash, as a file."""
    path = tmp_path_factory.mktemp("completion") / "tpllm.bash"
    with path.open("w") as out, contextlib.redirect_stdout(out):
        assert main(["completion", "bash"]) == 0
    return path


def completions(script, *words: str, folder=None) -> list[str]:
    """What bash offers for the last of the words."""
    program = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_tpllm; printf "%s\\n" "${COMPREPLY[@]}"'
    answer = subprocess.run([shutil.which("bash"), "-c", program, "bash", script, *words], capture_output=True, text=True, cwd=folder, check=True)
    return answer.stdout.split()


@pytest.mark.parametrize(("words", "wanted"), [
    (("tpllm", "gen"), ["generate"]),
    (("tpllm", "generate", "--tempe"), ["--temperature"]),
    (("tpllm", "generate", "--dtype", "f"), ["float32", "float16"]),
    (("tpllm", "run", "job.yaml", "--sampling.max"), ["--sampling.max-tokens"]),
    (("tpllm", "run", "job.yaml", "--rows"), ["--rows-per-part"]),
    (("tpllm", "bench", "latency", "--sh"), ["--shape"]),
    (("tpllm", "job", "sta"), ["status"]),
    (("tpllm", "job", "merge", "--allow"), ["--allow-environment-change"]),
    (("tpllm", "completion", "ba"), ["bash"]),
])
def test_bash_completes_commands_options_and_the_keys_of_a_job(script, words, wanted):
    assert completions(script, *words) == wanted


def test_bash_completes_a_job_file_and_a_model_folder(script, tmp_path):
    (tmp_path / "nightly.yaml").touch()
    (tmp_path / "model-a").mkdir()
    assert completions(script, "tpllm", "run", "nigh", folder=tmp_path) == ["nightly.yaml"]
    assert completions(script, "tpllm", "inspect", "mod", folder=tmp_path) == ["model-a"]
    assert completions(script, "tpllm", "job", "status", "mod", folder=tmp_path) == ["model-a"]


@pytest.mark.parametrize("shell", shtab.SUPPORTED_SHELLS)
def test_there_is_a_script_for_every_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "generate" in capsys.readouterr().out
