"""Attacks on scores that any framework saved, and what is read of them.

No model is needed: one result by every attack, without quantized variants side by side.
"""

import hashlib
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ptq_jax import settings, storage
from ptq_jax.attack import guards, protocol
from ptq_jax.audit import attacking, preflight
from ptq_jax.audit.layout import Manifest
from ptq_jax.base import as_members, as_scores
from ptq_jax.metrics import intervals, leakage
from ptq_jax.report import records
from ptq_jax.report.records import Variant


def attack(
  config,
  workdir: pathlib.Path,
  shadows: pathlib.Path | str | Mapping[str, Any],
  targets: pathlib.Path | str | Mapping[str, Any] | None = None,
  *,
  command: str = "",
) -> None:
  """Attacks saved scores and writes their results; `reporting.report` shows them.

  Args:
    config: its attack section and seed.
    workdir: of these results alone.
    shadows: an .npz file with `scores` float[M, E, V] (or [M, E]; higher means member) and
      `members` bool[M, E]; for a "class_threshold" among attack.attacks also `labels` int[E], and
      what else `read` knows. Or a folder that tensorflow/privacy's LiRA or Privacy Meter
      wrote; or the arrays themselves by name.
    targets: the same of T targets on the same examples; None: every shadow is target once.
    command: how this was called, for the record.
  Raises:
    ValueError: settings that make no sense; arrays that are missing or do not fit; a workdir that
      holds an audit, or results of other scores.
    FileNotFoundError: no such file.
  """
  if (workdir / "config.json").exists():
    raise ValueError(f"{workdir} holds an audit; results of saved scores need another --workdir.")
  preflight.check_values(config, sections=("attack", "seed"))
  own = read(shadows)
  attacked = own if targets is None else read(targets)
  _require_distinct(own, None if targets is None else attacked)
  names = ["arrays" if isinstance(one, Mapping) else str(one) for one in (shadows, targets) if one]
  path = workdir / "results.jsonl"
  fingerprint = _fingerprint(own, attacked)
  _require_same_scores(path, fingerprint)
  options = {"attacks": tuple(config.attack.attacks), "labels": own.get("labels")}
  if targets is not None:
    found = protocol.dedicated_targets(own["scores"], own["members"], attacked["scores"], **options)
  else:
    found = protocol.leave_one_out(own["scores"], own["members"], **options)
  key = jax.random.key(config.seed)
  accuracy, level = attacked.get("accuracy"), config.attack.confidence
  fit = attacked.get("member_accuracy")
  shift = {"targets": leakage.score_moments(attacked["scores"], attacked["members"])}
  if targets is not None:
    shift["given_shadows"] = leakage.score_moments(own["scores"], own["members"])
  common = {
    "scores": shift,
    "test_accuracy": records.number(None)
    if accuracy is None
    else intervals.over_targets(accuracy, confidence=level)._asdict(),
  }
  if fit is not None:
    common["member_accuracy"] = intervals.over_targets(fit, confidence=level)._asdict()
  leaks = [
    records.make(
      "leakage",
      **attacked["variant"]._asdict(),
      attacker="given",
      attack=name,
      bits_per_weight=None,
      size_kb=None,
      **common,
      epsilon=attacking.bound_on_epsilon(config.attack, rows, attacked["members"]),
      **attacking.summarise(config.attack, jax.random.fold_in(key, i), rows, attacked["members"]),
    )
    for i, (name, rows) in enumerate(found.items())
  ]
  files = {"name": ", ".join(names), "fingerprint": fingerprint}
  run_ = records.run(
    name=pathlib.Path(names[0]).stem,
    config={"attack": settings.plain(config.attack), "seed": config.seed},
    command=command,
    date=attacking.today(),
    seconds={},
    data=files
    | {"pool_size": own["scores"].shape[1], "members_share": float(own["members"].mean())},
    model={},
    models=len(own["scores"]),
    targets=len(attacked["scores"]),
    protocol="leave-one-out" if targets is None else "dedicated targets",
  )
  fewest = min(record["num_non_members"] for record in leaks)
  sentences = {
    "false-positive rates": guards.too_few_non_members(fewest, config.attack.fprs),
    "leakage": attacking.nothing_found(leaks),
    "scores": _upside_down(leaks),
  }
  if accuracy is not None and "accuracy" in own:
    sentences["accuracy"] = guards.accuracy_mismatch(own["accuracy"], accuracy)
  cautions = [
    records.make("warning", about=about, message=message)
    for about, message in sentences.items()
    if message
  ]
  storage.write_records(path, [run_, *leaks, *cautions])
  Manifest(workdir).record("attack", "saved scores", [path])


def _upside_down(leaks: list[dict]) -> str | None:
  """A sentence if an attack ranks members surely below the others."""
  below = [leak for leak in leaks if leak["auc"]["high"] is not None and leak["auc"]["high"] < 0.5]
  if not below:
    return None
  auc = below[0]["auc"]
  return (
    f"to {records.attack_name(below[0]['attack'])} members are surely the lower ones (AUC "
    f"{auc['value']:.3f}, {auc['low']:.3f} to {auc['high']:.3f}): a higher score must mean member, "
    "so of losses, say, give the negative."
  )


def _require_distinct(shadows: dict, targets: dict | None) -> None:
  """Raises ValueError for a model that is there twice, which tells all about its copy."""
  groups = {"shadow": shadows} | ({} if targets is None else {"target": targets})
  seen: dict[bytes, str] = {}
  for group, arrays in groups.items():
    pairs = zip(arrays["scores"], arrays["members"], strict=True)
    for number, (scores, members) in enumerate(pairs):
      row = hashlib.sha256(np.ascontiguousarray(scores, np.float64)).digest() + members.tobytes()
      if np.ptp(scores) > 0 and row in seen:
        raise ValueError(
          f"{seen[row]} and {group} {number} have the same scores and members; they are copies, so "
          "the attack would know all of it: give each model once."
        )
      seen[row] = f"{group} {number}"


def _fingerprint(*sources: dict) -> str:
  """Changes with any score or membership of `read`."""
  found = hashlib.sha256()
  for arrays in sources:
    for name in ("scores", "members"):
      found.update(f"{arrays[name].shape}".encode() + np.ascontiguousarray(arrays[name]).tobytes())
  return found.hexdigest()[:16]


def _require_same_scores(path: pathlib.Path, fingerprint: str) -> None:
  """Raises ValueError if results are there of scores that are not these."""
  try:
    runs = records.select(storage.read_records(path), "run")
  except (FileNotFoundError, storage.CorruptFileError):
    return
  stored = runs[0]["data"] if runs else {}
  if stored.get("fingerprint", fingerprint) != fingerprint:
    raise ValueError(
      f"{path.parent} holds results of other scores ({stored['name']}); use another --workdir, or "
      "delete it."
    )


def read(source: pathlib.Path | str | Mapping[str, Any]) -> dict:
  """`scores` [N, E, V], `members` and what else an .npz file says about itself, checked.

  Further arrays are optional: `labels` int[E]; `accuracy` float[N] on test data, `member_accuracy`
  float[N] on what each model trained on; and what the models are, `method` (a name), `levels` and
  `last_layer_levels` (numbers).

  Returns:
    The arrays, and "variant" made of the last three.
  Raises:
    FileNotFoundError, ValueError: one sentence that names the file, and the array.
  """
  given = isinstance(source, Mapping)
  path = "the arrays" if given else source
  if not isinstance(source, Mapping | str | pathlib.Path):
    raise ValueError(
      f"the scores are a {type(source).__name__}; give a dict of arrays, or the name of a file."
    )
  arrays = {k: _as_array(k, v) for k, v in source.items()} if given else _load(str(source))
  for name in ("scores", "members"):
    if name not in arrays:
      raise ValueError(f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}.")
  try:
    scores = as_scores(arrays["scores"], name="scores")
    members = as_members(arrays["members"], name="members")
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  scores = scores[:, :, None] if scores.ndim == 2 else scores
  if scores.ndim != 3 or 0 in scores.shape or members.shape != scores.shape[:2]:
    raise ValueError(
      f"{path} has scores of shape {arrays['scores'].shape} and members {members.shape}; they must "
      "be [models, examples, views] and [models, examples]."
    )
  broken = np.flatnonzero(~attacking.finite(scores))
  if len(broken):
    raise ValueError(
      f"{path}: scores of models {', '.join(map(str, broken[:5]))} are NaN or infinite; give "
      "finite ones, such as the logit-scaled confidence, or leave these models out."
    )
  found = {"scores": scores, "members": members, "variant": _said_variant(path, arrays)}
  if "labels" in arrays:
    found["labels"] = _said_labels(path, arrays["labels"], scores.shape[1])
  for name in ("accuracy", "member_accuracy"):
    if name in arrays:
      found[name] = rates = np.asarray(arrays[name], np.float64)
      if rates.shape != (len(scores),) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(f"{path}: {name} must be one number in [0, 1] for each of the models.")
  return found


def _as_array(name: str, given: Any) -> np.ndarray:
  """An array, or a sentence about rows of several lengths and what else is none."""
  try:
    return np.asarray(given)
  except Exception as error:  # of whatever framework it comes from
    reason = " ".join(str(error).split())
    raise ValueError(f"{name!r} is a {type(given).__name__} that is no array: {reason}") from error


def _load(path: str) -> dict[str, np.ndarray]:
  if pathlib.Path(path).is_dir():
    return _load_folder(pathlib.Path(path))
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"{path} does not exist; --scores and --targets name .npz files, or folders of scores."
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("single array")
      names = file.files
      arrays = {}
      for name in names:
        try:
          arrays[name] = file[name]
        except ValueError:
          raise ValueError(
            f"{path}: array {name!r} holds Python objects, not numbers; save it as an array of "
            "numbers (all rows of one length)."
          ) from None
  except (OSError, zipfile.BadZipFile, EOFError, AttributeError) as error:
    raise ValueError(f"{path} cannot be read as an .npz file of arrays ({error}).") from None
  except (ValueError, TypeError) as error:
    if str(error).startswith(path):
      raise
    raise ValueError(
      f"{path} is not an .npz file; save its arrays together, numpy.savez(path, scores=..., "
      "members=...)."
    ) from None
  for name, array in arrays.items():
    if array.dtype.kind == "V":
      raise ValueError(
        f"{path}: array {name!r} is of raw type {array.dtype}, as NumPy saves bfloat16; save it as "
        "float32."
      )
  return arrays


def _load_folder(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Scores [M, E, V] and members [M, E] as two other programs leave them.

  tensorflow/privacy, mi_lira_2021: experiment*/scores/*.npy, the last of each, [E, V], and
  experiment*/keep.npy, [E]. Privacy Meter: signals/rmia_signals.npy, the probability of the true
  class, or signals/loss_signals.npy, the loss, both [E, M], and models/memberships.npy, [M, E].
  """
  experiments = sorted(path for path in folder.glob("experiment*") if path.is_dir())
  if experiments:
    last = [max((path / "scores").glob("*.npy"), default=path / "scores") for path in experiments]
    kept = [_load_array(path / "keep.npy") for path in experiments]
    scores = [_load_array(path) for path in last]
    if len({array.shape for array in scores}) > 1 or len({array.shape for array in kept}) > 1:
      raise ValueError(f"{folder}: the experiments have scores or keep.npy of several shapes.")
    scores = np.stack(scores)
    return {"scores": scores, "members": np.stack(kept)[:, : scores.shape[1]]}
  members = folder / "models" / "memberships.npy"
  for name in ("rmia", "loss"):
    signals = folder / "signals" / f"{name}_signals.npy"
    if signals.exists() and members.exists():
      values = _load_array(signals).astype(np.float64).T
      log_p = np.log(np.maximum(values, 1e-45)) if name == "rmia" else -values
      if not (log_p <= 0).all():
        raise ValueError(f"{signals} holds no {'probabilities' if name == 'rmia' else 'losses'}.")
      rest = np.maximum(-np.expm1(log_p), 1e-45)
      return {"scores": log_p - np.log(rest), "members": _load_array(members)}
  raise ValueError(
    f"{folder} has neither experiment*/scores and keep.npy, nor signals/rmia_signals.npy (or "
    "loss_signals.npy) and models/memberships.npy."
  )


def _load_array(path: pathlib.Path) -> np.ndarray:
  try:
    return np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ValueError(f"{path} cannot be read as an array of numbers ({error}).") from None


def _said_variant(path, arrays) -> Variant:
  """What the file says its models are; "scores" if it says nothing."""
  values = {}
  for name in ("levels", "last_layer_levels"):
    value = arrays.get(name)
    if value is not None and (value.ndim or value.dtype.kind not in "iu" or value < 2):
      raise ValueError(f"{path}: {name} is {value!s}; it must be one integer of at least 2.")
    values[name] = None if value is None else int(value)
  method = str(arrays["method"]) if "method" in arrays else "scores"
  if method == "none" and values["levels"] is not None:
    raise ValueError(f"{path}: method 'none' is full precision, which has no levels.")
  return Variant(method, values["levels"], values["last_layer_levels"] or values["levels"])


def _said_labels(path, labels, num_examples) -> np.ndarray:
  whole = labels.dtype.kind in "iuf" and labels.shape == (num_examples,)
  if not whole or not ((labels >= 0) & (labels < num_examples) & (labels % 1 == 0)).all():
    raise ValueError(
      f"{path}: labels must be one class number for each of {num_examples} examples, whole and "
      f"below {num_examples}."
    )
  return labels.astype(np.int64)
