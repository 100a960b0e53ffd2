import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from ptq_jax.report import figures, records


def texts(figure):
  """Every text a figure shows."""
  return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_draw_makes_what_the_records_allow(example):
  names = ["privacy_utility", "roc", "last_layer", "exposure_overlap"]
  assert list(figures.draw(example.audit())) == names
  assert list(figures.draw([example.run()])) == []
  assert list(figures.draw([example.leakage(curve=None)])) == ["privacy_utility"]
  assert list(figures.draw([example.leakage(tpr=[])])) == ["roc"]
  exposure = next(record for record in example.audit() if record["kind"] == "exposure")
  assert list(figures.draw([exposure])) == ["exposure_overlap"]
  assert list(figures.draw([exposure | {"method": "none"}])) == []


def test_training_is_drawn_by_epoch():
  curves = {f"{name}{end}": [0.5, 0.25] for name in ("loss", "accuracy") for end in ("", "_high")}
  record = records.make("training", **curves, loss_low=[0.4, 0.1], accuracy_low=[0.3, 0.2])
  figure = figures.draw([record])["training"]
  for axes, factor in zip(figure.axes, (1, 100), strict=True):
    np.testing.assert_allclose(
      axes.get_lines()[0].get_xydata(), [[1, 0.5 * factor], [2, 0.25 * factor]]
    )
  with pytest.raises(ValueError, match="'accuracy_low'"):
    records.make("training", **curves, loss_low=[])


def test_drawing_leaves_no_global_state(example):
  before = dict(matplotlib.rcParams)
  figure = figures.privacy_utility(example.audit(methods=("obc",), sweep=False))
  figures.to_svg(figure)
  assert dict(matplotlib.rcParams) == before


def test_roc_has_a_panel_per_method_and_a_line_per_width_and_attacker(example):
  figure = figures.roc(example.audit(methods=("adaround", "obc")))
  assert [axes.get_title("left") for axes in figure.axes] == ["AdaRound", "OBC"]
  for axes in figure.axes:
    assert len(axes.get_lines()) == 1 + 1 + 3 * 2  # chance, full precision, widths x attackers
    assert [line.get_linestyle() for line in axes.get_lines()[2:]] == ["--", "-"] * 3
    assert axes.get_xscale() == axes.get_yscale() == "log"
  legend = [text.get_text() for text in figure.legends[0].get_texts()]
  assert legend[:4] == ["full precision", "4 bit", "2 bit", "1.58 bit"]
  assert "chance" in legend


def test_roc_draws_the_recorded_curve_without_zeros(example):
  curve = {"fpr": [0.0, 0.001, 0.01, 1.0], "tpr": [0.0, 0.02, 0.1, 1.0]}
  figure = figures.roc([example.leakage(curve=curve)])
  x, y = figure.axes[0].get_lines()[1].get_data()
  np.testing.assert_array_equal(x, curve["fpr"][1:])
  np.testing.assert_array_equal(y, curve["tpr"][1:])


@pytest.mark.parametrize(("non_members", "lowest"), [(25_000, 1e-4), (750, 1e-3), (50, 1e-2)])
def test_roc_starts_where_the_non_members_can_tell(example, non_members, lowest):
  figure = figures.roc([example.leakage(non_members=non_members)])
  assert figure.axes[0].get_xlim() == pytest.approx((lowest, 1))


def test_roc_needs_a_curve(example):
  with pytest.raises(ValueError, match="no leakage record of this attack has a 'curve'"):
    figures.roc([example.leakage(curve=None)])


def test_privacy_utility_has_a_panel_per_attacker(example):
  audit = example.audit(methods=("obc",), sweep=False)
  figure = figures.privacy_utility(audit, fpr=0.01)
  titles = [axes.get_title("left") for axes in figure.axes]
  assert titles == ["Attacker with full-precision shadows", "Attacker with matched shadows"]
  assert figure.axes[0].get_ylabel() == "TPR at 1% FPR, %"
  assert "OBC" in texts(figure)
  points = {
    tuple(line.get_xydata()[0].round(6))
    for line in figure.axes[1].get_lines()
    if line.get_marker() == "s"
  }
  [row] = [r for r in records.side_by_side(audit) if r.variant == ("obc", 4, 4)]
  accuracy = 100 * row.matched["test_accuracy"]["value"]
  for record in row.shown:  # the second is the faint one
    tpr = 100 * records.tpr_at(record, 0.01)["value"]
    assert (round(accuracy, 6), round(tpr, 6)) in points


def test_privacy_utility_without_matched_shadows_has_one_panel(example):
  audit = example.audit(methods=("brecq",), attackers=("full_precision",), sweep=False)
  figure = figures.privacy_utility(audit)
  assert len(figure.axes) == 1
  assert not any("see it" in text for text in texts(figure))


def test_privacy_utility_says_when_rates_are_weak(example):
  figure = figures.privacy_utility([example.leakage(non_members=50)])
  assert figure.axes[0].get_ylabel().endswith("†")
  assert any("fewer than 10 false positives" in text for text in texts(figure))


def test_wide_errors_are_spaced_by_their_logarithm(example):
  plain = [example.leakage(accuracy=0.70), example.leakage("obc", 3, 3, accuracy=0.60)]
  wide = [example.leakage(accuracy=0.97), example.leakage("obc", 3, 3, accuracy=0.30)]
  assert figures.privacy_utility(plain).axes[0].get_xscale() == "linear"
  axes = figures.privacy_utility(wide).axes[0]
  assert "logarithm of the error" in axes.get_xlabel()
  ten, one = (axes.transData.transform((x, 1))[0] for x in (90, 99))
  fifty = axes.transData.transform((50, 1))[0]
  assert (one - ten) / (ten - fifty) == pytest.approx(math.log(10) / math.log(5))


def test_variants_that_hardly_classify_are_named_instead_of_drawn(example):
  found = [
    example.leakage(accuracy=0.9),
    example.leakage("obc", 4, 4, accuracy=0.8),
    example.leakage("obc", 3, 3, accuracy=0.5),
    example.leakage("nearest", 4, 4, accuracy=0.44),
    example.leakage("nearest", 3, 3, accuracy=0.2),
  ]
  figure = figures.privacy_utility(found)
  assert (
    figure.legends[0]
    .get_title()
    .get_text()
    .endswith("not drawn, less than half as accurate: Nearest at 2 bit and 1.58 bit")
  )
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert "OBC" in labels
  assert "Nearest" not in labels
  only_broken = figures.privacy_utility([found[0], found[-1]])
  assert "not drawn" not in only_broken.legends[0].get_title().get_text()


def test_an_unrecorded_fpr_is_refused(example):
  with pytest.raises(ValueError, match=r"no TPR was recorded at fpr 0.05; recorded are \[0.1, "):
    figures.privacy_utility([example.leakage()], fpr=0.05)


def test_last_layer_has_a_column_per_width(example):
  found = [example.leakage()]
  for levels in (4, 3):
    for last in (levels, 16, None):
      found += [example.leakage("obc", levels, last, a) for a in records.SIDES]
  figure = figures.last_layer(found)
  assert [axes.get_title("left") for axes in figure.axes[:2]] == [
    "Other layers at 2 bit",
    "Other layers at 1.58 bit",
  ]
  assert [t.get_text() for t in figure.axes[3].get_xticklabels()] == ["1.58", "4", "full"]
  lines = [line for line in figure.axes[3].get_lines() if line.get_marker() == "o"]
  assert [len(line.get_xdata()) for line in lines] == [3, 3]


def test_last_layer_needs_a_sweep(example):
  with pytest.raises(ValueError, match="more than one last_layer_levels"):
    figures.last_layer([example.leakage(), example.leakage("obc", 3, 3)])


def test_exposure_overlap_shows_the_overlap_of_random_sets(example):
  figure = figures.exposure_overlap(example.audit(methods=("obc", "brecq")))
  [axes] = figure.axes
  assert [t.get_text() for t in axes.get_xticklabels()] == ["1.58", "2", "4"]
  [chance] = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
  generator = np.random.default_rng(0)
  draws = [[set(generator.choice(1500, 150, replace=False)) for _ in range(2)] for _ in range(300)]
  jaccard = np.mean([len(a & b) / len(a | b) for a, b in draws])
  assert chance.get_ydata()[0] == pytest.approx(jaccard, rel=0.05)
  assert "150 most exposed" in axes.get_ylabel()


def test_exposure_overlap_needs_records(example):
  with pytest.raises(ValueError, match="no exposure record"):
    figures.exposure_overlap([example.leakage()])


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_shows_every_image(channels):
  images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, channels), dtype=np.uint8)
  figure = figures.image_grid(images, [f"image {i}\n$x$" for i in range(10)], columns=4)
  shown = [axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()]
  assert len(shown) == 10
  np.testing.assert_array_equal(np.reshape(shown[7], (8, 8, -1)), images[7])
  assert "image 9" in " ".join(texts(figure))
  assert figures.to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_image_grid_refuses_what_is_no_image():
  images = np.zeros((2, 8, 8, 2), np.uint8)
  with pytest.raises(ValueError, match=r"shape \(2, 8, 8, 2\); need at least one"):
    figures.image_grid(images, ["a", "b"])
  with pytest.raises(ValueError, match="1 captions for 2 images"):
    figures.image_grid(images[..., :1], ["a"])


def test_missing_numbers_and_strange_names_are_drawn(example):
  nothing = records.number(None)
  name = "a $\\frac{1}{$ <b>method</b> " * 4
  found = [
    example.leakage(accuracy=0.9),
    example.leakage(name, 5, 5, test_accuracy=nothing),
    example.leakage(name, 5, None, auc=nothing, tpr=[]),
    example.leakage(name, 3, 3, "matched", test_accuracy=records.number(0.5)),
    dict(example.leakage("obc", 3, None), num_non_members=None),
  ]
  for figure in figures.draw(found).values():
    assert figures.to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_files_are_the_same_every_time(example):
  audit = example.audit(methods=("obc",), grids=((3, 3),), sweep=False)
  first, second = (figures.privacy_utility(audit) for _ in range(2))
  assert figures.to_svg(first) == figures.to_svg(second)
  assert figures.to_png(first, dpi=50) == figures.to_png(second, dpi=50)
  svg = figures.to_svg(first)
  assert "<dc:date>" not in svg
  assert ElementTree.fromstring(svg.encode()).tag.endswith("svg")


def test_inline_svg_takes_the_colours_of_its_page_and_keeps_its_ids_apart(example):
  figure = figures.roc([example.leakage(), example.leakage("obc", 3, 3)])
  svg = figures.to_inline_svg(figure, name="first", description='an "ROC" <curve>')
  root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
  assert root.get("aria-label") == 'an "ROC" <curve>'
  ids = {element.get("id") for element in root.iter() if element.get("id")}
  assert ids
  assert all(name.startswith("first-") for name in ids)
  used = set(re.findall(r'(?:url\(#|href="#)([^)"]*)', svg))
  assert used
  assert used <= ids
  assert "currentColor" in svg
  assert figures.INK not in svg
  assert "http" not in svg
  assert ">false-positive rate</text>" in svg


def test_every_method_and_width_has_its_own_colour(example):
  methods = ["nearest", "adaround", "brecq", "obc", "mine", "yours"]
  assert len({figures._method_color(m, methods) for m in methods}) == len(methods)
  levels = [256, 16, 8, 4, 3]
  assert len({figures._level_color(n, levels) for n in levels}) == len(levels)


def test_releases_draw_both_versions_against_each_alone(example):
  found = example.audit(attackers=("full_precision", "matched", "releases"))
  figure = figures.draw(found, fpr=0.01)["releases"]
  panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
  assert [axes.get_title(loc="left") for axes in panels] == ["Nearest", "AdaRound", "BRECQ", "OBC"]
  lines = [line for line in panels[0].get_lines() if len(line.get_ydata()) == 3]
  alone, both = lines[:2]
  full = panels[0].get_lines()[-1]
  rows = {row.variant: row for row in records.side_by_side(found)}
  nearest = rows[records.Variant("nearest", 16, 16)]
  assert alone.get_ydata()[-1] == pytest.approx(
    100 * records.tpr_at(nearest.counted, 0.01)["value"]
  )
  [pair] = records.select(found, "leakage", method="nearest", levels=16, attacker="releases")
  assert both.get_ydata()[-1] == pytest.approx(100 * records.tpr_at(pair, 0.01)["value"])
  top = rows[records.Variant("none", None, None)]
  assert full.get_ydata()[0] == pytest.approx(100 * records.tpr_at(top.counted, 0.01)["value"])
  with pytest.raises(ValueError, match="nothing to draw"):
    figures.releases(example.audit())
