"""Figures of result records: ROC curves, privacy against utility, last layer, exposure.

Every function returns a new `matplotlib.figure.Figure` and touches no global state; `to_png`,
`to_svg` and `to_inline_svg` turn one into bytes or text that depend on nothing but the figure.
Colours tell methods or bit widths apart also without colour vision. Matched shadows are drawn
solid and filled, full-precision shadows dashed and open.
"""

import html
import io
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ptq_jax.base import UInt8
from ptq_jax.report import records as records_lib
from ptq_jax.report.records import Record, Row
from ptq_jax.report.tables import clean, percent_words

_STYLE = matplotlib.rc_params_from_file(
  pathlib.Path(__file__).with_name("ptq_jax.mplstyle"), use_default_template=False
)
INK = _STYLE["text.color"]
MUTED = _STYLE["grid.color"]
PAPER = "#fdfdfe"

_METHOD_COLORS = {
  "nearest": "#8a8f98",
  "adaround": "#0072b2",
  "brecq": "#d55e00",
  "obc": "#009e73",
}
_MORE_COLORS = ("#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255")
_LEVEL_COLORS = ("#5b4fcf", "#b8459b", "#e8743b", "#e0a526")  # many bits to few
_MARKERS = {256: "P", 16: "o", 8: "h", 4: "s", 3: "^", 2: "v"}
STUDY_MARKS = "os^DvPXhp*<>d8H"
"""So many studies can be told apart in one figure."""

_DASHED = (0, (4, 2))


def draw(
  records: Sequence[Record], *, attack: str | None = None, fpr: float | None = None
) -> dict[str, Figure]:
  """Every figure the records have data for, by name.

  Args:
    records: any records.
    attack: which attack; default `records.main_attack(records)`.
    fpr: at which false-positive rate; default `records.solid_fpr(records)`.
  Returns:
    Some of "privacy_utility", "roc", "member_fit", "last_layer", "releases", "exposure_overlap",
    "training".
  """
  rows = records_lib.side_by_side(records, attack=attack)
  fpr = records_lib.solid_fpr(records, attack=attack) if fpr is None else fpr
  found: dict[str, Figure] = {}
  if fpr is not None:
    found["privacy_utility"] = privacy_utility(records, attack=attack, fpr=fpr)
  if any(_curve(record) for row in rows for record in row.shown):
    found["roc"] = roc(records, attack=attack)
  if fpr is not None and records_lib.fits(records, fpr, attack=attack):
    found["member_fit"] = member_fit({"": records}, attack=attack, fpr=fpr)
  if fpr is not None and records_lib.sweeps(rows):
    found["last_layer"] = last_layer(records, attack=attack, fpr=fpr)
  if fpr is not None and records_lib.select(
    records, "leakage", attacker="releases", attack=attack or records_lib.main_attack(records)
  ):
    found["releases"] = releases(records, attack=attack, fpr=fpr)
  if any(record["method"] != "none" for record in records_lib.select(records, "exposure")):
    found["exposure_overlap"] = exposure_overlap(records)
  if records_lib.select(records, "training"):
    found["training"] = training(records)
  return found


# ---- figures ----


def roc(records: Sequence[Record], *, attack: str | None = None) -> Figure:
  """ROC curves on logarithmic axes: a panel per method, a line per bit width and attacker.

  Where the last layer was swept, its usual precision is drawn (`records.main_rows`).

  Raises:
    ValueError: if no leakage record of the attack has a curve.
  """
  rows = records_lib.main_rows(records_lib.side_by_side(records, attack=attack))
  shown = [record for row in rows for record in row.shown if _curve(record)]
  if not shown:
    raise ValueError("no leakage record of this attack has a 'curve'; there is nothing to draw.")
  full, quantized = _split(rows)
  methods = list(dict.fromkeys(row.variant.method for row in quantized)) or ["none"]
  levels = _levels(quantized)
  lowest = _lowest_rate(shown)
  with matplotlib.rc_context(_STYLE):
    figure, panels = _panels(len(methods), columns=2 if len(methods) in (2, 4) else 3, size=3.1)
    for axes, method in zip(panels, methods, strict=True):
      axes.plot([lowest, 1], [lowest, 1], color=MUTED, linewidth=1, linestyle=":")
      for row in full:
        _roc_lines(axes, row, INK)
      for row in quantized:
        if row.variant.method == method:
          _roc_lines(axes, row, _level_color(row.variant.levels, levels))
      _log_axes(axes, lowest)
      if quantized:
        axes.set_title(_literal(records_lib.method_name(method)))
    for axes in panels:
      axes.set_xlabel("false-positive rate")
      if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("true-positive rate")
    handles = [_line(INK, "full precision")] if full else []
    handles += [_line(_level_color(n, levels), f"{records_lib.bits(n)} bit") for n in levels]
    handles += _attacker_handles(quantized, marker=None)
    handles.append(_line(MUTED, "chance", linestyle=":", linewidth=1))
    _legend(figure, handles)
  return figure


def privacy_utility(
  records: Sequence[Record], *, attack: str | None = None, fpr: float | None = None
) -> Figure:
  """Test accuracy against TPR at an FPR: a panel per attacker, a line per method.

  Lines run from full precision (star) through the bit widths, most bits first; bars are the
  intervals of both axes. Where the last layer was swept, its usual precision is drawn
  (`records.main_rows`). In the panel of matched shadows, faint marks repeat what the attacker with
  full-precision shadows sees. Variants with less than half of full precision's accuracy would
  squeeze the others together; a footnote names them instead.

  Raises:
    ValueError: if no TPR was recorded at the FPR.
  """
  rows = records_lib.side_by_side(records, attack=attack)
  fpr = _checked_fpr(records, attack, fpr)
  full, quantized = _split(records_lib.main_rows(rows))
  quantized, broken = _usable(quantized, full)
  attackers = [name for name in records_lib.SIDES if any(getattr(r, name) for r in quantized)]
  attackers = attackers or ["full_precision"]
  methods = list(dict.fromkeys(row.variant.method for row in quantized))
  with matplotlib.rc_context(_STYLE):
    figure, panels = _panels(len(attackers), columns=2, size=4.3, height=3.9, share=True)
    for axes, attacker in zip(panels, attackers, strict=True):
      for method in methods:
        path = [r for r in quantized if r.variant.method == method]
        if attacker == "matched":
          _ghosts(axes, path, fpr, _method_color(method, methods))
        _utility_path(axes, full, path, attacker, fpr, _method_color(method, methods))
      _star(axes, full, fpr)
      axes.axhline(100 * fpr, color=MUTED, linewidth=1, linestyle=":")
      axes.set_title(f"Attacker with {_attacker_words(attacker)} shadows")
    _scale_accuracy(panels, full + quantized)
    _scale_rate(panels, fpr)
    panels[0].set_ylabel(_rate_label(rows, fpr))
    handles = _method_handles(methods)
    handles += [_mark(_marker(n), f"{records_lib.bits(n)} bit") for n in _levels(quantized)]
    handles += [_mark("*", "full precision", size=11.0)] if full else []
    if len(attackers) > 1:
      handles.append(_ghost_handle())
    handles.append(_line(MUTED, "chance", linestyle=":", linewidth=1))
    _legend(figure, handles, note=_notes(_weak_note(rows, fpr), _broken_note(broken)))
  return figure


def member_fit(
  studies: Mapping[str, Sequence[Record]], *, fpr: float, attack: str | None = None
) -> Figure:
  """Leakage left of full precision's against the fall of the accuracy on members.

  A panel per attacker, a point per variant with paired intervals; colours are methods, marks are
  studies, or bit widths if there is one study only. Falls are spaced evenly up to one point and by
  their logarithm beyond.

  Args:
    studies: records by name.
    fpr: at which TPRs are compared.
    attack: which attack; default each study's main one.
  Raises:
    ValueError: if no variant has both recorded, or there are more studies than marks.
  """
  if len(studies) > len(STUDY_MARKS):
    raise ValueError(f"{len(studies)} studies are too many for one figure; {len(STUDY_MARKS)} fit.")
  found = {name: records_lib.fits(some, fpr, attack=attack) for name, some in studies.items()}
  attackers = [who for who in records_lib.COMPARED if any(who in fits for fits in found.values())]
  if not attackers:
    raise ValueError("no variant has its accuracy on members recorded; there is nothing to draw.")
  variants = {v for fits in found.values() for some in fits.values() for v in some}
  variants = sorted(variants, key=records_lib.order)
  methods = list(dict.fromkeys(variant.method for variant in variants))
  marks = dict(zip(studies, STUDY_MARKS, strict=False))
  hidden = 0
  with matplotlib.rc_context(_STYLE):
    figure, panels = _panels(len(attackers), columns=3, size=3.2, height=3.6, share=True)
    for axes, who in zip(panels, attackers, strict=True):
      axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
      for study, fits in found.items():
        for variant, fit in fits.get(who, {}).items():
          if not fit.left["value"]:
            hidden += 1
            continue
          lost = _percent(fit.lost._asdict())
          axes.errorbar(
            lost["value"], fit.left["value"], xerr=_bars(lost), yerr=_bars(fit.left),
            color=_method_color(variant.method, methods),
            marker=marks[study] if len(studies) > 1 else _marker(variant.levels),
            markersize=5.5, elinewidth=0.8, alpha=0.85,
          )  # fmt: skip
      axes.set_title(records_lib.COMPARED[who].capitalize())
      axes.set_xlabel("member accuracy lost, points")
    _scale_fit(panels)
    panels[0].set_ylabel(f"TPR at {percent_words(fpr)} FPR,\ndivided by full precision's")
    handles = _method_handles(methods)
    if len(studies) > 1:
      handles += [_mark(mark, _literal(study)) for study, mark in marks.items()]
    else:
      levels = sorted({v.levels for v in variants}, key=lambda n: -(n or math.inf))
      handles += [_mark(_marker(n), f"{records_lib.bits(n)} bit") for n in levels]
    handles.append(_line(MUTED, "as in full precision", linestyle=":", linewidth=1))
    note = f"not drawn: {hidden} points where no member is found" if hidden else ""
    _legend(figure, handles, note=note)
  return figure


def last_layer(
  records: Sequence[Record], *, attack: str | None = None, fpr: float | None = None
) -> Figure:
  """Accuracy and TPR against the precision of the last layer, all other weights kept alike.

  A column of panels per bit width that was swept, a line per method and attacker; the thin line is
  the full-precision model. Variants are left out as in `privacy_utility`.

  Raises:
    ValueError: if nothing was swept, or no TPR was recorded at the FPR.
  """
  rows = records_lib.side_by_side(records, attack=attack)
  sweeps = records_lib.sweeps(rows)
  if not sweeps:
    raise ValueError("no (method, levels) has more than one last_layer_levels; nothing to draw.")
  fpr = _checked_fpr(records, attack, fpr)
  full, _ = _split(rows)
  swept, broken = _usable([row for group in sweeps.values() for row in group], full)
  sweeps = {
    key: [row for row in group if row in swept]
    for key, group in sweeps.items()
    if any(row in swept for row in group)
  }
  levels = sorted({n for _, n in sweeps}, key=lambda n: -(n or math.inf))
  methods = list(dict.fromkeys(method for method, _ in sweeps))
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(min(9.0, 2.6 + 3.2 * len(levels)), 5.4), layout="constrained")
    panels = figure.subplots(2, len(levels), sharex="col", sharey="row", squeeze=False)
    for column, n in zip(map(list, panels.T), levels, strict=True):
      groups = {method: rows for (method, m), rows in sweeps.items() if m == n}
      lasts = sorted(
        {row.variant.last_layer_levels for group in groups.values() for row in group},
        key=lambda last: last or math.inf,
      )
      for method, group in groups.items():
        _sweep_lines(column, group, lasts, fpr, _method_color(method, methods))
      _reference_lines(column, full, fpr)
      column[0].set_title(f"Other layers at {_width_words(n)}")
      column[1].set_xticks(range(len(lasts)), [records_lib.bits(last) for last in lasts])
      column[1].set_xlim(-0.3, len(lasts) - 0.7)
      column[1].set_xlabel("bits of the last layer")
    panels[0, 0].set_ylabel("test accuracy, %")
    panels[1, 0].set_ylabel(_rate_label(rows, fpr))
    handles = _method_handles(methods)
    handles += _attacker_handles(swept, marker="o")
    handles += [_line(INK, "full precision", linewidth=1)] if full else []
    _legend(figure, handles, note=_notes(_weak_note(rows, fpr), _broken_note(broken)))
  return figure


def releases(
  records: Sequence[Record], *, attack: str | None = None, fpr: float | None = None
) -> Figure:
  """What publishing a quantized version beside full precision costs: TPR of both, by bit width.

  A panel per method: the quantized version alone (best attacker), full precision alone (line), and
  both together. Where the last layer was swept, its usual precision is drawn.

  Raises:
    ValueError: if nothing was attacked in both versions, or no TPR was recorded at the FPR.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  fpr = _checked_fpr(records, attack, fpr)
  both = {
    records_lib.variant(record): record
    for record in records_lib.select(records, "leakage", attacker="releases", attack=attack)
  }
  rows = records_lib.side_by_side(records, attack=attack)
  full, quantized = _split(records_lib.main_rows(rows))
  quantized = [row for row in quantized if row.variant in both]
  if not quantized:
    raise ValueError("no version was attacked together with full precision; nothing to draw.")
  methods = list(dict.fromkeys(row.variant.method for row in quantized))
  levels = _levels(quantized)[::-1]
  with matplotlib.rc_context(_STYLE):
    columns = 2 if len(methods) in (2, 4) else 3
    figure, panels = _panels(len(methods), columns=columns, size=3.1, share=True)
    for axes, method in zip(panels, methods, strict=True):
      some = [row for row in quantized if row.variant.method == method]
      some.sort(key=lambda row: levels.index(row.variant.levels))
      x = [float(levels.index(row.variant.levels)) for row in some]
      color = _method_color(method, methods)
      _number_line(axes, x, [_tpr(row.counted, fpr) for row in some], color, dashed=True)
      _number_line(axes, x, [_tpr(both[row.variant], fpr) for row in some], color)
      for row in full:
        value = _value(_tpr(row.counted, fpr))
        if value is not None:
          axes.axhline(value, color=INK, linewidth=1, zorder=1)
      axes.set_title(_literal(records_lib.method_name(method)))
      axes.set_xticks(range(len(levels)), [records_lib.bits(n) for n in levels])
      axes.set_xlim(-0.4, len(levels) - 0.6)
      axes.set_ylim(bottom=0)
      axes.set_xlabel("bits of the weights")
      if axes.get_subplotspec().is_first_col():
        axes.set_ylabel(_rate_label(rows, fpr))
    marks = {"marker": "o", "markersize": 5.5}
    handles = [
      _line(MUTED, "both published", **marks),
      _line(MUTED, "quantized alone", linestyle=_DASHED, markerfacecolor=PAPER, **marks),
      _line(INK, "full precision alone", linewidth=1),
    ]
    _legend(figure, handles, note=_weak_note(rows, fpr))
  return figure


def exposure_overlap(records: Sequence[Record]) -> Figure:
  """Overlap (Jaccard) of the most exposed examples with those of full precision, by bit width.

  Draws "exposure" records; with `top` and `num_examples` the overlap of random sets is shown too.

  Raises:
    ValueError: if there is no exposure record.
  """
  found = [r for r in records_lib.select(records, "exposure") if r["method"] != "none"]
  if not found:
    raise ValueError("there is no exposure record of a quantized variant; nothing to draw.")
  rows = records_lib.main_rows([Row(v, None, None) for v in _ordered_variants(found)])
  usual = {row.variant for row in rows}
  found = [record for record in found if records_lib.variant(record) in usual]
  methods = list(dict.fromkeys(variant.method for variant in sorted(usual, key=records_lib.order)))
  levels = _levels(rows)[::-1]
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.subplots()
    shift = 0.06
    for i, method in enumerate(methods):
      for attacker in (*records_lib.SIDES, None):
        some = [r for r in found if (r["method"], r.get("attacker")) == (method, attacker)]
        some.sort(key=lambda r: levels.index(r["levels"]))
        x = [levels.index(r["levels"]) + shift * (i - (len(methods) - 1) / 2) for r in some]
        numbers = [r["jaccard"] for r in some]
        color = _method_color(method, methods)
        _number_line(axes, x, numbers, color, dashed=attacker == "full_precision")
    handles = _method_handles(methods)
    if len({record.get("attacker") for record in found}) > 1:
      handles += _both_attackers("o")
    chance = _random_overlap(found)
    if chance is not None:
      axes.axhline(chance, color=MUTED, linewidth=1, linestyle=":")
      handles.append(_line(MUTED, "random sets", linestyle=":", linewidth=1))
    axes.set_xticks(range(len(levels)), [records_lib.bits(n) for n in levels])
    axes.set_xlim(-0.4, len(levels) - 0.6)
    axes.set_ylim(0, 1)
    axes.set_xlabel("bits of the weights")
    top = {record.get("top") for record in found}
    which = f"{top.pop():,} most exposed" if len(top) == 1 and None not in top else "most exposed"
    axes.set_ylabel(f"overlap of the {which}\nwith full precision (Jaccard)")
    _legend(figure, handles)
  return figure


def training(records: Sequence[Record]) -> Figure:
  """Loss and accuracy on training batches by epoch: means over models, bands over all of them.

  Raises:
    ValueError: if the records have no training.
  """
  found = records_lib.select(records, "training")
  if not found:
    raise ValueError("the records tell nothing of the training; nothing to draw.")
  epochs = np.arange(1, len(found[0]["loss"]) + 1)
  with matplotlib.rc_context(_STYLE):
    figure, panels = _panels(2, columns=2, size=3.1, share=False)
    for axes, name, factor in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
      mean, low, high = (factor * np.array(found[0][name + end]) for end in ("", "_low", "_high"))
      axes.fill_between(epochs, low, high, color=MUTED, alpha=0.25, linewidth=0)
      axes.plot(epochs, mean, color=INK, linewidth=1.5)
      axes.set_xlabel("epoch")
      axes.set_ylim(bottom=0)
    panels[0].set_ylabel("loss of a training batch, nats")
    panels[1].set_ylabel("accuracy on it, %")
  return figure


def image_grid(
  images: UInt8[np.ndarray, "K H W C"],
  captions: Sequence[str],
  *,
  columns: int = 8,
  title: str = "",
) -> Figure:
  """A grid of small images with a caption under each, in reading order.

  Args:
    images: uint8[K, H, W, C] with C of 1 (gray) or 3 (RGB).
    captions: one per image; may have several lines.
    columns: images per row at most.
    title: above the grid.
  Raises:
    ValueError: if there is no image, the captions do not match, or C is neither 1 nor 3.
  """
  count, _, _, channels = images.shape
  if count == 0 or channels not in (1, 3):
    raise ValueError(f"images have shape {images.shape}; need at least one, with 1 or 3 channels.")
  if len(captions) != count:
    raise ValueError(f"there are {len(captions)} captions for {count} images; give one each.")
  columns = min(columns, count)
  height = math.ceil(count / columns)
  lines = 1 + max(caption.count("\n") for caption in captions)
  with matplotlib.rc_context(_STYLE):
    side = 1.12
    size = (max(side * columns, 2.5), height * (side + 0.13 * lines) + (0.3 if title else 0.0))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    for axes in panels:
      axes.set_axis_off()
    for axes, image, caption in zip(panels, images, captions, strict=False):
      gray = {"cmap": "gray", "vmin": 0, "vmax": 255} if channels == 1 else {}
      axes.imshow(image[..., 0] if channels == 1 else image, interpolation="nearest", **gray)
      text = "\n".join(_literal(line, 24) for line in caption.split("\n"))
      axes.text(
        0.5, -0.05, text, transform=axes.transAxes, va="top", ha="center", fontsize=7.5
      )  # fmt: skip
    if title:
      figure.suptitle(_literal(title, 90), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
  return figure


# ---- writing ----


def to_png(figure: Figure, *, dpi: int = 200) -> bytes:
  """The figure as PNG on white, the same bytes every time."""
  out = io.BytesIO()
  figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
  return out.getvalue()


def to_svg(figure: Figure) -> str:
  """The figure as an SVG document on white with outlined letters, the same text every time."""
  return _svg(figure, {"svg.fonttype": "path"})


def to_inline_svg(figure: Figure, *, name: str, description: str = "") -> str:
  """The figure as an `<svg>` element to stand in an HTML page.

  Letters stay text, the background is transparent, ink becomes `currentColor` and the inside of
  open marks `var(--paper)`, so that the page's colours apply. Ids start with `name`, so several
  figures can share a page.
  """
  svg = _svg(figure, {"svg.fonttype": "none"}, transparent=True)
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
  svg = re.sub(r'\bid="', f'id="{name}-', svg)
  svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
  svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
  svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font, sans-serif)", svg)
  label = html.escape(clean(description or name))
  svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
  svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
  return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _svg(figure: Figure, settings: dict[str, Any], **kwargs) -> str:
  out = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "ptq_jax"} | settings):
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, **kwargs)
  return out.getvalue()


# ---- parts of the ROC ----


def _roc_lines(axes: Axes, row: Row, color: str) -> None:
  for record, style in ((row.full_precision or row.given, _DASHED), (row.matched, "-")):
    curve = _curve(record)
    if curve:
      fpr, tpr = (np.asarray(curve[k], float) for k in ("fpr", "tpr"))
      keep = np.isfinite(fpr) & np.isfinite(tpr) & (fpr > 0) & (tpr > 0)
      solid = "-" if row.variant.method == "none" else style
      axes.plot(fpr[keep], tpr[keep], color=color, linestyle=solid)
      if "low" in curve and solid == "-":
        low, high = (np.asarray(curve[k], float)[keep] for k in ("low", "high"))
        axes.fill_between(fpr[keep], np.maximum(low, 1e-12), high, color=color, alpha=0.1, lw=0)


def _curve(record: Record | None) -> Record | None:
  return None if record is None else record.get("curve")


def _lowest_rate(shown: Sequence[Record]) -> float:
  """The decade below the smallest FPR that the non-members of a target can resolve."""
  smallest = min(min((f for f in r["curve"]["fpr"] if f), default=1e-3) for r in shown)
  resolved = 1 / max((r["num_non_members"] or 1000) for r in shown)
  return min(0.1, 10.0 ** math.floor(math.log10(max(smallest, resolved, 1e-7)) + 1e-9))


def _log_axes(axes: Axes, lowest: float) -> None:
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_xlim(lowest, 1)
  axes.set_ylim(lowest, 1)
  axes.set_aspect("equal")
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(LogLocator(numticks=9))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda rate, _: percent_words(rate)))


# ---- parts of privacy against utility ----


def _utility_path(
  axes: Axes, full: Sequence[Row], path: Sequence[Row], attacker: str, fpr: float, color: str
) -> None:
  """One method: a thin line from full precision through its bit widths, marks with intervals."""
  points = [(_accuracy(r), _tpr(getattr(r, attacker), fpr), r) for r in path]
  points = [p for p in points if None not in (_value(p[0]), _value(p[1]))]
  start = [(_accuracy(r), _tpr(r.full_precision, fpr)) for r in full]
  line = [(_value(x), _value(y)) for x, y in start + [p[:2] for p in points]]
  line = [point for point in line if None not in point]
  axes.plot(*np.reshape(line, (-1, 2)).T, color=color, linewidth=1.1, alpha=0.55, zorder=2)
  for x, y, row in points:
    axes.errorbar(
      _value(x),
      _value(y),
      xerr=_bars(x),
      yerr=_bars(y),
      color=color,
      marker=_marker(row.variant.levels),
      markersize=6.5,
      markeredgecolor=color,
      markerfacecolor=color if attacker == "matched" else PAPER,
      markeredgewidth=1.4,
      elinewidth=1,
      zorder=3,
    )


def _ghosts(axes: Axes, path: Sequence[Row], fpr: float, color: str) -> None:
  """What the other attacker sees: a faint open mark, joined to where the filled one stands."""
  for row in path:
    x, low = _value(_accuracy(row)), _value(_tpr(row.full_precision, fpr))
    high = _value(_tpr(row.matched, fpr))
    if None in (x, low, high):
      continue
    axes.plot([x, x], [low, high], color=color, linewidth=0.9, alpha=0.5, linestyle=_DASHED)
    axes.plot(
      x,
      low,
      marker=_marker(row.variant.levels),
      markersize=4.5,
      markerfacecolor=PAPER,
      markeredgecolor=color,
      alpha=0.5,
      zorder=2,
    )


def _ghost_handle() -> Line2D:
  return _line(
    MUTED,
    "as full-precision shadows see it",
    linewidth=0.9,
    linestyle=_DASHED,
    marker="s",
    markersize=4.5,
    markerfacecolor=PAPER,
  )


def _star(axes: Axes, full: Sequence[Row], fpr: float) -> None:
  for row in full:
    x, y = _accuracy(row), _tpr(row.full_precision, fpr)
    if None not in (_value(x), _value(y)):
      axes.errorbar(
        _value(x), _value(y), xerr=_bars(x), yerr=_bars(y), color=INK, marker="*", markersize=12,
        elinewidth=1, zorder=4,
      )  # fmt: skip


def _scale_accuracy(panels: Sequence[Axes], rows: Sequence[Row]) -> None:
  """Linear, or spaced by the logarithm of the error if some variant errs five times more often."""
  numbers = [_accuracy(row) for row in rows]
  known = [v for n in numbers for v in (_value(n), *records_lib.bounds_of(n)) if v is not None]
  errors = [max(100 - v, 0.05) for v in known]
  if not errors or max(errors) < 5 * min(errors):
    for axes in panels:
      axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
      axes.set_xlabel("test accuracy, %")
    return
  ticks = [0, 20, 40, 50, 60, 70, 80, 85, 90, 95, 98, 99, 99.5, 99.8, 99.9]
  low, high = 1.25 * max(errors), 0.8 * min(errors)
  shown = [t for t in ticks if high <= 100 - t <= low]
  for axes in panels:
    axes.set_xscale("function", functions=(_log_error, _unlog_error))
    axes.set_xlim(100 - min(low, 100), 100 - high)
    axes.set_xticks(shown, [f"{t:g}" for t in shown])
    axes.minorticks_off()
    axes.set_xlabel("test accuracy, % (spaced by the logarithm of the error)")


def _log_error(accuracy):
  return -np.log10(np.maximum(100 - np.asarray(accuracy, float), 1e-3))


def _unlog_error(position):
  return 100 - 10.0 ** -np.asarray(position, float)


def _scale_rate(panels: Sequence[Axes], fpr: float) -> None:
  """Linear from zero, or logarithmic when the rates span more than a decade."""
  values = [y for axes in panels for line in axes.get_lines() for y in np.atleast_1d(
    line.get_ydata()) if np.isfinite(y)]  # fmt: skip
  positive = [y for y in values if y > 0] + [100 * fpr]
  for axes in panels:
    if max(positive) > 12 * min(positive) and min(values) > 0:
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
      axes.yaxis.set_minor_formatter(NullFormatter())
    else:
      axes.set_ylim(bottom=0)


# ---- parts of leakage against lost member fit ----


def _scale_fit(panels: Sequence[Axes]) -> None:
  """Limits and ticks by the points; intervals that reach far beyond them are cut."""
  marked = [line.get_xydata()[0] for axes in panels for line in axes.get_lines()
            if line.get_marker() in (*STUDY_MARKS, *_MARKERS.values(), "X")]  # fmt: skip
  lost, left = np.reshape(marked, (-1, 2)).T
  (start, stop), (low, high) = (
    (1.6 * min([*lost, -0.3]), 1.6 * max([*lost, 0.8])),
    (min([*left, 1]) / 1.6, 1.6 * max([*left, 1])),
  )
  for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
    ticks = [s * 10.0**n for n in range(-6, 4) for s in steps if low <= s * 10.0**n <= high]
    if len(ticks) > 3:
      break
  for axes in panels:
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xscale("symlog", linthresh=1, linscale=0.6)
    axes.set_xticks([x for x in (-50, -20, -5, -1, 0, 1, 2, 5, 10, 20, 50) if start <= x <= stop])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlim(start, stop)
    axes.set_ylim(low, high)


# ---- parts of the sweep ----


def _sweep_lines(
  column: Sequence[Axes], group: Sequence[Row], lasts: Sequence, fpr: float, color: str
) -> None:
  group = sorted(group, key=lambda row: lasts.index(row.variant.last_layer_levels))
  x = [float(lasts.index(row.variant.last_layer_levels)) for row in group]
  _number_line(column[0], x, [_accuracy(row) for row in group], color)
  for attacker in records_lib.SIDES:
    numbers = [_tpr(getattr(row, attacker), fpr) for row in group]
    _number_line(column[1], x, numbers, color, dashed=attacker == "full_precision")


def _reference_lines(column: Sequence[Axes], full: Sequence[Row], fpr: float) -> None:
  for row in full:
    for axes, number in zip(column, (_accuracy(row), _tpr(row.full_precision, fpr)), strict=True):
      if _value(number) is not None:
        axes.axhline(_value(number), color=INK, linewidth=1, zorder=1)
  column[1].set_ylim(bottom=0)


def _number_line(
  axes: Axes, x: Sequence[float], numbers: Sequence, color: str, dashed: bool = False
) -> None:
  """Numbers joined by a line, with their intervals; what is missing is left out."""
  shown = [(a, n) for a, n in zip(x, numbers, strict=True) if _value(n) is not None]
  axes.plot(
    [a for a, _ in shown],
    [_value(n) for _, n in shown],
    color=color,
    linestyle=_DASHED if dashed else "-",
    linewidth=1.4,
    marker="o",
    markersize=5.5,
    markeredgewidth=1.4,
    markerfacecolor=PAPER if dashed else color,
    zorder=3,
  )
  for a, number in shown:
    if _bars(number) is not None:
      axes.errorbar(a, _value(number), yerr=_bars(number), color=color, elinewidth=1)


def _random_overlap(found: Sequence[Record]) -> float | None:
  """Expected Jaccard overlap of two random sets of `top` of `num_examples` (to first order)."""
  pairs = {(r.get("top"), r.get("num_examples")) for r in found}
  if len(pairs) != 1 or None in (pair := pairs.pop()) or not pair[1]:
    return None
  share = pair[0] / pair[1]
  return share / (2 - share)


# ---- numbers ----


def _accuracy(row: Row) -> Record | None:
  return _percent(row.either.get("test_accuracy"))


def _tpr(record: Record | None, fpr: float) -> Record | None:
  return _percent(records_lib.tpr_at(record, fpr))


def _percent(number: Record | None) -> Record | None:
  if number is None:
    return None
  low, high = records_lib.bounds_of(number)
  parts = {"value": records_lib.value_of(number), "low": low, "high": high}
  return {name: None if part is None else 100 * part for name, part in parts.items()}


_value = records_lib.value_of


def _bars(number: Record | None) -> np.ndarray | None:
  """Lengths of the interval below and above the value, [2, 1], as matplotlib wants them."""
  value, (low, high) = _value(number), records_lib.bounds_of(number)
  if None in (value, low, high):
    return None
  return np.maximum([[value - low], [high - value]], 0.0)


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
  """Rows of full precision, and of quantized variants."""
  full = [row for row in rows if row.variant.method == "none"]
  return full, [row for row in rows if row.variant.method != "none"]


def _usable(rows: Sequence[Row], full: Sequence[Row]) -> tuple[list[Row], list[Row]]:
  """Rows to draw, and those with less than half of full precision's accuracy, if others remain."""
  best = max((v for row in full if (v := _value(_accuracy(row))) is not None), default=0.0)
  accuracies = [_value(_accuracy(row)) for row in rows]
  broken = [r for r, v in zip(rows, accuracies, strict=True) if v is not None and v < best / 2]
  kept = [row for row in rows if row not in broken]
  return (kept, broken) if kept else (list(rows), [])


def _levels(rows: Sequence[Row]) -> list[int | None]:
  return sorted({row.variant.levels for row in rows}, key=lambda n: -(n or math.inf))


def _ordered_variants(found: Sequence[Record]) -> list[records_lib.Variant]:
  return sorted({records_lib.variant(record) for record in found}, key=records_lib.order)


def _checked_fpr(records: Sequence[Record], attack: str | None, fpr: float | None) -> float:
  fpr = records_lib.solid_fpr(records, attack=attack) if fpr is None else fpr
  known = records_lib.false_positive_rates(records)
  if fpr is None or not any(math.isclose(fpr, rate) for rate in known):
    raise ValueError(f"no TPR was recorded at fpr {fpr}; recorded are {known}.")
  return fpr


# ---- words, colours, layout ----


def _is_weak(rows: Sequence[Row], fpr: float) -> bool:
  shown = [record for row in rows for record in row.shown]
  return any(records_lib.weakness(record, records_lib.tpr_at(record, fpr)) for record in shown)


def _rate_label(rows: Sequence[Row], fpr: float) -> str:
  return f"TPR at {percent_words(fpr)} FPR, %" + (" †" if _is_weak(rows, fpr) else "")


def _weak_note(rows: Sequence[Row], fpr: float) -> str:
  """The footnote of `_rate_label`."""
  if not _is_weak(rows, fpr):
    return ""
  return f"† some rest on fewer than {records_lib.FEW_FALSE_POSITIVES} false positives"


def _broken_note(rows: Sequence[Row]) -> str:
  """Names the methods and bit widths that `_usable` left out."""
  widths: dict[str, list[int | None]] = {}
  for row in rows:
    known = widths.setdefault(row.variant.method, [])
    if row.variant.levels not in known:
      known.append(row.variant.levels)
  named = [
    f"{_literal(records_lib.method_name(method))} at {' and '.join(map(_width_words, levels))}"
    for method, levels in widths.items()
  ]
  return f"not drawn, less than half as accurate: {', '.join(named)}" if named else ""


def _notes(*notes: str) -> str:
  return "\n".join(note for note in notes if note)


def _attacker_words(attacker: str) -> str:
  return "matched" if attacker == "matched" else "full-precision"


def _width_words(levels: int | None) -> str:
  return "full precision" if levels is None else f"{records_lib.bits(levels)} bit"


def _literal(text: str, longest: int = 26) -> str:
  """Text that matplotlib shows as it is: one line, no mathematics, not too long."""
  text = clean(text)
  text = text if len(text) <= longest else text[: longest - 1] + "…"
  return text.replace("$", r"\$")


def _method_color(method: str, methods: Sequence[str]) -> str:
  if method in _METHOD_COLORS:
    return _METHOD_COLORS[method]
  others = [name for name in methods if name not in _METHOD_COLORS]
  return _MORE_COLORS[others.index(method) % len(_MORE_COLORS)]


def _level_color(levels: int | None, shown: Sequence) -> str:
  """A colour from wide to narrow; luminance grows, so the order survives without hue."""
  scale = LinearSegmentedColormap.from_list("levels", _LEVEL_COLORS[: max(2, min(len(shown), 4))])
  return to_hex(scale(shown.index(levels) / max(1, len(shown) - 1)))


def _marker(levels: int | None) -> str:
  return _MARKERS.get(levels, "X")


def _line(color: str, label: str, **kwargs) -> Line2D:
  return Line2D([], [], color=color, label=label, **kwargs)


def _mark(marker: str, label: str, size: float = 6.5) -> Line2D:
  return _line(INK, label, linestyle="none", marker=marker, markersize=size)


def _method_handles(methods: Sequence[str]) -> list[Line2D]:
  return [_line(_method_color(m, methods), _literal(records_lib.method_name(m))) for m in methods]


def _both_attackers(marker: str | None) -> list[Line2D]:
  kwargs = {"marker": marker, "markersize": 5.5} if marker else {}
  return [
    _line(MUTED, "matched shadows", **kwargs),
    _line(
      MUTED, "full-precision shadows", linestyle=_DASHED, markerfacecolor=PAPER, **kwargs
    ),
  ]  # fmt: skip


def _attacker_handles(rows: Sequence[Row], marker: str | None) -> list[Line2D]:
  matched, plain = _both_attackers(marker)
  handles = [matched] if any(row.matched for row in rows) else []
  return handles + ([plain] if any(row.full_precision for row in rows) else [])


def _panels(
  count: int, *, columns: int, size: float, height: float | None = None, share: bool = False
) -> tuple[Figure, list[Axes]]:
  columns = min(columns, count)
  lines = math.ceil(count / columns)
  height = size if height is None else height
  figure = Figure(figsize=(size * columns + 0.4, height * lines + 0.6), layout="constrained")
  panels = figure.subplots(lines, columns, squeeze=False, sharex=share, sharey=share).ravel()
  for axes in panels[count:]:
    axes.set_axis_off()
  return figure, list(panels[:count])


def _legend(figure: Figure, handles: Sequence[Line2D], *, note: str = "") -> None:
  """A legend below the panels, in as many columns as fit, with a footnote above it."""
  room = figure.get_size_inches()[0]
  count = len(handles)
  columns = next(n for n in range(count, 0, -1) if n == 1 or _legend_width(handles, n) < room)
  title = {"title": note, "title_fontsize": 8.5} if note else {}
  figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, **title)


def _legend_width(handles: Sequence[Line2D], columns: int) -> float:
  """About how many inches a legend takes; matplotlib fills it column by column."""
  longest = [max(len(h.get_label()) for h in part) for part in np.array_split(handles, columns)]
  return sum(0.073 * letters + 0.65 for letters in longest)
