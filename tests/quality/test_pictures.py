"""Pictures of an evaluation and of one head: what is drawn is what was measured."""

import dataclasses

import pytest
import torch

import s2o_compile
from s2o_compile import OptionError, S2OConfig
from s2o_compile.kernels import planner as rank
from s2o_compile.kernels.core import plan, stop_rule
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.quality.visit_map import visit_map
from tests.conftest import Case, bounds, distance, visible_pairs
from tests.helpers.tiny import tiny_language_model, tiny_tokens

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from s2o_compile.quality import pictures

CONFIG = S2OConfig(tau=4.0, min_seq_len=0, segment_len=128)


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """The smallest chunks, so that a few hundred keys are enough to stop early."""
    for module in (plan, rank):
        monkeypatch.setattr(module, "default_chunk_len", lambda _: 128)


@pytest.fixture(scope="module")
def evaluation():
    with pytest.MonkeyPatch.context() as patch:
        for module in (plan, rank):
            patch.setattr(module, "default_chunk_len", lambda _: 128)
        ids = tiny_tokens(700)
        return s2o_compile.evaluate(tiny_language_model(), ids, CONFIG, needles=False, taus=(0.0, 0.3, 1.0))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    yield figures
    from matplotlib import pyplot

    pyplot.close("all")


def draw(kind, evaluation, folder, drawn):
    path = folder / f"{kind}.png"
    pictures.PICTURES[kind](evaluation, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "700 tokens, τ = 4" in drawn[0].get_suptitle()
    return drawn[0].axes


def test_density_and_error_of_every_head(evaluation, tmp_path, drawn):
    density, error, *_ = draw("density", evaluation, tmp_path, drawn)
    assert density.images[0].get_array().tolist() == [list(site.head_density) for site in evaluation.sites]
    expected = [[100 * error for error in site.head_error] for site in evaluation.sites]
    assert error.images[0].get_array().tolist() == expected
    assert [label.get_text() for label in density.get_yticklabels()] == ["0", "1"]
    assert density.get_ylabel() == "layer"


def test_sites_of_different_heads_and_names(evaluation, tmp_path, drawn):
    first, second = evaluation.sites
    other = dataclasses.replace(second, name="decoder", head_density=(0.5,), head_error=(0.1,))
    density, *_ = draw("density", dataclasses.replace(evaluation, sites=(first, other)), tmp_path, drawn)
    assert density.images[0].get_array().mask.tolist() == [[False] * 4, [False, True, True, True]]
    assert [label.get_text() for label in density.get_yticklabels()] == ["layers.0", "decoder"]


def test_error_against_density(evaluation, tmp_path, drawn):
    (axes,) = draw("error", evaluation, tmp_path, drawn)
    heads = [pair for site in evaluation.sites for pair in zip(site.head_density, site.head_error, strict=True)]
    assert axes.collections[0].get_offsets().tolist() == [list(pair) for pair in heads]
    (curve,) = axes.lines
    sites = evaluation.sites
    assert curve.get_xdata()[-1] == pytest.approx(evaluation.density)
    assert curve.get_ydata()[:3] == pytest.approx([sum(s.curve[i].error for s in sites) / 2 for i in range(3)])
    assert [text.get_text() for text in axes.texts] == ["τ = 0", "τ = 0.3", "τ = 1", "τ = 4"]


def test_names_of_neighbouring_points_do_not_collide(evaluation, tmp_path, drawn):
    taus = (0.5, 0.75, 1.0, 1.25, 1.5)  # points that lie so near to each other that names on one side would overlap
    site = evaluation.sites[0]
    curve = tuple(
        dataclasses.replace(site.curve[0], tau=tau, density=0.3 - 0.006 * at, error=0.03 + 0.0008 * at)
        for at, tau in enumerate(taus)
    )
    sites = (dataclasses.replace(site, curve=curve),)
    (axes,) = draw("error", dataclasses.replace(evaluation, sites=sites), tmp_path, drawn)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) >= 3
    for at, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:at])


def test_an_exact_evaluation_has_no_errors_to_draw(evaluation, tmp_path):
    sites = tuple(dataclasses.replace(site, head_error=(0.0,) * 4, curve=()) for site in evaluation.sites)
    with pytest.raises(OptionError, match="plot error: expected errors above zero, got an exact evaluation"):
        pictures.draw_error(dataclasses.replace(evaluation, sites=sites), tmp_path / "error.png")


def test_stop_depth(evaluation, tmp_path, drawn):
    axes, _ = draw("depth", evaluation, tmp_path, drawn)
    first, second, mean, dense = axes.lines
    for line, site in ((first, evaluation.sites[0]), (second, evaluation.sites[1])):
        assert tuple(line.get_ydata()) == site.tile_keys
    assert first.get_xdata()[:2].tolist() == [128, 256]
    assert mean.get_ydata()[5] == pytest.approx(sum(site.tile_keys[5] for site in evaluation.sites) / 2)
    assert dense.get_ydata()[-1] == 700


def observed(inputs, **options):
    """The one call of the operator on these inputs."""
    calls = []
    given = {"causal": inputs.mask.causal, "scale": inputs.scale, "softcap": inputs.softcap, "tau": 4.0}
    given |= {"causal_offset": inputs.mask.offset if inputs.mask.causal else None, "site": "here"}
    with observe_attention(calls.append):
        torch.ops.s2o.attention(
            *inputs.tensors, inputs.mask.key_mask, **given | {"min_seq_len": 0, "segment_len": 256} | options
        )
    return calls[0]


CASES = [
    Case(queries=900, heads=4, kv_heads=2),
    Case(queries=300, keys=900, heads=2, kv_heads=1),
    Case(queries=900, padding="left"),
    Case(queries=900, softcap=20.0),
    Case(queries=900, keys=800, causal=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_the_visited_keys_is_the_output(case, monkeypatch):
    monkeypatch.setattr(stop_rule, "TAIL_SHARE", 0.0)  # what was not visited does not count
    inputs = case.inputs()
    call = observed(inputs)
    for head in range(case.heads):
        visits = visit_map(call, head)
        assert torch.equal(visits.visible, visible_pairs(inputs)[0, 0])
        assert not (visits.visited & ~visits.visible).any()
        assert 0 < visits.visited.sum() < visits.visible.sum()
        weights = visits.weights * visits.visited
        seen = weights.sum(-1, keepdim=True)
        output = weights @ inputs.value[0, head * case.kv_heads // case.heads] / seen.clamp(min=1e-30)
        assert distance(output, call.result.output[0, head]) <= bounds(inputs)[0]
        missed = visits.visible.any(-1, keepdim=True).float() - seen
        assert visits.missed_mass == pytest.approx(missed.mean().item(), abs=1e-5)


def test_keys_stand_by_rank_behind_their_own_segment():
    visits = visit_map(observed(Case(queries=900).inputs()), 0)
    for segment in range(4):
        keys, count = visits.key_order[segment].tolist(), int(visits.key_count[segment])
        assert sorted(keys) == list(range(900))
        first, stop = segment * 256, min(segment * 256 + 256, 900)
        assert keys[: stop - first] == list(range(first, stop))
        assert count == stop
        walked = visits.visited[first].gather(0, visits.key_order[segment])[stop - first : count]
        assert walked.tolist() == sorted(walked.tolist(), reverse=True)  # a tile stops once


@pytest.mark.parametrize(
    ("dense_heads", "head", "message"),
    [([], 4, "head: expected one of 0 to 3 of 'here', got 4"), ([1], 2, "key/value head 1 is marked dense")],
    ids=["unknown", "dense"],
)
def test_heads_without_an_order(dense_heads, head, message):
    call = observed(CASES[0].inputs(), dense_heads=dense_heads)
    with pytest.raises(OptionError, match=message):
        visit_map(call, head)


def test_colours_tell_visited_from_missed(tmp_path, drawn):
    visits = visit_map(observed(Case(queries=300).inputs(), segment_len=128), 0)
    strong = torch.where(visits.visible, 1.0, 0.0)
    visited = visits.visible.clone()
    visited[200:, :100] = False
    visits = dataclasses.replace(visits, weights=strong, visited=visited)
    pictures.draw_attention(visits, tmp_path / "attention.pdf", title="A title")
    assert (tmp_path / "attention.pdf").read_bytes().startswith(b"%PDF")
    from matplotlib.colors import to_rgb

    original, ranked = (axes.images[0].get_array() for axes in drawn[0].axes[:2])
    assert tuple(original[250, 50]) == pytest.approx(to_rgb(pictures.ORANGE), abs=1e-6)
    assert tuple(original[250, 150]) == tuple(original[50, 20]) == pytest.approx(to_rgb(pictures.BLUE), abs=1e-6)
    assert tuple(original[50, 250]) == tuple(ranked[50, 250]) == (1.0, 1.0, 1.0)
    orange = [tuple(colour) == tuple(original[250, 50]) for colour in ranked[290]]
    assert sum(orange) == 100
    assert not any(orange[: 300 - 256])  # in-segment keys stand first
    assert "A title\nhere, head 0: 78% of the pairs visited" in drawn[0].get_suptitle()
