"""The default corpus: the language reference that every CPython carries for `help()`.

About 60 documents and 400 kB of English with code, slightly different between Python versions; nothing is copied into
this project and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator


def documents() -> Iterator[tuple[str, str]]:
    """Yield (topic, text) in the order of the topics' names.

    A topic is left out if more than half of it is also in a longer topic: `for` is a section of `compound`, and with
    one of them in training and the other in validation, the loss would measure memorisation.

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
