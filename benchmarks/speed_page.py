"""docs/speed.md, and the tables of README.md and benchmarks/README.md: what the files in benchmarks/results say.

    python -m benchmarks.speed_page     # or `make figures`, which draws the pictures, too

Of several devices the newest that was measured stands on the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.measured import (
    FA3,
    RESULTS,
    ROOT,
    crossover,
    device,
    first_token,
    newest,
    on_cpu,
    one_call,
    ours_on,
    paragraph,
    read,
    seconds,
    source,
    table,
    times,
    tokens,
)

README, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
PAGE = ROOT / "docs" / "speed.md"
MARKS = {
    README: ("<!-- speed: written by benchmarks/speed_page.py -->", "<!-- end: speed -->"),
    BENCHMARKS: ("<!-- tables: written by benchmarks/speed_page.py -->", "<!-- end: tables -->"),
}
"""Where tables stand in pages that are else written by hand."""


SHOWN = (131072, 32768, 16384, 8192)
"""Tokens of the single attentions in README's table."""
SHOWN_ON_CPU = (32768, 8192)


def readme_table() -> str:
    """README's table: where it wins first, each number with its baseline and condition."""
    lines = []
    about, _ = read(newest("end-to-end"))
    for length, baseline, dense, ours, density in first_token():
        what = f"whole model¹, {tokens(length)} tokens, {device(about)}"
        lines.append([what, baseline, seconds(dense), seconds(ours), times(dense, ours), f"{density:.2f}, held"])
    about, rows = read(newest("attention"))
    for length, _, dense, _ours in one_call():
        ours = next(row for row in rows if (row["length"], row["what"]) == (length, "S2O whole op, topical, default"))
        if length in SHOWN:
            what = f"one attention², {tokens(length)} tokens, {device(about)}"
            pair = dense["ms"] / 1e3, ours["ms"] / 1e3
            faster = times(*pair) + (", but dense runs here by default" if length < crossover(about) else "")
            lines.append([what, "SDPA", *map(seconds, pair), faster, f"{ours['density']:.2f}"])
    about, _ = read(RESULTS / "cpu.json")
    for row in on_cpu():
        if row["N"] in SHOWN_ON_CPU and row["heads"] == "8x2x128":
            what = f"one attention², {tokens(row['N'])} tokens, {device(about)}, {row['dtype']}"
            pair = row["dense_s"], row["whole_s"]
            lines.append([what, "SDPA", *map(seconds, pair), times(*pair), f"{row['density']:.2f}"])
    names = [f"[{path.name}](benchmarks/results/{path.name})" for path in _sources()]
    return "\n".join(
        [
            *table(["what", "dense, by", "takes", "S2O", "faster", "share of pairs computed"], lines),
            "",
            *paragraph(
                "¹ Time to the first token of Llama-3.1-8B's shape. Its weights are random, so the share is *held*: "
                "fixed by hand. ² Synthetic input with topics, the default settings. SDPA is PyTorch's own attention, "
                f"by its fastest kernel, with or without `torch.compile`. Files: {', '.join(names)}."
            ),
        ]
    )


def _sources() -> list[Path]:
    return [newest("end-to-end"), newest("attention"), RESULTS / "cpu.json"]


def page() -> str:
    """docs/speed.md."""
    sections: list[Callable[[], list[str]]] = [_first_token, _one_call, _where, _ceiling, _cpu, _servers, _gpus, _short]
    return "\n".join([*_INTRO, *(line for section in sections for line in ["", *section()])]) + "\n"


_INTRO = [
    "# How fast is it?",
    "",
    "<!-- Written by `make figures` (benchmarks/speed_page.py). Change that file, not this page. -->",
    "",
    *paragraph(
        "The longer the prompt, the more you gain. On a GPU S2O begins to win between 8K and 16K tokens, on a CPU with "
        "a C++ compiler at about 4K. Below that length it runs dense attention by itself, so you lose nothing."
    ),
    "",
    "![Time to the first token, and time of one attention against the length of the prompt](speed.png)",
    "",
    'A number of "times faster" says little alone. So each table names its baseline, and the *density*: the share of',
    "query-key pairs that S2O computed. The density depends on your model and your text. `s2o explain` shows yours.",
]
_FROM_DOCS = "../benchmarks/results/"


def _first_token() -> list[str]:
    path = newest("end-to-end")
    about, rows = read(path)
    lines = [
        [tokens(length), baseline, seconds(dense), seconds(ours), times(dense, ours), f"{density:.2f}"]
        for length, baseline, dense, ours, density in first_token()
    ]
    peaks = {row["what"]: row["peak_GiB"] for row in rows if "peak_GiB" in row}
    memory = f" Peak memory: {max(peaks.values()):g} GiB dense at most, {min(peaks.values()):g} GiB at least."
    return [
        "## Time to the first token",
        "",
        *paragraph(
            f"A model of Llama-3.1-8B's shape in {about['dtype']} on one {device(about)}. It reads the prompt, fills "
            "its cache, and gives the logits of the last token. The weights are random, and random weights give no "
            f"density that means something: it is held at {about['density_held']:g}.{memory if peaks else ''}"
        ),
        "",
        *table(["tokens", "dense, by", "dense", "S2O", "faster", "density"], lines),
        "",
        source(path, about, _FROM_DOCS),
    ]


def _one_call() -> list[str]:
    path = newest("attention")
    about, rows = read(path)
    lines = []
    for length, kernel, dense, ours in one_call():
        here = {row["what"]: row for row in rows if row["length"] == length}
        fa3 = [here[FA3]["ms"]] if FA3 in here else []
        lines.append(
            [
                tokens(length),
                f"{seconds(dense['ms'] / 1e3)} ({kernel.removeprefix('SDPA, ').removesuffix(' kernel')})",
                *(seconds(ms / 1e3) for ms in fa3),
                seconds(ours["ms"] / 1e3),
                times(dense["ms"], ours["ms"]),
                *(times(ms, ours["ms"]) for ms in fa3),
                f"{ours['density']:.2f}",
                f"{ours['relative_error']:.0%}" if "relative_error" in ours else "",
            ]
        )
    measured = any(row["what"] == FA3 for row in rows)  # its wheel may have been missing there
    heads = ["tokens", "SDPA's fastest kernel", *["FlashAttention-3"] * measured, "S2O"]
    heads += ["faster than SDPA", *["than FA-3"] * measured, "density", "error"]
    shape, begins = about["shape"], tokens(crossover(about))
    return [
        "## One attention on a GPU",
        "",
        *paragraph(
            f"{shape['heads']} query heads on {shape['kv_heads']} key/value heads of {shape['head_dim']}, "
            f"{about['dtype']}, causal, `S2OConfig(tau=0.5)`, ranking included. The input is synthetic, with topics "
            f"as text has them. S2O was forced below {begins}, where dense attention runs by default."
        ),
        "",
        *table(heads, lines),
        "",
        source(path, about, _FROM_DOCS),
    ]


def _where() -> list[str]:
    path = newest("attention")
    about, rows = read(path)
    lines = []
    for length, _, dense, _ours_topical in one_call():
        here = {row["what"]: row for row in rows if row["length"] == length}
        noise, never = ours_on(here, "random"), ours_on(here, "never stops")
        cells = [f"{times(dense['ms'], row['ms'])} ({row['density']:.2f})" for row in (noise, never)]
        lines.append([tokens(length), *cells])
    return [
        "## Where it gains nothing",
        "",
        *paragraph(
            "Pure noise has no important keys, and an input on which nothing may be left out has to be computed whole. "
            "Times faster than SDPA's fastest kernel, the density in brackets:"
        ),
        "",
        *table(["tokens", "noise, `S2OConfig(tau=0.5)`", "nothing left out"], lines),
        "",
        source(path, about, _FROM_DOCS),
        "",
        *paragraph(
            "Decoding, training, and prompts below the crossover run dense attention. Small models with little "
            "attention gain little: the rest of the model takes as long as before."
        ),
    ]


INPUTS = {"topical": "topics", "random": "noise"}


def _by_config(path: Path) -> dict[tuple[str, int], dict[str, dict]]:
    """Rows of a file by input and tokens, then by configuration."""
    found: dict[tuple[str, int], dict[str, dict]] = {}
    for row in read(path)[1]:
        found.setdefault((row["input"], row["tokens"]), {})[row["config"]] = row
    return found


def _ceiling_costs() -> str:
    """Per cent that the default's ceiling adds to a call over topics that S2O wins."""
    pairs = _by_config(newest("default-time"))
    more = [
        x["default"]["ms"] / x["tau-0.5"]["ms"] - 1
        for (name, length), x in pairs.items()
        if name == "topical" and length >= 16384
    ]
    return f"{100 * min(more):.0f} to {100 * max(more):.0f}"


def _ceiling() -> list[str]:
    path = newest("default-time")
    lines = [
        [
            f"{INPUTS[name]}, {tokens(length)}",
            seconds(x["default"]["dense_ms"] / 1e3),
            *(f"{seconds(x[config]['ms'] / 1e3)} ({x[config]['density']:.2f})" for config in ("tau-0.5", "default")),
            times(x["default"]["dense_ms"], x["default"]["ms"]),
        ]
        for (name, length), x in _by_config(path).items()
        if "default" in x
    ]
    return [
        "## What the default costs",
        "",
        *paragraph(
            "`S2OConfig()` is tau 0.5 with a ceiling of 10 % on the error ([quality.md](quality.md)). The tables above "
            "are of tau 0.5 alone. Where the ceiling holds at once, measuring it adds "
            f"{_ceiling_costs()} % from 16K tokens on. Noise errs more, so there the default visits all keys:"
        ),
        "",
        *table(["input, tokens", "dense", "`S2OConfig(tau=0.5)`", "`S2OConfig()`", "default, faster"], lines),
        "",
        source(path, read(path)[0], _FROM_DOCS),
    ]


def _cpu() -> list[str]:
    path = RESULTS / "cpu.json"
    about, _ = read(path)
    lines = [
        [
            tokens(row["N"]),
            row["heads"].replace("x", " on ", 1).replace("x", " of "),
            row["dtype"],
            seconds(row["dense_s"]),
            seconds(row["whole_s"]),
            times(row["dense_s"], row["whole_s"]),
            f"{row['density']:.2f}",
        ]
        for row in on_cpu()
    ]
    return [
        "## One attention on a CPU",
        "",
        "Query heads on key/value heads; synthetic input with topics, the default settings.",
        "",
        *table(["tokens", "heads", "dtype", "SDPA", "S2O", "faster", "density"], lines),
        "",
        source(path, about, _FROM_DOCS),
        "",
        *paragraph(
            "A whole model gains less, because the rest of it takes as long as before. "
            "[SmolLM2 on two CPU cores](../benchmarks/notes/models.md#smollm2-135m-on-two-cpu-cores) shows one."
        ),
    ]


def _servers() -> list[str]:
    path = RESULTS / "serving-h200.json"
    about, rows = read(path)
    packed = [row for row in rows if row["section"] == "packed"]
    lines = []
    for count, length in dict.fromkeys((row["sequences"], row["tokens"]) for row in packed):
        here = {row["what"]: row for row in packed if (row["sequences"], row["tokens"]) == (count, length)}
        ours, fa3 = here["S2O"], here["FlashAttention-3 varlen"]
        pair = fa3["ms"] / 1e3, ours["ms"] / 1e3
        lines.append([f"{count} of {tokens(length)}", *map(seconds, pair), times(*pair), f"{ours['density']:.2f}"])
    return [
        "## Several prompts in one tensor",
        "",
        "Servers join prompts. One attention over such a batch, topical input, `S2OConfig(tau=0.5)`:",
        "",
        *table(["prompts", "FlashAttention-3 varlen", "S2O", "faster", "density"], lines),
        "",
        source(path, about, _FROM_DOCS),
        "",
        "Prompts of 2K tokens are below the crossover, so their attention is dense. Keys in pages cost 1 % more, and",
        "prefills in chunks up to a quarter ([notes](../benchmarks/notes/serving.md)).",
    ]


def _gpus() -> list[str]:
    path = RESULTS / "several-gpus-h200.json"
    about, rows = read(path)
    lines = [
        [
            tokens(row["tokens"]),
            seconds(row["one_gpu_ms"] / 1e3),
            seconds(row["context_parallel_ms"] / 1e3),
            times(row["one_gpu_ms"], row["context_parallel_ms"]),
        ]
        for row in rows
        if row["section"] == "operator"
    ]
    return [
        "## Two GPUs",
        "",
        f"One attention by S2O on one GPU and on {about['ranks']}, at a density of {about['density_held']:g}",
        "([several-gpus.md](several-gpus.md)):",
        "",
        *table(["tokens", "one GPU", "two GPUs", "faster"], lines),
        "",
        source(path, about, _FROM_DOCS),
    ]


def _short() -> list[str]:
    path = newest("overhead")
    about, rows = read(path)
    short = [row for row in rows if row["section"] == "short"]
    more, gpu = [row["host_more"] for row in short], [row["over_SDPA"] for row in short]
    return [
        "## What a short call costs",
        "",
        f"A call that runs dense takes {min(more):.0f} to {max(more):.0f} microseconds of the host more than SDPA, and",
        f"{min(gpu):.2f} to {max(gpu):.2f} times its GPU time, from 16 to {max(row['N'] for row in short)} tokens.",
        "In CUDA graphs the host costs nothing.",
        "",
        source(path, about, _FROM_DOCS),
        "",
        "## More",
        "",
        *paragraph(
            "[benchmarks/README.md](../benchmarks/README.md) has every benchmark, its command and its file. On your "
            "own model: `s2o bench`. On another GPU: [`s2o tune`](tune.md)."
        ),
    ]


def benchmark_tables() -> str:
    """The three tables of benchmarks/README.md: one call, whole models' first token, rivals at the same error."""
    calls, first = _one_call(), _first_token()
    rivals = [
        "## At the same error",
        "",
        *paragraph(
            "Density that a rule needs for an error, 8K tokens of Python's language reference, float32, mean over "
            "heads and layers. Both rivals are rebuilt from their papers."
        ),
        "",
    ]
    lines, about, files = [], {}, []
    for model, name in (("gemma3", "Gemma-3-270M"), ("smollm2", "SmolLM2-135M")):
        path = RESULTS / f"rivals-{model}-cpu.json"
        about, rows = read(path)
        files.append(f"[{path.name}](results/{path.name})")
        for section, rule in (("density at error", "S2O"), ("PBS-Attn", "PBS-Attn"), ("FlashPrefill", "FlashPrefill")):
            row = next(row for row in rows if row["section"] == section and row.get("corrected", True))
            lines.append([name, rule, *(f"{row[f'at {error}%']:.2f}" for error in (2, 5, 10))])
    rivals += table(["model", "rule", "2 %", "5 %", "10 %"], lines)
    rivals += ["", f"*{about['device']}, torch {about['torch']}, {about['date']}: {', '.join(files)}.*"]
    text = "\n".join([*calls, "", *first, "", *rivals])
    return text.replace("](../benchmarks/results/", "](results/")


def with_tables(page: Path) -> str:
    """A page's text with the tables that the files make."""
    begin, end = MARKS[page]
    head, _, rest = page.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    if not tail:
        raise SystemExit(
            f"{page.name}: expected the lines {begin} and {end}, got none. Add them where the table belongs."
        )
    tables = {README: readme_table, BENCHMARKS: benchmark_tables}[page]()
    return f"{head}{begin}\n{tables}\n{end}{tail}"


def main() -> None:
    """Write all three pages."""
    for path in MARKS:
        path.write_text(with_tables(path))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
