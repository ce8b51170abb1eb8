"""What a chat template writes around answers, and the parts of a rendering that follow from it."""

from __future__ import annotations

from typing import NamedTuple

from llm_lightning.data.templates.hiding import Controls


class Region(NamedTuple):
    """A part of a rendering."""

    start: int
    stop: int
    kind: str
    is_trained: bool = True


class Shape(NamedTuple):
    """What a template writes around every answer."""

    header: str
    """The generation prompt, the last text before an answer."""
    footer: str
    """The text after the last answer."""
    end: tuple[str, int] | None
    """The first control token of the footer, by which an answer ends; None: there is none."""

    def fits(self, begun: str, answered: str) -> bool:
        """Whether a rendering is its prompt, an answer, and the footer."""
        n_around = len(begun) + len(self.footer)
        return answered.startswith(begun) and answered.endswith(self.footer) and len(answered) >= n_around

    def is_in(self, whole: str, begun: str, answered: str) -> bool:
        """Whether a longer rendering still begins with this one, up to the end of its answer."""
        return self.fits(begun, answered) and whole.startswith(self.up_to_end(answered))

    def up_to_end(self, answered: str) -> str:
        """A rendering without what follows the end of its last answer."""
        before = len(answered) - len(self.footer)
        return answered[: before + (self.footer.index(self.end[0]) + len(self.end[0]) if self.end else 0)]

    def prompt_regions(self, begun: str, start: int) -> list[Region]:
        """The prompt, and the header at the end of `begun`."""
        header = len(begun) - len(self.header) if begun.endswith(self.header) else len(begun)
        return [Region(start, header, "prompt"), Region(header, len(begun), "header")]

    def of_calls(self, begun: str, answered: str, controls: Controls) -> Shape:
        """The shape of an answer with tool calls, behind which some templates write another control token."""
        if self.fits(begun, answered) or not answered.startswith(begun):
            return self
        (pieces,) = controls.split(answered[len(begun) :], [len(answered)])
        end = next(((text, index) for text, index in reversed(pieces) if index is not None), None)
        footer = answered[answered.rindex(end[0]) :] if end else ""
        return self._replace(footer=footer, end=end) if end and not footer[len(end[0]) :].strip() else self
