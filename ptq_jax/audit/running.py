"""An audit from raw data to a page, in one call."""

import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from ptq_jax import models, settings, storage
from ptq_jax.audit import (
  attacking,
  events,
  preflight,
  quantizing,
  reporting,
  saved_scores,
  training,
  work,
)
from ptq_jax.audit.layout import FULL_PRECISION, Audit
from ptq_jax.data import load
from ptq_jax.report import records

SHORT = {
  "models": "train.models",
  "targets": "train.targets",
  "epochs": "train.epochs",
  "batch_size": "train.batch_size",
  "learning_rate": "train.learning_rate",
  "augmentation": "train.augmentation",
  "methods": "quantize.methods",
  "levels": "quantize.levels",
  "show_images": "report.show_images",
  "figures": "report.figures",
}
"""Names of settings that `run` takes without their section."""


@dataclasses.dataclass(frozen=True)
class Result:
  """What an audit found, and where it lies."""

  records: list[dict]
  workdir: pathlib.Path
  left: tuple[str, ...] = ()
  """Chunks that other processes are at, in words; there are no records then."""

  @property
  def page(self) -> pathlib.Path:
    """The page for a browser."""
    return self.workdir / "index.html"

  def frame(self) -> "pandas.DataFrame":
    """One row per variant, attacker, attack and metric: value, low and high.

    "scores KIND SIDE mean" and "... sd" have no interval: where the scores of targets and shadows
    lie.
    """
    import pandas  # a second of every command, which few need

    return pandas.DataFrame(
      [
        {
          "method": record["method"],
          "levels": record["levels"],
          "last_layer_levels": record["last_layer_levels"],
          "attacker": record["attacker"],
          "attack": record["attack"],
          "members": record.get("members", "all"),
          "metric": name,
          **{part: number[part] for part in ("value", "low", "high")},
        }
        for record in records.select(self.records, "leakage")
        for name, number in _numbers(record)
      ]
    )

  def __str__(self) -> str:
    return reporting.summary(self.records, self.workdir) if self.records else "\n".join(self.left)

  def _repr_html_(self) -> str:
    return f"<pre>{html.escape(str(self))}</pre>"


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Studies side by side, and where they lie."""

  studies: dict[str, list[dict]]
  """Records by the name of the study."""
  out: pathlib.Path

  @property
  def page(self) -> pathlib.Path:
    """The page for a browser."""
    return self.out / "index.html"

  def frame(self) -> "pandas.DataFrame":
    """Every study's `Result.frame`, with a first column `study`."""
    import pandas

    frames = {name: Result(found, self.out).frame() for name, found in self.studies.items()}
    return pandas.concat(frames, names=["study"]).reset_index("study").reset_index(drop=True)

  def __str__(self) -> str:
    return reporting.compared(self.studies, self.out)


def compare(
  folders: Sequence[pathlib.Path | str],
  *,
  out: pathlib.Path | str,
  progress: events.Listener | None = None,
) -> Comparison:
  """Puts the results of several audits side by side, without their models or scores.

  Args:
    folders: at least two, each with a results.jsonl; studies are called like their folders.
    out: where index.html, table.md, results.csv and figures/ are written.
    progress: told what is done.
  Raises:
    ValueError, OSError: one sentence, as `reporting.compare`.
  """
  studies = reporting.compare(folders, out=out, listener=events.listener(progress))
  return Comparison(studies, pathlib.Path(out))


def _numbers(record):
  """Every number with an interval in a record, by the name of its metric."""
  for name, value in record.items():
    if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
      yield name, value
    elif name == "tpr":
      yield from ((f"tpr at {n['fpr']:g} fpr", n) for n in value if n["rule"] == "at_most")
    elif name == "scores":
      for key, moment in settings.dotted(value).items():
        yield " ".join([name, *key.split(".")]), records.number(moment)


def run(
  config: settings.Config | pathlib.Path | str | None = None,
  *,
  workdir: pathlib.Path | str,
  data: Any = None,
  model: Any = None,
  progress: events.Listener | None = None,
  **chosen: Any,
) -> Result:
  """Trains, quantizes, attacks and reports; goes on where an earlier call in the workdir was.

  Args:
    config: settings, of `settings.audit_defaults`; or a config file or the name of a shipped one;
      None: the defaults.
    workdir: where everything is written.
    data: (x_train, y_train, x_test, y_test), uint8 images [N, H, W, C], vectors float32 [N, F] or
      token ids int32 [N, L], and integer labels [N]; a name of `data.load`, or a dict of its
      arguments; None: as the config says.
    model: a Linen module for these, or a function of `num_classes` that makes one (of `vocabulary`,
      too, if it takes token ids; with an argument `rngs`, an nnx module); None: as the config says.
    progress: told what is done, see `events`.
    **chosen: settings by name, those of `SHORT` as models=16, others as {"train.momentum": 0.9}.
  Returns:
    What was found.
  Raises:
    ValueError, OSError: one sentence, before anything is computed where it can be known by then.
  """
  for name in chosen if model is not None else ():
    if name.startswith("model."):
      raise ValueError(f"{name} is given beside model=, which has its options; leave it out.")
  config = _config(config, chosen)
  more: dict[str, Any] = {"listener": events.listener(progress)}
  if isinstance(data, str):
    config.data.name = data
  elif isinstance(data, Mapping) and data.keys() <= {*config.data}:
    config = _config(config, {f"data.{name}": value for name, value in data.items()})
  elif data is not None:
    if not isinstance(data, tuple | list) or len(data) != 4:
      parts = f" of {', '.join(map(str, data))}" if isinstance(data, Mapping) else ""
      raise ValueError(
        f"data is a {type(data).__name__}{parts}; give the four arrays (x_train, y_train, x_test, "
        f"y_test), the name of a dataset, or a dict of {', '.join(settings.SETTINGS['data'])}."
      )
    more["given_data"] = load.from_arrays(*data, **settings.named(config.data, "name"))
    config.data.name = "arrays"
  if model is not None:
    if not isinstance(model, nn.Module):
      dataset = more.get("given_data") or load.load(**settings.named(config.data))
      model = models.make(model, **dataset.sizes)
    more["given_model"] = model
    config.model = {"name": f"{type(model).__module__}:{type(model).__qualname__}",
                    "given": " ".join(repr(model).split())}  # fmt: skip
  return run_stages(preflight.open_audit(config, workdir, **more))


def run_scores(
  shadows: Mapping[str, Any] | str,
  targets: Mapping[str, Any] | str | None = None,
  *,
  workdir: pathlib.Path | str,
  config: settings.Config | pathlib.Path | str | None = None,
  progress: events.Listener | None = None,
  **chosen: Any,
) -> Result:
  """Attacks scores that any framework made, and reports.

  Args:
    shadows: {"scores": float[M, E, V] or [M, E], higher means member, "members": bool[M, E]}, and
      what else `saved_scores.read` knows; or an .npz file of these.
    targets: the same of T targets on the same examples; None: every shadow is target once.
    workdir: of these results alone.
    config: its sections attack and report, and its seed; as in `run`.
    progress: told what is done.
    **chosen: settings by name, as in `run`.
  Returns:
    What was found.
  Raises:
    ValueError, FileNotFoundError: one sentence that names the array.
  """
  for name in (SHORT.get(name, name) for name in chosen):
    require_scores_use(name)
  config, listener = _config(config, chosen), events.listener(progress)
  root = storage.require_writable(workdir)
  with work.pinned_randomness():
    saved_scores.attack(config, root, shadows, targets)
    found = reporting.report(root, options=config.report, listener=listener)
  return Result(found, root)


def require_scores_use(key: str) -> None:
  """Raises ValueError for a setting that an attack on saved scores would pass over."""
  if key != "seed" and key.partition(".")[0] not in ("attack", "report"):
    raise ValueError(
      f"{key} has no use for saved scores, which are there already; only attack.*, report.* and "
      "seed have."
    )


def _config(config, chosen) -> settings.Config:
  """A config of one's own, with settings chosen by name."""
  config = settings.load(str(config)) if isinstance(config, str | pathlib.Path) else config
  if not isinstance(config, settings.Config | None):
    raise ValueError(
      f"config is a {type(config).__name__}; give a config of settings.load or "
      "settings.audit_defaults, a file, or the name of a shipped one."
    )
  config = settings.audit_defaults() if config is None else config.copy_and_resolve_references()
  for name, value in chosen.items():
    key = SHORT.get(name, name)
    if key not in settings.dotted(settings.plain(config)):
      known = f"{', '.join(SHORT)}, or a dotted key such as 'train.momentum'"
      raise ValueError(f"audit.run has no setting {name!r}; it has {known}.")
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    try:
      config.update_from_flattened_dict({key: value})
    except TypeError as error:
      wanted = type(settings.get(config, key)).__name__
      raise ValueError(f"{key} is {value!r}; it must be of the type {wanted}.") from error
  return config


def run_stages(audit: Audit, *, command: str = "") -> Result:
  """All stages of an audit that was opened.

  Where other processes work in the same workdir, whoever ends last attacks.
  """
  with work.pinned_randomness():
    left = [*training.train(audit), *quantizing.quantize(audit)]
    missing = audit.missing([FULL_PRECISION, *audit.variants()])
    if missing:
      return Result([], audit.root, tuple(left) or (f"{len(missing)} files of scores",))
    with work.locked(audit.root / "locks" / "attack"):
      attacking.attack(audit, command=command)
      found = reporting.report(
        audit.root,
        options=audit.config.report,
        dataset=audit.dataset,
        listener=audit.listener,
      )
  return Result(found, audit.root)
