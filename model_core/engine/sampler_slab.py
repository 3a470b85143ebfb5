"""Some rows of a batch, chosen for together: what the device computes of them, and what the host makes of it.

In: the batch's logits and, row by row, what was asked for. Out: a token, with log-probabilities, or an error for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model_core.engine.choices import draw, token_at
from model_core.engine.draws import best, column_masses, mass_bits, pad, pick, to_mass, weigh
from model_core.engine.logit_changes import RowChange, apply_changes
from model_core.engine.row_arrays import Array, Arrays
from model_core.engine.sampler_state import SamplerState
from model_core.errors import RequestFailedError
from model_core.types import TokenLogprob

#: Best tokens at hand before a row of top-p asks for all; top-k alone needs no more than its k.
_NUM_CANDIDATES = 256
_NEVER = float("-inf")

#: What came to the host, by name.
Host = dict[str, np.ndarray]


class Sampled(NamedTuple):
    """One is made for every token: a frozen dataclass takes three times as long."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """index: in the batch. uniform: its random number, drawn before anything can fail or be tried again."""

    index: int
    state: SamplerState
    change: RowChange | None
    uniform: float


class Slab:
    """`sent` is what the host needs of these rows, and `finish` what it makes of that. Rows are numbered from 0.

    There are three kinds: greedy; drawn from the whole vocabulary, where the logits are; cut by top-k or top-p, where
    a row's best tokens are sent and the host draws.
    """

    def __init__(self, xp: Arrays, batch: Array, peaks: dict[str, Array], rows: Sequence[Row]) -> None:
        self._xp, self._rows, self._params = xp, rows, [row.state.params for row in rows]
        self._vocab_size = batch.shape[1]
        at = [row.index for row in rows]
        raw, raw_peaks = self._take(batch, at), self._take(peaks["values"], at)
        changed = apply_changes(xp, raw, [row.change for row in rows])
        if changed is raw:
            self._peaks, tokens = raw_peaks, self._take(peaks["tokens"], at)
        else:
            self._peaks, tokens = xp.highest(changed)
        self._raw = pad(xp, raw)
        self._logits = self._raw if changed is raw else pad(xp, changed)
        self.sent: dict[str, Array] = {"peaks": self._peaks, "tokens": tokens}
        self._set_dials()
        if self._mass_rows:
            self._send_masses()
        if self._cut_rows:
            self._send_candidates()
        self._reported = [row for row, p in enumerate(self._params) if p.logprobs is not None]
        if self._reported:
            self._send_reports(raw_peaks)

    def finish(self, host: Host) -> dict[int, Sampled | Exception]:
        """Every row's token or error, by its place in the batch."""
        peaks, tokens = host["peaks"].tolist(), host["tokens"].tolist()
        sound = [row for row, peak in enumerate(peaks) if math.isfinite(peak)]
        if "picked" in host:
            for row, token in zip(self._mass_rows, host["picked"].tolist(), strict=True):
                tokens[row] = token
        if self._cut_rows:
            tokens = self._draw_cut(host, tokens, frozenset(sound))
        logprobs = self._logprobs(host, tokens, frozenset(sound)) if self._reported else {}
        found: dict[int, Sampled | Exception] = {}
        for row in sound:
            found[self._rows[row].index] = Sampled(tokens[row], logprobs.get(row))
        if len(sound) < len(peaks):
            found = {row.index: _no_token(peak) for row, peak in zip(self._rows, peaks, strict=True)} | found
        return found

    # Sent

    def _set_dials(self) -> None:
        dials = [
            (p.temperature, p.min_p, row.uniform, p.top_k if p.top_k < self._vocab_size else 0, p.top_p)
            for p, row in zip(self._params, self._rows, strict=True)
        ]
        drawn = [row for row, one in enumerate(self._rows) if one.state.generator is not None]
        self._cut_rows = [row for row in drawn if dials[row][3] or dials[row][4] < 1.0]
        self._mass_rows = [row for row in drawn if not dials[row][3]]
        if drawn:
            self._host_dials = np.array(dials)
            self._dials = self._xp.upload(self._host_dials)

    def _weigh(self, logits: Array, rows: Sequence[int]) -> Array:
        """Weights of logits that belong to these rows: all of theirs, or some."""
        xp, dials = self._xp, self._take(self._dials, rows)
        is_tempered = any(self._params[row].temperature != 1.0 for row in rows)
        is_least = any(self._params[row].min_p > 0.0 for row in rows)
        temperature = xp.to_float(dials[:, 0]) if is_tempered else None
        least = xp.to_float(dials[:, 1]) if is_least else None
        return weigh(xp, logits, self._take(self._peaks, rows), temperature, least)

    def _send_masses(self) -> None:
        weights = self._weigh(self._take(self._logits, self._mass_rows), self._mass_rows)
        columns = column_masses(self._xp, weights)
        self.sent["totals"] = columns.sum(-1)
        if not set(self._mass_rows).issubset(self._cut_rows):
            numbers = self._take(self._dials, self._mass_rows)[:, 2]
            self.sent["picked"] = pick(self._xp, weights, columns, numbers)

    def _send_candidates(self) -> None:
        wanted = {self._params[row].top_k for row in self._cut_rows}
        count = max(k if 0 < k <= _NUM_CANDIDATES else _NUM_CANDIDATES for k in wanted)
        values, self.sent["best_tokens"] = best(self._xp, self._take(self._logits, self._cut_rows), count)
        self.sent["best_values"] = values
        self.sent["masses"] = to_mass(self._xp, self._weigh(values, self._cut_rows), self._logits.shape[1])

    def _send_reports(self, raw_peaks: Array) -> None:
        xp, raw = self._xp, self._take(self._raw, self._reported)
        peaks = self._take(raw_peaks, self._reported)
        self.sent["raw_peaks"], self.sent["raw_totals"] = peaks, column_masses(xp, weigh(xp, raw, peaks)).sum(-1)
        most = max(self._params[row].logprobs or 0 for row in self._reported)
        if most:  # one more than asked for shows whether a tie goes on beyond
            self.sent["top_values"], self.sent["top_tokens"] = best(xp, raw, most + 1)

    # Made of it

    def _draw_cut(self, host: Host, tokens: list[int], sound: frozenset[int]) -> list[int]:
        """`tokens` with those of the rows that top-k or top-p cuts."""
        totals = np.zeros(len(self._rows), np.int64)
        if self._mass_rows:
            totals[self._mass_rows] = host["totals"]
        values, best_tokens, masses = host["best_values"], host["best_tokens"], host["masses"]
        is_whole = masses.shape[1] == self._logits.shape[1]
        places, known = draw(masses, totals[self._cut_rows], *self._cuts(self._cut_rows))
        tokens = list(tokens)
        for n, row in enumerate(self._cut_rows):
            if row not in sound:
                continue
            if known[n] or is_whole:
                tokens[row] = token_at(self._xp, int(places[n]), values[n], best_tokens[n], self._logits[row])
            else:
                tokens[row] = self._draw_of_all(row, totals[[row]])
        return tokens

    def _cuts(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dials = self._host_dials[rows]
        return dials[:, 3], dials[:, 4], dials[:, 2]

    def _draw_of_all(self, row: int, total: np.ndarray) -> int:
        """The same draw where the best tokens were not enough: a flat distribution, or a large k."""
        xp, values = self._xp, self._xp.falling(self._logits[row])
        masses = to_mass(xp, self._weigh(values[None], [row]), len(values))
        host = xp.fetch({"values": values, "masses": masses})
        places, _ = draw(host["masses"], total, *self._cuts([row]))
        return token_at(xp, int(places[0]), host["values"], None, self._logits[row])

    def _logprobs(self, host: Host, tokens: list[int], sound: frozenset[int]) -> dict[int, TokenLogprob]:
        """Under the raw distribution, in double precision. Ties among the top go to the lower id."""
        chosen = self._raw[self._reported, [tokens[row] for row in self._reported]].tolist()
        found = {}
        for n, row in enumerate(self._reported):
            if row not in sound:
                continue
            # log(sum(exp(x))): the highest, and the logarithm of the sum of weights, of which the highest is 1.
            norm = float(host["raw_peaks"][n]) + math.log(host["raw_totals"][n] / 2 ** mass_bits(self._raw.shape[1]))
            top = []
            for place in range(min(self._params[row].logprobs or 0, self._vocab_size)):
                values = host["top_values"][n]
                token = token_at(self._xp, place, values, host["top_tokens"][n], self._raw[row])
                top.append((token, float(values[place]) - norm))
            found[row] = TokenLogprob(tokens[row], chosen[n] - norm, tuple(top))
        return found

    def _take(self, array: Array, rows: Sequence[int]) -> Array:
        """These rows; without a copy where they lie side by side."""
        first, last = rows[0], rows[-1]
        if last - first + 1 == len(rows):
            return array[first : last + 1]
        return array[self._xp.upload(np.array(rows))]


def not_finite() -> RequestFailedError:
    return RequestFailedError(
        "the model gave logits that are not finite", allowed="finite numbers",
        fix="Compute in bfloat16 or float32, and check that the weights are whole",
    )  # fmt: skip


def _no_token(peak: float) -> RequestFailedError:
    if peak != _NEVER:
        return not_finite()
    return RequestFailedError(
        "no token is left to choose from",
        value="all are forbidden",
        allowed="a logit_bias, min_tokens or response_format that leaves one",
        fix="Lower min_tokens, or take tokens off logit_bias",
    )
