"""One self-contained page about a run, and the file that keeps what is known of its features."""

from spalf.report.pack import FORMAT, pack, unpack
from spalf.report.page import page
from spalf.report.rundir import RunRecord, read
from spalf.report.story import story
from spalf.report.tables import evaluation, headline, parameters
from spalf.report.words import SORTS, find, search, words

__all__ = [
    "FORMAT",
    "SORTS",
    "RunRecord",
    "evaluation",
    "find",
    "headline",
    "pack",
    "page",
    "parameters",
    "read",
    "search",
    "story",
    "unpack",
    "words",
]
