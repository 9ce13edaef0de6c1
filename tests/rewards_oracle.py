"""Sections 2 and 3 of the method in scalar fp64 formulas: what rewards and advantages are compared with."""

import math
from statistics import fmean, stdev


def reference_weights(logc, logb, kind, scale):
    """alpha_i c_i of one trace, in scalars."""
    T = len(logb)
    if kind == "logp":
        return [1.0] * T
    if kind == "prob":
        return [math.exp(sum(logc))] * T
    if kind == "gm":
        return [math.exp(sum(logc) / T) / T] * T
    w = [{"am": 1.0, "ws_inv": 1.0 / math.exp(b), "ws_log": -b}[kind] for b in logb]
    return [w_i * math.exp(c) / (T if scale == "length" else sum(w)) for w_i, c in zip(w, logc)]


def reference_group(logc, logb, kind, scale):
    """(R of each trace, alpha_i c_i of each of its tokens) of one group; log b is clamped at -20."""
    T, logb = len(logb), [max(b, -20.0) for b in logb]
    if kind == "r3":
        sigma = [stdev(column) if len(logc) > 1 else 0.0 for column in zip(*logc)]
        w = [s / (sum(sigma) or 1.0) / T for s in sigma]
        return [sum(w_i * (c - b) for w_i, c, b in zip(w, row, logb)) for row in logc], [w] * len(logc)
    weights = [reference_weights(row, logb, kind, scale) for row in logc]
    if kind == "logp":
        return [sum(row) for row in logc], weights
    # Of all others R is a sum, or T equal parts, of its weights; prob is one part alone.
    return [row[0] if kind == "prob" else sum(row) for row in weights], weights


def reference_shaped(raw, base, closed, clip, drop_cut_reward, share):
    """R after drop_cut_reward, clip and format term."""
    raw = [base if drop_cut_reward and not end else value for value, end in zip(raw, closed)]
    clips = {"none": lambda r: r, "zero": lambda r: max(0.0, r - base), "unit": lambda r: min(max(0.0, r - base), 1.0)}
    shaped = [clips[clip](value) for value in raw]
    return [(1 - share) * value + share * end for value, end in zip(shaped, closed)]


def reference_advantages(values, kind, floor):
    if max(values) == min(values) or stdev(values) <= floor:
        return [0.0] * len(values)
    scale = {"grpo": 1 / stdev(values), "dr_grpo": 1.0, "rloo": len(values) / (len(values) - 1)}[kind]
    return [(value - fmean(values)) * scale for value in values]
