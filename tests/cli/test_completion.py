"""What a shell completes, by the printed script, in bash itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llm_lightning.cli.completion import SHELLS
from llm_lightning.cli.main import VERBS, main

COMPLETE = """
source ./script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p llm-lightning | sed 's/.*-F \\([^ ]*\\) .*/\\1/') llm-lightning "${COMP_WORDS[$COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "weights.ckpt").touch()
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], set(VERBS)),
        (["insp"], {"inspect", "inspect-data"}),
        (["evaluate", "--stri"], {"--stride"}),
        (["evaluate", "x", "--split", ""], {"train", "val", "test"}),
        (["completion", ""], set(SHELLS)),
        (["inspect", "weig"], {"weights.ckpt"}),
        (["inspect", "smollm2-360"], {"smollm2-360m", "smollm2-360m-instruct"}),
        (["export", "x", "--format", "p"], {"peft"}),
        (["runs", "--col"], {"--columns"}),
    ],
)
def test_bash_completes(folder: Path, words: list[str], expected: set[str]) -> None:
    command = ["bash", "--norc", "-c", COMPLETE, "bash", "llm-lightning", *words]
    outcome = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert expected <= set(outcome.stdout.split())
    if words[-1]:
        assert set(outcome.stdout.split()) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("near-duplicates", "stride"))
    assert "qwen3-0.6b" in script or shell == "tcsh"
