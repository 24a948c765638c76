"""What was a measure in the last so many seconds?

The autoscalers that are compared with Shoal all look at averages over a sliding window. Here it is
a value: spans of time with the mean of each, of which the window weighs what still lies in it.

      spans    ├── 4.0 ──┤├── 6.0 ──┤├─ 2.0 ─┤
      window              └─────── length_s ─┘ now

It does not know what the measure is, nor how often it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """The last `length_s` of a measure, as spans (from, to, mean) in the order of time."""

    length_s: float
    spans: tuple[tuple[float, float, float], ...] = ()

    def then(self, from_s: float, to_s: float, value: float) -> Window:
        """The window moved to `to_s`, with one more span; spans that left it are forgotten."""
        return self.then_all(((from_s, to_s, value),))

    def then_all(self, spans: tuple[tuple[float, float, float], ...]) -> Window:
        """The same with several spans, in the order of time; with none it is unchanged."""
        if not spans:
            return self
        start_s = spans[-1][1] - self.length_s
        kept = tuple(span for span in self.spans if span[1] > start_s)
        return Window(self.length_s, kept + spans)

    def mean(self, now_s: float, last_s: float | None = None) -> float:
        """The mean over the last `last_s` (or all) of what was seen of it; 0 if nothing was."""
        total, seen_s = self._sum(now_s, self.length_s if last_s is None else last_s)
        return total / seen_s if seen_s > 0 else 0.0

    def mean_of_whole(self, now_s: float) -> float:
        """The mean over the whole length; what was not seen counts as 0."""
        return self._sum(now_s, self.length_s)[0] / self.length_s

    def _sum(self, now_s: float, last_s: float) -> tuple[float, float]:
        start_s = now_s - last_s
        total = seen_s = 0.0
        for from_s, to_s, value in reversed(self.spans):
            if to_s <= start_s:
                break
            inside_s = to_s - max(from_s, start_s)
            total += value * inside_s
            seen_s += inside_s
        return total, seen_s


def arrival_spans(
    now_s: float, arrivals: tuple[float, ...], bin_s: float
) -> tuple[tuple[float, float, float], ...]:
    """Counts in bins of `bin_s`, the last of which ends at `now_s`, as spans of a rate in rps."""
    first_s = now_s - len(arrivals) * bin_s
    return tuple(
        (first_s + k * bin_s, first_s + (k + 1) * bin_s, count / bin_s)
        for k, count in enumerate(arrivals)
    )
