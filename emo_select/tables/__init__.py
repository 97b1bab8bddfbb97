"""Read a tree of runs, aggregate, and write tables, figures, the report and comparisons.

    load_tree → Records → (Filters, Layout) → tables → render / write_tables
"""

from emo_select.tables.layout import Layout, load_layout
from emo_select.tables.main import CHECKPOINTS
from emo_select.tables.make import make, problems_table
from emo_select.tables.pool import Filters
from emo_select.tables.read import Problem, Records, Result, Run, Setting, load_tree
from emo_select.tables.write import Table, render, write_tables

__all__ = [
    "CHECKPOINTS", "Filters", "Layout", "Problem", "Records", "Result", "Run", "Setting", "Table", "load_layout",
    "load_tree", "make", "problems_table", "render", "write_tables",
]
