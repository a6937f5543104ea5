"""A sample of the zoo, and the zoo's own tools. `make zoo` runs all of it."""

import argparse
import os
import time

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import zoo, zoo_measure, zoo_page, zoo_shrink
from benchmarks.zoo_measure import Row
from tests.conftest import quick_rows

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]

CAUSAL, BOTH = "causal", "bidirectional"
PADDED = ", key padding"
# architecture -> masks of the case without a mask, of the padded case, of generate's prefill; None where there is none
SDPA = {
    "llama": ({CAUSAL}, {CAUSAL + PADDED}, {CAUSAL + PADDED}),
    "gpt2": ({CAUSAL}, {CAUSAL + PADDED}, {CAUSAL + PADDED}),
    "mistral": ({"causal, window 48"}, {"causal, window 48" + PADDED}, {"causal, window 48" + PADDED}),
    "gemma3_text": ({CAUSAL, "causal, window 48"},) + ({CAUSAL + PADDED, "causal, window 48" + PADDED},) * 2,
    "bert": ({BOTH}, {BOTH + PADDED}, None),
    "modernbert": (None, None, None),  # its masks are the prover's business; here it must be right
    "bart": ({BOTH, CAUSAL}, None, None),  # self, causal and cross
    "whisper": ({BOTH, CAUSAL}, None, None),
    "vit": ({BOTH}, None, None),
    "wav2vec2": ({BOTH}, None, None),
}
OTHERS = {
    ("llama", "eager"): set(),
    ("bert", "flex_attention"): set(),
    ("hand-written: scaled_dot_product_attention", ""): set(),
    ("torch.nn: TransformerEncoder", ""): set(),
}


def rows(architecture, implementation):
    (job,) = [job for job in zoo.jobs([architecture]) if job[2] == implementation]
    found = list(zoo.run_job(job))
    assert found[0].case == "no mask", found
    return found


def masks(row):
    return {part.partition(" x ")[2] for part in row.masks.split("; ") if part}


def check(row):
    """No output differs, and every attention that ran is found or named."""
    assert row.status == "ok", row
    assert row.error <= zoo_measure.TOLERANCE
    assert row.ran > 0
    if row.graphs == 1:  # a graph that runs once: sites are calls
        assert row.found + row.not_found == row.ran
    assert row.rewritten + row.left == row.found
    assert row.contradictions == 0


QUICK = ("llama", "gemma3_text")
"""The rest of the sample is in the slow tier."""


@pytest.mark.parametrize("architecture", quick_rows(SDPA, QUICK))
def test_sdpa(architecture):
    found = {row.case: row for row in rows(architecture, "sdpa")}
    expected = dict(zip(("no mask", "padded", "generate"), SDPA[architecture], strict=True))
    for case, row in found.items():
        check(row)
        assert row.not_found == 0
        assert row.expressible_rewritten == row.expressible
        if expected[case] is not None:
            assert masks(row) == expected[case]
            assert case == "generate" or row.left == 0
        if case == "generate":
            assert "decode stays dense" in row.left_reasons


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "implementation"), OTHERS)
def test_what_is_not_found_is_named(architecture, implementation):
    row = rows(architecture, implementation)[0]
    check(row)
    named = {part.partition(" x ")[2] for part in row.not_found_kinds.split("; ") if part}
    assert named <= OTHERS[architecture, implementation]
    assert bool(named) == bool(row.not_found)


def test_shrink_keeps_layers_that_differ():
    defaults = {
        "model_type": "any",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "eos_token_id": 90_000,
        "vision_config": {"model_type": "vit", "image_size": 224, "patch_size": 14},
    }
    small = zoo_shrink.shrink(defaults, {"vision_config": {"patch_size": 7}})
    assert small["layer_types"] == ["sliding_attention", "full_attention"]
    assert small["num_hidden_layers"] == 2
    assert (small["hidden_size"], small["num_attention_heads"], small["num_key_value_heads"]) == (64, 4, 2)
    assert small["eos_token_id"] < zoo_shrink.VOCABULARY
    assert small["vision_config"]["patch_size"] == 7


def test_distance():
    x = torch.ones(2, 3)
    keep = torch.tensor([[True, True, False], [True, True, True]])
    other = x.clone()
    other[0, 2] = 5.0
    assert zoo_measure.distance((x,), (x,), None) == 0
    assert zoo_measure.distance(other, x, keep) == 0
    assert zoo_measure.distance(other, x, None) > 1
    assert zoo_measure.distance(x.long(), x.long() + 1, None) == float("inf")
    assert zoo_measure.distance(x, x[:1], None) == float("inf")
    assert zoo_measure.distance(x * float("nan"), x, None) == float("inf")


def test_jobs_crash_and_hang_alone_and_never_exceed_the_workers(monkeypatch):
    def run_job(job):
        start = time.monotonic()
        if job[1] == "crash":
            os._exit(3)
        time.sleep(60 if job[1] == "hang" else 0.2)
        yield Row("any", job[1], seconds=start, error=time.monotonic())

    monkeypatch.setattr(zoo, "run_job", run_job)
    names = ["crash", "hang", "a", "b", "c", "d"]
    ended = zoo.run_all([("any", name, "") for name in names], 2, limit=3)
    found = {row.architecture: row for rows in ended for row in rows}
    assert sorted(found) == sorted(names)
    assert "exit code 3" in found["crash"].note
    assert "stopped after 3 seconds" in found["hang"].note
    ran = sorted((found[name].seconds, found[name].error) for name in "abcd")
    assert all(end <= start for (_, end), (start, _) in zip(ran, ran[2:], strict=False))


def test_a_job_of_several_files_is_the_last_one(tmp_path):
    a, b = ([Row("any", "a", implementation=i, case=c, ran=n) for i, c, n in rows] for rows in (
        [("sdpa", "no mask", 1), ("sdpa", "padded", 2), ("eager", "no mask", 3)],
        [("sdpa", "no mask", 4)],
    ))  # fmt: skip
    zoo.write(tmp_path / "a.csv", a)
    zoo.write(tmp_path / "b.csv", b)
    together = zoo.merged([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert sorted((row.implementation, row.ran) for row in together) == [("eager", 3), ("sdpa", 4)]


def test_shards_are_all_jobs_once():
    every = zoo.jobs(["llama", "bert", "gpt2"])
    assert len(every) > 4
    shards = [every[i - 1 :: n] for i, n in map(zoo._shard, ("1/3", "2/3", "3/3"))]
    assert sorted(job for shard in shards for job in shard) == sorted(every)
    for wrong in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a shard"):
            zoo._shard(wrong)


def test_the_page_counts_what_the_rows_say(tmp_path):
    found = [
        Row("causal LM", "a", implementation="sdpa", case="no mask", ran=3, found=2, rewritten=1, left=1, not_found=1,
            left_reasons="1 x because | of this", not_found_kinds="1 x flex_attention", error=0.0, expressible=2,
            expressible_rewritten=1, missed_reasons="1 x mask_3 of 17; 1 x mask_12 of 17", seen_masks="3 x causal"),
        Row("causal LM", "b", implementation="sdpa", case="no mask", status="differs", error=0.5, control=0.25),
        Row("vision", "c", implementation="sdpa", status="cannot build", note="too <odd>"),
        Row("part", "d", status="part"),
    ]  # fmt: skip
    zoo_page.write_page(tmp_path / "zoo.md", found, not_started=7)
    text = (tmp_path / "zoo.md").read_text()
    assert "**2 architectures of transformers and 0 models from elsewhere, 2 runs**: 1 equal" in text
    assert "| causal LM, sdpa | 2 | 2 | 3 | 2 | 1 | 1 | 1 | 2 | 1 | 1 | 0 |" in text
    assert "**1 of 2 expressible calls are rewritten: 50.0%.** 0 calls" in text
    assert "| mask of 17 | 2 | 1 |" in text
    assert "| causal | 3 | 1 |" in text
    assert "| because \\| of this | 1 | 1 |" in text
    assert "| b | sdpa | no mask | differs | 5.0e-01 | 2.5e-01 |" in text
    assert "| c | too &lt;odd> |" in text
    assert "7 jobs" in text
    assert "1 configurations are parts of models and none of their own (no Auto class knows them): d." in text
