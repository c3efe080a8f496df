"""Plausible faces: mixtures of named ARKit poses instead of independent noise on 52 weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from avatars.head.makehuman import ARKIT_NAMES

__all__ = ["POSES", "code", "random_expression", "smooth_sequence"]

Floats = NDArray[np.float32]


def _both(**weights: float) -> dict[str, float]:
    """The same weight for the left and the right unit."""
    return {f"{name}{side}": value for name, value in weights.items() for side in ("Left", "Right")}


POSES: dict[str, dict[str, float]] = {
    "neutral": {},
    "smile": _both(mouthSmile=0.8, cheekSquint=0.5, eyeSquint=0.3, mouthDimple=0.3),
    "laugh": {
        "jawOpen": 0.45,
        **_both(mouthSmile=0.9, cheekSquint=0.8, eyeSquint=0.5, mouthUpperUp=0.45, mouthLowerDown=0.3),
    },
    "grin": _both(mouthSmile=0.6, mouthUpperUp=0.6, mouthLowerDown=0.5, cheekSquint=0.4),
    "smirk left": {"mouthSmileLeft": 0.8, "mouthDimpleLeft": 0.5, "mouthLeft": 0.25},
    "smirk right": {"mouthSmileRight": 0.8, "mouthDimpleRight": 0.5, "mouthRight": 0.25},
    "surprise": {"jawOpen": 0.5, "browInnerUp": 0.9, **_both(eyeWide=0.8, browOuterUp=0.8)},
    "sad": {"browInnerUp": 0.8, "mouthShrugLower": 0.4, **_both(mouthFrown=0.7, eyeSquint=0.2)},
    "angry": _both(browDown=0.9, eyeSquint=0.4, noseSneer=0.5, mouthPress=0.6, mouthFrown=0.3),
    "disgust": _both(noseSneer=0.9, mouthUpperUp=0.6, browDown=0.5, eyeSquint=0.5),
    "fear": {"browInnerUp": 0.8, "jawOpen": 0.2, **_both(eyeWide=0.8, mouthStretch=0.7)},
    "jaw drop": {"jawOpen": 0.85},
    "ah": {"jawOpen": 0.5, **_both(mouthLowerDown=0.2)},
    "ee": {"jawOpen": 0.12, **_both(mouthStretch=0.6, mouthUpperUp=0.3, mouthLowerDown=0.45)},
    "oh": {"jawOpen": 0.35, "mouthFunnel": 0.8},
    "oo": {"mouthPucker": 0.85, "jawOpen": 0.08},
    "pucker": {"mouthPucker": 1.0},
    "puff": {"cheekPuff": 0.95},
    "mouth left": {"mouthLeft": 0.9, "jawLeft": 0.3},
    "mouth right": {"mouthRight": 0.9, "jawRight": 0.3},
    "jaw left": {"jawLeft": 0.9, "jawOpen": 0.1},
    "jaw right": {"jawRight": 0.9, "jawOpen": 0.1},
    "jaw forward": {"jawForward": 0.9},
    "lips in": {"mouthRollLower": 0.8, "mouthRollUpper": 0.8},
    "shrug": {"mouthShrugLower": 0.8, "mouthShrugUpper": 0.5, **_both(browOuterUp=0.4)},
    "tongue": {"tongueOut": 0.9, "jawOpen": 0.4},
    "blink": _both(eyeBlink=0.95),
    "wink left": {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.7, "mouthSmileLeft": 0.4},
    "wink right": {"eyeBlinkRight": 1.0, "cheekSquintRight": 0.7, "mouthSmileRight": 0.4},
    "brows up": {"browInnerUp": 0.8, **_both(browOuterUp=0.9)},
    "brows down": _both(browDown=1.0),
    "squint": _both(eyeSquint=0.9, cheekSquint=0.6),
}  # fmt: skip


def code(weights: dict[str, float]) -> Floats:
    """ARKit weights by name as a code (52,).

    Raises:
        UserError: a name is unknown or a weight lies outside [0, 1].
    """
    out = np.zeros(len(ARKIT_NAMES), np.float32)
    for name, weight in weights.items():
        if name not in ARKIT_NAMES:
            raise UserError(f"unknown expression {name!r}; the names are ARKit's, for example 'jawOpen'")
        if not 0 <= weight <= 1:
            raise UserError(f"the weight of expression {name!r} is {weight}; it must lie in [0, 1]")
        out[ARKIT_NAMES.index(name)] = weight
    return out


def gaze(horizontal: float, vertical: float) -> dict[str, float]:
    """Both eyes turned to the subject's left (> 0) or right and up (> 0) or down, in shares of the full turn."""
    left, right = max(horizontal, 0.0), max(-horizontal, 0.0)
    up, down = max(vertical, 0.0), max(-vertical, 0.0)
    weights = {
        "eyeLookOutLeft": left,
        "eyeLookInRight": left,
        "eyeLookInLeft": right,
        "eyeLookOutRight": right,
    }
    return weights | _both(eyeLookUp=up, eyeLookDown=down)


def random_expression(rng: np.random.Generator) -> Floats:
    """One or two named poses at random strength, uneven sides, a gaze, and a little of everything; (52,)."""
    names = list(POSES)
    out = np.zeros(len(ARKIT_NAMES))
    for strength in (rng.uniform(0.5, 1.0), rng.uniform(0.0, 0.6) * (rng.random() < 0.5)):
        out += strength * code(POSES[names[rng.integers(len(names))]])
    out *= rng.uniform(0.85, 1.15, len(out))
    out += code(gaze(np.clip(rng.normal(0, 0.35), -1, 1), np.clip(rng.normal(0, 0.25), -1, 1)))
    small = rng.exponential(0.03, len(out)) * (rng.random(len(out)) < 0.3)
    for name in (
        "tongueOut",
        "jawOpen",
        "mouthClose",
    ):  # a little of these shows as teeth or tongue between shut lips
        small[ARKIT_NAMES.index(name)] = 0
    out = np.clip(out + small, 0, 1)
    # A blink leaves nothing to widen, and two opposite units do not pull at once.
    for first, second in (("eyeBlinkLeft", "eyeWideLeft"), ("eyeBlinkRight", "eyeWideRight"), ("jawLeft", "jawRight"),
                          ("mouthLeft", "mouthRight")):  # fmt: skip
        i, j = ARKIT_NAMES.index(first), ARKIT_NAMES.index(second)
        common = min(out[i], out[j])
        out[i], out[j] = out[i] - common, out[j] - common
    return out.astype(np.float32)


def smooth_sequence(rng: np.random.Generator, length: int, *, hold: int = 8) -> Floats:
    """A sequence (length, 52) that eases from one random expression to the next, `hold` frames apart."""
    n = length // hold + 2
    keys = np.stack([np.zeros(len(ARKIT_NAMES)), *(random_expression(rng) for _ in range(n))])
    time = np.arange(length) / hold
    k = time.astype(int)
    ease = (1 - np.cos(np.pi * (time - k))) / 2
    return (keys[k] + ease[:, None] * (keys[k + 1] - keys[k])).astype(np.float32)
