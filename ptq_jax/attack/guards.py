"""Guard rails: reasons not to trust an audit, each a sentence, or None when all is well."""

from collections.abc import Sequence

import numpy as np

from ptq_jax.base import ArrayLike, Bool, Float

ACCURACY_MARGIN = 0.02


def accuracy_mismatch(
  shadow_accuracy: Float[ArrayLike, "M"],
  target_accuracy: Float[ArrayLike, "T"],
  *,
  margin: float = ACCURACY_MARGIN,
) -> str | None:
  """Shadows stand for the targets only if they perform alike.

  Args:
    shadow_accuracy: float[M], test accuracy in [0, 1].
    target_accuracy: float[T].
    margin: largest difference of the means that passes.
  """
  shadow, target = float(np.mean(shadow_accuracy)), float(np.mean(target_accuracy))
  if abs(shadow - target) <= margin:
    return None
  return (
    f"shadows reach {shadow:.1%} test accuracy and targets {target:.1%}; they differ by more than "
    f"{margin:.1%}, so the shadows may not describe the targets and the attack may look too weak."
  )


def learned_nothing(
  accuracy: float, *, chance: float, num_examples: int, margin: float = 0.05
) -> bool:
  """Whether an accuracy is hardly above that of always naming the most frequent class.

  Args:
    accuracy: mean test accuracy, in [0, 1].
    chance: share of the most frequent class.
    num_examples: test examples; two deviations of the accuracy of a guesser count as chance.
    margin: part of the way from chance to 1 that counts as hardly.
  """
  noise = 2 * np.sqrt(chance * (1 - chance) / num_examples)
  return bool(accuracy - chance <= max(margin * (1 - chance), noise))


def too_few_non_members(num_non_members: int, fprs: Sequence[float]) -> str | None:
  """A false-positive rate below one non-member cannot be told from zero."""
  blind = [fpr for fpr in fprs if num_non_members * fpr < 1]
  if not blind:
    return None
  return (
    f"{num_non_members} non-members per target cannot resolve a false-positive rate of "
    f"{', '.join(f'{fpr:.3%}' for fpr in blind)}: no false positive is allowed there, which a "
    f"guesser's threshold keeps, too, and finds {1 / (num_non_members + 1):.3%} of members; "
    f"{int(np.ceil(1 / min(blind)))} non-members would do."
  )


def copies(pool_pairs: int, pool_size: int, fprs: Sequence[float]) -> str | None:
  """A sentence if exact copies within the pool may decide the lowest false-positive rate.

  With a chance of a half one of a pair is a member and the other is not: the same to every attack.

  Args:
    pool_pairs: pairs of copies in the pool.
    pool_size: examples in the pool, half of which are members.
    fprs: the rates that are reported.
  """
  share = pool_pairs / pool_size  # (pairs / 2) of (pool / 2) non-members
  if 10 * share < min(fprs) or not pool_pairs:
    return None
  return (
    f"the pool holds {_pairs(pool_pairs)} of exact copies, so about {share:.2%} of the non-members"
    " have a copy among the members and look like them: what is found at false-positive rates near"
    " or below that is too little; drop the copies from the data."
  )


def copies_in_test(cross_pairs: int, test_size: int) -> str | None:
  """A sentence if test accuracy is in part that on examples that were trained on."""
  if 100 * cross_pairs < test_size:
    return None
  return (
    f"{_pairs(cross_pairs)} of exact copies lie one in the pool and one in the test split, which "
    f"has {test_size} examples: test accuracy is in part accuracy on what was trained on; drop the "
    "copies from the test split."
  )


def _pairs(count: int) -> str:
  return f"{count} pair{'s' * (count != 1)}"


def few_false_positives(false_positives: int, *, fpr: float, needed: int = 10) -> str | None:
  """A threshold that rests on a handful of non-members moves with each of them."""
  if false_positives >= needed:
    return None
  return (
    f"the true-positive rate at {fpr:.3%} false positives rests on {false_positives} false "
    f"positives per target, fewer than {needed}; read its interval, not its value."
  )


def check_shadow_count(found: int, *, expected: int):
  """
  Raises:
    ValueError: if scores hold another number of shadows than was configured.
  """
  if found != expected:
    raise ValueError(
      f"there are scores of {found} shadows, but {expected} are configured; finish training or "
      "correct the number of models."
    )


def auditable(
  members: Bool[ArrayLike, "M E"], *, needed: int = 2, left_out: int = 0
) -> Bool[np.ndarray, "E"]:
  """The examples with enough "in" and "out" shadows for a variance of their own.

  Args:
    members: bool[M, E], the shadows'.
    needed: shadows on each side.
    left_out: how many shadows a target's attacker does without (leave-one-out: 1).
  """
  members = np.asarray(members).astype(bool)
  counts = np.minimum(members.sum(axis=0), (~members).sum(axis=0))
  return counts - left_out >= needed
