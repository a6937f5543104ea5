"""The table of docs/zoo.md about attention in public files; ``python -m benchmarks.zoo_public`` writes it.

`FORMS` says what the pass makes of each form. A test runs them all, and compares the table.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import public_images, public_others, public_text  # noqa: F401  (they fill FORMS)
from benchmarks.public_form import FORMS

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
_TITLE = "## Attention in public files\n"
_INTRO = """Files that people copy write attention in their own ways. The minimal form of each was written anew and run
through `explain` (batch of two, four heads, 40 tokens). Outputs are compared in float32 and bfloat16, with and without
rows that see no key. The forms are in `benchmarks/public_text.py`, `public_images.py` and `public_others.py`; a test
checks each line, so this table is of the code beside it. The counts above are of the versions and the date that they
name. Written by `python -m benchmarks.zoo_public`.
"""


def section() -> str:
    """The section of the page."""
    results = [form.result for form in FORMS.values()]
    left = sum(result.startswith("dense: ") for result in results)
    missed = sum(result.startswith("not found: ") for result in results)
    files = {file.partition(" (")[0] for form in FORMS.values() for file in form.files.split("; ")}
    lines = [
        _TITLE,
        _INTRO,
        f"**{len(results)} forms of {len(files)} files**: {len(results) - missed} are found, "
        f"{len(results) - left - missed} rewritten.",
        "",
        "| files | form | result |",
        "|---|---|---|",
    ]
    for form in FORMS.values():
        result = form.result if form.result.startswith(("dense", "not found")) else f"rewritten: {form.result}"
        cells = (form.files.replace("; ", "<br>"), form.text, result)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """A page with today's section, in its old place or at the end."""
    old = re.compile(re.escape(_TITLE) + r".*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    kept = page.rstrip() + "\n\n" + _TITLE if _TITLE not in page else page
    return old.sub(lambda _: section() + "\n", kept).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
