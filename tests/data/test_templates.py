"""Templates to the letter, their errors, and what the book counts of its own data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.record_store.tokens import encode_conversation
from llm_lightning.data.records.instruction import read_instructions
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Segment, Turn
from llm_lightning.data.templates.slots import TEMPLATES, SlotTemplate
from llm_lightning.tokenizers.build import build_tokenizer

GPT2 = build_tokenizer("gpt2")
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
END = "<END>"


def asked(instruction: str, given: str = "", response: str = "") -> Conversation:
    return Conversation((Turn(instruction, given, response),))


def rendered(template: Template, conversation: Conversation) -> str:
    """As text, every end of text as END."""
    return "".join(END if kind == "end" else text for text, kind, _ in template.segments(conversation, GPT2))


def book_text(entry: dict[str, str]) -> str:
    """What the book's InstructionDataset encodes: format_input and the response."""
    instruction_text = f"{PREAMBLE}\n\n### Instruction:\n{entry['instruction']}"
    input_text = f"\n\n### Input:\n{entry['input']}" if entry["input"] else ""
    return instruction_text + input_text + f"\n\n### Response:\n{entry['output']}"


# --- the three of the project -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "freind --> friend", "two\nlines\n"])
def test_alpaca_is_the_books_text(given: str) -> None:
    entry = {"instruction": "Spell it.\n", "input": given, "output": " It is spelt: {so} [here]"}
    text = rendered(TEMPLATES["alpaca"], asked(*entry.values()))
    assert text == book_text(entry) + END


def test_parts_of_alpaca() -> None:
    prompt = f"{PREAMBLE}\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2"
    conversation = asked("Add.", "1, 2", "3")
    assert TEMPLATES["alpaca"].segments(conversation, GPT2) == [
        Segment(prompt, "prompt"),
        Segment("\n\n### Response:\n", "header"),
        Segment("3", "response"),
        Segment("", "end", (GPT2.eot_id,)),
    ]
    assert TEMPLATES["alpaca"].question(conversation) == prompt
    assert TEMPLATES["alpaca"].slots == {"system", "instruction", "input", "response"}


def test_a_records_own_system_message_replaces_the_preamble() -> None:
    text = rendered(TEMPLATES["alpaca"], Conversation((Turn("Add.", "", "3"),), system="Be brief."))
    assert text == f"Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n3{END}"


@pytest.mark.parametrize(("given", "shown"), [("", ""), ("1, 2", "\n1, 2")])
def test_phi3_is_that_of_exercise_7_1(given: str, shown: str) -> None:
    """Its instruction is on the line after <|user|>, its answer on the one after `<|assistant|>:`."""
    text = rendered(TEMPLATES["phi3"], asked("Add.", given, "3"))
    assert text == f"<|user|>\nAdd.{shown}\n<|assistant|>:\n3{END}"
    with_system = Conversation((Turn("Add.", given, "3"),), system="Be brief.")
    assert rendered(TEMPLATES["phi3"], with_system) == "<|system|>\nBe brief.\n" + text


def test_chatml() -> None:
    conversation = Conversation((Turn("Add.", "1, 2", "3"), Turn("And 4?", "", "7")), system="Be brief.")
    assert rendered(TEMPLATES["chatml"], conversation) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nAdd.\n1, 2<|im_end|>\n<|im_start|>assistant\n3{END}<|im_end|>\n"
        f"<|im_start|>user\nAnd 4?<|im_end|>\n<|im_start|>assistant\n7{END}"
    )


# --- several turns ----------------------------------------------------------------------------------------------------

THREE_TURNS = Conversation((Turn("a", "", "1"), Turn("b", "", "2"), Turn("c", "", "3")), system="S")


def test_the_system_is_said_once_and_every_answer_ends() -> None:
    """What follows {response} stands between two turns, not after the last."""
    header = "\n\n### Response:\n"
    assert rendered(TEMPLATES["alpaca"], THREE_TURNS) == (
        f"S\n\n### Instruction:\na{header}1{END}"
        f"\n\n### Instruction:\nb{header}2{END}\n\n### Instruction:\nc{header}3{END}"
    )
    kinds = [piece.kind for piece in TEMPLATES["alpaca"].segments(THREE_TURNS, GPT2)]
    turn = ["prompt", "header", "response", "end"]
    assert kinds == [*turn, "prompt", *turn, "prompt", *turn]
    assert TEMPLATES["alpaca"].question(THREE_TURNS) == "### Instruction:\nc"


def test_a_prompt_holds_the_turns_before_and_the_last_header() -> None:
    template = SlotTemplate("mine", "Q{instruction}A{response}|")
    tokenizer = build_tokenizer("byte")
    parts = ["QaA1", END, "|QbA2", END, "|QcA"]
    assert "".join(
        END if kind == "end" else text for text, kind, _ in template.prompt(THREE_TURNS, tokenizer)
    ) == "".join(parts)
    ids = [id_ for part in parts for id_ in ([256] if part == END else tokenizer.encode(part))]
    assert template.prompt_ids(tokenizer, THREE_TURNS) == ids


def test_the_prompt_is_the_same_with_and_without_an_answer() -> None:
    template = TEMPLATES["alpaca"]
    assert template.prompt(asked("Add.", "1", "2"), GPT2) == template.prompt(asked("Add.", "1"), GPT2)
    whole = template.segments(asked("Add.", "1", "2"), GPT2)
    assert whole[:-2] == template.prompt(asked("Add.", "1"), GPT2)


# --- your own ---------------------------------------------------------------------------------------------------------


def test_sections_stand_where_all_of_their_slots_are_filled() -> None:
    template = choose_template("[{system}: {input}, ]{instruction}[ ({input})]={response}")
    assert rendered(template, asked("Add", "", "3")) == f"Add=3{END}"
    assert rendered(template, asked("Add", "1", "3")) == f"Add (1)=3{END}"
    both = Conversation((Turn("Add", "1", "3"),), system="S")
    assert rendered(template, both) == f"S: 1, Add (1)=3{END}"
    assert template.name == "data.template"


def test_signs_line_breaks_and_values_that_look_like_slots() -> None:
    template = choose_template(r"{{{instruction}}}\n[[x]]{{system}}[ [[{input}]].] ]]\n>{response}")
    text = "{{input}}\n[x]{system} [[a]]. ]\n>{response}" + END
    assert rendered(template, asked("{input}", "[a]", "{response}")) == text
    assert rendered(template, asked("i", "", "r")) == "{i}\n[x]{system} ]\n>r" + END
    assert template.slots == {"instruction", "input", "response"}
    headers = [piece.text for piece in template.segments(asked("i", "", "r"), GPT2) if piece.kind == "header"]
    assert headers == [" ]\n>"], "the fixed text behind the last slot or section"


def test_a_template_without_a_header() -> None:
    pieces = choose_template("{instruction}{response}").segments(asked("a", "", "b"), GPT2)
    assert pieces == [Segment("a", "prompt"), Segment("b", "response"), Segment("", "end", (GPT2.eot_id,))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{instuction}{response}",
            r"unknown placeholder \{instuction\}; did you mean \{instruction\}\? there are \{sys",
        ),
        ("{xyz}{response}", r"unknown placeholder \{xyz\}; there are \{system\}, \{instruction\}, \{input\}, \{respon"),
        ("{}{response}", r"unknown placeholder \{\}; there are"),
        ("{instruction}", r"has no \{response\} slot; it needs \{instruction\} and \{response\}"),
        ("{input}{response}", r"has no \{instruction\} slot"),
        ("{instruction}{response", r"'\{' without its partner at '\{instruction\}\{'; write \{\{ for the sign"),
        ("{instruction}}{response}", r"'\}' without its partner at '\{instruction\}\}'; write \}\} for the sign"),
        ("{instruction} } {response}", r"'\}' without its partner at '\{instruction\} \}'; write \}\} for the sign"),
        ("{instruction}]{response}", r"'\]' without its partner at '\{instruction\}\]'; write \]\] for the sign"),
        ("[{input}[{system}]]{instruction}{response}", r"'\[' without its partner at '\[\{input\}\['; write \[\["),
        ("{instruction}{response}[{input}", r"a section '\[' never ends; write \[\[ for the sign"),
        ("[none]{instruction}{response}", r"the section at '\[none\]' has no slot; write \[\[ for a bracket"),
        ("{instruction}{response}{response}", r"\{response\} must occur once, outside of \[\.\.\.\]"),
        ("{instruction}[{response}]", r"\{response\} must occur once, outside of \[\.\.\.\]"),
        ("{instruction}[{response}]{response}", r"\{response\} must occur once, outside of \[\.\.\.\]"),
        ("{response}{instruction}", r"only fixed text may follow \{response\}"),
        ("{instruction}{response}[{input}]", r"only fixed text may follow \{response\}"),
    ],
)
def test_templates_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^template data.template.*{message}"):
        choose_template(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "alpacca",
            r"data.template='alpacca' is unknown: did you mean alpaca\? use alpaca, phi3, chatml, smollm2, llama3, qw",
        ),
        ("???", r"is unknown: use alpaca, .*, a text with \{instruction\} and \{response\}, or a .jinja file"),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_template(name)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_found_by_name(name: str) -> None:
    assert choose_template(name) is TEMPLATES[name]
    assert TEMPLATES[name].name == name


# --- the book's data --------------------------------------------------------------------------------------------------


def test_pieces_and_whole_have_the_same_tokens(data_dir: Path) -> None:
    """GPT-2's encoding never joins the end of a prompt and the beginning of an answer here, so nothing is lost."""
    path = data_dir / "instruction-data.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    conversations, skipped = read_instructions(path)
    assert (len(conversations), skipped) == (1100, 0)
    for entry, conversation in zip(entries, conversations, strict=True):
        pieces = [GPT2.encode(text) for text, *_ in TEMPLATES["alpaca"].segments(conversation, GPT2)]
        assert [token for piece in pieces for token in piece] == GPT2.encode(book_text(entry)), conversation.place


@pytest.mark.slow
def test_what_the_book_counts(data_dir: Path) -> None:
    """Our samples have one token more: the end of text."""
    data = InstructionDataModule(
        tokenizer=GPT2,
        context_length=1024,
        name="book_instructions",
        path=str(data_dir / "instruction-data.json"),
        split="order",
        batch_size=8,
        loss_on="all",
    )
    data.build()
    entries = json.loads((data_dir / "instruction-data.json").read_text(encoding="utf-8"))
    for split, part in (("train", slice(935)), ("test", slice(935, 1045)), ("val", slice(1045, 1100))):
        assert [one.record for one in data.conversations_of(split)] == entries[part]
    lengths = [len(row.token_ids) - 1 for row in data.train_samples]  # type: ignore[attr-defined]
    assert (len(lengths), sum(lengths), min(lengths), max(lengths)) == (935, 52_760, 40, 91)
    assert round(sum(lengths) / 935, 2) == 56.43
    asked_of = [GPT2.encode(data.template.question(one)) for one in data.conversations_of("train")]
    assert round(sum(map(len, asked_of)) / 935, 2) == 38.31
    splits = data.report()["splits"]
    assert [round(splits[split]["mean_tokens"] - 1, 2) for split in ("val", "test")] == [56.65, 55.9]
    assert splits["train"]["targets"] == 52_760  # all but each first token, and each end
    leaks = data.report()["leaks"]
    assert leaks == {"val": {"prompts": 4, "of": 55}, "test": {"prompts": 2, "of": 110}}


# --- checkpoints of earlier versions ----------------------------------------------------------------------------------


def test_the_digest_of_data_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Records of each split, text and system message of the template, no more: an old run finds its data again."""
    rows = [{"instruction": f"a{n}", "input": "i", "output": f"b{n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = InstructionDataModule(
        tokenizer=GPT2, context_length=64, name=None, path=str(tmp_path / "rows.json"), split="order",
        val_fraction=0.25, test_fraction=0.25, batch_size=2,
    )  # fmt: skip
    data.read()
    plain = [["", [row["instruction"], row["input"], row["output"]]] for row in rows]
    content = {"train": plain[:2], "val": plain[3:], "test": plain[2:3]}
    header = "\n\n### Response:\n"
    alpaca = f"[{{system}}\n\n]### Instruction:\n{{instruction}}[\n\n### Input:\n{{input}}]{header}{{response}}\n\n"
    expected = hashlib.sha256(json.dumps([content, alpaca, PREAMBLE]).encode()).hexdigest()
    assert data.data_digest == expected


@pytest.mark.parametrize("question", ["A.\n\n", "a  ", "a", "theAn", "1\n#\n\n", ""])
@pytest.mark.parametrize("header", ["###", "\n\n### Response:\n", "Answer:", " A: ", "er"])
def test_what_the_question_has_alone_is_no_header(question: str, header: str) -> None:
    gpt2 = build_tokenizer("gpt2")
    template = SlotTemplate("own", f"[{{instruction}}]{header}{{response}}")
    pieces = list(encode_conversation(gpt2, template, Conversation((Turn(question, "", "b"),))))
    n_alone = len(gpt2.encode(question))
    whole = gpt2.encode(question + header)
    found = {kind: ids.tolist() for ids, kind in pieces}
    assert found.get("prompt", []) == whole[:n_alone]
    assert found["header"] == whole[n_alone:]
