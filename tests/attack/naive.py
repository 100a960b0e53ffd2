"""The attacks as plain loops over examples and views, from the formulas."""

import numpy as np
from scipy import optimize, special


def log_density(x, center, deviation):
  """Of a normal distribution; `scipy.stats.norm` takes a hundred times as long for a number."""
  return -(((x - center) / deviation) ** 2) / 2 - np.log(deviation * np.sqrt(2 * np.pi))


def lira(shadow_scores, shadow_members, target_scores, variant):
  """One target: float64[E]. `variant` as `lira.Variant`."""
  side, variance, tail, center = variant
  shadow_scores = np.asarray(shadow_scores, np.float64)
  num_examples, num_views = target_scores.shape
  middle = np.median if center == "median" else np.mean

  def group(inside, e, v):
    return shadow_scores[shadow_members[:, e] == inside, e, v]

  def shared_spread(inside):
    groups = [group(inside, e, v) for e in range(num_examples) for v in range(num_views)]
    if variance == "reference":
      return np.std(np.concatenate(groups))
    squares = sum(len(g) * np.var(g) for g in groups)
    return np.sqrt(squares / sum(len(g) - 1 for g in groups))

  def prior(inside):
    """Degrees of freedom and variance by the moments of log variances."""
    groups = [group(inside, e, v) for e in range(num_examples) for v in range(num_views)]
    known = [(len(g) - 1, np.var(g, ddof=1)) for g in groups if len(g) > 1 and np.var(g) > 0]
    half = np.array([d / 2 for d, _ in known])
    logs = np.log([s for _, s in known]) - special.digamma(half) + np.log(half)
    excess = np.var(logs, ddof=1) - np.mean(special.polygamma(1, half))
    if excess <= 1e-5:
      x = 1e5
    else:
      x = optimize.brentq(lambda x: special.polygamma(1, x) - excess, 1e-3, 1e6)
    return 2 * x, np.exp(np.mean(logs) + special.digamma(x) - np.log(x))

  def shrunk_spread(g, freedom, typical):
    return np.sqrt((freedom * typical + len(g) * np.var(g)) / (freedom + len(g) - 1))

  priors = {inside: prior(inside) for inside in (True, False)} if variance == "shrunk" else {}
  if variance not in ("per_example", "shrunk"):
    shared = {inside: shared_spread(inside) for inside in (True, False)}
  scores = np.zeros((num_examples, num_views))
  for e in range(num_examples):
    for v in range(num_views):
      spread = [
        np.std(group(inside, e, v))
        if variance == "per_example"
        else shrunk_spread(group(inside, e, v), *priors[inside])
        if variance == "shrunk"
        else shared[inside]
        for inside in (True, False)
      ]
      if variance == "reference" and side == "online":
        spread[1] = spread[0]
      centers = [middle(group(inside, e, v)) for inside in (True, False)]
      inside, outside = (
        log_density(target_scores[e, v], center, deviation + 1e-30)
        for center, deviation in zip(centers, spread, strict=True)
      )
      if side == "online":
        scores[e, v] = inside - outside
      elif tail == "density":
        scores[e, v] = -outside
      else:
        scores[e, v] = -special.log_ndtr((centers[1] - target_scores[e, v]) / (spread[1] + 1e-30))
  return scores.mean(axis=1)


def rmia(shadow_scores, shadow_members, target_scores, *, side, population, gamma, offline_a):
  """One target: float64[E]; `population` is (shadow scores [M, Z, V], members [M, Z], target)."""

  def probability(scores):
    return 1 / (1 + np.exp(-np.asarray(scores, np.float64)))

  def ratio(shadows, members, target, e, v):
    inside, outside = [probability(shadows[members[:, e] == m, e, v]) for m in (True, False)]
    if side == "offline":
      typical = ((1 + offline_a) * outside.mean() + 1 - offline_a) / 2
    elif len(inside):
      typical = (inside.mean() + outside.mean()) / 2
    else:
      typical = outside.mean()
    return probability(target[e, v]) / typical

  num_examples, num_views = target_scores.shape
  scores = np.zeros((num_examples, num_views))
  for v in range(num_views):
    others = [ratio(*population, z, v) for z in range(population[2].shape[0])]
    for e in range(num_examples):
      own = ratio(shadow_scores, shadow_members, target_scores, e, v)
      scores[e, v] = np.mean([own / other >= gamma for other in others])
  return scores.mean(axis=1)
