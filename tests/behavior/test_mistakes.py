"""Every mistake of mistakes.toml ends with status 2 and one message, which says where it is and what to do."""

import re

import mistakes
import pytest
import training

pytestmark = training.THEIR_WARNINGS_IGNORED
MISTAKES = mistakes.read_mistakes()


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A config, texts, token files, a finished run, an exported model."""
    return mistakes.make_playground(tmp_path_factory.mktemp("mistakes") / "playground")


def test_there_are_many_mistakes_and_none_twice():
    """At least 80; each has a text that its message must contain."""
    assert len(MISTAKES) >= 80
    assert len({mistake.did for mistake in MISTAKES}) == len(MISTAKES)
    assert [mistake.did for mistake in MISTAKES if not mistake.says] == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.topic}: {mistake.did}")
def test_a_mistake_ends_with_one_message_that_says_what_to_do(mistake, playground, tmp_path):
    """Exit status 2, no traceback, one message; nothing that existed before is changed."""
    answer = mistakes.make(mistake, playground, tmp_path / "copy")

    assert answer.status == 2, answer
    assert [part for part in mistake.says if part not in answer.message] == [], answer.message
    assert "Traceback" not in answer.message
    assert len(re.findall(r"^(?:\w+Error|run_train\.sh): ", answer.message, flags=re.MULTILINE)) == 1, answer.message
    assert answer.changed == [], answer.message


def test_the_page_of_mistakes_has_each_with_its_message():
    """docs/mistakes.md, which `python scripts/docs/mistakes_page.py` writes: in the order of mistakes.toml."""
    page = (mistakes.ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
    shown = re.findall(r"^You ([^\n]*):\n\n```text\n(.*?)\n```$", page, flags=re.MULTILINE | re.DOTALL)

    assert [did for did, _ in shown] == [mistake.did for mistake in MISTAKES]
    assert [
        (mistake.did, part)
        for mistake, (_, message) in zip(MISTAKES, shown, strict=True)
        for part in mistake.says
        if part not in message
    ] == []
