"""What a person sees of a run: live progress, figures, example pictures, report.html, comparison.

Everything here reads the files of a run folder, never the memory of a run: a report can be made again
at any time, also while the run goes on.
"""
