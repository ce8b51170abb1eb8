from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm_lightning.callbacks import samples as samples_file
from llm_lightning.callbacks.run_logs import TensorBoard
from llm_lightning.callbacks.samples import Samples, append_section, drop_sections_from, repetition_rate
from llm_lightning.terminal import visible


def headings(folder: Path) -> list[int]:
    return [int(step) for step in re.findall(r"^## step (\d+), val/loss \d", (folder / "samples.md").read_text(), re.M)]


def test_samples_are_written_after_each_validation(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = Samples(["ab", "xyz "], max_new_tokens=6)
    trainer = make_trainer(tmp_path, [samples], logger=[TensorBoard(tmp_path)])
    trainer.fit(make_module(), datamodule=make_data(batch_size=2, seed=5))
    assert headings(tmp_path) == [10, 21]
    text = (tmp_path / "samples.md").read_text()
    assert text.count("\n    ab") == text.count("\n    xyz ") == 2
    printed = capsys.readouterr().out.splitlines()
    assert [re.match(r"step (\d+), val/loss \d\.\d{4} \| ab", line)[1] for line in printed] == ["10", "21"]  # type: ignore[index]
    assert all(len(line) <= samples_file.TERMINAL_WIDTH for line in printed)
    trainer.logger.save()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Tensors("samples/text_summary")] == [10, 21]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20}])
def test_samples_do_not_change_training(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, options: dict[str, Any]
) -> None:
    def run(name: str, callbacks: list[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool]:
        module = make_module(dropout=0.3)
        torch.manual_seed(3)
        make_trainer(tmp_path / name, callbacks).fit(module, datamodule=make_data(batch_size=2, seed=5))
        return module.state_dict(), torch.get_rng_state(), module.model.training

    with_samples, without = run("with", [Samples(["ab"], **options)]), run("without", [])
    assert all(torch.equal(tensor, without[0][name]) for name, tensor in with_samples[0].items())
    assert torch.equal(with_samples[1], without[1])
    assert with_samples[2] == without[2]


def test_the_same_weights_give_the_same_samples(make_module: Any) -> None:
    samples = Samples(["ab", "c"], temperature=1.0, max_new_tokens=8)
    module = make_module()
    samples._prompt_ids = [module.tokenizer.encode(prompt) for prompt in samples.prompts]
    assert samples.write(module) == samples.write(module)


def test_repetition_by_hand() -> None:
    assert repetition_rate([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repetition_rate([[7] * 8, [1, 2, 3, 4, 5]]) == pytest.approx(4 / 7)  # five times 7777; 1234 2345
    assert repetition_rate([[1, 2, 3], []]) == 0


def test_what_was_written_at_the_start_stands_beside(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any
) -> None:
    module = make_module()
    samples = Samples(["ab", "xyz "], max_new_tokens=6, temperature=0.0, beside_start=True)
    samples._prompt_ids = [module.tokenizer.encode(prompt) for prompt in samples.prompts]
    first = [text for _, text in samples.write(module)[0]]
    trainer = make_trainer(tmp_path, [samples])
    trainer.fit(module, datamodule=make_data(batch_size=2, seed=5))
    sections = (tmp_path / "samples.md").read_text().split("## step")[1:]
    assert len(sections) == 2
    for section in sections:
        for prompt, text in zip(["ab", "xyz "], first, strict=True):
            assert prompt.rstrip() in section
            lines = "\n".join(f"    {line}" for line in f"at the start: {text}".split("\n"))
            assert lines in section
    again = Samples(["ab", "xyz "], beside_start=True)
    again.load_state_dict(samples.state_dict())
    assert again._at_start == first


@pytest.mark.parametrize(("prompt", "tokens"), [("x" * 16, 16), ("", 0)])
def test_prompts_that_do_not_fit_are_refused(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, prompt: str, tokens: int
) -> None:
    trainer = make_trainer(tmp_path, [Samples(["fine", prompt])])
    with pytest.raises(ValueError, match=rf"prompts\[1\] has {tokens} tokens, .* 1 and .* = 15; change the prompt"):
        trainer.fit(make_module(), datamodule=make_data(batch_size=2))


@pytest.mark.slow
def test_every_n_epochs(tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any) -> None:
    trainer = make_trainer(tmp_path, [Samples(["ab"], every_n_epochs=2)], max_epochs=4)
    trainer.fit(make_module(), datamodule=make_data(batch_size=2))
    assert headings(tmp_path) == [21, 43]


def test_sections_of_the_resumed_step_and_later_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    drop_sections_from(path, 0)
    assert not path.exists()
    for step in (9, 19, 29):
        append_section(path, f"## step {step}, val/loss 1.0000\n\n    ## step 99, val/loss\n\n    text\n\n")
    content = path.read_text()
    for length in range(len(content)):  # wherever the process was killed
        path.write_text(content[:length])
        drop_sections_from(path, 10)
        first = content[: content.index("## step 19")]
        assert path.read_text() == first[: first[:length].rfind("\n") + 1]
    path.write_text(content)
    drop_sections_from(path, 20)
    assert path.read_text() == content[: content.index("## step 29")]
    drop_sections_from(path, 0)
    assert path.read_text() == ""


def test_a_terminal_gets_no_control_characters_and_nothing_it_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible("a\x1b[31m\x07\u2028é\n") == r"a\x1b[31m\x07\u2028é" + "\n"

    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(samples_file.sys, "stdout", Ascii())
    assert samples_file._one_line("é\n ü" + "x" * 200) == "? ?" + "x" * 94 + "..."
