"""The measuring half of headsplat: metrics, protocols, result rows, tracking and reports."""

from eval import metrics
from eval.evaluate import Made, evaluate
from eval.protocol import Protocol
from eval.rows import Row, read_rows
from eval.sheets import comparison_sheet, contact_sheet
from eval.tables import table
from eval.validate import Validation, validation

__all__ = [
    "Made",
    "Protocol",
    "Row",
    "Validation",
    "comparison_sheet",
    "contact_sheet",
    "evaluate",
    "metrics",
    "read_rows",
    "table",
    "validation",
]
