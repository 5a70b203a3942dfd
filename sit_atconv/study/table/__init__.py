"""The table of a paper: `python evaluate_fid.py table RUN … --out DIR --reference REF --guidance SCALE`."""

from sit_atconv.study.table.command import main

__all__ = ["main"]
