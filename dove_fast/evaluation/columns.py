"""What tables and plots show of an evaluation's rows: each measure's name, its unit and digits, in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dove_fast.evaluation.results import QualityRow, Spread

__all__ = ["COSTS", "MEASURES", "Column", "measured"]


@dataclass(frozen=True)
class Column:
    """One measure of `QualityRow`. unit: what stands behind its name, or how to read it. digits: behind the point."""

    name: str
    unit: str
    digits: int
    value: Callable[[QualityRow], Spread | float | None]

    @property
    def label(self) -> str:
        """The name with the unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def mean(self, row: QualityRow) -> float | None:
        """Return the row's number, of a spread its mean; None where it was not measured."""
        value = self.value(row)
        return value.mean if isinstance(value, Spread) else value

    def text(self, row: QualityRow, none: str = "-") -> str:
        """Return the number as text, `none` where there is none."""
        mean = self.mean(row)
        return none if mean is None else f"{mean:,.{self.digits}f}"


MEASURES = (
    Column("PSNR", "dB", 2, lambda row: row.psnr),
    Column("SSIM", "", 4, lambda row: row.ssim),
    Column("LPIPS", "lower is better", 4, lambda row: row.lpips),
    Column("rFID", "lower is better", 2, lambda row: row.rfid),
)
COSTS = (
    Column("GFLOP an image", "", 2, lambda row: row.gflop),
    Column("bytes an image", "", 0, lambda row: row.token_bytes),
)


def measured(columns: Sequence[Column], rows: Sequence[QualityRow]) -> list[Column]:
    """Return the columns that have a number in one of the rows at least."""
    return [column for column in columns if any(column.mean(row) is not None for row in rows)]
