"""Tables, figures and page of what an attack found.

Reads results.jsonl; writes results.csv, results.md, figures/ and index.html beside it.
"""

import pathlib

from ptq_jax import settings, storage
from ptq_jax.audit import events
from ptq_jax.audit.layout import Manifest
from ptq_jax.report import figures, findings, page, records, tables


def report(workdir: pathlib.Path, *, listener: events.Listener = events.silent) -> list[dict]:
  """Renders what an attack found, unless this version did so and all of it is there.

  Returns:
    The records.
  Raises:
    FileNotFoundError: if nothing was attacked.
    storage.CorruptFileError: if results.jsonl is not as it was written.
  """
  path = workdir / "results.jsonl"
  if not path.exists():
    raise FileNotFoundError(f"{path} is missing; run bash launch/run attack first.")
  manifest = Manifest(workdir)
  manifest.require_same("attack", path)
  found = storage.read_records(path)
  records.validate_all(found)
  source = settings.fingerprint([storage.digest(path), settings.code_version("report")])
  problem = manifest.problem("report", source)
  if problem:
    listener(events.Event("", sentence=f"{problem.rstrip('.')}; reporting anew."))
  if problem is not None:
    manifest.record("report", source, write_report(found, workdir, listener))
  return found


def summary(found: list[dict], workdir: pathlib.Path) -> str:
  """What a report says on a terminal."""
  lines = [tables.to_text(tables.results(found, narrow=True)), findings.summarize(found).headline]
  for record in records.select(found, "warning"):
    lines.append(f"warning, {record['about']}: {record['message']}")
  return "\n".join([*lines, "", f"{workdir / 'index.html'} shows more."])


def write_report(found: list[dict], workdir: pathlib.Path, listener) -> list[pathlib.Path]:
  """Writes all files of the report."""
  drawn = figures.draw(found)
  exposed = workdir / "exposed.npz"
  if exposed.exists():
    pictures = storage.load_arrays(exposed)
    captions = [
      f"{label}  {value:.1f}"
      for label, value in zip(pictures["labels"], pictures["exposure"], strict=True)
    ]
    drawn["exposed_examples"] = figures.image_grid(pictures["images"], captions)
  written = []

  def write(name: str, text: str) -> None:
    written.append(workdir / name)
    storage.write_text(written[-1], text)

  with events.Stage(listener, "report", len(drawn) + 2) as stage:
    write("results.csv", tables.to_csv(found))
    shown = (tables.results, tables.attacks, tables.thresholds, tables.units, tables.warnings)
    write("results.md", "\n".join(tables.to_markdown(table(found)) for table in shown))
    stage.advance(1, "tables")
    write("index.html", page.render(found, drawn))
    stage.advance(1, "page")
    for name, figure in drawn.items():
      written.append(workdir / "figures" / f"{name}.png")
      with storage.replacing(written[-1]) as temporary:
        temporary.write_bytes(figures.to_png(figure))
      write(f"figures/{name}.svg", figures.to_svg(figure))
      stage.advance(1, name)
  return written
