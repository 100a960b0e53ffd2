"""Tables, figures and page of what an attack found.

Reads results.jsonl; writes results.csv, results.md, results.tex, index.html and, with
report.figures, figures/ beside it. Training images may be personal data: only with
report.show_images are the most exposed ones written, to exposed.npz, figures/ and the page.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_jax import settings, storage
from ptq_jax.audit import events
from ptq_jax.audit.layout import Manifest
from ptq_jax.data import load
from ptq_jax.report import comparison, findings, page, records, tables

IMAGES = ("exposed.npz", "figures/exposed_examples.png", "figures/exposed_examples.svg")
"""Files that hold training images."""


def report(
  workdir: pathlib.Path,
  *,
  options: settings.Config | Mapping[str, Any] | None = None,
  dataset: load.Dataset | None = None,
  listener: events.Listener = events.silent,
) -> list[dict]:
  """Renders what an attack found, unless this version did so like this and all of it is there.

  Files of an earlier report that this one does not have are deleted.

  Args:
    workdir: where results.jsonl is.
    options: the report section of a config; None: its defaults.
    dataset: whose images are shown; None: that which config.json names, if any are.
    listener: told what is done.
  Returns:
    The records.
  Raises:
    FileNotFoundError: if nothing was attacked.
    storage.CorruptFileError: if results.jsonl is not as it was written.
    ValueError: for options that make no sense, or images that are not at hand.
  """
  options = settings.plain(settings.audit_defaults().report if options is None else options)
  check(options)
  path = workdir / "results.jsonl"
  if not path.exists():
    raise FileNotFoundError(f"{path} is missing; run bash launch/run attack first.")
  manifest = Manifest(workdir)
  manifest.require_same("attack", path)
  found = storage.read_records(path)
  records.validate_all(found)
  code = settings.code_version("report", "audit/reporting")
  source = settings.fingerprint([storage.digest(path), options, code])
  problem = manifest.problem("report", source)
  if problem:
    listener(events.Event("", sentence=f"{problem.rstrip('.')}; reporting anew."))
  if problem is not None:
    images = _images(found, workdir, dataset, listener) if options["show_images"] else None
    written = write_report(found, workdir, listener, options=options, images=images)
    for name in {*manifest.files("report"), *IMAGES}:
      if workdir / name not in written:
        (workdir / name).unlink(missing_ok=True)
    manifest.record("report", source, written)
  return found


def compare(
  folders: Sequence[pathlib.Path | str],
  *,
  out: pathlib.Path | str,
  listener: events.Listener = events.silent,
) -> dict[str, list[dict]]:
  """Puts the results of several audits side by side: index.html, table.md, results.csv, figures/.

  Args:
    folders: each with a results.jsonl, from which alone all is made; studies are called like them.
    out: where it is written; files of an earlier comparison there that this one has not are
      deleted.
    listener: told what is done.
  Returns:
    The records of each study by its name.
  Raises:
    FileNotFoundError: for a folder without results.
    ValueError: for results that are damaged, of another version, or not comparable, for two folders
      of one name, and for an `out` that holds an audit; one sentence.
  """
  if isinstance(folders, str | pathlib.Path) or not isinstance(folders, Sequence):
    raise ValueError(f"folders is {folders!r}; give a list of at least two folders of audits.")
  studies: dict[str, list[dict]] = {}
  places: dict[str, pathlib.Path] = {}
  for folder in map(pathlib.Path, folders):
    name = folder.resolve().name
    if name in studies:
      raise ValueError(
        f"two studies are called {name} ({places[name]} and {folder}); rename one of the folders."
      )
    studies[name], places[name] = _read_results(folder), folder
  comparison.require_comparable(studies)
  out = storage.require_writable(out, flag="--out")
  if (out / "results.jsonl").exists() or (out / "config.json").exists():
    raise ValueError(f"{out} holds an audit; a comparison needs another --out.")
  drawn = comparison.draw(studies)
  with events.Stage(listener, "compare", 1 + len(drawn)) as stage:
    written = [out / name for name in ("table.md", "results.csv", "index.html")]
    made = map(tables.to_markdown, (comparison.results(studies), comparison.settings(studies)))
    texts = ["\n".join(made), tables.to_csv(studies), comparison.render(studies, drawn)]
    for path, text in zip(written, texts, strict=True):
      storage.write_text(path, text)
    stage.advance(1, "page")
    written += _write_figures(out, drawn, stage)
  manifest = Manifest(out)
  for name in manifest.files("comparison"):
    if out / name not in written:
      (out / name).unlink(missing_ok=True)
  source = settings.fingerprint([storage.digest(f / "results.jsonl") for f in places.values()])
  manifest.record("comparison", source, written)
  return studies


def _read_results(folder: pathlib.Path) -> list[dict]:
  """The records of a folder, checked."""
  path = folder / "results.jsonl"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is missing; a comparison needs folders with results of audits."
    )
  Manifest(folder).require_same("attack", path)
  found = storage.read_records(path)
  try:
    records.validate_all(found)
  except ValueError as error:
    reason = str(error).rstrip(".")
    raise ValueError(
      f"{path} was written by another version ({reason}); run bash launch/run attack on it again."
    ) from None
  return found


def compared(studies: Mapping[str, list[dict]], out: pathlib.Path) -> str:
  """What a comparison says on a terminal."""
  found = comparison.summarize(studies)
  lines = [tables.to_text(comparison.results(studies, narrow=True)), found.headline, *found.points]
  return "\n".join([*lines, "", f"{out / 'index.html'} shows more."])


def check(options: settings.Config | Mapping[str, Any]) -> None:
  """Raises ValueError for an option of a report that makes no sense."""
  for name in ("show_images", "figures"):
    if not isinstance(options[name], bool):
      raise ValueError(f"report.{name} is {options[name]!r}; it must be True or False.")
  if options["show_images"] and not options["figures"]:
    raise ValueError("report.show_images needs report.figures, without which nothing is drawn.")


def require_images(dataset: load.Dataset) -> None:
  """Raises ValueError for a set whose examples cannot be shown as pictures."""
  if dataset.kind != "images":
    raise ValueError(
      f"report.show_images is True, but {dataset.name} holds {dataset.kind}, no images; set it to "
      "False (exposure.csv has the numbers of all examples)."
    )


def _images(found, workdir, dataset, listener):
  """uint8[K, H, W, C], the pool's images of the most exposed examples; None if there are none."""
  examples = tables.most_exposed(found)
  if not examples:
    sentence = "report.show_images: these results name no exposed examples, so none are shown."
    listener(events.Event("", sentence=sentence))
    return None
  if dataset is None:
    stored = storage.read_json(workdir / "config.json")
    if not {"config", "data"} <= stored.keys():
      raise ValueError(f"{workdir / 'config.json'} does not say which data this was; audit again.")
    if stored["config"]["data"]["name"] == "arrays":
      raise ValueError(
        f"the images of {workdir} were given as arrays, so report.show_images needs audit.run with "
        "the same data."
      )
    dataset = load.load(**stored["config"]["data"])
    if dataset.fingerprint != stored["data"]:
      raise ValueError(f"the data of {workdir} changed since, so its images cannot be shown.")
  require_images(dataset)
  return dataset.train_images[[example["example"] for example in examples]]


def summary(found: list[dict], workdir: pathlib.Path) -> str:
  """What a report says on a terminal."""
  lines = [tables.to_text(tables.results(found, narrow=True)), findings.summarize(found).headline]
  for record in records.select(found, "warning"):
    lines.append(f"warning, {record['about']}: {record['message']}")
  return "\n".join([*lines, "", f"{workdir / 'index.html'} shows more."])


def write_report(
  found: list[dict], workdir: pathlib.Path, listener, *, options: Mapping[str, Any], images=None
) -> list[pathlib.Path]:
  """Writes all files of the report; `images` are those of the most exposed examples."""
  drawn, written = {}, []
  if options["figures"]:
    from ptq_jax.report import figures  # matplotlib takes long to import

    drawn = figures.draw(found)
  if images is not None:
    examples = tables.most_exposed(found)
    captions = [f"{each['label']}\nexposure {each['exposure']:z.1f}" for each in examples]
    drawn["exposed_examples"] = figures.image_grid(images, captions)
    written.append(workdir / "exposed.npz")
    columns = {name: [each[name] for each in examples] for name in examples[0]}
    storage.save_arrays(written[-1], images=images, **columns)
  shown = [
    record | {"config": record["config"] | {"report": dict(options)}}
    if record["kind"] == "run"
    else record
    for record in found
  ]

  def write(name: str, text: str) -> None:
    written.append(workdir / name)
    storage.write_text(written[-1], text)

  with events.Stage(listener, "report", len(drawn) + 2) as stage:
    write("results.csv", tables.to_csv(found))
    made = (tables.results, tables.attacks, tables.calibration, tables.score_shift,
            tables.thresholds, tables.units, tables.warnings)  # fmt: skip
    write("results.tex", tables.to_latex(tables.results(found)))
    write("results.md", "\n".join(tables.to_markdown(table(found)) for table in made))
    stage.advance(1, "tables")
    write("index.html", page.render(shown, drawn))
    stage.advance(1, "page")
    written += _write_figures(workdir, drawn, stage)
  return written


def _write_figures(folder: pathlib.Path, drawn: Mapping[str, Any], stage) -> list[pathlib.Path]:
  """Writes figures/NAME.png and .svg."""
  if not drawn:
    return []
  from ptq_jax.report import figures

  written = []
  for name, figure in drawn.items():
    png, svg = (folder / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
    with storage.replacing(png) as temporary:
      temporary.write_bytes(figures.to_png(figure))
    storage.write_text(svg, figures.to_svg(figure))
    written += [png, svg]
    stage.advance(1, name)
  return written
