"""The CPU kernel of the strong views' intensity part: what `Tone.changed` computes, a row at a time, in place.

All operations of a row follow each other while it is in cache; rows are independent, as in `kernel`.
"""

from typing import Any

import numpy as np
from torch import Tensor

from medfl.views import poisson
from medfl.views.compiled import CHUNK, HALF, ONE, ZERO, compiled, f32, hashed, i32, log2, power, soften, threaded, u32
from medfl.views.operations import GREY, LEVELS, TINY
from medfl.views.tone import Numbers, Operation, Tone

# Numbers have names here: f32(0.18) within a loop keeps numba from making it a loop of vectors.
TWO, FOUR, SIX = (f32(value) for value in (2, 4, 6))
FINE = 1 << 12  # bins of values in [0, 1]: a rank is first found among them, then within one
MINUS_LN2 = f32(-np.log(2))
MIDDLE_R, FAR_R, EDGE = f32(0.180625), f32(1.6), f32(0.425)
NEAR = tuple(  # of the normal quantile: see `_near` and `_far`
    map(f32, (59.109374720, 159.29113202, 50.434271938, 3.3871327179, 67.187563600, 78.757757664, 17.895169469))
)
FAR = tuple(map(f32, (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777, 0.12021132975, 0.73700164250)))
BLACK = f32(2.0**-26)  # no 24-bit number reaches a photon from here
GILES = tuple(map(f32, (1 / 3, 1 / 6, 1 / 36, 1 / 72, 7 / 810, 1 / 270, 8 / 405)))
SMALL, MOST, DROP = f32(poisson.SMALL), poisson.MOST, u32(32 - poisson.BITS)
MIDDLE, STEP = i32(1 << (poisson.BITS - 1)), f32(2.0**-poisson.BITS)
RED, GREEN, BLUE = (f32(value) for value in GREY)
NARROW, LEAST = f32(1 / LEVELS), f32(TINY)
COLUMN = Numbers(*range(len(Numbers._fields)))
BRIGHT, CONTRAST, SATURATION, HUE, GAMMA = COLUMN[:5]
SHARPNESS, BRIGHTNESS, KAPPA = COLUMN.sharpness, COLUMN.brightness, COLUMN.photons
JITTER, STRETCH, EQUALIZE = (int(o) for o in (Operation.JITTER, Operation.AUTO_CONTRAST, Operation.EQUALIZE))
SHARPEN, BRIGHTEN, PHOTONS = (int(o) for o in (Operation.SHARPNESS, Operation.BRIGHTNESS, Operation.PHOTONS))


@compiled
def _scale(values: Any, factor: Any) -> None:
    for k in range(values.size):
        values[k] = min(max(values[k] * factor, ZERO), ONE)


@compiled
def _mean(values: Any) -> Any:
    total: Any = 0.0
    for start in range(0, values.size, CHUNK):
        part, some = values[start : start + CHUNK], ZERO
        for k in range(part.size):
            some += part[k]
        total += some
    return f32(total / values.size)


@compiled
def _blend(values: Any, other: Any, factor: Any) -> None:
    for k in range(values.size):
        values[k] = min(max(other[k] + factor * (values[k] - other[k]), ZERO), ONE)


@compiled
def _contrast(values: Any, mean: Any, factor: Any) -> None:
    for k in range(values.size):
        values[k] = min(max(mean + factor * (values[k] - mean), ZERO), ONE)


@compiled
def _curve(values: Any, gamma: Any) -> None:
    for k in range(values.size):
        value = values[k]
        values[k] = power(value, gamma) if ZERO < value < ONE else value


@compiled
def _luma(channels: Any, grey: Any) -> None:
    """Grey (P,) of red, green and blue (3, P)."""
    for k in range(grey.size):
        grey[k] = RED * channels[0, k] + GREEN * channels[1, k] + BLUE * channels[2, k]


@compiled
def _turn(channels: Any, hue: Any) -> None:
    """Turn the hue of (3, P) by a part of the colour circle: see `operations.recoloured`."""
    for k in range(channels.shape[1]):
        red, green, blue = channels[0, k], channels[1, k], channels[2, k]
        value = max(red, green, blue)
        chroma = value - min(red, green, blue)
        divisor = max(chroma, LEAST)
        if value == red:
            sixths = (green - blue) / divisor
        elif value == green:
            sixths = (blue - red) / divisor + TWO
        else:
            sixths = (red - green) / divisor + FOUR
        sixths += SIX * hue
        for channel in range(3):
            place = sixths + f32(5 - 2 * channel)
            place -= SIX * np.floor(place / SIX)
            channels[channel, k] = value - chroma * min(max(min(place, FOUR - place), ZERO), ONE)


@compiled
def _jitter(view: Any, numbers: Any, colour: bool, volume: bool, grey: Any) -> None:
    """Brightness and contrast, then of three colours saturation and hue, of volumes gamma; view (C, P)."""
    _scale(view.reshape(-1), numbers[BRIGHT])
    if colour:
        _luma(view, grey)
        mean = _mean(grey)
    for c in range(len(view)):
        if not colour:
            mean = _mean(view[c])
        _contrast(view[c], mean, numbers[CONTRAST])
    if colour:
        _luma(view, grey)
        for c in range(len(view)):
            _blend(view[c], grey, numbers[SATURATION])
        _turn(view, numbers[HUE])
    elif volume and numbers[GAMMA] != ONE:
        _curve(view.reshape(-1), numbers[GAMMA])


@compiled
def _bin(value: Any, bins: int) -> Any:
    """Which of the bins of [0, 1]; of NaN some."""
    return min(max(i32(value * f32(bins)), i32(0)), i32(bins - 1))


@compiled
def _ranked(values: Any, rank: int, counts: Any, some: Any) -> Any:
    """The value of a rank from 0 among values in [0, 1], whose bins are counted."""
    below, place = 0, 0
    while below + counts[place] <= rank:
        below += counts[place]
        place += 1
    found, low, high = 0, ONE, ZERO
    for k in range(values.size):
        if _bin(values[k], FINE) == place:
            some[found] = values[k]
            low, high = min(low, values[k]), max(high, values[k])
            found += 1
    return low if low == high else np.sort(some[:found])[rank - below]  # a background is one value many times


@compiled
def _stretch(values: Any, low: int, high: int, counts: Any, some: Any) -> None:
    """The values between two ranks onto [0, 1], as they are where they are within one grey level."""
    counts[:] = 0
    for k in range(values.size):
        counts[_bin(values[k], FINE)] += 1
    bottom = _ranked(values, low, counts, some)
    span = _ranked(values, high, counts, some) - bottom
    if span > NARROW:
        for k in range(values.size):
            values[k] = min(max((values[k] - bottom) / span, ZERO), ONE)


@compiled
def _equalize(values: Any, counts: Any, table: Any) -> None:
    """Histogram equalisation of the voxels above the lowest bin that is not empty: see `operations.equalized`."""
    counts[:LEVELS] = 0
    for k in range(values.size):
        counts[_bin(values[k], LEVELS)] += 1
    reached, lowest = 0, values.size
    for level in range(LEVELS):
        reached += counts[level]
        if reached > 0:
            lowest = min(lowest, reached)
        table[level] = f32(max(reached - lowest, 0))
    if lowest < values.size:
        body = f32(values.size - lowest)
        for k in range(values.size):
            values[k] = table[_bin(values[k], LEVELS)] / body


@compiled
def _sharpen(view: Any, taps: Any, own: Any, factor: Any, smooth: Any) -> None:
    """Blend view (C, D, H, W) with what the taps make of it plus `own` times itself."""
    smooth[:] = view
    soften(smooth, taps)
    values, other = view.reshape(-1), smooth.reshape(-1)
    for k in range(values.size):
        smoothed = other[k] + own * values[k]
        values[k] = min(max(smoothed + factor * (values[k] - smoothed), ZERO), ONE)


@compiled
def _near(q: Any) -> Any:
    """The normal quantile of 1/2 + q, |q| <= 0.425 (Wichura, algorithm AS 241, PPND7): relative error about 1e-7."""
    r = MIDDLE_R - q * q
    top = ((NEAR[0] * r + NEAR[1]) * r + NEAR[2]) * r + NEAR[3]
    return q * top / (((NEAR[4] * r + NEAR[5]) * r + NEAR[6]) * r + ONE)


@compiled
def _far(q: Any) -> Any:
    """That of 1/2 + q for q from 0.425 to 1/2 - 2^-25."""
    r = np.sqrt(max(MINUS_LN2 * log2(HALF - q), ZERO)) - FAR_R
    top = ((FAR[0] * r + FAR[1]) * r + FAR[2]) * r + FAR[3]
    return top / ((FAR[4] * r + FAR[5]) * r + ONE)


@compiled
def _searched(rate: Any, uniform: Any) -> Any:
    """How many values of the distribution function of a small rate lie below `uniform`."""
    part = np.exp(-rate)
    total, number = part, ZERO
    while total < uniform and number < f32(MOST - 1):
        number += ONE
        part *= rate / number
        total += part
    return number


@compiled
def _photons(values: Any, kappa: Any, salts: Any, picked: Any, work: Any) -> None:
    """Each value times kappa becomes a Poisson number of that rate, and back: see `poisson`."""
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK]
        hashed(picked, start, salts)
        centred, near, far, number = work[0, : part.size], work[1], work[2], work[3]
        for k in range(part.size):
            centred[k] = (f32(i32(picked[k] >> DROP) - MIDDLE) + HALF) * STEP
        for k in range(part.size):
            near[k] = _near(centred[k])
        for k in range(part.size):
            far[k] = _far(abs(centred[k]))
        for k in range(part.size):
            w = near[k] if abs(centred[k]) <= EDGE else np.copysign(far[k], centred[k])
            rate = max(part[k] * kappa, SMALL)
            square, root = w * w, np.sqrt(rate)
            value = rate + root * w + (GILES[0] + square * GILES[1])
            value -= w * (GILES[2] + square * GILES[3]) / root
            value += (square * (GILES[4] + square * GILES[5]) - GILES[6]) / rate
            number[k] = max(np.floor(value), ZERO)
        for k in range(part.size):
            rate = part[k] * kappa
            if rate < SMALL:
                number[k] = _searched(rate, centred[k] + HALF) if rate > BLACK else ZERO
        for k in range(part.size):
            part[k] = min(number[k] / kappa, ONE)


@compiled
def _by_channel(view: Any, operation: int, ranks: Any, counts: Any, levels: Any, some: Any) -> None:
    """The operations that look at each channel of view (C, P) by itself."""
    for c in range(len(view)):
        if operation == STRETCH:
            _stretch(view[c], ranks[0], ranks[1], counts, some)
        elif operation == EQUALIZE:
            _equalize(view[c], counts, levels)


@compiled
def _rows(u: Any, chosen: Any, table: Any, taps: Any, salts: Any, ranks: Any, own: Any, start: int, stop: int) -> None:
    """Rows `start` to `stop` of u (R, C, D, H, W) in place; own is that of `_sharpen`."""
    channels, depth, size = u.shape[1], u.shape[2], u[0, 0].size
    counts, levels, some = np.empty(FINE, np.int32), np.empty(LEVELS, np.float32), np.empty(size, np.float32)
    smooth, picked, work = np.empty_like(u[0]), np.empty(CHUNK, np.uint32), np.empty((4, CHUNK), np.float32)
    for row in range(start, stop):
        view, numbers, values = u[row].reshape(channels, size), table[row], u[row].reshape(-1)
        for operation in chosen[row]:
            if operation == JITTER:
                _jitter(view, numbers, channels == len(GREY) and depth == 1, depth > 1, some)
            elif operation == BRIGHTEN:
                _scale(values, numbers[BRIGHTNESS])
            elif operation == SHARPEN:
                _sharpen(u[row], taps[row], own, numbers[SHARPNESS], smooth)
            else:
                _by_channel(view, operation, ranks, counts, levels, some)
        if (chosen[row] == PHOTONS).any():
            _photons(values, numbers[KAPPA], salts[row], picked, work)
        for k in range(values.size):
            values[k] = min(max(values[k], ZERO), ONE) * TWO - ONE


def change(u: Tensor, chosen: Tensor, table: Tensor, salts: Tensor, tone: Tone) -> None:
    """What `Tone.changed` does, all operations of all rows of u (R, C, *S) in place, and from [0, 1] to [-1, 1].

    Args:
        u: contiguous, on the CPU, in [0, 1].
        chosen: (R, K) operations in order, -1 behind the last; the photons come last wherever they stand.
        table, salts: as of `strong.Draw`.
    """
    values = u.view(*u.shape[:2], -1, *u.shape[-2:])
    last = values[0, 0].numel() - 1
    ranks = (round(tone.percentiles.low * last), round(tone.percentiles.high * last))
    taps, own = tone.smoothing(table, u.ndim - 2)
    arrays = (x.contiguous().numpy() for x in (values, chosen, table, taps))
    drawn = (*arrays, salts.numpy().view(np.uint32), ranks, f32(own))
    threaded(lambda start, stop: _rows(*drawn, start, stop), len(u), voxels=u.numel())
