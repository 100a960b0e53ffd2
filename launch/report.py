"""Writes the tables, figures and page of an audit, and prints the result table.

    bash launch/run report --config configs/digits.py --workdir runs/digits

Reads WORKDIR/results.jsonl; writes results.csv, results.md, figures/ and index.html beside it.
"""

import hashlib
import pathlib

from launch.progress import Progress
from ptq_jax import settings, storage
from ptq_jax.report import figures, findings, page, records, tables


def run(config, workdir) -> None:
  """The stage alone."""
  del config
  report(workdir)


def report(workdir: pathlib.Path) -> None:
  """Renders what `attack` found, unless this version did so, and prints the result table."""
  path = workdir / "results.jsonl"
  if not path.exists():
    raise FileNotFoundError(f"{path} is missing; run bash launch/run attack first.")
  found = storage.read_records(path)
  records.validate_all(found)
  stamp = digest(path, pathlib.Path(page.__file__).parent)
  done = workdir / "figures" / ".made_from"
  if not done.exists() or done.read_text() != stamp:
    write_report(found, workdir)
    storage.write_text(done, stamp)
  print(tables.to_text(tables.results(found)))
  print(findings.summarize(found).headline)
  for record in records.select(found, "warning"):
    print(f"warning, {record['about']}: {record['message']}")
  print(f"\n{workdir / 'index.html'} shows more.", flush=True)


def digest(results: pathlib.Path, sources: pathlib.Path) -> str:
  """What a report is made from: the results, and the modules that draw and word them."""
  found = hashlib.sha256()
  for path in (results, *sorted(sources.glob("*.py"))):
    found.update(path.read_bytes())
  return found.hexdigest()


def write_report(found: list[dict], workdir) -> None:
  """All files of the report."""
  drawn = figures.draw(found)
  exposed = workdir / "exposed.npz"
  if exposed.exists():
    pictures = storage.load_arrays(exposed)
    captions = [
      f"{label}  {value:.1f}"
      for label, value in zip(pictures["labels"], pictures["exposure"], strict=True)
    ]
    drawn["exposed_examples"] = figures.image_grid(pictures["images"], captions)
  with Progress("report", len(drawn) + 2) as progress:
    storage.write_text(workdir / "results.csv", tables.to_csv(found))
    shown = (tables.results, tables.attacks, tables.units, tables.warnings)
    texts = [tables.to_markdown(table(found)) for table in shown]
    storage.write_text(workdir / "results.md", "\n".join(texts))
    progress.advance(1, "tables")
    storage.write_text(workdir / "index.html", page.render(found, drawn))
    progress.advance(1, "page")
    for name, figure in drawn.items():
      with storage.replacing(workdir / "figures" / f"{name}.png") as temporary:
        temporary.write_bytes(figures.to_png(figure))
      storage.write_text(workdir / "figures" / f"{name}.svg", figures.to_svg(figure))
      progress.advance(1, name)


def main() -> None:
  settings.launch(run, config="configs/digits.py", workdir="runs/digits", description=__doc__)


if __name__ == "__main__":
  main()
