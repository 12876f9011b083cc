"""Published figures that can be reproduced on a CPU, one file per publication.

`python -m benchmarks.published` prints all tables, `python -m benchmarks.published NAME` one:
damped, das, denoisers, fmrg, mfm, ring. The ring without search is in `benchmarks.toys`.
"""
