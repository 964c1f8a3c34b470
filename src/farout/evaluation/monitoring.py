"""Monitoring of p-values over time: conformal test martingale, Shiryaev-Roberts statistic, windowed rates, online FDR.

The p-values of a detector share one calibration set of n images. A false-alarm rate that is a little too high because
of these n images would drive a martingale on the p-values to any threshold. Therefore every image is ranked among the
calibration images and all earlier images together. If all of them are exchangeable, these sequential p-values are
independent and uniform, exactly, for any n (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2022,
theorem 11.1).

A p-value (k + 1) / (n + 1) says that k calibration scores are at least as high as the score of the image. Earlier
images with another k are ranked by it, those with the same k in random order: within equal k all orders are equally
likely, so the sequential p-values have the same distribution as with the scores, and the state is one count per k.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel
from scipy import special, stats

from farout.core import store
from farout.core.errors import FaroutError, MissingExtraError, StoreError
from farout.core.schema import Schema, check_content
from farout.detectors.base import Detector, Scores
from farout.detectors.calibration import check_alpha, check_fitted, check_seed, flag_outliers

__all__ = ["Alarm", "FDRMethod", "Monitor", "Statistic", "expected_flag_range", "rate_interval"]

Statistic = Literal["martingale", "shiryaev-roberts"]
FDRMethod = Literal["lond", "lord++"]

_EXPONENTS = np.linspace(0.1, 0.9, 9)
"""Exponents of the power martingales, in equal parts: small ones detect few extreme scores, large ones small shifts."""
_ROWS_PER_STEP = 512
_THRESHOLDS: Mapping[Statistic, float] = {"martingale": 100.0, "shiryaev-roberts": 10_000.0}
_LN10 = math.log(10)


@dataclass(frozen=True)
class Alarm:
    """An image at which the statistic has reached the threshold.

    Attributes:
        row: number of the row among all that the monitor has seen, from 1, those without a p-value included.
        image: number of the image among those with a p-value, from 1.
        key: its key.
        log10_statistic: decimal logarithm of the statistic after this image.
    """

    row: int
    image: int
    key: str
    log10_statistic: float


class _Evidence(Schema):
    """Logarithms by exponent; None is minus infinity."""

    restarted: list[float | None]
    shiryaev_roberts: list[float | None]


class _AlarmContent(Schema):
    row: int
    image: int
    key: str
    log10_statistic: float


class _SettingsContent(BaseModel):
    """Arguments of `Monitor`."""

    calibration_images: int
    alpha: float
    statistic: Statistic
    threshold: float
    window: int
    fdr: float | None
    fdr_method: FDRMethod
    seed: int


class _StateContent(Schema):
    """What `Monitor.to_dict` returns."""

    settings: _SettingsContent
    rows: int
    status: dict[str, int]
    flagged: int
    selected: int
    counts: list[int]
    evidence: _Evidence
    recent_flags: list[bool]
    alarms: list[_AlarmContent]
    fdr_state: dict[str, Any] | None


class Monitor:
    """Watches the p-values of a detector over time: is the stream still like the calibration images?

    The null hypothesis is that calibration images and monitored images are exchangeable. Alarms are raised for streams
    that become more anomalous:

    - `martingale`: a mixture of power martingales (Vovk et al. 2003) over exponents and over the image at which the
      change happens, the latter with weights 1 / (j (j + 1)). It starts at 1, and by Ville's inequality the probability
      that it ever reaches `threshold` without a change is at most 1 / threshold, however long the stream is. There is
      at most one alarm.
    - `shiryaev-roberts`: the sum over all possible images of change instead of the weighted mean (Vovk et al. 2021).
      It reacts sooner in long streams and starts again after each alarm: without a change there is on average at most
      one alarm per `threshold` images.

    Both are computed; `statistic` chooses which of them raises alarms.

    Args:
        calibration_images: number n of calibration images of the detector that computed the p-values.
        alpha: false-alarm rate that images are flagged at.
        statistic: `martingale` or `shiryaev-roberts`.
        threshold: value of the statistic that raises an alarm; None: 100 for `martingale`, 10,000 for
            `shiryaev-roberts`.
        window: number of images for the windowed false-alarm rate.
        fdr: false discovery rate at which images are selected one by one; None: none are selected.
        fdr_method: `lond`, whose guarantee holds for the p-values of one calibration set, or `lord++`, which selects
            more, but is proven for independent p-values only.
        seed: seed of the random order of images with the same p-value.

    Attributes:
        rows: number of rows seen, those without a p-value included.
        status: number of rows by status.
        flagged: number of images with p <= alpha.
        selected: number of images selected at `fdr`.
        alarms: the alarms so far.

    Raises:
        FaroutError: for arguments out of range.
    """

    def __init__(
        self,
        calibration_images: int,
        *,
        alpha: float = 0.05,
        statistic: Statistic = "martingale",
        threshold: float | None = None,
        window: int = 100,
        fdr: float | None = None,
        fdr_method: FDRMethod = "lond",
        seed: int = 0,
    ) -> None:
        check_alpha(alpha)
        check_seed(seed)
        if statistic not in _THRESHOLDS:
            raise FaroutError(f"the statistic is {statistic!r}; expected {' or '.join(_THRESHOLDS)}")
        threshold = _THRESHOLDS[statistic] if threshold is None else threshold
        for name, value, least in (("calibration_images", calibration_images, 1), ("window", window, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise FaroutError(f"{name} is {value!r}; expected a whole number of {least} or more")
        if not 1 < threshold < math.inf:
            raise FaroutError(
                f"the threshold is {threshold!r}; expected a number above 1: a martingale starts at 1, and reaches the "
                "threshold without a change with a probability of at most 1 / threshold"
            )
        if fdr is not None and not 0 < fdr < 1:
            raise FaroutError(f"fdr is {fdr!r}; expected a rate between 0 and 1")
        self.calibration_images, self.alpha, self.window = calibration_images, float(alpha), window
        self.statistic: Statistic = statistic
        self.threshold = float(threshold)
        self.fdr, self.fdr_method, self.seed = fdr, fdr_method, seed
        self.rows = self.flagged = self.selected = 0
        self.status: dict[str, int] = {}
        self.alarms: list[Alarm] = []
        self._counts = np.zeros(calibration_images + 1, dtype=np.int64)
        """Images so far by k, the number of calibration scores that are at least as high."""
        self._log_restarted = np.full(len(_EXPONENTS), -np.inf)
        self._log_shiryaev_roberts = np.full(len(_EXPONENTS), -np.inf)
        self._recent_flags = np.zeros(0, dtype=bool)
        self._fdr_test = None if fdr is None else _create_fdr_test(fdr, fdr_method)

    @classmethod
    def from_detector(cls, detector: Detector, **settings: Any) -> Self:
        """Create a monitor for the p-values of a fitted detector, at its alpha; see `Monitor` for the settings."""
        check_fitted(detector)
        return cls(len(detector.calibration), **{"alpha": detector.alpha, **settings})

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        names = ("calibration_images", "alpha", "statistic", "threshold", "window", "fdr", "fdr_method", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def images(self) -> int:
        """Number of images with a p-value."""
        return int(self._counts.sum())

    @property
    def first_fdr_level(self) -> float:
        """The p-value up to which the first image is selected; NaN without `fdr`."""
        if self.fdr is None:
            return math.nan
        first = _create_fdr_test(self.fdr, self.fdr_method)
        first.test_one(1.0)
        return float(first.last_test_level)

    @property
    def log10_martingale(self) -> float:
        """Decimal logarithm of the martingale after the last image."""
        return float(_mix_restarts(self._log_restarted[None], self.images)[0]) / _LN10

    @property
    def log10_shiryaev_roberts(self) -> float:
        """Decimal logarithm of the Shiryaev-Roberts statistic after the last image; -inf before the first one."""
        return float(_log_mean(self._log_shiryaev_roberts[None])[0]) / _LN10

    def __repr__(self) -> str:
        return f"Monitor({self.images} images, {self.flagged} flagged, {len(self.alarms)} alarms)"

    def update(self, scores: Any) -> pd.DataFrame:
        """Continue with new images, in time order.

        Args:
            scores: `Scores`, a table (pandas, pyarrow, or a dict of columns) with the column `p_value` and optionally
                `key` and `status`, or p-values. Rows without a p-value, such as those of unreadable images, are counted
                by their status and have no influence.

        Returns:
            One row per given row: `key`, `status`, `p_value`; `sequential_p_value`, the rank among calibration and
            earlier images; `log10_martingale` and `log10_shiryaev_roberts`; `flagged`; `window_images`, `window_rate`
            with the ends `window_low` and `window_high` of its 95 % interval, and the range `expected_low` to
            `expected_high` that contains the rate with 95 % probability as long as nothing changes; `alarm`; with
            `fdr`, also `selected`.

        Raises:
            FaroutError: for p-values that are not those of `calibration_images` images; the monitor is then unchanged.
        """
        table = _to_table(scores, self.rows)
        has_p_value = table["p_value"].notna().to_numpy()
        keys = table["key"].to_numpy(dtype=object)[has_p_value]
        cells = self._find_cells(table["p_value"].to_numpy()[has_p_value], keys)
        p_values = (cells + 1) / (self.calibration_images + 1)  # those of a table may be rounded
        rows = self.rows + 1 + np.flatnonzero(has_p_value)

        columns: list[dict[str, np.ndarray]] = []
        for start in range(0, len(cells), _ROWS_PER_STEP):
            part = slice(start, start + _ROWS_PER_STEP)
            columns.append(self._advance(cells[part], rows[part], keys[part]))
        is_flagged = flag_outliers(p_values, self.alpha)
        window = self._windows(is_flagged)
        self.rows += len(table)
        self.status = dict(sorted((Counter(self.status) + Counter(table["status"])).items()))
        self.flagged += int(is_flagged.sum())

        decisions = table.loc[:, ["key", "status", "p_value"]]
        names = ("sequential_p_value", "log10_martingale", "log10_shiryaev_roberts", "alarm")
        evidence = {name: np.concatenate([np.zeros(0), *(part[name] for part in columns)]) for name in names}
        alarm = evidence.pop("alarm").astype(bool)
        for name, values in (evidence | {"flagged": is_flagged} | window).items():
            decisions[name] = _fill_rows(values, has_p_value)
        decisions["alarm"] = np.zeros(len(table), dtype=bool)
        decisions.loc[has_p_value, "alarm"] = alarm
        if self._fdr_test is not None:
            is_selected = np.array([self._fdr_test.test_one(float(value)) for value in p_values], dtype=bool)
            self.selected += int(is_selected.sum())
            decisions["selected"] = _fill_rows(is_selected, has_p_value)
        return decisions

    def _find_cells(self, p_values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The number of calibration scores that are at least as high, from each p-value (k + 1) / (n + 1)."""
        n = self.calibration_images
        scaled = p_values * (n + 1)
        cells = np.rint(scaled)
        # tables may have p-values of six digits
        invalid = np.flatnonzero((np.abs(scaled - cells) > 1e-3) | (cells < 1) | (cells > n + 1))
        if len(invalid):
            value, key = p_values[invalid[0]], keys[invalid[0]]
            raise FaroutError(
                f"{key} has the p-value {value:.8g}, which is no multiple of 1 / {n + 1}: with {n} calibration images "
                f"all p-values are 1 / {n + 1}, 2 / {n + 1}, …, 1; give the number of calibration images of the "
                "detector that computed them, and p-values that are not rounded"
            )
        return cells.astype(np.int64) - 1

    def _advance(self, cells: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
        """Rank some images among all earlier ones, and bet on their ranks."""
        before = self.images
        number = before + 1 + np.arange(len(cells))
        # draw t is the t-th number of the generator, in whatever parts the images come; it is above 0
        uniform = 1 - np.random.Generator(np.random.PCG64(self.seed).advance(before)).random(len(cells))
        is_earlier = np.tri(len(cells), k=-1, dtype=bool)
        lower, equal = cells[None] < cells[:, None], cells[None] == cells[:, None]
        lower_before = np.cumsum(self._counts) - self._counts
        above = cells + lower_before[cells] + (lower & is_earlier).sum(1)
        tied = self._counts[cells] + (equal & is_earlier).sum(1) + 1
        p_values = (above + uniform * tied) / (self.calibration_images + number)
        self._counts += np.bincount(cells, minlength=len(self._counts))

        # the bet eps u^(eps - 1) has the mean 1 for uniform u. It falls in u, so that equal scores of calibration
        # images, which count as higher, can only make it smaller
        log_bets = np.log(_EXPONENTS) + (_EXPONENTS - 1) * np.log(p_values)[:, None]
        # A_t = bet_t (A_{t-1} + 1 / (t (t + 1))): the capital of the changes that have begun
        log_weights = -np.log(number) - np.log(number + 1)
        restarted = _accumulate(self._log_restarted, log_weights, log_bets)
        self._log_restarted = restarted[-1]
        log_martingale = _mix_restarts(restarted, number)

        # R_t = bet_t (R_{t-1} + 1), from zero again after an alarm
        log_shiryaev_roberts, start = np.zeros(len(cells)), 0
        is_alarm = np.zeros(len(cells), dtype=bool)
        while start < len(cells):
            values = _accumulate(self._log_shiryaev_roberts, np.zeros(len(cells) - start), log_bets[start:])
            mixed = _log_mean(values)
            is_reached = (mixed >= math.log(self.threshold)) & (self.statistic == "shiryaev-roberts")
            reached = np.flatnonzero(is_reached)
            stop = start + (int(reached[0]) + 1 if len(reached) else len(values))
            log_shiryaev_roberts[start:stop] = mixed[: stop - start]
            self._log_shiryaev_roberts = values[stop - start - 1]
            if len(reached):
                is_alarm[stop - 1] = True
                self._log_shiryaev_roberts = np.full(len(_EXPONENTS), -np.inf)
            start = stop
        if self.statistic == "martingale" and not self.alarms:
            is_alarm[np.flatnonzero(log_martingale >= math.log(self.threshold))[:1]] = True
        statistic = log_martingale if self.statistic == "martingale" else log_shiryaev_roberts
        self.alarms += [
            Alarm(int(rows[i]), int(number[i]), str(keys[i]), float(statistic[i]) / _LN10)
            for i in np.flatnonzero(is_alarm)
        ]
        return {
            "sequential_p_value": p_values,
            "log10_martingale": log_martingale / _LN10,
            "log10_shiryaev_roberts": log_shiryaev_roberts / _LN10,
            "alarm": is_alarm,
        }

    def _windows(self, is_flagged: np.ndarray) -> dict[str, np.ndarray]:
        """The rate of flagged images among the last `window` ones, or among all while there are fewer."""
        joined = np.concatenate([self._recent_flags, is_flagged])
        total = np.concatenate([[0], np.cumsum(joined)])
        end = np.arange(len(self._recent_flags), len(joined)) + 1
        start = np.maximum(end - self.window, 0)
        sizes, flagged = end - start, total[end] - total[start]
        self._recent_flags = joined[-self.window :]
        low, high = rate_interval(flagged, sizes)
        used, index = np.unique(sizes, return_inverse=True)
        expected = np.array([expected_flag_range(int(size), self.calibration_images, self.alpha) for size in used])
        expected = expected.reshape(-1, 2)[index]
        return {
            "window_images": sizes,
            "window_rate": flagged / sizes,
            "window_low": low,
            "window_high": high,
            "expected_low": expected[:, 0],
            "expected_high": expected[:, 1],
        }

    def to_dict(self) -> dict[str, Any]:
        """The settings and the state as JSON values; `from_dict` is the inverse."""
        return {
            "settings": self.settings,
            "rows": self.rows,
            "status": self.status,
            "flagged": self.flagged,
            "selected": self.selected,
            "counts": self._counts.tolist(),
            "evidence": {
                "restarted": _to_json(self._log_restarted),
                "shiryaev_roberts": _to_json(self._log_shiryaev_roberts),
            },
            "recent_flags": self._recent_flags.tolist(),
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "fdr_state": None if self._fdr_test is None else self._fdr_test.snapshot(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "the state of the monitor") -> Self:
        """Restore a monitor from `to_dict`; raises StoreError for content of another form."""
        check_content(content, _StateContent, where)
        try:
            monitor = cls(**content["settings"])
        except (FaroutError, TypeError) as error:
            raise StoreError(f"{where}: {error}") from error
        counts, evidence = content["counts"], content["evidence"]
        lengths = (len(counts), *map(len, evidence.values()))
        numbers_with_p_value = sum(counts)
        if lengths != (monitor.calibration_images + 1, len(_EXPONENTS), len(_EXPONENTS)) or min(counts) < 0:
            raise StoreError(f"{where} does not fit {monitor.calibration_images} calibration images")
        if numbers_with_p_value > content["rows"] or sum(content["status"].values()) != content["rows"]:
            raise StoreError(f"{where} has {content['rows']} rows, but its counts are those of another number")
        monitor.rows, monitor.status = content["rows"], dict(content["status"])
        monitor.flagged, monitor.selected = content["flagged"], content["selected"]
        monitor.alarms = [Alarm(**alarm) for alarm in content["alarms"]]
        monitor._counts = np.array(counts, dtype=np.int64)
        monitor._log_restarted = _from_json(evidence["restarted"])
        monitor._log_shiryaev_roberts = _from_json(evidence["shiryaev_roberts"])
        monitor._recent_flags = np.array(content["recent_flags"][-monitor.window :], dtype=bool)
        if monitor._fdr_test is not None:
            try:
                monitor._fdr_test = type(monitor._fdr_test).from_snapshot(content["fdr_state"])
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise StoreError(f"{where}: fdr_state cannot be restored ({error})") from error
        return monitor

    def save(self, path: str | Path) -> None:
        """Write settings and state as one JSON file with a hash; `load` continues from it."""
        store.write_sealed_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises StoreError for a file that is missing or was changed."""
        return cls.from_dict(store.read_sealed_json(path), str(path))


def _to_table(scores: Any, rows_before: int) -> pd.DataFrame:
    """The columns `key`, `status` and `p_value` of new rows."""
    if isinstance(scores, Scores):
        scores = {"key": list(scores.keys), "p_value": scores.p_value, "status": list(scores.status)}
    elif isinstance(scores, pa.Table | pa.RecordBatch):
        scores = {name: scores.column(name).to_pandas() for name in scores.schema.names if name in _COLUMNS}
    if isinstance(scores, Mapping | pd.DataFrame):
        if "p_value" not in scores:
            raise FaroutError(f"monitoring requires a column p_value, this table has {', '.join(map(str, scores))}")
        columns = {name: np.asarray(scores[name]) for name in _COLUMNS if name in scores}
    else:
        columns = {"p_value": np.asarray(scores)}
    if columns["p_value"].ndim != 1:
        raise FaroutError(f"p-values are one-dimensional, got the shape {columns['p_value'].shape}")
    try:
        p_values = np.array(columns["p_value"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FaroutError(f"p-values are numbers, got {columns['p_value'][:3]!r}") from error
    keys = columns.get("key", rows_before + 1 + np.arange(len(p_values)))
    given = columns.get("status", np.full(len(p_values), None))
    if {len(keys), len(given)} != {len(p_values)}:
        raise FaroutError(f"there are {len(p_values)} p-values for {len(keys)} keys and {len(given)} values of status")
    defaults = np.where(np.isnan(p_values), "not a number", "ok")
    status = np.array(
        [str(default if pd.isna(value) else value) for value, default in zip(given, defaults)], dtype=object
    )
    # an image that counts as scored must have a p-value, and one without a score has none
    status[np.isnan(p_values) & (status == "ok")] = "no p-value"
    p_values[status != "ok"] = np.nan
    return pd.DataFrame({"key": [str(key) for key in keys], "status": status, "p_value": p_values})


_COLUMNS = ("key", "status", "p_value")


def _fill_rows(values: np.ndarray, has_p_value: np.ndarray) -> Any:
    """A column with a missing value in each row without a p-value."""
    if has_p_value.all():
        return values
    if values.dtype == bool or np.issubdtype(values.dtype, np.integer):
        column = pd.array([pd.NA] * len(has_p_value), dtype="boolean" if values.dtype == bool else "Int64")
        column[has_p_value] = values
        return column
    filled = np.full(len(has_p_value), np.nan)
    filled[has_p_value] = values
    return filled


def _accumulate(log_start: np.ndarray, log_added: np.ndarray, log_bets: np.ndarray) -> np.ndarray:
    """Logarithms of A_t = bet_t (A_{t-1} + added_t), for all t and exponents (t, exponent)."""
    log_products = np.cumsum(log_bets, axis=0)
    # A_t / (bet_1 ... bet_t) = A_0 + sum over j <= t of added_j / (bet_1 ... bet_{j-1})
    terms = log_added[:, None] - (log_products - log_bets)
    sums = np.logaddexp.accumulate(np.concatenate([log_start[None], terms]), axis=0)[1:]
    return log_products + sums


def _log_mean(values: np.ndarray) -> np.ndarray:
    """Logarithm of the mean over exponents."""
    return np.asarray(special.logsumexp(values, axis=1)) - math.log(values.shape[1])


def _mix_restarts(restarted: np.ndarray, number: Any) -> np.ndarray:
    """Logarithm of the martingale: the changes that have begun, and the weight 1 / (t + 1) of those that have not."""
    return np.asarray(np.logaddexp(_log_mean(restarted), -np.log(np.asarray(number) + 1)))


def rate_interval(flagged: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of Clopper and Pearson (1934) for a rate."""
    flagged, images = np.asarray(flagged, dtype=np.float64), np.asarray(images, dtype=np.float64)
    pairs, index = np.unique(np.stack([flagged, images]), axis=1, return_inverse=True)
    index = index.reshape(-1)
    low = np.where(pairs[0] > 0, special.betaincinv(np.maximum(pairs[0], 1), pairs[1] - pairs[0] + 1, 0.025), 0.0)
    high = np.where(
        pairs[0] < pairs[1], special.betaincinv(pairs[0] + 1, np.maximum(pairs[1] - pairs[0], 1), 0.975), 1.0
    )
    return low[index], high[index]


@functools.lru_cache(maxsize=4096)
def expected_flag_range(images: int, calibration_images: int, alpha: float) -> tuple[float, float]:
    """Range of the flagged share of `images` normal images, with a probability of at least 95 %.

    The m = floor(alpha (n + 1)) highest cells are flagged. Given n exchangeable calibration images, the rate is
    distributed as Beta(m, n + 1 - m) and the number of flagged images as beta-binomial: the range is wider than that
    of a binomial distribution, because all images share the calibration set.
    """
    cells = np.arange(1, calibration_images + 2) / (calibration_images + 1)
    flagged_cells = int(flag_outliers(cells, alpha).sum())
    if not flagged_cells:
        return 0.0, 0.0
    # higher counts than this are so rare that the sums below do not need them
    highest_rate = special.betaincinv(flagged_cells, calibration_images + 1 - flagged_cells, 0.999)
    highest = math.ceil(images * highest_rate + 6 * math.sqrt(images * highest_rate) + 6)
    counts = np.arange(min(highest, images) + 1)
    cumulative = np.cumsum(stats.betabinom.pmf(counts, images, flagged_cells, calibration_images + 1 - flagged_cells))
    low, high = np.searchsorted(cumulative, [0.025, 0.975])
    return float(low) / images, float(min(high, counts[-1])) / images


def _create_fdr_test(fdr: float, method: FDRMethod) -> Any:
    try:
        from online_fdr.p_values import Lond, LordPlusPlus
    except ImportError as error:
        raise MissingExtraError('online selection requires `pip install "farout[monitor]"`') from error
    if method == "lond":
        # the first levels are those of Javanmard and Montanari, alpha_t = beta_t (D + 1) for D discoveries so far; only
        # beta_t max(D, 1) is proven for positively dependent p-values (Zrnic et al. 2021)
        return Lond(fdr, original=False)
    if method == "lord++":
        return LordPlusPlus(fdr, wealth=fdr / 2)
    raise FaroutError(f"fdr_method is {method!r}; expected lond or lord++")


def _to_json(logarithms: np.ndarray) -> list[float | None]:
    return [None if value == -np.inf else float(value) for value in logarithms]


def _from_json(logarithms: list[float | None]) -> np.ndarray:
    return np.array([-np.inf if value is None else value for value in logarithms])
