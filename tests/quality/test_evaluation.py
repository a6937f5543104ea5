"""An evaluation as text: header, verdict, and lines that fit a terminal."""

import dataclasses

import pytest

from s2o_compile import Evaluation, S2OConfig
from s2o_compile.quality.needles import NeedleRecall
from s2o_compile.quality.site_quality import SiteQuality
from s2o_compile.report import shortened

NAME = "model.language_model.decoder.layers.{}.self_attn.attention"


def recall(loss_s2o, loss_first=13.0):
    return NeedleRecall(count=24, length=40, loss_dense=2.0, loss_s2o=loss_s2o, loss_first=loss_first)


def evaluation(loss_s2o=2.004, needles=None):
    sites = tuple(
        SiteQuality(
            name=NAME.format(layer),
            head_density=(0.4,),
            error=0.03,
            head_error=(0.03,),
            worst_tile=0.1,
            worst_row=1.1,
            tile_keys=(1.0,),
            tile_visible=(2.0,),
        )
        for layer in (0, 11)
    )
    return Evaluation(
        model="SmolLM2",
        device="cpu",
        config=S2OConfig(tau=0.25, error=None),
        lengths=(4096, 4096),
        tokens=4095,
        loss_dense=2.0,
        loss_s2o=loss_s2o,
        top1_agreement=0.974,
        kl=0.003,
        sites=sites,
        exact_sites={},
        needles=needles,
        dtype="float32",
    )


def test_the_header_says_what_was_measured():
    assert str(evaluation()).startswith("SmolLM2, 4096 tokens, tau 0.25, min_seq_len auto, cpu, float32\n")
    old = dataclasses.replace(evaluation(), dtype="")
    assert str(old).startswith("SmolLM2, 4096 tokens, tau 0.25, min_seq_len auto, cpu\n")
    assert Evaluation.from_json(evaluation().to_json()) == evaluation()


@pytest.mark.parametrize(
    ("loss", "needles", "said"),
    [
        (2.004, recall(2.1), "Quality holds: the loss of plain text changes by +0.0040, 2.6% of the best next tokens "),
        (2.004, None, "Quality holds: "),
        (2.004, recall(5.0), "Plain text holds, far tokens suffer: "),
        (2.2, recall(2.1), "Plain text suffers: "),
        (2.2, None, "Plain text suffers: "),
        (2.2, recall(14.0), "Quality suffers: "),
        (2.004, recall(9.0, loss_first=2.0), "Quality holds: "),  # a model that recalls nothing loses nothing
    ],
)
def test_verdict(loss, needles, said):
    found = evaluation(loss, needles)
    assert found.verdict.startswith(said)
    assert found.verdict.endswith("Lower tau, or give a smaller error.") == ("holds:" not in said)
    assert ("of the recall of needles is kept" in found.verdict) == (needles is not None and needles.kept is not None)
    assert str(found).endswith(found.verdict)


@pytest.mark.parametrize(("loss_s2o", "kept"), [(2.0, 1.0), (1.5, 1.0), (7.5, 0.5), (13.0, 0.0), (20.0, 0.0)])
def test_the_share_of_recall(loss_s2o, kept):
    assert recall(loss_s2o).kept == kept


def test_the_table_fits_a_narrow_terminal():
    lines = evaluation().text(80).splitlines()[1:5]
    assert max(map(len, lines)) <= 80
    for layer, line in zip((0, 11), lines[2:], strict=True):
        assert f"{layer}.self_attn.attention" in line
        assert "…" in line
    assert NAME.format(11) in str(evaluation())


def test_shortened():
    assert shortened("abc", 3) == "abc"
    assert shortened("model.layers.10.self_attn", 16) == "mo….10.self_attn"
    for width in (4, 9, 16):
        cut = shortened("model.layers.10.self_attn", width)
        assert (len(cut), cut.count("…")) == (width, 1)
        assert cut.endswith("tn")
