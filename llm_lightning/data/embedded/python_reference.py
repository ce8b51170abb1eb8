"""The default corpus: the language reference that every CPython carries for `help()`.

Some 60 documents and 400 kB of English with code, differing a little between Python versions; nothing is copied
into this project and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator


def documents() -> Iterator[tuple[str, str]]:
    """Yield (topic, text) in the order of the topics' names.

    A topic that stands, more than half of it, in a longer one is left out: `for` is a section of `compound`, and
    with one of them in training and the other in validation, the loss would measure what was learned by heart.

    Raises:
        FileNotFoundError: this Python was packaged without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            "data.name=python_reference needs the module pydoc_data, which this Python was packaged without; "
            "install your system's full Python, or give your own text with data.path=FILE"
        ) from error
    kept, seen = {}, set[str]()
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = set(text.split("\n\n"))
        if sum(map(len, paragraphs - seen)) > len(text) / 2:
            kept[topic] = text
        seen |= paragraphs
    yield from sorted(kept.items())
